"""Conditioning as a value: text features, their mask and the null prompt travel together."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is told about a batch of prompts.

    Attributes:
        features: text features, [B, L, D].
        mask: [B, L] bool, True at real tokens; None where padding is attended to (the paper's arm).
        null_features: features of the empty prompt, [1, L0, D], for classifier-free guidance; or of a negative one for each, [B, L0, D].
        null_mask: [1 or B, L0] bool or None, as ``mask``.
    """

    features: Tensor
    mask: Tensor | None
    null_features: Tensor
    null_mask: Tensor | None

    def __post_init__(self) -> None:
        if (self.mask is None) != (self.null_mask is None):
            raise ValueError("either both or neither of the prompt and the null prompt have a mask")

    def __len__(self) -> int:
        return self.features.shape[0]

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Conditioning:
        move = lambda mask: None if mask is None else mask.to(device)  # noqa: E731
        return Conditioning(self.features.to(device, dtype), move(self.mask), self.null_features.to(device, dtype), move(self.null_mask))

    def select(self, rows: slice | list[int]) -> Conditioning:
        """The conditioning of some of the prompts, with the same null prompt."""
        mask = None if self.mask is None else self.mask[rows]
        return Conditioning(self.features[rows], mask, self.null_features, self.null_mask)

    def repeat_each(self, count: int) -> Conditioning:
        """Each prompt ``count`` times in a row, and each negative one where there are as many."""
        rows = torch.arange(len(self)).repeat_interleave(count)
        each = self.select(rows.tolist())
        if len(self.null_features) == 1:
            return each
        null_mask = None if self.null_mask is None else self.null_mask[rows]
        return replace(each, null_features=self.null_features[rows], null_mask=null_mask)

    def repeat_null(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Features [count, L0, D] and mask of the null prompt alone."""
        mask = None if self.null_mask is None else self.null_mask.expand(count, -1)
        return self.null_features.expand(count, -1, -1), mask

    def guided(self) -> tuple[Tensor, Tensor | None]:
        """One batch of 2B for classifier-free guidance: the null prompt B times, then the prompts."""
        null, null_mask = self.repeat_null(len(self))
        length = max(self.features.shape[1], null.shape[1])
        if self.mask is None or null_mask is None:
            if self.features.shape[1] != null.shape[1]:
                raise ValueError("where padding is attended to, prompt and null prompt have the same padded length")
            return torch.cat([null, self.features]), None
        features = torch.cat([pad_length(null, length), pad_length(self.features, length)])
        return features, torch.cat([pad_length(null_mask, length), pad_length(self.mask, length)])


def pad_length(values: Tensor, length: int) -> Tensor:
    """Pad axis 1 at the end with zeros (False in a mask) to ``length``."""
    missing = length - values.shape[1]
    if missing <= 0:
        return values
    return torch.cat([values, values.new_zeros(values.shape[0], missing, *values.shape[2:])], dim=1)


def padded_length(longest: int, maximum: int, mask_padding: bool, multiple: int = 8) -> int:
    """How far a batch is padded, in tokens.

    Where padding is attended to it is always ``maximum``, so that no image depends on its neighbours in the batch. Where
    it is masked it is the longest caption, rounded up to ``multiple`` to keep the number of shapes small.
    """
    if not mask_padding:
        return maximum
    return min(maximum, -(-max(longest, 1) // multiple) * multiple)
