"""What the tests share: tiny models on disk, a small set of scenes, and the command lines as a user types them."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Set before torch is imported: one thread, so that tests neither fight over cores nor differ from one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest
from commands import ROOT, Command

if TYPE_CHECKING:
    from chat_server import ChatServer

# Of half a minute and more each.
LONGEST = {"test_ablate", "test_adapters", "test_cache", "test_caption", "test_describe", "test_documents", "test_equivalence", "test_evaluate", "test_hub", "test_launches", "test_other_systems", "test_pretended_gpu",
           "test_replay", "test_resume", "test_sentence_report", "test_text_encoders", "test_training"}  # fmt: skip
SIZES = {"web": 120, "big": 80, "small": 48, "val": 24}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long first: two processes that take files in this order then end at about the same moment."""
    items.sort(key=lambda item: (item.path.stem not in LONGEST, "unit" in item.path.parts))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    import torch  # here, since the process that deals out the tests needs none of it

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def codec_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random autoencoder of factor 8 in the diffusers layout, a few thousand parameters."""
    import torch
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("codec")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoencoderKL(
            block_out_channels=(8, 8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=4,
            mid_block_add_attention=False,
            scaling_factor=1.1193,  # as nano's, whose configuration the tests start from
        ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP of open_clip."""
    from tiny_clip import write_clip

    return write_clip(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(scope="session")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen3-VL."""
    from tiny_vlm import write_vlm

    return write_vlm(tmp_path_factory.mktemp("vlm") / "tiny-qwen")


@pytest.fixture
def server() -> Iterator[ChatServer]:
    """A server of the OpenAI chat protocol."""
    from chat_server import chat_server

    with chat_server() as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    from browser import chromium

    with chromium() as opened:
        yield opened


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small set of scenes: web, big, small and val."""
    from paradiffusion.scenes.dataset import ensure_demo_data

    folder = tmp_path_factory.mktemp("data") / "demo"
    ensure_demo_data(folder, SIZES, processes=1)
    return folder


@pytest.fixture(scope="session")
def tiny_arguments(codec_folder: Path, demo_folder: Path) -> list[str]:
    """Overrides of train.py under which a stage of 20 steps takes about two seconds."""
    return [
        "text_encoder=tiny",
        "unet=tiny",
        f"codec.path={codec_folder}",
        "codec.latent_channels=4",
        "conditioning.refiner_width=32",
        "conditioning.refiner_heads=2",
        "conditioning.refiner_layers=1",
        f"data.demo_folder={demo_folder}",
        "data.demo_sizes={" + ", ".join(f"{name}: {count}" for name, count in SIZES.items()) + "}",
        "data.workers=0",
        "batch_size=4",
        "max_steps=8",
        "log_every=2",
        "checkpoint_every=4",
        "validate_every=100",
        "validation.samples=4",
        "validation.images=0",
        "validation.scenes=0",
        "threads=1",
        # What nano's own stages choose may change; comparisons to the last bit must not.
        "precision=fp32",
        "keep_gb=0",
        "objective.layout_share=0",
        "repeats=1",
        "optimizer.schedule=constant",
        "optimizer.name=adamw",
        "optimizer.lr=1.5e-3",
        "optimizer.lr_conditioning=5e-4",
    ]


@pytest.fixture
def train(tiny_arguments: list[str], tmp_path: Path) -> Callable[..., int]:
    """``train("stage=2", ...)``: train.py's own path within this process, in ``run_dir=<tmp_path>/run``.

    Returns the status; a UserError comes through.
    """
    from training_runs import train_here

    return lambda *arguments: train_here([*tiny_arguments, f"run_dir={tmp_path / 'run'}", *arguments])


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """``command("train.py", "stage=9")``: what the shell sees of a program of the repository's root, within this process.

    New interpreters, which import for seconds, are started in tests/integration, above all in test_launches.py.
    """
    from accelerate.state import AcceleratorState

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        AcceleratorState._reset_state(reset_partial_state=True)
        capsys.readouterr()
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as leaving:
            patch.chdir(ROOT)
            patch.setattr(sys, "argv", list(arguments))
            runpy.run_path(arguments[0], run_name="__main__")
        said = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, int(leaving.value.code or 0), said.out, said.err)

    return run
