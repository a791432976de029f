"""Votes on disk: SQLite, each vote synced before it is acknowledged, written once however often it is sent."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from paradiffusion.errors import UserError
from paradiffusion.evaluation.votes.vote_study import Study

VOTES: Final = "votes.sqlite"
SIDES: Final = ("left", "right", "tie")
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS study (fingerprint TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS votes (
    rater TEXT NOT NULL, task TEXT NOT NULL, question TEXT NOT NULL,
    choice TEXT NOT NULL CHECK (choice IN ('left', 'right', 'tie')),
    stamp INTEGER NOT NULL, seconds REAL NOT NULL, at TEXT NOT NULL,
    PRIMARY KEY (rater, task, question)
);
CREATE TABLE IF NOT EXISTS comments (
    rater TEXT NOT NULL, task TEXT NOT NULL, text TEXT NOT NULL, at TEXT NOT NULL, PRIMARY KEY (rater, task)
);
CREATE TABLE IF NOT EXISTS finished (
    number INTEGER PRIMARY KEY, rater TEXT NOT NULL, task TEXT NOT NULL, UNIQUE (rater, task)
);
"""


@dataclass(frozen=True)
class Vote:
    """One vote: "left", "right" or "tie".

    Attributes:
        stamp: grows with each change of mind; of two votes the one with the greater stamp holds, whichever comes first.
        seconds: from when the pair (or the question, where another came before it on the screen) was shown.
        at: when it was written, UTC, ISO 8601.
    """

    rater: str
    task: str
    question: str
    choice: str
    stamp: int
    seconds: float
    at: str = ""


class Refusal(Exception):
    """A write that would change what the rater has left behind."""


class Store:
    """The votes of one study, open for as many threads and processes as there are. UserError for a file that is damaged, or of another
    study."""

    def __init__(self, study: Study) -> None:
        self.path = study.folder / VOTES
        self._guard = threading.Lock()
        try:
            self._base = sqlite3.connect(self.path, timeout=20, check_same_thread=False, isolation_level=None)
            # Where the disk cannot have a write-ahead log, SQLite goes on with its older journal; both are synced.
            self._base.execute("PRAGMA journal_mode=WAL")
            self._base.execute("PRAGMA synchronous=FULL")
            with self._change():
                # Not executescript, which would commit in the middle.
                for statement in filter(str.strip, _SCHEMA.split(";")):
                    self._base.execute(statement)
                row = self._base.execute("SELECT fingerprint FROM study").fetchone()
                if row is None:
                    self._base.execute("INSERT INTO study VALUES (?)", (study.fingerprint,))
        except sqlite3.Error as error:
            raise UserError(f"{self.path} cannot be used ({error}); bring it back from a copy, or choose another study= folder.") from None
        if row is not None and row[0] != study.fingerprint:
            raise UserError(
                f"{self.path} holds the votes of another study than study.json beside it; bring back the one that belongs to it."
            )

    @contextmanager
    def _change(self) -> Iterator[None]:
        """One transaction: on disk when this ends, or nothing of it."""
        with self._guard:
            self._base.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._base.execute("COMMIT")
            except BaseException:
                if self._base.in_transaction:
                    self._base.execute("ROLLBACK")
                raise

    def put(self, vote: Vote) -> None:
        """Write ``vote``; sent again it changes nothing, and with a smaller stamp neither. Refusal where the rater has gone on from
        this task; sqlite3.Error where it could not be written; nothing is then changed."""
        with self._change():
            self._still_open(vote.rater, vote.task)
            self._base.execute(
                "INSERT INTO votes (rater, task, question, choice, stamp, seconds, at) VALUES (?, ?, ?, ?, ?, ?, ?) "
                "ON CONFLICT (rater, task, question) DO UPDATE SET choice = excluded.choice, stamp = excluded.stamp, "
                "seconds = excluded.seconds, at = excluded.at WHERE excluded.stamp > stamp",
                (vote.rater, vote.task, vote.question, vote.choice, vote.stamp, vote.seconds, _now()),
            )

    def comment(self, rater: str, task: str, text: str) -> None:
        """Keep a remark on a task, or take it away with "". Raises as ``put`` does."""
        with self._change():
            self._still_open(rater, task)
            if text:
                self._base.execute("INSERT OR REPLACE INTO comments VALUES (?, ?, ?, ?)", (rater, task, text, _now()))
            else:
                self._base.execute("DELETE FROM comments WHERE rater = ? AND task = ?", (rater, task))

    def finish(self, rater: str, task: str) -> None:
        """The rater goes on from ``task``, whose votes now stand. Raises sqlite3.Error as ``put`` does."""
        with self._change():
            self._base.execute("INSERT OR IGNORE INTO finished (rater, task) VALUES (?, ?)", (rater, task))

    def reopen(self, rater: str) -> None:
        """The rater goes back to the task that was left last. Raises sqlite3.Error as ``put`` does."""
        with self._change():
            self._base.execute("DELETE FROM finished WHERE number = (SELECT max(number) FROM finished WHERE rater = ?)", (rater,))

    def finished(self, rater: str) -> set[str]:
        """Tasks that the rater has gone on from."""
        with self._guard:
            return {row[0] for row in self._base.execute("SELECT task FROM finished WHERE rater = ?", (rater,))}

    def votes(self, rater: str | None = None, task: str | None = None) -> list[Vote]:
        """Votes, of one rater and task where these are given, in the order in which they were first cast."""
        with self._guard:
            rows = self._base.execute(
                "SELECT rater, task, question, choice, stamp, seconds, at FROM votes "
                "WHERE (?1 IS NULL OR rater = ?1) AND (?2 IS NULL OR task = ?2) ORDER BY rowid",
                (rater, task),
            )
            return [Vote(*row) for row in rows]

    def comments(self) -> dict[tuple[str, str], str]:
        """(rater, task) -> remark."""
        with self._guard:
            return {(row[0], row[1]): row[2] for row in self._base.execute("SELECT rater, task, text FROM comments")}

    def close(self) -> None:
        with self._guard:
            self._base.close()

    def _still_open(self, rater: str, task: str) -> None:
        gone = self._base.execute("SELECT 1 FROM finished WHERE rater = ? AND task = ?", (rater, task)).fetchone()
        if gone is not None:
            raise Refusal("you have gone on from this pair; go back to change it")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
