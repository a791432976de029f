"""Classifier-free guidance: scale, rescale and interval."""

from __future__ import annotations

import pytest
import torch

from paradiffusion.config import SamplerConfig
from paradiffusion.diffusion.guidance import guide, is_guided
from paradiffusion.errors import UserError


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 5, 5, generator=generator), torch.randn(3, 4, 5, 5, generator=generator)


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
    assert [step for step in range(11) if is_guided(settings, step)] == [2, 3, 4, 5, 6, 7]
    whole = SamplerConfig(steps=5, guidance=3.0)
    assert all(is_guided(whole, step) for step in range(5))
    assert is_guided(SamplerConfig(steps=1, guidance=3.0), 0)
    assert not any(is_guided(SamplerConfig(steps=5, guidance=1.0), step) for step in range(5))
    assert is_guided(SamplerConfig(steps=5, guidance=0.0), 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"guidance": -1.0}, {"guidance": 101.0}, {"guidance": float("nan")}, {"guidance_rescale": 1.5}, {"steps": 0},
        {"guidance_start": 0.8, "guidance_stop": 0.2}, {"guidance_stop": 1.5}, {"solver": "heun"},
    ],
)  # fmt: skip
def test_refused_settings(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError):
        SamplerConfig(**wrong).check()  # type: ignore[arg-type]
