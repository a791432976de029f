"""The optimiser, one learning rate per part, and the schedule as a function of the step."""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from paradiffusion.config import OPTIMIZERS, OptimizerConfig
from paradiffusion.errors import UserError
from paradiffusion.machine import settled_precision
from paradiffusion.models.unet import PROJECTIONS
from paradiffusion.text.encoder import is_adapter
from paradiffusion.text.families import lacks_bitsandbytes


def part_of(name: str) -> str:
    """Which learning rate a parameter takes: "lora" (of the text encoder or of the U-Net), "conditioning" (refiner and
    linear projection) or "unet"."""
    if name.startswith("text_encoder.") or is_adapter(name):
        return "lora"
    return "conditioning" if name.startswith(("refiner.", *PROJECTIONS)) else "unet"


class Fp32Muon(torch.optim.Muon):
    """Muon for processors without bfloat16 instructions, where torch's own, which orthogonalises in bfloat16, takes seconds a step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            a, b, c = group["ns_coefficients"]
            for parameter in (p for p in group["params"] if p.grad is not None):
                state, (rows, columns) = self.state[parameter], parameter.shape
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                average = state["momentum_buffer"]
                average.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(average, group["momentum"]) if group["nesterov"] else average
                x = update.float() if rows <= columns else update.float().T
                x = x / x.norm().clamp(min=group["eps"])
                # Newton and Schulz's x <- (a + b G + c GG) x, G = xx', as torch's own, gathered into one product of the small G's.
                gram, product = x @ x.T, torch.eye(len(x), dtype=x.dtype)
                for _ in range(group["ns_steps"]):
                    factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
                    factor.diagonal().add_(a)
                    product, gram = factor @ product, factor @ gram @ factor
                x = product @ x
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                # adjust_lr_fn="match_rms_adamw"
                parameter.add_(x if rows <= columns else x.T, alpha=-0.2 * group["lr"] * math.sqrt(max(rows, columns)))


class MuonAdamW:
    """Muon for hidden matrices and AdamW for everything else, with one list of groups and one table of state.

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


def build_optimizer(parameters: dict[str, nn.Parameter], config: OptimizerConfig) -> Any:
    """The optimiser over named parameters, in one group per part, kind of decay and method. Weight decay is for matrices and kernels;
    norms and biases have none, as usual for transformers and U-Nets. Raises UserError where it cannot run here."""
    rates = {"unet": config.lr, "conditioning": config.lr_conditioning, "lora": config.lr_lora}
    groups: dict[tuple[bool, str, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        part, dimensions = part_of(name), len(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves a piece
        # Not for kernels, LoRA's thin factors, and what a U-Net makes of the time: at nano's size a third of Muon's arithmetic.
        muon = config.name == "muon" and dimensions == 2 and part != "lora" and "time_emb" not in name
        groups.setdefault((muon, part, dimensions > 1), []).append(parameter)

    def select(wanted: bool) -> list[dict[str, Any]]:
        return [
            {"params": members, "lr": rates[part], "base_lr": rates[part], "part": part,
             "weight_decay": config.weight_decay if decayed else 0.0}
            for (muon, part, decayed), members in groups.items() if muon == wanted
        ]  # fmt: skip

    made, others = find_optimizer(config.name, parameters), select(False)
    if config.name == "muon":
        on_cpu = all(parameter.device.type == "cpu" for parameter in parameters.values())
        slow = on_cpu and settled_precision("auto") == "fp32"
        matrices = (Fp32Muon if slow else made)(select(True), momentum=config.momentum, adjust_lr_fn="match_rms_adamw")
        return MuonAdamW(matrices, build(torch.optim.AdamW, others, parameters, config))
    if config.name == "prodigy" and len(found := {group["lr"] for group in others}) > 1:
        raise UserError(
            f"optimizer.name=prodigy finds one learning rate for all parts, and was given {sorted(found)} as its factors; set "
            "optimizer.lr, optimizer.lr_conditioning and optimizer.lr_lora to the same, as a rule to 1."
        )
    return build(made, others, parameters, config)


def find_optimizer(name: str, parameters: dict[str, nn.Parameter]) -> Any:
    """The class that OPTIMIZERS calls ``name``. Raises UserError where its package is not installed, or not for this device."""
    module, _, made = OPTIMIZERS[name].path.rpartition(".")
    package, lacking = module.partition(".")[0], None
    needs, mend = f"the package {package}", f"`pip install {package}`, or set optimizer.name=adamw"
    if package == "bitsandbytes":
        needs, mend = f"a CUDA device and {needs}", "set optimizer.name=adamw, or run it where both are"
        lacking = lacks_bitsandbytes()
        if lacking is None and any(p.device.type != "cuda" for p in parameters.values()):
            lacking = "the model is not on it"
    elif importlib.util.find_spec(package) is None:
        lacking = "it is not installed"
    if lacking is not None:
        raise UserError(f"optimizer.name={name} needs {needs}, and {lacking}; {mend}.")
    return getattr(importlib.import_module(module), made)


def build(made: Any, groups: list[dict[str, Any]], parameters: dict[str, nn.Parameter], config: OptimizerConfig) -> Any:
    """An optimiser of the class ``made``, with those of our settings that it takes, as it takes them (Adafactor's eps is another)."""
    ours = {"betas": (config.beta1, config.beta2), "eps": config.eps, "momentum": config.momentum, "fused": takes_fused(parameters, config)}
    takes = inspect.signature(made).parameters
    fits = {key: value for key, value in ours.items() if key in takes and isinstance(takes[key].default, tuple) == isinstance(value, tuple)}
    optimizer = made(groups, **fits)
    if keeps_average(optimizer):
        optimizer.train()
    return optimizer


def keeps_average(optimizer: Any) -> bool:
    """Whether ``optimizer.eval()`` brings an average of its own in the weights' place, and ``train()`` them back (schedule-free)."""
    return hasattr(optimizer, "eval")


def counters(optimizer: Any) -> Iterator[tuple[str, dict[str, Any], str, Any]]:
    """What an optimiser may count in its groups, such as Prodigy's estimate: name, group, key and first value."""
    for number, group in enumerate(optimizer.param_groups):
        for key, first in getattr(optimizer, "defaults", {}).items():
            if isinstance(first, (bool, int, float)) and key not in ("lr", "weight_decay"):
                yield f"{key}/group {number}", group, key, first


def plain_tensors(key: str, value: Any) -> dict[str, Tensor]:
    """A value of an optimiser's state as tensors that safetensors takes: torchao's are several in one, "exp_avg.codes" and others."""
    if not is_traceable_wrapper_subclass(value):
        return {key: torch.as_tensor(value)}
    return {f"{key}.{part}": getattr(value, part) for part in value.__tensor_flatten__()[0]}


def make_state(optimizer: Any) -> None:
    """Let an optimiser make its state, in a step that changes no weight."""
    set_learning_rate(optimizer, 0.0)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


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


def set_learning_rate(optimizer: Any, factor: float) -> None:
    """Apply the schedule's factor to every group."""
    for group in optimizer.param_groups:
        rate = group["base_lr"] * factor
        group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate  # torchao's is compiled in
