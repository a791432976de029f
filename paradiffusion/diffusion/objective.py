"""The diffusion objectives: noise schedule, prediction target, timestep density and loss weight of each prediction.

Training and sampling share one definition: an objective's ``scheduler`` is built from the same fields as its ``add_noise`` and
``target``, so they cannot drift apart. A new prediction is a class of its own in ``OBJECTIVES``, which says what the denoiser
returns as a sum of latents and noise.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from paradiffusion.config import SOLVERS, ObjectiveConfig
from paradiffusion.errors import UserError


class Objective(ABC):
    """Noise levels, targets and weights for one ObjectiveConfig.

    A "time" is what the denoiser is given: a float tensor [B] in 0 .. train_timesteps, whole numbers for the
    variance-preserving schedules, ``1000 * sigma`` for the flow, as in diffusers.

    Attributes:
        guided_from: guidance scales below this one draw without guidance.
        suits: names of diffusers' schedulers that draw from it, for messages.
        published: of a published scheduler's settings, what other solvers of this objective take, too.
        schedulers: a function of (solver, **overrides) that makes the scheduler in place of the configuration.
    """

    guided_from: float = 0.0
    suits: tuple[str, ...] = ("DPMSolverMultistepScheduler", "DDIMScheduler", "EulerDiscreteScheduler")
    published: tuple[str, ...] = ()
    schedulers: Callable[..., Any] | None = None

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config

    @abstractmethod
    def times(self, u: Tensor, size: Sequence[int] = ()) -> Tensor:
        """Map uniform draws ``u`` in [0, 1), [B], to times with the configured density, for latents of ``size`` (h, w)."""

    @abstractmethod
    def coefficients(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t of x_t = alpha_t x_0 + sigma_t eps, [B] each."""

    @abstractmethod
    def shares(self, alpha: Tensor, sigma: Tensor) -> tuple[Any, Any]:
        """a and b of the target a x_0 + b eps, by alpha_t and sigma_t; numbers, or tensors of their shape."""

    @abstractmethod
    def usual_scheduler(self, solver: str, **overrides: Any) -> Any:
        """As ``scheduler``, from the configuration alone."""

    def scheduler(self, solver: str = "dpm", size: Sequence[int] = (), **overrides: Any) -> Any:
        """A diffusers scheduler for this objective.

        Args:
            solver: "dpm" (DPM-Solver++ multistep, second order), "ddim" or "euler".
            size: (h, w) of the latents that it is to draw.
        Raises:
            UserError: for a solver that does not exist for this objective.
        """
        if solver not in SOLVERS:
            raise UserError(f"sampler.solver={solver} is unknown; choose one of {', '.join(SOLVERS)}.")
        return (self.schedulers or self.usual_scheduler)(solver, **overrides)

    def add_noise(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Noised latents x_t = alpha_t x_0 + sigma_t eps, [B, C, h, w]."""
        alpha, sigma = self.at(times, latents)
        return alpha * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What the denoiser should return, [B, C, h, w]."""
        a, b = self.shares(*self.at(times, latents))
        return a * latents + b * noise

    def slope(self, times: Tensor, like: Tensor) -> Any:
        """What a first estimate of x_0 is multiplied with to enter the prediction, the share of x_0 in the target: [B, 1, 1, 1] or
        a number."""
        return self.shares(*self.at(times, like))[0]

    def weight(self, times: Tensor) -> Tensor:
        """Loss weight [B]."""
        return torch.ones_like(times, dtype=torch.float32)

    def model_time(self, scheduler: Any, step: int, timestep: Tensor) -> Tensor:
        """The time that the denoiser is given at a scheduler's step, float32, no axes."""
        return timestep.float()

    @property
    def solver_order(self) -> int:
        """Of DPM-Solver: a distilled model's prediction holds for the whole of a step, which no second order is to bend."""
        return 1 if self.config.distill_steps else 2

    def levels(self, scheduler: Any) -> list[float]:
        """The noise level sigma_t / alpha_t of each of a scheduler's steps (EDM's sigma; infinite at pure noise)."""
        times = [self.model_time(scheduler, step, timestep) for step, timestep in enumerate(scheduler.timesteps)]
        alpha, sigma = self.coefficients(torch.stack(times).cpu())
        return [float(level) for level in sigma / alpha]

    def at(self, times: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """``coefficients``, shaped to broadcast over ``like``."""
        shape = (-1,) + (1,) * (like.ndim - 1)
        alpha, sigma = self.coefficients(times)
        return alpha.view(shape).to(like), sigma.view(shape).to(like)

    def density(self, u: Tensor) -> Tensor:
        """Uniform draws to draws of the configured density over [0, 1), float64 [B]."""
        config, u = self.config, u.double()
        if config.density == "logit_normal":
            return torch.sigmoid(config.logit_mean + config.logit_std * torch.special.ndtri(u.clamp(1e-9, 1 - 1e-9)))
        return u


class VariancePreserving(Objective):
    """alpha^2 + sigma^2 = 1, from a table of betas (DDPM, arXiv 2006.11239)."""

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """[train_timesteps]: the scheduler's own table, so that rescaling to zero terminal SNR is the same in training and in
        sampling."""
        table: Tensor = self.scheduler("dpm" if self.schedulers else "ddim").alphas_cumprod
        return table.float()

    published = ("trained_betas", "timestep_spacing")

    def times(self, u: Tensor, size: Sequence[int] = ()) -> Tensor:
        count = self.config.train_timesteps
        return (self.density(u) * count).floor().clamp(max=count - 1).float()

    def coefficients(self, times: Tensor) -> tuple[Tensor, Tensor]:
        if self.alphas_cumprod.device != times.device:  # once: in each step the device would wait for it
            self.alphas_cumprod = self.alphas_cumprod.to(times.device)
        kept = self.alphas_cumprod[times.long()]
        return kept.sqrt(), (1 - kept).sqrt()

    def weight(self, times: Tensor) -> Tensor:
        """Min-SNR-gamma (arXiv 2303.09556): min(SNR, gamma) times the squared error of x_0, as a weight of this prediction's."""
        if self.config.min_snr_gamma is None:
            return super().weight(times)
        alpha, sigma = self.coefficients(times)
        a, b = self.shares(alpha, sigma)
        return (alpha / sigma).square().clamp(max=self.config.min_snr_gamma) / (a - b * alpha / sigma) ** 2

    def scheduler(self, solver: str = "dpm", size: Sequence[int] = (), **overrides: Any) -> Any:
        made = super().scheduler(solver, size, **overrides)
        # For who makes another of diffusers' schedulers from this one's settings: several clip x_0 to pixels' range by default.
        made.register_to_config(clip_sample=False)
        return made

    def usual_scheduler(self, solver: str, **overrides: Any) -> Any:
        config = self.config
        spacing = "trailing" if config.zero_terminal_snr else "leading"
        settings: dict[str, Any] = {key: getattr(config, key) for key in ("beta_schedule", "beta_start", "beta_end")}
        settings |= {"num_train_timesteps": config.train_timesteps, "prediction_type": config.prediction}
        settings["rescale_betas_zero_snr"] = config.zero_terminal_snr
        if solver == "ddim":
            defaults = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": spacing}
            return DDIMScheduler(**{**defaults, **settings, **overrides})
        if solver == "euler":
            return EulerDiscreteScheduler(**{"steps_offset": 1, "timestep_spacing": spacing, **settings, **overrides})
        # DPM-Solver's own spacing in the official scheduler is "linspace" (no steps_offset there).
        settings["timestep_spacing"] = "trailing" if config.zero_terminal_snr else "linspace"
        return DPMSolverMultistepScheduler(**{**settings, "solver_order": self.solver_order, **overrides})


class Epsilon(VariancePreserving):
    """The noise (Ho et al. 2020)."""

    def shares(self, alpha: Tensor, sigma: Tensor) -> tuple[Any, Any]:
        return 0.0, 1.0


class Velocity(VariancePreserving):
    """v = alpha eps - sigma x_0 (Salimans & Ho 2022)."""

    def shares(self, alpha: Tensor, sigma: Tensor) -> tuple[Any, Any]:
        return -sigma, alpha


class Sample(VariancePreserving):
    """x_0 itself: for published weights that predict it. ObjectiveConfig refuses it for training."""

    def shares(self, alpha: Tensor, sigma: Tensor) -> tuple[Any, Any]:
        return 1.0, 0.0


class Flow(Objective):
    """Rectified flow, eps - x_0 on the straight line x_t = (1 - t) x_0 + t eps (arXiv 2403.03206)."""

    suits = ("FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")

    def times(self, u: Tensor, size: Sequence[int] = ()) -> Tensor:
        sigma, shift = self.density(u).clamp(1e-4, 1.0), self.shift(size) or 1.0
        return (shift * sigma / (1 + (shift - 1) * sigma) * self.config.train_timesteps).float()

    def shift(self, size: Sequence[int]) -> float | None:
        """By how much times are shifted towards high noise for latents of ``size`` (h, w): as the square root of their number, so
        that as much is seen of a large image as of a small one (arXiv 2403.03206, section 5.3.2). None: not by size."""
        side = self.config.flow_shift_side
        return self.config.flow_shift * math.sqrt(math.prod(size)) / side if side and size else None

    def scheduler(self, solver: str = "dpm", size: Sequence[int] = (), **overrides: Any) -> Any:
        if (shift := self.shift(size)) is not None:
            overrides["flow_shift"] = shift
        return super().scheduler(solver, **overrides)

    def coefficients(self, times: Tensor) -> tuple[Tensor, Tensor]:
        sigma = times.float() / self.config.train_timesteps
        return 1 - sigma, sigma

    def shares(self, alpha: Tensor, sigma: Tensor) -> tuple[Any, Any]:
        return -1.0, 1.0

    def slope(self, times: Tensor, like: Tensor) -> Any:
        """-sigma in place of -1, so that the estimate fades out where the latents can be seen."""
        return -self.at(times, like)[1]

    def model_time(self, scheduler: Any, step: int, timestep: Tensor) -> Tensor:
        """From sigma, since diffusers' DPM-Solver rounds its flow timesteps to whole numbers."""
        sigma: Tensor = scheduler.sigmas[step]
        return sigma.float() * self.config.train_timesteps

    def usual_scheduler(self, solver: str, **overrides: Any) -> Any:
        count, shift = self.config.train_timesteps, overrides.pop("flow_shift", self.config.flow_shift)
        if solver == "euler":
            return FlowMatchEulerDiscreteScheduler(num_train_timesteps=count, shift=shift)
        if solver == "ddim":
            raise UserError("sampler.solver=ddim does not exist for objective.prediction=flow; use dpm or euler.")
        settings: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
        settings["solver_order"] = self.solver_order
        return DPMSolverMultistepScheduler(num_train_timesteps=count, **{**settings, **overrides})


def unmix(mixed: Tensor, shares: tuple[Any, Any], other: Tensor, others: tuple[Any, Any]) -> tuple[Tensor, Tensor]:
    """x_0 and eps, of which ``mixed`` and ``other`` are sums with these ``shares`` (of x_0, of eps): noised latents and a prediction, or
    noised latents of two times."""
    (alpha, sigma), (a, b) = shares, others
    apart = alpha * b - sigma * a
    return (b * mixed - sigma * other) / apart, (alpha * other - a * mixed) / apart


def set_steps(scheduler: Any, steps: int, device: torch.device | str | None = None) -> None:
    """``scheduler.set_timesteps`` for any number of steps up to the length of its schedule.

    Where diffusers' "leading" spacing, which rounds the distance down and begins a distance below the top, would leave out the fifth
    of highest noise, or "linspace" would give a time twice, the times are those of "trailing".

    Raises:
        UserError: for more steps than the schedule has.
    """
    config = scheduler.config
    count, spacing = config.num_train_timesteps, config.get("timestep_spacing")
    if spacing is not None and not config.get("use_flow_sigmas"):
        if steps > count:
            raise UserError(f"steps={steps} are more than the {count} of the noise schedule; use at most {count}.")
        if steps == count or (spacing == "leading" and (steps < 5 or count // steps * steps < 0.8 * count)):
            scheduler.register_to_config(timestep_spacing="trailing")
    scheduler.set_timesteps(steps, device=device)


def keep_distance(scheduler: Any, step: int) -> None:
    """Before each step: DDIM takes the distance to the next time from the number of steps, rounded down; of 501 that is one for two."""
    times, count = scheduler.timesteps, scheduler.config.num_train_timesteps
    if isinstance(scheduler, DDIMScheduler) and len(times) ** 2 > count:
        following = int(times[step + 1]) if step + 1 < len(times) else -1
        scheduler.num_inference_steps = count // (int(times[step]) - following)  # type: ignore[attr-defined]


OBJECTIVES: dict[str, type[Objective]] = {"epsilon": Epsilon, "v_prediction": Velocity, "sample": Sample, "flow": Flow}


def make_objective(config: ObjectiveConfig) -> Objective:
    """The objective of a checked configuration. Raises UserError for what cannot be trained."""
    config.check()
    return OBJECTIVES[config.prediction](config)
