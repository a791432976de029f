"""Where the repository is, and waiting for what another process does."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARITY = ROOT.parent / "shared" / "assets" / "parity"


def wait_for(condition: Callable[[], bool], timeout: float = 120, interval: float = 0.05) -> None:
    """Wait until ``condition()`` holds; fail after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(interval)
