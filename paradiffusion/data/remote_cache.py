"""A local cache of whole remote shards, shared by any number of processes and of a limited size.

Each shard is one file, named by its URL and state, written to a temporary name and renamed when it is whole. A lock per
shard lets one process fetch while the others wait; a lock for the folder guards the count of bytes. The empty lock files
stay: with one of them removed, two processes could hold "the" lock.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO, Final

from paradiffusion.data.storage import RemotePath, read_range, with_state
from paradiffusion.data.store_errors import RemoteError

_PIECE: Final = 1 << 24


def cached_copy(shard: RemotePath) -> BinaryIO | None:
    """The local copy of a shard, open, fetched first if need be; None when there is no cache or it is too small.

    Raises RemoteError when it cannot be fetched or kept. A copy that another process evicts meanwhile stays readable.
    """
    storage = shard.storage
    if storage.cache_dir is None or not storage.cache_bytes:
        return None
    shard = shard if shard.size else with_state(shard)
    if not 0 < shard.size <= storage.cache_bytes:
        return None
    folder = Path(storage.cache_dir)
    state = f"{shard.url}\n{shard.size}\n{shard.version}"
    target = folder / f"{hashlib.blake2b(state.encode(), digest_size=16).hexdigest()}.shard"
    try:
        while (copy := _open(target)) is None:
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(target.with_suffix(".lock")):
                if not target.exists():
                    _fetch(shard, target, storage.cache_bytes)
    except RemoteError:
        raise
    except OSError as error:
        raise RemoteError(
            f"data.cache_dir={folder} cannot be used ({error.strerror}): make it usable, or leave it out"
        ) from error
    return copy


def _open(target: Path) -> BinaryIO | None:
    try:
        copy = open(target, "rb")  # noqa: SIM115, the caller closes it
        os.utime(target)  # Marks it as used; a mount without access times would tell nothing.
    except FileNotFoundError:
        return None
    return copy


def _fetch(shard: RemotePath, target: Path, limit: int) -> None:
    partial = target.with_suffix(".partial")
    try:
        with _locked(target.parent / "cache.lock"):
            _make_room(target.parent, limit - shard.size)
            with open(partial, "wb") as file:
                os.truncate(file.fileno(), shard.size)  # Counted from now on, so that two fetches do not share one gap.
        with open(partial, "r+b") as file:
            for start in range(0, shard.size, _PIECE):
                file.write(read_range(shard, start, min(_PIECE, shard.size - start)))
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _make_room(folder: Path, limit: int) -> None:
    """Evict what was used longest ago until at most ``limit`` bytes are left; what is being fetched counts and stays."""
    kept: list[tuple[float, int, Path]] = []
    total = 0
    for path in folder.iterdir():
        try:
            stat = path.stat()
        except FileNotFoundError:
            continue
        if path.suffix == ".partial":
            if _is_abandoned(path):
                path.unlink(missing_ok=True)
                continue
            total += stat.st_size
        elif path.suffix == ".shard":
            total += stat.st_size
            kept.append((stat.st_mtime, stat.st_size, path))
    for _, size, path in sorted(kept):
        if total <= limit:
            break
        path.unlink(missing_ok=True)
        total -= size


def _is_abandoned(partial: Path) -> bool:
    """Whether the process that was fetching is gone: it would hold the shard's lock."""
    try:
        with open(partial.with_suffix(".lock"), "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextmanager
def _locked(path: Path) -> Iterator[IO[str]]:
    with open(path, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock
