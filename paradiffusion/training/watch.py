"""Who is late: every process says where it is, and after a set time without a step the last one is named.

A collective operation that waits for a process which hangs or has died ends, after long minutes, in a time-out that
names neither. Here each process keeps its step, phase and samples in a small key-value store (torch's TCPStore, at the
main process), and a thread in each compares them.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta

import torch.distributed as dist

# In the order in which a step goes through them; of two processes in one step the one in the earlier phase is behind.
PHASES = ("setup", "data", "encode", "forward", "backward", "update", "wait", "validate", "save", "done")
# These may rightly take long, so all processes together in one of them are no stall.
LONG = ("setup", "validate", "save")
STALLED = 3  # exit status
SHOWN = 8
# Seconds between two messages to the store from the steps themselves; the thread sends its own besides.
PROMPT = 0.05


@dataclass
class Place:
    """Where a process is.

    Attributes:
        at: seconds since the epoch, when it came there.
        alive: when its thread last said so; old where the process has died or its machine is gone.
    """

    rank: int = 0
    host: str = ""
    step: int = 0
    phase: str = "setup"
    keys: list[str] = field(default_factory=list)
    at: float = 0.0
    alive: float = 0.0

    def progress(self) -> tuple[int, int]:
        return self.step, PHASES.index(self.phase)


def describe_stall(places: list[Place], now: float, seconds: float, silence: float | None = None) -> str | None:
    """One sentence about the processes that are behind, or None while none has been in its place for ``seconds``.

    Args:
        silence: after how many seconds without a sign of life a process counts as dead; None for ``seconds``.
    """
    waiting = [place for place in places if place.phase != "done"]
    if not waiting:
        return None
    last = min(place.progress() for place in waiting)
    behind = [place for place in waiting if place.progress() == last]
    dead = [place for place in waiting if now - place.alive > (seconds if silence is None else silence)]
    if not dead and len(behind) == len(waiting) and behind[0].phase in LONG:
        return None
    named = dead or behind
    if min(now - place.at for place in named) < seconds:
        return None
    parts = []
    for place in named[:SHOWN]:
        keys = ", ".join(place.keys[:SHOWN]) + (
            f" and {len(place.keys) - SHOWN} more" if len(place.keys) > SHOWN else ""
        )
        state = f"gave its last sign of life {now - place.alive:.0f} s ago, in" if place in dead else "has been in"
        parts.append(
            f"process {place.rank} ({place.host}) {state} phase {place.phase!r} of step {place.step}"
            + ("" if place in dead else f" for {now - place.at:.0f} s")
            + (f", samples {keys}" if keys else "")
        )
    more = f", and {len(named) - SHOWN} more" if len(named) > SHOWN else ""
    return "; ".join(parts) + more


class Watch:
    """This process's place, and the thread that looks after all of them.

    Args:
        seconds: how long a process may stay in one place.
        say: how the sentence is told.
    """

    def __init__(self, rank: int, world_size: int, seconds: float, say: Callable[[str], None] | None = None) -> None:
        self.place = Place(rank, socket.gethostname(), at=time.time(), alive=time.time())
        self.world_size, self.seconds = world_size, seconds
        self.say = say or (lambda text: print(text, file=sys.stderr, flush=True))
        self.interval = min(max(seconds / 10, 0.2), 2.0)
        self._ended = threading.Event()
        self._told = 0.0
        self._store = self._open_store() if world_size > 1 else None
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def _open_store(self) -> dist.TCPStore | None:
        """A store of our own: the process group's is not public, and goes with it."""
        host, patience = os.environ.get("MASTER_ADDR", "localhost"), timedelta(seconds=60)
        store, port = None, [0]
        if self.place.rank == 0:
            store = dist.TCPStore(host, 0, None, True, patience, wait_for_workers=False)
            port = [store.port]
        dist.broadcast_object_list(port, src=0)
        try:
            return store or dist.TCPStore(host, port[0], None, False, patience, wait_for_workers=False)
        except (RuntimeError, OSError) as error:
            self.say(f"warning: process {self.place.rank} cannot be watched ({str(error).splitlines()[0]}).")
            return None

    def beat(self, phase: str, step: int, keys: list[str] | None = None) -> None:
        """Come to ``phase`` of ``step`` with the samples ``keys`` (None: the same as before)."""
        place = self.place
        place.phase, place.step, place.at = phase, step, time.time()
        if keys is not None:
            place.keys = keys
        if place.at - place.alive > PROMPT:  # a process that is killed right here cannot say so later
            self._tell()

    def close(self) -> None:
        """The end of the watch; the other processes are told that this one is done."""
        self.beat("done", self.place.step, [])
        self._ended.set()
        self._thread.join(timeout=5)
        self._tell()

    def who_is_lost(self, patience: float = 10.0) -> str | None:
        """After a connection broke: who no longer gives signs of life, in one sentence, or None when all do."""
        silence = 3 * self.interval
        deadline = time.time() + max(patience, 2 * silence)
        while time.time() < deadline:
            now = time.time()
            lost = [place for place in self._places() if now - place.alive > silence and place.phase != "done"]
            if lost:
                return describe_stall(lost, now, 0.0, silence)
            time.sleep(self.interval / 2)
        return None

    def _run(self) -> None:
        while not self._ended.wait(self.interval):
            self._tell()
            if time.time() - self.place.at > self.seconds:
                self._judge()

    def _tell(self) -> None:
        self.place.alive = time.time()
        if self._store is None:
            return
        try:
            self._store.set(f"place/{self.place.rank}", json.dumps(asdict(self.place)))
        except (RuntimeError, OSError):
            self._store = None  # the main process is gone

    def _judge(self) -> None:
        """Tell and leave, where the process that is behind has been so for too long."""
        now = time.time()
        if self.world_size == 1:
            if now - self._told > self.seconds:
                self._told = now
                self.say(f"warning: no step for a while: {describe_stall([self.place], now, self.seconds)}.")
            return
        sentence = describe_stall(self._places(), now, self.seconds)
        if sentence is None:
            return
        self.say(
            f"error: {sentence}; process {self.place.rank} ends here. The last checkpoint is whole: look at that process "
            "or its data, then run the same command again (a slow machine: raise stall_seconds=)."
        )
        os._exit(STALLED)  # the main thread waits inside a collective operation, which nothing else ends

    def _places(self) -> list[Place]:
        """Everybody's place; of one who cannot be asked, what is known."""
        places = []
        for rank in range(self.world_size):
            known = self.place if rank == self.place.rank else self._ask(rank)
            places.append(known or Place(rank, "unknown machine", phase="setup"))
        return places

    def _ask(self, rank: int) -> Place | None:
        try:
            if self._store is not None and self._store.check([f"place/{rank}"]):
                return Place(**json.loads(self._store.get(f"place/{rank}")))
        except (RuntimeError, OSError, ValueError, TypeError):
            self._store = None
        if self._store is None and rank == 0:
            return Place(0, os.environ.get("MASTER_ADDR", "the main process's machine"), self.place.step, "setup")
        return None
