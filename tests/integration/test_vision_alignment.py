"""objective.align_weight: the deepest block learns what a frozen vision encoder sees, and nothing of that is drawn with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import user_error
from tiny_unet import SIMPLE, TINY_UNET, WIDTH, a_batch
from training_runs import assert_same_bits, build_here, newest, records, sample_here, tensors, train_here
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from paradiffusion.compose import compose_train
from paradiffusion.config import ObjectiveConfig, TrainConfig, UNetConfig
from paradiffusion.models.joint import JointModel, LossBatch, build_joint
from paradiffusion.models.vision import VisionEncoder
from scripts.cache import main as cache

SHAPE: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4, "image_size": 32}
# A nano-like one, whose deepest block is the last on the way down; one with a middle block; and the paper's kind.
FLAT = {**TINY_UNET, "mid_block_type": None}
UNETS: dict[str, dict[str, Any]] = {"middle": TINY_UNET, "no middle": FLAT, "SimpleCrossAttn": SIMPLE}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random DINOv2."""
    folder = tmp_path_factory.mktemp("vision") / "dinov2"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Dinov2Model(Dinov2Config(**SHAPE)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def arguments(tiny_arguments: list[str], encoder: Path) -> list[str]:
    return [*tiny_arguments, "objective.align_weight=0.5", f"objective.align_encoder={encoder}", "objective.align_until=6", "log_every=1"]


@pytest.fixture(scope="module")
def run(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 1 of eight steps, six of them aligned, stopped after four and resumed."""
    folder = tmp_path_factory.mktemp("aligned") / "run"
    for steps in (4, 8):
        assert train_here([*arguments, f"max_steps={steps}", f"run_dir={folder}"]) == 0
    return folder


@pytest.mark.parametrize("registers", [0, 3])
def test_each_patch_is_seen_at_its_place(registers: int, encoder: Path, tmp_path: Path) -> None:
    if registers:
        encoder = tmp_path / "registers"
        Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SHAPE, num_register_tokens=registers)).save_pretrained(encoder)
    sees = VisionEncoder(ObjectiveConfig(align_encoder=str(encoder)), 16, torch.device("cpu"))
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen = sees(images)
    assert seen.shape == (2, 4, 6, 24) and torch.isfinite(seen).all() and not any(p.requires_grad for p in sees.model.parameters())
    handed: list[torch.Tensor] = []
    sees.model.layernorm.register_forward_hook(lambda _module, _given, out: handed.append(out))
    changed = images.clone()
    changed[0, :, 16:20, 40:44] = 255 - changed[0, :, 16:20, 40:44]  # within the patch of row 2, column 5
    change = (sees(changed) - seen).norm(dim=-1)
    assert change[0].flatten().argmax() == 2 * 6 + 5 and change[1].max() == 0
    assert torch.equal(handed[0][0, 1 + registers :], sees(changed)[0].flatten(0, 1))


@pytest.mark.parametrize("kind", UNETS)
@pytest.mark.parametrize("levels", [1, 2])
def test_the_deepest_block_learns_what_is_seen(kind: str, levels: int, encoder: Path) -> None:
    objective = ObjectiveConfig(align_weight=1.0, align_encoder=str(encoder))
    joint = build_joint(TrainConfig(unet=UNetConfig(arguments=UNETS[kind]), objective=objective), WIDTH)
    batch = a_batch()
    batch = replace(batch, noise=batch.noise.repeat(levels, 1, 1, 1), times=batch.times.repeat(levels))
    seen = torch.randn(3, 8, 8, 24, generator=torch.Generator().manual_seed(1))
    plain, aligned = joint(batch), joint(replace(batch, vision=seen))
    assert plain.align is None and aligned.align is not None
    assert torch.equal(plain.total, plain.diffusion) and torch.equal(plain.errors, aligned.errors)
    assert aligned.total.item() == pytest.approx(aligned.diffusion.item() + aligned.align.item(), rel=1e-5)

    def gradients(batch: LossBatch) -> dict[str, torch.Tensor | None]:
        joint.zero_grad()
        joint(batch).total.backward()
        return {name: p.grad for name, p in joint.unet.named_parameters()}

    before, after = gradients(batch), gradients(replace(batch, vision=seen))
    moved = {name for name, grad in before.items() if grad is not None and not torch.allclose(grad, after[name])}  # type: ignore[arg-type]
    deepest = "down_blocks.1" if joint.unet.mid_block is None else "mid_block"
    assert any(name.startswith(deepest) for name in moved) and not any(name.startswith("up_blocks") for name in moved)
    optimizer = torch.optim.Adam(joint.parameters(), 3e-3)
    for _ in range(40):
        losses = joint(replace(batch, vision=seen))
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
    assert losses.align is not None and losses.align < 0.8 * aligned.align
    optimizer.zero_grad()
    joint(batch).total.backward()
    assert all(p.grad is not None for p in joint.aligner.parameters())  # type: ignore[union-attr]  # as DDP wants it


def test_a_perfect_match_costs_nothing(encoder: Path) -> None:
    objective = ObjectiveConfig(align_weight=1.0, align_encoder=str(encoder))
    joint: JointModel = build_joint(TrainConfig(unet=UNetConfig(arguments=TINY_UNET), objective=objective), WIDTH)
    aligner, same = joint.aligner, torch.ones(2, 3, 3, 24)
    assert aligner is not None
    with torch.no_grad():
        aligner.project[-1].weight.zero_()  # type: ignore[operator]
        aligner.project[-1].bias.fill_(2.0)  # type: ignore[operator]
        for vision, least, most in ((same, 0, 1e-5), (-same, 2 - 1e-5, 2 + 1e-5)):
            aligner.seen = torch.randn(4, TINY_UNET["block_out_channels"][-1], 2, 2)
            found = aligner(vision)
            assert found.shape == (4,) and least <= found.min() and found.max() <= most


def test_it_ends_with_its_last_step_and_resumes_exactly(run: Path, arguments: list[str], tmp_path: Path) -> None:
    aligned = ["loss_align" in row for row in records(run / "stage1")]
    assert aligned == [True] * 6 + [False] * 2
    assert train_here([*arguments, f"run_dir={tmp_path / 'whole'}"]) == 0
    assert_same_bits(newest(run / "stage1"), newest(tmp_path / "whole" / "stage1"))


def test_a_checkpoint_draws_and_starts_a_stage_without_the_projector(run: Path, tiny_arguments: list[str], tmp_path: Path) -> None:
    stored = tensors(newest(run / "stage1"))
    held = {name.partition(":")[0] for name in stored if "aligner." in name}
    assert held == {"training_state/model.safetensors", "training_state/optimizer.safetensors"}
    asked = (f"ckpt={run / 'stage1'}", "prompt=a star", "steps=2", "threads=1")
    assert sample_here(*asked, f"output_dir={tmp_path / 'drawn'}") == 0 and (tmp_path / "drawn" / "00000.png").exists()
    assert train_here([*tiny_arguments, "stage=2", f"run_dir={run}", "max_steps=1"]) == 0
    assert not any("aligner." in name for name in tensors(newest(run / "stage2")))


def test_what_cannot_be_aligned_is_refused_in_a_sentence(arguments: list[str], tiny_arguments: list[str], tmp_path: Path) -> None:
    user_error("set objective.align_encoder=", compose_train, [*tiny_arguments, "objective.align_weight=1"])
    for other in ("unet=pixart", "compile=true"):
        user_error("objective.align_weight does not go with", compose_train, [*arguments, other])
    for wrong in (tmp_path, "no/such-model"):
        user_error("is no vision transformer", build_here, [*arguments, f"objective.align_encoder={wrong}", f"run_dir={tmp_path / 'run'}"])
    held = tmp_path / "cache"
    assert cache([*tiny_arguments, "what=both", f"output={held}"]) == 0
    given = [*arguments, f"run_dir={tmp_path / 'cached'}", "max_steps=1"]
    assert f"data.cache={held / 'text'}" in user_error("needs the pictures themselves", train_here, [*given, f"data.cache={held}"])
    assert train_here([*given, f"data.cache={held / 'text'}"]) == 0
