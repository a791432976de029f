"""Benchmark of the cache: the same training steps with and without it, in turn in one process, and whether losses agree."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from accelerate.state import AcceleratorState

from paradiffusion.budget.bench_models import interleave, ratio
from paradiffusion.budget.results import Results, machine
from paradiffusion.checks import not_negative, positive
from paradiffusion.compose import compose_train, split_options
from paradiffusion.config import TrainConfig, keys_of, option
from paradiffusion.errors import UserError
from paradiffusion.scenes.dataset import make_wanted
from paradiffusion.training.caching import CacheOptions, make_cache
from paradiffusion.training.engine import make_accelerator
from paradiffusion.training.trainer import Trainer

SCENES = 320
# Nano computes in bf16, where one rounding is 0.4 %; the second arm tells what the cache itself changes.
ARMS = {"nano": [], "nano in fp32": ["precision=fp32", "text_encoder.dtype=float32"]}
HEADER = [
    "arm", "step", "step, cached", "speed-up (middle 80 % of steps)", "speed-up without reading", "reading, cached reading",
    "losses differ (mean, most)", "GiB per 1000 samples", "made in",
]  # fmt: skip


@dataclass
class CacheBenchSettings:
    """What scripts/benchmark_cache.py takes besides the overrides of train.py."""

    steps: int = option(30, accepts=positive)
    warmup: int = option(3, accepts=not_negative)
    output: str = "benchmarks"
    name: str = "cache_cpu"


def benchmark_cache(arguments: list[str]) -> Path:
    """Measure every arm and write ``<output>/<name>.json`` and ``.md``; returns their stem."""
    settings, overrides = split_options(CacheBenchSettings, arguments)
    with tempfile.TemporaryDirectory(prefix="benchmark-cache-") as folder:
        configs = {arm: configuration([*values, *overrides], Path(folder, arm.replace(" ", "_"))) for arm, values in ARMS.items()}
        about = (
            f"Stage 1 of preset=nano, batches of {configs['nano'].batch_size}, one thread, {settings.steps} steps: each is taken without "
            'and with cached latents and text features, in turn, in one process that reads its samples itself. "Without reading" is what '
            "is left where worker processes read ahead. Both runs start from the same weights and draw the same noise; their losses are "
            "compared over all steps."
        )
        command, ran_on = " ".join(["python scripts/benchmark_cache.py", *overrides, f"steps={settings.steps}"]), machine()
        document = {"machine": ran_on, "load": ran_on["load average"], "command": command}
        results = Results(settings, "Training from a cache", about, HEADER, document)
        for arm, config in configs.items():
            row = {"arm": arm, "batch_size": config.batch_size}
            row |= measure(replace(config, max_steps=settings.warmup + settings.steps), settings.warmup)
            results.add(row, cells(row))
    return results.stem


def configuration(overrides: list[str], run_dir: Path) -> TrainConfig:
    """One arm's, of scenes that are drawn once beside its ``run_dir``; UserError for a stage that trains the language model."""
    sizes = f"{{web: {SCENES}, big: 1, small: 1, val: 1}}"
    given = ["preset=nano", "stage=1", "threads=1", "data.workers=0", *overrides, f"data.demo_folder={run_dir.parent / 'demo'}",
             f"data.demo_sizes={sizes}", "data.val_shards=null", f"run_dir={run_dir}"]  # fmt: skip
    config = compose_train(given, tuple(keys_of(CacheBenchSettings)))
    if config.train_text != "frozen":
        raise UserError("the cache is measured in stage 1, where the language model is frozen; leave stage= out.")
    return config


def measure(config: TrainConfig, warmup: int) -> dict[str, Any]:
    """One arm: make the cache, then take every step once without and once with it. Seconds are medians; a speed-up is of all
    steps together, and ``low`` and ``high`` bound the middle 80 % of single steps'; differences of losses are relative."""
    cache = Path(config.run_dir) / "cache"
    began = time.perf_counter()
    make_wanted(config.data)
    make_cache(config, CacheOptions(output=str(cache)))
    making = time.perf_counter() - began
    AcceleratorState._reset_state(reset_partial_state=True)  # the arms differ in precision
    accelerator = make_accelerator(config)
    works: dict[str, Steps] = {}
    for name, path in (("uncached", None), ("cached", str(cache))):
        folder = Path(config.run_dir) / name
        folder.mkdir(parents=True)
        own = replace(config, data=replace(config.data, cache=path))
        works[name] = Steps(Trainer(own, accelerator, folder=folder))
    timings = interleave(dict(works), warmup, config.max_steps - warmup, accelerator.device)
    for work in works.values():
        work.close()
    plain, cached = works["uncached"], works["cached"]
    differences = [abs(one - other) / one for one, other in zip(plain.losses, cached.losses, strict=True)]
    seconds = {name: timing.seconds for name, timing in timings.items()}
    reading = {name: work.reading[warmup:] for name, work in works.items()}
    ratios = sorted(one / other for one, other in zip(seconds["uncached"], seconds["cached"], strict=True))
    computing = {name: sum(seconds[name]) - sum(reading[name]) for name in works}
    size = sum(path.stat().st_size for path in cache.rglob("*.tar"))
    return {
        "steps": len(ratios),
        **{name: median(seconds[name]) for name in works},
        "speedup": ratio(timings["uncached"], timings["cached"]),
        "low": ratios[len(ratios) // 10],
        "high": ratios[-1 - len(ratios) // 10],
        "speedup_computing": computing["uncached"] / computing["cached"],
        **{f"reading_{name}": median(reading[name]) for name in works},
        "largest_difference": max(differences),
        "mean_difference": fmean(differences),
        "making": making,
        "gib_per_1000": size / 2**30 / SCENES * 1000,
    }


class Steps:
    """Optimiser steps of training, with the loss of each and the seconds that it read for."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.loader = trainer, trainer.loader()
        self.losses: list[float] = []
        self.reading: list[float] = []

    def __call__(self, number: int) -> None:
        self.trainer.meters.reset()
        self.losses.append(self.trainer.train_step(self.loader)[0])
        self.reading.append(self.trainer.meters.waited)

    def close(self) -> None:
        self.loader.close()
        self.trainer.close()


def cells(row: dict[str, Any]) -> list[str]:
    """One row as text."""
    form = (
        "{arm}", "{uncached:.0f} ms", "{cached:.0f} ms", "{speedup:.2f} x ({low:.2f} to {high:.2f})", "{speedup_computing:.2f} x",
        "{reading_uncached:.0f} ms, {reading_cached:.0f} ms", "{mean_difference:.1e}, {largest_difference:.1e}",
        "{gib_per_1000:.3g}", "{making:.0f} s",
    )  # fmt: skip
    milliseconds = {key: 1e3 * row[key] for key in ("uncached", "cached", "reading_uncached", "reading_cached")}
    return [cell.format(**{**row, **milliseconds}) for cell in form]
