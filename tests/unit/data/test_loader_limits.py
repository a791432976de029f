"""The loader where the machine gives too little (shared memory, open files), and when bad samples stop a run."""

from __future__ import annotations

import gc
import os
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_fixtures import shards_of
from loader_fixtures import SETTINGS, assert_same, damaged, load, plan_of

from paradiffusion.data.index import SampleIndex
from paradiffusion.data.loader import Batch, Delivery, Failure, Loader, make_loader
from paradiffusion.data.plan import BatchPlan
from paradiffusion.errors import UserError


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> SampleIndex:
    return shards_of(tmp_path_factory.mktemp("shards"), 70)


@contextmanager
def limited(kind: int, value: int) -> Iterator[None]:
    """At most ``value`` of something for this process, and for those that it starts for ever."""
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


@pytest.mark.skipif(sys.platform != "linux", reason="the limit bounds shared memory on Linux alone")
def test_without_room_in_shared_memory_the_same_batches_come(
    index: SampleIndex, capfd: pytest.CaptureFixture[str]
) -> None:
    """No file larger than 1000 bytes in the workers is for them what a full /dev/shm is."""
    loader = make_loader(index, plan_of(index), replace(SETTINGS, workers=2, caption_dropout=0.2))
    found: list[Batch] = []
    with limited(resource.RLIMIT_FSIZE, 1000):
        reading = threading.Thread(target=lambda: found.extend(loader), daemon=True)  # A DataLoader alone hangs here.
        reading.start()
        reading.join(60)
    loader.close()
    assert_same(found, load(index, replace(SETTINGS, caption_dropout=0.2)))
    (line,) = capfd.readouterr().err.splitlines()  # Once, and no traceback of a worker.
    assert line.startswith("a batch cannot be put into shared memory (File too large") and "--shm-size" in line


def test_batches_come_in_shared_memory(index: SampleIndex, capfd: pytest.CaptureFixture[str]) -> None:
    loader = make_loader(index, plan_of(index), replace(SETTINGS, workers=1))
    assert next(loader).pixels.is_shared() and not capfd.readouterr().err
    loader.close()


# DataLoader's half-made iterator complains when it is freed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("spare", [1, 4])
def test_workers_that_cannot_be_started(index: SampleIndex, spare: int) -> None:
    loader = make_loader(index, plan_of(index), replace(SETTINGS, workers=2))
    taken = [os.open(os.devnull, os.O_RDONLY) for _ in range(8)]
    with limited(resource.RLIMIT_NOFILE, taken[-1] + spare), pytest.raises(UserError) as error:
        next(loader)
    for file in taken:
        os.close(file)
    said = str(error.value)
    assert "data.workers=2 cannot be started (Too many open files): set it lower" in said
    del error, loader
    gc.collect()  # Here, and not in a test that it does not concern.


def read_until_stopped(index: SampleIndex, seed: int, rate: float, most: int) -> int | None:
    """How many samples a process reads, of which ``rate`` are bad by chance, until it stops under the limit of 1 %."""
    loader = Loader(index, plan_of(index), SETTINGS)
    loader._whole = most  # A set of that many.
    rng = np.random.default_rng(seed)
    for _ in range(most // 8):
        failures = [Failure("a.tar", str(key), "bad") for key in range(rng.binomial(8, rate))]
        try:
            loader._judge(Delivery(torch.empty(0), [], [], ["k"] * 8, [], failures))
        except UserError:
            return loader.report.read
    return None


def test_chance_does_not_stop_a_run(index: SampleIndex) -> None:
    assert [read_until_stopped(index, seed, 0.001, 8000) for seed in range(60)] == [None] * 60
    assert all((read_until_stopped(index, seed, 0.03, 8000) or 9999) < 2500 for seed in range(20))
    assert all((read_until_stopped(index, seed, 0.3, 8000) or 9999) <= 80 for seed in range(20))


def test_a_small_set_is_judged_once_it_is_read(tmp_path: Path) -> None:
    """Then its share of bad samples is known, and not by chance."""
    index = damaged(tmp_path, 96, {7: b"", 50: b"<html>"})
    loader = make_loader(index, BatchPlan(index, 8, 1, [(64, 64)], {"short": 1.0}), replace(SETTINGS, last_step=None))
    with pytest.raises(UserError, match=r"of \d+ samples could not be read .*max_bad_fraction is 0.01"):
        for _ in range(24):
            next(loader)
    assert 96 <= loader.report.read <= 192
