"""Remote shards without an index, as a stream: WebDataset's resampled pipeline, and the same batches out of it.

What comes when depends on the network and on the number of workers, so such a run cannot be resumed exactly, and no two
runs are alike; epochs do not exist, since shards are drawn with replacement. An index (``scripts/index_shards.py``) is
better wherever it can be had.
"""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import webdataset as wds
from torch.utils.data import IterableDataset, get_worker_info

from paradiffusion.config import DataConfig
from paradiffusion.data.captions import choose_kinds, count_words, is_dropped
from paradiffusion.data.images import Bucket, assign_buckets, buckets_of, decode, probe_size, to_array
from paradiffusion.data.loader import Batch, Failure, Loader, LoaderSettings, Sample, make_batch, placed, slots_of
from paradiffusion.data.remote import RemotePath, open_shard, storage_of
from paradiffusion.data.shards import RawSample, expand_shards, read_through
from paradiffusion.errors import UserError
from paradiffusion.randomness import seed_from
from paradiffusion.text.scores import scores_of

NOT_RESUMABLE: Final = "data: STREAMING, not exactly resumable: shards are drawn with replacement, and a resumed run sees other samples"
# Encoded samples that are mixed before batches are made: more shards apart than a batch would hold otherwise.
_BUFFER: Final = 1000
_PIECE: Final = 1 << 23
# So many bad samples, or shards that cannot be opened, without one good one between them end the run.
_TOLD_AFTER, _IN_VAIN, _UNUSED = 64, 8, 10_000


class StreamLoader(Loader):
    """Batches of a stream, for as many steps as ``LoaderSettings`` say, so that all processes take the same number.

    Each has one bucket, but other processes may have another in the same step. Samples that cannot be read are left out
    and counted in ``report``; iterating raises UserError beyond ``max_bad_fraction``, and when nothing good comes at all.
    """

    def __init__(
        self, shards: Sequence[Path | RemotePath], batch_size: int, buckets: list[Bucket], caption_weights: dict[str, float],
        settings: LoaderSettings,
    ) -> None:  # fmt: skip
        if settings.cache is not None:
            raise UserError(
                "data.streaming=true cannot use a cache, since which sample comes is not known: index the shards with "
                "scripts/index_shards.py, or leave the cache out."
            )
        self._prepare(settings, batch_size)
        self._made = _Batches(shards, buckets, caption_weights, settings, self._size)

    def _start(self) -> Iterator[Batch]:
        return _in_steps(self._serve(self._made, None), self.settings, self._size)

    def _judge(self, batch: Batch) -> None:
        self.report.read += len(batch.failures)  # Beside the batch, not in its slots.
        super()._judge(batch)


def _in_steps(batches: Iterator[Batch], settings: LoaderSettings, size: int) -> Iterator[Batch]:
    """Give what comes a step and slots. Knows no loader: the thread that draws on this would keep it alive for ever."""
    step = settings.first_step
    while settings.last_step is None or step < settings.last_step:
        for micro in range(settings.accumulation):
            slots = slots_of(settings.rank, settings.world_size, size, micro)
            dropped = [is_dropped(settings.seed, step, slot, settings.caption_dropout) for slot in slots]
            yield placed(next(batches), step, micro, slots, dropped, settings.tokenize)
        step += 1


@dataclass(eq=False)
class _Batches(IterableDataset[Batch]):
    """What one worker makes of its own stream. It ends, with the failures, where nothing good comes any more."""

    shards: Sequence[Path | RemotePath]
    buckets: list[Bucket]
    caption_weights: dict[str, float]
    settings: LoaderSettings
    size: int

    def __iter__(self) -> Iterator[Batch]:
        waiting: list[list[Sample]] = [[] for _ in self.buckets]
        failures: list[Failure] = []
        good = unused = 0
        mixed = wds.shuffle(_BUFFER, initial=_BUFFER // 10, seed=self.settings.seed)
        for shard, epoch, raw in mixed(self._read(failures)):
            number, sample = self._make(raw, shard, epoch, failures)
            unused = unused + 1 if sample is None else 0
            if sample is not None:
                waiting[number].append(sample)
                good += 1
            if len(waiting[number]) == self.size or (not good and len(failures) >= _TOLD_AFTER):
                full = waiting[number] if len(waiting[number]) == self.size else []
                yield make_batch(full, [True] * len(full), list(failures))
                waiting[number], failures[:], good = [], [], 0
            if unused >= _UNUSED:
                failures.append(Failure("the shards", "", f"{unused:,} in a row are no picture with a caption"))
                break
        yield make_batch([], [], failures)

    def _read(self, failures: list[Failure]) -> Iterator[tuple[str, int, RawSample]]:
        """Samples with the name of their shard and their epoch, until shard after shard cannot be opened."""
        settings, info = self.settings, get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        number, readers = settings.rank * workers + worker, settings.world_size * workers
        shards = {str(shard): shard for shard in self.shards}
        seed = seed_from("stream", settings.seed, settings.first_step)
        visits, in_vain = Counter[str](), 0
        for source in wds.ResampledShards(list(shards), seed=seed, worker_seed=lambda: number, deterministic=True):
            shard = shards[source["url"]]
            # Shards come again and again: the number of times stands for the epoch.
            visits[source["url"]] += 1
            epoch = visits[source["url"]] * readers + number
            try:
                with open_shard(shard, _PIECE) as file:
                    for raw in read_through(file):
                        yield shard.name, epoch, raw
                        in_vain = 0
            except (OSError, tarfile.TarError) as error:
                is_tar = isinstance(error, tarfile.TarError)
                reason = "the shard is cut short, or no tar" if is_tar else getattr(error, "strerror", None) or str(error)
                failures.append(Failure(shard.name, "", reason))
                in_vain += 1
                if in_vain >= _IN_VAIN:
                    return

    def _make(self, raw: RawSample, shard: str, epoch: int, failures: list[Failure]) -> tuple[int, Sample | None]:
        """A sample with its bucket's number; None for what is no picture with a caption, or a failure."""
        captions = raw.meta["captions"]
        if not raw.image or not captions:
            return 0, None
        kinds = list(dict.fromkeys([*captions, *self.caption_weights]))
        words = np.array([[count_words(captions.get(kind, "")) for kind in kinds]])
        ids = np.array([seed_from(raw.key) ^ seed_from("shard", shard)], np.uint64)
        kind = kinds[int(choose_kinds(words, kinds, self.caption_weights, self.settings.seed, epoch, ids)[0])]
        try:
            width, height = probe_size(raw.image)
            number = int(assign_buckets(np.array([width]), np.array([height]), self.buckets)[0])
            bucket = self.buckets[number]
            pixels = to_array(decode(raw.image, cover=bucket), bucket, int(ids[0]))
        except ValueError as error:
            failures.append(Failure(shard, raw.key, str(error)))
            return 0, None
        return number, Sample(pixels, captions[kind], kind, f"{shard}/{raw.key}", scores=scores_of(raw.meta))


def open_stream(data: DataConfig, batch_size: int, settings: LoaderSettings) -> StreamLoader:
    """The stream of ``data.shards``, in batches as configured. Raises UserError for shards that make no sense."""
    shards = expand_shards(data.shards, "data.shards", storage_of(data))
    return StreamLoader(shards, batch_size, buckets_of(data), dict(data.captions), settings)
