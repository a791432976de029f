"""Decisions of reviewers on disk: a log that is only ever added to, and what it adds up to.

One JSON line an event, synced to disk before it is acknowledged:

    {"event": "...", "sample": "...", "shard": "...", "key": "...", "reviewer": "anna", "at": 1700000000000,
     "received": "2026-01-31T12:00:00+00:00", "set": {"decision": "keep", "caption": "...", "note": "..."}}

``set`` holds only what the event changes. The last value of each field by each reviewer counts; nothing is taken out.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from paradiffusion.curation.journal import Journal, read_journal

DECISIONS: Final = "decisions.jsonl"
FIELDS: Final = ("decision", "caption", "note")
VERDICTS: Final = ("keep", "drop", None)


@dataclass(frozen=True)
class Value:
    """A field's value, when it was given (ms since 1970, by the reviewer's clock) and the number of its event."""

    value: str | None
    at: int
    revision: int


@dataclass
class Standing:
    """What the events add up to: sample -> reviewer -> field -> value."""

    samples: dict[str, dict[str, dict[str, Value]]] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)  # sample -> its last revision
    events: set[str] = field(default_factory=set)
    revision: int = 0

    def add(self, event: Mapping[str, Any]) -> None:
        """Take in one event. One that comes late, from a queue, does not undo a later one."""
        self.revision += 1
        self.events.add(event["event"])
        self.changed[event["sample"]] = self.revision
        fields = self.samples.setdefault(event["sample"], {}).setdefault(event["reviewer"], {})
        for name, value in event["set"].items():
            if name not in fields or event["at"] >= fields[name].at:
                fields[name] = Value(value, event["at"], self.revision)

    def of(self, sample: str) -> dict[str, dict[str, str | None]]:
        """reviewer -> field -> value of one sample."""
        return {reviewer: {name: one.value for name, one in fields.items()} for reviewer, fields in self.samples.get(sample, {}).items()}


def read_decisions(path: Path) -> Standing:
    """What ``path`` adds up to; a line that a crash cut short was never acknowledged, and is passed over."""
    standing = Standing()
    for event in read_journal(path)[0]:
        whole = isinstance(event.get("set"), dict) and isinstance(event.get("at"), int)
        whole = whole and all(isinstance(event.get(name), str) for name in ("event", "sample", "reviewer"))
        if whole and event["event"] not in standing.events:
            standing.add(event)
    return standing


class DecisionLog:
    """The log, opened by the one server that writes it. Raises UserError when another one has it open."""

    def __init__(self, path: Path) -> None:
        self._guard = threading.Lock()
        self._journal = Journal(path, f"{path} is open in another review; use that page, or end that server first.")
        self.standing = read_decisions(path)

    def record(self, event: Mapping[str, Any]) -> None:
        """Write ``event`` to disk, then take it in; one that is there already is not written twice.

        Raises OSError when it cannot be written; then nothing is changed.
        """
        with self._guard:
            if event["event"] in self.standing.events:
                return
            # A clock that runs ahead must not make this decision final.
            now = time.time_ns() // 1_000_000
            stored = {**event, "at": min(event["at"], now), "received": datetime.now(UTC).isoformat(timespec="seconds")}
            self._journal.add([stored])
            self.standing.add(stored)

    def conflicts(self, sample: str, reviewer: str, changes: Mapping[str, Any], base: int) -> dict[str, str | None]:
        """Fields that were set otherwise since ``base``, the revision that the page knew, with their values."""
        with self._guard:
            fields = self.standing.samples.get(sample, {}).get(reviewer, {})
            return {
                name: fields[name].value
                for name, value in changes.items()
                if name in fields and fields[name].revision > base and fields[name].value != value
            }

    def of(self, sample: str) -> tuple[int, dict[str, dict[str, str | None]]]:
        """The revision of one sample, 0 where there is none, and what stands for it by reviewer."""
        with self._guard:
            return self.standing.changed.get(sample, 0), self.standing.of(sample)

    def since(self, revision: int) -> tuple[int, dict[str, dict[str, Any]]]:
        """The revision now, and for each sample changed after ``revision`` what stands: {"at": revision, "by": ...}."""
        with self._guard:
            changed = {sample: {"at": at, "by": self.standing.of(sample)} for sample, at in self.standing.changed.items() if at > revision}
            return self.standing.revision, changed

    def close(self) -> None:
        """Give the log free; everything is on disk already."""
        with self._guard:
            self._journal.close()
