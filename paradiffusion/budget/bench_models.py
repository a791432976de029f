"""Shared by the benchmarks of models: timed rounds side by side, rows of results, settings, arms and configurations."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import patch_environment

from paradiffusion.budget.flops import recognise
from paradiffusion.budget.synthetic import write_samples
from paradiffusion.checks import Check, choice, not_negative, positive, split_list
from paradiffusion.compose import compose_train, split_options
from paradiffusion.config import TrainConfig, option
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

    what: str = ""
    stage: int = 0
    arm: str = ""
    work: str = ""
    median: float | None = None
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
    alive, on_gpu = list(works), device.type == "cuda"
    for number in range(warmup + repeats):
        turn = number % len(alive) if alive else 0
        for name in alive[turn:] + alive[:turn]:
            timing = timings[name]
            try:
                if before is not None:
                    before[name]()
                if on_gpu:
                    torch.cuda.synchronize(device)
                    torch.cuda.reset_peak_memory_stats(device)
                began = time.perf_counter()
                works[name](number)
                if on_gpu:  # with all that was asked of it done
                    torch.cuda.synchronize(device)
                seconds = time.perf_counter() - began
            except torch.OutOfMemoryError:
                timing.seconds, timing.note = [], f"did not fit into the memory of {device}"
                alive = [other for other in alive if other != name]
                release()
                continue
            if number >= warmup:
                timing.seconds.append(seconds)
            if on_gpu:
                timing.peak_gib = max(timing.peak_gib or 0.0, torch.cuda.max_memory_allocated(device) / GIB)
                timing.reserved_gib = max(timing.reserved_gib or 0.0, torch.cuda.max_memory_reserved(device) / GIB)
    return timings


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
    timings: dict[str, Timing], work: str, count: float, unit: str = "samples/s", against: str = "reference",
    flop: float | None = None, peak: float | None = None, note: str = "", what: str = "",
) -> Row:  # fmt: skip
    """The row of one of several works that took turns, ``against`` being the one that it is compared with. ``count`` (samples, images or
    tokens) and ``flop`` are those of one round, ``peak`` the device's TFLOP/s. Stage and arm, and mostly what it is, are the caller's."""
    timing, slow = timings[work], timings.get(against)
    note = "; ".join(part for part in (note, timing.note) if part)
    if not timing.seconds:
        return Row(what, work=work, unit=unit, against=against, note=note)
    mean, seconds = statistics.fmean(timing.seconds), timing.seconds
    tflops = None if flop is None else flop / mean / 1e12
    return Row(
        what, work=work, median=statistics.median(seconds), low=min(seconds), high=max(seconds), rate=count / mean, unit=unit,
        speedup=None if slow is None or work == against else ratio(slow, timing), against=against, tflops=tflops,
        mfu=None if tflops is None or peak is None else tflops / peak, peak_gib=timing.peak_gib, reserved_gib=timing.reserved_gib,
        note=note,
    )  # fmt: skip


# Pictures in the made-up shards; batches of more are drawn from several epochs.
SAMPLES = 256
# What a row of our step with the switch is called; of what has no key of its own the row is of the step without it.
SWITCHES = {
    "channels_last": "channels_last=true",
    "compile": "compile=true",
    "fused": "AdamW fused",
    "async_save": "async_save=true",
    "reads": "numbers read in each micro-batch, copies waited for",
    "null_prompt": "null prompt read beside the others",
    "adapter_casts": "adapters' inputs cast to fp32 and back",
    "frozen_fp32": "frozen matrices of the U-Net in fp32",
    "cudnn_benchmark": "cudnn.benchmark off",
}
# In the place of a processor's defaults, for which compiling takes minutes.
ON_GPU = ["warmup=5", "repeats=20", "steps=null", "switches=channels_last,compile,fused"]


def several(text: str) -> list[str]:
    """The parts of "a,b" or "[a,b]"; of "none" none."""
    return [part for part in split_list(text) if part != "none"]


def each_of(*accepted: str) -> Check:
    """The check that all of ``several`` are among these."""

    def check(key: str, value: str) -> None:
        for part in several(value):
            choice(key, part, accepted)

    return check


@dataclass
class BenchmarkSettings:
    """What scripts/benchmark.py is asked to measure; it says what each key is. None is for what suits the stage or the sampler;
    ``steps`` are of its official settings, and other presets are shortened by the same share."""

    stages: str = option("1,2", accepts=each_of("1", "2", "3"))
    what: str = option("step,sampler,text", accepts=each_of("step", "sampler", "text"))
    switches: str = option("channels_last,fused", accepts=each_of(*SWITCHES))
    warmup: int = option(1, accepts=not_negative)
    repeats: int = option(3, accepts=positive)
    device: str | None = None
    resolution: int | None = option(None, accepts=positive)
    steps: int | None = option(20, accepts=positive)
    output: str = "benchmarks"
    name: str | None = None


def parse_settings(arguments: Sequence[str]) -> tuple[BenchmarkSettings, list[str]]:
    """Split the benchmark's own keys from the overrides of train.py; UserError for a value that makes no sense."""
    settings, rest = split_options(BenchmarkSettings, arguments)
    device = choose_device(settings.device).type
    if device == "cuda":
        settings, rest = split_options(BenchmarkSettings, [*ON_GPU, *arguments])
    return replace(settings, device=device), rest


@dataclass
class Bench:
    """A benchmark's fixed surroundings: its settings, the user's overrides of train.py, and a folder that goes away in the end."""

    settings: BenchmarkSettings
    overrides: list[str]
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
        self.runs += 1
        own += [f"run_dir={self.folder / f'run{self.runs}'}", f"data.shards={self.folder / 'shards'}", "tracker=jsonl"]
        config = compose_train([*own, f"threads={torch.get_num_threads()}", *self.overrides, *arm, *more])
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
        own = compose_train(["data.shards=unused", *preset]).conditioning.name
        return named if own == "paper" else {own: [], **named}

    def time(self, works: dict[str, Callable[[int], object]], before: dict[str, Callable[[], object]] | None = None) -> dict[str, Timing]:
        """``interleave``, as often as the settings say."""
        return interleave(works, self.settings.warmup, self.settings.repeats, self.device, before)

    def peak(self, precision: str) -> float | None:
        """TFLOP/s that the device can do, where its data sheet is known."""
        if self.device.type != "cuda":
            return None
        found = recognise(torch.cuda.get_device_name(self.device))
        return None if found is None else found.peak(precision)
