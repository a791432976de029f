"""How gradients are taken and weights updated: in one process or under DDP, or by DeepSpeed's engine.

The loop calls one interface. What differs between launches, above all who holds which weights and moments, ends here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from paradiffusion.config import TrainConfig
from paradiffusion.errors import UserError
from paradiffusion.models.joint import JointModel
from paradiffusion.training.launch import check_zero, is_deepspeed
from paradiffusion.training.masters import Masters, WholeMasters, zero_masters
from paradiffusion.training.optim import Optimizer, build_optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine(Protocol):
    """Attributes:
    model: the prepared wrapper of the joint module; training always calls it.
    masters: the fp32 weights.
    optimizer: has ``param_groups`` whose rates the schedule sets.
    whole: whether every process computes with whole weights, so that processes may draw different images.
    kind: what it is called in the log.
    """

    model: nn.Module
    masters: Masters
    optimizer: Any
    whole: bool
    kind: str

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a micro-batch; only the ``last`` one's gradients are exchanged."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch's mean loss."""
        ...

    def clip(self) -> float | None:
        """Clip the accumulated gradients; their norm before that, or None where only ``update`` tells."""
        ...

    def update(self) -> float | None:
        """Take the optimiser step; the norm where ``clip`` could not tell. After one that is not finite the weights may be
        spoiled, and are to be restored."""
        ...

    def discard(self) -> None:
        """Forget the accumulated gradients. Under ZeRO weights are to be restored after it, where ``update`` was not called."""
        ...

    def optimizer_state(self) -> Iterator[tuple[str, Tensor]]:
        """("exp_avg/NAME", tensor) and the like in the main process; every process must call this."""
        ...

    def load_optimizer(self, tensors: dict[str, Tensor]) -> None:
        """Put back what ``optimizer_state`` gave, on whatever number of processes."""
        ...


class PlainEngine:
    """One process, or DDP."""

    def __init__(self, accelerator: Accelerator, joint: JointModel, config: TrainConfig, micro_batches: int) -> None:
        self.accelerator = accelerator
        self.parameters = joint.trained()
        self.optimizer: Optimizer = build_optimizer(self.parameters, config.optimizer)
        # The launcher may name the same number as we: accelerate would then divide by it a second time.
        accelerator.gradient_accumulation_steps = 1
        if accelerator.num_processes > 1:
            share_from_main(joint)
        self.model: nn.Module = accelerator.prepare(joint)
        self.masters: Masters = WholeMasters(self.parameters, accelerator.is_main_process)
        self.max_norm, self.micro_batches = config.optimizer.max_grad_norm, micro_batches
        self.whole = True
        self.kind = "DDP" if accelerator.num_processes > 1 else "one process"

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss / self.micro_batches)

    def clip(self) -> float | None:
        return float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.max_norm))

    def update(self) -> float | None:
        self.optimizer.step()
        return None

    def discard(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def optimizer_state(self) -> Iterator[tuple[str, Tensor]]:
        if self.accelerator.is_main_process:
            names = {id(parameter): name for name, parameter in self.parameters.items()}
            for parameter, values in self.optimizer.state.items():
                for key, value in values.items():
                    yield f"{key}/{names[id(parameter)]}", torch.as_tensor(value).detach().cpu().contiguous()

    def load_optimizer(self, tensors: dict[str, Tensor]) -> None:
        by_name: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            by_name.setdefault(name, {})[kind] = value
        for name, parameter in self.parameters.items():
            self.optimizer.state[parameter] = {
                key: self._placed(key, value, parameter) for key, value in by_name.get(name, {}).items()
            }

    def _placed(self, key: str, value: Tensor, parameter: nn.Parameter) -> Tensor:
        """A stored value where the optimiser wants it."""
        if key == "step":  # AdamW's own counter stays on the CPU, except in its fused form
            fused = any(group.get("fused") for group in self.optimizer.param_groups)
            return value.to(parameter.device if fused else "cpu")
        if value.shape != parameter.shape:
            return value.to(parameter.device)
        # With the weight's strides, which channels_last changes: a fused step takes nothing else.
        return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def share_from_main(joint: JointModel) -> None:
    """Everything that is not trained, as DDP finds it: it sends trained weights to all processes once, and would send the
    frozen ones too, gigabytes that each has read from the same files, and the buffers in every step."""
    for name, buffer in joint.named_buffers():
        if not name.startswith("text_encoder."):  # the refiner's statistics, which each process has computed
            torch.distributed.broadcast(buffer, src=0)
    frozen = [name for name, parameter in joint.named_parameters() if not parameter.requires_grad]
    left_alone: Any = [*frozen, *(name for name, _ in joint.named_buffers())]
    joint._ddp_params_and_buffers_to_ignore = left_alone


class ZeroEngine:
    """DeepSpeed with ZeRO stage 1, 2 or 3."""

    def __init__(self, accelerator: Accelerator, joint: JointModel, config: TrainConfig, micro_batches: int) -> None:
        if config.optimizer.name != "adamw":
            raise UserError(
                f"optimizer.name={config.optimizer.name} does not work under DeepSpeed, which cuts weights into flat "
                "pieces; use optimizer.name=adamw, or launch without DeepSpeed."
            )
        if config.on_spike == "skip":
            raise UserError("on_spike=skip does not exist under DeepSpeed; use on_spike=stop or on_spike=rollback.")
        if config.channels_last:
            raise UserError(
                "channels_last=true does not work under DeepSpeed, which cuts weights into flat pieces; use "
                "channels_last=false, or launch without DeepSpeed."
            )
        plugin: Any = accelerator.state.deepspeed_plugin
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = config.batch_size // (
            micro_batches * accelerator.num_processes
        )
        plugin.deepspeed_config["gradient_accumulation_steps"] = micro_batches
        accelerator.gradient_accumulation_steps = micro_batches
        plugin.deepspeed_config["gradient_clipping"] = config.optimizer.max_grad_norm
        stage = check_zero(plugin)
        parameters = joint.trained()
        adamw = build_optimizer(parameters, config.optimizer)
        self.model: Any = accelerator.prepare(joint, adamw)[0]
        self.optimizer: Any = self.model.optimizer
        self.masters: Masters = zero_masters(parameters, self.optimizer, stage, accelerator.device)
        self.whole = stage < 3
        self.kind = f"ZeRO-{stage}"
        self._pending = False  # gradients that no step has taken

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        self.model.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss)  # divides by the number of micro-batches itself
        self._pending = True

    def clip(self) -> float | None:
        return None

    def update(self) -> float | None:
        self.model.step()
        self._pending = False
        norm = self.model.get_global_grad_norm()
        # DeepSpeed leaves a step out, and says infinity or -1, when a gradient is not finite.
        return float("inf") if norm is None or float(norm) < 0 else float(norm)

    def discard(self) -> None:
        if self._pending:  # only its step clears them, which lie in several buffers, one of them per kind of offloading
            self.update()

    def _inner(self) -> Any:
        return self.optimizer.optimizer

    def optimizer_state(self) -> Iterator[tuple[str, Tensor]]:
        state = self._inner().state
        flat = [state.get(tensor, {}) for tensor in self.masters.flat]  # type: ignore[attr-defined]
        stepped = any(values for values in flat)
        for key in MOMENTS if stepped else ():
            empty = [torch.zeros_like(tensor) for tensor in self.masters.tensors()]
            values = [have.get(key, none) for have, none in zip(flat, empty, strict=True)]
            for name, tensor in self.masters.full(values):
                yield f"{key}/{name}", tensor
        if stepped:
            steps = max(float(have["step"]) for have in flat if have)
            for name in self.masters.names:
                yield f"step/{name}", torch.tensor(steps)

    def load_optimizer(self, tensors: dict[str, Tensor]) -> None:
        if not tensors:
            return
        step = next(value for key, value in tensors.items() if key.startswith("step/"))
        fused = any(group.get("fused") for group in self._inner().param_groups)
        flat = self.masters.flat  # type: ignore[attr-defined]
        states = [{key: torch.zeros_like(tensor) for key in MOMENTS} for tensor in flat]
        for key in MOMENTS:
            stored = {name: tensors[f"{key}/{name}"] for name in self.masters.names}
            self.masters.fill([state[key] for state in states], stored.__getitem__)
        for tensor, state in zip(flat, states, strict=True):
            counter = step.clone().to(tensor.device if fused else "cpu")
            self._inner().state[tensor] = {"step": counter, **state}


def make_engine(accelerator: Accelerator, joint: JointModel, config: TrainConfig, micro_batches: int) -> Engine:
    """The engine for how this run was launched. ``joint`` is on its device, with the weights it starts from."""
    kind = ZeroEngine if is_deepspeed() else PlainEngine
    return kind(accelerator, joint, config, micro_batches)
