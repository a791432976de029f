"""The training loop: three stages in a row, what each trains and leaves alone, and what is logged and kept."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import Train, build_here, gradients_of, hash_parameters, newest, records, sample_here, steps_saved, tensors, train_here

from paradiffusion.checkpoints.layouts import open_layout
from paradiffusion.checkpoints.manifest import find_fault
from paradiffusion.compose import compose_train
from paradiffusion.training.trainer import Trainer

ADAPTER = "text_encoder_lora/adapter_model.safetensors"
MASTERS = "training_state/model.safetensors"
MODERN_WORDS = "conditioning.max_tokens=64"  # attention over 256 tokens would cost more than it tells here


@dataclass
class Stages:
    """A run of three stages, and the language model's hash before and after each."""

    run: Path
    before: dict[int, str] = field(default_factory=dict)
    after: dict[int, str] = field(default_factory=dict)

    def checkpoint(self, stage: int) -> Path:
        return newest(self.run / f"stage{stage}")


@pytest.fixture(scope="module")
def stages(tiny_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Stages:
    found = Stages(tmp_path_factory.mktemp("stages") / "run")
    train = Trainer.train
    with pytest.MonkeyPatch.context() as patch:
        for stage in (1, 2, 3):

            def watched(trainer: Trainer, *arguments: Any) -> bool:
                found.before[trainer.config.stage] = hash_parameters(trainer.encoder)
                finished = train(trainer, *arguments)
                found.after[trainer.config.stage] = hash_parameters(trainer.encoder)
                return finished

            patch.setattr(Trainer, "train", watched)
            assert train_here([*tiny_arguments, f"run_dir={found.run}", f"stage={stage}", "validate_every=4"]) == 0
    return found


def test_three_stages_run_and_say_what_they_did(stages: Stages) -> None:
    for stage in (1, 2, 3):
        folder = stages.run / f"stage{stage}"
        rows = records(folder)
        assert [row["step"] for row in rows] == [2, 4, 6, 8]
        for row in rows:
            positive = ("gradient_norm", "samples_per_second", "tokens_per_second", "seconds_per_step", "memory_gb", "learning_rate")
            assert math.isfinite(row["loss"]) and all(row[key] > 0 for key in positive)
            assert 0 <= row["data_wait"] <= 1 and 0 <= row["truncated"] <= 1
            assert row["bad_samples"] == 0 and row["images_seen"] == 4 * row["step"]
            for prefix in ("loss_time/", "loss_words/"):
                binned = [value for key, value in row.items() if key.startswith(prefix)]
                assert binned and min(binned) <= row["loss"] + 1e-9 and max(binned) >= row["loss"] - 1e-9
        held_out = records(folder, "validation")
        assert [row["step"] for row in held_out] == [4, 8]
        assert all(math.isfinite(row["loss_short"]) and math.isfinite(row["loss_long"]) for row in held_out)
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["stage"] == stage and summary["steps"] == 8 and summary["seconds"] > 0
        assert summary["validation"] == {key: held_out[-1][key] for key in ("loss_short", "loss_long")}
    long_bands = ("loss_words/78-128", "loss_words/129-256")
    assert any(band in row for row in records(stages.run / "stage2") for band in long_bands)


def test_language_model_never_changes_and_stage_3_keeps_the_adapter_of_stage_2(stages: Stages) -> None:
    assert stages.before == stages.after
    # PEFT renames but does not touch: the three stages read the very same model.
    assert stages.before[2] == stages.before[3] == stages.after[2]
    for stage in (1, 2, 3):
        stored = load_file(stages.checkpoint(stage) / MASTERS)
        stored |= load_file(stages.checkpoint(stage) / "training_state/optimizer.safetensors")
        language = [name for name in stored if "text_encoder." in name]
        assert len(language) == (8 + 3 * 8 if stage == 2 else 0)
        assert all(".lora_" in name for name in language)
        files = {path.parent.name for path in stages.checkpoint(stage).rglob("*.safetensors")}
        assert files - {"text_encoder_lora"} == {"unet", "refiner", "training_state"}
        if stage > 1:
            assert all(".lora_" in name for name in load_file(stages.checkpoint(stage) / ADAPTER))
    assert not (stages.checkpoint(1) / ADAPTER).exists()

    trained = load_file(stages.checkpoint(2) / ADAPTER)
    moved = {name: float(tensor.abs().max()) for name, tensor in trained.items() if "lora_B" in name}
    # q and v of two layers, under the names of PEFT and of models with a head; B begins at 0.
    assert len(moved) == 2 * 4 and all(value > 0 for value in moved.values())
    assert (stages.checkpoint(3) / ADAPTER).read_bytes() == (stages.checkpoint(2) / ADAPTER).read_bytes()
    assert not any("lora" in name for name in load_file(stages.checkpoint(3) / MASTERS))
    description = json.loads((stages.checkpoint(3) / "checkpoint.json").read_text())
    assert description["lora"]["rank"] == 8 and description["stage"] == 3


@pytest.mark.parametrize("stage", [2, 3])
def test_next_stage_starts_from_the_average(stage: int, stages: Stages, tiny_arguments: list[str], tmp_path: Path) -> None:
    source = stages.checkpoint(stage - 1)
    setup = build_here([*tiny_arguments, f"stage={stage}", f"init_from={source}", f"run_dir={tmp_path}"])
    averages, own, ema = open_layout(source).weights(), dict(setup.joint.named_parameters()), setup.ema.full()
    shared = [name for name in averages if name in own]
    assert len(shared) > 50 and all(torch.equal(own[name], averages[name]) for name in shared)
    assert len(ema) > 50 and all(torch.equal(ema[name], averages[name]) for name in shared if name in ema)
    masters = load_file(source / MASTERS)
    assert any(not torch.equal(own[name], masters[name]) for name in shared)


def test_average_is_fp32_and_no_copy_of_the_masters(stages: Stages) -> None:
    for stage in (1, 2, 3):
        checkpoint = stages.checkpoint(stage)
        assert all(t.dtype == torch.float32 for n, t in tensors(checkpoint).items() if not n.endswith("step"))
        masters, averages = load_file(checkpoint / MASTERS), open_layout(checkpoint).weights()
        assert masters.keys() <= averages.keys()
        assert not [name for name in masters if torch.equal(masters[name], averages[name])]
        optimizer = load_file(checkpoint / "training_state/optimizer.safetensors")
        assert {name.partition("/")[2] for name in optimizer} == set(masters)


@pytest.mark.parametrize("conditioning", ["modern", "paper"])
def test_lora_gradients_reach_every_layer(conditioning: str, stages: Stages, tiny_arguments: list[str], tmp_path: Path) -> None:
    start = "init_from=scratch" if conditioning == "paper" else f"init_from={stages.checkpoint(1)}"
    arguments = [*tiny_arguments, "stage=2", f"conditioning={conditioning}", start, f"run_dir={tmp_path}"]
    # At the first step B is 0, so that only B has a gradient; after one update both have.
    _, gradients = gradients_of(build_here([*arguments, MODERN_WORDS]), steps=2)
    lora = {name: gradient.abs().max().item() for name, gradient in gradients.items() if "lora_" in name}
    assert len(lora) == 8 and all(value > 0 for value in lora.values()), lora
    assert not any(name.startswith("text_encoder.") and "lora_" not in name for name in gradients)


@pytest.mark.parametrize(("stage", "repeats"), [(1, 2), (2, 1)])
def test_micro_batches_and_recomputation_change_nothing(
    stage: int, repeats: int, stages: Stages, tiny_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    arguments = [*tiny_arguments, f"stage={stage}", f"repeats={repeats}", f"run_dir={tmp_path}", MODERN_WORDS]
    arguments += [f"init_from={stages.checkpoint(1)}"]
    # In stage 2 B begins at 0, so that A has a gradient from the second step on; Adam's step before it divides by the
    # gradient's size, which makes rounding in the smallest ones visible.
    steps, tolerance = (1, 1e-5) if stage == 1 else (2, 1e-3)
    loss, gradients = gradients_of(build_here(arguments), steps)
    # Three do not divide four: two at once are taken.
    for change, count in (("micro_batch_size=1", 4), ("micro_batch_size=3", 2), ("gradient_checkpointing=true", 1)):
        setup = build_here([*arguments, change])
        assert setup.micro_batches == count
        assert ("micro-batches of 2: micro_batch_size=3 " in capsys.readouterr().out) == (count == 2)
        other_loss, others = gradients_of(setup, steps)
        assert other_loss == pytest.approx(loss, rel=1e-5), change
        assert others.keys() == gradients.keys()
        norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        apart = torch.stack([(others[name] - gradients[name]).norm() for name in gradients]).norm()
        assert apart < tolerance * norm, change
        lora = [gradient.abs().max() for name, gradient in others.items() if "lora_" in name]
        assert len(lora) == (8 if stage == 2 else 0) and all(value > 0 for value in lora), change


def test_bf16_keeps_masters_and_average_in_fp32(train: Train, tmp_path: Path) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        run = tmp_path / precision
        assert train("stage=1", f"run_dir={run}", f"precision={precision}", "log_every=8") == 0
        losses[precision] = records(run / "stage1")[0]["loss"]
        stored = tensors(newest(run / "stage1"))
        assert all(t.dtype == torch.float32 for t in stored.values())
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)


def test_checkpoints_are_pruned(train: Train, tmp_path: Path) -> None:
    stage = tmp_path / "run" / "stage1"
    assert train("max_steps=6", "checkpoint_every=1", "keep_last=2", "keep_every=2") == 0
    assert steps_saved(stage) == [2, 4, 5, 6]
    assert (stage / "checkpoints" / "latest").read_text().strip() == "step_000006"
    assert all(find_fault(stage / "checkpoints" / f"step_{step:06d}") is None for step in steps_saved(stage))
    assert not list((stage / "checkpoints").glob(".writing*"))
    assert train("max_steps=7", "keep_last=1", "keep_every=null") == 0
    assert steps_saved(stage) == [7]


PROMPTS = (
    {"prompt": "A large red circle is in the top left corner. A green square is at the bottom right.", "seed": 5},
    {"prompt": "A dog | on the moon.", "height": 48, "width": 80, "steps": 3},
)


def test_trackers_get_what_the_log_gets_and_what_is_drawn(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard; and wandb, which stays offline without a key. The user's prompts are drawn as sample.py draws them."""
    stage, prompts = tmp_path / "run" / "stage1", tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    chosen = ("validation.images=1", f"validation.prompts={prompts}")
    for again in (True, False):  # a step that is done again is shown once
        assert train("tracker=tensorboard", "max_steps=4", "checkpoint_every=2", *chosen) == 0
        if again:
            shutil.rmtree(stage / "checkpoints" / "step_000004")
            (stage / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records(stage)))
    events = EventAccumulator(str(stage / "tensorboard"), {"images": 0, "tensors": 0, "scalars": 0})
    events.Reload()
    logged = {row["step"]: row["loss"] for row in records(stage)}
    assert {event.step: pytest.approx(event.value) for event in events.Scalars("train/loss")} == logged
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4]
    assert [event.step for event in events.Scalars("validation/loss_short")] == [4]
    held_out = records(stage, "validation")[-1]
    assert not any(key.startswith(("loss_time", "loss_words")) for key in held_out)  # these are the trackers' alone
    table = events.Tensors("validation/loss_by_words/text_summary")[-1].tensor_proto.string_val[0].decode()
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    assert sum(int(samples) for _, _, samples in rows) == 8  # four samples, each with a short and a long caption
    mean = sum(float(loss) * int(samples) for _, loss, samples in rows) / 8
    assert mean == pytest.approx((held_out["loss_short"] + held_out["loss_long"]) / 2, abs=1e-4)
    assert [one.value for one in events.Scalars(f"validation/loss_words/{rows[0][0]}")] == [pytest.approx(float(rows[0][1]), abs=1e-4)]
    assert "validation/loss_by_time/text_summary" in events.Tags()["tensors"]

    (grid,) = events.Images("validation/samples")
    assert np.array_equal(picture(grid.encoded_image_string), picture(stage / "samples" / "step_000004.png"))
    out = tmp_path / "out"
    assert sample_here(f"ckpt={stage}", f"prompt_file={prompts}", "seed=1234", "dtype=float32", f"output_dir={out}") == 0
    expected = [picture(out / f"{number:05d}.png") for number in range(2)]
    for number, one in enumerate(expected, 1):  # after the held-out sample
        (event,) = events.Images(f"validation/prompts/{number:03d}")
        assert event.step == 4 and close(picture(event.encoded_image_string), one)
    table = events.Tensors("validation/prompts/text_summary")[-1].tensor_proto.string_val[0].decode()
    told = [line.strip("|").split(" | ") for line in table.splitlines()]
    assert told[0][0].strip() == "prompt" and told[3][2] == "2" and told[4][1:3] == ["0", "0"]
    assert PROMPTS[0]["prompt"] in told[3][0] and "A dog \\| on the moon." in table

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert compose_train(["tracker=wandb"]).tracker.mode == "online"
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    # Two runs of one name, with characters that an id may not have, are two runs there, too.
    for folder in ("a", "b"):
        with monkeypatch.context() as patched:
            patched.setenv("WANDB_DATA_DIR", "")  # to be put back
            patched.delenv("WANDB_DATA_DIR")
            assert train("tracker=wandb", "max_steps=4", *chosen, f"run_dir={tmp_path / folder / 'my:run'}") == 0
    stages = [tmp_path / folder / "my:run" / "stage1" for folder in ("a", "b")]
    ids = [(stage / "wandb_id").read_text() for stage in stages]
    assert ids[0] != ids[1] and all(re.fullmatch("[0-9a-f]{16}", one) for one in ids)
    for stage, one in zip(stages, ids, strict=True):
        (run,) = (stage / "wandb").glob("offline-run-*")
        assert run.name.endswith(one) and list(run.glob("*.wandb"))
        tables = {path.name.rsplit("_", 2)[0]: json.loads(path.read_text()) for path in run.rglob("*.table.json")}
        assert set(tables) == {"loss_by_time", "loss_by_words", "prompts"}
        rows = [row[:1] + row[3:5] for row in tables["prompts"]["data"][1:]]
        assert [row[0] for row in rows] == [row["prompt"] for row in PROMPTS] and rows[0][2] == 2 and rows[1][1:] == [0, 0]
        assert len(list(run.glob("files/media/images/validation/samples_*.png"))) == 1
        staged = [path.read_bytes() for path in (stage / "wandb" / "artifacts" / "staging").iterdir()]
        shown = [picture(data) for data in staged if data.startswith(b"\x89PNG")]  # of the table's cells
        assert all(any(image.shape == one.shape and close(image, one) for image in shown) for one in expected)


def picture(source: Path | bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(source) if isinstance(source, bytes) else source).convert("RGB"))


def close(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.abs(one.astype(int) - other.astype(int)).max() <= 1)


def test_a_tracker_that_fails_does_not_take_the_training_down(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(**_: object) -> None:
        raise wandb.errors.CommError("no answer\nafter 90 s")

    monkeypatch.setattr(wandb, "init", unreachable)
    assert train("tracker=wandb") == 0
    assert "warning: tracker=wandb failed (no answer); the run goes on without it." in capsys.readouterr().out
    (tmp_path / "run" / "stage1" / "tensorboard").touch()  # a file in its folder's place
    assert train("tracker=tensorboard", "max_steps=12") == 0
    said = capsys.readouterr().out
    assert said.count("warning: tracker=tensorboard failed") == 1 and "Traceback" not in said
    assert [row["step"] for row in records(tmp_path / "run" / "stage1")] == [2, 4, 6, 8, 10, 12]


def test_an_arm_that_mixes_an_objective_with_a_conditioning_trains_and_draws(train: Train, tmp_path: Path) -> None:
    chosen = ("objective=v_prediction", "conditioning=paper", MODERN_WORDS)
    assert train("stage=1", "max_steps=2", "validation.samples=0", *chosen) == 0
    stage = tmp_path / "run" / "stage1"
    assert math.isfinite(records(stage)[0]["loss"])
    description = json.loads((newest(stage) / "checkpoint.json").read_text())
    assert description["objective"]["prediction"] == "v_prediction" and not description["conditioning"]["mask_padding"]
    assert not (newest(stage) / "refiner").exists()
    out = tmp_path / "out"
    assert sample_here(f"ckpt={stage}", "prompt=a red circle", "steps=2", f"output_dir={out}") == 0
    assert (out / "00000.png").stat().st_size > 100


def test_a_stage_that_is_done_is_left_alone(train: Train, tmp_path: Path) -> None:
    """And the program's own signal handlers are put back."""
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert train("max_steps=4") == 0
    stage = tmp_path / "run" / "stage1"
    before = {path: path.stat().st_mtime_ns for path in stage.rglob("*.safetensors")}
    log = (stage / "log.jsonl").read_text()
    assert train("max_steps=4") == 0
    assert {path: path.stat().st_mtime_ns for path in stage.rglob("*.safetensors")} == before
    assert (stage / "log.jsonl").read_text() == log
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
