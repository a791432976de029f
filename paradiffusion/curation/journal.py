"""Journal: JSON lines that are only ever added to, each on disk before anything else happens; and the lock that guards a file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from paradiffusion.atomic import hold
from paradiffusion.errors import Busy, UserError


def lock(file: int | IO[Any], refusal: str) -> None:
    """Hold an open file or folder against other processes until it is closed. Raises Busy with ``refusal``."""
    if not hold(file):
        raise Busy(refusal)


def read_journal(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records of a journal, and how many damaged lines were passed over: a line that a kill or a full disk cut short was
    never acknowledged. None where there is no file."""
    records, damaged = [], 0
    # Not splitlines(): texts may hold U+2028.
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            record = json.loads(line) if line.strip() else None
        except ValueError:
            record = line
        if isinstance(record, dict):
            records.append(record)
        else:
            damaged += record is not None
    return records, damaged


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file, empty where there is no file. Raises UserError with ``remedy`` where it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} cannot be read, or is damaged; {remedy}.")
    return content


class Journal:
    """A journal opened by the one process that writes it. Raises Busy with ``refusal`` when another one has it open."""

    def __init__(self, path: Path, refusal: str) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o644)
        try:
            lock(self._file, refusal)
        except UserError:
            os.close(self._file)
            raise
        self._size = os.fstat(self._file).st_size
        os.lseek(self._file, max(0, self._size - 1), os.SEEK_SET)
        if os.read(self._file, 1) not in (b"", b"\n"):
            self._write(b"\n")  # a torn line stays where it is, and the next one begins afresh

    def add(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write records and sync them to disk. Raises OSError when that fails; then nothing is changed."""
        lines = [json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") for record in records]
        self._write(b"".join(line + b"\n" for line in lines))

    def close(self) -> None:
        """Give the journal free; everything is on disk already."""
        os.close(self._file)

    def _write(self, lines: bytes) -> None:
        try:
            written = 0
            while written < len(lines):
                written += os.write(self._file, lines[written:])
            os.fsync(self._file)
        except OSError:
            # A full disk takes half a line: away with it, or it would spoil the next one.
            os.ftruncate(self._file, self._size)
            raise
        self._size += len(lines)
