"""Our loader beside plain WebDataset and MosaicML Streaming: the same samples, decoding and workers, in turn, in one run."""

from __future__ import annotations

import datetime
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from paradiffusion.budget.bench_readers import ReaderSettings
from paradiffusion.budget.benchmark import machine
from paradiffusion.budget.synthetic import captions
from paradiffusion.checks import positive
from paradiffusion.data.loader import _THREADS
from paradiffusion.data.shards import RawSample, write_shards
from paradiffusion.errors import UserError
from paradiffusion.text.conditioning import padded_length

ROOT = Path(__file__).resolve().parents[2]
PICTURES = 256  # different ones; samples beyond that share them, under keys of their own
MULTIPLES = (1, 8, 32)  # padded to the longest caption itself, as conditioning.pad_multiple has it, and to fewer shapes
PREFETCHED = 4  # batches a worker may have made while it was not its turn


@dataclass
class LoaderBench:
    """The keys of the command line.

    Attributes:
        streaming_python: the interpreter of an environment with mosaicml-streaming; None leaves that row out.
        step_seconds: of one batch on a GPU, for the share of a step spent waiting.
        samples, width, height: of the set that is made: JPEG of quality 90.
        batches, repeats: batches of a round, and rounds.
        delay_ms: of each request for bytes of a shard. Over 0, ours is measured beside itself with one request at a time in
            each worker, and with whole shards fetched first, rather than beside others.
    """

    streaming_python: str | None = None
    workers: int = 2
    batch_size: int = 32
    resolution: int = 256
    samples: int = 4096
    width: int = 512
    height: int = 384
    batches: int = 40
    repeats: int = 5
    step_seconds: float | None = None
    delay_ms: float = 0.0
    output: str = "benchmarks"
    name: str = "loader_cpu"

    def check(self) -> None:
        for key in ("batch_size", "resolution", "samples", "width", "height", "batches", "repeats"):
            positive(key, getattr(self, key))
        positive("workers", self.workers, zero=True)
        positive("delay_ms", self.delay_ms, zero=True)
        if self.streaming_python is not None and not Path(self.streaming_python).is_file():
            raise UserError(
                f"streaming_python={self.streaming_python} is no file; expected the python of an environment with "
                "mosaicml-streaming, such as .venv-streaming/bin/python."
            )


@dataclass
class LoaderRow:
    """What was measured of one way of reading.

    Attributes:
        rates: samples per second of each round.
        padded: share of computed tokens that are padding, by the multiple that a batch's longest caption is rounded up to.
    """

    name: str
    version: str
    resumable: str
    rates: list[float]
    padded: dict[int, float]
    waiting: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.rates)


WAYS = {
    "ours": ("paradiffusion", "exactly, on any number of processes and workers"),
    "webdataset": ("webdataset", "no"),
    "streaming": ("mosaicml-streaming", "exactly, within its canonical nodes"),
    "one at a time": ("paradiffusion", "exactly, on any number of processes and workers"),
    "whole shards": ("paradiffusion", "exactly, on any number of processes and workers"),
}


def write_set(folder: Path, settings: LoaderBench) -> dict[str, str]:
    """Shards of JPEG pictures with captions of ParaImage-Big's lengths; the captions by key."""
    texts = captions("long", settings.samples)
    pictures = [picture(number, settings.width, settings.height) for number in range(min(PICTURES, settings.samples))]

    def rows() -> Iterator[RawSample]:
        for number, text in enumerate(tqdm(texts, desc="writing samples", unit="sample")):
            yield RawSample(f"{number:06d}", pictures[number % PICTURES], "jpg", {"captions": {"long": text}})

    write_shards(rows(), folder, samples_per_shard=512)
    return {f"{number:06d}": text for number, text in enumerate(texts)}


def picture(number: int, width: int, height: int) -> bytes:
    """A JPEG with shapes of all sizes, which costs about as much to decode as a photograph of its size."""
    rng = np.random.default_rng(number)
    total = np.zeros((height, width, 3))
    for side in (4, 16, 64):
        coarse = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        total += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), float)
    file = io.BytesIO()
    Image.fromarray((total / 3).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


class Child:
    """A way of reading in its own process, waiting for its turn."""

    def __init__(self, name: str, python: str, settings: ReaderSettings) -> None:
        self.name = name
        self.drop = PREFETCHED * max(settings.workers, 1)
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process
        self.process = subprocess.Popen(
            command(name, python, settings), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
            cwd=ROOT, env=environment(), start_new_session=True,
        )  # fmt: skip
        try:
            self.answer()
        except BaseException:
            self.close()
            raise

    def ask(self, count: int, work: float = 0.0) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{self.drop} {count} {work}\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next line of JSON; other lines are what its libraries print."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        self.log.seek(0)
        last = (self.log.read().strip().splitlines() or ["no word"])[-1]
        raise UserError(f"the {self.name} reader ended before its turn ({last}); try it alone to see more.")

    def close(self) -> None:
        """End it with its workers: some libraries' outlive it, and would slow whatever is measured next."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()


def command(name: str, python: str, settings: ReaderSettings) -> list[str]:
    return [python, "-m", "paradiffusion.budget.bench_readers", name, json.dumps(asdict(settings))]


def environment() -> dict[str, str]:
    """One thread a process: workers are what is compared."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def measure(settings: LoaderBench, folder: Path, step_seconds: float, count: Any) -> list[LoaderRow]:
    """All ways in turn, ``repeats`` rounds; ``count`` gives the tokens of a list of captions."""
    texts = write_set(folder, settings)
    tokens = dict(zip(texts, count(list(texts.values())), strict=True))
    reading = ReaderSettings(
        str(folder), settings.resolution, settings.batch_size, settings.workers, delay_ms=settings.delay_ms
    )
    pythons = dict.fromkeys(
        ["ours", "one at a time", "whole shards"] if settings.delay_ms else ["ours", "webdataset"], sys.executable
    )
    if settings.streaming_python is not None and not settings.delay_ms:
        pythons["streaming"] = settings.streaming_python
        written = subprocess.run(
            command("write_mds", settings.streaming_python, reading), capture_output=True, text=True, check=False, cwd=ROOT,
            env=environment(),
        )  # fmt: skip
        if written.returncode:
            last = (written.stderr.strip().splitlines() or ["no word"])[-1]
            raise UserError(
                f"{settings.streaming_python} cannot write Streaming's shards ({last}); expected an environment with "
                "mosaicml-streaming, webdataset, and torch and torchvision of one release."
            )
    children: list[Child] = []
    rates: dict[str, list[float]] = {name: [] for name in pythons}
    keys: dict[str, list[list[str]]] = {name: [] for name in pythons}
    try:
        for name, python in pythons.items():
            children.append(Child(name, python, reading))
        for turn in tqdm(range(settings.repeats), desc="rounds", unit="round"):
            for child in children[turn % len(children) :] + children[: turn % len(children)]:
                answer = child.ask(settings.batches)
                rates[child.name].append(settings.batches * settings.batch_size / answer["seconds"])
                keys[child.name] += answer["keys"]
        waits = {}
        for child in children:
            answer = child.ask(settings.batches, step_seconds)
            waits[child.name] = answer["waited"] / answer["seconds"]
    finally:
        for child in children:
            child.close()
    rows = []
    for name in rates:
        lengths = [[tokens[key] for key in batch] for batch in keys[name]]
        package, resumable = WAYS[name]
        shares = {multiple: padding(lengths, multiple) for multiple in MULTIPLES}
        rows.append(LoaderRow(name, version_in(pythons[name], package), resumable, rates[name], shares, waits[name]))
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
    """Measure, and write ``<output>/<name>.json`` and ``.md``; returns their stem and the rows.

    Args:
        step_seconds: of one batch on a GPU.
        count: captions to their numbers of tokens.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-loader-") as folder:
        rows = measure(settings, Path(folder), step_seconds, count)
    stem = Path(settings.output) / settings.name
    stem.parent.mkdir(parents=True, exist_ok=True)
    shown = asdict(replace(settings, streaming_python="PYTHON" if settings.streaming_python else None))
    document = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "machine": machine("cpu"),
        "settings": {**shown, "step_seconds": step_seconds},
        "rows": [asdict(row) for row in rows],
    }
    stem.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    stem.with_suffix(".md").write_text(as_markdown(document, rows))
    return stem, rows


def as_markdown(document: dict[str, Any], rows: list[LoaderRow]) -> str:
    """The results for a person."""
    s = document["settings"]
    first = rows[0].rates
    lines = [
        f"# Reading data, {document['machine']['processor']}, {document['date']}",
        "",
        f"{s['samples']} JPEG pictures of {s['width']}x{s['height']} pixels, cut to {s['resolution']}x{s['resolution']}, with "
        f"captions of ParaImage-Big's lengths; batches of {s['batch_size']}, {s['workers']} worker processes of one thread, "
        f"{s['repeats']} rounds of {s['batches']} batches in turn. Decoding, resizing and collation are the same function in "
        "all rows. The ratio is ours to that row, by round: median (lowest to highest). Waiting is the share of a step spent "
        f"for data when a step takes {s['step_seconds']:.2f} s a batch, as an H100 would at 40 % of its peak in stage 1 of "
        "preset=paper (`scripts/describe.py`); the GPU is a sleep.",
        "",
        "Padding: the share of computed tokens, batches padded to their longest caption, and to the next multiple of 8 "
        "(conditioning.pad_multiple's default) or 32.",
        "",
        "| way | version | samples/s (range) | ours / it | padding | x8 | x32 | waiting | resumes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratios = sorted(mine / theirs for mine, theirs in zip(first, row.rates, strict=True))
        ratio = (
            "1" if row is rows[0] else f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )  # by round: what else the machine does meets neighbours alike
        lines.append(
            f"| {row.name} | {row.version} | {row.median:.0f} ({min(row.rates):.0f} to {max(row.rates):.0f}) | {ratio} | "
            f"{' | '.join(f'{share:.1%}' for share in row.padded.values())} | {row.waiting:.2%} | {row.resumable} |"
        )
    if s["delay_ms"]:
        lines[2] += (
            f" Each request for bytes of a shard waits {s['delay_ms']:g} ms; a worker has {_THREADS} of them on the way, or one at a "
            "time, or fetches whole shards to a disk here first, 16 MB a request."
        )
    return "\n".join([*lines, ""])
