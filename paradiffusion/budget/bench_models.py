"""Arms, configurations and rows of the benchmarks of models."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator

from paradiffusion.budget.benchmark_settings import BenchmarkSettings
from paradiffusion.budget.devices import peak_tflops, recognise
from paradiffusion.budget.synthetic import write_samples
from paradiffusion.budget.timing import Timing, ratio
from paradiffusion.config import TrainConfig
from paradiffusion.training.engine import make_accelerator

# Pictures in the made-up shards; batches of more are drawn from several epochs.
SAMPLES = 256


@dataclass(frozen=True)
class Row:
    """One line of the results.

    Attributes:
        what: "step", "sampler", "text" or "update"; arm: of conditioning; work: which way of doing it.
        median, low, high: seconds; None where it could not be measured, and ``note`` says why.
        rate, unit: samples (images, tokens) per second over all rounds.
        speedup: over the plain reference measured in the same rounds; over ``against`` where that is set.
        tflops: achieved TFLOP/s (model FLOP, no recomputation); mfu: their share of the device's peak, where it is known.
        peak_gib: on a GPU.
    """

    what: str
    stage: int
    arm: str
    work: str
    median: float | None
    low: float | None = None
    high: float | None = None
    rate: float | None = None
    unit: str = "samples/s"
    speedup: float | None = None
    against: str = "reference"
    tflops: float | None = None
    mfu: float | None = None
    peak_gib: float | None = None
    note: str = ""


@dataclass
class Bench:
    """A benchmark's fixed surroundings.

    Attributes:
        overrides: the user's, of train.py; ``compose`` makes a configuration of such.
        samplers: names of configs/sampler to measure, the official settings first.
        folder: goes away in the end.
    """

    settings: BenchmarkSettings
    overrides: list[str]
    compose: Callable[[list[str]], TrainConfig]
    samplers: tuple[str, ...]
    folder: Path
    accelerator: Accelerator | None = None
    runs: int = 0

    @property
    def device(self) -> torch.device:
        return torch.device(self.settings.device)

    def config(self, stage: int, arm: Sequence[str], *more: str) -> TrainConfig:
        """A stage's configuration in one arm, on made-up data, one micro-batch a step."""
        own = ["data.workers=0", "data.max_aspect=1.0", "data.caption_dropout=0", "init_from=scratch", f"stage={stage}"]
        if self.settings.resolution is not None:
            own.append(f"data.resolution={self.settings.resolution}")
        if not any(o.startswith("threads=") for o in self.overrides):
            own.append(f"threads={torch.get_num_threads()}")
        self.runs += 1
        own += [f"run_dir={self.folder / f'run{self.runs}'}", f"data.shards={self.folder / 'shards'}", "tracker=jsonl"]
        config = self.compose([*own, *self.overrides, *arm, *more])
        micro = config.micro_batch_size or config.batch_size
        return replace(config, batch_size=micro, micro_batch_size=micro, max_steps=10**6)

    def write_data(self, side: int) -> None:
        """The made-up shards, of pictures of ``side`` pixels, once."""
        if not (self.folder / "shards").is_dir():
            write_samples(self.folder / "shards", SAMPLES, side)

    def accelerate(self, config: TrainConfig) -> Accelerator:
        """One accelerator for all runs, as train.py makes it."""
        if self.accelerator is None:
            before = os.environ.get("ACCELERATE_USE_CPU")
            if self.settings.device == "cpu":
                os.environ["ACCELERATE_USE_CPU"] = "true"
            try:
                self.accelerator = make_accelerator(config)
            finally:  # whatever this process starts later chooses for itself
                if before is None:
                    os.environ.pop("ACCELERATE_USE_CPU", None)
                else:
                    os.environ["ACCELERATE_USE_CPU"] = before
        return self.accelerator

    def arms(self) -> dict[str, list[str]]:
        """Conditionings to measure: the preset's own if it is neither of the other two, the paper's, and the paper's with
        padding masked; the user's alone where one is given."""
        if any(o.startswith("conditioning") for o in self.overrides):
            return {"as given": []}
        named = {"paper": ["conditioning=paper"], "masked": ["conditioning=paper", "conditioning.mask_padding=true"]}
        preset = [o for o in self.overrides if o.startswith("preset=")]
        own = self.compose(["data.shards=unused", *preset]).conditioning.name
        return named if own == "paper" else {own: [], **named}

    def peak(self, precision: str) -> float | None:
        """TFLOP/s that the device can do, where its data sheet is known."""
        if self.device.type != "cuda":
            return None
        found = recognise(torch.cuda.get_device_name(self.device))
        return None if found is None else peak_tflops(found, precision)


def make_row(
    timing: Timing, what: str, stage: int, arm: str, work: str, count: float, unit: str = "samples/s",
    reference: Timing | None = None, against: str = "reference", flop: float | None = None, peak: float | None = None,
    peak_gib: float | None = None, note: str = "",
) -> Row:  # fmt: skip
    """A row from its timing.

    Args:
        count: samples, images or tokens in one round; ``flop``: of one round; ``peak``: the device's TFLOP/s.
        peak_gib: measured apart, in the place of the timing's own.
    """
    median, mean = timing.median, timing.mean
    note = "; ".join(part for part in (note, timing.note) if part)
    if median is None or mean is None:
        return Row(what, stage, arm, work, None, unit=unit, note=note)
    tflops = None if flop is None else flop / mean / 1e12
    return Row(
        what, stage, arm, work, median, min(timing.seconds), max(timing.seconds), count / mean, unit,
        None if reference is None else ratio(reference, timing), against, tflops,
        None if tflops is None or peak is None else tflops / peak, peak_gib or timing.peak_gib, note,
    )  # fmt: skip
