"""The objective against what its papers say and the samplers' own tables; classifier-free guidance: scale, rescale, interval."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import user_error
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, LCMScheduler, TCDScheduler

from paradiffusion.checkpoints.layouts import objective_of
from paradiffusion.config import ObjectiveConfig, SamplerConfig
from paradiffusion.diffusion.guidance import guide, guided_steps
from paradiffusion.diffusion.objective import make_objective
from paradiffusion.errors import UserError

ZERO_SNR = ObjectiveConfig(prediction="v_prediction", zero_terminal_snr=True)


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 5, 5, generator=generator), torch.randn(3, 4, 5, 5, generator=generator)


def guided(settings: SamplerConfig, levels: list[float]) -> list[int]:
    return [step for step, is_guided in enumerate(guided_steps(settings, len(levels), lambda: levels)) if is_guided]


def test_scale(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    null, prompt = pair
    assert torch.equal(guide(null, prompt, 0.0), null)
    torch.testing.assert_close(guide(null, prompt, 1.0), prompt)
    torch.testing.assert_close(guide(null, prompt, 7.5), 7.5 * prompt - 6.5 * null)
    scales = torch.tensor([1.0, 2.0, 5.0])
    rows = guide(null, prompt, scales.view(3, 1, 1, 1))
    for row, scale in enumerate(scales.tolist()):
        torch.testing.assert_close(rows[row], guide(null, prompt, scale)[row])


def test_rescale_brings_back_each_images_deviation(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    null, prompt = pair
    plain, full = guide(null, prompt, 7.5), guide(null, prompt, 7.5, rescale=1.0)
    assert (plain.std((1, 2, 3)) > 3 * prompt.std((1, 2, 3))).all()
    torch.testing.assert_close(full.std((1, 2, 3)), prompt.std((1, 2, 3)))
    torch.testing.assert_close(guide(null, prompt, 7.5, rescale=0.3), 0.3 * full + 0.7 * plain)
    alone = guide(null[1:2], prompt[1:2], 7.5, rescale=1.0)
    torch.testing.assert_close(alone, full[1:2])
    assert torch.isfinite(guide(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), 3.0, rescale=1.0)).all()


def test_interval() -> None:
    settings = SamplerConfig(steps=11, guidance=3.0, guidance_start=0.2, guidance_stop=0.75)
    assert guided(settings, [1.0] * 11) == [2, 3, 4, 5, 6, 7]
    levels = [math.inf, 9.0, 2.0, 0.5, 0.01]
    assert guided(SamplerConfig(guidance=3.0), levels) == guided(SamplerConfig(guidance=0.0), levels) == [0, 1, 2, 3, 4]
    assert guided(SamplerConfig(guidance=3.0), levels[:1]) == [0]
    assert guided(SamplerConfig(guidance=1.0), levels) == []
    noisy = SamplerConfig(guidance=3.0, guidance_sigma_min=0.5, guidance_sigma_max=9.0)
    assert guided(noisy, levels) == [1, 2]  # above the one, up to the other: equation 5 of 2404.07724
    assert guided(replace(noisy, guidance_stop=0.25), levels) == [1]


@pytest.mark.parametrize(
    ("objective", "solver", "expected", "wanted"),
    [
        # Times 801, 601, 401, 201 and 1 of Stable Diffusion's betas: sqrt(1 / abar - 1), abar the product of 1 - beta.
        (ObjectiveConfig(), "ddim", [5.13443, 2.29285, 1.16822, 0.57405, 0.04131], [1, 2, 3]),
        # sigma 1, 0.75025, 0.5005, 0.25075 and 0.001: sigma / (1 - sigma).
        (ObjectiveConfig(prediction="flow"), "euler", [math.inf, 3.004, 1.002, 0.33467, 0.001001], [1, 2]),
        # Times 999, 799, ..., rescaled as arXiv 2305.08891 has it: the first holds no latents at all.
        (ZERO_SNR, "ddim", [math.inf, 7.4107, 2.60485, 1.24137, 0.59475], [2, 3, 4]),
    ],
)
def test_noise_levels_of_the_steps(objective: ObjectiveConfig, solver: str, expected: list[float], wanted: list[int]) -> None:
    made = make_objective(objective)
    scheduler = made.scheduler(solver)
    scheduler.set_timesteps(5)
    levels = made.levels(scheduler)
    assert levels == pytest.approx(expected, rel=2e-3)
    settings = SamplerConfig(solver=solver, guidance=3.0, guidance_sigma_min=0.5, guidance_sigma_max=3.5)
    assert guided(settings, levels) == wanted


@pytest.mark.parametrize(
    "wrong",
    [
        {"guidance": -1.0}, {"guidance": 101.0}, {"guidance": float("nan")}, {"guidance_rescale": 1.5}, {"steps": 0},
        {"guidance_sigma_min": -1.0}, {"guidance_sigma_min": 2.0, "guidance_sigma_max": 2.0}, {"guidance_sigma_max": 0.0},
        {"guidance_start": 0.8, "guidance_stop": 0.2}, {"guidance_stop": 1.5}, {"solver": "heun"}
    ],
)  # fmt: skip
def test_refused_settings(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError):
        SamplerConfig(**wrong).check()  # type: ignore[arg-type]


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


@pytest.mark.parametrize(("prediction", "below", "above"), [("epsilon", 1.0, 5 / 20), ("v_prediction", 0.5 / 1.5, 5 / 21)])
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
            torch.testing.assert_close(objective.target(latents, noise, times.float()), scheduler.get_velocity(latents, noise, times))


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
    user_error(words, make_objective, ObjectiveConfig(**changes))
    user_error("use dpm or euler", make_objective(ALL[3]).scheduler, "ddim")


def test_a_checkpoint_whose_weights_are_refused_today_is_still_sampled() -> None:
    config = ObjectiveConfig(prediction="v_prediction", zero_terminal_snr=True, min_snr_gamma=5.0)
    objective = objective_of({"objective": asdict(config)})
    assert objective.scheduler().alphas_cumprod[-1] < 1e-6 and objective.config.prediction == "v_prediction"


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler, LCMScheduler, TCDScheduler])
def test_other_schedulers_made_from_ours_do_not_clip_latents(kind: Any, tmp_path: Path) -> None:
    make_objective(ObjectiveConfig(prediction="epsilon")).scheduler("dpm").save_config(tmp_path)
    stored = DPMSolverMultistepScheduler.from_pretrained(tmp_path)
    assert kind.from_config(stored.config).config.clip_sample is False
