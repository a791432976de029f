"""Starting points other than our own weights: any U-Net in the diffusers layout, as far as its tensors fit."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from paradiffusion.checkpoints.official import UNET, is_official
from paradiffusion.checkpoints.tensors import UNET_STEM, read_tensors
from paradiffusion.errors import UserError

MAX_GROUPS = 24  # of a report's line


@dataclass(frozen=True)
class Fit:
    """What of a stored U-Net fits a model.

    Attributes:
        tensors: what fits, by the model's names.
        kept: names of the model's tensors that are in ``tensors``.
        fresh: names of those that are not, and keep their fresh weights.
        dropped: names of stored tensors that the model has no place for, or one of another shape.
        reshaped: of ``dropped``, those whose name fits and shape does not, with both shapes.
        sizes: number of elements by name, of the model's and of the dropped tensors.
    """

    tensors: dict[str, Tensor]
    kept: list[str]
    fresh: list[str]
    dropped: list[str]
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    sizes: dict[str, int]

    def report(self) -> str:
        """A few lines for a person: counts, parameters, and names grouped by block."""
        total = sum(self.sizes[name] for name in (*self.kept, *self.fresh))
        share = sum(self.sizes[name] for name in self.kept) / max(total, 1)
        lines = [f"kept    {self._line(self.kept)}; {share:.1%} of the model's parameters"]
        lines.append(f"fresh   {self._line(self.fresh)}")
        lines.append(f"dropped {self._line(self.dropped)}")
        for name, (stored, own) in list(self.reshaped.items())[:3]:
            lines.append(f"        {name} has the shape {stored} there and {own} here")
        if len(self.reshaped) > 3:
            lines.append(f"        and {len(self.reshaped) - 3} more of other shapes")
        return "\n".join(lines)

    def _line(self, names: list[str]) -> str:
        if not names:
            return "nothing"
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(block_of(name), []).append(name)
        shown = [f"{block} ({len(members)})" for block, members in list(groups.items())[:MAX_GROUPS]]
        shown += ["..."] if len(groups) > MAX_GROUPS else []
        return f"{len(names)} tensors, {millions(self.sizes[name] for name in names)}: {', '.join(shown)}"


def block_of(name: str) -> str:
    """The block of the U-Net that a tensor belongs to: ``down_blocks.1`` of ``unet.down_blocks.1.resnets.0...``."""
    parts = name.removeprefix(f"{UNET}.").split(".")
    return ".".join(parts[:2]) if parts[0] in ("down_blocks", "up_blocks") else parts[0]


def millions(sizes: Iterable[int]) -> str:
    """A number of parameters as people say it."""
    return f"{sum(sizes) / 1e6:.4g} M parameters"


def unet_folder(path: Path) -> Path | None:
    """The folder that holds a UNet2DConditionModel: ``path`` itself or its ``unet`` subfolder; None where there is none."""
    for folder in (path, path / UNET):
        try:
            config = json.loads((folder / "config.json").read_text())
        except (OSError, ValueError):
            continue
        if isinstance(config, dict) and config.get("_class_name") == "UNet2DConditionModel":
            return folder
    return None


def is_unet_folder(path: Path) -> bool:
    """Whether ``path`` is a starting point of this kind. Our checkpoints and the published weights are not: they are whole."""
    whole = (path / "checkpoint.json").is_file() or is_official(path) or is_our_pipeline(path)
    return not whole and unet_folder(path) is not None


def is_our_pipeline(path: Path) -> bool:
    """Whether ``path`` is a ParaDiffusionPipeline's folder, which is whole too."""
    try:
        index = json.loads((path / "model_index.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(index, dict) and index.get("_class_name") == "ParaDiffusionPipeline"


def read_unet(path: Path) -> dict[str, Tensor]:
    """The U-Net's tensors by the joint module's names (``unet.`` in front), fp32, on the CPU.

    Raises:
        UserError: when there are none, or they cannot be read.
    """
    folder = unet_folder(path)
    tensors = read_tensors(folder, UNET_STEM) if folder is not None else {}
    if not tensors:
        raise UserError(
            f"init_from={path} holds no weights of a UNet2DConditionModel; expected {UNET_STEM}.safetensors (or its shards, an "
            "fp16 variant or a .bin) beside config.json, in that folder or in its unet/."
        )
    return {f"{UNET}.{name}": tensor.float() for name, tensor in tensors.items()}


def fit(own: dict[str, Tensor], stored: dict[str, Tensor]) -> Fit:
    """Keep every stored tensor whose name and shape the model has; the rest of the model keeps fresh weights.

    Args:
        own: the model's tensors by name; a layer under LoRA takes the stored layer of its plain name.
        stored: as ``read_unet`` gives them.
    Raises:
        UserError: when nothing fits.
    """
    tensors: dict[str, Tensor] = {}
    dropped: list[str] = []
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    sizes = {name: tensor.numel() for name, tensor in own.items()}
    for name, tensor in stored.items():
        module, _, kind = name.rpartition(".")
        target = next((n for n in (name, f"{module}.base_layer.{kind}") if n in own), None)
        if target is not None and own[target].shape == tensor.shape:
            tensors[target] = tensor
            continue
        dropped.append(name)
        sizes.setdefault(name, tensor.numel())
        if target is not None:
            reshaped[name] = (tuple(tensor.shape), tuple(own[target].shape))
    if not tensors:
        raise UserError(
            f"none of the {len(stored)} stored tensors fits this model's U-Net; choose the unet= that it was made with, such as "
            "unet=sdxl, or init_from=scratch."
        )
    fresh = [name for name in own if name not in tensors]
    return Fit(tensors, [name for name in own if name in tensors], fresh, dropped, reshaped, sizes)
