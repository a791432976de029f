"""What frozen models made, kept in memory: made once, the same beside anything, within its limit; noise of several levels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_runs import Train, newest, records

from paradiffusion import machine
from paradiffusion.compose import compose_train
from paradiffusion.config import CodecConfig, ConditioningConfig, TextEncoderConfig
from paradiffusion.data.loader import Batch
from paradiffusion.models.codec import load_codec
from paradiffusion.text.encoder import load_text_encoder
from paradiffusion.text.tokenizer import tokenize_once
from paradiffusion.training.inputs import ROWS, Inputs, Memory, draw_noise, draw_uniform, latents_of, stored_text

CPU = torch.device("cpu")
MASKED = ConditioningConfig(layer_tap="mean", mask_padding=True, max_tokens=32)
ATTENDED = ConditioningConfig(max_tokens=32)
LONG = "a red circle at the top, a small blue star under it and nothing else"
Make = Callable[..., Memory]


@pytest.fixture
def make(codec_folder: Path) -> Make:
    def memory(settings: ConditioningConfig = MASKED, gigabytes: float = 1.0) -> Memory:
        encoder = load_text_encoder(TextEncoderConfig(), settings)
        return Memory(encoder, load_codec(CodecConfig(path=str(codec_folder))), gigabytes, CPU)

    return memory


def calls_of(module: nn.Module) -> list[int]:
    """The batch size of each of the module's calls from now on."""
    calls: list[int] = []
    module.register_forward_hook(lambda _module, _given, out: calls.append(len(out)))
    return calls


def text(memory: Memory, *captions: str) -> tuple[Tensor, Tensor | None]:
    made = memory.texts(captions)
    found = stored_text(memory.encoder, made, list(captions), CPU)
    return found.features, found.mask


def one(memory: Memory, caption: str) -> Tensor:
    return memory.texts([caption])[caption].values


def batch(*keys: str) -> Batch:
    """Images that are a function of their key."""
    pixels = [torch.full((3, 32, 32), ord(key), dtype=torch.uint8) for key in keys]
    return Batch(
        torch.stack(pixels), captions=["" for _ in keys], kinds=["" for _ in keys], keys=list(keys), readable=[True for _ in keys],
        taken=range(len(keys)),
    )  # fmt: skip


def test_each_caption_is_read_once_and_is_the_same_beside_any_other(make: Make) -> None:
    memory, other = make(), make()
    calls = calls_of(memory.encoder)
    first, mask = text(memory, "a star", LONG, "a star", "")
    again, _ = text(memory, "", "a star")
    assert calls == [ROWS, ROWS], "two lengths, and each call of one size"
    alone, alone_mask = text(other, "a star")
    assert mask is not None and alone_mask is not None
    real = alone[0, alone_mask[0]]
    assert torch.equal(first[0, mask[0]], real) and torch.equal(first[2, mask[2]], real)
    assert torch.equal(again[1, : len(real)], real) and not torch.equal(first[1, : len(real)], real)
    tokens = other.encoder.tokenize([LONG])
    direct = other.encoder(tokens.ids, tokens.mask, tokens.prefix)[0, tokens.mask[0]]
    torch.testing.assert_close(first[1, mask[1]], direct, atol=0.02, rtol=0.01)  # bfloat16


@pytest.mark.parametrize("settings", [MASKED, ATTENDED], ids=["masked", "attended"])
def test_the_null_prompt_is_read_once_beside_any_other(settings: ConditioningConfig, make: Make) -> None:
    """On a GPU (tests/gpu); here with its numbers."""
    memory = make(settings)
    encoder = memory.encoder
    nothing: Any = None  # that only other inputs need
    inputs = Inputs(nothing, encoder, memory.codec, nothing, CPU)
    calls = calls_of(encoder)
    for captions in (["a star", "", LONG, ""], ["", "", "a star"], [""]):
        tokens, rows = tokenize_once(encoder.tokenize, captions)
        found = inputs._read_without_null(tokens, rows, captions.index(""))
        expected, mask = encoder(tokens.ids, tokens.mask, tokens.prefix)[rows], encoder.feature_mask(tokens)
        if mask is not None:
            expected, found["features"] = (values * mask[rows, :, None] for values in (expected, found["features"]))
            assert torch.equal(found["mask"], mask[rows])
        torch.testing.assert_close(found["features"], expected)
    assert calls == [1, 2, 3, 1, 2, 1], "itself; two others, and all three; one other, and both; nothing, and the reference"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_company_does_not_change_a_bit_of_the_real_language_model(precision: str, codec_folder: Path) -> None:
    """Captions of the built-in scenes among many and among few, in another order: what a resumed run comes upon."""
    if precision == "bf16" and machine.settled_precision("auto") == "fp32":
        pytest.skip("bfloat16 is slower than fp32 here, or emulated")
    config = compose_train(["preset=nano", "stage=1"])
    captions = [f"A {size} {colour} circle stands at the top {side}. " * 3 for size in ("small", "large")
                for colour in ("red", "dark green") for side in ("left", "right")]  # fmt: skip
    codec = load_codec(CodecConfig(path=str(codec_folder)))
    encoder = load_text_encoder(config.text_encoder, config.conditioning)
    cast = lambda: torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")  # noqa: E731
    several, few = (Memory(encoder, codec, 1, CPU, cast) for _ in range(2))
    among_many = several.texts(captions)
    for chosen in (captions[3:5], captions[5:], captions[:2], captions[::-1]):
        for caption, entry in few.texts(chosen).items():
            assert torch.equal(entry.values, among_many[caption].values)


def test_each_image_is_encoded_once_and_is_the_same_beside_any_other(make: Make) -> None:
    memory = make()
    calls = calls_of(memory.codec.vae.encoder)
    first = latents_of(memory.codec, batch("a", "b"), None, CPU, memory)
    again = latents_of(memory.codec, batch("b", "c", "a"), None, CPU, memory)
    assert calls == [ROWS, ROWS], "two images, then one, and each call of one size"
    assert torch.equal(again[0], first[1]) and torch.equal(again[2], first[0])
    noise = torch.ones_like(first)
    drawn = latents_of(memory.codec, batch("a", "b"), noise, CPU, memory)
    expected = memory.codec.encode((batch("a", "b").pixels.float() / 127.5) - 1, noise)
    torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=1e-4)
    assert len(calls) == 3, "the posterior is kept, not a draw from it"
    # Shards of two sources often have the same names, and their samples the same keys.
    other = batch("d")
    other.keys = ["a"]
    torch.testing.assert_close(latents_of(memory.codec, other, None, CPU, memory), latents_of(memory.codec, batch("d"), None, CPU, make()))
    assert len(calls) == 4


def test_what_does_not_fit_is_made_each_time(make: Make) -> None:
    size = one(make(), "a star").nbytes
    memory = make(gigabytes=1.5 * size / 1e9)
    calls = calls_of(memory.encoder)
    kept, made = ([one(memory, caption) for _ in range(3)] for caption in ("a star", LONG))
    assert len(calls) == 1 + 3
    assert all(torch.equal(again, made[0]) for again in [*made, one(make(), LONG)]) and torch.equal(kept[0], kept[2])


def test_padding_that_is_attended_to_is_kept_whole(make: Make) -> None:
    memory = make(ATTENDED)
    features, mask = text(memory, "a star", LONG)
    assert mask is None and features.shape[:2] == (2, 32)
    tokens = memory.encoder.tokenize(["a star"])
    direct = memory.encoder(tokens.ids, tokens.mask, tokens.prefix)[0]
    assert torch.equal(features[0], direct.to(torch.bfloat16).float())
    assert one(make(MASKED), "a star").shape[0] < 32


# ---- several noise levels of a sample -------------------------------------------------------------------------------


def test_noise_is_a_function_of_seed_step_slot_and_repeat() -> None:
    def draw(slots: list[int], repeats: int, seed: int = 1, step: int = 5) -> Tensor:
        return draw_noise(seed, step, torch.tensor(slots), (2, 3), "noise", repeats)

    four = draw([0, 1, 2, 3], 2).view(2, 4, 2, 3)
    assert torch.equal(four[0], draw([0, 1, 2, 3], 1)), "the first repeat is what one repeat gives"
    assert torch.equal(four[:, [1, 3]].flatten(0, 1), draw([1, 3], 2)), "another process has the same of its slots"
    assert torch.equal(draw([0, 1, 2, 3], 3)[:8], draw([0, 1, 2, 3], 2))
    every = torch.cat([four.flatten(0, 1), draw([0], 1, seed=2), draw([0], 1, step=6)])
    assert len(every.flatten(1).unique(dim=0)) == 10


def test_times_are_spread_over_all_repeats_of_the_whole_batch() -> None:
    def draw(slots: list[int], seed: int = 1, step: int = 5) -> Tensor:
        return draw_uniform(seed, step, torch.tensor(slots), 4, repeats=2)

    every = draw([0, 1, 2, 3])
    assert every.shape == (8,) and ((every >= 0) & (every < 1)).all()
    torch.testing.assert_close(every.sort().values.diff(), torch.full((7,), 1 / 8, dtype=every.dtype))
    assert torch.equal(torch.cat([draw([0, 2]), draw([1, 3])]), every.view(2, 2, 2).permute(2, 0, 1).flatten())
    assert not torch.equal(draw([0, 1, 2, 3], step=6), every) and not torch.equal(draw([0, 1, 2, 3], seed=2), every)


# ---- precision, and what is logged ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vendor", "flags", "settled"),
    [
        ("GenuineIntel", "avx2 avx512f", "fp32"),
        ("GenuineIntel", "avx512_bf16 amx_bf16", "bf16"),
        ("GenuineIntel", "avx512f avx512_bf16", "fp32"),  # half as fast as fp32 there
        ("AuthenticAMD", "avx512f avx512_bf16", "bf16"),
        ("AuthenticAMD", None, "fp32"),  # a system without /proc
    ],
)
def test_auto_settles_by_what_the_processor_multiplies(
    vendor: str, flags: str | None, settled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpuinfo"
    if flags is not None:
        file.write_text(f"processor : 0\nvendor_id : {vendor}\nflags : fpu {flags}\n")
    monkeypatch.setattr(machine, "Path", lambda _: file)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert compose_train(["precision=auto"]).precision == settled
    assert compose_train(["precision=bf16"]).precision == "bf16"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for has in (False, True):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has=has: has)
        assert machine.settled_precision("auto") == ("bf16" if has else "fp32")


def test_the_layout_loss_is_a_number_of_its_own(train: Train, tmp_path: Path) -> None:
    """Runs that hardly move, so that they differ by the weight of that loss alone."""
    still = ["max_steps=2", "log_every=1", "optimizer.lr=1e-30", "optimizer.lr_conditioning=1e-30"]
    seen = []
    for change in ("objective.layout_weight=0", "objective.layout_weight=1000", "conditioning.layout_patch=0"):
        run = tmp_path / change
        assert train(*still, change, f"run_dir='{run}'") == 0
        rows, state = records(run / "stage1"), newest(run / "stage1") / "training_state" / "state.json"
        held_out = json.loads((run / "stage1" / "summary.json").read_text())["validation"]
        losses = [row["loss"] for row in rows], [row.get("loss_layout") for row in rows], held_out
        seen.append((*losses, json.loads(state.read_text())["typical_loss"]))
    light, heavy, none = seen
    assert light == heavy and all(value > 0 for value in light[1])
    assert light[2].keys() >= {"loss_short", "loss_long"} and none[1] == [None, None]
    assert heavy[3] < 100 < 1000 * heavy[1][0], "the average that spikes are measured against holds it"
