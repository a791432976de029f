"""Benchmark of the loader: ours beside plain WebDataset and MosaicML Streaming, the same samples, decoding and workers, in
turn, in one run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from paradiffusion.budget.bench_readers import ReaderSettings
from paradiffusion.budget.results import machine, processor, today, write_results
from paradiffusion.budget.synthetic import write_samples
from paradiffusion.checks import not_negative, positive
from paradiffusion.config import option
from paradiffusion.data.loader import _THREADS
from paradiffusion.errors import UserError
from paradiffusion.pages import markdown_table
from paradiffusion.repository import PACKAGE
from paradiffusion.text.conditioning import padded_length

MULTIPLES = (1, 8, 64)  # padded to the longest caption itself, as conditioning.pad_multiple has it, and to fewer shapes
# The package of each way, and whether it resumes.
WAYS = {
    "ours": ("paradiffusion", "exactly, on any number of processes and workers"),
    "webdataset": ("webdataset", "no"),
    "streaming": ("mosaicml-streaming", "exactly, within its canonical nodes"),
    "one at a time": ("paradiffusion", "exactly, on any number of processes and workers"),
    "whole shards": ("paradiffusion", "exactly, on any number of processes and workers"),
}
HEADER = ["way", "version", "samples/s (range)", "ours / it", "padding", "x8", "x64", "waiting", "resumes"]


@dataclass
class LoaderBench:
    """The keys of the command line, which scripts/benchmark_loader.py explains.

    With ``delay_ms`` over 0, ours is measured beside itself with one request at a time in each worker, and with whole shards
    fetched first, rather than beside others.
    """

    streaming_python: str | None = None
    workers: int = option(2, accepts=not_negative)
    batch_size: int = option(32, accepts=positive)
    resolution: int = option(256, accepts=positive)
    samples: int = option(4096, accepts=positive)
    width: int = option(512, accepts=positive)
    height: int = option(384, accepts=positive)
    batches: int = option(40, accepts=positive)
    repeats: int = option(5, accepts=positive)
    step_seconds: float | None = None
    delay_ms: float = option(0.0, accepts=not_negative)
    output: str = "benchmarks"
    name: str = "loader_cpu"

    def check(self) -> None:
        """Raise UserError for an interpreter that is not there."""
        if self.streaming_python is not None and not Path(self.streaming_python).is_file():
            raise UserError(
                f"streaming_python={self.streaming_python} is no file; expected the python of an environment with "
                "mosaicml-streaming, such as .venv-streaming/bin/python."
            )


@dataclass
class LoaderRow:
    """What was measured of one way of reading: samples per second of each round; the share of computed tokens that are padding, by
    the multiple that a batch's longest caption is rounded up to; and that of a step that went by before its batch was there."""

    name: str
    version: str
    resumable: str
    rates: list[float]
    padded: dict[int, float]
    waiting: float


def run_way(name: str, python: str, settings: ReaderSettings) -> dict[str, Any]:
    """What one way of reading answers, from a process of its own with one thread: workers are what is compared."""
    line = [python, "-m", "paradiffusion.budget.bench_readers", name, json.dumps(asdict(settings))]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    child = subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, cwd=PACKAGE.parent, env=environment, start_new_session=True)
    try:
        out, errors = child.communicate()
    finally:  # with its workers: some libraries' outlive it, and would slow whatever is measured next
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL) if hasattr(os, "killpg") else child.kill()
    found = [row for row in out.splitlines() if row.startswith("{")]  # other lines are what its libraries print
    if not found:
        last = (errors.strip().splitlines() or ["no word"])[-1]
        raise UserError(f"the {name} reader in {python} ended before it had read ({last}); try it alone to see more.")
    return json.loads(found[-1])  # type: ignore[no-any-return]


def measure(settings: LoaderBench, folder: Path, step_seconds: float, count: Any) -> list[LoaderRow]:
    """All ways in turn, ``repeats`` rounds; ``count`` gives the tokens of a list of captions."""
    texts = write_samples(folder, settings.samples, settings.width, settings.height, ["long"])["long"]
    tokens = {f"{number:06d}": length for number, length in enumerate(count(texts))}
    reading = ReaderSettings(
        str(folder), settings.resolution, settings.batch_size, settings.workers, settings.batches, delay_ms=settings.delay_ms
    )  # fmt: skip
    ways = ["ours", "one at a time", "whole shards"] if settings.delay_ms else ["ours", "webdataset"]
    pythons = dict.fromkeys(ways, sys.executable)
    if settings.streaming_python is not None and not settings.delay_ms:
        pythons["streaming"] = settings.streaming_python
        run_way("write_mds", settings.streaming_python, reading)
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in pythons}
    names = list(pythons)
    for turn in tqdm(range(settings.repeats), desc="rounds", unit="round"):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            answers[name].append(run_way(name, pythons[name], replace(reading, seed=turn)))
    rows = []
    for name, python in pythons.items():
        package, resumable = WAYS[name]
        rates = [settings.batches * settings.batch_size / answer["seconds"] for answer in answers[name]]
        lengths = [[tokens[key] for key in batch] for answer in answers[name] for batch in answer["keys"]]
        shares = {multiple: padding(lengths, multiple) for multiple in MULTIPLES}
        busy = run_way(name, python, replace(reading, work=step_seconds))
        waiting = busy["waited"] / busy["seconds"]
        rows.append(LoaderRow(name, version_in(python, package), resumable, rates, shares, waiting))
    return rows


def padding(batches: list[list[int]], multiple: int) -> float:
    """The share of computed tokens that are padding."""
    computed = sum(len(batch) * padded_length(max(batch), 10**6, True, multiple) for batch in batches)
    return 1 - sum(map(sum, batches)) / computed


def version_in(python: str, package: str) -> str:
    asked = f"from importlib.metadata import version; print(version({package!r}))"
    found = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=False).stdout.strip()
    return found or "this repository"


def benchmark_loader(settings: LoaderBench, step_seconds: float, count: Any) -> tuple[Path, list[LoaderRow]]:
    """Measure, and write ``<output>/<name>.json`` and ``.md``; returns their stem and the rows. ``step_seconds`` are those of one
    batch on a GPU, ``count`` takes captions to their numbers of tokens."""
    with tempfile.TemporaryDirectory(prefix="benchmark-loader-") as folder:
        rows = measure(settings, Path(folder), step_seconds, count)
    s = replace(settings, streaming_python="PYTHON" if settings.streaming_python else None, step_seconds=step_seconds)
    document = {"date": today(), "machine": machine(), "settings": asdict(s), "rows": [asdict(row) for row in rows]}

    def cells(row: LoaderRow) -> list[str]:
        # By round: what else the machine does meets neighbours alike.
        ratios = sorted(mine / theirs for mine, theirs in zip(rows[0].rates, row.rates, strict=True))
        ratio = "1" if row is rows[0] else f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        rate = f"{median(row.rates):.0f} ({min(row.rates):.0f} to {max(row.rates):.0f})"
        shares = [f"{share:.1%}" for share in row.padded.values()]
        return [row.name, row.version, rate, ratio, *shares, f"{row.waiting:.2%}", row.resumable]

    delay = (
        f" Each request for bytes of a shard waits {s.delay_ms:g} ms; a worker has {_THREADS} of them on the way, or one at a time, or "
        "fetches whole shards to a disk here first, 16 MB a request."
    )
    expected = ", as an H100 would at 40 % of its peak in stage 1 of preset=paper (`scripts/describe.py`)"
    readers = f"{s.workers} worker processes of one thread" if s.workers else "one process, by its processor time"
    text = (
        f"# Reading data, {processor()}, {document['date']}\n\n"
        f"{s.samples} JPEG pictures of {s.width}x{s.height} pixels, cut to {s.resolution}x{s.resolution}, with captions of "
        f"ParaImage-Big's lengths; batches of {s.batch_size}, {readers}, {s.repeats} rounds of "
        f"{s.batches} batches in turn. Decoding, resizing and collation are the same function in all rows. The ratio is ours to that "
        "row, by round: median (lowest to highest). Waiting is the share of a step spent for data when a step takes "
        f"{step_seconds:.2f} s a batch{expected if settings.step_seconds is None else ''}; the GPU is a sleep."
        f"{delay if s.delay_ms else ''}\n\nPadding: the share of computed tokens, batches padded to their longest caption, "
        "and to the next multiple "
        f"of 8 (conditioning.pad_multiple's default) or 64.\n\n{markdown_table(HEADER, map(cells, rows))}\n"
    )
    return write_results(settings.output, settings.name, document, text), rows
