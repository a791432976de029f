"""Ablations: what a study's file may say, which trainings it comes to, and the commands as they are printed."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import yaml
from commands import ROOT
from programs import script

from paradiffusion.compose import compose_train
from paradiffusion.errors import UserError
from paradiffusion.evaluation.ablation import AblateOptions, split
from paradiffusion.evaluation.ablation_plan import Extra, Launcher, Plan, as_script, make_plan, read_study

SHIPPED = sorted((ROOT / "configs" / "ablations").glob("*.yaml"))
Write = Callable[..., Path]
main = script("ablate").main


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """``write(settings={...}, ...)``: a study's file."""

    def file(**values: Any) -> Path:
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump({"name": "tried", "seeds": [0], **values}, sort_keys=False))
        return path

    return file


def plan_of(path: Path, *overrides: str, output: Path = Path("out"), seeds: tuple[int, ...] | None = None) -> Plan:
    study = read_study(path)
    if seeds is not None:
        object.__setattr__(study, "seeds", seeds)
    return make_plan(study, output, split(list(overrides))[1], compose_train)


def trainings(plan: Plan, setting: str, seed: int = 0) -> tuple[str, ...]:
    return next(cell.trainings for cell in plan.cells if (cell.setting, cell.seed) == (setting, seed))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.parametrize("preset", ["nano", "paper"])
def test_every_override_of_the_shipped_studies_is_accepted(path: Path, preset: str) -> None:
    shards = ["data.shards=/data/{00000..00009}.tar"] if preset == "paper" else []
    plan = plan_of(path, f"preset={preset}", *shards, seeds=(0,))
    ends = {cell.setting: cell.trainings[-1] for cell in plan.cells}
    study = read_study(path)
    if path.stem in ("nano", "paper"):
        asked = {setting.group for setting in study.settings}
        assert {"text encoder", "LoRA rank", "stages", "masking", "layer tap", "caption mix"} <= asked
        assert {"baseline", "no_stage_2", "no_stage_3"} <= ends.keys()
    if f"preset={preset}" in study.base:  # elsewhere a setting may be what the preset does already
        same = [name for name, key in ends.items() if name != study.baseline and key == ends[study.baseline]]
        assert not same, f"{same} change nothing"
        assert len({*ends.values()}) == len(ends)


def test_what_settings_have_in_common_is_trained_once(write: Write) -> None:
    settings = {
        "baseline": {},
        "rank_4": {"overrides": ["lora.rank=4"]},
        "short": {"per_stage": {2: ["data.captions={short: 1.0}"]}},
        "no_stage_2": {"stages": [1, 3], "per_stage": {3: ["train_text=frozen"]}},
        "no_stage_3": {"stages": [1, 2]},
        "other_tap": {"overrides": ["conditioning.layer_tap=last"]},
    }
    plan = plan_of(write(settings=settings, evaluate=["suite=scenes"]), seeds=(0, 1))
    chains = {name: trainings(plan, name) for name in settings}
    assert {chain[0] for name, chain in chains.items() if name != "other_tap"} == {chains["baseline"][0]}
    assert chains["no_stage_3"] == chains["baseline"][:2]
    assert len({chains[name][1] for name in settings}) == 5  # all but no_stage_3 have their own second stage
    assert not {*chains["other_tap"]} & {*chains["baseline"]}
    assert not {*chains["baseline"]} & {*trainings(plan, "baseline", 1)}, "another seed is another training"
    kinds = [unit.kind for unit in plan.units.values()]
    # Per seed: stage 1 twice; stage 2 of the baseline, rank_4, short and other_tap; stage 3 of these and of no_stage_2.
    assert kinds.count("train") == 2 * (2 + 4 + 5) and kinds.count("evaluate") == 2 * 6
    order = list(plan.units)
    assert all(one.needs is None or order.index(one.needs) < order.index(one.key) for one in plan.units.values())
    first = plan.units[chains["rank_4"][1]]
    assert f"init_from=out/trained/{plan.units[chains['baseline'][0]].folder.name}/stage1" in first.arguments
    assert plan.units[chains["baseline"][0]].also == ("rank_4", "short", "no_stage_2", "no_stage_3")
    last = plan.units[chains["no_stage_2"][1]]
    assert last.needs == chains["baseline"][0] and last.stage == 3


def test_a_training_is_known_by_what_decides_its_weights(write: Write, tmp_path: Path) -> None:
    path = write(settings={"baseline": {}}, stages=[1])
    key = trainings(plan_of(path), "baseline")[0]
    same = ["threads=3", "checkpoint_every=7", "log_every=3", "data.workers=0", "tracker=tensorboard", "keep_last=9"]
    assert {trainings(plan_of(path, one), "baseline")[0] for one in same} == {key}
    other = ["max_steps=7", "batch_size=8", "optimizer.lr=1e-5", "ema_decay=0.5", "text_encoder.path=x"]
    keys = {trainings(plan_of(path, one), "baseline")[0] for one in other}
    assert len({*keys, key}) == len(other) + 1
    # Under another name it is found where it was made, and nothing is trained again.
    folder = plan_of(path).units[key].folder
    (tmp_path / folder).mkdir(parents=True)
    renamed = write(settings={"usual": {}}, stages=[1])
    assert plan_of(renamed, output=tmp_path / "out").units[key].folder == tmp_path / folder


def test_later_overrides_win_and_stages_have_their_own(write: Write) -> None:
    path = write(
        base=["max_steps=9", "batch_size=4"],
        per_stage={2: ["max_steps=8"]},
        settings={"baseline": {}, "longer": {"overrides": ["max_steps=20"], "per_stage": {2: ["max_steps=30"]}}},
        stages=[1, 2],
    )
    plan = plan_of(path, "batch_size=8", "stage2.batch_size=2")
    steps = {name: [plan.units[key].steps for key in trainings(plan, name)] for name in ("baseline", "longer")}
    assert steps == {"baseline": [9, 8], "longer": [20, 30]}
    units = [plan.units[key].arguments for key in trainings(plan, "baseline")]
    assert [[a for a in arguments if a.startswith("batch_size")] for arguments in units] == [
        ["batch_size=8"],
        ["batch_size=2"],
    ]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"baseline": {"overrides": ["conditioning.layer_tap=middle"]}}, "setting baseline, stage 1: .*one of last, mean"),
        ({"baseline": {}, "b": {"overrides": ["max_stepz=3"]}}, "setting b, stage 1: the key max_stepz is unknown; did you"),
        ({"baseline": {"stages": [1, 3]}}, r"no stage before it trains a LoRA adapter; write baseline: \{per_stage: \{3: \[train_text=frozen\]\}\}"),
        ({"baseline": {"per_stage": {3: ["train_text=frozen"]}}}, "would drop the LoRA adapter"),
        ({"baseline": {"stages": [2, 3]}}, "stage 2 is the first and starts from nothing"),
        ({"baseline": {"per_stage": {2: ["conditioning.layer_tap=last"]}}}, "says conditioning.layer_tap=last, and the stage that it starts from mean"),
    ],
)  # fmt: skip
def test_what_training_would_refuse_is_refused_before_it(write: Write, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        plan_of(write(settings=settings))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("settings: [a", "is not understood in line"), ("[1, 2]", "is no mapping"), ("settings: {}", "has no settings"),
        ("settings: {a: {}}\nsetings: {}", "unknown key setings; the keys are name, settings"),
        ("settings: {a: {override: []}}", "settings: a: unknown key override"),
        ("settings: {a/b: {}}", "settings: a/b: .*becomes part of folder names"),
        ("settings: {a: {name: b}}", "settings: a: unknown key name"),
        ("settings: {a: {overrides: [data.captions={long: 1}]}}", "put quotes around"),
        ("settings: {a: {overrides: [max_steps]}}", "'max_steps' is no key=value"),
        ("settings: {a: {overrides: [seed=3]}}", "seed is set by the study itself"),
        ("settings: {a: {}}\nevaluate: [output_dir=x]", "output_dir is set by the study itself"),
        ("settings: {a: {}}\nseeds: [0, 0]", "must be at least one, and each another"),
        ("settings: {a: {}}\nseeds: 3", "seeds: .*valid list"),
        ("settings: {a: {}}\nseeds: [true]", "seeds: 0: .*valid integer"), ("settings: {a: {}}\nstages: [3, 1]", "rising order"),
        ("settings: {a: {per_stage: {4: [a=b]}}}", "per_stage: 4: .*1, 2 or 3"), ("settings: {a: {}}\nbaseline: b", "baseline: b is none of its settings"),
        ("settings: {a: {}, b: {}, a: {overrides: [max_steps=2]}}", "in line 1: a stands twice"),
        ("settings: {a: {}, no: {}}", "settings: False: .*valid string .*put quotes"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_in_a_sentence(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=said) as error:
        read_study(path)
    assert "\n" not in str(error.value)


def test_commands_for_a_shell_hold_what_was_said(write: Write) -> None:
    path = write(settings={"baseline": {}, "rank_4": {"overrides": ["lora.rank=4"]}}, evaluate=["suite=scenes"])
    shards = "data.shards=/data/a set/{00000..00003}.tar"
    plan = plan_of(path, "preset=paper", shards)
    launcher = Launcher("configs/launch/zero2.yaml", ("--num_processes", "4"))
    lines = [
        line
        for line in as_script("shell", plan, launcher, [], ["study=x"]).splitlines()
        if line.startswith("accelerate")
    ]
    assert len(lines) == len(plan.units) == 7
    words = shlex.split(lines[0])
    assert words[:7] == [
        "accelerate", "launch", "--config_file", "configs/launch/zero2.yaml", "--num_processes", "4", "train.py",
    ]  # fmt: skip
    assert {"preset=paper", shards, "stage=1", "seed=0"} <= {*words}
    done = [trainings(plan, "baseline")[0]]
    left = as_script("shell", plan, launcher, done, [])
    assert left.count("accelerate launch") == 6 and "stage=1" not in left
    rows = [json.loads(line) for line in as_script("json", plan, launcher, done, []).splitlines()]
    assert [row["key"] for row in rows] == list(plan.units) and [row["finished"] for row in rows].count(True) == 1
    assert rows[0]["command"] == words and rows[0]["shared_with"] == ["rank_4"]


def test_slurm_gets_what_can_start_now_alone(write: Write) -> None:
    plan = plan_of(
        write(settings={"baseline": {}, "rank_4": {"overrides": ["lora.rank=4"]}}, evaluate=["suite=scenes"])
    )
    chain = trainings(plan, "baseline")

    def submitted(finished: list[str]) -> list[list[str]]:
        script = as_script("slurm", plan, Launcher(), finished, [])
        return [shlex.split(line) for line in script.splitlines() if line.startswith("sbatch")]

    (first,) = submitted([])
    assert first[2] == "scripts/slurm.sh" and "stage=1" in first and "train.py" not in first
    assert [("lora.rank=4" in words) for words in submitted([chain[0]])] == [False, True]
    jobs = submitted([*chain])  # the baseline's evaluation, and the other setting's second stage
    wrapped = next(word for words in jobs for word in words if word.startswith("--wrap="))
    assert len(jobs) == 2 and shlex.split(wrapped.removeprefix("--wrap="))[1] == "scripts/evaluate.py"
    with pytest.raises(UserError, match="takes no launch="):
        as_script("slurm", plan, Launcher("configs/launch/ddp.yaml"), [], [])


def test_options_and_overrides_are_told_apart() -> None:
    arguments = ["study=a.yaml", "seeds=[0,2]", "preset=paper", "stage2.data.shards=x{0..3}.tar", "unet=tiny"]
    extra = Extra(("preset=paper", "unet=tiny"), ((2, "data.shards=x{0..3}.tar"),))
    assert split(arguments) == (["study=a.yaml", "seeds=[0,2]"], extra)
    for taken in ("run_dir=x", "stage=1", "stage1.seed=3", "++seed=3"):
        with pytest.raises(UserError, match="is set by the study itself"):
            split([taken])
    for name, value in (
        ("seeds", "[0,0]"),
        ("seeds", "[a]"),
        ("print", "yes"),
        ("launch", "no.yaml"),
        ("launch_arguments", "[x]"),
    ):
        with pytest.raises(UserError):
            AblateOptions(study="a.yaml", **{name: value}).check()  # type: ignore[arg-type]


def test_the_command_line_prints_and_refuses_without_traceback(
    command: Callable[..., CompletedProcess[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nano = f"study={ROOT}/configs/ablations/nano.yaml"
    assert main([nano, "preset=paper", "data.shards=x", "only=[rank_2]", "seeds=[0]", "print=json",
                 f"launch={ROOT}/configs/launch/zero2.yaml", f"output={tmp_path / 'out'}"]) == 0  # fmt: skip
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["kind"] for row in rows] == ["train", "train", "train", "evaluate", "train", "train", "evaluate"]
    assert all(row["command"][:2] == ["accelerate", "launch"] for row in rows)
    assert not (tmp_path / "out").exists(), "printing leaves nothing behind"
    for arguments, said in (
        ([], "study= is missing"), (["study=none.yaml"], "cannot be read"), ([nano, "only=[rank_3]"], "rank_3 is no setting"),
        ([nano, "table=true", f"output={tmp_path}"], "has no finished run"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            main(arguments)
    refused = command("scripts/ablate.py", nano, "max_stepz=3")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "did you mean max_steps" in refused.stderr


def test_what_an_earlier_version_of_the_study_finished_is_named_and_stays_aside(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(settings={"baseline": {}, "wide": {"overrides": ["batch_size=32"]}}, stages=[1])
    output = tmp_path / "out"
    for unit in plan_of(path, output=output).units.values():
        unit.checkpoints.mkdir(parents=True)
        (unit.checkpoints / "summary.json").write_text(json.dumps({"steps": unit.steps, "seconds": 60}))
    line = {"key": "train-000000000000", "outcome": "done", "title": "narrow, seed 0, stage 1"}
    (output / "journal.rank0.jsonl").write_text(json.dumps(line) + "\n")
    assert main([f"study={path}", f"output={output}"]) == 0
    said = capsys.readouterr().out
    assert "2 units, 2 of them finished" in said and "stay aside: narrow, seed 0, stage 1" in said
    rows = json.loads((output / "report.json").read_text())["rows"]
    assert [row["setting"] for row in rows] == ["baseline", "wide"]
    assert main([f"study={path}", f"output={output}", "table=true", "seeds=[0]"]) == 0
