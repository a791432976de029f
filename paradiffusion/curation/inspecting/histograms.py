"""Distributions: figures of a column of numbers, and what a page draws of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

BINS, FEWEST = 24, 10


@dataclass(frozen=True)
class Distribution:
    """Figures of ``n`` numbers: lower ends of the bins and the end of the last, and their counts. The last bin also holds everything above
    it, the first everything below, so that a few giants do not flatten the rest."""

    n: int
    mean: float
    median: float
    p5: float
    p95: float
    smallest: float
    largest: float
    edges: list[float]
    counts: list[int]


def distribution(values: np.ndarray, edges: Sequence[float] | None = None) -> Distribution | None:
    """Figures of ``values`` [n]; None for no values. Without ``edges`` they are round numbers that suit the values."""
    if not len(values):
        return None
    low, p5, median, p95, high = (float(v) for v in np.percentile(values, (0, 5, 50, 95, 100)))
    bounds = np.asarray(edges if edges is not None else nice_edges(low, usual_most(values)), float)
    counts, _ = np.histogram(np.clip(values, bounds[0], np.nextafter(bounds[-1], bounds[0])), bounds)
    mean = float(np.mean(values, dtype=np.float64))
    return Distribution(len(values), mean, median, p5, p95, low, high, bounds.tolist(), counts.tolist())


def usual_most(values: np.ndarray) -> float:
    """Where an axis should end: at the 99.5th percentile, but where few values lie far beyond the others, as one caption of
    20,000 words does among 60 of a hundred, so that those others still fill the picture."""
    low, most, far = (float(v) for v in np.percentile(values, (0, 95, 99.5)))
    return min(far, low + 3 * (most - low)) if most > low else far


def nice_edges(low: float, high: float, bins: int = BINS) -> list[float]:
    """At most ``bins`` equal bins of 1, 2 or 5 times a power of ten (1 at least) from below ``low`` to above ``high``; ten at
    least, so that a column of equal values looks like one."""
    span = max(high - low, 1.0)
    step = next(s for power in range(12) for base in (1, 2, 5) if span / (s := base * 10**power) <= bins - 1)
    start = np.floor(low / step) * step
    count = max(int((high - start) // step) + 1, FEWEST)
    return [float(start + number * step) for number in range(count + 1)]


def histogram(
    found: Distribution, title: str, label: str, unit: str, marks: Sequence[float] = (), names: Sequence[str] | None = None
) -> dict[str, Any]:
    """What the template draws: ``bars`` (name, count), ``marks`` (share of the axis, number), ``ticks`` (bar, text). ``label`` says what is
    counted, for screen readers; ``names`` are the bins', where numbers would not do."""
    count = len(found.counts)
    first, last = found.edges[0], found.edges[-1]
    texts = names or [_number(edge) for edge in found.edges]
    return {
        "title": title, "label": label, "unit": unit, "n": found.n,
        "bars": [(names[i] if names else _range(found, i), number) for i, number in enumerate(found.counts)],
        "marks": [((mark - first) / (last - first), _number(mark)) for mark in marks if first < mark < last],
        "ticks": [(i + (0.5 if names else 0), texts[i]) for i in range(0, count, max(1, -(-count // 8)))],
    }  # fmt: skip


def _range(found: Distribution, number: int) -> str:
    low, high = found.edges[number : number + 2]
    if number == len(found.counts) - 1 and found.largest >= high:
        return f"{_number(low)} and more"
    whole = all(float(edge).is_integer() for edge in found.edges)
    if whole and high - low == 1:
        return _number(low)
    return f"{_number(low)} to {_number(high - 1 if whole else high)}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.3g}"
