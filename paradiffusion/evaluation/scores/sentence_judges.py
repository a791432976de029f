"""Sentences against pictures: judges (a scene's ground truth, or CLIP), and each sentence on its own picture and on others."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from PIL import Image

from paradiffusion.errors import UserError
from paradiffusion.evaluation.journal import read_journals
from paradiffusion.evaluation.records import Drawn, Run
from paradiffusion.evaluation.scores.image_features import Extractor, clip_weights, image_features, looked_at, read_features, read_picture
from paradiffusion.evaluation.suites.suite import Suite, SuitePrompt, by_id
from paradiffusion.metrics.clip import Clip, load_clip
from paradiffusion.metrics.sentences import sentences
from paradiffusion.randomness import permutation
from paradiffusion.scenes.sentence_truth import claims, follow
from paradiffusion.scenes.world import Scene, scene_from_meta

THIRDS: Final = ("first third", "middle third", "last third")
_LISTED: Final = 8  # places with a row of their own; few paragraphs have more sentences


def third(position: int, of: int) -> str:
    """The third of the paragraph that the middle of sentence ``position`` (from 0) of ``of`` lies in."""
    return THIRDS[int(3 * (position + 0.5) / of)]


def ordinal(number: int) -> str:
    """1st for 0, up to 20th."""
    return f"{number + 1}{({0: 'st', 1: 'nd', 2: 'rd'}).get(number, 'th')}"


PLACES: Final = (*(ordinal(number) for number in range(_LISTED)), f"{ordinal(_LISTED)} and later")


def place(position: int) -> str:
    """The one of PLACES that ``position`` (from 0) belongs to."""
    return PLACES[min(position, _LISTED)]


@dataclass(frozen=True)
class Judgement:
    """How well a picture follows one sentence: a score (higher is better; see ``SentenceJudge.unit``), yes or no (None where the judge
    only compares), and where the judge knows them the single facts, (what it is about, 0 to 1), and what the sentence is about."""

    score: float
    followed: bool | None = None
    facts: tuple[tuple[str, float], ...] = ()
    kind: str = ""


class SentenceJudge:
    """Judges sentences one by one. ``unit`` is its scores': "share" (1 = all of it is shown) or "cosine"; ``exact`` whether it knows the
    truth; others estimate."""

    name: str
    title: str
    unit: str
    exact: bool = False

    def settings(self) -> dict[str, Any]:
        """What its scores depend on, as JSON; loads nothing."""
        return {"judge": self.name}

    def judge(self, prompt: SuitePrompt, sentences: Sequence[str], image: np.ndarray) -> list[Judgement | None]:
        """Each sentence of the prompt against a picture, uint8 [H, W, 3]; None where no picture could show it."""
        raise NotImplementedError

    def kinds(self, prompt: SuitePrompt, sentences: Sequence[str]) -> list[str | None]:
        """What each sentence is about, "" where that is not known; None for those that are not judged."""
        return ["" for _ in sentences]


class SceneJudge(SentenceJudge):
    """The truth about a built-in scene: every fact of every sentence is looked up in the pixels (scene_truth.py)."""

    name = "truth"
    title = "the scene's ground truth"
    unit = "share"
    exact = True

    def judge(self, prompt: SuitePrompt, sentences: Sequence[str], image: np.ndarray) -> list[Judgement | None]:
        found = follow(scene_of(prompt), sentences, image)
        return [
            None if one is None else Judgement(one.score, one.followed, one.facts, kind or "")
            for one, kind in zip(found, self.kinds(prompt, sentences), strict=True)
        ]

    def kinds(self, prompt: SuitePrompt, sentences: Sequence[str]) -> list[str | None]:
        return [claim.kind or None for claim in claims(sentences)]


def scene_of(prompt: SuitePrompt) -> Scene:
    """The ground truth of a prompt of the scenes suite; UserError for any other prompt."""
    if "scene" not in prompt.meta:
        raise UserError(f"the prompt {prompt.id} has no ground truth of a built-in scene; judge this suite with clip=<model> instead.")
    return scene_from_meta(prompt.meta["scene"])


class NoJudge(SentenceJudge):
    """Nobody who could say how well a picture follows a sentence: what leaving it out changes can be measured all the same."""

    name = "none"
    title = "the picture's own change"
    unit = "number"

    def judge(self, prompt: SuitePrompt, sentences: Sequence[str], image: np.ndarray) -> list[Judgement | None]:
        return [None for _ in sentences]


class ClipJudge(SentenceJudge):
    """Cosines of CLIP features of sentences and pictures (CLIPScore, arXiv 2104.08718, without its factor of 2.5).

    A cosine says little alone: sentences differ in how well any picture fits them. So it compares, and never says yes or no. The
    model is loaded at the first use, from ``spec`` as ``paradiffusion.metrics.clip.load_clip`` takes it."""

    name = "clip"
    unit = "cosine"

    def __init__(self, spec: str, device: str = "cpu", precision: str = "fp32") -> None:
        self.spec, self.device, self.precision = spec, device, precision
        self.title = f"CLIP {spec}"
        self._last: tuple[tuple[str, ...], tuple[torch.Tensor, list[bool]]] | None = None

    def settings(self) -> dict[str, Any]:
        return {"judge": self.name, "clip": self.spec, "precision": self.precision, "weights": self._weights}

    @cached_property
    def _weights(self) -> str | None:
        return clip_weights(self.spec)

    @cached_property
    def clip(self) -> Clip:
        return load_clip(self.spec, self.device, self.precision)

    def judge(self, prompt: SuitePrompt, sentences: Sequence[str], image: np.ndarray) -> list[Judgement | None]:
        texts, _ = self.texts(sentences)
        picture = self.clip.image_features(self.clip.prepare(Image.fromarray(image))[None])[0]
        return [Judgement(float(value)) for value in texts @ picture]

    def texts(self, sentences: Sequence[str]) -> tuple[torch.Tensor, list[bool]]:
        """Features [S, D] of unit length, and which sentences were cut; those of the last call are kept."""
        key = tuple(sentences)
        if self._last is None or self._last[0] != key:
            self._last = (key, self.clip.text_features(list(key)))
        return self._last[1]


# Cosines are rounded before they are compared: equal pictures may differ in the last bits by their place in a batch.
DIGITS: Final = 6


@dataclass(frozen=True)
class SentenceRow:
    """One sentence, at ``position`` (from 0) of the ``of`` of its paragraph; of one that is ``cut`` only the beginning was read.

    ``others`` are float [K], its scores on the pictures of other prompts (empty where none were looked at), of which
    ``others_followed`` follow it; None where the judge does not say."""

    text: str
    position: int
    of: int
    own: Judgement
    others: np.ndarray
    others_followed: int | None = None
    cut: bool = False

    def first(self) -> float:
        """1 where its own picture scores above all others; among ``t`` others that score the same, 1 / (1 + t)."""
        own = round(self.own.score, DIGITS)
        return 0.0 if (self.others > own).any() else 1 / (1 + int((self.others == own).sum()))

    def percentile(self) -> float:
        """The share of other pictures that score below its own; those that score the same count half."""
        own = round(self.own.score, DIGITS)
        return float(((self.others < own) + 0.5 * (self.others == own)).mean())


@dataclass(frozen=True)
class PictureRows:
    """What is known of one image: a row for each sentence that can be judged, and why it failed where it did; no sentence
    is then followed."""

    image: Drawn
    rows: list[SentenceRow]
    error: str = ""


def prepare_rows(judge: SentenceJudge, suite: Suite, images: Sequence[Drawn], work: Path, run: Run, others: int, title: str) -> None:
    """Look at ``images``, this process's share, and keep in ``work`` what ``read_rows`` needs. A sentence is compared with the pictures
    of ``others`` other prompts; by CLIP with those of all."""
    if isinstance(judge, ClipJudge):
        extractor = Extractor(judge.clip.prepare, judge.clip.image_features)
        image_features(images, extractor, _features_of(judge, work), run, title="CLIP image features")
        return
    prompts = by_id(suite.prompts)
    follow = _foreign(suite, others)
    looked_at(images, work, run, title, lambda image: _judged(judge, prompts, image, follow[image.prompt]))


def read_rows(judge: SentenceJudge, suite: Suite, images: Sequence[Drawn], work: Path, others: int) -> Iterator[PictureRows]:
    """Every image of ``images``, in their order; the arguments are those of ``prepare_rows``."""
    if isinstance(judge, ClipJudge):
        return _by_features(judge, suite, images, work)
    return _by_journal(judge, suite, images, work, others)


def clip_features(judge: ClipJudge, work: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Features [D] of unit length of those images that have them, by name."""
    found, features, _ = read_features(_features_of(judge, work), names)
    return dict(zip(found, features, strict=True))


def turn_of(image: Drawn) -> int:
    """The number of an image among those of its prompt, from 0."""
    rest = image.name[len(image.prompt) + 1 :]
    return int(rest) if rest.isdigit() else 0


def _features_of(judge: ClipJudge, work: Path) -> Path:
    """Beside the scores' own folders, named after the model: several scores look at the pictures with the same one."""
    digest = hashlib.sha256(json.dumps(judge.settings(), sort_keys=True).encode()).hexdigest()[:12]
    return work.parent / f"clip_features_{digest}"


def _failed(judge: SentenceJudge, prompt: SuitePrompt) -> list[SentenceRow]:
    parts = sentences(prompt.text)
    return [
        SentenceRow(text, number, len(parts), Judgement(0.0, False, (), kind), np.zeros(0), 0)
        for number, (text, kind) in enumerate(zip(parts, judge.kinds(prompt, parts), strict=True))
        if kind is not None
    ]


def _same(sentence: str) -> str:
    return " ".join(sentence.casefold().split())


def _holders(suite: Suite) -> dict[str, set[str]]:
    """The prompts that hold a sentence."""
    holders: dict[str, set[str]] = defaultdict(set)
    for prompt in suite.prompts:
        for sentence in sentences(prompt.text):
            holders[_same(sentence)].add(prompt.id)
    return holders


def _by_features(judge: ClipJudge, suite: Suite, images: Sequence[Drawn], work: Path) -> Iterator[PictureRows]:
    names, features, errors = read_features(_features_of(judge, work), [image.name for image in images])
    place = {name: row for row, name in enumerate(names)}
    prompts, holders = by_id(suite.prompts), _holders(suite)
    turns: dict[int, list[Drawn]] = defaultdict(list)  # readable pictures only
    for image in images:
        if image.name in place:
            turns[turn_of(image)].append(image)
    stacked = {turn: features[[place[image.name] for image in members]].T for turn, members in turns.items()}
    owners = {turn: np.array([image.prompt for image in members]) for turn, members in turns.items()}
    for image in images:
        if image.name not in place:
            reason = errors.get(image.name, image.error or "it was not looked at")
            yield PictureRows(image, _failed(judge, prompts[image.prompt]), reason)
            continue
        turn = turn_of(image)
        parts = sentences(prompts[image.prompt].text)
        texts, cut = judge.texts(parts)
        scores = np.round(texts.numpy() @ stacked[turn], DIGITS)  # [S, pictures of this turn]
        mine = owners[turn] == image.prompt
        rows = [
            SentenceRow(
                text, number, len(parts), Judgement(float(scores[number, mine][0])),
                scores[number, ~np.isin(owners[turn], list(holders[_same(text)]))], cut=cut[number],
            )
            for number, text in enumerate(parts)
        ]  # fmt: skip
        yield PictureRows(image, rows)


def _foreign(suite: Suite, others: int) -> dict[str, list[SuitePrompt]]:
    """For each prompt, those whose sentences its picture is tried on: each prompt is tried with ``others`` pictures."""
    total = len(suite.prompts)
    steps = 1 + permutation(total - 1, "foreign sentences", total)[:others] if total > 1 else np.zeros(0, int)
    return {prompt.id: [suite.prompts[(number + int(step)) % total] for step in steps] for number, prompt in enumerate(suite.prompts)}


def _judged(judge: SentenceJudge, prompts: dict[str, SuitePrompt], image: Drawn, foreign: list[SuitePrompt]) -> dict[str, Any]:
    picture = read_picture(image)
    if isinstance(picture, str):
        return {"error": picture}
    prompt, pixels = prompts[image.prompt], np.asarray(picture)
    own = judge.judge(prompt, sentences(prompt.text), pixels)
    tried = {
        other.id: [one and (one.score, one.followed) for one in judge.judge(other, sentences(other.text), pixels)] for other in foreign
    }
    return {"own": [one and vars(one) for one in own], "foreign": tried}


def _by_journal(judge: SentenceJudge, suite: Suite, images: Sequence[Drawn], work: Path, others: int) -> Iterator[PictureRows]:
    found = dict(read_journals(work))
    prompts, holders, foreign = by_id(suite.prompts), _holders(suite), _foreign(suite, others)
    tried: dict[tuple[str, int], list[tuple[str, list[Any]]]] = defaultdict(list)
    for image in images:
        for other in foreign[image.prompt]:
            values = found.get(image.name, {}).get("foreign", {}).get(other.id)
            if values is not None:
                tried[other.id, turn_of(image)].append((image.prompt, values))
    for image in images:
        record = found.get(image.name, {"error": image.error or "it was not looked at"})
        if "error" in record:
            yield PictureRows(image, _failed(judge, prompts[image.prompt]), record["error"])
            continue
        parts = sentences(prompts[image.prompt].text)
        rows = []
        for number, (text, own) in enumerate(zip(parts, record["own"], strict=True)):
            if own is not None:
                pairs = [
                    values[number]
                    for owner, values in tried[image.prompt, turn_of(image)]
                    if owner not in holders[_same(text)] and values[number] is not None
                ]
                judgement = Judgement(**{**own, "facts": tuple((name, value) for name, value in own["facts"])})
                scores = np.round([score for score, _ in pairs], DIGITS)
                rows.append(SentenceRow(text, number, len(parts), judgement, scores, sum(bool(yes) for _, yes in pairs)))
        yield PictureRows(image, rows)
