"""What the worker processes of the loader do: read the samples of an order and make the pixels of one batch."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection

import numpy as np
import torch
from torch.utils.data import Dataset

from paradiffusion.data.cache import Cache, Stored, StoredBatch, collate
from paradiffusion.data.images import Bucket, decode, to_array
from paradiffusion.data.read_ahead import ReadAhead
from paradiffusion.data.shards import Place, RawSample, read_place


@dataclass
class Order:
    """What a worker is to read: the samples of one batch, and stand-ins.

    ``ahead`` is what the same worker is going to read next, where that is worth fetching beforehand.
    """

    step: int
    micro: int
    bucket: Bucket
    places: list[Place]
    kinds: list[str]
    slots: range
    dropped: list[bool]
    spares: list[tuple[Place, str]]
    ahead: Order | None = None


@dataclass
class Failure:
    """A sample that could not be read, and why."""

    shard: str
    key: str
    error: str

    def __str__(self) -> str:
        return f"{self.shard}/{self.key}: {self.error}"


@dataclass
class Delivery:
    """What a worker has read. Pixels stay uint8 [b, 3, H, W] on the way between processes; none where latents are cached."""

    pixels: torch.Tensor
    captions: list[str]
    kinds: list[str]
    keys: list[str]
    weights: list[float]
    failures: list[Failure]
    stored: StoredBatch | None = None

    def pin_memory(self) -> Delivery:
        """For the DataLoader: from pinned memory the pixels travel to a GPU while it computes."""
        self.pixels = self.pixels.pin_memory()
        self.stored = self.stored and self.stored.pin_memory()
        return self


@dataclass
class _Sample:
    pixels: np.ndarray  # uint8 [H, W, 3]
    caption: str
    kind: str
    key: str
    stored: Stored | None = None


class Reader(Dataset[tuple[Order, Delivery]]):
    """Reads one order at a time. Holds no index, so that workers stay small."""

    def __init__(self, max_pixels: int, cache: Cache | None = None) -> None:
        self.max_pixels = max_pixels
        self.cache = cache
        self._read_ahead = ReadAhead(self._fetch)

    def __getitem__(self, order: Order) -> tuple[Order, Delivery]:
        ahead, order.ahead = order.ahead, None
        then = (ahead.step, ahead.micro) if ahead else None
        raws = self._read_ahead.take((order.step, order.micro), order.places, then, ahead.places if ahead else [])
        read = [
            self._read(place, kind, order.bucket, raw)
            for place, kind, raw in zip(order.places, order.kinds, raws, strict=True)
        ]
        failures = [sample for sample in read if isinstance(sample, Failure)]
        good = [sample for sample in read if not isinstance(sample, Failure)]
        spares = iter(order.spares)
        while not good and (spare := next(spares, None)):
            sample = self._read(*spare, order.bucket, partial(self._fetch, spare[0]))
            good += [] if isinstance(sample, Failure) else [sample]
        if not good:
            return order, Delivery(torch.empty(0), [], [], [], [], failures)
        filled = []
        for slot, sample in enumerate(read):
            filled.append(good[slot % len(good)] if isinstance(sample, Failure) else sample)
        return order, Delivery(
            pixels=join_pixels([sample.pixels for sample in filled]),
            captions=[sample.caption for sample in filled],
            kinds=[sample.kind for sample in filled],
            keys=[sample.key for sample in filled],
            weights=[float(not isinstance(sample, Failure)) for sample in read],
            failures=failures,
            stored=None if self.cache is None else collate([sample.stored for sample in filled if sample.stored]),
        )

    def _fetch(self, place: Place) -> RawSample:
        return read_place(place if self.cache is None else self.cache.slim(place))

    def _read(self, place: Place, kind: str, bucket: Bucket, get: Callable[[], RawSample]) -> _Sample | Failure:
        try:
            raw = get()
            if self.cache is None or self.cache.latents is None:
                pixels = to_array(decode(raw.image, self.max_pixels, cover=bucket), bucket, place.id)
            else:
                pixels = np.zeros((0, 0, 3), np.uint8)
            caption = raw.meta["captions"].get(kind)
            if not caption:
                raise ValueError(f"no caption of kind {kind}: the shard has changed since it was indexed")
            stored = None if self.cache is None else self.cache.read(place, caption, bucket)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            return Failure(place.shard.name, place.key, reason)
        return _Sample(pixels, caption, kind, f"{place.shard.name}/{place.key}", stored)


def join_pixels(pictures: list[np.ndarray]) -> torch.Tensor:
    """uint8 [b, 3, H, W] of b pictures [H, W, 3], written once: to turn the whole batch around takes twice as long."""
    tall, wide, _ = pictures[0].shape
    joined = np.empty((len(pictures), 3, tall, wide), np.uint8)
    for place, picture in zip(joined, pictures, strict=True):
        place[:] = picture.transpose(2, 0, 1)
    return torch.from_numpy(joined)


def guard_worker(number: int, ended: Connection) -> None:
    """Let the parent decide when a worker ends, and end with it. ``ended`` has something to read once it decides so.

    Ctrl-C and a scheduler's SIGTERM reach the whole process group, but the parent still needs batches while it saves
    and leaves. When the parent is killed outright, a worker that is blocked in a full pipe would live on for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(), ended), daemon=True).start()


def _end_with(parent: int, ended: Connection) -> None:
    """Poll, and leave the word unread, since the other workers wait for it too."""
    while os.getppid() == parent:
        if ended.poll(1.0):
            # DataLoader's own way of ending is quicker and tidier, but it is lost where the garbage collector frees a
            # loader (its queues close before its __del__ runs), and its last means is the SIGTERM that is ignored here.
            time.sleep(1.0)
            break
    os._exit(0)
