"""Measure a start over many samples: index and plan of batches, finding a far step as a resumed run does, and their memory.

    python scripts/benchmark_plan.py                                   # step 1,000,000 over 20 million samples
    python scripts/benchmark_plan.py rows=1000000 sources=3 output=/tmp name=mine

The samples are made up (170 bytes of disk each, where TMPDIR says) and no image is read. Keys (key=value):
  rows=20000000 shards=2000   of the index
  step=1000000                the step to find
  batch_size=256 window_shards=16   of the plan
  sources=1,3                 numbers of sources to measure, 1 or 3
  repeats=5                   starts of each, in a process of its own
  output=benchmarks name=plan_cpu   where FILE.json and FILE.md are written
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # One core, before numpy is imported.

from paradiffusion.entry import run


def main(arguments: list[str]) -> int:
    """Measure, print each row when it is there, and write the files."""
    from paradiffusion.budget.bench_plan import benchmark_plan

    stem = benchmark_plan(arguments)
    print(f"{stem}.json and {stem}.md")
    return 0


if __name__ == "__main__":
    run(main, lambda: __doc__ or "")
