"""The one table of samples: of shards, local or remote, of a folder, or of several sources together."""

from __future__ import annotations

import ctypes
import hashlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np
from tqdm import tqdm

from paradiffusion.data.places import Place, ShardPath
from paradiffusion.data.shard_index import (
    ShardIndex,
    TokenCounter,
    check_kinds,
    index_shard,
    load_stored,
    refuse_truncated,
)
from paradiffusion.data.storage import RemotePath
from paradiffusion.data.tars import IMAGE_EXTENSIONS, Span
from paradiffusion.errors import UserError
from paradiffusion.machine import cores
from paradiffusion.randomness import seed_from

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
