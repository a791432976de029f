"""Numbers and foreign text as a report shows them."""

from __future__ import annotations

import math
import re
from typing import Any, Final

from paradiffusion.evaluation.estimates import Estimate
from paradiffusion.pages import plain

MISSING: Final = "–"
MINUS: Final = "−"
MOST_ITEMS: Final = 8  # of a list among settings
# What a model's own key or a URL's password may stand under; a report is sent round.
_SECRET: Final = re.compile(r"(api_?key|token|password|secret)$", re.IGNORECASE)


def value_text(value: float | None, unit: str) -> str:
    """``value`` in its ``unit`` (see records.Measure): "62.3 %", "0.231", "12.34"; a dash for none."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{_digits(value, unit)}{' %' if unit == 'share' else ''}"


def interval_text(estimate: Estimate | None, unit: str) -> str:
    """The interval's ends: "60.1 to 64.5", in per cent for shares; "" for none, as one prompt has none."""
    if estimate is None or estimate.prompts == 1 or not (math.isfinite(estimate.low) and math.isfinite(estimate.high)):
        return ""
    return f"{_digits(estimate.low, unit)} to {_digits(estimate.high, unit)}"


def difference_text(difference: Estimate | None, unit: str) -> str:
    """A difference with its sign, shares in percentage points: "+3.1 (1.0 to 5.2)"; "" for none."""
    if difference is None or not math.isfinite(difference.mean):
        return ""
    shown = _digits(difference.mean, unit)
    sign = "" if shown.startswith(MINUS) else "+"
    interval = interval_text(difference, unit)
    return f"{sign}{shown} ({interval})" if interval else f"{sign}{shown}"


def estimate_text(estimate: Estimate | None, unit: str) -> str:
    """Value and interval in one: "62.3 % (60.1 to 64.5)"."""
    if estimate is None:
        return MISSING
    interval = interval_text(estimate, unit)
    return value_text(estimate.mean, unit) + (f" ({interval})" if interval else "")


def cell_text(cell: Any, unit: str) -> str:
    """A cell of a records.Table: text, number or Estimate."""
    if isinstance(cell, Estimate):
        return estimate_text(cell, unit)
    if cell is None:
        return MISSING
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return f"{cell:,}"
    return value_text(cell, unit) if isinstance(cell, float) else plain(str(cell))


def setting_text(key: str, value: Any) -> str:
    """A setting's value in one line; what stands under a secret's name is left out."""
    if _SECRET.search(key):
        return "(not shown)"
    if isinstance(value, dict):
        return ", ".join(f"{plain(str(name))}: {setting_text(str(name), inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        more = f" and {len(value) - MOST_ITEMS:,} more" if len(value) > MOST_ITEMS else ""
        return ", ".join(setting_text(key, inner) for inner in value[:MOST_ITEMS]) + more
    if isinstance(value, float):
        return f"{value:g}"
    return MISSING if value is None or value == "" else plain(str(value))


def excerpt(text: str, length: int = 120) -> str:
    """The beginning of ``text``, on one line, at most ``length`` characters."""
    line = plain(text)
    return line if len(line) <= length else line[: length - 1].rstrip() + "…"


def _digits(value: float, unit: str) -> str:
    if unit == "share":
        shown = f"{100 * value:.1f}"
    elif unit == "cosine":
        shown = f"{value:.3f}"
    elif value != 0 and abs(value) < 0.001:
        shown = f"{value:.2e}"
    else:
        digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2 if abs(value) >= 1 else 3
        shown = f"{value:,.{digits}f}"
    if not any(digit in shown for digit in "123456789"):
        shown = shown.lstrip("-")  # no "-0.0"
    return shown.replace("-", MINUS, 1) if shown.startswith("-") else shown
