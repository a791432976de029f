"""Classifier-free guidance with rescale and interval."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from paradiffusion.config import SamplerConfig


def guided_steps(settings: SamplerConfig, levels: Sequence[float]) -> list[bool]:
    """Which steps are guided: scale not 1, within the interval of shares of the steps, and of noise levels (2404.07724).

    Args:
        levels: the noise level sigma / alpha of each step, the highest first.
    """
    last, lowest = max(len(levels) - 1, 1), settings.guidance_sigma_min
    highest = math.inf if settings.guidance_sigma_max is None else settings.guidance_sigma_max
    return [
        settings.guidance != 1.0
        and settings.guidance_start <= step / last <= settings.guidance_stop
        and lowest < level <= highest
        for step, level in enumerate(levels)
    ]


def guide(null: Tensor, prompt: Tensor, scale: float | Tensor, rescale: float = 0.0) -> Tensor:
    """The guided prediction, [B, C, h, w]; ``scale`` may be one number or a tensor that broadcasts, [B, 1, 1, 1]."""
    guided = null + scale * (prompt - null)
    if rescale == 0:
        return guided
    axes = tuple(range(1, prompt.ndim))
    ratio = prompt.std(axes, keepdim=True) / guided.std(axes, keepdim=True).clamp_min(1e-8)
    return rescale * (guided * ratio) + (1 - rescale) * guided
