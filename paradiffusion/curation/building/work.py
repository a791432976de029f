"""Tasks shared out among processes, with progress from within them; an interrupt ends all of them at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any, Final

from tqdm import tqdm

from paradiffusion.errors import UserError

Report = Callable[[int], None]
"""Tells that so many more items are done."""

_LINE_SECONDS: Final = 30.0  # between the lines of a log file
_ASK_SECONDS: Final = 2.0
_STOPS: Final = (signal.SIGINT, signal.SIGTERM)
_stop: Final = threading.Event()


class EndedFromOutside(UserError):
    """A working process was killed; what is done stays, and the same command goes on."""


def run_tasks(
    function: Callable[[Any, Report], Any], tasks: Sequence[Any], processes: int, report: Report
) -> Iterator[tuple[int, Any]]:
    """(number, result) of ``function(task, report)`` for each task, as they are done, on up to ``processes`` processes.

    Tasks and results are pickled, ``function`` need not be where processes are forked (Linux). What a task raises is
    raised here; a process that is killed from outside (most often for want of memory) is a UserError.
    """
    count = min(processes, len(tasks))
    if count <= 1:
        for number, task in enumerate(tasks):
            yield number, function(task, report)
            _check_stop()
        return
    context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    workers: dict[Connection, Any] = {}
    waiting = deque(enumerate(tasks))
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(function, theirs, os.getpid()), daemon=True)
            with _unhindered():
                worker.start()
            theirs.close()  # else the end of the child would not show as the end of its pipe
            workers[ours] = worker
            ours.send(waiting.popleft())
        busy = set(workers)
        while busy:
            _check_stop()
            for pipe in wait(list(busy), _ASK_SECONDS):
                assert isinstance(pipe, Connection)
                kind, number, value = _receive(pipe, workers[pipe])
                if kind == "progress":
                    report(value)
                    continue
                if kind == "error":
                    raise value
                if waiting:
                    pipe.send(waiting.popleft())
                else:
                    busy.remove(pipe)
                yield number, value
    finally:
        for pipe, worker in workers.items():
            worker.terminate()
            worker.join()
            pipe.close()


@contextmanager
def _unhindered() -> Iterator[None]:
    """No stop comes in within: neither into the hooks around a fork, nor to a child that still has its parent's handlers."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _receive(pipe: Connection, worker: Any) -> tuple[str, int, Any]:
    try:
        message: tuple[str, int, Any] = pipe.recv()
        return message
    except (EOFError, ConnectionResetError):
        worker.join(10)
        raise EndedFromOutside(
            f"A working process was ended from outside (status {worker.exitcode}), most often for want of memory; run the "
            "same command with fewer processes=, it goes on where it stopped."
        ) from None


def _work(function: Callable[[Any, Report], Any], pipe: Connection, parent: int) -> None:
    # Ctrl-C reaches the whole group: the parent alone answers it, and ends its children.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
    while True:
        while not pipe.poll(_ASK_SECONDS):
            if os.getppid() != parent:
                return
        try:
            number, task = pipe.recv()
        except EOFError:
            return
        try:
            result = function(task, partial(_tell, pipe, number))
        except (BrokenPipeError, ConnectionResetError):  # the parent is gone
            return
        except (UserError, OSError) as error:
            pipe.send(("error", number, error))
        except BaseException:
            pipe.send(("error", number, RuntimeError(f"in a working process:\n{traceback.format_exc()}")))
        else:
            pipe.send(("done", number, result))


def _tell(pipe: Connection, number: int, more: int) -> None:
    pipe.send(("progress", number, more))


@contextmanager
def progress(what: str, unit: str, total: int | None, done: int = 0) -> Iterator[Report]:
    """A bar with rate and time left; where standard error is no terminal, a line now and then instead."""
    if sys.stderr.isatty():
        with tqdm(total=total, initial=done, desc=what, unit=f" {unit}", smoothing=0.1) as bar:

            def advance(more: int) -> None:
                bar.update(more)

            yield advance
        return
    start = last = time.monotonic()
    count = done

    def show() -> None:
        spent = time.monotonic() - start
        # tqdm takes None for an unknown total, which its types do not say.
        total_or_none: Any = total
        line = tqdm.format_meter(count, total_or_none, spent, ncols=0, prefix=what, unit=f" {unit}", initial=done)
        print(line, file=sys.stderr, flush=True)

    def report(more: int) -> None:
        nonlocal count, last
        count += more
        if time.monotonic() - last >= _LINE_SECONDS:
            last = time.monotonic()
            show()

    yield report
    show()


@contextmanager
def ended_like_interrupted() -> Iterator[None]:
    """SIGTERM (a scheduler's stop) raises KeyboardInterrupt within, as Ctrl-C does.

    An exception out of a handler is lost where Python runs a hook, as it does around every fork; so the wish is kept, and
    ``run_tasks`` asks for it again.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        _stop.set()
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # only the main thread may have handlers
        yield
        return
    _stop.clear()
    before = {number: signal.signal(number, interrupt) for number in _STOPS}
    try:
        yield
        _check_stop()
    finally:
        _stop.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_stop() -> None:
    if _stop.is_set():
        raise KeyboardInterrupt
