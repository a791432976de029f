"""The one trained module: U-Net, refiner and, where LoRA is trained, the language model, with one forward.

It is prepared once and always called through its wrapper, so that DeepSpeed holds one engine and DDP sees every gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paradiffusion.config import TrainConfig
from paradiffusion.diffusion.objective import Objective
from paradiffusion.models.unet import add_lora, apart_from_image, build_unet, has_layout, with_coordinates
from paradiffusion.randomness import seed_from
from paradiffusion.text.encoder import TextEncoder
from paradiffusion.text.refiner import Refiner, average


@dataclass(frozen=True)
class LossBatch:
    """One forward's input; every tensor on the model's device.

    Attributes:
        latents, noise: [B, C, h, w].
        times: [B] float, see Objective.
        weights: [B], 0 for a sample that stands in for one that could not be read.
        features, mask: from the frozen text encoder, [B, L, D] and [B, L]; None where the module reads ``ids`` itself.
        ids, id_mask, prefix: tokens, [U, L], of the batch's different captions, for a text encoder with LoRA inside.
        rows: [B] int64, which row of ``ids`` each sample has.
    """

    latents: Tensor
    noise: Tensor
    times: Tensor
    weights: Tensor
    mask: Tensor | None
    features: Tensor | None = None
    ids: Tensor | None = None
    id_mask: Tensor | None = None
    prefix: int = 0
    rows: Tensor | None = None


class JointModel(nn.Module):
    """Everything that is trained.

    Args:
        text_encoder: given only where its LoRA is trained; a frozen one stays outside.
    """

    def __init__(
        self,
        unet: Any,
        refiner: Refiner | None,
        objective: Objective,
        coordinates: int,
        text_encoder: TextEncoder | None = None,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.refiner = refiner
        self.text_encoder = text_encoder
        self.objective = objective
        self.coordinates = coordinates

    def refine(self, features: Tensor, mask: Tensor | None) -> Tensor:
        """Language-model features to what the U-Net's linear projection takes."""
        return features if self.refiner is None else self.refiner(features.to(self.refiner.embed.weight.dtype), mask)

    def denoise(self, latents: Tensor, times: Tensor, features: Tensor, mask: Tensor | None) -> Tensor:
        """The prediction [B, C, h, w] for noised latents, times [B] and refined features [B, L, D].

        Inputs take the U-Net's dtype: DeepSpeed and sampling hold it in bfloat16 without autocast.
        """
        dtype = self.unet.conv_in.weight.dtype
        latents, features = latents.to(dtype), features.to(dtype)
        sample = with_coordinates(latents, self.coordinates)
        painted = None
        if self.refiner is not None and self.refiner.layout is not None:
            painted = self.refiner.paint(features, *latents.shape[-2:]).to(dtype)
            sample = torch.cat([sample, painted], dim=1)
        # The refiner's summary stands first; without a refiner's summary the mean of the tokens is the next best.
        summary = features[:, 0] if painted is not None else average(features, mask)
        labels = summary if self.unet.config["class_embed_type"] else None
        if mask is not None:
            features, mask = apart_from_image(self.unet, features, mask, *latents.shape[-2:])
        prediction = self.unet(
            sample,
            times,
            encoder_hidden_states=features,
            class_labels=labels,
            encoder_attention_mask=mask,
            return_dict=False,
        )[0]
        return prediction if painted is None else prediction + self.objective.slope(times, prediction) * painted

    def forward(self, batch: LossBatch) -> tuple[Tensor, Tensor]:
        """The weighted mean loss (a scalar, fp32) and each sample's unweighted loss ([B], detached)."""
        features = batch.features
        if features is None:
            assert self.text_encoder is not None
            features = self.text_encoder(batch.ids, batch.id_mask, batch.prefix)
            features = features if batch.rows is None else features[batch.rows]
        refined = self.refine(features.to(batch.latents.dtype), batch.mask)
        noised = self.objective.add_noise(batch.latents, batch.noise, batch.times)
        prediction = self.denoise(noised, batch.times, refined, batch.mask)
        target = self.objective.target(batch.latents, batch.noise, batch.times)
        errors = (prediction.float() - target.float()).square().mean(dim=(1, 2, 3))  # [B]
        loss = (errors * self.objective.weight(batch.times) * batch.weights).mean()
        return loss, errors.detach()

    def trained(self) -> dict[str, nn.Parameter]:
        """Name and parameter of everything that is trained, in a fixed order."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


def build_joint(config: TrainConfig, encoder_width: int, text_encoder: TextEncoder | None = None) -> JointModel:
    """The joint module with fresh weights, a function of ``config.seed``."""
    seed = seed_from("weights", config.seed) % (1 << 31)
    unet: Any = build_unet(config.unet, config.codec, config.conditioning, encoder_width, seed)
    add_lora(unet, config.unet, seed + 2)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    refiner = None
    conditioning = config.conditioning
    if conditioning.projection == "refiner":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            refiner = Refiner(
                encoder_width,
                conditioning.refiner_width,
                conditioning.refiner_layers,
                conditioning.refiner_heads,
                conditioning.refiner_kernel,
                config.codec.latent_channels if has_layout(conditioning) else 0,
            )
    return JointModel(unet, refiner, Objective(config.objective), config.unet.coordinates, text_encoder)
