"""The diffusers pipeline draws what sample.py draws, saves itself, and behaves as diffusers' users expect."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import ROOT, user_error
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from official_models import MODERN, latents, make_official, make_ours, same
from tiny_encoders import write_llama_tokenizer
from training_runs import drawn_here

from paradiffusion.checkpoints.export import export_official, export_ours, export_pipeline
from paradiffusion.checkpoints.layouts import find_checkpoint, open_layout
from paradiffusion.errors import UserError
from paradiffusion.sampling.diffusers_pipeline import ParaDiffusionPipeline, unload_adapter

PROMPT = "a red circle at the left of a blue square"
IN_A_FRESH_PROCESS = """
import sys, numpy as np, torch
from paradiffusion.sampling.diffusers_pipeline import ParaDiffusionPipeline
for folder in sys.argv[3:]:
    pipe = ParaDiffusionPipeline.from_pretrained(folder)
    image = pipe(sys.argv[2], generator=torch.Generator().manual_seed(7), num_inference_steps=3).images[0]
    np.save(f"{sys.argv[1]}/{folder.rpartition('/')[2]}.npy", np.asarray(image))
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, codec_folder: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    lora = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
    return {
        "modern": make_ours(folder / "modern", codec_folder, **MODERN),
        "official": make_official(folder / "official", codec_folder, lora, timestep_spacing="trailing"),
    }


@pytest.fixture(scope="module")
def folders(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pipelines")
    for name, checkpoint in checkpoints.items():
        export_pipeline(open_layout(checkpoint), folder / name)
    return {name: folder / name for name in checkpoints}


@pytest.fixture
def pipe(folders: dict[str, Path]) -> ParaDiffusionPipeline:
    loaded = ParaDiffusionPipeline.from_pretrained(str(folders["modern"]))
    loaded.set_progress_bar_config(disable=True)
    return loaded


def arrays(pipe: ParaDiffusionPipeline, prompt: str = PROMPT, seed: int = 7, **settings: Any) -> np.ndarray:
    """What it draws from a seed, [N, H, W, 3]."""
    return pipe(prompt, **{"generator": seeded(seed), "output_type": "np", "num_inference_steps": 3, **settings}).images


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_fresh_process_draws_what_sample_py_draws(checkpoints: dict[str, Path], folders: dict[str, Path], tmp_path: Path) -> None:
    arguments = [str(tmp_path), PROMPT, *map(str, folders.values())]
    subprocess.run([sys.executable, "-c", IN_A_FRESH_PROCESS, *arguments], cwd=ROOT, check=True)
    for name, checkpoint in checkpoints.items():
        expected = drawn_here(tmp_path / "out" / name, f"ckpt={checkpoint}", f"prompt={PROMPT}", "seed=7", "steps=3")
        assert expected.std() > 1 and np.array_equal(np.load(tmp_path / f"{name}.npy"), expected)


@pytest.mark.parametrize("name", ["modern", "official"])
def test_back_to_checkpoints(checkpoints: dict[str, Path], folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    weights = find_checkpoint(folders[name])
    assert torch.equal(latents(folders[name]), latents(checkpoints[name]))
    export_ours(weights, tmp_path / "ours")
    assert same(open_layout(tmp_path / "ours").weights(), open_layout(checkpoints[name]).weights())
    assert torch.equal(latents(tmp_path / "ours"), latents(checkpoints[name]))
    if name == "official":
        export_official(weights, tmp_path / "official", frozen="link")
        assert torch.equal(latents(tmp_path / "official"), latents(checkpoints[name]))


def test_saving_changes_nothing_and_links_stay_links(checkpoints: dict[str, Path], pipe: ParaDiffusionPipeline, tmp_path: Path) -> None:
    before = arrays(pipe)
    pipe.save_pretrained(tmp_path / "again")
    again = ParaDiffusionPipeline.from_pretrained(str(tmp_path / "again"))
    assert np.array_equal(arrays(pipe), before) and np.array_equal(arrays(again), before)
    assert str(tmp_path) not in (tmp_path / "again" / "model_index.json").read_text()

    export_pipeline(open_layout(checkpoints["modern"]), tmp_path / "linked", frozen="link")
    assert (tmp_path / "linked" / "text_encoder").is_symlink() and (tmp_path / "linked" / "vae").is_symlink()
    assert np.array_equal(arrays(ParaDiffusionPipeline.from_pretrained(str(tmp_path / "linked"))), before)
    export_pipeline(open_layout(checkpoints["modern"]), tmp_path / "bare", frozen="none")
    index = json.loads((tmp_path / "bare" / "model_index.json").read_text())
    index["refiner"][0] = "paradiffusion.sampling.pipeline_components"  # as exported before November 2026
    (tmp_path / "bare" / "model_index.json").write_text(json.dumps(index))
    parts = {"text_encoder": again.text_encoder, "vae": again.vae}
    unload_adapter(again.text_encoder)
    assert np.array_equal(arrays(ParaDiffusionPipeline.from_pretrained(str(tmp_path / "bare"), **parts)), before)


def test_outputs_and_numbers_of_images(pipe: ParaDiffusionPipeline) -> None:
    array = arrays(pipe)
    assert np.array_equal(np.asarray(arrays(pipe, output_type="pil")[0]), (array[0] * 255).round().astype(np.uint8))
    assert np.array_equal(arrays(pipe, output_type="pt").permute(0, 2, 3, 1).numpy(), array)
    (latent,) = pipe(PROMPT, num_inference_steps=3, output_type="latent", return_dict=False)
    assert latent.shape == (1, 4, 8, 8)
    two = arrays(pipe, [PROMPT, "a dog"], generator=[seeded(7 + n) for n in range(4)], num_images_per_prompt=2)
    assert two.shape == (4, 64, 64, 3) and np.abs(two[0] - array[0]).max() < 1e-5
    assert np.abs(two[2] - arrays(pipe, "a dog", 9)[0]).max() < 1e-5 and np.abs(two[0] - two[1]).max() > 0.01
    assert arrays(pipe, "a", height=32, width=48).shape == (1, 32, 48, 3)
    pipe.vae.enable_slicing()
    np.testing.assert_allclose(arrays(pipe), array, atol=1e-5)
    pipe.vae.enable_tiling()  # this codec's tiles are smaller than the image, and each is normalised by itself
    tiled = arrays(pipe)
    assert tiled.shape == array.shape and np.abs(tiled - array).max() > 1e-3
    pipe.vae.disable_tiling()
    np.testing.assert_allclose(arrays(pipe), array, atol=1e-5)


def test_settings_reach_the_sampler(pipe: ParaDiffusionPipeline) -> None:
    plain = arrays(pipe, output_type="latent")
    for settings in (
        {"guidance_scale": 1.0}, {"negative_prompt": "a dog"}, {"num_inference_steps": 5}, {"guidance_rescale": 0.5},
        {"guidance_start": 0.9}, {"guidance_stop": 0.2}, {"guidance_sigma_min": 5.0}, {"guidance_sigma_max": 0.5},
    ):  # fmt: skip
        assert not torch.allclose(arrays(pipe, output_type="latent", **settings), plain, atol=1e-4), settings
    assert torch.equal(arrays(pipe, output_type="latent", negative_prompt=""), plain)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    assert not torch.allclose(arrays(pipe, output_type="latent"), plain, atol=1e-4)


def test_callbacks_see_and_change_and_end(pipe: ParaDiffusionPipeline) -> None:
    seen: list[tuple[int, float]] = []

    def watch(_: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, float(timestep)))
        return tensors

    assert np.array_equal(arrays(pipe), arrays(pipe, callback_on_step_end=watch)) and [step for step, _ in seen] == [0, 1, 2]
    assert all(first > second for (_, first), (_, second) in pairwise(seen))

    def change(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] * 0} if step == 2 else {}

    assert arrays(pipe, output_type="latent", callback_on_step_end=change).abs().max() == 0

    def stop(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        seen.append((step, 0.0))
        pipe._interrupt = step == 1
        return {}

    seen.clear()
    arrays(pipe, num_inference_steps=4, callback_on_step_end=stop)
    assert [step for step, _ in seen] == [0, 1]


def test_components_may_be_replaced_and_shared(folders: dict[str, Path], tmp_path: Path) -> None:
    load = lambda **parts: ParaDiffusionPipeline.from_pretrained(str(folders["official"]), **parts)  # noqa: E731
    pipe = load()
    before, unet, vae = arrays(pipe), copy.deepcopy(pipe.unet), copy.deepcopy(pipe.vae)
    shared = ParaDiffusionPipeline(**pipe.components, description=pipe.config["description"])
    for other in (shared, ParaDiffusionPipeline.from_pipe(pipe), load(text_encoder=pipe.text_encoder)):
        assert np.array_equal(arrays(other), before)
    shared.save_pretrained(tmp_path / "shared")
    assert np.array_equal(arrays(ParaDiffusionPipeline.from_pretrained(str(tmp_path / "shared"))), before)
    assert np.array_equal(arrays(pipe), before)
    with torch.no_grad():
        unet.conv_out.weight.mul_(2)
        vae.decoder.conv_out.bias.add_(0.2)
    for name, part in (("unet", unet), ("vae", vae)):
        changed = arrays(load(**{name: part}))
        setattr(pipe, name, part)
        assert np.array_equal(arrays(pipe), changed) and np.abs(changed - before).max() > 0.01
        pipe = load()
    calls: list[int] = []
    pipe.unet = torch.compile(pipe.unet, backend=lambda graph, _: calls.append(1) or graph.forward)
    pipe.text_encoder = copy.deepcopy(shared.text_encoder)  # with its adapter inside
    np.testing.assert_allclose(arrays(pipe), before, atol=1e-5)
    assert calls
    with torch.no_grad():
        next(p for n, p in shared.text_encoder.named_parameters() if ".lora_B" in n).add_(1)
    with pytest.raises(ValueError, match="carries another adapter"):
        load(text_encoder=shared.text_encoder)


def test_the_tokenizers_own_rules_hold(folders: dict[str, Path], tmp_path: Path) -> None:
    """Here and after saving again, as for text_encoder.path=."""
    shutil.copytree(folders["official"], tmp_path / "pipe")
    shutil.rmtree(tmp_path / "pipe" / "tokenizer")
    rules = write_llama_tokenizer(tmp_path / "pipe" / "tokenizer")
    path = tmp_path / "pipe" / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer": ["transformers", "LlamaTokenizer"]}))
    pipe = ParaDiffusionPipeline.from_pretrained(str(tmp_path / "pipe"))
    pipe.save_pretrained(tmp_path / "again")
    for tokenizer in (pipe.tokenizer, ParaDiffusionPipeline.from_pretrained(str(tmp_path / "again")).tokenizer):
        assert tokenizer("  a b", add_special_tokens=False)["input_ids"] == rules.encode("  a b").ids


def test_what_pipelines_of_diffusers_take(pipe: ParaDiffusionPipeline, folders: dict[str, Path]) -> None:
    """latents=, prompt_embeds= and eta=, and another scheduler."""
    noise = torch.randn(1, 4, 8, 8, generator=seeded())  # as the generator's own
    assert np.array_equal(arrays(pipe, generator=None, latents=noise), arrays(pipe))
    embeds = pipe.encode_prompt([PROMPT, "a"], "a green star")
    names = "prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask"
    settings = {"num_images_per_prompt": 2, "generator": [seeded(n) for n in range(4)], "guidance_scale": 3.0}
    told = arrays(pipe, None, **dict(zip(names, embeds, strict=True)), **settings)
    settings["generator"] = [seeded(n) for n in range(4)]
    assert np.array_equal(told, arrays(pipe, [PROMPT, "a"], negative_prompt="a green star", **settings))
    settings["generator"] = [seeded(n) for n in range(4)]
    apart = dict(zip(names[:2], embeds, strict=False))  # with negative texts, one for each
    assert np.array_equal(told, arrays(pipe, None, **apart, negative_prompt=["a green star"] * 2, **settings))
    for wrong, words in (({"latents": noise[:, :3]}, "latents= has the shape"), ({"prompt_embeds": embeds[0]}, "two ways")):
        with pytest.raises(ValueError, match=words):
            pipe("a", **wrong)
    user_error(r"eta=0.5 means nothing to DPMSolver", pipe, "a", eta=0.5)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    user_error("DDIMScheduler as it is set here does not draw .* flow", pipe, "a")
    other = ParaDiffusionPipeline.from_pretrained(str(folders["official"]))
    other.scheduler = DDIMScheduler.from_config(other.scheduler.config)
    assert np.array_equal(arrays(other, eta=0.0), arrays(other)) and not np.array_equal(arrays(other, eta=1.0), arrays(other))
    assert np.array_equal(arrays(other, eta=1.0), arrays(other, eta=1.0))  # what is drawn anew is a function of the seed


def test_wrong_arguments(pipe: ParaDiffusionPipeline) -> None:
    for prompt in (None, [], 3, ["a", None]):
        with pytest.raises(ValueError, match="neither a text nor a list of texts"):
            pipe(prompt)
    with pytest.raises(ValueError, match="needs its description"):
        ParaDiffusionPipeline(**pipe.components)
    for arguments, error, words in (
        ({"height": 50}, UserError, "multiple of"),
        ({"output_type": "jpg"}, ValueError, "pil, np, pt, latent"),
        ({"generator": [seeded(), seeded()]}, ValueError, "2 generators for 1 images"),
        ({"negative_prompt": ["a", "b"]}, ValueError, "2 negative prompts"),
        ({"guidance_scale": -1.0}, UserError, "guidance"),
        ({"num_images_per_prompt": 0}, ValueError, "num_images_per_prompt=0"),
    ):
        with pytest.raises(error, match=words):
            pipe("a", **arguments)


def test_an_adapter_that_was_left_out_is_missed(folders: dict[str, Path]) -> None:
    """As by DiffusionPipeline.from_pretrained(custom_pipeline=), which knows nothing of it."""
    base = DiffusionPipeline.from_pretrained.__func__(ParaDiffusionPipeline, str(folders["official"]))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"LoRA adapter .* which has none here"):
        base(PROMPT)


def test_dtypes_are_those_of_training_unless_one_is_asked_for(
    folders: dict[str, Path], pipe: ParaDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But the denoiser's where there is CUDA."""
    assert pipe.text_encoder.dtype == pipe.unet.dtype == torch.float32
    with monkeypatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: True)
        there = ParaDiffusionPipeline.from_pretrained(str(folders["modern"]))
    assert (there.unet.dtype, there.text_encoder.dtype) == (torch.bfloat16, torch.float32)
    half = ParaDiffusionPipeline.from_pretrained(str(folders["modern"]), torch_dtype=torch.bfloat16)
    assert half.unet.dtype == half.text_encoder.dtype == half.refiner.dtype == torch.bfloat16
    assert torch.isfinite(arrays(half, output_type="latent")).all()
