"""The counterfactual: what becomes of a picture, from the same seed, when one sentence of its paragraph is left out?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from paradiffusion.atomic import atomic_file
from paradiffusion.errors import UserError
from paradiffusion.evaluation.estimates import Estimate, mean, mean_rows
from paradiffusion.evaluation.journal import Journal, read_journals
from paradiffusion.evaluation.records import Drawn, ImageScore, Measure, Painter, Request, Run, ScoreResult, Table
from paradiffusion.evaluation.scores.sentence_judges import PLACES, NoJudge, SentenceJudge, place
from paradiffusion.evaluation.suites.suite import Suite, SuitePrompt, by_id
from paradiffusion.metrics.sentences import sentences
from paradiffusion.scenes.sentence_truth import KINDS

FACTOR: Final = 3.0  # see ``removals_of``
LEAST: Final = 1e-6  # a smaller drop is rounding
NOTHING: Final = 0.05  # of another seed's change, below which a picture counts as unchanged; our choice


@dataclass(frozen=True)
class Removal:
    """One sentence left out, of the ``of`` of its paragraph.

    Attributes:
        kind: what it says, None where it is not judged, "" where that is not known.
        score, followed: of the sentence on the picture of the whole text; ``drop``: of that score on the picture without it.
        change: of all pixels, relative to another seed's picture; None where that is the same picture.
        matters: whether its drop stands out of the noise; None where it is not judged.
    """

    prompt: str
    text: str
    position: int
    of: int
    kind: str | None
    score: float | None
    followed: bool | None
    drop: float
    change: float | None
    matters: bool | None


def removals_of(prompt: str, of: int, record: dict[str, Any]) -> list[Removal]:
    """The sentences that were left out of one prompt, from what ``Counterfactual.prepare`` kept.

    A sentence matters where its score drops by more than FACTOR times the median change of that score over the pictures
    without another sentence. For an ignored sentence the drop is as random as these changes, and normal noise passes FACTOR
    in about 3 % of cases.
    """
    scale = record["seed_change"]
    whole, left_out = record["scores"]["whole"], record["left_out"]
    found = []
    for row, number in enumerate(left_out):
        judged = whole[number] is not None
        drop, matters = 0.0, None
        if judged:
            drop = whole[number] - record["scores"][f"without_{number}"][number]
            noise = [abs(whole[number] - record["scores"][f"without_{other}"][number]) for other in left_out if other != number]
            matters = bool(drop > max(LEAST, FACTOR * float(np.median(noise))))
        found.append(
            Removal(
                prompt, record["texts"][number], number, of, record["kinds"][number], whole[number], record["followed"][number], drop,
                record["changes"][row] / scale if scale else None, matters,
            )
        )  # fmt: skip
    return found


def tables(removals: Sequence[Removal], exact: bool) -> Iterator[Table]:
    judged = [one for one in removals if one.matters is not None]
    if not removals:
        return
    if judged:
        title = "Sentences that matter, by place in the paragraph"
        yield _shares(title, "sentence", judged, PLACES, lambda o: place(o.position), "lines")
    if judged and exact:
        yield _shares("Sentences that matter, by what they say", "what it says", judged, KINDS, lambda o: o.kind or "")
    changes: list[list[Any]] = [[name, _change_of([one for one in judged or removals if place(one.position) == name])] for name in PLACES]
    title = "Change of the picture, by the place of the sentence left out (1 = another seed's)"
    yield Table(title, ["sentence", "change"], [row for row in changes if row[1] is not None], "", "number", "lines")
    yield _noise(removals)
    yield from _beside_report(judged)


def _shares(
    title: str, head: str, judged: Sequence[Removal], groups: Sequence[str], group_of: Callable[[Removal], str],
    plot: str = "bars",
) -> Table:  # fmt: skip
    rows = mean_rows([(group_of(one), float(bool(one.matters)), one.prompt) for one in judged], groups)
    return Table(title, [head, "matter"], rows, plot=plot)


def _noise(removals: Sequence[Removal]) -> Table:
    """The change that a judged sentence makes beside that of an idle one, and that of another seed."""
    judged = [one for one in removals if one.matters is not None]
    idle = [one for one in removals if one.matters is None]
    named = [("a sentence that is judged", judged), ("a sentence that nothing can show", idle)] if judged else [("a sentence", removals)]
    rows: list[list[Any]] = [[name, found] for name, members in named if (found := _change_of(members)) is not None]
    rows.append(["another seed", 1.0])
    known = [one.change for one in judged or removals if one.change is not None]
    still, kind = sum(change < NOTHING for change in known), "judged " if judged else ""
    note = f"{still} of {len(known)} {kind}sentences change the picture by less than {NOTHING:.0%} of another seed." if known else ""
    return Table(
        "How much a sentence changes the picture (1 = another seed's)", ["what is left out", "change of pixels"], rows, note, "number"
    )


def _beside_report(judged: Sequence[Removal]) -> Iterator[Table]:
    """Do sentences that are followed matter, and others not?"""
    called = {True: "followed", False: "not followed", None: ""}
    found = [(called[one.followed], float(bool(one.matters)), one.prompt) for one in judged]
    rows = mean_rows(found, ("followed", "not followed"))
    note = "A sentence that is followed and does not matter was said twice, or came about by chance."
    if rows:
        title = "Beside the sentence report: sentences that matter"
        yield Table(title, ["on the whole text's picture", "matter"], rows, note, plot="bars")


def _change_of(members: Sequence[Removal]) -> Estimate | None:
    known = [(one.change, one.prompt) for one in members if one.change is not None]
    return mean([change for change, _ in known], [prompt for _, prompt in known]) if known else None


LIMIT: Final = 16  # sentences of one prompt that are left out, each in turn; of more, these are spread evenly
AT_ONCE: Final = 8  # pictures asked of the painter in one call: what a stop may cost
_MEASURES: Final = (
    Measure("matters", "Sentences that matter", "share"),
    Measure("without_effect", "Sentences whose removal leaves the picture as it is", "share", False, worst=1.0),
    Measure("change", "Change of the picture, relative to another seed's", "number", worst=None),
    Measure("drop", "Drop of the sentence's own score", "number", worst=None),
)
_JUDGED: Final = ("matters", "drop")
_FORMULA: Final = (
    "For each prompt its picture, the picture of the next seed, and from the first seed again one picture without each "
    "sentence k. Change: mean absolute difference of all pixel values between the pictures with and without k, divided by "
    "that between the two seeds (1 = as different as another seed's picture; 0 = nothing changed); below "
    f"{NOTHING:.0%} of it the picture counts as left as it is. Drop: the judge's score "
    "of sentence k on the picture with it minus that without it. A sentence matters where its drop is above 0 and above "
    "three times the median change of its score when any one of the other sentences is left out instead."
)
_SOURCE: Final = "this project; the factor of three is its choice (about 3 % of ignored sentences pass it by noise)"


class Counterfactual:
    """The share of sentences that matter to the picture: a sentence whose removal changes nothing was ignored.

    Formula: _FORMULA. A prompt of one sentence has nothing that could stay, and is left out and counted. The ``painter`` is asked for
    sentences + 2 pictures of each of ``prompts`` prompts, spread evenly."""

    name = "counterfactual"

    def __init__(self, painter: Painter, judge: SentenceJudge, prompts: int) -> None:
        if prompts < 1:
            raise UserError(f"counterfactual={prompts} is out of range; expected a number of prompts above 0.")
        self.painter = painter
        self.judge = judge
        self.prompts = prompts
        self.title = f"Counterfactual: one sentence left out ({judge.title})"

    @property
    def _measures(self) -> tuple[Measure, ...]:
        """Without a judge no sentence has a score that could drop."""
        return tuple(one for one in _MEASURES if not isinstance(self.judge, NoJudge) or one.name not in _JUDGED)

    def settings(self) -> dict[str, Any]:
        return {**self.judge.settings(), "limit": LIMIT}  # more prompts leave what is known of the others

    def prepare(self, suite: Suite, images: list[Drawn], work: Path, run: Run) -> None:
        """The prompts whose first image is among ``images``. A prompt that the painter fails at is noted as failed."""
        mine = {image.prompt for image in images if image.name == image.prompt}
        chosen = [prompt for prompt in suite.first(self.prompts).prompts if prompt.id in mine]
        chosen = [prompt for prompt in chosen if len(sentences(prompt.text)) > 1]
        total = sum(len(requests_of(prompt, prompt.seed(suite.name))) for prompt in chosen)
        with Journal(work, run.rank) as journal, run.bar(total, self.title) as bar:
            for prompt in chosen:
                requests = requests_of(prompt, prompt.seed(suite.name))
                if "scores" in journal.found.get(prompt.id, {}):  # what failed is tried again
                    bar.update(len(requests))
                    continue
                try:
                    self._paint(requests, work / "pictures" / prompt.id, run, bar)
                except (UserError, ValueError, RuntimeError) as error:
                    reason = next(iter(str(error).splitlines()), type(error).__name__)[:300].rstrip(".")
                    journal.add(prompt.id, {"error": f"it could not be drawn again: {reason}"})
                    continue
                folder = work / "pictures" / prompt.id
                pictures = {name: np.asarray(Image.open(folder / f"{name}.png").convert("RGB")) for name in requests}
                journal.add(prompt.id, self.compared(prompt, pictures))
                run.check()

    def result(self, suite: Suite, images: list[Drawn], work: Path) -> ScoreResult:
        found, prompts = dict(read_journals(work)), by_id(suite.prompts)
        chosen = [prompt.id for prompt in suite.first(self.prompts).prompts]
        present = {image.prompt for image in images if image.name == image.prompt}
        removals: list[Removal] = []
        scores = []
        still = 0
        for name in chosen:
            parts = sentences(prompts[name].text)
            if len(parts) < 2 or name not in present:
                continue
            record = found.get(name, {"error": "it was not looked at"})
            if "error" in record:
                worst = {one.name: one.worst for one in self._measures if one.worst is not None}
                weights = {measure: float(len(parts)) for measure in worst}
                scores.append(ImageScore(name, name, worst, weights, record["error"]))
                continue
            mine = removals_of(name, len(parts), record)
            removals += mine
            still += record["seed_change"] == 0
            scores.append(_image_score(name, mine))
        settings = {**self.settings(), "prompts": self.prompts}
        result = ScoreResult(
            self.name, self.title, _FORMULA, _SOURCE, settings, list(self._measures), scores,
            tables=list(tables(removals, self.judge.exact)),
        )  # fmt: skip
        self._warn(result, [prompts[name] for name in chosen], len(suite.prompts))
        if still:
            result.warnings.append(f"Of {still} prompts another seed gave the very same picture: their change has no scale.")
        return result

    def _warn(self, result: ScoreResult, chosen: Sequence[SuitePrompt], total: int) -> None:
        counts = [len(sentences(prompt.text)) for prompt in chosen]
        if single := sum(count < 2 for count in counts):
            result.warnings.append(f"{single} prompts of a single sentence were left out: nothing of them would stay.")
        if long := sum(count > LIMIT for count in counts):
            result.warnings.append(f"Of {long} prompts with over {LIMIT} sentences, {LIMIT} were left out in turn.")
        if len(chosen) < total:
            result.warnings.append(f"Drawn for {len(chosen)} of {total} prompts, spread evenly.")
        if single == len(counts):
            result.skipped = "no chosen prompt has more than one sentence; the counterfactual leaves one of several out."

    def _paint(self, requests: dict[str, Request], folder: Path, run: Run, bar: Any) -> None:
        """Draw what is not there yet; each picture is whole or not there."""
        folder.mkdir(parents=True, exist_ok=True)
        missing = [name for name in requests if not (folder / f"{name}.png").is_file()]
        bar.update(len(requests) - len(missing))
        for start in range(0, len(missing), AT_ONCE):
            names = missing[start : start + AT_ONCE]
            for name, picture in zip(names, self.painter([requests[name] for name in names]), strict=True):
                with atomic_file(folder / f"{name}.png") as partial:
                    Image.fromarray(np.asarray(picture)).save(partial, "png")
            bar.update(len(names))
            run.check()

    def compared(self, prompt: SuitePrompt, pictures: dict[str, np.ndarray]) -> dict[str, Any]:
        """What is kept of a prompt, from the pictures of ``requests_of``, uint8 [H, W, 3]: changes, and the scores of its sentences on all
        pictures, [pictures][sentences]."""
        parts = sentences(prompt.text)
        base = pictures["whole"]
        left_out = _left_out(len(parts))
        judged = {name: self.judge.judge(prompt, parts, picture) for name, picture in pictures.items()}
        return {
            "texts": parts,
            "left_out": left_out,
            "seed_change": _change(base, pictures["seed"]),
            "changes": [_change(base, pictures[f"without_{number}"]) for number in left_out],
            "kinds": self.judge.kinds(prompt, parts),
            "followed": [one and one.followed for one in judged["whole"]],
            "scores": {name: [one and one.score for one in found] for name, found in judged.items()},
        }


def _left_out(count: int) -> list[int]:
    return [number * count // min(count, LIMIT) for number in range(min(count, LIMIT))]


def requests_of(prompt: SuitePrompt, seed: int) -> dict[str, Request]:
    """By name: "whole", "seed" and "without_K". Sentences are joined by single spaces in all, so that nothing else differs."""
    parts = sentences(prompt.text)
    whole = " ".join(parts)
    requests = {"whole": Request(whole, seed, prompt.height, prompt.width), "seed": Request(whole, seed + 1, prompt.height, prompt.width)}
    for number in _left_out(len(parts)):
        text = " ".join(part for other, part in enumerate(parts) if other != number)
        requests[f"without_{number}"] = Request(text, seed, prompt.height, prompt.width)
    return requests


def _change(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference of pixel values in 0..1."""
    difference = np.abs(a.astype(np.float32) - b.astype(np.float32)).mean(-1) / 255  # [H, W]
    return float(difference.mean())


def _image_score(name: str, removals: Sequence[Removal]) -> ImageScore:
    """Sentences that cannot be judged (``matters`` is None) count where none can."""
    judged = [one for one in removals if one.matters is not None]
    changes = [one.change for one in judged or removals if one.change is not None]
    values: dict[str, float] = {}
    if judged:
        values["matters"] = float(np.mean([bool(one.matters) for one in judged]))
        values["drop"] = float(np.mean([one.drop for one in judged]))
    if changes:
        values["change"] = float(np.mean(changes))
        values["without_effect"] = float(np.mean([change < NOTHING for change in changes]))
    weights = {"matters": len(judged), "drop": len(judged), "change": len(changes), "without_effect": len(changes)}
    detail = [
        {
            "text": one.text, "position": one.position, "score": one.score, "followed": one.followed, "cut": False,
            "change": one.change, "drop": one.drop, "matters": one.matters,
        }
        for one in removals
    ]  # fmt: skip
    kept = {key: float(weight) for key, weight in weights.items() if key in values}
    return ImageScore(name, name, values, kept, detail={"sentences": detail})
