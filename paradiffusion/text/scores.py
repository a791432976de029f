"""Score tokens: how good a sample was found, as further tokens beside the refined text (MIRO, arXiv 2510.25897).

Trained on pictures of all qualities, told which is which, a model can be asked for the best ones; a caption that is dropped for
guidance takes its scores with it, so that guidance leads towards them, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from paradiffusion.errors import UserError

Scores = Mapping[str, float]
UNKNOWN = 0  # the bin of a score that is not known, or not told; the others are counted from 1, the lowest


def scores_of(meta: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in a sample's JSON by name: under "scores" (as scripts/select.py exports them), under "extra" (other columns of a table
    that scripts/build_shards.py read), else beside the captions (img2dataset's)."""
    parts = (meta, *(part for key in ("extra", "scores") if isinstance(part := meta.get(key), dict)))
    numbers = ((name, value) for part in parts for name, value in part.items() if isinstance(value, int | float))
    return {name: float(value) for name, value in numbers if abs(value) < 1e30}  # neither nan nor infinite in fp32


class ScoreTokens(nn.Module):
    """A token for each score, which says in which of its bins a sample lies.

    They stand before the text: behind it, their place would depend on how far its neighbours in the batch are padded.

    Args:
        width: of the refined text.
        bins: how many of each score, by name.
    Attributes:
        edges: [S, most bins - 1], the lower edge of each score's bins but the first; infinite before ``set_edges``, and where there is
            no bin. Part of the weights, so that a resumed run and later stages have the same.
    """

    def __init__(self, width: int, bins: Mapping[str, int]) -> None:
        super().__init__()
        self.bins = dict(bins)
        most = max(self.bins.values())
        self.edges: Tensor
        self.register_buffer("edges", torch.full((len(self.bins), most - 1), math.inf))
        self.tokens = nn.Parameter(torch.randn(len(self.bins), 1 + most, width))  # of the scale of layer-normalised text

    def values(self, samples: Sequence[Scores]) -> Tensor:
        """float32 [B, S] of the samples' ``scores_of``; nan where one has no such score."""
        return torch.tensor([[one.get(name, math.nan) for name in self.bins] for one in samples], dtype=torch.float32)

    def set_edges(self, samples: Sequence[Scores]) -> None:
        """Cut each score into bins of as many of the ``samples`` each. Raises UserError where they have too few different values."""
        values = self.values(samples)
        for row, (name, count) in enumerate(self.bins.items()):
            known = values[:, row][~values[:, row].isnan()]
            if (found := len(known.unique())) < count:
                raise UserError(
                    f"conditioning.scores={{{name}: {count}}} needs {count} different values, and the JSON of {len(samples)} samples has "
                    f"{found} of that name; its numbers are {', '.join(sorted({key for one in samples for key in one})) or 'none'}."
                )
            self.edges[row, : count - 1] = known.quantile(torch.arange(1, count) / count).to(self.edges.device)

    def place(self, values: Tensor) -> Tensor:
        """The bins of ``values`` [B, S], int64."""
        return torch.where(values.isnan(), UNKNOWN, 1 + (values[..., None] >= self.edges).sum(-1))

    def forward(self, text: Tensor, mask: Tensor | None, bins: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Refined text [B, L, width] and its mask with S tokens before them: of the ``bins``, [B, S] or [S] (None: all UNKNOWN)."""
        rows, scores = len(text), torch.arange(len(self.bins), device=text.device)
        bins = torch.full_like(scores, UNKNOWN) if bins is None else bins
        tokens = self.tokens[scores, bins].to(text.dtype).expand(rows, -1, -1)
        return torch.cat([tokens, text], 1), None if mask is None else torch.cat([mask.new_ones(rows, len(scores)), mask], 1)
