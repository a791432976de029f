"""Positions on the text's keys: keys know where a token stands and values do not, in every kind of block and under LoRA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from commands import user_error
from tiny_unet import SIMPLE, TINY_UNET, WIDTH, a_batch
from torch import Tensor

from paradiffusion.checkpoints.layouts import copy_tensors, merge_unet_lora
from paradiffusion.config import ConditioningConfig, TrainConfig, UNetConfig
from paradiffusion.models.joint import JointModel, build_joint
from paradiffusion.models.unet import with_positions

PIXART = {"sample_size": 8, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32}
KINDS = {
    "CrossAttn": UNetConfig(arguments=TINY_UNET),
    "plain attention": UNetConfig(arguments=TINY_UNET, plain_attention=True),
    "SimpleCrossAttn": UNetConfig(arguments=SIMPLE),
    "PixArt": UNetConfig(class_name="PixArtTransformer2DModel", arguments=PIXART),
    "LoRA": UNetConfig(arguments=TINY_UNET, lora_rank=2),
}
TEXT_LAYERS = {"key": ("attn2.to_k", "add_k_proj"), "value": ("attn2.to_v", "add_v_proj")}


def make(unet: UNetConfig, key_positions: bool) -> JointModel:
    joint = build_joint(TrainConfig(unet=unet, conditioning=ConditioningConfig(key_positions=key_positions)), WIDTH).eval()
    with torch.no_grad():
        for name, parameter in joint.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return joint


@torch.no_grad()
def predict(joint: JointModel, features: Tensor) -> Tensor:
    batch = a_batch()
    return joint.denoise(batch.latents, batch.times, features, batch.mask)


@pytest.mark.parametrize("kind", KINDS)
def test_keys_know_where_a_token_stands_and_values_do_not(kind: str) -> None:
    joint, seen = make(KINDS[kind], True), dict[str, list[Tensor]]()
    for name, module in joint.unet.named_modules():
        for part, ends in TEXT_LAYERS.items():
            if name.endswith(ends):
                module.register_forward_hook(lambda *given, part=part: seen.setdefault(part, []).append(given[2]))
    predict(joint, torch.ones(3, 6, WIDTH))  # one and the same token six times
    assert len(seen["key"]) == len(seen["value"]) > 0
    for key, value in zip(seen["key"], seen["value"], strict=True):
        apart = torch.cdist(key[0], key[0]) + torch.eye(6)
        assert key.shape == value.shape and (apart > 1e-2).all() and torch.equal(key[0], key[1])
        torch.testing.assert_close(value, value[:, :1].expand_as(value))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key_positions", [False, True])
def test_the_order_of_tokens_matters_with_it_alone(kind: str, key_positions: bool) -> None:
    joint, features = make(KINDS[kind], key_positions), a_batch().features
    assert features is not None
    turned = features.clone()
    turned[1] = features[1].flip(0)  # the row without padding
    difference = (predict(joint, turned) - predict(joint, features)).abs().amax((1, 2, 3))
    assert difference[[0, 2]].max() < 1e-5 and (difference[1] > 1e-4) == key_positions


def test_merged_adapters_and_the_same_denoiser_twice_draw_the_same() -> None:
    joint, features = make(KINDS["LoRA"], True), a_batch().features
    assert features is not None
    expected = predict(joint, features)
    again = JointModel(joint.unet, None, joint.objective, 0, key_positions=True)  # as a pipeline does at every call
    assert torch.equal(predict(again, features), expected)
    plain = make(KINDS["CrossAttn"], True)
    copy_tensors(plain, merge_unet_lora(dict(joint.named_parameters()), KINDS["LoRA"].adapter))
    torch.testing.assert_close(predict(plain, features), expected, atol=1e-5, rtol=0)


def test_a_denoiser_that_reads_no_text_is_refused() -> None:
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2, "mid_block_type": "UNetMidBlock2D"}
    arguments: dict[str, Any] = {**TINY_UNET, **blocks}
    assert make(UNetConfig(arguments=arguments), False) is not None
    user_error("key_positions=true needs a denoiser with cross-attention", make, UNetConfig(arguments=arguments), True)


def test_half_precision_rounds_positions_once() -> None:
    layer, text = torch.nn.Identity(), torch.zeros(1, 400, 32)
    whole = with_positions(layer, (text,))
    torch.testing.assert_close(with_positions(layer, (text.bfloat16(),)), whole.bfloat16(), atol=0, rtol=0)
    assert whole[0, 300, [0, 16]].tolist() == pytest.approx(torch.tensor([300.0]).sin().tolist() + torch.tensor([300.0]).cos().tolist())
