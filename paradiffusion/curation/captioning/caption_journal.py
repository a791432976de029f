"""What has been answered of one shard, line by line, so that a killed captioner goes on after its last line."""

from __future__ import annotations

import fcntl
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from paradiffusion.atomic import write_atomic
from paradiffusion.errors import UserError


@dataclass
class Entry:
    """One answer as it came; what it is worth is judged anew whenever it is read.

    Attributes:
        row: the sample, counted within its shard.
        part: the attempt, or the number of the claim.
        key: the sample's key.
        text, tokens, finished, error: see Answer.
        seconds: this process's time for it; those of all entries add up to the time spent.
        device: what computed it.
    """

    row: int
    part: int
    key: str
    text: str
    tokens: int
    finished: bool
    error: str
    seconds: float
    device: str


class Journal:
    """A file of entries that only grows, held by one process at a time.

    Attributes:
        entries: by (row, part).

    Raises:
        UserError: where another process writes it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[tuple[int, int], Entry] = {}

    def __enter__(self) -> Self:
        self._file = open(self.path, "a+b")  # closed in __exit__
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UserError(
                f"another process is at work on {self.path}; wait for it, or give each its own shards or output=."
            ) from None
        self._file.seek(0)
        whole = 0
        for line in self._file:
            entry = _parse(line)
            if entry is None:  # torn by a kill or a full disk; what follows it is asked for again
                break
            self.entries[entry.row, entry.part] = entry
            whole += len(line)
        self._file.truncate(whole)
        return self

    def add(self, entries: list[Entry]) -> None:
        """Write entries, all in one piece, so that they are there when the process is killed next."""
        lines = [json.dumps(asdict(entry), ensure_ascii=False) for entry in entries]
        self._file.write("".join(line + "\n" for line in lines).encode())
        self._file.flush()
        self.entries.update({(entry.row, entry.part): entry for entry in entries})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _parse(line: bytes) -> Entry | None:
    try:
        return Entry(**json.loads(line)) if line.endswith(b"\n") else None
    except (ValueError, TypeError):
        return None


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """A file of JSON lines, whole or not at all."""
    write_atomic(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What ``write_lines`` wrote. Raises UserError where the file is damaged."""
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete it, and run the same command again.") from None
    if not all(isinstance(record, dict) and "key" in record for record in records):
        raise UserError(f"{path} holds a line without key; delete it, and run the same command again.")
    return records
