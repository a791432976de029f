"""A stage for workers of Ray, which import this file and none of the tests."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from paradiffusion.atomic import write_atomic
from paradiffusion.errors import UserError
from paradiffusion.runner import Tell


class Stage:
    """Squares; 0 is slow, so that others end before it, 5 kills its first worker, 11 is a user's mistake, 12 kills every worker, and 13 the
    first time the workers of 20 to 24, which are idle by then, and its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, task: int, tell: Tell) -> int:
        mark = self.folder / str(task)
        if task == 12 or (task == 5 and not mark.exists()):
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if task == 0:
            time.sleep(2)
        if task >= 20:
            write_atomic(mark, str(os.getpid()))
        if task >= 13:  # each has a worker of its own
            marks = [self.folder / str(number) for number in range(20, 25)]
            while not all(one.exists() for one in marks):
                time.sleep(0.1)
            if task == 13 and not mark.exists():
                mark.touch()
                time.sleep(3)
                for worker in [*(int(one.read_text()) for one in marks), os.getpid()]:
                    os.kill(worker, signal.SIGKILL)
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
