"""LoRA on the U-Net: what is trained, what it changes, and where its weights come from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_unet import SIMPLE, TINY_UNET, WIDTH, a_batch
from torch import Tensor

from paradiffusion.checkpoints.layouts import copy_tensors, merge_unet_lora
from paradiffusion.config import ConditioningConfig, OptimizerConfig, TrainConfig, UNetConfig
from paradiffusion.errors import UserError
from paradiffusion.models.joint import JointModel, LossBatch, build_joint
from paradiffusion.models.unet import lora_names
from paradiffusion.training.optim import build_optimizer, part_of

STYLES = pytest.mark.parametrize("arguments", [TINY_UNET, SIMPLE], ids=["CrossAttn", "SimpleCrossAttn"])
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT_KEYS = ["add_k_proj", "add_v_proj"]  # of SimpleCrossAttn blocks alone
REFINED = ConditioningConfig(
    name="modern",
    mask_padding=True,
    layout_patch=2,
    projection="refiner",
    refiner_width=16,
    refiner_layers=1,
    refiner_heads=2,
)


def make(arguments: dict[str, Any], rank: int = 2, seed: int = 3, **changes: Any) -> JointModel:
    conditioning = changes.pop("conditioning", ConditioningConfig())
    saving = changes.pop("gradient_checkpointing", False)
    targets = TARGETS + (TEXT_KEYS if arguments is SIMPLE else [])
    unet = UNetConfig(arguments=arguments, lora_rank=rank, lora_alpha=4, **{"lora_target_modules": targets, **changes})
    config = TrainConfig(seed=seed, unet=unet, conditioning=conditioning, gradient_checkpointing=saving)
    return build_joint(config, WIDTH)


@torch.no_grad()
def predict(joint: JointModel, batch: LossBatch) -> Tensor:
    assert batch.features is not None
    return joint.denoise(batch.latents, batch.times, joint.refine(batch.features, None), None)


@STYLES
def test_only_adapter_and_projection_are_trained(arguments: dict[str, Any]) -> None:
    joint, plain, batch = make(arguments), make(arguments, rank=0), a_batch(mask_padding=False)
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
    plain, adapted = make(arguments, rank=0, seed=8), make(arguments)
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
    whole = {n for n in make(TINY_UNET, conditioning=REFINED).trained() if ".lora_" not in n}
    assert {"unet.conv_in.weight", "unet.encoder_hid_proj.weight", "refiner.embed.weight"} <= whole
    assert not any("down_blocks" in n for n in whole)
    assert "unet.conv_in.weight" in make(TINY_UNET, coordinates=2).trained()
    assert "unet.conv_in.weight" not in make(TINY_UNET).trained()


def test_the_adapter_is_a_function_of_the_seed_alone() -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first, again, other = make(TINY_UNET), make(TINY_UNET), make(TINY_UNET, seed=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, parameter in first.trained().items():
        assert torch.equal(parameter, again.trained()[name])
        if "lora_A" in name:
            assert not torch.equal(parameter, other.trained()[name])


@STYLES
def test_gradient_checkpointing_reaches_the_adapter(arguments: dict[str, Any]) -> None:
    plain, saving = make(arguments), make(arguments, gradient_checkpointing=True)
    for joint in (plain, saving):
        joint.train()(a_batch(mask_padding=False))[0].backward()
    for name, parameter in plain.trained().items():
        torch.testing.assert_close(saving.trained()[name].grad, parameter.grad, msg=name)


def test_wrong_targets_are_named() -> None:
    with pytest.raises(
        UserError, match=r"unet\.lora_target_modules=.*add_k_proj names no layer of this U-Net"
    ) as error:
        make(TINY_UNET, lora_target_modules=["to_q", "add_k_proj"])
    assert "to_out.0" in str(error.value) and "\n" not in str(error.value)


@STYLES
def test_a_bfloat16_unet_takes_fp32_inputs(arguments: dict[str, Any]) -> None:
    """As under DeepSpeed, which casts modules and not what goes into them."""
    joint, batch = make(arguments, rank=0), a_batch(mask_padding=False)
    expected = predict(joint, batch)
    loss = joint(batch).total
    joint.unet.to(torch.bfloat16)
    assert predict(joint, batch).dtype == torch.bfloat16
    assert (predict(joint, batch).float() - expected).abs().max() < 0.05
    low, _, errors, _ = joint(batch)
    assert low.dtype == errors.dtype == torch.float32
    assert low.item() == pytest.approx(loss.item(), rel=0.02)


def test_a_bfloat16_refiner_takes_fp32_features() -> None:
    joint, batch = make(TINY_UNET, rank=0, conditioning=REFINED), a_batch()
    loss = joint(batch).total
    assert joint.to(torch.bfloat16)(batch)[0].item() == pytest.approx(loss.item(), rel=0.02)
