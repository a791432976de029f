"""What a user can get wrong: one sentence that names it, or training that goes on and says what it left out."""

from __future__ import annotations

import math
import re
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import user_error, wait_for
from training_runs import Train, assert_same_bits, newest, records, sample_here, steps_saved, train_here

from paradiffusion.checkpoints.manifest import find_fault, write_manifest
from paradiffusion.compose import compose_sample, compose_train
from paradiffusion.data.shards import RawSample, write_shards
from paradiffusion.errors import UserError
from paradiffusion.scenes.dataset import demo_samples
from paradiffusion.training import trainer as module
from paradiffusion.training.start import find_init
from paradiffusion.training.trainer import Trainer


@pytest.fixture(scope="module")
def trained(tiny_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps with two checkpoints."""
    run = tmp_path_factory.mktemp("trained") / "run"
    assert train_here([*tiny_arguments, f"run_dir={run}", "optimizer.warmup_steps=0"]) == 0
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged; ``train`` goes on there."""
    return shutil.copytree(trained, tmp_path / "run")


def test_what_contradicts_itself_or_is_not_there(train: Train, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    mistakes = (
        ("data.val_shards=nowhere", r"^data\.val_shards=nowhere matches no \.tar"),
        ("data.bucket_multiple=8", r"data\.bucket_multiple=8 must be a multiple of 16"),
        (f"run_dir={tmp_path / 'file'}", r"run_dir: .* cannot be written .*choose another run_dir="),
    )
    for number, (argument, said) in enumerate(mistakes):
        user_error(said, train, f"run_dir={tmp_path / str(number)}", argument)
    with pytest.raises(UserError, match=r"run `python train\.py preset=paper stage=1 run_dir=runs/none` first"):
        find_init(compose_train(["preset=paper", "stage=2", "run_dir=runs/none", "data.shards=unused"]))
    with pytest.raises(UserError, match=r"text_encoder has keys of its own; set text_encoder\.path or"):
        compose_sample(["ckpt=x", "prompt=a", "text_encoder=qwen3_4b"])
    with pytest.raises(UserError, match=r"device=cuda:99 is not to be had here, where torch finds"):
        sample_here(f"ckpt={trained}", "prompt=a", "device=cuda:99", f"output_dir={tmp_path / 'out'}")


def test_stage_without_the_one_before(train: Train, run: Path) -> None:
    user_error(r"run `python train\.py stage=2 run_dir=.*` first", train, "stage=3")
    user_error(r"applies the LoRA adapter of stage 2, and .* has none", train, "stage=3", f"init_from={run / 'stage1'}")
    user_error(r"init_from=.*nowhere holds no checkpoint.*diffusers folder", train, "stage=2", f"init_from={run / 'nowhere'}")
    user_error(r"was trained with conditioning\.\w+=.*use the same conditioning", train, "stage=2", "conditioning=paper")
    for step in steps_saved(run / "stage1"):
        (run / "stage1" / "checkpoints" / f"step_{step:06d}" / "checkpoint.json").unlink()
    user_error(r"holds no whole checkpoint; run `python train\.py stage=1", train, "stage=2")


def test_tar_cut_in_the_middle(train: Train, demo_folder: Path, tmp_path: Path) -> None:
    shard = tmp_path / "cut" / "000000.tar"
    shard.parent.mkdir()
    whole = (demo_folder / "web" / "000000.tar").read_bytes()
    shard.write_bytes(whole[: len(whole) // 2 + 100])
    with pytest.raises(UserError, match=r"000000\.tar.*data\.allow_truncated=true") as caught:
        train(f"data.shards={shard.parent}")
    found = [int(number) for number in re.findall(r"\b\d+\b(?= whole)", str(caught.value))]
    assert found and 20 < found[0] < 100, caught.value
    assert train(f"data.shards={shard.parent}", "data.allow_truncated=true", "max_steps=2") == 0


def changed(count: int, change: Callable[[int, RawSample], RawSample], folder: Path) -> Path:
    """Shards of ``count`` scenes, each passed through ``change``."""
    write_shards((change(number, one) for number, one in enumerate(demo_samples("web", count))), folder, 40)
    return folder


def test_image_that_does_not_decode(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoil(number: int, one: RawSample) -> RawSample:
        # Half of the file: its header still tells the size, so that it is planned, read, and found to be bad.
        return replace(one, image=one.image[: len(one.image) // 2]) if number % 10 == 3 else one

    weights: list[float] = []
    planned = 0
    encode = Trainer.encode

    def watched(trainer: Any, batch: Any) -> Any:
        nonlocal planned
        weights.extend(batch.weights.tolist())
        planned += sum(trainer.plan.index.key(row).endswith("3") for row in trainer.plan.batch(batch.step).rows)
        return encode(trainer, batch)

    folder = changed(40, spoil, tmp_path / "bad")
    monkeypatch.setattr(Trainer, "encode", watched)
    assert train(f"data.shards={folder}", "max_steps=10", "log_every=10", "data.max_bad_fraction=0.2") == 0
    (row,) = records(tmp_path / "run" / "stage1")
    assert row["bad_samples"] == weights.count(0.0) == planned > 0
    assert math.isfinite(row["loss"])
    assert f"unreadable {planned}" in capsys.readouterr().out
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"samples could not be read .*web-0000\d3.*data\.max_bad_fraction is 0\.01"):
        train(f"data.shards={folder}", f"run_dir={tmp_path / 'strict'}", "max_steps=40")


def test_captions_missing_empty_and_of_5000_words(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def odd(number: int, one: RawSample) -> RawSample:
        captions: dict[str, Any] = [
            {"short": "red circle " * 2500}, {"short": ""}, {}, {"short": " \n\t"}, {"short": None}, one.meta["captions"],
        ][number % 6]  # fmt: skip
        return replace(one, meta={**one.meta, "captions": captions})

    folder = changed(48, odd, tmp_path / "odd")
    assert train(f"data.shards={folder}", "max_steps=8", "log_every=8", "data.caption_dropout=0") == 0
    (row,) = records(tmp_path / "run" / "stage1")
    # 16 of 48 samples have a caption, and half of those are too long; what fills no batch waits, so it is not just half.
    assert 8 <= row["truncated_count"] <= 24 and row["truncated"] == row["truncated_count"] / 32
    assert "loss_words/257+" in row and math.isfinite(row["loss_words/257+"])
    output = capsys.readouterr().out
    assert "32 samples without a caption are left out" in output
    assert f"truncated {row['truncated']:5.1%}" in output
    nothing = changed(8, lambda _, one: replace(one, meta={**one.meta, "captions": {}}), tmp_path / "mute")
    user_error("caption", train, f"data.shards={nothing}", f"run_dir={tmp_path / 'mute_run'}")


def test_sampling_from_a_damaged_checkpoint(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def draw(ckpt: Path) -> int:
        return sample_here(f"ckpt={ckpt}", "prompt=a", "steps=1", f"output_dir={tmp_path / 'out'}")

    checkpoint, older = newest(run / "stage1"), run / "stage1" / "checkpoints" / "step_000004"
    weights = checkpoint / "unet" / "diffusion_pytorch_model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size - 7)
    user_error(r"is damaged: unet/diffusion_pytorch_model\.safetensors has", draw, checkpoint)
    assert draw(run) == 0  # which has an older one
    assert "step_000004, step 4" in capsys.readouterr().out
    (older / "refiner" / "model.safetensors").unlink()
    for ckpt, sentence in (
        (older, "refiner/model.safetensors is missing"), (run, "no whole checkpoint is left"),
        (tmp_path / "no", "holds no checkpoint; expected a run"),
    ):  # fmt: skip
        user_error(re.escape(sentence), draw, ckpt)
    # Somebody put the files together by hand, and made a manifest of them.
    (checkpoint / "checkpoint.json").write_text("{}")
    write_manifest(checkpoint)
    user_error(r"checkpoint\.json does not describe a checkpoint", draw, checkpoint)


@pytest.mark.parametrize("more", [[], ["async_save=true", "max_steps=16"]], ids=["waited for", "while steps run"])
def test_a_full_disk_while_saving(more: list[str], train: Train, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint of step 4 fits and that of step 8 does not; with room the run ends as if nothing had been.

    From the second checkpoint on, the system refuses files over a megabyte.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    save, stage = module.save_checkpoint, tmp_path / "run" / "stage1"

    def limited(*arguments: Any) -> Callable[[], Path]:
        if arguments[5].step == 8:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
        return save(*arguments)

    said = r"step 8 could not be saved in .*step_000004 is whole: make room"

    def stepped(trainer: Any, *given: Any) -> Any:
        if trainer.state.step == 8:  # beside which the checkpoint of before is written
            wait_for(trainer.failed_to_save)
        return step(trainer, *given)

    step = Trainer.train_step
    try:
        with monkeypatch.context() as patch, pytest.raises(UserError, match=said) as caught:
            patch.setattr(module, "save_checkpoint", limited)
            patch.setattr(Trainer, "train_step", stepped)
            train("optimizer.warmup_steps=0", "log_every=1", *more)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert steps_saved(stage) == [4] and find_fault(newest(stage)) is None
    assert records(stage)[-1]["step"] == (9 if more else 8)
    assert not list((stage / "checkpoints").glob(".writing*"))
    assert train("optimizer.warmup_steps=0") == 0
    assert_same_bits(newest(trained / "stage1"), newest(stage))
