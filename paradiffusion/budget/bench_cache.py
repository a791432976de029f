"""Benchmark of the cache: the same training steps with and without it, in turn in one process, and whether losses agree."""

from __future__ import annotations

import datetime
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

from paradiffusion.budget.benchmark import machine
from paradiffusion.checks import positive
from paradiffusion.config import TrainConfig
from paradiffusion.errors import UserError
from paradiffusion.pages import markdown_table
from paradiffusion.scenes.dataset import make_wanted
from paradiffusion.training.caching import CacheOptions, make_cache
from paradiffusion.training.engine import make_accelerator
from paradiffusion.training.trainer import Trainer

SCENES = 320
# Nano computes in bf16, where one rounding is 0.4 %; the second arm tells what the cache itself changes.
ARMS = {"nano": [], "nano in fp32": ["precision=fp32", "text_encoder.dtype=float32"]}


@dataclass
class CacheBenchSettings:
    """What scripts/benchmark_cache.py takes besides the overrides of train.py."""

    steps: int = 30
    warmup: int = 3
    output: str = "benchmarks"
    name: str = "cache_cpu"

    def check(self) -> None:
        positive("steps", self.steps)
        positive("warmup", self.warmup, zero=True)


@dataclass
class CacheRow:
    """One arm.

    Attributes:
        uncached, cached: median seconds of a step, reading included; ``low`` and ``high`` bound the middle 80 % of the
            speed-ups of single steps.
        speedup: of all steps together; ``speedup_computing`` without the reading, which worker processes do meanwhile.
        reading_uncached, reading_cached: median seconds of a step that reading took.
        largest_difference, mean_difference: of the losses of single steps, relative.
        making: seconds that the cache took to make, of ``gib_per_1000`` GiB for 1000 samples.
    """

    arm: str
    steps: int
    batch_size: int
    uncached: float
    cached: float
    speedup: float
    low: float
    high: float
    speedup_computing: float
    reading_uncached: float
    reading_cached: float
    largest_difference: float
    mean_difference: float
    making: float
    gib_per_1000: float


@dataclass
class _Step:
    seconds: float
    reading: float
    loss: float


def benchmark_cache(
    settings: CacheBenchSettings, overrides: list[str], compose: Callable[[list[str]], TrainConfig], folder: Path
) -> tuple[Path, list[CacheRow]]:
    """Measure every arm in ``folder`` and write ``<output>/<name>.json`` and ``.md``; returns their stem and the rows."""
    settings.check()
    rows = []
    for arm, values in ARMS.items():
        sizes = f"{{web: {SCENES}, big: 1, small: 1, val: 1}}"
        config = compose(["preset=nano", "stage=1", "threads=1", "data.workers=0", *values, *overrides,
                          f"data.demo_folder={folder / 'demo'}", f"data.demo_sizes={sizes}", "data.val_shards=null",
                          f"run_dir={folder / arm.replace(' ', '_')}"])  # fmt: skip
        if config.train_text != "frozen":
            raise UserError("the cache is measured in stage 1, where the language model is frozen; leave stage= out.")
        rows.append(measure(arm, replace(config, max_steps=settings.warmup + settings.steps), settings))
        print(line(rows[-1]), flush=True)
    stem = Path(settings.output) / settings.name
    stem.parent.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "machine": machine("cpu"),
        "load": round(os.getloadavg()[0], 1),
        "command": " ".join(["python scripts/benchmark_cache.py", *overrides, f"steps={settings.steps}"]),
        "rows": [asdict(row) for row in rows],
    }
    stem.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    stem.with_suffix(".md").write_text(as_markdown(document, rows))
    return stem, rows


def measure(arm: str, config: TrainConfig, settings: CacheBenchSettings) -> CacheRow:
    """One arm: make the cache, then take every step once without and once with it."""
    cache = Path(config.run_dir) / "cache"
    began = time.perf_counter()
    make_wanted(config.data)
    make_cache(config, CacheOptions(output=str(cache)))
    making = time.perf_counter() - began
    AcceleratorState._reset_state(reset_partial_state=True)  # the arms differ in precision
    accelerator = make_accelerator(config)
    trainers: dict[str, Trainer] = {}
    for name, path in (("uncached", None), ("cached", str(cache))):
        folder = Path(config.run_dir) / name
        folder.mkdir(parents=True)
        own = replace(config, data=replace(config.data, cache=path))
        trainers[name] = Trainer(own, accelerator, folder=folder)
    loaders = {name: trainer.loader() for name, trainer in trainers.items()}
    steps: dict[str, list[_Step]] = {name: [] for name in trainers}
    for number in range(config.max_steps):
        # In turning order, so that what else the machine does meets both alike.
        for name in sorted(trainers, reverse=bool(number % 2)):
            steps[name].append(one_step(trainers[name], loaders[name]))
    for name, trainer in trainers.items():
        loaders[name].close()
        trainer.close()
    size = sum(path.stat().st_size for path in cache.rglob("*.tar"))
    plain, cached = (steps[name][settings.warmup :] for name in ("uncached", "cached"))
    ratios = sorted(one.seconds / other.seconds for one, other in zip(plain, cached, strict=True))
    every = zip(steps["uncached"], steps["cached"], strict=True)
    differences = [abs(one.loss - other.loss) / one.loss for one, other in every]
    return CacheRow(
        arm=arm,
        steps=len(plain),
        batch_size=config.batch_size,
        uncached=statistics.median(step.seconds for step in plain),
        cached=statistics.median(step.seconds for step in cached),
        speedup=sum(step.seconds for step in plain) / sum(step.seconds for step in cached),
        low=ratios[len(ratios) // 10],
        high=ratios[-1 - len(ratios) // 10],
        speedup_computing=sum(s.seconds - s.reading for s in plain) / sum(s.seconds - s.reading for s in cached),
        reading_uncached=statistics.median(step.reading for step in plain),
        reading_cached=statistics.median(step.reading for step in cached),
        largest_difference=max(differences),
        mean_difference=statistics.fmean(differences),
        making=making,
        gib_per_1000=size / 2**30 / SCENES * 1000,
    )


def one_step(trainer: Trainer, loader: Any) -> _Step:
    """One optimiser step of training."""
    trainer.meters.reset()
    began = time.perf_counter()
    loss, _ = trainer.train_step(loader)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return _Step(time.perf_counter() - began, trainer.meters.waited, loss)


def line(row: CacheRow) -> str:
    """One row for a person."""
    return (
        f"{row.arm}: {row.uncached:.3f} s a step, {row.cached:.3f} s cached: {row.speedup:.2f} x ({row.low:.2f} to "
        f"{row.high:.2f}), {row.speedup_computing:.2f} x without reading; losses differ by {row.largest_difference:.1e} at most"
    )


def as_markdown(document: dict[str, Any], rows: list[CacheRow]) -> str:
    """The results for a person."""
    facts = ", ".join(f"{key} {value}" for key, value in document["machine"].items())
    header = [
        "arm", "step", "step, cached", "speed-up (middle 80 % of steps)", "speed-up without reading", "reading, cached reading",
        "losses differ (mean, most)", "GiB per 1000 samples", "made in",
    ]  # fmt: skip
    table = []
    for row in rows:
        table.append([
            row.arm, f"{row.uncached * 1e3:.0f} ms", f"{row.cached * 1e3:.0f} ms",
            f"{row.speedup:.2f} x ({row.low:.2f} to {row.high:.2f})", f"{row.speedup_computing:.2f} x",
            f"{row.reading_uncached * 1e3:.0f} ms, {row.reading_cached * 1e3:.0f} ms",
            f"{row.mean_difference:.1e}, {row.largest_difference:.1e}", f"{row.gib_per_1000:.3g}", f"{row.making:.0f} s",
        ])  # fmt: skip
    return (
        f"# Training from a cache, {document['date']}\n\n{facts}; load average {document['load']}.\n\n"
        f"```\n{document['command']}\n```\n\n"
        f"Stage 1 of preset=nano, batches of {rows[0].batch_size}, one thread, {rows[0].steps} steps: each is taken without and with "
        "cached latents and text features, in turn, in one process that reads its samples itself. \"Without reading\" is what is "
        "left where worker processes read ahead. Both runs start from the same weights and draw the same noise; their losses "
        f"are compared over all steps.\n\n" + markdown_table(header, table) + "\n"
    )  # fmt: skip
