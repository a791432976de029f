"""Classifier-free guidance with rescale and interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from paradiffusion.config import SamplerConfig


def guided_steps(settings: SamplerConfig, count: int, levels: Callable[[], Sequence[float]]) -> list[bool]:
    """Which of ``count`` steps are guided: scale not 1, within the interval of shares of the steps, and of noise levels (2404.07724).

    Args:
        levels: gives the noise level sigma / alpha of each step, the highest first; called where they matter.
    """
    lowest, highest = settings.guidance_sigma_min, settings.guidance_sigma_max
    within = [True] * count
    if lowest > 0 or highest is not None:
        within = [lowest < level <= (math.inf if highest is None else highest) for level in levels()]
    shares = [step / max(count - 1, 1) for step in range(count)]
    start, stop = settings.guidance_start, settings.guidance_stop
    return [settings.guidance != 1.0 and start <= share <= stop and ok for share, ok in zip(shares, within, strict=True)]


def guide(null: Tensor, prompt: Tensor, scale: float | Tensor, rescale: float = 0.0) -> Tensor:
    """The guided prediction, [B, C, h, w]; ``scale`` may be one number or a tensor that broadcasts, [B, 1, 1, 1]."""
    guided = null + scale * (prompt - null)
    if rescale == 0:
        return guided
    axes = tuple(range(1, prompt.ndim))
    ratio = prompt.std(axes, keepdim=True) / guided.std(axes, keepdim=True).clamp_min(1e-8)
    return rescale * (guided * ratio) + (1 - rescale) * guided
