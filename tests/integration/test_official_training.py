"""Fine-tuning the published weights: `train.py stage=3 init_from=<folder>`, with nothing said twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import user_error
from official_models import make_official, make_unet
from training_runs import build_here, drawn_here, newest, records, train_here

from paradiffusion.checkpoints.export import export_official
from paradiffusion.checkpoints.layouts import open_layout

LORA = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]}


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory, codec_folder: Path) -> Path:
    return make_official(tmp_path_factory.mktemp("official") / "weights", codec_folder, LORA)


@pytest.fixture
def arguments(official: Path, demo_folder: Path, tmp_path: Path) -> list[str]:
    """The paper's preset as a user would fine-tune with it; only sizes of the run are small."""
    return [
        "preset=paper", "stage=3", f"init_from={official}", f"run_dir={tmp_path / 'run'}", "codec.scaling_factor=null",
        f"data.shards={demo_folder / 'small'}", "data.captions={clean: 1.0}", "data.resolution=32", "data.bucket_multiple=16",
        "data.max_aspect=1", "data.workers=0", "conditioning.max_tokens=64", "batch_size=2", "micro_batch_size=2",
        "max_steps=2", "checkpoint_every=2", "log_every=1", "validation.images=0", "validation.samples=0", "precision=fp32",
        "threads=1", "text_encoder.dtype=float32", "codec.dtype=float32",
    ]  # fmt: skip


def test_fine_tune_resume_sample_and_export(
    official: Path, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_here(arguments) == 0
    assert f"the U-Net takes its shape from {official}, not from unet=paper" in capsys.readouterr().out
    assert train_here([*arguments, "max_steps=3"]) == 0
    run = tmp_path / "run" / "stage3"
    assert [row["step"] for row in records(run)] == [1, 2, 3]
    checkpoint = newest(run)
    before, after = open_layout(official).weights(), open_layout(checkpoint).weights()
    assert before.keys() == after.keys() and open_layout(checkpoint).description["lora"]["rank"] == 3
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed and all(name.startswith("unet.") for name in changed)  # the adapter is applied, not trained
    export_official(open_layout(checkpoint), tmp_path / "again", frozen="link")
    images = []
    for name, folder in (("run", tmp_path / "run"), ("again", tmp_path / "again")):
        images.append(drawn_here(tmp_path / f"images_{name}", f"ckpt={folder}", "prompt=a red circle", "steps=3"))
    # As the released code, the export ends at the schedule's lowest noise, the checkpoint at none.
    assert images[0].std() > 1 and np.abs(images[0] - images[1]).max() <= 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("unet.arguments.layers_per_block=5", r"trained with unet\.arguments\..*=.*this command says"),
        ("unet.coordinates=1", r"trained with unet\.coordinates=0, and this command says 1"),
        ("objective.prediction=v_prediction", r"trained with objective\.prediction=epsilon"),
        ("objective.beta_end=0.02", r"trained with objective\.beta_end=0\.012"),
    ],
)
def test_what_contradicts_the_weights_is_refused(arguments: list[str], change: str, words: str) -> None:
    user_error(words, build_here, [*arguments, change])


def test_weights_without_a_text_projection(official: Path, arguments: list[str], tmp_path: Path) -> None:
    """Their cross-attention is as wide as the language model; resumed, too."""
    shutil.copytree(official, tmp_path / "wide")
    width = json.loads((official / "Llama-2-7b-hf" / "config.json").read_text())["hidden_size"]
    make_unet(width=width, projection=False).save_pretrained(tmp_path / "wide" / "unet")
    arguments = [*arguments, f"init_from={tmp_path / 'wide'}"]
    assert train_here([*arguments, "max_steps=1", "checkpoint_every=1"]) == 0
    assert train_here([*arguments, "max_steps=2"]) == 0
    run = tmp_path / "run" / "stage3"
    assert [row["step"] for row in records(run)] == [1, 2]
    assert not any("encoder_hid_proj" in name for name in open_layout(newest(run)).weights())


def test_our_own_checkpoints_give_their_shape_too(tiny_arguments: list[str], tmp_path: Path) -> None:
    """Stage 2 need not repeat what stage 1 was told of the U-Net; said twice, it must agree."""
    arguments = [*tiny_arguments, f"run_dir={tmp_path}", "max_steps=1", "unet.arguments.layers_per_block=3"]
    assert train_here([*arguments, "stage=1"]) == 0
    stored = json.loads((newest(tmp_path / "stage1") / "unet" / "config.json").read_text())
    plain = [argument for argument in arguments if not argument.startswith("unet.")]
    setup = build_here([*plain, "stage=2"])
    assert stored["layers_per_block"] == 3 == setup.config.unet.arguments["layers_per_block"]
    user_error(r"layers_per_block=3, and this command says 4", build_here, [*plain, "stage=2", "unet.arguments.layers_per_block=4"])
