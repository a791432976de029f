"""A tiny CLIP of open_clip on disk, and shards with scores, for the tests of the selection."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from data_fixtures import encoded, picture
from safetensors.torch import save_file

from paradiffusion.curation.choosing.score_files import stamp_of, write_scores
from paradiffusion.curation.choosing.selection import Choosing, choose
from paradiffusion.data.shards import RawSample, write_shards

WIDTH = 16
CONTEXT = 12


def write_clip(folder: Path) -> Path:
    """A CLIP with random weights: features of ``WIDTH``, texts of ``CONTEXT`` tokens."""
    import open_clip

    config = {
        "embed_dim": WIDTH,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": CONTEXT, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.model.CLIP(**config)
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    return folder


def write_candidates(work: Path, captions: list[str], size: int = 96) -> Path:
    """``len(captions)`` candidates in ``work``, their shard beside it; candidate i has key ``picture-i``."""
    samples = [
        RawSample(
            f"picture-{number}", encoded(picture(number, size, size - 8 * (number % 3))), "png",
            {"captions": {"short": "a thing", "long": caption}},
        )
        for number, caption in enumerate(captions)
    ]  # fmt: skip
    (shard,) = write_shards(samples, work.parent / "shards", len(samples))
    # The score falls, so that the candidates keep this order.
    rows = [{"key": sample.key, "error": None, "aesthetic": 9.0 - number / 100} for number, sample in enumerate(samples)]
    features = np.eye(len(samples), dtype=np.float32)
    write_scores(work, str(shard), stamp_of(str(shard)), rows, features, "tiny")
    choose(work, Choosing())
    return work
