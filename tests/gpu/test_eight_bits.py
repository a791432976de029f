"""recipe=24gb on a GPU: what its 8-bit optimiser comes to."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from paradiffusion.config import OptimizerConfig
from paradiffusion.training.optim import build_optimizer

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("bitsandbytes") is None,
    reason="needs a CUDA device (CUDA_VISIBLE_DEVICES=0) and bitsandbytes",
)


def test_eight_bit_steps_follow_adamw() -> None:
    device = torch.device("cuda")
    results = []
    for name in ("adamw", "adamw8bit"):
        named = {n: nn.Parameter(torch.ones(128, 128, device=device)) for n in ("unet.a", "unet.b")}
        optimizer = build_optimizer(named, OptimizerConfig(name=name, lr=1e-2))
        for step in range(20):
            for number, parameter in enumerate(named.values()):
                parameter.grad = torch.full_like(parameter, 0.1 * (step + number + 1))
            optimizer.step()
        results.append(named["unet.a"].detach())
    torch.testing.assert_close(*results, rtol=0.02, atol=0)
