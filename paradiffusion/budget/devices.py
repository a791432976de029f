"""What accelerators can do at most, from their vendors' data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass

from paradiffusion.errors import UserError


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
        title: as the data sheet calls it.
        match: lower-case words of which all are in the name that its driver gives.
        bf16: dense bfloat16 TFLOP/s with fp32 accumulation, without sparsity and at the stated boost clock.
        fp32: TFLOP/s outside the tensor cores.
        gib: memory in GiB.
        half: the 16-bit format that ``bf16`` is for: chips before 2020 have float16 only.
    """

    title: str
    match: tuple[str, ...]
    bf16: float
    fp32: float
    gib: float
    half: str = "bfloat16"


# NVIDIA's and AMD's data sheets; where those give figures with sparsity, half of them.
DEVICES = {
    "b200": Device("NVIDIA B200 (HGX)", ("b200",), 2250, 75, 180),
    "h200": Device("NVIDIA H200 SXM", ("h200",), 989.4, 66.9, 141),
    "h100_pcie": Device("NVIDIA H100 PCIe", ("h100", "pcie"), 756.4, 51.2, 80),
    "h100": Device("NVIDIA H100 SXM", ("h100",), 989.4, 66.9, 80),
    "a100": Device("NVIDIA A100 80GB SXM", ("a100",), 312, 19.5, 80),
    "a100_40gb": Device("NVIDIA A100 40GB", ("a100", "40gb"), 312, 19.5, 40),
    "l40s": Device("NVIDIA L40S", ("l40s",), 362.1, 91.6, 48),
    "l4": Device("NVIDIA L4", ("l4",), 121, 30.3, 24),
    "a10": Device("NVIDIA A10", ("a10",), 125, 31.2, 24),
    "rtx6000ada": Device("NVIDIA RTX 6000 Ada", ("6000 ada",), 364.2, 91.1, 48),
    "a6000": Device("NVIDIA RTX A6000", ("a6000",), 154.8, 38.7, 48),
    "rtx5090": Device("NVIDIA GeForce RTX 5090", ("5090",), 209.5, 104.8, 32),
    "rtx4090": Device("NVIDIA GeForce RTX 4090", ("4090",), 165.2, 82.6, 24),
    "rtx3090": Device("NVIDIA GeForce RTX 3090", ("3090",), 71, 35.6, 24),
    "v100": Device("NVIDIA V100 SXM2", ("v100",), 125, 15.7, 32, "float16"),
    "t4": Device("NVIDIA T4", ("t4",), 65, 8.1, 16, "float16"),
    "mi300x": Device("AMD Instinct MI300X", ("mi300x",), 1307.4, 163.4, 192),
}


def device_named(name: str) -> Device:
    """The device that a person names; UserError for one that is not in the table."""
    if name not in DEVICES:
        raise UserError(f"device={name} is unknown; choose one of {', '.join(DEVICES)}.")
    return DEVICES[name]


def recognise(driver_name: str) -> Device | None:
    """The device of a driver's name such as "NVIDIA H100 80GB HBM3"; None where its peak is not known here."""
    words = set(re.split(r"[^a-z0-9]+", driver_name.lower()))
    found = [d for d in DEVICES.values() if words.issuperset(" ".join(d.match).split())]
    return max(found, key=lambda device: len(" ".join(device.match)), default=None)


def peak_tflops(device: Device, precision: str) -> float:
    """TFLOP/s of matrix products in training at ``precision`` (a run's "bf16" or "fp32")."""
    return device.fp32 if precision == "fp32" else device.bf16
