"""Time pieces of work side by side: warm-up, interleaved rounds, median and range, peak memory."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

GIB = 2**30


@dataclass
class Timing:
    """Seconds of each round of one piece of work, its peak memory on a GPU in GiB, and why there are none."""

    seconds: list[float] = field(default_factory=list)
    peak_gib: float | None = None
    note: str = ""

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.seconds) if self.seconds else None

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None


def interleave(
    works: dict[str, Callable[[int], object]],
    warmup: int,
    repeats: int,
    device: torch.device,
    before: dict[str, Callable[[], object]] | None = None,
) -> dict[str, Timing]:
    """Run every piece of work in each round, in turning order, so that what else the machine does meets all alike.

    Args:
        works: by name; called with the number of the round.
        warmup, repeats: rounds that are not counted, and rounds that are.
        before: what is done before each run of the work of that name, and not timed.
    """
    timings = {name: Timing() for name in works}
    alive = list(works)
    for number in range(warmup + repeats):
        turn = number % len(alive) if alive else 0
        for name in alive[turn:] + alive[:turn]:
            timing = timings[name]
            try:
                if before is not None:
                    before[name]()
                seconds, peak = timed(works[name], number, device)
            except torch.OutOfMemoryError:
                timing.seconds, timing.note = [], f"did not fit into the memory of {device}"
                alive = [other for other in alive if other != name]
                release()
                continue
            if number >= warmup:
                timing.seconds.append(seconds)
            if peak is not None:
                timing.peak_gib = max(timing.peak_gib or 0.0, peak)
    return timings


def timed(work: Callable[[int], object], number: int, device: torch.device) -> tuple[float, float | None]:
    """Seconds of ``work(number)``, with all that it has asked of a GPU done, and the most memory that it held there, in GiB."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    work(number)
    if on_gpu:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    return seconds, torch.cuda.max_memory_allocated(device) / GIB if on_gpu else None


def release() -> None:
    """Give back what is no longer referred to."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def ratio(slow: Timing, fast: Timing) -> float | None:
    """How many times faster ``fast`` is over all rounds. Of totals, not of medians: batches of long captions are few, and
    take more than their share of the time."""
    return sum(slow.seconds) / sum(fast.seconds) if slow.seconds and fast.seconds else None
