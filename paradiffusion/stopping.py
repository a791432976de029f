"""Stop signal: Ctrl-C and SIGTERM are noted, and asked for between items, so that nothing is left half done."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

REPEAT_SECONDS = 2.0  # launchers pass Ctrl-C on to processes that the terminal has told already


class Stopped(KeyboardInterrupt):
    """A signal, Ctrl-C or another, asked the process to stop; ``status`` is that of StopSignal."""

    def __init__(self, status: int = 128 + signal.SIGTERM) -> None:
        super().__init__()
        self.status = status


@dataclass
class StopSignal:
    """Whether SIGINT or SIGTERM came.

    Attributes:
        status: what a program that a signal stopped exits with: 128 + the signal's number, as a shell tells it, so that a command
            behind ``&&`` does not start. Where another process was told, as if this one had been.
    """

    came_at: float | None = None
    status: int = 128 + signal.SIGTERM

    def check(self) -> None:
        """Raise Stopped once a signal has come."""
        if self.came_at is not None:
            raise Stopped(self.status)

    def handle(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.came_at is not None and number == signal.SIGINT and now - self.came_at > REPEAT_SECONDS:
            raise KeyboardInterrupt
        if self.came_at is None:
            self.came_at, self.status = now, 128 + number


@contextmanager
def stop_on_signals() -> Iterator[StopSignal]:
    """Note SIGINT and SIGTERM instead of dying of them; a second Ctrl-C after two seconds does kill."""
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield stop
        return
    before = {number: signal.signal(number, stop.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
