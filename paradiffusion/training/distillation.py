"""Distillation of guided sampling into a few steps of one forward each (objective.distill_steps).

The teacher is what the stage starts from, frozen, and guided as its checkpoint says, at a scale drawn for each sample. The student
begins as a copy whose U-Net is given the scale as an embedding and trained, and that alone (guidance distillation, arXiv
2210.03142). Time is cut into as many windows as the student is to take steps. From latents noised to the start of a window the
teacher goes to its end in ``distill_substeps`` guided steps, and the student learns the straight way between the two, at any time
within the window (piecewise rectified flow, arXiv 2405.07510). A straight way in noised latents is what one x_0 and one eps make of
each other at all noise levels, for the flow and for the variance-preserving schedules alike. So the two take the places of latents
and noise, and the objective stays as it is: the student's loss is that of a stage on data. Steps of the first order from window to
window then are what was trained; twice as many, and a few more, are fine too, since within a window the way is straight.

Beside consistency distillation (arXiv 2310.04378) it needs neither an average of the student as a second teacher nor steps through
noise drawn anew: every target is the teacher's own, and what one window leaves wrong is no part of another one's target. The price is
that the teacher takes 2 ``distill_substeps`` forwards for each of the student's, without gradients.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from paradiffusion.checkpoints.layouts import REFINER, UNET_LORA, Layout, parse
from paradiffusion.config import SamplerConfig, TrainConfig
from paradiffusion.diffusion.guidance import guide, guided_steps
from paradiffusion.diffusion.objective import make_objective, set_steps, unmix
from paradiffusion.models.joint import LossBatch
from paradiffusion.sampling.pipeline import load_joint
from paradiffusion.text.conditioning import Conditioning
from paradiffusion.text.encoder import TextEncoder
from paradiffusion.text.sources import hash_ends


class Teacher:
    """Guided sampling with a checkpoint's weights, a window of time at once; the ``encoder`` has the checkpoint's adapter, where there is
    one. ``known_by`` is a hash of the weights: a resumed stage must have the same. Raises UserError where they are incomplete."""

    def __init__(self, checkpoint: Layout, config: TrainConfig, encoder: TextEncoder, device: torch.device) -> None:
        self.config, self.device = config, device
        self.joint = load_joint(checkpoint, checkpoint.weights(), encoder.width).to(device)
        self.objective = make_objective(config.objective)
        self.settings = parse(SamplerConfig, checkpoint.description["sampler"])
        folders = (checkpoint.unet, checkpoint.folder / REFINER, checkpoint.adapter, checkpoint.folder / UNET_LORA)
        files = [path for folder in folders for path in sorted(folder.glob("*")) if path.suffix in (".safetensors", ".bin")]
        self.known_by = hash_ends(files)
        with torch.no_grad(), self.autocast():
            tokens = encoder.tokenize([""]).to(encoder.device)
            features, mask = encoder(tokens.ids, tokens.mask, tokens.prefix), encoder.feature_mask(tokens)
            self.null_mask = None if mask is None else mask.to(device)
            refined = self.joint.refine(features.float().to(device), self.null_mask)
            self.null, self.null_mask = self.joint.with_scores(refined, self.null_mask, None)

    def autocast(self) -> AbstractContextManager[Any]:
        """The arithmetic of training."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision != "fp32")

    @torch.no_grad()
    def __call__(self, batch: LossBatch, scales: Tensor) -> LossBatch:
        """``batch`` with what the student is to learn in the places of latents and noise: of each sample the x_0 and eps whose straight
        way leads through the window in which its time lies, from where data and noise put its start to where guidance at its one of
        the ``scales`` [B] leads from there."""
        joint, objective, latents = self.joint, self.objective, batch.latents
        assert batch.features is not None
        times, alpha, sigma, guided = self.grid(latents.shape[-2:])
        count = self.config.objective.distill_substeps
        starts = times[count:-1:count]  # of all windows but the first
        first = count * (starts >= batch.times[:, None]).sum(1)  # [B]
        with self.autocast():
            told = joint.with_scores(joint.refine(batch.features, batch.mask), batch.mask, batch.scores)
            features, mask = Conditioning(*told, self.null, self.null_mask).guided()
            estimate = joint.estimate(features, mask, *latents.shape[-2:])

        def shares(step: Tensor) -> tuple[Tensor, Tensor]:
            return alpha[step].view(-1, 1, 1, 1), sigma[step].view(-1, 1, 1, 1)

        def mix(clean: Tensor, noise: Tensor, step: Tensor) -> Tensor:
            of_clean, of_noise = shares(step)
            return of_clean * clean + of_noise * noise

        noised = start = mix(latents, batch.noise, first)
        for step in (first + number for number in range(count)):
            now = times[step].repeat(2)
            with self.autocast():
                both = joint.denoise(torch.cat([noised, noised]), now, features, mask, estimate)
            null, prompt = both.float().chunk(2)
            scale = torch.where(guided[step], scales, 1.0).view(-1, 1, 1, 1)
            prediction = guide(null, prompt, scale, self.settings.guidance_rescale)
            clean, noise = unmix(noised, shares(step), prediction, objective.shares(*shares(step)))
            noised = mix(clean, noise, step + 1)
        clean, noise = unmix(start, shares(first), noised, shares(first + count))
        return replace(batch, latents=clean, noise=noise, scales=scales)

    def grid(self, size: torch.Size) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Times, alpha and sigma of the teacher's steps, [n + 1] with the clean latents at the end, and which of the steps are guided."""
        config, objective = self.config.objective, self.objective
        scheduler = objective.scheduler("dpm", size=size)
        set_steps(scheduler, config.distill_steps * config.distill_substeps)
        steps = range(len(scheduler.timesteps))
        times = torch.stack([objective.model_time(scheduler, step, scheduler.timesteps[step]) for step in steps])
        alpha, sigma = objective.coefficients(times)
        # Guided wherever the interval says so, whatever the scale.
        interval = replace(self.settings, guidance=2.0)
        guided = [*guided_steps(interval, len(steps), lambda: objective.levels(scheduler)), False]
        ends = (times, 0.0), (alpha, 1.0), (sigma, 0.0)
        times, alpha, sigma = (torch.cat([v, v.new_tensor([end])]).to(self.device) for v, end in ends)
        return times, alpha, sigma, torch.tensor(guided, device=self.device)
