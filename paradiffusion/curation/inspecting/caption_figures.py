"""Figures of a data set's captions: tokens, repetitions, first words, and padding in planned batches.

They are read by place, as many at most as were asked for, and none is kept but those that repeat another one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import islice
from typing import Final

import numpy as np
from tqdm import tqdm

from paradiffusion.config import ConditioningConfig
from paradiffusion.curation.inspecting.histograms import Distribution, distribution
from paradiffusion.data.index import SampleIndex, TokenCounter
from paradiffusion.data.plan import BatchPlan
from paradiffusion.data.remote import RemotePath
from paradiffusion.data.shards import Span, read_place

CUTS = (77, 256, 512)  # where CLIP, the paper's stage 1 and its stages 2 and 3 end a text
OPENING_WORDS: Final = 4  # our choice: two say little ("the image"), and six hardly repeat
_LISTED: Final = 8
_AT_ONCE: Final = 1024
_CONNECTIONS: Final = 32


@dataclass(frozen=True)
class TokenFigures:
    """Tokens of one kind's captions by one tokenizer, start and end marks included; ``cut`` is the share of captions that
    have more than so many tokens. ``n`` captions were read."""

    tokenizer: str
    kind: str
    n: int
    per_word: float
    tokens: Distribution
    cut: dict[int, float]


@dataclass(frozen=True)
class OpeningFigures:
    """How the captions of one kind begin: of the ``n`` that have more than ``OPENING_WORDS`` words, the most frequent first
    words in lower case, each with its share; only such as come twice."""

    kind: str
    n: int
    most: list[tuple[str, float]]


@dataclass(frozen=True)
class CaptionSample:
    """The captions that were read: of ``rows``; ``tokens[name]`` is int64 [rows, kinds], 0 where there is none.
    ``repeats`` of the ``captions`` are another one again, ``repeated`` those that come most often."""

    rows: np.ndarray
    tokens: dict[str, np.ndarray]
    repeated: list[tuple[str, int]]
    repeats: int
    captions: int
    openings: list[OpeningFigures]
    unreadable: int


def read_texts(index: SampleIndex, rows: np.ndarray) -> Iterator[dict[str, str] | None]:
    """The captions of each of ``rows``, in their order, by kind; None for a sample that cannot be read. No image of a shard
    is read. From a store, many are asked for at once: each waits for far longer than it works."""
    if not any(isinstance(shard, RemotePath) for shard in index.shards):
        yield from (_texts_at(index, int(row)) for row in rows)
        return
    pool = ThreadPoolExecutor(_CONNECTIONS, "captions")
    try:
        for start in range(0, len(rows), _AT_ONCE):
            yield from pool.map(lambda row: _texts_at(index, int(row)), rows[start : start + _AT_ONCE])
    finally:
        pool.shutdown(cancel_futures=True)


def _texts_at(index: SampleIndex, row: int) -> dict[str, str] | None:
    try:
        captions: dict[str, str] = read_place(replace(index.place(row), image=Span(0, 0))).meta["captions"]
    except OSError:
        return None
    return captions


def read_captions(index: SampleIndex, counters: list[TokenCounter], limit: int, seed: int) -> CaptionSample:
    """Read the captions of ``limit`` samples at most (a seeded draw where there are more), count their tokens, and look for
    those that are equal or begin alike."""
    rows = np.arange(len(index))
    if len(rows) > limit:
        rows = np.sort(np.random.default_rng(seed).choice(len(index), limit, replace=False))
    tokens = {counter.name: np.zeros((len(rows), len(index.kinds)), np.int64) for counter in counters}
    openings: dict[str, Counter[str]] = {kind: Counter() for kind in index.kinds}
    times: Counter[bytes] = Counter()  # of a text, by its digest: the texts themselves might fill the memory
    again: dict[bytes, str] = {}
    unreadable = 0
    bar = tqdm(read_texts(index, rows), "captions", len(rows), unit="sample", mininterval=1, dynamic_ncols=True)
    for start in range(0, len(rows), _AT_ONCE):
        block = list(islice(bar, _AT_ONCE))
        for column, kind in enumerate(index.kinds):
            texts = {start + number: found[kind] for number, found in enumerate(block) if found and kind in found}
            for counter in counters if texts else ():
                tokens[counter.name][list(texts), column] = counter.count(list(texts.values()))
            words = (text[:200].lower().split(maxsplit=OPENING_WORDS) for text in texts.values())
            openings[kind].update(" ".join(first[:OPENING_WORDS]) for first in words if len(first) > OPENING_WORDS)
        for found in block:
            unreadable += found is None
            for text in set((found or {}).values()):  # a sample whose kinds have the same text repeats nothing
                digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
                times[digest] += 1
                if times[digest] > 1:
                    again[digest] = text
    repeated = sorted(((text, times[digest]) for digest, text in again.items()), key=lambda pair: (-pair[1], pair[0]))
    figures = [
        OpeningFigures(kind, counts.total(), [(words, n / counts.total()) for words, n in counts.most_common(_LISTED) if n > 1])
        for kind, counts in openings.items()
    ]
    return CaptionSample(rows, tokens, repeated[:12], times.total() - len(times), times.total(), figures, unreadable)


def tokens_of(index: SampleIndex, read: CaptionSample) -> list[TokenFigures]:
    """Tokens by tokenizer and kind, of the captions that were read."""
    figures = []
    for name, table in read.tokens.items():
        for number, kind in enumerate(index.kinds):
            counts = table[:, number]
            words = index.words[read.rows, number][counts > 0].sum(dtype=np.int64)
            counts = counts[counts > 0]
            if (found := distribution(counts)) is not None:
                cut = {length: float((counts > length).mean()) for length in CUTS}
                figures.append(TokenFigures(name, kind, len(counts), float(counts.sum() / max(words, 1)), found, cut))
    return figures


def most_tokens(read: CaptionSample, count: int) -> list[int]:
    """The rows of the ``count`` longest captions by the first tokenizer, of those that were read, the longest first. Words
    do not tell them: a text of a language without spaces is one word."""
    if not read.tokens:
        return []
    longest = next(iter(read.tokens.values())).max(axis=1, initial=0)
    order = np.argsort(-longest, kind="stable")[:count]
    return [int(read.rows[at]) for at in order if longest[at]]


# Captions that are tokenised for it at most; where an epoch has more, batches all over it are taken.
MOST_CAPTIONS = 8192


@dataclass(frozen=True)
class PaddingFigures:
    """Padded tokens as a share of all tokens that are computed, over ``batches`` batches of ``batch_size`` captions: padded to the
    longest of each planned batch, or of batches of the same captions in random order; the same ``_rounded`` as training does to keep
    the number of shapes small; and every caption padded to the limit. ``trained`` is which of these the configured stage has."""

    tokenizer: str
    batches: int
    of_batches: int
    batch_size: int
    limit: int
    multiple: int
    planned: float
    unsorted: float
    planned_rounded: float
    unsorted_rounded: float
    to_limit: float
    trained: float
    kinds: dict[str, float]
    sources: dict[str, float]
    cut: float


def measure_padding(plan: BatchPlan, counter: TokenCounter, padded: ConditioningConfig, seed: int) -> PaddingFigures:
    """Tokenise the captions of planned batches, evenly from the first epoch, and count the padding that ``padded`` makes."""
    index, size, limit, multiple = plan.index, plan.batch_size, padded.max_tokens, padded.pad_multiple
    # At least one batch, also of a set that is smaller than that.
    epoch = max(1, int(plan.steps_per_epoch))
    steps = np.unique(np.linspace(0, epoch - 1, min(epoch, max(1, MOST_CAPTIONS // size))).astype(np.int64))
    lengths = np.zeros((len(steps), size), np.int64)
    kinds: Counter[str] = Counter()
    origins = np.zeros(len(index.sources), np.int64)
    for number, step in enumerate(tqdm(steps, desc="batches", unit="batch", mininterval=1, dynamic_ncols=True)):
        batch = plan.batch(int(step))
        origins += np.bincount(plan.source_of(batch.rows), minlength=len(origins))
        names = [index.kinds[kind] for kind in batch.kinds]
        kinds.update(names)
        found = zip(read_texts(index, batch.rows), names, strict=True)
        lengths[number] = counter.count([(captions or {}).get(name, "") for captions, name in found])
    cut = np.minimum(lengths, limit)
    shuffled = np.random.default_rng(seed).permutation(cut.reshape(-1)).reshape(cut.shape)
    planned, unsorted = (_padded(table, 1, limit) for table in (cut, shuffled))
    planned_rounded, unsorted_rounded = (_padded(table, multiple, limit) for table in (cut, shuffled))
    to_limit = 1 - float(cut.sum() / (cut.size * limit))
    return PaddingFigures(
        counter.name, len(steps), epoch, size, limit, multiple, planned, unsorted, planned_rounded, unsorted_rounded, to_limit,
        trained=planned_rounded if padded.mask_padding else to_limit,
        kinds={kind: count / kinds.total() for kind, count in kinds.most_common()},
        sources={name: float(n / origins.sum()) for name, n in zip(index.sources, origins, strict=True)},
        cut=float((lengths > limit).mean()),
    )  # fmt: skip


def _padded(lengths: np.ndarray, multiple: int, limit: int) -> float:
    """The share of padding in batches of captions with ``lengths`` [batches, B], each padded to its longest."""
    longest = np.minimum(-(-np.maximum(lengths.max(axis=1), 1) // multiple) * multiple, limit)
    return float(1 - lengths.sum() / (longest.sum() * lengths.shape[1]))
