"""Cards of a report: which pictures it shows, each with its values, answers, and the sentences of its prompt marked."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from PIL import Image

from paradiffusion.data.images import BadImage, decode
from paradiffusion.evaluation.records import Drawn, ImageScore, Measure, ScoreResult, relative_file
from paradiffusion.evaluation.reporting.numbers import ScoreNumbers, SuiteNumbers
from paradiffusion.evaluation.reporting.texts import excerpt, value_text
from paradiffusion.evaluation.suites.suite import SuitePrompt, by_id
from paradiffusion.pages import Grid, text_grid, thumbnail_uri

SIDE: Final = 320  # pixels of a small copy
TINY: Final = 128  # pixels of the longer side; smaller pictures are shown enlarged with hard edges
SPREAD: Final = 12
DIFFER: Final = 8
WORST: Final = 12
BEST: Final = 8
GROUPS: Final = {"spread": "Spread evenly over the suite", "differ": "Where the models differ most", "worst": "Worst", "best": "Best"}
# Shares from which a sentence counts as followed, and as followed in part, where its score does not say so itself: our choice.
FOLLOWED: Final = 0.75
PARTLY: Final = 0.4
MARKS: Final = {
    "followed": ("✓", "followed"),
    "partly": ("◐", "followed in part"),
    "ignored": ("✗", "not followed"),
    "unknown": ("?", "not judged"),
}
"""Level: its mark, so that no colour is needed to tell it, and its words."""
ANSWERS: Final = {"yes": "✓", "no": "✗", "zeroed": "⊘"}


@dataclass
class Shown:
    """An image (prompt, number and so seed) that the report shows of every model, its section of GROUPS, and each reason."""

    image: str
    prompt: str
    group: str
    why: list[str] = field(default_factory=list)


def leading(numbers: SuiteNumbers) -> list[tuple[ScoreNumbers, Measure]]:
    """The first measure of each score that images have, by which best and worst are told."""
    return [
        (score, score.measures[0].measure) for score in numbers.scores if score.measures and image_values(score, score.measures[0].measure)
    ]


def short_title(score: ScoreNumbers) -> str:
    """A score's title without what stands in brackets, its model, for places that are narrow."""
    return score.title.partition(" (")[0]


def image_values(score: ScoreNumbers, measure: Measure) -> dict[str, dict[int, float]]:
    """By image and model, what ``measure`` gave; images that failed are absent, as they stand in their own list."""
    found: dict[str, dict[int, float]] = {}
    for number, result in enumerate(score.results):
        for image in result.images if result is not None else ():
            value = image.values.get(measure.name)
            if value is not None and math.isfinite(value) and not image.error:
                found.setdefault(image.image, {})[number] = value
    return found


def choose(numbers: SuiteNumbers) -> list[Shown]:
    """The images to show, most wanted first within each group, each once, in the group that wants it first."""
    prompt_of = {drawn.name: drawn.prompt for model in numbers.models for drawn in model.images}
    found: dict[str, Shown] = {}

    def want(image: str, group: str, why: str) -> None:
        if image in prompt_of:
            shown = found.setdefault(image, Shown(image, prompt_of[image], group))
            shown.why.append(why)

    first = list(dict.fromkeys(drawn.name for drawn in numbers.models[0].images if drawn.name == drawn.prompt))
    count = min(SPREAD, len(first))
    for number in range(count):
        want(first[number * len(first) // count], "spread", "spread")
    for image in _most_different(numbers)[:DIFFER]:
        want(image, "differ", "models differ")
    for group, amount in (("worst", WORST), ("best", BEST)):
        for (image, why), _ in zip(_extremes(numbers, group), range(amount), strict=False):
            want(image, group, why)
    order = list(GROUPS)
    return sorted(found.values(), key=lambda shown: order.index(shown.group))


def _most_different(numbers: SuiteNumbers) -> list[str]:
    """Images by how far the models lie apart, in standard deviations of each measure, added up; the farthest first."""
    distance: dict[str, float] = {}
    for score, measure in leading(numbers):
        values = image_values(score, measure)
        spread = statistics.pstdev([value for of in values.values() for value in of.values()])
        for image, of in values.items():
            apart = max(of.values()) - min(of.values())
            if len(of) > 1 and spread > 0 and apart > 0:
                distance[image] = distance.get(image, 0.0) + apart / spread
    return sorted(distance, key=lambda image: -distance[image])


def _extremes(numbers: SuiteNumbers, end: str) -> Iterator[tuple[str, str]]:
    """(image, why): the worst, or best, by each leading measure of each model in turn, then the second ones, ..."""
    ranked = []
    for score, measure in leading(numbers):
        values = image_values(score, measure)
        down = measure.higher_is_better == (end == "best")
        for number, label in enumerate(numbers.labels):
            own = [(of[number], image) for image, of in values.items() if number in of]
            own.sort(key=lambda pair, down=down: -pair[0] if down else pair[0])  # type: ignore[misc]
            half = own[: max(1, len(own) // 2)]  # of three images that were scored none is the best and the worst too
            whose = f" of {label}" if len(numbers.labels) > 1 else ""
            ranked.append([(image, f"{end}{whose}: {short_title(score)}") for _, image in half])
    yield from (found for turn in zip_longest(*ranked) for found in turn if found is not None)


def _in_turn(shown: Sequence[Shown]) -> list[Shown]:
    """One of each group in turn, so that a full page leaves none of them out."""
    groups = ([one for one in shown if one.group == group] for group in GROUPS)
    return [one for turn in zip_longest(*groups) for one in turn if one is not None]


@dataclass
class Album:
    """What a report's pictures may weigh: ``left`` are bytes that they may still take; they link to their files from ``folder``."""

    folder: Path
    left: int

    def picture(self, drawn: Drawn | None, alt: str) -> dict[str, Any]:
        """One picture as the template takes it; ``missing`` is the reason where there is none."""
        if drawn is None:
            return {"missing": "not among this model's images"}
        if drawn.error:
            return {"missing": excerpt(drawn.error, 300)}
        try:
            picture: Image.Image = decode(drawn.file.read_bytes(), cover=(SIDE, SIDE))
        except FileNotFoundError:
            return {"missing": f"{drawn.file.name} is missing"}
        except (OSError, BadImage) as error:
            reason = (error.strerror if isinstance(error, OSError) else "") or str(error)
            return {"missing": excerpt(f"{drawn.file.name}: {reason}", 300)}
        uri = thumbnail_uri(picture, SIDE)
        self.left -= len(uri)
        return {
            "missing": "", "uri": uri, "width": picture.width, "height": picture.height, "tiny": max(picture.size) <= TINY,
            "alt": excerpt(alt, 160), "link": quote(relative_file(drawn.file, self.folder)),
        }  # fmt: skip


def picture_cards(numbers: SuiteNumbers, album: Album, budget: int) -> tuple[dict[str, Any], dict[str, str]]:
    """The cards of one suite, until their pictures take ``budget`` bytes of ``album``; and by image the id of its card."""
    prompts, stop = by_id(numbers.suite.prompts), album.left - budget
    total = len({drawn.name for model in numbers.models for drawn in model.images})
    drawn = [{drawn.name: drawn for drawn in model.images} for model in numbers.models]
    scores = [[(score, {image.image: image for image in score.images}) for score in model.scores] for model in numbers.models]
    groups: dict[str, list[dict[str, Any]]] = {}
    anchors: dict[str, str] = {}
    for one in _in_turn(choose(numbers)):
        if album.left <= stop:
            break
        if one.prompt in prompts:
            found = [[(r, rows[one.image]) for r, rows in model if one.image in rows] for model in scores]
            anchors[one.image] = f"{numbers.anchor}-picture-{len(anchors)}"
            card = _card(numbers, one, prompts[one.prompt], [of.get(one.image) for of in drawn], found, album)
            groups.setdefault(one.group, []).append({**card, "anchor": anchors[one.image]})
    beside = ", each with the pictures of all models side by side" if len(numbers.models) > 1 else ""
    marked = any(model["parts"] for cards in groups.values() for card in cards for model in card["models"])
    about = " A sentence's marks say how well the picture follows it; hover over it, or reach it by the Tab key, for the figures."
    return {
        "note": f"{len(anchors):,} of {total:,} shown{beside}.{about if marked else ''}",
        "marked": marked,
        "groups": [{"name": n, "title": title, "cards": groups[n]} for n, title in GROUPS.items() if n in groups],
    }, anchors


Found = Sequence[tuple[ScoreResult, ImageScore]]  # every score's findings about one picture


def _card(
    numbers: SuiteNumbers, shown: Shown, prompt: SuitePrompt, drawn: Sequence[Drawn | None], found: Sequence[Found],
    album: Album,
) -> dict[str, Any]:  # fmt: skip
    marked = [judged_sentences(one) for one in found]
    seeds = {one.seed for one in drawn if one is not None}
    seed = f" · seed {next(iter(seeds))}" if len(seeds) == 1 and None not in seeds else ""
    models = []
    for label, picture, said, sentences in zip(numbers.labels, drawn, found, marked, strict=True):
        by_name = {result.name: image for result, image in said}
        chips = [
            (short_title(score), value_text(image.values[measure.name], measure.unit), bool(image.error))
            for score, measure in leading(numbers)
            if (image := by_name.get(score.name)) is not None and measure.name in image.values
        ]
        models.append(
            {
                "label": label, "picture": album.picture(picture, f"{label}: {prompt.text}"), "chips": chips,
                "parts": parts_of(prompt.text, sentences) if sentences else [],
                "details": [_details(result, image) for result, image in said],
            }
        )  # fmt: skip
    return {
        "image": shown.image,
        "about": f"{prompt.words} words{f' · {prompt.category}' if prompt.category else ''}{seed}",
        "tags": [why for why in dict.fromkeys(shown.why) if why != "spread"],
        # Without marks the text is the same for all models, and stands once.
        "text": "" if any(marked) else prompt.text,
        "models": models,
        "table": _values(numbers, found),
    }


def _details(result: ScoreResult, image: ImageScore) -> dict[str, Any]:
    """A score's words about a picture: answers, the caption, why it failed."""
    caption = image.detail.get("caption")
    answers = []
    for row in image.detail.get("questions", ()):
        kind = "zeroed" if not row["counted"] else "yes" if row["yes"] else "no"
        answers.append({"kind": kind, "mark": ANSWERS[kind], "text": row["text"], "said": row["answer"]})
    return {
        "title": result.title, "texts": [("caption of the picture", caption)] if caption else [], "error": image.error,
        "questions": answers, "right": sum(row["kind"] == "yes" for row in answers),
    }  # fmt: skip


def _values(numbers: SuiteNumbers, found: Sequence[Found]) -> Grid:
    """All values of one image; without groups where there are none."""
    rows = []
    of_model = [{result.name: image for result, image in one} for one in found]
    for score in numbers.scores:
        for numbered in score.measures:
            measure = numbered.measure
            values = [one[score.name].values.get(measure.name) if score.name in one else None for one in of_model]
            if any(value is not None for value in values):
                rows.append([f"{score.title}: {measure.title}", *(value_text(value, measure.unit) for value in values)])
    return text_grid(["", *numbers.labels], rows) if rows else Grid([])


@dataclass
class JudgedSentence:
    """A sentence of a prompt, and what is known of it.

    Attributes:
        level: one of MARKS; ``notes`` are sentences about it, from every score that looked at it.
    """

    text: str
    level: str = "unknown"
    notes: list[str] = field(default_factory=list)


def judged_sentences(found: Found) -> list[JudgedSentence]:
    """The sentences of one picture's prompt, from all scores that have some (``detail["sentences"]``); the first that can tell sets
    the level."""
    merged: dict[tuple[int, str], JudgedSentence] = {}
    for result, image in found:
        # The unit of a sentence's own score need not be that of the score's measures.
        unit = "cosine" if result.settings.get("judge") == "clip" else result.measures[0].unit if result.measures else "number"
        for row in image.detail.get("sentences", ()):
            sentence = merged.setdefault((row["position"], row["text"]), JudgedSentence(row["text"]))
            if sentence.level == "unknown":
                sentence.level = level_of(row, unit)
            sentence.notes += _notes(row, result.title, unit)
    # Scores may pass over sentences that they cannot judge, each over others.
    return [merged[key] for key in sorted(merged)]


def parts_of(prompt: str, sentences: Sequence[JudgedSentence]) -> list[tuple[str, JudgedSentence | None]]:
    """``prompt`` cut into its sentences and what stands between them, such as a line's end."""
    parts: list[tuple[str, JudgedSentence | None]] = []
    at = 0
    for sentence in sentences:
        start = prompt.find(sentence.text, at)
        if start < 0 or not sentence.text:
            continue  # the score changed the text; the rest of the prompt is shown unmarked
        parts += [(prompt[at:start], None), (sentence.text, sentence)]
        at = start + len(sentence.text)
    return [*parts, (prompt[at:], None)]


def level_of(row: dict[str, Any], unit: str) -> str:
    """One of MARKS, from a sentence's ``score``, of this unit, and whether it is ``followed``."""
    score, followed = row.get("score"), row.get("followed")
    if followed is True:
        return "followed"
    share = score if unit == "share" else None
    if followed is False:
        return "partly" if share is not None and share >= PARTLY else "ignored"
    if share is None:
        return "unknown"  # a cosine alone tells nothing: what is high differs from sentence to sentence
    return "followed" if share >= FOLLOWED else "partly" if share >= PARTLY else "ignored"


def _notes(row: dict[str, Any], title: str, unit: str) -> list[str]:
    notes = []
    score, percentile, change, drop = (row.get(key) for key in ("score", "percentile", "change", "drop"))
    # The counterfactual's score is that of another score's judge, and stands there already.
    if score is not None and change is None:
        notes.append(f"{title}: {value_text(score, unit)}")
    if percentile is not None:
        notes.append(f"{title}: fits this picture better than {value_text(percentile, 'share')} of the other pictures")
    if change is not None:
        scale = "of what another seed changes"
        notes.append(f"{title}: without this sentence the picture changes by {value_text(change, 'share')} {scale}")
    if drop is not None:
        notes.append(f"without it its own score falls by {value_text(drop, 'number')}")
    if row.get("matters") is not None:
        notes.append("it matters" if row["matters"] else "it was ignored: its removal changes nothing")
    if row.get("cut"):
        notes.append(f"{title}: its end was not read")
    return notes
