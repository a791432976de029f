"""What the launcher asks for: DeepSpeed or not, and that it contradicts none of our keys."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from paradiffusion.config import TrainConfig
from paradiffusion.errors import UserError

# What the launchers export for keys that their configuration does not set.
UNSET = {
    "ACCELERATE_MIXED_PRECISION": ("no",),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "auto", "none"),
    "ACCELERATE_GRADIENT_CLIPPING": ("1.0", "auto", "none"),
}


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
    settings["torch_autocast"] = {
        "enabled": config.precision != "fp32",
        "dtype": "bfloat16",
        "lower_precision_safe_modules": [],
    }
    # torch's own fused AdamW runs on processors too; DeepSpeed's would compile C++ at the first start.
    settings["zero_force_ds_cpu_optimizer"] = False
    return plugin


def check_zero(plugin: Any) -> int:
    """The stage of ZeRO that the launch configuration asks for.

    Raises:
        UserError: for one that checkpoints could not be read from.
    """
    stage, settings = int(plugin.zero_stage), plugin.deepspeed_config.get("zero_optimization", {})
    if stage not in (1, 2, 3):
        raise UserError(
            f"the launch configuration says zero_stage={stage}; expected 1, 2 or 3: launch with configs/launch/ddp.yaml instead."
        )
    for part in ("offload_optimizer", "offload_param"):
        device = (settings.get(part) or {}).get("device", "none")
        if device == "nvme":
            raise UserError(
                f"the launch configuration says {part} to nvme, where checkpoints do not find the weights; expected none or cpu, "
                "as in configs/launch/zero2_offload.yaml."
            )
    return stage


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
    for kind in ("FSDP", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true":
            raise UserError(
                f"the launch configuration asks for {kind}, which is not supported; use one of configs/launch/: ddp, zero2 or zero3."
            )
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
