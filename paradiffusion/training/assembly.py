"""The models of a stage: built, filled with the weights that it starts from, frozen where they are not trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paradiffusion.checkpoints.layouts import check_complete, copy_tensors, load_adapter, open_layout
from paradiffusion.checkpoints.starting import fit
from paradiffusion.config import TrainConfig
from paradiffusion.data.index import read_sample
from paradiffusion.data.plan import BatchPlan
from paradiffusion.errors import UserError
from paradiffusion.models.joint import JointModel, build_joint
from paradiffusion.models.unet import downsampling, lora_names
from paradiffusion.randomness import seed_from
from paradiffusion.text.encoder import TextEncoder, attach_lora

# Captions from which the refiner's input statistics are taken.
STATISTICS_CAPTIONS = 256


def build_models(
    config: TrainConfig,
    encoder: TextEncoder,
    plan: BatchPlan,
    source: Path | None,
    description: dict[str, Any] | None,
    main: bool,
) -> tuple[JointModel, dict[str, Tensor]]:
    """The joint module with the weights that it starts from, on the CPU, and the frozen tensors that checkpoints keep.

    Args:
        source: a checkpoint with its ``description``, or a folder with just a U-Net (no description); None for fresh weights.
    """
    is_start = source is not None and description is None
    stored: dict[str, Tensor] = {}
    if source is not None:
        stored = open_layout(source).weights(merge=not config.unet.lora_rank)
    if config.train_text == "adapter":
        load_adapter(encoder, stored, config.lora)
    elif config.train_text == "lora":
        attach_lora(encoder, config.lora, seed_from("lora", config.seed) % (1 << 31))
        if config.gradient_checkpointing:
            checkpoint_activations(encoder)
    joint = build_joint(config, encoder.width, encoder if config.train_text == "lora" else None)
    check_sizes(config, joint)
    own = {**dict(joint.named_parameters()), **dict(joint.named_buffers())}
    if is_start:
        found = fit({name: tensor for name, tensor in own.items() if name.startswith("unet.")}, stored)
        if main:
            print(found.report(), flush=True)
        copy_tensors(joint, found.tensors)
    elif stored:
        stored = lora_names(stored, joint.unet)
        # Adapters that begin with this stage are the one thing that a checkpoint may lack.
        check_complete({name for name in own if not name.startswith("text_encoder.") and ".lora_" not in name}, stored)
        copy_tensors(joint, {n: t for n, t in stored.items() if n in own or not n.startswith("text_encoder.")})
    if not stored or is_start:
        take_statistics(joint, encoder, plan)
    frozen = (
        {n: t for n, t in stored.items() if n.startswith("text_encoder.")} if config.train_text == "adapter" else {}
    )
    # Under its own LoRA the U-Net belongs to the checkpoint too; kept here, since ZeRO-3 cuts frozen weights as well.
    frozen |= {f"unet.{name}": p.detach() for name, p in joint.unet.named_parameters() if not p.requires_grad}
    return joint, frozen if main else {}


def checkpoint_activations(encoder: TextEncoder) -> None:
    """Recompute the language model's activations. Reentrant checkpointing would leave LoRA without a gradient, since
    nothing that enters the first layer needs one."""
    encoder.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    encoder.model.enable_input_require_grads()
    # transformers recomputes only layers in training mode, which a loaded model is not in; its dropout must stay off.
    encoder.model.train()
    for module in encoder.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def check_sizes(config: TrainConfig, joint: JointModel) -> None:
    """Refuse buckets that the U-Net cannot halve as often as it does."""
    needed = config.codec.factor * downsampling(joint.unet)
    if config.data.bucket_multiple % needed:
        raise UserError(
            f"data.bucket_multiple={config.data.bucket_multiple} must be a multiple of {needed}: codec.factor times the "
            "U-Net's own downsampling (a transformer's patch)."
        )


@torch.no_grad()
def take_statistics(joint: JointModel, encoder: TextEncoder, plan: BatchPlan) -> None:
    """Standardise the refiner's input, where there is one, by the features of the plan's first captions."""
    if joint.refiner is None:
        return
    captions: list[str] = []
    step = 0
    while len(captions) < STATISTICS_CAPTIONS:
        batch = plan.batch(step)
        for row, kind in zip(batch.rows, batch.kinds, strict=True):
            captions.append(read_sample(plan.index, int(row)).meta["captions"].get(plan.index.kinds[kind], ""))
        step += 1
    tokens = encoder.tokenize(captions[:STATISTICS_CAPTIONS])
    rows = [tokens.ids[i : i + 1] for i in range(len(tokens.ids))]
    features = torch.cat(
        [encoder(row, mask[None], tokens.prefix).float() for row, mask in zip(rows, tokens.mask, strict=True)]
    )
    joint.refiner.set_statistics(features, tokens.mask[:, tokens.prefix :])
