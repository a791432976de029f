"""Sentence report: the share of sentences that were followed, by place in the paragraph, by length and by what they say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from paradiffusion.data.captions import count_words
from paradiffusion.evaluation.estimates import mean, mean_rows
from paradiffusion.evaluation.records import Drawn, ImageScore, Measure, Run, ScoreResult, Table
from paradiffusion.evaluation.scores.segments import sentence_details
from paradiffusion.evaluation.scores.sentence_judges import (
    PLACES,
    THIRDS,
    PictureRows,
    SentenceJudge,
    SentenceRow,
    place,
    prepare_rows,
    read_rows,
    third,
)
from paradiffusion.evaluation.suites.suite import Suite
from paradiffusion.scenes.sentence_truth import FACTS, KINDS

OTHERS: Final = 4  # pictures of other scenes, for the recall that chance reaches
# A judge that only compares calls a sentence followed where its own picture scores above this share of the other prompts'
# pictures: a model that does not read reaches the rest. Our choice, and an estimate.
ABOVE: Final = 0.9
FEWEST: Final = 10  # pictures to compare with, below which ABOVE means nothing
# Upper ends, in words; our choice.
LENGTHS: Final = ((8, "up to 8"), (14, "9-14"), (24, "15-24"), (None, "over 24"))
_SOURCE: Final = "this project; the estimate elsewhere than on scenes is retrieval inside the suite with the judge's scores"


@dataclass(frozen=True)
class Told:
    """A sentence, whether it was followed, and the share of other prompts' pictures that follow it, where known."""

    row: SentenceRow
    prompt: str
    followed: bool
    chance: float | None


class SentenceReport:
    """The share of sentences that were followed, and which were not.

    On scenes a sentence is followed where every fact that it states holds (``Followed.followed``). Elsewhere this is
    estimated: where its own picture fits it better than ABOVE of the other prompts' pictures do."""

    name = "sentences"

    def __init__(self, judge: SentenceJudge, others: int = OTHERS) -> None:
        self.judge = judge
        self.others = others
        self.title = f"Sentence report ({'' if judge.exact else 'estimated by '}{judge.title})"

    def settings(self) -> dict[str, Any]:
        return {**self.judge.settings(), **({"others": self.others} if self.judge.exact else {"above": ABOVE})}

    def prepare(self, suite: Suite, images: list[Drawn], work: Path, run: Run) -> None:
        prepare_rows(self.judge, suite, images, work, run, self.others, self.title)

    def result(self, suite: Suite, images: list[Drawn], work: Path) -> ScoreResult:
        found = list(read_rows(self.judge, suite, images, work, self.others))
        result = ScoreResult(self.name, self.title, self._formula(), _SOURCE, self.settings())
        told = [(rows, list(_told(rows))) for rows in found]
        every = [one for _, part in told for one in part]
        readable = [part for rows, part in told if not rows.error]
        if not every or (readable and not any(readable)):  # failed images alone say nothing of the others
            result.skipped = (
                "no sentence of these prompts says anything that pixels can show; choose another suite."
                if self.judge.exact
                else f"the sentence report compares each sentence with at least {FEWEST} other prompts' pictures and found "
                "fewer; evaluate more prompts."
            )
            return result
        result.measures = [Measure("recall", "Sentences followed", "share")]
        if self.judge.exact:
            result.measures.append(Measure("facts", "Facts of a sentence that hold, mean", "share"))
        result.images = [self._image_score(rows, part) for rows, part in told]
        result.tables = [*_tables(every)]
        if not self.judge.exact:
            result.warnings.append(
                f"Followed is an estimate: a sentence counts as followed where its own picture fits it better than "
                f"{ABOVE:.0%} of the other prompts' pictures; {1 - ABOVE:.0%} is what a model that does not read reaches."
            )
        return result

    def _formula(self) -> str:
        if self.judge.exact:
            return (
                "Share of the sentences that can be judged from pixels of which every stated fact holds (object in its "
                "colour at its place, shape, background; size, texture and pattern only where a sentence says nothing else; "
                "the number of objects). Facts: the mean over the things that a sentence speaks of, each the mean over its "
                "facts, with size, texture and pattern at half weight; nothing of a thing holds that is not there in its "
                "colour. Both are means over sentences; chance is the same with the pictures of other prompts."
            )
        return (
            f"Share of sentences whose own picture scores above {ABOVE:.0%} of the pictures of other prompts with the "
            "same sentence (ties count half; prompts that hold the same sentence are left out)."
        )

    def _image_score(self, found: PictureRows, told: list[Told]) -> ImageScore:
        image = found.image
        values = {"recall": float(np.mean([one.followed for one in told]))} if told else {}
        if self.judge.exact and told:
            values["facts"] = float(np.mean([one.row.own.score for one in told]))
        weights = {name: float(len(told)) for name in values}
        detail: dict[str, Any] = {}
        if not found.error:
            details = sentence_details(found)
            followed = {one.row.position: one.followed for one in told}
            for one, row in zip(details, found.rows, strict=True):
                one["followed"] = followed.get(row.position)
                if row.own.facts:
                    one["facts"] = [list(fact) for fact in row.own.facts]
            detail["sentences"] = details
        elif not told:  # which cannot be told of a prompt without a sentence that is judged
            values = {measure: 0.0 for measure in (("recall", "facts") if self.judge.exact else ("recall",))}
        return ImageScore(image.name, image.prompt, values, weights, found.error, detail)


def _told(found: PictureRows) -> Iterable[Told]:
    """The sentences of an image that were judged, yes or no."""
    for row in found.rows:
        if row.own.followed is not None:
            chance = row.others_followed / len(row.others) if len(row.others) and row.others_followed is not None else None
            yield Told(row, found.image.prompt, row.own.followed, chance)
        elif len(row.others) >= FEWEST:
            yield Told(row, found.image.prompt, row.percentile() > ABOVE, 1 - ABOVE)


def _tables(told: Sequence[Told]) -> Iterable[Table]:
    exact = any(one.row.own.kind for one in told)
    if exact:
        yield _table("Sentences followed, by what they say", "what it says", told, KINDS, lambda one: one.row.own.kind)
        yield _facts(told)
    yield _table(
        "Sentences followed, by place in the paragraph", "sentence", told, PLACES,
        lambda one: place(one.row.position), plot="lines",
    )  # fmt: skip
    yield _table(
        "Sentences followed, by third of the paragraph", "part", told, THIRDS,
        lambda one: third(one.row.position, one.row.of),
    )  # fmt: skip
    yield _table(
        "Sentences followed, by their length", "words", told, [name for _, name in LENGTHS],
        lambda one: next(name for end, name in LENGTHS if end is None or count_words(one.row.text) <= end),
    )  # fmt: skip


def _table(
    title: str, head: str, told: Sequence[Told], groups: Sequence[str], group_of: Callable[[Told], str], plot: str = "bars"
) -> Table:
    rows: list[list[Any]] = []
    any_chance = any(one.chance is not None for one in told)
    for group in groups:
        members = [one for one in told if group_of(one) == group]
        if not members:
            continue
        row: list[Any] = [group, mean([float(one.followed) for one in members], [one.prompt for one in members])]
        chances = [one.chance for one in members if one.chance is not None]
        rows.append([*row, float(np.mean(chances)) if chances else ""] if any_chance else row)
    columns = [head, "followed", *(["chance"] if any_chance else [])]
    return Table(title, columns, rows, "Chance: the same sentences on other prompts' pictures." * any_chance, plot=plot)


def _facts(told: Sequence[Told]) -> Table:
    """Single facts, of whichever sentence; an image that failed has none, and is in the other tables alone."""
    found = [(name, value, one.prompt) for one in told for name, value in one.row.own.facts]
    rows = mean_rows(found, [fact for fact in FACTS if fact != "there"])
    note = "Of an object that is not there in its colour, no further fact holds. Images that failed are not in this table."
    return Table("Single facts that hold, of all sentences", ["fact", "holds"], rows, note, plot="bars")
