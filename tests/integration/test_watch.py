"""A process that hangs or dies is named by the others, with its phase and samples, instead of a bare time-out."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import ROOT, wait_for
from training_runs import free_port

from paradiffusion.training.watch import FAILED, STALLED, Place, Watch, describe_stall


def place(rank: int, step: int, phase: str, at: float, alive: float = 100.0, keys: tuple[str, ...] = ()) -> Place:
    return Place(rank, f"host{rank}", step, phase, list(keys), at, alive)


CAT, MANY = ("000003.tar/cat",), tuple("abcdefghijk")


@pytest.mark.parametrize(
    ("places", "sentence"),
    [
        ([place(0, 7, "backward", 60), place(1, 7, "data", 50, keys=CAT), place(2, 7, "wait", 61)],
         r"process 1 \(host1\) has been in phase 'data' of step 7 for 50 s, samples 000003.tar/cat$"),
        ([place(0, 8, "data", 10), place(1, 7, "wait", 10)], "process 1 "),  # an earlier step is behind a later one
        ([place(0, 8, "save", 10), place(1, 8, "data", 10)], "process 0 ((?!process 1).)*$"),  # a save comes before the next data
        ([place(0, 7, "data", 20), place(1, 7, "backward", 30, alive=35.0, keys=("a", "b"))],  # the dead are named first
         r"process 1 \(host1\) gave its last sign of life 65 s ago, in phase 'backward' of step 7, samples a, b$"),
        ([place(rank, 1, "backward", 0, keys=MANY) for rank in range(20)], ".*and 3 more.*and 12 more"),
        ([*(place(rank, 7, "save", 0) for rank in range(3)), place(3, 7, "wait", 0)], "process"),
    ],
)  # fmt: skip
def test_who_is_late_is_named_and_not_those_who_wait_for_it(places: list[Place], sentence: str) -> None:
    found = describe_stall(places, 100.0, 30.0)
    assert found is not None and re.match(sentence, found), found
    assert describe_stall(places, 100.0, 101.0) is None or "life" in found


@pytest.mark.parametrize("phase", ["setup", "validate", "save"])
def test_long_work_of_all_together_is_no_stall(phase: str) -> None:
    assert describe_stall([place(rank, 7, phase, 0) for rank in range(3)], 100.0, 10.0) is None
    assert describe_stall([place(0, 9, "done", 0, alive=0)], 100.0, 10.0) is None, "who has finished is not waited for"


def test_one_process_is_only_warned(capsys: pytest.CaptureFixture[str]) -> None:
    saving = Watch(0, 1, 0.2)
    saving.beat("save", 3)
    time.sleep(0.8)
    saving.close()
    assert capsys.readouterr().err == "", "a long save of one process is no stall"
    watch, said = Watch(0, 1, 0.3), []
    watch.beat("data", 4, ["000000.tar/dog"])
    wait_for(lambda: bool(said.append(capsys.readouterr().err) or "".join(said)), timeout=10)
    watch.close()
    warning = r"warning: no step for a while: process 0 .* 'data' of step 4 for \d+ s, samples 000000.tar/dog"
    assert re.search(warning, "".join(said))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGSTOP, STALLED), (signal.SIGKILL, 2)])
def test_two_processes_and_one_is_lost(
    number: signal.Signals, status: int, tiny_arguments: list[str], tmp_path: Path
) -> None:
    log = tmp_path / "run" / "stage1" / "log.jsonl"
    endless = ["max_steps=1000000", "checkpoint_every=1000000", "log_every=1", "stall_seconds=5"]
    common = {"ACCELERATE_USE_CPU": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    both = [
        subprocess.Popen(
            [sys.executable, "train.py", *tiny_arguments, *endless, f"run_dir={tmp_path / 'run'}"], cwd=ROOT, text=True,
            env={**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    try:
        wait_for(lambda: (log.exists() and log.read_text().count("\n") > 3) or both[0].poll() is not None)
        assert both[0].poll() is None, both[0].communicate()[1]
        both[1].send_signal(number)
        _, errors = both[0].communicate(timeout=60)
        assert both[0].returncode == status and "Traceback" not in errors, errors
        step = json.loads(log.read_text().splitlines()[-1])["step"]
        sentence = (
            r"error: process 1 \(.*\) gave its last sign of life \d+ s ago, in phase '\w+' of step (\d+), samples (\S+)"
        )
        named = re.search(sentence, errors)
        assert named and abs(int(named[1]) - step) <= 4 and named[2].startswith("000000.tar/"), errors
    finally:
        for process in both:
            process.kill()
            process.communicate()


# ---- processes end as one: an error of any of them ends all, promptly, and is told once -------------------------------

# Pairs of processes, each pair in a scenario, forked from one that has imported everything. "asleep" stands for a wait
# that nothing ends from within, as in a collective operation of NCCL.
PROGRAM = """
import json, os, signal, sys, time
from datetime import timedelta
import torch.distributed as dist
from paradiffusion import entry
from paradiffusion.errors import UserError
from paradiffusion.training.watch import Watch, together

def work(name, rank, watch):
    if name == "all": raise UserError("the same everywhere")
    if name == "bug" and rank == 1: raise KeyError("a bug")
    if name == "first" and rank == 0: raise UserError("only the main process")
    if name == "other" and rank == 1: raise UserError("only the other one")
    if name == "meeting" and rank == 1: raise UserError("while they meet")
    if name == "killed" and rank == 0:
        watch.beat("data", 3, ["000000.tar/bird"])
        time.sleep(5)  # the other looks every two seconds
        os.kill(os.getpid(), signal.SIGKILL)
    if name in ("meeting", "killed"): dist.barrier()
    watch.beat("backward", 7)
    if name == "late" and rank == 1: watch.beat("data", 7, ["000000.tar/dog"])
    if name == "stopped" and rank == 0:
        time.sleep(0.2)  # sooner after its start a place is posted by the thread alone
        watch.beat("encode", 7, ["000000.tar/cat"])
        time.sleep(1.5)
        os.kill(os.getpid(), signal.SIGSTOP)
    if name == "paused":
        open(f"{folder}/ready{rank}", "w").close()
        while not os.path.exists(f"{folder}/resumed"): time.sleep(0.05)
    if name in ("fine", "paused"):
        dist.barrier()
        return
    time.sleep(600)

def child(name, rank, folder):
    sys.stdout = sys.stderr = open(f"{folder}/{name}{rank}.txt", "w", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)
    # They meet at a file: a port found free for so many pairs may be taken before it is used.
    os.environ |= {"MASTER_ADDR": "localhost", "RANK": str(rank), "WORLD_SIZE": "2"}
    meeting = f"file://{folder}/{name}.store"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    dist.barrier()
    watch = Watch(rank, 2, 4.0 if name in ("late", "paused", "stopped") else 600.0)
    watch.on_leave = lambda: print("cleaned up")
    def main(_):
        with together(watch):
            work(name, rank, watch)
        return 0
    entry.run(main)

folder, scenarios = sys.argv[1], json.loads(sys.argv[2])
began, running = time.time(), {}
for name in scenarios:
    for rank in (0, 1):
        pid = os.fork()
        if not pid:
            child(name, rank, folder)
        running[pid] = f"{name}{rank}"
# Both stop at one moment, for longer than a stall takes, and go on at one moment.
pair, stopped_at, ended = [pid for pid, name in running.items() if name.startswith("paused")], None, {}
while len(ended) < len(running) and time.time() - began < 120:
    for pid, name in running.items():
        if name in ended: continue
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            ended[name] = os.waitstatus_to_exitcode(status)
    if stopped_at is None and all(os.path.exists(f"{folder}/ready{rank}") for rank in (0, 1)):
        for pid in pair: os.kill(pid, signal.SIGSTOP)
        stopped_at = time.time()
    if stopped_at and time.time() - stopped_at > 7 and not os.path.exists(f"{folder}/resumed"):
        open(f"{folder}/resumed", "w").close()
        for pid in pair: os.kill(pid, signal.SIGCONT)
    if all(name in ended or name == "stopped0" for name in running.values()): break
    time.sleep(0.05)
for pid, name in running.items():
    if name not in ended: os.kill(pid, signal.SIGKILL)
print(json.dumps(ended))
"""
SCENARIOS = ("all", "bug", "first", "other", "meeting", "late", "stopped", "killed", "fine", "paused")


@dataclass
class Ending:
    """How one process of a scenario ended; status None: it did not."""

    status: int | None
    text: str


Endings = dict[str, list[Ending]]


@pytest.fixture(scope="module")
def endings(tmp_path_factory: pytest.TempPathFactory) -> Endings:
    folder = tmp_path_factory.mktemp("together")
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), json.dumps(SCENARIOS)], cwd=ROOT, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    ended = json.loads(result.stdout.splitlines()[-1])
    return {
        name: [Ending(ended.get(f"{name}{rank}"), (folder / f"{name}{rank}.txt").read_text()) for rank in (0, 1)]
        for name in SCENARIOS
    }


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("all", "the same everywhere"),
        ("first", "only the main process"),
        ("other", "only the other one"),
        ("meeting", "while they meet"),
    ],
)
def test_an_error_ends_all_and_is_told_once(name: str, sentence: str, endings: Endings) -> None:
    both = endings[name]
    texts = "".join(ending.text for ending in both)
    assert [ending.status for ending in both] == [FAILED, FAILED], texts
    assert texts.count(f"error: {sentence}") == texts.count("error: ") == 1
    # torch's own store may write the frames of its C++ stack when its peer has gone: only Python's must not be there.
    assert "Traceback (most recent call last)" not in texts


def test_a_bug_keeps_its_traceback_and_ends_the_others_without_a_word(endings: Endings) -> None:
    waiting, failed = endings["bug"]
    assert failed.status == 1 and "KeyError: 'a bug'" in failed.text
    # It was asleep, so that the watch had to end it, and cleaned up before.
    assert (waiting.status, waiting.text) == (FAILED, "cleaned up\n")


def test_who_is_late_is_named_once_and_all_leave(endings: Endings) -> None:
    texts = "".join(ending.text for ending in endings["late"])
    assert {ending.status for ending in endings["late"]} == {FAILED, STALLED}, texts
    assert texts.count("error: ") == 1
    assert re.search(
        r"error: process 1 \(.*\) has been in phase 'data' of step 7 for \d+ s, samples 000000.tar/dog", texts
    )


def test_a_main_process_that_is_stopped_or_killed_is_named(endings: Endings) -> None:
    """It keeps the board and the store: one then answers nobody, the other goes with it."""
    stopped, other = endings["stopped"]
    assert stopped.status is None and other.status == STALLED
    # Whether it counts as late or as dead already is a matter of a second.
    assert re.search(r"error: process 0 \(.*\) .* phase 'encode' of step 7.*, samples 000000.tar/cat", other.text)
    killed, other = endings["killed"]
    assert (killed.status, other.status) == (-9, FAILED), other.text
    sentence = r"error: process 0 \(.*\) gave its last sign of life .* 'data' of step 3, samples 000000.tar/bird;"
    assert re.search(sentence, other.text)


@pytest.mark.parametrize("name", ["fine", "paused"])
def test_no_false_alarm(name: str, endings: Endings) -> None:
    """ "paused": both stopped for longer than a stall takes, as on a machine that is suspended, and then going on."""
    for ending in endings[name]:
        # torch's own store may write that its peer has gone.
        assert ending.status == 0 and "error: " not in ending.text and "Traceback" not in ending.text, ending.text
