"""Figures of a report as inline SVG: drawn by matplotlib in the page's own colours and letters, the same bytes for the same numbers."""

from __future__ import annotations

import io
import logging
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Final

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paradiffusion.evaluation.estimates import Estimate
from paradiffusion.evaluation.records import Table
from paradiffusion.evaluation.reporting.numbers import MeasureNumbers, Row, ScoreNumbers, SuiteNumbers
from paradiffusion.evaluation.reporting.report_tables import group_name
from paradiffusion.evaluation.reporting.texts import cell_text, estimate_text, excerpt
from paradiffusion.pages import page_text, plain, render

# Stand-ins that the page's own colours replace, so that one figure serves light and dark: ink, lines, and the models'.
INK: Final = "#0f0e01"
LINE: Final = "#0f0e02"
MODELS: Final = tuple(f"#0f0ea{i}" for i in range(8))
MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X", "*")  # no model is known by its colour alone
DASHES: Final = ("-", "--", "-.", ":", "-", "--", "-.", ":")
MOST_POINTS: Final = 500
MOST_PLACES: Final = 24
LENGTH: Final = re.compile(r"\d+ words")  # a category of suite=scenes with lengths
_STYLE: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "paradiffusion",
    "text.parse_math": False,  # a model's name may hold dollar signs
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
}
_FONT: Final = re.compile(r"font-family: [^;\"]*;? ?|(?<=font: )([\d.]+px) [^;\"]*")
_ID: Final = re.compile(r'(\bid="|href="#|url\(#)')


@dataclass(frozen=True)
class Series:
    """One model's numbers, an estimate (or None) for each place on the axis; ``points`` are (x, value) drawn faintly, and ``cut`` the
    places at which the model did not read all of some prompts."""

    label: str
    estimates: Sequence[Estimate | None]
    points: Sequence[tuple[float, float]] = ()
    cut: Sequence[int] = ()


def line_figure(
    name: str, title: str, series: Sequence[Series], places: Sequence[str], unit: str, axis: str,
    at: Sequence[float] | None = None,
) -> Markup:  # fmt: skip
    """Estimates with their intervals joined by lines: against length, by position.

    ``name`` is unique on the page; ids inside the figure begin with it. ``places`` are what the places on the axis are called, and
    ``at`` the position of each; None: 0, 1, 2, ..., labelled by ``places``."""
    axes = _empty(4.4, 2.9)
    for number, one in enumerate(series):
        shown = one.points[:: -(-len(one.points) // MOST_POINTS) or 1]
        axes.scatter([x for x, _ in shown], [y for _, y in shown], s=7, color=_colour(number), alpha=0.3, lw=0)
        step = 0.1 if at is None else (max(at) - min(at)) * 0.012
        where = _beside(number, len(series), step, range(len(places)) if at is None else at)
        _errors(axes, where, one, number, DASHES[number % len(DASHES)])
        ringed = [(where[place], value.mean) for place in one.cut if (value := one.estimates[place]) is not None]
        if ringed:
            axes.plot(*zip(*ringed, strict=True), "o", markersize=11, mfc="none", color=_colour(number))
    if at is None:
        _name_places(axes, places)
        axes.set_xlim(-0.5, len(places) - 0.5)
    axes.set_xlabel(axis)
    return _drawn(axes, name, title, series, places, unit)


def row_figure(name: str, title: str, series: Sequence[Series], places: Sequence[str], unit: str, legend: bool = True) -> Markup:
    """Estimates with their intervals, a row for each place: categories, models."""
    # Without a legend each series has a row of its own, and stands in its middle.
    spread = len(series) if legend else 1
    axes = _empty(4.4, 0.9 + len(places) * (0.2 + 0.14 * spread) + 0.25 * legend * (len(series) > 1))
    for number, one in enumerate(series):
        _errors(axes, _beside(number if legend else 0, spread, 0.7 / spread, range(len(places))), one, number, "none", upright=False)
    axes.set_yticks(range(len(places)), [excerpt(place, 24) for place in places])
    axes.set_ylim(len(places) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    return _drawn(axes, name, title, series, places, unit, legend, upright=False)


def bar_figure(name: str, title: str, series: Sequence[Series], places: Sequence[str], unit: str) -> Markup:
    """Bars from 0 with intervals, those of one place side by side."""
    axes = _empty(4.4, 2.9)
    width = 0.8 / max(1, len(series))
    for number, one in enumerate(series):
        where, values = _known(_beside(number, len(series), width, range(len(places))), one)
        axes.bar(
            where, [value.mean for value in values], width * 0.92, yerr=_ends(values), color=_colour(number), alpha=0.75,
            error_kw={"ecolor": INK, "elinewidth": 1.1}, label=_label(one),
        )  # fmt: skip
    _name_places(axes, places)
    axes.grid(axis="x", visible=False)
    return _drawn(axes, name, title, series, places, unit)


def _empty(width: float, height: float) -> Axes:
    with rc_context(_STYLE):
        return Figure(figsize=(width, height), layout="constrained").add_subplot()


def _beside(number: int, count: int, width: float, at: Sequence[float]) -> list[float]:
    """Where a series stands at each place, so that intervals do not cover each other."""
    return [place + (number - (count - 1) / 2) * width for place in at]


def _known(where: Sequence[float], one: Series) -> tuple[list[float], list[Estimate]]:
    known = [(x, value) for x, value in zip(where, one.estimates, strict=True) if value is not None]
    return [x for x, _ in known], [value for _, value in known]


def _errors(axes: Axes, where: Sequence[float], one: Series, number: int, line: str, upright: bool = True) -> None:
    places, values = _known(where, one)
    means, ends = [value.mean for value in values], _ends(values)
    axes.errorbar(
        *((places, means, ends, None) if upright else (means, places, None, ends)), color=_colour(number), linestyle=line,
        marker=MARKERS[number % len(MARKERS)], elinewidth=1.2, capsize=2.5, label=_label(one),
    )  # fmt: skip


def _label(one: Series) -> str:
    return f" {plain(one.label)}"  # matplotlib leaves out of a legend what begins with "_"


def _ends(values: Sequence[Estimate]) -> list[list[float]]:
    """Lengths of the error bars, [2, n]; 0 where an end is unknown or, as in a percentile interval it can, lies beyond."""
    return [
        [max(0.0, value.mean - value.low) if value.low == value.low else 0.0 for value in values],
        [max(0.0, value.high - value.mean) if value.high == value.high else 0.0 for value in values],
    ]


def _name_places(axes: Axes, places: Sequence[str]) -> None:
    slanted: dict[str, Any] = {"rotation": 35, "ha": "right"} if len(places) > 6 or any(len(place) > 12 for place in places) else {}
    axes.set_xticks(range(len(places)), [excerpt(place, 14) for place in places], **slanted)


def _colour(number: int) -> str:
    return MODELS[number % len(MODELS)]


def _drawn(
    axes: Axes, name: str, title: str, series: Sequence[Series], places: Sequence[str], unit: str, legend: bool = True,
    upright: bool = True,
) -> Markup:  # fmt: skip
    """The figure under its title; over the axes alone a long one would run out of the picture. Said in words for those who do
    not see it."""
    if unit == "share":
        (axes.yaxis if upright else axes.xaxis).set_major_formatter(lambda value, _: f"{100 * value:g} %")
    if legend and len(series) > 1:
        handles, texts = axes.get_legend_handles_labels()
        labels = [f" {excerpt(text, 24)}" for text in texts]
        # Side by side only what the figure is wide enough for: what runs over its edge is cut off.
        columns = max(1, min(3, len(series), 60 // (max(map(len, labels), default=0) + 4)))
        axes.figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8.5, frameon=False)
    said = (
        ", ".join(
            f"{place} {estimate_text(value, unit)}{' (cut)' if number in one.cut else ''}"
            for number, (place, value) in enumerate(zip(places, one.estimates, strict=True))
            if value is not None
        )
        for one in series
    )
    whole = "; ".join(f"{one.label}: {values}" for one, values in zip(series, said, strict=True))
    svg = _svg(axes, name, plain(f"{title}. {whole}."))
    return Markup(render("evaluation/templates/figure.html", title=title, svg=svg))


def _svg(axes: Axes, name: str, description: str) -> Markup:
    figure: Any = axes.figure
    buffer, log = io.StringIO(), logging.getLogger("matplotlib")
    level = log.level
    with rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that its own font lacks: the browser's has them
        log.setLevel(logging.ERROR)
        try:
            nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
        finally:
            log.setLevel(level)
    text = buffer.getvalue()
    text = _ID.sub(lambda match: f"{match.group()}{name}-", text[text.index("<svg") :])
    text = _FONT.sub(lambda match: f"{match.group(1)} system-ui, sans-serif" if match.group(1) else "", text)
    text = text.replace(INK, "currentColor").replace(LINE, "var(--line)")
    for number, colour in enumerate(MODELS):
        text = text.replace(colour, f"var(--model{number})")
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{page_text(description)}"', 1).strip())


def measure_figures(numbers: SuiteNumbers, score: ScoreNumbers, one: MeasureNumbers, name: str) -> list[Markup]:
    """A measure by model, against length and by category, as far as there is something to see; ``name`` is unique on the page."""
    measure, found = one.measure, []
    curve = len(one.categories) > 1 and all(LENGTH.fullmatch(row.group) for row in one.categories)
    if sum(value is not None for value in one.whole.estimates) > 1:
        alone = [[value if i == number else None for i, value in enumerate(one.whole.estimates)] for number in range(len(numbers.labels))]
        series = [Series(label, values) for label, values in zip(numbers.labels, alone, strict=True)]
        found.append(row_figure(f"{name}-models", f"{measure.title}, by model", series, numbers.labels, measure.unit, legend=False))
    if len(one.bands) > 1 and not curve:
        words = [fmean(p.words for p in numbers.suite.prompts if p.band == row.group) for row in one.bands]
        series = _by_row(numbers, one.bands, _points(numbers, score, one) if len(numbers.labels) == 1 else ())
        named, title = [f"{row.group} words" for row in one.bands], f"{measure.title}, by length"
        found.append(line_figure(f"{name}-length", title, series, named, measure.unit, "words of the prompt", words))
    if curve:
        found.append(length_curve(f"{name}-lengths", numbers, one))
    elif 1 < len(one.categories) <= MOST_PLACES:
        named, series = [group_name(row.group) for row in one.categories], _by_row(numbers, one.categories)
        found.append(row_figure(f"{name}-categories", f"{measure.title}, by category", series, named, measure.unit))
    return found


def length_curve(name: str, numbers: SuiteNumbers, one: MeasureNumbers) -> Markup:
    """A measure against the lengths that scenes were asked for; ringed where a checkpoint cut prompts."""
    rows = sorted(one.categories, key=lambda row: int(row.group.split()[0]))
    series = []
    for number, (label, model) in enumerate(zip(numbers.labels, numbers.models, strict=True)):
        counts = model.source.get("cut_prompts")
        cut = [place for place, row in enumerate(rows) if isinstance(counts, dict) and counts.get(row.group)]
        series.append(Series(label, [row.estimates[number] for row in rows], cut=cut))
    title = f"{one.measure.title}, by length" + (", ringed where prompts were cut" if any(s.cut for s in series) else "")
    words = [float(row.group.split()[0]) for row in rows]
    return line_figure(name, title, series, [row.group for row in rows], one.measure.unit, "words of the prompt", words)


def table_figures(tables: Sequence[tuple[str, Table]], name: str) -> list[Markup]:
    """The figure that a table of a score's own asks for: its first column against its estimates; of several models the first column of
    those alone."""
    kind, rows = tables[0][1].plot, tables[0][1].rows
    if kind not in ("bars", "lines") or not 1 < len(rows) <= MOST_PLACES:
        return []
    places = list(dict.fromkeys(cell_text(row[0], "number") for _, table in tables for row in table.rows if row))
    series = []
    for label, table in tables:
        columns = [j for j in range(1, len(table.head)) if any(_plotted(row, j) is not None for row in table.rows)]
        for j in columns[:1] if len(tables) > 1 else columns:
            of = {cell_text(row[0], "number"): _plotted(row, j) for row in table.rows if row}
            series.append(Series(label if len(tables) > 1 else table.head[j], [of.get(place) for place in places]))
    if not series:
        return []
    title, unit = tables[0][1].title, tables[0][1].unit
    if kind == "lines":
        return [line_figure(name, title, series, places, unit, str(tables[0][1].head[0]))]
    return [bar_figure(name, title, series, places, unit)]


def _by_row(numbers: SuiteNumbers, rows: Sequence[Row], points: Sequence[tuple[float, float]] = ()) -> list[Series]:
    return [Series(label, [row.estimates[number] for row in rows], points) for number, label in enumerate(numbers.labels)]


def _points(numbers: SuiteNumbers, score: ScoreNumbers, one: MeasureNumbers) -> list[tuple[float, float]]:
    """(words, value) of each image of the only model."""
    words = {prompt.id: prompt.words for prompt in numbers.suite.prompts}
    result = score.results[0]
    return [
        (float(words[image.prompt]), image.values[one.measure.name])
        for image in (result.images if result is not None else ())
        if image.prompt in words and math.isfinite(image.values.get(one.measure.name, math.nan))
    ]


def _plotted(row: Sequence[object], column: int) -> Estimate | None:
    cell = row[column] if column < len(row) else None
    return cell if isinstance(cell, Estimate) and math.isfinite(cell.mean) else None
