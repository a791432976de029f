"""One way of reading a data set, in a process of its own: ours, plain WebDataset, or MosaicML Streaming.

Started by bench_loader.py as ``python -m paradiffusion.budget.bench_readers NAME SETTINGS``. It imports nothing of ours but the
decoding until it knows who it is: Streaming wants other versions of our libraries, and lives in an environment of its own.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from paradiffusion.data.images import decode, to_array

SHUFFLE = 1000  # samples in WebDataset's buffer, as its documentation has it


@dataclass(frozen=True)
class ReaderSettings:
    """What is read and how.

    Attributes:
        shards: a folder of tars, and beside them for Streaming a folder ``mds`` with the same samples.
        resolution: the side in pixels of the one bucket that all samples are cut to.
        batch_size: samples of a batch, all made by one worker process.
        delay_ms: what each request for bytes of a shard waits for, as at a store or a disk far away.
    """

    shards: str
    resolution: int = 256
    batch_size: int = 32
    workers: int = 2
    kind: str = "long"
    delay_ms: float = 0.0


Keys = list[str]


def pixels_of(image: bytes, number: int, resolution: int) -> Any:
    """The decoding that all ways share: uint8 [H, W, 3]."""
    bucket = (resolution, resolution)
    return to_array(decode(image, cover=bucket), bucket, number)


def stack(samples: list[tuple[Any, str, str]]) -> tuple[Any, list[str], Keys]:
    """Samples (pixels, caption, key) to a batch: uint8 [B, 3, H, W], captions, keys."""
    import numpy as np
    import torch

    images, captions, keys = zip(*samples, strict=True)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return pixels, list(captions), list(keys)


def ours(settings: ReaderSettings, threads: int | None = None, whole: bool = False) -> Iterator[Keys]:
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
    plan = BatchPlan(index, settings.batch_size, 0, [bucket], {settings.kind: 1.0}, window_shards=16)
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


class DecodeTar:
    """A WebDataset sample to (pixels, caption, key); a class, since it travels to worker processes."""

    def __init__(self, settings: ReaderSettings) -> None:
        self.settings = settings

    def __call__(self, sample: dict[str, Any]) -> tuple[Any, str, str]:
        key = sample["__key__"]
        caption = json.loads(sample["json"])["captions"][self.settings.kind]
        return pixels_of(sample["jpg"], int(key), self.settings.resolution), caption, key


def webdataset(settings: ReaderSettings) -> Iterator[Keys]:
    """WebDataset's own pipeline: shards in random order, a shuffle buffer, batches made in the workers."""
    import webdataset as wds

    shards = sorted(str(path) for path in Path(settings.shards).glob("*.tar"))
    pipeline = (
        wds.WebDataset(shards, resampled=True, shardshuffle=False)
        .shuffle(SHUFFLE)
        .map(DecodeTar(settings))
        .batched(settings.batch_size, collation_fn=stack, partial=False)
    )
    for _, _, keys in wds.WebLoader(pipeline, batch_size=None, num_workers=settings.workers):
        yield keys


def streaming(settings: ReaderSettings) -> Iterator[Keys]:
    """MosaicML Streaming over the same samples as MDS shards, in PyTorch's own loader."""
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    class Samples(StreamingDataset):
        def __getitem__(self, at: Any) -> tuple[Any, str, str]:
            sample = super().__getitem__(at)
            return pixels_of(sample["jpg"], int(sample["key"]), settings.resolution), sample["caption"], sample["key"]

    folder = str(Path(settings.shards) / "mds")
    samples = Samples(local=folder, shuffle=True, batch_size=settings.batch_size)
    loader: Any = DataLoader(
        samples, batch_size=settings.batch_size, num_workers=settings.workers, collate_fn=stack, drop_last=True,
        persistent_workers=settings.workers > 0,
    )  # fmt: skip
    while True:
        for _, _, keys in loader:
            yield keys


def write_mds(settings: ReaderSettings) -> None:
    """The samples of the tars once more, as Streaming's own shards."""
    import webdataset as wds
    from streaming import MDSWriter

    shards = sorted(str(path) for path in Path(settings.shards).glob("*.tar"))
    columns = {"jpg": "bytes", "caption": "str", "key": "str"}
    with MDSWriter(out=str(Path(settings.shards) / "mds"), columns=columns) as writer:
        for sample in wds.WebDataset(shards, shardshuffle=False):
            caption = json.loads(sample["json"])["captions"][settings.kind]
            writer.write({"jpg": sample["jpg"], "caption": caption, "key": sample["__key__"]})


READERS: dict[str, Callable[[ReaderSettings], Iterator[Keys]]] = {
    "ours": ours, "webdataset": webdataset, "streaming": streaming, "one at a time": partial(ours, threads=1),
    "whole shards": partial(ours, whole=True),
}  # fmt: skip


def serve(batches: Iterator[Keys]) -> None:
    """For each line ``drop count seconds``: pass over ``drop`` batches, then take ``count``, sleeping ``seconds`` after each as
    if a GPU worked, and print how long the whole took, how long the waiting, and the keys."""
    for line in sys.stdin:
        drop, count, work = (float(word) for word in line.split())
        for _ in itertools.islice(batches, int(drop)):
            pass
        time.sleep(work)  # of the step before, in which the first batch is made
        keys, waited, began = [], 0.0, time.perf_counter()
        for _ in range(int(count)):
            asked = time.perf_counter()
            keys.append(next(batches))
            waited += time.perf_counter() - asked
            time.sleep(work)
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "waited": waited, "keys": keys}), flush=True)


def main(name: str, given: str) -> None:
    """Serve one way of reading until standard input ends."""
    settings = ReaderSettings(**json.loads(given))
    if name == "write_mds":
        write_mds(settings)
        return
    batches = READERS[name](settings)
    next(batches)  # workers are up
    print(json.dumps({"ready": name}), flush=True)
    serve(batches)
    sys.stdout.flush()
    os._exit(0)  # some loaders would wait for their workers


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
