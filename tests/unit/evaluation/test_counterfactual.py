"""The counterfactual: followed sentences are told from ignored ones, for painters whose hearing is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from judged_scenes import Alone, Reader, put, scenes_suite
from sampling_models import TinyModels

from paradiffusion.errors import UserError
from paradiffusion.evaluation.records import Drawn, Painter, Request, ScoreResult, Table
from paradiffusion.evaluation.scores.counterfactual import LIMIT, Counterfactual, removals_of
from paradiffusion.evaluation.scores.sentence_judges import ClipJudge, NoJudge, SceneJudge
from paradiffusion.evaluation.suites.suite import Suite, SuitePrompt
from paradiffusion.metrics.sentences import sentences
from paradiffusion.sampling.pipeline import Job, generate
from paradiffusion.scenes.sentence_truth import Claim, claims


def drawn(suite: Suite, painter: Painter, folder: Path) -> list[Drawn]:
    requests = [Request(prompt.text, prompt.seed(suite.name), prompt.height, prompt.width) for prompt in suite.prompts]
    pictures = painter(requests)
    return put(folder, suite, lambda number: pictures[number])


def run(score: Counterfactual, suite: Suite, images: list[Drawn], work: Path) -> ScoreResult:
    score.prepare(suite, images, work, Alone())
    return score.result(suite, images, work)


def of_painter(painter: Painter, judge: Any, suite: Suite, folder: Path) -> ScoreResult:
    """The score of every prompt, whose pictures the same painter has painted."""
    images = drawn(suite, painter, folder / "images")
    return run(Counterfactual(painter, judge, len(suite.prompts)), suite, images, folder / "work")


def titled(result: ScoreResult, beginning: str) -> Table:
    return next(table for table in result.tables if table.title.startswith(beginning))


def area(heard: list[float], ignored: list[float]) -> float:
    """The area under the ROC curve: how often one that was heard has more than one that was ignored, ties half."""
    a, b = np.array(heard)[:, None], np.array(ignored)[None]
    return float(((a > b) + 0.5 * (a == b)).mean())


def said_once(result: ScoreResult, suite: Suite) -> list[tuple[dict[str, Any], int]]:
    """Sentences that place an object which no other sentence places too, and the number of words up to their end."""
    texts = {prompt.id: prompt.text for prompt in suite.prompts}
    placing = {name: [one for one in claims(sentences(text)) if one.kind == "object"] for name, text in texts.items()}
    owner = {id(part): one.prompt for one in result.images for part in one.detail["sentences"]}

    def others(detail: dict[str, Any], claim: Claim) -> bool:
        told = [one for one in placing[owner[id(detail)]] if one != claim]
        return any(one.names(item.colour, item.shape) for one in told for item in claim.mentions)

    found = parts_of(result, suite)
    return [(detail, end) for detail, claim, end in found if claim.kind == "object" and not others(detail, claim)]


def parts_of(result: ScoreResult, suite: Suite) -> list[tuple[dict[str, Any], Claim, int]]:
    """Each sentence's detail, its claim, and the number of words up to its end."""
    texts = {prompt.id: prompt.text for prompt in suite.prompts}
    found = []
    for one in result.images:
        parts = sentences(texts[one.prompt])
        ends = np.cumsum([len(part.split()) for part in parts])
        for detail in one.detail["sentences"]:
            found.append((detail, claims(parts)[detail["position"]], int(ends[detail["position"]])))
    return found


def test_a_painter_that_is_deaf_to_backgrounds(tmp_path: Path) -> None:
    suite = scenes_suite(24)
    result = of_painter(Reader(deaf=lambda claim: claim.ground is not None), SceneJudge(), suite, tmp_path)
    heard = [detail for detail, _ in said_once(result, suite)]
    ignored = [detail for detail, claim, _ in parts_of(result, suite) if claim.kind == "background"]
    assert len(heard) > 24 and len(ignored) >= 24
    for value in ("drop", "change"):
        assert area([one[value] for one in heard], [one[value] for one in ignored]) >= 0.99
    assert not any(one["matters"] for one in ignored) and np.mean([one["matters"] for one in heard]) >= 0.95
    assert all(one["change"] == 0 for one in ignored)
    shares = {row[0]: row[1].mean for row in titled(result, "Sentences that matter, by what they say").rows}
    assert shares["background"] == 0 and shares["object"] >= 0.95
    change = {row[0]: row[1] for row in titled(result, "How much a sentence changes").rows}
    assert change["a sentence that nothing can show"].mean == 0 and change["another seed"] == 1


def test_a_painter_that_reads_the_first_words_only(tmp_path: Path) -> None:
    suite = scenes_suite(30)
    result = of_painter(Reader(words=30), SceneJudge(), suite, tmp_path)
    objects = said_once(result, suite)
    heard = [detail for detail, end in objects if end <= 30]
    ignored = [detail for detail, end in objects if end - len(detail["text"].split()) >= 30]
    assert len(heard) >= 15 and len(ignored) >= 10
    assert area([one["drop"] for one in heard], [one["drop"] for one in ignored]) >= 0.95
    assert np.mean([one["matters"] for one in heard]) > 0.9 > 0.1 > np.mean([one["matters"] for one in ignored])
    places = titled(result, "Sentences that matter, by place")
    assert places.rows[0][1].mean > 0.25 and places.rows[-1][1].mean < 0.15
    beside = titled(result, "Beside")
    assert [row[0] for row in beside.rows] == ["followed", "not followed"]
    assert beside.rows[0][1].mean > 0.5 > 0.3 > beside.rows[1][1].mean  # what is followed in part can still lose that


def test_without_a_judge_the_picture_itself_tells(tmp_path: Path) -> None:
    """What a suite without truth and without CLIP still gets: sentences whose removal leaves the picture as it is."""
    suite = scenes_suite(12)
    result = of_painter(Reader(words=30), NoJudge(), suite, tmp_path)
    assert [measure.name for measure in result.measures] == ["without_effect", "change"]
    # Where another seed paints the same picture a change has no scale.
    parts = [part for part in parts_of(result, suite) if part[0]["change"] is not None]
    beyond = [detail["change"] for detail, _, end in parts if end - len(detail["text"].split()) >= 30]
    heard = [detail["change"] for detail, claim, end in parts if end <= 30 and claim.kind == "object"]
    assert len(beyond) > 10 and area(heard, beyond) >= 0.95 and not any(beyond)
    known = [one for one in result.images if one.values]
    still = [sum(part["change"] < 0.05 for part in one.detail["sentences"]) for one in known]
    assert [one.values["without_effect"] * one.weights["without_effect"] for one in known] == pytest.approx(still)
    assert len(result.tables) == 2 and result.tables[1].rows[0][0] == "a sentence"


def test_a_sentence_matters_above_the_noise() -> None:
    def removals(whole: float, without: list[list[float]]) -> list[bool | None]:
        count = len(without)
        record = {
            "texts": ["a"] * count, "left_out": list(range(count)), "seed_change": 0.2, "changes": [0.1] * count,
            "kinds": [""] * count, "followed": [None] * count,
            "scores": {"whole": [whole] * count, **{f"without_{n}": row for n, row in enumerate(without)}},
        }  # fmt: skip
        found = removals_of("p", count, record)
        assert all(one.change == pytest.approx(0.5) for one in found)
        return [one.matters for one in found]

    # Sentence 0 falls from 1 to 0.6 without itself, and by 0.1 without another; 1 falls by 0.2 to 0.1; 2 rises.
    assert removals(1, [[0.6, 0.9, 0.9], [0.9, 0.8, 1.0], [0.9, 0.9, 1.3]]) == [True, False, False]
    rng = np.random.Generator(np.random.PCG64(0))
    noise = [removals(float(rng.normal()), rng.normal(size=(6, 6)).tolist()) for _ in range(500)]
    assert np.mean(noise) < 0.08  # of sentences that change nothing, what passes as noise does


def test_a_stopped_counterfactual_paints_nothing_twice(tmp_path: Path) -> None:
    suite, painter = scenes_suite(6), Reader()
    images = drawn(suite, painter, tmp_path / "i")
    whole = run(Counterfactual(Reader(), SceneJudge(), 4), suite, images, tmp_path / "whole")
    painter.asked.clear()
    score = Counterfactual(painter, SceneJudge(), 4)
    # So that more prompts go on from fewer.
    assert score.settings() == Counterfactual(painter, SceneJudge(), 2).settings()
    with pytest.raises(KeyboardInterrupt):
        score.prepare(suite, images, tmp_path / "w", Alone(stop_after=3))
    before = len(painter.asked)
    again = Alone()
    score.prepare(suite, images, tmp_path / "w", again)
    expected = sum(len(sentences(prompt.text)) + 2 for prompt in suite.first(4).prompts)
    assert 0 < before < len(painter.asked) == expected == again.bars[0].count
    assert score.result(suite, images, tmp_path / "w") == whole
    for rank in (0, 1):  # and two processes find the same
        Counterfactual(painter, SceneJudge(), 4).prepare(suite, images[rank::2], tmp_path / "two", Alone(rank, 2))
    assert score.result(suite, images, tmp_path / "two") == whole
    assert "4 of 6 prompts" in " ".join(whole.warnings) and len(whole.images) == 4


class Broken:
    """Refuses one prompt."""

    def __init__(self, word: str) -> None:
        self.word = word
        self.painter = Reader()

    def __call__(self, requests: list[Request]) -> list[np.ndarray]:
        if any(self.word in request.text for request in requests):
            raise UserError("a height of 40 is not a multiple of 16; choose another.")
        return self.painter(requests)


def test_prompts_that_cannot_be_painted_or_have_one_sentence(tmp_path: Path) -> None:
    scenes = scenes_suite(3).prompts
    first = scenes[0]
    single = SuitePrompt("single", sentences(first.text)[0], "", 64, 64, meta=first.meta)
    odd = SuitePrompt("odd", f"{scenes[1].text} Zebra.", "", 64, 64, meta=scenes[1].meta)
    suite = Suite("scenes", "", (first, single, odd, scenes[2]))
    images = drawn(suite, Reader(), tmp_path / "i")
    result = run(Counterfactual(Broken("Zebra"), SceneJudge(), 4), suite, images, tmp_path / "w")
    assert [one.prompt for one in result.images] == [first.id, "odd", scenes[2].id]
    failed = result.images[1]
    assert "not a multiple of 16" in failed.error and failed.values == {"matters": 0, "without_effect": 1}
    assert any(sentence.startswith("1 prompts of a single sentence") for sentence in result.warnings)
    mended = Counterfactual(Reader(), SceneJudge(), 4)
    assert run(mended, Suite("scenes", "", (single,)), images[1:2], tmp_path / "a").skipped
    # The same command tries a failed prompt again, also where the second of two processes failed and one alone tries again.
    for rank in (0, 1):
        share = images[1 - rank :: 2]
        Counterfactual(Broken("Zebra"), SceneJudge(), 4).prepare(suite, share, tmp_path / "t", Alone(rank, 2))
    for work in ("w", "t"):
        assert not any(one.error for one in run(mended, suite, images, tmp_path / work).images)
    with pytest.raises(UserError, match="counterfactual=0"):
        Counterfactual(Reader(), SceneJudge(), 0)


class CheckpointPainter:
    """A random model through the sampler; ``asked`` counts pictures."""

    def __init__(self) -> None:
        self.models = TinyModels()
        self.asked = 0

    def __call__(self, requests: list[Request]) -> list[np.ndarray]:
        self.asked += len(requests)
        jobs = [Job(str(n), one.text, one.seed, one.height or 32, one.width or 32, self.models.sampler) for n, one in enumerate(requests)]
        found = dict((int(job.name), image) for job, image in generate(self.models, jobs, 4))
        return [found[number] for number in range(len(requests))]


def test_a_model_judged_by_clip(clip_folder: Path, tmp_path: Path) -> None:
    """A random U-Net and a random CLIP: every number is there, and long prompts are limited."""
    long = " ".join(f"Thing {word} is here." for word in ("red", "big", "old", "new", "far", "odd") * 3)
    suite = Suite("mine", "", (SuitePrompt("a", "A cat sits. A dog runs. It rains."), SuitePrompt("b", long)))
    painter = CheckpointPainter()
    result = of_painter(painter, ClipJudge(str(clip_folder)), suite, tmp_path)
    assert painter.asked == 2 + (3 + 2) + (LIMIT + 2)
    assert [len(one.detail["sentences"]) for one in result.images] == [3, LIMIT]
    for one in result.images:
        assert set(one.values) == {"matters", "drop", "change", "without_effect"}
        assert one.weights["change"] == len(one.detail["sentences"]) and 0 < one.values["change"] < 3
    assert f"Of 1 prompts with over {LIMIT} sentences" in " ".join(result.warnings)
    noise = titled(result, "How much a sentence changes")
    assert noise.rows[0][1].mean > 0 and noise.rows[-1] == ["another seed", 1.0]
    # "red" is among the first 16 words that this model reads, the last sentences are not: leaving them out changes nothing.
    changes = {part["position"]: part["change"] for part in result.images[1].detail["sentences"]}
    assert changes[0] > 0 and changes[max(changes)] == 0
    assert sorted(path.name for path in (tmp_path / "work" / "pictures" / "a").iterdir())[-1] == "without_2.png"
