"""Arrays on a disk that all processes of a machine map and share: one of them makes them, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np

from paradiffusion.atomic import atomic_folder, locked

_FACTS: Final = "facts.json"
_ABANDONED_SECONDS: Final = 86400.0

New: TypeAlias = Callable[[str, Any, tuple[int, ...]], np.ndarray]  # name, dtype and shape to an array of zeros
Columns: TypeAlias = tuple[Path | None, dict[str, np.ndarray], dict[str, Any]]  # where they are mapped from, and facts


def shared_columns(places: Sequence[Path], state: str, fill: Callable[[New], dict[str, Any]]) -> Columns:
    """The arrays that ``fill`` makes, and the facts (as JSON has them) that it returns, mapped from one of the folders
    ``places``: the first process that comes writes them, whole or not at all, and others wait. What lies there in another
    ``state`` is replaced. In memory where there is no such folder, or, with a warning, none that can be written."""
    failure: OSError | None = None
    for place in places:
        try:
            with locked(place):
                if (found := map_columns([place], state)) is None:
                    _write_columns(place, state, fill)
                    found = map_columns([place], state)
                if found is not None:
                    return found
        except OSError as error:
            failure = error
    if failure is not None and os.environ.get("LOCAL_RANK", "0") == "0":
        told = f"{', '.join(map(str, places))} could not be written ({failure.strerror or failure})"
        print(f"warning: {told}: each process holds this index in its own memory.", file=sys.stderr, flush=True)
    arrays: dict[str, np.ndarray] = {}

    def new(name: str, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
        return arrays.setdefault(name, np.zeros(shape, dtype))

    return None, arrays, fill(new)


def map_columns(places: Sequence[Path], state: str) -> Columns | None:
    """What ``shared_columns`` has written in that state; None where there is none."""
    for place in places:
        with suppress(OSError, ValueError, AttributeError):
            facts = json.loads((place / _FACTS).read_text(encoding="utf-8"))
            if facts.get("state") == state:
                found = {file.stem: np.asarray(np.load(file, mmap_mode="r")) for file in place.glob("*.npy")}
                return place, found, facts
    return None


def _write_columns(place: Path, state: str, fill: Callable[[New], dict[str, Any]]) -> None:
    written: list[np.memmap[Any, Any]] = []
    for old in place.parent.glob(f".{place.name}.*.part"):  # What a killed process has left; another machine may be at work.
        if time.time() - old.stat().st_mtime > _ABANDONED_SECONDS:
            shutil.rmtree(old, ignore_errors=True)
    with atomic_folder(place, shared=True) as partial:

        def new(name: str, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
            path = partial / f"{name}.npy"
            written.append(np.lib.format.open_memmap(path, "w+", dtype, shape))
            # Where the disk is full, writing to what is mapped would kill the process.
            if hasattr(os, "posix_fallocate"):
                with open(path, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            return written[-1]

        facts = fill(new)
        for array in written:
            array.flush()
        (partial / _FACTS).write_text(json.dumps({**facts, "state": state}), encoding="utf-8")


def digest(*parts: str) -> str:
    return hashlib.blake2b("\n".join(parts).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
