"""The joint module, the U-Net and the codec: losses by hand, masks, and refusals."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusionXLImg2ImgPipeline
from tiny_unet import SIMPLE, TINY_UNET, WIDTH, a_batch
from torch import Tensor

from paradiffusion.compose import compose_train
from paradiffusion.config import CodecConfig, ConditioningConfig, ObjectiveConfig, TrainConfig, UNetConfig
from paradiffusion.errors import UserError
from paradiffusion.models.codec import load_codec
from paradiffusion.models.joint import JointModel, LossBatch, build_joint
from paradiffusion.models.unet import build_unet, coordinate_channels, downsampling, with_coordinates

MODERN = ConditioningConfig(
    name="modern",
    projection="refiner",
    refiner_width=16,
    refiner_layers=1,
    refiner_heads=2,
    refiner_kernel=3,
    mask_padding=True,
)
PAPER = ConditioningConfig()


def make(
    arguments: dict[str, Any] = TINY_UNET, conditioning: ConditioningConfig = MODERN, **changes: Any
) -> JointModel:
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
    prediction = joint.unet(
        with_coordinates(noised, 2), batch.times, encoder_hidden_states=text, encoder_attention_mask=batch.mask
    ).sample
    errors = ((prediction - (alpha * batch.noise - sigma * batch.latents)) ** 2).mean((1, 2, 3))
    snr = kept / (1 - kept)
    expected = (errors * snr.clamp(max=5) / (snr + 1) * batch.weights).sum() / 3
    loss, _, each, _ = joint(batch)
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


def test_gradient_checkpointing_changes_no_gradient() -> None:
    plain, saving = make(), make(gradient_checkpointing=True)
    assert saving.unet.is_gradient_checkpointing and not plain.unet.is_gradient_checkpointing
    for joint in (plain, saving):
        joint.train()(a_batch())[0].backward()
    for (name, one), two in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, msg=name)


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


def test_plain_attention_changes_no_prediction() -> None:
    def build(**changes: Any) -> Any:
        return build_unet(UNetConfig(arguments=TINY_UNET, **changes), CodecConfig(), PAPER, WIDTH, seed=1)

    usual, plain = build(), build(plain_attention=True)
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([5.0]), torch.randn(1, 6, WIDTH))
    with torch.no_grad():
        torch.testing.assert_close(plain(*inputs).sample, usual(*inputs).sample, atol=1e-5, rtol=0)


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


@pytest.mark.parametrize(
    "wrong", [{"layers_per_blok": 1}, {"down_block_types": ["NoSuchBlock2D", "DownBlock2D"]}, {"norm_num_groups": 7}]
)
def test_arguments_that_make_no_unet(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"unet\.arguments .* configs/unet") as error:
        make({**TINY_UNET, **wrong})
    assert "\n" not in str(error.value)


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
    assert codec.config.scaling_factor == codec.source["scaling_factor"] == 0.6348
    torch.testing.assert_close(mean, posterior.mean * 0.6348)
    torch.testing.assert_close(one - mean, posterior.std * 0.6348)
    torch.testing.assert_close(two - mean, 2 * posterior.std * 0.6348)
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
    kind, more = (
        (StableDiffusion3Img2ImgPipeline, {}) if shifted else (StableDiffusionXLImg2ImgPipeline, {"add_noise": False})
    )
    parts = SimpleNamespace(vae=codec.vae, scheduler=SimpleNamespace(scale_noise=lambda latents, *_: latents))
    first, second = (torch.Generator().manual_seed(3) for _ in range(2))
    theirs = kind.prepare_latents(parts, images, None, 2, 1, torch.float32, "cpu", generator=first, **more)
    torch.testing.assert_close(codec.encode(images, torch.randn(raw.shape, generator=second)), theirs)


def test_another_scale_than_the_vaes_own_is_refused(codec_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has the scaling_factor 0\.6348 .*codec\.scaling_factor=0\.13025"):
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
        with pytest.raises(UserError, match=said):
            load_codec(config)
    with pytest.raises(UserError, match="trained with beef"):
        load_codec(codec_config(codec_folder), expected_hash="beef")
    weights = shutil.copytree(codec_folder, tmp_path / "codec") / "diffusion_pytorch_model.safetensors"
    for damage in (lambda: weights.write_bytes(weights.read_bytes()[:-500]), weights.unlink):
        damage()
        with pytest.raises(UserError, match="could not be read"):
            load_codec(codec_config(tmp_path / "codec"))
