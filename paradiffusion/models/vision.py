"""Alignment of the denoiser with a frozen vision encoder, for a stage's first steps (U-REPA, arXiv 2503.18414; REPA, 2410.06940).

What a vision encoder (DINOv2, DINOv3) sees in the clean picture, patch by patch, is what the deepest block of the U-Net is to hold of
the noised latents, behind an MLP and at twice the block's resolution. Neither encoder nor MLP is a part of what is drawn with.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paradiffusion.config import ObjectiveConfig
from paradiffusion.errors import UserError, reason_of

ALIGNER = "aligner."  # begins the names of the MLP's parameters within the joint module
# Patches along each side for each place of the deepest block: 16 x 16 for the 8 x 8 of the paper's U-Net at 512 px.
FINER = 2
# Weight of the similarities between patches beside that of the patches themselves; our choice.
MANIFOLD = 3.0
# Of the pictures that DINOv2 and DINOv3 were trained on, in 0..1.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def vision_config(objective: ObjectiveConfig) -> Any:
    """The vision encoder's configuration in transformers. Raises UserError where it is not to be had, or reads no patches."""
    from transformers import AutoConfig

    name = str(objective.align_encoder)
    try:
        config = AutoConfig.from_pretrained(name)
        assert config.patch_size > 0 and config.hidden_size > 0
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"objective.align_encoder={name} is no vision transformer that can be read ({reason_of(error)}); name a folder or a hub id, "
            "such as facebook/dinov2-base."
        ) from None
    return config


class VisionEncoder:
    """A frozen vision transformer of transformers, in bfloat16 on a GPU.

    Args:
        shrink: pixels along each side of what becomes one place of the denoiser's deepest block.
    """

    def __init__(self, objective: ObjectiveConfig, shrink: int, device: torch.device) -> None:
        from transformers import AutoModel

        config, name = vision_config(objective), str(objective.align_encoder)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.patch, self.shrink, self.dtype = config.patch_size, shrink, dtype
        self.model: Any = AutoModel.from_pretrained(name, dtype=dtype).requires_grad_(False).eval().to(device)
        self.scale = [torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD)]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features of the patches of ``images`` (uint8 [B, 3, H, W]), [B, rows, columns, D]."""
        rows, columns = (FINER * (side // self.shrink) for side in images.shape[-2:])
        mean, std = self.scale
        pixels = (images.float() / 255 - mean) / std
        size = (rows * self.patch, columns * self.patch)
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False)
        states = self.model(pixel_values=pixels.to(self.dtype)).last_hidden_state
        return states[:, -rows * columns :].float().unflatten(1, (rows, columns))  # the class's and registers' tokens come first


class Aligner(nn.Module):
    """The MLP from the hidden states of a U-Net's deepest block to a vision encoder's features, and their loss.

    Attributes:
        seen: the hidden states [B, C, h, w] of the U-Net's last forward.
    """

    def __init__(self, unet: Any, width: int) -> None:
        super().__init__()
        block, channels = unet.mid_block, unet.config.block_out_channels[-1]
        self.seen: Tensor | None = None
        (unet.down_blocks[-1] if block is None else block).register_forward_hook(self._see)
        layers = (nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.project = nn.Sequential(*layers)

    def _see(self, _block: nn.Module, _given: Any, out: Any) -> None:
        self.seen = out[0] if isinstance(out, tuple) else out  # a block on the way down gives those for its skips, too

    def forward(self, vision: Tensor | None) -> Tensor:
        """The loss of each noised latent that the U-Net saw last, [R * B], for the pictures' features [B, rows, columns, D]; zeros, with
        gradients of zero, where there are none."""
        assert self.seen is not None
        seen, self.seen = self.seen, None
        found = self.project(seen.permute(0, 2, 3, 1).float()).float()  # [R * B, h, w, D]
        if vision is None:
            return 0 * found.mean(dim=(1, 2, 3))
        found = F.interpolate(found.permute(0, 3, 1, 2), vision.shape[1:3], mode="bilinear", align_corners=False)
        ours = F.normalize(found.flatten(2).transpose(1, 2), dim=-1)  # [R * B, N, D]
        theirs = F.normalize(vision.flatten(1, 2), dim=-1).repeat(len(ours) // len(vision), 1, 1)
        apart = 1 - (ours * theirs).sum(-1).mean(1)
        manifold = (ours @ ours.mT - theirs @ theirs.mT).square().mean((1, 2))
        return apart + MANIFOLD * manifold
