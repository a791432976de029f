"""Caches of latents and text features: the same training, refusals, and what happens to them, to data, models and disks."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from accelerate.state import AcceleratorState
from commands import user_error, wait_for
from data_fixtures import as_json, encoded, picture, sample, write_tar
from PIL import Image
from ranks import Started, run_on_two
from remote_fixtures import serving
from safetensors.torch import load
from training_runs import assert_same_bits, build_here, newest, records, train_here

from paradiffusion.compose import compose_train
from paradiffusion.data.cache import KEY_FILE, PIXELS_VERSION, Members, folders_of, remove_abandoned, writing
from paradiffusion.data.images import decode, to_array
from paradiffusion.data.shards import write_shards
from paradiffusion.errors import UserError
from paradiffusion.models.codec import Codec
from paradiffusion.models.joint import LossBatch
from paradiffusion.text.encoder import TextEncoder
from paradiffusion.training import caching
from paradiffusion.training.caching import CacheOptions, make_cache, tokenizer_hash, weights_hash
from paradiffusion.training.engine import make_accelerator
from paradiffusion.training.log import Meters
from paradiffusion.training.preflight import preflight
from paradiffusion.training.trainer import Trainer

# Short enough for some captions to be cut.
WORDS = ["conditioning.max_tokens=24", "data.caption_dropout=0.3", "conditioning.prefix=Describe it:"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of 16 samples of several sizes, with captions of up to 40 words; one image that does not decode."""
    folder = tmp_path_factory.mktemp("cache_data")
    samples = [sample(number) for number in range(48)]
    for number, one in enumerate(samples):
        one.meta["captions"]["long"] = f"thing {number} " + "word " * (number % 40)
    for number in (5, 6, 30):  # much larger than their bucket: a JPEG is then decoded at a fraction of its size
        samples[number].image, samples[number].extension = encoded(picture(number, 600, 500), "JPEG"), "jpg"
    samples[21].image = b"\x89PNG" + bytes(60)
    samples[22].meta["captions"].pop("short")
    write_shards(iter(samples), folder, 16)
    return folder


@pytest.fixture(scope="module")
def arguments(tiny_arguments: list[str], data: Path) -> list[str]:
    return [
        *tiny_arguments, *WORDS, "stage=1", f"data.shards={data}", "data.captions={short: 0.7, long: 0.3}",
        "data.max_bad_fraction=0.5", "log_every=1", "max_steps=12",
    ]  # fmt: skip


def make(arguments: list[str], output: Path, **options: Any) -> int:
    """What scripts/cache.py does."""
    return make_cache(compose_train(arguments), CacheOptions(output=str(output), **options))


@pytest.fixture(scope="module")
def caches(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A cache of both kinds for each arm."""
    found = {arm: tmp_path_factory.mktemp("caches") / arm for arm in ("modern", "paper")}
    for arm, folder in found.items():
        assert make([*arguments, f"conditioning={arm}", *WORDS], folder) == 0
    return found


def inputs(trainer: Trainer, steps: int) -> tuple[list[LossBatch], Meters]:
    """What the first steps give the joint module."""
    loader = trainer.loader()
    try:
        return [trainer.encode(next(loader)) for _ in range(steps)], trainer.meters
    finally:
        loader.close()


@pytest.mark.parametrize(("arm", "kinds"), [("modern", "both"), ("paper", "both"), ("modern", "latents"), ("modern", "text")])
def test_the_model_gets_the_same_inputs(arguments: list[str], caches: dict[str, Path], arm: str, kinds: str, tmp_path: Path) -> None:
    arguments = [*arguments, f"conditioning={arm}", *WORDS, f"run_dir={tmp_path / 'run'}"]
    folder = caches[arm] if kinds == "both" else caches[arm] / kinds
    plain, plain_meters = inputs(build_here(arguments), 12)
    cached, meters = inputs(build_here([*arguments, f"data.cache={folder}"]), 12)
    for one, other in zip(plain, cached, strict=True):
        assert torch.equal(one.noise, other.noise) and torch.equal(one.times, other.times)
        assert torch.equal(one.weights, other.weights)
        torch.testing.assert_close(one.latents, other.latents, rtol=1e-4, atol=1e-5)
        assert one.features is not None and other.features is not None and one.features.shape == other.features.shape
        real: torch.Tensor | slice = slice(None)
        if one.mask is not None:
            assert other.mask is not None and torch.equal(one.mask, other.mask)
            real = one.mask
        torch.testing.assert_close(one.features[real], other.features[real], rtol=1e-4, atol=1e-5)
    assert (plain[0].mask is None) == (arm == "paper")
    for name in ("tokens", "truncated", "samples", "bad"):
        assert getattr(meters, name) == getattr(plain_meters, name) > 0, name


def test_losses_are_those_of_training_without_a_cache(arguments: list[str], caches: dict[str, Path], tmp_path: Path) -> None:
    """And a run that was stopped in the middle ends in the same bits."""
    arguments = [*arguments, "data.workers=1", "checkpoint_every=3", "max_steps=6"]
    cached = [*arguments, f"data.cache={caches['modern']}"]
    for name, typed in (("plain", arguments), ("cached", cached), ("parts", [*cached, "max_steps=4"]), ("parts", cached)):
        assert train_here([*typed, f"run_dir={tmp_path / name}"]) == 0
    plain, other = (records(tmp_path / name / "stage1") for name in ("plain", "cached"))
    for one, two in zip(plain, other, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
        assert all(one[key] == two[key] for key in ("truncated_count", "bad_samples", "truncated"))
    assert_same_bits(newest(tmp_path / "cached" / "stage1"), newest(tmp_path / "parts" / "stage1"))


def test_no_image_is_decoded_and_no_caption_encoded(
    arguments: list[str], caches: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = build_here([*arguments, f"data.cache={caches['modern']}", f"run_dir={tmp_path / 'run'}"])
    called: list[str] = []
    monkeypatch.setattr("paradiffusion.data.loader.decode", lambda *_: called.append("decode"))
    setup.encoder.register_forward_pre_hook(lambda *_: called.append("encoder"))
    setup.codec.vae.encoder.register_forward_pre_hook(lambda *_: called.append("codec"))
    found, _ = inputs(setup, 4)
    assert len(found) == 4 and not called


def test_another_configuration_is_refused(arguments: list[str], caches: dict[str, Path], tmp_path: Path) -> None:
    here = [*arguments, f"data.cache={caches['modern']}", f"run_dir={tmp_path / 'run'}"]
    for change, sentence in (
        ("conditioning.layer_tap=last", "text features made with conditioning.layer_tap='mean', .* says 'last'"),
        ("conditioning.prefix=Say:", "conditioning.prefix='Describe it:', and this command says 'Say:'"),
        ("conditioning.max_tokens=32", "conditioning.max_tokens=24, and this command says 32"),
        ("conditioning.mask_padding=false", "conditioning.mask_padding=True, and this command says False"),
        ("data.resolution=80", "latents made with data.resolution=64, and this command says 80"),
        ("codec.dtype=bfloat16", "latents made with codec.dtype='float32', and this command says 'bfloat16'"),
        ("data.captions={clean: 1}", r"data.captions=\['long', 'short'\], and this command says \['clean'\]"),
    ):
        user_error(f"{sentence}.*scripts/cache.py what=(latents|text) preset=nano stage=1", build_here, [*here, change])
    # Fewer kinds need no other cache. One sample has no short caption, so that its long one stands in: it is cached too.
    assert inputs(build_here([*here, "data.captions={short: 1}"]), 12)[1].bad == 1
    assert folders_of(caches["modern"] / "text") == {"text": caches["modern"] / "text"} and folders_of(tmp_path) == {}
    user_error("holds no cache.*scripts/cache.py what=both preset=nano stage=1", build_here, [*here, f"data.cache={tmp_path}"])


def test_cached_text_is_refused_where_the_adapter_is_trained(arguments: list[str], caches: dict[str, Path], tmp_path: Path) -> None:
    second = [*arguments, "stage=2", "init_from=scratch", f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(UserError, match="train_text=lora trains the language model's adapter.*data.cache=.*/latents"):
        build_here([*second, f"data.cache={caches['modern']}"])
    setup = build_here([*second, f"data.cache={caches['modern'] / 'latents'}"])
    assert inputs(setup, 1)[0][0].ids is not None
    user_error("cannot be cached; what=latents caches the images alone", make, second, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_adapter_of_stage_3_belongs_to_the_key(arguments: list[str], tmp_path: Path) -> None:
    third = [*arguments, "stage=3", f"run_dir={tmp_path / 'run'}"]
    cache = tmp_path / "cache"
    user_error("stage 3 starts from stage 2", make, third, cache, what="text")
    for more in (["stage=1", "max_steps=1"], ["stage=2", "max_steps=2", "checkpoint_every=1", "keep_last=5"]):
        assert train_here([*arguments, *more, f"run_dir={tmp_path / 'run'}"]) == 0
    assert make(third, cache, what="text") == 0
    plain = inputs(build_here(third), 2)[0]
    cached = inputs(build_here([*third, f"data.cache={cache}"]), 2)[0]
    for one, other in zip(plain, cached, strict=True):
        assert one.mask is not None and one.features is not None and other.features is not None
        torch.testing.assert_close(one.features[one.mask], other.features[one.mask], rtol=1e-4, atol=1e-5)
    earlier = tmp_path / "run" / "stage2" / "checkpoints" / "step_000001"
    user_error("lora.hash=", build_here, [*third, f"data.cache={cache}", f"init_from={earlier}"])


def test_a_shard_that_was_never_cached(arguments: list[str], caches: dict[str, Path], data: Path, tmp_path: Path) -> None:
    more = tmp_path / "more"
    shutil.copytree(data, more)
    write_shards((sample(number) for number in range(100, 105)), tmp_path / "new", 5)
    shutil.move(tmp_path / "new" / "000000.tar", more / "000009.tar")
    here = [*arguments, f"data.shards={more}", f"run_dir={tmp_path / 'run'}", f"data.cache={caches['modern']}"]
    user_error(r"lacks 1 of 4 shards \(5 of 53 samples\), .*000009.tar the first", build_here, here)
    cache = tmp_path / "cache"
    shutil.copytree(caches["modern"], cache)
    assert make([*arguments, f"data.shards={more}"], cache) == 0
    assert len(list((cache / "latents").glob("*.tar"))) == 4
    build_here([*here, f"data.cache={cache}"])


def test_a_caption_that_has_changed_is_not_trained_on_with_old_features(arguments: list[str], tmp_path: Path) -> None:
    changed, cache = tmp_path / "data", tmp_path / "cache"

    def write(told: str) -> None:
        captions = {"a": told, **{str(number): "other words" for number in range(7)}}
        members = [(f"{key}.{end}", encoded(picture(ord(key))) if end == "png" else as_json(caption=text))
                   for key, text in captions.items() for end in ("png", "json")]  # fmt: skip
        write_tar(changed / "0.tar", members)

    def bad() -> list[str]:
        loader = build_here([*here, f"data.cache={cache}"]).loader()
        return [str(failure) for batch in (next(loader), next(loader)) for failure in batch.failures]

    here = [*arguments, f"data.shards={changed}", "data.captions={short: 1}", f"run_dir={tmp_path / 'run'}"]
    write("a red circle")
    assert make(here, cache) == 0
    write("a blue square")  # as many words
    user_error("lacks 1 of 1 shards .*which was never cached or has changed", bad)
    assert make(here, cache) == 0  # which makes that shard's features again, though its file is there
    assert not bad()


def test_remote_shards(arguments: list[str], data: Path, caches: dict[str, Path], tmp_path: Path) -> None:
    """Shards behind a server have the cache that the same shards have on a disk, and with it their images are not asked for."""
    here = [*arguments, f"run_dir={tmp_path / 'run'}", f"data.index_dir={tmp_path / 'indexes'}", "data.workers=0"]
    with serving(data) as server:
        here.append(f"data.shards={server.url}{{000000..000002}}.tar")
        assert make(here, tmp_path / "cache") == 0
        for kind in ("latents", "text"):
            files = sorted((tmp_path / "cache" / kind).glob("*.tar"))
            assert len(files) == 3 + (kind == "text")
            for file in files:
                assert file.read_bytes() == (caches["modern"] / kind / file.name).read_bytes()
        setup = build_here([*here, f"data.cache={caches['modern']}"])
        before = server.bytes_sent
        assert inputs(setup, 4)[1].samples == 16
        assert 0 < server.bytes_sent - before < 16 * 1024  # captions; an image has about 12 kB


def test_the_preflight_tries_what_will_run(tiny_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = [*tiny_arguments, "stage=1", "conditioning.max_tokens=32", f"run_dir={tmp_path / 'run'}"]
    assert make(here, tmp_path / "cache") == 0
    encoded: list[int] = []
    monkeypatch.setattr(Codec, "encode", lambda self, images, noise=None: encoded.append(len(images)))
    AcceleratorState._reset_state(reset_partial_state=True)
    config = compose_train([*here, f"data.cache={tmp_path / 'cache'}", "validation.samples=0"])
    found = preflight(config, make_accelerator(config))
    assert found.step > 0 and not encoded


def test_frozen_models_stay_off_the_device_where_nothing_needs_them(
    arguments: list[str], caches: dict[str, Path], demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[type] = []

    def to(self: torch.nn.Module, *_: Any, **__: Any) -> torch.nn.Module:
        moved.append(type(self))
        return self

    for model in (Codec, TextEncoder):
        monkeypatch.setattr(model, "to", to)
    held_out = [f"data.val_shards={demo_folder / 'val'}", f"run_dir={tmp_path / 'run'}"]
    cached = [*arguments, *held_out, f"data.cache={caches['modern']}"]
    expected: dict[str, set[type]] = {"validation.samples=0": set(), "validation.samples=2": {Codec, TextEncoder}}
    for more, models in expected.items():
        moved.clear()
        build_here([*cached, more])
        assert set(moved) == models
    moved.clear()
    build_here([*arguments, *held_out, "validation.samples=0", f"data.cache={caches['modern'] / 'text'}"])
    assert set(moved) == {Codec}


def test_a_damaged_file_is_one_sentence_and_is_made_again(
    arguments: list[str], caches: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(caches["modern"], cache)
    first, second, third = sorted((cache / "latents").glob("*.tar"))
    whole, times = second.read_bytes(), [path.stat().st_mtime_ns for path in (first, third)]
    second.write_bytes(whole[:-100])
    here = [*arguments, f"run_dir={tmp_path / 'run'}", f"data.cache={cache}"]
    user_error(f"{second.name} is missing or cut short.*output={cache}", build_here, here)
    capsys.readouterr()
    assert make(arguments, cache, what="latents") == 0
    assert "48 samples in 3 files" in capsys.readouterr().out
    assert second.read_bytes() == whole and [path.stat().st_mtime_ns for path in (first, third)] == times
    (cache / "text" / KEY_FILE).write_text("{")
    user_error(r"text/key.json is no key of a cache", build_here, here)


def test_a_cache_of_an_earlier_format_is_refused_with_the_command_that_makes_it_anew(
    arguments: list[str], caches: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "cache" / "latents"
    folder.mkdir(parents=True)
    key = json.loads((caches["modern"] / "latents" / KEY_FILE).read_text())
    assert key["about"]["samples"] == 48 and key["about"]["shards"] == 3
    (folder / KEY_FILE).write_text(json.dumps({**key, "format_version": 1}))
    said = f"format_version 1.*scripts/cache.py what=latents output={tmp_path / 'cache'}`"
    for here in (folder, folder.parent):
        user_error(said, build_here, [*arguments, f"data.cache={here}", f"run_dir={tmp_path / 'run'}"])
    user_error("format_version 1", make, arguments, tmp_path / "cache", what="latents")


def test_what_is_made_is_not_mixed(arguments: list[str], caches: dict[str, Path], tmp_path: Path) -> None:
    for more, options, said in (
        (["conditioning.prefix=Say:"], {"what": "text"}, "this command says 'Say:'; choose another output="),
        ([], {"what": "latents", "dtype": "bfloat16"}, "dtype='float32', and this command says 'bfloat16'"),
    ):
        user_error(said, make, [*arguments, *more], caches["modern"], **options)
    half = tmp_path / "half"
    assert make(arguments, half, dtype="bfloat16") == 0
    sizes = [sum(path.stat().st_size for path in (root / "text").glob("0*.tar")) for root in (half, caches["modern"])]
    assert sizes[0] < 0.6 * sizes[1]
    build_here([*arguments, f"run_dir={tmp_path / 'run'}", f"data.cache={half}"])


def test_the_version_of_the_pixels_changes_with_the_pixels() -> None:
    # Another crop, filter or background makes other latents: then PIXELS_VERSION must change, and these numbers with it.
    ramp = np.arange(24, dtype=np.uint8)[:, None].repeat(16, axis=1) * 10
    found = to_array(Image.fromarray(ramp).convert("RGB"), (8, 8), 7)[:, 0, 0]
    clear = decode(encoded(Image.new("RGBA", (2, 2), (9, 9, 9, 0))))
    assert clear.getpixel((0, 0)) == (255, 255, 255)
    assert PIXELS_VERSION == "crop 1, lanczos, JPEG reduced, on white, profiles to sRGB"
    # The window's place is drawn from the sample's id; another release of Pillow may round differently.
    assert np.abs(found.astype(int) - [78, 98, 118, 138, 158, 178, 197, 220]).max() <= 1


@pytest.fixture(scope="module")
def plain(tiny_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Twelve shards of two samples."""
    folder = tmp_path_factory.mktemp("faults_data")
    write_shards((sample(number) for number in range(24)), folder, 2)
    more = ["stage=1", "data.captions={short: 0.5, long: 0.5}", "conditioning.max_tokens=24", "log_every=1"]
    return [*tiny_arguments, *more, f"data.shards={folder}", "data.max_bad_fraction=0.5"]


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
def latents(plain: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of latents, to be copied."""
    cache = tmp_path_factory.mktemp("cache") / "cache"
    assert make(plain, cache, what="latents") == 0
    return cache


def test_a_cache_is_made_of_ordinary_shards(latents: Path) -> None:
    tars = sorted(str(path) for path in (latents / "latents").glob("*.tar"))
    samples = [load(sample["safetensors"]) for sample in webdataset.WebDataset(tars, shardshuffle=False)]
    assert len(samples) == 24 and all(sample["values"].shape[:2] == (2, 4) for sample in samples)


def test_training_replaces_what_is_damaged(plain: list[str], latents: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(latents, tmp_path / "cache")
    damaged = sorted((cache / "latents").glob("*.tar"))[0]
    flip(damaged, "values")
    assert train_here([*plain, f"data.cache={cache}", f"run_dir={tmp_path / 'run'}", "max_steps=6"]) == 0
    assert sum(row["bad_samples"] for row in records(tmp_path / "run" / "stage1")) == 1  # of 24 samples, all seen once
    damaged.unlink()
    assert make(plain, cache, what="latents") == 0
    assert train_here([*plain, f"data.cache={cache}", f"run_dir={tmp_path / 'again'}", "max_steps=6"]) == 0
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
    here = [*tiny_arguments, "stage=1", f"data.sources=[{sources}]", "log_every=1", "data.max_bad_fraction=1", "max_steps=4"]
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


def test_entries_are_made_and_dropped_one_by_one(tiny_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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

    here = [*tiny_arguments, "stage=1", f"data.folder={folder}", "log_every=1", "max_steps=4", "data.max_bad_fraction=0"]
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
    user_error("lacks 1 of 1 shards", build_here, [*cached, f"run_dir={tmp_path / 'stale'}"])
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


def test_shards_of_another_name_keep_their_entries(tiny_arguments: list[str], tmp_path: Path) -> None:
    for name, numbers in (("a", range(8)), ("b", range(6))):  # a set, and most of it
        (shard,) = write_shards((sample(number) for number in numbers), tmp_path / name, 8)
        path = shard.rename(shard.with_name(f"{name}.tar"))
        assert make([*tiny_arguments, "stage=1", f"data.shards={path}"], tmp_path / "cache") == 0
    for kind in ("latents", "text"):
        assert {path.name[0] for path in (tmp_path / "cache" / kind).glob("*-*.tar")} == {"a", "b"}, kind


def test_shards_added_with_fewer_kinds_get_all_of_the_cache(plain: list[str], tmp_path: Path) -> None:
    data, cache = tmp_path / "data", tmp_path / "cache"
    write_shards((sample(number) for number in range(8)), data, 8)
    here = [*plain, f"data.shards={data}", "data.max_bad_fraction=0"]
    assert make(here, cache, what="text") == 0
    write_shards((sample(number) for number in range(16)), data, 8)
    assert make([*here, "data.captions={short: 1}"], cache, what="text") == 0
    assert train_here([*here, f"data.cache={cache}", f"run_dir={tmp_path / 'run'}", "max_steps=8"]) == 0
    assert not any(row["bad_samples"] for row in records(tmp_path / "run" / "stage1"))


def test_what_is_not_finite_is_never_cached(plain: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    posterior, encode = Codec.posterior, TextEncoder.forward
    for factor, key in ((float("nan"), "codec.dtype"), (1e8, "dtype")):
        scaled = lambda self, images, by=factor: tuple(part * by for part in posterior(self, images))  # noqa: E731
        monkeypatch.setattr(Codec, "posterior", scaled)
        cache = tmp_path / str(factor)
        sentence = rf"the latents of 000000.tar/\d+ .*not finite numbers.* set {key}=bfloat16 or {key}=float32"
        user_error(sentence, make, plain, cache, what="latents", dtype="float16")
        assert not list(cache.rglob("*.tar")) and not list(cache.rglob(".*"))
    monkeypatch.setattr(TextEncoder, "forward", lambda *a, **k: encode(*a, **k) * float("inf"))
    user_error(r"the features of '.*not finite numbers.* set text_encoder.dtype=", make, plain, tmp_path / "text", what="text")


def test_other_weights_or_another_tokenizer_are_noticed(plain: list[str], tmp_path: Path) -> None:
    """Tuned layers in the middle of a file, and settings beside it, change no end of a file of weights."""
    setup = build_here([*plain, f"run_dir={tmp_path / 'run'}"])
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
    assert make(plain, cache) == 0
    for kind, part in (("latents", "codec.weights"), ("text", "text_encoder.weights"), ("text", "text_encoder.tokenizer")):
        path = cache / kind / "key.json"
        kept = path.read_text()
        stored = json.loads(kept)
        stored["key"][part] = "another"
        path.write_text(json.dumps(stored))
        with pytest.raises(UserError, match=f"made with {part}='another', and this command says"):
            build_here([*plain, f"data.cache={cache}", f"run_dir={tmp_path / 'cached'}"])
        path.write_text(kept)
    # How far batches are padded is no part of a cache.
    build_here([*plain, "conditioning.pad_multiple=32", f"data.cache={cache}", f"run_dir={tmp_path / 'padded'}"])


def test_captions_are_read_without_their_images(plain: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, sizes = caching.read_place, []

    def counted(place: Any) -> Any:
        raw = read(place)
        sizes.append(len(raw.image))
        return raw

    monkeypatch.setattr(caching, "read_place", counted)
    assert make(plain, tmp_path / "cache", what="text") == 0
    assert sizes == [0] * 24


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_processes_make_what_one_makes(plain: list[str], tmp_path: Path) -> None:
    ended, said = run_on_two("scripts/cache.py", *plain, f"output={tmp_path / 'two'}")
    assert ended == [0, 0], said
    assert said.count("24 samples in 12 files") == 2  # latents and text, each told once
    assert make_cache(compose_train(plain), CacheOptions(output=str(tmp_path / "one"))) == 0
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert len(one) == 2 * (2 * 12 + 1) + 2 and one == two  # each tar with its index, and a key


def test_a_stopped_run_goes_on_after_its_last_whole_shard(plain: list[str], tmp_path: Path) -> None:
    # Large pictures one by one, so that there is time to stop.
    slow, folder = [*plain, "data.resolution=256"], tmp_path / "cache" / "latents"
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
        assert make_cache(compose_train(slow), CacheOptions(output=str(tmp_path / name), what="latents", at_once=1)) == 0
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
