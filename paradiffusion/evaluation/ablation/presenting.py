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
from paradiffusion.evaluation.estimates import Estimate
from paradiffusion.evaluation.reporting.figures import Series, row_figure
from paradiffusion.evaluation.reporting.texts import (
    MISSING,
    difference_text,
    estimate_text,
    html,
    interval_text,
    markdown,
    value_text,
)
from paradiffusion.pages import page

FORMAT_VERSION: Final = 1
_MOST_FIGURES: Final = 12
_STYLE: Final = """
:root { --model0: #3b7dd8; } @media (prefers-color-scheme: dark) { :root { --model0: #6ea6f0; } }
h2 { font-size: 1.1rem; margin: 1.75rem 0 .5rem; } p, li { max-width: 60rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { vertical-align: bottom; font-weight: 600; }
tbody th { font-weight: 600; position: sticky; left: 0; background: Canvas; }
tr.group th { color: var(--soft); font-weight: 500; padding-top: .9rem; }
td small { display: block; color: var(--soft); white-space: nowrap; } td small.better { color: var(--good); }
td small.worse { color: var(--bad); }
.figures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr)); }
"""


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
    page = folder / "report.html"
    write_atomic(page, as_page(comparison, failures))
    return page


def as_markdown(comparison: Comparison, failures: list[tuple[str, str]]) -> str:
    """Heading, table, notes."""
    study, columns = comparison.study, comparison.columns
    head = ["setting", "seeds", *(_heading(column) for column in columns)]
    rows = [
        [markdown(row.setting.name), _seeds(row), *(_markdown_cell(row, column) for column in columns)]
        for row in comparison.rows
    ]
    lines = [f"# {markdown(_title(comparison))}", ""]
    lines += [
        "| " + " | ".join(cells) + " |" for cells in ([markdown(text) for text in head], ["---"] * len(head), *rows)
    ]
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
    parts = [f"<h1>{html(_title(comparison))}</h1>"]
    if comparison.warnings:
        items = "".join(f"<li>{html(warning)}</li>" for warning in comparison.warnings)
        parts.append(f'<ul role="alert">{items}</ul>')
    parts.append(_html_table(comparison))
    parts.append(f"<ul>{''.join(f'<li>{html(note)}</li>' for note in notes(comparison))}</ul>")
    if failures:
        items = "".join(f"<li><b>{html(title)}</b>: {html(reason)}</li>" for title, reason in failures)
        parts.append(f"<h2>Not finished</h2><ul>{items}</ul>")
    if figures := _figures(comparison):
        parts.append(f'<h2>Measures</h2><div class="figures">{"".join(figures)}</div>')
    parts.append(f"<h2>Each run</h2>{_runs(comparison)}<h2>Settings</h2>{_settings(comparison)}")
    return page(_title(comparison), _STYLE, "\n".join(parts))


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


def _html_table(comparison: Comparison) -> str:
    columns = comparison.columns
    head = "".join(f'<th scope="col">{html(_heading(column))}</th>' for column in columns)
    body = []
    for group, members in groupby(comparison.rows, key=lambda row: row.setting.group):
        if group:
            body.append(f'<tr class="group"><th scope="rowgroup" colspan="{2 + len(columns)}">{html(group)}</th></tr>')
        for row in members:
            cells = "".join(_html_cell(row, column) for column in columns)
            body.append(f'<tr><th scope="row">{html(row.setting.name)}</th><td>{_seeds(row)}</td>{cells}</tr>')
    return (
        '<div class="wide" tabindex="0" role="region" aria-label="Table of settings and measures"><table><thead><tr>'
        f'<th scope="col">setting</th><th scope="col">seeds</th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    )


def _html_cell(row: Row, column: Column) -> str:
    estimate = row.estimates.get(column.key)
    if estimate is None:
        return f"<td>{MISSING}</td>"
    interval = interval_text(estimate, column.unit)
    lines = html(value_text(estimate.mean, column.unit))
    lines += f"<small>({html(interval)})</small>" if interval else ""
    change, kind = _change(row, column)
    if change:
        word = f", {kind}" if kind else ""
        lines += f'<small class="{kind or "even"}">{html(change)}{word}</small>'
    return f"<td>{lines}</td>"


def _figures(comparison: Comparison) -> list[str]:
    """A row for each setting, with its interval."""
    names = [row.setting.name for row in comparison.rows]
    found = []
    for number, column in enumerate([c for c in comparison.columns if c.suite][:_MOST_FIGURES]):
        estimates = [row.estimates.get(column.key) for row in comparison.rows]
        if any(value is not None for value in estimates):
            series = [Series(column.title, estimates)]
            found.append(f"<article>{row_figure(f'f{number}', _heading(column), series, names, column.unit)}</article>")
    return found


def _name_of_run(row: Row, place: int) -> str:
    """Setting and seed, with a link to the evaluation's own report where there is one, relative to this page."""
    name = html(f"{row.setting.name}, seed {row.seeds[place]}")
    folder = row.folders[place] if row.folders else None
    report = next(iter(sorted(folder.rglob("report.html"), key=lambda path: len(path.parts))), None) if folder else None
    if folder is None or report is None:
        return name
    link = quote("/".join([folder.parent.name, folder.name, *report.relative_to(folder).parts]))
    return f'<a href="{html(link)}">{name}</a>'


def _runs(comparison: Comparison) -> str:
    head = "".join(f'<th scope="col">{html(_heading(column))}</th>' for column in comparison.columns)
    body = []
    for row in comparison.rows:
        for place in range(len(row.seeds)):
            values = (row.values.get(c.key, (math.nan,) * len(row.seeds))[place] for c in comparison.columns)
            shown = zip(values, comparison.columns, strict=True)
            cells = "".join(f"<td>{html(value_text(value, column.unit))}</td>" for value, column in shown)
            body.append(f'<tr><th scope="row">{_name_of_run(row, place)}</th>{cells}</tr>')
    return (
        '<div class="wide" tabindex="0" role="region" aria-label="Each run"><table><thead><tr><th scope="col">run</th>'
        f"{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _settings(comparison: Comparison) -> str:
    items = []
    for row in comparison.rows:
        setting = row.setting
        said = [*setting.overrides, *(f"stage {n}: {o}" for n, given in setting.per_stage.items() for o in given)]
        said += [f"stages {', '.join(map(str, setting.stages))}"] if setting.stages else []
        said += [*setting.evaluate]
        note = f" {html(setting.note)}" if setting.note else ""
        items.append(
            f"<li><b>{html(setting.name)}</b>{note} <code>{html('; '.join(said) or 'as the base')}</code></li>"
        )
    base = "; ".join(comparison.study.base)
    return f"<ul>{''.join(items)}</ul>" + (f"<p>In all of them: <code>{html(base)}</code></p>" if base else "")


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
                "estimates": {key: _plain(estimate) for key, estimate in row.estimates.items()},
                "differences": {key: _plain(estimate) for key, estimate in row.differences.items()},
                "values": {key: [_number(value) for value in values] for key, values in row.values.items()},
            }
            for row in comparison.rows
        ],
        "notes": notes(comparison),
        "warnings": list(comparison.warnings),
        "not_finished": [{"unit": title, "reason": reason} for title, reason in failures],
    }


def _plain(estimate: Estimate) -> dict[str, Any]:
    return {key: _number(value) for key, value in asdict(estimate).items()}


def _number(value: float) -> float | None:
    """JSON has no word for NaN."""
    return value if math.isfinite(value) else None
