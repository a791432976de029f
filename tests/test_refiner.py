"""The refiner: bidirectional, masked, aware of order, and blind to padding."""

from __future__ import annotations

import pytest
import torch

from paradiffusion.text.refiner import Refiner, rotary


@pytest.fixture(params=[(0, 0), (3, 0), (3, 4)], ids=["attention", "convolution", "layout"])
def refiner(request: pytest.FixtureRequest) -> Refiner:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kernel, layout = request.param
        return Refiner(12, width=16, layers=2, heads=2, kernel=kernel, layout=layout).eval()


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_padding_changes_nothing_where_it_is_masked(refiner: Refiner, features: torch.Tensor) -> None:
    mask = torch.ones(2, 7, dtype=torch.bool)
    padded = torch.cat([features, torch.full((2, 9, 12), 3.0)], dim=1)
    padded_mask = torch.cat([mask, torch.zeros(2, 9, dtype=torch.bool)], dim=1)
    out = refiner(features, mask)
    assert out.shape == (2, 7, 16)
    torch.testing.assert_close(refiner(padded, padded_mask)[:, :7], out, atol=1e-5, rtol=0)
    torch.testing.assert_close(refiner(features, None), out, atol=1e-6, rtol=0)
    assert not torch.allclose(refiner(padded, None)[:, :7], out, atol=1e-3), "unmasked padding must count"


@torch.no_grad()
def test_early_tokens_see_later_ones_and_order_matters(refiner: Refiner, features: torch.Tensor) -> None:
    out = refiner(features)
    changed = features.clone()
    changed[:, -1] += 1
    assert not torch.allclose(refiner(changed)[:, 0], out[:, 0], atol=1e-4)
    order = [0, 2, 1, 3, 4, 5, 6]
    swapped = refiner(features[:, order])
    assert not torch.allclose(swapped[:, [0, 2, 1, 3, 4, 5, 6]], out, atol=1e-4), "a bag of words"


def test_rotary_depends_on_distances_only() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(8, generator=generator), torch.randn(8, generator=generator)
    rows = lambda x: x.expand(1, 1, 10, 8)  # noqa: E731 - the same vector at ten places
    scores = (rotary(rows(q)) @ rotary(rows(k)).transpose(-1, -2))[0, 0]
    for distance in range(-4, 5):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=0)
    torch.testing.assert_close(rotary(rows(q)).norm(dim=-1), rows(q).norm(dim=-1))
    assert torch.equal(rotary(rows(q))[0, 0, 0], q)


@torch.no_grad()
def test_statistics_come_from_real_tokens_and_undo_channel_scales(refiner: Refiner, features: torch.Tensor) -> None:
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 4:] = False
    refiner.set_statistics(features, mask)
    real = features[mask]
    torch.testing.assert_close(refiner.mean, real.mean(0))
    torch.testing.assert_close(refiner.std, real.std(0))
    out = refiner(features, mask)
    scale = torch.logspace(-2, 3, 12)
    refiner.set_statistics(features * scale + 5, mask)
    torch.testing.assert_close(refiner(features * scale + 5, mask)[mask], out[mask], atol=1e-3, rtol=0)


@torch.no_grad()
def test_a_constant_channel_does_not_divide_by_zero(refiner: Refiner, features: torch.Tensor) -> None:
    features[..., 3] = 2.0
    refiner.set_statistics(features, None)
    assert torch.isfinite(refiner(features)).all()


@torch.no_grad()
def test_the_layout_is_painted_from_the_summary_alone_at_any_size(features: torch.Tensor) -> None:
    torch.manual_seed(0)
    refiner = Refiner(12, width=16, layers=1, heads=2, layout=4).eval()
    refined = refiner(features)
    small, large = refiner.paint(refined, 4, 6), refiner.paint(refined, 8, 12)
    assert small.shape == (2, 4, 4, 6) and large.shape == (2, 4, 8, 12)
    halved = torch.nn.functional.avg_pool2d(large, 2)
    torch.testing.assert_close(halved, small, atol=0.15 * float(small.std()), rtol=0.15)  # one picture, twice as fine
    other = torch.cat([refined[:, :1], torch.zeros_like(refined[:, 1:])], dim=1)
    torch.testing.assert_close(refiner.paint(other, 4, 6), small)
    assert float((small[0] - small[1]).abs().max()) > 1e-3, "every caption paints the same"
    # A single cosine down the rows and none across: what the amplitudes mean.
    assert refiner.layout is not None
    refiner.layout.weight.zero_()
    refiner.layout.bias.zero_()
    refiner.layout.bias[4] = 1.0  # channel 0, wave 1 down, wave 0 across
    down = torch.cos(torch.pi * (torch.arange(4) + 0.5) / 4)
    torch.testing.assert_close(refiner.paint(refined, 4, 6)[0, 0], down[:, None].expand(4, 6))


@torch.no_grad()
def test_the_summary_is_standardised_over_captions(features: torch.Tensor) -> None:
    refiner = Refiner(12, width=16, layers=1, heads=2, layout=4).eval()
    assert refiner.summary is not None
    captions = torch.cat([features, features.flip(1) * 0.5, features * 2 + 1])
    refiner.set_statistics(captions, None)
    means = (captions.mean(1) - refiner.caption_mean) / refiner.caption_std
    torch.testing.assert_close(means.mean(0), torch.zeros(12), atol=1e-5, rtol=0)
    torch.testing.assert_close(means.std(0), torch.ones(12), atol=1e-4, rtol=0)
    torch.testing.assert_close(refiner(captions)[:, 0], refiner.summary(means))


@torch.no_grad()
def test_captions_that_are_all_alike_blow_nothing_up(features: torch.Tensor) -> None:
    refiner = Refiner(12, width=16, layers=1, heads=2, layout=4).eval()
    alike = features[:1].repeat(8, 1, 1)
    refiner.set_statistics(alike + 1e-7 * torch.randn(alike.shape, generator=torch.Generator().manual_seed(0)), None)
    other = (features[1:].mean(1) - refiner.caption_mean) / refiner.caption_std
    assert other.abs().max() < 10, "any other caption is blown up"
    assert torch.isfinite(refiner(features)).all()
