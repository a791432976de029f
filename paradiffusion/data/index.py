"""Index of a data set: of one shard (what lies where in it, kept in a small file beside it), and of many as one table."""

from __future__ import annotations

import ctypes
import hashlib
import io
import multiprocessing
import os
import signal
import threading
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from tqdm import tqdm

from paradiffusion.atomic import atomic_file
from paradiffusion.data.captions import captions_of, parse_meta
from paradiffusion.data.images import probe_size
from paradiffusion.data.remote import RemoteError, RemotePath, open_shard, read_whole, with_state
from paradiffusion.data.shards import IMAGE_EXTENSIONS, Listing, Place, RawSample, ShardPath, Span, list_tar, read_place
from paradiffusion.errors import UserError
from paradiffusion.machine import cores
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


# So few new indexes are made faster here than a pool starts; above it, one process of each machine makes them.
_FEW: Final = 8
_CONNECTIONS: Final = 32
PATIENCE_SECONDS = 120.0


@dataclass(eq=False)
class SampleIndex:
    """All samples of a list of shards, as arrays: about 75 bytes and the key per sample, so 85 MB per million.

    ``shard`` is int32 [N], the number in ``shards``, ascending; ``words`` uint16 [N, K], the words of the caption of
    each of the ``kinds`` (0: none); ``ids`` uint64 [N], stable names for randomness: functions of key and shard name.
    ``without_image``, ``stray`` and ``bad_json`` count what was passed over, ``truncated`` lists the shards cut short.
    ``tokens`` is uint16 [N, K], the tokens of each caption for the tokenizer called ``tokenizer``; None unless every
    shard has them for one tokenizer. ``shard_source`` is int16 [shards], each shard's number in ``sources``.
    """

    shards: list[ShardPath]
    shard: np.ndarray
    table: np.ndarray
    words: np.ndarray
    kinds: list[str]
    ids: np.ndarray
    key_bytes: np.ndarray
    key_starts: np.ndarray  # int64 [N + 1]
    without_image: int = 0
    stray: int = 0
    bad_json: int = 0
    truncated: tuple[ShardPath, ...] = ()
    tokens: np.ndarray | None = None
    tokenizer: str | None = None
    shard_source: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int16))
    sources: list[str] = field(default_factory=lambda: ["data"])

    def __post_init__(self) -> None:
        if not len(self.shard_source):
            self.shard_source = np.zeros(len(self.shards), np.int16)

    def __len__(self) -> int:
        return len(self.shard)

    @property
    def width(self) -> np.ndarray:
        """int32 [N], pixels, upright; 0 where the image's header could not be read."""
        return self.table["width"]

    @property
    def height(self) -> np.ndarray:
        """int32 [N], as ``width``."""
        return self.table["height"]

    @property
    def lengths(self) -> np.ndarray:
        """uint16 [N, K]: tokens where they are known, else words. 0 where there is no caption."""
        return self.words if self.tokens is None else self.tokens

    def key(self, row: int) -> str:
        """The sample's key within its shard."""
        return self.key_bytes[self.key_starts[row] : self.key_starts[row + 1]].tobytes().decode("utf-8", "replace")

    def place(self, row: int) -> Place:
        """Where the sample of ``row`` lies."""
        at = dict(zip(self.table.dtype.names or (), self.table[row].item(), strict=True))  # Faster than field by field.
        spans = [Span(at[f"{part}_offset"], at[f"{part}_size"]) for part in ("image", "json", "text")]
        extension = IMAGE_EXTENSIONS[at["extension"]]
        return Place(self.shards[self.shard[row]], self.key(row), int(self.ids[row]), extension, *spans)

    def fingerprint(self) -> str:
        """A short name of exactly these samples with these captions' lengths, to notice that data has changed.

        Tokens and sources take part where there are any, since the plan follows them too.
        """
        digest = hashlib.blake2b(digest_size=8)
        for array in (self.ids, self.words, self.width, self.height):
            digest.update(np.ascontiguousarray(array).tobytes())
        if self.tokens is not None:
            digest.update(f"tokens {self.tokenizer}\n".encode())
            digest.update(np.ascontiguousarray(self.tokens).tobytes())
        if len(self.sources) > 1:
            digest.update("\n".join(["sources", *self.sources]).encode("utf-8", "surrogateescape"))
            digest.update(np.ascontiguousarray(self.shard_source[self.shard]).tobytes())
        return digest.hexdigest()


def load_index(
    shards: Sequence[Path | RemotePath],
    allow_truncated: bool = False,
    counter: TokenCounter | None = None,
    key: str = "data.shards",
    index_dir: str | None = None,
) -> SampleIndex:
    """Index all ``shards`` (as ``expand_shards`` lists them); builds and stores what is not there yet.

    Many new indexes are made by several processes; of the processes of one machine, the first makes them and the others
    wait. A remote shard must have its index already. Raises UserError as ``index_shard`` does, when a remote shard has
    no index, and when the shards hold no sample at all; it names ``key``. ``index_dir`` is where indexes may lie that are
    not beside their shards; for remote ones their ``storage`` says it too.
    """
    folder = Path(index_dir).expanduser() if index_dir else None
    parts = _load_all(shards, counter, folder)
    todo = [number for number, part in enumerate(parts) if part is None]
    if lacking := [shards[number] for number in todo if isinstance(shards[number], RemotePath)]:
        raise UserError(
            f"{len(lacking)} of the {len(shards)} remote shards have no index, or one of an earlier state, the first one {lacking[0]}: run "
            "`python scripts/index_shards.py shards=... output=DIR` and set data.index_dir=DIR, or set "
            "data.streaming=true, which cannot resume exactly."
        )
    if len(todo) > _FEW and os.environ.get("LOCAL_RANK", "0") != "0":
        todo = _wait_for(shards, parts, todo, counter, folder)
    built = build_indexes([shards[number] for number in todo], counter)
    for number, part in zip(todo, built, strict=True):
        if isinstance(part, UserError):
            raise part
        parts[number] = part
    whole = assemble([refuse_truncated(part, allow_truncated) for part in parts if part is not None], key)
    parts.clear()
    _give_back_memory()
    return whole


def _give_back_memory() -> None:
    """The freed indexes of many shards would stay with this process, twice what their table takes, and with its workers."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc has it.
        trim(0)


def _load_all(
    shards: Sequence[Path | RemotePath], counter: TokenCounter | None, folder: Path | None
) -> list[ShardIndex | None]:
    def load(shard: Path | RemotePath) -> ShardIndex | None:
        own = shard.storage.index_dir if isinstance(shard, RemotePath) else None
        return load_stored(shard, Path(own).expanduser() if own else folder, counter)

    if not any(isinstance(shard, RemotePath) for shard in shards):
        return [load(shard) for shard in shards]
    with ThreadPoolExecutor(_CONNECTIONS) as pool:  # Each waits for its store, far longer than it works.
        return list(pool.map(load, shards))


def _wait_for(
    shards: Sequence[Path | RemotePath],
    parts: list[ShardIndex | None],
    todo: list[int],
    counter: TokenCounter | None,
    folder: Path | None,
) -> list[int]:
    """Take the indexes that another process makes into ``parts``; those still lacking when no more come."""
    last = time.monotonic()
    while todo and time.monotonic() - last < PATIENCE_SECONDS:
        for number in todo:
            parts[number] = load_stored(shards[number], folder, counter)
        left = [number for number in todo if parts[number] is None]
        if len(left) < len(todo):
            last = time.monotonic()
        todo = left
        time.sleep(0.5 if todo else 0)
    return todo


def build_indexes(
    shards: Sequence[Path | RemotePath],
    counter: TokenCounter | None = None,
    folder: Path | None = None,
    processes: int | None = None,
) -> Iterator[ShardIndex | UserError]:
    """Yield the index of each shard, in order, made and stored by several processes where there are many.

    What is stored already is taken as it is. Truncated shards are indexed as far as they go; for a shard that cannot be
    indexed comes the error that says why.

    Args:
        folder: where the indexes go; None: beside the shards.
        processes: None for as many as there are cores, where there is enough to do for them.
    """
    count = min(processes or cores(), len(shards))
    many = len(shards) > _FEW if processes is None else count > 1
    with tqdm(total=len(shards), desc="indexing shards", unit="shard", disable=None if many else True) as bar:
        if not many:
            for shard in shards:
                yield _index_one(shard, folder, counter)
                bar.update()
            return
        # Forked, so that a tokenizer needs no pickling and nothing is imported again.
        fork = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(count, fork, _begin, (counter, os.getpid())) as pool:
            try:
                for index in pool.map(_index_one, shards, [folder] * len(shards)):
                    yield index
                    bar.update()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


_counter: TokenCounter | None = None


def _begin(counter: TokenCounter | None, parent: int) -> None:
    """In a process of the pool: leave Ctrl-C to the parent, which lets what is begun be finished; and end with it."""
    global _counter
    _counter = counter
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _index_one(
    shard: Path | RemotePath, folder: Path | None, counter: TokenCounter | None = None
) -> ShardIndex | UserError:
    try:
        return index_shard(shard, True, counter or _counter, folder)
    except UserError as error:
        return error


def assemble(parts: list[ShardIndex], key: str) -> SampleIndex:
    """One table of all shards' indexes. Raises UserError when there is no sample."""
    kinds = list(dict.fromkeys(kind for part in parts for kind in part.kinds))
    check_kinds(kinds, key)
    counts = [len(part.table) for part in parts]
    if not sum(counts):
        raise UserError(
            f"The {len(parts)} shards from {parts[0].path} on hold no sample, but {sum(part.stray for part in parts)} "
            f"other files: expected key.json or key.txt beside an image key.{', key.'.join(IMAGE_EXTENSIONS)}."
        )
    names = {part.tokenizer for part in parts}
    tokenizer = names.pop() if len(names) == 1 else None
    columns = [(part.kinds, part.words, part.tokens) for part in parts]
    key_sizes = [np.diff(part.key_ends, prepend=0) for part in parts]
    return SampleIndex(
        shards=[part.path for part in parts],
        shard=np.repeat(np.arange(len(parts), dtype=np.int32), counts),
        table=np.concatenate([part.table for part in parts]),
        words=_spread([(names, words) for names, words, _ in columns], kinds),
        kinds=kinds,
        ids=np.concatenate([p.table["key_hash"] ^ np.uint64(seed_from("shard", p.path.name)) for p in parts]),
        key_bytes=np.concatenate([part.key_bytes for part in parts]),
        key_starts=np.concatenate([[0], np.cumsum(np.concatenate(key_sizes))]).astype(np.int64),
        without_image=sum(part.without_image for part in parts),
        stray=sum(part.stray for part in parts),
        bad_json=sum(part.bad_json for part in parts),
        truncated=tuple(part.path for part in parts if part.truncated),
        tokens=_spread([(names, tokens) for names, _, tokens in columns if tokens is not None], kinds)
        if tokenizer
        else None,
        tokenizer=tokenizer,
    )


def index_head(shards: Sequence[Path | RemotePath], samples: int = 256) -> SampleIndex:
    """An index of the first samples of the first shard: what a run asks its plan for at the start (kinds, sizes and some
    captions) where the whole of the data is streamed. Raises UserError when the shard cannot be read or holds none."""
    return assemble([index_shard_head(shards[0], samples)], "data.shards")


def read_sample(index: SampleIndex, row: int) -> RawSample:
    """Read one sample by its offsets. Raises OSError when the shard is gone or shorter than its index says."""
    return read_place(index.place(row))


def _spread(columns: list[tuple[list[str], np.ndarray]], kinds: list[str]) -> np.ndarray:
    """Counts by kind of several parts, uint16 [N, K], each part's columns where ``kinds`` has them."""
    spread = np.zeros((sum(len(counts) for _, counts in columns), len(kinds)), np.uint16)
    start = 0
    for names, counts in columns:
        spread[start : start + len(counts), [kinds.index(name) for name in names]] = counts
        start += len(counts)
    return spread


def join_indexes(indexes: Sequence[SampleIndex], names: Sequence[str]) -> SampleIndex:
    """One index of several sources, called ``names``: their shards one after the other, ``sources`` and ``shard_source``
    saying whose they are. Ids stay as they are, so that a sample is cropped alike on its own and among others."""
    if len(indexes) == 1:
        return replace(indexes[0], sources=list(names))
    kinds = list(dict.fromkeys(kind for index in indexes for kind in index.kinds))
    check_kinds(kinds, "data.sources")
    tokenizers = {index.tokenizer for index in indexes if index.tokens is not None}
    common = tokenizers.pop() if len(tokenizers) == 1 and all(one.tokens is not None for one in indexes) else None
    first_shard = np.cumsum([0, *(len(index.shards) for index in indexes)])
    first_byte = np.cumsum([0, *(len(index.key_bytes) for index in indexes)])
    starts = [index.key_starts[:-1] + first for index, first in zip(indexes, first_byte, strict=False)]
    return SampleIndex(
        shards=[shard for index in indexes for shard in index.shards],
        shard=np.concatenate([i.shard + np.int32(first) for i, first in zip(indexes, first_shard, strict=False)]),
        table=np.concatenate([index.table for index in indexes]),
        words=_spread([(index.kinds, index.words) for index in indexes], kinds),
        kinds=kinds,
        ids=np.concatenate([index.ids for index in indexes]),
        key_bytes=np.concatenate([index.key_bytes for index in indexes]),
        key_starts=np.concatenate([*starts, [first_byte[-1]]]).astype(np.int64),
        without_image=sum(index.without_image for index in indexes),
        stray=sum(index.stray for index in indexes),
        bad_json=sum(index.bad_json for index in indexes),
        truncated=tuple(shard for index in indexes for shard in index.truncated),
        tokens=_spread([(i.kinds, i.tokens) for i in indexes if i.tokens is not None], kinds) if common else None,
        tokenizer=common,
        shard_source=np.repeat(np.arange(len(indexes), dtype=np.int16), [len(index.shards) for index in indexes]),
        sources=list(names),
    )


@dataclass
class IndexReport:
    """What was found, over all shards."""

    shards: int = 0
    samples: int = 0
    uncaptioned: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    captions: Counter[str] = field(default_factory=Counter)
    words: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    truncated: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def add(self, index: ShardIndex | UserError) -> None:
        """Count one shard."""
        if isinstance(index, UserError):
            self.errors.append(str(index))
            return
        self.shards += 1
        self.samples += len(index.table)
        self.uncaptioned += int((~index.words.any(axis=1)).sum())
        self.truncated += [str(index.path)] if index.truncated else []
        self.counts.update(
            {
                "keys without an image": index.without_image,
                "files that are no part of a sample": index.stray,
                "JSON files that cannot be read": index.bad_json,
                "images of unknown size": int((index.table["width"] == 0).sum()),
            }
        )
        for column, kind in enumerate(index.kinds):
            self.captions[kind] += int((index.words[:, column] > 0).sum())
            self.words[kind] += int(index.words[:, column].sum())
            if index.tokens is not None:
                self.tokens[kind] += int(index.tokens[:, column].sum())

    def lines(self) -> list[str]:
        """For a person."""
        lines = [f"{self.shards} shards, {self.samples} samples, {self.uncaptioned} of them without a caption"]
        for kind, count in self.captions.items():
            mean = f"{self.words[kind] / max(count, 1):.1f} words"
            mean += f", {self.tokens[kind] / max(count, 1):.1f} tokens" if self.tokens[kind] else ""
            lines.append(f"  captions of kind {kind}: {count}, {mean} on average")
        lines += [f"  passed over: {count} {reason}" for reason, count in self.counts.items() if count]
        lines += [f"  cut short: {path} (data.allow_truncated=true uses its whole samples)" for path in self.truncated]
        return lines + [f"  not indexed: {error}" for error in self.errors]


def check_names(shards: Iterable[ShardPath]) -> None:
    """Raise UserError where two shards would have one index in ``output``."""
    stems: dict[str, ShardPath] = {}
    for shard in shards:
        if shard.stem in stems:
            raise UserError(
                f"{stems[shard.stem]} and {shard} have one name, and so would their indexes in output=; "
                "index them in two runs, each with a folder of its own."
            )
        stems[shard.stem] = shard
