"""Segment alignment: a paragraph is judged sentence by sentence, so that nothing of it is cut at CLIP's 77 tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from paradiffusion.evaluation.estimates import mean, ratio
from paradiffusion.evaluation.records import Drawn, ImageScore, Measure, Run, ScoreResult, Table
from paradiffusion.evaluation.scores.sentence_judges import ClipJudge, PictureRows, SentenceJudge, clip_features, prepare_rows, read_rows
from paradiffusion.evaluation.suites.suite import Suite, by_id
from paradiffusion.metrics.clip import Clip

OTHERS: Final = 20  # pictures that a judge other than CLIP compares with: each costs it a look
_FORMULA: Final = (
    "Mean and minimum over the sentences s of a prompt of score(s, picture), then the mean over images. Retrieval: for each "
    "sentence, its score on its own picture against those on the pictures of other prompts (image j of a prompt against "
    "image j of the others; prompts that hold the same sentence are left out): 'first' is the share of sentences whose own "
    "picture scores highest (1 / (1 + t) where it ties with t others), 'percentile' the mean share of other pictures that "
    "score lower (ties half; chance is 50 %). A picture that failed counts as 0, or as the lowest score of all where that is "
    "below 0."
)
_SOURCE: Final = (
    "scoring by segments after LongAlign's Denscore (arXiv 2410.11817), here with the plain cosine of any open_clip model; "
    "CLIPScore (arXiv 2104.08718) without its factor 2.5"
)


class SegmentAlignment:
    """Mean and minimum score of a prompt's sentences, their retrieval inside the suite, and the whole-text CLIP score.

    Source: _SOURCE; formula: _FORMULA. The whole-text score reads only the tokens that fit into CLIP's context.

    ``others`` says with how many other pictures a judge that is no CLIP compares.
    """

    name = "segments"

    def __init__(self, judge: SentenceJudge, others: int = OTHERS) -> None:
        self.judge = judge
        self.others = others
        self.title = f"Segment alignment ({self.judge.title})"

    def settings(self) -> dict[str, Any]:
        others = {} if isinstance(self.judge, ClipJudge) else {"others": self.others}
        return {**self.judge.settings(), **others}

    def prepare(self, suite: Suite, images: list[Drawn], work: Path, run: Run) -> None:
        prepare_rows(self.judge, suite, images, work, run, self.others, self.title)

    def result(self, suite: Suite, images: list[Drawn], work: Path) -> ScoreResult:
        found = list(read_rows(self.judge, suite, images, work, self.others))
        measures = self._measures(_lowest(row.own.score for rows in found for row in rows.rows if not rows.error))
        if not any(len(row.others) for rows in found for row in rows.rows) and not all(rows.error for rows in found):
            measures = measures[:2]  # failed images alone say nothing of retrieval
        scores = [_image_score(rows, measures) for rows in found]
        result = ScoreResult(self.name, self.title, _FORMULA, _SOURCE, self.settings(), measures, scores)
        self._add_chance(result, found)
        if isinstance(self.judge, ClipJudge):
            self._add_whole(result, suite, found, work)
        return result

    def _measures(self, worst: float) -> list[Measure]:
        unit = self.judge.unit
        return [
            Measure("mean", "Sentences, mean", unit, worst=worst),
            Measure("minimum", "Sentences, minimum", unit, worst=worst),
            Measure("first", "Sentences that match this picture best", "share"),
            Measure("percentile", "Share of other pictures that match worse", "share"),
        ]

    def _add_chance(self, result: ScoreResult, found: Sequence[PictureRows]) -> None:
        counts = [len(row.others) for rows in found for row in rows.rows if len(row.others)]
        if not counts:
            result.warnings.append("There is no other prompt's picture to compare with, so retrieval was not computed.")
            return
        chance = float(np.mean([1 / (1 + count) for count in counts]))
        rows: list[list[Any]] = [["Sentences that match this picture best", chance]]
        rows.append(["Share of other pictures that match worse", 0.5])
        note = f"Each sentence was compared with {np.median(counts):.0f} pictures of other prompts (median)."
        result.tables.append(Table("Chance: what a model that does not read reaches", ["", "share"], rows, note))

    def _add_whole(self, result: ScoreResult, suite: Suite, found: Sequence[PictureRows], work: Path) -> None:
        """The score of the whole text, and how much of it was not read."""
        assert isinstance(self.judge, ClipJudge)
        clip, prompts = self.judge.clip, by_id(suite.prompts)
        title = f"Whole-text CLIP score: reads only the first {clip.context} tokens"
        texts = [prompt.text for prompt in suite.prompts]
        features, _ = clip.text_features(texts)
        text_of = {prompt.id: row for prompt, row in zip(suite.prompts, features.numpy(), strict=True)}
        pictures = clip_features(self.judge, work, [rows.image.name for rows in found if not rows.error])
        cosines = {s.image: float(text_of[s.prompt] @ pictures[s.image]) for s in result.images if not s.error}
        worst = _lowest(cosines.values())
        result.measures.append(Measure("whole", title, "cosine", worst=worst))
        for score in result.images:
            score.values["whole"] = cosines.get(score.image, worst)
        read = words_read(clip, texts)
        words = [max(1, len(text.split())) for text in texts]  # as ``words_read`` takes them
        ids = list(prompts)
        unread = [count - seen for count, seen in zip(words, read, strict=True)]
        cut = [float(row.cut) for rows in found for row in rows.rows]
        owners = [rows.image.prompt for rows in found for _ in rows.rows]
        lines: list[list[Any]] = [
            ["prompts of which the whole-text score reads only a part", mean([float(n > 0) for n in unread], ids)],
            ["words that the whole-text score does not read", ratio(unread, words, ids)],
        ]
        if cut:
            lines.append(["sentences of which segment alignment reads only a part", mean(cut, owners)])
        result.tables.append(Table(f"What {clip.context} tokens leave out", ["", "share"], lines))
        share = sum(n > 0 for n in unread) / len(unread)
        if share:
            result.warnings.append(
                f"The whole-text CLIP score reads {clip.context} tokens: of {share:.0%} of the prompts only the beginning."
            )


def _lowest(scores: Iterable[float]) -> float:
    """What a picture that failed counts as: cosines may be below 0, and a failure must not be better than a picture."""
    return min([0.0, *scores])


def _image_score(found: PictureRows, measures: Sequence[Measure]) -> ImageScore:
    image = found.image
    if found.error:
        worst = {measure.name: measure.worst or 0.0 for measure in measures}
        count = float(max(1, len(found.rows)))
        weights: dict[str, float] = {name: count for name in ("first", "percentile") if name in worst}
        return ImageScore(image.name, image.prompt, worst, weights, found.error)
    if not found.rows:
        return ImageScore(image.name, image.prompt, {})
    scores = [row.own.score for row in found.rows]
    compared = [row for row in found.rows if len(row.others)]
    values = {"mean": float(np.mean(scores)), "minimum": min(scores)}
    weights = {}
    if compared:
        values["first"] = float(np.mean([row.first() for row in compared]))
        values["percentile"] = float(np.mean([row.percentile() for row in compared]))
        weights = {name: float(len(compared)) for name in ("first", "percentile")}
    return ImageScore(image.name, image.prompt, values, weights, detail={"sentences": sentence_details(found)})


def sentence_details(found: PictureRows) -> list[dict[str, Any]]:
    """The sentences as the report's coloured page takes them."""
    return [
        {"text": row.text, "position": row.position, "score": row.own.score, "followed": row.own.followed,
         "cut": row.cut, "percentile": row.percentile() if len(row.others) else None}
        for row in found.rows
    ]  # fmt: skip


def words_read(clip: Clip, texts: Sequence[str]) -> list[int]:
    """How many of each text's words lie wholly within the tokens that ``clip`` reads, found by halving."""
    words = [text.split() for text in texts]
    low, high = [0] * len(words), [len(one) for one in words]
    while any(a < b for a, b in zip(low, high, strict=True)):
        middle = [(a + b + 1) // 2 for a, b in zip(low, high, strict=True)]
        # A text that is cut ends in another token than when there is more room.
        cut = clip.cut([" ".join(one[:count]) for one, count in zip(words, middle, strict=True)])
        low = [a if over else count for a, count, over in zip(low, middle, cut, strict=True)]
        high = [count - 1 if over else b for b, count, over in zip(high, middle, cut, strict=True)]
    return low
