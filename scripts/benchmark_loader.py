"""Measure our loader beside plain WebDataset and MosaicML Streaming: the same samples, decoding and workers, in one run.

    python -m venv .venv-streaming && .venv-streaming/bin/pip install mosaicml-streaming webdataset   # its versions differ from ours
    python scripts/benchmark_loader.py streaming_python=.venv-streaming/bin/python

Without streaming_python= that row is left out. Further keys: workers=2 batch_size=32 resolution=256 samples=4096 width=512
height=384 batches=40 repeats=5 step_seconds= (of a batch on a GPU; default: what describe says of an H100) output=benchmarks
name=loader_cpu; workers=0 (one process, by its processor time: what a core does, however busy the machine); delay_ms=5 (of
each request for bytes of a shard: measures ours alone, in three ways).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paradiffusion.entry import run


def main(arguments: list[str]) -> int:
    """Measure, print the rows, and write the files."""
    from paradiffusion.budget.bench_loader import benchmark_loader

    stem = benchmark_loader(arguments)
    print(f"{stem}.json and {stem}.md")
    return 0


if __name__ == "__main__":
    run(main, lambda: __doc__ or "")
