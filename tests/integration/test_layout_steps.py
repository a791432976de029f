"""objective.layout_steps: the text path alone first, then the denoiser with it; and a stop in between changes nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import ROOT
from training_runs import assert_same_bits, free_port, newest, records, tensors

from paradiffusion.errors import UserError

FIRST = ["objective.layout_steps=3", "log_every=1", "checkpoint_every=3"]


def test_the_denoiser_begins_after_them(train: Callable[..., int], tmp_path: Path) -> None:
    whole, parted = tmp_path / "whole" / "stage1", tmp_path / "parted" / "stage1"
    assert train(*FIRST, f"run_dir={whole.parent}", "max_steps=6", "keep_last=5", "spike_factor=1.5") == 0
    before, after = (tensors(whole / "checkpoints" / f"step_{step:06d}") for step in (3, 6))
    moved = {
        name for name in before if ("unet" in name or "refiner" in name) and not torch.equal(before[name], after[name])
    }
    assert any("unet" in name for name in moved) and any("refiner" in name for name in moved)
    moments = {name for name in before if "exp_avg/" in name and before[name].any()}
    assert any("refiner" in name for name in moments) and not any("/unet" in name for name in moments)
    losses = [(row["loss"], row["loss_layout"]) for row in records(whole)]
    assert all(loss == pytest.approx(layout) for loss, layout in losses[:3]) and losses[3][0] != pytest.approx(
        losses[3][1]
    )
    for steps in (2, 4, 6):  # as if it had been stopped among them, at their end, and after it
        assert train(*FIRST, f"run_dir={parted.parent}", f"max_steps={steps}", "spike_factor=1.5") == 0
    assert_same_bits(newest(whole), newest(parted))


def test_two_processes_give_what_one_gives(
    tiny_arguments: list[str], train: Callable[..., int], tmp_path: Path
) -> None:
    given = [*tiny_arguments, *FIRST, "max_steps=6"]
    assert train(*FIRST, "max_steps=6") == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    done = subprocess.run(
        [*launch, "train.py", *given, f"run_dir={tmp_path / 'two'}"], cwd=ROOT, env=dict(os.environ), capture_output=True,
        text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (tensors(newest(tmp_path / run / "stage1")) for run in ("run", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=0, msg=name)


def test_a_start_may_run_the_refiner_more_often_but_not_less(train: Callable[..., int], tmp_path: Path) -> None:
    assert train("max_steps=1") == 0
    more = [
        "conditioning.refiner_passes=2",
        f"run_dir={tmp_path / 'more'}",
        f"init_from={tmp_path / 'run'}",
        "max_steps=1",
    ]
    assert train(*more) == 0
    with pytest.raises(UserError, match="conditioning.refiner_passes=2, and this command says 1"):
        train(f"init_from={tmp_path / 'more'}", f"run_dir={tmp_path / 'less'}")


def test_what_cannot_be(train: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="layout_patch=0 has none"):
        train(*FIRST, "conditioning.layout_patch=0")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="does not go with DeepSpeed"):
        train(*FIRST)
