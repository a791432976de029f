"""Shards where they lie: local files, and remote ones of any store that fsspec knows, read by ranges with retries.

A remote shard is a URL (``s3://``, ``gs://``, ``https://``, ``hf://``, ...). Credentials come from the environment, as the
store's own tools have it. Only bytes are fetched: nothing here runs commands.
"""

from __future__ import annotations

import io
import os
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar, cast

from paradiffusion.config import DataConfig
from paradiffusion.data.store_errors import NoRanges, RemoteError, ShortRead, explain
from paradiffusion.data.stores import fetch_piece, system_of, version_in
from paradiffusion.errors import UserError

_FIRST_WAIT, _LONGEST_WAIT = 0.25, 30.0  # seconds
_LEAST, _MOST = 1 << 18, 1 << 23  # bytes that one request brings of a file that is read through
_BACK = 1 << 14
T = TypeVar("T")


@dataclass(frozen=True)
class Storage:
    """How remote shards are reached.

    Attributes:
        retries: further tries after an error that may pass, with exponential back-off and jitter.
        cache_dir: keep whole remote shards in this local folder; None: read the needed ranges only.
        cache_bytes: the most that ``cache_dir`` may hold; the least recently used shards leave.
        index_dir: where the indexes of shards lie that cannot have them beside themselves.
    """

    retries: int = 5
    cache_dir: str | None = None
    cache_bytes: int = 0
    index_dir: str | None = None


def storage_of(data: DataConfig) -> Storage:
    """What ``data`` says of remote shards."""
    folders = (os.path.expanduser(folder) if folder else None for folder in (data.cache_dir, data.index_dir))
    cache_dir, index_dir = folders
    return Storage(data.retries, cache_dir, int(data.cache_gb * 1e9), index_dir)


@dataclass(frozen=True, order=True)
class RemotePath:
    """A remote shard. ``str()`` is its URL; ``size`` (bytes, 0: unknown) and ``version`` tell one state from another."""

    url: str
    storage: Storage = field(default=Storage(), compare=False)
    size: int = field(default=0, compare=False)
    version: str = field(default="", compare=False)

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of the path, without a query."""
        return self._split()[0].rpartition("/")[2]

    @property
    def stem(self) -> str:
        """``name`` without its last suffix."""
        return PurePosixPath(self.name).stem

    def sibling(self, name: str) -> RemotePath:
        """The file ``name`` in the same folder; a query (a signature, say) is kept."""
        path, query = self._split()
        return RemotePath(f"{path.rpartition('/')[0]}/{name}{query}", self.storage)

    def _split(self) -> tuple[str, str]:
        """The URL without and from its query on; in other stores than the web, a question mark is part of a name."""
        path, mark, query = self.url.partition("?") if self.url.startswith("http") else (self.url, "", "")
        return path, mark + query


def is_remote(spec: str) -> bool:
    """Whether ``spec`` is a URL of something else than a local file."""
    return "://" in spec and not spec.startswith("file://")


def with_retries(action: Callable[[], T], retries: int) -> T:
    """``action()``, tried again after errors that may pass. Raises RemoteError, UserError as it comes."""
    wait = _FIRST_WAIT
    for left in range(retries, -1, -1):
        try:
            return action()
        except UserError:
            raise
        except Exception as error:  # Each store's library has errors of its own, few of them OSErrors.
            passing, words = explain(error)
            if not passing or not left:
                tries = f", after {retries + 1} tries" if passing and retries else ""
                raise RemoteError(words + tries) from error
        # Full jitter: many processes that met the same overload do not come back together.
        time.sleep(random.uniform(0.0, wait))
        wait = min(wait * 2, _LONGEST_WAIT)
    raise AssertionError("unreachable")


def read_range(path: RemotePath, offset: int, size: int) -> bytes:
    """Bytes ``offset`` to ``offset + size``. Raises RemoteError."""
    if size <= 0:
        return b""

    def fetch() -> bytes:
        data = fetch_piece(path.url, offset, offset + size, path.version)
        if len(data) > size:
            raise NoRanges("the server does not send pieces of files (no HTTP ranges)")
        if len(data) < size:
            raise ShortRead("fewer bytes came than were asked for")
        return data

    return with_retries(fetch, path.storage.retries)


def read_whole(path: RemotePath) -> bytes:
    """All bytes of a small file. Raises RemoteError."""
    # From its first byte on: for a whole file s3fs asks for its size before, and lists the folder when there is none.
    return with_retries(lambda: bytes(system_of(path.url).cat_file(path.url, start=0)), path.storage.retries)


def with_state(path: RemotePath) -> RemotePath:
    """``path`` with its size and version, as the store tells them. Raises RemoteError."""
    info = with_retries(lambda: cast(dict[str, Any], system_of(path.url).info(path.url)), path.storage.retries)
    return RemotePath(path.url, path.storage, int(info.get("size") or 0), version_in(info))


def list_remote(url: str, storage: Storage) -> list[RemotePath]:
    """The ``.tar`` files that a URL with ``*`` or ``[`` matches, or that lie in the folder it names."""
    has_magic = any(mark in url for mark in "*[")
    pattern = url if has_magic else url.rstrip("/") + "/*.tar"
    system = system_of(url)
    try:
        names = with_retries(lambda: list(system.glob(pattern)), storage.retries)
    except RemoteError as error:
        raise UserError(
            f"{url} cannot be listed ({error}): name the shards by a range {{00000..00099}}.tar."
        ) from error
    return [RemotePath(system.unstrip_protocol(name), storage) for name in names if name.endswith(".tar")]


class RangedFile(io.RawIOBase):
    """A remote file to read and seek in, by requests of at least ``least`` bytes, and of more while it is read through.

    Raises RemoteError when it cannot be read, also when it was replaced since ``path`` was asked for its state.
    """

    def __init__(self, path: RemotePath, least: int = _LEAST) -> None:
        self.path, self.position = path, 0
        self._least = self._asked = least
        # Two pieces, each with its start: a sample that lies across their border is read to and fro.
        self._held: deque[tuple[int, bytes]] = deque([(0, b"")], maxlen=2)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.path.size}[whence]
        return self.position

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), self.path.size - self.position)
        if size <= 0:
            return 0
        start, held = next(
            ((start, held) for start, held in self._held if start <= self.position < start + len(held)), None
        ) or self._fetch(size)
        place = self.position - start
        data = held[place : place + size]
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)

    def _fetch(self, size: int) -> tuple[int, bytes]:
        """Hold the bytes from here on. Twice as many as the last time where little was skipped since: the index of a shard
        of small images reads nearly all of it, that of one of large images a little of each."""
        end = self._held[-1][0] + len(self._held[-1][1])
        skipped = self.position - end
        reads_on = 0 <= skipped <= self._asked // 4
        self._asked = max(min(2 * self._asked, _MOST), self._least) if reads_on else self._least
        # A little of what was skipped comes too: a sample's JSON may lie before its image and be read after it.
        start = max(self.position - _BACK, end if skipped >= 0 else 0)
        wanted = min(max(self.position - start + size, self._asked), self.path.size - start)
        self._held.append((start, read_range(self.path, start, wanted)))
        return self._held[-1]


def open_shard(path: Path | RemotePath, least: int = _LEAST) -> BinaryIO:
    """A shard to read and seek in; of a remote one each request brings at least ``least`` bytes."""
    if isinstance(path, RemotePath):
        path = path if path.size else with_state(path)
        return io.BufferedReader(RangedFile(path, least))
    return open(path, "rb")
