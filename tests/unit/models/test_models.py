"""The joint module, the U-Net with and without LoRA, and the codec: losses by hand, masks, what is trained, and refusals."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import user_error
from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusionXLImg2ImgPipeline
from tiny_unet import SIMPLE, TINY_UNET, WIDTH, a_batch
from torch import Tensor

from paradiffusion.checkpoints.layouts import copy_tensors, merge_unet_lora
from paradiffusion.compose import compose_train
from paradiffusion.config import CodecConfig, ConditioningConfig, ObjectiveConfig, OptimizerConfig, TrainConfig, UNetConfig
from paradiffusion.errors import UserError
from paradiffusion.models.codec import load_codec
from paradiffusion.models.joint import JointModel, LossBatch, build_joint
from paradiffusion.models.unet import build_unet, coordinate_channels, downsampling, halve_frozen, lora_names, with_coordinates  # fmt: skip
from paradiffusion.training.optim import build_optimizer, part_of

MODERN = ConditioningConfig(
    name="modern", projection="refiner", refiner_width=16, refiner_layers=1, refiner_heads=2, refiner_kernel=3, mask_padding=True
)
PAPER = ConditioningConfig()


def make(arguments: dict[str, Any] = TINY_UNET, conditioning: ConditioningConfig = MODERN, **changes: Any) -> JointModel:
    config = TrainConfig(
        seed=3,
        unet=UNetConfig(arguments=arguments, coordinates=2 if conditioning is MODERN else 0),
        conditioning=conditioning,
        objective=ObjectiveConfig(prediction="v_prediction", min_snr_gamma=5.0),
        **changes,
    )
    return build_joint(config, WIDTH).eval()


@torch.no_grad()
def predict(joint: JointModel, batch: LossBatch) -> Tensor:
    assert batch.features is not None
    return joint.denoise(batch.latents, batch.times, joint.refine(batch.features, batch.mask), batch.mask)


@torch.no_grad()
def test_loss_by_hand() -> None:
    joint, batch = make(), replace(a_batch(), weights=torch.tensor([1.0, 0.0, 2.0]))
    kept = joint.objective.alphas_cumprod[batch.times.long()]
    alpha, sigma = kept.sqrt().view(3, 1, 1, 1), (1 - kept).sqrt().view(3, 1, 1, 1)
    noised = alpha * batch.latents + sigma * batch.noise
    assert batch.features is not None and joint.refiner is not None
    text = joint.refiner(batch.features, batch.mask)
    prediction = joint.unet(with_coordinates(noised, 2), batch.times, encoder_hidden_states=text, encoder_attention_mask=batch.mask).sample
    errors = ((prediction - (alpha * batch.noise - sigma * batch.latents)) ** 2).mean((1, 2, 3))
    snr = kept / (1 - kept)
    expected = (errors * snr.clamp(max=5) / (snr + 1) * batch.weights).sum() / 3
    loss, _, each, *_ = joint(batch)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(each, errors)


def test_a_sample_of_weight_zero_has_no_gradient() -> None:
    joint, batch = make(), a_batch()
    assert batch.features is not None

    def gradients(latents: Tensor) -> list[Tensor]:
        joint.zero_grad()
        features = batch.features.clone().requires_grad_()  # type: ignore[union-attr]
        joint(replace(batch, latents=latents, features=features, weights=torch.tensor([1.0, 0.0, 1.0])))[0].backward()
        assert features.grad is not None and features.grad[1].abs().max() == 0 and features.grad[0].abs().max() > 0
        return [p.grad.clone() for p in joint.parameters() if p.grad is not None]

    other = batch.latents.clone()
    other[1] = 5.0
    first, second = gradients(batch.latents), gradients(other)
    assert len(first) == len(joint.trained()), "everything that is trained has a gradient"
    for one, two in zip(first, second, strict=True):
        torch.testing.assert_close(one, two, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("arguments", [TINY_UNET, SIMPLE], ids=["CrossAttn", "SimpleCrossAttn"])
@pytest.mark.parametrize("refiner", [True, False])
def test_masked_padding_does_not_matter(arguments: dict[str, Any], refiner: bool) -> None:
    joint, batch = make(arguments, MODERN if refiner else replace(PAPER, mask_padding=True)), a_batch()
    assert batch.features is not None and batch.mask is not None
    short = predict(joint, batch)
    for more in (26, 10, 58):  # 16 and 64 tokens are as many as the image has at its levels
        features = torch.cat([batch.features, torch.full((3, more, WIDTH), 7.0)], dim=1)
        mask = torch.cat([batch.mask, torch.zeros(3, more, dtype=torch.bool)], dim=1)
        longer = predict(joint, replace(batch, features=features, mask=mask))
        torch.testing.assert_close(longer, short, atol=1e-5, rtol=0)
    words = batch.features.clone()
    words[1, 0] += 3  # a real token
    changed = predict(joint, replace(batch, features=words))
    assert (changed[1] - short[1]).abs().max() > 1e-3, "the text must matter at all"


@pytest.mark.parametrize("arguments", [TINY_UNET, SIMPLE], ids=["CrossAttn", "SimpleCrossAttn"])
def test_the_papers_arm_attends_to_padding_and_not_to_neighbours(arguments: dict[str, Any]) -> None:
    joint, batch = make(arguments, PAPER), a_batch(mask_padding=False)
    assert batch.features is not None
    out = predict(joint, batch)
    padding = batch.features.clone()
    padding[0, 4:] += 3
    assert (predict(joint, replace(batch, features=padding))[0] - out[0]).abs().max() > 1e-3
    for row in range(3):
        one = slice(row, row + 1)
        alone = replace(batch, latents=batch.latents[one], times=batch.times[one], features=batch.features[one])
        torch.testing.assert_close(predict(joint, alone), out[one], atol=1e-5, rtol=0)


@pytest.mark.parametrize("octaves", [0, 1, 3])
def test_coordinates(octaves: int) -> None:
    out = with_coordinates(torch.zeros(2, 4, 3, 5), octaves)
    assert out.shape == (2, 4 + coordinate_channels(octaves), 3, 5) and (out[:, :4] == 0).all()
    assert coordinate_channels(octaves) == {0: 0, 1: 2, 3: 10}[octaves]
    if octaves:  # the latents' centres, the same in each image
        torch.testing.assert_close(out[1, 4, 0], torch.tensor([-0.8, -0.4, 0.0, 0.4, 0.8]))
        torch.testing.assert_close(out[0, 5, :, 4], torch.tensor([-2 / 3, 0.0, 2 / 3]))
    if octaves == 3:
        torch.testing.assert_close(out[0, 6], torch.sin(torch.pi * out[0, 4]))
        torch.testing.assert_close(out[0, 13], torch.cos(2 * torch.pi * out[0, 5]))
        assert len(out[0].flatten(1).T.unique(dim=0)) == 15, "every place is told from every other"
    large = torch.zeros(1, 4, 128, 96)  # in bf16 what autocast makes of training's
    assert torch.equal(with_coordinates(large.bfloat16(), octaves), with_coordinates(large, octaves).bfloat16())


def test_weights_are_a_function_of_the_seed_alone() -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = make()
    assert torch.equal(torch.random.get_rng_state(), state), "building must leave the global generator alone"
    torch.manual_seed(2)
    second = make()
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    other = build_unet(UNetConfig(arguments=TINY_UNET), CodecConfig(), PAPER, WIDTH, seed=9)
    again = build_unet(UNetConfig(arguments=TINY_UNET), CodecConfig(), PAPER, WIDTH, seed=10)
    assert not torch.equal(other.conv_in.weight, again.conv_in.weight)


def test_the_linear_projection_is_the_unets_own() -> None:
    paper, modern = make(TINY_UNET, PAPER), make()
    assert paper.refiner is None and paper.unet.encoder_hid_proj.weight.shape == (32, WIDTH)
    assert modern.unet.encoder_hid_proj.weight.shape == (32, 16) and downsampling(modern.unet) == 2
    # Coordinates widen the first convolution only.
    channels = [(one.unet.config["in_channels"], one.unet.config["out_channels"]) for one in (modern, paper)]
    assert channels == [(10, 4), (4, 4)]


@pytest.mark.parametrize("wrong", [{"layers_per_blok": 1}, {"down_block_types": ["NoSuchBlock2D", "DownBlock2D"]}, {"norm_num_groups": 7}])
def test_arguments_that_make_no_unet(wrong: dict[str, Any]) -> None:
    user_error(r"unet\.arguments .* configs/unet", make, {**TINY_UNET, **wrong})


def codec_config(folder: Path, **changes: Any) -> CodecConfig:
    return CodecConfig(**{"path": str(folder), **changes})


def described(folder: Path, target: Path, **changes: Any) -> Path:
    """A copy of the autoencoder with other values in its config.json; None takes one out."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return target


def test_codec_shapes_and_posterior(codec_folder: Path) -> None:
    codec = load_codec(codec_config(codec_folder))
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean = codec.encode(images)
    assert mean.shape == (2, *codec.latent_shape(32, 48)) == (2, 4, 4, 6) and mean.dtype == torch.float32
    zero, one, two = (codec.encode(images, torch.full_like(mean, value)) for value in (0.0, 1.0, 2.0))
    assert torch.equal(zero, mean)
    with torch.no_grad():
        posterior = codec.vae.encode(images).latent_dist
        pictures = codec.vae.decode(posterior.mean).sample.clamp(-1, 1)
    assert codec.config.scaling_factor == codec.source["scaling_factor"] == 1.1193
    torch.testing.assert_close(mean, posterior.mean * 1.1193)
    torch.testing.assert_close(one - mean, posterior.std * 1.1193)
    torch.testing.assert_close(two - mean, 2 * posterior.std * 1.1193)
    torch.testing.assert_close(codec.decode(mean), pictures)
    assert codec.decode(mean * 100).abs().max() <= 1
    assert not any(p.requires_grad for p in codec.parameters())


@pytest.mark.parametrize(
    "own",
    [
        {"scaling_factor": 0.3611, "shift_factor": 0.1159},  # as FLUX.1's
        {"scaling_factor": 0.5, "latents_mean": [0.1, -0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]},
    ],
)
def test_the_vae_brings_its_own_scale(codec_folder: Path, tmp_path: Path, own: dict[str, Any]) -> None:
    codec = load_codec(codec_config(described(codec_folder, tmp_path / "codec", **own)))
    plain = load_codec(codec_config(described(codec_folder, tmp_path / "plain", scaling_factor=1.0)))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    raw, shift = plain.encode(images), torch.tensor(own.get("latents_mean", own.get("shift_factor"))).view(-1, 1, 1)
    expected = (raw - shift) * own["scaling_factor"] / torch.tensor(own.get("latents_std", 1.0)).view(-1, 1, 1)
    torch.testing.assert_close(codec.encode(images), expected)
    torch.testing.assert_close(codec.decode(expected), plain.decode(raw))
    # As diffusers' own pipelines encode pictures with these keys, but for the noise that one of them adds.
    shifted = "shift_factor" in own
    kind, more = (StableDiffusion3Img2ImgPipeline, {}) if shifted else (StableDiffusionXLImg2ImgPipeline, {"add_noise": False})
    parts = SimpleNamespace(vae=codec.vae, scheduler=SimpleNamespace(scale_noise=lambda latents, *_: latents))
    first, second = (torch.Generator().manual_seed(3) for _ in range(2))
    theirs = kind.prepare_latents(parts, images, None, 2, 1, torch.float32, "cpu", generator=first, **more)
    torch.testing.assert_close(codec.encode(images, torch.randn(raw.shape, generator=second)), theirs)


def test_another_scale_than_the_vaes_own_is_refused(codec_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has the scaling_factor 1\.1193 .*codec\.scaling_factor=0\.13025"):
        load_codec(codec_config(codec_folder, scaling_factor=0.13025))
    silent = described(codec_folder, tmp_path / "silent", scaling_factor=None)
    assert load_codec(codec_config(silent, scaling_factor=0.13025)).scale == 0.13025
    assert load_codec(codec_config(silent)).scale == 0.18215  # diffusers' default
    trained = load_codec(codec_config(codec_folder)).source["hash"]  # a checkpoint from when any factor was taken
    assert load_codec(codec_config(codec_folder, scaling_factor=0.13025), trained).scale == 0.13025
    shipped = compose_train(["preset=nano"]).codec
    assert load_codec(shipped).config == shipped


def test_codecs_that_are_refused(codec_folder: Path, tmp_path: Path) -> None:
    for config, said in (
        (codec_config(Path("/nowhere")), r"codec\.path=/nowhere holds no config\.json"),
        (CodecConfig(), r"found nowhere.*codec\.path=<folder>"),
        (codec_config(codec_folder, latent_channels=8), "has 4 latent channels and factor 8"),
        (codec_config(codec_folder, factor=4), r"codec\.factor=4"),
    ):
        user_error(said, load_codec, config)
    user_error("trained with beef", load_codec, codec_config(codec_folder), expected_hash="beef")
    weights = shutil.copytree(codec_folder, tmp_path / "codec") / "diffusion_pytorch_model.safetensors"
    for damage in (lambda: weights.write_bytes(weights.read_bytes()[:-500]), weights.unlink):
        damage()
        user_error("could not be read", load_codec, codec_config(tmp_path / "codec"))


STYLES = pytest.mark.parametrize("arguments", [TINY_UNET, SIMPLE], ids=["CrossAttn", "SimpleCrossAttn"])
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT_KEYS = ["add_k_proj", "add_v_proj"]  # of SimpleCrossAttn blocks alone
REFINED = ConditioningConfig(
    name="modern", mask_padding=True, layout_patch=2, projection="refiner", refiner_width=16, refiner_layers=1, refiner_heads=2
)


def with_lora(arguments: dict[str, Any], rank: int = 2, seed: int = 3, **changes: Any) -> JointModel:
    conditioning = changes.pop("conditioning", ConditioningConfig())
    saving = changes.pop("gradient_checkpointing", False)
    targets = TARGETS + (TEXT_KEYS if arguments is SIMPLE else [])
    unet = UNetConfig(arguments=arguments, lora_rank=rank, lora_alpha=4, **{"lora_target_modules": targets, **changes})
    config = TrainConfig(seed=seed, unet=unet, conditioning=conditioning, gradient_checkpointing=saving)
    return build_joint(config, WIDTH)


@STYLES
def test_only_adapter_and_projection_are_trained(arguments: dict[str, Any]) -> None:
    joint, plain, batch = with_lora(arguments), with_lora(arguments, rank=0), a_batch(mask_padding=False)
    assert len(plain.trained()) == len(list(plain.parameters())), "without a rank everything is trained"
    before = predict(joint, batch)
    torch.testing.assert_close(before, predict(plain, batch), atol=1e-6, rtol=0)

    trained = joint.trained()
    lora = {n for n in trained if ".lora_" in n}
    assert set(trained) - lora == {"unet.encoder_hid_proj.weight", "unet.encoder_hid_proj.bias"}
    targets = {n.partition(".lora_")[0].rpartition("attentions.")[2].split(".", 1)[1] for n in lora}
    assert any(t.endswith("to_out.0") for t in targets)
    assert any("add_k_proj" in t for t in targets) == (arguments is SIMPLE)
    assert all(n.endswith((".lora_A.default.weight", ".lora_B.default.weight")) for n in lora)
    assert all(p.dtype == torch.float32 for p in trained.values())
    assert {part_of(n) for n in lora} == {"lora"} and part_of("unet.encoder_hid_proj.weight") == "conditioning"

    optimizer = build_optimizer(trained, OptimizerConfig(lr=0.0, lr_conditioning=1e-9, lr_lora=1e-2))
    joint.train()(batch)[0].backward()
    assert all(p.grad is None for n, p in joint.named_parameters() if n not in trained)
    assert all(trained[n].grad.abs().sum() > 0 for n in trained if "lora_A" not in n)  # type: ignore[union-attr]
    frozen = {n: p.detach().clone() for n, p in joint.named_parameters() if n not in trained}
    optimizer.step()
    assert all(torch.equal(p, frozen[n]) for n, p in joint.named_parameters() if n in frozen)
    assert (predict(joint, batch) - before).abs().max() > 1e-3, "the adapter takes its own learning rate"


@STYLES
def test_a_plain_checkpoint_starts_an_adapter_and_merging_leads_back(arguments: dict[str, Any]) -> None:
    batch = a_batch(mask_padding=False)
    plain, adapted = with_lora(arguments, rank=0, seed=8), with_lora(arguments)
    state = {n: p.detach().clone() for n, p in plain.named_parameters()}
    named = lora_names(state, adapted.unet)
    assert set(named) == {n for n, _ in adapted.named_parameters() if ".lora_" not in n}
    assert set(lora_names(named, adapted.unet)) == set(named), "names that fit already stay"
    copy_tensors(adapted, named)
    torch.testing.assert_close(predict(adapted, batch), predict(plain, batch), atol=1e-6, rtol=0)

    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    changed = predict(adapted, batch)
    assert (changed - predict(plain, batch)).abs().max() > 1e-3
    merged = merge_unet_lora(dict(adapted.named_parameters()), {"rank": 2, "alpha": 4})
    assert set(merged) == set(state)
    copy_tensors(plain, merged)
    torch.testing.assert_close(predict(plain, batch), changed, atol=1e-5, rtol=0)


def test_what_a_pretrained_unet_cannot_know_is_trained_whole() -> None:
    whole = {n for n in with_lora(TINY_UNET, conditioning=REFINED).trained() if ".lora_" not in n}
    assert {"unet.conv_in.weight", "unet.encoder_hid_proj.weight", "refiner.embed.weight"} <= whole
    assert not any("down_blocks" in n for n in whole)
    assert "unet.conv_in.weight" in with_lora(TINY_UNET, coordinates=2).trained()
    assert "unet.conv_in.weight" not in with_lora(TINY_UNET).trained()


def test_the_adapter_is_a_function_of_the_seed_alone() -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first, again, other = with_lora(TINY_UNET), with_lora(TINY_UNET), with_lora(TINY_UNET, seed=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, parameter in first.trained().items():
        assert torch.equal(parameter, again.trained()[name])
        if "lora_A" in name:
            assert not torch.equal(parameter, other.trained()[name])


@STYLES
def test_gradient_checkpointing_reaches_the_adapter(arguments: dict[str, Any]) -> None:
    plain, saving = with_lora(arguments), with_lora(arguments, gradient_checkpointing=True)
    for joint in (plain, saving):
        joint.train()(a_batch(mask_padding=False))[0].backward()
    for name, parameter in plain.trained().items():
        torch.testing.assert_close(saving.trained()[name].grad, parameter.grad, msg=name)


@STYLES
def test_frozen_matrices_in_bfloat16_change_no_bit_under_autocast(arguments: dict[str, Any]) -> None:
    whole, halved = with_lora(arguments), with_lora(arguments)
    halve_frozen(halved.unet)
    frozen = [sum(p.nbytes for p in joint.unet.parameters() if not p.requires_grad) for joint in (whole, halved)]
    assert frozen[1] < 0.52 * frozen[0]
    for joint in (whole, halved):
        with torch.autocast("cpu", torch.bfloat16):
            joint.train()(a_batch(mask_padding=False)).total.backward()
    for name, parameter in whole.trained().items():
        assert parameter.dtype == torch.float32 and torch.equal(halved.trained()[name].grad, parameter.grad), name


def test_wrong_targets_are_named() -> None:
    with pytest.raises(UserError, match=r"unet\.lora_target_modules=.*add_k_proj names no layer of this U-Net") as error:
        with_lora(TINY_UNET, lora_target_modules=["to_q", "add_k_proj"])
    assert "to_out.0" in str(error.value) and "\n" not in str(error.value)


@STYLES
def test_a_bfloat16_unet_takes_fp32_inputs(arguments: dict[str, Any]) -> None:
    """As under DeepSpeed, which casts modules and not what goes into them."""
    joint, batch = with_lora(arguments, rank=0), a_batch(mask_padding=False)
    expected = predict(joint, batch)
    loss = joint(batch).total
    joint.unet.to(torch.bfloat16)
    assert predict(joint, batch).dtype == torch.bfloat16
    assert (predict(joint, batch).float() - expected).abs().max() < 0.05
    low, _, errors, *_ = joint(batch)
    assert low.dtype == errors.dtype == torch.float32
    assert low.item() == pytest.approx(loss.item(), rel=0.02)


def test_a_bfloat16_refiner_takes_fp32_features() -> None:
    joint, batch = with_lora(TINY_UNET, rank=0, conditioning=REFINED), a_batch()
    loss = joint(batch).total
    assert joint.to(torch.bfloat16)(batch)[0].item() == pytest.approx(loss.item(), rel=0.02)
