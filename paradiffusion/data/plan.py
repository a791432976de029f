"""Which samples form which batch: pure integers, the same on any number of processes, found for any step directly.

An epoch permutes the shards by (seed, epoch) and walks over them in windows. Inside a window the samples are ordered
by a hash of (seed, epoch, sample id) and fall into their aspect buckets, so every bucket sees one endless *stream* of
rows: epoch after epoch, window after window. Batches are cut from the streams without a gap. What does not fill a batch
waits for the next window, and over the end of an epoch for the next epoch: nothing is dropped or repeated. Since every
epoch brings each bucket the same number of rows, the place of any batch in its stream follows from counts alone.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from paradiffusion.data.captions import choose_kinds
from paradiffusion.data.images import Bucket, assign_buckets
from paradiffusion.data.shards import SampleIndex
from paradiffusion.errors import UserError
from paradiffusion.randomness import permutation, uniforms

_KEPT_WINDOWS = 4
K = TypeVar("K")
V = TypeVar("V")


@dataclass(eq=False)
class GlobalBatch:
    """The samples of one optimiser step, over all processes.

    ``rows`` is int64 [B], rows of the index; ``kinds`` int8 [B], each row's caption kind as an index into
    ``index.kinds``; ``bucket`` the (height, width) in pixels they share. ``epoch`` is the one being walked through:
    rows that waited belong to an earlier one. Slot i of the batch is ``rows[i]``.
    """

    step: int
    epoch: int
    bucket: Bucket
    rows: np.ndarray
    kinds: np.ndarray


@dataclass(eq=False)
class _Epoch:
    """The counts of one epoch: what each window brings, and the batches cut in it."""

    windows: list[np.ndarray]  # the shards of each window
    arrived: np.ndarray  # int64 [W + 1, buckets], rows of the stream that have come before each window, all epochs told
    first_step: np.ndarray  # int64 [W + 1], the first step cut in each window


@dataclass(eq=False)
class _Window:
    """The batches cut in one window, in the order of their steps."""

    first_step: int
    rows: np.ndarray  # int64 [batches, B]
    kinds: np.ndarray  # int8 [batches, B]
    buckets: np.ndarray  # int64 [batches]


class BatchPlan:
    """Batches of ``batch_size`` rows of one bucket each, for every step from 0 on without end.

    ``window_shards`` shards are joined and shuffled together. ``caption_weights`` are the shares of the caption kinds.
    Samples without any caption are left out and counted in ``left_out``. Within a window, a bucket's rows are sorted by
    the length of their captions (in words) before they are cut, and the batches then shuffled: a batch has captions of
    similar length. Raises UserError when no sample can be used. Keeps 9 bytes a sample.
    """

    def __init__(
        self,
        index: SampleIndex,
        batch_size: int,
        seed: int,
        buckets: list[Bucket],
        caption_weights: dict[str, float],
        window_shards: int = 8,
    ) -> None:
        if batch_size < 1 or window_shards < 1:
            raise UserError(f"batch_size={batch_size} and window_shards={window_shards} must both be at least 1.")
        choose_kinds(index.words[:0], index.kinds, caption_weights, seed, 0, index.ids[:0])  # Refuses wrong weights.
        self.index = index
        self.batch_size = batch_size
        self.seed = seed
        self.buckets = list(buckets)
        self.caption_weights = dict(caption_weights)
        self.window_shards = window_shards
        usable = index.words.any(axis=1)
        self.left_out = int(len(index) - usable.sum())
        self.samples = len(index) - self.left_out
        if not self.samples:
            raise UserError(
                f"None of the {len(index)} samples in data.shards has a caption: expected "
                '"captions": {"short": text} or "caption": text in key.json, or a key.txt.'
            )
        bucket = np.where(usable, assign_buckets(index.width, index.height, self.buckets), len(self.buckets))
        self._by_bucket, self._starts = _group(index.shard, bucket, len(index.shards), len(self.buckets))
        self._counts = np.diff(self._starts, axis=1)  # int64 [shards, buckets]
        self._per_epoch = self._counts.sum(axis=0)  # int64 [buckets]
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], _Window] = OrderedDict()

    @property
    def steps_per_epoch(self) -> float:
        """The mean number of steps that an epoch takes; single epochs differ by what waits at their ends."""
        return self.samples / self.batch_size

    def bucket_sizes(self) -> dict[Bucket, int]:
        """How many samples each bucket has."""
        return {bucket: int(count) for bucket, count in zip(self.buckets, self._per_epoch, strict=True)}

    def rows_of(self, bucket: Bucket) -> np.ndarray:
        """All rows of a bucket, int64, in the order of the index."""
        number = self.buckets.index(bucket)
        return np.concatenate([self._by_bucket[slice(*spans[number : number + 2])] for spans in self._starts])

    def first_step(self, epoch: int) -> int:
        """The first step cut in ``epoch`` or later."""
        return int((epoch * self._per_epoch // self.batch_size).sum())

    def epoch_of(self, step: int) -> int:
        """The epoch in which the batch of ``step`` is cut."""
        # No fewer than step * B rows have come by then, and at most B - 1 rows wait in each bucket.
        most = ((step + 1) * self.batch_size + len(self.buckets) * self.batch_size) // self.samples + 1
        return bisect_right(range(most + 1), step, key=self.first_step) - 1

    def batch(self, step: int) -> GlobalBatch:
        """The batch of ``step``: a function of the index, the arguments of this plan and ``step`` alone."""
        if step < 0:
            raise ValueError(f"step {step} is negative")
        epoch = self.epoch_of(step)
        window = self._window(epoch, int(np.searchsorted(self._epoch(epoch).first_step, step, side="right")) - 1)
        place = step - window.first_step
        bucket = self.buckets[window.buckets[place]]
        return GlobalBatch(step, epoch, bucket, window.rows[place], window.kinds[place])

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            order = permutation(len(self._counts), "shards", self.seed, epoch)
            starts = range(0, len(order), self.window_shards)
            windows = [order[start : start + self.window_shards] for start in starts]
            per_window = np.stack([self._counts[shards].sum(axis=0) for shards in windows])
            arrived = np.concatenate([np.zeros_like(per_window[:1]), np.cumsum(per_window, axis=0)])
            arrived += epoch * self._per_epoch
            first_step = (arrived // self.batch_size).sum(axis=1)
            _remember(self._epochs, epoch, _Epoch(windows, arrived, first_step))
        return self._epochs[epoch]

    def _window(self, epoch: int, number: int) -> _Window:
        """Cut the batches of a window: for each bucket, what waited and what comes, as far as it fills batches."""
        if (epoch, number) in self._windows:
            return self._windows[epoch, number]
        counts, size = self._epoch(epoch), self.batch_size
        rows: list[np.ndarray] = []
        kinds: list[np.ndarray] = []
        buckets: list[np.ndarray] = []
        for bucket in range(len(self.buckets)):
            before, after = counts.arrived[number, bucket], counts.arrived[number + 1, bucket]
            full = int(after // size - before // size)
            if not full:
                continue
            # The last (after mod B) rows of the stream go on waiting.
            pool, pool_kinds = self._stream_before(epoch, number + 1, bucket, int(after - before // size * size))
            pool, pool_kinds = pool[: full * size], pool_kinds[: full * size]
            by_length = np.argsort(self.index.words[pool, pool_kinds], kind="stable")
            rows.append(pool[by_length].reshape(full, size))
            kinds.append(pool_kinds[by_length].reshape(full, size))
            buckets.append(np.full(full, bucket))
        order = permutation(sum(map(len, buckets)), "batches", self.seed, epoch, number)
        joined = (np.concatenate(parts)[order] for parts in (rows, kinds, buckets))
        _remember(self._windows, (epoch, number), _Window(int(counts.first_step[number]), *joined))
        return self._windows[epoch, number]

    def _stream_before(self, epoch: int, number: int, bucket: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The last ``count`` rows that have come to ``bucket`` before window ``number`` of ``epoch``, and their kinds.

        Walks backwards over as many windows as hold them, into earlier epochs where the bucket is small.
        """
        pieces: list[tuple[np.ndarray, np.ndarray]] = []
        while count > 0:
            arrived = self._epoch(epoch).arrived[:, bucket]
            # The last window before `number` that brought this bucket anything; 0 when there is none in this epoch.
            last = int(np.searchsorted(arrived, arrived[number]))
            if last == 0:
                epoch, number = epoch - 1, len(self._epoch(epoch - 1).windows)
                continue
            piece = self._arrivals(epoch, last - 1, bucket)
            pieces.append((piece[0][-count:], piece[1][-count:]))
            count -= len(pieces[-1][0])
            number = last - 1
        rows, kinds = zip(*reversed(pieces), strict=True)
        return np.concatenate(rows), np.concatenate(kinds)

    def _arrivals(self, epoch: int, number: int, bucket: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows that a window brings to a bucket, in the order of the stream, and their caption kinds."""
        shards = np.sort(self._epoch(epoch).windows[number])
        spans = [slice(*self._starts[shard, bucket : bucket + 2]) for shard in shards]
        rows = np.concatenate([self._by_bucket[span] for span in spans])
        ids = self.index.ids[rows]
        order = np.argsort(uniforms(ids, "order", self.seed, epoch), kind="stable")
        rows, ids = rows[order], ids[order]
        index = self.index
        return rows, choose_kinds(index.words[rows], index.kinds, self.caption_weights, self.seed, epoch, ids)


def _group(shard: np.ndarray, bucket: np.ndarray, shards: int, buckets: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows sorted by (shard, bucket), and where each bucket of each shard starts: int64 [shards, buckets + 1].

    Rows whose bucket is ``buckets`` are left out: they lie behind the last start of their shard.
    """
    rows = np.empty(len(shard), np.int64)
    starts = np.empty((shards, buckets + 1), np.int64)
    bounds = np.searchsorted(shard, np.arange(shards + 1))
    for number, (low, high) in enumerate(itertools.pairwise(bounds)):
        inside = bucket[low:high].astype(np.int16)
        order = np.argsort(inside, kind="stable")  # A radix sort, on 16-bit integers.
        rows[low:high] = low + order
        starts[number] = low + np.searchsorted(inside[order], np.arange(buckets + 1))
    return rows, starts


def _remember(kept: OrderedDict[K, V], key: K, value: V) -> None:
    kept[key] = value
    while len(kept) > _KEPT_WINDOWS:
        kept.popitem(last=False)
