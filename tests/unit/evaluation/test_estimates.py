"""Means and differences with their intervals, whose rate is shown in simulation."""

from __future__ import annotations

import numpy as np
import pytest

from paradiffusion.evaluation.estimates import Estimate, difference, expanded_tails, mean, ratio


def test_a_ratio_is_the_sum_over_the_sum() -> None:
    found = ratio([1, 0, 3], [2, 2, 4], ["a", "a", "b"])
    assert found.mean == 0.5 and found.n == 8 and found.prompts == 2
    assert (found.low, found.high) == (0.25, 0.75)
    # Prompts of which nothing counts are no prompts.
    assert ratio([1, 0, 0, 0], [1, 1, 0, 0], ["a", "b", "c", "d"]) == ratio([1, 0], [1, 1], ["a", "b"])


def test_the_order_of_entries_and_the_cut_into_pieces_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    values, prompts = rng.random(60), [f"p{number % 20}" for number in range(60)]
    turned = rng.permutation(60)
    found = mean(values.tolist(), prompts)
    again = mean(values[turned].tolist(), [prompts[place] for place in turned])
    assert np.allclose([found.mean, found.low, found.high], [again.mean, again.low, again.high], atol=1e-12)
    monkeypatch.setattr("paradiffusion.evaluation.estimates._AT_ONCE", 100)
    assert mean(values.tolist(), prompts) == found
    assert mean(values.tolist(), prompts, seed=1) != found


def test_one_prompt_has_no_width_and_nothing_no_mean() -> None:
    assert mean([0.2, 0.4], ["a", "a"]) == Estimate(pytest.approx(0.3), pytest.approx(0.3), pytest.approx(0.3), 2, 1)
    for values, weights, prompts, said in (([0, 0], [0, 0], ["a", "b"], "counted"), ([], [], [], "0 prompts"),
                                           ([1, 2], [1, 1], ["a"], "1 prompts")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            ratio(values, weights, prompts)


@pytest.mark.parametrize(
    ("sets", "prompts", "images", "least", "most"), [(1000, 30, 4, 0.93, 0.97), (1000, 5, 1, 0.90, 0.975), (1000, 10, 1, 0.92, 0.975)]
)
def test_intervals_cover_at_their_rate(sets: int, prompts: int, images: int, least: float, most: float) -> None:
    # The standard error of a share of 1,000 near 0.95 is 0.007.
    assert least <= share_covered(sets, prompts, images) <= most
    if images > 1:
        assert share_covered(300, prompts, images, by_prompt=False) < 0.85, "were images taken for prompts"


def clustered(rng: np.random.Generator, prompts: int, images: int) -> np.ndarray:
    """Values [prompts, images] with mean 0, half of whose variance is the prompt's."""
    return rng.normal(size=(prompts, 1)) + rng.normal(size=(prompts, images))


def share_covered(sets: int, prompts: int, images: int, by_prompt: bool = True) -> float:
    rng = np.random.default_rng(2)
    names = [f"{p}" if by_prompt else f"{p} {i}" for p in range(prompts) for i in range(images)]
    found = [mean(clustered(rng, prompts, images).ravel().tolist(), names, seed) for seed in range(sets)]
    return float(np.mean([one.low <= 0 <= one.high for one in found]))


def test_the_tails_widen_for_few_prompts_and_end_at_the_usual() -> None:
    assert expanded_tails(1) == (0.5, 0.5)
    assert expanded_tails(5)[0] < expanded_tails(20)[0] < 0.025
    assert expanded_tails(10_000) == pytest.approx((0.025, 0.975), abs=1e-4)


def test_a_difference_is_paired_by_prompt() -> None:
    rng = np.random.default_rng(4)
    hardness, prompts = rng.normal(size=50), [f"p{number}" for number in range(50)]
    a, b = hardness, hardness + 0.1 + 0.01 * rng.normal(size=50)
    found = difference(a.tolist(), prompts, b.tolist()[::-1], prompts[::-1])
    assert found.mean == pytest.approx(0.1, abs=0.01) and 0.09 < found.low < found.high < 0.11
    assert found.prompts == 50 and found.n == 100
    turned = difference(b.tolist(), prompts, a.tolist(), prompts)
    assert (turned.mean, turned.low, turned.high) == pytest.approx((-found.mean, -found.high, -found.low), abs=2e-3)
    alone = mean(a.tolist(), prompts)
    assert alone.high - alone.low > 10 * (found.high - found.low)

    found = difference([1.0, 5.0], ["x", "a"], [2.0, 9.0], ["x", "b"])
    assert (found.mean, found.n, found.prompts) == (1.0, 2, 1)
    weighted = difference([0, 1], ["x", "y"], [1, 0], ["x", "y"], [3, 1], [1, 3])
    assert weighted.mean == 0.0
    with pytest.raises(ValueError, match="both"):
        difference([1.0], ["a"], [1.0], ["b"])
    with pytest.raises(ValueError):
        difference([1.0, 2.0], ["a"], [1.0], ["a"])


def test_differences_cover_at_their_rate() -> None:
    rng = np.random.default_rng(5)
    names = [str(prompt) for prompt in range(30) for _ in range(2)]
    held = 0
    for seed in range(600):
        hardness = 2 * rng.normal(size=(30, 1))
        a, b = (hardness + clustered(rng, 30, 2) + shift for shift in (0.0, 0.3))
        found = difference(a.ravel().tolist(), names, b.ravel().tolist(), names, seed=seed)
        held += found.low <= 0.3 <= found.high
    assert 0.93 <= held / 600 <= 0.97
