"""Watch over a run's processes: one that hangs or dies is named with its last place, and an error of any of them ends all.

A collective operation that waits for a process which hangs or has died ends, after long minutes, in a time-out that names
neither. Here each process posts its step, phase and samples in a key-value store (torch's TCPStore, which the main process
keeps), and compares them once it has waited long. Whoever asks the store may wait without end for a main process that is
stopped: torch has no time limit there, so one thread talks to the store, and another, which never does first, judges.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from paradiffusion.errors import UserError

# In the order in which a step goes through them; of two processes in one step the one in the earlier phase is behind.
# What follows the n-th step, a save and a validation, comes before the data of step n, counted from 0.
PHASES = ("setup", "save", "validate", "data", "encode", "forward", "compile", "backward", "wait", "update", "done")
# These may rightly take long, so all processes together in one of them are no stall.
LONG = ("setup", "validate", "save", "compile")
STALLED, FAILED = 3, 2  # exit statuses
SHOWN = 8
# Seconds that a process has for leaving by itself once another has failed.
GRACE = 5.0
# Seconds between two messages to the store from the steps themselves; the thread sends its own besides.
PROMPT = 0.05


@dataclass
class Place:
    """Where a process is; it came there ``at``, and its thread last said so ``alive`` (seconds since the epoch)."""

    rank: int = 0
    host: str = "unknown machine"
    step: int = 0
    phase: str = "setup"
    keys: list[str] = field(default_factory=list)
    at: float = 0.0
    alive: float = 0.0


def describe_stall(places: list[Place], now: float, seconds: float, silence: float | None = None) -> str | None:
    """One sentence about the processes that are behind, or None while none has been in its place for ``seconds``; after ``silence``
    seconds (None: as many) without a sign of life a process counts as dead."""
    waiting = [place for place in places if place.phase != "done"]
    progress = [(place.step, PHASES.index(place.phase)) for place in waiting]
    behind = [place for place, come in zip(waiting, progress, strict=True) if come == min(progress)]
    dead = [place for place in waiting if now - place.alive > (seconds if silence is None else silence)]
    named = dead or behind
    long = not dead and all(place.phase in LONG for place in behind)
    at_work = long and (len(behind) == len(waiting) or behind[0].phase == "compile")  # its shapes may be new to one alone
    if at_work or min(now - place.at for place in named) < seconds:
        return None
    parts = []
    for place in named[:SHOWN]:
        where = f"phase {place.phase!r} of step {place.step}"
        lost = f"gave its last sign of life {now - place.alive:.0f} s ago, in {where}"
        told = lost if place in dead else f"has been in {where} for {now - place.at:.0f} s"
        more = f" and {len(place.keys) - SHOWN} more" if len(place.keys) > SHOWN else ""
        keys = f", samples {', '.join(place.keys[:SHOWN])}{more}" if place.keys else ""
        parts.append(f"process {place.rank} ({place.host}) {told}{keys}")
    return "; ".join(parts) + (f", and {len(named) - SHOWN} more" if len(named) > SHOWN else "")


class Watch:
    """This process's place, and what it knows of the others', which may stay in one place for so many ``seconds``; of a single process
    that is only told. ``on_leave`` is called before the watch ends the process, which no other clean-up survives; ``failing`` says whether
    any process has said that it ends with an error, as far as is known."""

    def __init__(self, rank: int, world_size: int, seconds: float) -> None:
        self.world_size, self.seconds = world_size, seconds
        self.on_leave: Callable[[], None] = lambda: None
        self.interval = min(max(seconds / 10, 0.2), 2.0)
        self._silence = 3 * self.interval  # after which a process counts as dead, where a connection broke
        self._ahead = 0.0  # this machine's clock before the main process's
        self._store = self._open_store(rank) if world_size > 1 else None
        now = self._heard = self._told = self.now()
        self.place = Place(rank, socket.gethostname(), at=now, alive=now)
        self.known = [Place(other, at=now, alive=now) for other in range(world_size)]
        self._ended, self.failing = threading.Event(), threading.Event()
        work = (self._judge, self._talk)
        self._threads = [threading.Thread(target=target, name="watch", daemon=True) for target in work]
        for thread in self._threads:
            thread.start()

    def now(self) -> float:
        """Seconds since the epoch by the main process's clock, since those of several machines may differ."""
        return time.time() - self._ahead

    def beat(self, phase: str, step: int, keys: list[str] | None = None) -> None:
        """Come to ``phase`` of ``step`` with the samples ``keys`` (None: the same as before)."""
        place = self.place
        place.phase, place.step, place.at = phase, step, self.now()
        place.keys = place.keys if keys is None else keys
        if place.at - place.alive > PROMPT:  # a process that is killed right here cannot say so later
            self._post()

    def fail(self) -> bool:
        """Say that this process ends with an error, so that no other waits for it; whether it is the first to say so."""
        if self.failing.is_set():
            return False
        first = (self._ask("add", "failures", 1) or 0) <= 1
        self._notice()
        return first

    def close(self) -> None:
        """The end of the watch; the other processes are told that this one is done."""
        self.place.phase, self.place.keys = "done", []
        self._ended.set()
        for thread in self._threads:
            thread.join(timeout=5)
        if not any(thread.is_alive() for thread in self._threads):  # else the store does not answer
            self._post()
            self._linger()

    def who_is_lost(self) -> str | None:
        """After a connection broke: who no longer gives signs of life, in one sentence, or None when all do, or when one
        has said itself that it ends."""
        deadline = time.monotonic() + max(10.0, 2 * self._silence)
        while time.monotonic() < deadline and not self.failing.wait(min(self.interval / 2, 0.25)):
            self._read(range(self.world_size))
            now = self.now()
            lost = [place for place in self._places() if now - place.alive > self._silence and place.phase != "done"]
            if lost:
                return describe_stall(lost, now, 0.0, self._silence)
        return None

    def _open_store(self, rank: int) -> dist.TCPStore:
        """A store of our own: the process group's is not public, and goes with it."""
        host, patience = os.environ.get("MASTER_ADDR", "localhost"), timedelta(seconds=60)
        store = dist.TCPStore(host, 0, None, True, patience, wait_for_workers=False) if rank == 0 else None
        dist.barrier()  # so that all of them look at their clocks at the same time
        found: list[tuple[float, int]] = [(0.0, 0)] * self.world_size
        dist.all_gather_object(found, (time.time(), store.port if store else 0))
        self._ahead = found[rank][0] - found[0][0]
        return store or dist.TCPStore(host, found[0][1], None, False, patience, wait_for_workers=False)

    def _ask(self, request: str, *values: Any) -> Any:
        """The store's answer; None once it has gone, and where there is none."""
        store = self._store  # which the other thread may find gone meanwhile
        try:
            return getattr(store, request)(*values) if store is not None else None
        except (RuntimeError, OSError):
            self._store = None
            return None

    def _post(self) -> None:
        self.place.alive = self.now()
        if not self.failing.is_set():  # the store may go at any moment once a process has failed
            self._ask("set", f"place/{self.place.rank}", json.dumps(asdict(self.place)))

    def _read(self, ranks: range) -> None:
        for rank in ranks:
            if self._ask("check", [f"place/{rank}"]) and (found := self._ask("get", f"place/{rank}")):
                self.known[rank] = Place(**json.loads(found))

    def _talk(self) -> None:
        """Post and read, until this process or any other ends."""
        while not self.failing.is_set():
            self._post()
            # To read them all is much work where they are thousands: only once this one waits.
            self._read(range(self.world_size if self.now() - self.place.at > self.seconds / 2 else 1))
            if self._ask("check", ["failures"]):
                self._notice()
            if self._store is not None:
                self._heard = self.now()
            if self._ended.wait(self.interval):
                return

    def _judge(self) -> None:
        """End this process where it would wait without end."""
        before = self.now()
        while not self._ended.wait(self.interval):
            now = self.now()
            if now - before > max(4 * self.interval, 5.0):
                self.place.at = self._heard = now  # this process itself stood still, as on a machine that was suspended
            before = now
            if self.failing.is_set():
                if not self._ended.wait(GRACE):
                    self._leave(FAILED)
            elif now - self.place.at > self.seconds:
                self._accuse(describe_stall(self._places(), now, self.seconds))

    def _accuse(self, sentence: str | None) -> None:
        """Tell who is behind, and leave; a single process is only told."""
        if sentence is None:
            return
        if self.world_size == 1:
            if self.now() - self._told >= self.seconds:
                self._told = self.now()
                print(f"warning: no step for a while: {sentence}.", file=sys.stderr, flush=True)
        elif not self._answers() or self.fail():  # else another has told it
            print(
                f"error: {sentence}; process {self.place.rank} ends here. The last checkpoint is whole: look at that process "
                "or its data, then run the same command again (a slow machine: raise stall_seconds=).",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            self._linger()
            self._leave(STALLED)

    def _answers(self) -> bool:
        return self._store is not None and self.now() - self._heard < self._silence

    def _places(self) -> list[Place]:
        """Everybody's place. While the store does not answer only the main process is known to be silent."""
        known = self.known if self._answers() else self.known[:1]
        others = [place for place in known if place.rank != self.place.rank]
        return [*others, replace(self.place, alive=self.now())]

    def _notice(self) -> None:
        self.failing.set()
        self._ask("set", f"noticed/{self.place.rank}", "")

    def _linger(self) -> None:
        """The store goes with the main process: where one has failed, all must have looked before. One process alone has none."""
        if self.world_size == 1:
            return
        deadline = time.monotonic() + 2 * self.interval + 1
        everybody = [f"noticed/{rank}" for rank in range(self.world_size)]
        while self.failing.is_set() and self.place.rank == 0 and time.monotonic() < deadline:
            if self._ask("check", everybody):
                return
            time.sleep(0.05)

    def _leave(self, status: int) -> None:
        """End the process: its main thread waits inside a collective operation, which nothing else ends."""
        self.on_leave()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@contextmanager
def together(watch: Watch) -> Iterator[None]:
    """Around all of a run's work: an error of any process ends all, promptly, and is told once. Closes ``watch``.

    Raises UserError in the process that failed first, or in the first to notice that another has died; SystemExit in the others,
    without a word of their own: what they would say is the same, or a consequence.
    """
    try:
        yield
    except SystemExit:  # all of them leave, and have agreed on it
        raise
    except BaseException as error:
        told = what_to_tell(error, watch)
        first = watch.fail()
        if told is None:
            raise
        raise told if first else SystemExit(FAILED) from None
    finally:
        watch.close()


def what_to_tell(error: BaseException, watch: Watch) -> UserError | None:
    """What a person is told of an error that ends this process; None for a bug, which keeps its traceback."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        return UserError(
            f"a batch does not fit into this GPU's memory ({str(error).splitlines()[0]}); lower micro_batch_size= first, then "
            "set gradient_checkpointing=true, ema_device=cpu, or launch with configs/launch/zero2.yaml or zero2_offload.yaml (and "
            "for a run that has not begun, text_encoder.quantization=4bit); scripts/describe.py says what each saves."
        )
    # A collective operation fails where another process has died.
    said = isinstance(error, RuntimeError) and any(sign in str(error) for sign in ("gloo", "NCCL", "Connection"))
    if said or isinstance(error, dist.DistError):
        lost = watch.who_is_lost()
        if lost is not None or watch.failing.is_set():
            return UserError(
                f"{lost}; the others cannot go on without it. The last checkpoint is whole: look at that process's log, then "
                "run the same command again."
            )
    return None
