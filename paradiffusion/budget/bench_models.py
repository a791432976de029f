"""Shared by the benchmarks of models: timed rounds side by side, rows of results, settings, arms and configurations."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import patch_environment

from paradiffusion.budget.flops import recognise
from paradiffusion.budget.synthetic import write_samples
from paradiffusion.checks import choice, positive, split_list
from paradiffusion.compose import split_options
from paradiffusion.config import TrainConfig
from paradiffusion.machine import choose_device
from paradiffusion.training.engine import make_accelerator

GIB = 2**30


@dataclass
class Timing:
    """Seconds of each round of one piece of work, the most memory on a GPU in GiB, as its tensors had it and as the allocator had
    reserved it for them, and why there are none."""

    seconds: list[float] = field(default_factory=list)
    peak_gib: float | None = None
    reserved_gib: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One line of the results: a kind of work ("step", "sampler", "text", "update"), an arm of conditioning, a way of doing it.

    Seconds are None where it could not be measured, as ``note`` says. The rate, in ``unit``, is over all rounds, the speed-up that over
    ``against`` in the same ones; ``tflops`` are achieved (model FLOP, no recomputation), ``mfu`` their share of the device's peak."""

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
    described_gib: float | None = None
    reserved_gib: float | None = None
    note: str = ""


def interleave(
    works: dict[str, Callable[[int], object]],
    warmup: int,
    repeats: int,
    device: torch.device,
    before: dict[str, Callable[[], object]] | None = None,
) -> dict[str, Timing]:
    """Run every piece of work in each round, in turning order, so that what else the machine does meets all alike: ``warmup``
    rounds that are not counted, then ``repeats``. Each is called with the round's number, after its ``before``, not timed."""
    timings = {name: Timing() for name in works}
    alive = list(works)
    for number in range(warmup + repeats):
        turn = number % len(alive) if alive else 0
        for name in alive[turn:] + alive[:turn]:
            timing = timings[name]
            try:
                if before is not None:
                    before[name]()
                seconds, peak, reserved = timed(works[name], number, device)
            except torch.OutOfMemoryError:
                timing.seconds, timing.note = [], f"did not fit into the memory of {device}"
                alive = [other for other in alive if other != name]
                release()
                continue
            if number >= warmup:
                timing.seconds.append(seconds)
            if peak is not None and reserved is not None:
                timing.peak_gib = max(timing.peak_gib or 0.0, peak)
                timing.reserved_gib = max(timing.reserved_gib or 0.0, reserved)
    return timings


def timed(work: Callable[[int], object], number: int, device: torch.device) -> tuple[float, float | None, float | None]:
    """Seconds of ``work(number)``, with all that it has asked of a GPU done, and the most memory that it held there, and that was
    reserved, in GiB."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    work(number)
    if on_gpu:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    if not on_gpu:
        return seconds, None, None
    return seconds, torch.cuda.max_memory_allocated(device) / GIB, torch.cuda.max_memory_reserved(device) / GIB


def release() -> None:
    """Give back what is no longer referred to."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def ratio(slow: Timing, fast: Timing) -> float | None:
    """How many times faster ``fast`` is over all rounds. Of totals, not of medians: batches of long captions are few, and
    take more than their share of the time."""
    return sum(slow.seconds) / sum(fast.seconds) if slow.seconds and fast.seconds else None


def make_row(
    timing: Timing, what: str, stage: int, arm: str, work: str, count: float, unit: str = "samples/s",
    reference: Timing | None = None, against: str = "reference", flop: float | None = None, peak: float | None = None,
    memory: Timing | None = None, note: str = "", described_gib: float | None = None,
) -> Row:  # fmt: skip
    """A row from its timing. ``count`` (samples, images or tokens) and ``flop`` are those of one round, ``peak`` the device's
    TFLOP/s; ``memory`` was measured apart, in the place of the timing's own, and ``described_gib`` is what its peak should be."""
    note = "; ".join(part for part in (note, timing.note) if part)
    if not timing.seconds:
        return Row(what, stage, arm, work, None, unit=unit, note=note)
    mean, memory = statistics.fmean(timing.seconds), memory or timing
    tflops = None if flop is None else flop / mean / 1e12
    return Row(
        what, stage, arm, work, statistics.median(timing.seconds), min(timing.seconds), max(timing.seconds), count / mean, unit,
        None if reference is None else ratio(reference, timing), against, tflops,
        None if tflops is None or peak is None else tflops / peak, memory.peak_gib, described_gib, memory.reserved_gib, note,
    )  # fmt: skip


# Pictures in the made-up shards; batches of more are drawn from several epochs.
SAMPLES = 256
SEVERAL = {
    "stages": ("1", "2", "3"),
    "what": ("step", "sampler", "text"),
    "switches": (
        "channels_last",
        "compile",
        "fused",
        "async_save",
        "reads",
        "null_prompt",
        "adapter_casts",
        "frozen_fp32",
        "cudnn_benchmark",
    ),
}


@dataclass
class BenchmarkSettings:
    """What scripts/benchmark.py is asked to measure; it says what each key is. -1 and None are for what suits the device, the
    stage or the sampler; ``steps`` are of its official settings, and other presets are shortened by the same share."""

    stages: str = "1,2"
    what: str = "step,sampler,text"
    switches: str | None = None
    warmup: int = -1
    repeats: int = -1
    device: str | None = None
    resolution: int | None = None
    steps: int | None = None
    output: str = "benchmarks"
    name: str | None = None

    def settle(self) -> None:
        """Fill in what depends on the device; UserError for a value that makes no sense."""
        self.device = choose_device(self.device).type
        # Compiling for a processor takes minutes.
        usual = {"warmup": 1, "repeats": 3, "steps": 20, "switches": "channels_last,fused"}
        if self.device == "cuda":
            usual = {"warmup": 5, "repeats": 20, "switches": "channels_last,compile,fused"}
        for key, value in usual.items():
            if getattr(self, key) in (None, -1):
                setattr(self, key, value)
        for key, accepted in SEVERAL.items():
            for value in self.several(key):
                choice(key, value, accepted)
        positive("warmup", self.warmup, zero=True)
        for key in ("repeats", "resolution", "steps"):
            if getattr(self, key) is not None:
                positive(key, getattr(self, key))

    def several(self, key: str) -> tuple[str, ...]:
        """The parts of "a,b" or "[a,b]"; of "none" none."""
        return tuple(part for part in split_list(getattr(self, key)) if part != "none")

    def spelled(self) -> list[str]:
        """The settings as one would type them, where the file lies left out."""
        shown = {key: value for key, value in asdict(self).items() if key not in ("output", "name")}
        return [f"{key}={value}" for key, value in shown.items() if value is not None]


def parse_settings(arguments: Sequence[str]) -> tuple[BenchmarkSettings, list[str]]:
    """Split the benchmark's own keys from the overrides of train.py; UserError for a value that makes no sense."""
    settings, rest = split_options(BenchmarkSettings, arguments)
    settings.settle()
    return settings, rest


@dataclass
class Bench:
    """A benchmark's fixed surroundings: the user's overrides of train.py, and ``compose``, which makes a configuration of such; names
    of configs/sampler to measure, the official settings first; and a folder that goes away in the end."""

    settings: BenchmarkSettings
    overrides: list[str]
    compose: Callable[[list[str]], TrainConfig]
    samplers: tuple[str, ...]
    folder: Path
    accelerator: Accelerator | None = None
    runs: int = 0

    @property
    def device(self) -> torch.device:
        return torch.device(str(self.settings.device))

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
            write_samples(self.folder / "shards", SAMPLES, side, side)

    def accelerate(self, config: TrainConfig) -> Accelerator:
        """One accelerator for all runs, as train.py makes it."""
        if self.accelerator is None:
            on_cpu = {"ACCELERATE_USE_CPU": "true"} if self.device.type == "cpu" else {}
            with patch_environment(**on_cpu):  # whatever this process starts later chooses for itself
                self.accelerator = make_accelerator(config)
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

    def each_arm(self, what: str, stage: int, measure: Callable[[str, list[str]], Iterator[Row]]) -> Iterator[Row]:
        """Rows of every arm; what does not fit says so, and the others go on."""
        for arm, overrides in self.arms().items():
            try:
                yield from measure(arm, overrides)
            except torch.OutOfMemoryError:
                yield Row(what, stage, arm, "ours", None, note=f"did not fit into the memory of {self.device}")
            release()

    def peak(self, precision: str) -> float | None:
        """TFLOP/s that the device can do, where its data sheet is known."""
        if self.device.type != "cuda":
            return None
        found = recognise(torch.cuda.get_device_name(self.device))
        return None if found is None else found.peak(precision)
