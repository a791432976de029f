"""The one sampler: from seeds and conditioning to latents.

Validation, ``sample.py``, evaluation and the diffusers pipeline all draw through ``sample_latents``. Each image has noise
of its own seed, so it does not depend on the batch that it is drawn in.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from paradiffusion.config import SamplerConfig
from paradiffusion.diffusion.guidance import guide, guided_steps
from paradiffusion.diffusion.objective import Objective, keep_distance, set_steps
from paradiffusion.errors import UserError, reason_of
from paradiffusion.text.conditioning import Conditioning

# (latents [B, C, h, w], times [B] float, features [B, L, D], mask [B, L] bool or None) -> prediction [B, C, h, w]; of a distilled
# model the guidance scales [B] come after these
Denoiser = Callable[..., Tensor]


def starting_noise(seeds: Sequence[int | torch.Generator], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise, [B, *shape] float32 on the CPU; row i is a function of ``seeds[i]`` and ``shape`` alone.

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
    on_step: Callable[[int, Tensor], Tensor | None] | None = None, noise: Tensor | None = None, eta: float | None = None,
) -> Tensor:  # fmt: skip
    """Draw latents, [B, C, h, w] float32 on ``device``.

    Args:
        denoise: the model's prediction, of the kind that ``objective`` defines; called in ``dtype``, with 2B rows in the
            guided steps: the null prompt's, then the prompts'. A distilled model guides itself.
        conditioning: of B prompts, perhaps ``against`` negative ones.
        seeds: one for each image, or a generator of the CPU for each.
        shape: (C, h, w) of one image's latents.
        settings: solver, steps and guidance, shared by the batch.
        on_step: called after each step with the number of steps done and the latents; latents that it returns take their
            place, and what it raises ends the sampling.
        noise: [B, C, h, w] to start from, in place of the seeds' own.
        eta: the share of DDIM's noise that is drawn anew in each step, for schedulers that have it.
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
    scales: list[Tensor] = []
    if objective.config.distill_steps:
        scales.append(torch.full((len(seeds),), settings.guidance, device=device))
        settings = replace(settings, guidance=1.0)
    guided = guided_steps(settings, len(scheduler.timesteps), lambda: objective.levels(scheduler))
    conditioning = conditioning.to(device, dtype)
    features, mask = conditioning.features, conditioning.mask
    guided_features, guided_mask = conditioning.guided() if any(guided) else (features, mask)

    generators = [_generator(seed) for seed in seeds]
    latents = (starting_noise(generators, shape) if noise is None else noise.float()).to(device)
    latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)  # the flow's schedulers have none: pure noise is 1
    # Of a stochastic scheduler each image's own generator goes on, as in the official pipeline.
    takes = inspect.signature(scheduler.step).parameters
    drawn: dict[str, Any] = {"generator": generators} if "generator" in takes else {}
    if eta is not None:
        if "eta" not in takes:
            raise UserError(f"eta={eta} means nothing to {type(scheduler).__name__}; leave it out, or take DDIMScheduler.")
        drawn["eta"] = eta
    for step, timestep in enumerate(scheduler.timesteps):
        inputs = scheduler.scale_model_input(latents, timestep) if hasattr(scheduler, "scale_model_input") else latents
        inputs = inputs.to(dtype)
        times = objective.model_time(scheduler, step, timestep).to(device).expand(len(seeds))
        if guided[step]:
            both = denoise(torch.cat([inputs, inputs]), torch.cat([times, times]), guided_features, guided_mask)
            null, prompt = both.float().chunk(2)
            prediction = guide(null, prompt, settings.guidance, settings.guidance_rescale)
        else:
            prediction = denoise(inputs, times, features, mask, *scales).float()
        keep_distance(scheduler, step)
        latents = scheduler.step(prediction, timestep, latents, **drawn).prev_sample.float()
        if on_step is not None:
            replaced = on_step(step + 1, latents)
            latents = latents if replaced is None else replaced
    return latents


def check_distilled(objective: Objective, settings: SamplerConfig, own: SamplerConfig, negative: bool) -> None:
    """Raise UserError for what a distilled model cannot draw with: it has its guidance within.

    Args:
        own: the settings that its checkpoint names.
        negative: whether a negative prompt was asked for.
    """
    if not objective.config.distill_steps:
        return
    low, high = objective.config.distill_guidance
    if negative:
        raise UserError(
            "negative_prompt needs guidance, which this model has within, distilled against the empty prompt; leave it out, or draw "
            "with the model that it was distilled from."
        )
    if not low <= settings.guidance <= high:
        raise UserError(f"guidance={settings.guidance} is out of range for this distilled model; expected {low} to {high}.")
    for key in (one.name for one in fields(settings) if one.name not in ("steps", "guidance", "score_bins")):
        if (value := getattr(settings, key)) != (mine := getattr(own, key)):
            raise UserError(
                f"{key}={value} has no place in a distilled model, which has its guidance within and one solver; leave {key}={mine}."
            )


def check_scheduler(objective: Objective) -> None:
    """See that ``objective.scheduler`` leads where the objective means it to: with a denoiser that knows the picture, each step
    must show it as much noise as the step's time says, and the last one the picture. Raises UserError where it does not, as
    with a flow's scheduler on a model that predicts noise, or the other way about."""
    truth = torch.linspace(-2, 2, 4096).view(1, 1, 64, 64)
    off: list[Tensor] = []

    def knowing(noised: Tensor, times: Tensor, *_: Tensor | None) -> Tensor:
        alpha, sigma = objective.at(times, noised)
        noise = noised - alpha * truth
        off.append((noise.std() - sigma.mean()).abs())
        return objective.target(truth, noise / sigma.clamp_min(1e-5), times)

    nothing = Conditioning(torch.zeros(1, 1, 1), None, torch.zeros(1, 1, 1), None)
    settings = SamplerConfig(steps=20, guidance=1.0)
    kind = "scheduler"
    try:
        kind = type(objective.scheduler()).__name__
        found = sample_latents(knowing, objective, nothing, [0], (1, 64, 64), settings, "cpu", torch.float32)
        astray = float(torch.stack([*off, (found - truth).abs().mean()]).max())  # NaN where any of them is
        reason = "" if astray < 0.1 else f"it comes out {astray:.2g} beside what a perfect model would draw"
    except Exception as error:  # other people's schedulers raise anything
        reason = reason_of(error)
    if reason:
        raise UserError(
            f"{kind} as it is set here does not draw from a model whose prediction is {objective.config.prediction} ({reason}); put the "
            f"pipeline's own back, or take {' or '.join(objective.suits)}, without Karras or other sigmas."
        )


def against(conditioning: Conditioning, negative: Conditioning) -> Conditioning:
    """The conditioning with ``negative``'s prompts (1 or B) in the place of the null prompt."""
    if len(negative) not in (1, len(conditioning)):
        raise ValueError(f"{len(negative)} negative prompts for {len(conditioning)} prompts")
    return Conditioning(conditioning.features, conditioning.mask, negative.features, negative.mask)
