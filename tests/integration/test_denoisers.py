"""A denoiser that is no U-Net: PixArt's transformer trains, resumes, draws and is exported by the same commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import user_error
from diffusers import PixArtTransformer2DModel
from training_runs import drawn_here, newest, records, sample_here, train_here

from paradiffusion import config
from paradiffusion.checkpoints.layouts import find_checkpoint
from paradiffusion.compose import compose_train
from paradiffusion.errors import UserError
from paradiffusion.models.unet import DENOISERS
from paradiffusion.sampling.diffusers_pipeline import ParaDiffusionPipeline
from scripts.export import main as export

PIXART = [
    "unet=pixart",
    "unet.arguments={sample_size: 8, num_layers: 2, num_attention_heads: 2, attention_head_dim: 16, cross_attention_dim: 32}",
]
PROMPT = "a red circle above a blue square"


@pytest.fixture(scope="module")
def arguments(tiny_arguments: list[str]) -> list[str]:
    return [*(one for one in tiny_arguments if one != "unet=tiny"), *PIXART, "validate_every=4", "log_every=1"]


@pytest.fixture(scope="module")
def run(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 1 of eight steps, stopped after four and resumed."""
    folder = tmp_path_factory.mktemp("pixart") / "run"
    for steps in (4, 8):
        assert train_here([*arguments, f"max_steps={steps}", f"run_dir={folder}"]) == 0
    return folder


def test_it_trains_and_resumes(run: Path, arguments: list[str], tmp_path: Path) -> None:
    folder = newest(run / "stage1")
    assert not (folder / "unet").exists()
    stored = PixArtTransformer2DModel.from_pretrained(folder / "transformer")
    assert stored.config.caption_channels == 32 and stored.caption_projection is not None  # as wide as the refiner
    losses = [row["loss"] for row in records(run / "stage1")]
    assert len(losses) == 8 and np.isfinite(losses).all() and len(set(losses)) == 8
    # LoRA in the next stage, with the text projection trained whole; then a fresh run from the transformer alone.
    assert train_here([*arguments, f"run_dir={run}", "stage=2", "unet.lora_rank=2", "max_steps=2"]) == 0
    names = find_checkpoint(run).weights(merge=False)
    assert any(name.startswith("unet.transformer_blocks.0.attn2.to_q.lora_A") for name in names)
    alone = [f"init_from={folder / 'transformer'}", f"run_dir={tmp_path / 'alone'}", "max_steps=2"]
    assert train_here([*arguments, *alone]) == 0


def test_it_draws_and_is_exported(run: Path, tmp_path: Path) -> None:
    def drawn(checkpoint: Path) -> np.ndarray:
        return drawn_here(tmp_path / f"from_{checkpoint.name}", f"ckpt={checkpoint}", f"prompt={PROMPT}", "steps=3", "threads=1")

    expected = drawn(run / "stage1")
    assert expected.std() > 1
    for layout in ("ours", "pipeline"):
        assert export([f"ckpt={run / 'stage1'}", f"to={layout}", f"output={tmp_path / layout}"]) == 0
        assert np.abs(drawn(tmp_path / layout) - expected).max() <= 1
    pipe = ParaDiffusionPipeline.from_pretrained(str(tmp_path / "pipeline"))
    assert isinstance(pipe.unet, PixArtTransformer2DModel)
    image = pipe(PROMPT, num_inference_steps=3, generator=torch.Generator().manual_seed(0)).images[0]
    assert np.abs(np.asarray(image).astype(int) - expected).max() <= 1
    user_error("a denoiser that is no U-Net", export, [f"ckpt={run / 'stage1'}", "to=official", f"output={tmp_path / 'official'}"])


def test_other_classes_are_refused_by_name(run: Path, tiny_arguments: list[str], tmp_path: Path) -> None:
    assert tuple(DENOISERS) == config.DENOISERS
    with pytest.raises(UserError, match=r"unet\.class_name=UNet3DConditionModel .* PixArtTransformer2DModel"):
        compose_train([*tiny_arguments, "unet.class_name=UNet3DConditionModel"])
    assert export([f"ckpt={run / 'stage1'}", "to=pipeline", f"output={tmp_path / 'pipeline'}"]) == 0
    path = tmp_path / "pipeline" / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": "SanaTransformer2DModel"}))
    with pytest.raises(UserError, match="a SanaTransformer2DModel, which is not known here"):
        sample_here(f"ckpt={tmp_path / 'pipeline'}", f"prompt={PROMPT}", f"output_dir={tmp_path / 'out'}")
