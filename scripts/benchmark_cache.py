"""Measure stage-1 steps of preset=nano with and without a cache, in turn in one process, and compare their losses.

    python scripts/benchmark_cache.py

It draws its own scenes and makes the cache itself, within two or three minutes on one core. Besides every override of
train.py it takes
  steps=30 warmup=3             counted steps, and those before them
  output=benchmarks name=cache_cpu   where NAME.json and NAME.md are written
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paradiffusion.entry import run


def main(arguments: list[str]) -> int:
    """Measure, print each row when it is there, and write the files."""
    from paradiffusion.budget.bench_cache import benchmark_cache

    stem = benchmark_cache(arguments)
    print(f"{stem}.json and {stem}.md")
    return 0


if __name__ == "__main__":
    run(main, lambda: __doc__ or "")
