"""objective.layout_share: the text path alone first, then the denoiser with it; and a stop in between changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import user_error
from ranks import run_on_two
from training_runs import Train, assert_same_bits, build_here, newest, records, tensors

from paradiffusion.compose import compose_train

FIRST = ["objective.layout_share=0.5", "max_steps=6", "log_every=1", "checkpoint_every=3"]


def test_the_denoiser_begins_after_them(tiny_arguments: list[str], train: Train, tmp_path: Path) -> None:
    whole, parted = tmp_path / "whole" / "stage1", tmp_path / "parted" / "stage1"
    assert train(*FIRST, f"run_dir={whole.parent}", "keep_last=5", "spike_factor=1.5") == 0
    before, after = (tensors(whole / "checkpoints" / f"step_{step:06d}") for step in (3, 6))
    moved = {name for name in before if ("unet" in name or "refiner" in name) and not torch.equal(before[name], after[name])}
    assert any("unet" in name for name in moved) and any("refiner" in name for name in moved)
    moments = {name for name in before if "exp_avg/" in name and before[name].any()}
    assert any("refiner" in name for name in moments) and not any("/unet" in name for name in moments)
    losses = [(row["loss"], row["loss_layout"]) for row in records(whole)]
    assert all(loss == pytest.approx(layout) for loss, layout in losses[:3]) and losses[3][0] != pytest.approx(losses[3][1])
    for steps in (2, 4, 6):  # stopped among them, after them, and at the end
        trainer = build_here([*tiny_arguments, *FIRST, f"run_dir={parted.parent}", "spike_factor=1.5"])
        assert trainer.train(lambda trainer=trainer, steps=steps: trainer.state.step + 1 >= steps) == (steps == 6)  # type: ignore[misc]
    assert_same_bits(newest(whole), newest(parted))


def test_two_processes_give_what_one_gives(tiny_arguments: list[str], train: Train, tmp_path: Path) -> None:
    given = [*tiny_arguments, *FIRST]
    assert train(*FIRST) == 0
    ended, said = run_on_two("train.py", *given, f"run_dir={tmp_path / 'two'}")
    assert ended == [0, 0], said
    one, two = (tensors(newest(tmp_path / run / "stage1")) for run in ("run", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("none", ["conditioning.layout_patch=0", "objective.layout_weight=0", "conditioning=paper"])
def test_without_a_layout_loss_there_is_nothing_to_train_first(none: str, tiny_arguments: list[str]) -> None:
    user_error("trains by the layout loss alone", compose_train, [*tiny_arguments, *FIRST, none])


def test_deepspeed_would_decay_the_waiting_denoiser(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    user_error("does not go with DeepSpeed", train, *FIRST)
