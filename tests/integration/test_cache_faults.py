"""What happens to data, models and disks after a cache was made: noticed, named, and mended by the same command."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from data_fixtures import encoded, picture, sample
from safetensors.torch import load
from training_runs import build_here, records, train_here

from paradiffusion.compose import compose_train
from paradiffusion.data.cache import Members, writing
from paradiffusion.data.shards import write_shards
from paradiffusion.errors import UserError
from paradiffusion.models.codec import Codec
from paradiffusion.text.encoder import TextEncoder
from paradiffusion.training import caching
from paradiffusion.training.caching import CacheOptions, make_cache, tokenizer_hash, weights_hash


@pytest.fixture(scope="module")
def arguments(tiny_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three shards of eight samples."""
    folder = tmp_path_factory.mktemp("faults_data")
    write_shards((sample(number) for number in range(24)), folder, 8)
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
    # One by one each has its own.
    for thing, folder in folders.items():
        build_here([*tiny_arguments, "stage=1", f"data.folder={folder}", f"run_dir={tmp_path / thing}", cache])


def test_entries_are_made_and_dropped_one_by_one(
    tiny_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture replaced by one of the same name, size in bytes and sides; one more; one less; another caption."""
    folder, encoded_now = tmp_path / "pictures", []
    folder.mkdir()

    def put(number: int, what: int, text: str) -> None:
        (folder / f"{number}.png").write_bytes(encoded(picture(what), compress_level=0))
        (folder / f"{number}.txt").write_text(text)

    posterior, read_captions = Codec.posterior, caching.read_captions

    def counted(self: Codec, images: torch.Tensor) -> Any:
        encoded_now.extend(["picture"] * len(images))
        return posterior(self, images)

    def counted_text(encoder: TextEncoder, captions: list[str], device: torch.device) -> Any:
        encoded_now.extend(["caption"] * len(captions))
        return read_captions(encoder, captions, device)

    here = [
        *tiny_arguments,
        "stage=1",
        f"data.folder={folder}",
        "log_every=1",
        "max_steps=4",
        "data.max_bad_fraction=0",
    ]
    cached = [*here, f"data.cache={tmp_path / 'cache'}"]

    def made() -> tuple[int, int]:
        encoded_now.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Codec, "posterior", counted)
            patch.setattr(caching, "read_captions", counted_text)
            assert make(here, tmp_path / "cache") == 0
        assert len(list((tmp_path / "cache" / "latents").glob("*.tar"))) == 1
        return encoded_now.count("picture"), encoded_now.count("caption")

    for number in range(6):
        put(number, number, f"a thing {number}")
    assert made() == (6, 6 + 1)  # and the empty caption
    size = (folder / "3.png").stat().st_size
    put(3, 77, "a thing 3")
    assert (folder / "3.png").stat().st_size == size
    with pytest.raises(UserError, match="lacks 1 of 1 shards"):
        build_here([*cached, f"run_dir={tmp_path / 'stale'}"])
    assert made() == (1, 0)
    put(0, 0, "a star 0")
    assert made() == (0, 1)
    put(10, 10, "a thing 10")
    (folder / "1.png").unlink()
    assert made() == (1, 1) and made() == (0, 0)
    losses = []
    for name, arguments in (("plain", here), ("cached", cached)):
        assert train_here([*arguments, f"run_dir={tmp_path / name}"]) == 0
        losses.append([row["loss"] for row in records(tmp_path / name / "stage1")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


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
