"""The exponential moving average of everything that is trained, LoRA included, in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Follows named fp32 parameters.

    Args:
        parameters: name and parameter; the average starts as a copy.
        decay: the final decay; early steps use (1 + n) / (10 + n), so that the average forgets the initial weights.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self.parameters = parameters
        self.decay = decay
        self.values: dict[str, Tensor] = {
            name: p.detach().to(torch.float32, copy=True) for name, p in parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after optimiser step ``step`` (0 first)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current = [p.detach().float() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.values.values()), current, 1 - decay)

    @torch.no_grad()
    def load(self, values: dict[str, Tensor]) -> None:
        """Set the average from stored tensors; every name must be there."""
        for name, value in self.values.items():
            value.copy_(values[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the parameters hold the average; the trained weights come back after it, bit for bit."""
        with torch.no_grad():
            kept = {name: p.detach().clone() for name, p in self.parameters.items()}
            for name, p in self.parameters.items():
                p.copy_(self.values[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in self.parameters.items():
                    p.copy_(kept[name])
