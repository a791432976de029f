"""The one sampler: from seeds and conditioning to latents.

Validation, ``sample.py``, evaluation and the diffusers pipeline all draw through ``sample_latents``. Each image has noise
of its own seed, so it does not depend on the batch that it is drawn in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from paradiffusion.config import SamplerConfig
from paradiffusion.diffusion.guidance import guide, guided_steps
from paradiffusion.diffusion.objective import Objective, set_steps
from paradiffusion.text.conditioning import Conditioning

# (latents [B, C, h, w], times [B] float, features [B, L, D], mask [B, L] bool or None) -> prediction [B, C, h, w]
Denoiser = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def starting_noise(seeds: Sequence[int | torch.Generator], shape: tuple[int, int, int]) -> Tensor:
    """Standard normal noise, [B, C, h, w] float32 on the CPU; row i is a function of ``seeds[i]`` and ``shape`` alone.

    Drawn on the CPU, since every kind of accelerator has a generator of its own. In a seed's place a generator of the CPU
    may stand, which goes on from where it is.
    """
    return torch.stack([torch.randn(shape, generator=_generator(seed), dtype=torch.float32) for seed in seeds])


def _generator(seed: int | torch.Generator) -> torch.Generator:
    return seed if isinstance(seed, torch.Generator) else torch.Generator("cpu").manual_seed(seed)


@torch.no_grad()
def sample_latents(
    denoise: Denoiser, objective: Objective, conditioning: Conditioning, seeds: Sequence[int | torch.Generator],
    shape: tuple[int, int, int], settings: SamplerConfig, device: torch.device | str, dtype: torch.dtype,
    negative: Conditioning | None = None, on_step: Callable[[int, Tensor], Tensor | None] | None = None,
) -> Tensor:  # fmt: skip
    """Draw latents, [B, C, h, w] float32 on ``device``.

    Args:
        denoise: the model's prediction, of the kind that ``objective`` defines; called in ``dtype``, with 2B rows in the
            guided steps: the null prompt's, then the prompts'.
        conditioning: of B prompts.
        seeds: one for each image, or a generator of the CPU for each.
        shape: (C, h, w) of one image's latents.
        settings: solver, steps and guidance, shared by the batch.
        negative: of 1 or B negative prompts, which take the null prompt's place in guidance.
        on_step: called after each step with the number of steps done and the latents; latents that it returns take their
            place, and what it raises ends the sampling.
    Raises:
        ValueError: where seeds and prompts differ in number.
        UserError: for a solver that the objective does not have.
    """
    if len(seeds) != len(conditioning):
        raise ValueError(f"{len(seeds)} seeds for {len(conditioning)} prompts")
    if settings.guidance < objective.guided_from:
        settings = replace(settings, guidance=1.0)
    scheduler = objective.scheduler(settings.solver, size=shape[1:])
    set_steps(scheduler, settings.steps, device)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # or the scheduler looks the step up, and takes the second of two equal times
    guided = guided_steps(settings, len(scheduler.timesteps), lambda: objective.levels(scheduler))
    conditioning = conditioning.to(device, dtype)
    pair = conditioning if negative is None else against(conditioning, negative.to(device, dtype))
    features, mask = conditioning.features, conditioning.mask
    guided_features, guided_mask = pair.guided() if any(guided) else (features, mask)

    generators = [_generator(seed) for seed in seeds]
    latents = starting_noise(generators, shape).to(device)
    latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)  # the flow's schedulers have none: pure noise is 1
    # A published scheduler may be a stochastic one: then each image's own generator goes on, as in the official pipeline.
    noise = {"generator": generators} if str(scheduler.config.get("algorithm_type")).startswith("sde") else {}
    for step, timestep in enumerate(scheduler.timesteps):
        inputs = scheduler.scale_model_input(latents, timestep) if hasattr(scheduler, "scale_model_input") else latents
        inputs = inputs.to(dtype)
        times = objective.model_time(scheduler, step, timestep).to(device).expand(len(seeds))
        if guided[step]:
            both = denoise(torch.cat([inputs, inputs]), torch.cat([times, times]), guided_features, guided_mask)
            null, prompt = both.float().chunk(2)
            prediction = guide(null, prompt, settings.guidance, settings.guidance_rescale)
        else:
            prediction = denoise(inputs, times, features, mask).float()
        latents = scheduler.step(prediction, timestep, latents, **noise).prev_sample.float()
        if on_step is not None:
            replaced = on_step(step + 1, latents)
            latents = latents if replaced is None else replaced
    return latents


def against(conditioning: Conditioning, negative: Conditioning) -> Conditioning:
    """The conditioning with ``negative``'s prompts (1 or B) in the place of the null prompt."""
    if len(negative) not in (1, len(conditioning)):
        raise ValueError(f"{len(negative)} negative prompts for {len(conditioning)} prompts")
    return Conditioning(conditioning.features, conditioning.mask, negative.features, negative.mask)
