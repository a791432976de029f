"""The refiner: a small bidirectional transformer between the language model and the U-Net.

Features of a causal language model know only what stands before each token: at "red" in "a red circle at the top", the
place is not known yet. A few bidirectional layers mend that (LI-DiT, arXiv 2406.11831). It is trained in every stage,
beside the U-Net's own linear projection, which follows it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paradiffusion.errors import UserError
from paradiffusion.models.layout import LayoutHead, attend
from paradiffusion.text.scores import ScoreTokens


def rotary(x: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864) on queries or keys, [B, heads, L, d], d even."""
    length, width = x.shape[-2], x.shape[-1]
    frequencies = 100.0 ** (-torch.arange(0, width, 2, device=x.device, dtype=torch.float32) / width)
    angles = torch.arange(length, device=x.device, dtype=torch.float32)[:, None] * frequencies  # [L, d/2]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def nearness(length: int, reach: float, heads: int, device: torch.device) -> Tensor:
    """What is added to the scores of attention between ``length`` tokens, [heads, length, length]: minus their distance over a
    head's reach. The last head sees all alike; the one before reaches ``reach`` tokens far, and each before that half as far. More
    than four heads are such fours, one after the other: halved further, a reach would be that of a token alone.

    As in ALiBi (arXiv 2108.12409), in both directions. Before anything is learned, a token then holds what stands around it.
    """
    kinds = min(heads, 4)
    near = max(1, kinds - 1)  # a single head looks near
    slopes = F.pad(2.0 ** torch.arange(near - 1, -1, -1, device=device) / reach, (0, kinds - near))
    slopes = slopes.repeat(-(-heads // kinds))[:heads]
    places = torch.arange(length, device=device)
    return -slopes[:, None, None] * (places[:, None] - places).abs()


def convolve(convolution: nn.Conv1d, x: Tensor) -> Tensor:
    """``convolution``, of stride 1 that keeps the length, over tokens [B, L, D]; one matrix product on processors, where the
    gradient of torch's own takes eight times as long (2.14)."""
    if x.device.type != "cpu":
        return convolution(x.transpose(1, 2)).transpose(1, 2)
    side = convolution.kernel_size[0] // 2
    windows = F.pad(x, (0, 0, side, side)).unfold(1, 2 * side + 1, 1)  # [B, L, D, kernel]
    return F.linear(windows.flatten(2), convolution.weight.flatten(1), convolution.bias)


class RefinerBlock(nn.Module):
    """Pre-norm: a convolution over neighbouring tokens (``kernel`` 0: none; as in the Conformer, arXiv 2005.08100), self-attention
    without a causal mask, an MLP."""

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

    def forward(self, x: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
        b, length, width = x.shape
        if self.kernel:
            near = self.convolution_norm(x)
            if mask is not None:
                near = near * mask[..., None]  # or padding would reach the tokens beside it
            x = x + F.gelu(convolve(self.convolution, near))
        qkv = self.qkv(self.attention_norm(x)).view(b, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, L, d]
        attended = attend(rotary(q), rotary(k), v, mask, bias)
        x = x + self.attention_out(attended.transpose(1, 2).reshape(b, length, width))
        return x + self.mlp(self.mlp_norm(x))


class Refiner(nn.Module):
    """Language-model features [B, L, D] to refined features [B, L, width].

    Args:
        input_width: D, the language model's width.
        width, layers, heads: shape of the transformer; ``width / heads`` must be even.
        kernel: tokens that each block's convolution spans, odd; 0 for none.
        layout: arguments of the layout head that reads the refined features (models/layout.py); None for none.
        reach: tokens over which attention falls off in the farthest of the heads that look near (see ``nearness``); 0: none does.
        scores: bins of each score that a sample is told to have (text/scores.py); empty for none.
    Raises:
        UserError: for a refiner of before, whose layout was painted from the mean of the features.
    """

    def __init__(
        self,
        input_width: int,
        width: int,
        layers: int,
        heads: int,
        kernel: int = 0,
        layout: dict[str, Any] | None = None,
        reach: float = 0,
        scores: dict[str, int] | None = None,
        passes: int = 1,
    ) -> None:
        super().__init__()
        if layout and not isinstance(layout, dict):
            raise UserError(
                "this checkpoint's refiner paints its layout from the mean of the features, which this version no longer has; "
                "train it anew (make demo), or use data/nano."
            )
        if passes != 1:
            raise UserError("this checkpoint's refiner runs its blocks several times, which this version no longer does.")
        self.heads, self.reach = heads, reach
        self.mean: Tensor
        self.std: Tensor
        self.config = {
            "input_width": input_width,
            "width": width,
            "layers": layers,
            "heads": heads,
            "kernel": kernel,
            "layout": layout or None,
            "reach": reach,
            "scores": scores or None,
        }
        # A handful of channels of a language model's hidden states are hundreds of times larger than the rest. Statistics
        # per channel, taken once before training from real captions, bring all of them to one scale.
        self.register_buffer("mean", torch.zeros(input_width))
        self.register_buffer("std", torch.ones(input_width))
        self.embed = nn.Linear(input_width, width)
        self.blocks = nn.ModuleList(RefinerBlock(width, heads, kernel) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.layout = LayoutHead(width, heads, **layout) if layout else None
        self.scores = ScoreTokens(width, scores) if scores else None

    def set_statistics(self, features: Tensor, mask: Tensor | None) -> None:
        """Take mean and standard deviation per channel over the real tokens of ``features`` [B, L, D]."""
        rows = (features if mask is None else features[mask]).reshape(-1, features.shape[-1]).double()
        self.mean.copy_(rows.mean(0))
        self.std.copy_(rows.std(0).clamp_min(1e-6))

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, L, D] and mask [B, L] (True at real tokens, None to attend to padding) to [B, L, width]."""
        x = self.embed((features - self.mean) / self.std)
        bias = nearness(x.shape[1], self.reach, self.heads, x.device) if self.reach else None
        for block in self.blocks:
            x = block(x, mask, bias)
        return self.norm(x)
