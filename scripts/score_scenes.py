"""Draw held-out scenes from their paragraphs with a checkpoint, and score them beside the unbound score and the true pictures.

    python scripts/score_scenes.py --ckpt data/nano [--scenes 200] [--kind clean] [--world small]
    python scripts/score_scenes.py --ckpt data/nano --file data/paragraphs.jsonl [--world large]

The scenes are those of `make demo` (data/demo/val, made when missing), drawn with the nano preset's sampler settings; or
paragraphs that people wrote, each with its scene: lines of JSON with `text`, `world` and the scene's own keys.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paradiffusion.data.demo import draw, scene_from_meta
from paradiffusion.data.demo_captions import KINDS
from paradiffusion.entry import run
from paradiffusion.errors import UserError
from paradiffusion.training.validation import HeldOut


def written(path: Path, world: str) -> list[HeldOut]:
    """The paragraphs of one world in a file of JSON lines."""
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        found = [(row["text"], scene_from_meta(row)) for row in rows if row["world"] == world]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--file {path} holds no paragraphs with scenes ({error}); see data/paragraphs.jsonl.") from None
    if not found:
        raise UserError(f"--file {path} has no paragraph of the {world} world; choose another with --world.")
    return [
        HeldOut(f"{path.name}:{number}", np.asarray(draw(scene)), text, text, text, "", scene)
        for number, (text, scene) in enumerate(found)
    ]


def main(arguments: list[str]) -> int:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default="data/nano", help="a run, a stage or a checkpoint")
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--kind", default="clean", choices=KINDS, help="the captions that are drawn from")
    parser.add_argument("--world", default=None, help="data.world: small or large")
    parser.add_argument("--file", type=Path, default=None, help="paragraphs with their scenes, in place of the held-out ones")
    parser.add_argument("--guidance", type=float, default=None, help="default: the nano preset's")
    options = parser.parse_args(arguments)
    from paradiffusion.compose import compose_train
    from paradiffusion.evaluation.report import alignment_table
    from paradiffusion.models.inference import load_models
    from paradiffusion.models.manifest import resolve_checkpoint
    from paradiffusion.training.setup import open_data
    from paradiffusion.training.validation import Validation

    overrides = [f"validation.scenes={options.scenes}", "validation.samples=0", f"validation.paragraph={options.kind}"]
    overrides += [f"data.world={options.world}"] if options.world else []
    config = compose_train(["stage=3", "validation.unseen=0", *overrides])
    most = config.data.demo_sizes["val"]
    if not 1 <= options.scenes <= most:
        raise UserError(
            f"--scenes {options.scenes} is out of range; expected 1 to {most}, the size of the held-out set."
        )
    config.sampler.guidance = config.sampler.guidance if options.guidance is None else options.guidance
    items = None if options.file is None else written(options.file, config.data.world)
    models = load_models(resolve_checkpoint(options.ckpt))
    held_out = open_data(config)[1] if items is None else None
    validation = Validation(held_out, config, 0, 1, gather=lambda items: items)
    validation.items = validation.items if items is None else items[: options.scenes]
    print(alignment_table(options.ckpt, validation.alignment(models)))
    return 0


if __name__ == "__main__":
    run(main, lambda: __doc__ or "")
