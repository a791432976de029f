"""Frechet's distance and the kernel one, on features whose distance is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import linalg

from paradiffusion.evaluation.estimates import mean
from paradiffusion.evaluation.scores import set_quality as frechet


def with_moments(rng: np.random.Generator, count: int, center: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Features [count, D] whose sample mean and covariance are exactly these."""
    rows = rng.normal(size=(count, len(center)))
    rows -= rows.mean(axis=0)
    white = np.linalg.solve(np.linalg.cholesky(np.cov(rows, rowvar=False)), rows.T).T
    return center + white @ np.linalg.cholesky(covariance).T


def spread(rng: np.random.Generator, width: int) -> np.ndarray:
    turn = rng.normal(size=(width, width))
    return turn @ turn.T / width + 0.1 * np.eye(width)


def test_frechet_is_the_closed_form_on_gaussians() -> None:
    rng = np.random.default_rng(0)
    m, r, a, b = rng.normal(size=8), rng.normal(size=8), rng.uniform(0.5, 3, 8), rng.uniform(0.5, 3, 8)
    one = frechet.gaussian(with_moments(rng, 50, m, np.diag(a**2)))
    other = frechet.gaussian(with_moments(rng, 70, r, np.diag(b**2)))
    # Where covariances commute, the distance is that of the means plus that of the standard deviations.
    assert frechet.frechet_distance(one, other) == pytest.approx(((m - r) ** 2).sum() + ((a - b) ** 2).sum(), rel=1e-9)
    assert np.allclose(one.covariance, np.diag(a**2)) and one.count == 50


def test_frechet_is_symmetric_0_to_itself_and_agrees_with_the_matrix_root() -> None:
    rng = np.random.default_rng(1)
    for p, q in (
        (rng.normal(size=(300, 6)) @ spread(rng, 6), rng.normal(size=(200, 6)) + 0.3),
        (rng.normal(size=(10, 64)), rng.normal(size=(500, 64))),  # fewer images than features: a singular matrix
    ):
        one, other = frechet.gaussian(p), frechet.gaussian(q)
        c, d = np.cov(p, rowvar=False), np.cov(q, rowvar=False)
        half = linalg.sqrtm(d).real
        roots = np.sqrt(np.linalg.eigvalsh(half @ c @ half).clip(min=0))
        expected = ((p.mean(0) - q.mean(0)) ** 2).sum() + np.trace(c + d) - 2 * roots.sum()
        assert frechet.frechet_distance(one, other) == pytest.approx(expected, rel=1e-6)
        assert frechet.frechet_distance(other, one) == pytest.approx(expected, rel=1e-6)
        assert frechet.frechet_distance(one, frechet.gaussian_from_moments(q.mean(0), d)) == pytest.approx(expected)
        assert frechet.frechet_distance(one, one) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="1 features"):
        frechet.gaussian(p[:1])


def test_what_an_image_adds_is_the_derivative() -> None:
    rng = np.random.default_rng(3)
    rows, reference = rng.normal(size=(30, 5)) * 2 + 1, frechet.gaussian(rng.normal(size=(90, 5)))
    found = frechet.frechet_influence(rows, reference)

    def weighted(weights: np.ndarray) -> float:
        center = weights @ rows
        factor = np.sqrt(weights * 30 / 29)[:, None] * (rows - center)
        return frechet.frechet_distance(frechet.Gaussian(center, factor), reference)

    even, step = np.full(30, 1 / 30), 1e-6
    for image in (0, 7, 29):
        moved = even * (1 - step) + step * (np.arange(30) == image)
        assert found[image] == pytest.approx((weighted(moved) - weighted(even)) / step, rel=1e-3, abs=1e-3)
    assert found.mean() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("count", "width"), [(150, 12), (40, 64)])
def test_the_interval_covers_the_distance_of_as_many_images(count: int, width: int) -> None:
    rng = np.random.default_rng(4)
    reference = frechet.gaussian(rng.normal(size=(1000, width)))
    names = [str(number) for number in range(count)]
    found, low, high = [], [], []
    for seed in range(100):
        rows = 1.2 * rng.normal(size=(count, width)) + 0.15
        around = mean(frechet.frechet_influence(rows, reference).tolist(), names, seed)
        found.append(frechet.frechet_distance(frechet.gaussian(rows), reference))
        low.append(found[-1] + around.low)
        high.append(found[-1] + around.high)
    truth = np.mean(found)
    assert np.mean((np.array(low) <= truth) & (truth <= np.array(high))) >= 0.92
    assert np.mean(np.array(high) - np.array(low)) < 4 * 1.8 * np.std(found), "it is not made safe by being wide"


@pytest.mark.parametrize(
    ("count", "fid", "kid", "kid_of_subsets", "around_fid", "around_kid"),
    [
        (60, 1.5826746496, 0.7505857557, 0.9496959959, (-0.4106665782, 0.4285013455), (-0.3121780084, 0.2987090292)),
        (9, 5.5778186272, 1.5559925517, 1.4981788730, (-0.8538307509, 1.5278974393), (-1.2587754535, 1.2589522732)),
    ],
)
def test_values_are_those_of_our_own_formulas_before_torchmetrics(
    count: int,
    fid: float,
    kid: float,
    kid_of_subsets: float,
    around_fid: tuple[float, float],
    around_kid: tuple[float, float],
) -> None:
    rng = np.random.default_rng(7)
    mix = rng.normal(size=(16, 16)) / 4
    made = (np.abs(rng.normal(size=(60, 16))) @ mix + 0.2).astype(np.float32)[:count]
    real = (np.abs(rng.normal(size=(90, 16))) @ mix).astype(np.float32)[: count + 30]
    prompts = [f"p{number // 3}" for number in range(count)]
    reference = frechet.gaussian(real)
    assert frechet.frechet_distance(frechet.gaussian(made), reference) == pytest.approx(fid, abs=1e-6)
    assert frechet.kernel_distance(made, real) == pytest.approx(kid, abs=1e-6)
    assert frechet.kernel_distance(made, real, subsets=20, size=8, seed=1) == pytest.approx(kid_of_subsets, abs=1e-6)
    near = mean(frechet.frechet_influence(made, reference).tolist(), prompts)
    assert (near.low, near.high) == pytest.approx(around_fid, abs=1e-6)
    near = mean(frechet.kernel_influence(made, real).tolist(), prompts)
    assert (near.low, near.high) == pytest.approx(around_kid, abs=1e-6)


def brute_force(a: np.ndarray, b: np.ndarray) -> float:
    def k(x: np.ndarray, y: np.ndarray) -> float:
        return (float(x @ y) / len(x) + 1) ** 3

    def within(rows: np.ndarray) -> float:
        pairs = [k(x, y) for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j]
        return sum(pairs) / len(pairs)

    return within(a) + within(b) - 2 * float(np.mean([k(x, y) for x in a for y in b]))


def test_kid_is_the_sum_over_pairs() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(9, 4)), rng.normal(size=(9, 4)) + 0.5
    assert frechet.kernel_distance(a, b) == pytest.approx(brute_force(a, b), rel=1e-9)
    assert frechet.kernel_influence(a, b).mean() == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="1 and 9"):
        frechet.kernel_distance(a[:1], b)


def test_kid_takes_subsets_without_repeating_and_is_unbiased() -> None:
    rng = np.random.default_rng(6)
    a, b = rng.normal(size=(400, 4)), rng.normal(size=(300, 4)) + 0.5
    whole = frechet.kernel_distance(a, b[:300], subsets=1, size=10**9)
    found = frechet.kernel_distance(a, b, subsets=200, size=100)
    assert found == frechet.kernel_distance(a, b, subsets=200, size=100) != whole
    assert found == pytest.approx(brute_force(a[:150], b[:150]), rel=0.5) and found > 0.1
    same = [frechet.kernel_distance(*rng.normal(size=(2, 60, 4))) for _ in range(200)]
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(200) and min(same) < 0
