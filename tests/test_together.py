"""Processes end as one: an error of any of them ends all, promptly, and is told once."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT

from paradiffusion.training.watch import FAILED, STALLED

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
    if name == "meeting": dist.barrier()
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
    time.sleep(100)

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
while len(ended) < len(running) and time.time() - began < 60:
    for pid, name in running.items():
        if name in ended: continue
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            ended[name] = [os.waitstatus_to_exitcode(status), time.time() - began]
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
SCENARIOS = ("all", "bug", "first", "other", "meeting", "late", "stopped", "fine", "paused")


@dataclass
class Ending:
    """How one process of a scenario ended; status None: it did not."""

    status: int | None
    seconds: float
    text: str


Endings = dict[str, tuple[Ending, Ending]]


@pytest.fixture(scope="module")
def endings(tmp_path_factory: pytest.TempPathFactory) -> Endings:
    folder = tmp_path_factory.mktemp("together")
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), json.dumps(SCENARIOS)], cwd=ROOT, env=dict(os.environ), capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    ended = json.loads(result.stdout.splitlines()[-1])
    found: Endings = {}
    for name in SCENARIOS:
        both = [Ending(*ended.get(f"{name}{rank}", (None, 0.0)), Path(folder / f"{name}{rank}.txt").read_text()) for rank in (0, 1)]  # fmt: skip
        found[name] = (both[0], both[1])
    return found


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
    assert max(ending.seconds for ending in both) < 30
    assert texts.count(f"error: {sentence}") == texts.count("error: ") == 1
    # torch's own store may write the frames of its C++ stack when its peer has gone: only Python's must not be there.
    assert "Traceback (most recent call last)" not in texts


def test_a_bug_keeps_its_traceback_and_ends_the_others_without_a_word(endings: Endings) -> None:
    waiting, failed = endings["bug"]
    assert failed.status == 1 and "KeyError: 'a bug'" in failed.text
    # It was asleep, so that the watch had to end it, and cleaned up before.
    assert (waiting.status, waiting.text) == (FAILED, "cleaned up\n")


def test_who_is_late_is_named_once_and_all_leave(endings: Endings) -> None:
    both = endings["late"]
    texts = "".join(ending.text for ending in both)
    assert sorted(str(ending.status) for ending in both) == [str(FAILED), str(STALLED)], texts
    assert texts.count("error: ") == 1
    assert re.search(
        r"error: process 1 \(.*\) has been in phase 'data' of step 7 for \d+ s, samples 000000.tar/dog", texts
    )


def test_a_main_process_that_is_stopped_is_named(endings: Endings) -> None:
    """It keeps the board, which then answers nobody."""
    stopped, other = endings["stopped"]
    assert stopped.status is None and other.status == STALLED
    # Whether it counts as late or as dead already is a matter of a second.
    assert re.search(r"error: process 0 \(.*\) .* phase 'encode' of step 7.*, samples 000000.tar/cat", other.text)


@pytest.mark.parametrize("name", ["fine", "paused"])
def test_no_false_alarm(name: str, endings: Endings) -> None:
    """ "paused": both stopped for longer than a stall takes, as on a machine that is suspended, and then going on."""
    for ending in endings[name]:
        # torch's own store may write that its peer has gone.
        assert ending.status == 0 and "error: " not in ending.text and "Traceback" not in ending.text, ending.text
