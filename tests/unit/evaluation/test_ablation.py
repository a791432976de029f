"""Ablations: a study's file, its trainings and commands, and its table with intervals over seeds and prompts."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from commands import ROOT, user_error
from programs import script

from paradiffusion.compose import compose_train
from paradiffusion.errors import UserError
from paradiffusion.evaluation.ablation import AblateOptions, split
from paradiffusion.evaluation.ablation_plan import Cell, Extra, Launcher, Plan, Setting, Study, Unit, as_script, make_plan, read_study
from paradiffusion.evaluation.ablation_table import (
    LOSS,
    MINUTES,
    Comparison,
    Observed,
    as_markdown,
    compare,
    difference,
    number,
    over_seeds,
    write_comparison,
)
from paradiffusion.evaluation.estimates import Estimate, mean
from paradiffusion.evaluation.records import Drawn, Evaluation, ImageScore, Measure, ScoreResult, write_evaluation
from paradiffusion.evaluation.suites.suite import Suite, SuitePrompt

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
    assert [[a for a in arguments if a.startswith("batch_size")] for arguments in units] == [["batch_size=8"], ["batch_size=2"]]


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
    user_error(said, plan_of, write(settings=settings))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("settings: [a", "is not understood: "), ("[1, 2]", "is no mapping"), ("settings: {}", "has no settings"),
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
        ("settings: {a: {}, b: {}, a: {overrides: [max_steps=2]}}", "a stands twice, line 1"),
        ("settings: {a: {}, no: {}}", "settings: False: .*valid string .*put quotes"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_in_a_sentence(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    user_error(said, read_study, path)


def test_commands_for_a_shell_hold_what_was_said(write: Write) -> None:
    path = write(settings={"baseline": {}, "rank_4": {"overrides": ["lora.rank=4"]}}, evaluate=["suite=scenes"])
    shards = "data.shards=/data/a set/{00000..00003}.tar"
    plan = plan_of(path, "preset=paper", shards)
    launcher = Launcher("configs/launch/zero2.yaml", ("--num_processes", "4"))
    lines = [line for line in as_script("shell", plan, launcher, [], ["study=x"]).splitlines() if line.startswith("accelerate")]
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
    plan = plan_of(write(settings={"baseline": {}, "rank_4": {"overrides": ["lora.rank=4"]}}, evaluate=["suite=scenes"]))
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
    user_error("takes no launch=", as_script, "slurm", plan, Launcher("configs/launch/ddp.yaml"), [], [])


def test_options_and_overrides_are_told_apart() -> None:
    arguments = ["study=a.yaml", "seeds=[0,2]", "preset=paper", "stage2.data.shards=x{0..3}.tar", "unet=tiny"]
    extra = Extra(("preset=paper", "unet=tiny"), ((2, "data.shards=x{0..3}.tar"),))
    assert split(arguments) == (["study=a.yaml", "seeds=[0,2]"], extra)
    for taken in ("run_dir=x", "stage=1", "stage1.seed=3", "++seed=3"):
        user_error("is set by the study itself", split, [taken])
    for name, value in (("seeds", "[0,0]"), ("seeds", "[a]"), ("print", "yes"), ("launch", "no.yaml"), ("launch_arguments", "[x]")):
        with pytest.raises(UserError):
            AblateOptions(study="a.yaml", **{name: value}).check()  # type: ignore[arg-type]


def test_the_command_line_prints_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nano = f"study={ROOT}/configs/ablations/nano.yaml"
    assert main([nano, "preset=paper", "data.shards=x", "only=[rank_2]", "seeds=[0]", "print=json",
                 f"launch={ROOT}/configs/launch/zero2.yaml", f"output={tmp_path / 'out'}"]) == 0  # fmt: skip
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["kind"] for row in rows] == ["train", "train", "train", "evaluate", "train", "train", "evaluate"]
    assert all(row["command"][:2] == ["accelerate", "launch"] for row in rows)
    assert not (tmp_path / "out").exists(), "printing leaves nothing behind"
    for arguments, said in (
        ([], "study= is missing"), ([nano, "max_stepz=3"], "did you mean max_steps"), (["study=none.yaml"], "cannot be read"), ([nano, "only=[rank_3]"], "rank_3 is no setting"),
        ([nano, "table=true", f"output={tmp_path}"], "has no finished run"),
    ):  # fmt: skip
        user_error(said, main, arguments)


def test_what_an_earlier_version_of_the_study_finished_is_named_and_stays_aside(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(settings={"baseline": {}, "wide": {"overrides": ["batch_size=16"]}}, stages=[1])
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


PROMPTS = 30


def observed(values: np.ndarray) -> Observed:
    names = [str(number) for number in range(len(values))]
    return Observed(dict(zip(names, values.tolist(), strict=True)), dict.fromkeys(names, 1.0), None, len(values))


@pytest.mark.parametrize(("seeds", "seed_deviation"), [(2, 0.0), (2, 0.03), (3, 0.15)])
def test_intervals_cover_at_their_rate(seeds: int, seed_deviation: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paradiffusion.evaluation.ablation_table.RESAMPLES", 200)
    rng = np.random.default_rng(seeds)
    covered, trials = 0, 200
    for _ in range(trials):
        hard, lucky = rng.normal(0, 0.2, PROMPTS), rng.normal(0, seed_deviation, seeds)
        runs = [observed(0.5 + hard + one + rng.normal(0, 0.3, PROMPTS)) for one in lucky]
        found = over_seeds(runs)
        covered += found.low <= 0.5 <= found.high
    assert 0.905 <= covered / trials <= 0.995


def test_a_hard_prompt_is_hard_for_every_seed() -> None:
    """Were prompts taken as others for each seed, four equal runs would halve the interval of one."""
    values = np.random.default_rng(0).normal(0.5, 0.2, PROMPTS)
    one, four = over_seeds([observed(values)]), over_seeds([observed(values)] * 4)
    assert four.mean == pytest.approx(one.mean) and four.prompts == PROMPTS
    assert four.high - four.low == pytest.approx(one.high - one.low, rel=0.15)
    usual = mean(values.tolist(), [str(number) for number in range(PROMPTS)])
    assert one.high - one.low == pytest.approx(usual.high - usual.low, rel=0.1)


def test_seeds_that_differ_widen_the_interval() -> None:
    same = [observed(np.full(PROMPTS, 0.5))] * 2
    apart = [observed(np.full(PROMPTS, 0.4)), observed(np.full(PROMPTS, 0.6))]
    assert over_seeds(same) == Estimate(0.5, 0.5, 0.5, 2 * PROMPTS, PROMPTS)
    # Nothing but two seeds: Student's t with one degree of freedom, 12.7 standard errors of 0.1.
    found = over_seeds(apart)
    assert found.high - found.mean == pytest.approx(12.706 * 0.1, rel=1e-3)
    assert over_seeds([*map(number, (0.4, 0.5, 0.6))]).high - 0.5 == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-3)
    two = over_seeds([number(0.4), number(0.6)])
    assert math.isnan(two.low) and two.mean == 0.5


def test_differences_are_paired() -> None:
    """Between prompts and seeds there is far more than between the settings, yet their difference is sure."""
    rng = np.random.default_rng(1)
    hard = rng.normal(0, 0.3, PROMPTS)
    base = [0.5 + hard + lucky for lucky in (0.0, 0.2)]
    better = [values + 0.05 + rng.normal(0, 0.005, PROMPTS) for values in base]
    found = difference([observed(values) for values in better], [observed(values) for values in base])
    assert found is not None and 0 < found.low < 0.05 < found.high < 0.07
    unpaired = over_seeds([observed(values) for values in better])
    assert unpaired.high - unpaired.low > 5 * (found.high - found.low)
    with pytest.raises(ValueError, match="1 runs and 2"):
        difference([observed(hard)], [observed(values) for values in base])


def test_a_number_of_the_whole_set_keeps_its_own_interval() -> None:
    one = Observed(whole=Estimate(20.0, 18.0, 22.0, 400, 400))
    assert over_seeds([one]) == one.whole
    both = over_seeds([one, one])
    assert (both.low, both.high) == (pytest.approx(18, abs=0.02), pytest.approx(22, abs=0.02))
    assert difference([one], [one]) is None, "with one seed nothing is known of how much it varies"
    other = Observed(whole=Estimate(23.0, 21.0, 25.0, 400, 400))
    found = difference([one, other], [other, other])
    assert found is not None and found.mean == -1.5 and found.low < -10
    # Questions weigh as many as they are.
    runs = [Observed({"a": 4.0, "b": 0.0}, {"a": 8.0, "b": 2.0}, None, 10)] * 2
    assert over_seeds(runs).mean == pytest.approx(0.4)


# From folders to the table


class Made:
    """A finished study on disk: ``add`` writes what training and evaluation of one cell leave behind."""

    def __init__(self, folder: Path, settings: tuple[Setting, ...], seeds: tuple[int, ...]) -> None:
        self.folder = folder
        self.study = Study("made", settings, settings[0].name, seeds=seeds)
        self.units: dict[str, Unit] = {}
        self.cells: list[Cell] = []

    def add(self, setting: str, seed: int, right: list[float], suite: str = "s", clip: str = "a", lost: int = 0) -> None:
        name = f"{setting}-{seed}"
        training = Unit(f"t-{name}", "train", name, self.folder / "trained" / name, (), None, 1, 5)
        evaluation = Unit(f"e-{name}", "evaluate", name, self.folder / "evaluated" / name, (), training.key, 1)
        training.checkpoints.mkdir(parents=True)
        summary = {"stage": 1, "steps": 5, "seconds": 90.0, "validation": {"loss_long": 0.5 + seed / 10}}
        (training.checkpoints / "summary.json").write_text(json.dumps(summary))
        rows = [{"kind": "train", "loss": 0.9}, {"kind": "train", "loss": 0.7}, {"kind": "validation", "loss_long": 0.5}]
        (training.checkpoints / "log.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{cut")
        prompts = tuple(SuitePrompt(f"{suite}{number}", f"prompt {number}") for number in range(len(right)))
        measures = [Measure("right", "Right", "share"), Measure("distance", "Distance", "number", False, None)]
        images = [
            ImageScore(prompt.id, prompt.id, {"right": value}, error="no picture" if number < lost else "")
            for number, (prompt, value) in enumerate(zip(prompts, right, strict=True))
        ]
        result = ScoreResult("made", "Made", settings={"clip": clip}, measures=measures, images=images)
        result.overall["distance"] = Estimate(30.0 - seed, 29.0, 31.0, len(right), len(right))
        drawn = [Drawn(p.id, p.id, Path("x.png"), error="failed" if n < lost else "") for n, p in enumerate(prompts)]
        skipped = ScoreResult("none", "None", skipped="no model was given")
        suites = Suite("pictures", "Pictures", prompts)
        write_evaluation(evaluation.folder, Evaluation(name, "checkpoint", {}, suites, 1, drawn, [result, skipped]))
        (evaluation.folder / "report.html").write_text("x")
        self.units |= {training.key: training, evaluation.key: evaluation}
        self.cells.append(Cell(setting, seed, (training.key,), evaluation.key))

    def compared(self, finished: set[str] | None = None) -> Comparison:
        plan = Plan(self.units, tuple(self.cells))
        return compare(self.study, plan, {*self.units} if finished is None else finished)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Made]:
    def made(*settings: Setting, seeds: tuple[int, ...] = (0, 1)) -> Made:
        return Made(tmp_path, settings, seeds)

    return made


HALF, MOST = [0.0, 1.0] * 20, [0.0, 1.0, 1.0, 1.0] * 10


def test_the_table_holds_measures_losses_and_minutes(make: Callable[..., Made], tmp_path: Path) -> None:
    made = make(Setting("base"), Setting("<b>new|", group="<group>", note="a & b", overrides=("lora.rank=4",)))
    for seed in (0, 1):
        made.add("base", seed, HALF)
        made.add("<b>new|", seed, MOST, lost=2)
    comparison = made.compared()
    base, new = comparison.rows
    right, distance = "pictures/made/right", "pictures/made/distance"
    assert [c.key for c in comparison.columns] == [right, distance, "held-out loss, long", LOSS, MINUTES]
    assert (base.estimates[right].mean, base.estimates[right].prompts, new.estimates[right].mean) == (0.5, 40, 0.75)
    assert new.differences[right].mean == 0.25 and new.differences[right].low > 0 and not base.differences
    assert new.estimates[distance].mean == 29.5
    assert base.estimates[LOSS].mean == 0.7 and base.estimates[MINUTES].mean == 1.5
    assert base.values["held-out loss, long"] == (0.5, 0.6)
    assert any("2 of 40 images of pictures were not drawn with <b>new|, seed 0" in text for text in comparison.warnings)

    page = write_comparison(tmp_path, comparison, [("first", "it broke <i>"), ("second", "not run")]).read_text()
    assert not any(text in page for text in ("<b>new", "<group>", "<i>", "<script", "https://"))
    assert all(text in page for text in ("a &amp; b", "+25.0", ", better", 'href="evaluated/base-0/report.html"'))
    markdown = (tmp_path / "report.md").read_text()
    row, *_ = [line for line in markdown.splitlines() if "new\\| |" in line]
    assert "<b>" not in row and "75.0 %" in row and "+25.0 (" in row and ", better" in row
    assert "2 seeds say little" in markdown and "it broke" in markdown
    record = json.loads((tmp_path / "report.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert record["rows"][1]["estimates"][right]["mean"] == 0.75 and record["rows"][1]["seeds"] == [0, 1]
    assert record["rows"][0]["estimates"][MINUTES]["low"] is None
    assert record["not_finished"] == [{"unit": "first", "reason": "it broke <i>"}, {"unit": "second", "reason": "not run"}]
    assert not list(tmp_path.glob(".*part"))
    # Measures are chosen by the end of their name.
    made.study = replace(made.study, measures=("made/distance", "made/right", "clip/mean"))
    chosen = made.compared()
    assert [c.key for c in chosen.columns][:2] == [distance, right]
    assert any("clip/mean was not measured; there are pictures/made/right" in text for text in chosen.warnings)


def test_what_is_not_finished_is_said_and_pairs_are_of_seeds_that_both_have(make: Callable[..., Made]) -> None:
    made = make(Setting("base"), Setting("new"), Setting("none"), seeds=(0, 1))
    made.add("base", 0, HALF)
    made.add("new", 0, MOST)
    made.add("new", 1, [1.0] * 40)
    comparison = made.compared()
    new = comparison.rows[1]
    assert new.estimates["pictures/made/right"].mean == 0.875
    assert new.differences["pictures/made/right"].mean == 0.25, "seed 1 has no baseline to be compared with"
    text = as_markdown(comparison, [])
    assert "| base | 1 of 2 |" in text and "| none | 0 of 2 | – |" in text
    assert made.compared({"t-new-1"}).rows[1].seeds == (), "without its evaluation a run has no place in the table"
    made.study = replace(made.study, seeds=(0,))
    assert "With one seed it does not hold how much another training" in as_markdown(made.compared(), [])


def test_settings_that_were_trained_as_one_are_said_to_be(make: Callable[..., Made]) -> None:
    made = make(Setting("base"), Setting("rank_2"), Setting("other"), seeds=(0, 1))
    for seed in (0, 1):
        for name in ("base", "other"):
            made.add(name, seed, HALF)
        shared = next(cell for cell in made.cells if (cell.setting, cell.seed) == ("base", seed))
        made.cells.append(replace(shared, setting="rank_2"))
    said = [warning for warning in made.compared().warnings if "trained as one" in warning]
    assert len(said) == 1 and said[0].startswith("base and rank_2 were")


def test_what_cannot_be_compared_is_left_out_by_name(make: Callable[..., Made]) -> None:
    made = make(Setting("base"), Setting("new"), seeds=(0, 1))
    made.add("base", 0, HALF)
    made.add("base", 1, HALF, clip="b")
    made.add("new", 0, HALF, suite="other")
    made.add("new", 1, HALF)
    (made.units["e-new-1"].folder / "evaluation.json").write_text("{")
    comparison = made.compared()
    assert comparison.rows[0].values["pictures/made/right"][0] == 0.5
    assert math.isnan(comparison.rows[0].values["pictures/made/right"][1])
    assert "pictures/made/right" not in comparison.rows[1].estimates
    for said in ("pictures/made was computed with other settings for base, seed 1", "the suite pictures has other prompts",
                 "it is not whole JSON"):  # fmt: skip
        assert any(said in warning for warning in comparison.warnings), said
