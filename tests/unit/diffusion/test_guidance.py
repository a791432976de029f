"""Classifier-free guidance: scale, rescale and interval."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

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
def test_noise_levels_of_the_steps(
    objective: ObjectiveConfig, solver: str, expected: list[float], wanted: list[int]
) -> None:
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
