"""Read and write checkpoints: weights in diffusers and PEFT layouts, everything else as JSON beside them.

A checkpoint folder describes itself: ``checkpoint.json`` records text encoder and codec by id, revision and hash, the
whole conditioning, the objective and the sampler's defaults. ``unet/``, ``refiner/`` and ``text_encoder_lora/`` hold the
EMA weights; where a U-Net was trained through LoRA, ``unet/`` holds its frozen base and ``unet_lora/`` the adapter. A
folder of the published weights is read as if it were such a checkpoint (``checkpoints/official.py``).
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from paradiffusion.checkpoints.tensors import ADAPTER_STEM, UNET_STEM, joint_adapter_name, read_tensors, write_tensors
from paradiffusion.config import CodecConfig, LoraConfig, ObjectiveConfig, TextEncoderConfig, TrainConfig
from paradiffusion.diffusion.objective import OBJECTIVES, Objective, make_objective
from paradiffusion.errors import UserError
from paradiffusion.models import official
from paradiffusion.models.codec import locate_codec
from paradiffusion.models.joint import JointModel
from paradiffusion.text.encoder import TextEncoder, attach_lora
from paradiffusion.text.sources import locate

FORMAT = "paradiffusion"
FORMAT_VERSION = 1
# Where each part of the joint module is stored, and the prefix of its parameters' names there.
UNET, REFINER, LORA, UNET_LORA = "unet", "refiner", "text_encoder_lora", "unet_lora"
# PEFT's own prefix: by it PEFT loads unet_lora/ by itself.
PEFT_PREFIX = "base_model.model."
T = TypeVar("T")


def describe(
    config: TrainConfig, step: int, text_source: dict[str, Any], codec_source: dict[str, Any]
) -> dict[str, Any]:
    """What ``checkpoint.json`` says."""
    unet_lora = {
        "rank": config.unet.lora_rank,
        "alpha": config.unet.lora_alpha,
        "target_modules": list(config.unet.lora_target_modules),
    }
    libraries = {name: version(name) for name in ("torch", "diffusers", "transformers", "peft", "safetensors")}
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "preset": config.preset,
        "stage": config.stage,
        "step": step,
        "seed": config.seed,
        "resolution": config.data.resolution,
        "text_encoder": {**asdict(config.text_encoder), "hash": text_source["hash"]},
        "lora": None if config.train_text == "frozen" else asdict(config.lora),
        "conditioning": asdict(config.conditioning),
        "coordinates": config.unet.coordinates,
        "unet_lora": unet_lora if config.unet.lora_rank else None,
        "codec": {**asdict(config.codec), "hash": codec_source["hash"]},
        "objective": asdict(config.objective),
        "sampler": asdict(config.sampler),
        "provenance": {"libraries": libraries, "images_seen": step * config.batch_size, "init_from": config.init_from},
    }


def split_parts(state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Group a joint module's tensors by part, each named as its own library names it."""
    parts: dict[str, dict[str, Tensor]] = {UNET: {}, REFINER: {}, LORA: {}, UNET_LORA: {}}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        if part == "text_encoder":
            # PEFT stores adapters without the adapter's own name ("default").
            parts[LORA][rest.removeprefix("model.").replace(".default.", ".")] = tensor
        elif part == UNET and ".lora_" in rest:
            parts[UNET_LORA][PEFT_PREFIX + rest.replace(".default.", ".")] = tensor
        else:
            parts[part][rest.replace(".base_layer.", ".")] = tensor
    return parts


def save_weights(folder: Path, joint: JointModel, state: dict[str, Tensor], description: dict[str, Any]) -> None:
    """Write ``state`` (the EMA weights by parameter name) to ``folder`` with its description.

    Args:
        joint: gives the configuration of the U-Net, the refiner and the adapter. Its own weights are read only where they
            are a U-Net's frozen base under LoRA that ``state`` lacks.
    """
    base = {}
    if description.get("unet_lora"):  # all but adapter and projection is frozen, so it is no part of the average
        base = {f"{UNET}.{n}": p for n, p in joint.unet.named_parameters() if not p.requires_grad}
    parts = split_parts({name: tensor.detach().cpu().contiguous() for name, tensor in {**base, **state}.items()})
    if joint.refiner is not None:
        parts[REFINER] |= {name: tensor.detach().cpu() for name, tensor in joint.refiner.named_buffers()}
        (folder / REFINER).mkdir(parents=True, exist_ok=True)
        (folder / REFINER / "config.json").write_text(json.dumps(joint.refiner.config, indent=1))
    joint.unet.save_config(folder / UNET)
    write_parts(folder, parts, description)


def write_parts(folder: Path, parts: dict[str, dict[str, Tensor]], description: dict[str, Any]) -> None:
    """Write the tensors of ``split_parts`` and the description; configurations of U-Net and refiner are the caller's."""
    write_tensors(folder / UNET / f"{UNET_STEM}.safetensors", parts[UNET])
    if parts[REFINER]:
        write_tensors(folder / REFINER / "model.safetensors", parts[REFINER])
    for part, key in ((LORA, "lora"), (UNET_LORA, "unet_lora")):
        if parts[part]:
            write_tensors(folder / part / f"{ADAPTER_STEM}.safetensors", parts[part])
            write_adapter_config(folder / part, description[key])
    (folder / "checkpoint.json").write_text(json.dumps(description, indent=1))


def write_adapter_config(folder: Path, lora: dict[str, Any]) -> None:
    """The adapter_config.json by which PEFT itself can load the adapter."""
    from peft import LoraConfig as PeftLoraConfig

    targets = {"target_modules": sorted(lora["target_modules"]), **lora.get("settings", {})}
    PeftLoraConfig(r=lora["rank"], lora_alpha=lora["alpha"], lora_dropout=0.0, **targets).save_pretrained(str(folder))
    # PEFT writes a set in the order of this process's string hashes.
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "target_modules": targets["target_modules"]}, indent=1))


def read_description(checkpoint: Path, unet: str = UNET) -> dict[str, Any]:
    """``checkpoint.json``, checked for format and version; of a folder in the official layout, what it would say.

    Args:
        unet: which U-Net, where a folder in the official layout holds several.
    Raises:
        UserError: for a checkpoint that cannot be read, or has parts that this version no longer has.
    """
    if official.is_official(checkpoint):
        return official.describe_official(checkpoint, unet)
    official.choose_unet(checkpoint, unet)
    try:
        description = json.loads((checkpoint / "checkpoint.json").read_text())
        found = (description["format"], description["version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{checkpoint}/checkpoint.json could not be read ({error}); use another checkpoint.") from None
    if found[0] != FORMAT or found[1] > FORMAT_VERSION:
        raise UserError(
            f"{checkpoint}/checkpoint.json has the format {found[0]} {found[1]}, expected {FORMAT} up to {FORMAT_VERSION}; "
            "update this repository."
        )
    if official.read_json(checkpoint / UNET / "config.json").get("class_embed_type") == "simple_projection":
        raise UserError(
            f"{checkpoint} has a summary of the text in its time embedding, which this version no longer has; train it anew "
            "(make demo), or use data/nano."
        )
    return description


def place_frozen_models(
    description: dict[str, Any], checkpoint: Path, text_encoder_path: str | None, codec_path: str | None
) -> None:
    """Note in ``description`` where the frozen models lie on this machine, if not where it says.

    The autoencoder of a folder in the official layout has a scaling factor of its own, which only its configuration tells.

    Raises:
        UserError: where there is no model.
    """
    if text_encoder_path is not None:
        locate(TextEncoderConfig(path=text_encoder_path))
        description["text_encoder"]["path"] = text_encoder_path
    if codec_path is not None:
        folder = locate_codec(CodecConfig(path=codec_path))
        if official.is_official(checkpoint):
            description["codec"] = official.describe_codec(folder)
        description["codec"]["path"] = codec_path


def parse(cls: type[T], values: dict[str, Any]) -> T:
    """A dataclass from a description's dictionary; keys that this version does not know are left out."""
    known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    return cls(**{key: value for key, value in values.items() if key in known})


def objective_of(description: dict[str, Any]) -> Objective:
    """The objective that a description records; where it has a published scheduler's settings, sampled exactly by that.

    Other solvers than DPM-Solver take its noise schedule alone. Betas of any kind are accepted, since nothing is trained with
    them. As in the released pipeline, a guidance scale below 1 is none.
    """
    config = parse(ObjectiveConfig, description["objective"])
    settings = description.get("scheduler")
    if settings is None:
        return make_objective(replace(config, min_snr_gamma=None))  # a weight of the loss plays no part here
    objective = OBJECTIVES[config.prediction](config)

    def schedulers(solver: str, **overrides: Any) -> Any:
        if solver == "dpm":
            return DPMSolverMultistepScheduler(**{**settings, **overrides})
        if config.prediction != "flow":
            shared = ("trained_betas", "timestep_spacing")
            overrides = {key: settings[key] for key in shared if key in settings} | overrides
        return objective.usual_scheduler(solver, **overrides)

    objective.schedulers, objective.guided_from = schedulers, 1.0
    return objective


def read_weights(checkpoint: Path, unet: str = UNET) -> dict[str, Tensor]:
    """All weights of a checkpoint by the joint module's names (adapters and refiner buffers included), fp32, on the CPU.

    Under a U-Net's LoRA the layers that have it are named as PEFT names them, ``...base_layer.weight``.
    """
    if official.is_official(checkpoint):
        return official.read_official(checkpoint, unet)
    state = {
        f"{part}.{name}": tensor.float()
        for part, stem in ((UNET, UNET_STEM), (REFINER, "model"))
        for name, tensor in read_tensors(checkpoint / part, stem).items()
    }
    for name, tensor in read_tensors(checkpoint / LORA, ADAPTER_STEM).items():
        state[joint_adapter_name(name)] = tensor.float()
    adapter = {
        joint_adapter_name(name.removeprefix(PEFT_PREFIX)).replace("text_encoder.model.", f"{UNET}."): tensor.float()
        for name, tensor in read_tensors(checkpoint / UNET_LORA, ADAPTER_STEM).items()
    }
    adapted = {name.partition(".lora_")[0] for name in adapter}
    named = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        named[f"{module}.base_layer.{kind}" if module in adapted else name] = tensor
    return {**named, **adapter}


def merge_unet_lora(state: dict[str, Tensor], unet_lora: dict[str, Any] | None) -> dict[str, Tensor]:
    """``state`` with the U-Net's adapter added to its base, W + alpha / rank * B A, under the plain U-Net's names.

    Args:
        unet_lora: rank and alpha, as the description has them; None returns ``state``.
    Raises:
        UserError: for a layer that lacks half of its adapter.
    """
    if unet_lora is None:
        return state
    scale = unet_lora["alpha"] / unet_lora["rank"]
    merged = {}
    for name, tensor in state.items():
        if name.startswith(f"{UNET}.") and ".lora_" in name:
            continue
        module, base, kind = name.partition(".base_layer.")
        if base and kind == "weight":
            halves = [state.get(f"{module}.lora_{half}.default.weight") for half in "BA"]
            if halves[0] is None or halves[1] is None:
                raise UserError(f"the checkpoint lacks a half of the LoRA of {module}; use another checkpoint.")
            tensor = tensor + scale * (halves[0] @ halves[1])
        merged[f"{module}.{kind}" if base else name] = tensor
    return merged


def load_adapter(
    encoder: TextEncoder, state: dict[str, Tensor], lora: LoraConfig, settings: dict[str, Any] | None = None
) -> None:
    """Attach the adapter in ``state`` to a frozen text encoder, and freeze it too (stage 3, sampling).

    Args:
        settings: what else PEFT must be told of a published adapter (``official.describe_adapter``).
    """
    if settings:
        official.attach_adapter(encoder, lora, settings)
    else:
        attach_lora(encoder, lora)
    adapter = {name.removeprefix("text_encoder."): t for name, t in state.items() if name.startswith("text_encoder.")}
    check_complete({name for name, p in encoder.named_parameters() if p.requires_grad}, adapter)
    copy_tensors(encoder, adapter)
    encoder.requires_grad_(False)


def check_complete(names: set[str], state: dict[str, Tensor]) -> None:
    """UserError unless ``state`` has every tensor of ``names``: one that it lacks would keep its random start."""
    missing = sorted(names - state.keys())
    if missing:
        raise UserError(
            f"the checkpoint lacks {len(missing)} of the model's tensors, {missing[0]} the first; use another checkpoint, or "
            "copy it again."
        )


def copy_tensors(module: torch.nn.Module, state: dict[str, Tensor]) -> None:
    """Copy named tensors into a module's parameters and buffers; every name must be there with its shape."""
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with torch.no_grad():
        for name, tensor in state.items():
            if name not in own or own[name].shape != tensor.shape:
                found = "no such tensor" if name not in own else f"the shape {tuple(own[name].shape)}"
                raise UserError(
                    f"the checkpoint's tensor {name} of shape {tuple(tensor.shape)} does not fit the model, which has {found}; "
                    "use the configuration that it was trained with."
                )
            own[name].copy_(tensor)
