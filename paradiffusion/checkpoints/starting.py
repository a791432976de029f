"""Starting from somebody else's U-Net: its tensors are kept as far as they fit, and a report says what was not."""

from __future__ import annotations

from collections import Counter

from torch import Tensor

from paradiffusion.checkpoints.layouts import UNET, under_lora
from paradiffusion.errors import UserError

MAX_GROUPS = 24  # of a report's line


def fit(own: dict[str, Tensor], stored: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Every stored tensor whose name and shape the model has, by the model's names; the rest of the model keeps fresh weights. And a few
    lines for a person: counts, parameters, and names grouped by block, of what was kept, fresh and dropped.

    Args:
        own: the model's tensors by name; a layer under LoRA takes the stored layer of its plain name.
        stored: a ``UNetAlone``'s weights.
    Raises:
        UserError: when nothing fits.
    """
    kept: dict[str, Tensor] = {}
    dropped: dict[str, Tensor] = {}
    reshaped: list[str] = []
    for name, tensor in stored.items():
        target = next((n for n in (name, under_lora(name)) if n in own), None)
        if target is not None and own[target].shape == tensor.shape:
            kept[target] = tensor
            continue
        dropped[name] = tensor
        if target is not None:
            reshaped.append(f"        {name} has the shape {tuple(tensor.shape)} there and {tuple(own[target].shape)} here")
    if not kept:
        raise UserError(
            f"none of the {len(stored)} stored tensors fits this model's U-Net; choose the unet= that it was made with, such as "
            "unet=sdxl, or init_from=scratch."
        )
    share = count(kept) / count(own)
    lines = [f"kept    {told(kept)}; {share:.1%} of the model's parameters"]
    lines += [f"fresh   {told({n: t for n, t in own.items() if n not in kept})}", f"dropped {told(dropped)}", *reshaped[:3]]
    lines += [f"        and {len(reshaped) - 3} more of other shapes"] if len(reshaped) > 3 else []
    return kept, "\n".join(lines)


def count(tensors: dict[str, Tensor]) -> int:
    """All their elements."""
    return sum(tensor.numel() for tensor in tensors.values())


def told(tensors: dict[str, Tensor]) -> str:
    """How many, with how many parameters, in which blocks (down_blocks.1 and the like)."""
    if not tensors:
        return "nothing"
    places = (name.removeprefix(f"{UNET}.").split(".") for name in tensors)
    groups = Counter(".".join(place[: 1 + place[0].endswith("_blocks")]) for place in places)
    shown = [f"{block} ({number})" for block, number in list(groups.items())[:MAX_GROUPS]]
    shown += ["..."] if len(groups) > MAX_GROUPS else []
    return f"{len(tensors)} tensors, {count(tensors) / 1e6:.4g} M parameters: {', '.join(shown)}"
