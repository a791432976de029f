"""Draw held-out scenes from their paragraphs with a checkpoint, and score them beside the unbound score and the true pictures.

    python scripts/score_scenes.py --ckpt data/nano [--scenes 200] [--kind clean] [--world small] [--steps 20]

The scenes are those of `make demo` (data/demo/val, made when missing), drawn with the checkpoint's own sampler settings.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paradiffusion.entry import run
from paradiffusion.errors import UserError
from paradiffusion.scenes.captions import KINDS


def main(arguments: list[str]) -> int:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default="data/nano", help="a run, a stage or a checkpoint")
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--kind", default="clean", choices=KINDS, help="the captions that are drawn from")
    parser.add_argument("--world", default=None, help="data.world: small or large")
    parser.add_argument("--guidance", type=float, default=None, help="default: the checkpoint's")
    parser.add_argument("--steps", type=int, default=None, help="default: the checkpoint's")
    options = parser.parse_args(arguments)
    from paradiffusion.checkpoints.layouts import find_checkpoint
    from paradiffusion.compose import compose_train
    from paradiffusion.config import SampleConfig
    from paradiffusion.data.plan import open_shards
    from paradiffusion.sampling.pipeline import load_models, sampler_settings
    from paradiffusion.sampling.sampler import check_distilled
    from paradiffusion.scenes.alignment import SceneScorer, alignment_table
    from paradiffusion.scenes.dataset import make_wanted
    from paradiffusion.training.validation import Validation

    overrides = [f"validation.scenes={options.scenes}", "validation.samples=0", f"validation.paragraph={options.kind}"]
    overrides += [f"data.world={options.world}"] if options.world else []
    config = compose_train(["stage=3", "validation.unseen=0", *overrides])
    most = config.data.demo_sizes["val"]
    if not 1 <= options.scenes <= most:
        raise UserError(f"--scenes {options.scenes} is out of range; expected 1 to {most}, the size of the held-out set.")
    config.data.demo_sizes = {"val": most}  # training sets of other sizes stay as they are
    models = load_models(find_checkpoint(options.ckpt))
    wanted = SampleConfig(steps=options.steps, guidance=options.guidance)
    config.sampler = sampler_settings(wanted, models.sampler)
    check_distilled(models.objective, config.sampler, models.sampler, negative=False)
    make_wanted(config.data)
    held_out = open_shards(config.data, config.data.val_shards, "data.val_shards")
    validation = Validation(held_out, config, 0, 1, gather=lambda items: items, scorer=SceneScorer())
    print(alignment_table(options.ckpt, validation.alignment(models)))
    return 0


if __name__ == "__main__":
    run(main, lambda: __doc__ or "")
