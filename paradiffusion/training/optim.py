"""The optimiser, one learning rate per part, and the schedule as a function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from paradiffusion.config import OptimizerConfig
from paradiffusion.errors import UserError
from paradiffusion.models.unet import PROJECTIONS
from paradiffusion.text.families import lacks_bitsandbytes


def part_of(name: str) -> str:
    """Which learning rate a parameter takes: "lora" (of the text encoder or of the U-Net), "conditioning" (refiner and
    linear projection) or "unet"."""
    if name.startswith("text_encoder.") or ".lora_" in name:
        return "lora"
    return "conditioning" if name.startswith(("refiner.", *PROJECTIONS)) else "unet"


class MuonAdamW:
    """Muon for matrices and AdamW for everything else, with one list of groups and one table of state.

    Muon (Jordan et al. 2024) orthogonalises each matrix's momentum, so that rare directions, such as those that bind a
    colour to a place, move as far as common ones. With ``match_rms_adamw`` (arXiv 2502.16982) its steps have AdamW's
    size, and one learning rate serves both.
    """

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW) -> None:
        self.members = (muon, adamw)
        muon.state = self.state = adamw.state
        self.param_groups = [*muon.param_groups, *adamw.param_groups]

    def step(self) -> None:
        for member in self.members:
            member.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for member in self.members:
            member.zero_grad(set_to_none=set_to_none)


class AdamW8bit:
    """bitsandbytes' AdamW, whose averages are blocks of 8-bit numbers (arXiv 2110.02861), a quarter of their memory.

    Its step counters are plain integers; here they are tensors between steps, so that checkpoints hold them like the rest.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerConfig) -> None:
        import bitsandbytes

        self.inner = bitsandbytes.optim.AdamW8bit(groups, betas=(config.beta1, config.beta2), eps=config.eps)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    @property
    def state(self) -> Any:
        return self.inner.state

    def step(self) -> None:
        for values in self.state.values():
            if "step" in values:
                values["step"] = int(values["step"])
        self.inner.step()
        for values in self.state.values():
            values["step"] = torch.tensor(float(values["step"]))

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none=set_to_none)


Optimizer = torch.optim.AdamW | MuonAdamW | AdamW8bit


def build_optimizer(parameters: dict[str, nn.Parameter], config: OptimizerConfig) -> Optimizer:
    """The optimiser over named parameters, in one group per part, kind of decay and method. Weight decay is for matrices and kernels;
    norms and biases have none, as usual for transformers and U-Nets."""
    rates = {"unet": config.lr, "conditioning": config.lr_conditioning, "lora": config.lr_lora}
    groups: dict[tuple[bool, str, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        part, dimensions = part_of(name), len(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves a piece
        muon = config.name == "muon" and dimensions == 2 and part != "lora"  # not for kernels, and LoRA's thin factors
        groups.setdefault((muon, part, dimensions > 1), []).append(parameter)

    def select(wanted: bool) -> list[dict[str, Any]]:
        return [
            {"params": members, "lr": rates[part], "base_lr": rates[part], "part": part,
             "weight_decay": config.weight_decay if decayed else 0.0}
            for (muon, part, decayed), members in groups.items() if muon == wanted
        ]  # fmt: skip

    if config.name == "adamw8bit":
        lacking = lacks_bitsandbytes()
        if lacking is None and any(p.device.type != "cuda" for p in parameters.values()):
            lacking = "the model is not on it"
        if lacking is not None:
            raise UserError(
                f"optimizer.name=adamw8bit needs a CUDA device and the package bitsandbytes, and {lacking}; set "
                "optimizer.name=adamw, or run it where both are."
            )
        return AdamW8bit(select(False), config)
    adamw = torch.optim.AdamW(
        select(False), betas=(config.beta1, config.beta2), eps=config.eps, fused=takes_fused(parameters, config)
    )
    if config.name == "adamw":
        return adamw
    return MuonAdamW(torch.optim.Muon(select(True), momentum=config.momentum, adjust_lr_fn="match_rms_adamw"), adamw)


def takes_fused(parameters: dict[str, nn.Parameter], config: OptimizerConfig) -> bool | None:
    """True where one kernel can update all parameters: floating point, on CUDA or a processor. None leaves the choice to torch."""
    fits = all(p.device.type in ("cuda", "cpu") and p.is_floating_point() for p in parameters.values())
    return True if config.fused and parameters and fits else None


def schedule(config: OptimizerConfig, step: int, max_steps: int) -> float:
    """The factor on every base learning rate at ``step`` (0 first): linear warm-up, then the configured shape."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = min((step - config.warmup_steps) / max(max_steps - config.warmup_steps, 1), 1.0)
    left = {
        "constant": 1.0,
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "linear": 1 - done,
        "trapezoid": min(1.0, (1 - done) / max(config.decay, 1e-9)),
    }[config.schedule]
    return left if config.schedule == "constant" else config.final_lr + (1 - config.final_lr) * left


def set_learning_rate(optimizer: Optimizer, factor: float) -> None:
    """Apply the schedule's factor to every group."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
