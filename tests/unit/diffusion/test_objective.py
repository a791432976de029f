"""The objective against what its papers say, and against the samplers' own tables."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, LCMScheduler, TCDScheduler

from paradiffusion.checkpoints.layouts import objective_of
from paradiffusion.config import ObjectiveConfig
from paradiffusion.diffusion.objective import make_objective
from paradiffusion.errors import UserError

ALL = [
    ObjectiveConfig(),
    ObjectiveConfig(prediction="v_prediction"),
    ObjectiveConfig(prediction="v_prediction", zero_terminal_snr=True),
    ObjectiveConfig(prediction="flow"),
]
NAMES = ["epsilon", "v", "v-zero-snr", "flow"]


def draws(count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 4, 3, 3, generator=generator), torch.randn(count, 4, 3, 3, generator=generator)


@pytest.mark.parametrize("config", ALL, ids=NAMES)
def test_the_target_leads_back_to_the_latents(config: ObjectiveConfig) -> None:
    objective = make_objective(config)
    latents, noise = draws()
    times = torch.tensor([0.0, 1.0, 250.0, 500.0, 750.0, 990.0])
    noised = objective.add_noise(latents, noise, times)
    target = objective.target(latents, noise, times)
    alpha, sigma = objective.at(times, latents)
    a, b = objective.shares(alpha, sigma)  # the target is a x_0 + b eps, and what is seen alpha x_0 + sigma eps
    torch.testing.assert_close((b * noised - sigma * target) / (b * alpha - a * sigma), latents, atol=1e-4, rtol=1e-4)


def test_values_by_hand() -> None:
    latents, noise = draws(1)
    times = torch.tensor([400.0])
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = torch.cumprod(1 - betas, 0)[400]
    alpha, sigma = kept.sqrt().float(), (1 - kept).sqrt().float()
    epsilon, v = make_objective(ALL[0]), make_objective(ALL[1])
    torch.testing.assert_close(epsilon.add_noise(latents, noise, times), alpha * latents + sigma * noise)
    assert torch.equal(epsilon.target(latents, noise, times), noise)
    torch.testing.assert_close(v.target(latents, noise, times), alpha * noise - sigma * latents)
    flow = make_objective(ALL[3])
    torch.testing.assert_close(flow.add_noise(latents, noise, times), 0.6 * latents + 0.4 * noise)
    assert torch.equal(flow.target(latents, noise, times), noise - latents)


def test_zero_terminal_snr() -> None:
    plain, rescaled = make_objective(ALL[1]).alphas_cumprod, make_objective(ALL[2]).alphas_cumprod
    assert plain[-1] > 1e-3 and rescaled[-1] == 0
    torch.testing.assert_close(rescaled[0], plain[0])  # algorithm 1 keeps the first step
    root = plain.double().sqrt()
    expected = (root - root[-1]) * root[0] / (root[0] - root[-1])
    torch.testing.assert_close(rescaled.double().sqrt(), expected, atol=1e-4, rtol=0)
    latents, noise = draws(1)
    assert torch.equal(make_objective(ALL[2]).add_noise(latents, noise, torch.tensor([999.0])), noise)


@pytest.mark.parametrize(
    ("prediction", "below", "above"), [("epsilon", 1.0, 5 / 20), ("v_prediction", 0.5 / 1.5, 5 / 21)]
)
def test_min_snr_weights(prediction: str, below: float, above: float) -> None:
    objective = make_objective(ObjectiveConfig(prediction=prediction, min_snr_gamma=5.0))
    # Signal-to-noise ratios of 0.5 and 20, on either side of gamma.
    objective.alphas_cumprod = torch.tensor([0.5 / 1.5, 20 / 21])
    torch.testing.assert_close(objective.weight(torch.tensor([0.0, 1.0])), torch.tensor([below, above]))
    assert torch.equal(make_objective(ObjectiveConfig()).weight(torch.tensor([3.0, 900.0])), torch.ones(2))


def test_uniform_times_cover_the_schedule() -> None:
    u = (torch.arange(4000.0, dtype=torch.float64) + 0.5) / 4000
    times = make_objective(ObjectiveConfig()).times(u)
    assert torch.equal(times.unique(), torch.arange(1000.0)) and torch.equal(times, times.floor())
    flow = make_objective(ALL[3]).times(torch.tensor([0.0, 0.25, 1.0]))
    torch.testing.assert_close(flow, torch.tensor([0.1, 250.0, 1000.0]))
    assert make_objective(ObjectiveConfig()).times(torch.tensor([0.999999999])).item() == 999


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 1.0), (-0.7, 0.4)])
def test_logit_normal_quantiles(mean: float, std: float) -> None:
    config = ObjectiveConfig(prediction="flow", density="logit_normal", logit_mean=mean, logit_std=std)
    # Standard normal quantiles of 2.28 %, 15.87 %, 50 % and 84.13 %: -2, -1, 0, 1.
    u = torch.tensor([0.022750131948, 0.158655253931, 0.5, 0.841344746069], dtype=torch.float64)
    expected = [1000 / (1 + math.exp(-(mean + std * z))) for z in (-2, -1, 0, 1)]
    torch.testing.assert_close(make_objective(config).times(u), torch.tensor(expected), rtol=1e-5, atol=1e-3)
    ends = make_objective(config).times(torch.tensor([0.0, 1.0]))
    assert torch.isfinite(ends).all() and 0 < ends[0] < ends[1] <= 1000


@pytest.mark.parametrize("solver", ["dpm", "ddim", "euler"])
@pytest.mark.parametrize("config", ALL[:3], ids=NAMES[:3])
def test_training_and_sampling_share_one_table(config: ObjectiveConfig, solver: str) -> None:
    objective = make_objective(config)
    scheduler = objective.scheduler(solver)
    torch.testing.assert_close(scheduler.alphas_cumprod.float(), objective.alphas_cumprod, atol=1e-7, rtol=1e-6)
    assert scheduler.config.prediction_type == config.prediction
    latents, noise = draws(2)
    if solver == "ddim":
        times = torch.tensor([10, 700])
        expected = scheduler.add_noise(latents, noise, times)
        torch.testing.assert_close(objective.add_noise(latents, noise, times.float()), expected)
        if config.prediction == "v_prediction":
            torch.testing.assert_close(
                objective.target(latents, noise, times.float()), scheduler.get_velocity(latents, noise, times)
            )


@pytest.mark.parametrize("solver", ["dpm", "euler"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_samplers_begin_at_pure_noise_and_shift(solver: str, shift: float) -> None:
    scheduler = make_objective(ObjectiveConfig(prediction="flow", flow_shift=shift)).scheduler(solver)
    scheduler.set_timesteps(4)
    sigmas = scheduler.sigmas
    assert sigmas[0] > 0.99 and sigmas[-1] == 0 and (sigmas[:-1] > sigmas[1:]).all()
    # DPM-Solver rounds its flow timesteps down to whole numbers.
    assert (scheduler.timesteps.float() - 1000 * sigmas[:-1]).abs().max() <= 1
    plain = make_objective(ObjectiveConfig(prediction="flow")).scheduler(solver)
    plain.set_timesteps(4)
    if solver == "dpm":  # the other one shifts its table before it is thinned out
        s = plain.sigmas
        torch.testing.assert_close(sigmas, shift * s / (1 + (shift - 1) * s), atol=1e-3, rtol=0)


def test_flow_times_shift_with_the_size_in_training_as_in_sampling() -> None:
    """2403.03206, section 5.3.2: four times the pixels at base 64 x 64 latents is alpha = sqrt(4) = 2."""
    u = torch.tensor([0.25, 0.5, 0.8, 1.0])
    config = ObjectiveConfig(prediction="flow", flow_shift_side=64)
    objective, plain = make_objective(config), make_objective(ALL[3])
    assert torch.equal(objective.times(u, (64, 64)), plain.times(u, (64, 64)))
    expected = torch.tensor([1000 * 2 * t / (1 + t) for t in u.tolist()])
    for size in ((128, 128), (256, 64)):
        torch.testing.assert_close(objective.times(u, size), expected)
    torch.testing.assert_close(make_objective(replace(config, flow_shift=2.0)).times(u, (64, 64)), expected)
    assert torch.equal(make_objective(replace(ALL[3], flow_shift=2.0)).times(u, (128, 128)), plain.times(u))
    for solver in ("dpm", "euler"):
        large = objective.scheduler(solver, size=(128, 128))
        fixed = make_objective(replace(ALL[3], flow_shift=2.0)).scheduler(solver)
        for scheduler in (large, fixed):
            scheduler.set_timesteps(7)
        assert torch.equal(large.sigmas, fixed.sigmas)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prediction": "x0"}, "epsilon, v_prediction, flow"), ({"density": "beta"}, "uniform, logit_normal"),
        ({"beta_schedule": "cosine"}, "scaled_linear, linear"), ({"zero_terminal_snr": True}, "objective.prediction=v_prediction"),
        ({"prediction": "flow", "min_snr_gamma": 5.0}, "min_snr_gamma=null"),
        ({"prediction": "v_prediction", "zero_terminal_snr": True, "min_snr_gamma": 5.0}, "leave one of them out"),
        ({"min_snr_gamma": 0.0}, "positive number"), ({"logit_std": 0.0}, "above 0"), ({"flow_shift_side": 0}, "above 0"),
        ({"beta_start": 0.5}, "start first"),
    ],
)  # fmt: skip
def test_refused_objectives(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_objective(ObjectiveConfig(**changes))
    with pytest.raises(UserError, match="use dpm or euler"):
        make_objective(ALL[3]).scheduler("ddim")


def test_a_checkpoint_whose_weights_are_refused_today_is_still_sampled() -> None:
    config = ObjectiveConfig(prediction="v_prediction", zero_terminal_snr=True, min_snr_gamma=5.0)
    objective = objective_of({"objective": asdict(config)})
    assert objective.scheduler().alphas_cumprod[-1] < 1e-6 and objective.config.prediction == "v_prediction"


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler, LCMScheduler, TCDScheduler])
def test_other_schedulers_made_from_ours_do_not_clip_latents(kind: Any, tmp_path: Path) -> None:
    make_objective(ObjectiveConfig(prediction="epsilon")).scheduler("dpm").save_config(tmp_path)
    stored = DPMSolverMultistepScheduler.from_pretrained(tmp_path)
    assert kind.from_config(stored.config).config.clip_sample is False
