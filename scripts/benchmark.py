"""Measure training steps, sampling and text encoding beside a plain reference with the same libraries.

    python scripts/benchmark.py                                        # nano, on a processor or a GPU
    python scripts/benchmark.py preset=paper resolution=512 switches=channels_last,compile,fused

Weights are random and data is made up, so nothing has to be downloaded. Besides every override of train.py it takes
  stages=1,2          of training; what=step,sampler,text
  repeats=3 warmup=1  rounds (20 and 5 on a GPU); device=cpu or cuda; resolution=512 in place of the stage's own
  steps=20            of the sampler, in place of the official 100 (the default on a processor)
  switches=channels_last,compile,fused   which to measure beside; switches=none for none. async_save takes checkpoints; of what
                      has no key a step without it is measured: reads and cudnn_benchmark, null_prompt (stages 1 and 3),
                      adapter_casts (stage 2), frozen_fp32 (with unet.lora_rank)
  output=benchmarks name=FILE            where FILE.json and FILE.md are written
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paradiffusion.entry import run


def main(arguments: list[str]) -> int:
    """Measure, print each row when it is there, and write the files."""
    from paradiffusion.budget.benchmark import benchmark

    stem, rows = benchmark(arguments)
    print(f"{len(rows)} rows in {stem}.json and {stem}.md")
    return 0


if __name__ == "__main__":
    run(main, lambda: __doc__ or "")
