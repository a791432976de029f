"""The one trained module: U-Net, refiner and, where LoRA is trained, the language model, with one forward.

It is prepared once and always called through its wrapper, so that DeepSpeed holds one engine and DDP sees every gradient.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from paradiffusion.config import TrainConfig
from paradiffusion.diffusion.objective import Objective, make_objective
from paradiffusion.models.layout import layout_losses
from paradiffusion.models.unet import (
    add_lora,
    apart_from_image,
    build_unet,
    embed_scales,
    layout_arguments,
    number_keys,
    with_coordinates,
)  # fmt: skip
from paradiffusion.models.vision import Aligner, vision_config
from paradiffusion.randomness import seed_from
from paradiffusion.text.encoder import TextEncoder
from paradiffusion.text.refiner import Refiner
from paradiffusion.text.scores import ScoreTokens


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
        vision: [B, rows, columns, D], what a vision encoder sees in the pictures (models/vision.py); None: nothing is aligned with it.
        scores: [B, S] int64, the bins of the samples' scores (text/scores.py); None: unknown.
        denoise: False: the layout loss alone, without the denoiser (objective.layout_share).
        scales: [B] guidance scales, of a batch whose ``latents`` and ``noise`` a teacher made (training/distillation.py).
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
    denoise: bool = True
    vision: Tensor | None = None
    scores: Tensor | None = None
    scales: Tensor | None = None


class Losses(NamedTuple):
    """What one forward gives.

    Attributes:
        total: a scalar, fp32, to take gradients of: ``diffusion`` + layout_weight x ``layout`` + align_weight x ``align``.
        diffusion: the weighted mean of ``errors``, a detached scalar; where the denoiser is left out, the same as ``layout``.
        errors: each noise level's unweighted loss, [R * B], detached; where the denoiser is left out, the estimate's.
        layout: the mean squared error of the layout head's estimate over the captions that were told, a detached scalar; None
            without a layout head.
        align: the weighted mean of the aligner's loss, a detached scalar; None where nothing is aligned.
    """

    total: Tensor
    diffusion: Tensor
    errors: Tensor
    layout: Tensor | None
    align: Tensor | None = None


class JointModel(nn.Module):
    """Everything that is trained.

    Args:
        text_encoder: given only where its LoRA is trained; a frozen one stays outside.
        key_positions: as ConditioningConfig has it.
        aligner: of the denoiser with a vision encoder, in training alone.
    Attributes:
        start: of adapters that began as a part of the weights, what they began as, by parameter name (PiSSA).
    """

    def __init__(
        self,
        unet: Any,
        refiner: Refiner | None,
        objective: Objective,
        coordinates: int,
        text_encoder: TextEncoder | None = None,
        key_positions: bool = False,
        aligner: Aligner | None = None,
    ) -> None:
        super().__init__()
        if key_positions:
            number_keys(unet)
        self.unet, self.refiner, self.text_encoder, self.aligner = unet, refiner, text_encoder, aligner
        self.objective, self.coordinates = objective, coordinates
        self.start: dict[str, Tensor] = {}

    def refine(self, features: Tensor, mask: Tensor | None) -> Tensor:
        """Language-model features to what the U-Net's linear projection takes."""
        return features if self.refiner is None else self.refiner(features.to(self.refiner.embed.weight.dtype), mask)

    @property
    def score_tokens(self) -> ScoreTokens | None:
        return None if self.refiner is None else self.refiner.scores

    def with_scores(self, features: Tensor, mask: Tensor | None, bins: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Refined features and their mask with the tokens of scores before them, where there are any; see ``ScoreTokens.forward``."""
        tokens = self.score_tokens
        return (features, mask) if tokens is None else tokens(features, mask, bins)

    def estimate(self, features: Tensor, mask: Tensor | None, height: int, width: int) -> Tensor | None:
        """The layout head's estimate of the latents, [B, C, height, width], from refined features; None without a head."""
        head = None if self.refiner is None else self.refiner.layout
        return None if head is None else head(features, mask, height, width)

    def denoise(
        self, latents: Tensor, times: Tensor, features: Tensor, mask: Tensor | None, estimate: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The prediction [B, C, h, w] for noised latents, times [B] and refined features [B, L, D].

        Inputs take the U-Net's dtype, which sampling holds in bfloat16; in training its frozen matrices alone may be.

        Args:
            estimate: what ``estimate`` gives, where it was called before.
            scales: [B] guidance scales, for a distilled denoiser.
        """
        dtype = next(p for p in self.unet.parameters() if p.ndim == 1).dtype
        latents, features = latents.to(dtype), features.to(dtype)
        if estimate is None:
            estimate = self.estimate(features, mask, *latents.shape[-2:])
        sample = with_coordinates(latents, self.coordinates)
        if estimate is not None:
            sample = torch.cat([sample, estimate := estimate.to(dtype)], dim=1)
        if mask is not None:
            features, mask = apart_from_image(self.unet, features, mask, *latents.shape[-2:])
        conditioning = {"encoder_hidden_states": features, "encoder_attention_mask": mask}
        if scales is not None:
            conditioning["timestep_cond"] = embed_scales(scales).to(dtype)
        prediction = self.unet(sample, timestep=times, **conditioning, return_dict=False)[0]
        return prediction if estimate is None else prediction + self.objective.slope(times, prediction) * estimate

    def forward(self, batch: LossBatch) -> Losses:
        """The losses of one micro-batch: the text's features through the projection to the denoiser of the noised latents."""
        clean, times, levels = batch.latents, batch.times, len(batch.times) // len(batch.latents)
        layout: Tensor | None = None
        align: Tensor | None = None
        text, mask = self.with_scores(self.refine(self.read(batch).to(clean.dtype), batch.mask), batch.mask, batch.scores)
        estimate = self.estimate(text, mask, *clean.shape[-2:])
        if estimate is not None and not batch.denoise:
            total, layout, apart = layout_losses(estimate, clean, batch.weights, batch.told)
            return Losses(self.objective.config.layout_weight * total, layout, at_each(levels, apart), layout)
        latents = at_each(levels, clean)
        noised = self.objective.add_noise(latents, batch.noise, times)
        # A copy at one level too: its gradients are summed by themselves then, in the order in which they always were.
        given = None if estimate is None else estimate.repeat(levels, 1, 1, 1)
        prediction = self.denoise(noised, times, at_each(levels, text), at_each(levels, mask), given, batch.scales)
        target = self.objective.target(latents, batch.noise, times)
        errors = (prediction.float() - target.float()).square().mean(dim=(1, 2, 3))  # [R * B]
        loss = (errors * self.objective.weight(times) * at_each(levels, batch.weights)).mean()
        total = loss
        if estimate is not None and batch.scales is None:  # it estimates the data, not latents on a teacher's way
            share, layout, _ = layout_losses(estimate, clean, batch.weights, batch.told)
            total = total + self.objective.config.layout_weight * share
        if self.aligner is not None:  # always, so that its weights have gradients in every step
            share = (self.aligner(batch.vision) * at_each(levels, batch.weights)).mean()
            total = total + self.objective.config.align_weight * share
            align = None if batch.vision is None else share.detach()
        return Losses(total, loss.detach(), errors.detach(), layout, align)

    def read(self, batch: LossBatch) -> Tensor:
        """The language model's features [B, L, D]: given, or from the text encoder whose LoRA is trained."""
        if batch.features is not None:
            return batch.features
        assert self.text_encoder is not None
        features: Tensor = self.text_encoder(batch.ids, batch.id_mask, batch.prefix)
        return features if batch.rows is None else features[batch.rows]

    def trained(self) -> dict[str, nn.Parameter]:
        """Name and parameter of everything that is trained, in a fixed order."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


def at_each(levels: int, rows: Any) -> Any:
    """``rows`` once for each of the noise levels, all samples of the first before the second: their text is read but once."""
    return rows if rows is None or levels == 1 else rows.repeat(levels, *(1,) * (rows.ndim - 1))


def build_joint(
    config: TrainConfig, encoder_width: int, text_encoder: TextEncoder | None = None, device: torch.device | None = None
) -> JointModel:
    """The joint module with fresh weights, a function of ``config.seed``; on ``device`` "meta" with none."""
    seed = seed_from("weights", config.seed) % (1 << 31)
    refiner, aligner, conditioning = None, None, config.conditioning
    with device or nullcontext():
        unet: Any = build_unet(config.unet, config.codec, conditioning, encoder_width, seed, config.objective.distill_steps > 0)
        add_lora(unet, config.unet, seed + 2)
        if conditioning.projection == "refiner":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed + 1)
                parts = ("width", "layers", "heads", "kernel", "reach")
                shape = {part: getattr(conditioning, f"refiner_{part}") for part in parts}
                layout = layout_arguments(conditioning, config.codec.latent_channels)
                refiner = Refiner(encoder_width, **shape, layout=layout, scores=dict(conditioning.scores))
                refiner.requires_grad_(not config.objective.distill_steps)  # the text is read as the teacher reads it
        if config.objective.align_weight:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed + 3)
                aligner = Aligner(unet, vision_config(config.objective).hidden_size)
    if config.gradient_checkpointing and config.gradient_checkpointing != "half":
        unet.enable_gradient_checkpointing()
    objective, positions = make_objective(config.objective), conditioning.key_positions
    return JointModel(unet, refiner, objective, config.unet.coordinates, text_encoder, positions, aligner)
