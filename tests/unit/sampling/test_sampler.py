"""The sampler: an image of its own seed at any batch size, guidance, and every solver."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from commands import user_error
from sampling_models import TinyModels
from torch import Tensor

from paradiffusion.config import PREDICTIONS, SOLVERS, ObjectiveConfig, SamplerConfig
from paradiffusion.diffusion.objective import make_objective, set_steps
from paradiffusion.errors import UserError
from paradiffusion.sampling.sampler import against, check_scheduler, sample_latents, starting_noise
from paradiffusion.text.conditioning import Conditioning

SHAPE = (4, 8, 8)
# The flow has no ddim.
KINDS = [(p, s) for p in PREDICTIONS for s in SOLVERS if (p, s) != ("flow", "ddim")]
PROMPTS = [f"a red circle and {'one more thing ' * n}" for n in range(4)]


def draw(
    models: TinyModels,
    prompts: list[str],
    seeds: list[int],
    settings: SamplerConfig,
    negative: Conditioning | None = None,
    **options: object,
) -> Tensor:
    conditioning = models.encode(prompts)
    conditioning = conditioning if negative is None else against(conditioning, negative)
    return sample_latents(models.denoise, models.objective, conditioning, seeds, SHAPE, settings, "cpu", models.dtype, **options)


@pytest.mark.parametrize(("prediction", "solver"), KINDS)
def test_alone_equals_in_a_batch_of_eight(prediction: str, solver: str) -> None:
    models = TinyModels(prediction=prediction)
    settings = SamplerConfig(solver=solver, steps=5, guidance=3.0, guidance_rescale=0.5)
    seeds = [3, 1, 4, 1, 5, 9, 2, 6]
    together = draw(models, PROMPTS * 2, seeds, settings)
    for row in (0, 3, 7):
        alone = draw(models, [(PROMPTS * 2)[row]], [seeds[row]], settings)
        # Rounding, in proportion to the largest: which kernel a batch of another size takes is the processor's matter.
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=2e-6 * float(together.abs().max()))
    assert torch.isfinite(together).all()
    assert (together[1] - together[3]).abs().max() > 1e-2  # same seed, another prompt
    assert (together[0] - together[4]).abs().max() > 1e-2  # same prompt, another seed


@pytest.mark.parametrize("steps", [1, 20, 501, 1000])
@pytest.mark.parametrize(
    ("prediction", "solver", "zero_terminal_snr"),
    [(*kind, False) for kind in KINDS] + [("v_prediction", solver, True) for solver in SOLVERS],
)
def test_a_perfect_denoiser_finds_the_latents(prediction: str, solver: str, zero_terminal_snr: bool, steps: int) -> None:
    """The oracle knows the one image of its data set, so every solver must arrive there from any noise."""
    objective = make_objective(ObjectiveConfig(prediction=prediction, zero_terminal_snr=zero_terminal_snr))
    truth = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(3))
    seen: list[float] = []

    def oracle(noised: Tensor, times: Tensor, features: Tensor, mask: Tensor | None) -> Tensor:
        seen.append(float(times[0]))
        if prediction == "flow":
            return (noised - truth) / (times.view(-1, 1, 1, 1) / 1000)
        # Between two whole times the euler scheduler interpolates sigma, as is done here.
        cumprod = objective.alphas_cumprod.clamp_min(2**-24)  # as the euler scheduler does: 0 has no sigma
        variances = ((1 - cumprod) / cumprod).sqrt()
        low = times.floor().long()
        sigma = torch.lerp(variances[low], variances[(low + 1).clamp(max=999)], times - low).view(-1, 1, 1, 1)
        alpha = (1 / (1 + sigma**2)).sqrt()
        noise = (noised - alpha * truth) / (sigma * alpha)
        return noise if prediction == "epsilon" else alpha * noise - sigma * alpha * truth

    conditioning = Conditioning(torch.zeros(2, 1, 1), None, torch.zeros(1, 1, 1), None)
    settings = SamplerConfig(solver=solver, steps=steps, guidance=1.0)
    found = sample_latents(oracle, objective, conditioning, [0, 1], SHAPE, settings, "cpu", torch.float32)
    assert (found - truth).abs().mean() < 0.03  # DDIM ends at the lowest noise
    assert seen == sorted(seen, reverse=True) and len(seen) == steps and 800 <= max(seen) <= 1000


SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_a_scheduler_of_diffusers_fits_the_objective_or_is_refused(prediction: str) -> None:
    """Those that people put into a pipeline, made from the configuration that ours has."""
    noises = {
        diffusers.DDIMScheduler: [], diffusers.DDPMScheduler: [], diffusers.PNDMScheduler: [], diffusers.LCMScheduler: [],
        diffusers.TCDScheduler: [], diffusers.EulerDiscreteScheduler: SIGMAS, diffusers.EulerAncestralDiscreteScheduler: [],
        diffusers.HeunDiscreteScheduler: SIGMAS, diffusers.KDPM2DiscreteScheduler: SIGMAS,
    }  # fmt: skip
    flows = {diffusers.FlowMatchEulerDiscreteScheduler: SIGMAS, diffusers.FlowMatchHeunDiscreteScheduler: []}
    both = {diffusers.DPMSolverMultistepScheduler: SIGMAS, diffusers.UniPCMultistepScheduler: SIGMAS}
    right, wrong = (flows, noises) if prediction == "flow" else (noises, flows)
    objective = make_objective(ObjectiveConfig(prediction=prediction))
    config = objective.scheduler("dpm").config

    def check(kind: Any, **more: Any) -> None:
        objective.schedulers = lambda solver, **overrides: kind.from_config(config, **more)
        check_scheduler(objective)

    for kind, sigmas in {**right, **both}.items():
        check(kind)
        for key in sigmas:
            # UniPC alone knows what Karras' sigmas are for a flow.
            if prediction == "flow" and kind in both and (kind.__name__, key) != ("UniPCMultistepScheduler", SIGMAS[0]):
                user_error(f"{kind.__name__} as it is set here .* flow .* without Karras", check, kind, **{key: True})
            else:
                check(kind, **{key: True})
    for kind in wrong:
        user_error(f"{kind.__name__} as it is set here .* {prediction} .*{objective.suits[0]}", check, kind)


def test_more_steps_than_the_schedule_has() -> None:
    with pytest.raises(UserError, match="steps=1001 are more than the 1000"):
        set_steps(make_objective(ObjectiveConfig(prediction="epsilon")).scheduler(), 1001)


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({"guidance_start": 0.3, "guidance_stop": 0.8}, [2, 2, 4, 4, 2]),
        # Stable Diffusion's noise levels at these five steps: 14.6, 5.09, 2.28, 1.16 and 0.57.
        ({"guidance_sigma_min": 0.5, "guidance_sigma_max": 5}, [2, 2, 4, 4, 4]),
        ({"guidance": 1.0}, [2] * 5),
        ({}, [4] * 5),
    ],
)
def test_guidance_runs_twice_the_rows_only_inside_its_interval(settings: dict[str, float], rows: list[int]) -> None:
    models = TinyModels()
    draw(models, PROMPTS[:2], [0, 1], SamplerConfig(**{"steps": 5, "guidance": 3.0, **settings}))  # type: ignore[arg-type]
    assert models.rows_seen == rows


@pytest.mark.parametrize("mask_padding", [True, False])
def test_scale_zero_is_the_null_prompt_and_negatives_take_its_place(mask_padding: bool) -> None:
    models = TinyModels(mask_padding=mask_padding)
    zero, one = SamplerConfig(steps=3, guidance=0.0), SamplerConfig(steps=3, guidance=1.0)
    assert torch.allclose(draw(models, PROMPTS[2:], [5, 6], zero), draw(models, ["", ""], [5, 6], one), atol=1e-5)
    negatives = ["a blue star", "nothing but a very long negative prompt of many words"]
    wanted = draw(models, negatives, [5, 6], one)
    found = draw(models, PROMPTS[2:], [5, 6], zero, negative=models.encode(negatives))
    assert torch.allclose(found, wanted, atol=1e-5)
    shared = draw(models, PROMPTS[2:], [5, 6], zero, negative=models.encode(negatives[:1]))
    assert torch.allclose(shared[0], wanted[0], atol=1e-5)
    with pytest.raises(ValueError, match="3 negative prompts"):
        against(models.encode(PROMPTS[:2]), models.encode(PROMPTS[:3]))


def test_noise_is_a_function_of_the_seed_and_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    noise = starting_noise([7, 8, 7], SHAPE)
    assert torch.equal(noise[0], noise[2]) and not torch.equal(noise[0], noise[1])
    models = TinyModels()
    settings = SamplerConfig(steps=2)
    assert torch.equal(draw(models, PROMPTS[:1], [7], settings), draw(models, PROMPTS[:1], [7], settings))
    assert torch.equal(before, torch.get_rng_state())


def test_denoiser_gets_dtype_and_latents_stay_float32() -> None:
    models, seen, steps = TinyModels(dtype=torch.bfloat16), [], []

    def denoise(latents: Tensor, times: Tensor, features: Tensor, mask: Tensor | None) -> Tensor:
        seen.append((latents.dtype, times.dtype, features.dtype))
        return latents

    models.denoise = denoise  # type: ignore[method-assign]
    settings = SamplerConfig(steps=3, guidance=2.0)
    found = draw(models, PROMPTS[:2], [0, 1], settings, on_step=lambda step, latents: steps.append(step))
    assert set(seen) == {(torch.bfloat16, torch.float32, torch.bfloat16)}
    assert found.dtype == torch.float32 and steps == [1, 2, 3]
    with pytest.raises(ValueError, match="1 seeds for 2 prompts"):
        draw(TinyModels(), PROMPTS[:2], [0], settings)
