"""Cached latents and text features: the same training, and a refusal wherever they would not be the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from data_fixtures import as_json, encoded, picture, sample, write_tar
from PIL import Image
from remote_fixtures import serving
from training_runs import assert_same_bits, build_here, newest, records, train_here

from paradiffusion.compose import compose_train
from paradiffusion.data.cache import KEY_FILE, PIXELS_VERSION, folders_of
from paradiffusion.data.images import decode, to_array
from paradiffusion.data.shards import write_shards
from paradiffusion.errors import UserError
from paradiffusion.models.codec import Codec
from paradiffusion.models.joint import LossBatch
from paradiffusion.text.encoder import TextEncoder
from paradiffusion.training.caching import CacheOptions, make_cache
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


@pytest.mark.parametrize(
    ("arm", "kinds"), [("modern", "both"), ("paper", "both"), ("modern", "latents"), ("modern", "text")]
)
def test_the_model_gets_the_same_inputs(
    arguments: list[str], caches: dict[str, Path], arm: str, kinds: str, tmp_path: Path
) -> None:
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


def test_losses_are_those_of_training_without_a_cache(
    arguments: list[str], caches: dict[str, Path], tmp_path: Path
) -> None:
    """And a run that was stopped in the middle ends in the same bits."""
    arguments = [*arguments, "data.workers=1", "checkpoint_every=3"]
    cached = [*arguments, f"data.cache={caches['modern']}"]
    for name, typed in (
        ("plain", arguments),
        ("cached", cached),
        ("parts", [*cached, "max_steps=5"]),
        ("parts", cached),
    ):
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
        with pytest.raises(UserError, match=f"{sentence}.*scripts/cache.py what=(latents|text) preset=nano stage=1"):
            build_here([*here, change])
    # Fewer kinds need no other cache. One sample has no short caption, so that its long one stands in: it is cached too.
    assert inputs(build_here([*here, "data.captions={short: 1}"]), 12)[1].bad == 1
    assert folders_of(caches["modern"] / "text") == {"text": caches["modern"] / "text"} and folders_of(tmp_path) == {}
    with pytest.raises(UserError, match="holds no cache.*scripts/cache.py what=both preset=nano stage=1"):
        build_here([*here, f"data.cache={tmp_path}"])


def test_cached_text_is_refused_where_the_adapter_is_trained(
    arguments: list[str], caches: dict[str, Path], tmp_path: Path
) -> None:
    second = [*arguments, "stage=2", "init_from=scratch", f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(UserError, match="train_text=lora trains the language model's adapter.*data.cache=.*/latents"):
        build_here([*second, f"data.cache={caches['modern']}"])
    setup = build_here([*second, f"data.cache={caches['modern'] / 'latents'}"])
    assert inputs(setup, 1)[0][0].ids is not None
    with pytest.raises(UserError, match="cannot be cached; what=latents caches the images alone"):
        make(second, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_adapter_of_stage_3_belongs_to_the_key(arguments: list[str], tmp_path: Path) -> None:
    third = [*arguments, "stage=3", f"run_dir={tmp_path / 'run'}"]
    cache = tmp_path / "cache"
    with pytest.raises(UserError, match="stage 3 starts from stage 2"):
        make(third, cache, what="text")
    for more in (["stage=1", "max_steps=1"], ["stage=2", "max_steps=2", "checkpoint_every=1", "keep_last=5"]):
        assert train_here([*arguments, *more, f"run_dir={tmp_path / 'run'}"]) == 0
    assert make(third, cache, what="text") == 0
    plain = inputs(build_here(third), 2)[0]
    cached = inputs(build_here([*third, f"data.cache={cache}"]), 2)[0]
    for one, other in zip(plain, cached, strict=True):
        assert one.mask is not None and one.features is not None and other.features is not None
        torch.testing.assert_close(one.features[one.mask], other.features[one.mask], rtol=1e-4, atol=1e-5)
    earlier = tmp_path / "run" / "stage2" / "checkpoints" / "step_000001"
    with pytest.raises(UserError, match="lora.hash="):
        build_here([*third, f"data.cache={cache}", f"init_from={earlier}"])


def test_a_shard_that_was_never_cached(
    arguments: list[str], caches: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    more = tmp_path / "more"
    shutil.copytree(data, more)
    write_shards((sample(number) for number in range(100, 105)), tmp_path / "new", 5)
    shutil.move(tmp_path / "new" / "000000.tar", more / "000009.tar")
    here = [*arguments, f"data.shards={more}", f"run_dir={tmp_path / 'run'}", f"data.cache={caches['modern']}"]
    with pytest.raises(UserError, match=r"lacks 1 of 4 shards \(5 of 53 samples\), .*000009.tar the first"):
        build_here(here)
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
        return [line for batch in (next(loader), next(loader)) for line in batch.bad]

    here = [*arguments, f"data.shards={changed}", "data.captions={short: 1}", f"run_dir={tmp_path / 'run'}"]
    write("a red circle")
    assert make(here, cache) == 0
    write("a blue square")  # as many words
    with pytest.raises(UserError, match="lacks 1 of 1 shards .*which was never cached or has changed"):
        bad()
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


def test_the_preflight_tries_what_will_run(
    tiny_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    with pytest.raises(UserError, match=f"{second.name} is missing or cut short.*output={cache}"):
        build_here(here)
    capsys.readouterr()
    assert make(arguments, cache, what="latents") == 0
    assert "48 samples in 3 files" in capsys.readouterr().out
    assert second.read_bytes() == whole and [path.stat().st_mtime_ns for path in (first, third)] == times
    (cache / "text" / KEY_FILE).write_text("{")
    with pytest.raises(UserError, match=r"text/key.json is no key of a cache"):
        build_here(here)


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
        with pytest.raises(UserError, match=said):
            build_here([*arguments, f"data.cache={here}", f"run_dir={tmp_path / 'run'}"])
    with pytest.raises(UserError, match="format_version 1"):
        make(arguments, tmp_path / "cache", what="latents")


def test_what_is_made_is_not_mixed(arguments: list[str], caches: dict[str, Path], tmp_path: Path) -> None:
    for more, options, said in (
        (["conditioning.prefix=Say:"], {"what": "text"}, "this command says 'Say:'; choose another output="),
        ([], {"what": "latents", "dtype": "bfloat16"}, "dtype='float32', and this command says 'bfloat16'"),
    ):
        with pytest.raises(UserError, match=said):
            make([*arguments, *more], caches["modern"], **options)
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
