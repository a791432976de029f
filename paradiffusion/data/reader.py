"""What the worker processes of the loader do: read the samples of an order and make the pixels of one batch."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from paradiffusion.data.images import Bucket, decode, to_array
from paradiffusion.data.shards import Place, read_place


@dataclass
class Order:
    """What a worker is to read: the samples of one batch, and stand-ins."""

    step: int
    micro: int
    bucket: Bucket
    places: list[Place]
    kinds: list[str]
    slots: range
    dropped: list[bool]
    spares: list[tuple[Place, str]]


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
    """What a worker has read. Pixels stay uint8 [b, 3, H, W] on the way between processes."""

    pixels: torch.Tensor
    captions: list[str]
    kinds: list[str]
    keys: list[str]
    weights: list[float]
    failures: list[Failure]


@dataclass
class _Sample:
    pixels: np.ndarray  # uint8 [H, W, 3]
    caption: str
    kind: str
    key: str


class Reader(Dataset[tuple[Order, Delivery]]):
    """Reads one order at a time. Holds no index, so that workers stay small."""

    def __init__(self, max_pixels: int) -> None:
        self.max_pixels = max_pixels

    def __getitem__(self, order: Order) -> tuple[Order, Delivery]:
        read = [self._read(place, kind, order.bucket) for place, kind in zip(order.places, order.kinds, strict=True)]
        failures = [sample for sample in read if isinstance(sample, Failure)]
        good = [sample for sample in read if not isinstance(sample, Failure)]
        spares = iter(order.spares)
        while not good and (spare := next(spares, None)):
            sample = self._read(*spare, order.bucket)
            good += [] if isinstance(sample, Failure) else [sample]
        if not good:
            return order, Delivery(torch.empty(0), [], [], [], [], failures)
        filled = []
        for slot, sample in enumerate(read):
            filled.append(good[slot % len(good)] if isinstance(sample, Failure) else sample)
        pixels = torch.from_numpy(np.stack([sample.pixels for sample in filled])).permute(0, 3, 1, 2).contiguous()
        return order, Delivery(
            pixels=pixels,
            captions=[sample.caption for sample in filled],
            kinds=[sample.kind for sample in filled],
            keys=[sample.key for sample in filled],
            weights=[float(not isinstance(sample, Failure)) for sample in read],
            failures=failures,
        )

    def _read(self, place: Place, kind: str, bucket: Bucket) -> _Sample | Failure:
        try:
            raw = read_place(place)
            pixels = to_array(decode(raw.image, self.max_pixels), bucket, place.id)
            caption = raw.meta["captions"].get(kind)
            if not caption:
                raise ValueError(f"no caption of kind {kind}: the shard has changed since it was indexed")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            return Failure(place.shard.name, place.key, reason)
        return _Sample(pixels, caption, kind, f"{place.shard.name}/{place.key}")


def as_it_is(delivery: Any) -> Any:
    """For the DataLoader, which would otherwise look for tensors inside."""
    return delivery


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
