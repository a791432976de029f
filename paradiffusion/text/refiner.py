"""The refiner: a small bidirectional transformer between the language model and the U-Net.

Features of a causal language model know only what stands before each token: at "red" in "a red circle at the top", the
place is not known yet. A few bidirectional layers mend that (LI-DiT, arXiv 2406.11831). It is trained in every stage,
beside the U-Net's own linear projection, which follows it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Cosines along each side of the painted map: four tell a quarter of a picture from its neighbours.
WAVES = 4
# A channel whose mean differs less than this between captions, as a share of how it differs between tokens, tells them
# apart by rounding alone. Of paragraphs it differs by 0.17 or more. Our choice.
ALIKE = 0.01


def rotary(x: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864) on queries or keys, [B, heads, L, d], d even."""
    length, width = x.shape[-2], x.shape[-1]
    frequencies = 100.0 ** (-torch.arange(0, width, 2, device=x.device, dtype=torch.float32) / width)
    angles = torch.arange(length, device=x.device, dtype=torch.float32)[:, None] * frequencies  # [L, d/2]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class RefinerBlock(nn.Module):
    """Pre-norm: a convolution over neighbouring tokens, self-attention without a causal mask, an MLP.

    The convolution (as in the Conformer, arXiv 2005.08100) sees a clause at once, so that what is said of one object
    meets in each of its tokens before any attention has been learned.
    """

    def __init__(self, width: int, heads: int, kernel: int) -> None:
        super().__init__()
        self.heads = heads
        self.kernel = kernel
        if kernel:
            self.convolution_norm = nn.LayerNorm(width)
            self.convolution = nn.Conv1d(width, width, kernel, padding=kernel // 2)
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        b, length, width = x.shape
        if self.kernel:
            near = self.convolution_norm(x)
            if mask is not None:
                near = near * mask[..., None]  # or padding would reach the tokens beside it
            x = x + F.gelu(self.convolution(near.transpose(1, 2)).transpose(1, 2))
        qkv = self.qkv(self.attention_norm(x)).view(b, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, L, d]
        attended = F.scaled_dot_product_attention(
            rotary(q), rotary(k), v, attn_mask=None if mask is None else mask[:, None, None, :]
        )
        x = x + self.attention_out(attended.transpose(1, 2).reshape(b, length, width))
        return x + self.mlp(self.mlp_norm(x))


class Refiner(nn.Module):
    """Language-model features [B, L, D] to refined features [B, L, width].

    Args:
        input_width: D, the language model's width.
        width, layers, heads: shape of the transformer; ``width / heads`` must be even.
        kernel: tokens that each block's convolution spans, odd; 0 for none.
        layout: latent channels of the map that ``paint`` draws from the summary; 0 for neither.
    """

    def __init__(self, input_width: int, width: int, layers: int, heads: int, kernel: int = 0, layout: int = 0) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.caption_mean: Tensor
        self.caption_std: Tensor
        self.config = {
            "input_width": input_width,
            "width": width,
            "layers": layers,
            "heads": heads,
            "kernel": kernel,
            "layout": layout,
        }
        # A handful of channels of a language model's hidden states are hundreds of times larger than the rest. Statistics
        # per channel, taken once before training from real captions, bring all of them to one scale.
        self.register_buffer("mean", torch.zeros(input_width))
        self.register_buffer("std", torch.ones(input_width))
        self.embed = nn.Linear(input_width, width)
        self.blocks = nn.ModuleList(RefinerBlock(width, heads, kernel) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.summary: nn.Sequential | None = None
        self.layout: nn.Linear | None = None
        if layout:
            # The mean of a caption's features differs from caption to caption by a fraction of its size. Brought to unit
            # variance over captions, what is said can be told from how it is said from the first step on.
            self.register_buffer("caption_mean", torch.zeros(input_width))
            self.register_buffer("caption_std", torch.ones(input_width))
            self.summary = nn.Sequential(
                nn.Linear(input_width, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.GELU()
            )
            self.layout = nn.Linear(width, layout * WAVES**2)

    def set_statistics(self, features: Tensor, mask: Tensor | None) -> None:
        """Take mean and standard deviation per channel from ``features`` [B, L, D]: of its real tokens, and of the
        captions' means."""
        rows = (features if mask is None else features[mask]).reshape(-1, features.shape[-1]).double()
        self.mean.copy_(rows.mean(0))
        self.std.copy_(rows.std(0).clamp_min(1e-6))
        if self.summary is not None and len(features) > 1:
            means = average(features.double(), mask)
            self.caption_mean.copy_(means.mean(0))
            # Captions that are all alike (one sentence for every picture) have no spread of their own, and any other text,
            # such as a dropped caption's, would be blown up by it: a channel is then brought to its tokens' scale.
            spread, scale = means.std(0), torch.where(self.std > 1e-6, self.std, 1.0).double()
            self.caption_std.copy_(torch.where(spread > ALIKE * scale, spread, scale))

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, L, D] and mask [B, L] (True at real tokens, None to attend to padding) to [B, L, width].

        With a summary, the first token (the start of the sequence, which says nothing of its own) gives its place to it.
        """
        x = self.embed((features - self.mean) / self.std)
        for block in self.blocks:
            x = block(x, mask)
        refined = self.norm(x)
        if self.summary is None:
            return refined
        standard = (average(features, mask) - self.caption_mean) / self.caption_std
        return torch.cat([self.summary(standard)[:, None].to(refined.dtype), refined[:, 1:]], dim=1)

    def paint(self, refined: Tensor, height: int, width: int) -> Tensor:
        """A coarse first estimate of the latents from the summary alone, [B, C, height, width].

        A sum of low cosines over the picture, whatever its size. The U-Net takes it as input and corrects it. It is the
        short way from "at the top left" to the top left: attention must first learn which token a place should read,
        and until then earns nothing from knowing where things belong.
        """
        assert self.layout is not None
        amplitudes = self.layout(refined[:, 0]).view(len(refined), -1, WAVES, WAVES)
        rows, columns = (cosines(side, amplitudes) for side in (height, width))
        return torch.einsum("bcij,ih,jw->bchw", amplitudes, rows, columns)


def average(features: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of features [B, L, D] over real tokens, [B, D]."""
    if mask is None:
        return features.mean(dim=1)
    shares = mask / mask.sum(dim=1, keepdim=True)
    return (features * shares[..., None].to(features)).sum(dim=1)


def cosines(side: int, like: Tensor) -> Tensor:
    """The first WAVES cosines of the discrete cosine transform at ``side`` points, [WAVES, side]."""
    points = (torch.arange(side, device=like.device, dtype=torch.float32) + 0.5) / side
    waves = torch.arange(WAVES, device=like.device, dtype=torch.float32)
    return torch.cos(math.pi * waves[:, None] * points).to(like.dtype)
