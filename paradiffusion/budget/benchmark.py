"""Measure what was asked for, and write it down as JSON and as a Markdown table."""

from __future__ import annotations

import datetime
import json
import platform
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from paradiffusion.budget.bench_models import Bench, Row
from paradiffusion.budget.bench_sampling import measure_sampler, measure_text
from paradiffusion.budget.bench_step import measure_steps
from paradiffusion.budget.benchmark_settings import BenchmarkSettings
from paradiffusion.config import TrainConfig
from paradiffusion.machine import cores
from paradiffusion.pages import markdown_table

MEASURES = {"step": measure_steps, "sampler": measure_sampler, "text": measure_text}


# The released inference code's settings, and ours for speed: configs/sampler.
SAMPLERS = ("paper", "fast")


def benchmark(
    settings: BenchmarkSettings, overrides: list[str], compose: Callable[[list[str]], TrainConfig]
) -> tuple[Path, list[Row]]:
    """Run everything and write ``<output>/<name>.json`` and ``.md``; returns their stem and the rows.

    Raises:
        UserError: for overrides that are wrong.
    """
    config = compose(["data.shards=unused", *overrides])  # refuses what is wrong before anything is built
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        bench = Bench(settings, overrides, compose, SAMPLERS, Path(folder))
        for what in settings.what:
            for row in MEASURES[what](bench):
                rows.append(row)
                print(line(row), flush=True)
    stem = Path(settings.output) / (settings.name or f"{config.preset}_{device_slug(settings.device)}")
    stem.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "machine": machine(settings.device),
        "command": "python scripts/benchmark.py " + " ".join([*overrides, *spelled(settings)]),
        "precision": config.precision,
        "rows": [asdict(row) for row in rows],
    }
    stem.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    stem.with_suffix(".md").write_text(as_markdown(document, rows))
    return stem, rows


def spelled(settings: BenchmarkSettings) -> list[str]:
    """The settings as one would type them, where the file lies left out."""
    shown = []
    for key, value in asdict(settings).items():
        if key in ("output", "name") or value is None:
            continue
        shown.append(f"{key}={','.join(map(str, value)) or 'none'}" if isinstance(value, tuple) else f"{key}={value}")
    return shown


def device_slug(device: str) -> str:
    """ "cpu", or a GPU's name fit for a file."""
    if device == "cpu":
        return "cpu"
    name = torch.cuda.get_device_name(0).lower().replace("nvidia", "").strip()
    return "_".join("".join(c if c.isalnum() else " " for c in name).split())


def machine(device: str) -> dict[str, Any]:
    """What it ran on, and with."""
    facts: dict[str, Any] = {
        "processor": processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "diffusers", "transformers", "accelerate", "peft")},
    }
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(0)
        facts["gpu_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
        facts["cuda"] = torch.version.cuda
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


def cells(row: Row) -> list[str]:
    """One row as text."""
    if row.median is None:
        return [row.what, str(row.stage), row.arm, row.work, "-", "-", "-", "-", "-", row.note]
    speedup = "-" if row.speedup is None else f"{row.speedup:.2f} x"
    if row.speedup is not None and row.against != "reference":
        speedup += f" of {row.against}"
    power = "-" if row.tflops is None else f"{row.tflops:.3g}" + ("" if row.mfu is None else f" ({row.mfu:.1%})")
    return [
        row.what, str(row.stage), row.arm, row.work, f"{row.median:.4g} s ({row.low:.4g} to {row.high:.4g})",
        f"{row.rate:,.4g} {row.unit}", speedup, power, "-" if row.peak_gib is None else f"{row.peak_gib:.1f}", row.note,
    ]  # fmt: skip


def line(row: Row) -> str:
    return "  ".join(cell for cell in cells(row) if cell != "-")


HEADER = ["what", "stage", "arm", "work", "median (range)", "rate", "speed-up", "TFLOP/s (MFU)", "peak GiB", "settings"]


def as_markdown(document: dict[str, Any], rows: Sequence[Row]) -> str:
    """The results for a person."""
    facts = ", ".join(f"{key} {value}" for key, value in document["machine"].items())
    return (
        f"# {document['machine'].get('gpu', document['machine']['processor'])}, {document['date']}\n\n"
        f"{facts}; precision {document['precision']}.\n\n```\n{document['command']}\n```\n\n"
        "Rate, speed-up (how many times faster than the plain reference in rounds that ran in turn) and TFLOP/s (forward and "
        "backward of the models, nothing twice) are over all rounds; their batches go from short captions to long ones.\n\n"
        + markdown_table(HEADER, map(cells, rows))
        + "\n"
    )
