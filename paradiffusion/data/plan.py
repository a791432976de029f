"""Batch plan: which samples form which batch. Pure integers, the same on any number of processes, found for any step directly.

An epoch permutes a source's shards by (seed, epoch) and walks over them in windows. Inside a window the samples are
ordered by a hash of (seed, epoch, sample id), so each source is one endless *stream* of samples: epoch after epoch,
window after window. Several sources are mixed by weight, window by window. Samples fall into their aspect buckets, so
every bucket sees an endless stream too, and batches are cut from those without a gap. What does not fill a batch waits for
the next window, and over the end of an epoch for the next epoch: nothing is dropped or repeated. The place of any batch in
its stream follows from counts alone.
"""

from __future__ import annotations

import itertools
import math
import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np

from paradiffusion.config import DataConfig
from paradiffusion.data.captions import KindShares, check_weights, draw_kinds, drawable_kinds, expected_shares, settle_kinds
from paradiffusion.data.columns import shared_columns
from paradiffusion.data.folder import load_folder
from paradiffusion.data.images import Bucket, assign_buckets, buckets_of, fitted
from paradiffusion.data.index import New, SampleIndex, index_head, join_indexes, load_index
from paradiffusion.data.remote import storage_of
from paradiffusion.data.shards import expand_shards
from paradiffusion.errors import UserError
from paradiffusion.randomness import Part, permutation, seed_from, uniforms

# Batches are asked for twice: ahead of time by who reads, and in time by who trains.
_KEPT_WINDOWS, _KEPT_BATCHES, _KEPT_COUNTS = 4, 64, 4096
_KEPT_EPOCHS, _KEPT_ORDERS, _KEPT_ARRIVALS = 16, 8, 128
_ROWS_AT_ONCE: Final = 1 << 20
# Of which a person is told: of a picture's area, of its sides, and of all pictures (as scripts/inspect_data.py does).
_MUCH_CROPPED, _MUCH_ENLARGED, _MUCH_ON_AVERAGE = 0.5, 2.0, 0.1
# A row of the index, the caption kind that it is read with, and the kind that was drawn for it.
_SAMPLE: Final = np.dtype([("row", np.int64), ("kind", np.int8), ("drawn", np.int8)])


def open_index(data: DataConfig) -> SampleIndex:
    """The index of all samples that are trained on. Raises UserError for what is missing or cannot be read."""
    if not data.sources:
        return open_shards(data, data.shards, "data.shards")
    indexes = []
    for number, source in enumerate(data.sources):
        key = f"data.sources[{number}]"
        if source.folder is not None:
            typed = "data.folder" if data.folder is not None else f"{key}.folder"  # the short form of one source
            indexes.append(load_folder(source.folder, typed))
        else:
            indexes.append(open_shards(data, source.shards, f"{key}.shards"))
    return join_indexes(indexes, [source.title for source in data.sources])


def open_shards(data: DataConfig, spec: Any, key: str) -> SampleIndex:
    """The index of the shards that ``spec`` names (the value of ``key``), or of a folder of pictures that are held out."""
    if not spec:
        raise UserError(f"{key} is not set; name WebDataset shards, such as {key}='shards/{{00000..00099}}.tar'.")
    folder = Path(spec).expanduser() if key == "data.val_shards" and isinstance(spec, str) else None
    if folder is not None and folder.is_dir() and not any(folder.glob("*.tar")):
        return load_folder(folder, key)
    shards = expand_shards(spec, key, storage_of(data))
    if data.streaming and key == "data.shards":
        return index_head(shards)
    return load_index(shards, data.allow_truncated, key, data.index_dir)


def make_plan(index: SampleIndex, data: DataConfig, batch_size: int, seed: int) -> BatchPlan:
    """The plan of batches of ``index`` (see ``open_index``) as configured. Raises UserError as BatchPlan does."""
    shares = [Share(source.weight, dict(source.captions) or None) for source in data.sources] or None
    return BatchPlan(index, batch_size, seed, buckets_of(data), dict(data.captions), data.window_shards, shares)


def describe_plan(plan: BatchPlan) -> str:
    """What a person may want to know before hours are spent, a line each: the sources with their shares, where there are several;
    the caption kinds, where there are several or samples lack the one that is asked for; what is cropped and enlarged, where
    that is much."""
    lines = []
    names, total = plan.index.sources, sum(share.weight for share in plan.shares)
    if len(names) > 1:
        parts = []
        for number, (name, stream, share) in enumerate(zip(names, plan.streams, plan.shares, strict=True)):
            steps = plan.steps_of(number)
            once = f"once in {steps:.{0 if steps >= 10 else 2}f} steps"
            parts.append(f"{name} {share.weight / total:.1%} ({stream.size} samples, {once})")
        lines.append("sources: " + ", ".join(parts))
    for name, shares in plan.expected_kinds().items():
        if len(shares.read) > 1 or any(shares.fell_back.values()):
            read = ", ".join(f"{kind} {share:.1%}" for kind, share in shares.read.items())
            lacking = [f"{share:.1%} lack {kind}" for kind, share in shares.fell_back.items() if share]
            of = f" of {name}" if len(names) > 1 else ""
            lines.append(f"captions{of}: {read}" + (f" ({', '.join(lacking)}, and another is read)" if lacking else ""))
    if fit := _describe_fit(plan):
        lines.append(fit)
    return "".join(f"\n  {line}" for line in lines)


def _describe_fit(plan: BatchPlan) -> str:
    """What the buckets cost the pictures, of a million of them at most; empty where that is little."""
    index = plan.index
    rows = np.arange(0, len(index), max(1, len(index) // _ROWS_AT_ONCE))
    rows = rows[(index.width[rows] > 0) & (index.height[rows] > 0) & index.words[rows].any(axis=1)]
    if not len(rows):
        return ""
    width, height = index.width[rows], index.height[rows]
    tall, wide = np.array(plan.buckets)[assign_buckets(width, height, plan.buckets)].T
    cropped, scale = fitted(width, height, tall, wide)
    most, largest, enlarged = int(cropped.argmax()), int(scale.argmax()), (scale > 1).mean()
    if cropped[most] <= _MUCH_CROPPED and scale[largest] <= _MUCH_ENLARGED and max(cropped.mean(), enlarged) <= _MUCH_ON_AVERAGE:
        return ""
    return (
        f"crops: up to {cropped[most]:.0%} of a picture's area is cut away ({index.key(rows[most])}), {cropped.mean():.1%} on average; "
        f"up to {scale[largest]:.1f} times enlarged ({index.key(rows[largest])}), {enlarged:.1%} of the pictures at all "
        "(scripts/inspect_data.py shows them)"
    )


@dataclass(frozen=True)
class Share:
    """What is drawn from one source: its share of the samples (a weight against the other sources') and, where it has
    weights of caption kinds of its own, those."""

    weight: float = 1.0
    captions: dict[str, float] | None = None


@dataclass(eq=False)
class GlobalBatch:
    """The samples of one optimiser step, over all processes.

    ``rows`` is int64 [B], rows of the index; ``kinds`` int8 [B], each row's caption kind as an index into
    ``index.kinds``; ``drawn`` int8 [B], the kind that was drawn for it, as an index into ``plan.drawable``, another where
    the sample lacks that one. ``bucket`` is the (height, width) in pixels they share. ``epochs`` are those that each
    source is being walked through as the batch's window begins: rows that waited belong to an earlier one. Slot i of the
    batch is ``rows[i]``.
    """

    step: int
    bucket: Bucket
    rows: np.ndarray
    kinds: np.ndarray
    drawn: np.ndarray
    epochs: tuple[int, ...]

    @property
    def epoch(self) -> int:
        """How many times every source has been walked through."""
        return min(self.epochs)


@dataclass(eq=False)
class _Window:
    """The batches cut in one window, in the order of their steps: ``samples`` _SAMPLE [batches, B], ``buckets`` [batches]."""

    first_step: int
    epochs: tuple[int, ...]
    samples: np.ndarray
    buckets: np.ndarray


class BatchPlan:
    """Batches of ``batch_size`` rows of one bucket each, for every step from 0 on without end.

    ``window_shards`` shards are joined and shuffled together. ``caption_weights`` are the shares of the caption kinds.
    ``shares`` has one entry for each of ``index.sources`` (None: each weighs the same); epochs are counted per source, and
    a batch may hold samples of all. Samples without any caption are left out and counted in ``left_out``. Within a window,
    a bucket's rows are sorted by the length of their captions before they are cut, and the batches then shuffled: a batch
    has captions of similar length. Raises UserError when a source has no sample that can be used, and for wrong weights.
    Keeps 4 bytes a sample, of a mapped index in a file that all processes share.
    """

    def __init__(
        self, index: SampleIndex, batch_size: int, seed: int, buckets: list[Bucket], caption_weights: dict[str, float],
        window_shards: int = 8, shares: Sequence[Share] | None = None,
    ) -> None:  # fmt: skip
        self.shares = list(shares) if shares is not None else [Share() for _ in index.sources]
        self.captions = [dict(share.captions or caption_weights) for share in self.shares]  # of each source
        for weights in (caption_weights, *self.captions):
            check_weights(index.kinds, weights)
        self.index, self.batch_size, self.seed = index, batch_size, seed
        self.buckets = list(buckets)
        self.drawable = drawable_kinds(index.kinds)
        self._grouped = _group_usable(index, self.buckets)
        several = len(index.sources) > 1
        self.streams = []
        for number, name in enumerate(index.sources):
            shards = np.flatnonzero(index.shard_source == number)
            salt = (name,) if several else ()  # What one source brings is what it brought before there could be several.
            stream = SourceStream(index, self._grouped, shards, self.captions[number], seed, window_shards, salt)
            self.streams.append(stream)
            if not stream.size:
                where = f"the source {name}" if several else "data.shards"
                raise UserError(
                    f"None of the {int(np.isin(index.shard, shards).sum())} samples in {where} has a caption: expected "
                    '"captions": {"short": text} or "caption": text in key.json, or a key.txt.'
                )
        self.samples = sum(stream.size for stream in self.streams)
        self.left_out = len(index) - self.samples
        weights_of = [share.weight for share in self.shares]
        mixed = MixedWindows(self.streams, weights_of, batch_size) if several else None
        self.schedule: SourceStream | MixedWindows = mixed or self.streams[0]
        self._lock = threading.Lock()  # The loader plans in a thread of its own.
        self._arrived = lru_cache(_KEPT_COUNTS)(self._count_arrived)
        self._window = lru_cache(_KEPT_WINDOWS)(self._cut)
        self._batch = lru_cache(_KEPT_BATCHES)(self._take_batch)

    @property
    def steps_per_epoch(self) -> float:
        """The mean number of steps until every source has been walked through; single epochs differ by what waits."""
        return max(self.steps_of(number) for number in range(len(self.streams)))

    def steps_of(self, source: int) -> float:
        """The mean number of steps until a source has been walked through."""
        total, weight = sum(share.weight for share in self.shares), self.shares[source].weight
        return self.streams[source].size * total / weight / self.batch_size

    def bucket_sizes(self) -> dict[Bucket, int]:
        """How many samples each bucket has, over all sources."""
        counts = sum(stream.per_bucket for stream in self.streams)
        return {bucket: int(count) for bucket, count in zip(self.buckets, counts, strict=True)}

    def rows_of(self, bucket: Bucket) -> np.ndarray:
        """All rows of a bucket, int64, in the order of the index."""
        return self._grouped.take(np.arange(len(self._grouped.starts)), self.buckets.index(bucket))

    def source_of(self, rows: np.ndarray) -> np.ndarray:
        """The source of each row, as an index into ``index.sources``: int16 with the shape of ``rows``."""
        return self.index.shard_source[self.index.shard[rows]]

    def expected_kinds(self) -> dict[str, KindShares]:
        """What the caption weights come to, by source, of some millions of its samples at most."""
        found = {}
        for number, name in enumerate(self.index.sources):
            shards = self.streams[number].shards  # of one source they stand together
            low, high = np.searchsorted(self.index.shard, [shards[0], shards[-1] + 1])
            words = self.index.words[low : high : max(1, (high - low) // _ROWS_AT_ONCE)]
            found[name] = expected_shares(words, self.index.kinds, self.captions[number])
        return found

    def first_step(self, epoch: int) -> int:
        """The first step cut after every source has been walked through ``epoch`` times."""
        return self._first_step(self.schedule.first_window(epoch))

    def batch(self, step: int) -> GlobalBatch:
        """The batch of ``step``: a function of the index, the arguments of this plan and ``step`` alone."""
        if step < 0:
            raise ValueError(f"step {step} is negative")
        with self._lock:
            return self._batch(step)

    def choices(self, step: int, slots: np.ndarray) -> Counter[tuple[str, str, str]]:
        """The samples in ``slots`` (int [n]) of a step, counted by source, drawn caption kind, and the kind read."""
        batch = self.batch(step)
        columns = (self.source_of(batch.rows[slots]).tolist(), batch.drawn[slots].tolist(), batch.kinds[slots].tolist())
        sources, drawable, kinds = self.index.sources, self.drawable, self.index.kinds
        return Counter((sources[s], drawable[d], kinds[k]) for s, d, k in zip(*columns, strict=True))

    def _take_batch(self, step: int) -> GlobalBatch:
        # At least step * B rows have come by the end of the batch's window, and at most B - 1 wait in each bucket.
        low, high = self.schedule.window_range(step * self.batch_size, (step + 1 + len(self.buckets)) * self.batch_size)
        window = self._window(low + bisect_right(range(low, high + 1), step, key=self._first_step) - 1)
        place = step - window.first_step
        at = window.samples[place]
        bucket = self.buckets[window.buckets[place]]
        # Copies: a view would keep the whole window in memory.
        return GlobalBatch(step, bucket, at["row"].copy(), at["kind"].copy(), at["drawn"].copy(), window.epochs)

    def _count_arrived(self, window: int) -> np.ndarray:
        """Rows that have come before ``window``: int64 [sources, buckets]."""
        positions = self.schedule.positions(window)
        return np.stack([s.count_before(position) for s, position in zip(self.streams, positions, strict=True)])

    def _first_step(self, window: int) -> int:
        """The first step cut in ``window`` or later."""
        return int((self._arrived(window).sum(axis=0) // self.batch_size).sum())

    def _cut(self, number: int) -> _Window:
        """Cut the batches of a window: for each bucket, what waited and what comes, as far as it fills batches."""
        size = self.batch_size
        before, after = (self._arrived(window).sum(axis=0) // size for window in (number, number + 1))
        parts = [np.empty(0, _SAMPLE)]
        for bucket in np.flatnonzero(after > before).tolist():
            pool = self._pool(number, bucket, int(before[bucket]) * size, int(after[bucket]) * size)
            parts.append(pool[np.argsort(self.index.lengths[pool["row"], pool["kind"]], kind="stable")])
        buckets = np.repeat(np.arange(len(before)), after - before)
        order = permutation(len(buckets), "batches", self.seed, *self.schedule.label(number))
        samples = np.concatenate(parts).reshape(-1, size)[order]
        positions = self.schedule.positions(number)
        epochs = tuple(position // stream.size for position, stream in zip(positions, self.streams, strict=True))
        return _Window(int(before.sum()), epochs, samples, buckets[order])

    def _pool(self, number: int, bucket: int, low: int, high: int) -> np.ndarray:
        """The rows that come to ``bucket`` as number ``low`` to ``high`` (exclusive), ``high`` by the end of window
        ``number``. Inside a window the sources take turns in even measure, so that those that wait are of all."""
        if len(self.streams) == 1:
            return self.streams[0].take(bucket, low, high)

        def arrived(window: int) -> int:
            return int(self._arrived(window)[:, bucket].sum())

        back = 1
        while arrived(max(number - back, 0)) > low:
            back *= 2
        earliest = max(number - back, 0)
        first = earliest + bisect_right(range(earliest, number + 1), low, key=arrived) - 1
        borders = np.stack([self._arrived(window)[:, bucket] for window in range(first, number + 2)])
        taken, turns = [], []
        for stream, marks in zip(self.streams, borders.T, strict=True):
            taken.append(stream.take(bucket, int(marks[0]), int(marks[-1])))
            brought = np.diff(marks)
            windows = np.repeat(np.arange(len(brought)), brought)
            place = np.arange(marks[0], marks[-1]) - marks[:-1][windows]
            turns.append(windows + (place + 0.5) / brought[windows])
        order = np.argsort(np.concatenate(turns), kind="stable")
        start = int(borders[0].sum())
        return np.concatenate(taken)[order[low - start : high - start]]


class MixedWindows:
    """Windows of about ``size`` samples, of several sources by their ``weights``: each takes the next samples of each
    stream, as many as its weight says, rounded cumulatively, so that over any number of windows a source is less than one
    sample off its share. Methods as of ``SourceStream``, which has windows of its own.

    ``size`` is the most by which no source gives more than one of its own windows at once. That is never more than its
    epoch, so a mixed window holds a sample twice only where an epoch of its source ends inside. But it is ``least`` (a
    batch) at the least: of a source that is smaller than its share of a batch every batch holds samples twice anyway, and
    finding what waits in a rare bucket would mean to look back over very many windows.
    """

    def __init__(self, streams: Sequence[SourceStream], weights: Sequence[float], least: int) -> None:
        # As they were typed: 0.7 and 0.3 are 7 and 3 tenths, not the nearest binary fractions.
        exact = [Fraction(repr(float(weight))) for weight in weights]
        scale = math.lcm(*(weight.denominator for weight in exact))
        self.parts = [int(weight * scale) for weight in exact]
        self.streams, self.whole = streams, sum(self.parts)
        own = [max(1, stream.size // stream.windows) for stream in streams]
        self.size = max(least, min(most * self.whole // part for most, part in zip(own, self.parts, strict=True)))

    def positions(self, window: int) -> list[int]:
        return [window * self.size * part // self.whole for part in self.parts]

    def window_range(self, low: int, high: int) -> tuple[int, int]:
        return low // self.size, -(-(high + len(self.parts)) // self.size)

    def first_window(self, epoch: int) -> int:
        sizes = zip(self.streams, self.parts, strict=True)
        return max(-(-epoch * stream.size * self.whole // (self.size * part)) for stream, part in sizes)

    def label(self, window: int) -> tuple[Part, ...]:
        return "mixed", window


@dataclass(eq=False)
class Grouped:
    """The usable rows of an index, sorted by (shard, bucket).

    ``rows`` is uint32 [N] (int64 above four billion); ``starts`` int64 [shards, buckets + 1], where each bucket of each
    shard starts in it. Both may be mapped.
    """

    rows: np.ndarray
    starts: np.ndarray

    def take(self, shards: np.ndarray, bucket: int) -> np.ndarray:
        """The rows of a bucket in ``shards``, int64."""
        spans = self.starts[shards, bucket : bucket + 2]
        return np.concatenate([self.rows[low:high] for low, high in spans]).astype(np.int64)


def _group_usable(index: SampleIndex, buckets: list[Bucket]) -> Grouped:
    """The rows that have a caption, by shard and bucket; of a mapped index kept in a folder of its own beside its columns."""

    def fill(new: New) -> dict[str, Any]:
        rows = new("rows", np.uint32 if len(index) < 1 << 32 else np.int64, (len(index),))
        starts = new("starts", np.int64, (len(index.shards), len(buckets) + 1))
        bounds = np.searchsorted(index.shard, np.arange(len(index.shards) + 1))
        for number, (low, high) in enumerate(itertools.pairwise(bounds)):
            nearest = assign_buckets(index.width[low:high], index.height[low:high], buckets)
            inside = np.where(index.words[low:high].any(axis=1), nearest, len(buckets)).astype(np.int16)
            order = np.argsort(inside, kind="stable")  # A radix sort, on 16-bit integers.
            rows[low:high] = low + order
            starts[number] = low + np.searchsorted(inside[order], np.arange(len(buckets) + 1))
        return {}

    name = seed_from("buckets", *(side for bucket in buckets for side in bucket))
    places = [] if index.columns is None else [index.columns / f"buckets-{name:016x}"]
    _, columns, _ = shared_columns(places, index.state() if places else "", fill)
    return Grouped(columns["rows"], columns["starts"])


@dataclass(eq=False)
class _Epoch:
    """What each of the W windows of one epoch brings."""

    shards: list[np.ndarray]  # ascending
    counts: np.ndarray  # int64 [W + 1, buckets], rows that have come before each window
    totals: np.ndarray  # int64 [W + 1], the same over all buckets


class SourceStream:
    """One source, endless: ``shards`` (numbers, ascending) of ``index``, ``window_shards`` of them shuffled together.

    An epoch permutes the shards by (seed, epoch, salt); a window's samples are ordered by a hash of (seed, epoch, id).
    Positions count from 0 on over all epochs. Every epoch brings each bucket the same number of rows, so how many rows of a
    bucket come before a position follows from counts, and from the order inside the one window that the position cuts.
    """

    def __init__(
        self, index: SampleIndex, grouped: Grouped, shards: np.ndarray, captions: dict[str, float], seed: int,
        window_shards: int, salt: tuple[Part, ...],
    ) -> None:  # fmt: skip
        self.index, self.grouped, self.shards, self.captions = index, grouped, shards, captions
        self.seed, self.window_shards, self.salt = seed, window_shards, salt
        self._counts = np.diff(grouped.starts[shards], axis=1)  # int64 [shards, buckets]
        self.per_bucket = self._counts.sum(axis=0)  # int64 [buckets], rows that an epoch brings
        self.size = int(self.per_bucket.sum())
        self.windows = -(-len(shards) // window_shards)  # of an epoch
        self._epoch = lru_cache(_KEPT_EPOCHS)(self._plan_epoch)
        self._order = lru_cache(_KEPT_ORDERS)(self._sort_buckets)
        self._arrivals = lru_cache(_KEPT_ARRIVALS)(self._sort_arrivals)

    def positions(self, window: int) -> list[int]:
        """The position of each source's stream where ``window`` begins; windows are counted over all epochs."""
        epoch, number = divmod(window, self.windows)
        return [epoch * self.size + int(self._epoch(epoch).totals[number])]

    def window_range(self, low: int, high: int) -> tuple[int, int]:
        """A window by whose start at most ``low`` samples have come, and one by whose start at least ``high`` have."""
        return low // self.size * self.windows, -(-high // self.size) * self.windows

    def first_window(self, epoch: int) -> int:
        """The first window by whose start every source has been walked through ``epoch`` times."""
        return epoch * self.windows

    def label(self, window: int) -> tuple[Part, ...]:
        """What names the window where randomness is drawn for it."""
        return divmod(window, self.windows)

    def count_before(self, position: int) -> np.ndarray:
        """Rows of each bucket that come before ``position``: int64 [buckets], over all epochs."""
        epoch, inside = divmod(position, self.size)
        if not inside:
            return epoch * self.per_bucket
        counts = self._epoch(epoch)
        window = int(np.searchsorted(counts.totals, inside, side="right")) - 1
        arrived = epoch * self.per_bucket + counts.counts[window]
        if rest := inside - int(counts.totals[window]):
            arrived += np.bincount(self._order(epoch, window)[:rest], minlength=len(arrived))
        return arrived

    def take(self, bucket: int, low: int, high: int) -> np.ndarray:
        """The rows that come to ``bucket`` as number ``low`` to ``high`` (exclusive) over all epochs, in their order: _SAMPLE."""
        parts = [np.empty(0, _SAMPLE)]
        while low < high:
            epoch, inside = divmod(low, int(self.per_bucket[bucket]))
            arrived = self._epoch(epoch).counts[:, bucket]
            window = int(np.searchsorted(arrived, inside, side="right")) - 1
            start = inside - int(arrived[window])
            parts.append(self._arrivals(epoch, window, bucket)[start : start + high - low])
            low += len(parts[-1])
        return np.concatenate(parts)

    def _plan_epoch(self, epoch: int) -> _Epoch:
        order = permutation(len(self.shards), "shards", self.seed, epoch, *self.salt)
        starts = np.arange(0, len(order), self.window_shards)
        per_window = np.add.reduceat(self._counts[order], starts, axis=0)
        counts = np.concatenate([np.zeros_like(per_window[:1]), np.cumsum(per_window, axis=0)])
        windows = [np.sort(self.shards[order[start : start + self.window_shards]]) for start in starts]
        return _Epoch(windows, counts, counts.sum(axis=1))

    def _sort_buckets(self, epoch: int, window: int) -> np.ndarray:
        """The bucket of each sample that a window brings, in the order of the stream: int16 [n]."""
        starts = self.grouped.starts[self._epoch(epoch).shards[window]]
        rows = np.concatenate([self.grouped.rows[low:high] for low, high in starts[:, [0, -1]]])
        numbers = np.tile(np.arange(starts.shape[1] - 1, dtype=np.int16), len(starts))
        buckets = np.repeat(numbers, np.diff(starts, axis=1).ravel())
        return buckets[np.argsort(uniforms(self.index.ids[rows], "order", self.seed, epoch), kind="stable")]

    def _sort_arrivals(self, epoch: int, window: int, bucket: int) -> np.ndarray:
        """The rows that a window brings to a bucket, in the order of the stream, and their caption kinds: _SAMPLE [n]."""
        rows = self.grouped.take(self._epoch(epoch).shards[window], bucket)
        ids = self.index.ids[rows]
        order = np.argsort(uniforms(ids, "order", self.seed, epoch), kind="stable")
        samples = np.empty(len(rows), _SAMPLE)
        samples["row"] = rows[order]
        samples["drawn"] = draw_kinds(self.index.kinds, self.captions, self.seed, epoch, ids[order])
        words = self.index.words[samples["row"]]
        samples["kind"] = settle_kinds(words, self.index.kinds, self.captions, samples["drawn"])
        return samples
