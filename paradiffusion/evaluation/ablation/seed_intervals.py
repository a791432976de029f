"""Means over training runs with 95 % intervals, where few seeds were trained and each was judged on the same many prompts.

Two things vary: another seed gives another model, and another choice of prompts another score. Prompts are the same for all
seeds, so a hard prompt is hard in every run and more seeds do not average it away: prompts are resampled for all seeds at
once. Resampling two or three seeds says nearly nothing (with two, half of the resamples hold one seed twice), so their
variance is taken with Student's t instead, as in an analysis with two random factors:

    variance = s2 / S + b2,   degrees of freedom by Satterthwaite (Biometrics Bulletin 2, 1946)

S seeds whose results have the sample variance s2 (S - 1 degrees of freedom), and b2 the bootstrap variance over P prompts of
their mean (P - 1). Chance within a single prompt and run is in both terms, so the interval errs on the wide side: in simulation
it covers 96 to 98 % (test_ablation.py), but only some 85 % where there are two seeds that differ far more than prompts do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from scipy.stats import t as student

from paradiffusion.evaluation.estimates import RESAMPLES, Estimate, expanded_tails
from paradiffusion.randomness import seed_from

_LEVEL: Final = 0.975
_NORMAL: Final = 1.959964  # half of a 95 % interval, in standard deviations of the normal distribution


@dataclass(frozen=True)
class Observed:
    """What one measure came to with one training run.

    Attributes:
        above, below: by prompt, sums of value x weight and of weights; the value is the ratio of their totals. Empty where
            the whole set has one number (FID), which ``whole`` is then.
        n: images, questions or objects that were counted.
    """

    above: dict[str, float] = field(default_factory=dict)
    below: dict[str, float] = field(default_factory=dict)
    whole: Estimate | None = None
    n: int = 0

    @property
    def value(self) -> float:
        return self.whole.mean if self.whole is not None else sum(self.above.values()) / sum(self.below.values())


def over_seeds(runs: Sequence[Observed]) -> Estimate:
    """The mean over runs; the interval of ``estimates.ratio`` over prompts alone where there is one run.

    ``n`` of the result is what was counted in all runs. A number of a whole set takes its own interval for its prompts, as
    if it were the same prompts' doing in every run. ValueError for no runs.
    """
    if not runs:
        raise ValueError("there are no runs")
    values = np.array([run.value for run in runs])
    count = sum(run.n for run in runs)
    if any(run.whole is not None for run in runs):
        wholes = [run.whole for run in runs if run.whole is not None]
        if len(runs) == 1:
            return wholes[0]
        widths = [(one.high - one.low) / (2 * _NORMAL) for one in wholes]
        prompts = wholes[0].prompts
        return _joined(values, float(np.mean(np.square(np.nan_to_num(widths)))), prompts, count)
    names = list(dict.fromkeys(name for run in runs for name in run.below))
    resampled = _resampled(runs, names)
    return _estimate(values, resampled, len(names), count)


def difference(runs: Sequence[Observed], baseline: Sequence[Observed]) -> Estimate | None:
    """Mean of ``runs`` minus that of ``baseline``, both with the same seeds in the same order, paired by seed and prompt.

    Returns:
        None where a number of the whole set has one seed: nothing is known then about how much it varies.
    """
    if len(runs) != len(baseline) or not runs:
        raise ValueError(f"{len(runs)} runs and {len(baseline)} of the baseline")
    values = np.array([run.value - base.value for run, base in zip(runs, baseline, strict=True)])
    count = sum(run.n for run in runs)
    if any(one.whole is not None for one in (*runs, *baseline)):
        prompts = min((one.whole.prompts for one in (*runs, *baseline) if one.whole is not None), default=0)
        return _joined(values, 0.0, prompts, count) if len(runs) > 1 else None
    names = list(dict.fromkeys(name for run in (*runs, *baseline) for name in run.below))
    resampled = _resampled(runs, names) - _resampled(baseline, names)
    return _estimate(values, resampled, len(names), count)


def plain_mean(values: Sequence[float]) -> Estimate:
    """The mean over runs of a number without prompts, such as a loss.

    No interval (NaN) for one run, nor for two, for which Student's t gives 13 standard errors to each side.
    """
    if len(values) < 3:
        return Estimate(float(np.mean(values)), np.nan, np.nan, len(values), 0)
    return _joined(np.array(values), 0.0, 0, len(values))


def _resampled(runs: Sequence[Observed], names: list[str]) -> np.ndarray:
    """Each run's value with prompts drawn with replacement, the same draws for all, [RESAMPLES, runs]; NaN where a draw
    holds nothing that counts."""
    above = np.array([[run.above.get(name, 0.0) for run in runs] for name in names])
    below = np.array([[run.below.get(name, 0.0) for run in runs] for name in names])
    rng = np.random.Generator(np.random.PCG64(seed_from("ablation", len(names))))
    found = np.empty((RESAMPLES, len(runs)))
    for start in range(0, RESAMPLES, 100):  # in pieces: [resamples, prompts] of tens of thousands would not fit
        counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), 100).astype(float)
        weights = counts @ below
        found[start : start + 100] = (counts @ above) / np.where(weights > 0, weights, np.nan)
    return found


def _estimate(values: np.ndarray, resampled: np.ndarray, prompts: int, count: int) -> Estimate:
    if len(values) == 1:
        low, high = np.nanquantile(resampled[:, 0], expanded_tails(prompts))
        return Estimate(float(values[0]), float(low), float(high), count, prompts)
    variance = float(np.nanvar(resampled.mean(1))) * prompts / max(prompts - 1, 1)
    return _joined(values, variance, prompts, count)


def _joined(values: np.ndarray, prompt_variance: float, prompts: int, count: int) -> Estimate:
    """The interval of the mean of ``values`` (one for each seed) with both variances."""
    mean = float(values.mean())
    seed_variance = float(values.var(ddof=1)) / len(values)
    total = seed_variance + prompt_variance
    if total <= 0:
        return Estimate(mean, mean, mean, count, prompts)
    below = seed_variance**2 / (len(values) - 1) + prompt_variance**2 / max(prompts - 1, 1)
    reach = float(student.ppf(_LEVEL, total**2 / below)) * total**0.5
    return Estimate(mean, mean - reach, mean + reach, count, prompts)
