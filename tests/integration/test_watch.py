"""A process that hangs or dies is named by the others, with its phase and samples, instead of a bare time-out."""

from __future__ import annotations

import json
import re
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from commands import wait_for
from ranks import Started, start_two
from training_runs import build_here

from paradiffusion.errors import UserError
from paradiffusion.training.watch import FAILED, STALLED, Place, Watch, describe_stall, together


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


def test_compiling_is_no_stall_of_one_process_either() -> None:
    """Shapes may be new to it alone; another that is behind is still named."""
    compiling = [place(0, 7, "compile", 0), place(1, 7, "backward", 0)]
    assert describe_stall(compiling, 100.0, 10.0) is None
    assert "process 2" in str(describe_stall([*compiling, place(2, 7, "encode", 0)], 100.0, 10.0))
    assert "life" in str(describe_stall([place(0, 7, "compile", 0, alive=50.0), *compiling[1:]], 100.0, 10.0))


def test_a_step_compiles_where_its_shape_is_new(tiny_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build_here([*tiny_arguments, "conditioning=paper", "max_steps=2", f"run_dir={tmp_path / 'run'}"])
    trainer.config = replace(trainer.config, compile=True)  # as far as the watch knows
    phases: list[str] = []
    monkeypatch.setattr(trainer.watch, "beat", lambda phase, *_: phases.append(phase))
    loader = trainer.loader()
    batch = next(loader)
    for expected in (["compile"] * 2, ["forward", "backward"]):  # the language model's layers, then the rest
        phases.clear()
        trainer.train_step(iter([batch]))
        assert [phase for phase in phases if phase in ("compile", "forward", "backward")] == expected
    loader.close()
    trainer.close()


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


def test_a_mistake_of_one_process_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paradiffusion.training.watch.time.sleep", lambda _: pytest.fail("nobody is there to wait for"))
    with pytest.raises(UserError, match="a mistake"), together(Watch(0, 1, 600.0)):
        raise UserError("a mistake")


def test_two_processes_and_one_is_lost(tiny_arguments: list[str], tmp_path: Path) -> None:
    log = tmp_path / "run" / "stage1" / "log.jsonl"
    endless = ["max_steps=1000000", "checkpoint_every=1000000", "log_every=1", "stall_seconds=5"]
    both = start_two("train.py", *tiny_arguments, *endless, f"run_dir={tmp_path / 'run'}")
    try:
        wait_for(lambda: (log.exists() and log.read_text().count("\n") > 3) or both[0].poll() is not None)
        assert both[0].poll() is None, both[0].communicate()[1]
        both[1].send_signal(signal.SIGSTOP)
        _, errors = both[0].communicate(timeout=60)
        assert both[0].returncode == STALLED and "Traceback" not in errors, errors
        step = json.loads(log.read_text().splitlines()[-1])["step"]
        sentence = r"error: process 1 \(.*\) gave its last sign of life \d+ s ago, in phase '\w+' of step (\d+), samples (\S+)"
        named = re.search(sentence, errors)
        assert named and abs(int(named[1]) - step) <= 4 and named[2].startswith("000000.tar/"), errors
    finally:
        for process in both:
            process.kill()
            process.communicate()


# ---- processes end as one: an error of any of them ends all, promptly, and is told once -------------------------------

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
    pairs = {
        name: [
            Started("tests/support/watched_pair.py", name, str(folder), RANK=rank, WORLD_SIZE="2", MASTER_ADDR="localhost")
            for rank in "01"
        ]
        for name in SCENARIOS
    }  # fmt: skip
    # Both stop at one moment, for longer than a stall takes, and go on at one moment.
    wait_for(lambda: (folder / "ready0").exists() and (folder / "ready1").exists())
    for process in pairs["paused"]:
        process.send_signal(signal.SIGSTOP)
    time.sleep(7)
    (folder / "resumed").touch()
    for process in pairs["paused"]:
        process.send_signal(signal.SIGCONT)
    left = pairs["stopped"][0]
    wait_for(lambda: all(process.poll() is not None for pair in pairs.values() for process in pair if process is not left))
    return {name: [Ending(process.poll(), "".join(process.communicate(0))) for process in pair] for name, pair in pairs.items()}


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("all", "the same everywhere"), ("first", "only the main process"), ("other", "only the other one"), ("meeting", "while they meet")],
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

    texts = "".join(ending.text for ending in endings["late"])
    assert {ending.status for ending in endings["late"]} == {FAILED, STALLED}, texts
    assert texts.count("error: ") == 1
    assert re.search(r"error: process 1 \(.*\) has been in phase 'data' of step 7 for \d+ s, samples 000000.tar/dog", texts)


@pytest.mark.parametrize("name", ["fine", "paused"])
def test_no_false_alarm(name: str, endings: Endings) -> None:
    """ "paused": both stopped for longer than a stall takes, as on a machine that is suspended, and then going on."""
    for ending in endings[name]:
        # torch's own store may write that its peer has gone.
        assert ending.status == 0 and "error: " not in ending.text and "Traceback" not in ending.text, ending.text
