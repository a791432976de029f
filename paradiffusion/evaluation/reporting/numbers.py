"""The numbers of a report: every score of every model, over all prompts, by length and by category, and their differences."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from paradiffusion.evaluation.estimates import Estimate, difference
from paradiffusion.evaluation.records import Evaluation, ImageScore, Measure, ScoreResult, estimate, measured
from paradiffusion.evaluation.suites.suite import BAND_NAMES, Suite, SuitePrompt

FEWEST: Final = 5
"""Prompts that a lead must rest on, or it is none: the interval of one prompt has no width. Our choice."""


@dataclass(frozen=True)
class Row:
    """One measure over one group of prompts ("all", a length band or a category), an entry for each model.

    Attributes:
        differences: to the baseline, over the prompts that both have, which are resampled together; None for the baseline itself and
            where models are not comparable.
        best: the model that leads where the interval of its difference to the next best excludes 0, else None.
    """

    group: str
    prompts: int
    estimates: tuple[Estimate | None, ...]
    differences: tuple[Estimate | None, ...]
    best: int | None


@dataclass(frozen=True)
class MeasureNumbers:
    """A measure over all prompts, and by group; groups are empty for a number of the whole set, such as FID."""

    measure: Measure
    whole: Row
    bands: tuple[Row, ...]
    categories: tuple[Row, ...]


@dataclass(frozen=True)
class ScoreNumbers:
    """A score: what each model's evaluation says about it (None: not asked for there), its measures, and the settings by which models are
    unlike each other, so that differences are not computed."""

    name: str
    title: str
    results: tuple[ScoreResult | None, ...]
    measures: tuple[MeasureNumbers, ...]
    unlike: tuple[str, ...]

    @property
    def described(self) -> ScoreResult:
        """The first result, preferably one that was computed: it says what the score is."""
        known = [result for result in self.results if result is not None]
        return next((result for result in known if not result.skipped), known[0])


@dataclass(frozen=True)
class SuiteNumbers:
    """One suite: its models in the order that they were given in, labels made unique, and their scores."""

    suite: Suite
    models: tuple[Evaluation, ...]
    labels: tuple[str, ...]
    baseline: int
    scores: tuple[ScoreNumbers, ...]
    anchor: str

    @property
    def failures(self) -> list[tuple[int, str, str, str, str]]:
        """(model, image, prompt, what failed, reason) of everything that failed, drawing first."""
        found = []
        for number, model in enumerate(self.models):
            undrawn = {drawn.name for drawn in model.images if drawn.error}
            found += [(number, d.name, d.prompt, "drawing", d.error) for d in model.images if d.error]
            found += [
                (number, row.image, row.prompt, score.title, row.error)
                for score in model.scores
                for row in score.images
                # Without a picture every score fails; once is enough.
                if row.error and row.image not in undrawn
            ]
        return found


def suite_numbers(evaluations: Sequence[Evaluation], baseline: str | None = None) -> list[SuiteNumbers]:
    """The numbers of each suite (of one name and the same prompts) among ``evaluations``, in the order that they come in. Differences
    are taken to the model with the label ``baseline``; without one, or where a suite has not got it, to its first."""
    suites: dict[tuple[str, str], list[Evaluation]] = {}
    for evaluation in evaluations:
        suites.setdefault((evaluation.suite.name, evaluation.suite.fingerprint), []).append(evaluation)
    names = [name for name, _ in suites]
    return [
        _suite(models, baseline, name if names.count(name) == 1 else f"{name}-{fingerprint}")
        for (name, fingerprint), models in suites.items()
    ]


def _suite(models: list[Evaluation], baseline: str | None, anchor: str) -> SuiteNumbers:
    labels = unique([model.label for model in models])
    first = next((i for i, model in enumerate(models) if baseline in (model.label, labels[i])), 0)
    names = list(dict.fromkeys(score.name for model in models for score in model.scores))
    scores = tuple(_score(models[0].suite, [model.score(name) for model in models], first) for name in names)
    anchor = "suite-" + "".join(c if c.isascii() and (c.isalnum() or c == "-") else "-" for c in anchor)
    return SuiteNumbers(models[0].suite, tuple(models), labels, first, scores, anchor)


def unique(labels: Sequence[str]) -> tuple[str, ...]:
    """``labels``, a repeated one with " (2)", " (3)"."""
    found: list[str] = []
    for label in labels:
        name, number = label, 1
        while name in found:
            number += 1
            name = f"{label} ({number})"
        found.append(name)
    return tuple(found)


def _score(suite: Suite, results: list[ScoreResult | None], baseline: int) -> ScoreNumbers:
    known = [result for result in results if result is not None]
    measures = {measure.name: measure for result in known for measure in result.measures}
    unlike = _unlike([result.settings for result in known if not result.skipped])
    return ScoreNumbers(
        known[0].name,
        next((result.title for result in known if not result.skipped), known[0].title),
        tuple(results),
        tuple(_measure(suite, results, measure, baseline, not unlike) for measure in measures.values()),
        unlike,
    )


def _unlike(settings: list[dict[str, Any]]) -> tuple[str, ...]:
    keys = list(dict.fromkeys(key for one in settings for key in one))
    texts = {key: {json.dumps(one.get(key), sort_keys=True, default=str) for one in settings} for key in keys}
    return tuple(key for key in keys if len(texts[key]) > 1)


def _measure(suite: Suite, results: list[ScoreResult | None], measure: Measure, baseline: int, comparable: bool) -> MeasureNumbers:
    def row(group: str, prompts: Sequence[SuitePrompt], whole: bool = False) -> Row:
        ids = {prompt.id for prompt in prompts}
        chosen = [[image for image in result.images if image.prompt in ids] if result else [] for result in results]
        estimates = [
            estimate(result, measure, None if whole else images) if result else None for result, images in zip(results, chosen, strict=True)
        ]

        def change(a: int, b: int) -> Estimate | None:
            one, other = estimates[a], estimates[b]
            found = paired_difference(measure, chosen[a], chosen[b]) if comparable else None
            if found is None or one is None or other is None:
                return None
            # An overall number made by a formula of its own is not what the images' difference is about.
            return found if math.isclose(found.mean, other.mean - one.mean, rel_tol=1e-6, abs_tol=1e-9) else None

        return Row(
            group,
            len(prompts),
            tuple(estimates),
            tuple(None if i == baseline else change(baseline, i) for i in range(len(results))),
            _best(estimates, measure.higher_is_better, change),
        )

    def rows(names: Sequence[str], group_of: Callable[[SuitePrompt], str]) -> tuple[Row, ...]:
        made = (row(name or "none", [p for p in suite.prompts if group_of(p) == name]) for name in names)
        return tuple(one for one in made if any(value is not None for value in one.estimates))

    categories = sorted({prompt.category for prompt in suite.prompts}, key=_natural)
    present = {prompt.band for prompt in suite.prompts}
    return MeasureNumbers(
        measure,
        row("all", suite.prompts, whole=True),
        rows([name for name in BAND_NAMES if name in present], lambda prompt: prompt.band),
        rows(categories, lambda prompt: prompt.category) if any(categories) else (),
    )


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts "2 objects" before "10 objects", and no name last."""
    return [(int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", name)] if name else [(1 << 62, "")]


def paired_difference(measure: Measure, first: Sequence[ImageScore], second: Sequence[ImageScore]) -> Estimate | None:
    """The mean of ``second`` minus that of ``first``, prompts resampled for both at once; None where they share none."""
    one, other = measured(measure, first), measured(measure, second)
    if not {prompt for _, _, prompt in one} & {prompt for _, _, prompt in other}:
        return None
    values_a, weights_a, prompts_a = zip(*one, strict=True)
    values_b, weights_b, prompts_b = zip(*other, strict=True)
    return difference(values_a, prompts_a, values_b, prompts_b, weights_a, weights_b)


def _best(estimates: Sequence[Estimate | None], higher: bool | None, change: Callable[[int, int], Estimate | None]) -> int | None:
    known = [(value.mean, i) for i, value in enumerate(estimates) if value is not None and math.isfinite(value.mean)]
    if len(known) < 2 or higher is None:
        return None
    order = [i for _, i in sorted(known, key=lambda pair: -pair[0] if higher else pair[0])]
    lead = change(order[1], order[0])
    if lead is None or lead.prompts < FEWEST:
        return None
    return order[0] if (lead.low > 0 if higher else lead.high < 0) else None
