"""recipe=24gb: what it sets, and one sentence where the machine cannot run it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from training_runs import newest, sample_here, stage_arguments, tensors, train_here

from paradiffusion.compose import compose_train
from paradiffusion.config import OptimizerConfig, TrainConfig
from paradiffusion.errors import UserError
from paradiffusion.models.unet import add_lora, empty_unet
from paradiffusion.training.optim import build_optimizer, takes_fused

CUDA = torch.cuda.is_available()
BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None


def recipe(*overrides: str) -> TrainConfig:
    return compose_train(["preset=paper", "recipe=24gb", "data.shards=x", *overrides])


@pytest.mark.parametrize(("stage", "unet"), [(2, "paper"), (3, "sdxl")])
def test_what_it_sets(stage: int, unet: str) -> None:
    plain = compose_train(["preset=paper", "data.shards=x", f"stage={stage}"])
    small = recipe(f"stage={stage}", f"unet={unet}")
    assert (small.text_encoder.quantization, small.optimizer.name, small.ema_device) == ("4bit", "adamw8bit", "cpu")
    assert small.gradient_checkpointing and small.micro_batch_size == 1 and small.unet.lora_rank > 0
    assert recipe(f"stage={stage}", "unet.lora_rank=0").unet.lora_rank == 0, "the whole U-Net by one key"
    # What the stage is for does not change.
    for key in ("train_text", "precision", "conditioning", "objective", "lora", "data", "sampler"):
        assert getattr(small, key) == getattr(plain, key), key
    assert small.text_encoder.hub == plain.text_encoder.hub and small.optimizer.lr == plain.optimizer.lr

    denoiser = empty_unet(small.unet, small.codec, small.conditioning, 4096)
    add_lora(denoiser, small.unet, seed=0)
    trained = sum(p.numel() for p in denoiser.parameters() if p.requires_grad)
    assert 0.005 < trained / sum(p.numel() for p in denoiser.parameters()) < 0.05
    adapted = {n.rpartition(".lora_A")[0].rpartition(".")[2] for n, _ in denoiser.named_parameters() if "lora_A" in n}
    assert adapted == {"to_q", "to_k", "to_v", "0"} | ({"add_k_proj", "add_v_proj"} if unet == "paper" else set())


def test_stages_with_an_adapter_on_the_unet(
    tiny_arguments: list[str], demo_folder: Path, codec_folder: Path, tmp_path: Path
) -> None:
    """Stage 1 trains the U-Net whole; 2 and 3 go on from it with an adapter, resume, and are sampled from."""
    run = tmp_path / "run"
    arguments = stage_arguments(tiny_arguments, demo_folder, codec_folder, run)
    assert train_here([*arguments, "stage=1", "max_steps=2"]) == 0
    arguments += ["unet.lora_rank=2", "ema_device=cpu", "gradient_checkpointing=true", "micro_batch_size=1"]
    arguments += ["optimizer.lr_lora=1e-2", "optimizer.warmup_steps=0"]
    for more in (["stage=2", "max_steps=2"], ["stage=3", "max_steps=2"], ["stage=3", "max_steps=3"]):
        assert train_here([*arguments, *more]) == 0
    first, second = (tensors(newest(run / stage)) for stage in ("stage1", "stage2"))
    key = "unet/diffusion_pytorch_model.safetensors:mid_block.resnets.0.conv1.weight"
    assert torch.equal(first[key], second[key]), "the U-Net's own weights are stage 1's"
    trained = [name for name in second if name.startswith("unet_lora/") and "lora_B" in name]
    assert trained and all(second[name].abs().sum() > 0 for name in trained)
    output = tmp_path / "out"
    assert sample_here(f"ckpt={run}", "prompt=red", "steps=2", "height=64", "width=64", f"output_dir={output}") == 0
    assert (output / "00000.png").is_file()


def parameters(count: int = 3) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {f"unet.{n}.weight": nn.Parameter(torch.randn(8, 8, generator=generator)) for n in range(count)}


@pytest.mark.skipif(CUDA and BITSANDBYTES, reason="here it works")
def test_the_recipe_is_refused_where_it_cannot_run(tiny_arguments: list[str], tmp_path: Path) -> None:
    arguments = [*tiny_arguments, "recipe=24gb", f"run_dir={tmp_path / 'run'}"]
    lacking = "bitsandbytes is not installed" if CUDA else "there is no CUDA device"
    for more, said in (
        ([], r"text_encoder\.quantization=4bit needs a CUDA device and the package bitsandbytes"),
        (
            ["text_encoder.quantization=null"],
            rf"optimizer\.name=adamw8bit needs .* {lacking}; set optimizer\.name=adamw",
        ),
    ):
        with pytest.raises(UserError, match=said):
            train_here([*arguments, *more])


def test_fused_steps_are_those_of_the_plain_optimiser() -> None:
    """The same steps and the same names of state with and without."""
    assert takes_fused(parameters(), OptimizerConfig()) is True and takes_fused({}, OptimizerConfig()) is None
    assert takes_fused({"unet.a": nn.Parameter(torch.ones(2))}, OptimizerConfig(fused=False)) is None
    states = []
    for fused in (True, False):
        named = parameters()
        optimizer = build_optimizer(named, OptimizerConfig(fused=fused, lr=0.1))
        for parameter in named.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert all(set(optimizer.state[p]) == {"exp_avg", "exp_avg_sq", "step"} for p in named.values())
        states.append({name: parameter.detach() for name, parameter in named.items()})
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-6, atol=1e-7)
