"""How gradients are taken and weights updated: in one process or under DDP, or by DeepSpeed's engine.

The loop calls one interface. What differs between launches, above all who holds which weights and moments, ends here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from paradiffusion.config import TrainConfig
from paradiffusion.errors import UserError
from paradiffusion.models.joint import JointModel
from paradiffusion.training.masters import Masters, WholeMasters, zero_masters
from paradiffusion.training.optim import Optimizer, build_optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")
# What the launchers export for keys that their configuration does not set.
UNSET = {
    "ACCELERATE_MIXED_PRECISION": ("no",),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "auto", "none"),
    "ACCELERATE_GRADIENT_CLIPPING": ("1.0", "auto", "none"),
}


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
        """Take the optimiser step; the norm where ``clip`` could not tell. One that is not finite changed nothing."""
        ...

    def discard(self) -> None:
        """Forget the accumulated gradients."""
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
                    yield f"{key}/{names[id(parameter)]}", torch.as_tensor(value).detach().cpu()

    def load_optimizer(self, tensors: dict[str, Tensor]) -> None:
        by_name: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            by_name.setdefault(name, {})[kind] = value
        for name, parameter in self.parameters.items():
            # AdamW's own step counter stays on the CPU, except in its fused form.
            self.optimizer.state[parameter] = {
                key: value.to(self._step_device(parameter)) if key == "step" else value.to(parameter.device)
                for key, value in by_name.get(name, {}).items()
            }

    def _step_device(self, parameter: nn.Parameter) -> torch.device:
        groups = self.optimizer.param_groups
        return parameter.device if any(group.get("fused") for group in groups) else torch.device("cpu")


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
        plugin: Any = accelerator.state.deepspeed_plugin
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = config.batch_size // (
            micro_batches * accelerator.num_processes
        )
        plugin.deepspeed_config["gradient_accumulation_steps"] = micro_batches
        accelerator.gradient_accumulation_steps = micro_batches
        plugin.deepspeed_config["gradient_clipping"] = config.optimizer.max_grad_norm
        stage = int(plugin.zero_stage)
        parameters = joint.trained()
        adamw = build_optimizer(parameters, config.optimizer)
        self.model: Any = accelerator.prepare(joint, adamw)[0]
        self.optimizer: Any = self.model.optimizer
        self.masters: Masters = zero_masters(parameters, self.optimizer, stage, accelerator.device)
        self.whole = stage < 3
        self.kind = f"ZeRO-{stage}"

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        self.model.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss)  # divides by the number of micro-batches itself

    def clip(self) -> float | None:
        return None

    def update(self) -> float | None:
        self.model.step()
        norm = self.model.get_global_grad_norm()
        # DeepSpeed leaves a step out, and says infinity or -1, when a gradient is not finite.
        return float("inf") if norm is None or float(norm) < 0 else float(norm)

    def discard(self) -> None:
        pass  # its step has cleared them, and a rollback replaces whatever it did

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


def is_deepspeed() -> bool:
    """Whether the launcher asked for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def deepspeed_plugin(config: TrainConfig) -> Any:
    """Accelerate's plugin from the launcher's settings, with our own keys in the place of its.

    Raises:
        UserError: where DeepSpeed is not installed.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed  # noqa: F401
        from accelerate.utils import DeepSpeedPlugin
    except ImportError:
        raise UserError(
            "the launch configuration asks for DeepSpeed, which is not installed; `pip install deepspeed`, or launch with "
            "configs/launch/ddp.yaml."
        ) from None
    plugin = DeepSpeedPlugin(zero3_init_flag=False)
    settings: dict[str, Any] = plugin.deepspeed_config
    settings.pop("train_batch_size", None)
    # Weights stay in fp32 and are cast where they are used, as under DDP: one meaning of "precision" for every launch.
    settings["torch_autocast"] = {"enabled": config.precision != "fp32", "dtype": "bfloat16"}
    # torch's own fused AdamW runs on processors too; DeepSpeed's would compile C++ at the first start.
    settings["zero_force_ds_cpu_optimizer"] = False
    return plugin


def load_models_whole(plugin: Any) -> None:
    """Keep transformers from cutting every model that it loads under ZeRO-3: the frozen ones stay outside the engine, and
    the engine cuts the joint module itself. Called once the Accelerator has been made."""
    from transformers.integrations import unset_hf_deepspeed_config

    plugin.dschf = None
    unset_hf_deepspeed_config()


def check_launch(config: TrainConfig, micro_batches: int) -> None:
    """One key each for precision, accumulation and clipping: a launcher's other value is refused.

    Raises:
        UserError: naming both keys and both values.
    """
    wanted = {
        "ACCELERATE_MIXED_PRECISION": ("mixed_precision", "precision", {"fp32": "no"}.get(config.precision, config.precision)),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("gradient_accumulation_steps", "batch_size and micro_batch_size", str(micro_batches)),
        "ACCELERATE_GRADIENT_CLIPPING": ("gradient_clipping", "optimizer.max_grad_norm", str(config.optimizer.max_grad_norm)),
    }  # fmt: skip
    for variable, (theirs, ours, value) in wanted.items():
        found = os.environ.get(variable, "").lower()
        if found and found not in UNSET[variable] and found != value:
            raise contradiction(theirs, found, ours, value)
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if is_deepspeed() and path.lower() != "none":
        check_deepspeed_file(Path(path), config, micro_batches)


def check_deepspeed_file(path: Path, config: TrainConfig, micro_batches: int) -> None:
    """The same for a DeepSpeed configuration of the user's own."""
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"the DeepSpeed configuration {path} could not be read ({error}); expected a JSON file."
        ) from None
    wanted: dict[str, tuple[str, Any]] = {
        "train_batch_size": ("batch_size", config.batch_size),
        "gradient_accumulation_steps": ("batch_size and micro_batch_size", micro_batches),
        "gradient_clipping": ("optimizer.max_grad_norm", config.optimizer.max_grad_norm),
        "optimizer": ("optimizer", "its own group"),
        "scheduler": ("optimizer.schedule", config.optimizer.schedule),
    }
    for key, (ours, value) in wanted.items():
        found = settings.get(key, "auto")
        if found not in ("auto", value):
            raise contradiction(key, found, ours, value)
    for key in ("bf16", "fp16"):
        if settings.get(key, {}).get("enabled") is True:
            raise contradiction(f"{key}.enabled", True, "precision", config.precision)


def contradiction(theirs: str, found: Any, ours: str, value: Any) -> UserError:
    """Two sources that disagree."""
    return UserError(
        f"the launch configuration says {theirs}={found}, and {ours} makes it {value}; take {theirs} out of the launch "
        f"configuration, since {ours} alone decides."
    )
