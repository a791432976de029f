"""Tokens of scores: which numbers are read, how they are cut into bins, and what the denoiser is told of them."""

from __future__ import annotations

import math

import pytest
import torch
from commands import user_error
from tiny_unet import TINY_UNET, WIDTH, a_batch
from torch import Tensor

from paradiffusion.config import ConditioningConfig, SamplerConfig, TrainConfig, UNetConfig
from paradiffusion.models.joint import JointModel, build_joint
from paradiffusion.text.conditioning import pad_length
from paradiffusion.text.scores import ScoreTokens, scores_of

SCORES = {"aesthetic": 4, "agreement": 2}
REFINER = {"projection": "refiner", "refiner_width": 16, "refiner_layers": 1, "refiner_heads": 2, "mask_padding": True}


def joint_of(scores: dict[str, int]) -> JointModel:
    conditioning = ConditioningConfig(**REFINER, key_positions=True, layout_patch=2, scores=scores)
    return build_joint(TrainConfig(unet=UNetConfig(arguments=TINY_UNET), conditioning=conditioning), WIDTH).eval()


def test_numbers_are_read_wherever_our_tools_and_others_put_them() -> None:
    meta = {
        "aesthetic": 1,
        "width": 64,
        "extra": {"aesthetic": 2, "likes": 7, "title": "a"},
        "scores": {"aesthetic": 3.5, "agreement": math.nan},
    }
    assert scores_of(meta) == {"aesthetic": 3.5, "width": 64.0, "likes": 7.0}
    assert scores_of({"scores": [1, 2], "extra": None, "huge": 10**400, "no": -math.inf}) == {}


def test_bins_hold_as_many_samples_each_and_stay_as_they_are() -> None:
    tokens, generator = ScoreTokens(8, SCORES), torch.Generator().manual_seed(0)
    values = torch.stack([torch.randn(1000, generator=generator).exp(), torch.rand(1000, generator=generator)], 1)
    tokens.set_edges([dict(zip(SCORES, row, strict=True)) for row in values.tolist()] + [{}] * 50)
    for row, count in enumerate(SCORES.values()):
        sizes = tokens.place(values)[:, row].bincount(minlength=count + 1).tolist()
        assert sizes[0] == 0 and len(sizes) == count + 1 and all(abs(size - 1000 / count) <= 1 for size in sizes[1:])
    asked = tokens.values([{"aesthetic": -9.0}, {"aesthetic": 1e6, "agreement": 2.0}, {"agreement": 0.0}])
    assert tokens.place(asked).tolist() == [[1, 0], [4, 2], [0, 1]]
    again = ScoreTokens(8, SCORES)
    again.load_state_dict(tokens.state_dict())
    assert torch.equal(again.place(values), tokens.place(values))


def test_a_score_with_too_few_values_is_refused_with_those_that_there_are() -> None:
    samples = [{"aesthetic": float(number), "words": 3.0} for number in range(9)]
    said = user_error("conditioning.scores={agreement: 2} needs 2 different values", ScoreTokens(8, SCORES).set_edges, samples)
    assert "9 samples has 0" in said and "aesthetic, words" in said
    user_error("has 1 of that name", ScoreTokens(8, {"words": 3}).set_edges, samples)


@torch.no_grad()
def predict(joint: JointModel, bins: list[list[int]] | None, padding: int = 0) -> Tensor:
    batch = a_batch()
    assert batch.features is not None and batch.mask is not None
    length = batch.features.shape[1] + padding
    features, mask = pad_length(batch.features, length), pad_length(batch.mask, length)
    told = joint.with_scores(joint.refine(features, mask), mask, None if bins is None else torch.tensor(bins))
    return joint.denoise(batch.latents, batch.times, *told)


def test_the_denoiser_is_told_each_score_whatever_its_neighbours_padding() -> None:
    joint = joint_of(SCORES)
    told = predict(joint, [[4, 2], [4, 1], [1, 0]])
    for other in ([[3, 2], [4, 1], [1, 0]], [[4, 1], [4, 1], [1, 0]]):
        change = (predict(joint, other) - told).abs().amax((1, 2, 3))
        assert change[0] > 1e-4 and change[1:].max() == 0
    torch.testing.assert_close(predict(joint, [[4, 2], [4, 1], [1, 0]], padding=9), told, atol=1e-5, rtol=0)
    assert torch.equal(predict(joint, None), predict(joint, [[0, 0]] * 3)) and not torch.equal(predict(joint, None), told)


def test_all_weights_but_those_of_scores_are_the_same_as_without() -> None:
    """So a study's baseline differs in nothing else."""
    with_scores, without = (joint_of(scores).state_dict() for scores in (SCORES, {}))
    assert with_scores.keys() - without.keys() == {"refiner.scores.tokens", "refiner.scores.edges"}
    assert all(torch.equal(tensor, with_scores[name]) for name, tensor in without.items())


@pytest.mark.parametrize("wrong", [ConditioningConfig(scores={"a": 2}), ConditioningConfig(**REFINER, scores={"a": 1})])
def test_scores_need_the_refiner_and_two_bins(wrong: ConditioningConfig) -> None:
    user_error("conditioning.scores=", wrong.check)


@pytest.mark.parametrize("asked", [{"b": 1}, {"a": 3}, {"a": -1}])
def test_a_stage_asks_for_bins_that_there_are(asked: dict[str, int]) -> None:
    config = TrainConfig(conditioning=ConditioningConfig(**REFINER, scores={"a": 2}), sampler=SamplerConfig(score_bins=asked))
    config.data.captions = {"short": 1.0}
    assert "its scores are a: 0 to 2" in user_error("sampler.score_bins={", config.check)
