"""The table of an ablation: intervals over seeds and prompts, what is compared with what, and how it is shown."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from paradiffusion.evaluation.ablation_plan import Cell, Plan, Setting, Study, Unit
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

    def add(
        self, setting: str, seed: int, right: list[float], suite: str = "s", clip: str = "a", lost: int = 0
    ) -> None:
        name = f"{setting}-{seed}"
        training = Unit(f"t-{name}", "train", name, self.folder / "trained" / name, (), None, 1, 5)
        evaluation = Unit(f"e-{name}", "evaluate", name, self.folder / "evaluated" / name, (), training.key, 1)
        training.checkpoints.mkdir(parents=True)
        summary = {"stage": 1, "steps": 5, "seconds": 90.0, "validation": {"loss_long": 0.5 + seed / 10}}
        (training.checkpoints / "summary.json").write_text(json.dumps(summary))
        rows = [
            {"kind": "train", "loss": 0.9},
            {"kind": "train", "loss": 0.7},
            {"kind": "validation", "loss_long": 0.5},
        ]
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
    (row,) = [line for line in markdown.splitlines() if "new\\| |" in line]
    assert "<b>" not in row and "75.0 %" in row and "+25.0 (" in row and ", better" in row
    assert "2 seeds say little" in markdown and "it broke" in markdown
    record = json.loads((tmp_path / "report.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert record["rows"][1]["estimates"][right]["mean"] == 0.75 and record["rows"][1]["seeds"] == [0, 1]
    assert record["rows"][0]["estimates"][MINUTES]["low"] is None
    assert record["not_finished"] == [
        {"unit": "first", "reason": "it broke <i>"},
        {"unit": "second", "reason": "not run"},
    ]
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
    assert "With one seed they do not hold how much another training" in as_markdown(made.compared(), [])


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
