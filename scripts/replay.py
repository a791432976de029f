"""The exact batch of a training step again: images as cropped, captions as chosen and as cut, times, and losses.

    python scripts/replay.py run=runs/NAME/stage1 step=48210

Writes a page sorted by loss (index.html), a line for each sample (samples.jsonl), what is told of the step
(replay.json) and the crops (images/) to runs/NAME/stage1/replay/step_048210/. Steps are counted from 0, as in
samples_seen/ and in the sentence that tells of a loss spike. Nothing else in the run is touched, and it may go on meanwhile.

  run=      a stage's folder
  step=     which one
  ckpt=     a checkpoint, stage or run whose EMA weights the losses are taken with; else the weights that the step had, where
            its checkpoint is there, the EMA weights of the newest before it, or the first weights where there is none
  output=   another folder for what is written
  shards=   where data.shards lies now, if it has moved
  world=    the number of processes that the step ran on, where log_samples=true did not record it: who had which sample
  device=   cpu, cuda or cuda:1; else a GPU where there is one
  force=    true: also where the data has changed since, as what the step would be now

With log_samples=true a run records digests of what each step saw, and the page says whether this is the same to the byte.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paradiffusion.entry import run


def main(arguments: list[str]) -> int:
    """Write the replay and say where it is."""
    from paradiffusion.compose import compose_options
    from paradiffusion.curation.inspecting.replay import ReplayOptions, replay

    found, page = replay(compose_options(ReplayOptions, arguments))
    print(found.verdict)
    print(f"{page}: {len(found.samples)} samples, sorted by loss")
    return 0


if __name__ == "__main__":
    run(main, lambda: __doc__ or "")
