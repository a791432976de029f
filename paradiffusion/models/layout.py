"""Layout head: an estimate of the clean latents from the text alone, by queries that stand at places of the picture.

The diffusion loss alone hardly teaches the text path which words belong to which place. The head's own loss, the squared
error of the estimate, does: its minimum is the posterior mean of the latents given the text, which needs no labels and holds
for any data (compare posterior-mean rectified flow, arXiv 2410.00418, and Kandinsky's prior). The U-Net takes the estimate
as further input channels and corrects it. Not part of the paper.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Half turns of the sines and cosines in a position's code: three tell a sixth of a picture from its neighbours.
HALF_TURNS = 3


def position_code(rows: int, columns: int, like: Tensor) -> Tensor:
    """Where each of ``rows`` x ``columns`` patches lies, [rows * columns, 4 + 4 * HALF_TURNS].

    x and y of its centre in -1..1, their sines and cosines of 1 to HALF_TURNS half turns, and the logarithm of both sides, by
    which "at the top left" can mean a quarter of one canvas and a ninth of another.
    """
    y, x = ((torch.arange(n, device=like.device, dtype=torch.float32) + 0.5) / n * 2 - 1 for n in (rows, columns))
    y, x = y.repeat_interleave(columns), x.repeat(rows)
    waves = [wave(math.pi / 2 * k * axis) for k in range(1, HALF_TURNS + 1) for axis in (x, y) for wave in (torch.sin, torch.cos)]
    sides = [torch.full_like(x, math.log2(side / 4)) for side in (rows, columns)]
    return torch.stack([x, y, *waves, *sides], dim=1).to(like.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """Attention of queries [B, heads, Q, d] to keys and values [B, heads, L, d]; mask [B, L] is True at what is read, and ``bias``
    [heads, Q, L] is added to the scores.

    Written out on processors in half precision, where the gradient of torch's fused attention takes four times as long (2.14).
    """
    mask = None if mask is None else mask[:, None, None, :]
    if q.device.type != "cpu" or v.dtype == torch.float32:
        if bias is not None:
            bias = bias.to(q.dtype)
            mask = bias[None] if mask is None else bias.masked_fill(~mask, torch.finfo(q.dtype).min)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1).to(v.dtype) @ v


class Attention(nn.Module):
    """Multi-head attention from ``x`` [B, Q, W] to ``context`` [B, L, W], with RMS norm on queries and keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.norm_q, self.norm_k = nn.RMSNorm(width // heads), nn.RMSNorm(width // heads)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        q = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, Q, d]
        k, v = self.to_kv(context).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, heads, L, d]
        q, k = (F.rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype)) for x, norm in ((q, self.norm_q), (k, self.norm_k)))
        attended = attend(q, k, v, mask)
        return self.to_out(attended.transpose(1, 2).flatten(2))


class LayoutBlock(nn.Module):
    """Pre-norm: queries attend to the text, then to each other, then an MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.text_norm, self.text = nn.LayerNorm(width), Attention(width, heads)
        self.self_norm, self.self_attention = nn.LayerNorm(width), Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.text(self.text_norm(x), tokens, mask)
        near = self.self_norm(x)
        x = x + self.self_attention(near, near, None)
        return x + self.mlp(self.mlp_norm(x))


class LayoutHead(nn.Module):
    """Refined text features [B, L, width] to an estimate of the latents [B, channels, h, w], for any h and w.

    Args:
        width, heads: of the refined features and of the attention to them.
        layers: blocks.
        patch: latents along each side of the square that one query estimates: 64 x 64 latents and 4 make 16 x 16 queries.
        channels: of the latents.
        reads: "tokens", or their "mean" alone: the ablation that shows what attention to them is for.
    """

    def __init__(self, width: int, heads: int, layers: int, patch: int, channels: int, reads: Literal["tokens", "mean"] = "tokens") -> None:
        super().__init__()
        self.patch, self.channels, self.reads = patch, channels, reads
        code = position_code(1, 1, torch.zeros(())).shape[1]
        self.place = nn.Sequential(nn.Linear(code, width), nn.GELU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(LayoutBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, channels * patch**2)

    def forward(self, tokens: Tensor, mask: Tensor | None, height: int, width: int) -> Tensor:
        """[B, L, width] and mask [B, L] (None: all are read) to [B, channels, height, width].

        Sides that are no multiple of ``patch`` are cut from the next larger estimate.
        """
        if self.reads == "mean":
            real = torch.ones_like(tokens[..., :1]) if mask is None else mask[..., None].to(tokens)
            tokens, mask = (tokens * real).sum(1, keepdim=True) / real.sum(1, keepdim=True), None  # [B, 1, width]
        rows, columns = -(-height // self.patch), -(-width // self.patch)
        x = self.place(position_code(rows, columns, tokens)).expand(len(tokens), -1, -1)  # [B, rows * columns, width]
        for block in self.blocks:
            x = block(x, tokens, mask)
        patches = self.out(self.norm(x)).view(-1, rows, columns, self.channels, self.patch, self.patch)
        estimate = patches.permute(0, 3, 1, 4, 2, 5).reshape(-1, self.channels, rows * self.patch, columns * self.patch)
        return estimate[..., :height, :width]


def layout_losses(estimate: Tensor, latents: Tensor, weights: Tensor, told: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The squared error of the head's estimate, over captions that were ``told`` [B]: as a share of the weighted batch; and,
    detached, the mean over them alone, and each sample's [B]."""
    shares = weights if told is None else weights * told
    errors = (estimate.float() - latents.float()).square().mean(dim=(1, 2, 3))  # [B]
    mean = (errors * shares).sum() / shares.sum().clamp_min(1)
    return (errors * shares).mean(), mean.detach(), errors.detach()
