"""The U-Net of configs/unet/tiny.yaml and a batch for it, for tests that build models without a command line."""

from __future__ import annotations

from typing import Any

import torch
import yaml
from commands import ROOT

from paradiffusion.models.joint import LossBatch

TINY_UNET: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "unet" / "tiny.yaml").read_text())["arguments"]

# The Kandinsky style of the official weights.
SIMPLE = {
    **TINY_UNET,
    "down_block_types": ["SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"],
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ["ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"],
    "attention_head_dim": 8,
    "resnet_time_scale_shift": "scale_shift",
}

WIDTH = 12


def a_batch(mask_padding: bool = True, length: int = 6, rows: int = 3) -> LossBatch:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    mask = torch.arange(length) < torch.tensor([[2], [length], [1]])[:rows]
    return LossBatch(
        latents=draw(rows, 4, 8, 8),
        noise=draw(rows, 4, 8, 8),
        times=torch.tensor([10.0, 500.0, 900.0])[:rows],
        weights=torch.ones(rows),
        mask=mask if mask_padding else None,
        features=draw(rows, length, WIDTH),
    )
