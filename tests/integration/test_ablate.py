"""scripts/ablate.py runs: a study killed in its middle goes on where it was, and failures and stops leave nothing behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest
import yaml
from commands import user_error, wait_for
from programs import end, fork, script
from ranks import Started

from paradiffusion.evaluation.ablation import Outcome, finished_units, run_plan
from paradiffusion.evaluation.ablation_plan import Launcher, Plan, Unit
from paradiffusion.evaluation.journal import read_journals

# A training in a line: it takes its time, and a SIGTERM as train.py does.
TRAINING = """
import json, pathlib, signal, sys, time
folder, seconds = pathlib.Path(sys.argv[1]), float(sys.argv[2])
folder.mkdir(parents=True, exist_ok=True)
with (folder / "starts").open("a") as file:
    file.write("s" if (folder / "saved").exists() else "x")
def stop(*_):
    time.sleep(1)
    (folder / "saved").write_text("")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
time.sleep(seconds)
(folder / "stage1").mkdir(exist_ok=True)
(folder / "stage1" / "summary.json").write_text(json.dumps({"steps": 3}))
"""
FAILING = "import sys; print('error: the data is gone; bring it back.', file=sys.stderr); sys.exit(2)"


class Forked(Started):
    """What ``subprocess.Popen`` begins, forked from a process that has imported the libraries, which would take each command longer
    than its training; as real commands are started and stopped, the plans of small programs tell."""

    def __init__(self, command: list[str], stdout: BinaryIO, **_: Any) -> None:
        super().__init__(*command[1:])
        self.output = stdout

    def wait(self, timeout: float) -> int:
        self.process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.command, timeout)
        self.output.write("".join(self.communicate()).encode())
        return self.returncode


class Runs:
    """Plans of small programs in ``output``."""

    def __init__(self, folder: Path) -> None:
        self.output = folder / "out"
        self.programs = folder / "programs"
        self.programs.mkdir()
        (self.programs / "train.py").write_text(TRAINING)
        (self.programs / "fail.py").write_text(FAILING)

    def unit(self, name: str, seconds: float = 0.0, needs: str | None = None, program: str = "train.py") -> Unit:
        folder = self.output / "trained" / name
        arguments = (str(self.programs / program), str(folder), str(seconds))
        return Unit(name, "train", f"unit {name}", folder, arguments, needs, 1, 3)

    def run(self, *units: Unit, keep_going: bool = True) -> Outcome:
        return run_plan(self.plan(*units), self.output, Launcher(), keep_going, lambda unit: None)

    def plan(self, *units: Unit) -> Plan:
        return Plan({unit.key: unit for unit in units}, ())

    def start(self, *units: Unit) -> int:
        """The same in a process of its own, as scripts/ablate.py ends it."""
        return fork(lambda _: self.run(*units).stopped, [], self.output.parent / "said.txt")

    def starts(self, name: str) -> int:
        path = self.output / "trained" / name / "starts"
        return len(path.read_text()) if path.is_file() else 0


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def test_a_failure_is_listed_and_what_does_not_need_it_goes_on(runs: Runs) -> None:
    units = [runs.unit("a"), runs.unit("b", program="fail.py"), runs.unit("c", needs="b"), runs.unit("d", needs="a")]
    outcome = runs.run(*units)
    assert finished_units(runs.plan(*units), runs.output) == {"a", "d"}
    assert set(outcome.failed) == {"b"} and outcome.blocked == ("c",) and not outcome.stopped
    log = runs.output / "logs" / "b.log"
    assert outcome.failed["b"] == f"the data is gone; bring it back. (status 2, see {log})"
    assert "fail.py" in log.read_text() and dict(read_journals(runs.output))["b"]["outcome"] == "failed"
    # Mended, it is tried again, and the others are not.
    outcome = runs.run(units[0], runs.unit("b"), runs.unit("c", needs="b"), units[3])
    assert not outcome.failed and not outcome.blocked
    assert [runs.starts(name) for name in "abcd"] == [1, 1, 1, 1]

    first = [runs.unit("e", program="fail.py"), runs.unit("f")]
    assert set(runs.run(*first, keep_going=False).failed) == {"e"} and runs.starts("f") == 0


def test_a_result_that_was_deleted_is_made_again_and_half_a_training_is_no_result(runs: Runs) -> None:
    unit = runs.unit("a")
    runs.run(unit)
    summary = unit.checkpoints / "summary.json"
    summary.write_text(json.dumps({"steps": 2}))
    assert not finished_units(runs.plan(unit), runs.output)
    summary.unlink()
    runs.run(unit)
    assert runs.starts("a") == 2 and finished_units(runs.plan(unit), runs.output) == {"a"}
    # An evaluation counts when its command has ended well: its folder may hold one suite of two.
    evaluation = Unit("e", "evaluate", "unit e", runs.output / "evaluated" / "e", (), None, 1)
    evaluation.folder.mkdir(parents=True)
    (evaluation.folder / "evaluation.json").write_text("{}")
    assert not finished_units(runs.plan(evaluation), runs.output)
    with (runs.output / "journal.rank0.jsonl").open("a") as file:
        file.write('{"key": "e", "outcome": "done"}\n')
    assert finished_units(runs.plan(evaluation), runs.output) == {"e"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_is_passed_on_and_waits_until_the_command_has_saved(runs: Runs, number: int) -> None:
    units = [runs.unit("a"), runs.unit("b", seconds=60), runs.unit("c")]
    child = runs.start(*units)
    wait_for(lambda: runs.starts("b") == 1)
    time.sleep(0.3)  # until it has its handler
    assert end(child, lambda: True, number) == 128 + number
    assert (units[1].folder / "saved").exists() and [runs.starts(name) for name in "abc"] == [1, 1, 0]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a command outlives the program that started it")
def test_killed_it_leaves_no_command_behind_and_another_waits_for_the_last_one(runs: Runs) -> None:
    units = [runs.unit("a"), runs.unit("b", seconds=60)]
    child = runs.start(*units)
    wait_for(lambda: runs.starts("b") == 1)
    time.sleep(0.3)
    user_error("in use by another", runs.run, *units)
    end(child, lambda: True)
    outcome = runs.run(runs.unit("a"), runs.unit("b"))
    said = (units[1].folder / "starts").read_text()
    assert said == "xs", "the orphan was to save and leave before another one started"
    assert not outcome.failed and [runs.starts(name) for name in "ab"] == [1, 2]


def test_a_study_on_nano_goes_on_where_it_was(
    tiny_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two settings, trained, sampled and scored; the second goes on from the first one's stage."""
    started = SimpleNamespace(**{**vars(subprocess), "Popen": Forked})
    monkeypatch.setattr("paradiffusion.evaluation.ablation.subprocess", started)
    study, output = tmp_path / "study.yaml", tmp_path / "a study"
    values = {
        "name": "tried",
        "base": [*(a for a in tiny_arguments if not a.startswith("max_steps")), "max_steps=4", "checkpoint_every=2"],
        "seeds": [0],
        "stages": [1],
        "evaluate": ["suite=scenes", "count=6", "steps=2", "scores=scenes", "threads=1"],
        "settings": {"baseline": {}, "paragraphs": {"stages": [1, 2]}},
    }
    study.write_text(yaml.safe_dump(values))
    arguments = [f"study={study}", f"output={output}"]

    def journal() -> dict[str, str]:
        return {record["title"]: record["outcome"] for _, record in read_journals(output)}

    assert script("ablate").main([*arguments, "only=[baseline]"]) == 0
    assert [*journal()] == ["baseline, seed 0, stage 1", "baseline, seed 0, evaluation"]
    made = [*output.glob("trained/*/*/summary.json"), *output.glob("evaluated/baseline-seed0*/images/*.png")]
    before = {path: path.stat().st_mtime_ns for path in made}
    assert len(before) >= 1 + 6
    capsys.readouterr()
    assert script("ablate").main(arguments) == 0
    said = capsys.readouterr().out
    assert "are 4 units, 2 of them finished" in said
    assert len(journal()) == 4 and {*journal().values()} == {"done"}
    assert before == {path: path.stat().st_mtime_ns for path in made}, "something was made again"
    (log,) = output.glob("logs/baseline-seed0-stage1*.log")
    assert log.read_text().count("$ python train.py") == 1

    report = json.loads((output / "report.json").read_text())
    right = "scenes/scenes/colour_at_place"
    assert [row["seeds"] for row in report["rows"]] == [[0], [0]] and not report["not_finished"]
    for row in report["rows"]:
        found = row["estimates"][right]
        assert found["prompts"] == 6 and 0 <= found["low"] <= found["mean"] <= found["high"] <= 1
        assert {"training loss", "minutes"} <= row["estimates"].keys()
    assert right in report["rows"][1]["differences"]
    assert "| paragraphs | 1 |" in said and (output / "report.html").is_file()

    # The same table from the file of results alone, in which another study's runs, and those of a setting as it was, count for nothing.
    results, elsewhere = tmp_path / "results.jsonl", [f"study={study}", f"output={tmp_path / 'other'}"]
    broken = next(output.glob("evaluated/baseline*/evaluation.json"))
    whole = broken.read_text()
    broken.write_text(whole[:100])
    assert script("ablate").main([*arguments, f"results={results}", "table=true"]) == 0
    assert len(results.read_text().splitlines()) == 1  # what cannot be read is not kept
    broken.write_text(whole)
    user_error("cannot be read", script("ablate").main, [*elsewhere, f"results={tmp_path}"])
    assert script("ablate").main([*arguments, f"results={results}"]) == 0
    assert len(results.read_text().splitlines()) == 2
    capsys.readouterr()
    for _ in range(2):
        assert script("ablate").main([*elsewhere, f"results={results}"]) == 0
        assert "are 4 units, 4 of them finished" in capsys.readouterr().out and len(results.read_text().splitlines()) == 2
    again = json.loads((tmp_path / "other" / "report.json").read_text())
    for row, other in zip(report["rows"], again["rows"], strict=True):
        for key in ("estimates", "differences", "values"):
            for name, had in row[key].items():
                numbers = [[x or 0 for x in (one.values() if isinstance(one, dict) else one)] for one in (had, other[key][name])]
                assert numbers[1] == pytest.approx(numbers[0], rel=1e-5, abs=1e-6), name
    results.write_text(results.read_text().replace('"machine": "', '"machine": "another ', 1))
    assert script("ablate").main([*elsewhere, f"results={results}", "table=true"]) == 0
    assert "seed 0 was trained on" in capsys.readouterr().out
    study.write_text(yaml.safe_dump({**values, "evaluate": [*values["evaluate"], "guidance=1"]}))
    user_error("has no finished run", script("ablate").main, [*elsewhere, f"results={results}", "table=true"])
    results.write_text('{"setting": "baseline"}\n')
    user_error("line 1 of .* is no result", script("ablate").main, [*elsewhere, f"results={results}", "table=true"])


def test_what_evaluation_would_refuse_is_refused_before_any_training(tmp_path: Path) -> None:
    nowhere = f"suite_path={{paraprompts: {tmp_path / 'nowhere'}}}"
    for evaluate, message in (
        (["suite=scenes", "scores=[foo]"], "foo is unknown; choose among"),
        (["suite=scenes", "scores=[scenes,fid]"], "fid cannot be computed: reference= is not given"),
        (["suite=[scenes,paraprompts]", nowhere], f"suite=paraprompts: {tmp_path / 'nowhere'} does not exist"),
    ):
        study = {"name": "wrong", "base": ["preset=nano"], "seeds": [0], "stages": [1], "settings": {"one": {}}}
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump({**study, "evaluate": evaluate}))
        user_error(message, script("ablate").main, [f"study={path}", f"output={tmp_path / 'out'}"])
        assert not (tmp_path / "out" / "trained").exists()
