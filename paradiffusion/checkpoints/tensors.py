"""Tensor files as other programs write them: safetensors whole, in shards or as an fp16 variant, and the old .bin form."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from paradiffusion.data.captions import LFS_POINTER
from paradiffusion.errors import UserError, reason_of

_MOST_OF_A_POINTER = 1024  # bytes
UNET_STEM, ADAPTER_STEM = "diffusion_pytorch_model", "adapter_model"


def is_pointer(path: Path) -> bool:
    """Whether a Git LFS pointer is there in the place of a file."""
    return path.is_file() and path.stat().st_size < _MOST_OF_A_POINTER and path.read_bytes().startswith(LFS_POINTER)


def whole_files(place: Path) -> Path:
    """``place``, a file of weights or a model's folder. Raises UserError where a file there is a Git LFS pointer, as a clone without
    git-lfs leaves them, which libraries report as damage of many kinds."""
    for path in [place] if place.is_file() else sorted(place.glob("*")):
        if is_pointer(path):
            raise UserError(
                f"{path} is a Git LFS pointer, not the file itself; fetch it with git-lfs (`git lfs install && git lfs pull` in "
                "the clone), or download the model again."
            )
    return place


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """One safetensors file; exactly one metadata key, since the order of several varies from run to run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(sorted(tensors.items())), path, metadata={"format": "pt"})


def find_tensors(folder: Path, stem: str) -> list[Path]:
    """The files that hold the tensors called ``stem`` in ``folder``, none where there are none: whole ones before variants, and
    safetensors before ``.bin``. An index names the shards. Raises UserError for one that cannot be read, or that names a file outside
    its folder or one that is missing."""
    for kind in ("safetensors", "bin"):
        for variant in ("", ".fp16"):
            whole = folder / f"{stem}{variant}.{kind}"
            if whole.is_file():
                return [whole]
            # diffusers puts the variant last in an index's name, transformers before the ending.
            for name in (f"{stem}.{kind}.index{variant}.json", f"{stem}{variant}.{kind}.index.json"):
                if (folder / name).is_file():
                    return _shards(folder / name)
    return []


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} could not be read ({error}); copy the folder again.") from None
    paths = [index.parent / name for name in names]
    for path in paths:
        if path.parent != index.parent or not path.is_file():
            raise UserError(f"{index.name} names {path.name}, which is not in {index.parent}; copy the folder again.")
    return paths


def read_tensors(folder: Path, stem: str) -> dict[str, Tensor]:
    """All tensors called ``stem`` in ``folder`` as stored, on the CPU; empty where there are none. ``.bin`` files are unpickled with
    ``weights_only=True``: tensors and nothing that runs. Raises UserError for a file that cannot be read, or holds anything else."""
    tensors: dict[str, Tensor] = {}
    for path in find_tensors(folder, stem):
        tensors |= read_file(path)
    return tensors


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, by its ending; see ``read_tensors``."""
    whole_files(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors raises its own type, which it does not export; pickle raises anything
        raise UserError(f"{path} could not be read ({reason_of(error)}); use another checkpoint, or copy it again.") from None
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{path} holds something else than named tensors; expected the weights of a model.")
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def joint_adapter_name(name: str, prefix: str = "text_encoder.model.") -> str:
    """The name within the joint module of a tensor of an adapter as PEFT stores it, which is without the adapter's own name
    ("default"); ``prefix`` is the adapted model's."""
    name = re.sub(r"\.(lora_[AB])\.weight$", r".\1.default.weight", name)
    name = re.sub(r"\.lora_magnitude_vector(\.weight)?$", ".lora_magnitude_vector.default.weight", name)
    name = re.sub(r"\.(lora_embedding_[AB]|(?:lokr|hada)_\w+)$", r".\1.default", name)
    return prefix + name
