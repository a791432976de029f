"""The weights that a replayed step's losses are taken with: its own where they can be had."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from paradiffusion.checkpoints.layouts import check_complete, copy_tensors, find_checkpoint, is_unet_folder, open_layout
from paradiffusion.checkpoints.manifest import checkpoints_of, find_fault
from paradiffusion.config import TrainConfig
from paradiffusion.data.plan import BatchPlan
from paradiffusion.errors import UserError
from paradiffusion.models.codec import Codec, load_codec
from paradiffusion.models.joint import JointModel
from paradiffusion.sampling.pipeline import choose_device, load_models
from paradiffusion.text.encoder import TextEncoder, load_text_encoder
from paradiffusion.training.assembly import build_models
from paradiffusion.training.checkpoint import STATE, TrainState
from paradiffusion.training.folder import find_init
from paradiffusion.training.processes import set_threads
from paradiffusion.training.setup import Setup


@dataclass(frozen=True)
class Weights:
    """What the losses are taken with.

    Attributes:
        checkpoint: None for the weights that the stage starts from.
        trained: as training has them; else their average (EMA).
        note: a word on it, for the page.
    """

    checkpoint: Path | None
    trained: bool
    note: str


def choose_weights(folder: Path, step: int, wanted: str | None) -> Weights:
    """The weights of ``step`` itself where its checkpoint is there to resume from; else the average of the newest checkpoint
    that is whole and not after ``step``, or of the oldest after it; where there is none yet, the stage's first weights."""
    if wanted is not None:
        path = find_checkpoint(wanted).folder
        return Weights(path, False, f"with the EMA weights of {path.name}, as asked for")
    found = checkpoints_of(folder)
    before = [path for path in found if int(path.name[5:]) <= step]
    after = [path for path in found if int(path.name[5:]) > step][::-1]
    for path in (*before, *after):
        if find_fault(path) is not None:
            continue
        if int(path.name[5:]) == step and (path / STATE).is_dir():
            return Weights(path, True, f"with the weights that the step had, those of {path.name}")
        which = "the newest before the step" if path in before else "the oldest there is, after the step"
        return Weights(path, False, f"with the EMA weights of {path.name}, {which}")
    return Weights(None, True, "with the weights that the stage would start from now, since there is no checkpoint")


def open_models(
    config: TrainConfig,
    folder: Path,
    plan: BatchPlan,
    weights: Weights,
    step: int,
    micro_batches: int,
    device: str | None,
) -> Setup:
    """What ``prepare`` and the forward pass need of a Setup; nothing of it writes, or trains.

    Raises:
        UserError: when the checkpoint is another kind of model than the run's.
    """
    target = choose_device(device)
    set_threads(config, 1)
    if weights.trained:
        encoder, codec, joint = training_models(config, folder, plan, weights.checkpoint)
    else:
        assert weights.checkpoint is not None
        checkpoint = open_layout(weights.checkpoint)
        checkpoint.place(config.text_encoder.path, config.codec.path)
        models = load_models(checkpoint, device=device)
        if models.objective.config != config.objective:
            raise UserError(
                f"ckpt={weights.checkpoint} was trained with another objective than {folder}, so its losses would say "
                "nothing of this step; choose a checkpoint of the run."
            )
        encoder, codec, joint = models.text_encoder, models.codec, models.joint
    for model in (encoder, codec, joint):
        model.to(target)
    if target.type == "cuda":
        torch.cuda.set_device(target)
    return Setup(
        config, folder, Accelerator(cpu=target.type == "cpu"), plan, encoder, codec,
        joint, engine=None, ema=None, state=TrainState(step), validation=None, frozen={},  # type: ignore[arg-type]
        micro_batches=micro_batches, watch=None,  # type: ignore[arg-type]
    )  # fmt: skip


def training_models(
    config: TrainConfig, folder: Path, plan: BatchPlan, checkpoint: Path | None
) -> tuple[TextEncoder, Codec, JointModel]:
    """The models as a step of training has them, with the weights that are trained rather than their average.

    Args:
        checkpoint: with a training state; None for what the stage starts from.
    """
    config = replace(config, run_dir=str(folder.parent))  # wherever the run lies now
    source = checkpoint or find_init(config)
    description = None if source is None or is_unet_folder(source) else open_layout(source).description
    encoder = load_text_encoder(config.text_encoder, config.conditioning)
    codec = load_codec(config.codec)
    joint, _ = build_models(config, encoder, plan, source, description, main=False)
    if checkpoint is not None:
        stored = load_file(checkpoint / STATE / "model.safetensors")
        check_complete(set(joint.trained()), stored)
        copy_tensors(joint, stored)
    return encoder, codec, joint
