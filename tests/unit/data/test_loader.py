"""The loader: the same batches for any number of workers and ranks, from any step; bad samples replaced and counted."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from commands import ROOT
from data_fixtures import encoded, picture, sample, shards_of
from loader_fixtures import BUCKETS, SETTINGS, assert_same, children, damaged, load, plan_of
from PIL import Image

from paradiffusion.data.captions import is_dropped
from paradiffusion.data.images import decode, to_array
from paradiffusion.data.index import SampleIndex, load_index, read_sample
from paradiffusion.data.loader import default_workers, make_loader, slots_of
from paradiffusion.data.plan import BatchPlan
from paradiffusion.data.shards import RawSample, write_shards
from paradiffusion.errors import UserError
from paradiffusion.text.tokenizer import Tokens

PATHS = [str(ROOT / "tests" / "support"), str(ROOT)]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> SampleIndex:
    return shards_of(tmp_path_factory.mktemp("shards"), 70)


def test_batches_are_what_the_plan_says(index: SampleIndex) -> None:
    plan = plan_of(index)
    batches = load(index, replace(SETTINGS, caption_dropout=0.3))
    assert [batch.step for batch in batches] == list(range(12))
    dropped = 0
    for batch in batches:
        planned = plan.batch(batch.step)
        assert batch.images.dtype == torch.float32 and batch.images.is_contiguous()
        assert batch.images.shape == (8, 3, *planned.bucket)
        assert batch.slots.tolist() == list(range(8)) and batch.weights.tolist() == [1.0] * 8 and batch.bad == []
        for slot, (row, kind) in enumerate(zip(planned.rows.tolist(), planned.kinds.tolist(), strict=True)):
            raw = read_sample(index, row)
            assert batch.keys[slot] == f"{index.shards[index.shard[row]].name}/{raw.key}"
            assert batch.kinds[slot] == index.kinds[kind]
            caption = raw.meta["captions"][batch.kinds[slot]]
            if is_dropped(1, batch.step, slot, 0.3):
                caption, dropped = "", dropped + 1
            assert batch.captions[slot] == caption and batch.words[slot] == len(caption.split())
            pixels = to_array(decode(raw.image), planned.bucket, int(index.ids[row])).astype(np.float32) / 127.5 - 1
            assert np.allclose(batch.images[slot].permute(1, 2, 0).numpy(), pixels, atol=1e-6)
    assert 10 < dropped < 50


def test_workers_change_nothing(index: SampleIndex) -> None:
    settings = replace(SETTINGS, caption_dropout=0.2, accumulation=2)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert_same(load(index, settings), load(index, replace(settings, workers=2)))
    assert torch.equal(torch.get_rng_state(), state)  # The global generator is left alone.


def letters(captions: list[str]) -> Tokens:
    """A token a letter."""
    ids = torch.zeros(len(captions), max(map(len, captions), default=0), dtype=torch.int64)
    for row, caption in zip(ids, captions, strict=True):
        row[: len(caption)] = torch.tensor([ord(letter) for letter in caption])
    return Tokens(ids, ids > 0, 0, [len(caption) for caption in captions], 0)


def test_captions_are_tokenised_by_who_reads(index: SampleIndex) -> None:
    """Each different one once, the dropped ones, which are empty, among them."""
    settings = replace(SETTINGS, caption_dropout=0.5, tokenize=letters)
    plain = load(index, replace(settings, tokenize=None))
    for workers in (0, 2):
        batches = load(index, replace(settings, workers=workers))
        for batch, without in zip(batches, plain, strict=True):
            assert without.tokens is None and batch.tokens is not None and batch.captions == without.captions
            tokens, rows = batch.tokens
            assert len(tokens.ids) == len(set(batch.captions))
            said = [
                "".join(chr(int(one)) for one in ids[mask]) for ids, mask in zip(tokens.ids, tokens.mask, strict=True)
            ]
            assert [said[row] for row in rows.tolist()] == batch.captions


def test_starting_anywhere(index: SampleIndex) -> None:
    settings = replace(SETTINGS, caption_dropout=0.2, last_step=40)
    whole = load(index, settings)
    for first in (1, 9, 10, 39, 40):
        assert_same(load(index, replace(settings, first_step=first)), whole[first:])


@pytest.mark.parametrize(("world_size", "accumulation"), [(2, 1), (4, 1), (1, 4), (2, 2)])
def test_slices_join_to_the_global_batch(index: SampleIndex, world_size: int, accumulation: int) -> None:
    settings = replace(SETTINGS, caption_dropout=0.2)
    whole = load(index, settings)
    ranks = [
        load(index, replace(settings, rank=rank, world_size=world_size, accumulation=accumulation))
        for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        parts = [part for rank in ranks for part in rank[step * accumulation : (step + 1) * accumulation]]
        assert [part.micro for part in parts] == list(range(accumulation)) * world_size
        assert {part.step for part in parts} == {step}
        slots = torch.cat([part.slots for part in parts])
        assert sorted(slots.tolist()) == batch.slots.tolist()
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images[slots])
        for name in ("captions", "kinds", "words", "keys"):
            assert sum((getattr(part, name) for part in parts), []) == [getattr(batch, name)[slot] for slot in slots]


@pytest.mark.parametrize(("world_size", "accumulation"), [(4, 1), (2, 2)])
def test_processes_get_captions_of_equal_lengths(index: SampleIndex, world_size: int, accumulation: int) -> None:
    """A batch is sorted by length: cut into contiguous parts, the last process would wait for nobody and all for it."""
    plan = plan_of(index)
    lengths = {rank: [0] * accumulation for rank in range(world_size)}
    size = plan.batch_size // (world_size * accumulation)
    for rank in range(world_size):
        for micro in range(accumulation):
            slots = slots_of(rank, world_size, size, micro)
            lengths[rank][micro] = sum(slots)
    for micro in range(accumulation):
        sums = [lengths[rank][micro] for rank in range(world_size)]
        assert max(sums) - min(sums) <= (world_size - 1) * size


def test_a_batch_that_does_not_split(index: SampleIndex) -> None:
    with pytest.raises(UserError, match="multiple of 6"):
        make_loader(index, plan_of(index), replace(SETTINGS, world_size=3, accumulation=2))


def test_the_crop_follows_the_sample_not_its_row(tmp_path: Path) -> None:
    wide = [RawSample(f"{n}", encoded(picture(n, 200, 90)), "png", {"captions": {"short": "x"}}) for n in range(8)]
    found = []
    for name, samples in (("a", wide), ("b", wide[::-1] + [sample(99)])):
        one = load_index(write_shards(samples, tmp_path / name, 20))
        plan = BatchPlan(one, 8, 1, BUCKETS, {"short": 1.0})
        loader = make_loader(one, plan, replace(SETTINGS, last_step=1))
        batch = next(loader)
        found.append({key: image for key, image in zip(batch.keys, batch.images, strict=True) if "99" not in key})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(image, found[1][key]) for key, image in found[0].items())


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_replaced_and_counted(tmp_path: Path, workers: int) -> None:
    index = damaged(tmp_path, 64, {5: b"<html>", 40: encoded(picture(40))[:900]})
    settings = replace(SETTINGS, workers=workers, last_step=8, max_bad_fraction=0.05)
    loader = make_loader(index, BatchPlan(index, 8, 1, BUCKETS, {"short": 1.0}), settings)
    batches = list(loader)
    assert loader.report.read == 64 and loader.report.bad.total() == 2
    assert {shard for shard, _ in loader.report.bad} == {"damaged.tar"}
    assert "2 of 64" in loader.report.summary() and "does not decode" in loader.report.summary()
    told = [line for batch in batches for line in batch.bad]
    assert sorted(line.split(":")[0] for line in told) == ["damaged.tar/005", "damaged.tar/040"]
    for batch in batches:
        assert len(batch.keys) == 8 and batch.images.shape[0] == 8
        assert (batch.weights == 0).sum() == len(batch.bad)
        good = {key: slot for slot, key in enumerate(batch.keys) if batch.weights[slot]}
        for slot in torch.flatten(torch.nonzero(batch.weights == 0)).tolist():
            assert torch.equal(batch.images[slot], batch.images[good[batch.keys[slot]]])
            assert batch.captions[slot] == batch.captions[good[batch.keys[slot]]]
    assert sum(batch.weights.sum().item() for batch in batches) == 62


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_samples(tmp_path: Path, workers: int) -> None:
    index = damaged(tmp_path, 96, {number: b"<html>" for number in range(0, 96, 6)})
    settings = replace(SETTINGS, workers=workers, last_step=24, max_bad_fraction=0.1)
    loader = make_loader(index, BatchPlan(index, 8, 1, BUCKETS, {"short": 1.0}), settings)
    with pytest.raises(UserError, match=r"damaged.tar/\d+: does not decode") as error:
        list(loader)
    assert loader.report.read >= 64 and "\n" not in str(error.value) and error.value.__class__ is UserError
    assert len(list(make_loader(index, loader.plan, replace(settings, max_bad_fraction=0.5)))) == 24


@pytest.mark.parametrize("workers", [0, 2])
def test_a_slice_without_one_good_sample(tmp_path: Path, workers: int) -> None:
    index = damaged(tmp_path, 16, {number: b"" for number in range(16)})
    settings = replace(SETTINGS, workers=workers, max_bad_fraction=1.0)
    with pytest.raises(UserError, match="16 of 16"):
        list(make_loader(index, BatchPlan(index, 16, 1, BUCKETS, {"short": 1.0}), settings))


def test_one_bad_sample_in_slices_of_one(tmp_path: Path) -> None:
    """With one sample a process, a bad one is stood in for by another of the global batch."""
    index = damaged(tmp_path, 8, {3: b"<html>"})
    plan = BatchPlan(index, 8, 1, BUCKETS, {"short": 1.0})
    ranks = [list(make_loader(index, plan, replace(SETTINGS, rank=r, world_size=8, last_step=1))) for r in range(8)]
    assert sorted(batch.weights.item() for (batch,) in ranks) == [0.0] + [1.0] * 7


def test_a_shard_that_goes_away(tmp_path: Path) -> None:
    index = shards_of(tmp_path, 16)
    os.remove(str(index.shards[0]))
    with pytest.raises(UserError, match=r"000000.tar/\d+: No such file"):
        list(make_loader(index, plan_of(index, 4), replace(SETTINGS, workers=1)))


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_workers_ignore_signals_and_end_with_the_loader(index: SampleIndex) -> None:
    before = set(children())
    loader = make_loader(index, plan_of(index), replace(SETTINGS, workers=2, last_step=None))
    next(loader)
    workers = set(children()) - before
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker, signal.SIGTERM)
        os.kill(worker, signal.SIGINT)
    assert [next(loader).step for _ in range(20)] == list(range(1, 21))
    assert workers <= set(children())
    loader.close()
    assert ended(workers) and list(loader) == []


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_workers_end_with_a_loader_that_only_the_garbage_collector_finds(index: SampleIndex) -> None:
    before = set(children())
    loader = make_loader(index, plan_of(index), replace(SETTINGS, workers=2, last_step=None))
    next(loader)
    cycle = [loader]
    cycle.append(cycle)  # type: ignore[arg-type]
    workers = set(children()) - before
    del loader, cycle
    gc.collect()
    assert len(workers) == 2 and ended(workers)


def test_a_worker_that_dies_is_told_in_one_sentence(index: SampleIndex) -> None:
    before = set(children())
    loader = make_loader(index, plan_of(index), replace(SETTINGS, workers=1, last_step=None))
    next(loader)
    for worker in set(children()) - before:
        os.kill(worker, signal.SIGKILL)
    with pytest.raises(UserError, match="process that reads data has died"):
        for _ in range(50):
            next(loader)


PROGRAM = """
import sys, time
sys.path[:0] = {paths!r}
from loader_fixtures import children, plan_of
from paradiffusion.data.index import load_index
from paradiffusion.data.loader import LoaderSettings, make_loader
from paradiffusion.data.shards import expand_shards
index = load_index(expand_shards({folder!r}))
loader = make_loader(index, plan_of(index), LoaderSettings(workers=2))
next(loader)
print(*children(), flush=True)
{last}
"""


def start(index: SampleIndex, last: str) -> subprocess.Popen[str]:
    """A program that has begun to read, and what it does then."""
    program = PROGRAM.format(paths=PATHS, folder=str(Path(str(index.shards[0])).parent), last=last)
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)


def test_a_program_may_end_without_closing(index: SampleIndex) -> None:
    with start(index, "sys.exit(3)") as program:
        assert program.wait(240) == 3


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_workers_end_when_the_parent_is_killed(index: SampleIndex) -> None:
    with start(index, "time.sleep(60)") as parent:
        assert parent.stdout is not None
        workers = [int(word) for word in parent.stdout.readline().split()]
        assert len(workers) == 2
        parent.kill()
    assert ended(workers)


def ended(processes: Iterable[int]) -> bool:
    """Whether they end within a minute."""
    deadline = time.monotonic() + 60
    while (alive := any(map(is_alive, processes))) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def resident(process: int) -> float:
    """MB of a process that are its own."""
    return float(psutil.Process(process).memory_full_info().uss) / 1e6


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_nothing_leaks_over_many_epochs(index: SampleIndex) -> None:
    """Neither memory nor open files of this process and of a worker grow over 30 epochs; 270 KB of pixels a step would."""
    before = set(children())
    plan = plan_of(index)
    loader = make_loader(index, plan, replace(SETTINGS, workers=1, last_step=None))
    found: dict[int, list[tuple[float, int]]] = {}
    for epoch in range(33):
        while next(loader).step < plan.first_step(epoch + 1):
            pass
        if epoch in (2, 17, 32):
            gc.collect()
            for process in (os.getpid(), *(set(children()) - before)):
                found.setdefault(process, []).append((resident(process), psutil.Process(process).num_fds()))
    loader.close()
    print(found)
    assert len(found) == 2
    for (first, files, *_), _, (last, later, *_) in found.values():
        assert last - first < 24 and later <= files + 2


def test_the_default_number_of_workers(index: SampleIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(24)), raising=False)
    for processes, workers in (("1", 8), ("4", 6), ("16", 1), ("48", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert default_workers() == workers
    before = set(children())
    loader = make_loader(index, plan_of(index), replace(SETTINGS, workers=None))
    next(loader)
    assert len(set(children()) - before) == 1
    loader.close()


@pytest.mark.parametrize("orientation", [1, 6])
def test_large_photographs_are_decoded_smaller_and_look_the_same(orientation: int) -> None:
    rng = np.random.default_rng(0)
    size = (1501, 1003) if orientation == 1 else (1504, 1000)
    image = Image.fromarray(rng.integers(0, 256, (16, 24, 3), dtype=np.uint8)).resize(size)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, "JPEG", quality=92, exif=exif)
    for bucket in BUCKETS:
        whole, smaller = decode(data), decode(data, cover=bucket)
        target = max(bucket[1] / whole.width, bucket[0] / whole.height)
        assert 2 * target * whole.width <= smaller.width < whole.width / 3  # At least twice what is wanted.
        assert 2 * target * whole.height <= smaller.height
        difference = to_array(whole, bucket, 5).astype(np.float64) - to_array(smaller, bucket, 5)
        assert 20 * np.log10(255 / np.sqrt((difference**2).mean())) > 40  # dB
    assert decode(data, cover=(600, 400)).size == decode(data).size
    assert decode(encoded(image, "PNG"), cover=(64, 64)).size == size
