"""The review's command line as a process, a browser, and what lies on disk, for the tests of the review page."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from commands import ROOT, wait_for

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


class Server:
    """The command line of the review, as a process that can be killed and started again at its port."""

    def __init__(self, work: Path) -> None:
        self.work, self.port, self.url = work, 0, ""
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> Server:
        self.process = subprocess.Popen(
            [sys.executable, "scripts/select.py", "action=review", f"folder={self.work}", f"port={self.port}", "reviewer=anna"],
            cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/\S+", line)
        assert found, line
        self.url, self.port = found[0], int(found[1])
        return self

    def kill(self, number: int = signal.SIGKILL) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.communicate(timeout=20)
        return self.process.returncode


@contextmanager
def started(work: Path) -> Iterator[Server]:
    """A server on ``work``, ended at the end however often it was killed and started again."""
    server = Server(work)
    try:
        yield server.start()
    finally:
        if server.process is not None and server.process.poll() is None:
            server.kill()


def at(page: Any, number: int | str) -> None:
    page.wait_for_selector(f"body[data-number='{number}']")


def until(page: Any, condition: str) -> None:
    """Wait for a condition in the page, whose policy forbids playwright's own way (eval)."""
    wait_for(lambda: page.evaluate(condition), timeout=20)
