"""preset=paper: the sizes that the paper gives, what its stages say, weights that are kept in fp32; and recipe=24gb."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import PARITY, user_error
from training_runs import SMALL, build_here, newest, records, sample_here, stage_arguments, tensors, train_here

from paradiffusion.compose import compose_train
from paradiffusion.config import CodecConfig, ConditioningConfig, TrainConfig
from paradiffusion.data.images import make_buckets
from paradiffusion.models.unet import add_lora, build_unet, downsampling, empty_unet
from paradiffusion.text.families import text_width
from paradiffusion.training.engine import at_once, count_micro_batches


def paper(*overrides: str) -> TrainConfig:
    return compose_train(["preset=paper", "data.shards=x", *overrides])


def shapes(unet: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in unet.named_parameters()}


def empty(config: TrainConfig) -> Any:
    return empty_unet(config.unet, config.codec, config.conditioning, text_width(config.text_encoder))


def test_the_papers_unet() -> None:
    """1.251 B parameters with the projection from 4096 to 1280 (PAPER: block widths 384, 768, 1152, 1536)."""
    unet = empty(paper())
    assert all(p.device.type == "meta" for p in unet.parameters())
    assert sum(p.numel() for p in unet.parameters()) == pytest.approx(1.251e9, rel=0.01)
    assert unet.encoder_hid_proj.weight.shape == (1280, 4096) and downsampling(unet) == 8
    assert unet.config["block_out_channels"] == [384, 768, 1152, 1536]
    heads = {m.heads for n, m in unet.named_modules() if n.startswith("mid_block.attentions.") and hasattr(m, "heads")}
    assert heads == {1536 // 64}, "a head is 64 wide"
    config = paper(*SMALL)
    arguments = (config.unet, config.codec, config.conditioning, 24)
    assert shapes(build_unet(*arguments, seed=1)) == shapes(empty_unet(*arguments))
    user_error(r"unet\.arguments do not make", empty, paper("unet.arguments.norm_num_groups=7"))


@pytest.mark.skipif(not PARITY.is_dir(), reason="the reference weights (../shared/assets/parity) are not here")
def test_the_papers_unet_is_of_the_official_kind() -> None:
    official = json.loads((PARITY / "weights" / "unet" / "config.json").read_text())
    ours = {**paper().unet.arguments}
    for key in ("block_out_channels", "layers_per_block", "cross_attention_dim", "attention_head_dim", "norm_num_groups",
                "sample_size"):  # fmt: skip
        ours[key] = official[key]
    for key in ("down_block_types", "up_block_types"):  # the small one has three levels
        ours[key] = ours[key][:3] if key == "down_block_types" else ours[key][1:]
    unet = empty_unet(type(paper().unet)(arguments=ours), CodecConfig(), ConditioningConfig(), official["encoder_hid_dim"])
    from safetensors import safe_open

    with safe_open(PARITY / "weights" / "unet" / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert shapes(unet) == {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def test_sdxls_unet() -> None:
    """SDXL's 2.567 B without add_embedding (2816 to 1280 to 1280), and a projection from 4096 to its 2048."""
    config = paper("unet=sdxl", "stage=2")
    unet = empty(config)
    published, add_embedding, projection = 2_567_463_684, 2816 * 1280 + 1280 + 1280 * 1280 + 1280, 4096 * 2048 + 2048
    assert sum(p.numel() for p in unet.parameters()) == published - add_embedding + projection
    found = shapes(unet)
    for name, shape in (  # of the published checkpoint, but for the projection
        ("encoder_hid_proj.weight", (2048, 4096)), ("down_blocks.1.attentions.0.proj_in.weight", (640, 640)),
        ("down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k.weight", (1280, 2048)),
        ("mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj.weight", (10240, 1280)),
    ):  # fmt: skip
        assert found[name] == shape
    assert not any("add_embedding" in name for name in found)
    heads = {n.split(".")[1]: m.heads for n, m in unet.named_modules() if n.startswith("down_blocks") and hasattr(m, "heads")}
    assert heads == {"1": 10, "2": 20} and config.codec == paper().codec, "the same latent space"


def test_stages_as_the_paper_has_them() -> None:
    stages = [paper(f"stage={n}") for n in (1, 2, 3)]
    assert [c.conditioning.max_tokens for c in stages] == [256, 512, 512]
    assert [list(c.data.captions) for c in stages] == [["short"], ["long"], ["clean"]]
    assert [c.train_text for c in stages] == ["frozen", "lora", "adapter"]
    resolutions = [c.data.resolution for c in stages]
    assert resolutions == sorted(set(resolutions))
    for config, mean_side in zip(stages, (537, 771, 1326), strict=True):
        assert config.data.resolution < mean_side, "images are not to be enlarged"
        assert (config.conditioning.layer_tap, config.conditioning.mask_padding) == ("last", False)
        assert (config.conditioning.projection, config.objective.prediction) == ("linear", "epsilon")
        assert (config.sampler.solver, config.sampler.steps, config.sampler.guidance) == ("dpm", 100, 7.5)
        assert (config.codec.hub, config.codec.scaling_factor) == ("madebyollin/sdxl-vae-fp16-fix", 0.13025)
        assert (config.text_encoder.name, config.run_dir, config.precision) == ("llama2_7b", "runs/paper", "bf16")
        assert not config.data.demo and config.data.caption_dropout == 0.1
        assert config.data.bucket_multiple == config.codec.factor * 8
        buckets = make_buckets(config.data.resolution, config.data.bucket_multiple, config.data.max_aspect)
        assert len(buckets) >= 3 and {side % 64 for bucket in buckets for side in bucket[-2:]} == {0}
        assert config.micro_batch_size is not None
        for processes in (1, 8, 32):
            assert config.batch_size % (config.micro_batch_size * processes) == 0
    assert stages[1].lora == stages[2].lora, "stage 3 applies stage 2's adapter"


def test_trained_weights_are_kept_in_fp32(tiny_arguments: list[str], demo_folder: Path, codec_folder: Path, tmp_path: Path) -> None:
    """A bfloat16 weight of 1 would forget steps of 1e-4: they are an eightieth of what it can tell apart there."""
    run = tmp_path / "run"
    arguments = stage_arguments(tiny_arguments, demo_folder, codec_folder, run)
    assert compose_train(arguments).precision == "bf16"
    for stage in ("stage=1", "stage=2"):
        assert train_here([*arguments, stage, "max_steps=2"]) == 0
    assert all(record["loss"] > 0 for record in records(run / "stage2"))
    setup = build_here([*arguments, "stage=2", "max_steps=4"])
    trained = setup.joint.trained()
    assert len(trained) > 100 and any("lora_" in name for name in trained)
    assert {p.dtype for p in trained.values()} == {value.dtype for value in setup.ema.values} == {torch.float32}
    saved = tensors(newest(run / "stage2"))
    assert any("optimizer" in name for name in saved) and any("text_encoder_lora" in name for name in saved)
    assert not [name for name, tensor in saved.items() if tensor.is_floating_point() and tensor.dtype != torch.float32]
    sizes = ("height=64", "width=64", f"output_dir={tmp_path / 'out'}")
    assert sample_here(f"ckpt={run}", "prompt=a red circle", "steps=2", *sizes) == 0
    assert (tmp_path / "out" / "00000.png").is_file()


CUDA = torch.cuda.is_available()
BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None


def recipe(*overrides: str) -> TrainConfig:
    return compose_train(["preset=paper", "recipe=24gb", "data.shards=x", *overrides])


@pytest.mark.parametrize(("stage", "unet"), [(2, "paper"), (3, "sdxl")])
def test_what_it_sets(stage: int, unet: str) -> None:
    plain = compose_train(["preset=paper", "data.shards=x", f"stage={stage}"])
    small = recipe(f"stage={stage}", f"unet={unet}")
    assert (small.text_encoder.quantization, small.optimizer.name, small.ema_device) == ("4bit", "adamw8bit", "cpu")
    assert small.gradient_checkpointing and small.micro_batch_size == 8 and small.unet.lora_rank > 0
    assert recipe(f"stage={stage}", "unet.lora_rank=0").unet.lora_rank == 0, "the whole U-Net by one key"
    assert [count_micro_batches(small, cards) for cards in (1, 4, 8, 32)] == [4, 1, 1, 1], "on any number of cards"
    other = recipe(f"stage={stage}", f"unet={unet}", "batch_size=20")
    assert [at_once(other, cards) for cards in (1, 2, 4)] == [5, 5, 5] and count_micro_batches(other, 1) == 4
    user_error("batch_size=20 is not a whole multiple of 3 processes", count_micro_batches, other, 3)
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


def test_stages_with_an_adapter_on_the_unet(tiny_arguments: list[str], demo_folder: Path, codec_folder: Path, tmp_path: Path) -> None:
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


@pytest.mark.skipif(CUDA and BITSANDBYTES, reason="here it works")
def test_the_recipe_is_refused_where_it_cannot_run(tiny_arguments: list[str], tmp_path: Path) -> None:
    own = [argument for argument in tiny_arguments if not argument.startswith("optimizer.name=")]  # the recipe's, then
    arguments = [*own, "recipe=24gb", f"run_dir={tmp_path / 'run'}"]
    lacking = "bitsandbytes is not installed" if CUDA else "there is no CUDA device"
    for more, said in (
        ([], r"text_encoder\.quantization=4bit needs a CUDA device and the package bitsandbytes"),
        (["text_encoder.quantization=null"], rf"optimizer\.name=adamw8bit needs .* {lacking}; set optimizer\.name=adamw"),
    ):
        user_error(said, train_here, [*arguments, *more])
