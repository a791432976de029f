"""The index of one shard: what lies where in it, kept in a small file beside it."""

from __future__ import annotations

import hashlib
import os
import uuid
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np

from paradiffusion.data.captions import captions_of, parse_meta
from paradiffusion.data.images import probe_size
from paradiffusion.data.tars import IMAGE_EXTENSIONS, Span, list_tar
from paradiffusion.errors import UserError
from paradiffusion.randomness import seed_from

_VERSION: Final = 1
_MAX_KINDS: Final = 16
_HEAD_BYTES: Final = 1 << 16
ROW: Final = np.dtype(
    [
        ("image_offset", "<i8"),
        ("image_size", "<u4"),
        ("json_offset", "<i8"),
        ("json_size", "<u4"),
        ("text_offset", "<i8"),
        ("text_size", "<u4"),
        ("width", "<i4"),
        ("height", "<i4"),
        ("extension", "u1"),
        ("key_hash", "<u8"),
    ]
)


@dataclass(eq=False)
class ShardIndex:
    """What lies where in one shard of n samples; see SampleIndex for the columns."""

    path: Path
    table: np.ndarray  # ROW [n]
    words: np.ndarray  # uint16 [n, K]
    kinds: list[str]
    key_bytes: np.ndarray  # uint8, all keys joined
    key_ends: np.ndarray  # int64 [n]
    without_image: int
    stray: int
    bad_json: int
    truncated: bool


def index_shard(path: Path, allow_truncated: bool = False) -> ShardIndex:
    """What lies where in a shard, stored beside it as ``<stem>.index.npz`` and rebuilt when its size or time differ.

    In a read-only folder the index goes to ``$PARADIFFUSION_CACHE`` (``~/.cache/paradiffusion``). Raises UserError
    when the shard cannot be read, or is cut short and ``allow_truncated`` is not set.
    """
    index = load_stored(path)
    if index is None:
        try:
            stamp = _stamp(path)  # Taken first: a shard that changes meanwhile is indexed again next time.
            index = _build(path)
        except OSError as error:
            raise UserError(f"The shard {path} cannot be read ({error}): check its permissions.") from error
        _store(index, stamp)
    return refuse_truncated(index, allow_truncated)


def refuse_truncated(index: ShardIndex, allow_truncated: bool) -> ShardIndex:
    """``index`` itself; raises UserError when its shard is cut short and that is not allowed."""
    if index.truncated and not allow_truncated:
        raise UserError(
            f"The shard {index.path} is cut short after {len(index.table)} whole samples: fetch it again, "
            "or set data.allow_truncated=true to use the whole samples."
        )
    return index


def check_kinds(kinds: list[str], where: Path | str) -> None:
    """Raise UserError when captions are keyed by something that is no kind, which would make ``words`` huge."""
    if len(kinds) > _MAX_KINDS:
        raise UserError(
            f"{where} has over {_MAX_KINDS} kinds of captions ({', '.join(kinds[:3])}, ...): "
            'expected "captions": {"short": text, "long": text} in each JSON.'
        )


def _build(path: Path) -> ShardIndex:
    listing = list_tar(path)
    entries = listing.entries
    table = np.zeros(len(entries), ROW)
    bad_json = 0
    counted: list[dict[str, int]] = []
    with open(path, "rb") as file:
        for row, entry in zip(table, entries, strict=True):
            for name, span in (("image", entry.image), ("json", entry.json), ("text", entry.text)):
                row[f"{name}_offset"], row[f"{name}_size"] = span.offset, span.size
            row["extension"] = IMAGE_EXTENSIONS.index(entry.extension)
            row["key_hash"] = seed_from(entry.key)
            row["width"], row["height"] = _size_of(file, entry.image)
            meta_bytes, text = _pick(file, entry.json), _pick(file, entry.text)
            meta = parse_meta(meta_bytes) if meta_bytes else {}
            bad_json += meta is None
            captions = captions_of(meta or {}, text)
            counted.append({kind: min(len(value.split()), 65535) for kind, value in captions.items()})
    kinds = list(dict.fromkeys(kind for counts in counted for kind in counts))
    check_kinds(kinds, path)
    words = np.array([[counts.get(kind, 0) for kind in kinds] for counts in counted], np.uint16)
    keys = [entry.key.encode("utf-8", "replace") for entry in entries]
    return ShardIndex(
        path=path,
        table=table,
        words=words.reshape(len(entries), len(kinds)),
        kinds=kinds,
        key_bytes=np.frombuffer(b"".join(keys), np.uint8),
        key_ends=np.cumsum([len(key) for key in keys], dtype=np.int64),
        without_image=listing.without_image,
        stray=listing.stray,
        bad_json=bad_json,
        truncated=listing.truncated,
    )


def _pick(file: BinaryIO, span: Span) -> bytes:
    file.seek(span.offset)
    return file.read(span.size)


def _size_of(file: BinaryIO, image: Span) -> tuple[int, int]:
    """(width, height) from the head of the image, so that indexing does not read whole shards, else from all of it."""
    size = probe_size(_pick(file, Span(image.offset, min(image.size, _HEAD_BYTES))))
    return probe_size(_pick(file, image)) if size == (0, 0) and image.size > _HEAD_BYTES else size


def _stamp(path: Path) -> np.ndarray:
    """What tells one state of a shard from another."""
    stat = path.stat()
    return np.array([_VERSION, stat.st_size, stat.st_mtime_ns], np.int64)


def _places(path: Path) -> list[Path]:
    """Where the index of a shard may lie: beside it, else in the user's cache."""
    cache = Path(os.environ.get("PARADIFFUSION_CACHE") or Path.home() / ".cache" / "paradiffusion")
    name = hashlib.blake2b(str(path.resolve()).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    return [path.with_suffix(".index.npz"), cache / "index" / f"{name}.npz"]


def _store(index: ShardIndex, stamp: np.ndarray) -> None:
    """Write the index where it can be written, and be content when that is nowhere: it is built again then."""
    for place in _places(index.path):
        partial = place.with_name(f".{place.name}.{uuid.uuid4().hex}")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(partial, "xb") as file:
                    np.savez(
                        file,
                        stamp=stamp,
                        table=index.table,
                        words=index.words,
                        kinds=np.array(index.kinds, dtype=np.str_),
                        key_bytes=index.key_bytes,
                        key_ends=index.key_ends,
                        counts=np.array([index.without_image, index.stray, index.bad_json, index.truncated], np.int64),
                    )
                os.replace(partial, place)  # Whole or not at all: several processes may index one shard at a time.
            finally:
                partial.unlink(missing_ok=True)
            return
        except OSError:
            continue


def load_stored(path: Path) -> ShardIndex | None:
    """The stored index of a shard; None where there is none, it is damaged, or the shard has changed since."""
    for place in _places(path):
        try:
            with np.load(place, allow_pickle=False) as stored:
                if not np.array_equal(stored["stamp"], _stamp(path)) or stored["table"].dtype != ROW:
                    continue
                without_image, stray, bad_json, truncated = (int(count) for count in stored["counts"])
                return ShardIndex(
                    path=path,
                    table=stored["table"],
                    words=stored["words"],
                    kinds=[str(kind) for kind in stored["kinds"]],
                    key_bytes=stored["key_bytes"],
                    key_ends=stored["key_ends"],
                    without_image=without_image,
                    stray=stray,
                    bad_json=bad_json,
                    truncated=bool(truncated),
                )
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            continue
    return None
