"""Votes as a CSV file: a row each, with the sets by name."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from paradiffusion.atomic import atomic_file
from paradiffusion.evaluation.votes.outcomes import outcomes
from paradiffusion.evaluation.votes.store import Vote
from paradiffusion.evaluation.votes.study import Study

COLUMNS: Final = (
    "study", "rater", "prompt", "category", "band", "set_a", "set_b", "left", "question", "choice", "seconds", "at", "image",
    "occasion", "missing", "comment",
)  # fmt: skip


def write_csv(study: Study, votes: Sequence[Vote], comments: Mapping[tuple[str, str], str], path: Path) -> int:
    """Write a row for each vote, and for each pair that a missing picture decided (``missing`` is then 1, ``left`` empty).

    ``choice`` is a, b or tie; ``occasion`` 1 where a rater saw the pair for the second time; ``at`` in UTC.

    Returns:
        How many votes there were.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial, partial.open("w", encoding="utf-8", errors="replace", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for one in outcomes(study, votes, comments):
            row = {name: getattr(one, name) for name in COLUMNS if name != "study"}
            row |= {"study": study.name, "missing": int(one.missing), "comment": _harmless(one.comment)}
            writer.writerow(row)
    return len(votes)


def _harmless(text: str) -> str:
    """What a rater wrote, so that a spreadsheet shows it and does not compute it."""
    # A carriage return alone is not quoted by the csv module, and ends the row for most that read it.
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return f"'{text}" if text[:1] in "=+-@\t\n" and text else text
