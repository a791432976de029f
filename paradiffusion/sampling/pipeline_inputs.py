"""The diffusers pipeline's arguments: what goes together, and one value for each image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from paradiffusion.errors import UserError
from paradiffusion.models.inference import InferenceModels

Prompts = str | list[str]


def portable(description: dict[str, Any]) -> dict[str, Any]:
    """A description without what is true of this machine alone, as plain JSON."""
    values: dict[str, Any] = json.loads(json.dumps({**description, "unet_lora": None}))
    for part in ("text_encoder", "codec"):
        values[part]["path"] = None
    values["provenance"]["init_from"] = None
    return values


def check_request(models: InferenceModels, height: int, width: int, output_type: str, tensors: Sequence[str]) -> None:
    """UserError for a size that the model cannot take, ValueError for an output or a callback's tensor that is unknown."""
    for key, value in (("height", height), ("width", width)):
        if value < 1 or value % models.multiple:
            raise UserError(f"{key}={value} cannot be drawn by this model; expected a multiple of {models.multiple}.")
    if output_type not in ("pil", "np", "pt", "latent"):
        raise ValueError(f"output_type={output_type} is unknown; choose one of pil, np, pt, latent")
    if set(tensors) - {"latents"}:
        raise ValueError(f"callback_on_step_end_tensor_inputs={list(tensors)} names more than latents")


def prompts_of(prompt: Prompts) -> list[str]:
    """One or more prompts as a list; ValueError for anything else."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(one, str) for one in prompts):
        raise ValueError(f"prompt={prompt!r} is neither a text nor a list of texts")
    return list(prompts)


def repeated(values: list[str], times: int) -> list[str]:
    """Each value ``times`` times in a row; ValueError for fewer than one."""
    if times < 1:
        raise ValueError(f"num_images_per_prompt={times} is out of range; expected a number above 0")
    return [value for value in values for _ in range(times)]


def negatives_of(negative: Prompts | None, count: int, times: int) -> list[str]:
    """One negative prompt for each of ``count`` images, or none at all."""
    if not negative:
        return []
    values = [negative] * (count // times) if isinstance(negative, str) else list(negative)
    if len(values) * times != count:
        raise ValueError(f"{len(values)} negative prompts for {count // times} prompts")
    return repeated(values, times)


def generators_of(
    generator: torch.Generator | Sequence[torch.Generator] | None, count: int
) -> list[int | torch.Generator]:
    """One source of noise for each image."""
    if generator is None:
        return [torch.Generator().manual_seed(int(seed)) for seed in torch.randint(2**62, (count,))]
    single = isinstance(generator, torch.Generator)
    generators: list[Any] = [generator] * count if single else list(generator)  # type: ignore[arg-type]
    if len(generators) != count:
        raise ValueError(f"{len(generators)} generators for {count} images")
    if any(one.device.type != "cpu" for one in generators):
        raise ValueError("noise is drawn on the CPU, so that it is the same everywhere: use torch.Generator()")
    return generators
