"""The review's command line, and what lies on disk, for the tests of the review page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from browser import Program
from commands import wait_for

from paradiffusion.curation.choosing.decisions import read_decisions


def logged(work: Path) -> list[dict[str, Any]]:
    """The events on disk."""
    path = work / "decisions.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def decisions(work: Path, reviewer: str = "anna") -> dict[str, dict[str, str | None]]:
    """key -> fields, as they stand on disk for one reviewer."""
    keys = {one["sample"]: one["key"] for one in logged(work)}
    standing = read_decisions(work / "decisions.jsonl")
    return {keys[name]: standing.of(name)[reviewer] for name in keys if reviewer in standing.of(name)}


class Server(Program):
    """The review of the candidates in ``work``."""

    def __init__(self, work: Path) -> None:
        super().__init__("scripts/select.py", "action=review", f"folder={work}", "reviewer=anna")
        self.work = work

    @property
    def url(self) -> str:
        return self.urls[0]


def at(page: Any, number: int | str) -> None:
    page.wait_for_selector(f"body[data-number='{number}']")


def until(page: Any, condition: str) -> None:
    """Wait for a condition in the page, whose policy forbids playwright's own way (eval)."""
    wait_for(lambda: page.evaluate(condition), timeout=20)
