"""The one trained module: U-Net, refiner and, where LoRA is trained, the language model, with one forward.

It is prepared once and always called through its wrapper, so that DeepSpeed holds one engine and DDP sees every gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from paradiffusion.config import TrainConfig
from paradiffusion.diffusion.objective import Objective, make_objective
from paradiffusion.models.unet import add_lora, apart_from_image, build_unet, layout_arguments, with_coordinates
from paradiffusion.randomness import seed_from
from paradiffusion.text.encoder import TextEncoder
from paradiffusion.text.refiner import Refiner


@dataclass(frozen=True)
class LossBatch:
    """One forward's input; every tensor on the model's device.

    Attributes:
        latents: [B, C, h, w].
        noise, times: [R * B, C, h, w] and [R * B] float (see Objective): R noise levels of each sample, the first of all first.
        weights: [B], 0 for a sample that stands in for one that could not be read; of a global batch their mean is 1.
        told: [B] bool, False where the caption was dropped; None where none was.
        features, mask: from the frozen text encoder, [B, L, D] and [B, L]; None where the module reads ``ids`` itself.
        ids, id_mask, prefix: tokens, [U, L], of the batch's different captions, for a text encoder with LoRA inside.
        rows: [B] int64, which row of ``ids`` each sample has.
    """

    latents: Tensor
    noise: Tensor
    times: Tensor
    weights: Tensor
    mask: Tensor | None
    told: Tensor | None = None
    features: Tensor | None = None
    ids: Tensor | None = None
    id_mask: Tensor | None = None
    prefix: int = 0
    rows: Tensor | None = None


class Losses(NamedTuple):
    """What one forward gives.

    Attributes:
        total: a scalar, fp32, to take gradients of: ``diffusion`` + layout_weight x ``layout``.
        diffusion: the weighted mean of ``errors``, a detached scalar.
        errors: each noise level's unweighted loss, [R * B], detached.
        layout: the mean squared error of the layout head's estimate over the captions that were told, a detached scalar; None
            without a layout head.
    """

    total: Tensor
    diffusion: Tensor
    errors: Tensor
    layout: Tensor | None


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

    def estimate(self, features: Tensor, mask: Tensor | None, height: int, width: int) -> Tensor | None:
        """The layout head's estimate of the latents, [B, C, height, width], from refined features; None without a head."""
        head = None if self.refiner is None else self.refiner.layout
        return None if head is None else head(features, mask, height, width)

    def denoise(
        self, latents: Tensor, times: Tensor, features: Tensor, mask: Tensor | None, estimate: Tensor | None = None
    ) -> Tensor:
        """The prediction [B, C, h, w] for noised latents, times [B] and refined features [B, L, D].

        Inputs take the U-Net's dtype: DeepSpeed and sampling hold it in bfloat16 without autocast.

        Args:
            estimate: what ``estimate`` gives, where it was called before.
        """
        dtype = next(self.unet.parameters()).dtype
        latents, features = latents.to(dtype), features.to(dtype)
        if estimate is None:
            estimate = self.estimate(features, mask, *latents.shape[-2:])
        sample = with_coordinates(latents, self.coordinates)
        if estimate is not None:
            estimate = estimate.to(dtype)
            sample = torch.cat([sample, estimate], dim=1)
        if mask is not None:
            features, mask = apart_from_image(self.unet, features, mask, *latents.shape[-2:])
        prediction = self.unet(
            sample,
            timestep=times,
            encoder_hidden_states=features,
            encoder_attention_mask=mask,
            return_dict=False,
        )[0]
        return prediction if estimate is None else prediction + self.objective.slope(times, prediction) * estimate

    def forward(self, batch: LossBatch) -> Losses:
        """The losses of one micro-batch."""
        features = batch.features
        if features is None:
            assert self.text_encoder is not None
            features = self.text_encoder(batch.ids, batch.id_mask, batch.prefix)
            features = features if batch.rows is None else features[batch.rows]
        refined = self.refine(features.to(batch.latents.dtype), batch.mask)
        estimate = self.estimate(refined, batch.mask, *batch.latents.shape[-2:])
        latents, weights, mask = batch.latents, batch.weights, batch.mask
        if (repeats := len(batch.times) // len(latents)) > 1:  # the text is read once for all noise levels
            latents, weights, refined = (
                latents.repeat(repeats, 1, 1, 1),
                weights.repeat(repeats),
                refined.repeat(repeats, 1, 1),
            )
            mask = None if mask is None else mask.repeat(repeats, 1)
        noised = self.objective.add_noise(latents, batch.noise, batch.times)
        given = None if estimate is None else estimate.repeat(repeats, 1, 1, 1)
        prediction = self.denoise(noised, batch.times, refined, mask, given)
        target = self.objective.target(latents, batch.noise, batch.times)
        errors = (prediction.float() - target.float()).square().mean(dim=(1, 2, 3))  # [R * B]
        loss = (errors * self.objective.weight(batch.times) * weights).mean()
        if estimate is None:
            return Losses(loss, loss.detach(), errors.detach(), None)
        shares = batch.weights if batch.told is None else batch.weights * batch.told
        layout = (estimate.float() - batch.latents.float()).square().mean(dim=(1, 2, 3))  # [B]
        total = loss + self.objective.config.layout_weight * (layout * shares).mean()
        seen = (layout * shares).sum() / shares.sum().clamp_min(1)
        return Losses(total, loss.detach(), errors.detach(), seen.detach())

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
                layout_arguments(conditioning, config.codec.latent_channels),
            )
    return JointModel(unet, refiner, make_objective(config.objective), config.unet.coordinates, text_encoder)
