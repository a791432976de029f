"""Results of a study's votes: outcomes, rates, strengths (Davidson's model) and agreement, by question, category and length.

Davidson, "On extending the Bradley-Terry model to accommodate ties in paired comparison experiments" (JASA 65, 1970): with
strengths p_i and a tie parameter v, the chances of "i", "j" and "tie" are as p_i : p_j : v sqrt(p_i p_j). Without ties it is
Bradley and Terry's; its estimates depend on the votes through wins and half ties alone.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import median
from typing import Any, Final

import numpy as np
from scipy.sparse.csgraph import connected_components

from paradiffusion.evaluation.estimates import RESAMPLES, Estimate, expanded_tails, mean, of_sums, ratio
from paradiffusion.evaluation.suites.suite import BAND_NAMES
from paradiffusion.evaluation.votes.vote_store import Vote
from paradiffusion.evaluation.votes.vote_study import TIE, Question, Study, Task
from paradiffusion.randomness import seed_from


@dataclass(frozen=True)
class Outcome:
    """One comparison of two sets: "a", "b" or "tie". ``pair`` is its number in the study.

    ``rater`` was shown it, with the set ``left`` on the left, or would have been: ``missing`` says that a missing picture decided
    instead. ``occasion`` is 1 where it was seen for the second time; such outcomes count for nothing but that."""

    pair: int
    prompt: str
    image: int
    category: str
    band: str
    set_a: str
    set_b: str
    question: str
    choice: str
    rater: str
    occasion: int = 0
    left: str = ""
    missing: bool = False
    seconds: float | None = None
    at: str = ""
    comment: str = ""

    @property
    def chose_left(self) -> bool:
        return (self.set_a if self.choice == "a" else self.set_b) == self.left


def outcomes(study: Study, votes: Sequence[Vote], comments: Mapping[tuple[str, str], str]) -> list[Outcome]:
    """All outcomes: the votes, then the pairs that a missing picture decides.

    Such a pair counts once for each rater to whom it fell, from when they have come past it: so in a study that is not
    finished it weighs no more than a pair that is voted on.
    """
    tasks = {(rater, task.key): task for rater, own in study.tasks.items() for task in own}
    found = []
    for vote in votes:
        task = tasks.get((vote.rater, vote.task))
        if task is not None:
            # The first set is "a"; where it is on the right, a vote for the left is one for "b".
            choice = TIE if vote.choice == TIE else "a" if (vote.choice == "left") != task.flipped else "b"
            shown = {"left": study.sides(task)[0], "seconds": vote.seconds, "at": vote.at}
            comment = comments.get((vote.rater, vote.task), "")
            found.append(_outcome(study, task, vote.question, choice, vote.rater, comment=comment, **shown))
    return found + list(_settled(study, votes))


def _settled(study: Study, votes: Sequence[Vote]) -> Iterator[Outcome]:
    voted: dict[str, set[str]] = defaultdict(set)
    for vote in votes:
        voted[vote.rater].add(vote.task)
    for rater, tasks in study.tasks.items():
        for round_number in sorted({task.round for task in tasks}):
            own = [task for task in tasks if task.round == round_number and task.occasion == 0]
            decided = [study.settled(study.pairs[task.pair]) for task in own]
            seen = [place for place, task in enumerate(own) if task.key in voted[rater]]
            shown = sum(choice is None for choice in decided)
            reached = len(own) if len(seen) == shown else max(seen, default=0)
            for task, choice in list(zip(own, decided, strict=True))[:reached]:
                if choice is not None:
                    for question in study.asked(round_number):
                        yield _outcome(study, task, question.name, choice, rater, missing=True)


def _outcome(study: Study, task: Task, question: str, choice: str, rater: str, **shown: Any) -> Outcome:
    pair, prompt = study.pairs[task.pair], study.prompts[study.pairs[task.pair].prompt]
    return Outcome(
        task.pair, pair.prompt, pair.image, prompt.category, prompt.band, pair.set_a, pair.set_b, question, choice, rater,
        task.occasion, **shown,
    )  # fmt: skip


CHOICES = ("a", "b", TIE)


@dataclass(frozen=True)
class Reliability:
    """Of one question's votes; each None where there is nothing to tell it from.

    Attributes:
        alpha: Krippendorff's, nominal over a, b and tie; n counts the votes on pairs that two or more raters saw.
        same: the share of pairs of votes, by two raters on the same pictures, that are the same.
        left: the share of the left among votes that chose a side; 0.5 where sides do not matter.
        again: the share of pairs seen a second time on which the rater chose the same set again.
    """

    alpha: Estimate | None
    same: Estimate | None
    left: Estimate | None
    again: Estimate | None


def reliability(outcomes: Sequence[Outcome], seed: int = 0) -> Reliability:
    """Agreement and leaning in the ``outcomes`` of one question."""
    voted = [one for one in outcomes if not one.missing]
    first = [one for one in voted if one.occasion == 0]
    units = [((one.pair, one.image), CHOICES.index(one.choice), one.prompt) for one in first]
    sided = [one for one in first if one.choice != TIE]
    alpha = alpha_of([u for u, _, _ in units], [v for _, v, _ in units], [p for _, _, p in units], 3, seed)
    return Reliability(alpha, _same(first, seed), _share([one.chose_left for one in sided], sided, seed), _again(voted, seed))


def alpha_of(units: Sequence[Hashable], values: Sequence[int], prompts: Sequence[str], choices: int, seed: int = 0) -> Estimate | None:
    """Krippendorff's nominal alpha, with a 95 % interval by bootstrap over prompts; None where there is nothing to tell apart, as where
    all votes are one value. "Content Analysis": 1 - (n - 1) (sum of o_ck over c != k) / (sum of n_c n_k over c != k).

    Args:
        units: what each value was given to; those with a single value say nothing, and are left out.
        values: numbers below ``choices``.
        prompts: what each value's unit belongs to, which is what is resampled.
    """
    given: dict[Hashable, np.ndarray] = defaultdict(lambda: np.zeros(choices))
    prompt_of: dict[Hashable, str] = {}
    for unit, value, prompt in zip(units, values, prompts, strict=True):
        given[unit][value] += 1
        prompt_of[unit] = prompt
    names = {p: row for row, p in enumerate(dict.fromkeys(prompt_of[u] for u, row in given.items() if row.sum() > 1))}
    tables = np.zeros((len(names), choices, choices))
    for unit, row in given.items():
        if row.sum() > 1:
            tables[names[prompt_of[unit]]] += (np.outer(row, row) - np.diag(row)) / (row.sum() - 1)

    def alpha(sums: np.ndarray) -> np.ndarray:
        coincidences = sums.reshape(choices, choices, -1)  # [values, values, resamples]
        totals = coincidences.sum(0)
        n = totals.sum(0)
        expected = n**2 - (totals**2).sum(0)
        return np.where(expected > 0, 1 - (n - 1) * (n - np.trace(coincidences)) / expected, np.nan)

    try:
        return of_sums(tables.reshape(len(names), -1).T, alpha, round(float(tables.sum())), seed)
    except ValueError:
        return None


def _same(outcomes: Sequence[Outcome], seed: int) -> Estimate | None:
    """The share of equal votes among all pairs of votes on one pair of pictures."""
    groups: dict[tuple[int, str], list[str]] = defaultdict(list)
    for one in outcomes:
        groups[one.pair, one.prompt].append(one.choice)
    several = {prompt: choices for prompt, choices in groups.items() if len(choices) > 1}
    equal = [float(sum(math.comb(choices.count(choice), 2) for choice in CHOICES)) for choices in several.values()]
    all_pairs = [float(math.comb(len(choices), 2)) for choices in several.values()]
    return ratio(equal, all_pairs, [prompt for _, prompt in several], seed) if several else None


def _again(outcomes: Sequence[Outcome], seed: int) -> Estimate | None:
    first = {(one.rater, one.pair): one.choice for one in outcomes if one.occasion == 0}
    second = [one for one in outcomes if one.occasion == 1 and (one.rater, one.pair) in first]
    return _share([first[one.rater, one.pair] == one.choice for one in second], second, seed)


def _share(holds: Sequence[bool], outcomes: Sequence[Outcome], seed: int) -> Estimate | None:
    """The share of ``outcomes`` of which something holds; None without any."""
    return mean([*map(float, holds)], [one.prompt for one in outcomes], seed) if outcomes else None


# The spread of a normal prior on log strengths and on the tie parameter, natural logarithm; our choice. A set that won every
# vote has no finite estimate without one; with 20 votes a pair it moves an estimate by less than 2 %.
PRIOR: Final = 3.0
_STEPS: Final = 60


@dataclass(frozen=True)
class Strengths:
    """The fit of one question's votes: log strength of each set (natural logarithm), all together of mean 0; log of the tie parameter v
    (with two equal sets the share of ties is v / (2 + v)); and what a reader must know of them."""

    sets: dict[str, Estimate]
    tie: Estimate
    warnings: list[str]


def fit_davidson(counts: np.ndarray, pairs: Sequence[tuple[int, int]], sets: int) -> tuple[np.ndarray, np.ndarray]:
    """Fit many tables of votes at once, by Newton's method on the log likelihood, which is concave.

    ``counts`` are [B, M, 3], for each of M ``pairs`` of sets (numbers below ``sets``) the votes for the first, for the second, and
    ties. Returns log strengths [B, sets], of mean 0, and the log tie parameter [B]."""
    # The logits of a pair's three answers are linear in the parameters: [M, 3, sets + 1].
    design = np.zeros((len(pairs), 3, sets + 1))
    for row, (first, second) in enumerate(pairs):
        design[row, :, first] = (0.5, -0.5, 0)
        design[row, :, second] = (-0.5, 0.5, 0)
        design[row, 2, sets] = 1
    parameters = np.zeros((len(counts), sets + 1))
    votes = counts.sum(2)  # [B, M]
    ridge = np.eye(sets + 1) / PRIOR**2
    for _ in range(_STEPS):
        logits = np.einsum("mck,bk->bmc", design, parameters)
        odds = np.exp(logits - logits.max(2, keepdims=True))
        chance = odds / odds.sum(2, keepdims=True)
        gradient = np.einsum("mck,bmc->bk", design, counts - votes[..., None] * chance) - parameters @ ridge
        weighted = votes[..., None] * chance  # [B, M, 3]
        centre = np.einsum("mck,bmc->bmk", design, chance)
        curvature = np.einsum("mck,bmc,mcl->bkl", design, weighted, design) - np.einsum("bm,bmk,bml->bkl", votes, centre, centre)
        step = np.linalg.solve(curvature + ridge, gradient[..., None])[..., 0]
        # Far from the top a whole step can overshoot.
        step /= np.maximum(1, np.abs(step).max(1, keepdims=True))
        parameters = parameters + step
        if np.abs(step).max(initial=0) < 1e-9:
            break
    strengths = parameters[:, :sets]
    return strengths - strengths.mean(1, keepdims=True), parameters[:, sets]


def strengths_of(outcomes: Sequence[Outcome], sets: Sequence[str], seed: int = 0) -> Strengths | None:
    """Strengths with 95 % intervals by bootstrap over prompts; None where there are no votes."""
    if not outcomes:
        return None
    number = {name: place for place, name in enumerate(sets)}
    pairs = sorted({(number[one.set_a], number[one.set_b]) for one in outcomes})
    place = {pair: row for row, pair in enumerate(pairs)}
    prompts = {prompt: row for row, prompt in enumerate(dict.fromkeys(one.prompt for one in outcomes))}
    counts = np.zeros((len(prompts), len(pairs), 3))
    for one in outcomes:
        counts[prompts[one.prompt], place[number[one.set_a], number[one.set_b]], CHOICES.index(one.choice)] += 1
    found, tie = fit_davidson(counts.sum(0, keepdims=True), pairs, len(sets))
    rng = np.random.Generator(np.random.PCG64(seed_from("strengths", seed, len(prompts))))
    weights = rng.multinomial(len(prompts), np.full(len(prompts), 1 / len(prompts)), RESAMPLES)  # [B, prompts]
    drawn = np.tensordot(weights.astype(float), counts, 1)
    sampled, ties = fit_davidson(drawn, pairs, len(sets))
    tails = expanded_tails(len(prompts))

    def estimate(value: float, values: np.ndarray, votes: float) -> Estimate:
        low, high = np.quantile(values, tails)
        return Estimate(float(value), min(float(low), value), max(float(high), value), round(votes), len(prompts))

    shown = [counts[:, [name in pair for pair in pairs]].sum() for name in range(len(sets))]
    return Strengths(
        {name: estimate(float(found[0, i]), sampled[:, i], float(shown[i])) for i, name in enumerate(sets)},
        estimate(float(tie[0]), ties, float(counts.sum())),
        _connection_warnings(counts.sum(0), pairs, sets),
    )


def _connection_warnings(counts: np.ndarray, pairs: Sequence[tuple[int, int]], sets: Sequence[str]) -> list[str]:
    """What Ford's condition (American Mathematical Monthly 64, 1957) asks: from each set a way of wins to each other."""
    beats = np.zeros((len(sets), len(sets)))
    for (first, second), (wins, losses, ties) in zip(pairs, counts, strict=True):
        beats[first, second] = wins + ties
        beats[second, first] = losses + ties
    parts, part_of = connected_components(beats, directed=True, connection="weak")
    if parts > 1:
        groups = [" and ".join(name for i, name in enumerate(sets) if part_of[i] == part) for part in range(parts)]
        return [f"No votes connect {', '.join(groups)}: strengths say nothing across these groups."]
    if connected_components(beats, directed=True, connection="strong")[0] > 1:
        return [
            "Some sets never lost (or never won) against the others, so that no finite strength is the likeliest; what is "
            "shown is held back by a weak prior, and its size means little."
        ]
    return []


@dataclass(frozen=True)
class Rates:
    """How two sets did against each other, as shares of the votes; ``margin`` is ``win`` minus ``loss``."""

    set_a: str
    set_b: str
    win: Estimate
    tie: Estimate
    loss: Estimate
    margin: Estimate


@dataclass(frozen=True)
class Answers:
    """All about one question. ``by_category`` and ``by_band`` hold the rates of groups of prompts."""

    question: Question
    rates: list[Rates]
    by_category: dict[str, list[Rates]]
    by_band: dict[str, list[Rates]]
    strengths: Strengths | None
    reliability: Reliability
    votes: int
    missing: int
    warnings: list[str]


@dataclass(frozen=True)
class Rater:
    """How far a rater is, in screens; how long a vote took (median, seconds); and shares of their votes."""

    name: str
    done: int
    total: int
    votes: int
    seconds: float | None
    ties: float | None
    left: float | None


@dataclass(frozen=True)
class Results:
    study: str
    title: str
    suite: str
    prompts: int
    pairs: int
    repeats: int
    ask: str
    sets: list[str]
    raters: list[Rater]
    answers: list[Answers]
    failures: list[tuple[str, str, int, str]]
    comments: list[tuple[str, str, str]] = field(default_factory=list)


def results_of(study: Study, votes: Sequence[Vote], comments: Mapping[tuple[str, str], str], seed: int = 0) -> Results:
    """Count ``votes``, as ``Store`` has them. ``seed`` is the bootstrap's."""
    found = outcomes(study, votes, comments)
    remarks = {(o.rater, o.prompt, o.comment): None for o in found if o.comment}
    # How many raters see a pair.
    repeats = sum(not (t.pair or t.occasion or t.round) for own in study.tasks.values() for t in own)
    return Results(
        study.name, study.title, study.suite, len(study.prompts), len(study.pairs), repeats, study.ask, list(study.sets),
        raters=[_rater(study, rater, votes, found) for rater in study.tasks],
        answers=[_answers(study, q, [o for o in found if o.question == q.name], seed) for q in study.questions],
        failures=study.failures(),
        comments=list(remarks),
    )  # fmt: skip


def rates_of(found: Sequence[Outcome], sets: Sequence[str], seed: int = 0) -> list[Rates]:
    """Rates of each two of ``sets`` that have votes."""
    rates = []
    for first, second in combinations(sets, 2):
        own = [one for one in found if (one.set_a, one.set_b) == (first, second)]
        if own:
            prompts = [one.prompt for one in own]
            # What each choice adds to the win, the tie, the loss and the margin.
            worth = ({"a": 1.0}, {TIE: 1.0}, {"b": 1.0}, {"a": 1.0, "b": -1.0})
            shares = [mean([each.get(one.choice, 0.0) for one in own], prompts, seed) for each in worth]
            rates.append(Rates(first, second, *shares))
    return rates


def _answers(study: Study, question: Question, found: Sequence[Outcome], seed: int) -> Answers:
    counted = [one for one in found if one.occasion == 0]
    sets = list(study.sets)

    def groups(name_of: Callable[[Outcome], str], names: Sequence[str]) -> dict[str, list[Rates]]:
        return {n: rates for n in names if (rates := rates_of([o for o in counted if name_of(o) == n], sets, seed))}

    categories = sorted({one.category for one in counted if one.category})
    trust = reliability(found, seed)
    warnings = []
    if trust.left is not None and not trust.left.low <= 0.5 <= trust.left.high:
        warnings.append(
            f"Raters leaned to the {'left' if trust.left.mean > 0.5 else 'right'}. Sides are balanced, so that this blurs "
            "differences and favours no set."
        )
    prompts = len({one.prompt for one in counted})
    if 0 < prompts < 20:
        warnings.append(f"Votes on {prompts} prompts only: intervals of so few hold the truth less often than 95 %.")
    return Answers(
        question=question,
        rates=rates_of(counted, sets, seed),
        by_category=groups(lambda one: one.category, categories),
        by_band=groups(lambda one: one.band, BAND_NAMES),
        strengths=strengths_of(counted, sets, seed),
        reliability=trust,
        votes=sum(not one.missing for one in counted),
        missing=sum(one.missing for one in counted),
        warnings=warnings,
    )


def _rater(study: Study, rater: str, votes: Sequence[Vote], found: Sequence[Outcome]) -> Rater:
    own = [vote for vote in votes if vote.rater == rater]
    shown, answered = study.shown(rater), {(vote.task, vote.question) for vote in own}
    sided = [one for one in found if one.rater == rater and not one.missing and one.choice != TIE]
    return Rater(
        name=rater,
        done=sum(all((task.key, q.name) in answered for q in study.asked(task.round)) for task in shown),
        total=len(shown),
        votes=len(own),
        seconds=round(median(vote.seconds for vote in own), 1) if own else None,
        ties=sum(vote.choice == TIE for vote in own) / len(own) if own else None,
        left=sum(one.chose_left for one in sided) / len(sided) if sided else None,
    )
