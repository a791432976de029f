"""The diffusion objective: noise schedule, prediction target, timestep density, loss weight.

Training and sampling share this one definition: ``Objective.scheduler`` builds the sampler's scheduler from the same
fields that ``Objective.add_noise`` and ``Objective.target`` use, so they cannot drift apart.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from paradiffusion.config import SOLVERS, ObjectiveConfig
from paradiffusion.errors import UserError


class Objective:
    """Noise levels, targets and weights for one ObjectiveConfig.

    A "time" is what the denoiser is given: a float tensor [B] in 0 .. train_timesteps, whole numbers for the
    variance-preserving schedules, ``1000 * sigma`` for the flow, as in diffusers.

    Attributes:
        guided_from: guidance scales below this one draw without guidance.
    """

    guided_from: float = 0.0

    def __init__(self, config: ObjectiveConfig) -> None:
        config.check()
        self.config = config
        # The scheduler's own table, so that rescaling to zero terminal SNR is the same in training and in sampling.
        scheduler: Any = DDIMScheduler(**self._discrete())
        self.alphas_cumprod: Tensor = scheduler.alphas_cumprod.to(torch.float32)

    def _discrete(self) -> dict[str, Any]:
        config = self.config
        return (
            {
                "num_train_timesteps": config.train_timesteps,
                "beta_schedule": config.beta_schedule,
                "beta_start": config.beta_start,
                "beta_end": config.beta_end,
                "rescale_betas_zero_snr": config.zero_terminal_snr,
                "prediction_type": config.prediction,
            }
            if config.prediction != "flow"
            else {"num_train_timesteps": config.train_timesteps}
        )

    def times(self, u: Tensor) -> Tensor:
        """Map uniform draws ``u`` in [0, 1), [B], to times with the configured density."""
        config = self.config
        u = u.double()
        if config.density == "logit_normal":
            u = torch.sigmoid(config.logit_mean + config.logit_std * torch.special.ndtri(u.clamp(1e-9, 1 - 1e-9)))
        if config.prediction == "flow":
            return (u.clamp(1e-4, 1.0) * config.train_timesteps).float()
        return (u * config.train_timesteps).floor().clamp(max=config.train_timesteps - 1).float()

    def _coefficients(self, times: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise coefficients at ``times``, shaped to broadcast over ``like``."""
        if self.config.prediction == "flow":
            sigma = times.float() / self.config.train_timesteps
            alpha, sigma = 1 - sigma, sigma
        else:
            cumprod = self.alphas_cumprod.to(times.device)[times.long()]
            alpha, sigma = cumprod.sqrt(), (1 - cumprod).sqrt()
        shape = (-1,) + (1,) * (like.ndim - 1)
        return alpha.view(shape).to(like), sigma.view(shape).to(like)

    def add_noise(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Noised latents x_t = alpha_t x_0 + sigma_t eps, [B, C, h, w]."""
        alpha, sigma = self._coefficients(times, latents)
        return alpha * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What the denoiser should return, [B, C, h, w]: eps; alpha eps - sigma x_0 (v); or eps - x_0 (flow)."""
        if self.config.prediction == "epsilon":
            return noise
        if self.config.prediction == "flow":
            return noise - latents
        alpha, sigma = self._coefficients(times, latents)
        return alpha * noise - sigma * latents

    def slope(self, times: Tensor, like: Tensor) -> Tensor:
        """What a first estimate of x_0 is multiplied with to enter the prediction, [B, 1, 1, 1]: -sigma for v and flow,
        whose targets hold -sigma x_0 and -x_0 (there it fades out where the latents can be seen); 0 for eps."""
        _, sigma = self._coefficients(times, like)
        return -sigma if self.config.prediction != "epsilon" else torch.zeros_like(sigma)

    def weight(self, times: Tensor) -> Tensor:
        """Loss weight [B]: min-SNR-gamma (arXiv 2303.09556): min(SNR, g)/SNR for eps, min(SNR, g)/(SNR + 1) for v."""
        gamma = self.config.min_snr_gamma
        if gamma is None:
            return torch.ones_like(times, dtype=torch.float32)
        cumprod = self.alphas_cumprod.to(times.device)[times.long()]
        snr = cumprod / (1 - cumprod)
        clipped = snr.clamp(max=gamma)
        return clipped / snr if self.config.prediction == "epsilon" else clipped / (snr + 1)

    def predict_latents(self, noised: Tensor, prediction: Tensor, times: Tensor) -> Tensor:
        """The estimate of x_0 that a prediction implies, [B, C, h, w]."""
        alpha, sigma = self._coefficients(times, noised)
        if self.config.prediction == "epsilon":
            return (noised - sigma * prediction) / alpha
        if self.config.prediction == "flow":
            return noised - sigma * prediction
        return alpha * noised - sigma * prediction

    def scheduler(self, solver: str = "dpm", **overrides: Any) -> Any:
        """A diffusers scheduler for this objective.

        Args:
            solver: "dpm" (DPM-Solver++ multistep, second order), "ddim" or "euler".
        Raises:
            UserError: for a solver that does not exist for this objective.
        """
        if solver not in SOLVERS:
            raise UserError(f"sampler.solver={solver} is unknown; choose one of {', '.join(SOLVERS)}.")
        if self.config.prediction == "flow":
            if solver == "euler":
                return FlowMatchEulerDiscreteScheduler(
                    num_train_timesteps=self.config.train_timesteps, shift=self.config.flow_shift
                )
            if solver == "ddim":
                raise UserError("sampler.solver=ddim does not exist for objective.prediction=flow; use dpm or euler.")
            return DPMSolverMultistepScheduler(
                num_train_timesteps=self.config.train_timesteps,
                prediction_type="flow_prediction",
                use_flow_sigmas=True,
                flow_shift=self.config.flow_shift,
                **overrides,
            )
        settings = {**self._discrete(), "timestep_spacing": "trailing" if self.config.zero_terminal_snr else "leading"}
        if solver == "ddim":
            return DDIMScheduler(
                **{"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, **settings, **overrides}
            )
        if solver == "euler":
            return EulerDiscreteScheduler(**{"steps_offset": 1, **settings, **overrides})
        # DPM-Solver's own spacing in the official scheduler is "linspace" (no steps_offset there).
        settings["timestep_spacing"] = "trailing" if self.config.zero_terminal_snr else "linspace"
        return DPMSolverMultistepScheduler(**{**settings, **overrides})
