"""Reading the files of suites: text, YAML, tables and JSON, with errors that name the line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from paradiffusion.errors import UserError
from paradiffusion.sampling.prompts import read_text


@dataclass(frozen=True)
class Row:
    """One row of a table: the file and the row, for messages, and values by column; texts in CSV, anything in JSON."""

    where: str
    values: dict[str, Any]

    def text(self, column: str) -> str:
        """The column as text, stripped. UserError for an empty one, or one that is no text."""
        return self._checked(column, needed=True)

    def text_or_empty(self, column: str) -> str:
        """The same, but "" for what is empty or absent."""
        return self._checked(column, needed=False)

    def _checked(self, column: str, needed: bool) -> str:
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
    text = read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text.rstrip()) - 1
        reason = "it ends too early" if cut else f"{error.msg}, line {error.lineno} column {error.colno}"
        raise UserError(f"{path} is not whole JSON ({reason}); get it again.") from None
    except (RecursionError, ValueError):
        raise UserError(
            f"{path} is no JSON of a suite (it is nested too deep, or has a number of thousands of digits); get it again."
        ) from None


def read_rows(path: Path, needed: Sequence[str]) -> list[Row]:
    """The rows of a .csv, .tsv, .jsonl or .json file, the last a list of objects or an object that holds one.

    ``needed`` columns must be there under these names, letter case and spaces around them aside. UserError for a file without them,
    or with a row that is malformed."""
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv"):
        return list(_csv_rows(path, needed, "\t" if kind == ".tsv" else None))
    if kind == ".jsonl":
        found = list(_jsonl_values(path))
    elif kind == ".json":
        found = list(_json_values(path))
    else:
        raise UserError(f"{path} is no table; expected a name that ends in .csv, .tsv, .jsonl or .json.")
    rows = []
    for where, values in found:
        if not isinstance(values, dict):
            raise UserError(f"{where} is no object; expected one with {', '.join(needed)}.")
        rows.append(Row(where, _renamed(values, needed)))
        missing = [column for column in needed if column not in rows[-1].values]
        if missing:
            raise _no_column(where, missing[0], list(values), "keys")
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


def _csv_rows(path: Path, needed: Sequence[str], delimiter: str | None) -> Iterator[Row]:
    text = read_text(path)
    header = next((line for line in text.splitlines() if line.strip()), "")
    # Spreadsheets of many countries write semicolons, so the header decides.
    marks = delimiter or max(",;\t", key=header.count)
    found = [(line, cells) for line, cells in _cells(path, text, marks) if any(cell.strip() for cell in cells)]
    if not found:
        raise UserError(f"{path} is empty; expected a header and rows.")
    head = found[0][1]
    names = list(_renamed({cell.strip(): None for cell in head}, needed))
    missing = [column for column in needed if column not in names]
    if missing:
        raise _no_column(str(path), missing[0], head, "columns")
    for number, (line, cells) in enumerate(found[1:], 1):
        where = f"{path} row {number} (line {line})"
        if len(cells) != len(head):
            raise UserError(
                f"{where} has {len(cells)} cells, the header {len(head)}; a file that was cut off or a comma outside of "
                "quotes makes that: get it again."
            )
        yield Row(where, dict(zip(names, cells, strict=True)))


def _cells(path: Path, text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """The rows as lists of cells, each with its line. Quotes that are not doubled are taken as spreadsheets take them, but
    one that is never closed is refused: it would swallow the rest of the file."""
    for strict in (True, False):
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=strict)
        rows, line = [], 1
        try:
            for cells in reader:
                rows.append((line, cells))
                line = reader.line_num + 1
            return rows
        except csv.Error as error:
            if not strict or "unexpected end" in str(error):
                raise UserError(f"{path} line {line} is not valid CSV ({error}); get it again.") from None
    raise AssertionError("the second reading returns or raises")


def _jsonl_values(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(read_text(path).replace("\r\n", "\n").split("\n"), 1):
        if line.strip():
            try:
                yield f"{path} line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", "nested too deep, or a number of thousands of digits")
                raise UserError(f"{path} line {number} is not valid JSON ({reason}); get it again.") from None


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


def _renamed(values: dict[str, Any], needed: Sequence[str]) -> dict[str, Any]:
    wanted = {column.strip().casefold(): column for column in needed}
    return {key if key in needed else wanted.get(key.strip().casefold(), key): value for key, value in values.items()}


def _no_column(where: str, missing: str, found: Sequence[str], what: str) -> UserError:
    return UserError(
        f"{where} has the {what} {', '.join(found)[:200]}; expected one named {missing}: get the released file, or name the "
        "column that it has under columns: in a .yaml of your own."
    )


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
