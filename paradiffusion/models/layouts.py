"""Read and write checkpoints: weights in diffusers and PEFT layouts, everything else as JSON beside them.

A checkpoint folder describes itself: ``checkpoint.json`` records text encoder and codec by id, revision and hash, the
whole conditioning, the objective and the sampler's defaults. ``unet/``, ``refiner/`` and ``text_encoder_lora/`` hold the
EMA weights.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from paradiffusion.config import LoraConfig, TrainConfig
from paradiffusion.errors import UserError
from paradiffusion.models.joint import JointModel
from paradiffusion.models.manifest import write_manifest
from paradiffusion.text.encoder import DTYPES, TextEncoder, attach_lora

FORMAT = "paradiffusion"
FORMAT_VERSION = 1
# Where each part of the joint module is stored, and the prefix of its parameters' names there.
UNET, REFINER, LORA = "unet", "refiner", "text_encoder_lora"
T = TypeVar("T")


def describe(
    config: TrainConfig, step: int, text_source: dict[str, Any], codec_source: dict[str, Any]
) -> dict[str, Any]:
    """What ``checkpoint.json`` says."""
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
        "codec": {**asdict(config.codec), "hash": codec_source["hash"]},
        "objective": asdict(config.objective),
        "sampler": asdict(config.sampler),
        "provenance": {"libraries": libraries, "images_seen": step * config.batch_size, "init_from": config.init_from},
    }


def split_parts(state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Group a joint module's tensors by part, each named as its own library names it."""
    parts: dict[str, dict[str, Tensor]] = {UNET: {}, REFINER: {}, LORA: {}}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        if part == "text_encoder":
            # PEFT stores adapters without the adapter's own name ("default").
            parts[LORA][rest.removeprefix("model.").replace(".default.", ".")] = tensor
        else:
            parts[part][rest] = tensor
    return parts


def save_weights(folder: Path, joint: JointModel, state: dict[str, Tensor], description: dict[str, Any]) -> None:
    """Write ``state`` (the EMA weights by parameter name) to ``folder`` with its description.

    Args:
        joint: gives the configuration of the U-Net, the refiner and the adapter; its own weights are not read.
    """
    parts = split_parts({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})
    write_tensors(folder / UNET / "diffusion_pytorch_model.safetensors", parts[UNET])
    joint.unet.save_config(folder / UNET)
    if joint.refiner is not None:
        buffers = {name: tensor.detach().cpu() for name, tensor in joint.refiner.named_buffers()}
        write_tensors(folder / REFINER / "model.safetensors", {**parts[REFINER], **buffers})
        (folder / REFINER / "config.json").write_text(json.dumps(joint.refiner.config, indent=1))
    if parts[LORA]:
        write_tensors(folder / LORA / "adapter_model.safetensors", parts[LORA])
        write_adapter_config(folder / LORA, description["lora"])
    (folder / "checkpoint.json").write_text(json.dumps(description, indent=1))


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """One safetensors file; exactly one metadata key, since the order of several varies from run to run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(sorted(tensors.items())), path, metadata={"format": "pt"})


def write_adapter_config(folder: Path, lora: dict[str, Any]) -> None:
    """The adapter_config.json by which PEFT itself can load the adapter."""
    from peft import LoraConfig as PeftLoraConfig

    PeftLoraConfig(
        r=lora["rank"], lora_alpha=lora["alpha"], lora_dropout=0.0, target_modules=sorted(lora["target_modules"])
    ).save_pretrained(str(folder))
    # PEFT writes a set in the order of this process's string hashes.
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "target_modules": sorted(values["target_modules"])}, indent=1))


def read_description(checkpoint: Path) -> dict[str, Any]:
    """``checkpoint.json``, checked for format and version."""
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
    return description


def parse(cls: type[T], values: dict[str, Any]) -> T:
    """A dataclass from a description's dictionary; keys that this version does not know are left out."""
    known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    return cls(**{key: value for key, value in values.items() if key in known})


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """All weights of a checkpoint by the joint module's names (adapter and refiner buffers included), fp32, on the CPU."""
    state: dict[str, Tensor] = {}
    for part, file in ((UNET, "diffusion_pytorch_model"), (REFINER, "model"), (LORA, "adapter_model")):
        path = checkpoint / part / f"{file}.safetensors"
        if not path.is_file():
            continue
        try:
            tensors = load_file(path)
        except Exception as error:  # safetensors raises its own type, which it does not export
            raise UserError(f"{path} could not be read ({error}); use another checkpoint, or copy it again.") from None
        for name, tensor in tensors.items():
            if part == LORA:
                for matrix in ("lora_A", "lora_B"):
                    name = name.replace(f".{matrix}.weight", f".{matrix}.default.weight")
                state[f"text_encoder.model.{name}"] = tensor.float()
            else:
                state[f"{part}.{name}"] = tensor.float()
    return state


def load_adapter(encoder: TextEncoder, state: dict[str, Tensor], lora: LoraConfig) -> None:
    """Attach the adapter in ``state`` to a frozen text encoder, and freeze it too (stage 3, sampling)."""
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


def publish(checkpoint: Path, output: Path, dtype: str) -> int:
    """Copy a checkpoint's weights and description, without training state, to a new folder; returns its size in bytes.

    Floating-point weights are stored as ``dtype``; reading brings them back to fp32.

    Raises:
        UserError: when ``output`` exists.
    """
    if output.exists():
        raise UserError(f"{output} exists already; choose another --output, or delete it first.")
    description = read_description(checkpoint)
    # Paths of this machine say nothing elsewhere, except those below the repository's root, which are shipped with it.
    for part in ("text_encoder", "codec"):
        path = description[part].get("path")
        if path is not None and Path(path).is_absolute():
            description[part]["path"] = None
    description["provenance"]["init_from"] = None
    output.mkdir(parents=True)
    for source in sorted(checkpoint.glob("*/*")):
        if source.parent.name not in (UNET, REFINER, LORA):
            continue
        target = output / source.parent.name / source.name
        if source.suffix == ".safetensors":
            tensors = {
                name: t.to(DTYPES[dtype]) if t.is_floating_point() else t for name, t in load_file(source).items()
            }
            write_tensors(target, tensors)
        else:
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(source.read_bytes())
    (output / "checkpoint.json").write_text(json.dumps(description, indent=1))
    write_manifest(output)
    return sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
