"""A stage's folder: one writer at a time, one configuration over its life, and its checkpoints.

A checkpoint is weights that describe themselves, and beside them what only resuming needs. It is taken between two steps, and may
be written while the next ones run: under a temporary name, hashed, forced to the disk and renamed; ``latest`` is written last. So
whatever stops a run, at any instant, the newest named folder is whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from paradiffusion.atomic import hold, write_atomic
from paradiffusion.checkpoints.layouts import Ours, check_complete, copy_tensors, save_weights, write_tensors
from paradiffusion.checkpoints.manifest import checkpoints_of, follow_pointer, newest_valid, sync, write_manifest
from paradiffusion.config import SourceConfig, TrainConfig, keys_of
from paradiffusion.data.index import same_data
from paradiffusion.errors import UserError
from paradiffusion.models.joint import JointModel
from paradiffusion.models.vision import ALIGNER
from paradiffusion.text.sources import same_weights
from paradiffusion.training.ema import Ema
from paradiffusion.training.engine import Engine

CONFIG_FILE, STATE, SUMMARY, BEST = "config.json", "training_state", "summary.json", "best"
# With those of a list's entries, whose places are left out of their names.
KEYS = {**keys_of(TrainConfig), **keys_of(SourceConfig, "data.sources.")}
# Keys of earlier versions, with the value by which a run did without what this version no longer has.
GONE = {"conditioning.layout": False, "unet.pooled_text": False, "unet.attention_gain": 1.0}


def stage_folder(config: TrainConfig) -> Path:
    """``run_dir/stageN``."""
    return Path(config.run_dir) / f"stage{config.stage}"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the stage folder; the lock goes with the process, however it ends. Raises UserError when another process writes
    there, or the folder cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 - held until the block ends
    except OSError as error:
        raise UserError(f"run_dir: {folder} cannot be written ({error.strerror}); choose another run_dir=.") from None
    with file:
        file.seek(0)
        if not hold(file):
            raise UserError(
                f"{folder} is being written by another run (process {file.read().strip() or 'unknown'}); wait for it, stop it, "
                "or choose another run_dir=."
            )
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        yield


def find_resume(config: TrainConfig, folder: Path) -> Path | None:
    """The checkpoint to go on from, or None for a fresh stage. Raises UserError when resume=false meets a folder with
    checkpoints, or only damaged ones are left."""
    found, faults = newest_valid(folder)
    for sentence in faults:
        print(f"warning: {sentence}", flush=True)
    if not config.resume and (found is not None or faults):
        raise UserError(f"resume=false, but {folder} already holds checkpoints; choose another run_dir=, or delete that folder yourself.")
    if found is None and faults:
        raise UserError(f"every checkpoint in {folder} is damaged; delete the folder's checkpoints/ to start the stage again.")
    return found


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries, and lists of them, with dotted keys such as "data.sources[0].weight"."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            flat |= flatten({f"{key}[{number}]": one for number, one in enumerate(value)}, prefix)
        else:
            flat[prefix + key] = value
    return flat


def may_differ(key: str, streaming: bool) -> bool:
    """Whether a resumed run may have another value of this key (see ``config.option``). Of streamed data there is no
    fingerprint that could say whether other paths hold the same."""
    name = re.sub(r"\[\d+\]", "", key)
    while name and name not in KEYS:  # a key of the user's own, in a dictionary
        name = name.rpartition(".")[0]
    free = KEYS[name]["free"] if name else ""
    return bool(free) and not (free == "data" and streaming)


def check_unchanged(config: TrainConfig, folder: Path, facts: dict[str, Any] | None = None) -> None:
    """Compare with the configuration that the stage began with, and with its ``facts``, which were found rather than configured, such
    as the data's fingerprint (None before anything was loaded). UserError names the first key that differs, with both values."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        return
    before, after = flatten(json.loads(path.read_text())), {**flatten(recorded(config, facts or {})), **GONE}
    defaults = {**flatten(recorded(TrainConfig(), {})), **GONE}  # of a key that was not there yet when the stage began
    for key in sorted({*before, *after}):
        if may_differ(key, config.data.streaming) or (facts is None and key.startswith("facts.")):
            continue
        if (old := before.get(key, defaults.get(key))) != after.get(key):
            if key in ("facts.text_encoder", "facts.codec") and same_weights(old, after[key]):
                continue
            if key == "facts.data":
                if same_data(old, after[key]):
                    continue
                raise UserError(
                    f"the data has changed since {folder} was begun (samples, captions, pictures, or the tokens in the indexes), and "
                    "a resumed run reads the same data in the same order; put the old data back, or begin a new run on it from "
                    f"these weights with run_dir=<new folder> init_from={folder}."
                )
            raise UserError(
                f"{folder} was begun with {key}={old}, and this command says {after.get(key)}: a resumed run "
                "must go on as it began; put the old value back, or choose another run_dir=."
            )


def recorded(config: TrainConfig, facts: dict[str, Any]) -> dict[str, Any]:
    """What config.json holds, as it reads back from JSON."""
    values: dict[str, Any] = json.loads(json.dumps({**asdict(config), "facts": facts}))
    return values


def record_config(config: TrainConfig, folder: Path, facts: dict[str, Any]) -> None:
    """Write what the stage runs with to config.json."""
    write_atomic(folder / CONFIG_FILE, json.dumps(recorded(config, facts), indent=1))


@dataclass
class TrainState:
    """What a run knows besides tensors: the optimiser steps done (``step``, also the position in the data, since the plan is a function of
    it); steps ``skipped`` because of a spike, and the running average of the loss that one is measured against, None before the first
    step; and ``seconds`` of training over all starts."""

    step: int = 0
    skipped: list[int] = field(default_factory=list)
    typical_loss: float | None = None
    seconds: float = 0.0


def save_checkpoint(
    stage_folder: Path, joint: JointModel, engine: Engine, ema: Ema, frozen: dict[str, Tensor], state: TrainState,
    description: dict[str, Any], main: bool = True, apart: bool = False,
) -> Callable[[], Path]:  # fmt: skip
    """Take what ``checkpoints/step_NNNNNN`` will hold, with the ``frozen`` tensors that are applied but not trained, and return what
    writes it in the ``main`` process: its folder, or UserError when the disk is full or refuses; nothing that was there is lost.

    Every process calls this, since each may hold a part. With ``apart`` the writing may be called while training goes on.
    """
    taken = [ema.full(), engine.masters.full(engine.masters.tensors()), dict(engine.optimizer_state())]
    if main and apart:  # what lies on the CPU is what the next step changes; a GPU's are copies already
        taken = [{name: t if t.is_pinned() else t.clone() for name, t in tensors.items()} for tensors in taken]
    averages, weights, moments = taken
    # A sharded weight that was not gathered is missing or empty.
    wrong = [name for name in engine.masters.names if name not in averages or not averages[name].numel()]
    if main and wrong:
        raise RuntimeError(f"{len(wrong)} trained tensors were not gathered, {wrong[0]} the first")
    averages = {**frozen, **averages}
    return partial(write_checkpoint, stage_folder, joint, averages, weights, moments, deepcopy(vars(state)), description)


def write_checkpoint(
    stage_folder: Path, joint: JointModel, averages: dict[str, Tensor], weights: dict[str, Tensor], moments: dict[str, Tensor],
    state: dict[str, Any], description: dict[str, Any],
) -> Path:  # fmt: skip
    """Write what ``save_checkpoint`` took."""
    folder = stage_folder / "checkpoints" / f"step_{state['step']:06d}"
    temporary = folder.parent / f".writing_{folder.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        (temporary / STATE).mkdir(parents=True)
        save_weights(temporary, joint, averages, description)
        write_tensors(temporary / STATE / "model.safetensors", weights)
        write_tensors(temporary / STATE / "optimizer.safetensors", moments)
        (temporary / STATE / "state.json").write_text(json.dumps(state))
        write_manifest(temporary)
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one of the same step, which a resume passed over
        temporary.rename(folder)
        sync(folder.parent)
        write_atomic(folder.parent / "latest", folder.name + "\n")  # for people and scripts
    except Exception as error:  # safetensors reports a full disk as its own type, which it does not export
        shutil.rmtree(temporary, ignore_errors=True)
        reason = str(getattr(error, "strerror", None) or error)
        if not isinstance(error, OSError) and "os error" not in reason.lower() and "No space" not in reason:
            raise
        kept = checkpoints_of(stage_folder)
        raise UserError(
            f"the checkpoint of step {state['step']} could not be saved in {folder.parent} ({reason}); "
            f"{f'{kept[0].name} is whole' if kept else 'there is none before it'}: make room, then run the same command again."
        ) from None
    return folder


def prune(stage_folder: Path, keep_last: int, keep_every: int | None) -> None:
    """Delete all but the newest ``keep_last`` checkpoints, every ``keep_every``-th step and the best one."""
    best = follow_pointer(stage_folder / BEST)
    for folder in checkpoints_of(stage_folder)[keep_last:]:
        if folder != best and (not keep_every or int(folder.name[5:]) % keep_every):
            shutil.rmtree(folder, ignore_errors=True)


def restore_checkpoint(checkpoint: Path, joint: JointModel, engine: Engine, ema: Ema) -> TrainState:
    """Bring back weights, average, optimiser and position, on whatever number of processes; returns the state. Raises UserError
    when the checkpoint has no training state (a published one), or does not fit."""
    folder = checkpoint / STATE
    if not folder.is_dir():
        raise UserError(
            f"{checkpoint} holds weights but no {STATE}, so a run cannot resume from it; set init_from={checkpoint} and another "
            "run_dir to start from its weights."
        )
    averages = Ours(checkpoint).weights(merge=False)
    for name, start in joint.start.items():  # stored beside its end, see ``save_weights``
        averages[name] = averages[name][tuple(map(slice, start.shape))]
    copy_tensors(joint, {name: averages[name] for name, _ in joint.named_buffers() if name in averages})
    weights = load_file(folder / "model.safetensors")
    averages |= {name: tensor for name, tensor in weights.items() if name.startswith(ALIGNER)}  # drawn with by nobody, so not kept
    for stored in (averages, weights):
        check_complete(set(engine.masters.names), stored)
    ema.load(averages)
    with torch.no_grad():
        engine.masters.fill(engine.masters.tensors(), weights.__getitem__)
    engine.masters.refresh()
    engine.load_optimizer(load_file(folder / "optimizer.safetensors"))
    return TrainState(**json.loads((folder / "state.json").read_text()))
