"""Where the repository is, waiting for what another process does, and the sentence that a user's mistake ends with."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paradiffusion.errors import UserError

Command = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).resolve().parents[2]
PARITY = ROOT.parent / "shared" / "assets" / "parity"


def wait_for(condition: Callable[[], bool], timeout: float = 120, interval: float = 0.05) -> None:
    """Wait until ``condition()`` holds; fail after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(interval)


def user_error(said: str, call: Callable[..., object], *given: Any, **named: Any) -> str:
    """The one sentence, in which ``said`` is found, of the UserError that ``call(...)`` ends with."""
    with pytest.raises(UserError, match=said) as caught:
        call(*given, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)
