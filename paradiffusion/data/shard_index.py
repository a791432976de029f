"""The index of one shard: what lies where in it, kept in a small file beside it."""

from __future__ import annotations

import hashlib
import io
import os
import threading
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from paradiffusion.atomic import atomic_file
from paradiffusion.data.captions import captions_of, parse_meta
from paradiffusion.data.images import probe_size
from paradiffusion.data.storage import RemoteError, RemotePath, open_shard, read_whole, with_state
from paradiffusion.data.tars import IMAGE_EXTENSIONS, Listing, Span, list_tar
from paradiffusion.errors import UserError
from paradiffusion.randomness import seed_from

_VERSION: Final = 2
_MAX_KINDS: Final = 16
# What np.load raises for files that are no .npz, or one with a flipped bit (zipfile then finds it encrypted, say).
DAMAGED: Final = (ValueError, KeyError, EOFError, TypeError, RuntimeError, zlib.error, zipfile.BadZipFile)
_HEAD_BYTES: Final = 1 << 16
_PARSING: Final = threading.Lock()
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


@dataclass(frozen=True)
class TokenCounter:
    """``count`` gives the number of tokens of each text, without padding; ``name`` tells tokenizers apart."""

    name: str
    count: Callable[[list[str]], list[int]]


@dataclass(eq=False)
class ShardIndex:
    """What lies where in one shard of n samples; see SampleIndex for the columns."""

    path: Path | RemotePath
    table: np.ndarray  # ROW [n]
    words: np.ndarray  # uint16 [n, K]
    kinds: list[str]
    key_bytes: np.ndarray  # uint8, all keys joined
    key_ends: np.ndarray  # int64 [n]
    without_image: int
    stray: int
    bad_json: int
    truncated: bool
    tokens: np.ndarray | None = None  # uint16 [n, K]
    tokenizer: str | None = None


def index_shard(
    path: Path | RemotePath,
    allow_truncated: bool = False,
    counter: TokenCounter | None = None,
    folder: Path | None = None,
) -> ShardIndex:
    """What lies where in a shard, stored beside it as ``<stem>.index.npz`` and rebuilt when its size or time differ.

    Where it cannot be written, the index goes to ``$PARADIFFUSION_CACHE`` (``~/.cache/paradiffusion``). Raises UserError
    when the shard cannot be read, or is cut short and ``allow_truncated`` is not set.

    Args:
        counter: counts tokens too; an index without them, or with another tokenizer's, is made again.
        folder: where the index goes instead.
    """
    if isinstance(path, RemotePath) and not path.size:
        try:
            path = with_state(path)  # asked once, for both
        except RemoteError as error:
            raise UserError(f"The shard {path} cannot be read ({error}): correct data.shards or try again.") from error
    index = load_stored(path, folder, counter)
    if index is None:
        try:
            stamp = _stamp(path)  # Taken first: a shard that changes meanwhile is indexed again next time.
            index = _build(path, counter)
        except RemoteError as error:
            raise UserError(f"The shard {path} cannot be read ({error}): correct data.shards or try again.") from error
        except OSError as error:
            raise UserError(f"The shard {path} cannot be read ({error}): check its permissions.") from error
        _store(index, stamp, folder)
    return refuse_truncated(index, allow_truncated)


def index_shard_head(path: Path | RemotePath, samples: int) -> ShardIndex:
    """The index of the first ``samples`` of a shard, stored nowhere. Raises UserError when it cannot be read."""
    try:
        return _build(path, None, samples)
    except OSError as error:
        raise UserError(f"The shard {path} cannot be read ({error}): correct data.shards or try again.") from error


def refuse_truncated(index: ShardIndex, allow_truncated: bool) -> ShardIndex:
    """``index`` itself; raises UserError when its shard is cut short and that is not allowed."""
    if index.truncated and not allow_truncated:
        raise UserError(
            f"The shard {index.path} is cut short after {len(index.table)} whole samples: fetch it again, "
            "or set data.allow_truncated=true to use the whole samples."
        )
    return index


def check_kinds(kinds: list[str], where: object) -> None:
    """Raise UserError when captions are keyed by something that is no kind, which would make ``words`` huge."""
    if len(kinds) > _MAX_KINDS:
        raise UserError(
            f"{where} has over {_MAX_KINDS} kinds of captions ({', '.join(kinds[:3])}, ...): "
            'expected "captions": {"short": text, "long": text} in each JSON.'
        )


def _build(path: Path | RemotePath, counter: TokenCounter | None, at_most: int | None = None) -> ShardIndex:
    with open_shard(path) as file:
        listing = list_tar(file, str(path), at_most)
        return _describe(path, file, listing, counter)


def _describe(path: Path | RemotePath, file: BinaryIO, listing: Listing, counter: TokenCounter | None) -> ShardIndex:
    entries = listing.entries
    table = np.zeros(len(entries), ROW)
    bad_json = 0
    captions: list[dict[str, str]] = []
    for row, entry in zip(table, entries, strict=True):
        for name, span in (("image", entry.image), ("json", entry.json), ("text", entry.text)):
            row[f"{name}_offset"], row[f"{name}_size"] = span.offset, span.size
        row["extension"] = IMAGE_EXTENSIONS.index(entry.extension)
        row["key_hash"] = seed_from(entry.key)
        row["width"], row["height"] = _size_of(file, entry.image)
        meta_bytes, text = _pick(file, entry.json), _pick(file, entry.text)
        meta = parse_meta(meta_bytes) if meta_bytes else {}
        bad_json += meta is None
        captions.append(captions_of(meta or {}, text))
    kinds, words, tokens = count_captions(captions, counter, path)
    keys = [entry.key.encode("utf-8", "replace") for entry in entries]
    return ShardIndex(
        path=path,
        table=table,
        words=words,
        kinds=kinds,
        key_bytes=np.frombuffer(b"".join(keys), np.uint8),
        key_ends=np.cumsum([len(key) for key in keys], dtype=np.int64),
        without_image=listing.without_image,
        stray=listing.stray,
        bad_json=bad_json,
        truncated=listing.truncated,
        tokens=tokens,
        tokenizer=counter.name if counter else None,
    )


def count_captions(
    captions: list[dict[str, str]], counter: TokenCounter | None, where: object
) -> tuple[list[str], np.ndarray, np.ndarray | None]:
    """The kinds, uint16 [n, K] words of each, and as many tokens where there is a ``counter``; 0 where there is none.

    Raises UserError, which names ``where``, for keys that are no kinds.
    """
    kinds = list(dict.fromkeys(kind for one in captions for kind in one))
    check_kinds(kinds, where)
    words = np.zeros((len(captions), len(kinds)), np.uint16)
    tokens = np.zeros_like(words) if counter else None
    for number, one in enumerate(captions):
        for kind, text in one.items():
            words[number, kinds.index(kind)] = min(len(text.split()), 65535)
    for column, kind in enumerate(kinds):
        rows = [number for number, one in enumerate(captions) if kind in one]
        if counter is not None and tokens is not None:
            counts = counter.count([captions[number][kind] for number in rows])
            tokens[rows, column] = np.clip(counts, 1, 65535)
    return kinds, words, tokens


def _pick(file: BinaryIO, span: Span) -> bytes:
    file.seek(span.offset)
    return file.read(span.size)


def _size_of(file: BinaryIO, image: Span) -> tuple[int, int]:
    """(width, height) from the head of the image, so that indexing does not read whole shards, else from all of it."""
    size = probe_size(_pick(file, Span(image.offset, min(image.size, _HEAD_BYTES))))
    return probe_size(_pick(file, image)) if size == (0, 0) and image.size > _HEAD_BYTES else size


def _stamp(path: Path | RemotePath) -> np.ndarray:
    """What tells one state of a shard from another: version, size, time; of a remote one the time is not known."""
    if isinstance(path, RemotePath):
        return np.array([_VERSION, path.size, 0], np.int64)
    stat = path.stat()
    return np.array([_VERSION, stat.st_size, stat.st_mtime_ns], np.int64)


def cache_folder() -> Path:
    """``$PARADIFFUSION_CACHE``, else ``~/.cache/paradiffusion``: what can be made again at any time."""
    return Path(os.environ.get("PARADIFFUSION_CACHE") or Path.home() / ".cache" / "paradiffusion")


def hidden_name(path: object) -> str:
    """A name for what belongs to ``path`` and cannot lie beside it."""
    return hashlib.blake2b(str(path).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def _places(path: Path | RemotePath, folder: Path | None) -> list[Path]:
    """Local files where the index of a shard may lie: in ``folder``, beside the shard, else in the user's cache."""
    places = [folder / f"{path.stem}.index.npz"] if folder else []
    if isinstance(path, RemotePath):
        return [*places, cache_folder() / "index" / f"{hidden_name(path)}.npz"]
    return [*places, path.with_suffix(".index.npz"), cache_folder() / "index" / f"{hidden_name(path.resolve())}.npz"]


def _store(index: ShardIndex, stamp: np.ndarray, folder: Path | None) -> None:
    """Write the index where it can be written, and be content when that is nowhere: it is built again then."""
    arrays: dict[str, Any] = {
        "stamp": stamp,
        "version": np.array(index.path.version if isinstance(index.path, RemotePath) else ""),
        "table": index.table,
        "words": index.words,
        "kinds": np.array(index.kinds, dtype=np.str_),
        "key_bytes": index.key_bytes,
        "key_ends": index.key_ends,
        "counts": np.array([index.without_image, index.stray, index.bad_json, index.truncated], np.int64),
    }
    if index.tokens is not None:
        arrays |= {"tokens": index.tokens, "tokenizer": np.array(index.tokenizer)}
    for place in _places(index.path, folder)[: 1 if folder else None]:
        if save_arrays(place, arrays):
            return
    if folder:
        raise UserError(f"The index of {index.path} cannot be written to {folder}: choose another folder.")


def save_arrays(place: Path, arrays: dict[str, Any]) -> bool:
    """Write an .npz whole or not at all, since several processes may make one at a time; False when that cannot be."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(place, shared=True) as partial, open(partial, "xb") as file:
            np.savez(file, **arrays)
    except OSError:
        return False
    return True


def load_stored(
    path: Path | RemotePath, folder: Path | None = None, counter: TokenCounter | None = None
) -> ShardIndex | None:
    """The stored index of a shard; None where there is none, it is damaged, or the shard has changed since.

    With a ``counter`` also where it has no tokens of that tokenizer. A remote shard's index may lie beside it in its
    store; its size, and its version where both are known, must then be those of the index.

    Raises:
        UserError: when a remote shard is not there.
    """
    if isinstance(path, RemotePath) and not path.size:
        try:
            path = with_state(path)
        except RemoteError as error:
            raise UserError(f"The shard {path} cannot be read: {error}.") from error
    for place in _places(path, folder):
        try:
            index = _parse(path, place)
        except OSError:
            continue
        if index is not None and (counter is None or index.tokenizer == counter.name):
            return index
    if isinstance(path, RemotePath):
        try:
            index = _parse(path, io.BytesIO(read_whole(path.sibling(f"{path.stem}.index.npz"))))
        except RemoteError:
            return None
        if index is not None and (counter is None or index.tokenizer == counter.name):
            return index
    return None


def _parse(path: Path | RemotePath, place: Path | io.BytesIO) -> ShardIndex | None:
    """The index in an .npz; None where it is damaged or another state's. Raises OSError where there is none."""
    try:
        # NumPy reads an array's header as a Python literal, and Python 3.11's parser counts its depth for all threads
        # together: two at once now and then raise SystemError. The waiting for a store is over by now.
        with _PARSING, np.load(place, allow_pickle=False) as stored:
            stamp, now = stored["stamp"], _stamp(path)
            if isinstance(path, RemotePath):
                # Made beside a local copy it has that one's time; and not every server tells a size or a version.
                versions = {str(stored["version"]), path.version} - {""}
                same = stamp[0] == now[0] and stamp[1] == now[1] and len(versions) < 2
            else:
                same = np.array_equal(stamp, now)
            if not same or stored["table"].dtype != ROW:
                return None
            without_image, stray, bad_json, truncated = (int(count) for count in stored["counts"])
            has_tokens = "tokens" in stored.files
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
                tokens=stored["tokens"] if has_tokens else None,
                tokenizer=str(stored["tokenizer"]) if has_tokens else None,
            )
    except DAMAGED:
        return None
