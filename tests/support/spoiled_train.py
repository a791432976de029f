"""train.py, but the latents of one step are not numbers, as a broken image would make them: STEP, then its arguments."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pytest

import train
from paradiffusion.entry import run
from paradiffusion.training.trainer import Trainer


def spoil(step: int) -> None:
    encode = Trainer.encode

    def spoiled(trainer: Any, batch: Any) -> Any:
        inputs = encode(trainer, batch)
        return replace(inputs, latents=inputs.latents * float("nan")) if batch.step == step else inputs

    Trainer.encode = spoiled  # type: ignore[method-assign]


def spoil_latents(monkeypatch: pytest.MonkeyPatch, steps: set[int], factor: float) -> dict[int, list[str]]:
    """Multiply the latents of some steps, as a broken image would; returns the samples of each step as they come."""
    encode, seen = Trainer.encode, {}

    def spoiled(trainer: Any, batch: Any) -> Any:
        seen[batch.step] = batch.keys
        inputs = encode(trainer, batch)
        return replace(inputs, latents=inputs.latents * factor) if batch.step in steps else inputs

    monkeypatch.setattr(Trainer, "encode", spoiled)
    return seen


if __name__ == "__main__":
    spoil(int(sys.argv.pop(1)))
    run(train.main)
