"""Runner: tasks that go on from their files, on processes of this machine that end with this one, or on Ray's workers."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any, Protocol

from tqdm import tqdm

from paradiffusion.checks import not_understood, one_of, parsed, positive
from paradiffusion.config import option
from paradiffusion.errors import UserError
from paradiffusion.machine import start_method

# What a process of a pool was started with: the function, its own number, and its place in the table of counts.
_OWN: dict[str, Any] = {}


class Tell(Protocol):
    """Tells of items as a task goes: ``done`` now, ``found`` finished before, ``more`` to do than was thought; and of those done how many
    were of which kind ("rejected"). In the process that a person sees it raises what stops the work."""

    def __call__(self, done: int = 0, /, found: int = 0, more: int = 0, **kinds: int) -> None: ...


Work = Callable[[Any, Tell], Any]  # a function, or an object that loads its model at its first task


class EndedFromOutside(UserError):
    """A working process was killed; what is done stays, and the same command goes on."""


@dataclass(frozen=True)
class RayOptions:
    """What ``runner_options=`` may say. ``workers`` of None are as many as the cluster has room for, ``gpus`` of None one for each worker
    where the cluster has any; a worker computes with ``cpus`` threads."""

    address: str | None = None
    workers: int | None = None
    cpus: float = 1.0
    gpus: float | None = None


@dataclass
class RunnerKeys:
    """The keys that say where the work runs. They are part of no result's identity: one runner goes on with what another began."""

    runner: str = option("local", accepts=one_of("local", "ray"))
    runner_options: str | None = None

    def ray(self, model: bool = True) -> RayOptions | None:
        """How Ray is to be used, by default without GPUs for work that needs no ``model``; None for the local runner. Raises UserError for
        what cannot be meant."""
        example = "{address: auto, workers: 8, cpus: 4, gpus: 1}"
        given = parsed("runner_options", self.runner_options, example) or {}
        if self.runner == "local":
            if given:
                raise UserError("runner_options= are for runner=ray; add that, or leave them out.")
            return None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("runner=ray starts workers of its own; start the command with python, not with accelerate or torchrun.")
        if not isinstance(given, dict) or not set(given) <= set(RayOptions.__dataclass_fields__):
            raise not_understood("runner_options", self.runner_options, example)
        for key in {"workers", "cpus", "gpus"} & set(given):
            whole = key == "workers"
            if not isinstance(given[key], int if whole else int | float):
                raise not_understood("runner_options", self.runner_options, example)
            positive(f"runner_options.{key}", given[key], zero=key == "gpus")
        found = RayOptions(**given)
        return found if model or "gpus" in given else replace(found, gpus=0.0)


def make_bar(what: str, unit: str, total: int | None, done: int = 0, shown: bool = True) -> tqdm[Any]:
    """A bar with rate and time left; in a log file, a line every half minute."""
    slow = not sys.stderr.isatty()
    return tqdm(
        total=total, initial=done, desc=what, unit=f" {unit}", disable=not shown, smoothing=0.05,
        dynamic_ncols=not slow, mininterval=30 if slow else 0.2, maxinterval=60 if slow else 10,
    )  # fmt: skip


class Progress:
    """``Tell`` of the process that a person sees: moves ``bar``, calls ``check``. Counts may be negative, for what was told and lost."""

    def __init__(self, bar: tqdm[Any], check: Callable[[], None]) -> None:
        self.bar, self.check, self.kinds = bar, check, Counter[str]()

    def __call__(self, done: int = 0, /, found: int = 0, more: int = 0, **kinds: int) -> None:
        bar = self.bar
        if not bar.disable:
            if more:
                bar.total = (bar.total or 0) + more
            if found:  # the rate is that of what is made
                bar.n, bar.initial, bar.last_print_n = bar.n + found, bar.initial + found, bar.last_print_n + found
            self.kinds.update(kinds)
            if self.kinds and (made := bar.n + done - bar.initial) > 0:
                told = [f"{kind} {count / made:.0%}" for kind, count in self.kinds.most_common(4) if count > 0]
                bar.set_postfix_str(", ".join(told), refresh=False)
            bar.update(done)
        self.check()


def run_tasks(
    bar: tqdm[Any], function: Work, tasks: Sequence[Any], check: Callable[[], None], on: int | RayOptions = 1, start: str | None = None
) -> list[Any]:
    """``function(task, tell)`` of each task, in their order, under a ``bar`` of items, ``on`` up to so many processes or on Ray's workers.

    ``check`` is called between items, or every second; what it raises ends the processes at once. ``start`` is "spawn" where a GPU
    needs it, else ``start_method()``; ``function`` is pickled by "spawn" and for Ray alone. What a task raises is raised here; a process
    that is killed from outside (most often for want of memory) is EndedFromOutside, but for Ray's: another worker takes its task."""
    with bar:
        progress = Progress(bar, check)
        if isinstance(on, int):
            return _run(function, tasks, on, progress, start or start_method())
        from paradiffusion import ray_pool

        ray_pool.connect(on)
        bar.unpause()  # a cluster that starts is no slow work
        return ray_pool.run_on_ray(function, tasks, progress, on)


def _run(function: Work, tasks: Sequence[Any], processes: int, tell: Progress, start: str) -> list[Any]:
    count = min(processes, len(tasks))
    if count <= 1:
        return [function(task, tell) for task in tasks]
    context: Any = multiprocessing.get_context(start)
    # A slot for each process, without a lock that a killed one could hold for ever.
    counts, numbers = context.RawArray("q", count), context.SimpleQueue()
    for number in range(count):
        numbers.put(number)
    theirs, ours = context.Pipe(duplex=False)  # nothing is sent: its end tells the processes to end
    pool = ProcessPoolExecutor(count, context, _begin, (function, counts, numbers, theirs, ours))
    told = 0
    try:
        futures = [pool.submit(_work, task) for task in tasks]
        pending = set(futures)
        while pending:
            finished, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in finished:
                future.result()
            told, before = sum(counts), told
            tell(told - before)
        return [future.result() for future in futures]
    except BrokenProcessPool:
        raise EndedFromOutside(
            "A working process was ended from outside, most often for want of memory; run the same command with fewer "
            "processes= (or a smaller batch_size=, where there is one): it goes on where it stopped."
        ) from None
    finally:
        ours.close()
        pool.shutdown(cancel_futures=True)
        theirs.close()


def process_number() -> int:
    """Which process of its pool this one is, from 0; 0 outside of one."""
    return int(_OWN.get("number", 0))


def _begin(function: Any, counts: Any, numbers: Any, pipe: Connection, ours: Connection) -> None:
    # Ctrl-C reaches the whole group: the parent alone answers it, and ends its children.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ours.close()  # else the end of the parent's would not show
    threading.Thread(target=_end_with, args=(pipe,), daemon=True).start()
    _OWN.update(function=function, counts=counts, number=numbers.get())


def _end_with(pipe: Connection) -> None:
    with suppress(EOFError, OSError):
        pipe.recv_bytes()
    os._exit(1)


def _work(task: Any) -> Any:
    return _OWN["function"](task, _count)


def _count(done: int = 0, /, found: int = 0, more: int = 0, **kinds: int) -> None:
    _OWN["counts"][_OWN["number"]] += done + found
