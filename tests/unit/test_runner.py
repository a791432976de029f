"""The pool that builds and scores share: order, progress, mistakes, killed processes, and a stop that ends them all."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from commands import user_error

from paradiffusion.errors import UserError
from paradiffusion.runner import EndedFromOutside, Tell, make_bar, process_number, run_tasks
from paradiffusion.stopping import stop_on_signals


def nothing() -> None:
    """No stop."""


def squared(task: int, tell: Tell) -> tuple[int, int]:
    time.sleep(0.01 * (3 - task % 4))
    tell(task)
    return task * task, process_number()


def refused(task: int, tell: Tell) -> None:
    if task == 2:
        raise UserError("task 2 cannot be done.")


def killed(task: int, tell: Tell) -> None:
    if task == 2:
        os.kill(os.getpid(), signal.SIGKILL)


def endless(task: str, tell: Tell) -> None:
    Path(task).write_text(str(os.getpid()))
    while True:
        time.sleep(0.1)


@pytest.mark.parametrize(("processes", "start"), [(1, "fork"), (3, "fork"), (2, "spawn")])
def test_results_come_in_the_order_of_the_tasks(processes: int, start: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_tasks(make_bar("squaring", "number", 45), squared, range(10), nothing, processes, start)
    assert [result for result, _ in found] == [number**2 for number in range(10)]
    assert {number for _, number in found} <= set(range(processes))
    assert "45/45" in capsys.readouterr().err


def test_a_mistake_is_told_and_a_killed_process_too() -> None:
    user_error("task 2 cannot be done", run_tasks, make_bar("working", "task", 5), refused, range(5), nothing, 2)
    with pytest.raises(EndedFromOutside, match="fewer processes="):
        run_tasks(make_bar("working", "task", 5), killed, range(5), nothing, 2)


def test_a_stop_ends_all_processes_at_once(tmp_path: Path) -> None:
    places = [str(tmp_path / name) for name in "ab"]

    def stop_once_they_work() -> None:
        if all(os.path.exists(place) and os.path.getsize(place) for place in places):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt), stop_on_signals() as stop:
        run_tasks(make_bar("working", "task", 2), endless, places, lambda: (stop_once_they_work(), stop.check())[1], 2)
    for place in places:
        with pytest.raises(ProcessLookupError):
            os.kill(int(Path(place).read_text()), 0)
