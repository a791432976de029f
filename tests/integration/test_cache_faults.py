"""Making caches: stopped, on two processes, beside another; and what happens to data, models and disks afterwards."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from commands import wait_for
from data_fixtures import encoded, picture, sample
from ranks import Started, run_on_two
from safetensors.torch import load
from training_runs import build_here, records, train_here

from paradiffusion.compose import compose_train
from paradiffusion.data.cache import Members, remove_abandoned, writing
from paradiffusion.data.shards import write_shards
from paradiffusion.errors import UserError
from paradiffusion.models.codec import Codec
from paradiffusion.text.encoder import TextEncoder
from paradiffusion.training import caching
from paradiffusion.training.caching import CacheOptions, make_cache, tokenizer_hash, weights_hash


@pytest.fixture(scope="module")
def arguments(tiny_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Twelve shards of two samples."""
    folder = tmp_path_factory.mktemp("faults_data")
    write_shards((sample(number) for number in range(24)), folder, 2)
    more = ["stage=1", "data.captions={short: 0.5, long: 0.5}", "conditioning.max_tokens=24", "log_every=1"]
    return [*tiny_arguments, *more, f"data.shards={folder}", "data.max_bad_fraction=0.5"]


def make(arguments: list[str], output: Path, **options: Any) -> int:
    """What scripts/cache.py does."""
    return make_cache(compose_train(arguments), CacheOptions(output=str(output), **options))


def flip(path: Path, part: str) -> None:
    """Change a bit of the first member: in one of its tensors, or in its "header"."""
    with tarfile.open(path) as tar:
        start = tar.getmembers()[0].offset_data
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[start : start + 8], "little")
    tensors = json.loads(data[start + 8 : start + 8 + size])
    data[start + 8 + (0 if part == "header" else size + tensors[part]["data_offsets"][0])] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("part", "dtype"),
    [("values", torch.bfloat16), ("values", torch.float32), ("length", torch.float32), ("checksum", torch.float32),
     ("header", torch.float32)],
)  # fmt: skip
def test_a_flipped_bit_is_noticed(tmp_path: Path, part: str, dtype: torch.dtype) -> None:
    path, values = tmp_path / "one.tar", [torch.randn(2, 3, 5), torch.randn(2, 4, 4)]
    with writing(path, dtype) as add:
        for name, value in enumerate(values):
            add(name, value, length=7)
    for name, value in enumerate(values):
        found = Members(path).get(name)
        assert found is not None and torch.equal(found.values, value.to(dtype)) and found.length == 7
    flip(path, part)
    with pytest.raises(ValueError, match=r"damaged entry in the cache: delete one.tar and run"):
        Members(path).get(0)
    assert Members(path).get(1) is not None and Members(path).get(2) is None


@pytest.fixture(scope="module")
def latents(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of latents, to be copied."""
    cache = tmp_path_factory.mktemp("cache") / "cache"
    assert make(arguments, cache, what="latents") == 0
    return cache


def test_a_cache_is_made_of_ordinary_shards(latents: Path) -> None:
    tars = sorted(str(path) for path in (latents / "latents").glob("*.tar"))
    samples = [load(sample["safetensors"]) for sample in webdataset.WebDataset(tars, shardshuffle=False)]
    assert len(samples) == 24 and all(sample["values"].shape[:2] == (2, 4) for sample in samples)


def test_training_replaces_what_is_damaged(arguments: list[str], latents: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(latents, tmp_path / "cache")
    damaged = sorted((cache / "latents").glob("*.tar"))[0]
    flip(damaged, "values")
    assert train_here([*arguments, f"data.cache={cache}", f"run_dir={tmp_path / 'run'}", "max_steps=6"]) == 0
    assert sum(row["bad_samples"] for row in records(tmp_path / "run" / "stage1")) == 1  # of 24 samples, all seen once
    damaged.unlink()
    assert make(arguments, cache, what="latents") == 0
    assert train_here([*arguments, f"data.cache={cache}", f"run_dir={tmp_path / 'again'}", "max_steps=6"]) == 0
    assert not any(row["bad_samples"] for row in records(tmp_path / "again" / "stage1"))


def test_folders_whose_files_are_numbered_alike(tiny_arguments: list[str], tmp_path: Path) -> None:
    """Same names, sizes of images and numbers of words, as in two small folders of products or pets."""
    folders = {thing: tmp_path / thing / "pictures" for thing in ("dog", "cat")}
    for first, (thing, folder) in enumerate(folders.items()):
        folder.mkdir(parents=True)
        for number in range(4):
            (folder / f"{number}.png").write_bytes(encoded(picture(100 * first + number), compress_level=0))
            (folder / f"{number}.txt").write_text(f"photo of {thing} {number}")
    sources = ", ".join(f"{{name: {thing}, folder: {folder}, weight: 0.5}}" for thing, folder in folders.items())
    here = [
        *tiny_arguments,
        "stage=1",
        f"data.sources=[{sources}]",
        "log_every=1",
        "data.max_bad_fraction=1",
        "max_steps=4",
    ]
    cache = f"data.cache={tmp_path / 'cache'}"
    assert make(here, tmp_path / "cache") == 0
    assert len(list((tmp_path / "cache" / "latents").glob("*.tar"))) == 2
    losses = []
    for name, more in (("plain", []), ("cached", [cache])):
        assert train_here([*here, *more, f"run_dir={tmp_path / name}"]) == 0
        losses.append([row["loss"] for row in records(tmp_path / name / "stage1")])
        assert not any(row["bad_samples"] for row in records(tmp_path / name / "stage1"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    # Put elsewhere one by one, neither is taken for the other.
    for thing, folder in folders.items():
        with pytest.raises(UserError, match="lacks 1 of 1 shards"):
            build_here([*tiny_arguments, "stage=1", f"data.folder={folder}", f"run_dir={tmp_path / thing}", cache])


def test_shards_added_with_fewer_kinds_get_all_of_the_cache(arguments: list[str], tmp_path: Path) -> None:
    data, cache = tmp_path / "data", tmp_path / "cache"
    write_shards((sample(number) for number in range(8)), data, 8)
    here = [*arguments, f"data.shards={data}", "data.max_bad_fraction=0"]
    assert make(here, cache, what="text") == 0
    write_shards((sample(number) for number in range(16)), data, 8)
    assert make([*here, "data.captions={short: 1}"], cache, what="text") == 0
    assert train_here([*here, f"data.cache={cache}", f"run_dir={tmp_path / 'run'}", "max_steps=8"]) == 0
    assert not any(row["bad_samples"] for row in records(tmp_path / "run" / "stage1"))


def test_what_is_not_finite_is_never_cached(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    posterior, encode = Codec.posterior, TextEncoder.forward
    for factor, more in (
        (float("nan"), "set codec.dtype=float32"),
        (1e8, "store with dtype=bfloat16 or dtype=float32"),
    ):
        scaled = lambda self, images, by=factor: tuple(part * by for part in posterior(self, images))  # noqa: E731
        monkeypatch.setattr(Codec, "posterior", scaled)
        cache = tmp_path / str(factor)
        with pytest.raises(UserError, match=rf"the latents of 000000.tar/\d+ .*not all finite numbers; {more}"):
            make(arguments, cache, what="latents", dtype="float16")
        assert not list(cache.rglob("*.tar")) and not list(cache.rglob(".*"))
    monkeypatch.setattr(TextEncoder, "forward", lambda *a, **k: encode(*a, **k) * float("inf"))
    with pytest.raises(UserError, match=r"the features of '.*not all finite numbers; set text_encoder.dtype=float32"):
        make(arguments, tmp_path / "text", what="text")


def test_other_weights_or_another_tokenizer_are_noticed(arguments: list[str], tmp_path: Path) -> None:
    """Tuned layers in the middle of a file, and settings beside it, change no end of a file of weights."""
    setup = build_here([*arguments, f"run_dir={tmp_path / 'run'}"])
    encoder, vae = setup.encoder, setup.codec.vae
    for model in (encoder.model, vae):
        before = weights_hash(model)
        assert before == weights_hash(model)
        parameter = list(model.parameters())[len(list(model.parameters())) // 2]
        with torch.no_grad():
            parameter.add_(1e-3)
        assert weights_hash(model) != before
    before = tokenizer_hash(encoder)
    encoder.tokenizer.add_tokens(["<new>"])
    assert tokenizer_hash(encoder) != before
    cache = tmp_path / "cache"
    assert make(arguments, cache) == 0
    for kind, part in (
        ("latents", "codec.weights"),
        ("text", "text_encoder.weights"),
        ("text", "text_encoder.tokenizer"),
    ):
        path = cache / kind / "key.json"
        kept = path.read_text()
        stored = json.loads(kept)
        stored["key"][part] = "another"
        path.write_text(json.dumps(stored))
        with pytest.raises(UserError, match=f"made with {part}='another', and this command says"):
            build_here([*arguments, f"data.cache={cache}", f"run_dir={tmp_path / 'cached'}"])
        path.write_text(kept)
    # How far batches are padded is no part of a cache.
    build_here([*arguments, "conditioning.pad_multiple=32", f"data.cache={cache}", f"run_dir={tmp_path / 'padded'}"])


def test_captions_are_read_without_their_images(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, sizes = caching.read_place, []

    def counted(place: Any) -> Any:
        raw = read(place)
        sizes.append(len(raw.image))
        return raw

    monkeypatch.setattr(caching, "read_place", counted)
    assert make(arguments, tmp_path / "cache", what="text") == 0
    assert sizes == [0] * 24


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_processes_make_what_one_makes(arguments: list[str], tmp_path: Path) -> None:
    ended, said = run_on_two("scripts/cache.py", *arguments, f"output={tmp_path / 'two'}")
    assert ended == [0, 0], said
    assert said.count("24 samples in 12 files") == 2  # latents and text, each told once
    assert make_cache(compose_train(arguments), CacheOptions(output=str(tmp_path / "one"))) == 0
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert len(one) == 2 * (2 * 12 + 1) + 2 and one == two  # each tar with its index, and a key


def test_a_stopped_run_goes_on_after_its_last_whole_shard(arguments: list[str], tmp_path: Path) -> None:
    # Large pictures one by one, so that there is time to stop.
    slow, folder = [*arguments, "data.resolution=256"], tmp_path / "cache" / "latents"
    more = ("what=latents", "at_once=1", "readers=1", f"output={tmp_path / 'cache'}")
    started = Started("scripts/cache.py", *slow, *more, ACCELERATE_USE_CPU="1")
    wait_for(lambda: len(list(folder.glob("0*.tar"))) >= 2 or started.poll() is not None, interval=0.01)
    started.send_signal(signal.SIGTERM)
    output, errors = started.communicate(timeout=120)
    assert started.returncode == 128 + signal.SIGTERM and "Traceback" not in errors, errors
    assert "stopped; finished shards are kept: run the same command again" in output
    before = {path: path.stat().st_mtime_ns for path in folder.glob("0*.tar")}
    assert 2 <= len(before) < 12 and not list(folder.glob(".*"))
    for name in ("cache", "whole"):
        assert (
            make_cache(compose_train(slow), CacheOptions(output=str(tmp_path / name), what="latents", at_once=1)) == 0
        )
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert files(folder) == files(tmp_path / "whole" / "latents")


def test_a_full_disk_is_one_sentence_and_leaves_nothing_behind(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # It stands for a disk: a larger file is refused by the system.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    said = r"one.tar could not be written \(.*\); make room, then run the same"
    try:
        with pytest.raises(UserError, match=said), writing(tmp_path / "one.tar", torch.float32) as add:
            add(1, torch.zeros(1 << 16))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_two_commands_at_work_on_one_shard(tmp_path: Path) -> None:
    """What the first has finished is whole, even where the second, which began later, is killed before its end."""
    path, values = tmp_path / "one.tar", [torch.full((64, 64), float(n)) for n in range(1, 20)]
    with pytest.raises(KeyboardInterrupt), writing(path, torch.float32) as second:
        second(0, values[0])
        with writing(path, torch.float32) as first:
            for name, value in enumerate(values):
                first(name, value)
        kept = Members(path)
        assert all(torch.equal(kept.get(name).values, value) for name, value in enumerate(values))  # type: ignore[union-attr]
        (left,) = tmp_path.glob(".*.part")
        remove_abandoned(tmp_path)
        assert left.exists()
        os.utime(left, (1.0, 1.0))
        remove_abandoned(tmp_path)
        assert sorted(found.name for found in tmp_path.iterdir()) == ["one.npy", "one.tar"]
        raise KeyboardInterrupt
