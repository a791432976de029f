"""The machine: processor cores and the device that are this process's own, the precision that it multiplies fastest in, the way to a GPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def cores() -> int:
    """The processor cores that this process may run on; all of them where the system does not say (macOS)."""
    return max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor`` on ``device``; on its way to a GPU through pinned memory, so that the host does not wait for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def settled_precision(precision: str) -> str:
    """ "bf16" or "fp32" for "auto": bf16 where this machine multiplies it faster than fp32.

    On processors that is AMX, and AVX512-BF16 of AMD: Intel's without AMX (as some virtual machines show it) takes twice as long
    as fp32, and elsewhere it is emulated, a hundred times slower.
    """
    if precision != "auto":
        return precision
    import torch  # here, for who only composes a configuration

    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    path = Path("/proc/cpuinfo")
    flags = path.read_text().split() if path.is_file() else []
    return "bf16" if "amx_bf16" in flags or {"avx512_bf16", "AuthenticAMD"} <= set(flags) else "fp32"
