"""The training engine: a step's gradients and its update, in one process, under DDP, or by DeepSpeed's, as was launched.

The trainer calls one interface. What differs between launches, above all who holds which weights and moments, ends here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs, KwargsHandler
from torch import Tensor, nn

from paradiffusion.config import TrainConfig
from paradiffusion.errors import UserError
from paradiffusion.machine import deterministic, exact_float32, own_cores, to_host
from paradiffusion.models.joint import JointModel
from paradiffusion.training.optim import build_optimizer, counters, make_state, plain_tensors

Values = Sequence[Tensor]
MOMENTS = ("exp_avg", "exp_avg_sq")
BATCHES = "batch_size and micro_batch_size"


class WholeMasters:
    """The fp32 weights that are trained, as this process holds them: in one process and under DDP all of each.

    The average, checkpoints and validation work on these, so they need not know how a run was launched. A value of the
    weights' kind (the average, a moment of the optimiser) is a list of tensors of the same shapes as ``tensors()``.

    Args:
        parameters: by name, in a fixed order; ``main``: whether this process is given whole values.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], main: bool) -> None:
        self.parameters, self.main = parameters, main
        self.names = list(parameters)

    def tensors(self) -> list[Tensor]:
        """This process's fp32 weights, live."""
        return [parameter.data for parameter in self.parameters.values()]

    def full(self, values: Values) -> dict[str, Tensor]:
        """Each parameter's whole value, fp32 on the CPU, by name in the main process; nothing in the others, which must call this too."""
        pairs = zip(self.names, values, strict=True)
        return to_host({name: value.float() for name, value in pairs}) if self.main else {}

    def fill(self, values: Values, read: Callable[[str], Tensor]) -> None:
        """Set ``values`` from whole tensors by name."""
        for name, value in zip(self.names, values, strict=True):
            value.copy_(read(name))

    @torch.no_grad()
    def exchange(self, values: Values) -> None:
        """Weights against ``values``, one tensor at a time: a second copy of all of them might not fit."""
        for tensor, value in zip(self.tensors(), values, strict=True):
            kept = tensor.clone()
            tensor.copy_(value)
            value.copy_(kept)

    def refresh(self) -> None:
        """Bring the weights that the model computes with up to date, after ``tensors()`` were changed."""


class ZeroMasters(WholeMasters):
    """The same under ZeRO, where each process holds flat tensors with pieces of the weights. DeepSpeed's public calls gather
    and set whole weights: other values of their kind change places with the weights meanwhile."""

    def __init__(self, parameters: dict[str, nn.Parameter], optimizer: Any, stage: int) -> None:
        super().__init__(parameters, dist.get_rank() == 0)
        self.optimizer, self.stage = optimizer, stage
        # Live pieces have a public call under ZeRO-3 alone, and there it copies offloaded ones. These are what the torch
        # optimiser, which is ours, updates; under ZeRO-3 it has them only within a step.
        groups = optimizer.optimizer.param_groups
        self.flat: list[Tensor] = list(optimizer.fp32_partitioned_groups_flat) if stage == 3 else [t for g in groups for t in g["params"]]

    def tensors(self) -> list[Tensor]:
        return [tensor.data for tensor in self.flat]

    @contextmanager
    def _in_place(self, values: Values) -> Iterator[None]:
        """Within the block ``values`` are where the weights are."""
        if [value.data_ptr() for value in values] == [tensor.data_ptr() for tensor in self.flat]:
            yield
            return
        self.exchange(values)
        try:
            yield
        finally:
            self.exchange(values)

    def full(self, values: Values) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        found: dict[str, Tensor] = {}
        with self._in_place(values):
            for name, parameter in self.parameters.items():
                whole = safe_get_full_fp32_param(parameter)
                if self.main:
                    found |= to_host({name: whole})
        return found

    def fill(self, values: Values, read: Callable[[str], Tensor]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        with self._in_place(values):
            for name, parameter in self.parameters.items():
                whole = read(name).to(parameter.device, torch.float32)
                if self.stage < 3:
                    safe_set_full_fp32_param(parameter, whole)
                    continue
                # The last piece is filled up, which the call for whole tensors forgets.
                size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
                piece = whole.reshape(-1)[dist.get_rank() * size :][:size]
                safe_set_local_fp32_param(parameter, nn.functional.pad(piece, (0, size - len(piece))))

    @torch.no_grad()
    def refresh(self) -> None:
        if self.stage < 3:
            self.optimizer.update_lp_params()
            return
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        for parameter in self.parameters.values():
            whole = safe_get_full_fp32_param(parameter)
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(whole)


class Engine:
    """One process, or DDP; ``ZeroEngine`` is the other way.

    Args:
        joint: with the weights that it starts from, on its device, but where the engine ``cuts_weights``.
    Attributes:
        model: the prepared wrapper of the joint module; training always calls it.
        whole: whether every process computes with whole weights, so that processes may draw different images.
        kind: what it is called in the log.
    """

    model: nn.Module
    masters: WholeMasters
    optimizer: Any
    whole = True

    def __init__(self, accelerator: Accelerator, joint: JointModel, config: TrainConfig, micro_batches: int) -> None:
        self.accelerator = accelerator
        self.parameters = joint.trained()
        self.optimizer = build_optimizer(self.parameters, config.optimizer)
        # The launcher may name the same number as we: accelerate would then divide by it a second time.
        accelerator.gradient_accumulation_steps = 1
        # DDP would send the frozen weights to all processes too, gigabytes that each has read from the same files, and the buffers in
        # every step.
        frozen = [name for name, parameter in joint.named_parameters() if not parameter.requires_grad]
        left_alone: Any = [*frozen, *(name for name, _ in joint.named_buffers())]
        joint._ddp_params_and_buffers_to_ignore = left_alone
        self.model = accelerator.prepare(joint)
        self.masters = WholeMasters(self.parameters, accelerator.is_main_process)
        self.max_norm, self.micro_batches = config.optimizer.max_grad_norm, micro_batches
        self.kind = "DDP" if accelerator.num_processes > 1 else "one process"

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a micro-batch; only the ``last`` one's gradients are exchanged.

        Under DDP the first of all too: gradients lie in its buckets from an exchange on, and are held a second time before. (It costs
        a rounding after a resume, so not where runs are the same to the bit.)"""
        exact = self.accelerator.device.type != "cuda" or torch.are_deterministic_algorithms_enabled()
        first = not exact and all(parameter.grad is None for parameter in self.parameters.values())
        return nullcontext() if last or first else self.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch's mean loss."""
        self.accelerator.backward(loss / self.micro_batches)

    def clip(self) -> Tensor | None:
        """Clip the accumulated gradients; their norm before that, a scalar, or None where only ``update`` tells."""
        return torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.max_norm)

    def update(self, left_out: Tensor) -> float | None:
        """Take the optimiser step, unless the bool scalar ``left_out`` holds; the gradients' norm where ``clip`` could not tell it.

        torch's fused AdamW looks at the scalar on the device, as it does for a loss scaler's overflow, so nobody waits for it.
        """
        if isinstance(self.optimizer, torch.optim.AdamW) and self.optimizer.defaults["fused"]:
            self.optimizer.found_inf = left_out.float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not left_out:
            self.optimizer.step()
        return None

    def discard(self) -> None:
        """Forget the accumulated gradients. DDP's stay where they are, in its buckets: others would be held beside these."""
        self.optimizer.zero_grad(set_to_none=self.accelerator.num_processes == 1)

    def optimizer_state(self) -> Iterator[tuple[str, Tensor]]:
        """("exp_avg/NAME", tensor) and the like in the main process; every process must call this."""
        if self.accelerator.is_main_process:
            names = {id(parameter): name for name, parameter in self.parameters.items()}
            for parameter, values in self.optimizer.state.items():
                name, plain = names[id(parameter)], [plain_tensors(key, value) for key, value in values.items()]
                yield from to_host({f"{key}/{name}": t for tensors in plain for key, t in tensors.items()}).items()
            for label, group, key, first in counters(self.optimizer):
                if group[key] != first:
                    yield label, torch.tensor(group[key], dtype=torch.float64)

    def load_optimizer(self, tensors: dict[str, Tensor]) -> None:
        """Put back what ``optimizer_state`` gave, on whatever number of processes."""
        by_name: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            by_name.setdefault(name, {})[kind] = value
        state = self.optimizer.state
        if not state and any("." in key.partition("/")[0] for key in tensors):
            make_state(self.optimizer)
        for name, parameter in self.parameters.items():
            made, found = state.get(parameter, {}), {}
            for key, value in by_name.get(name, {}).items():
                kind, _, part = key.partition(".")
                if part:
                    found[kind] = made[kind]
                    getattr(made[kind], part).copy_(value)
                else:
                    found[kind] = placed(key, value, parameter, self.optimizer)
            state[parameter] = found
        for label, group, key, first in counters(self.optimizer):
            group[key] = type(first)(tensors[label].item()) if label in tensors else first


def placed(key: str, value: Tensor, parameter: Tensor, optimizer: Any) -> Any:
    """A stored value of an optimiser's state where that wants it."""
    if key == "step" and not type(optimizer).__module__.startswith(("torch", "paradiffusion")):
        return int(value)  # bitsandbytes and Prodigy count in numbers
    if key == "step":  # AdamW's own counter stays on the CPU, except in its fused form
        fused = any(group.get("fused") for group in optimizer.param_groups)
        return value.clone().to(parameter.device if fused else "cpu")
    if value.shape != parameter.shape:
        return value.to(parameter.device)
    # With the weight's strides, which channels_last changes: a fused step takes nothing else.
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def share(tensors: Iterable[Tensor]) -> None:
    """The main process's values of ``tensors``, in all processes."""
    for tensor in tensors if dist.is_initialized() else ():
        dist.broadcast(tensor, src=0)


def bring(joint: nn.Module, device: torch.device) -> None:
    """Bring the joint module to ``device``. All of it but the language model, which each process has read, becomes the main process's: in
    the others it may be on the meta device."""
    joint._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    values = {**dict(joint.named_parameters()), **dict(joint.named_buffers())}
    share(value.data for name, value in values.items() if not name.startswith("text_encoder."))


def cut(joint: nn.Module, device: torch.device, settings: dict[str, Any]) -> None:
    """Cut a module's weights over the processes (ZeRO-3), so that ``device`` holds this one's pieces and one whole tensor at a time.
    Values are the main process's; in the others the module may be on the meta device."""
    import deepspeed

    first: Any = None
    whole: dict[nn.Parameter, nn.Parameter] = {}  # of those on the meta device, which other modules may share
    for module in joint.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta and parameter not in whole:
                made = torch.empty_like(parameter, device=device)
                whole[parameter] = nn.Parameter(made, requires_grad=parameter.requires_grad)
            mine: Any = whole.get(parameter, parameter)
            module.register_parameter(name, mine)
            if first is None:
                first = mine
                deepspeed.zero.Init(module=nn.ParameterList([mine]), config_dict_or_path=settings)
            else:
                first.convert_to_zero_parameters(param_list=[mine])
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
    share(joint.buffers())


def cuts_weights(accelerator: Accelerator) -> bool:
    """Whether the engine will ``cut`` the joint module's weights."""
    plugin: Any = accelerator.state.deepspeed_plugin
    return plugin is not None and plugin.zero_stage == 3


class ZeroEngine(Engine):
    """DeepSpeed with ZeRO stage 1, 2 or 3; under 3 ``joint`` is where it was built."""

    def __init__(self, accelerator: Accelerator, joint: JointModel, config: TrainConfig, micro_batches: int) -> None:
        plugin: Any = accelerator.state.deepspeed_plugin
        plugin.deepspeed_config.update({
            "train_micro_batch_size_per_gpu": config.batch_size // (micro_batches * accelerator.num_processes),
            "gradient_accumulation_steps": micro_batches,
            "gradient_clipping": config.optimizer.max_grad_norm,
        })  # fmt: skip
        accelerator.gradient_accumulation_steps = micro_batches
        if (stage := int(plugin.zero_stage)) not in (1, 2, 3):
            raise UserError(
                f"the launch configuration says zero_stage={stage}; expected 1, 2 or 3, or launch with configs/launch/ddp.yaml."
            )
        zero = plugin.deepspeed_config.get("zero_optimization", {})
        if any((zero.get(part) or {}).get("device") == "nvme" for part in ("offload_optimizer", "offload_param")):
            raise UserError(
                "the launch configuration offloads to nvme, where checkpoints do not find the weights; expected none or cpu, as in "
                "configs/launch/zero2_offload.yaml."
            )
        if stage == 3:  # before DeepSpeed, which would bring the whole module to the device first
            cut(joint, accelerator.device, plugin.deepspeed_config)
        parameters = joint.trained()
        adamw = build_optimizer(parameters, config.optimizer)
        self.model: Any = accelerator.prepare(joint, adamw)[0]
        self.optimizer: Any = self.model.optimizer
        self.masters: ZeroMasters = ZeroMasters(parameters, self.optimizer, stage)
        self.whole = stage < 3
        self.kind = f"ZeRO-{stage}"
        self._pending = False  # gradients that no step has taken

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        self.model.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss)  # divides by the number of micro-batches itself
        self._pending = True

    def clip(self) -> Tensor | None:
        return None

    def update(self, left_out: Tensor) -> float | None:
        if left_out:
            return None
        self.model.step()
        self._pending = False
        norm = self.model.get_global_grad_norm()
        # DeepSpeed leaves a step out, and says infinity or -1, when a gradient is not finite.
        return float("inf") if norm is None or float(norm) < 0 else float(norm)

    def discard(self) -> None:
        if not self._pending:
            return
        # Gradients lie in several buffers, and only DeepSpeed's step clears them all: one that updates nothing.
        adamw = self.optimizer.optimizer
        step, adamw.step = adamw.step, lambda *_: None
        try:
            self.model.step()
        finally:
            adamw.step = step
        self._pending = False

    def optimizer_state(self) -> Iterator[tuple[str, Tensor]]:
        masters = self.masters
        states = [self.optimizer.optimizer.state.get(tensor, {}) for tensor in masters.flat]
        steps = [float(values["step"]) for values in states if values]
        if not steps:
            return
        for key in MOMENTS:
            values = [state.get(key, torch.zeros_like(t)) for state, t in zip(states, masters.tensors(), strict=True)]
            for name, tensor in masters.full(values).items():
                yield f"{key}/{name}", tensor
        for name in masters.names:
            yield f"step/{name}", torch.tensor(max(steps))

    def load_optimizer(self, tensors: dict[str, Tensor]) -> None:
        if not tensors:
            return
        adamw, masters = self.optimizer.optimizer, self.masters
        step = next(value for key, value in tensors.items() if key.startswith("step/"))
        moments = {key: [torch.zeros_like(tensor) for tensor in masters.tensors()] for key in MOMENTS}
        for key, values in moments.items():
            masters.fill(values, lambda name, key=key: tensors[f"{key}/{name}"])  # type: ignore[misc]
        for number, tensor in enumerate(masters.flat):
            counter = placed("step", step, tensor, adamw)
            adamw.state[tensor] = {"step": counter, **{key: values[number] for key, values in moments.items()}}


def layout_steps(config: TrainConfig) -> int:
    """The first steps of the stage that train the text path alone (objective.layout_share)."""
    return int(config.objective.layout_share * config.max_steps)


def make_accelerator(config: TrainConfig) -> Accelerator:
    """The launcher's processes and device. The launcher always exports a precision of "no", so ours is passed on. Raises
    UserError where the launch configuration contradicts ours, or asks for what is not installed."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    check_gpus(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    check_launch(config, count_micro_batches(config, world_size))
    plugin = deepspeed_plugin(config) if is_deepspeed() else None
    torch.backends.cudnn.benchmark = True  # tries the ways of each convolution once: buckets give few shapes
    if config.deterministic:
        deterministic()
    if config.precision == "fp32":
        exact_float32()
    # Gradients as views into the buffers that are exchanged: one copy of all of them less.
    # Of a compiled model the graph is cut at each buffer's end, 200 times at the paper's size with buffers of torch's 25 MB.
    handlers: list[KwargsHandler] = [
        DistributedDataParallelKwargs(
            gradient_as_bucket_view=True, find_unused_parameters=layout_steps(config) > 0, bucket_cap_mb=512 if config.compile else 25
        )
    ]
    if world_size > 1 or plugin is not None:
        # The watch, which names who is late, must come before the bare time-out of a collective operation.
        timeout = timedelta(seconds=2 * config.stall_seconds + 600)
        backend = None if torch.cuda.is_available() else "gloo"
        handlers.append(InitProcessGroupKwargs(backend=backend, timeout=timeout))
    accelerator = Accelerator(
        # Without a GPU accelerate joins processes only where it is told so, and would let each train by itself.
        cpu=world_size > 1 and plugin is None and not torch.accelerator.is_available(),
        # Under DeepSpeed its engine casts; accelerate's own casting would come on top.
        mixed_precision="no" if config.precision == "fp32" or plugin is not None else config.precision,
        deepspeed_plugin=plugin,
        kwargs_handlers=handlers,
    )
    if world_size > 1 and accelerator.distributed_type == DistributedType.NO:
        raise UserError(
            f"{world_size} processes were launched, and accelerate cannot join them on {accelerator.device.type}: each would "
            "train a model of its own; launch one process, or set ACCELERATE_USE_CPU=1 to train on processors."
        )
    if plugin is not None:
        from transformers.integrations import unset_hf_deepspeed_config

        # Or transformers would cut every model that it loads under ZeRO-3: the frozen ones stay outside the engine, and ``cut``
        # takes the joint module when it is whole, with its start's weights and adapters.
        plugin.dschf = None
        unset_hf_deepspeed_config()
    # ``accelerate launch`` sets OMP_NUM_THREADS=1 for one process too, which would leave all cores but one idle.
    torch.set_num_threads(config.threads or own_cores())
    return accelerator


def check_gpus(local_processes: int) -> None:
    """Raise UserError where this machine has GPUs, but not one for each of its processes."""
    gpus = 0 if os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true") else torch.cuda.device_count()
    if 0 < gpus < local_processes:
        raise UserError(
            f"{local_processes} processes were launched on this machine, which has {gpus} GPU(s), and each needs its own; launch "
            f"with `accelerate launch --num_processes {gpus} ...` (times the number of machines)."
        )


def at_once(config: TrainConfig, processes: int) -> int:
    """Samples of a micro-batch: as many as micro_batch_size allows of which a process's share of the batch is a whole multiple."""
    share = max(1, config.batch_size // processes)
    most = min(config.micro_batch_size or share, share)
    return next(size for size in range(most, 0, -1) if share % size == 0)


def count_micro_batches(config: TrainConfig, processes: int) -> int:
    """Micro-batches per process and optimiser step; UserError where processes cannot share the batch evenly."""
    if config.batch_size % processes:
        raise UserError(f"batch_size={config.batch_size} is not a whole multiple of {processes} processes; choose one that is.")
    return config.batch_size // (at_once(config, processes) * processes)


def is_deepspeed() -> bool:
    """Whether the launcher asked for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def deepspeed_plugin(config: TrainConfig) -> Any:
    """Accelerate's plugin from the launcher's settings, with our own keys in the place of its. UserError without DeepSpeed."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
        from accelerate.utils import DeepSpeedPlugin
    except ImportError:
        raise UserError(
            "the launch configuration asks for DeepSpeed, which is not installed; `pip install deepspeed`, or launch with "
            "configs/launch/ddp.yaml."
        ) from None
    if not torch.cuda.is_available():
        # It would compile C++ for a minute at the first start, for sums in shared memory; torch's own do.
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})
    plugin = DeepSpeedPlugin(zero3_init_flag=False)
    settings: dict[str, Any] = plugin.deepspeed_config
    settings.pop("train_batch_size", None)
    # Weights stay in fp32 and are cast where they are used, as under DDP: one meaning of "precision" for every launch.
    # By default the gradients of linear and convolution layers would be summed over the processes in bf16.
    settings["torch_autocast"] = {"enabled": config.precision != "fp32", "dtype": "bfloat16", "lower_precision_safe_modules": []}
    # torch's own fused AdamW runs on processors too; DeepSpeed's would compile C++ at the first start.
    settings["zero_force_ds_cpu_optimizer"] = False
    return plugin


def deepspeed_needs(config: TrainConfig) -> str | None:
    """The override without which a stage cannot be launched under DeepSpeed, or None. It cuts weights into flat pieces, packed ones
    of 4 bits as if they were numbers, and its optimiser would decay those of a denoiser that has no gradient yet."""
    needs = {
        "objective.layout_share=0": config.objective.layout_share == 0,
        "optimizer.name=adamw": config.optimizer.name == "adamw",
        "lora.kind=lora": config.train_text != "lora" or config.lora.kind == "lora",
        "unet.lora_kind=lora": config.unet.lora_kind == "lora",
        "channels_last=false": not config.channels_last,
        "text_encoder.quantization=null": config.text_encoder.quantization is None,
    }
    return next((override for override, is_so in needs.items() if not is_so), None)


def check_launch(config: TrainConfig, micro_batches: int) -> None:
    """One key each for precision, accumulation and clipping: a launcher's other value is refused, as is what does not work there."""
    for kind in ("FSDP", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true":
            raise UserError(
                f"the launch configuration asks for {kind}, which is not supported; use one of configs/launch/: ddp, zero2 or zero3."
            )
    if is_deepspeed() and (override := deepspeed_needs(config)) is not None:
        key, _, works = override.partition("=")
        raise UserError(f"{key} does not go with DeepSpeed; set {works}, or launch with configs/launch/ddp.yaml.")
    precision = "no" if config.precision == "fp32" else config.precision
    norm = config.optimizer.max_grad_norm
    # With what launchers export for a key that their configuration does not set.
    for variable, unset, theirs, ours, value in (
        ("MIXED_PRECISION", ("no",), "mixed_precision", "precision", precision),
        ("GRADIENT_ACCUMULATION_STEPS", ("1", "auto", "none"), "gradient_accumulation_steps", BATCHES, str(micro_batches)),
        ("GRADIENT_CLIPPING", ("1.0", "auto", "none"), "gradient_clipping", "optimizer.max_grad_norm", str(norm)),
    ):  # fmt: skip
        found = os.environ.get(f"ACCELERATE_{variable}", "").lower()
        refuse_unless(found in ("", value, *unset), theirs, found, ours, value)
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if is_deepspeed() and path.lower() != "none":
        check_deepspeed_file(Path(path), config, micro_batches)


def check_deepspeed_file(path: Path, config: TrainConfig, micro_batches: int) -> None:
    """The same for a DeepSpeed configuration of the user's own."""
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"the DeepSpeed configuration {path} could not be read ({error}); expected a JSON file.") from None
    for theirs, ours, value in (
        ("train_batch_size", "batch_size", config.batch_size),
        ("gradient_accumulation_steps", BATCHES, micro_batches),
        ("gradient_clipping", "optimizer.max_grad_norm", config.optimizer.max_grad_norm),
        ("optimizer", "optimizer", "its own group"),
        ("scheduler", "optimizer.schedule", config.optimizer.schedule),
    ):
        found = settings.get(theirs, "auto")
        refuse_unless(found in ("auto", value), theirs, found, ours, value)
    for kind in ("bf16", "fp16"):
        enabled = settings.get(kind, {}).get("enabled")
        refuse_unless(enabled is not True, f"{kind}.enabled", enabled, "precision", config.precision)


def refuse_unless(agrees: bool, theirs: str, found: Any, ours: str, value: Any) -> None:
    """Raise UserError where the launch configuration's key and ours do not agree."""
    if not agrees:
        raise UserError(
            f"the launch configuration says {theirs}={found}, and {ours} makes it {value}; take {theirs} out of it (of accelerate's own "
            f"default_config.yaml, where no --config_file is named), since {ours} alone decides."
        )
