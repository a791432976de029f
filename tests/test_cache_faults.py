"""What happens to data, models and disks after a cache was made: noticed, named, and mended by the same command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from data_fixtures import encoded, picture, sample
from training_runs import build_here, records, train_here

from paradiffusion.compose import compose_train
from paradiffusion.data.cache_files import EntryFile, EntryWriter
from paradiffusion.data.shards import write_shards
from paradiffusion.errors import UserError
from paradiffusion.models.codec import Codec
from paradiffusion.text.encoder import TextEncoder
from paradiffusion.training import cache_makers
from paradiffusion.training.cache_keys import tokenizer_hash, weights_hash
from paradiffusion.training.caching import CacheOptions, make_cache


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


def flip(path: Path, table: str, at: int = 0) -> None:
    """Change a bit of the first byte of a table, or of the byte ``at``."""
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    data[8 + size + json.loads(data[8 : 8 + size])[table]["data_offsets"][0] + at] ^= 0x40
    path.write_bytes(data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("table", ["values", "lengths", "shapes", "checksums", "offsets"])
def test_a_flipped_bit_is_noticed(tmp_path: Path, table: str, dtype: torch.dtype) -> None:
    path = tmp_path / "one.safetensors"
    values = [torch.randn(2, 3, 5), torch.randn(2, 4, 4)]
    with EntryWriter(path, dtype) as writer:
        for name, value in enumerate(values):
            writer.add(name, value, length=7)
        writer.close()
    for name, value in enumerate(values):
        found = EntryFile(path).get(name)
        assert found is not None and torch.equal(found.values, value.to(dtype)) and found.length == 7
    flip(path, table)
    with pytest.raises(ValueError, match=r"damaged entry in the cache: delete one.safetensors and run"):
        EntryFile(path).get(0)
    assert table == "offsets" or EntryFile(path).get(1) is not None


def test_training_replaces_what_is_damaged(arguments: list[str], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert make(arguments, cache, what="latents") == 0
    damaged = sorted((cache / "latents").glob("*.safetensors"))[0]
    flip(damaged, "shapes")
    assert train_here([*arguments, f"data.cache={cache}", f"run_dir={tmp_path / 'run'}", "max_steps=6"]) == 0
    assert sum(row["bad_samples"] for row in records(tmp_path / "run" / "stage1")) == 1  # of 24 samples, all seen once
    damaged.unlink()
    assert make(arguments, cache, what="latents") == 0
    assert train_here([*arguments, f"data.cache={cache}", f"run_dir={tmp_path / 'again'}", "max_steps=6"]) == 0
    assert not any(row["bad_samples"] for row in records(tmp_path / "again" / "stage1"))


def test_folders_whose_files_are_numbered_alike(tiny_arguments: list[str], tmp_path: Path) -> None:
    """Same names, sizes of images and numbers of words, as in two small folders of products or pets."""
    for thing, first in (("dog", 0), ("cat", 100)):
        folder = tmp_path / thing / "pictures"
        folder.mkdir(parents=True)
        for number in range(4):
            (folder / f"{number}.png").write_bytes(encoded(picture(first + number), compress_level=0))
            (folder / f"{number}.txt").write_text(f"photo of {thing} {number}")
    sources = [f"{{name: {thing}, folder: {tmp_path / thing / 'pictures'}, weight: 0.5}}" for thing in ("dog", "cat")]
    here = [
        *tiny_arguments,
        "stage=1",
        f"data.sources=[{', '.join(sources)}]",
        "log_every=1",
        "data.max_bad_fraction=1",
    ]
    assert make(here, tmp_path / "cache") == 0
    assert len(list((tmp_path / "cache" / "latents").glob("*.safetensors"))) == 2
    losses = []
    for name, more in (("plain", []), ("cached", [f"data.cache={tmp_path / 'cache'}"])):
        assert train_here([*here, *more, f"run_dir={tmp_path / name}", "max_steps=4"]) == 0
        losses.append([row["loss"] for row in records(tmp_path / name / "stage1")])
        assert not any(row["bad_samples"] for row in records(tmp_path / name / "stage1"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    # Put elsewhere one by one, neither is taken for the other.
    for thing in ("dog", "cat"):
        alone = [
            *tiny_arguments,
            "stage=1",
            f"data.folder={tmp_path / thing / 'pictures'}",
            f"run_dir={tmp_path / thing}",
        ]
        with pytest.raises(UserError, match="lacks 1 of 1 shards"):
            build_here([*alone, f"data.cache={tmp_path / 'cache'}"])


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
        assert not list(cache.rglob("*.safetensors")) and not list(cache.rglob(".*"))
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
    assert before == tokenizer_hash(encoder)
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


def test_how_far_batches_are_padded_is_no_part_of_a_cache(arguments: list[str], tmp_path: Path) -> None:
    masked, cache = [*arguments, "conditioning.mask_padding=true"], tmp_path / "cache"
    assert make(masked, cache, what="text") == 0
    build_here([*masked, "conditioning.pad_multiple=32", f"data.cache={cache}", f"run_dir={tmp_path / 'run'}"])


def test_captions_are_read_without_their_images(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, sizes = cache_makers.read_place, []

    def counted(place: Any) -> Any:
        raw = read(place)
        sizes.append(len(raw.image))
        return raw

    monkeypatch.setattr(cache_makers, "read_place", counted)
    assert make(arguments, tmp_path / "cache", what="text") == 0
    assert sizes == [0] * 24
    shutil.rmtree(tmp_path / "cache")
    sizes.clear()
    assert make(arguments, tmp_path / "cache", what="latents") == 0
    assert len(sizes) == 24 and all(sizes)
