"""One key each for precision, accumulation and clipping: the launcher's other values are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from commands import ROOT
from data_fixtures import half_unreadable
from training_runs import build_here, clipped, gradients_of

from paradiffusion.compose import compose_train
from paradiffusion.errors import UserError
from paradiffusion.training.engine import check_deepspeed_file, check_launch

NAMES = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_GRADIENT_CLIPPING")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NAMES, "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("ACCELERATE_MIXED_PRECISION", "fp16", "mixed_precision=fp16, and precision makes it no"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "mixed_precision=bf16, and precision makes it no"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "batch_size and micro_batch_size makes it 2"),
        ("ACCELERATE_GRADIENT_CLIPPING", "0.5", "gradient_clipping=0.5, and optimizer.max_grad_norm makes it 2.0"),
    ],
)
def test_contradictions_are_refused(
    name: str, value: str, said: str, tiny_arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose_train([*tiny_arguments, "precision=fp32", "optimizer.max_grad_norm=2.0"])
    check_launch(config, 2)
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        check_launch(config, 2)
    assert said in str(caught.value)


def test_what_launchers_always_export_is_no_contradiction(
    tiny_arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose_train([*tiny_arguments, "precision=bf16", "optimizer.max_grad_norm=0.5"])
    for name, value in zip(NAMES, ("no", "1", "1.0"), strict=True):
        monkeypatch.setenv(name, value)
    check_launch(config, 4)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"train_batch_size": 99}, "train_batch_size=99, and batch_size makes it 4"),
        ({"gradient_accumulation_steps": 8}, "batch_size and micro_batch_size makes it 1"),
        ({"bf16": {"enabled": True}}, "bf16.enabled=True, and precision makes it fp32"),
        ({"optimizer": {"type": "Adam"}}, "take optimizer out"),
        ({"scheduler": {"type": "WarmupLR"}}, "optimizer.schedule"),
    ],
)
def test_a_deepspeed_file_of_the_users_own(
    settings: dict[str, object], said: str, tiny_arguments: list[str], tmp_path: Path
) -> None:
    config = compose_train(tiny_arguments)
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, "train_batch_size": "auto"}))
    check_deepspeed_file(path, config, 1)
    path.write_text(json.dumps(settings))
    with pytest.raises(UserError) as caught:
        check_deepspeed_file(path, config, 1)
    assert said in str(caught.value)
    path.write_text("{")
    with pytest.raises(UserError, match="could not be read"):
        check_deepspeed_file(path, config, 1)


def test_the_launch_configurations_leave_our_keys_alone() -> None:
    files = sorted((ROOT / "configs" / "launch").glob("*.yaml"))
    assert {path.stem for path in files} == {"one", "ddp", "zero2", "zero2_offload", "zero3", "two_nodes"}
    for path in files:
        settings = yaml.safe_load(path.read_text())
        both = {**settings, **settings.get("deepspeed_config", {})}
        assert (
            not {"mixed_precision", "gradient_accumulation_steps", "gradient_clipping", "train_batch_size"}
            & both.keys()
        )


def test_accumulated_micro_batches_have_the_gradient_of_the_whole_batch(
    tiny_arguments: list[str], tmp_path: Path
) -> None:
    found = []
    for micro in (4, 2, 1):
        # Padding is masked, so that how far a micro-batch is padded must not matter.
        setup = build_here(
            [
                *tiny_arguments,
                "stage=2",
                "init_from=scratch",
                f"run_dir={tmp_path / str(micro)}",
                f"micro_batch_size={micro}",
            ]
        )
        assert setup.micro_batches == 4 // micro
        found.append(gradients_of(setup, steps=2))
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        for name, gradient in gradients.items():
            apart = float((gradient - found[0][1][name]).norm())
            assert apart <= 1e-4 * float(found[0][1][name].norm()) + 1e-7, name


def test_unreadable_samples_leave_the_mean_over_the_readable_ones(tiny_arguments: list[str], tmp_path: Path) -> None:
    bad = [f"data.shards={half_unreadable(tmp_path / 'bad')}", "data.max_bad_fraction=0.9"]
    found = []
    for micro in (4, 1):
        trainer = build_here([*tiny_arguments, *bad, f"run_dir={tmp_path / str(micro)}", f"micro_batch_size={micro}"])
        batches = trainer.loader()
        for _ in range(2):
            trainer.train_step(batches)
        share, taken = trainer.gradients(batches)
        found.append((float(share), clipped(trainer)))
        errors = torch.cat([losses.errors for _, _, losses in taken])
        weights = torch.cat([batch.weights for batch, _, _ in taken])
        assert 0 < weights.sum() < 4
        assert found[-1][0] == pytest.approx(float((errors * weights).sum() / weights.sum()), rel=1e-5)
    (loss, whole), (other, parts) = found
    assert loss == pytest.approx(other, rel=1e-5)
    for name, gradient in parts.items():
        assert float((gradient - whole[name]).norm()) <= 1e-4 * float(whole[name].norm()) + 1e-7, name
