"""Reading the files of suites: text, YAML, tables and JSON, with errors that name the line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from paradiffusion.data import tables
from paradiffusion.errors import UserError
from paradiffusion.sampling.prompts import read_text


@dataclass(frozen=True)
class Row:
    """One row of a table: the file and the row, for messages, and values by column; texts in CSV, anything in JSON."""

    where: str
    values: dict[str, Any]

    def text(self, column: str, needed: bool = True) -> str:
        """The column as text, stripped. UserError for one that is no text, and for an empty one, which is "" unless it is ``needed``."""
        value = self.values.get(column)
        if value is None or (isinstance(value, str) and not value.strip()):
            if needed:
                raise UserError(f"{self.where} has an empty {column}; expected some text: mend or remove it.")
            return ""
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str):
            raise UserError(f"{self.where}: {column} is {str(value)[:60]!r}; expected text.")
        return value.strip()


def read_json(path: Path) -> Any:
    """A JSON file. UserError for one that is damaged, such as half a download, with the place."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:  # also of a number of thousands of digits
        raise UserError(f"{path} is not whole JSON ({error}); get it again.") from None


def read_rows(path: Path, needed: Sequence[str]) -> list[Row]:
    """The rows of a .csv, .tsv, .jsonl or .json file, the last a list of objects or an object that holds one.

    ``needed`` columns must be there under these names, letter case and spaces around them aside. UserError for a file without them,
    or with a row that is malformed."""
    if path.suffix.lower() not in (".csv", ".tsv", ".jsonl", ".json"):
        raise UserError(f"{path} is no table; expected a name that ends in .csv, .tsv, .jsonl or .json.")
    rows = []
    for where, values in _json_values(path) if path.suffix.lower() == ".json" else _table_values(path):
        if not isinstance(values, dict):
            raise UserError(f"{where} is no object; expected one with {', '.join(needed)}.")
        wanted = {column.strip().casefold(): column for column in needed}
        found = {key if key in needed else wanted.get(key.strip().casefold(), key): value for key, value in values.items()}
        if missing := [column for column in needed if column not in found]:
            raise UserError(
                f"{where} has the columns {', '.join(values)[:200]}; expected one named {missing[0]}: get the released file, or name the "
                "column that it has under columns: in a .yaml of your own."
            )
        rows.append(Row(where, found))
    return rows


def find_file(path: Path, names: Sequence[str], what: str) -> Path:
    """``path`` itself where it is a file, else the first of ``names`` (patterns) in it or in a folder of it.

    UserError where none is there; ``what`` says what was looked for and how to get it.
    """
    if path.is_file():
        return path
    if not path.exists():
        raise UserError(f"{path} does not exist (looked in {Path.cwd()}); {what}")
    # The last part alone, too: a person may name the very folder.
    for pattern in (start + name for name in (*names, *(Path(n).name for n in names)) for start in ("", "*/")):
        found = sorted(p for p in path.glob(pattern) if p.is_file() and not p.name.startswith("."))
        if found:
            return found[0]
    raise UserError(f"{path} holds no {' or '.join(names)}; {what}")


def _table_values(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each row of a table stands, and what it says. A suite is not mended as captions are: whatever is odd is refused."""
    if not path.is_file():
        raise UserError(f"{path} does not exist (looked in {Path.cwd()}); check the path.")
    for row in tables.read_rows(path):
        where = f"{path} {row.place}"
        if odd := row.problem or " and ".join(row.notes):
            raise UserError(f"{where} is not as it must be ({odd}); get the file again.")
        yield where, row.fields


def _json_values(path: Path) -> Iterator[tuple[str, Any]]:
    values = read_json(path)
    if isinstance(values, dict):
        lists = [value for value in values.values() if isinstance(value, list)]
        if len(lists) != 1:
            raise UserError(f"{path} is an object with {len(lists)} lists; expected a list of prompts, or one list in it.")
        values = lists[0]
    if not isinstance(values, list):
        raise UserError(f"{path} holds no list; expected a list of objects.")
    for number, value in enumerate(values, 1):
        yield f"{path} entry {number}", value


class _Once(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML libraries keep the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(problem=f"{key.value} stands twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """The value of a YAML text. ValueError, which says what and where, for all that is wrong with it: a key that stands twice, and what
    PyYAML itself lets through as another error, such as a date that there is none of, or brackets without end."""
    try:
        return yaml.load(text, Loader=_Once)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        mark = getattr(error, "problem_mark", None)
        problem = "it is nested too deeply" if isinstance(error, RecursionError) else problem
        raise ValueError(f"{problem}, line {mark.line + 1}" if mark else problem) from None
