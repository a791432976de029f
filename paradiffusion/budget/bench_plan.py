"""Benchmark of index and batch plan: time and memory of a start, and of finding a far step, over many samples.

What is measured runs in a process of its own (``python -m paradiffusion.budget.bench_plan FOLDER SETTINGS``), over shards that
are indexed and hold nothing.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from paradiffusion.budget.results import Results, answer_of, machine, spread
from paradiffusion.checks import not_negative, one_of, positive
from paradiffusion.compose import compose_options
from paradiffusion.config import option
from paradiffusion.data.images import make_buckets
from paradiffusion.data.index import ROW, SampleIndex, _stamp, _store, join_indexes, load_index, of_one_shard
from paradiffusion.data.plan import BatchPlan, Share
from paradiffusion.errors import UserError

CAPTIONS = {"short": 0.5, "long": 0.5}
# Of the shards and of the samples, where there are three sources: a large one is not drawn in proportion to its size.
THREE = ((0.80, 0.6), (0.19, 0.3), (0.01, 0.1))


@dataclass
class PlanBench:
    """What is measured; scripts/benchmark_plan.py says what each key is."""

    rows: int = option(20_000_000, accepts=positive)
    shards: int = option(2000, accepts=positive)
    step: int = option(1_000_000, accepts=not_negative)
    batch_size: int = option(256, accepts=positive)
    window_shards: int = option(16, accepts=positive)
    sources: str = option("1,3", accepts=one_of("1", "3", "1,3"))
    repeats: int = option(5, accepts=positive)
    output: str = "benchmarks"
    name: str = "plan_cpu"


def bounds_of(sources: int) -> list[float]:
    """Where each source's shards begin and end, as shares of all."""
    return [sum(part for part, _ in THREE[:number]) for number in range(4)] if sources == 3 else [0.0, 1.0]


def make_index(rows: int, shards: int, sources: int = 1, seed: int = 0) -> SampleIndex:
    """A table as ``load_index`` makes it, of ``rows`` samples that exist nowhere, with keys of nine digits."""
    rng = np.random.default_rng(seed)
    table = np.zeros(rows, ROW)
    table["width"], table["height"] = rng.integers(300, 900, rows), rng.integers(300, 900, rows)
    words = np.stack([rng.integers(1, 30, rows), rng.integers(0, 200, rows)], axis=1).astype(np.uint16)
    bounds = [round(shards * part) for part in bounds_of(sources)]
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
    """The plan that is measured: the aspect buckets of 512 pixels, two caption kinds."""
    buckets = make_buckets(512, 32, 2.0)  # 9 of them
    shares = [Share(weight) for _, weight in THREE] if len(index.sources) == 3 else None
    return BatchPlan(index, settings.batch_size, 0, buckets, CAPTIONS, settings.window_shards, shares)


def write_set(folder: Path, settings: PlanBench) -> None:
    """Empty shards, and the indexes of what they would hold."""
    for number, rows in enumerate(np.diff(np.arange(settings.shards + 1) * settings.rows // settings.shards).tolist()):
        made = make_index(rows, 1, seed=number)
        path = folder / f"{number:06d}.tar"
        path.touch()
        made.table["key_hash"] = made.ids
        columns = {name: getattr(made, name) for name in ("words", "kinds", "key_bytes", "key_starts")}
        _store(path, of_one_shard(path, made.table, **columns), _stamp(path), None)


def memory() -> dict[str, int]:
    """Bytes of this process, by the names of smaps_rollup."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    return {name: int(size.split()[0]) << 10 for name, size in (line.split(":") for line in lines)}


def measure_start(folder: Path, settings: PlanBench, sources: int) -> dict[str, float]:
    """One start in this process. In seconds: ``start`` from the shards' paths to the plan, ``seek`` the batch of the far step,
    ``next_batch`` the mean of the next 1000. In bytes: ``private``, the memory that index and plan then add to the process's own
    (anonymous), and ``shared``, what of the mapped columns is in memory."""
    before, began = memory(), time.perf_counter()
    shards = sorted(folder.glob("*.tar"))
    bounds = [round(len(shards) * part) for part in bounds_of(sources)]
    indexes = [load_index(shards[low:high]) for low, high in pairwise(bounds)]
    plan = make(join_indexes(indexes, [f"source {number}" for number in range(sources)]), settings)
    started = time.perf_counter()
    plan.batch(settings.step)
    found = time.perf_counter()
    for step in range(settings.step + 1, settings.step + 1001):
        plan.batch(step)
    ended, now = time.perf_counter(), memory()
    return {
        "start": started - began, "seek": found - started, "next_batch": (ended - found) / 1000,
        "private": now["Anonymous"] - before["Anonymous"],
        "shared": (now["Rss"] - now["Anonymous"]) - (before["Rss"] - before["Anonymous"]),
    }  # fmt: skip


def benchmark_plan(arguments: list[str]) -> Path:
    """Measure each number of sources, and write ``<output>/<name>.json`` and ``.md``; returns their stem.

    A row has ``first``, the seconds of the first start, which writes the columns, what each of the ``repeats`` then came to, and
    ``disk``, the columns' bytes."""
    settings = compose_options(PlanBench, arguments)
    if settings.rows < settings.shards or settings.shards < 100:
        raise UserError(f"rows={settings.rows} shards={settings.shards} is too small; expected 100 shards, and a row for each.")
    about = (
        f"{settings.rows:,} samples in {settings.shards} indexed shards, 9 aspect buckets, two caption kinds, batches of "
        f"{settings.batch_size}, windows of {settings.window_shards} shards, in one thread. A start goes from the shards' paths to a "
        f"plan; the first one writes the columns that the others map. Median and range of {settings.repeats} starts, each a process of "
        "its own; the load average says how busy other work kept the machine. Private is the anonymous memory that index and plan add "
        "to the process once the step and 1000 more are found, shared what of the columns it has touched. Three sources have 80, 19 "
        "and 1 % of the shards and weights of 0.6, 0.3 and 0.1; their columns lie there apart and joined."
    )
    head = ("sources", "first start", "start", f"step {settings.step:,} found", "each next batch", "private", "shared", "on disk")
    command = " ".join(["python scripts/benchmark_plan.py", *arguments])
    document = {"machine": machine(), "command": command, "settings": asdict(settings)}
    results = Results(settings, f"Index and plan over {settings.rows:,} samples", about, head, document)
    with tempfile.TemporaryDirectory(prefix="benchmark-plan-") as name:
        folder = Path(name)
        write_set(folder, settings)
        for sources in map(int, settings.sources.split(",")):
            given = json.dumps({**asdict(settings), "sources": sources})
            first, *runs = [answer_of("paradiffusion.budget.bench_plan", name, given) for _ in range(1 + settings.repeats)]
            disk = sum(file.stat().st_size for file in folder.glob("*.columns/**/*.npy"))
            found: dict[str, list[Any]] = {key: [run[key] for run in runs] for key in runs[0]}
            private, shared = (spread([size / 1e6 for size in found[key]], ".0f", " MB") for key in ("private", "shared"))
            results.add({"sources": sources, "first": first["start"], **found, "disk": disk}, [
                str(sources), f"{first['start']:.1f} s", spread(found["start"], ".3f", " s"), spread(found["seek"], ".3f", " s"),
                f"{statistics.median(found['next_batch']) * 1e3:.2f} ms", private, shared, f"{disk / 1e6:.0f} MB",
            ])  # fmt: skip
    return results.stem


if __name__ == "__main__":
    _given = json.loads(sys.argv[2])
    _sources = _given.pop("sources")
    print(json.dumps(measure_start(Path(sys.argv[1]), PlanBench(**_given), _sources)))
