"""What is kept, moved and switched to draw faster changes no image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import user_error
from official_models import MODERN, draw, make_official, make_ours

from paradiffusion.checkpoints.layouts import open_layout
from paradiffusion.compose import compose_sample
from paradiffusion.sampling import pipeline
from paradiffusion.sampling.pipeline import load_models

DOG = {"prompt": "a dog", "steps": 3, "height": 32, "width": 32}  # one tile
PROMPTS = ["a red circle", "a blue square at the left of a dog", "", "a red circle", "a"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, codec_folder: Path) -> Path:
    return make_ours(tmp_path_factory.mktemp("ours") / "modern", codec_folder, **MODERN)


def test_repeated_prompts_and_the_null_prompt_are_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = load_models(open_layout(folder), device="cpu")
    rows: list[int] = []
    models.text_encoder.register_forward_hook(lambda _, arguments, __: rows.append(len(arguments[0])))
    first = models.encode(PROMPTS)
    assert sum(rows) == 4  # three prompts and the null prompt
    again = models.encode(PROMPTS)
    assert sum(rows) == 4 and torch.equal(first.features, again.features)
    alone = load_models(open_layout(folder), device="cpu").encode([PROMPTS[1]])
    length = alone.features.shape[1]
    assert torch.equal(alone.features[0], again.features[1, :length])
    assert alone.mask is not None and again.mask is not None and torch.equal(alone.mask[0], again.mask[1, :length])
    assert torch.equal(again.null_features, alone.null_features) and len(again.null_features) == 1

    monkeypatch.setattr(pipeline, "KEPT_PROMPTS", 2)
    many = [f"{number} dogs" for number in range(5)]
    assert torch.equal(models.encode([*many, PROMPTS[1]]).features[5, :length], alone.features[0])
    assert set(models.kept) == {"", *many, PROMPTS[1]}
    models.encode(["the latest", many[0]])
    assert set(models.kept) == {"", "the latest", many[0]}
    assert torch.equal(models.encode([PROMPTS[1]]).features, alone.features)


def test_offloading_encodes_ahead_and_changes_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [{"prompt": f"{number} dogs", "steps": 2, "negative_prompt": "cats"} for number in range(5)]
    plain = draw(folder, cases, tmp_path / "a", "batch_size=2")
    moved: list[str] = []
    move = pipeline.TextEncoder.to
    monkeypatch.setattr(pipeline.TextEncoder, "to", lambda self, device: (moved.append(str(device)), move(self, device))[1])
    offloaded = draw(folder, cases, tmp_path / "b", "batch_size=2", "offload_text_encoder=true")
    assert moved == ["cpu", "cpu", "cpu"]  # from the disk, to the device (here the CPU too), and off it for good
    assert all(np.array_equal(one, other) for one, other in zip(plain, offloaded, strict=True))


@pytest.fixture(scope="module")
def plain(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    return draw(folder, [DOG], tmp_path_factory.mktemp("plain"))[0]


@pytest.mark.parametrize("switch", ["channels_last=true", "vae_tiling=true", "codec.dtype=bfloat16", "text_encoder.dtype=bfloat16"])
def test_switches_change_rounding_only(folder: Path, plain: np.ndarray, tmp_path: Path, switch: str) -> None:
    (switched,) = draw(folder, [DOG], tmp_path, switch)
    assert np.abs(plain - switched).mean() < (0.02 if "bfloat16" in switch else 1e-3)


def test_the_unet_is_compiled_once_for_a_shape(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[object]] = []

    def counted(graph: Any, inputs: list[Any]) -> Any:
        given.append(inputs)
        return graph.forward

    torch.compiler.reset()
    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, mode, **asked: compile_with(call, backend=counted, **asked))
    cases = [{**DOG, "seed": seed} for seed in range(2)]
    changes = ("sampler=fast", "compile=true", "batch_size=1")
    expected = draw(folder, cases, tmp_path / "a", changes[0], changes[2])
    drawn = draw(folder, cases, tmp_path / "b", *changes)
    assert all(np.array_equal(one, other) for one, other in zip(expected, drawn, strict=True))
    assert len(given) == 2, "with guidance, and without it"
    assert not any(isinstance(value, torch.SymInt) for inputs in given for value in inputs), "for any shape, and slower"


def test_every_attention_is_fused(tmp_path: Path, codec_folder: Path) -> None:
    unet = load_models(open_layout(make_official(tmp_path / "weights", codec_folder)), device="cpu").joint.unet
    assert {type(one).__name__ for one in unet.attn_processors.values()} == {"AttnAddedKVProcessor2_0"}


def test_the_fast_set_of_sampler_values() -> None:
    given = ["ckpt=x", "prompt=a"]
    fast = compose_sample([*given, "sampler=fast", "steps=7"])
    assert (fast.solver, fast.steps, fast.guidance_start, fast.guidance_stop) == ("dpm", 7, 0.0, 0.8)
    assert compose_sample([*given, "sampler=paper"]).guidance == 7.5 and compose_sample(given).steps is None
    for wrong, words in (
        ("sampler=slow", r"sampler=slow is unknown; choose one of fast, nano, paper"),
        ("text_encoder.dtype=int8", "text_encoder.dtype=int8"), ("text_encoder_path=/x", r"did you mean text_encoder\.path"),
    ):  # fmt: skip
        user_error(words, compose_sample, [*given, wrong])
