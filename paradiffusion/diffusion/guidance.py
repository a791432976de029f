"""Classifier-free guidance with rescale and interval."""

from __future__ import annotations

from torch import Tensor

from paradiffusion.config import SamplerConfig


def is_guided(settings: SamplerConfig, step: int) -> bool:
    """Whether step ``step`` (0 first, at the highest noise) is guided: scale not 1, and within the interval of 2404.07724."""
    share = step / max(settings.steps - 1, 1)
    return settings.guidance != 1.0 and settings.guidance_start <= share <= settings.guidance_stop


def guide(null: Tensor, prompt: Tensor, scale: float | Tensor, rescale: float = 0.0) -> Tensor:
    """The guided prediction, [B, C, h, w]; ``scale`` may be one number or a tensor that broadcasts, [B, 1, 1, 1]."""
    guided = null + scale * (prompt - null)
    if rescale == 0:
        return guided
    axes = tuple(range(1, prompt.ndim))
    ratio = prompt.std(axes, keepdim=True) / guided.std(axes, keepdim=True).clamp_min(1e-8)
    return rescale * (guided * ratio) + (1 - rescale) * guided
