"""A loss that is not a number or far above its average: stop, skip or roll back, with the step and the samples named."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from commands import user_error
from diffusers import AutoencoderKL
from spoiled_train import spoil_latents
from training_runs import Train, assert_same_bits, newest, sample_here, steps_saved, tensors

from paradiffusion.checkpoints.manifest import find_fault
from paradiffusion.errors import UserError


def test_huge_learning_rate_stops_and_names_step_and_samples(train: Train, tmp_path: Path) -> None:
    assert train("max_steps=4") == 0
    run = tmp_path / "run"
    wild = tmp_path / "wild"
    with pytest.raises(UserError, match=r"step \d+: the loss is .*samples 000000\.tar/big-\d+.*lower optimizer\.lr"):
        train("stage=2", f"init_from={run / 'stage1'}", f"run_dir={wild}", "optimizer.lr=1e12", "max_steps=60",
              "optimizer.warmup_steps=0", "checkpoint_every=100")  # fmt: skip
    assert steps_saved(wild / "stage2") == []


@pytest.mark.parametrize(("on_spike", "factor"), [("stop", math.nan), ("skip", math.inf), ("rollback", math.nan)])
def test_loss_that_is_not_finite(
    on_spike: str, factor: float, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    seen = spoil_latents(monkeypatch, {5}, factor)
    stage = tmp_path / "run" / "stage1"
    if on_spike == "stop":
        with pytest.raises(UserError) as caught:
            train("on_spike=stop")
        said = str(caught.value)
        assert steps_saved(stage) == [4]
    else:
        assert train(f"on_spike={on_spike}") == 0
        said = capsys.readouterr().out
        assert steps_saved(stage) == [4, 8]
        # Rolling back leaves out step 4 as well, whose update the checkpoint of step 4 does not have.
        skipped = [5] if on_spike == "skip" else [4, 5]
        assert json.loads((stage / "summary.json").read_text())["skipped_steps"] == skipped
        assert all(torch.isfinite(tensor).all() for tensor in tensors(newest(stage)).values())
    assert "step 5: the loss is" in said and all(key in said for key in seen[5])
    if on_spike != "skip":
        assert str(stage / "checkpoints" / "step_000004") in said
    assert find_fault(stage / "checkpoints" / "step_000004") is None


def test_finite_spike_is_measured_against_the_average(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = tmp_path / "run" / "stage1"
    # Over ten times the usual loss; at step 3, before there is a usual loss, it passes.
    spoil_latents(monkeypatch, {3, 52}, 20.0)
    with pytest.raises(UserError, match=r"step 52: the loss is .*over 10 times its average .*step_000050"):
        train("max_steps=56", "checkpoint_every=10", "log_every=10")
    assert steps_saved(stage)[-1] == 50
    # The same command with another answer goes on from there; the average is part of the checkpoint.
    assert train("max_steps=56", "checkpoint_every=10", "log_every=10", "on_spike=skip") == 0
    assert json.loads((stage / "summary.json").read_text())["skipped_steps"] == [52]


@pytest.mark.parametrize("factor", [math.nan, 30.0])
def test_a_skipped_step_leaves_weights_average_and_moments_as_they_were(
    factor: float, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paradiffusion.training.spikes.SPIKE_WARMUP", 2)
    spoil_latents(monkeypatch, {5}, factor)
    assert train("on_spike=skip", "max_steps=7", "checkpoint_every=1", "keep_last=9") == 0
    assert json.loads((tmp_path / "run" / "stage1" / "summary.json").read_text())["skipped_steps"] == [5]
    before, after = (tmp_path / "run" / "stage1" / "checkpoints" / f"step_{step:06d}" for step in (5, 6))
    assert_same_bits(before, after)


def test_a_run_stopped_after_a_skipped_step_goes_on_with_the_same_bits(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Stopped at 7 and started again, a run that skipped step 5 ends in the same bits as one that did not stop.
    spoil_latents(monkeypatch, {5}, math.nan)
    ends = []
    for name, stops in (("once", ["max_steps=8"]), ("twice", ["max_steps=7", "max_steps=8"])):
        for stop in stops:
            assert train("on_spike=skip", f"run_dir={tmp_path / name}", stop) == 0
        ends.append(newest(tmp_path / name / "stage1"))
    assert_same_bits(*ends)
    assert json.loads((ends[1] / "training_state" / "state.json").read_text())["skipped"] == [5]


def test_spikes_without_end_stop_the_run(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_latents(monkeypatch, set(range(5, 100)), math.nan)
    user_error(r"step 15: .*step_0000(08|12)", train, "max_steps=60", "on_spike=skip")


def test_a_run_that_skips_every_step_does_not_succeed(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_latents(monkeypatch, set(range(9)), math.nan)
    user_error("each of the 3 steps was skipped, so nothing was learned", train, "max_steps=3", "on_spike=skip")
    assert not (tmp_path / "run" / "stage1" / "summary.json").exists()


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_codec_that_overflows_is_named_with_its_dtype(
    part: str, codec_folder: Path, train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vae = AutoencoderKL.from_pretrained(codec_folder)
    getattr(vae, part).conv_out.weight.data *= 1e7
    vae.save_pretrained(tmp_path / "vae")
    codec = [f"codec.path={tmp_path / 'vae'}", "codec.dtype=float16"]
    if part == "encoder":  # of training, where no rate and no skipping helps
        user_error(r"step 0: the latents .* overflowed in its dtype; set codec\.dtype=", train, *codec, "on_spike=skip")
        return
    assert train(*codec, "max_steps=1", "validation.samples=0") == 0
    drawn = [f"ckpt={tmp_path / 'run'}", "prompt=a red circle", "steps=2", f"output_dir={tmp_path / 'out'}"]
    user_error(r"the pictures that the autoencoder decodes .* set codec\.dtype=", sample_here, *drawn)
    assert not list((tmp_path / "out").glob("*.png")), "no black picture"
    assert sample_here(*drawn, "codec.dtype=float32") == 0
