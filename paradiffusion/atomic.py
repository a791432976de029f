"""Files and folders that are written whole or not at all: a kill or a full disk leaves what was there before. Locks, and the
user's cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from paradiffusion.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


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


@contextmanager
def atomic_folder(path: Path, shared: bool = False) -> Iterator[Path]:
    """As ``atomic_file``: an empty folder beside ``path``, made with its parents, which has its name when the block ends. Only a
    ``shared`` one takes the place of a folder that is there."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part" if shared else f".{path.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        if shared:
            shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def cache_folder() -> Path:
    """``$PARADIFFUSION_CACHE``, else ``~/.cache/paradiffusion``: what can be made again at any time."""
    return Path(os.environ.get("PARADIFFUSION_CACHE") or Path.home() / ".cache" / "paradiffusion")


def cached_index(path: object, suffix: str) -> Path:
    """Where in the user's cache the index of ``path`` lies, when it cannot lie beside it."""
    name = hashlib.blake2b(str(path).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    return cache_folder() / "index" / (name + suffix)


def hold(file: int | IO[Any], wait: bool = False, unsure: bool = True) -> bool:
    """Hold an open file or folder against other processes until it is closed; the system gives it free when this one dies.

    Args:
        wait: for another process to give it free.
    Returns:
        Whether it is held; ``unsure`` on a file system, or a Windows, that has no locks, where nobody can be kept out.
    """
    if fcntl is None:
        return unsure
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return unsure
    return True


@contextmanager
def locked(path: Path, refusal: str = "") -> Iterator[None]:
    """Held by one process of a machine at a time, for what lies at ``path``. The lock is in the user's cache, since the
    disks that data lie on may be read only; where there can be none, nobody waits. With a ``refusal`` nobody waits either, and
    a UserError says it."""
    lock = cached_index(path, ".lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = open(lock, "a")  # noqa: SIM115, closed below
    except OSError:
        yield
        return
    with file:
        if not hold(file, wait=not refusal):
            raise UserError(refusal)
        yield
