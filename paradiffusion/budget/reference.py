"""The plain way to do the same work with the same libraries, to measure ours beside.

Training follows what diffusers' text-to-image example does: every caption padded to the maximum, the language model run
on the padded batch, PyTorch's default AdamW, diffusers' EMAModel, the loss read in every step. Sampling is the
official inference code's way: prompts and empty prompts padded to the maximum and encoded anew with each batch, guidance
in every step. The models are those of the stage itself, so the difference is what is done with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel
from torch import Tensor

from paradiffusion.config import SamplerConfig
from paradiffusion.data.loader import Batch
from paradiffusion.models.joint import LossBatch
from paradiffusion.sampling.pipeline import InferenceModels
from paradiffusion.text.encoder import TextEncoder
from paradiffusion.training.trainer import Trainer


def padded(encoder: TextEncoder, captions: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, L] with L the maximum, however short the captions are."""
    tokens = encoder.tokenize(list(captions))
    missing = encoder.limit + tokens.prefix - tokens.ids.shape[1]
    ids = F.pad(tokens.ids, (0, missing), value=encoder.pad_id)
    return ids.to(device), F.pad(tokens.mask, (0, missing)).to(device)


class PlainTrainer:
    """Optimiser steps of a stage's models, written straightforwardly, with an optimiser and an average of its own."""

    def __init__(self, ours: Trainer) -> None:
        config = ours.config.optimizer
        self.ours = ours
        self.parameters = list(ours.joint.trained().values())
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            eps=config.eps,
        )
        self.ema: Any = EMAModel(self.parameters, decay=ours.config.ema_decay)

    def step(self, batch: Batch) -> float:
        """One step on ``batch``; returns the loss."""
        ours, device = self.ours, self.ours.device
        encoder, codec, joint = ours.encoder, ours.codec, ours.joint
        with torch.no_grad():
            images = batch.images.to(device, codec.vae.dtype)
            latents = codec.to_unit(codec.vae.encode(images).latent_dist.sample())
        noise = torch.randn_like(latents)
        times = joint.objective.times(torch.rand(len(latents), device=device), latents.shape[2:])
        ids, id_mask = padded(encoder, batch.captions, device)
        prefix = len(encoder.prefix_ids)
        inputs: dict[str, Any] = {
            "latents": latents,
            "noise": noise,
            "times": times,
            "weights": torch.ones(len(latents), device=device),
            "mask": id_mask[:, prefix:] if encoder.settings.mask_padding else None,
        }
        if joint.text_encoder is None:
            with torch.no_grad():
                inputs["features"] = encoder(ids, id_mask, prefix)
        else:
            inputs |= {"ids": ids, "id_mask": id_mask, "prefix": prefix}
        loss = ours.engine.model(LossBatch(**inputs)).total
        ours.accelerator.backward(loss)
        ours.accelerator.clip_grad_norm_(self.parameters, ours.config.optimizer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.parameters)
        return float(loss.item())


@torch.no_grad()
def plain_sample(
    models: InferenceModels, prompts: Sequence[str], seeds: Sequence[int], side: int, settings: SamplerConfig
) -> Tensor:
    """Draw one batch of square images: uint8 [B, side, side, 3] on the CPU."""
    device, encoder, count = models.device, models.text_encoder, len(prompts)
    ids, id_mask = padded(encoder, [""] * count + list(prompts), device)
    prefix = len(encoder.prefix_ids)
    mask = id_mask[:, prefix:] if encoder.settings.mask_padding else None
    features = models.joint.refine(encoder(ids, id_mask, prefix).to(models.dtype), mask)

    scheduler = models.objective.scheduler(settings.solver)
    scheduler.set_timesteps(settings.steps, device=device)
    shape = models.codec.latent_shape(side, side)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    latents = torch.stack(noise).to(device) * getattr(scheduler, "init_noise_sigma", 1.0)
    for timestep in scheduler.timesteps:
        both = torch.cat([latents, latents])
        if hasattr(scheduler, "scale_model_input"):
            both = scheduler.scale_model_input(both, timestep)
        times = timestep.float().to(device).expand(2 * count)
        null, prompt = models.joint.denoise(both.to(models.dtype), times, features, mask).float().chunk(2)
        prediction = null + settings.guidance * (prompt - null)
        latents = scheduler.step(prediction, timestep, latents).prev_sample
    return models.decode(latents)
