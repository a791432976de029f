"""Everything that a prompt passes on its way to an image, loaded from a checkpoint or lent by the training loop."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from paradiffusion.checkpoints.layouts import (
    REFINER,
    UNET,
    check_complete,
    copy_tensors,
    load_adapter,
    merge_unet_lora,
    objective_of,
    parse,
    place_frozen_models,
    read_description,
    read_weights,
)
from paradiffusion.config import (
    CodecConfig,
    ConditioningConfig,
    LoraConfig,
    SamplerConfig,
    TextEncoderConfig,
)
from paradiffusion.diffusion.objective import Objective
from paradiffusion.errors import UserError
from paradiffusion.models.codec import Codec, load_codec
from paradiffusion.models.joint import JointModel
from paradiffusion.models.unet import downsampling
from paradiffusion.text.conditioning import Conditioning, pad_length
from paradiffusion.text.encoder import DTYPES, TextEncoder, load_text_encoder
from paradiffusion.text.families import lacks_bitsandbytes
from paradiffusion.text.refiner import Refiner

# Features of a prompt take 2 MB at the paper's size in half precision.
KEPT_PROMPTS = 64


def takes_any_size(unet: Any) -> bool:
    """Whether the U-Net draws latents of any size: its upsampling blocks are told the size that they must come to.

    The blocks of the paper's U-Net (SimpleCrossAttn, ResnetUpsample) double what they get, whatever it was before.
    """
    return set(unet.config["up_block_types"]) <= {"CrossAttnUpBlock2D", "UpBlock2D"}


@dataclass
class InferenceModels:
    """Everything that a prompt passes on its way to an image; what the sampler works with.

    What a prompt is encoded to depends on the prompt and the weights alone, so it is kept: of the null prompt as long as
    this object lives, of the latest ``KEPT_PROMPTS`` others until newer ones come. Weights that change need a new object.

    Attributes:
        estimated: the features that the layout head read last, the size that it was asked for, and its estimate.
        offload: keep the text encoder on the CPU but while prompts are encoded.
        multiple: an image's sides must be multiples of this many pixels.
        resolution: default height and width.
    """

    joint: JointModel
    text_encoder: TextEncoder
    codec: Codec
    objective: Objective
    sampler: SamplerConfig
    resolution: int
    device: torch.device
    dtype: torch.dtype
    checkpoint: str
    step: int
    provenance: dict[str, Any]
    offload: bool = False
    kept: dict[str, Tensor] = field(default_factory=dict)
    estimated: tuple[Tensor, torch.Size, Tensor | None] | None = None

    @property
    def latent_channels(self) -> int:
        return self.codec.config.latent_channels

    @property
    def factor(self) -> int:
        return self.codec.config.factor

    @property
    def multiple(self) -> int:
        return self.factor * (1 if takes_any_size(self.joint.unet) else downsampling(self.joint.unet))

    def count_truncated(self, prompts: list[str]) -> int:
        """How many prompts lose text at the encoder's maximum."""
        return self.text_encoder.tokenize(prompts).truncated

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        """Refined features of prompts and of the null prompt (the encoded empty string)."""
        self.encode_ahead(prompts)
        features, mask = self._batch(prompts)
        null_features, null_mask = self._batch([""])
        return Conditioning(features, mask, null_features, null_mask)

    @torch.no_grad()
    def encode_ahead(self, prompts: list[str]) -> None:
        """Encode the prompts that are not kept yet, and keep them; many at once where the text encoder is offloaded."""
        wanted = dict.fromkeys(prompt for prompt in prompts if prompt)
        for prompt in wanted:
            if prompt in self.kept:
                self.kept[prompt] = self.kept.pop(prompt)  # to the end: the first are the next to go
        missing = [prompt for prompt in ("", *wanted) if prompt not in self.kept]
        if not missing:
            return
        if self.offload:
            self.text_encoder.to(self.device)
        # One prompt at a time: a language model in bfloat16 rounds differently in another batch, and an image must not
        # depend on its neighbours. The denoiser, which takes nearly all of the time, works in batches.
        for prompt in missing:
            self.kept[prompt] = self._one(prompt)
        newest = max(KEPT_PROMPTS, len(wanted))
        for prompt in [prompt for prompt in self.kept if prompt][:-newest]:
            del self.kept[prompt]
        if self.offload:
            self.text_encoder.to("cpu")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _one(self, prompt: str) -> Tensor:
        """Refined features of a prompt, [1, L, D]; L is its own length where padding is masked."""
        tokens = self.text_encoder.tokenize([prompt]).to(self.device)
        ids, mask, prefix = tokens.ids, tokens.mask, tokens.prefix
        if not self.text_encoder.settings.mask_padding:
            return self.joint.refine(self.text_encoder(ids, mask, prefix).to(self.dtype), None)
        length = int(mask.sum())
        features = self.text_encoder(ids[:, :length], mask[:, :length], prefix)
        return self.joint.refine(features.to(self.dtype), mask[:, prefix:length])

    def _batch(self, prompts: list[str]) -> tuple[Tensor, Tensor | None]:
        """Kept features of several prompts, padded to the length that they have as a batch, with their mask."""
        tokens = self.text_encoder.tokenize(prompts).to(self.device)
        width = tokens.ids.shape[1] - tokens.prefix
        rows = [pad_length(self.kept[prompt], width) for prompt in prompts]
        return torch.cat(rows), self.text_encoder.feature_mask(tokens)

    @torch.no_grad()
    def denoise(self, latents: Tensor, times: Tensor, features: Tensor, mask: Tensor | None) -> Tensor:
        """The denoiser's prediction, [B, C, h, w]."""
        size = latents.shape[-2:]
        if (
            self.estimated is None or self.estimated[0] is not features or self.estimated[1] != size
        ):  # once for all steps
            self.estimated = features, size, self.joint.estimate(features, mask, *size)
        return self.joint.denoise(latents, times, features, mask, self.estimated[2])

    def tune(
        self,
        compile_unet: bool = False,
        channels_last: bool = False,
        vae_tiling: bool = False,
    ) -> None:
        """Switches of speed and memory; an image changes by rounding only (by more with tiles, where it has several)."""
        if channels_last:
            self.joint.unet.to(memory_format=torch.channels_last)
        if compile_unet:
            self.joint.unet.compile()
        if vae_tiling:
            self.codec.vae.enable_tiling()

    def decode(self, latents: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] on the CPU."""
        images = self.codec.decode(latents.to(self.device))
        return ((images + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).to("cpu", torch.uint8)


def choose_device(name: str | None) -> torch.device:
    """The device that ``name`` says, None for CUDA where there is one, else the CPU; UserError where it is not to be had."""
    try:
        target = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UserError(f"device={name} is unknown; choose one of cpu, cuda, or cuda:0 and the like.") from None
    found = torch.cuda.device_count() if target.type == "cuda" else 1
    if (target.index or 0) >= found:
        has = f"{found} CUDA device(s)" if found else "no CUDA device"
        raise UserError(f"device={name} is not to be had here, where torch finds {has}; choose another, or device=cpu.")
    return target


def load_models(
    checkpoint: Path,
    device: str | None = None,
    dtype: str = "float32",
    text_encoder_path: str | None = None,
    codec_path: str | None = None,
    unet: str = UNET,
    text_encoder_dtype: str | None = None,
    codec_dtype: str | None = None,
    offload_text_encoder: bool = False,
) -> InferenceModels:
    """Build everything that a checkpoint describes, ready to sample.

    Args:
        device: None for CUDA where there is one, else the CPU.
        dtype: of U-Net and refiner.
        text_encoder_path, codec_path: where the frozen models lie on this machine, if not where the checkpoint says.
        unet: which U-Net, where a folder in the official layout holds several.
        text_encoder_dtype, codec_dtype: of the frozen models, if not the checkpoint's.
        offload_text_encoder: keep it on the CPU but while prompts are encoded.
    Raises:
        UserError: when a part is missing, damaged, or not the one that the checkpoint was trained with.
    """
    description = read_description(checkpoint, unet)
    place_frozen_models(description, checkpoint, text_encoder_path, codec_path)
    encoder_config = parse(TextEncoderConfig, description["text_encoder"])
    codec_config = parse(CodecConfig, description["codec"])
    encoder_config.dtype = text_encoder_dtype or encoder_config.dtype
    if lacks_bitsandbytes() is not None:
        encoder_config.quantization = None  # trained with 4 bits, but whole weights draw as well
    codec_config.dtype = codec_dtype or codec_config.dtype
    conditioning = parse(ConditioningConfig, description["conditioning"])
    target = choose_device(device)

    codec = load_codec(codec_config, description["codec"]["hash"])
    encoder = load_text_encoder(encoder_config, conditioning, description["text_encoder"]["hash"])
    state = merge_unet_lora(read_weights(checkpoint, unet), description.get("unet_lora"))
    if description["lora"] is not None:
        load_adapter(encoder, state, parse(LoraConfig, description["lora"]), description["lora"].get("settings"))
    denoiser = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(checkpoint / unet))
    refiner = None
    if conditioning.projection == "refiner":
        refiner = Refiner(**json.loads((checkpoint / REFINER / "config.json").read_text()))
    joint = JointModel(denoiser, refiner, objective_of(description), description["coordinates"])
    check_complete(set(joint.state_dict()), state)
    copy_tensors(joint, {name: tensor for name, tensor in state.items() if not name.startswith("text_encoder.")})
    joint.requires_grad_(False).eval().to(target, DTYPES[dtype])
    encoder.to("cpu" if offload_text_encoder else target)
    codec.to(target)
    return InferenceModels(
        joint=joint,
        text_encoder=encoder,
        codec=codec,
        objective=joint.objective,
        sampler=parse(SamplerConfig, description["sampler"]),
        resolution=description["resolution"],
        device=target,
        dtype=DTYPES[dtype],
        checkpoint=str(checkpoint if unet == UNET else checkpoint / unet),
        step=description["step"],
        provenance=description["provenance"],
        offload=offload_text_encoder,
    )
