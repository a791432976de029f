"""The loader: the same batches for any number of workers and ranks, from any step; bad samples replaced and counted."""

from __future__ import annotations

import gc
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from commands import ROOT, user_error, wait_for
from data_fixtures import encoded, picture, sample, shards_of
from loader_fixtures import BUCKETS, SETTINGS, alive, assert_same, children, damaged, load, plan_of
from PIL import Image

from paradiffusion.data.captions import is_dropped
from paradiffusion.data.images import decode, to_array
from paradiffusion.data.index import SampleIndex, load_index, read_sample
from paradiffusion.data.loader import Batch, Failure, Loader, default_workers, make_loader, slots_of
from paradiffusion.data.plan import BatchPlan
from paradiffusion.data.shards import RawSample, write_shards
from paradiffusion.errors import UserError
from paradiffusion.text.tokenizer import Tokens


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
        assert batch.slots.tolist() == list(range(8)) and batch.weights.tolist() == [1.0] * 8 and not batch.failures
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
    batches = load(index, replace(settings, workers=2))
    assert_same(load(index, settings), batches)
    assert torch.equal(torch.get_rng_state(), state)  # The global generator is left alone.
    assert all(batch.pixels.is_shared() for batch in batches), "batches come in shared memory"
    six = replace(SETTINGS, world_size=3, accumulation=2)
    user_error("multiple of 6", make_loader, index, plan_of(index), six)


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
            said = ["".join(chr(int(one)) for one in ids[mask]) for ids, mask in zip(tokens.ids, tokens.mask, strict=True)]
            assert [said[row] for row in rows.tolist()] == batch.captions


@pytest.mark.parametrize(("world_size", "accumulation"), [(4, 1), (2, 2)])
def test_processes_get_captions_of_equal_lengths(world_size: int, accumulation: int) -> None:
    """A batch is sorted by length: cut into contiguous parts, the last process would wait for nobody and all for it."""
    size = 8 // (world_size * accumulation)
    for micro in range(accumulation):
        sums = [sum(slots_of(rank, world_size, size, micro)) for rank in range(world_size)]
        assert max(sums) - min(sums) <= (world_size - 1) * size


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
    told = [str(failure) for batch in batches for failure in batch.failures]
    assert sorted(line.split(":")[0] for line in told) == ["damaged.tar/005", "damaged.tar/040"]
    for batch in batches:
        assert len(batch.keys) == 8 and batch.images.shape[0] == 8
        assert (batch.weights == 0).sum() == len(batch.failures)
        good = {key: slot for slot, key in enumerate(batch.keys) if batch.weights[slot]}
        for slot in torch.flatten(torch.nonzero(batch.weights == 0)).tolist():
            assert torch.equal(batch.images[slot], batch.images[good[batch.keys[slot]]])
            assert batch.captions[slot] == batch.captions[good[batch.keys[slot]]]
    assert sum(batch.weights.sum().item() for batch in batches) == 62


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_samples(tmp_path: Path, workers: int) -> None:
    index = damaged(tmp_path / "some", 96, {number: b"<html>" for number in range(0, 96, 6)})
    settings = replace(SETTINGS, workers=workers, last_step=24, max_bad_fraction=0.1)
    loader = make_loader(index, BatchPlan(index, 8, 1, BUCKETS, {"short": 1.0}), settings)
    with pytest.raises(UserError, match=r"damaged.tar/\d+: does not decode") as error:
        list(loader)
    assert loader.report.read >= 64 and error.value.__class__ is UserError
    assert len(list(make_loader(index, loader.plan, replace(settings, max_bad_fraction=0.5)))) == 24
    gone = shards_of(tmp_path / "gone", 16)
    os.remove(str(gone.shards[0]))
    with pytest.raises(UserError, match=r"000000.tar/\d+: No such file"):
        list(make_loader(gone, plan_of(gone, 4), settings))
    index = damaged(tmp_path / "all", 16, {number: b"" for number in range(16)})
    with pytest.raises(UserError, match="16 of 16"):
        plan = BatchPlan(index, 16, 1, BUCKETS, {"short": 1.0})
        list(make_loader(index, plan, replace(settings, max_bad_fraction=1.0)))


def test_one_bad_sample_in_slices_of_one(tmp_path: Path) -> None:
    """With one sample a process, a bad one is stood in for by another of the global batch."""
    index = damaged(tmp_path, 8, {3: b"<html>"})
    plan = BatchPlan(index, 8, 1, BUCKETS, {"short": 1.0})
    ranks = [list(make_loader(index, plan, replace(SETTINGS, rank=r, world_size=8, last_step=1))) for r in range(8)]
    assert sorted(batch.weights.item() for (batch,) in ranks) == [0.0] + [1.0] * 7


def wait_until_ended(processes: Iterable[int]) -> None:
    wait_for(lambda: not any(map(alive, processes)), timeout=60)


def reading(index: SampleIndex, **settings: object) -> tuple[Loader, set[int]]:
    """A loader that has given its first batch, and its processes."""
    before = set(children())
    loader = make_loader(index, plan_of(index), replace(SETTINGS, last_step=None, **settings))  # type: ignore[arg-type]
    next(loader)
    return loader, set(children()) - before


def test_workers_ignore_signals_and_end_with_the_loader(index: SampleIndex) -> None:
    loader, workers = reading(index, workers=2)
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker, signal.SIGTERM)
        os.kill(worker, signal.SIGINT)
    assert [next(loader).step for _ in range(20)] == list(range(1, 21))
    assert workers <= set(children())
    loader.close()
    wait_until_ended(workers)
    assert list(loader) == []
    loader, workers = reading(index, workers=2)
    cycle = [loader]
    cycle.append(cycle)  # type: ignore[arg-type]
    del loader, cycle
    gc.collect()  # nobody else finds that one
    assert len(workers) == 2
    wait_until_ended(workers)

    loader, (worker,) = reading(index, workers=1)
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(UserError, match="process that reads data has died"):
        for _ in range(50):
            next(loader)


PROGRAM = """
import sys
from loader_fixtures import children, plan_of
from paradiffusion.data.index import load_index
from paradiffusion.data.loader import LoaderSettings, make_loader
from paradiffusion.data.shards import expand_shards
index = load_index(expand_shards(sys.argv[1]))
loader = make_loader(index, plan_of(index), LoaderSettings(workers=2))
next(loader)
print(*children(), flush=True)
if sys.argv[2] == "sleeps":
    import time
    time.sleep(60)
sys.exit(3)
"""


@pytest.mark.parametrize(("last", "status"), [("ends", 3), ("sleeps", -signal.SIGKILL)])
def test_workers_end_with_a_program_that_does_not_close(index: SampleIndex, last: str, status: int) -> None:
    arguments = [str(Path(str(index.shards[0])).parent), last]
    paths = os.pathsep.join([str(ROOT / "tests" / "support"), str(ROOT)])
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths}
    ) as program:  # fmt: skip
        assert program.stdout is not None
        workers = [int(word) for word in program.stdout.readline().split()]
        if last == "sleeps":
            program.kill()
        assert len(workers) == 2 and program.wait(60) == status
    wait_until_ended(workers)


def test_nothing_leaks_over_many_epochs(index: SampleIndex) -> None:
    """Neither memory nor open files of this process and of a worker grow over 20 epochs; 270 KB of pixels a step would."""
    loader, workers = reading(index, workers=1)
    found: dict[int, list[tuple[float, int]]] = {}
    for epoch in range(23):
        while next(loader).step < loader.plan.first_step(epoch + 1):
            pass
        if epoch in (2, 12, 22):
            gc.collect()
            for process in (os.getpid(), *workers):
                found.setdefault(process, []).append(
                    (psutil.Process(process).memory_full_info().uss / 1e6, psutil.Process(process).num_fds())
                )
    loader.close()
    assert len(found) == 2
    for (first, files, *_), _, (last, later, *_) in found.values():
        assert last - first < 16 and later <= files + 2, found


def test_the_default_number_of_workers(index: SampleIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(24)), raising=False)
    for processes, workers in (("1", 8), ("4", 6), ("16", 1), ("48", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert default_workers() == workers
    loader, started = reading(index, workers=None)
    loader.close()
    assert len(started) == 1


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


# ---- where the machine gives too little, and when bad samples stop a run ----------------------------------------------


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
def test_without_room_in_shared_memory_the_same_batches_come(index: SampleIndex, capfd: pytest.CaptureFixture[str]) -> None:
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
            loader._judge(Batch(torch.empty(0), [], [], ["k"] * 8, [], failures))
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
