"""Adapters of every kind train, resume and draw; exported, other libraries load them without this package and draw the same."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import Command, user_error
from diffusers import UNet2DConditionModel
from official_models import make_ours
from peft import PeftModel
from safetensors.torch import load_file, save_file
from training_runs import assert_same_bits, build_here, newest, train_here

from paradiffusion.budget.empty import empty_models
from paradiffusion.budget.memory import count_parameters
from paradiffusion.checkpoints.export import lora_told
from paradiffusion.checkpoints.layouts import find_checkpoint, open_layout
from paradiffusion.compose import compose_train
from paradiffusion.config import ADAPTERS, ConditioningConfig, UNetConfig
from paradiffusion.sampling.pipeline import InferenceModels, encode_prompts, load_models
from paradiffusion.sampling.sampler import sample_latents, starting_noise
from paradiffusion.text.sources import locate

PROMPT = "a red circle at the left of a blue square"
# Of the language model and of the U-Net: each kind once on both sides. diffusers loads none of LyCORIS'.
EXPORTED = [("lora", "pissa"), ("lokr", "lora"), ("pissa", "dora"), ("dora", "rslora")]
REFUSED = [("rslora", "loha"), ("loha", "lokr")]
BY_OTHERS = """
import sys
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaModel
plain, language_model, codec, given, *folders = sys.argv[1:]
text = load_file(given + "/text.safetensors")
none = dict(text_encoder=None, tokenizer=None, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
with torch.no_grad():
    for folder in folders:
        model = PeftModel.from_pretrained(LlamaModel.from_pretrained(language_model), folder + "/text_encoder_lora").eval()
        hidden = model(input_ids=text["ids"], attention_mask=text["mask"].long()).last_hidden_state
        found = {"hidden": hidden}
        for name in ("with", "without"):
            unet, vae = UNet2DConditionModel.from_pretrained(plain), AutoencoderKL.from_pretrained(codec)
            pipe = StableDiffusionPipeline(vae=vae, unet=unet, scheduler=DPMSolverMultistepScheduler(), **none)
            if name == "with":
                unet.load_state_dict(load_file(folder + "/unet_trained_whole.safetensors"), strict=False)
            pipe.load_lora_weights(folder)
            latents, scheduler = text["noise"], DPMSolverMultistepScheduler.from_pretrained(given)
            scheduler.set_timesteps(3)
            for time in scheduler.timesteps:
                predicted = unet(latents, time, encoder_hidden_states=hidden).sample
                latents = scheduler.step(predicted, time, latents).prev_sample
            found[name] = vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1).contiguous()
        save_file(found, folder + "/found.safetensors")
assert not any(name.partition(".")[0] == "paradiffusion" for name in sys.modules)
"""


@pytest.fixture(scope="module")
def arguments(tiny_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of stage 2 with adapters on both models, from a stage 1 without."""
    kept = [a for a in tiny_arguments if not a.startswith(("conditioning.", "max_steps", "checkpoint_every"))]
    shared = [*kept, "conditioning=paper", "conditioning.max_tokens=32", "objective=paper"]
    run = tmp_path_factory.mktemp("plain") / "run"
    assert train_here([*shared, "max_steps=1", f"run_dir={run}"]) == 0
    shared += ["stage=2", f"init_from={newest(run / 'stage1')}", "lora.rank=2", "unet.lora_rank=3", "unet.lora_alpha=6"]
    return [*shared, "checkpoint_every=2", "optimizer.lr_lora=0.01", "optimizer.lr_conditioning=0.05"]


@pytest.fixture(scope="module")
def runs(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The stage that was trained with adapters of these two kinds, once; with ``stops``, stopped and resumed."""
    folder = tmp_path_factory.mktemp("runs")

    def run(kinds: tuple[str, str], stops: tuple[int, ...] = (4,)) -> Path:
        stage = folder / f"{kinds}{len(stops)}" / "stage2"
        for steps in stops if not stage.exists() else ():
            assert train_here([*arguments, *keys(kinds), f"max_steps={steps}", f"run_dir={stage.parent}"]) == 0
        return stage

    return run


def keys(kinds: tuple[str, str]) -> list[str]:
    return [f"lora.kind={kinds[0]}", f"unet.lora_kind={kinds[1]}"]


@torch.no_grad()
def predicted(models: InferenceModels) -> torch.Tensor:
    tokens = models.text_encoder.tokenize([PROMPT])
    features = models.text_encoder(tokens.ids, tokens.mask)
    return models.denoise(starting_noise([4], (4, 8, 8)), torch.tensor([500.0]), features, None)


@pytest.mark.parametrize("kinds", [*EXPORTED, *REFUSED], ids="-".join)
def test_every_kind_trains_resumes_counts_and_merges(
    kinds: tuple[str, str], runs: Callable[..., Path], arguments: list[str], tmp_path: Path
) -> None:
    checkpoint = newest(runs(kinds))
    assert_same_bits(checkpoint, newest(runs(kinds, (2, 4))))
    trained = load_file(checkpoint / "training_state" / "model.safetensors")
    counts = count_parameters(empty_models(compose_train([*arguments, *keys(kinds)])))
    assert counts.trained == sum(tensor.numel() for tensor in trained.values())
    projection = sum(t.numel() for name, t in trained.items() if ".encoder_hid_proj." in name)
    assert counts.lora + counts.unet_lora + projection == counts.trained and min(counts.lora, counts.unet_lora) > 0
    # It begins where the model without it is, and is drawn with as it was trained.
    plain = predicted(load_models(find_checkpoint(str(compose_train(arguments).init_from)), device="cpu"))
    fresh, ended = (build_here([*arguments, *keys(kinds), "max_steps=4", f"run_dir={run}"]) for run in (tmp_path, runs(kinds).parent))
    torch.testing.assert_close(predicted(fresh.inference()), plain, atol=1e-4, rtol=0)
    read = load_models(find_checkpoint(checkpoint), device="cpu")
    with ended.ema.applied():
        torch.testing.assert_close(predicted(read), predicted(ended.inference()), atol=1e-4, rtol=0)
    assert (predicted(read) - plain).abs().max() > 0.01
    assert all(start.abs().max() > 1e-3 for start in fresh.joint.start.values())
    assert bool(fresh.joint.start) == ("pissa" in kinds)
    base = UNet2DConditionModel.from_pretrained(checkpoint / "unet")
    by_peft = PeftModel.from_pretrained(base, checkpoint / "unet_lora").merge_and_unload().state_dict()
    assert all(torch.allclose(by_peft[name], t, atol=1e-6) for name, t in read.joint.unet.state_dict().items())


def test_other_libraries_draw_what_we_draw(runs: Callable[..., Path], arguments: list[str], command: Command, tmp_path: Path) -> None:
    expected = {}
    for kinds in EXPORTED:
        models = load_models(find_checkpoint(runs(kinds)), device="cpu")
        models.sampler.steps, models.sampler.guidance = 3, 1.0
        settings = (models.objective, encode_prompts(models, [PROMPT]), [4], (4, 8, 8), models.sampler, "cpu", torch.float32)
        tokens = models.text_encoder.tokenize([PROMPT])
        with torch.no_grad():
            hidden = models.text_encoder(tokens.ids, tokens.mask)
            expected["-".join(kinds)] = hidden, models.codec.decode(sample_latents(models.denoise, *settings))
        done = command("scripts/export.py", f"ckpt={runs(kinds)}", "to=lora", f"output={tmp_path / '-'.join(kinds)}")
        assert done.returncode == 0 and "draws another picture" in done.stdout, done.stderr
        assert "draws another picture" in (tmp_path / "-".join(kinds) / "README.md").read_text()
    save_file({"ids": tokens.ids, "mask": tokens.mask, "noise": starting_noise([4], (4, 8, 8))}, tmp_path / "text.safetensors")
    models.objective.scheduler("dpm").save_config(tmp_path)
    config = compose_train(arguments)
    frozen = [f"{config.init_from}/unet", str(locate(config.text_encoder)), str(config.codec.path), str(tmp_path)]
    folders = [str(tmp_path / name) for name in expected]
    subprocess.run([sys.executable, "-c", BY_OTHERS, *frozen, *folders], check=True, cwd=tmp_path)
    for name, (hidden, picture) in expected.items():
        found = load_file(tmp_path / name / "found.safetensors")
        torch.testing.assert_close(found["hidden"], hidden, atol=1e-4, rtol=0)
        torch.testing.assert_close(found["with"], picture, atol=1e-3, rtol=0)
        assert (found["without"] - picture).abs().max() > 0.02, "what was trained whole is part of the picture"


def test_what_no_other_library_loads_is_refused(
    runs: Callable[..., Path], arguments: list[str], tmp_path: Path, codec_folder: Path
) -> None:
    for kinds in REFUSED:
        user_error(f"diffusers loads no adapter of the kind {kinds[1]}", lora_told, find_checkpoint(runs(kinds)))
    assert "U-Net was trained whole" in lora_told(open_layout(make_ours(tmp_path / "ours", codec_folder)))[-1]
    positions = {"unet": UNetConfig(lora_rank=2), "conditioning": ConditioningConfig(key_positions=True)}
    numbered = make_ours(tmp_path / "numbered", codec_folder, **positions)
    user_error("no place for positions on the text's keys", lora_told, open_layout(numbered))
    user_error("has no adapter", lora_told, open_layout(Path(str(compose_train(arguments).init_from))))
    with pytest.raises(Exception, match=r"lora.kind=loha .*quantization=4bit"):
        compose_train(["stage=2", "lora.kind=loha", "text_encoder.quantization=4bit"])
    assert {kind for kinds in (*EXPORTED, *REFUSED) for kind in kinds} == set(ADAPTERS)
