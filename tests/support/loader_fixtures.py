"""Plans and loaders over small shards, and the processes that they start."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import psutil
import torch
from data_fixtures import as_json, encoded, picture, write_tar

from paradiffusion.data.images import make_buckets
from paradiffusion.data.index import SampleIndex, load_index
from paradiffusion.data.loader import Batch, LoaderSettings, make_loader
from paradiffusion.data.plan import BatchPlan

BUCKETS = make_buckets(64, 16, 2.0)

SETTINGS = LoaderSettings(seed=1, workers=0, last_step=12)


def plan_of(index: SampleIndex, batch_size: int = 8) -> BatchPlan:
    return BatchPlan(index, batch_size, 1, BUCKETS, {"short": 1.0, "long": 1.0}, window_shards=2)


def load(index: SampleIndex, settings: LoaderSettings, batch_size: int = 8) -> list[Batch]:
    return list(make_loader(index, plan_of(index, batch_size), settings))


def assert_same(first: Iterable[Batch], second: Iterable[Batch]) -> None:
    for one, other in zip(first, second, strict=True):
        for name, value in vars(one).items():
            theirs = getattr(other, name)
            assert torch.equal(value, theirs) if isinstance(value, torch.Tensor) else value == theirs, name


def damaged(folder: Path, count: int, bad: dict[int, bytes]) -> SampleIndex:
    """Square samples, some of whose images are other bytes."""
    members = []
    for number in range(count):
        members.append((f"{number:03d}.png", bad.get(number, encoded(picture(number)))))
        members.append((f"{number:03d}.json", as_json(captions={"short": f"thing {number}"}, width=64, height=64)))
    return load_index([write_tar(folder / "damaged.tar", members)])


def children() -> list[int]:
    """Living processes started by this one."""
    return [one.pid for one in psutil.Process().children() if alive(one.pid)]


def alive(process: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
