"""Floating-point operations of one sample, by part: 2 x multiply-adds of every matrix product and convolution.

Counted on the meta device by torch's FlopCounterMode through the real forward and backward. So it is exact for what runs:
the backward of a trained layer costs twice its forward, that of a frozen one under LoRA once, and the first frozen layers
before any adapter nothing. Attention is counted whole, causal or not, as PaLM's appendix B and most MFU figures do.
"""

from __future__ import annotations

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
    """FLOP of one part and one sample.

    Attributes:
        forward, backward: without what checkpointing does twice; backward is 0 where nothing of the part is trained and
            nothing trained lies before it.
        recompute: the forward that gradient checkpointing repeats.
    """

    forward: float
    backward: float = 0.0
    recompute: float = 0.0

    @property
    def training(self) -> float:
        """Forward and backward: what MFU counts."""
        return self.forward + self.backward


@dataclass(frozen=True)
class StageFlops:
    """FLOP of one sample at a stage's resolution and token length.

    Attributes:
        unet: with its linear text projection; text: the language model; refiner: between them, if any;
            layout: the layout head, if any; vae: encoding.
    """

    unet: PartFlops
    refiner: PartFlops
    layout: PartFlops
    text: PartFlops
    vae: PartFlops

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
    if not config.gradient_checkpointing:
        return StageFlops(**plain)
    repeated = _count_parts(empty_models(config))
    return StageFlops(
        **{
            name: replace(part, recompute=repeated[name].training - part.training if part.backward else 0.0)
            for name, part in plain.items()
        }
    )


def _count_parts(models: EmptyModels) -> dict[str, PartFlops]:
    joint, latents = models.joint, torch.empty(1, *models.codec.latent_shape(models.height, models.width), device=META)
    mask = models.batch(1, cached=True).mask
    trains_text, refines = joint.text_encoder is not None, joint.refiner is not None
    has_head = joint.refiner is not None and joint.refiner.layout is not None

    def text() -> Tensor:
        return models.read_text(1)

    # What comes before a part and is trained asks it for the gradient of its input.
    def refiner() -> Tensor:
        shape = (1, models.tokens, models.text.width)
        return joint.refine(torch.empty(shape, device=META, requires_grad=trains_text), mask)

    def refined() -> Tensor:
        shape = (1, models.tokens, read_width({**joint.unet.config, "_class_name": type(joint.unet).__name__}))
        return torch.empty(shape, device=META, requires_grad=trains_text or refines)

    def layout() -> Any:
        return joint.estimate(refined(), mask, *latents.shape[-2:])

    def unet() -> Tensor:
        estimate = torch.empty_like(latents, requires_grad=True) if has_head else None
        return joint.denoise(latents, torch.empty(1, device=META), refined(), mask, estimate)

    levels = models.config.repeats  # noise levels, each of which the U-Net alone sees
    return {
        "unet": PartFlops(*(levels * flop for flop in count(unet, backward=True))),
        "refiner": PartFlops(*count(refiner, backward=True)) if refines else PartFlops(0.0),
        "layout": PartFlops(*count(layout, backward=True)) if has_head else PartFlops(0.0),
        "text": PartFlops(*count(text, backward=trains_text)),
        "vae": PartFlops(*count(lambda: models.encode_images(1))),
    }
