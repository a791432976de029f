"""The exponential moving average of everything that is trained, LoRA included, in fp32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from paradiffusion.training.engine import WholeMasters


class Ema:
    """Follows the fp32 weights (``masters``), of which each process averages what it holds; it starts as a copy, and lies on ``device``,
    None for beside the weights. ``decay`` is the final one: early steps use (1 + n) / (10 + n), so that the average forgets the initial
    weights."""

    def __init__(self, masters: WholeMasters, decay: float, device: str | None = None) -> None:
        assert all(tensor.dtype == torch.float32 for tensor in masters.tensors()), "trained weights are kept in fp32"
        self.masters = masters
        self.decay = decay
        self.values: list[Tensor] = [t.detach().to(device or t.device, torch.float32, copy=True) for t in masters.tensors()]
        # An average on the CPU takes a GPU's weights by way of pinned memory: one wait for all of them, not one for each.
        apart = [t.is_cuda and not value.is_cuda for t, value in zip(masters.tensors(), self.values, strict=True)]
        self.pinned = [torch.empty_like(value).pin_memory() for value in self.values] if any(apart) else None

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimiser step ``step`` (0 first)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current = self.masters.tensors()
        if self.pinned is not None:
            for tensor, place in zip(current, self.pinned, strict=True):
                place.copy_(tensor, non_blocking=True)
            torch.cuda.synchronize(current[0].device)
            current = self.pinned
        torch._foreach_lerp_(self.values, current, 1 - decay)

    def full(self) -> dict[str, Tensor]:
        """The whole average by name, on the CPU, in the main process; empty in the others, which must call this too."""
        return self.masters.full(self.values)

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Set the average from whole tensors; every name must be there."""
        self.masters.fill(self.values, values.__getitem__)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the model computes with the average; the trained weights come back after it, bit for bit."""
        self.masters.exchange(self.values)
        self.masters.refresh()
        try:
            yield
        finally:
            self.masters.exchange(self.values)
            self.masters.refresh()


class OwnAverage(Ema):
    """The average of an optimiser that keeps one (schedule-free), in the EMA's place: made when it is asked for, so a step pays
    nothing for it. ``train()`` after ``eval()`` would bring the weights back but for a rounding; here they come back themselves."""

    def __init__(self, masters: WholeMasters, optimizer: Any, device: str | None = None) -> None:
        super().__init__(masters, 0.0, device)
        self.optimizer = optimizer

    def update(self, step: int) -> None:
        pass

    @torch.no_grad()
    def take(self) -> None:
        """Bring the average up to date."""
        for value, tensor in zip(self.values, self.masters.tensors(), strict=True):
            value.copy_(tensor)
        self.optimizer.eval()
        self.masters.exchange(self.values)
        for group in self.optimizer.param_groups:
            group["train_mode"] = True

    def full(self) -> dict[str, Tensor]:
        self.take()
        return super().full()

    @contextmanager
    def applied(self) -> Iterator[None]:
        self.take()
        with super().applied():
            yield
