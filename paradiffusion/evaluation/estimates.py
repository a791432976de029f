"""Means with 95 % intervals by bootstrap over prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final

import numpy as np
from pydantic import BeforeValidator
from scipy import special

from paradiffusion.randomness import seed_from

RESAMPLES: Final = 2000
_AT_ONCE: Final = 1 << 21  # draws: [resamples, prompts] of tens of thousands of prompts would not fit in memory


# JSON has null for what is no finite number.
Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]


@dataclass(frozen=True)
class Estimate:
    """A mean, or another number that a set of images has.

    Attributes:
        low, high: the 95 % interval; equal to ``mean`` where ``prompts`` is 1, or all are alike: nothing is known of others then.
        n: what was counted: images, questions, sentences, pairs; ``prompts``: what these belong to and what is resampled.
    """

    mean: Number
    low: Number
    high: Number
    n: int
    prompts: int


def ratio(numerators: Sequence[float], denominators: Sequence[float], prompts: Sequence[str], seed: int = 0) -> Estimate:
    """The sum of ``numerators`` over that of ``denominators``, with the expanded percentile interval (``expanded_tails``).

    Everything that belongs to one of ``prompts`` is resampled together, since images of one prompt are alike. Denominators say how
    much each entry counts, all 1 for a plain mean; prompts whose denominators are all 0 are left out. ValueError for no entries,
    sequences of unequal length, or denominators that sum to 0."""
    above, below, _ = _sums(numerators, denominators, prompts)
    return of_sums(np.stack([above, below]), lambda sums: sums[0] / sums[1], round(float(below.sum())), seed)


def mean(values: Sequence[float], prompts: Sequence[str], seed: int = 0) -> Estimate:
    """The mean of ``values``; ``prompts`` and the interval as in ``ratio``."""
    return ratio(values, [1.0] * len(values), prompts, seed)


def mean_rows(found: Sequence[tuple[str, float, str]], groups: Sequence[str]) -> list[list[Any]]:
    """Rows of a table, [group, mean], of (group, value, prompt), for each of ``groups`` that has a value, in this order."""
    members = {group: [(value, prompt) for name, value, prompt in found if name == group] for group in groups}
    return [[group, mean(*map(list, zip(*own, strict=True)))] for group, own in members.items() if own]  # type: ignore[arg-type]


def difference(
    values_a: Sequence[float],
    prompts_a: Sequence[str],
    values_b: Sequence[float],
    prompts_b: Sequence[str],
    weights_a: Sequence[float] | None = None,
    weights_b: Sequence[float] | None = None,
    seed: int = 0,
) -> Estimate:
    """The (weighted) mean of b minus that of a, over the prompts that both have.

    Prompts are resampled for both at once: what makes a prompt hard for both is no difference, so the interval is narrower than two
    intervals side by side suggest. Where it holds 0, the two do not differ at the 5 % level. ``n`` counts the entries of both.
    ValueError where no prompt has values of positive weight in both, or sequences are of unequal length."""
    weights_a = [1.0] * len(values_a) if weights_a is None else weights_a
    weights_b = [1.0] * len(values_b) if weights_b is None else weights_b
    sums_a = _sums([v * w for v, w in zip(values_a, weights_a, strict=True)], weights_a, prompts_a)
    sums_b = _sums([v * w for v, w in zip(values_b, weights_b, strict=True)], weights_b, prompts_b)
    common, in_a, in_b = np.intersect1d(sums_a[2], sums_b[2], assume_unique=True, return_indices=True)
    if not len(common):
        raise ValueError("no prompt has values in both")
    above = np.stack([sums_a[0][in_a], sums_b[0][in_b]])  # [2, prompts]
    below = np.stack([sums_a[1][in_a], sums_b[1][in_b]])
    shared = set(common.tolist())
    n = sum(prompt in shared for prompt in (*prompts_a, *prompts_b))
    return of_sums(np.concatenate([above, below]), lambda s: s[1] / s[3] - s[0] / s[2], n, seed)


def of_sums(sums: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], n: int, seed: int = 0) -> Estimate:
    """A number that follows from sums over prompts, such as a ratio of two, with the interval of ``ratio``.

    Args:
        sums: [K, prompts], what each prompt adds to each of the K sums.
        statistic: takes K sums, each [resamples], to the number; resamples for which it is not finite are left out, and ValueError
            is raised where it is not finite for all prompts together.
        n: what was counted.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        found = float(np.asarray(statistic(sums.sum(axis=1)[:, None]))[0])
        if not math.isfinite(found):
            raise ValueError("nothing was counted")
        count = sums.shape[1]
        rng = np.random.Generator(np.random.PCG64(seed_from("bootstrap", seed, count)))
        rows = max(1, _AT_ONCE // count)
        parts = []
        for start in range(0, RESAMPLES, rows):
            draws = rng.integers(0, count, (min(rows, RESAMPLES - start), count))
            parts.append(statistic(np.stack([column[draws].sum(axis=1) for column in sums])))
        resampled = np.concatenate(parts)
        low, high = np.quantile(resampled[np.isfinite(resampled)], expanded_tails(count))
    return Estimate(found, min(float(low), found), max(float(high), found), n, count)


def expanded_tails(prompts: int) -> tuple[float, float]:
    """The quantiles of the bootstrap that bound a 95 % interval.

    Resampling n prompts gives a spread that is too small by sqrt(1 - 1/n), and normal quantiles where Student's t belongs;
    moving the quantiles out by both is the expanded percentile interval (Hesterberg, arXiv 1411.5279). Measured over 2,000
    sets of normal values (standard error 0.5 %), 93 % of the intervals hold the truth for 5 prompts, 94 % for 10 and 95 % from
    20 on; the plain 2.5 % and 97.5 % quantiles reach 85, 92 and 93 %. Skewed values are covered less (exponential ones 88, 91
    and 93 %), and so are shares near 0 or 1 of few prompts: where 90 % of all would be right, 87 % for 20 prompts, 96 % for 50.
    """
    if prompts < 2:
        return 0.5, 0.5
    t = special.stdtrit(prompts - 1, 0.975)
    tail = float(special.ndtr(-math.sqrt(prompts / (prompts - 1)) * t))
    return tail, 1 - tail


def _sums(numerators: Sequence[float], denominators: Sequence[float], prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums of both by prompt, and the prompts' names, sorted; of the prompts that count for something."""
    if not len(numerators) == len(denominators) == len(prompts) or not len(prompts):
        raise ValueError(f"{len(numerators)} and {len(denominators)} values for {len(prompts)} prompts")
    names, group = np.unique(np.asarray(prompts, dtype=str), return_inverse=True)
    above = np.bincount(group, weights=np.asarray(numerators, dtype=float))
    below = np.bincount(group, weights=np.asarray(denominators, dtype=float))
    counted = below > 0
    if not counted.any():
        raise ValueError("nothing was counted")
    return above[counted], below[counted], names[counted]
