"""Compute a stage's latents and text features once, so that training reads them instead of running the frozen models.

    python scripts/cache.py what=both stage=1 preset=paper data.shards=/data/web output=/data/web_cache
    accelerate launch scripts/cache.py what=latents stage=2 preset=paper data.shards=/data/big output=/data/big_cache
    python train.py stage=1 preset=paper data.shards=/data/web data.cache=/data/web_cache

Give it the overrides of the training that will use it: the cache records everything that its values are functions of, and
training refuses one that does not fit. The same command again goes on where it was stopped. Besides train.py's keys:
  what=both        latents, text or both; text is not to be cached where stage 2 trains the language model's adapter
  output=DIR       latents/ and text/ are made in it; data.cache=DIR takes both, data.cache=DIR/latents one of them
  dtype=           float32, bfloat16 or float16 to store; by default what the models compute in, which loses nothing
  at_once=16       images or captions that go through a model together
  readers=4        threads that read and decode, in each process
  runner=local     or ray: workers of a Ray cluster take shard after shard (docs/cluster.md);
                   runner_options='{address: auto, workers: 8, cpus: 4, gpus: 1}', workers and what each asks for
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paradiffusion.entry import run


def main(arguments: list[str]) -> int:
    """Check the command line, then make what is missing; the exit status."""
    from paradiffusion.compose import compose_train, split_options
    from paradiffusion.scenes.dataset import make_wanted
    from paradiffusion.training.caching import CacheOptions, make_cache

    options, overrides = split_options(CacheOptions, arguments)
    options.check()
    config = compose_train(overrides, beside=tuple(CacheOptions.__dataclass_fields__))
    make_wanted(config.data)
    return make_cache(config, options)


if __name__ == "__main__":
    run(main, lambda: __doc__ or "")
