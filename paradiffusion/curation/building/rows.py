"""A row of a table, whatever kind of file it lay in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paradiffusion.errors import UserError


@dataclass
class Row:
    """One row: ``number`` counts rows from 0 (keys are made of it), ``place`` is what a person looks for in the file ("line 2",
    as an editor counts; "row 1" where there are no lines); ``fields`` by column; ``problem`` is set where the row could not be
    read.

    ``cell`` is (row group, row in it) of a Parquet file.
    """

    number: int
    place: str
    fields: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    problem: str = ""
    cell: tuple[int, int] = (0, 0)


def check_names(path: Path, names: Iterable[str]) -> None:
    """Raise UserError for two columns of one name, of which one would be lost; columns without a name are nobody's."""
    again = [name for name, count in Counter(names).items() if count > 1 and name]
    if again:
        raise repeated_name(path, again[0])


def repeated_name(path: Path, name: str, where: str = "") -> UserError:
    """The refusal of a table that has a name twice."""
    return UserError(
        f"{path} has {name!r} twice{where}, and which is meant is not known; give one of them another name."
    )
