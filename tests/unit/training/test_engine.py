"""One key each for precision, accumulation and clipping: the launcher's other values are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from commands import ROOT
from data_fixtures import half_unreadable
from training_runs import build_here, clipped

from paradiffusion.compose import compose_train
from paradiffusion.errors import UserError
from paradiffusion.training.engine import check_deepspeed_file, check_launch

NAMES = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_GRADIENT_CLIPPING")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NAMES, "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)


def test_contradictions_are_refused(tiny_arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose_train([*tiny_arguments, "precision=fp32", "optimizer.max_grad_norm=2.0"])
    check_launch(config, 2)
    for name, value, said in (
        (NAMES[0], "fp16", "mixed_precision=fp16, and precision makes it no"),
        (NAMES[1], "4", "batch_size and micro_batch_size makes it 2"),
        (NAMES[2], "0.5", r"gradient_clipping=0\.5, and optimizer\.max_grad_norm makes it 2\.0"),
    ):
        with monkeypatch.context() as patch, pytest.raises(UserError, match=said):
            patch.setenv(name, value)
            check_launch(config, 2)
    for name, value in zip(NAMES, ("no", "1", "1.0"), strict=True):  # what launchers always export
        monkeypatch.setenv(name, value)
    check_launch(compose_train([*tiny_arguments, "precision=bf16", "optimizer.max_grad_norm=0.5"]), 4)


def test_a_deepspeed_file_of_the_users_own(tiny_arguments: list[str], tmp_path: Path) -> None:
    config, path = compose_train(tiny_arguments), tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, "train_batch_size": "auto"}))
    check_deepspeed_file(path, config, 1)
    for settings, said in (
        ('{"train_batch_size": 99}', "train_batch_size=99, and batch_size makes it 4"),
        ('{"gradient_accumulation_steps": 8}', "batch_size and micro_batch_size makes it 1"),
        ('{"bf16": {"enabled": true}}', "bf16.enabled=True, and precision makes it fp32"),
        ('{"optimizer": {"type": "Adam"}}', "take optimizer out"),
        ('{"scheduler": {"type": "WarmupLR"}}', "optimizer.schedule"),
        ("{", "could not be read"),
    ):
        path.write_text(settings)
        with pytest.raises(UserError, match=said):
            check_deepspeed_file(path, config, 1)


def test_the_launch_configurations_leave_our_keys_alone() -> None:
    files = sorted((ROOT / "configs" / "launch").glob("*.yaml"))
    assert {path.stem for path in files} == {"one", "ddp", "zero2", "zero2_offload", "zero3", "two_nodes"}
    ours = {"mixed_precision", "gradient_accumulation_steps", "gradient_clipping", "train_batch_size"}
    for settings in (yaml.safe_load(path.read_text()) for path in files):
        assert not ours & {**settings, **settings.get("deepspeed_config", {})}.keys()


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


def test_accelerates_own_default_file_is_named_where_it_contradicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "default_config.yaml"
    file.write_text("distributed_type: MULTI_GPU\nmixed_precision: bf16\n")
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(file))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    config = compose_train(["preset=nano", "precision=fp32"])
    with pytest.raises(
        UserError, match=rf"^accelerate's own {file}, .* says mixed_precision=bf16, and precision makes it no;"
    ):
        check_launch(config, 1)
    file.write_text("mixed_precision: 'no'\n")
    with pytest.raises(UserError, match=r"^the launch configuration says mixed_precision=bf16"):
        check_launch(config, 1)
