"""Process pool: tasks with progress from within them, on processes that end with this one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from tqdm import tqdm

from paradiffusion.errors import UserError
from paradiffusion.machine import start_method

Tell = Callable[[int], object]
"""Tells that so many more items are done."""
# What a process of a pool was started with: the function, its own number, and its place in the table of counts.
_OWN: dict[str, Any] = {}


class EndedFromOutside(UserError):
    """A working process was killed; what is done stays, and the same command goes on."""


def make_bar(what: str, unit: str, total: int | None, done: int = 0, shown: bool = True) -> tqdm[Any]:
    """A bar with rate and time left; in a log file, a line every half minute."""
    slow = not sys.stderr.isatty()
    return tqdm(
        total=total, initial=done, desc=what, unit=f" {unit}", disable=not shown, smoothing=0.05,
        dynamic_ncols=not slow, mininterval=30 if slow else 0.2, maxinterval=60 if slow else 10,
    )  # fmt: skip


def run_tasks(
    what: str, unit: str, total: int | None, function: Callable[[Any, Tell], Any], tasks: Sequence[Any], processes: int,
    check: Callable[[], None], done: int = 0, start: str | None = None, shown: bool = True,
) -> list[Any]:  # fmt: skip
    """``function(task, tell)`` of each task, in their order, on up to ``processes`` processes, under a bar of ``total`` items.

    ``check`` is called between items, or every half second; what it raises ends the processes at once. ``start`` is "spawn" where a GPU
    needs it, else ``start_method()``; ``function`` is pickled by "spawn" alone. What a task raises is raised here; a process
    that is killed from outside (most often for want of memory) is EndedFromOutside."""
    with make_bar(what, unit, total, done, shown) as bar:
        return _run(function, tasks, processes, bar, check, start or start_method())


def _run(
    function: Callable[[Any, Tell], Any], tasks: Sequence[Any], processes: int, bar: tqdm[Any], check: Callable[[], None],
    start: str,
) -> list[Any]:  # fmt: skip
    def tell(more: int) -> None:
        bar.update(more)
        check()

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


def _count(more: int) -> None:
    _OWN["counts"][_OWN["number"]] += more
