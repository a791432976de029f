"""Where one sample lies, and how its bytes are read from there: a local shard, a remote one, or a plain folder."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from paradiffusion.data.captions import captions_of, parse_meta
from paradiffusion.data.folder_files import read_beside
from paradiffusion.data.remote_cache import cached_copy
from paradiffusion.data.storage import RemotePath, read_range
from paradiffusion.data.tars import Span

_OPEN_FILES: Final = 64
# Members of a sample that lie further apart are read one by one: what is between them would be read for nothing.
_MOST_BETWEEN: Final = 1 << 16


@dataclass
class RawSample:
    """One sample as it lies in a shard.

    ``key`` names it within its shard; ``image`` is the encoded file, ``extension`` one of ``IMAGE_EXTENSIONS``;
    ``meta`` is the content of ``key.json``, where ``meta["captions"]`` maps a kind ("short", "long", "clean") to text.
    """

    key: str
    image: bytes
    extension: str
    meta: dict[str, Any]


@dataclass(frozen=True, order=True)
class FolderPart:
    """Some of a folder's pictures, which stand for a shard: ``name`` is for people. A sample's key is its path in
    ``root``, with the suffix."""

    root: Path
    number: int

    def __str__(self) -> str:
        return str(self.root)

    @property
    def name(self) -> str:
        """The folder's name; the key says the rest."""
        return self.root.name

    @property
    def stem(self) -> str:
        """As ``name``."""
        return self.root.name


ShardPath: TypeAlias = Path | RemotePath | FolderPart


@dataclass(frozen=True)
class Place:
    """Where one sample lies, enough to read it without an index. ``id`` is stable: of its key and shard's name."""

    shard: ShardPath
    key: str
    id: int
    extension: str
    image: Span
    json: Span
    text: Span


def read_place(place: Place) -> RawSample:
    """As ``shards.read_sample``; the captions in ``meta`` are cleaned, and those of a text file are of kind "short"."""
    if isinstance(place.shard, FolderPart):
        image, meta_bytes, text = _read_files(place.shard, place)
    elif isinstance(place.shard, RemotePath):
        image, meta_bytes, text = _read_remote(place.shard, place)
    else:
        shard = str(place.shard)
        image, meta_bytes, text = _read_spans(place, lambda offset, size: _files.read(shard, offset, size))
    meta = parse_meta(meta_bytes) or {}
    return RawSample(place.key, image, place.extension, {**meta, "captions": captions_of(meta, text)})


def _read_remote(shard: RemotePath, place: Place) -> tuple[bytes, bytes, bytes]:
    copy = cached_copy(shard)
    if copy is None:
        return _read_spans(place, lambda offset, size: read_range(shard, offset, size))
    with copy:  # Not kept open: what leaves the cache must free its room.
        return _read_spans(place, lambda offset, size: os.pread(copy.fileno(), size, offset))


def _read_spans(place: Place, read: Callable[[int, int], bytes]) -> tuple[bytes, bytes, bytes]:
    """Image, JSON and text of a tar: one read where they lie side by side, as they do unless somebody sorted by kind."""
    spans = (place.image, place.json, place.text)
    present = [span for span in spans if span.size]
    start = min((span.offset for span in present), default=0)
    end = max((span.offset + span.size for span in present), default=0)
    if end - start > sum(span.size for span in present) + _MOST_BETWEEN:
        pieces = [read(span.offset, span.size) if span.size else b"" for span in spans]
    else:
        whole = memoryview(read(start, end - start))
        pieces = [bytes(whole[span.offset - start : span.offset - start + span.size]) for span in spans]
        pieces = [piece if span.size else b"" for piece, span in zip(pieces, spans, strict=True)]
    if any(len(piece) < span.size for piece, span in zip(pieces, spans, strict=True)):
        raise OSError("the shard is shorter than when it was indexed")
    return pieces[0], pieces[1], pieces[2]


def _read_files(part: FolderPart, place: Place) -> tuple[bytes, bytes, bytes]:
    path = part.root / place.key
    meta_bytes, text = read_beside(path, place.json.size > 0, place.text.size > 0)
    return path.read_bytes() if place.image.size else b"", meta_bytes, text


class _OpenFiles:
    """The local files read last stay open: on network disks opening one costs as much as reading a sample of it."""

    def __init__(self) -> None:
        self.files: OrderedDict[str, int] = OrderedDict()
        self.lock = threading.Lock()

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Raises OSError. A file that was replaced is opened anew, and one that is gone is missed at once."""
        with self.lock:  # Also while reading, so that no other thread closes the file.
            now = os.stat(path)
            number = self.files.pop(path, None)
            if number is not None:
                then = os.fstat(number)
                if (then.st_ino, then.st_dev) != (now.st_ino, now.st_dev):
                    os.close(number)
                    number = None
            if number is None:
                number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self.files[path] = number
            while len(self.files) > _OPEN_FILES:
                os.close(self.files.popitem(last=False)[1])
            return os.pread(number, size, offset)

    def after_fork(self) -> None:
        """A lock that was held elsewhere at the fork would stay so; the files may be shared, since pread has no place."""
        self.lock = threading.Lock()


_files = _OpenFiles()
os.register_at_fork(after_in_child=_files.after_fork)
