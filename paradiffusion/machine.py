"""Processor cores, devices and precision of this process."""

from __future__ import annotations

import multiprocessing
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from paradiffusion.errors import UserError

if TYPE_CHECKING:  # for who only composes a configuration, torch is slow to import
    import torch


def cores() -> int:
    """The processor cores that this process may run on; all of them where the system does not say (macOS)."""
    return max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def own_cores() -> int:
    """Of ``cores`` this process's share, beside those that a launcher started on the same machine. A task of Slurm's is bound to
    its own already, where the cluster binds any."""
    job, world = os.environ, os.environ.get("WORLD_SIZE", "1")
    if job.get("SLURM_NTASKS") == world and cores() < int(job.get("SLURM_CPUS_ON_NODE", "0")):
        return cores()
    return max(1, cores() // max(1, int(job.get("LOCAL_WORLD_SIZE", world))))


def start_method() -> str:
    """How processes of our pools begin: "fork" on Linux, where nothing need then be imported again or pickled; "spawn" where there is no
    fork, where it is not safe (macOS), and where a program has set it (multiprocessing.set_start_method)."""
    spawns = sys.platform != "linux" or multiprocessing.get_start_method(allow_none=True) == "spawn"
    return "spawn" if spawns else "fork"


def choose_device(name: str | None = None) -> torch.device:
    """The device that ``name`` says, None for CUDA where there is one, else the CPU. "cuda" alone is this process's own GPU where a
    launcher started several. It becomes torch's current one, on which libraries put what nobody has placed (weights of 4 bits,
    contexts). UserError where it is not to be had."""
    import torch

    mps = int(torch.backends.mps.is_available())
    found = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": mps, "xpu": torch.xpu.device_count()}
    target = torch.device("meta")
    with suppress(RuntimeError):  # torch does not know the name
        target = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    local = os.environ.get("LOCAL_RANK", os.environ.get("RANK"))
    if target.type == "cuda" and target.index is None and local is not None and found["cuda"]:
        target = torch.device("cuda", int(local) % found["cuda"])
    if target.type not in found:
        raise UserError(f"device={name} is unknown; choose one of {', '.join(found)}, or cuda:0 and the like.")
    if (target.index or 0) >= found[target.type]:
        has = f"{found[target.type] or 'no'} {target.type.upper()} device(s)"
        raise UserError(f"device={name} is not to be had here, where torch finds {has}; choose another, or device=cpu.")
    if target.type == "cuda" and target.index is not None:
        torch.cuda.set_device(target)
    return target


def settled_dtype(dtype: str, device: torch.device) -> str:
    """ "bfloat16" or "float32" for "auto": bfloat16 on a GPU."""
    return ("bfloat16" if device.type == "cuda" else "float32") if dtype == "auto" else dtype


def exact_float32() -> None:
    """Let float32 be float32: in convolutions GPUs would round to TF32's 10 bits by default."""
    import torch

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def deterministic() -> None:
    """Let GPUs compute the same bits each time, slower; before the first of them is used."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_cudnn_sdp(False)  # its gradients are summed in any order


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor`` on ``device``; on its way to a GPU through pinned memory, so that the host does not wait for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def to_host(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors on the CPU, contiguous: a processor's own, a GPU's as copies in pinned memory, which are whole when this returns."""
    import torch

    found, waits = {}, False
    for name, tensor in tensors.items():
        if tensor.device.type == "cuda":
            pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            found[name], waits = pinned.copy_(tensor.detach(), non_blocking=True), True
        else:
            found[name] = tensor.detach().cpu().contiguous()
    if waits:
        torch.cuda.synchronize()
    return found


def settled_precision(precision: str) -> str:
    """ "bf16" or "fp32" for "auto": bf16 where this machine multiplies it faster than fp32.

    On processors that is AMX, and AVX512-BF16 of AMD: Intel's without AMX (as some virtual machines show it) takes twice as long
    as fp32, and elsewhere it is emulated, a hundred times slower.
    """
    if precision != "auto":
        return precision
    import torch

    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    path = Path("/proc/cpuinfo")
    flags = path.read_text().split() if path.is_file() else []
    return "bf16" if "amx_bf16" in flags or {"avx512_bf16", "AuthenticAMD"} <= set(flags) else "fp32"
