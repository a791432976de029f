"""Floating-point operations of one sample, by part: 2 x multiply-adds of every matrix product and convolution; and how many a
device can do in a second.

Counted on the meta device by torch's FlopCounterMode through the real forward and backward. So it is exact for what runs:
the backward of a trained layer costs twice its forward, that of a frozen one under LoRA once, and the first frozen layers
before any adapter nothing. Attention is counted whole, causal or not, as PaLM's appendix B and most MFU figures do.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from paradiffusion.budget.empty import META, EmptyModels, empty_models
from paradiffusion.config import TrainConfig
from paradiffusion.models.unet import read_width


@dataclass(frozen=True)
class PartFlops:
    """FLOP of one part and one sample, ``recompute`` being the forward that gradient checkpointing repeats. ``backward`` is 0 where
    nothing of the part is trained and nothing trained lies before it."""

    forward: float
    backward: float = 0.0
    recompute: float = 0.0

    @property
    def training(self) -> float:
        """Forward and backward: what MFU counts."""
        return self.forward + self.backward


@dataclass(frozen=True)
class StageFlops:
    """FLOP of one sample at a stage's resolution and token length. ``unet`` is with its linear text projection, ``vae`` encoding; of a
    stage that distils, ``teacher`` is the guided steps of a window, each of two forwards."""

    unet: PartFlops
    refiner: PartFlops
    layout: PartFlops
    text: PartFlops
    vae: PartFlops
    teacher: PartFlops

    def parts(self) -> dict[str, PartFlops]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def total(self, *left_out: str) -> PartFlops:
        """The sum over the parts but those ``left_out``, such as "text" where features are cached."""
        kept = [part for name, part in self.parts().items() if name not in left_out]
        return PartFlops(*(sum(getattr(p, f.name) for p in kept) for f in fields(PartFlops)))


def count(work: Callable[[], Any], backward: bool = False) -> tuple[float, float]:
    """FLOP of ``work``'s forward and, where asked for, of the way back from the sum of what it returns."""
    counter: Any = FlopCounterMode(display=False)
    with counter:
        if not backward:
            with torch.no_grad():
                work()
            return float(counter.get_total_flops()), 0.0
        result = work()
        forward = float(counter.get_total_flops())
        result.sum().backward()
    return forward, float(counter.get_total_flops()) - forward


def stage_flops(config: TrainConfig) -> StageFlops:
    """FLOP of one sample of a stage, by part. Raises UserError as ``empty_models``."""
    plain = _count_parts(empty_models(replace(config, gradient_checkpointing=False)))
    if config.gradient_checkpointing:
        for name, part in _count_parts(empty_models(config)).items():
            if plain[name].backward:
                plain[name] = replace(plain[name], recompute=part.training - plain[name].training)
    return StageFlops(**plain)


def _count_parts(models: EmptyModels) -> dict[str, PartFlops]:
    joint, latents = models.joint, torch.empty(1, *models.codec.latent_shape(models.height, models.width), device=META)
    mask = models.batch(1, cached=True).mask
    trains_text, has_refiner = joint.text_encoder is not None, joint.refiner is not None
    refines = joint.refiner is not None and next(joint.refiner.parameters()).requires_grad
    has_head = joint.refiner is not None and joint.refiner.layout is not None

    def text() -> Tensor:
        return models.read_text(1)

    # What comes before a part and is trained asks it for the gradient of its input.
    def refiner() -> Tensor:
        shape = (1, models.tokens, models.text.width)
        return joint.refine(torch.empty(shape, device=META, requires_grad=trains_text), mask)

    def refined() -> tuple[Tensor, Tensor | None]:
        shape = (1, models.tokens, read_width({**joint.unet.config, "_class_name": type(joint.unet).__name__}))
        return joint.with_scores(torch.empty(shape, device=META, requires_grad=trains_text or refines), mask, None)

    def layout() -> Any:
        return joint.estimate(*refined(), *latents.shape[-2:])

    def unet() -> Tensor:
        estimate = torch.empty_like(latents, requires_grad=refines) if has_head else None
        return joint.denoise(latents, torch.empty(1, device=META), *refined(), estimate)

    levels = models.config.repeats  # noise levels, each of which the U-Net alone sees
    distils, substeps = models.config.objective.distill_steps > 0, models.config.objective.distill_substeps
    parts = {
        "unet": PartFlops(*(levels * flop for flop in count(unet, backward=True))),
        "refiner": PartFlops(*count(refiner, backward=refines)) if has_refiner else PartFlops(0.0),
        "layout": PartFlops(*count(layout, backward=refines)) if has_head else PartFlops(0.0),
        "text": PartFlops(*count(text, backward=trains_text)),
        "vae": PartFlops(*count(lambda: models.encode_images(1))),
    }
    once = parts["refiner"].forward + 2 * parts["layout"].forward
    return {**parts, "teacher": PartFlops(distils * (once + 2 * substeps * parts["unet"].forward / levels))}


@dataclass(frozen=True)
class Device:
    """What an accelerator can do at most: TFLOP/s in bfloat16 (dense, fp32 accumulation, at the stated boost clock) and in fp32 outside
    the tensor cores. ``match`` are lower-case words of which all are in the name that its driver gives, ``half`` the 16-bit format that
    ``bf16`` is for: chips before 2020 have float16 only."""

    title: str
    match: tuple[str, ...]
    bf16: float
    fp32: float
    half: str = "bfloat16"

    def peak(self, precision: str) -> float:
        """TFLOP/s of matrix products in training at ``precision`` (a run's "bf16" or "fp32")."""
        return self.fp32 if precision == "fp32" else self.bf16


# NVIDIA's and AMD's data sheets; where those give figures with sparsity, half of them.
DEVICES = {
    "b200": Device("NVIDIA B200 (HGX)", ("b200",), 2250, 75),
    "h200": Device("NVIDIA H200 SXM", ("h200",), 989.4, 66.9),
    "h100_pcie": Device("NVIDIA H100 PCIe", ("h100", "pcie"), 756.4, 51.2),
    "h100": Device("NVIDIA H100 SXM", ("h100",), 989.4, 66.9),
    "a100": Device("NVIDIA A100 80GB SXM", ("a100",), 312, 19.5),
    "a100_40gb": Device("NVIDIA A100 40GB", ("a100", "40gb"), 312, 19.5),
    "l40s": Device("NVIDIA L40S", ("l40s",), 362.1, 91.6),
    "l4": Device("NVIDIA L4", ("l4",), 121, 30.3),
    "a10": Device("NVIDIA A10", ("a10",), 125, 31.2),
    "rtx6000ada": Device("NVIDIA RTX 6000 Ada", ("6000 ada",), 364.2, 91.1),
    "a6000": Device("NVIDIA RTX A6000", ("a6000",), 154.8, 38.7),
    "rtx5090": Device("NVIDIA GeForce RTX 5090", ("5090",), 209.5, 104.8),
    "rtx4090": Device("NVIDIA GeForce RTX 4090", ("4090",), 165.2, 82.6),
    "rtx3090": Device("NVIDIA GeForce RTX 3090", ("3090",), 71, 35.6),
    "v100": Device("NVIDIA V100 SXM2", ("v100",), 125, 15.7, "float16"),
    "t4": Device("NVIDIA T4", ("t4",), 65, 8.1, "float16"),
    "mi300x": Device("AMD Instinct MI300X", ("mi300x",), 1307.4, 163.4),
}


def recognise(driver_name: str) -> Device | None:
    """The device of a driver's name such as "NVIDIA H100 80GB HBM3"; None where its peak is not known here."""
    words = set(re.split(r"[^a-z0-9]+", driver_name.lower()))
    found = [d for d in DEVICES.values() if words.issuperset(" ".join(d.match).split())]
    return max(found, key=lambda device: len(" ".join(device.match)), default=None)
