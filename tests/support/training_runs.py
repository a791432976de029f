"""Training and sampling within the tests' own process, as the programs do it, and what they leave behind."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from paradiffusion.checkpoints.manifest import checkpoints_of
from paradiffusion.compose import compose_sample, compose_train
from paradiffusion.sampling.run import sample
from paradiffusion.scenes.alignment import SceneScorer
from paradiffusion.scenes.dataset import make_wanted
from paradiffusion.training import start
from paradiffusion.training.engine import make_accelerator
from paradiffusion.training.folder import stage_folder
from paradiffusion.training.trainer import Trainer, train

Train = Callable[..., int]  # what the fixtures ``train`` and ``command`` (commands.py) of conftest.py are
Weights = dict[str, torch.Tensor]

# The refiner's input is standardised by a batch of captions: for all of them the language model would read as long as six steps
# take. Here, since whoever trains within the tests or in the forks of ranks.py imports this first.
USUAL_STATISTICS, start.STATISTICS_CAPTIONS = start.STATISTICS_CAPTIONS, start.AT_ONCE


def train_here(arguments: list[str]) -> int:
    """What ``train.py`` does with these arguments; a UserError comes through."""
    AcceleratorState._reset_state(reset_partial_state=True)
    config = compose_train(arguments)
    make_wanted(config.data)
    return train(config, SceneScorer())


def sample_here(*arguments: str) -> int:
    """What ``sample.py`` does with these arguments."""
    return sample(compose_sample(list(arguments)))


def drawn_here(folder: Path, *arguments: str) -> np.ndarray:
    """The first picture, int [H, W, 3], of what ``sample.py`` draws into ``folder`` with these arguments."""
    assert sample_here(*arguments, f"output_dir={folder}") == 0
    return np.asarray(Image.open(folder / "00000.png")).astype(int)


def build_here(arguments: list[str]) -> Trainer:
    """A stage, ready to run, as train.py has it before its first step."""
    AcceleratorState._reset_state(reset_partial_state=True)
    config = compose_train(arguments)
    stage_folder(config).mkdir(parents=True, exist_ok=True)
    return Trainer(config, make_accelerator(config))


def gradients_of(trainer: Trainer, steps: int = 1) -> tuple[float, Weights]:
    """Loss and gradients of the last of ``steps`` optimiser steps, before its update."""
    batches = trainer.loader()
    for _ in range(steps - 1):
        trainer.train_step(batches)
    share, _ = trainer.gradients(batches)
    return float(share), clipped(trainer)


def clipped(trainer: Trainer) -> Weights:
    """The accumulated gradients as an update would take them."""
    trainer.engine.clip()
    return {name: p.grad.clone() for name, p in trainer.joint.trained().items() if p.grad is not None}


def at_step(number: int, function: Callable[[], Any]) -> Callable[..., Any]:
    """``Trainer.train_step`` that calls ``function`` before its ``number``-th call (1 first)."""
    calls, train_step = 0, Trainer.train_step

    def stepped(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            function()
        return train_step(*arguments)

    return stepped


def records(stage: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The lines of log.jsonl of one kind."""
    rows = [json.loads(line) for line in (stage / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def newest(stage: Path) -> Path:
    """The newest checkpoint, by number alone."""
    return checkpoints_of(stage)[0]


def steps_saved(stage: Path) -> list[int]:
    """Steps of all checkpoints, oldest first."""
    return sorted(int(path.name[5:]) for path in checkpoints_of(stage))


def tensors(checkpoint: Path) -> Weights:
    """All tensors of a checkpoint, as "file:name"."""
    found = {}
    for path in sorted(checkpoint.rglob("*.safetensors")):
        part = path.relative_to(checkpoint).as_posix()
        found.update({f"{part}:{name}": tensor for name, tensor in load_file(path).items()})
    return found


def assert_same_bits(first: Path, second: Path) -> None:
    """Weights, EMA and optimiser of two checkpoints agree bit for bit, and so do the bytes of every safetensors file."""
    one, other = tensors(first), tensors(second)
    assert one.keys() == other.keys() and one
    different = [name for name in one if not torch.equal(bits(one[name]), bits(other[name]))]
    assert not different, f"{len(different)} of {len(one)} tensors differ, such as {different[0]}"
    for path in first.rglob("*.safetensors"):
        assert path.read_bytes() == (second / path.relative_to(first)).read_bytes(), path.name


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor: they tell -0.0 from 0.0, and NaN equals itself."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def hash_parameters(module: torch.nn.Module) -> str:
    """A hash of all parameters and buffers but the LoRA adapter's."""
    digest = hashlib.sha256()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if "lora_" not in name:
            digest.update(bits(tensor.detach().cpu()).numpy().tobytes())
    return digest.hexdigest()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


# The paper's U-Net at a size for tests: every kind of block of it.
SMALL = [
    "unet.arguments.block_out_channels=[16,32,48,64]",
    "unet.arguments.layers_per_block=1",
    "unet.arguments.cross_attention_dim=32",
    "unet.arguments.attention_head_dim=8",
    "unet.arguments.norm_num_groups=8",
]


def stage_arguments(tiny_arguments: list[str], demo_folder: Path, codec_folder: Path, run: Path) -> list[str]:
    """preset=paper with small models on a few scenes; precision and everything else as the preset has it."""
    kept = [a for a in tiny_arguments if a.startswith(("data.workers", "threads", "validation"))]
    return [
        "preset=paper", "text_encoder=tiny", *SMALL, *kept, f"codec.path={codec_folder}", "codec.dtype=float32",
        "codec.scaling_factor=null",
        f"data.shards={demo_folder}/web", "data.resolution=64", "batch_size=4", "micro_batch_size=2", "max_steps=3",
        "log_every=1", "lora.rank=2", f"run_dir={run}",
    ]  # fmt: skip
