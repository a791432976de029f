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
from typing import Any, Final

import numpy as np
import webdataset as wds
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.tariterators import group_by_keys, tar_file_expander

from paradiffusion.config import DataConfig
from paradiffusion.data.captions import captions_of, choose_kinds, count_words, is_dropped, parse_meta
from paradiffusion.data.images import Bucket, assign_buckets, buckets_of, decode, probe_size, to_array
from paradiffusion.data.loader import Delivery, Failure, Loader, LoaderSettings, Order, Sample, deliver, slots_of
from paradiffusion.data.remote import RemoteError, RemotePath, explain, open_shard, storage_of
from paradiffusion.data.shards import IMAGE_EXTENSIONS, PARTS, expand_shards, split_member
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
        self._batches = _Batches(shards, buckets, caption_weights, settings, self._size)

    def _start(self) -> Iterator[tuple[Order, Delivery]]:
        return _in_steps(self._serve(self._batches, None), self.settings, self._size)

    def _judge(self, delivery: Delivery) -> None:
        self.report.read += len(delivery.failures)  # Beside the batch, not in its slots.
        super()._judge(delivery)


def _in_steps(deliveries: Iterator[tuple[Bucket, Delivery]], settings: LoaderSettings, size: int) -> Iterator[tuple[Order, Delivery]]:
    """Give what comes a step and slots. Knows no loader: the thread that draws on this would keep it alive for ever."""
    step = settings.first_step
    while settings.last_step is None or step < settings.last_step:
        for micro in range(settings.accumulation):
            bucket, delivery = next(deliveries)
            slots = slots_of(settings.rank, settings.world_size, size, micro)
            dropped = [is_dropped(settings.seed, step, slot, settings.caption_dropout) for slot in slots]
            yield Order(step, micro, bucket, [], delivery.kinds, slots, dropped, []), delivery
        step += 1


class _NothingGood(Exception):
    """Shard after shard cannot be opened, or holds nothing that can be used."""


@dataclass(eq=False)
class _Batches(IterableDataset[tuple[Bucket, Delivery]]):
    """What one worker makes of its own stream."""

    shards: Sequence[Path | RemotePath]
    buckets: list[Bucket]
    caption_weights: dict[str, float]
    settings: LoaderSettings
    size: int

    def __iter__(self) -> Iterator[tuple[Bucket, Delivery]]:
        failures: list[Failure] = []
        try:
            yield from self._batches(failures)
        except _NothingGood:
            yield self.buckets[0], deliver([], [], failures)

    def _batches(self, failures: list[Failure]) -> Iterator[tuple[Bucket, Delivery]]:
        waiting: list[list[Sample]] = [[] for _ in self.buckets]
        good = 0
        for number, sample in self._samples(failures):
            if sample is not None:
                waiting[number].append(sample)
                good += 1
            if len(waiting[number]) == self.size or (not good and len(failures) >= _TOLD_AFTER):
                full = waiting[number] if len(waiting[number]) == self.size else []
                yield self.buckets[number], deliver(full, [1.0] * len(full), list(failures))
                waiting[number], failures[:], good = [], [], 0

    def _samples(self, failures: list[Failure]) -> Iterator[tuple[int, Sample | None]]:
        """Samples without end, each with its bucket's number; None where there is only a failure to tell."""
        settings, info = self.settings, get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        number, readers = settings.rank * workers + worker, settings.world_size * workers
        shards = {str(shard): shard for shard in self.shards}
        visits: Counter[str] = Counter()

        def opened() -> Iterator[dict[str, Any]]:
            in_vain = 0
            seed = seed_from("stream", settings.seed, settings.first_step)
            for source in wds.ResampledShards(list(shards), seed=seed, worker_seed=lambda: number, deterministic=True):
                url = source["url"]
                visits[url] += 1
                try:
                    with open_shard(shards[url], _PIECE) as stream:
                        yield {"url": url, "stream": stream}
                    in_vain = 0
                except OSError as error:
                    failures.append(_failure(shards[url].name, error))
                    in_vain += 1
                    if in_vain >= _IN_VAIN:
                        raise _NothingGood from error

        def note(error: Exception) -> bool:
            url = next((part for part in reversed(error.args) if isinstance(part, str) and part in shards), None)
            failures.append(_failure(shards[url].name if url else "a shard", error))
            return True

        members = tar_file_expander(opened(), handler=note, select_files=_is_wanted)
        grouped, unused = group_by_keys(members, keys=_Keys(), handler=note), 0
        for sample in wds.shuffle(_BUFFER, initial=_BUFFER // 10, seed=settings.seed)(iter(grouped)):
            url = sample["__url__"]
            # Shards come again and again: the number of times stands for the epoch.
            epoch = visits[url] * readers + number
            bucket, made = self._make(sample, shards[url].name, epoch, failures)
            unused = 0 if made is not None else unused + 1
            if unused >= _UNUSED:
                failures.append(Failure("the shards", "", f"{unused:,} in a row are no picture with a caption"))
                raise _NothingGood
            yield bucket, made

    def _make(self, sample: dict[str, Any], shard: str, epoch: int, failures: list[Failure]) -> tuple[int, Sample | None]:
        key = str(sample["__key__"])
        extension = next((extension for extension in IMAGE_EXTENSIONS if extension in sample), None)
        meta = parse_meta(sample["json"]) if "json" in sample else {}
        texts = (sample.get(extension) for extension, part in PARTS.items() if part == "text")
        captions = captions_of(meta or {}, next(filter(None, texts), b""))
        if extension is None or not captions:
            return 0, None
        kinds = list(dict.fromkeys([*captions, *self.caption_weights]))
        words = np.array([[count_words(captions.get(kind, "")) for kind in kinds]])
        ids = np.array([seed_from(key) ^ seed_from("shard", shard)], np.uint64)
        kind = kinds[int(choose_kinds(words, kinds, self.caption_weights, self.settings.seed, epoch, ids)[0])]
        try:
            width, height = probe_size(sample[extension])
            number = int(assign_buckets(np.array([width]), np.array([height]), self.buckets)[0])
            bucket = self.buckets[number]
            pixels = to_array(decode(sample[extension], cover=bucket), bucket, int(ids[0]))
        except ValueError as error:
            failures.append(Failure(shard, key, str(error)))
            return 0, None
        return number, Sample(pixels, captions[kind], kind, f"{shard}/{key}", scores=scores_of(meta or {}))


def _failure(shard: str, error: BaseException) -> Failure:
    """The same words for the same cause: WebDataset's messages carry addresses in memory."""
    if isinstance(error, tarfile.TarError | EOFError):
        return Failure(shard, "", "the shard is cut short, or no tar")
    if isinstance(error, RemoteError):
        return Failure(shard, "", str(error))
    if isinstance(error, OSError):
        return Failure(shard, "", error.strerror or explain(error)[1])
    return Failure(shard, "", f"a name comes twice or is no sample's ({type(error).__name__})")


class _Keys:
    """Key and extension of each member in turn. WebDataset takes what lies side by side under one key as a sample, so cat.seg.png
    between cat.jpg and cat.txt stays a part of cat."""

    def __init__(self) -> None:
        self.last, self.names = "", dict[str, str]()

    def __call__(self, name: str) -> tuple[str, str]:
        folder, slash, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        key, ending = split_member(name)
        if self.last == folder + slash + stem != key:
            return self.last, extension.lower()
        if self.last != key:
            self.last, self.names = key, {}
        # Of two texts (cat.jpg.txt, cat.txt) the first is the sample's, as in an index; under one suffix WebDataset refuses both.
        return key, ending if self.names.setdefault(ending, base) == base else f"second.{ending}"


def _is_wanted(name: str) -> bool:
    return split_member(name)[1] in PARTS


def open_stream(data: DataConfig, batch_size: int, settings: LoaderSettings) -> StreamLoader:
    """The stream of ``data.shards``, in batches as configured. Raises UserError for shards that make no sense."""
    shards = expand_shards(data.shards, "data.shards", storage_of(data))
    return StreamLoader(shards, batch_size, buckets_of(data), dict(data.captions), settings)
