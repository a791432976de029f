"""Results of a benchmark on disk: FILE.json and FILE.md, with what they were measured on."""

from __future__ import annotations

import datetime
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil  # which accelerate brings

from paradiffusion.machine import cores

# Where torch's settings stand for it; the second is the older name.
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def machine(device: str = "cpu") -> dict[str, Any]:
    """What it ran on, and with."""
    import torch  # the plan of batches is measured without it

    libraries = {name: version(name) for name in ("torch", "diffusers", "transformers", "accelerate", "peft")}
    facts: dict[str, Any] = {
        "processor": processor(), "cores": cores(), "threads": torch.get_num_threads(), "python": platform.python_version(),
        **libraries,
    }  # fmt: skip
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(0)
        facts["gpu_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
        facts["cuda"] = torch.version.cuda
        facts["allocator"] = next((os.environ[key] for key in ALLOCATOR if key in os.environ), "default")
    return facts


def processor() -> str:
    """The processor's model, as the system names it."""
    try:
        for row in Path("/proc/cpuinfo").read_text().splitlines():
            if row.startswith("model name"):
                return row.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def load() -> float:
    """The load average: how busy other work keeps the machine."""
    return round(psutil.getloadavg()[0], 1)


def today() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")


def facts(machine: dict[str, Any]) -> str:
    """What it ran on, in a line."""
    return ", ".join(f"{key} {value}" for key, value in machine.items())


def write_results(output: str, name: str, document: dict[str, Any], text: str) -> Path:
    """Write ``<output>/<name>.json`` and ``.md``; returns their stem."""
    stem = Path(output) / name
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    stem.with_suffix(".md").write_text(text)
    return stem
