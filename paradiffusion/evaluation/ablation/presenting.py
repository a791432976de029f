"""The table of an ablation as Markdown, as JSON and as a self-contained page."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from paradiffusion.atomic import write_atomic
from paradiffusion.evaluation.ablation.collecting import Column, Comparison, Row
from paradiffusion.evaluation.ablation.running import Outcome
from paradiffusion.evaluation.ablation.study import Setting
from paradiffusion.evaluation.reporting.figures import Series, row_figure
from paradiffusion.evaluation.reporting.texts import (
    MISSING,
    difference_text,
    estimate_text,
    finite,
    interval_text,
    value_text,
)
from paradiffusion.pages import Cell, Grid, Group, cells, markdown, markdown_table, render

FORMAT_VERSION: Final = 1
_MOST_FIGURES: Final = 12


def write_comparison(folder: Path, comparison: Comparison, outcome: Outcome | None, titles: dict[str, str]) -> Path:
    """Write report.md, report.json and report.html into ``folder``, each whole; the page's path.

    Args:
        outcome: how the run ended; None where nothing was run.
        titles: of units, by key, for those that failed.
    """
    failures = [] if outcome is None else [(titles[key], reason) for key, reason in outcome.failed.items()]
    failures += (
        []
        if outcome is None
        else [(titles[key], "not run, since what it starts from failed") for key in outcome.blocked]
    )
    write_atomic(folder / "report.json", json.dumps(_record(comparison, failures), ensure_ascii=False, indent=1) + "\n")
    write_atomic(folder / "report.md", as_markdown(comparison, failures))
    write_atomic(folder / "report.html", as_page(comparison, failures))
    return folder / "report.html"


def as_markdown(comparison: Comparison, failures: list[tuple[str, str]]) -> str:
    """Heading, table, notes."""
    study, columns = comparison.study, comparison.columns
    head = ["setting", "seeds", *(_heading(column) for column in columns)]
    rows = [
        [markdown(row.setting.name), _seeds(row), *(_markdown_cell(row, column) for column in columns)]
        for row in comparison.rows
    ]
    lines = [f"# {markdown(_title(comparison))}", ""]
    lines.append(markdown_table([markdown(text) for text in head], rows))
    lines += ["", *(f"- {markdown(note)}" for note in notes(comparison))]
    lines += [f"- **{markdown(warning)}**" for warning in comparison.warnings]
    lines += [
        f"- {markdown(row.setting.name)}: {markdown(row.setting.note)}" for row in comparison.rows if row.setting.note
    ]
    if failures:
        lines += ["", "## Not finished", ""]
        lines += [f"- {markdown(title)}: {markdown(reason)}" for title, reason in failures]
    return "\n".join(lines) + f"\n\nBaseline: {markdown(study.baseline)}.\n"


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


def _markdown_cell(row: Row, column: Column) -> str:
    estimate = row.estimates.get(column.key)
    if estimate is None:
        return MISSING
    change, kind = _change(row, column)
    shown = f"**{change}**" if kind else change
    return estimate_text(estimate, column.unit) + (f"<br>{shown}" if change else "")


def _table(comparison: Comparison) -> Grid:
    columns = comparison.columns
    groups = []
    for group, members in groupby(comparison.rows, key=lambda row: row.setting.group):
        rows = [
            [*cells([row.setting.name, _seeds(row)]), *(_cell(row, column) for column in columns)] for row in members
        ]
        groups.append(Group(group, rows))
    return Grid(["setting", "seeds", *map(_heading, columns)], groups)


def _cell(row: Row, column: Column) -> Cell:
    estimate = row.estimates.get(column.key)
    if estimate is None:
        return Cell(MISSING)
    interval = interval_text(estimate, column.unit)
    change, kind = _change(row, column)
    small = [f"({interval})"] if interval else []
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
