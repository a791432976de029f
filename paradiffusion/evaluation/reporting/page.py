"""A report as a page: one file, readable without a network or a script, light or dark, on paper and on a telephone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from paradiffusion.evaluation.reporting import tables
from paradiffusion.evaluation.reporting.cards import picture_cards
from paradiffusion.evaluation.reporting.grids import grid_html
from paradiffusion.evaluation.reporting.numbers import ScoreNumbers, SuiteNumbers
from paradiffusion.evaluation.reporting.own_tables import own_tables
from paradiffusion.evaluation.reporting.pictures import Album
from paradiffusion.evaluation.reporting.plots import measure_figures, table_figures
from paradiffusion.evaluation.reporting.style import SCRIPT, STYLE
from paradiffusion.evaluation.reporting.texts import html
from paradiffusion.evaluation.reporting.votes import vote_tables, vote_warnings
from paradiffusion.pages import page

PICTURE_BYTES: Final = 5_500_000  # of a page, so that it stays below 8 MB with 400 prompts and three models


def report_page(folder: Path, title: str, suites: Sequence[SuiteNumbers], votes: Mapping[str, Any] | None) -> str:
    """The HTML of a report that will lie in ``folder``."""
    album = Album(folder, PICTURE_BYTES)
    sections, links = [], []
    for numbers in suites:
        parts = _suite(numbers, album, PICTURE_BYTES // len(suites))
        links.append(_links(numbers, [name for name, _, content in parts if content]))
        body = "".join(
            f'<section id="{numbers.anchor}-{name}"><h3>{heading}</h3>{content}</section>'
            for name, heading, content in parts
            if content
        )
        sections.append(
            f'<section class="suite" id="{numbers.anchor}"><h2>{html(numbers.suite.title)}</h2>{body}</section>'
        )
    if votes is not None:
        links.append('<li><a href="#votes">Human votes</a></li>')
        sections.append(f'<section class="suite" id="votes"><h2>Human votes</h2>{_votes(votes)}</section>')
    parts_of_page = [
        f"<header><h1>{html(title)}</h1></header>",
        f'<nav aria-label="Contents"><ul>{"".join(links)}</ul></nav>',
        f"<main>{''.join(sections)}</main>",
        f"<script>{SCRIPT}</script>",
    ]
    return page(" ".join(title.split()), STYLE, "\n".join(parts_of_page))


SECTIONS: Final = {
    "judged": "What was judged",
    "scores": "Scores",
    "categories": "By category",
    "each": "Each score",
    "pictures": "Pictures",
    "prompts": "Every prompt",
    "failures": "Failures",
}


def _links(numbers: SuiteNumbers, names: Sequence[str]) -> str:
    inner = "".join(f'<li><a href="#{numbers.anchor}-{name}">{SECTIONS[name]}</a></li>' for name in names)
    return f'<li><a href="#{numbers.anchor}">{html(numbers.suite.title)}</a><ul>{inner}</ul></li>'


def _suite(numbers: SuiteNumbers, album: Album, budget: int) -> list[tuple[str, str, str]]:
    """(name, heading, content) of each part, empty ones included."""
    pictures = picture_cards(numbers, album, budget)
    prompts = tables.prompt_grid(numbers, pictures.anchors)
    contents = {
        "judged": _judged(numbers),
        "scores": _scores(numbers),
        "categories": _categories(numbers),
        "each": "".join(
            _score(numbers, score, i) for i, score in enumerate(numbers.scores) if not score.described.skipped
        ),
        "pictures": pictures.body,
        "prompts": _folded(f"{len(prompts.groups[0].rows):,} prompts", grid_html(prompts, "Every prompt")),
        "failures": _failures(numbers),
    }
    return [(name, SECTIONS[name], content) for name, content in contents.items()]


def _judged(numbers: SuiteNumbers) -> str:
    suite = numbers.suite
    words = sorted(prompt.words for prompt in suite.prompts)
    length = f" of {words[0]} to {words[-1]} words, median {words[len(words) // 2]}" if words else ""
    about = [f"{len(words):,} prompts{length}."]
    about += [f"Source: {suite.source.rstrip('.')}."] if suite.source else []
    about += [f"Licence: {suite.licence.rstrip('.')}."] if suite.licence else []
    return f"<p>{html(' '.join(about))}</p>{grid_html(tables.judged_grid(numbers), 'What was judged')}"


def _scores(numbers: SuiteNumbers) -> str:
    grid = tables.score_grid(numbers)
    body = grid_html(grid, "Scores by length") if grid.groups else '<p class="note">No score was computed.</p>'
    left = "".join(f"<li><b>{html(name)}</b>: {html(why)}</li>" for name, why in tables.skipped(numbers))
    return body + (f'<h4>Not computed</h4><ul class="skipped">{left}</ul>' if left else "")


def _categories(numbers: SuiteNumbers) -> str:
    grid = tables.category_grid(numbers)
    if not grid.groups:
        return ""
    count = max(len(group.rows) for group in grid.groups)
    return _folded(f"Scores in {count} categories", grid_html(grid, "Scores by category"))


def _score(numbers: SuiteNumbers, score: ScoreNumbers, place: int) -> str:
    result, anchor = score.described, f"{numbers.anchor}-score-{place}"
    about = "".join(
        f"<dt>{name}</dt><dd>{html(text)}</dd>"
        for name, text in (("Formula", result.formula), ("Source", result.source))
        if text
    )
    settings = "".join(
        f"<dt>{html(key)}</dt><dd>{html(text)}</dd>" for key, text in tables.settings_lines(numbers, score)
    )
    warnings = "".join(f"<li>{html(text)}</li>" for text in tables.shared(numbers, score, "warnings"))
    figures: list[str] = []
    further: list[str] = []
    for number, one in enumerate(score.measures):
        made = measure_figures(numbers, score, one, f"{anchor}-{number}")
        (figures if number == 0 else further).extend(made)
    own = []
    for number, found in enumerate(own_tables(numbers, score)):
        name = found[0][1].title
        drawn = "".join(table_figures(found, f"{anchor}-own-{number}"))
        table = grid_html(tables.own_grid(found), name)
        plot = f'<div class="plots">{drawn}</div>' if drawn else ""
        own.append(
            f"<div>{plot}{_folded(f'Table: {name}', table)}</div>"
            if drawn
            else f"<div><h5>{html(name)}</h5>{table}</div>"
        )
    return (
        f'<section class="score" id="{anchor}"><h4>{html(score.title)}</h4>'
        + (f'<ul class="warnings">{warnings}</ul>' if warnings else "")
        + (f"<dl>{about}</dl>" if about else "")
        + (_folded("Settings", f"<dl>{settings}</dl>") if settings else "")
        + (f'<div class="plots">{"".join(figures)}</div>' if figures else "")
        + (f'<div class="owns">{"".join(own)}</div>' if own else "")
        + (_folded("Plots of its other measures", f'<div class="plots">{"".join(further)}</div>') if further else "")
        + "</section>"
    )


def _failures(numbers: SuiteNumbers) -> str:
    grid = tables.failure_grid(numbers)
    if not grid.groups:
        return '<p class="note">Nothing failed.</p>'
    count = len(numbers.failures)
    note = (
        f'<p class="note">{count:,} failure{"s" * (count != 1)}. Each counts with the worst value of its measure, never left out of '
        "a mean over images.</p>"
    )
    return note + grid_html(grid, "Failures")


def _votes(votes: Mapping[str, Any]) -> str:
    parts = [
        f"<h3>{html(table.title)}</h3>{grid_html(tables.own_grid([('', table)]), table.title)}"
        for table in vote_tables(votes)
    ]
    warnings = "".join(f"<li>{html(text)}</li>" for text in vote_warnings(votes))
    parts += [f'<ul class="warnings">{warnings}</ul>'] if warnings else []
    return "".join(parts) or '<p class="note">There are no votes yet.</p>'


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{html(summary)}</summary>{content}</details>"
