"""Everything that a prompt passes on its way to an image, loaded from a checkpoint or lent by the training loop."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from paradiffusion.config import (
    CodecConfig,
    ConditioningConfig,
    LoraConfig,
    ObjectiveConfig,
    SamplerConfig,
    TextEncoderConfig,
)
from paradiffusion.diffusion.objective import Objective
from paradiffusion.errors import UserError
from paradiffusion.models.codec import Codec, load_codec
from paradiffusion.models.joint import JointModel
from paradiffusion.models.layouts import (
    REFINER,
    UNET,
    check_complete,
    copy_tensors,
    load_adapter,
    parse,
    read_description,
    read_weights,
)
from paradiffusion.models.unet import downsampling
from paradiffusion.text.conditioning import Conditioning
from paradiffusion.text.encoder import DTYPES, TextEncoder, load_text_encoder
from paradiffusion.text.refiner import Refiner


@dataclass
class InferenceModels:
    """Everything that a prompt passes on its way to an image; what the sampler works with.

    Attributes:
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

    @property
    def latent_channels(self) -> int:
        return self.codec.config.latent_channels

    @property
    def factor(self) -> int:
        return self.codec.config.factor

    @property
    def multiple(self) -> int:
        return self.factor * downsampling(self.joint.unet)

    def count_truncated(self, prompts: list[str]) -> int:
        """How many prompts lose text at the encoder's maximum."""
        return self.text_encoder.tokenize(prompts).truncated

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        """Refined features of prompts and of the null prompt (the encoded empty string)."""
        features, mask = self._features(prompts)
        null_features, null_mask = self._features([""])
        return Conditioning(features, mask, null_features, null_mask)

    def _features(self, prompts: list[str]) -> tuple[Tensor, Tensor | None]:
        tokens = self.text_encoder.tokenize(prompts).to(self.device)
        # One prompt at a time: a language model in bfloat16 rounds differently in another batch, and an image must not
        # depend on its neighbours. The denoiser, which takes nearly all of the time, works in batches.
        rows = [self._one(tokens.ids[i : i + 1], tokens.mask[i : i + 1], tokens.prefix) for i in range(len(prompts))]
        return torch.cat(rows), self.text_encoder.feature_mask(tokens)

    def _one(self, ids: Tensor, mask: Tensor, prefix: int) -> Tensor:
        if self.text_encoder.settings.mask_padding:
            length = int(mask.sum())
            features = self.text_encoder(ids[:, :length], mask[:, :length], prefix)
            refined = self.joint.refine(features.to(self.dtype), mask[:, prefix:length])
            return torch.nn.functional.pad(refined, (0, 0, 0, ids.shape[1] - length))
        return self.joint.refine(self.text_encoder(ids, mask, prefix).to(self.dtype), None)

    @torch.no_grad()
    def denoise(self, latents: Tensor, times: Tensor, features: Tensor, mask: Tensor | None) -> Tensor:
        """The denoiser's prediction, [B, C, h, w]."""
        return self.joint.denoise(latents, times, features, mask)

    def decode(self, latents: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] on the CPU."""
        images = self.codec.decode(latents.to(self.device))
        return ((images + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).to("cpu", torch.uint8)


def load_models(
    checkpoint: Path,
    device: str | None = None,
    dtype: str = "float32",
    text_encoder_path: str | None = None,
    codec_path: str | None = None,
) -> InferenceModels:
    """Build everything that a checkpoint describes, ready to sample.

    Args:
        device: None for CUDA where there is one, else the CPU.
        text_encoder_path, codec_path: where the frozen models lie on this machine, if not where the checkpoint says.
    Raises:
        UserError: when a part is missing, damaged, or not the one that the checkpoint was trained with.
    """
    description = read_description(checkpoint)
    encoder_config = parse(TextEncoderConfig, description["text_encoder"])
    codec_config = parse(CodecConfig, description["codec"])
    encoder_config.path = text_encoder_path or encoder_config.path
    codec_config.path = codec_path or codec_config.path
    conditioning = parse(ConditioningConfig, description["conditioning"])
    try:
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UserError(f"device={device} is unknown; choose one of cpu, cuda, or cuda:0 and the like.") from None

    codec = load_codec(codec_config, description["codec"]["hash"])
    encoder = load_text_encoder(encoder_config, conditioning, description["text_encoder"]["hash"])
    state = read_weights(checkpoint)
    if description["lora"] is not None:
        load_adapter(encoder, state, parse(LoraConfig, description["lora"]))
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(checkpoint / UNET))
    refiner = None
    if conditioning.projection == "refiner":
        refiner = Refiner(**json.loads((checkpoint / REFINER / "config.json").read_text()))
    objective = Objective(parse(ObjectiveConfig, description["objective"]))
    joint = JointModel(unet, refiner, objective, description["coordinates"])
    check_complete(set(joint.state_dict()), state)
    copy_tensors(joint, {name: tensor for name, tensor in state.items() if not name.startswith("text_encoder.")})
    joint.requires_grad_(False).eval().to(target, DTYPES[dtype])
    encoder.to(target)
    codec.to(target)
    return InferenceModels(
        joint=joint,
        text_encoder=encoder,
        codec=codec,
        objective=objective,
        sampler=parse(SamplerConfig, description["sampler"]),
        resolution=description["resolution"],
        device=target,
        dtype=DTYPES[dtype],
        checkpoint=str(checkpoint),
        step=description["step"],
        provenance=description["provenance"],
    )
