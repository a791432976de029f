"""What two runs of the captioner share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LINES = ("seconds",)  # of a line, what differs from run to run


def lines(path: Path) -> list[dict[str, Any]]:
    """A shard's lines without what no two runs share."""
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return [{key: value for key, value in line.items() if key not in LINES} for line in found]


def same(one: Path, other: Path) -> None:
    """Both folders hold the same shards, byte by byte, and the same lines."""
    names = sorted(path.name for path in one.glob("*.tar"))
    assert names and names == sorted(path.name for path in other.glob("*.tar"))
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes()
        stem = name.removesuffix(".tar")
        assert lines(one / f"{stem}.jsonl") == lines(other / f"{stem}.jsonl")
    assert not [path for folder in (one, other) for path in folder.iterdir() if "journal" in path.name]
