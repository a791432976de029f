"""This process among the others of its launch: accelerator, threads, its share of a batch."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs, KwargsHandler

from paradiffusion.config import TrainConfig
from paradiffusion.errors import UserError
from paradiffusion.machine import cores
from paradiffusion.training.launch import check_launch, deepspeed_plugin, is_deepspeed, load_models_whole


def set_threads(config: TrainConfig, local_processes: int) -> None:
    """Share the cores among this machine's processes. ``accelerate launch`` sets OMP_NUM_THREADS=1 for one process too,
    which would leave all cores but one idle."""
    torch.set_num_threads(config.threads or max(1, cores() // max(local_processes, 1)))


def make_accelerator(config: TrainConfig) -> Accelerator:
    """The launcher's processes and device. The launcher always exports a precision of "no", so ours is passed on.

    Raises:
        UserError: where the launch configuration contradicts ours, or asks for what is not installed.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    check_gpus(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    check_launch(config, count_micro_batches(config, world_size))
    plugin = deepspeed_plugin(config) if is_deepspeed() else None
    # Gradients as views into the buffers that are exchanged: one copy of all of them less.
    handlers: list[KwargsHandler] = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
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
        load_models_whole(plugin)
    set_threads(config, int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes)))
    return accelerator


def check_gpus(local_processes: int) -> None:
    """Raise UserError where this machine has GPUs, but not one for each of its processes."""
    gpus = 0 if os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true") else torch.cuda.device_count()
    if 0 < gpus < local_processes:
        raise UserError(
            f"{local_processes} processes were launched on this machine, which has {gpus} GPU(s), and each needs its own; launch "
            f"with `accelerate launch --num_processes {gpus} ...` (times the number of machines)."
        )


def count_micro_batches(config: TrainConfig, processes: int) -> int:
    """Micro-batches per process and optimiser step; UserError unless all ratios are whole."""
    micro = config.micro_batch_size
    if micro is None and config.batch_size % processes == 0:
        return 1
    if micro is None or config.batch_size % (micro * processes):
        shown = "batch_size / processes" if micro is None else micro
        raise UserError(
            f"batch_size={config.batch_size} is not a whole multiple of micro_batch_size={shown} times {processes} processes; "
            "choose numbers that divide."
        )
    return config.batch_size // (micro * processes)
