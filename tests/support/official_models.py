"""A tiny random folder in the layout of the published weights, and what a plain pipeline of the libraries makes of it."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from paradiffusion.checkpoints.layouts import find_checkpoint
from paradiffusion.compose import compose_sample
from paradiffusion.config import ConditioningConfig, FrozenConfig, ObjectiveConfig, SampleConfig, UNetConfig
from paradiffusion.sampling.pipeline import load_models
from paradiffusion.sampling.run import sample
from paradiffusion.sampling.sampler import sample_latents
from paradiffusion.text.tiny import build_tiny

# As an old library wrote it: nothing says how the trajectory ends.
SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler", "_diffusers_version": "0.20.0", "algorithm_type": "dpmsolver++", "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "lambda_min_clipped": float("-inf"), "lower_order_final": True,
    "num_train_timesteps": 1000, "prediction_type": "epsilon", "solver_order": 2, "solver_type": "midpoint", "steps_offset": 1,
    "thresholding": False, "timestep_spacing": "linspace", "trained_betas": None, "use_karras_sigmas": False, "variance_type": None,
}  # fmt: skip


def make_unet(seed: int = 0, width: int = 48, blocks: str = "Simple", projection: bool = True) -> UNet2DConditionModel:
    """The paper's kind of U-Net, or with ``blocks=""`` one of ordinary cross-attention blocks.

    Without a ``projection`` of its own, its cross-attention is as wide as the text.
    """
    outer = {"": ("DownBlock2D", "UpBlock2D"), "Simple": ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")}[blocks]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            down_block_types=(outer[0], f"{blocks}CrossAttnDownBlock2D"),
            mid_block_type=f"UNetMidBlock2D{blocks}CrossAttn",
            up_block_types=(f"{blocks}CrossAttnUpBlock2D", outer[1]),
            layers_per_block=1,
            cross_attention_dim=24 if projection else width,
            attention_head_dim=8 if blocks else 2,
            norm_num_groups=8,
            encoder_hid_dim=width if projection else None,
            encoder_hid_dim_type="text_proj" if projection else None,
            resnet_time_scale_shift="scale_shift" if blocks else "default",
        )
        for parameter in unet.parameters():  # away from zeros and from attention that is the same everywhere
            parameter.data += 0.05 * torch.randn(parameter.shape)
    return unet.eval()


MADE = tempfile.TemporaryDirectory(prefix="made_")


def copied(write: Callable[..., None], folder: Path, *given: Any) -> Path:
    """In ``folder`` a copy of what ``write(folder, *given)`` writes, which takes a second and is done once."""
    kept = Path(MADE.name) / hashlib.sha256(repr((write.__name__, given)).encode()).hexdigest()
    if not kept.exists():
        write(kept, *given)
    return shutil.copytree(kept, folder, dirs_exist_ok=True)


def make_official(folder: Path, codec_folder: Path, lora: dict[str, Any] | None = None, **scheduler: Any) -> Path:
    """Write the folder; ``lora`` are arguments of PEFT's LoraConfig, ``scheduler`` replaces keys of SCHEDULER."""
    copied(_write_official, folder, codec_folder, lora)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({**SCHEDULER, **scheduler}))
    return folder


def _write_official(folder: Path, codec_folder: Path, lora: dict[str, Any] | None) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    build_tiny(folder / "Llama-2-7b-hf")
    shutil.copytree(codec_folder, folder / "sdxl-vae-fp16-fix")
    model = AutoModel.from_pretrained(folder / "Llama-2-7b-hf", dtype=torch.float32)
    make_unet(width=model.config.hidden_size).save_pretrained(folder / "unet")
    if lora is not None:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            adapted = get_peft_model(model, LoraConfig(lora_dropout=0.0, **lora))
            for name, parameter in adapted.named_parameters():
                if ".lora_B" in name:
                    parameter.data.normal_(std=0.2)
        adapted.save_pretrained(folder / "text_encoder_lora")


@torch.no_grad()
def reference(folder: Path, prompt: str, seed: int, height: int, width: int, steps: int, guidance: float, unet: str = "unet") -> Tensor:
    """What the libraries' own classes draw, used in the usual way: latents [1, 4, h, w] and image [H, W, 3] in 0..1."""
    from peft import PeftModel
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "Llama-2-7b-hf")
    encoder = AutoModel.from_pretrained(folder / "Llama-2-7b-hf", dtype=torch.float32)
    adapter = folder / unet.replace("unet", "text_encoder_lora")
    adapter = adapter if adapter.is_dir() else folder / "text_encoder_lora"
    if adapter.is_dir():
        encoder = PeftModel.from_pretrained(encoder, adapter).eval()

    def encode(text: str) -> Tensor:
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]][:256]
        padded = torch.tensor([ids + [tokenizer.eos_token_id] * (256 - len(ids))])
        return encoder(input_ids=padded, attention_mask=(torch.arange(256) < len(ids)).long()[None]).last_hidden_state

    denoiser = UNet2DConditionModel.from_pretrained(folder / unet, torch_dtype=torch.float32)
    scheduler = DPMSolverMultistepScheduler.from_pretrained(folder / "scheduler", final_sigmas_type="sigma_min", steps_offset=1)
    vae = AutoencoderKL.from_pretrained(folder / "sdxl-vae-fp16-fix", torch_dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn((1, 4, height // 8, width // 8), generator=generator)
    features = torch.cat([encode(""), encode(prompt)])
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        null, text = denoiser(torch.cat([latents] * 2), timestep, encoder_hidden_states=features).sample.chunk(2)
        guided = null + guidance * (text - null) if guidance > 1 else text  # as the released pipeline has it
        latents = scheduler.step(guided, timestep, latents, generator=generator).prev_sample
    image = vae.decode(latents / vae.config.scaling_factor).sample
    return (image / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0)


def as_bin(folder: Path, stem: str) -> None:
    """Replace a safetensors file by one of the old form."""
    path = folder / f"{stem}.safetensors"
    torch.save(load_file(path), folder / f"{stem}.bin")
    path.unlink()


def make_ours(folder: Path, codec_folder: Path, **changes: Any) -> Path:
    """A checkpoint of ours with random weights, the text encoder's adapter among them; ``changes`` are TrainConfig's."""
    return copied(_write_ours, folder, codec_folder, changes)


def _write_ours(folder: Path, codec_folder: Path, changes: dict[str, Any]) -> None:
    from paradiffusion.checkpoints.layouts import describe, save_weights
    from paradiffusion.checkpoints.manifest import write_manifest
    from paradiffusion.config import CodecConfig, LoraConfig, TextEncoderConfig, TrainConfig, UNetConfig
    from paradiffusion.models.codec import load_codec
    from paradiffusion.models.joint import build_joint
    from paradiffusion.text.encoder import attach_lora, load_text_encoder

    arguments = dict(make_unet().config)
    derived = ("in_channels", "out_channels", "encoder_hid_dim", "encoder_hid_dim_type")
    arguments = {k: v for k, v in arguments.items() if not k.startswith("_") and k not in derived}
    values: dict[str, Any] = {
        "train_text": "lora",
        "text_encoder": TextEncoderConfig(),
        "lora": LoraConfig(rank=2, alpha=6, target_modules=["v_proj", "q_proj"]),
        "unet": UNetConfig(arguments=arguments),
        "codec": CodecConfig(path=str(codec_folder)),
    }
    config = TrainConfig(**{**values, **changes})
    for key, value in changes.get("unet", UNetConfig()).__dict__.items():
        if key != "arguments":
            setattr(config.unet, key, value)
    config.unet.arguments = arguments
    config.sampler.steps, config.sampler.guidance = 3, 4.0
    encoder, codec = load_text_encoder(config.text_encoder, config.conditioning), load_codec(config.codec)
    attach_lora(encoder, config.lora)
    joint = build_joint(config, encoder.width, encoder)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in joint.trained().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    state = {name: parameter.detach() for name, parameter in joint.trained().items()}
    save_weights(folder, joint, state, describe(config, 5, encoder.source, codec.source))
    write_manifest(folder)


MODERN = {
    "conditioning": ConditioningConfig(
        name="modern", layer_tap="mean", projection="refiner", refiner_width=16, refiner_layers=1, refiner_heads=2,
        layout_patch=2, key_positions=True, mask_padding=True, max_tokens=32
    ),
    "objective": ObjectiveConfig(prediction="flow"),
    "unet": UNetConfig(coordinates=2),
}  # fmt: skip


def latents(folder: Path, codec: Path | None = None, **scheduler: Any) -> torch.Tensor:
    """What a folder draws of one prompt, with settings of its own ``scheduler`` changed."""
    frozen = FrozenConfig(path=codec and str(codec))
    models = load_models(find_checkpoint(folder), SampleConfig(codec=frozen), device="cpu")
    models.sampler.steps, models.sampler.guidance = 3, 4.0
    if scheduler:
        models.objective.schedulers = partial(models.objective.usual_scheduler, **scheduler)
    conditioning = models.encode(["a red circle"])
    return sample_latents(models.denoise, models.objective, conditioning, [4], (4, 8, 8), models.sampler, "cpu", torch.float32)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def draw(folder: Path, cases: list[dict[str, Any]], out: Path, *arguments: str) -> list[np.ndarray]:
    """sample.py's own path; images [H, W, 3] in 0..1."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "cases.jsonl").write_text("\n".join(json.dumps(case) for case in cases))
    keys = [f"ckpt={folder}", f"prompt_file={out / 'cases.jsonl'}", f"output_dir={out / 'images'}", *arguments]
    assert sample(compose_sample(keys)) == 0
    return [np.asarray(Image.open(path)) / 255 for path in sorted((out / "images").glob("0*.png"))]
