"""A small real set of models for the sampling tests: random U-Net, one vector a word, linear codec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from paradiffusion.config import ObjectiveConfig, SamplerConfig
from paradiffusion.diffusion.objective import make_objective
from paradiffusion.randomness import seed_from
from paradiffusion.text.conditioning import Conditioning, pad_length, padded_length

WIDTH, MAX_TOKENS = 8, 16


def tiny_unet() -> UNet2DConditionModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=WIDTH,
            attention_head_dim=2,
            norm_num_groups=8,
        ).eval()


@dataclass
class TinyModels:
    """Stands in for InferenceModels; 4 pixels a latent."""

    prediction: str = "v_prediction"
    mask_padding: bool = True
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig(steps=4, guidance=3.0))
    checkpoint: str = "runs/tiny/stage1"
    step: int = 7
    dtype: torch.dtype = torch.float32
    latent_channels: int = 4
    factor: int = 4
    multiple: int = 8
    resolution: int = 32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    provenance: dict[str, Any] = field(default_factory=lambda: {"seed": 0})

    def __post_init__(self) -> None:
        self.objective = make_objective(ObjectiveConfig(prediction=self.prediction))
        self.unet = tiny_unet()
        generator = torch.Generator().manual_seed(1)
        self.to_pixels = torch.randn(3 * self.factor**2, self.latent_channels, generator=generator) / 2
        self.rows_seen: list[int] = []

    @torch.no_grad()
    def denoise(self, latents: Tensor, times: Tensor, features: Tensor, mask: Tensor | None) -> Tensor:
        self.rows_seen.append(len(latents))
        return self.unet(latents, times, features, encoder_attention_mask=mask).sample

    def encode(self, prompts: list[str], score_bins: Mapping[str, int] | None = None) -> Conditioning:
        rows = [self._words(prompt) for prompt in prompts]
        length = padded_length(max(map(len, rows)), MAX_TOKENS, self.mask_padding, multiple=4)
        features = torch.cat([pad_length(row[None], length) for row in rows])
        null = self._words("")[None]
        if not self.mask_padding:
            return Conditioning(features, None, pad_length(null, length), None)
        mask = torch.arange(length) < torch.tensor([[len(row)] for row in rows])
        return Conditioning(features, mask, null, torch.ones(1, 1, dtype=torch.bool))

    def encode_ahead(self, prompts: list[str]) -> None:
        """Nothing is kept."""

    def _words(self, prompt: str) -> Tensor:
        words = ["<s>", *prompt.split()][:MAX_TOKENS]
        draws = [torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed_from(word))) for word in words]
        return torch.stack(draws)

    def decode(self, latents: Tensor) -> Tensor:
        planes = torch.einsum("pc,bchw->bphw", self.to_pixels, latents)
        images = torch.nn.functional.pixel_shuffle(planes, self.factor)
        return ((images + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8)

    def count_truncated(self, prompts: list[str]) -> int:
        return sum(len(prompt.split()) >= MAX_TOKENS for prompt in prompts)
