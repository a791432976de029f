"""Rows of CSV, TSV, JSONL, JSON and Parquet files, read a piece at a time (JSON alone is read whole)."""

from __future__ import annotations

import csv
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final

from paradiffusion.data.captions import ENCODING_NOTES, captions_of, decode_text
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
    return UserError(f"{path} has {name!r} twice{where}, and which is meant is not known; give one of them another name.")


# Tables of captions beside pictures, as the hub's image folders and others have them, the first that is there; and what the column
# of the files is called.
BESIDE: Final = tuple(f"{stem}.{end}" for stem in ("metadata", "captions") for end in ("jsonl", "csv", "tsv", "parquet"))
FILE_NAMES: Final = (
    "file_name", "filename", "file", "file_path", "filepath", "image_path", "img_path", "path", "image", "img",
)  # fmt: skip
SUFFIXES: Final = (".csv", ".tsv", ".jsonl", ".jsonlines", ".ndjson", ".json", ".parquet")
_UTF16: Final = (b"\xff\xfe", b"\xfe\xff")
_MAX_CELL: Final = 1 << 24
_MAX_LINES: Final = 1000  # of one row of a CSV: our choice


class _Repeated(Exception):
    """An object of a JSON has a name twice."""


def read_rows(path: Path, wanted: Collection[str] | None = None, cells: str | None = None) -> Iterator[Row]:
    """The rows of a table, streamed. Raises UserError when the file is no such table, or has two columns of one name.

    Of a Parquet file only the columns ``wanted`` are read (None: all), and ``cells``, the one that holds the images, not at
    all but for their paths.
    """
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return _csv_rows(path, "\t" if suffix == ".tsv" else None)
    if suffix in (".jsonl", ".jsonlines", ".ndjson"):
        return _jsonl_rows(path)
    if suffix == ".json":
        return _json_rows(path)
    if suffix == ".parquet":
        return parquet_rows(path, wanted, cells)
    raise UserError(f"{path} is no table that can be read; expected one of {', '.join(SUFFIXES)}.")


def columns_of(path: Path) -> list[str]:
    """The columns of a table: its header's, or those of its first rows. Raises UserError as ``read_rows`` does."""
    if path.suffix.lower() == ".parquet":
        return [*read_schema(path).names]
    names: dict[str, None] = {}
    for row in islice(read_rows(path), 100):
        names.update(dict.fromkeys(row.fields))
    return list(names)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """(line, encoding) of a text file; each line by itself, since tables are glued together from many sources."""
    try:
        with open(path, "rb") as file:
            if file.read(2) in _UTF16:
                with open(path, encoding="utf-16", errors="replace", newline="") as wide:
                    for line in wide:
                        yield line, "utf-16"
                return
            file.seek(0)
            for raw in file:
                yield decode_text(raw)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the path and its permissions.") from None


def _csv_lines(path: Path, encodings: set[str]) -> Iterator[str]:
    """Lines for the csv reader; what each was encoded in is added to ``encodings``."""
    for line, encoding in _lines(path):
        encodings.add(encoding)
        line = line.replace("\0", "")
        line = re.sub(r"\r+\n$", "\r\n", line)
        if line.endswith("\n"):  # a "\r" within is damage, which the reader tells
            yield line
            continue
        # Old programs end all lines with "\r" alone. In quotes the reader gets them back as they were.
        yield from (part for part in re.split(r"(?<=\r)(?!\n)", line) if part)


def _delimiter(line: str) -> str:
    """What stands between the columns of a header: where the comma is for decimals, spreadsheets write semicolons."""
    if len(line) > _MAX_CELL:  # no header; the reader says so
        return ","
    # The first that stands outside of quotes: what comes later may be part of a name.
    plain = re.sub(r'"[^"]*"', "", line)
    return min(",;\t", key=lambda one: plain.find(one) % (len(plain) + 1))


def _csv_rows(path: Path, delimiter: str | None) -> Iterator[Row]:
    csv.field_size_limit(_MAX_CELL)
    encodings: set[str] = set()
    lines = _csv_lines(path, encodings)
    first = next(lines, "")
    skipped = 0
    if first.lower().startswith("sep=") and len(first.strip()) == 5:  # Excel's own way to say it
        delimiter, first, skipped = first[4], next(lines, ""), 1
    reader = csv.reader(chain([first], lines), delimiter=delimiter or _delimiter(first))
    header: list[str] | None = None
    number = 0
    while True:
        encodings.clear()
        start = reader.line_num
        try:
            cells, problem = next(reader), ""
        except StopIteration:
            break
        except csv.Error as error:
            cells, problem = [], str(error)
        if not cells and not problem:
            continue
        if header is None and not problem:
            header = [name.strip() for name in cells]
            check_names(path, header)
            continue
        width = len(header or [])
        while len(cells) > width and not cells[-1].strip():  # a delimiter at the end of the line
            cells.pop()
        if reader.line_num - start > _MAX_LINES:
            problem = f"it goes on for {reader.line_num - start} lines: a quote is not closed"
        elif len(cells) != width:
            problem = problem or f"{len(cells)} cells, the header has {width}"
        notes = [ENCODING_NOTES[one] for one in sorted(encodings & ENCODING_NOTES.keys())]
        fields = dict(zip(header or [], cells, strict=False))
        yield Row(number, f"line {start + skipped + 1}", fields, notes, problem)
        number += 1


def _jsonl_rows(path: Path) -> Iterator[Row]:
    number = 0
    for at, (line, encoding) in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        notes, place = [ENCODING_NOTES[encoding]] if encoding in ENCODING_NOTES else [], f"line {at}"
        try:
            content = json.loads(line, object_pairs_hook=_object)
        except _Repeated as repeated:
            raise repeated_name(path, str(repeated), f" in one object ({place})") from None
        except (ValueError, RecursionError):
            content = None
        is_row = isinstance(content, dict)
        yield Row(number, place, content if is_row else {}, notes, "" if is_row else "no JSON object")
        number += 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Repeated(Counter(name for name, _ in pairs).most_common(1)[0][0])
    return found


def _json_rows(path: Path) -> Iterator[Row]:
    """A list of objects; or an object from file to caption, or to an object of fields."""
    try:
        text, encoding = decode_text(path.read_bytes())
        content = json.loads(text, object_pairs_hook=_object)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the path and its permissions.") from None
    except _Repeated as repeated:
        raise repeated_name(path, str(repeated), " in one object") from None
    except (ValueError, RecursionError):
        raise UserError(
            f"{path} is no JSON; expected a list of objects, or an object from file names to captions (one object a line: call it .jsonl)."
        ) from None
    notes = [ENCODING_NOTES[encoding]] if encoding in ENCODING_NOTES else []
    if isinstance(content, dict):
        content = [{"file": name, **(v if isinstance(v, dict) else {"caption": v})} for name, v in content.items()]
    if not isinstance(content, list):
        raise UserError(f"{path} holds a single value; expected a list of objects or an object from files to captions.")
    for number, row in enumerate(content):
        is_row = isinstance(row, dict)
        yield Row(number, f"row {number + 1}", row if is_row else {}, list(notes), "" if is_row else "no JSON object")


_ROWS_AT_ONCE: Final = 1000


def read_schema(path: Path) -> Any:
    """The schema. Raises UserError for what is no Parquet file, and for two columns of one name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is no Parquet file that can be read ({str(error).splitlines()[0]}).") from None
    check_names(path, schema.names)
    return schema


def byte_columns(path: Path) -> list[str]:
    """Columns that may hold files: binary, or an object with "bytes" as ``datasets`` writes images."""
    import pyarrow as pa

    found = []
    for column in read_schema(path):
        kind = column.type
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or "bytes" in _fields_of(kind):
            found.append(column.name)
    return found


def parquet_rows(path: Path, wanted: Collection[str] | None, cells: str | None) -> Iterator[Row]:
    """The rows with the ``wanted`` columns (None: all). Of ``cells``, the column of the images themselves, only their paths
    are read here."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = read_schema(path)
    columns = [name for name in schema.names if name != cells and (wanted is None or name in wanted)]
    columns += [f"{cells}.path"] if cells and "path" in _fields_of(schema.field(cells).type) else []
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                rows, within = file.metadata.row_group(group).num_rows, 0
                if not columns:
                    for within in range(rows):
                        yield Row(number + within, f"row {number + within + 1}", {}, cell=(group, within))
                    number += rows
                    continue
                batches = file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=columns, use_threads=False)
                for batch in batches:
                    for fields in _plain_times(batch).to_pylist():
                        yield Row(number, f"row {number + 1}", fields, cell=(group, within))
                        number, within = number + 1, within + 1
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is a damaged Parquet file ({str(error).splitlines()[0]}); fetch it again.") from None
    except (ValueError, OverflowError) as error:
        raise UserError(f"{path} holds a value that is none of its column's type ({error}); write it anew.") from None


def _fields_of(kind: Any) -> list[str]:
    import pyarrow as pa

    return [kind.field(number).name for number in range(kind.num_fields)] if pa.types.is_struct(kind) else []


def _plain_times(batch: Any) -> Any:
    """``batch`` with times as text (of UTC) and durations as numbers: Python's types have no nanoseconds, and not all zones."""
    import pyarrow as pa

    columns = []
    for column in batch.columns:
        kind = column.type
        if pa.types.is_timestamp(kind):
            column = column.cast(pa.timestamp(kind.unit)).cast(pa.string())
        elif pa.types.is_time(kind) or pa.types.is_date(kind):
            column = column.cast(pa.string())
        elif pa.types.is_duration(kind):
            column = column.cast(pa.int64())
        columns.append(column)
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def captions_by_file(table: Path) -> dict[str, tuple[dict[str, str], bool]]:
    """The captions by kind (``captions_of``) of each file that a table beside pictures names, relative to the table's folder, and
    whether its row was not in UTF-8.
    Read once, and again when it has changed; empty, with a line that says so, where no column names files. Raises UserError as
    ``read_rows`` does."""
    stat = table.stat()
    return _captions_by_file(table, stat.st_size, stat.st_mtime_ns)


@lru_cache(8)
def _captions_by_file(table: Path, *state: int) -> dict[str, tuple[dict[str, str], bool]]:
    names = columns_of(table)
    column = next((name for name in FILE_NAMES if name in names), None)
    if column is None:
        if os.environ.get("RANK", "0") == "0":
            told = f"none of its columns ({', '.join(names)}) names pictures, as {', '.join(FILE_NAMES[:3])} would"
            print(f"{table} is passed over: {told}", file=sys.stderr, flush=True)
        return {}
    rows = ((row.fields.get(column), row) for row in read_rows(table))
    return {file.removeprefix("./"): (captions_of(row.fields, b""), bool(row.notes)) for file, row in rows if isinstance(file, str)}


@lru_cache(4096)
def table_beside(folder: Path, root: Path) -> Path | None:
    """The table of captions in ``folder``, else in the nearest folder above it, up to ``root``."""
    for place in (folder, *folder.parents):
        for name in BESIDE:
            if (place / name).is_file():
                return place / name
        if place == root:
            return None
    return None


def told_by_table(root: Path, key: str) -> tuple[dict[str, str], bool]:
    """``captions_by_file`` of the picture ``key`` of the folder ``root`` in the table beside it; empty where there are none."""
    picture = root / key
    table = table_beside(picture.parent, root)
    nothing: tuple[dict[str, str], bool] = {}, False
    return captions_by_file(table).get(picture.relative_to(table.parent).as_posix(), nothing) if table else nothing
