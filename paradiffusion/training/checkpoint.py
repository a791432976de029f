"""Save and restore: weights that describe themselves, and beside them what only resuming needs.

A checkpoint is written under a temporary name, hashed, forced to the disk and renamed; ``latest`` is written last. So
whatever stops a run, at any instant, the newest named folder is whole.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from paradiffusion.atomic import write_atomic
from paradiffusion.checkpoints.layouts import Ours, check_complete, copy_tensors, save_weights, write_tensors
from paradiffusion.checkpoints.manifest import checkpoints_of, sync, write_manifest
from paradiffusion.errors import UserError
from paradiffusion.models.joint import JointModel
from paradiffusion.training.ema import Ema
from paradiffusion.training.engine import Engine

STATE = "training_state"


@dataclass
class TrainState:
    """What a run knows besides tensors.

    Attributes:
        step: optimiser steps done; it is also the position in the data, since the plan is a function of it.
        skipped: steps whose update was left out because of a spike.
        typical_loss: running average that a spike is measured against; None before the first step.
        seconds: time spent in training over all starts.
    """

    step: int = 0
    skipped: list[int] = field(default_factory=list)
    typical_loss: float | None = None
    seconds: float = 0.0


def save_checkpoint(
    stage_folder: Path,
    joint: JointModel,
    engine: Engine,
    ema: Ema,
    frozen: dict[str, Tensor],
    state: TrainState,
    description: dict[str, Any],
    main: bool = True,
) -> Path:
    """Write ``checkpoints/step_NNNNNN``. Every process calls this, since each may hold a part; the ``main`` one writes.

    Args:
        frozen: tensors that are applied but not trained, and belong to the checkpoint: the adapter in stage 3.
    Raises:
        UserError: when the disk is full or refuses; nothing that was there before is lost.
    """
    folder = stage_folder / "checkpoints" / f"step_{state.step:06d}"
    averages = ema.full()
    weights = engine.masters.full(engine.masters.tensors())
    moments = dict(engine.optimizer_state())
    if not main:
        return folder
    check_whole(averages, engine.masters.names)
    temporary = folder.parent / f".writing_{folder.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        (temporary / STATE).mkdir(parents=True)
        save_weights(temporary, joint, {**frozen, **averages}, description)
        write_tensors(temporary / STATE / "model.safetensors", weights)
        write_tensors(temporary / STATE / "optimizer.safetensors", moments)
        (temporary / STATE / "state.json").write_text(json.dumps(vars(state)))
        write_manifest(temporary)
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one of the same step, which a resume passed over
        temporary.rename(folder)
        sync(folder.parent)
        write_latest(folder)
    except Exception as error:  # safetensors reports a full disk as its own type, which it does not export
        shutil.rmtree(temporary, ignore_errors=True)
        reason = str(error.strerror if isinstance(error, OSError) and error.strerror else error)
        if not isinstance(error, OSError) and "os error" not in reason.lower() and "No space" not in reason:
            raise
        kept = checkpoints_of(stage_folder)
        raise UserError(
            f"the checkpoint of step {state.step} could not be saved in {folder.parent} ({reason}); "
            f"{f'{kept[0].name} is whole' if kept else 'there is none before it'}: make room, then run the same command again."
        ) from None
    return folder


def check_whole(averages: dict[str, Tensor], names: list[str]) -> None:
    """Fail on a tensor that is missing or empty: a sharded weight that was not gathered looks just like that."""
    wrong = [name for name in names if name not in averages or not averages[name].numel()]
    if wrong:
        raise RuntimeError(f"{len(wrong)} of {len(names)} trained tensors were not gathered, {wrong[0]} the first")


def write_latest(folder: Path) -> None:
    """Name the newest checkpoint in ``latest``, for people and scripts."""
    write_atomic(folder.parent / "latest", folder.name + "\n")


def prune(stage_folder: Path, keep_last: int, keep_every: int | None) -> None:
    """Delete all but the newest ``keep_last`` checkpoints and every ``keep_every``-th step."""
    for folder in checkpoints_of(stage_folder)[keep_last:]:
        if not keep_every or int(folder.name[5:]) % keep_every:
            shutil.rmtree(folder, ignore_errors=True)


def restore_checkpoint(checkpoint: Path, joint: JointModel, engine: Engine, ema: Ema) -> TrainState:
    """Bring back weights, average, optimiser and position, on whatever number of processes; returns the state.

    Raises:
        UserError: when the checkpoint has no training state (a published one), or does not fit.
    """
    folder = checkpoint / STATE
    if not folder.is_dir():
        raise UserError(
            f"{checkpoint} holds weights but no {STATE}, so a run cannot resume from it; set init_from={checkpoint} and another "
            "run_dir to start from its weights."
        )
    averages = Ours(checkpoint).weights(merge=False)
    copy_tensors(joint, {name: averages[name] for name, _ in joint.named_buffers() if name in averages})
    weights = load_file(folder / "model.safetensors")
    for stored in (averages, weights):
        check_complete(set(engine.masters.names), stored)
    ema.load(averages)
    with torch.no_grad():
        engine.masters.fill(engine.masters.tensors(), weights.__getitem__)
    engine.masters.refresh()
    engine.load_optimizer(load_file(folder / "optimizer.safetensors"))
    return TrainState(**json.loads((folder / "state.json").read_text()))
