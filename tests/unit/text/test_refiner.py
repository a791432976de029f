"""The refiner: bidirectional, masked, aware of order, and blind to padding."""

from __future__ import annotations

import pytest
import torch

from paradiffusion.models.layout import attend
from paradiffusion.text.refiner import Refiner, convolve, nearness, rotary


@pytest.fixture(params=[(0, 0), (3, 0), (0, 4)], ids=["attention", "convolution", "near"])
def refiner(request: pytest.FixtureRequest) -> Refiner:
    kernel, reach = request.param
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Refiner(12, width=16, layers=2, heads=2, kernel=kernel, reach=reach).eval()


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
    # Before the text, too: places count by their distances alone.
    padded, padded_mask = (torch.cat([x[:, 7:], x[:, :7]], dim=1) for x in (padded, padded_mask))
    torch.testing.assert_close(refiner(padded, padded_mask)[:, 9:], out, atol=1e-5, rtol=0)
    torch.testing.assert_close(refiner(features, None), out, atol=1e-6, rtol=0)
    assert not torch.allclose(refiner(padded, None)[:, :7], out, atol=1e-3), "unmasked padding must count"


@torch.no_grad()
@torch.enable_grad()
@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_the_written_out_convolution_is_torchs_own(kernel: int) -> None:
    convolution, x = torch.nn.Conv1d(6, 6, kernel, padding=kernel // 2), torch.randn(2, 5, 6, requires_grad=True)
    written, own = convolve(convolution, x), convolution(x.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(written, own, atol=1e-6, rtol=0)
    asked = [x, convolution.weight, convolution.bias]
    for found, expected in zip(*(torch.autograd.grad(out.square().sum(), asked) for out in (written, own)), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_early_tokens_see_later_ones_and_order_matters(refiner: Refiner, features: torch.Tensor) -> None:
    out = refiner(features)
    changed = features.clone()
    changed[:, -1] += 1
    assert not torch.allclose(refiner(changed)[:, 0], out[:, 0], atol=1e-4)
    order = [0, 2, 1, 3, 4, 5, 6]
    swapped = refiner(features[:, order])
    assert not torch.allclose(swapped[:, [0, 2, 1, 3, 4, 5, 6]], out, atol=1e-4), "a bag of words"


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


def test_all_heads_but_the_last_look_near() -> None:
    bias = nearness(30, 8, 4, torch.device("cpu"))
    distance = (torch.arange(30)[:, None] - torch.arange(30)).abs()
    for head, reach in enumerate((2, 4, 8)):
        torch.testing.assert_close(bias[head], -distance / reach)
    assert not bias[3].any()
    assert torch.equal(nearness(30, 8, 20, torch.device("cpu")), bias.repeat(5, 1, 1))
    assert nearness(5, 8, 1, torch.device("cpu"))[0, 0, 4] == -0.5, "of a single head"
    assert nearness(5, 8, 2, torch.device("cpu"))[:, 0, 4].tolist() == [-0.5, 0]


@torch.no_grad()
def test_a_reach_changes_what_the_refiner_gives(features: torch.Tensor) -> None:
    far, near = (Refiner(12, width=16, layers=1, heads=2, reach=reach) for reach in (0, 2))
    near.load_state_dict(far.state_dict())
    assert not torch.allclose(near(features), far(features), atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_nearness_is_the_same_in_the_attention_that_is_written_out(masked: bool) -> None:
    q, k, v = torch.randn(3, 2, 4, 9, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask = torch.arange(9).expand(2, -1) < torch.tensor([[9], [6]]) if masked else None
    bias = nearness(9, 8, 4, torch.device("cpu"))
    fused = attend(q.float(), k.float(), v.float(), mask, bias)
    torch.testing.assert_close(attend(q, k, v, mask, bias).float(), fused, atol=0.03, rtol=0)
    assert not torch.allclose(fused, attend(q.float(), k.float(), v.float(), mask), atol=0.03)
