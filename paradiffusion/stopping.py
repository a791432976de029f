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


class Stopped(Exception):
    """A signal asked the process to stop."""


@dataclass
class StopSignal:
    """Whether SIGINT or SIGTERM came."""

    came_at: float | None = None

    def check(self) -> None:
        """Raise Stopped once a signal has come."""
        if self.came_at is not None:
            raise Stopped

    def handle(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.came_at is not None and number == signal.SIGINT and now - self.came_at > REPEAT_SECONDS:
            raise KeyboardInterrupt
        self.came_at = self.came_at or now


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
