"""A process that hangs or dies is named by the others, with its phase and samples, instead of a bare time-out."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, wait_for
from training_runs import free_port

from paradiffusion.training.watch import STALLED, Place, Watch, describe_stall


def place(rank: int, step: int, phase: str, at: float, alive: float = 100.0, keys: tuple[str, ...] = ()) -> Place:
    return Place(rank, f"host{rank}", step, phase, list(keys), at, alive)


def test_the_one_that_is_behind_is_named_and_not_those_who_wait_for_it() -> None:
    places = [place(0, 7, "backward", 60), place(1, 7, "data", 50, keys=("000003.tar/cat",)), place(2, 7, "wait", 61)]
    sentence = describe_stall(places, 100.0, 40.0)
    assert sentence == "process 1 (host1) has been in phase 'data' of step 7 for 50 s, samples 000003.tar/cat"
    assert describe_stall(places, 100.0, 51.0) is None


def test_an_earlier_step_is_behind_a_later_one() -> None:
    sentence = describe_stall([place(0, 8, "data", 10), place(1, 7, "wait", 10)], 100.0, 30.0)
    assert sentence is not None and sentence.startswith("process 1 ")


def test_the_dead_are_named_first() -> None:
    places = [place(0, 7, "data", 20), place(1, 7, "backward", 30, alive=35.0, keys=("a", "b"))]
    sentence = describe_stall(places, 100.0, 40.0)
    assert (
        sentence == "process 1 (host1) gave its last sign of life 65 s ago, in phase 'backward' of step 7, samples a, b"
    )


@pytest.mark.parametrize("phase", ["setup", "validate", "save"])
def test_long_work_of_all_together_is_no_stall(phase: str) -> None:
    together = [place(rank, 7, phase, 0) for rank in range(3)]
    assert describe_stall(together, 100.0, 10.0) is None
    assert describe_stall([*together, place(3, 7, "wait", 0)], 100.0, 10.0) is not None


def test_finished_processes_are_not_waited_for() -> None:
    assert describe_stall([place(0, 9, "done", 0, alive=0)], 100.0, 10.0) is None


def test_many_are_counted() -> None:
    sentence = describe_stall(
        [place(rank, 1, "backward", 0, keys=tuple("abcdefghijk")) for rank in range(20)], 99.0, 9.0
    )
    assert sentence is not None and "and 12 more" in sentence and "and 3 more" in sentence


def test_one_process_is_only_warned() -> None:
    said: list[str] = []
    watch = Watch(0, 1, 0.3, said.append)
    watch.beat("data", 4, ["000000.tar/dog"])
    wait_for(lambda: bool(said), timeout=10)
    watch.close()
    assert re.search(
        r"warning: no step for a while: process 0 .* 'data' of step 4 for \d+ s, samples 000000.tar/dog", said[0]
    )


def test_a_save_comes_before_the_data_of_the_next_step() -> None:
    sentence = describe_stall([place(0, 8, "save", 10), place(1, 8, "data", 10)], 100.0, 30.0)
    assert sentence is not None and sentence.startswith("process 0 ") and "process 1" not in sentence


def test_a_long_save_of_one_process_is_no_stall() -> None:
    said: list[str] = []
    watch = Watch(0, 1, 0.2, said.append)
    watch.beat("save", 3)
    time.sleep(1.2)
    watch.close()
    assert said == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGSTOP, STALLED), (signal.SIGKILL, 2)])
def test_two_processes_and_one_is_lost(
    number: signal.Signals, status: int, tiny_arguments: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = [
        *tiny_arguments,
        f"run_dir={run}",
        "max_steps=1000000",
        "checkpoint_every=1000000",
        "log_every=1",
        "stall_seconds=5",
    ]
    common = {
        **os.environ,
        "ACCELERATE_USE_CPU": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
    }
    both = [
        subprocess.Popen(
            [sys.executable, "train.py", *arguments], cwd=ROOT, env={**common, "RANK": rank, "LOCAL_RANK": rank}, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    log = run / "stage1" / "log.jsonl"
    try:
        wait_for(lambda: (log.exists() and log.read_text().count("\n") > 3) or both[0].poll() is not None)
        assert both[0].poll() is None, both[0].communicate()[1]
        both[1].send_signal(number)
        began = time.monotonic()
        _, errors = both[0].communicate(timeout=60)
        assert both[0].returncode == status, errors
        assert time.monotonic() - began < 40
        step = json.loads(log.read_text().splitlines()[-1])["step"]
        named = re.search(
            r"error: process 1 \(.*\) gave its last sign of life \d+ s ago, in phase '(\w+)' of step (\d+), samples (\S+)",
            errors,
        )
        assert named, errors
        assert abs(int(named[2]) - step) <= 4 and named[3].startswith("000000.tar/") and "Traceback" not in errors
    finally:
        for process in both:
            process.kill()
            process.communicate()
