"""Distributions: figures of a column of numbers, and their picture as inline SVG that follows the page's colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paradiffusion.pages import page_text

BINS, FEWEST = 24, 10


@dataclass(frozen=True)
class Distribution:
    """Figures of ``n`` numbers.

    Attributes:
        edges: lower ends of the bins and the end of the last; ``counts`` has one fewer. The last bin also holds
            everything above it, the first everything below, so that a few giants do not flatten the rest.
    """

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
    return Distribution(
        n=len(values),
        mean=float(np.mean(values, dtype=np.float64)),
        median=median,
        p5=p5,
        p95=p95,
        smallest=low,
        largest=high,
        edges=bounds.tolist(),
        counts=counts.tolist(),
    )


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


def histogram_svg(
    found: Distribution, label: str, unit: str, marks: Sequence[float] = (), names: Sequence[str] | None = None
) -> str:
    """A histogram: a bar for each bin with its count as a tooltip, ``marks`` as vertical lines with their number.

    Args:
        label: what is counted, for screen readers; ``unit`` stands below the axis.
        names: of the bins, where numbers would not do.
    """
    width, height, left, top, low = 460, 190, 8, 14, 34
    bars, inner = len(found.counts), width - 2 * left
    tallest, step = max(found.counts) or 1, inner / len(found.counts)
    base = height - low
    drawn = []
    for number, count in enumerate(found.counts):
        tall = count / tallest * (base - top)
        name = names[number] if names else _range(found, number)
        share = f"{name}: {count:,} ({count / found.n:.1%})"
        drawn.append(
            f'<rect x="{left + number * step + 0.75:.2f}" y="{base - tall:.2f}" width="{max(step - 1.5, 0.5):.2f}" '
            f'height="{max(tall, 0.75 if count else 0):.2f}" rx="1.5" fill="var(--mark)"><title>{page_text(share)}</title></rect>'
        )
    first, last = found.edges[0], found.edges[-1]
    for mark in marks:
        if first < mark < last:
            x = left + (mark - first) / (last - first) * inner
            drawn.append(
                f'<path d="M{x:.1f} {top - 2}V{base}" stroke="currentColor" stroke-width="1.5" stroke-dasharray="4 3"/>'
                f'<text x="{x + 3:.1f}" y="{top + 6}">{_number(mark)}</text>'
            )
    every = max(1, -(-bars // 8))
    for number in range(0, bars, every):
        x = left + (number + (0.5 if names else 0)) * step
        anchor = "middle" if names or number else "start"
        text = names[number] if names else _number(found.edges[number])
        drawn.append(f'<text x="{x:.1f}" y="{base + 14}" text-anchor="{anchor}">{page_text(text)}</text>')
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="{page_text(label)}">'
        f'<path d="M{left} {base}H{width - left}" stroke="var(--soft)"/>{"".join(drawn)}'
        f'<text x="{width / 2}" y="{height - 4}" text-anchor="middle">{page_text(unit)}</text></svg>'
    )


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
