"""The comparison of an ablation: measures, losses and time of each setting and seed, as Markdown, JSON and a page."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from paradiffusion.atomic import write_atomic
from paradiffusion.errors import UserError
from paradiffusion.evaluation.ablation.ablation_plan import Cell as PlannedCell
from paradiffusion.evaluation.ablation.ablation_plan import Plan
from paradiffusion.evaluation.ablation.ablation_study import Setting, Study
from paradiffusion.evaluation.ablation.running import Outcome
from paradiffusion.evaluation.ablation.seed_intervals import Observed, difference, over_seeds, plain_mean
from paradiffusion.evaluation.estimates import Estimate
from paradiffusion.evaluation.records import NAME, Evaluation, Measure, ScoreResult, finite, read_evaluation
from paradiffusion.evaluation.reporting.figures import Series, row_figure
from paradiffusion.evaluation.reporting.texts import (
    MISSING,
    difference_text,
    interval_text,
    value_text,
)
from paradiffusion.pages import Cell, Grid, Group, cells, grid_markdown, markdown, render

LOSS: Final = "training loss"
MINUTES: Final = "minutes"
_RANGES: Final = {"share": (0.0, 1.0), "cosine": (-1.0, 1.0)}
_LOSSES: Final = (("loss_long", "held-out loss, long"), ("loss_short", "held-out loss, short"))


@dataclass(frozen=True)
class Column:
    """One measure. ``key`` is "suite/score/measure", or the name of a number that training gave."""

    key: str
    title: str
    unit: str = "number"
    higher_is_better: bool | None = None
    suite: str = ""


@dataclass(frozen=True)
class Row:
    """One setting.

    Attributes:
        seeds: those that are finished, of ``planned``.
        values: by column, each finished seed's own number, in the order of ``seeds``; NaN where it has none.
        estimates, differences: by column, over the seeds, and to the baseline over the seeds that both have.
        folders: of each finished seed's evaluation, or None.
    """

    setting: Setting
    seeds: tuple[int, ...]
    planned: int
    values: dict[str, tuple[float, ...]]
    estimates: dict[str, Estimate]
    differences: dict[str, Estimate]
    folders: tuple[Path | None, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """The table, and what a reader must know beside it."""

    study: Study
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    warnings: tuple[str, ...]


@dataclass
class _Found:
    """What one cell has."""

    measures: dict[str, Observed] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    folder: Path | None = None


@dataclass
class _Seen:
    """What the evaluations must agree on to be compared, and what was found to differ."""

    columns: dict[str, Column] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def warn(self, sentence: str) -> None:
        if sentence not in self.warnings:
            self.warnings.append(sentence)


def compare(study: Study, plan: Plan, finished: set[str]) -> Comparison:
    """The table of all that is finished."""
    seen = _Seen()
    cells: dict[tuple[str, int], _Found] = {}
    for cell in plan.cells:
        if cell.trainings[-1] in finished and (cell.evaluation is None or cell.evaluation in finished):
            cells[cell.setting, cell.seed] = _read(cell, plan, seen)
    for names in _same_trainings(plan):
        seen.warn(
            f"{' and '.join(names)} were trained as one: no stage of this study reads what they differ in, so that where they "
            "are evaluated alike their difference is 0 by construction."
        )
    columns = _chosen(study, seen)
    rows = []
    for setting in study.settings:
        seeds = tuple(seed for seed in study.seeds if (setting.name, seed) in cells)
        paired = [seed for seed in seeds if (study.baseline, seed) in cells]
        folders = tuple(cells[setting.name, seed].folder for seed in seeds)
        rows.append(replace(_found_row(study, setting, seeds, paired, cells, columns), folders=folders))
    return Comparison(study, columns, tuple(rows), tuple(seen.warnings))


def _same_trainings(plan: Plan) -> list[tuple[str, ...]]:
    """Settings that share every training, such as two LoRA ranks where no stage trains LoRA."""
    settings: dict[tuple[str, ...], list[str]] = {}
    for cell in plan.cells:
        settings.setdefault(cell.trainings, []).append(cell.setting)
    return list(dict.fromkeys(tuple(names) for names in settings.values() if len(names) > 1))


def _found_row(
    study: Study, setting: Setting, seeds: tuple[int, ...], paired: Sequence[int], cells: dict[tuple[str, int], _Found],
    columns: tuple[Column, ...],
) -> Row:  # fmt: skip
    row = Row(setting, seeds, len(study.seeds), {}, {}, {})
    mine = [cells[setting.name, seed] for seed in seeds]
    for column in columns:
        key = column.key
        known = [found.measures[key] for found in mine if key in found.measures]
        numbers = [found.numbers[key] for found in mine if key in found.numbers]
        if known:
            row.values[key] = tuple(f.measures[key].value if key in f.measures else math.nan for f in mine)
            row.estimates[key] = _within(over_seeds(known), _RANGES.get(column.unit))
        elif numbers:
            row.values[key] = tuple(found.numbers.get(key, math.nan) for found in mine)
            mean = plain_mean(numbers)
            # How long machines take is no sample of anything.
            row.estimates[key] = replace(mean, low=math.nan, high=math.nan) if key == MINUTES else mean
        if setting.name == study.baseline or column.suite == "":
            continue
        pairs = [
            (cells[setting.name, seed].measures.get(key), cells[study.baseline, seed].measures.get(key))
            for seed in paired
        ]
        both = [(one, base) for one, base in pairs if one is not None and base is not None]
        found = difference([one for one, _ in both], [base for _, base in both]) if both else None
        if found is not None:
            row.differences[key] = found
    return row


def _within(estimate: Estimate, limits: tuple[float, float] | None) -> Estimate:
    """The interval cut where the measure itself ends, which Student's t knows nothing of."""
    if limits is None:
        return estimate
    return replace(estimate, low=max(estimate.low, limits[0]), high=min(estimate.high, limits[1]))


def _read(cell: PlannedCell, plan: Plan, seen: _Seen) -> _Found:
    found = _Found()
    seconds = 0.0
    for key in cell.trainings:
        stage = plan.units[key].checkpoints
        summary = _summary(stage)
        seconds += float(summary.get("seconds", 0))
        for name, title in _LOSSES:
            if name in summary.get("validation", {}):
                found.numbers[title] = float(summary["validation"][name])
                seen.columns.setdefault(title, Column(title, title))
        if (loss := _last_loss(stage)) is not None:
            found.numbers[LOSS] = loss
            seen.columns.setdefault(LOSS, Column(LOSS, LOSS))
    found.numbers[MINUTES] = seconds / 60
    seen.columns.setdefault(MINUTES, Column(MINUTES, MINUTES))
    if cell.evaluation is not None:
        found.folder = plan.units[cell.evaluation].folder
        for path in sorted(found.folder.rglob(NAME)):
            try:
                evaluation = read_evaluation(path.parent)
            except UserError as error:
                seen.warn(str(error))
                continue
            _take(evaluation, cell, found, seen)
    return found


def _take(evaluation: Evaluation, cell: PlannedCell, found: _Found, seen: _Seen) -> None:
    suite = evaluation.suite
    if seen.fingerprints.setdefault(suite.name, suite.fingerprint) != suite.fingerprint:
        seen.warn(
            f"the suite {suite.name} has other prompts in the evaluation of {cell.setting}, seed {cell.seed}, than in the first "
            "one, so it is left out; delete its folder under evaluated/, and run the study again."
        )
        return
    failed = sum(1 for image in evaluation.images if image.error)
    if failed:
        seen.warn(
            f"{failed} of {len(evaluation.images)} images of {suite.name} were not drawn with {cell.setting}, seed {cell.seed}; "
            "they count as failures."
        )
    for result in evaluation.scores:
        if result.skipped:
            continue
        name = f"{suite.name}/{result.name}"
        settings = json.dumps(result.settings, sort_keys=True, default=str)
        if seen.settings.setdefault(name, settings) != settings:
            seen.warn(
                f"{name} was computed with other settings for {cell.setting}, seed {cell.seed}, and is left out there."
            )
            continue
        for measure in result.measures:
            observed = _observed(result, measure)
            if observed is None:
                continue
            key = f"{name}/{measure.name}"
            found.measures[key] = observed
            title = measure.title or measure.name
            seen.columns.setdefault(key, Column(key, title, measure.unit, measure.higher_is_better, suite.name))


def _observed(result: ScoreResult, measure: Measure) -> Observed | None:
    above: dict[str, float] = {}
    below: dict[str, float] = {}
    count = 0.0
    for image in result.images:
        value = image.values.get(measure.name)
        if value is None or not math.isfinite(value):
            continue
        weight = image.weights.get(measure.name, 1.0)
        above[image.prompt] = above.get(image.prompt, 0.0) + value * weight
        below[image.prompt] = below.get(image.prompt, 0.0) + weight
        count += weight
    overall = result.overall.get(measure.name)
    per_image = Observed(above, below, None, round(count)) if sum(below.values()) > 0 else None
    if overall is None or not math.isfinite(overall.mean):
        return per_image
    # A mean by a formula of its own is not what the images' values add up to.
    if per_image is not None and math.isclose(per_image.value, overall.mean, rel_tol=1e-6, abs_tol=1e-9):
        return per_image
    return Observed(whole=overall, n=overall.n)


def _chosen(study: Study, seen: _Seen) -> tuple[Column, ...]:
    measured = [column for column in seen.columns.values() if column.suite]
    numbers = [column for column in seen.columns.values() if not column.suite]
    numbers.sort(key=lambda column: [*(title for _, title in _LOSSES), LOSS, MINUTES].index(column.key))
    if not study.measures:
        return (*measured, *numbers)
    chosen: list[Column] = []
    for name in study.measures:
        matching = [c for c in measured if c.key == name or c.key.endswith(f"/{name}")]
        if measured and not matching:
            seen.warn(f"measures: {name} was not measured; there are {', '.join(c.key for c in measured)}.")
        chosen += [column for column in matching if column not in chosen]
    return (*chosen, *numbers)


def _summary(stage: Path) -> dict[str, Any]:
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


FORMAT_VERSION: Final = 1
_MOST_FIGURES: Final = 12


def write_comparison(folder: Path, comparison: Comparison, outcome: Outcome | None, titles: dict[str, str]) -> Path:
    """Write report.md, report.json and report.html into ``folder``, each whole; the page's path.

    Args:
        outcome: how the run ended; None where nothing was run.
        titles: of units, by key, for those that failed.
    """
    failures = []
    if outcome is not None:
        failures = [(titles[key], reason) for key, reason in outcome.failed.items()]
        failures += [(titles[key], "not run, since what it starts from failed") for key in outcome.blocked]
    write_atomic(folder / "report.json", json.dumps(_record(comparison, failures), ensure_ascii=False, indent=1) + "\n")
    write_atomic(folder / "report.md", as_markdown(comparison, failures))
    write_atomic(folder / "report.html", as_page(comparison, failures))
    return folder / "report.html"


def as_markdown(comparison: Comparison, failures: list[tuple[str, str]]) -> str:
    """Heading, table, notes."""
    lines = [f"# {markdown(_title(comparison))}", "", grid_markdown(_table(comparison))]
    lines += ["", *(f"- {markdown(note)}" for note in notes(comparison))]
    lines += [f"- **{markdown(warning)}**" for warning in comparison.warnings]
    lines += [
        f"- {markdown(row.setting.name)}: {markdown(row.setting.note)}" for row in comparison.rows if row.setting.note
    ]
    if failures:
        lines += ["", "## Not finished", ""]
        lines += [f"- {markdown(title)}: {markdown(reason)}" for title, reason in failures]
    return "\n".join(lines) + f"\n\nBaseline: {markdown(comparison.study.baseline)}.\n"


def as_page(comparison: Comparison, failures: list[tuple[str, str]]) -> str:
    """The page: table, a figure for each measure, single runs, settings, and what is not finished."""
    return render(
        "evaluation/templates/ablation.html", title=_title(comparison), warnings=comparison.warnings, failures=failures,
        table=_table(comparison), notes=notes(comparison), figures=_figures(comparison), runs=_runs(comparison),
        settings=[(row.setting, "; ".join(_said(row.setting)) or "as the base") for row in comparison.rows],
        base="; ".join(comparison.study.base),
    )  # fmt: skip


def notes(comparison: Comparison) -> list[str]:
    """What the intervals mean and do not mean, with the numbers of seeds at hand."""
    most = max((len(row.seeds) for row in comparison.rows), default=0)
    prompts = [e.prompts for row in comparison.rows for key, e in row.estimates.items() if "/" in key]
    over = f"{max(prompts)} prompts" if prompts else "the prompts"
    found = []
    if most > 1:
        found.append(
            f"In brackets: 95 % intervals over up to {most} seeds and {over}: Student's t with the variance between seeds and the "
            "bootstrap variance over prompts, which all seeds share."
        )
        if most < 5:
            found.append(
                f"{most} seeds say little about how much trainings differ; where seeds differ far more than prompts do, "
                "the intervals are too narrow. More seeds make them sure."
            )
    elif most == 1:
        found.append(
            f"In brackets: 95 % intervals by bootstrap over {over}. With one seed they do not hold how much another training of "
            "the same setting would differ."
        )
    if any(row.differences for row in comparison.rows):
        found.append(
            f"Second in a cell: the difference to {comparison.study.baseline}, paired by seed and prompt. Of many such intervals "
            "one in twenty leaves out 0 by chance."
        )
    if any(not column.suite for column in comparison.columns):
        found.append(
            "Losses compare settings with the same objective, data and last stage alone, and have an interval from three seeds "
            "on; minutes are those of all stages, those shared with other settings included."
        )
    return found


def _title(comparison: Comparison) -> str:
    return comparison.study.title or f"Ablation {comparison.study.name}"


def _heading(column: Column) -> str:
    arrow = {True: " ↑", False: " ↓", None: ""}[column.higher_is_better]
    return f"{column.title}{arrow}" + (f" ({column.suite})" if column.suite else "")


def _seeds(row: Row) -> str:
    return f"{len(row.seeds)} of {row.planned}" if len(row.seeds) < row.planned else str(row.planned)


def _change(row: Row, column: Column) -> tuple[str, str]:
    """The difference as text, and "better", "worse" or "" where its interval leaves out 0."""
    found = row.differences.get(column.key)
    if found is None:
        return "", ""
    sure = found.low > 0 or found.high < 0
    if not sure or column.higher_is_better is None:
        return difference_text(found, column.unit), ""
    return difference_text(found, column.unit), "better" if (found.mean > 0) == column.higher_is_better else "worse"


def _table(comparison: Comparison) -> Grid:
    columns = comparison.columns
    groups = []
    for group, members in groupby(comparison.rows, key=lambda row: row.setting.group):
        rows = [
            [*cells([row.setting.name, _seeds(row)]), *(_shown_cell(row, column) for column in columns)]
            for row in members
        ]
        groups.append(Group(group, rows))
    return Grid(["setting", "seeds", *map(_heading, columns)], groups)


def _shown_cell(row: Row, column: Column) -> Cell:
    estimate = row.estimates.get(column.key)
    if estimate is None:
        return Cell(MISSING)
    interval = interval_text(estimate, column.unit)
    change, kind = _change(row, column)
    small = [interval] if interval else []
    small += [f"{change}, {kind}" if kind else change] if change else []
    return Cell(value_text(estimate.mean, column.unit), tuple(small), kind)


def _figures(comparison: Comparison) -> list[str]:
    """A row for each setting, with its interval."""
    names = [row.setting.name for row in comparison.rows]
    found: list[str] = []
    for number, column in enumerate([c for c in comparison.columns if c.suite][:_MOST_FIGURES]):
        estimates = [row.estimates.get(column.key) for row in comparison.rows]
        if any(value is not None for value in estimates):
            series = [Series(column.title, estimates)]
            found.append(row_figure(f"f{number}", _heading(column), series, names, column.unit))
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
            link = _report_of(row.folders[place] if row.folders else None)
            values = [row.values.get(c.key, (math.nan,) * len(row.seeds))[place] for c in comparison.columns]
            shown = [value_text(value, c.unit) for value, c in zip(values, comparison.columns, strict=True)]
            rows.append([Cell(f"{row.setting.name}, seed {seed}", link=link), *cells(shown)])
    return Grid(["run", *map(_heading, comparison.columns)], [Group("", rows)])


def _said(setting: Setting) -> list[str]:
    said = [*setting.overrides, *(f"stage {n}: {o}" for n, given in setting.per_stage.items() for o in given)]
    said += [f"stages {', '.join(map(str, setting.stages))}"] if setting.stages else []
    return [*said, *setting.evaluate]


def _record(comparison: Comparison, failures: list[tuple[str, str]]) -> dict[str, Any]:
    record = {
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
    found: dict[str, Any] = finite(record)
    return found
