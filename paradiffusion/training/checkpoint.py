"""Save and restore: weights that describe themselves, and beside them what only resuming needs.

A checkpoint is written under a temporary name, hashed, forced to the disk and renamed; ``latest`` is written last. So
whatever stops a run, at any instant, the newest named folder is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from paradiffusion.errors import UserError
from paradiffusion.models.joint import JointModel
from paradiffusion.models.layouts import copy_tensors, read_weights, save_weights, write_tensors
from paradiffusion.models.manifest import checkpoints_of, sync, write_manifest
from paradiffusion.training.ema import Ema
from paradiffusion.training.optim import Optimizer

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
    ema: Ema,
    frozen: dict[str, Tensor],
    optimizer: Optimizer,
    state: TrainState,
    description: dict[str, Any],
) -> Path:
    """Write ``checkpoints/step_NNNNNN``; one process calls this.

    Args:
        frozen: adapter tensors that are applied but not trained (stage 3).
    Raises:
        UserError: when the disk is full or refuses; nothing that was there before is lost.
    """
    folder = stage_folder / "checkpoints" / f"step_{state.step:06d}"
    temporary = folder.parent / f".writing_{folder.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        (temporary / STATE).mkdir(parents=True)
        save_weights(temporary, joint, {**frozen, **ema.values}, description)
        names = {id(parameter): name for name, parameter in ema.parameters.items()}
        write_tensors(temporary / STATE / "model.safetensors", {n: p.detach().cpu() for n, p in ema.parameters.items()})
        write_tensors(temporary / STATE / "optimizer.safetensors", optimizer_tensors(optimizer, names))
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


def write_latest(folder: Path) -> None:
    """Name the newest checkpoint in ``latest``, for people and scripts."""
    temporary = folder.parent / ".latest"
    temporary.write_text(folder.name + "\n")
    os.replace(temporary, folder.parent / "latest")


def optimizer_tensors(optimizer: Optimizer, names: dict[int, str]) -> dict[str, Tensor]:
    """The optimiser's state per parameter: "exp_avg/NAME", "exp_avg_sq/NAME", "step/NAME"."""
    tensors = {}
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            tensors[f"{key}/{names[id(parameter)]}"] = value.detach().cpu()
    return tensors


def prune(stage_folder: Path, keep_last: int, keep_every: int | None) -> None:
    """Delete all but the newest ``keep_last`` checkpoints and every ``keep_every``-th step."""
    for folder in checkpoints_of(stage_folder)[keep_last:]:
        if not keep_every or int(folder.name[5:]) % keep_every:
            shutil.rmtree(folder, ignore_errors=True)


def restore_checkpoint(checkpoint: Path, joint: JointModel, ema: Ema, optimizer: Optimizer) -> TrainState:
    """Bring back weights, average, optimiser and position; returns the state.

    Raises:
        UserError: when the checkpoint has no training state (a published one), or does not fit.
    """
    folder = checkpoint / STATE
    if not folder.is_dir():
        raise UserError(
            f"{checkpoint} holds weights but no {STATE}, so a run cannot resume from it; set init_from={checkpoint} and another "
            "run_dir to start from its weights."
        )
    averages = read_weights(checkpoint)
    buffers = {name: averages[name] for name, _ in joint.named_buffers() if name in averages}
    copy_tensors(joint, buffers)
    ema.load(averages)
    copy_tensors(joint, load_file(folder / "model.safetensors"))
    load_optimizer(optimizer, load_file(folder / "optimizer.safetensors"), ema.parameters)
    return TrainState(**json.loads((folder / "state.json").read_text()))


def load_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> None:
    """Put stored state back, on each parameter's device (AdamW's own step counter stays on the CPU)."""
    for name, parameter in parameters.items():
        values = {key.partition("/")[0]: value for key, value in tensors.items() if key.partition("/")[2] == name}
        optimizer.state[parameter] = {
            key: value if key == "step" else value.to(parameter.device) for key, value in values.items()
        }
