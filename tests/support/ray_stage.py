"""A stage for workers of Ray, which import this file and none of the tests."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from paradiffusion.errors import UserError
from paradiffusion.runner import Tell


class Stage:
    """Squares; 0 is slow, so that others end before it, 5 kills its first worker, 11 is a user's mistake, and 12 kills every worker."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, task: int, tell: Tell) -> int:
        mark = self.folder / str(task)
        if task == 12 or (task == 5 and not mark.exists()):
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if task == 0:
            time.sleep(2)
        if task == 11:
            raise UserError("task 11 cannot be done.")
        tell(1, odd=task % 2)
        return task * task


def rank(folder: Path) -> list[str]:
    """As a rank of a job, of which number 1 kills itself the first time; who it is."""
    mark = folder / "rank"
    if os.environ["RANK"] == "1" and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]
