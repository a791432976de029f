"""The layout head: an estimate of the latents from the text, of any size, whose loss teaches the text path."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from paradiffusion.compose import compose_train
from paradiffusion.errors import UserError
from paradiffusion.models.joint import JointModel, LossBatch, build_joint
from paradiffusion.models.layout import LayoutHead, attend, position_code
from paradiffusion.text.refiner import Refiner

WIDTH = 12
TINY = ["unet=tiny", "conditioning.refiner_width=16", "conditioning.refiner_heads=2", "conditioning.refiner_layers=1"]


def joint(*overrides: str) -> JointModel:
    return build_joint(compose_train([*TINY, *overrides]), WIDTH)


@pytest.fixture
def batch() -> LossBatch:
    g = torch.Generator().manual_seed(0)
    return LossBatch(
        latents=torch.randn(3, 8, 6, 4, generator=g),
        noise=torch.randn(3, 8, 6, 4, generator=g),
        times=torch.tensor([200.0, 500.0, 900.0]),
        weights=torch.ones(3),
        mask=torch.ones(3, 7, dtype=torch.bool),
        told=torch.ones(3, dtype=torch.bool),
        features=torch.randn(3, 7, WIDTH, generator=g),
    )


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (6, 10), (12, 12), (5, 7)])
def test_it_estimates_latents_of_any_size(size: tuple[int, int]) -> None:
    head = LayoutHead(16, heads=2, layers=1, patch=2, channels=4)
    assert head(torch.randn(2, 5, 16), None, *size).shape == (2, 4, *size)


@torch.no_grad()
def test_masked_tokens_are_not_read_and_places_differ() -> None:
    torch.manual_seed(0)
    head = LayoutHead(16, heads=2, layers=2, patch=2, channels=4)
    tokens = torch.randn(2, 5, 16)
    mask = torch.ones(2, 5, dtype=torch.bool)
    padded, padded_mask = torch.cat([tokens, torch.full((2, 3, 16), 9.0)], 1), torch.cat([mask, ~mask[:, :3]], 1)
    out = head(tokens, mask, 8, 8)
    torch.testing.assert_close(head(padded, padded_mask, 8, 8), out, atol=1e-5, rtol=0)
    assert (out[..., :2, :2] - out[..., 6:, 6:]).abs().max() > 1e-3, "every place says the same"
    assert (out[0] - out[1]).abs().max() > 1e-3, "every caption says the same"


def test_attention_written_out_is_torchs() -> None:
    """What processors compute in bfloat16, and its gradient, against torch's attention in fp32."""
    torch.manual_seed(0)
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(1)
        inputs = [torch.randn(2, 3, n, 8).to(torch.bfloat16).to(dtype).requires_grad_() for n in (5, 9, 9)]
        given = attend(*inputs, mask)
        given.square().sum().backward()
        results.append([given.float(), *(tensor.grad.float() for tensor in inputs)])  # type: ignore[union-attr]
        assert not results[-1][2][1, :, 4:].any()  # keys that are not read have no gradient
    for exact, rounded in zip(*results, strict=True):
        torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05)


@torch.no_grad()
def test_the_mean_is_all_that_it_reads_where_it_is_told_so() -> None:
    model = joint("conditioning.layout_reads=mean")
    assert model.refiner is not None
    again = Refiner(**model.refiner.config)  # as a checkpoint's refiner/config.json has it
    again.load_state_dict(model.refiner.state_dict())
    tokens = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    means = torch.stack([tokens[0].mean(0), tokens[1, :3].mean(0)])[:, None]
    out = model.estimate(tokens, mask, 4, 4)
    for refiner in (model.refiner, again):
        assert refiner.layout is not None
        torch.testing.assert_close(refiner.layout(means, None, 4, 4), out, atol=1e-5, rtol=0)
    reading = joint()
    reading.load_state_dict(model.state_dict())
    assert (reading.estimate(tokens, mask, 4, 4) - out).abs().max() > 1e-3  # type: ignore[operator]


def test_a_place_knows_its_canvas() -> None:
    like = torch.zeros(())
    small, large = position_code(4, 4, like), position_code(6, 6, like)
    assert small.shape[0] == 16 and len(small.unique(dim=0)) == 16
    assert (torch.cdist(small, large) > 1e-3).all(), "a place of one canvas cannot be told from a place of another"


def test_its_loss_has_a_gradient_into_the_refiner(batch: LossBatch) -> None:
    model = joint("objective.layout_weight=3")
    with torch.no_grad():
        for parameter in model.unet.parameters():
            parameter.zero_()  # nothing but the layout loss can reach the text path
    losses = model(batch)
    losses.total.backward()
    assert losses.layout is not None and losses.layout > 0
    torch.testing.assert_close(losses.total.detach(), losses.diffusion + 3 * losses.layout)
    without = joint("objective.layout_weight=0")
    without.load_state_dict(model.state_dict())
    without(batch).total.backward()
    for name, parameter in model.refiner.embed.named_parameters():  # type: ignore[union-attr]
        other = without.refiner.embed.get_parameter(name).grad  # type: ignore[union-attr]
        assert parameter.grad is not None and other is not None
        assert (parameter.grad - other).abs().max() > 1e-5, "the layout loss does not reach the refiner"


def test_the_first_steps_may_leave_the_denoiser_out(batch: LossBatch) -> None:
    model = joint("objective.layout_weight=3")
    whole, alone = model(batch), model(replace(batch, denoise=False))
    assert whole.layout == alone.layout == alone.diffusion and alone.errors.shape == (3,)
    torch.testing.assert_close(alone.total, 3 * whole.layout)
    alone.total.backward()
    assert all(parameter.grad is None for parameter in model.unet.parameters())
    assert model.refiner is not None and model.refiner.embed.weight.grad is not None


def test_dropped_captions_and_stand_ins_take_no_part_in_its_loss(batch: LossBatch) -> None:
    model = joint()
    alone = [model(replace(batch, told=torch.arange(3) == row)).layout for row in range(3)]
    both = model(replace(batch, told=torch.tensor([True, False, True]))).layout
    torch.testing.assert_close(both, (alone[0] + alone[2]) / 2)
    torch.testing.assert_close(model(replace(batch, weights=torch.tensor([1.0, 0.0, 1.0]))).layout, both)
    nobody = model(replace(batch, told=torch.zeros(3, dtype=torch.bool)))
    assert nobody.layout == 0 and nobody.total == nobody.diffusion


def test_several_noise_levels_are_as_many_samples(batch: LossBatch) -> None:
    model = joint()
    g = torch.Generator().manual_seed(1)
    noise, times = torch.randn(6, 8, 6, 4, generator=g), torch.tensor([100.0, 300, 500, 700, 800, 950])
    twice = model(replace(batch, noise=noise, times=times))
    once = [model(replace(batch, noise=noise[i : i + 3], times=times[i : i + 3])) for i in (0, 3)]
    torch.testing.assert_close(twice.errors, torch.cat([one.errors for one in once]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(twice.layout, once[0].layout)


def test_the_paper_has_no_head_and_an_old_one_is_refused() -> None:
    assert joint("conditioning=paper").estimate(torch.zeros(1, 3, WIDTH), None, 4, 4) is None
    with pytest.raises(UserError, match="mean of the features"):
        Refiner(12, 16, 1, 2, 0, layout=8)  # type: ignore[arg-type]  # as config.json of before has it
