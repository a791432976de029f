"""scripts/describe.py: counts against hand counts and the paper's table, memory against real tensors, and what it says."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import user_error
from programs import script

from paradiffusion.budget.activations import peak_bytes
from paradiffusion.budget.describe import Description, Question, as_text, describe, least_recomputation, parse_question, throughput
from paradiffusion.budget.empty import empty_models
from paradiffusion.budget.flops import DEVICES, StageFlops, count, recognise, stage_flops
from paradiffusion.budget.memory import GIB, LAUNCHES, Fitter, measure_training
from paradiffusion.compose import compose_train
from paradiffusion.config import TrainConfig
from paradiffusion.errors import UserError
from paradiffusion.models.unet import build_unet, empty_unet
from paradiffusion.text.refiner import Refiner
from paradiffusion.training.engine import check_launch

PAPER = ["preset=paper", "data.shards=unused"]
# The paper's arm with the smallest models: stage 2 has everything that its memory is made of.
SMALL = [*PAPER, "stage=2", "unet=tiny", "text_encoder=tiny", "data.resolution=64", "data.bucket_multiple=16"]
# Few layers, but wide enough that each key saves something that shows.
WIDE = [
    *PAPER, "stage=2", "unet=tiny", "unet.arguments.block_out_channels=[512,1024]", "text_encoder.layers=2",
    "data.resolution=128", "data.bucket_multiple=16",
]  # fmt: skip


# Counting a stage takes seconds: each is counted and described once.
COUNTED: dict[str, StageFlops] = {}
KNOWN: dict[str, Description] = {}


def counted(config: TrainConfig) -> StageFlops:
    if repr(config) not in COUNTED:
        COUNTED[repr(config)] = stage_flops(config)
    return COUNTED[repr(config)]


@pytest.fixture(autouse=True)
def counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paradiffusion.budget.describe.stage_flops", counted)


def flops_of(*arguments: str) -> StageFlops:
    return counted(compose_train(list(arguments)))


def described(overrides: Sequence[str], question: Question) -> Description:
    """A stage's description: how it is printed and what stands beside it changes nothing."""
    key = f"{overrides} {replace(question, format='text', beside=None)}"
    if key not in KNOWN:
        KNOWN[key] = describe(overrides, question)
    return KNOWN[key]


def ask(*arguments: str) -> Description:
    question, overrides = parse_question(arguments)
    return described(overrides, question)


# ---- FLOP -----------------------------------------------------------------------------------------------------------


def test_nano_parameters_are_those_of_the_models() -> None:
    fitter = Fitter(["stage=2"], 1)
    counts = fitter.counts(fitter.config())
    hidden, rank = 576, 8
    assert counts.lora == 2 * rank * ((hidden + hidden) + (hidden + 192))  # queries and values of two layers
    layer = 2 * hidden**2 + 2 * hidden * 192 + 3 * hidden * 1536 + 2 * hidden
    assert counts.text == 49152 * hidden + 2 * layer + hidden
    assert counts.projection == 192 * 192 + 192
    assert counts.trained == counts.unet + counts.projection + counts.refiner + counts.layout + counts.lora
    assert counts.total == counts.trained + counts.text + counts.vae


@pytest.mark.parametrize(
    ("side", "tokens", "unet", "text"),
    [(256, 256, 0.247, 3.35), (512, 256, 0.897, 3.35), (1024, 512, 3.85, 6.77)],
)  # fmt: skip
def test_the_papers_table(side: int, tokens: int, unet: float, text: float) -> None:
    arguments = ["stage=1", f"data.resolution={side}", f"conditioning.max_tokens={tokens}"]
    models = empty_models(compose_train([*PAPER, *arguments]))
    latents, features = torch.empty(1, 4, side // 8, side // 8, device="meta"), models.batch(1).features
    times = torch.empty(1, device="meta")
    found, _ = count(lambda: models.joint.denoise(latents, times, features, None))
    assert found / 1e12 == pytest.approx(unet, rel=0.03)
    if side != 256:
        assert count(lambda: models.read_text(1))[0] / 1e12 == pytest.approx(text, rel=0.03)


def test_lora_on_a_frozen_model_costs_twice_its_forward_and_checkpointing_once_more() -> None:
    plain = flops_of(*WIDE, "gradient_checkpointing=false")
    repeated = flops_of(*WIDE, "gradient_checkpointing=true")
    # No gradient of a frozen weight is taken: 2 x, not 3 x.
    assert 1.9 < plain.text.training / plain.text.forward < 2.05
    assert plain.unet.training / plain.unet.forward == pytest.approx(3.0, rel=0.01)
    assert plain.text.recompute == plain.unet.recompute == 0
    assert repeated.text.training == plain.text.training
    assert 0.5 < repeated.text.recompute / plain.text.forward <= 1.0
    assert 0.3 < repeated.unet.recompute / plain.unet.forward <= 1.0
    assert repeated.vae.recompute == 0
    assert plain.total("text", "vae").forward == plain.unet.forward
    once, twice = ask(*SMALL).flops, flops_of(*SMALL, "repeats=2")
    assert twice.unet.training == 2 * once.unet.training and twice.text == once.text


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_the_peak_follows_tensors_from_birth_to_release() -> None:
    size = 1024 * 4
    layers = [torch.nn.Linear(32, 32, bias=False, device="meta") for _ in range(2)]

    def work() -> None:
        first = torch.empty(1024, device="meta") + 1  # two live, then one
        second = first + 1  # two
        del first
        third = second + 1  # two again
        assert third.numel() == 1024

    assert peak_bytes(work, layers) == 2 * size


def test_the_meta_device_needs_what_real_tensors_need() -> None:
    config = compose_train(SMALL)
    parts = (config.unet, config.codec, config.conditioning, 64)
    for checkpointing in (False, True):
        peaks = []
        for unet, device in ((build_unet(*parts, seed=0), "cpu"), (empty_unet(*parts), "meta")):
            if checkpointing:
                unet.enable_gradient_checkpointing()

            def work(unet: Any = unet, device: str = device) -> torch.Tensor:
                latents, times = torch.ones(2, 4, 16, 16, device=device), torch.zeros(2, device=device)
                text = torch.ones(2, 64, 64, device=device)
                return unet(latents, times, encoder_hidden_states=text, return_dict=False)[0].square().mean()

            peaks.append(peak_bytes(work, [unet]))
        assert peaks[0] == peaks[1] > 1e6


def test_checkpointing_saves_activations_and_the_micro_batch_scales_them() -> None:
    def peak(micro: int, *arguments: str) -> int:
        return measure_training(compose_train([*arguments]), micro)

    plain, repeated = (peak(8, *WIDE, "stage=1", f"gradient_checkpointing={way}") for way in ("false", "true"))
    assert repeated < 0.8 * plain
    assert 1.8 < peak(16, *WIDE, "stage=1", "gradient_checkpointing=false") / plain < 2.1
    small = [*SMALL, "gradient_checkpointing=false"]
    assert peak(8, *small) > 1.2 * peak(8, *small, "train_text=frozen")  # the language model's own activations


def test_bytes_that_are_exact() -> None:
    description = ask(*SMALL, "gpus=8", "text_encoder.dtype=bfloat16")
    trained = description.parameters.trained
    one, ddp, zero2, offload, zero3 = description.memory
    assert [m.launch for m in description.memory] == [launch.name for launch in LAUNCHES]
    assert (one.gpus, ddp.gpus) == (1, 8)
    for memory, shares in ((one, (4, 4, 8, 4)), (ddp, (4, 4, 8, 4)), (zero2, (4.5, 0.5, 1, 0.5))):
        found = (memory.weights, memory.gradients, memory.optimizer, memory.ema)
        assert found == tuple(trained * share for share in shares), memory.launch
    assert one.frozen == 2 * (description.parameters.text + description.parameters.vae)  # both in bfloat16
    assert offload.optimizer == offload.ema == 0 and offload.host == trained * 16 / 8
    assert zero3.weights == trained
    vae = 2 * description.parameters.vae
    assert zero3.frozen - vae == (one.frozen - vae) / 8  # stage 2's language model is cut as well
    assert description.checkpoint_whole == 16 * trained
    assert description.latent_bytes == 2 * 2 * 4 * 8 * 8  # mean and standard deviation, 2 bytes each


@pytest.mark.parametrize("override", ["optimizer.name=muon", "text_encoder.quantization=4bit"])
def test_no_launch_is_listed_that_the_start_refuses(override: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [*SMALL, override]
    assert [launch.name for launch in Fitter(given, 8).launches()] == ["one_gpu", "ddp"]
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    key = override.partition("=")[0]
    user_error(f"^{key} does not go with DeepSpeed; set (adamw|null),", check_launch, compose_train(given), 1)
    check_launch(compose_train(SMALL), 1)


def test_the_least_recomputation_that_fits_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    fitter = Fitter([*WIDE, "gradient_checkpointing=true", "micro_batch_size=8"], 2)
    monkeypatch.setattr(fitter, "launches", lambda: LAUNCHES[:1])
    ways = [[], ["gradient_checkpointing=half"], ["gradient_checkpointing=false"]]
    needs = [fitter.memory(LAUNCHES[0], *way).total for way in (*ways, [*ways[2], "micro_batch_size=4"])]
    assert needs[0] < needs[1] < needs[2] and needs[3] < needs[2]
    whole, half, none = (counted(fitter.config(*way)) for way in ways)
    flops = [found.total().training + found.total().recompute for found in (whole, half, none)]
    assert flops[0] > flops[1] > flops[2]
    assert half.text.recompute < 0.6 * whole.text.recompute and half.unet.recompute == 0
    for room, override, computed in (
        (needs[2], "gradient_checkpointing=false", flops[2]),
        (needs[3], "gradient_checkpointing=false micro_batch_size=4", flops[2]),
    ):
        found = least_recomputation(fitter, room / 0.94, whole)
        (chosen,) = found
        assert chosen.override == override and chosen.total == room
        assert chosen.speed_up == pytest.approx(flops[0] / computed)
        assert f"fits by {override} (one GPU" in as_text(replace(ask(*SMALL), recomputation=found))
    assert not least_recomputation(fitter, needs[0] / 2, whole)


def test_it_counts_the_micro_batches_that_training_takes() -> None:
    given = [*SMALL, "batch_size=20", "micro_batch_size=8"]
    fitter = Fitter(given, 2)
    assert {fitter.micro_batch(fitter.config(), launch) for launch in fitter.launches()} == {5}
    described = ask(*SMALL)
    assert "refuses" not in as_text(described)
    on_three = replace(described, config=fitter.config(), memory=[replace(memory, gpus=3) for memory in described.memory])
    assert "refuses batch_size=20 on 3 GPUs" in as_text(on_three)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_24gb_recipe_fits(stage: int) -> None:
    fitter = Fitter([*PAPER, f"stage={stage}", "recipe=24gb"], 1)
    one = fitter.memory(LAUNCHES[0])
    counts = fitter.counts(fitter.config())
    assert one.ema == 0 and one.host == 2 * 4 * counts.trained  # the average, and pinned weights on their way to it
    # The U-Net's own weights are frozen beside the language model's, which are less than a third of their bfloat16 size.
    assert one.frozen < 2.01 * counts.unet + 2 * counts.text * 0.33 + 2 * counts.vae + 4 * counts.lora
    assert one.total < 0.95 * 24 * GIB


def test_what_to_change_is_ordered_and_true(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [launch for launch in LAUNCHES if launch.name in ("one_gpu", "zero2")]
    monkeypatch.setattr(Fitter, "launches", lambda _: chosen)
    description = ask(*WIDE, "gpu=3", "gpus=2")
    assert description.feature_bytes == pytest.approx(4.2e6, rel=0.01)  # as the paper's
    one = next(advice for advice in description.advice if advice.launch == "one_gpu")
    assert one.needed == description.memory[0].total > one.available == 3 * GIB
    saved = [change.saves for change in one.changes]
    assert saved == sorted(saved, reverse=True) and saved[-1] > 0
    changes = {change.override: change for change in one.changes}
    assert {"recipe=24gb", "text_encoder.quantization=4bit"} <= set(changes)
    assert changes["ema_device=cpu"].saves == 4 * description.parameters.trained
    assert changes["optimizer.name=adamw8bit"].saves == 6 * description.parameters.trained
    assert all(change.fits == (change.total <= one.available) for change in one.changes)
    assert changes["ema_device=cpu"].total == Fitter([*WIDE, "ema_device=cpu"], 2).memory(LAUNCHES[0]).total
    assert one.fits == (one.total <= one.available)
    if len(one.together) > 1:  # what is left out of it would not have sufficed
        assert one.total < min(changes[override].total for override in one.together)
    zero = next((advice for advice in description.advice if advice.launch == "zero2"), None)
    assert zero is None or "optimizer.name=adamw8bit" not in {change.override for change in zero.changes}
    text = as_text(description)
    assert "one GPU needs" in text and "recipe=24gb" in text and "fits" in text


def test_time_follows_the_device_and_the_share_of_its_peak() -> None:
    config = compose_train([*PAPER, "stage=1"])
    flops = counted(config)
    slow = throughput(config, flops, Question(device="a100", mfu=0.2, gpus=4, price=3.0))
    fast = throughput(config, flops, Question())
    assert fast.samples_per_second / slow.samples_per_second == pytest.approx(4 * 989.4 / 312)
    assert slow.days == pytest.approx(300000 * 1024 / slow.samples_per_second / 86400)
    assert (slow.money, fast.money) == (pytest.approx(slow.days * 24 * 4 * 3.0), None)
    assert slow.cached_samples_per_second is not None
    assert slow.cached_samples_per_second > 4 * slow.samples_per_second  # Llama costs more than the whole U-Net step
    assert ask(*SMALL).throughput.cached_samples_per_second is None  # its language model is trained
    names = {"H100 80GB HBM3": "h100", "H100 PCIe": "h100_pcie", "A100-SXM4-80GB": "a100", "L4": "l4"}
    for name, device in names.items():
        assert recognise(f"NVIDIA {name}") is DEVICES[device]
    assert recognise("Some Other Chip") is None


def test_every_text_encoder_can_be_described() -> None:
    for name, tokens in (("t5_xxl", 512), ("clip_l", 77), ("gemma3_4b", 512)):
        config = compose_train([*PAPER, "stage=3", f"text_encoder={name}", "train_text=frozen"])
        models = empty_models(config)
        assert models.tokens == tokens, name
        assert models.read_text(1).shape == (1, tokens, models.text.width), name


# ---- the command line -----------------------------------------------------------------------------------------------


def test_the_command_prints_a_stage_alone_and_beside_another_conditioning(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paradiffusion.budget.describe.describe", described)
    main, stage = script("describe").main, ["stage=1", "unet=tiny", "text_encoder=tiny", "gpus=1", "conditioning=modern"]
    one, other = (ask(*stage[:4], f"conditioning={name}") for name in ("modern", "paper"))
    assert main([*stage, "beside=paper"]) == 0
    text, _, table = capsys.readouterr().out.partition("Side by side")
    # The layout head has lines of its own, of parameters and of TFLOP, where there is one.
    assert text.count("layout head") == 2 and "layout head" not in as_text(other)
    rows = {name: values for name, *values in (re.split(r"  +", line.strip()) for line in table.splitlines()[1:])}
    assert rows["refiner, width"] == ["32", "none"] and rows["refiner"][1] == "0.00 M"
    assert rows["trained"] == [f"{d.parameters.trained / 1e6:,.2f} M" for d in (one, other)]
    total = one.flops.total()
    assert float(rows["TFLOP per sample"][0]) == pytest.approx((total.training + total.recompute) / 1e12, rel=1e-3)
    assert rows["samples/s"] == [f"{d.throughput.samples_per_second:,.1f}" for d in (one, other)]
    for beside, expected in (([], {}), (["beside=paper"], {"beside": other.as_json()})):
        assert main([*stage, *beside, "format=json"]) == 0
        assert json.loads(capsys.readouterr().out) == one.as_json() | expected
    user_error("papr", main, ["stage=1", "beside=papr"])


def test_attention_keeps_what_is_added_to_its_scores() -> None:
    refiners = [Refiner(8, 16, 2, 4, reach=reach).to("meta") for reach in (0, 8)]
    text, mask = torch.empty(8, 64, 8, device="meta"), torch.empty(8, 64, dtype=torch.bool, device="meta")
    plain, near = (peak_bytes(lambda made=made: made(text, mask).sum(), [made], autocast=True) for made in refiners)
    assert near - plain >= 2 * 2 * 8 * 4 * 64 * 64  # one [B, heads, L, L] of each of two blocks, in bfloat16


def test_mistakes_cost_one_sentence() -> None:
    for argument in ("gpu=much", "gpu=-1", "gpus=1.5", "mfu=1.2", "format=xml", "device=abacus"):
        user_error(argument.replace(".", r"\."), parse_question, [argument])
    user_error(r"did you mean gpu\?", compose_train, ["gup=24"], tuple(Question.__dataclass_fields__))
    with pytest.raises(UserError, match="stag"):
        compose_train(parse_question(["stag=2"])[1])
    user_error(r"codec\.path", empty_models, compose_train(["stage=1", "codec.path=nowhere"]))


def test_the_codec_folder_tells_its_own_shape(codec_folder: Path) -> None:
    config = compose_train(["stage=1", f"codec.path={codec_folder}", "codec.latent_channels=4"])
    assert empty_models(config).encode_images(2).shape == (2, 4, 8, 8)
