"""Benchmark of the loader: ours beside plain WebDataset and MosaicML Streaming, the same samples, decoding and workers, in
turn, in one run."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from paradiffusion.budget.describe import Question, describe
from paradiffusion.budget.results import Results, answer_of, machine, spread
from paradiffusion.budget.synthetic import write_samples
from paradiffusion.checks import not_negative, positive
from paradiffusion.compose import compose_options, compose_train
from paradiffusion.config import option
from paradiffusion.data.loader import _THREADS
from paradiffusion.errors import UserError
from paradiffusion.text.conditioning import padded_length
from paradiffusion.text.sources import locate
from paradiffusion.text.tokenizer import load_tokenizer

MULTIPLES = (1, 8, 64)  # padded to the longest caption itself, as conditioning.pad_multiple has it, and to fewer shapes
OURS = "exactly, on any number of processes and workers"
RESUMES = {"webdataset": "no", "streaming": "exactly, within its canonical nodes"}
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
    step_seconds: float | None = option(None, accepts=positive)
    delay_ms: float = option(0.0, accepts=not_negative)
    output: str = "benchmarks"
    name: str = "loader_cpu"


def run_way(name: str, python: str, settings: LoaderBench, folder: Path, **more: float) -> dict[str, Any]:
    """What one way of reading the shards in ``folder`` answers, from a process of its own with one thread: workers are what is
    compared."""
    given = json.dumps({"shards": str(folder), "work": 0.0, "seed": 0, **asdict(settings), **more})
    return answer_of("paradiffusion.budget.bench_readers", name, given, python=python)


def measure(settings: LoaderBench, folder: Path, step_seconds: float) -> list[dict[str, Any]]:
    """All ways in turn, ``repeats`` rounds. A row of each: ``rates``, samples per second of each round; ``padded``, the share of
    computed tokens that are padding, by the multiple that a batch's longest caption is rounded up to; and ``waiting``, that of a step
    of ``step_seconds`` that went by before its batch was there."""
    texts = write_samples(folder, settings.samples, settings.width, settings.height, ["long"])["long"]
    tokenizer = load_tokenizer(locate(compose_train([]).text_encoder))
    tokens = {f"{number:06d}": len(ids) for number, ids in enumerate(tokenizer(texts)["input_ids"])}
    pythons = dict.fromkeys(["ours", "one at a time", "whole shards"] if settings.delay_ms else ["ours", "webdataset"], sys.executable)
    if settings.streaming_python is not None and not settings.delay_ms:
        pythons["streaming"] = settings.streaming_python
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in pythons}
    names = list(pythons)
    for turn in tqdm(range(settings.repeats), desc="rounds", unit="round"):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            answers[name].append(run_way(name, pythons[name], settings, folder, seed=turn))
    rows = []
    for name, python in pythons.items():
        lengths = [[tokens[key] for key in batch] for answer in answers[name] for batch in answer["keys"]]
        busy = run_way(name, python, settings, folder, work=step_seconds)
        rows.append({
            "name": name,
            "version": busy["version"],
            "resumable": RESUMES.get(name, OURS),
            "rates": [settings.batches * settings.batch_size / answer["seconds"] for answer in answers[name]],
            "padded": {multiple: padding(lengths, multiple) for multiple in MULTIPLES},
            "waiting": busy["waited"] / busy["seconds"],
        })  # fmt: skip
    return rows


def padding(batches: list[list[int]], multiple: int) -> float:
    """The share of computed tokens that are padding."""
    computed = sum(len(batch) * padded_length(max(batch), 10**6, True, multiple) for batch in batches)
    return 1 - sum(map(sum, batches)) / computed


def benchmark_loader(arguments: list[str]) -> Path:
    """Measure, and write ``<output>/<name>.json`` and ``.md``; returns their stem."""
    s = compose_options(LoaderBench, arguments)
    if s.streaming_python is not None and not Path(s.streaming_python).is_file():
        raise UserError(
            f"streaming_python={s.streaming_python} is no file; expected the python of an environment with mosaicml-streaming, such as "
            ".venv-streaming/bin/python."
        )
    step, expected = s.step_seconds, ""
    if step is None:
        stage = describe(["preset=paper", "stage=1", "data.shards=unused"], Question(gpus=1))
        step = s.batch_size / stage.throughput.samples_per_second
        expected = ", as an H100 would at 40 % of its peak in stage 1 of preset=paper (`scripts/describe.py`)"
    readers = f"{s.workers} worker processes of one thread" if s.workers else "one process, by its processor time"
    about = (
        f"{s.samples} JPEG pictures of {s.width}x{s.height} pixels, cut to {s.resolution}x{s.resolution}, with captions of "
        f"ParaImage-Big's lengths; batches of {s.batch_size}, {readers}, {s.repeats} rounds of "
        f"{s.batches} batches in turn. Decoding, resizing and collation are the same function in all rows. The ratio is ours to that "
        "row, by round: median (lowest to highest). Waiting is the share of a step spent for data when a step takes "
        f"{step:.2f} s a batch{expected}; the GPU is a sleep."
    )
    if s.delay_ms:
        about += (
            f" Each request for bytes of a shard waits {s.delay_ms:g} ms; a worker has {_THREADS} of them on the way, or one at a time, "
            "or fetches whole shards to a disk here first, 16 MB a request."
        )
    about += (
        "\n\nPadding: the share of computed tokens, batches padded to their longest caption, and to the next multiple of 8 "
        "(conditioning.pad_multiple's default) or 64."
    )
    told = asdict(replace(s, streaming_python="PYTHON" if s.streaming_python else None, step_seconds=step))
    command = " ".join(["python scripts/benchmark_loader.py", *(f"{key}={value}" for key, value in told.items() if value is not None)])
    document = {"machine": machine(), "command": command, "settings": told}
    results = Results(s, "Reading data", about, HEADER, document)
    with tempfile.TemporaryDirectory(prefix="benchmark-loader-") as folder:
        rows = measure(s, Path(folder), step)
    for row in rows:
        # By round: what else the machine does meets neighbours alike.
        ratios = [mine / theirs for mine, theirs in zip(rows[0]["rates"], row["rates"], strict=True)]
        results.add(row, [
            row["name"], row["version"], spread(row["rates"], ".0f"), "1" if row is rows[0] else spread(ratios, ".2f"),
            *(f"{share:.1%}" for share in row["padded"].values()), f"{row['waiting']:.2%}", row["resumable"],
        ])  # fmt: skip
    return results.stem
