"""Benchmark of the batch plan: time and memory to find a far step over many samples."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paradiffusion.checks import choice, positive
from paradiffusion.data.images import make_buckets
from paradiffusion.data.index import ROW, SampleIndex
from paradiffusion.data.plan import BatchPlan, Share
from paradiffusion.errors import UserError

CAPTIONS = {"short": 0.5, "long": 0.5}
# Of the shards and of the samples, where there are three sources: a large one is not drawn in proportion to its size.
THREE = ((0.80, 0.6), (0.19, 0.3), (0.01, 0.1))


@dataclass
class PlanBench:
    """What is measured.

    Attributes:
        rows, shards: of the synthetic index.
        step: the one that is looked for, in batches of ``batch_size``.
        sources: the numbers of sources that are measured: "1", "3" or "1,3".
        repeats: runs of each, every one with a plan of its own.
        output, name: FILE.json and FILE.md are written there.
    """

    rows: int = 10_000_000
    shards: int = 2000
    step: int = 1_000_000
    batch_size: int = 256
    window_shards: int = 16
    resolution: int = 512
    sources: str = "1,3"
    repeats: int = 5
    output: str = "benchmarks"
    name: str = "plan_cpu"

    def check(self) -> None:
        for key in ("rows", "shards", "batch_size", "window_shards", "repeats"):
            positive(key, getattr(self, key))
        positive("step", self.step, zero=True)
        choice("sources", self.sources, ("1", "3", "1,3"))
        if self.rows < self.shards or self.shards < 100:
            raise UserError(
                f"rows={self.rows} shards={self.shards} is too small; expected 100 shards, and a row for each."
            )


@dataclass
class PlanRow:
    """What one number of sources came to: seconds of each repeat, and bytes a sample. ``build`` is the making of a plan from an
    index in memory, ``seek`` its batch of the far step, ``cpu`` the processor time of both, ``next_batch`` the mean of the next
    1000. ``peak`` is the most that build and seek hold at once, ``plan`` what the plan keeps then, both besides the index."""

    sources: int
    buckets: int
    build: list[float]
    seek: list[float]
    cpu: list[float]
    next_batch: float
    index_bytes: float
    plan_bytes: float
    peak_bytes: float

    @property
    def total(self) -> list[float]:
        return [build + seek for build, seek in zip(self.build, self.seek, strict=True)]


def make_index(rows: int, shards: int, sources: int = 1) -> SampleIndex:
    """A table as ``load_index`` makes it, of ``rows`` samples that exist nowhere, with keys of nine digits."""
    rng = np.random.default_rng(0)
    table = np.zeros(rows, ROW)
    table["width"], table["height"] = rng.integers(300, 900, rows), rng.integers(300, 900, rows)
    words = np.stack([rng.integers(1, 30, rows), rng.integers(0, 200, rows)], axis=1).astype(np.uint16)
    bounds = (
        [round(shards * sum(part for part, _ in THREE[:number])) for number in range(4)]
        if sources == 3
        else [0, shards]
    )
    return SampleIndex(
        shards=[Path(f"{number:06d}.tar") for number in range(shards)],
        shard=(np.arange(rows) * shards // rows).astype(np.int32),
        table=table,
        words=words,
        kinds=["short", "long"],
        ids=rng.integers(0, 1 << 63, rows, dtype=np.uint64),
        key_bytes=np.zeros(9 * rows, np.uint8),
        key_starts=np.arange(rows + 1, dtype=np.int64) * 9,
        shard_source=np.repeat(np.arange(sources, dtype=np.int16), np.diff(bounds)),
        sources=[f"source {number}" for number in range(sources)],
    )


def make(index: SampleIndex, settings: PlanBench) -> BatchPlan:
    """The plan that is measured: the aspect buckets of a resolution, two caption kinds."""
    buckets = make_buckets(settings.resolution, 32, 2.0)  # 9 of them
    shares = [Share(weight) for _, weight in THREE] if len(index.sources) == 3 else None
    return BatchPlan(index, settings.batch_size, 0, buckets, CAPTIONS, settings.window_shards, shares)


def measure(settings: PlanBench) -> Iterator[PlanRow]:
    """Measure each number of sources in turn."""
    for sources in map(int, settings.sources.split(",")):
        index = make_index(settings.rows, settings.shards, sources)
        build, seek, cpu = [], [], []
        for _ in range(settings.repeats):
            spent, began = time.process_time(), time.perf_counter()
            plan = make(index, settings)
            built = time.perf_counter()
            plan.batch(settings.step)
            found = time.perf_counter()
            build.append(built - began)
            seek.append(found - built)
            cpu.append(time.process_time() - spent)
        for step in range(settings.step + 1, settings.step + 1001):
            plan.batch(step)
        following = (time.perf_counter() - found) / 1000
        # Apart from the timed runs: it slows them down.
        tracemalloc.start()
        plan = make(index, settings)
        plan.batch(settings.step)
        kept, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        yield PlanRow(
            sources, len(plan.buckets), build, seek, cpu, following, index_bytes(index) / settings.rows, kept / settings.rows,
            peak / settings.rows,
        )  # fmt: skip


def index_bytes(index: SampleIndex) -> int:
    """What an index holds in memory."""
    return sum(value.nbytes for value in vars(index).values() if isinstance(value, np.ndarray))


def write(settings: PlanBench, rows: list[PlanRow]) -> Path:
    """Write FILE.json and FILE.md; their common stem."""
    from paradiffusion.budget.results import processor

    document: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": {
            "processor": processor(),
            "python": platform.python_version(),
            "numpy": np.__version__,
            "threads": 1,
            "load average": round(os.getloadavg()[0], 1),
        },
        "settings": asdict(settings),
        "rows": [{**asdict(row), "total": row.total} for row in rows],
    }
    stem = Path(settings.output) / settings.name
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    stem.with_suffix(".md").write_text(as_markdown(document, settings, rows))
    return stem


def spread(seconds: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(seconds):.3f} s ({min(seconds):.3f} to {max(seconds):.3f})"


def line(row: PlanRow) -> str:
    """A row for the terminal."""
    return f"{row.sources} source(s): plan and far step {spread(row.total)}, {row.peak_bytes:.0f} MB per million rows at the peak"


def as_markdown(document: dict[str, Any], settings: PlanBench, rows: list[PlanRow]) -> str:
    """The table, with what it was measured on and how to read it."""
    head = (
        "sources",
        "plan made",
        f"step {settings.step:,} found",
        "together",
        "processor time",
        "each next batch",
        "index",
        "plan",
        "peak",
    )
    cells = [
        (
            str(row.sources), spread(row.build), spread(row.seek), spread(row.total), spread(row.cpu), f"{row.next_batch * 1e3:.2f} ms",
            f"{row.index_bytes:.0f} MB", f"{row.plan_bytes:.1f} MB", f"{row.peak_bytes:.0f} MB",
        )
        for row in rows
    ]  # fmt: skip
    table = "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *cells))
    machine = ", ".join(f"{key} {value}" for key, value in document["machine"].items())
    command = " ".join(f"{key}={getattr(settings, key)}" for key in ("rows", "shards", "step", "batch_size", "repeats"))
    return (
        f"# The plan of batches over {settings.rows:,} samples, {document['date']}\n\n{machine}.\n\n"
        f"```\npython scripts/benchmark_plan.py {command}\n```\n\n"
        f"{settings.shards} shards, {rows[0].buckets} aspect buckets, two caption kinds, batches of {settings.batch_size}, windows of "
        f"{settings.window_shards} shards; from an index in memory, in one thread. Median and range of {settings.repeats} runs, each with a "
        "plan of its own; the load average says how busy other work kept the machine. Memory is per million samples: of the index, of the plan once it has found the step, and the most that "
        "making it and finding the step take besides the index (traced, in a run apart). Three sources have 80, 19 and 1 % of the "
        f"shards and weights of 0.6, 0.3 and 0.1.\n\n{table}\n"
    )
