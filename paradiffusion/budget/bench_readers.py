"""One way of reading a data set, in a process of its own: ours, plain WebDataset, or MosaicML Streaming.

Started by bench_loader.py as ``python -m paradiffusion.budget.bench_readers NAME SETTINGS``. It imports nothing of ours but the
decoding until it knows who it is: Streaming wants other versions of our libraries, and lives in an environment of its own.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from paradiffusion.data.images import decode, to_array

PREFETCHED = 4  # batches that a worker may have made before its time is taken
SHUFFLE = 1000  # samples in WebDataset's buffer, as its documentation has it


Keys = list[str]


class Settings(SimpleNamespace):
    """What is read and how: the keys of bench_loader.py's ``LoaderBench``, and ``shards``, a folder of tars; ``work``, seconds of sleep
    after each batch, as if a GPU worked; and ``seed``, of our order: the others draw theirs."""

    @property
    def tars(self) -> list[str]:
        return sorted(str(path) for path in Path(self.shards).glob("*.tar"))

    def pixels(self, image: bytes, key: str) -> Any:
        """The decoding that all ways share: uint8 [H, W, 3]."""
        bucket = (self.resolution, self.resolution)
        return to_array(decode(image, cover=bucket), bucket, int(key))

    def caption(self, sample: dict[str, Any]) -> str:
        text: str = json.loads(sample["json"])["captions"]["long"]
        return text

    def read(self, sample: dict[str, Any]) -> tuple[Any, str, str]:
        """A WebDataset sample to (pixels, caption, key)."""
        key = sample["__key__"]
        return self.pixels(sample["jpg"], key), self.caption(sample), key


def stack(samples: list[tuple[Any, str, str]]) -> tuple[Any, list[str], Keys]:
    """Samples (pixels, caption, key) to a batch: uint8 [B, 3, H, W], captions, keys."""
    import numpy as np
    import torch

    images, captions, keys = zip(*samples, strict=True)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return pixels, list(captions), list(keys)


def ours(settings: Settings, threads: int | None = None, whole: bool = False) -> Iterator[Keys]:
    """The plan of batches and its loader, as training uses them; with another number of ``threads``, or ``whole`` shards fetched
    to a disk here first, from one end to the other."""
    from paradiffusion.data import loader as loading
    from paradiffusion.data.index import load_index
    from paradiffusion.data.loader import LoaderSettings, make_loader
    from paradiffusion.data.plan import BatchPlan
    from paradiffusion.data.remote import Storage
    from paradiffusion.data.shards import expand_shards

    loading._THREADS = threads or loading._THREADS  # type: ignore[misc]
    shards, cache = settings.shards, tempfile.mkdtemp(dir=settings.shards) if whole else None
    if settings.delay_ms:
        load_index(expand_shards(shards))  # Makes the indexes, which a store's shards must have.
        shards = far_away(shards, settings.delay_ms / 1000)
    storage = Storage(cache_dir=cache, cache_bytes=1 << 40, index_dir=settings.shards)
    index = load_index(expand_shards(shards, storage=storage))
    bucket = (settings.resolution, settings.resolution)
    plan = BatchPlan(index, settings.batch_size, settings.seed, [bucket], {"long": 1.0}, window_shards=16)
    loader = make_loader(index, plan, LoaderSettings(workers=settings.workers))
    for batch in loader:
        yield [key.partition("/")[2] for key in batch.keys]


def far_away(folder: str, seconds: float) -> str:
    """The URL of ``folder`` in a store whose every answer takes so long."""
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    class FarAway(LocalFileSystem):  # type: ignore[misc]
        protocol = "faraway"

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return path.removeprefix("faraway://")

        def cat_file(self, path: str, start: int | None = None, end: int | None = None, **rest: Any) -> Any:
            time.sleep(seconds)
            return super().cat_file(path, start, end, **rest)

    fsspec.register_implementation("faraway", FarAway)
    return f"faraway://{folder}"


def webdataset(settings: Settings) -> Iterator[Keys]:
    """WebDataset's own pipeline: shards in random order, a shuffle buffer, batches made in the workers."""
    import webdataset as wds

    pipeline = (
        wds.WebDataset(settings.tars, resampled=True, shardshuffle=False)
        .shuffle(SHUFFLE)
        .map(settings.read)
        .batched(settings.batch_size, collation_fn=stack, partial=False)
    )
    for _, _, keys in wds.WebLoader(pipeline, batch_size=None, num_workers=settings.workers):
        yield keys


def streaming(settings: Settings) -> Iterator[Keys]:
    """MosaicML Streaming over the same samples as MDS shards, in PyTorch's own loader."""
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    class Samples(StreamingDataset):
        def __getitem__(self, at: Any) -> tuple[Any, str, str]:
            sample = super().__getitem__(at)
            return settings.pixels(sample["jpg"], sample["key"]), sample["caption"], sample["key"]

    samples = Samples(local=as_mds(settings), shuffle=True, batch_size=settings.batch_size)
    loader: Any = DataLoader(
        samples, batch_size=settings.batch_size, num_workers=settings.workers, collate_fn=stack, drop_last=True,
        persistent_workers=settings.workers > 0,
    )  # fmt: skip
    while True:
        for _, _, keys in loader:
            yield keys


def as_mds(settings: Settings) -> str:
    """The folder of the samples as Streaming's own shards, which are made beside the tars once."""
    import webdataset as wds
    from streaming import MDSWriter

    folder = Path(settings.shards, "mds")
    if not folder.is_dir():
        with MDSWriter(out=str(folder), columns={"jpg": "bytes", "caption": "str", "key": "str"}) as writer:
            for sample in wds.WebDataset(settings.tars, shardshuffle=False):
                writer.write({"jpg": sample["jpg"], "caption": settings.caption(sample), "key": sample["__key__"]})
    return str(folder)


READERS: dict[str, Callable[[Settings], Iterator[Keys]]] = {
    "ours": ours, "webdataset": webdataset, "streaming": streaming, "one at a time": partial(ours, threads=1),
    "whole shards": partial(ours, whole=True),
}  # fmt: skip
PACKAGES = {"webdataset": "webdataset", "streaming": "mosaicml-streaming"}


def main(name: str, given: str) -> None:
    """Pass over the batches that were read ahead while the workers came up, then take as many as asked for, and print how long
    the whole took, how long the waiting, the keys, and the version of who read them."""
    settings = Settings(**json.loads(given))
    batches = READERS[name](settings)
    for _ in range(1 + PREFETCHED * settings.workers):
        next(batches)
    time.sleep(settings.work)  # of the step before, in which the first batch is made
    # Without workers all is done by this process, whose own time says what a core does, however busy the machine is.
    clock = time.perf_counter if settings.workers else time.process_time
    keys, waited, began = [], 0.0, clock()
    for _ in range(settings.batches):
        asked = clock()
        keys.append(next(batches))
        waited += clock() - asked
        time.sleep(settings.work)
    answer = {"seconds": clock() - began, "waited": waited, "keys": keys}
    found = version(PACKAGES[name]) if name in PACKAGES else "this repository"
    print(json.dumps({**answer, "version": found}), flush=True)
    os._exit(0)  # some loaders would wait for their workers


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
