"""Starting from somebody else's U-Net: its tensors are kept as far as they fit, and a report says what was not."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import Tensor

from paradiffusion.checkpoints.layouts import UNET, under_lora
from paradiffusion.errors import UserError

MAX_GROUPS = 24  # of a report's line


@dataclass(frozen=True)
class Fit:
    """What of a stored U-Net fits a model.

    Attributes:
        tensors: what fits, by the model's names.
        fresh: names of the model's other tensors, which keep their fresh weights.
        dropped: names of stored tensors that the model has no place for, or one of another shape.
        reshaped: of ``dropped``, those whose name fits and shape does not, with both shapes.
        sizes: number of elements by name, of the model's and of the dropped tensors.
    """

    tensors: dict[str, Tensor]
    fresh: list[str]
    dropped: list[str]
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    sizes: dict[str, int]

    def report(self) -> str:
        """A few lines for a person: counts, parameters, and names grouped by block."""
        kept = sum(self.sizes[name] for name in self.tensors)
        share = kept / max(kept + sum(self.sizes[name] for name in self.fresh), 1)
        lines = [f"kept    {self._line(list(self.tensors))}; {share:.1%} of the model's parameters"]
        lines += [f"fresh   {self._line(self.fresh)}", f"dropped {self._line(self.dropped)}"]
        for name, (stored, own) in list(self.reshaped.items())[:3]:
            lines.append(f"        {name} has the shape {stored} there and {own} here")
        if len(self.reshaped) > 3:
            lines.append(f"        and {len(self.reshaped) - 3} more of other shapes")
        return "\n".join(lines)

    def _line(self, names: list[str]) -> str:
        if not names:
            return "nothing"
        places = (name.removeprefix(f"{UNET}.").split(".") for name in names)
        groups = Counter(".".join(place[: 1 + place[0].endswith("_blocks")]) for place in places)  # down_blocks.1 and the like
        shown = [f"{block} ({count})" for block, count in list(groups.items())[:MAX_GROUPS]]
        shown += ["..."] if len(groups) > MAX_GROUPS else []
        millions = sum(self.sizes[name] for name in names) / 1e6
        return f"{len(names)} tensors, {millions:.4g} M parameters: {', '.join(shown)}"


def fit(own: dict[str, Tensor], stored: dict[str, Tensor]) -> Fit:
    """Keep every stored tensor whose name and shape the model has; the rest of the model keeps fresh weights.

    Args:
        own: the model's tensors by name; a layer under LoRA takes the stored layer of its plain name.
        stored: a ``UNetAlone``'s weights.
    Raises:
        UserError: when nothing fits.
    """
    tensors: dict[str, Tensor] = {}
    dropped: list[str] = []
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    sizes = {name: tensor.numel() for name, tensor in own.items()}
    for name, tensor in stored.items():
        target = next((n for n in (name, under_lora(name)) if n in own), None)
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
    return Fit(tensors, [name for name in own if name not in tensors], dropped, reshaped, sizes)
