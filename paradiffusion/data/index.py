"""Index of a data set: one table of all its samples, put together of the small files that are kept beside its shards.

Of a large set the table is a folder of columns that all processes of a machine map and share: one of them writes it.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import multiprocessing
import os
import signal
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeAlias

import numpy as np
from tqdm import tqdm

from paradiffusion.atomic import atomic_file, cached_index, locked
from paradiffusion.data.captions import captions_of, count_words, is_odd, parse_meta
from paradiffusion.data.columns import New, digest, map_columns, shared_columns
from paradiffusion.data.images import probe_size
from paradiffusion.data.remote import RemoteError, RemotePath, open_shard, read_whole, with_state
from paradiffusion.data.shards import IMAGE_EXTENSIONS, FolderPart, Place, RawSample, ShardPath, Span, TarEntry, list_tar, read_place
from paradiffusion.errors import UserError
from paradiffusion.machine import cores, start_method
from paradiffusion.randomness import seed_from

_VERSION: Final = 5
_MAX_KINDS: Final = 16
# What an index counts of its files, in the order in which that is stored, and what a person is told of them.
COUNTS: Final = {
    "without_image": "keys without an image", "stray": "files that are no part of a sample",
    "bad_json": "JSON files that cannot be read", "odd_text": "texts that are not UTF-8 (read as Windows-1252 or UTF-16 where that fits)",
}  # fmt: skip
# So few new indexes are made faster here than a pool starts; above it, one process of each machine makes them.
_FEW: Final = 8
# A larger index, over 22 MB, is mapped and shared.
_MAPPED_FROM: Final = 1 << 18
_ROWS_AT_ONCE: Final = 1 << 20
# Indexes of single shards that are kept until the whole is put together: with few of them none is read twice.
_KEPT_PARTS: Final = 128
_CONNECTIONS: Final = 32
_HEAD_BYTES: Final = 1 << 16
_TAIL_BYTES: Final = 1 << 12
# What np.load raises for files that are no .npz, or one with a flipped bit (zipfile then finds it encrypted, say).
DAMAGED: Final = (ValueError, KeyError, EOFError, TypeError, RuntimeError, zlib.error, zipfile.BadZipFile)
_PARSING: Final = threading.Lock()
ROW: Final = np.dtype(
    [
        ("image_offset", "<i8"), ("image_size", "<u4"), ("json_offset", "<i8"), ("json_size", "<u4"), ("text_offset", "<i8"),
        ("text_size", "<u4"), ("width", "<i4"), ("height", "<i4"), ("extension", "u1"), ("key_hash", "<u8"),
        ("image_hash", "<u8"), ("captions_hash", "<u8"),  # of what is there
    ]
)  # fmt: skip


Each: TypeAlias = Callable[..., Iterator[Any]]  # map, or an executor's


@dataclass(frozen=True)
class TokenCounter:
    """``count`` gives the number of tokens of each text, without padding; ``name`` tells tokenizers apart."""

    name: str
    count: Callable[[list[str]], list[int]]


@dataclass(eq=False)
class SampleIndex:
    """All samples of a list of shards, as arrays: about 91 bytes and the key per sample, so 100 MB per million. Those of a large
    set are mapped from the folder ``columns``, read only, and cost a process no memory of its own.

    ``shard`` is int32 [N], the number in ``shards``, ascending; ``words`` uint16 [N, K], the words of the caption of
    each of the ``kinds`` (0: none); ``ids`` uint64 [N], stable names for randomness: functions of key and shard name.
    ``without_image``, ``stray`` and ``bad_json`` count what was passed over, ``odd_text`` texts that are not UTF-8, ``truncated``
    lists the shards cut short.
    ``tokens`` is uint16 [N, K], the tokens of each caption for the tokenizer called ``tokenizer``; None unless every
    shard has them for one tokenizer. ``shard_source`` is int16 [shards], each shard's number in ``sources``.
    """

    shards: list[ShardPath]
    shard: np.ndarray
    table: np.ndarray  # ROW [N]
    words: np.ndarray
    kinds: list[str]
    ids: np.ndarray
    key_bytes: np.ndarray  # uint8, all keys joined
    key_starts: np.ndarray  # int64 [N + 1]
    without_image: int = 0
    stray: int = 0
    bad_json: int = 0
    odd_text: int = 0
    truncated: tuple[ShardPath, ...] = ()
    tokens: np.ndarray | None = None
    tokenizer: str | None = None
    shard_source: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int16))
    sources: list[str] = field(default_factory=lambda: ["data"])
    columns: Path | None = None
    facts: dict[str, Any] = field(default_factory=dict)  # what is kept beside mapped columns

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
        image, json, text = (Span(at[f"{part}_offset"], at[f"{part}_size"]) for part in ("image", "json", "text"))
        extension = IMAGE_EXTENSIONS[at["extension"]]
        shard, key = self.shards[self.shard[row]], self.key(row)
        return Place(shard, key, int(self.ids[row]), extension, image, json, text, at["image_hash"])

    def take(self, rows: np.ndarray) -> SampleIndex:
        """The samples of ``rows``, in that order."""
        keys = [self.key_bytes[self.key_starts[row] : self.key_starts[row + 1]] for row in rows]
        return replace(
            self, shard=self.shard[rows], table=self.table[rows], words=self.words[rows], ids=self.ids[rows],
            tokens=None if self.tokens is None else self.tokens[rows], key_bytes=np.concatenate([self.key_bytes[:0], *keys]),
            key_starts=np.cumsum([0, *map(len, keys)], dtype=np.int64), columns=None,
        )  # fmt: skip

    def fingerprint(self) -> str:
        """A short name of exactly these samples, to notice that data has changed: "shape.content", of their captions' lengths and
        sizes in pixels, and of the hashes of captions and pictures, where all are known. See ``same_data``.

        Tokens and sources take part where there are any, since the plan follows them too.
        """
        if self.columns is not None:
            return str(self.facts["fingerprint"])
        found = hashlib.blake2b(digest_size=8)

        def add(column: np.ndarray, of: np.ndarray | None = None) -> None:
            for start in range(0, len(column), _ROWS_AT_ONCE):  # the whole may be a column of 0.3 billion rows, copied
                part = column[start : start + _ROWS_AT_ONCE]
                found.update(np.ascontiguousarray(part if of is None else of[part]).reshape(-1).data)

        for column in (self.ids, self.words, self.width, self.height):
            add(column)
        if self.tokens is not None:
            found.update(f"tokens {self.tokenizer}\n".encode())
            add(self.tokens)
        if len(self.sources) > 1:
            found.update("\n".join(["sources", *self.sources]).encode("utf-8", "surrogateescape"))
            add(self.shard, self.shard_source)
        shape, found = found.hexdigest(), hashlib.blake2b(digest_size=8)
        hashes = [self.table[name] for name in ("image_hash", "captions_hash")]
        for column in hashes:
            add(column)
        return f"{shape}.{found.hexdigest()}" if all(column.all() for column in hashes) else shape

    def state(self) -> str:
        """A short name of these samples where they lie: unlike the fingerprint another one when a shard is written anew."""
        if self.columns is not None:
            return str(self.facts["state"])
        content = (self.table.tobytes(), self.key_bytes.tobytes(), self.fingerprint().encode())
        return hashlib.blake2b(b"".join(content), digest_size=16).hexdigest()


def same_data(was: str | None, now: str) -> bool:
    """Whether two fingerprints may be those of the same data: one of before says nothing of contents."""
    return was is not None and all(one == other for one, other in zip(was.split("."), now.split("."), strict=False))


def read_sample(index: SampleIndex, row: int) -> RawSample:
    """Read one sample by its offsets. Raises OSError when the shard is gone or shorter than its index says."""
    return read_place(index.place(row))


def load_index(
    shards: Sequence[Path | RemotePath], allow_truncated: bool = False, key: str = "data.shards", index_dir: str | None = None
) -> SampleIndex:
    """Index all ``shards`` (as ``expand_shards`` lists them); builds and stores what is not there yet.

    Many new indexes are made by several processes; of those of one machine, the first makes them and the others wait. A remote shard must
    have its index already. What does not lie beside the shards is in ``index_dir`` (for remote ones their ``storage`` says it too), or in
    the user's cache; a large set's columns likewise. Raises UserError as ``index_shard`` does, when a remote shard has no index, and when
    the shards hold no sample at all; it names ``key``.
    """
    given = next((shard.storage.index_dir for shard in shards if isinstance(shard, RemotePath)), None) or index_dir
    folder = Path(given).expanduser() if given else None
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        # Threads wait for a store, far longer than they work.
        each: Each = pool.map if any(isinstance(shard, RemotePath) for shard in shards) else map
        settled = list(each(_settled, shards))
        places = _column_folders(settled, folder)
        stored = lru_cache(_KEPT_PARTS)(lambda shard: _load_stored(shard, folder))

        def state() -> str:
            return digest(*each(lambda shard: _state_of(shard, folder), settled))

        def mapped() -> SampleIndex | None:
            """The whole, where it is stored and neither shards nor their indexes have changed since."""
            found = map_columns(places, state()) if any(place.is_dir() for place in places) else None
            return None if found is None else _of_columns(settled, *found)

        def parts() -> Iterator[SampleIndex]:
            for shard, part in zip(settled, each(stored, settled), strict=True):
                yield index_shard(shard, True) if part is None else part

        def made() -> SampleIndex:
            """The whole of what is stored of each shard, once all of them are."""
            missing = [shard for shard, part in zip(settled, each(stored, settled), strict=True) if part is None]
            if lacking := [shard for shard in missing if isinstance(shard, RemotePath)]:
                raise UserError(
                    f"{len(lacking)} of the {len(settled)} remote shards have no index, or one of an earlier state, the first "
                    f"one {lacking[0]}: run `python scripts/index_shards.py shards=... output=DIR` and set data.index_dir=DIR, "
                    "or set data.streaming=true, which cannot resume exactly."
                )
            for one in build_indexes(missing):
                if isinstance(one, UserError):
                    raise one
            if missing:
                stored.cache_clear()
            return assemble(parts, key, places, state)

        whole = mapped()
        if whole is None:
            with locked(places[0].with_suffix(".making")) if len(settled) > _FEW else nullcontext():
                whole = mapped() or made()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # glibc has it.
        trim(0)  # The freed indexes of many shards would stay with this process, and with its workers.
    _refuse_truncated(whole, allow_truncated)
    if not len(whole):
        raise UserError(
            f"The {len(shards)} shards from {shards[0]} on hold no sample, but {whole.stray} other files: expected "
            f"key.json or key.txt beside an image key.{', key.'.join(IMAGE_EXTENSIONS)}."
        )
    return whole


def _state_of(shard: Path | RemotePath, folder: Path | None) -> str:
    """Names the state of a shard and of its stored index."""
    stamps = [shard.version if isinstance(shard, RemotePath) else ""]
    with suppress(OSError):
        stamps += map(str, _stamp(shard))
    for place in _candidates(shard, folder):
        with suppress(OSError):
            stat = place.stat()
            return " ".join((*stamps, str(stat.st_size), str(stat.st_mtime_ns)))
    return " ".join(stamps)


def join_indexes(indexes: Sequence[SampleIndex], names: Sequence[str]) -> SampleIndex:
    """One index of several sources, called ``names``: their shards one after the other, ``sources`` and ``shard_source``
    saying whose they are. Ids stay as they are, so that a sample is cropped alike on its own and among others."""
    if len(indexes) == 1:
        return replace(indexes[0], sources=list(names))
    source = np.repeat(np.arange(len(indexes), dtype=np.int16), [len(index.shards) for index in indexes])
    places = _column_folders([shard for index in indexes for shard in index.shards], None)
    places = [index.columns.with_name(places[0].name) for index in indexes if index.columns] + places
    more = {"sources": list(names), "shard_source": source}

    def state() -> str:
        return digest(*names, *(index.state() for index in indexes))

    return assemble(lambda: indexes, "data.sources", places, state, more)


def assemble(
    parts: Callable[[], Iterable[SampleIndex]], where: object, places: Sequence[Path] = (),
    state: Callable[[], str] = str, sources: dict[str, Any] | None = None,
) -> SampleIndex:  # fmt: skip
    """The samples of all ``parts``, which are gone through twice so that none need be held; many are mapped from one of
    ``places``, where there are any and one can be written, and are there in that ``state``."""
    shards: list[ShardPath] = []
    kinds: dict[str, None] = {}
    truncated, tokenizers, counts, dtype = [], set(), np.zeros(6, np.int64), ROW
    for part in parts():
        truncated += [len(shards) + part.shards.index(shard) for shard in part.truncated]
        shards += part.shards
        kinds |= dict.fromkeys(part.kinds)
        tokenizers.add(part.tokenizer)
        counts += (len(part), len(part.key_bytes), *(getattr(part, name) for name in COUNTS))
        dtype = part.table.dtype
    names, tokenizer = list(kinds), tokenizers.pop() if len(tokenizers) == 1 else None
    _check_kinds(names, where)
    rows, letters = int(counts[0]), int(counts[1])
    places = places if rows > _MAPPED_FROM else ()
    facts = {"kinds": names, "tokenizer": tokenizer, "truncated": truncated, "counts": counts[2:].tolist()}

    def fill(new: New) -> dict[str, Any]:
        once, by_kind = (rows,), (rows, len(names))
        shard, table, ids = new("shard", np.int32, once), new("table", dtype, once), new("ids", np.uint64, once)
        words = new("words", np.uint16, by_kind)
        tokens = new("tokens", np.uint16, by_kind) if tokenizer else None
        key_bytes, key_starts = new("key_bytes", np.uint8, (letters,)), new("key_starts", np.int64, (rows + 1,))
        row = letter = number = 0
        for part in parts():
            here, columns = slice(row, row + len(part)), [names.index(kind) for kind in part.kinds]
            shard[here], table[here], ids[here] = part.shard + np.int32(number), part.table, part.ids
            words[here, columns] = part.words
            if tokens is not None:
                tokens[here, columns] = part.tokens
            key_bytes[letter : letter + len(part.key_bytes)] = part.key_bytes
            key_starts[row : row + len(part) + 1] = part.key_starts + letter
            row, letter, number = here.stop, letter + len(part.key_bytes), number + len(part.shards)
        if not places:
            return facts
        arrays = {"shard": shard, "table": table, "ids": ids, "words": words, "tokens": tokens, "key_bytes": key_bytes}
        whole = _of_columns(shards, None, {**arrays, "key_starts": key_starts}, facts, sources)
        return {**facts, "fingerprint": whole.fingerprint()}

    return _of_columns(shards, *shared_columns(places, state() if places else "", fill), sources)


def _of_columns(
    shards: Sequence[ShardPath], folder: Path | None, columns: dict[str, Any], facts: dict[str, Any],
    sources: dict[str, Any] | None = None,
) -> SampleIndex:  # fmt: skip
    return SampleIndex(
        shards=list(shards), kinds=facts["kinds"], tokenizer=facts["tokenizer"], columns=folder, facts=facts,
        truncated=tuple(shards[number] for number in facts["truncated"]), **columns, **(sources or {}),
        **dict(zip(COUNTS, facts["counts"], strict=True)),
    )  # fmt: skip


def _column_folders(shards: Sequence[ShardPath], folder: Path | None) -> list[Path]:
    """Where the columns of ``shards`` may lie: in ``folder``, else beside the first shard, else in the user's cache."""
    name = f"{digest(*map(str, shards))}.columns"
    beside = [folder] if folder else [shard.parent for shard in shards[:1] if isinstance(shard, Path)]
    return [*(place.resolve() / name for place in beside), cached_index("", "").parent / name]


# Many indexes at once.

_counter: TokenCounter | None = None


def build_indexes(
    shards: Sequence[Path | RemotePath], counter: TokenCounter | None = None, folder: Path | None = None,
    processes: int | None = None,
) -> Iterator[SampleIndex | UserError]:  # fmt: skip
    """Yield the index of each shard, in order, made and stored in ``folder`` (None: beside the shards) by several ``processes`` (None: as
    many as there are cores, where there are many shards). What is stored already is taken as it is. Truncated shards are indexed as far
    as they go; for a shard that cannot be indexed comes the error that says why."""
    count = min(processes or cores(), len(shards))
    many = len(shards) > _FEW if processes is None else count > 1
    with tqdm(total=len(shards), desc="indexing shards", unit="shard", disable=None if many else True) as bar:
        if not many:
            for shard in shards:
                yield _index_one(shard, folder, counter)
                bar.update()
            return
        begin = multiprocessing.get_context(start_method())
        with ProcessPoolExecutor(count, begin, _begin, (counter, os.getpid())) as pool:
            try:
                for index in pool.map(_index_one, shards, [folder] * len(shards)):
                    yield index
                    bar.update()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


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


def _index_one(shard: Path | RemotePath, folder: Path | None, counter: TokenCounter | None = None) -> SampleIndex | UserError:
    try:
        return index_shard(shard, True, counter or _counter, folder)
    except UserError as error:
        return error


# One shard.


def index_shard(
    path: Path | RemotePath, allow_truncated: bool = False, counter: TokenCounter | None = None, folder: Path | None = None
) -> SampleIndex:  # fmt: skip
    """What lies where in a shard, stored as ``<stem>.index.npz`` in ``folder``, else beside it, or where that cannot be written in the
    user's cache; rebuilt when the shard's size or time differ, and where there is a ``counter`` of tokens when it has not that one's.
    Raises UserError when the shard cannot be read, or is cut short and ``allow_truncated`` is not set."""
    try:
        path = _settled(path)
        index = _load_stored(path, folder, counter)
        if index is None:
            stamp = _stamp(path)  # Taken first: a shard that changes meanwhile is indexed again next time.
            index = _build(path, counter)
            _store(path, index, stamp, folder)
    except OSError as error:
        advice = "correct data.shards or try again" if isinstance(error, RemoteError) else "check its permissions"
        raise UserError(f"The shard {path} cannot be read ({error}): {advice}.") from error
    return _refuse_truncated(index, allow_truncated)


def index_head(shards: Sequence[Path | RemotePath], samples: int = 256) -> SampleIndex:
    """An index of the first samples of the first shard, stored nowhere: what a run asks its plan for at the start (kinds,
    sizes and some captions) where the data is streamed. Raises UserError when the shard cannot be read or holds none."""
    try:
        index = _build(shards[0], None, samples)
    except OSError as error:
        raise UserError(f"The shard {shards[0]} cannot be read ({error}): correct data.shards or try again.") from error
    if not len(index):
        raise UserError(f"The shard {shards[0]} holds no sample: expected key.json or key.txt beside an image key.jpg.")
    return index


def _refuse_truncated(index: SampleIndex, allow_truncated: bool) -> SampleIndex:
    if index.truncated and not allow_truncated:
        number = index.shards.index(index.truncated[0])
        low, high = np.searchsorted(index.shard, [number, number + 1])
        raise UserError(
            f"The shard {index.truncated[0]} is cut short after {high - low} whole samples: fetch it again, "
            "or set data.allow_truncated=true to use the whole samples."
        )
    return index


def _settled(path: Path | RemotePath) -> Path | RemotePath:
    """``path`` with its size and version, asked of its store once. Raises UserError when a remote shard is not there."""
    try:
        return with_state(path) if isinstance(path, RemotePath) and not path.size else path
    except RemoteError as error:
        raise UserError(f"The shard {path} cannot be read: {error}.") from error


def _check_kinds(kinds: list[str], where: object) -> None:
    """Raise UserError when captions are keyed by something that is no kind, which would make ``words`` huge."""
    if len(kinds) > _MAX_KINDS:
        raise UserError(
            f"{where} has over {_MAX_KINDS} kinds of captions ({', '.join(kinds[:3])}, ...): "
            'expected "captions": {"short": text, "long": text} in each JSON.'
        )


def of_one_shard(path: ShardPath, table: np.ndarray, truncated: bool = False, **columns: Any) -> SampleIndex:
    """The index of one shard. A picture of a folder is named by its path alone, so that it may stand in another part."""
    of_shard = 0 if isinstance(path, FolderPart) else seed_from("shard", path.name)
    return SampleIndex(
        shards=[path], shard=np.zeros(len(table), np.int32), table=table, ids=table["key_hash"] ^ np.uint64(of_shard),
        truncated=(path,) if truncated else (), **columns,
    )  # fmt: skip


def _build(path: Path | RemotePath, counter: TokenCounter | None, at_most: int | None = None) -> SampleIndex:
    looks, captions, bad_json, odd_text = [], [], 0, 0
    readers: dict[str, Callable[[BinaryIO, Span], Any]] = {"image": look_at, "json": _pick, "text": _pick}
    with open_shard(path) as file:
        listing = list_tar(file, str(path), at_most)
        for entry in listing.entries:
            # In the order in which they lie, since a remote file is read ahead.
            parts = sorted(readers, key=lambda part: getattr(entry, part).offset)
            found: dict[str, Any] = {part: readers[part](file, getattr(entry, part)) for part in parts}
            meta_bytes, text = found["json"], found["text"]
            looks.append(found["image"])
            meta = parse_meta(meta_bytes) if meta_bytes else {}
            bad_json += meta is None
            odd_text += is_odd(meta_bytes, text)
            captions.append(captions_of(meta or {}, text))
    counts = {"without_image": listing.without_image, "stray": listing.stray, "bad_json": bad_json, "odd_text": odd_text}
    return tabulated(path, listing.entries, looks, captions, counter, listing.truncated, **counts)


def tabulated(
    path: ShardPath, entries: list[TarEntry], looks: list[tuple[int, int, int]], captions: list[dict[str, str]],
    counter: TokenCounter | None = None, truncated: bool = False, **counts: int,
) -> SampleIndex:  # fmt: skip
    """The index of one shard's samples, of which ``looks`` are (width, height, hash) and ``captions`` by kind."""
    table = np.zeros(len(entries), ROW)
    for row, entry, look, texts in zip(table, entries, looks, captions, strict=True):
        for name, span in (("image", entry.image), ("json", entry.json), ("text", entry.text)):
            row[f"{name}_offset"], row[f"{name}_size"] = span.offset, span.size
        row["extension"] = IMAGE_EXTENSIONS.index(entry.extension)
        row["key_hash"] = seed_from("folder", entry.key) if isinstance(path, FolderPart) else seed_from(entry.key)
        row["width"], row["height"], row["image_hash"] = look
        row["captions_hash"] = seed_from(repr(sorted(texts.items()))) | 1
    kinds, words, tokens = _count_captions(captions, counter, path)
    keys = [entry.key.encode("utf-8", "replace") for entry in entries]
    return of_one_shard(
        path, table, truncated, words=words, kinds=kinds, tokens=tokens, tokenizer=counter.name if counter else None,
        key_bytes=np.frombuffer(b"".join(keys), np.uint8), key_starts=np.cumsum([0, *map(len, keys)], dtype=np.int64), **counts,
    )  # fmt: skip


def _count_captions(
    captions: list[dict[str, str]], counter: TokenCounter | None, where: object
) -> tuple[list[str], np.ndarray, np.ndarray | None]:
    """The kinds, uint16 [n, K] words of each, and as many tokens where there is a ``counter``; 0 where there is none.

    Raises UserError, which names ``where``, for keys that are no kinds.
    """
    kinds = list(dict.fromkeys(kind for one in captions for kind in one))
    _check_kinds(kinds, where)
    words = np.zeros((len(captions), len(kinds)), np.uint16)
    tokens = np.zeros_like(words) if counter else None
    for column, kind in enumerate(kinds):
        rows = [number for number, one in enumerate(captions) if kind in one]
        texts = [captions[number][kind] for number in rows]
        words[rows, column] = np.minimum([*map(count_words, texts)], 65535)
        if counter is not None and tokens is not None:
            tokens[rows, column] = np.clip(counter.count(texts), 1, 65535)
    return kinds, words, tokens


def _pick(file: BinaryIO, span: Span) -> bytes:
    file.seek(span.offset)
    return file.read(span.size)


def look_at(file: BinaryIO, image: Span) -> tuple[int, int, int]:
    """(width, height, hash) of an image from its head and its last bytes, so that indexing does not read whole shards; the size
    from all of it where the head does not tell."""
    head = _pick(file, Span(image.offset, min(image.size, _HEAD_BYTES)))
    found = hashlib.blake2b(head, digest_size=8)
    size = probe_size(head)
    if image.size > _HEAD_BYTES:
        found.update(_pick(file, Span(image.offset + image.size - _TAIL_BYTES, _TAIL_BYTES)) + str(image.size).encode())
        size = probe_size(_pick(file, image)) if size == (0, 0) else size
    return *size, int.from_bytes(found.digest(), "little") | 1


# Stored indexes.


def _stamp(path: Path | RemotePath) -> np.ndarray:
    """What tells one state of a shard from another: version, size, time; of a remote one the time is not known."""
    if isinstance(path, RemotePath):
        return np.array([_VERSION, path.size, 0], np.int64)
    stat = path.stat()
    return np.array([_VERSION, stat.st_size, stat.st_mtime_ns], np.int64)


def _candidates(path: Path | RemotePath, folder: Path | None) -> list[Path]:
    """Local files where the index of a shard may lie: in ``folder``, beside the shard, else in the user's cache."""
    places = [folder / f"{path.stem}.index.npz"] if folder else []
    if isinstance(path, RemotePath):
        return [*places, cached_index(path, ".npz")]
    return [*places, path.with_suffix(".index.npz"), cached_index(path.resolve(), ".npz")]


def _store(path: Path | RemotePath, index: SampleIndex, stamp: np.ndarray, folder: Path | None) -> None:
    """Write the index where it can be written, and be content when that is nowhere: it is built again then."""
    version = np.array(path.version if isinstance(path, RemotePath) else "")
    arrays = {"stamp": stamp, "version": version, **arrays_of(index)}
    if not any(save_arrays(place, arrays) for place in _candidates(path, folder)[: 1 if folder else None]) and folder:
        raise UserError(f"The index of {path} cannot be written to {folder}: choose another folder.")


def arrays_of(index: SampleIndex) -> dict[str, Any]:
    """What is stored of the index of one shard; ``index_of`` reads it."""
    counts = np.array([*(getattr(index, name) for name in COUNTS), len(index.truncated)], np.int64)
    arrays = {
        "table": index.table, "words": index.words, "kinds": np.array(index.kinds, dtype=np.str_), "counts": counts,
        "key_bytes": index.key_bytes, "key_ends": index.key_starts[1:],
    }  # fmt: skip
    return arrays | ({} if index.tokens is None else {"tokens": index.tokens, "tokenizer": np.array(index.tokenizer)})


def index_of(shard: ShardPath, stored: Any) -> SampleIndex:
    """The index of one shard from stored arrays. Raises KeyError, ValueError for others."""
    counts = dict(zip([*COUNTS, "truncated"], stored["counts"].tolist(), strict=True))
    tokens = {"tokens": stored["tokens"], "tokenizer": str(stored["tokenizer"])} if "tokens" in stored else {}
    return of_one_shard(
        shard, stored["table"], bool(counts.pop("truncated")), words=stored["words"], key_bytes=stored["key_bytes"],
        kinds=[str(kind) for kind in stored["kinds"]], **counts, **tokens,
        key_starts=np.concatenate([[0], stored["key_ends"]]).astype(np.int64),
    )  # fmt: skip


def save_arrays(place: Path, arrays: dict[str, Any]) -> bool:
    """Write an .npz whole or not at all, since several processes may make one at a time; False when that cannot be."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(place, shared=True) as partial, open(partial, "xb") as file:
            np.savez(file, **arrays)
    except OSError:
        return False
    return True


def _load_stored(path: Path | RemotePath, folder: Path | None, counter: TokenCounter | None = None) -> SampleIndex | None:
    """The stored index of a shard; None where there is none, it is damaged or has no tokens of the ``counter``, or the shard has changed
    since. A remote shard's may lie beside it in its store; its size, and its version where both are known, must then be those of the
    index. Raises UserError when a remote shard is not there."""
    path = _settled(path)
    places: list[Path | RemotePath] = [*_candidates(path, folder)]
    if isinstance(path, RemotePath):
        places.append(path.sibling(f"{path.stem}.index.npz"))
    for place in places:
        try:
            index = _parse(path, io.BytesIO(read_whole(place)) if isinstance(place, RemotePath) else place)
        except OSError:
            continue
        if index is not None and (counter is None or index.tokenizer == counter.name):
            return index
    return None


def _parse(path: Path | RemotePath, place: Path | io.BytesIO) -> SampleIndex | None:
    """The index in an .npz; None where it is damaged or another state's. Raises OSError where there is none."""
    try:
        # NumPy reads an array's header as a Python literal, and Python 3.11's parser counts its depth for all threads
        # together: two at once now and then raise SystemError. The waiting for a store is over by now.
        with _PARSING, np.load(place, allow_pickle=False) as stored:
            stamp, now = stored["stamp"], _stamp(path)
            if isinstance(path, RemotePath):
                # Made beside a local copy it has that one's time; and not every server tells a size or a version.
                versions = {str(stored["version"]), path.version} - {""}
                same = np.array_equal(stamp[:2], now[:2]) and len(versions) < 2
            else:
                same = np.array_equal(stamp, now)
            return index_of(path, stored) if same else None
    except DAMAGED:
        return None
