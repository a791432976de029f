"""On a real GPU (`CUDA_VISIBLE_DEVICES=0 pytest tests/gpu`; the tests hide it otherwise): its numbers beside the processor's, compiling,
the same bits after a resume, several of them by NCCL, 4 bits."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from accelerate.utils import patch_environment
from ranks import launch
from torch import Tensor
from training_runs import Train, assert_same_bits, build_here, gradients_of, newest, records, sample_here

from paradiffusion.text.families import lacks_bitsandbytes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: CUDA_VISIBLE_DEVICES=0")


def step(arguments: list[str], folder: Path, *more: str, cpu: bool = False) -> tuple[float, Tensor]:
    """The loss of a stage's third step, and its gradients in one vector on the CPU."""
    with patch_environment(**({"ACCELERATE_USE_CPU": "true"} if cpu else {})):
        trainer = build_here([*arguments, f"run_dir={folder}", *more])
        assert trainer.device.type == ("cpu" if cpu else "cuda")
        loss, gradients = gradients_of(trainer, steps=3)
        trainer.close()
    return loss, torch.cat([gradient.float().cpu().flatten() for _, gradient in sorted(gradients.items())])


@pytest.mark.parametrize(("changes", "loss_bound", "angle"), [
    (["precision=fp32"], 1e-4, 1e-5),
    (["precision=bf16"], 2e-2, 2e-2),
    (["precision=bf16", "compile=true"], 2e-2, 2e-2),
    (["precision=bf16", "channels_last=true"], 2e-2, 2e-2),
    (["precision=bf16", "gradient_checkpointing=true"], 2e-2, 2e-2),
])  # fmt: skip
def test_steps_are_those_of_a_processor(
    changes: list[str], loss_bound: float, angle: float, tiny_arguments: list[str], tmp_path: Path
) -> None:
    loss, gradients = step(tiny_arguments, tmp_path / "gpu", *changes)
    expected, reference = step(tiny_arguments, tmp_path / "cpu", "precision=fp32", cpu=True)
    assert loss == pytest.approx(expected, rel=loss_bound)
    assert torch.cosine_similarity(gradients, reference, dim=0) > 1 - angle


def test_a_resumed_run_has_the_same_bits(train: Train, tmp_path: Path) -> None:
    # Weights, average, and the moments and counters of fused AdamW.
    for name, stops in (("once", [8]), ("twice", [5, 8])):
        for stop in stops:
            assert train(f"run_dir={tmp_path / name}", f"max_steps={stop}", "deterministic=true", "precision=bf16") == 0
    assert_same_bits(newest(tmp_path / "once" / "stage1"), newest(tmp_path / "twice" / "stage1"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kind", ["ddp", "zero2", "zero3"])
def test_two_gpus_give_the_losses_of_one(kind: str, train: Train, tiny_arguments: list[str], tmp_path: Path) -> None:
    assert train(f"run_dir={tmp_path / 'one'}", "log_every=1") == 0
    done = launch(kind, "train.py", *tiny_arguments, f"run_dir={tmp_path / 'two'}", "log_every=1", new_interpreters=True)
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = ([row["loss"] for row in records(tmp_path / name / "stage1")] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-3)


@pytest.mark.skipif(lacks_bitsandbytes() is not None, reason="needs bitsandbytes")
def test_a_language_model_of_four_bits_trains(train: Train, tmp_path: Path) -> None:
    assert train("text_encoder.quantization=4bit", "max_steps=2", "precision=bf16") == 0
    assert all(math.isfinite(row["loss"]) for row in records(tmp_path / "run" / "stage1"))


def test_pictures_are_those_of_a_processor(train: Train, tmp_path: Path) -> None:
    from PIL import Image

    assert train("max_steps=2") == 0
    pictures = []
    for device, dtype in (("cpu", "float32"), ("cuda", "float32"), ("cuda", "auto")):
        out = tmp_path / f"{device}_{dtype}"
        sample_here(f"ckpt={tmp_path / 'run'}", "prompt=a red circle", f"output_dir={out}", f"device={device}", f"dtype={dtype}")
        pictures.append(torch.frombuffer(bytearray(Image.open(out / "00000.png").tobytes()), dtype=torch.uint8).float())
    exact, rounded = ((picture - pictures[0]).abs() for picture in pictures[1:])
    assert exact.max() <= 2 and rounded.mean() < 8
