"""Prompts from a file, from the command line or from standard input."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from paradiffusion.data.captions import ENCODING_NOTES, LFS_POINTER, decode_text
from paradiffusion.data.tables import check_names
from paradiffusion.errors import UserError
from paradiffusion.repository import find_shipped

MAX_SEED = 2**63 - 1  # what torch.Generator.manual_seed takes on every platform


@dataclass(frozen=True)
class PromptRequest:
    """One prompt and what its line says about how to draw it; None means that the line says nothing. The ``index`` among the
    prompts, 0 first, names the images; ``source`` is where it stands, for messages, such as "prompts.csv line 3"."""

    index: int
    prompt: str
    seed: int | None = None
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance: float | None = None
    negative_prompt: str | None = None
    source: str = "prompt="


KEYS = tuple(field.name for field in fields(PromptRequest) if field.name not in ("index", "source"))
# What the text itself is called, the first that is there.
NAMES = ("prompt", "text", "caption")
MISSPELT = 0.74  # as alike as sead and seed
EXAMPLE = '{"prompt": "a red circle", "seed": 1}'
# Lowest and highest of each number; of whole ones but guidance.
ANY = (1, math.inf)
RANGES = {"seed": (0, MAX_SEED), "height": ANY, "width": ANY, "steps": ANY, "guidance": (0, 100)}

Row = tuple[str, dict[str, Any]]  # the source and the fields of one prompt


def read_prompts(prompt: str | None = None, prompt_file: str | Path | None = None, key: str = "prompt_file") -> list[PromptRequest]:
    """The prompts in the order of the file.

    Args:
        prompt: one prompt; "-" reads standard input, one a line.
        prompt_file: .txt with one prompt a line, .csv or .tsv with a column of them (``NAMES``), .jsonl with an object a line,
            .json with a list of objects or texts, or "-". In all but .txt the other fields of PromptRequest may be given for
            each prompt; further columns are passed over, with a line that names them.
        key: under which the user gave the file, for messages.
    Raises:
        UserError: for a file that is missing, empty, not UTF-8 or malformed, and for a misspelt column; it names the line.
    """
    if (prompt is None) == (prompt_file is None):
        raise UserError("expected one of prompt= and prompt_file=; prompt_file=prompts.txt is the main way.")
    if "-" in (prompt, str(prompt_file)):
        source = "standard input"
        rows = _lines(_decode(sys.stdin.buffer.read(), source), source)
    elif prompt is not None:
        rows, source = iter([("prompt=", {"prompt": prompt})]), "prompt="
    else:
        path = find_shipped(str(prompt_file))
        source, kind = f"{key}={path}", path.suffix.lower()
        readers = {".txt": _lines, ".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl, ".json": _json}
        if kind not in readers:
            found = f"a name that ends in {kind}" if kind else "a name without an ending"
            raise UserError(f"{source} has {found}; expected {', '.join(readers)}, or {key}=- for standard input.")
        rows = readers[kind](read_text(path, source), path.name)
    passed_over: dict[str, None] = {}
    requests = [_request(index, where, _known(row, where, passed_over)) for index, (where, row) in enumerate(rows)]
    if passed_over and os.environ.get("RANK", "0") == "0":
        shown = ", ".join([*passed_over][:8])
        known = ", ".join(KEYS)
        print(f"{source}: passed over: {shown}; a prompt has the fields {known}.", file=sys.stderr, flush=True)
    if not requests:
        raise UserError(f"{source} holds no prompts; expected at least one, as a line of text.")
    return requests


def read_text(path: Path, called: str = "") -> str:
    """A file as text. UserError, in which it is ``called`` so, where it is missing, is a folder, or is not UTF-8 (with the line)."""
    called = called or str(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{called} does not exist (looked in {Path.cwd()}); check the path.") from None
    except OSError as error:
        raise UserError(f"{called} cannot be read ({error.strerror}); expected a readable file.") from None
    return _decode(data, called)


def _decode(data: bytes, source: str) -> str:
    if data.startswith(LFS_POINTER):
        raise UserError(f"{source} is a Git LFS pointer, not the file itself; fetch that with `git lfs pull`.")
    text, encoding = decode_text(data)
    if encoding not in ENCODING_NOTES and "\0" not in text:
        return text
    try:
        at = data.index(0) if 0 in data else len(data.decode())
    except UnicodeDecodeError as error:
        at = error.start
    raise UserError(f"{source} is not UTF-8: byte 0x{data[at]:02x} in line {data[:at].count(10) + 1}; save it with the encoding UTF-8.")


def _split(text: str) -> list[str]:
    """Lines at line feeds only: str.splitlines also cuts at characters that a prompt may hold, such as U+2028."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _lines(text: str, source: str) -> Iterator[Row]:
    for number, line in enumerate(_split(text), 1):
        if line.strip():
            yield f"{source} line {number}", {"prompt": line.strip()}


def _csv(text: str, source: str) -> Iterator[Row]:
    header = next((line for line in _split(text) if line.strip()), "")
    if not header:
        return
    # Spreadsheets of many countries write semicolons, so the header decides.
    marks = (mark for mark in ",;\t" if mark in header and {*NAMES} & {*_names(header.split(mark))})
    delimiter = next(marks, "\t" if source.lower().endswith(".tsv") else ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names: list[str] = []
    start = 1
    try:
        for cells in reader:
            where, start = f"{source} line {start}", reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if not names:
                names = _names(cells)
                check_names(Path(source), names)
                if not {*NAMES} & {*names}:
                    columns = ", ".join(cells)
                    raise UserError(f"{where} has the columns {columns}; expected one named {' or '.join(NAMES)}.")
                continue
            if len(cells) > len(names):
                raise UserError(
                    f"{where} has {len(cells)} cells, the header {len(names)}; "
                    "put a prompt that holds a comma into double quotes, or use .txt or .jsonl."
                )
            found = {name: cell for name, cell in zip(names, cells, strict=False) if name and cell.strip()}
            if next(name for name in NAMES if name in names) not in found:  # another column does not stand in for an empty prompt
                found = {name: cell for name, cell in found.items() if name not in NAMES}
            yield where, {name: _number(name, cell, where) for name, cell in found.items()}
    except csv.Error as error:
        raise UserError(f"{source} line {start} is not valid CSV ({error}); write a quote inside a quoted prompt as two quotes.") from None


def _names(cells: list[str]) -> list[str]:
    return [cell.strip().strip('"').lower() for cell in cells]


def _number(name: str, cell: str, where: str) -> Any:
    if name not in RANGES:
        return cell
    for kind in (int, float):
        with suppress(ValueError):
            return kind(cell)
    raise UserError(f"{where}: {name} is {cell!r}; expected a number or an empty cell.")


def _jsonl(text: str, source: str) -> Iterator[Row]:
    for where, row in _lines(text, source):
        yield where, _object(_loaded(row["prompt"], where, f"expected an object such as {EXAMPLE}"), where)


def _json(text: str, source: str) -> Iterator[Row]:
    rows = _loaded(text, source, "one object a line belongs into a .jsonl")
    if not isinstance(rows, list):
        raise UserError(f"{source} holds {_shown(rows)}; expected a list of objects such as {EXAMPLE}, or of texts.")
    for number, row in enumerate(rows, 1):
        where = f"{source} entry {number}"
        yield where, {"prompt": row} if isinstance(row, str) else _object(row, where)


def _loaded(text: str, where: str, advice: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # the number of digits of an integer is limited, too
        raise UserError(f"{where} is not valid JSON ({error}); {advice}.") from None


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{where} holds {_shown(row)}; expected an object such as {EXAMPLE}.")
    return {key: value for key, value in row.items() if value is not None}


def _known(row: dict[str, Any], where: str, passed_over: dict[str, None]) -> dict[str, Any]:
    """The fields of a prompt; others, noted in ``passed_over``, are those of somebody's benchmark, unless they look like one."""
    text = next((name for name in NAMES if name in row), "prompt")
    found = {}
    for key, value in row.items():
        if key == text:
            found["prompt"] = value
        elif key in KEYS and key not in NAMES:
            found[key] = value
        elif key in NAMES or {*key.split("_")} & {*KEYS} or not _misspelt(key):  # prompt_id
            passed_over[key] = None
        else:
            raise UserError(f"{where} has the unknown key {key!r}; accepted keys are {', '.join(KEYS)}.")
    return found


def _misspelt(key: str) -> bool:
    return any(close[0] == key[:1] for close in get_close_matches(key, KEYS, 1, MISSPELT))  # "weight" is no height


def _request(index: int, source: str, row: dict[str, Any]) -> PromptRequest:
    """Check types and ranges of one row."""
    for key, value in row.items():
        if key not in RANGES:
            if not isinstance(value, str):
                raise UserError(f"{source}: {key} is {_shown(value)}; expected text in quotes.")
            # JSON can spell half of a surrogate pair, which no tokenizer or file takes.
            if half := next((letter for letter in value if "\ud800" <= letter <= "\udfff"), None):
                raise UserError(f"{source}: {key} holds {half!r}, half of a character pair; expected whole characters.")
            continue
        whole, (lowest, highest) = key != "guidance", RANGES[key]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not lowest <= value <= highest or (whole and value % 1 != 0):
            limits = f"of at least {lowest}" if highest == math.inf else f"from {lowest} to {highest}"
            raise UserError(f"{source}: {key} is {_shown(value)}; expected a {'whole ' if whole else ''}number {limits}.")
        row[key] = int(value) if whole else float(value)
    if not row.get("prompt", "").strip():  # spaces at its ends are tokens too, and stay
        raise UserError(f"{source} has an empty prompt; expected some text, or remove the line.")
    return PromptRequest(index=index, source=source, **row)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else text[:60] + "..."
