"""Files that are written whole or not at all: a kill or a full disk leaves what was there before."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(path: Path, shared: bool = False) -> Iterator[Path]:
    """A name beside ``path`` to write to: renamed to ``path`` when the block ends, removed when it raises.

    Args:
        path: in a folder that exists.
        shared: several processes may write it at once; the last one's file stands. Otherwise what a killed process left
            is overwritten by the next, and does not gather.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part" if shared else f".{path.name}.part")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomic(path: Path, text: str, shared: bool = False) -> None:
    """Write a text file. Half of a surrogate pair, which other people's texts may hold, cannot be encoded, and is replaced."""
    with atomic_file(path, shared) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace", newline="\n")
