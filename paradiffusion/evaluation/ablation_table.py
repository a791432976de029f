"""The table of an ablation: measures, losses and time of each setting over its seeds, as Markdown, JSON and a page.

Few seeds are trained, and each is judged on the same many prompts. Two things vary: another seed gives another model, and another
choice of prompts another score. A hard prompt is hard in every run and more seeds do not average it away, so prompts are
resampled for all seeds at once. Resampling two or three seeds says nearly nothing (with two, half of the resamples hold one
seed twice), so their variance is taken with Student's t instead, as in an analysis with two random factors:

    variance = s2 / S + b2,   degrees of freedom by Satterthwaite (Biometrics Bulletin 2, 1946)

S seeds whose results have the sample variance s2 (S - 1 degrees of freedom), and b2 the bootstrap variance over P prompts of
their mean (P - 1). Chance within a single prompt and run is in both terms, so the interval errs on the wide side: in simulation
it covers 96 to 98 % (test_ablation.py), but only some 85 % where there are two seeds that differ far more than prompts do.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import numpy as np
from markupsafe import Markup
from scipy.stats import t as student

from paradiffusion.budget.results import processor
from paradiffusion.errors import UserError
from paradiffusion.evaluation.ablation_plan import Cell as PlannedCell
from paradiffusion.evaluation.ablation_plan import Plan, Setting, Study
from paradiffusion.evaluation.estimates import RESAMPLES, Estimate, expanded_tails
from paradiffusion.evaluation.records import NAME, Evaluation, Measure, ScoreResult, measured, read_evaluation
from paradiffusion.evaluation.reporting.figures import Series, row_figure
from paradiffusion.evaluation.reporting.sections import Section, document_markdown, write_sections
from paradiffusion.evaluation.reporting.texts import MISSING, difference_text, interval_text, value_text
from paradiffusion.machine import settled_precision
from paradiffusion.pages import Cell, Grid, Group, cells, text_grid
from paradiffusion.randomness import seed_from

LOSS: Final = "training loss"
MINUTES: Final = "minutes"
FORMAT_VERSION: Final = 1
_LOSSES: Final = {"loss_long": "held-out loss, long", "loss_short": "held-out loss, short"}
_RANGES: Final = {"share": (0.0, 1.0), "cosine": (-1.0, 1.0)}
_MOST_FIGURES: Final = 12
_LEVEL: Final = 0.975
_NORMAL: Final = 1.959964  # half of a 95 % interval, in standard deviations of the normal distribution


@dataclass(frozen=True)
class Observed:
    """What one measure came to with one training run.

    Attributes:
        above, below: by prompt, sums of value x weight and of weights; the value is the ratio of their totals.
        whole: the one number that the whole set (FID) or the run (a loss) has; ``above`` and ``below`` are then empty.
        n: images, questions or objects that were counted.
    """

    above: dict[str, float] = field(default_factory=dict)
    below: dict[str, float] = field(default_factory=dict)
    whole: Estimate | None = None
    n: int = 0

    @property
    def value(self) -> float:
        return self.whole.mean if self.whole is not None else sum(self.above.values()) / sum(self.below.values())


def number(value: float) -> Observed:
    """What a run has one of, and no prompts: a loss."""
    return Observed(whole=Estimate(value, math.nan, math.nan, 1, 0), n=1)


def over_seeds(runs: Sequence[Observed]) -> Estimate:
    """The mean over runs; the interval of ``estimates.ratio`` over prompts alone where there is one run.

    ``n`` of the result is what was counted in all runs. A number of a whole set takes its own interval for its prompts, as
    if it were the same prompts' doing in every run. One without prompts has no interval (NaN) for one run, nor for two, for
    which Student's t gives 13 standard errors to each side. ValueError for no runs.
    """
    if not runs:
        raise ValueError("there are no runs")
    values = np.array([run.value for run in runs])
    count = sum(run.n for run in runs)
    wholes = [run.whole for run in runs if run.whole is not None]
    if not wholes:
        return _estimate(values, _resampled(runs, names := _prompts(runs)), len(names), count)
    if len(runs) == 1:
        return wholes[0]
    prompts = wholes[0].prompts
    if len(runs) == 2 and not prompts:
        return Estimate(float(values.mean()), math.nan, math.nan, count, 0)
    widths = [(one.high - one.low) / (2 * _NORMAL) for one in wholes]
    return _joined(values, float(np.mean(np.square(np.nan_to_num(widths)))), prompts, count)


def difference(runs: Sequence[Observed], baseline: Sequence[Observed]) -> Estimate | None:
    """Mean of ``runs`` minus that of ``baseline``, both with the same seeds in the same order, paired by seed and prompt; None where a
    number of the whole set has one seed: nothing is known then about how much it varies."""
    if len(runs) != len(baseline) or not runs:
        raise ValueError(f"{len(runs)} runs and {len(baseline)} of the baseline")
    values = np.array([run.value - base.value for run, base in zip(runs, baseline, strict=True)])
    count = sum(run.n for run in runs)
    if any(one.whole is not None for one in (*runs, *baseline)):
        prompts = min((one.whole.prompts for one in (*runs, *baseline) if one.whole is not None), default=0)
        return _joined(values, 0.0, prompts, count) if len(runs) > 1 else None
    names = _prompts([*runs, *baseline])
    resampled = _resampled(runs, names) - _resampled(baseline, names)
    return _estimate(values, resampled, len(names), count)


def _prompts(runs: Sequence[Observed]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.below))


def _resampled(runs: Sequence[Observed], names: list[str]) -> np.ndarray:
    """Each run's value with prompts drawn with replacement, the same draws for all, [RESAMPLES, runs]; NaN where a draw
    holds nothing that counts."""
    above = np.array([[run.above.get(name, 0.0) for run in runs] for name in names])
    below = np.array([[run.below.get(name, 0.0) for run in runs] for name in names])
    rng = np.random.Generator(np.random.PCG64(seed_from("ablation", len(names))))
    found = np.empty((RESAMPLES, len(runs)))
    for start in range(0, RESAMPLES, 100):  # in pieces: [resamples, prompts] of tens of thousands would not fit
        counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), 100).astype(float)
        weights = counts @ below
        found[start : start + 100] = (counts @ above) / np.where(weights > 0, weights, np.nan)
    return found


def _estimate(values: np.ndarray, resampled: np.ndarray, prompts: int, count: int) -> Estimate:
    if len(values) == 1:
        low, high = np.nanquantile(resampled[:, 0], expanded_tails(prompts))
        return Estimate(float(values[0]), float(low), float(high), count, prompts)
    variance = float(np.nanvar(resampled.mean(1))) * prompts / max(prompts - 1, 1)
    return _joined(values, variance, prompts, count)


def _joined(values: np.ndarray, prompt_variance: float, prompts: int, count: int) -> Estimate:
    """The interval of the mean of ``values`` (one for each seed) with both variances."""
    mean = float(values.mean())
    seed_variance = float(values.var(ddof=1)) / len(values)
    total = seed_variance + prompt_variance
    if total <= 0:
        return Estimate(mean, mean, mean, count, prompts)
    below = seed_variance**2 / (len(values) - 1) + prompt_variance**2 / max(prompts - 1, 1)
    reach = float(student.ppf(_LEVEL, total**2 / below)) * total**0.5
    return Estimate(mean, mean - reach, mean + reach, count, prompts)


@dataclass(frozen=True)
class Column:
    """One measure. ``key`` is "suite/score/measure", or the name of a number that training gave."""

    key: str
    title: str
    unit: str = "number"
    higher_is_better: bool | None = None
    suite: str = ""

    @property
    def heading(self) -> str:
        arrow = {True: " ↑", False: " ↓", None: ""}[self.higher_is_better]
        return f"{self.title}{arrow}" + (f" ({self.suite})" if self.suite else "")


@dataclass
class Result:
    """What one run came to, by column.

    Attributes:
        said: what the study says of it (Cell.said): results of something else are not taken for it.
        machine: the processor that it was trained on, and the precision there.
        agreed: fingerprints of suites and settings of scores, by the beginnings of the columns' keys; runs with others are not compared.
        folder: of its evaluation; None where there is none here.
        whole: not so where a file of the evaluation cannot be read: it is to be made again.
    """

    setting: str
    seed: int
    said: tuple[str, ...]
    machine: str
    observed: dict[str, Observed] = field(default_factory=dict)
    columns: dict[str, Column] = field(default_factory=dict)
    agreed: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    folder: Path | None = None
    whole: bool = True


@dataclass(frozen=True)
class Row:
    """One setting: ``seeds`` that are finished, of ``planned``, and the ``folders`` of their evaluations.

    By column: ``values``, each finished seed's own number (NaN where it has none); ``estimates`` over the seeds; and
    ``differences`` to the baseline over the seeds that both have."""

    setting: Setting
    seeds: tuple[int, ...]
    planned: int
    folders: tuple[Path | None, ...]
    values: dict[str, tuple[float, ...]] = field(default_factory=dict)
    estimates: dict[str, Estimate] = field(default_factory=dict)
    differences: dict[str, Estimate] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """The table, and what a reader must know beside it."""

    study: Study
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    warnings: tuple[str, ...]
    results: tuple[Result, ...] = ()


@dataclass
class _Seen:
    """What results must agree on to be compared, and what was found."""

    columns: dict[str, Column] = field(default_factory=dict)
    agreed: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def warn(self, sentence: str) -> None:
        if sentence not in self.warnings:
            self.warnings.append(sentence)

    def take(self, result: Result) -> dict[str, Observed]:
        """What of a result can be compared with those before it."""
        found = result.observed
        for sentence in result.warnings:
            self.warn(sentence)
        for name, value in result.agreed.items():
            if self.agreed.setdefault(name, value) != value:
                what = f"{name} was computed with other settings" if "/" in name else f"the suite {name} has other prompts"
                self.warn(
                    f"{what} for {result.setting}, seed {result.seed}, than for the first run, and is left out there; delete its folder "
                    "under evaluated/, or its line of results=, and run the study again."
                )
                found = {key: one for key, one in found.items() if not key.startswith(f"{name}/")}
        self.columns = {**{key: result.columns[key] for key in found}, **self.columns}
        return found


def compare(study: Study, plan: Plan, finished: set[str], kept: Mapping[tuple[str, int], Result] | None = None) -> Comparison:
    """The table of all that is finished, with ``kept`` results by setting and seed in the place of what lies in the study's folder."""
    seen = _Seen()
    results: dict[tuple[str, int], Result] = {}
    settings: dict[tuple[str, ...], list[str]] = {}
    for cell in plan.cells:
        settings.setdefault(cell.trainings, []).append(cell.setting)
        place = cell.setting, cell.seed
        if kept and place in kept:
            results[place] = kept[place]
        elif cell.trainings[-1] in finished and (cell.evaluation is None or cell.evaluation in finished):
            results[place] = _result(cell, plan)
    found = {place: seen.take(result) for place, result in results.items()}
    for seed in study.seeds:
        machines = sorted({result.machine for place, result in results.items() if place[1] == seed})
        if len(machines) > 1:
            seen.warn(f"seed {seed} was trained on {' and '.join(machines)}: differences between settings may be the machines'.")
    for names in settings.values():  # such as two LoRA ranks where no stage trains LoRA
        if len(names) > 1:
            seen.warn(
                f"{' and '.join(names)} were trained as one: no stage of this study reads what they differ in, so that where "
                "they are evaluated alike their difference is 0 by construction."
            )
    columns = _chosen(study, seen)
    rows = []
    for setting in study.settings:
        seeds = tuple(seed for seed in study.seeds if (setting.name, seed) in found)
        row = Row(setting, seeds, len(study.seeds), tuple(results[setting.name, seed].folder for seed in seeds))
        mine = [found[setting.name, seed] for seed in seeds]
        base = [found.get((study.baseline, seed), {}) for seed in seeds]
        for column in columns:
            key = column.key
            if known := [one[key] for one in mine if key in one]:
                row.values[key] = tuple(one[key].value if key in one else math.nan for one in mine)
                row.estimates[key] = _shown_estimate(over_seeds(known), column)
            pairs = [(one[key], other[key]) for one, other in zip(mine, base, strict=True) if key in one and key in other]
            if pairs and column.suite and setting.name != study.baseline:
                change = difference([one for one, _ in pairs], [other for _, other in pairs])
                row.differences.update({key: change} if change else {})
        rows.append(row)
    return Comparison(study, columns, tuple(rows), tuple(seen.warnings), tuple(results.values()))


def _shown_estimate(estimate: Estimate, column: Column) -> Estimate:
    """The interval cut where the measure itself ends, which Student's t knows nothing of, and none of minutes: how long machines
    take is no sample of anything."""
    if column.key == MINUTES:
        return replace(estimate, low=math.nan, high=math.nan)
    low, high = _RANGES.get(column.unit, (-math.inf, math.inf))
    return replace(estimate, low=max(estimate.low, low), high=min(estimate.high, high))


def _result(cell: PlannedCell, plan: Plan) -> Result:
    """Losses of the last stage that has them, minutes of all stages, and what the evaluation's files hold."""
    result = Result(cell.setting, cell.seed, cell.said, f"{processor()}, {settled_precision('auto')}")
    numbers: dict[str, float] = {}
    seconds = 0.0
    for key in cell.trainings:
        stage = plan.units[key].checkpoints
        summary = stage_summary(stage)
        seconds += float(summary.get("seconds", 0))
        losses = summary.get("validation", {})
        numbers |= {title: float(losses[name]) for name, title in _LOSSES.items() if name in losses}
        if (loss := _last_loss(stage)) is not None:
            numbers[LOSS] = loss
    numbers[MINUTES] = seconds / 60
    result.columns |= {title: Column(title, title) for title in numbers}
    result.observed |= {title: number(value) for title, value in numbers.items()}
    if cell.evaluation is not None:
        result.folder = plan.units[cell.evaluation].folder
        for path in sorted(result.folder.rglob(NAME)):
            try:
                _add_measures(read_evaluation(path.parent), result)
            except UserError as error:
                result.warnings.append(str(error))
                result.whole = False
    return result


def stage_summary(stage: Path) -> dict[str, Any]:
    """A finished training's summary.json; {} where there is none."""
    try:
        values = json.loads((stage / "summary.json").read_text())
        return values if isinstance(values, dict) else {}
    except (OSError, ValueError):
        return {}


def _last_loss(stage: Path) -> float | None:
    """Training loss over the last logged interval."""
    try:
        lines = (stage / "log.jsonl").read_text().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            record = json.loads(line)
            if record["kind"] == "train":
                return float(record["loss"])
        except (ValueError, KeyError, TypeError):
            continue
    return None


def _add_measures(evaluation: Evaluation, result: Result) -> None:
    suite = evaluation.suite
    result.agreed[suite.name] = suite.fingerprint
    if failed := sum(1 for image in evaluation.images if image.error):
        drawn = f"{failed} of {len(evaluation.images)} images of {suite.name} were not drawn with {result.setting}, seed {result.seed}"
        result.warnings.append(f"{drawn}; they count as failures.")
    for score in evaluation.scores:
        if score.skipped:
            continue
        name = f"{suite.name}/{score.name}"
        result.agreed[name] = json.dumps(score.settings, sort_keys=True, default=str)
        for measure in score.measures:
            if measure.higher_is_better is not None and (observed := _observed(score, measure)) is not None:
                key = f"{name}/{measure.name}"
                result.observed[key] = observed
                title = measure.title or measure.name
                result.columns[key] = Column(key, title, measure.unit, measure.higher_is_better, suite.name)


def _observed(result: ScoreResult, measure: Measure) -> Observed | None:
    above: dict[str, float] = defaultdict(float)
    below: dict[str, float] = defaultdict(float)
    for value, weight, prompt in measured(measure, result.images):
        above[prompt] += value * weight
        below[prompt] += weight
    overall = result.overall.get(measure.name)
    per_image = Observed(dict(above), dict(below), None, round(sum(below.values()))) if below else None
    if overall is None or not math.isfinite(overall.mean):
        return per_image
    # A mean by a formula of its own is not what the images' values add up to.
    if per_image is not None and math.isclose(per_image.value, overall.mean, rel_tol=1e-6, abs_tol=1e-9):
        return per_image
    return Observed(whole=overall, n=overall.n)


def _chosen(study: Study, seen: _Seen) -> tuple[Column, ...]:
    measured = [column for column in seen.columns.values() if column.suite]
    numbers = [column for column in seen.columns.values() if not column.suite]
    numbers.sort(key=lambda column: [*_LOSSES.values(), LOSS, MINUTES].index(column.key))
    if not study.measures:
        return (*measured, *numbers)
    chosen: list[Column] = []
    for name in study.measures:
        matching = [c for c in measured if c.key == name or c.key.endswith(f"/{name}")]
        if measured and not matching:
            seen.warn(f"measures: {name} was not measured; there are {', '.join(c.key for c in measured)}.")
        chosen += [column for column in matching if column not in chosen]
    return (*chosen, *numbers)


def write_comparison(folder: Path, comparison: Comparison, failures: list[tuple[str, str]]) -> Path:
    """Write report.md, report.json and report.html into ``folder``, each whole; the page's path. ``failures`` are title and reason of
    what is not finished."""
    figures = _figures(comparison)
    rows = [[row.setting.name, row.setting.note, "; ".join(_said(row.setting)) or "as the base"] for row in comparison.rows]
    sections = [
        *_main_sections(comparison, failures),
        *([Section("Measures", figures=figures)] if figures else []),
        Section("Each run", tables=[("", _runs(comparison))]),
        Section("Settings", tables=[("", text_grid(["setting", "note", "overrides"], rows, "; ".join(comparison.study.base), 3))]),
    ]
    return write_sections(folder, "report", _title(comparison), sections, _record(comparison, failures))


def as_markdown(comparison: Comparison, failures: list[tuple[str, str]]) -> str:
    return document_markdown(_title(comparison), _main_sections(comparison, failures))


def _main_sections(comparison: Comparison, failures: list[tuple[str, str]]) -> list[Section]:
    about = [*notes(comparison), f"Baseline: {comparison.study.baseline}."]
    found = [Section("", warnings=list(comparison.warnings), tables=[("", _table(comparison))]), Section("How to read it", about)]
    if failures:
        found.append(Section("Not finished", tables=[("", text_grid(["", "why"], failures, words=2))]))
    return found


def notes(comparison: Comparison) -> list[str]:
    """What the intervals mean and do not mean, with the numbers of seeds at hand."""
    most = max((len(row.seeds) for row in comparison.rows), default=0)
    prompts = [e.prompts for row in comparison.rows for key, e in row.estimates.items() if "/" in key]
    over = f"{max(prompts)} prompts" if prompts else "the prompts"
    found = []
    if most > 1:
        found.append(
            f"With each mean its 95 % interval over up to {most} seeds and {over}: Student's t with the variance between seeds and the "
            "bootstrap variance over prompts, which all seeds share."
        )
        if most < 5:
            found.append(
                f"{most} seeds say little about how much trainings differ; where seeds differ far more than prompts do, "
                "the intervals are too narrow. More seeds make them sure."
            )
    elif most == 1:
        found.append(
            f"With each mean its 95 % interval by bootstrap over {over}. With one seed it does not hold how much another training of "
            "the same setting would differ."
        )
    if any(row.differences for row in comparison.rows):
        found.append(
            f"Behind it the difference to {comparison.study.baseline}, paired by seed and prompt. Of many such intervals "
            "one in twenty leaves out 0 by chance."
        )
    if machines := sorted({result.machine for result in comparison.results}):
        found.append(f"Trained on: {'; '.join(machines)}.")
    if any(not column.suite for column in comparison.columns):
        found.append(
            "Losses compare settings with the same objective, data and last stage alone, and have an interval from three seeds "
            "on; minutes are those of all stages, those shared with other settings included."
        )
    return found


def _title(comparison: Comparison) -> str:
    return comparison.study.title or f"Ablation {comparison.study.name}"


def _table(comparison: Comparison) -> Grid:
    groups = []
    for group, members in groupby(comparison.rows, key=lambda row: row.setting.group):
        rows = []
        for row in members:
            count = f"{len(row.seeds)} of {row.planned}" if len(row.seeds) < row.planned else str(row.planned)
            shown = [_shown_cell(row, column) for column in comparison.columns]
            rows.append([*cells([row.setting.name, count]), *shown])
        groups.append(Group(group, rows))
    return Grid(["setting", "seeds", *(column.heading for column in comparison.columns)], groups)


def _shown_cell(row: Row, column: Column) -> Cell:
    """Mean, interval and the difference to the baseline: "better" or "worse" where its interval leaves out 0."""
    estimate = row.estimates.get(column.key)
    if estimate is None:
        return Cell(MISSING)
    small = [interval_text(estimate, column.unit)]
    kind = ""
    if found := row.differences.get(column.key):
        if (found.low > 0 or found.high < 0) and column.higher_is_better is not None:
            kind = "better" if (found.mean > 0) == column.higher_is_better else "worse"
        small.append(", ".join(filter(None, (difference_text(found, column.unit), kind))))
    return Cell(value_text(estimate.mean, column.unit), tuple(filter(None, small)), kind)


def _figures(comparison: Comparison) -> list[Markup]:
    """A row for each setting, with its interval."""
    names = [row.setting.name for row in comparison.rows]
    found: list[Markup] = []
    for number, column in enumerate([c for c in comparison.columns if c.suite][:_MOST_FIGURES]):
        estimates = [row.estimates.get(column.key) for row in comparison.rows]
        if any(value is not None for value in estimates):
            series = [Series(column.title, estimates)]
            found.append(row_figure(f"f{number}", column.heading, series, names, column.unit))
    return found


def _report_of(folder: Path | None) -> str:
    """The link from this page to the report of a run's evaluation, "" where there is none."""
    report = next(iter(sorted(folder.rglob("report.html"), key=lambda path: len(path.parts))), None) if folder else None
    if folder is None or report is None:
        return ""
    return quote("/".join([folder.parent.name, folder.name, *report.relative_to(folder).parts]))


def _runs(comparison: Comparison) -> Grid:
    rows = []
    for row in comparison.rows:
        for place, seed in enumerate(row.seeds):
            link = _report_of(row.folders[place])
            values = [row.values.get(c.key, (math.nan,) * len(row.seeds))[place] for c in comparison.columns]
            shown = [value_text(value, c.unit) for value, c in zip(values, comparison.columns, strict=True)]
            rows.append([Cell(f"{row.setting.name}, seed {seed}", link=link), *cells(shown)])
    return Grid(["run", *(column.heading for column in comparison.columns)], [Group("", rows)])


def _said(setting: Setting) -> list[str]:
    said = [*setting.overrides, *(f"stage {n}: {o}" for n, given in setting.per_stage.items() for o in given)]
    said += [f"stages {', '.join(map(str, setting.stages))}"] if setting.stages else []
    return [*said, *setting.evaluate]


def _record(comparison: Comparison, failures: list[tuple[str, str]]) -> dict[str, Any]:
    return {
        "paradiffusion_ablation": FORMAT_VERSION,
        "study": asdict(comparison.study),
        "columns": [asdict(column) for column in comparison.columns],
        "rows": [
            {
                "setting": row.setting.name,
                "group": row.setting.group,
                "seeds": list(row.seeds),
                "planned_seeds": row.planned,
                "estimates": {key: asdict(estimate) for key, estimate in row.estimates.items()},
                "differences": {key: asdict(estimate) for key, estimate in row.differences.items()},
                "values": {key: list(values) for key, values in row.values.items()},
            }
            for row in comparison.rows
        ],
        "notes": notes(comparison),
        "warnings": list(comparison.warnings),
        "not_finished": [{"unit": title, "reason": reason} for title, reason in failures],
    }
