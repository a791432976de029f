"""Agreement with people: pairs of pictures with what people preferred, and how often each score prefers the same one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Final

import numpy as np

from paradiffusion.errors import UserError
from paradiffusion.evaluation.estimates import Estimate, mean
from paradiffusion.evaluation.records import Evaluation, Measure, ScoreResult, Table
from paradiffusion.evaluation.suites.suite_files import read_rows

_LAYOUT: Final = (
    "expected .csv or .jsonl with prompt, set_a, set_b and choice a, b or tie (or votes_a, votes_b and ties; or, in .jsonl, ranks by "
    "set, 1 for the best)"
)
_CHOICES: Final = {"a": (1, 0, 0), "b": (0, 1, 0), "tie": (0, 0, 1)}


@dataclass(frozen=True)
class HumanPair:
    """What one person, or several together, said of two pictures of one prompt (its id, or its text).

    Attributes:
        a, b, ties: votes for the one, for the other, for neither.
        question, rater: "" where the file does not say, or where these are votes of several.
        number: of the prompt's image.
    """

    prompt: str
    set_a: str
    set_b: str
    a: int
    b: int
    ties: int
    question: str = ""
    rater: str = ""
    number: int = 0


def read_pairs(path: Path) -> list[HumanPair]:
    """The pairs of a CSV or JSON lines file: one row for each vote, or for each pair with its votes counted.

    The CSV that scripts/vote.py exports is of the first kind, with ``image``, the number of the prompt's image, and ``occasion``,
    which is 0 but where a rater saw a pair again, and ``missing``, 1 where no person decided; further columns are passed
    over. Where people ranked several pictures of a prompt, as for LPG-Bench (arXiv 2510.02987: 13 models on 200 prompts,
    equal ranks are ties), a line of ``ranks`` stands for all of its pairs.

    Raises:
        UserError: for a file that cannot be read, without pairs, or with a row that is none, by its line.
    """
    pairs: list[HumanPair] = []
    for row in read_rows(path, ["prompt"]):
        try:
            pairs += _pairs({key: value for key, value in row.values.items() if value not in (None, "")})
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
            raise UserError(f"agreement={row.where}: {what}; {_LAYOUT}.") from None
    if not pairs:
        raise UserError(f"agreement={path} holds no pairs; {_LAYOUT}.")
    return pairs


def _pairs(row: dict[str, Any]) -> Iterator[HumanPair]:
    prompt = str(row["prompt"])
    if str(row.get("occasion", 0)) != "0" or str(row.get("missing", 0)) == "1":
        return  # shown to a rater again, to see whether he agrees with himself; or nobody was asked, as a picture is missing
    about: dict[str, Any] = {"question": str(row.get("question", "")), "rater": str(row.get("rater", "")), "number": _number(row)}
    if "ranks" in row:
        ranks = {str(name): float(rank) for name, rank in row["ranks"].items()}
        if not all(math.isfinite(rank) for rank in ranks.values()):
            raise ValueError("a rank is no number")
        for one, other in combinations(ranks, 2):
            won = (int(ranks[one] < ranks[other]), int(ranks[one] > ranks[other]), int(ranks[one] == ranks[other]))
            yield HumanPair(prompt, one, other, *won, **about)
        return
    set_a, set_b = str(row["set_a"]), str(row["set_b"])
    if set_a == set_b:
        raise ValueError(f"both sides are {set_a}")
    if "votes_a" in row or "votes_b" in row:
        votes = int(row["votes_a"]), int(row["votes_b"]), int(row.get("ties", 0))
        if min(votes) < 0:
            raise ValueError(f"there are {min(votes)} votes")
    elif (choice := str(row["choice"]).strip().lower()) in _CHOICES:
        votes = _CHOICES[choice]
    else:
        raise ValueError(f"the choice is {choice}")
    if sum(votes):
        yield HumanPair(prompt, set_a, set_b, *votes, **about)


def _number(row: dict[str, Any]) -> int:
    number = int(row.get("image", 0))
    if number < 0:
        raise ValueError(f"the image is {number}")
    return number


NAME: Final = "agreement"
TITLE: Final = "Agreement with people"
_FORMULA: Final = (
    "share of the pairs that people decided in which the score is higher for the picture that they preferred, equal scores counting half"
)
_SOURCE: Final = "pairwise accuracy as in LPG-Bench (arXiv 2510.02987)"
_NOTE: Final = (
    "People's preference is that of the majority: the side with more votes, a tie where both have as many or where most votes "
    "are ties. A picture that failed counts with its score's worst value. Another person: each vote against the majority of "
    "the others on the same pair."
)
_PEOPLE: Final = "another person"

Side = tuple[str, str]  # the set, the image's name


@dataclass
class _Judged:
    """One pair and one question, with everybody's votes: for the first side, for the second, ties."""

    question: str
    prompt: str
    first: Side
    second: Side
    named: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    unnamed: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def votes(self) -> tuple[int, int, int]:
        rows = [*self.named.values(), *self.unnamed]
        return sum(row[0] for row in rows), sum(row[1] for row in rows), sum(row[2] for row in rows)


def agreement(evaluations: Sequence[Evaluation], pairs: Sequence[HumanPair]) -> ScoreResult:
    """Each score's agreement with people, by question, over the pairs whose pictures ``evaluations`` (of one suite) hold; their labels
    are the names of the sets.

    For each question a table with a row for each measure, best first, below what people agree with each other; skipped where no pair
    is of these evaluations."""
    result = ScoreResult(NAME, TITLE, _FORMULA, _SOURCE, {"votes": sum(pair.a + pair.b + pair.ties for pair in pairs)})
    judged, lost = _gathered(evaluations, pairs)
    if not judged:
        named = sorted({name for pair in pairs for name in (pair.set_a, pair.set_b)})
        result.skipped = (
            f"No pair is of these pictures: the votes are on the sets {', '.join(named[:8])}, and the evaluations are labelled "
            f"{', '.join(one.label for one in evaluations)}; label them alike, and take the suite that was voted on."
        )
        return result
    if lost:
        result.warnings.append(
            f"{lost} of {len(pairs)} rows of votes are on sets, prompts or images that are not among these, and are left out."
        )
    measured = _measured(evaluations)
    for question in dict.fromkeys(one.question for one in judged):
        own = [one for one in judged if one.question == question]
        result.tables += _tables(question, own, measured)
    return result


def _gathered(evaluations: Sequence[Evaluation], pairs: Sequence[HumanPair]) -> tuple[list[_Judged], int]:
    """Pairs with their votes joined, whichever side came first; and how many rows are of other pictures."""
    labels = {_plain(one.label): one for one in evaluations}
    ids = {p.text: p.id for one in evaluations for p in one.suite.prompts} | {p.id: p.id for one in evaluations for p in one.suite.prompts}
    images = {one.label: {image.name: image.prompt for image in one.images} for one in evaluations}
    judged: dict[tuple[str, str, Side, Side], _Judged] = {}
    lost = 0
    for pair in pairs:
        prompt = ids.get(pair.prompt, "")
        sets = [labels.get(_plain(name)) for name in (pair.set_a, pair.set_b)]
        name = prompt if pair.number == 0 else f"{prompt}_{pair.number}"
        sides = [(one.label, name) for one in sets if one is not None]
        if len(sides) < 2 or any(images[label].get(name) != prompt for label, name in sides):
            lost += 1
            continue
        turned = sides[1] < sides[0]
        first, second = reversed(sides) if turned else sides
        votes = (pair.b, pair.a, pair.ties) if turned else (pair.a, pair.b, pair.ties)
        key = (pair.question, prompt, first, second)
        one = judged.setdefault(key, _Judged(*key))
        if pair.rater:  # who voted twice on a pair changed his mind, and counts once
            one.named[pair.rater] = votes
        else:
            one.unnamed.append(votes)
    return list(judged.values()), lost


def _measured(evaluations: Sequence[Evaluation]) -> list[tuple[str, dict[Side, float]]]:
    found: dict[tuple[str, str], tuple[str, dict[Side, float]]] = {}
    for evaluation in evaluations:
        for score in evaluation.scores:
            for measure in score.measures:
                if measure.higher_is_better is None:
                    continue
                sign = 1.0 if measure.higher_is_better else -1.0
                values = {
                    (evaluation.label, image.image): sign * image.values[measure.name]
                    for image in score.images
                    if math.isfinite(image.values.get(measure.name, math.nan))
                }
                if values:
                    title = _title(score, measure)
                    found.setdefault((score.name, measure.name), (title, {}))[1].update(values)
    return list(found.values())


def _tables(question: str, judged: Sequence[_Judged], measured: Sequence[tuple[str, dict[Side, float]]]) -> list[Table]:
    """The table of a question; none where nobody decided."""
    found: list[list[Any]] = []
    decided = [one for one in judged if _preferred(one.votes)]
    for title, values in measured:
        known = [one for one in decided if one.first in values and one.second in values]
        signs = [float(np.sign(values[one.first] - values[one.second])) for one in known]
        if known:
            right = [(1 + sign * _preferred(one.votes)) / 2 for sign, one in zip(signs, known, strict=True)]
            found.append([title, share := mean(right, [one.prompt for one in known]), share.n, signs.count(0.0)])
    found.sort(key=lambda row: -row[1].mean)
    ceiling = _people(judged)
    rows: list[list[Any]] = [*([[_PEOPLE, ceiling, ceiling.n, None]] if ceiling is not None else []), *found]
    note = f"{len(judged)} pairs, {len(judged) - len(decided)} of them undecided. {_NOTE}"
    return [Table(f"{TITLE}: {question}" if question else TITLE, ["", "agrees", "decided pairs", "equal scores"], rows, note, plot="bars")]


def _preferred(votes: tuple[int, int, int]) -> int:
    """1 for the first side, -1 for the second, 0 for a tie."""
    first, second, ties = votes
    return 0 if ties > first + second else (first > second) - (first < second)


def _people(judged: Sequence[_Judged]) -> Estimate | None:
    """How often a vote agrees with the majority of the others on the same pair, a vote for a tie counting half."""
    values, prompts = [], []
    for one in judged:
        votes = one.votes
        for side, sign in enumerate((1, -1, 0)):
            others = tuple(count - (side == place) for place, count in enumerate(votes))
            majority = _preferred(others) if votes[side] and sum(others) else 0  # type: ignore[arg-type]
            if majority:
                values += [(1 + sign * majority) / 2] * votes[side]
                prompts += [one.prompt] * votes[side]
    return mean(values, prompts) if values else None


def _title(score: ScoreResult, measure: Measure) -> str:
    return score.title if measure.title == score.title else f"{score.title}: {measure.title}"


def _plain(label: str) -> str:
    return " ".join(label.casefold().split())
