"""Means and differences with their intervals, whose rate is shown in simulation."""

from __future__ import annotations

import numpy as np
import pytest

from paradiffusion.evaluation.estimates import Estimate, difference, expanded_tails, mean, of_sums, ratio


def test_a_ratio_is_the_sum_over_the_sum() -> None:
    found = ratio([1, 0, 3], [2, 2, 4], ["a", "a", "b"])
    assert found.mean == 0.5 and found.n == 8 and found.prompts == 2
    assert found.low <= 0.5 <= found.high and (found.low, found.high) == (0.25, 0.75)


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
    with pytest.raises(ValueError, match="counted"):
        ratio([0.0, 0.0], [0.0, 0.0], ["a", "b"])
    with pytest.raises(ValueError, match="0 prompts"):
        mean([], [])
    with pytest.raises(ValueError, match="1 prompts"):
        mean([1.0, 2.0], ["a"])


def test_prompts_of_which_nothing_counts_are_no_prompts() -> None:
    with_empty = ratio([1, 0, 0, 0], [1, 1, 0, 0], ["a", "b", "c", "d"])
    assert with_empty == ratio([1, 0], [1, 1], ["a", "b"]) and with_empty.prompts == 2


def test_many_prompts_fit_in_memory() -> None:
    rng = np.random.default_rng(1)
    found = mean(rng.normal(size=20_000).tolist(), [str(number) for number in range(20_000)])
    assert found.high - found.low == pytest.approx(2 * 1.96 / np.sqrt(20_000), rel=0.1)


def clustered(rng: np.random.Generator, prompts: int, images: int) -> np.ndarray:
    """Values [prompts, images] with mean 0, half of whose variance is the prompt's."""
    return rng.normal(size=(prompts, 1)) + rng.normal(size=(prompts, images))


def share_covered(sets: int, prompts: int, images: int, by_prompt: bool = True) -> float:
    rng = np.random.default_rng(2)
    names = [f"{p}" if by_prompt else f"{p} {i}" for p in range(prompts) for i in range(images)]
    found = [mean(clustered(rng, prompts, images).ravel().tolist(), names, seed) for seed in range(sets)]
    return float(np.mean([one.low <= 0 <= one.high for one in found]))


def test_intervals_cover_at_their_rate_and_would_not_without_prompts() -> None:
    # The standard error of a share of 1,500 near 0.95 is 0.006.
    assert 0.93 <= share_covered(1500, 30, 4) <= 0.97
    assert share_covered(500, 30, 4, by_prompt=False) < 0.85


@pytest.mark.parametrize(("prompts", "least"), [(5, 0.90), (10, 0.92)])
def test_few_prompts_are_covered_too(prompts: int, least: float) -> None:
    assert least <= share_covered(1000, prompts, 1) <= 0.975


def test_the_tails_widen_for_few_prompts_and_end_at_the_usual() -> None:
    assert expanded_tails(1) == (0.5, 0.5)
    assert expanded_tails(5)[0] < expanded_tails(20)[0] < 0.025
    assert expanded_tails(10_000) == pytest.approx((0.025, 0.975), abs=1e-4)


def test_shares_are_covered() -> None:
    rng = np.random.default_rng(3)
    names = [str(number) for number in range(60)]
    found = [mean((rng.random(60) < 0.8).astype(float).tolist(), names, seed) for seed in range(800)]
    assert 0.92 <= np.mean([one.low <= 0.8 <= one.high for one in found]) <= 0.98


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


def test_a_difference_is_over_common_prompts_and_takes_weights() -> None:
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
    for seed in range(1000):
        hardness = 2 * rng.normal(size=(30, 1))
        a, b = (hardness + clustered(rng, 30, 2) + shift for shift in (0.0, 0.3))
        found = difference(a.ravel().tolist(), names, b.ravel().tolist(), names, seed=seed)
        held += found.low <= 0.3 <= found.high
    assert 0.93 <= held / 1000 <= 0.97


def test_resamples_without_a_value_are_left_out() -> None:
    found = of_sums(np.array([[1.0, 0, 0], [1.0, 0, 0]]), lambda sums: sums[0] / sums[1], 3)
    assert (found.mean, found.low, found.high) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="counted"):
        of_sums(np.zeros((2, 3)), lambda sums: sums[0] / sums[1], 3)
