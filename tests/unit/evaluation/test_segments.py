"""Segment alignment: the right picture is ranked first by a judge that knows the truth; CLIP's mechanics; what is cut."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from judged_scenes import Alone, pixels, put, scenes_suite
from PIL import Image
from tiny_clip import CONTEXT, write_clip

from paradiffusion.evaluation.records import Drawn, ScoreResult
from paradiffusion.evaluation.scores.segments import SegmentAlignment, words_read
from paradiffusion.evaluation.scores.sentence_judges import (
    ClipJudge,
    Judgement,
    SceneJudge,
    SentenceRow,
)
from paradiffusion.evaluation.scores.sentence_report import SentenceReport
from paradiffusion.evaluation.suites.suite import Suite, SuitePrompt
from paradiffusion.metrics.sentences import sentences
from paradiffusion.scenes.dataset import make_scene


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("judge") / "clip")


def test_truth_ranks_the_right_picture_first(tmp_path: Path) -> None:
    suite = scenes_suite(24)
    images = put(tmp_path / "images", suite, lambda number: pixels(make_scene("val", 0, number)))
    right = judged(SceneJudge(), suite, images, tmp_path / "right" / "segments", others=8)
    assert np.mean([one.values["mean"] for one in right.images]) >= 0.99
    assert np.mean([one.values["percentile"] for one in right.images]) >= 0.9
    shifted = put(tmp_path / "wrong", suite, lambda number: pixels(make_scene("val", 0, (number + 1) % 24)))
    wrong = judged(SceneJudge(), suite, shifted, tmp_path / "other" / "segments", others=8)
    assert np.mean([one.values["mean"] for one in wrong.images]) < 0.5
    assert np.mean([one.values["percentile"] for one in wrong.images]) < 0.65
    first = [np.mean([one.values["first"] for one in result.images]) for result in (right, wrong)]
    assert first[0] > 3 * first[1]


@pytest.mark.parametrize(
    ("own", "others", "first", "percentile"),
    [(2, [1, 0, 1], 1, 1), (1, [1, 0, 2], 0, 0.5), (1, [1, 0], 0.5, 0.75), (1, [1, 1, 1], 0.25, 0.5), (0, [1], 0, 0)],
)
def test_rank_counts_ties_half(own: float, others: list[float], first: float, percentile: float) -> None:
    row = SentenceRow("", 0, 1, Judgement(own), np.array(others))
    assert (row.first(), row.percentile()) == (first, percentile)


TEXTS = (
    "A red kite flies. It is high.",
    "A blue boat. " + "Its long sails are full of wind on this bright and early morning by the quiet sea. " * 2,
    "A green hill. It is high.",
    "One yellow lamp.",
)


def small_suite(folder: Path, per_prompt: int = 1) -> tuple[Suite, list[Drawn]]:
    """Four prompts; the pictures are noise."""
    suite = Suite("mine", "Mine", tuple(SuitePrompt(f"p{n}", text) for n, text in enumerate(TEXTS)))
    folder.mkdir(parents=True)
    images = []
    for prompt in suite.prompts:
        for number in range(per_prompt):
            name = f"{prompt.id}_{number}" if number else prompt.id
            noise = np.random.Generator(np.random.PCG64(len(images))).integers(0, 256, (40, 40, 3))
            Image.fromarray(noise.astype(np.uint8)).save(folder / f"{name}.png")
            images.append(Drawn(name, prompt.id, folder / f"{name}.png"))
    return suite, images


def test_clip_numbers_are_its_cosines(tmp_path: Path, clip_folder: Path) -> None:
    suite, images = small_suite(tmp_path / "images", per_prompt=2)
    images[4].file.unlink()
    score = SegmentAlignment(str(clip_folder))
    work = tmp_path / "scores" / "segments"
    for rank in (0, 1):
        score.prepare(suite, images[rank::2], work, Alone(rank, 2))
    result = SegmentAlignment(str(clip_folder)).result(suite, images, work)

    judge = ClipJudge(str(clip_folder))
    cosines = {}  # by sentence and image
    for prompt in suite.prompts:
        for text in sentences(prompt.text):
            for image in images:
                if image is not images[4]:
                    picture = np.asarray(Image.open(image.file))
                    cosines[text, image.name] = judge.judge(prompt, [text], picture)[0].score  # type: ignore[union-attr]
    for prompt, image in zip([p for p in suite.prompts for _ in range(2)], images, strict=True):
        found = next(one for one in result.images if one.image == image.name)
        if image is images[4]:
            assert "cannot be read" in found.error
            assert found.values == {measure.name: measure.worst for measure in result.measures}
            continue
        own = [cosines[text, image.name] for text in sentences(prompt.text)]
        assert found.values["mean"] == pytest.approx(np.mean(own), abs=1e-5)
        assert found.values["minimum"] == pytest.approx(min(own), abs=1e-5)
        turn = "_1" if image.name.endswith("_1") else ""
        wins = []
        for text in sentences(prompt.text):
            # Not images of the same sentence, nor of another number, nor the one that is missing.
            rivals = [
                cosines[text, other.id + turn]
                for other in suite.prompts
                if text not in sentences(other.text) and (text, other.id + turn) in cosines
            ]
            wins.append(cosines[text, image.name] > max(rivals))
        assert found.values["first"] == pytest.approx(np.mean(wins))
        assert found.weights["first"] == len(own)
        assert [part["text"] for part in found.detail["sentences"]] == sentences(prompt.text)
    assert result.settings["weights"] and result.measures[-1].title.endswith(f"first {CONTEXT} tokens")


def test_what_is_cut_is_told(tmp_path: Path, clip_folder: Path) -> None:
    """CLIP's tokeniser has one token for each of these words, and two for the ends."""
    suite, images = small_suite(tmp_path / "images")
    result = judged(str(clip_folder), suite, images, tmp_path / "scores" / "segments")
    clip = ClipJudge(str(clip_folder)).clip
    assert words_read(clip, ["one two three", "a " * 40, ""]) == [3, CONTEXT - 2, 0]
    table = next(one for one in result.tables if one.title == f"What {CONTEXT} tokens leave out")
    read = words_read(clip, list(TEXTS))
    assert [one < len(text.split()) for one, text in zip(read, TEXTS, strict=True)] == [False, True, False, False]
    assert table.rows[0][1].mean == 0.25  # prompts
    total = sum(len(text.split()) for text in TEXTS)
    assert table.rows[1][1].mean == pytest.approx(1 - sum(read) / total) and table.rows[1][1].n == total
    assert table.rows[2][1].mean == pytest.approx(2 / 8)  # sentences
    cut = [part["cut"] for one in result.images for part in one.detail["sentences"]]
    assert cut == [False, False, False, True, True, False, False, False]
    assert any("25%" in sentence for sentence in result.warnings)


def test_a_failure_is_not_better_than_a_picture(tmp_path: Path, clip_folder: Path) -> None:
    suite, images = small_suite(tmp_path / "images")
    images[3].file.unlink()
    work = tmp_path / "scores" / "segments"
    result = judged(str(clip_folder), suite, images, work)
    lowest = min(part["score"] for one in result.images[:3] for part in one.detail["sentences"])
    assert lowest < 0, "so that 0 would be no failure"
    failed = result.images[3].values
    assert failed["mean"] == failed["minimum"] == lowest and failed["first"] == failed["percentile"] == 0
    assert failed["whole"] == min(0, *(one.values["whole"] for one in result.images[:3]))
    assert {one.name: one.worst for one in result.measures} == failed
    alone, own = Suite("mine", "Mine", suite.prompts[:1]), [images[0], Drawn("p0_1", "p0", tmp_path / "none.png")]
    result = SegmentAlignment(str(clip_folder)).result(
        alone, own, work
    )  # of one prompt there is no retrieval to fail at
    assert [one.name for one in result.measures] == ["mean", "minimum", "whole"]
    assert not any("first" in one.values for one in result.images) and "not computed" in result.warnings[0]


def test_features_are_shared_and_kept(tmp_path: Path, clip_folder: Path) -> None:
    """Two scores look at the pictures once; another model looks again; a picture drawn anew is looked at again."""
    suite, images = small_suite(tmp_path / "images")
    scores = tmp_path / "scores"
    before = judged(str(clip_folder), suite, images, scores / "segments").images[0].values
    kept = sorted(scores.rglob("features.*"))
    report = SentenceReport(ClipJudge(str(clip_folder)))
    report.prepare(suite, images, scores / "sentences", Alone())
    assert "at least 10 other prompts' pictures" in report.result(suite, images, scores / "sentences").skipped
    assert kept and sorted(scores.rglob("features.*")) == kept
    Image.fromarray(np.zeros((50, 50, 3), np.uint8)).save(images[0].file)
    assert judged(str(clip_folder), suite, images, scores / "segments").images[0].values["mean"] != before["mean"]
    judged(str(shutil.copytree(clip_folder, tmp_path / "another")), suite, images, scores / "segments")
    assert len({path.parent for path in scores.rglob("features.*")}) == 2


def test_sentence_report_by_clip_is_an_estimate(tmp_path: Path, clip_folder: Path) -> None:
    suite, work = scenes_suite(40), tmp_path / "scores" / "sentences"
    images = put(tmp_path / "images", suite, lambda number: pixels(make_scene("val", 0, number)))
    images[3] = replace(images[3], error="refused")
    report = SentenceReport(ClipJudge(str(clip_folder)))
    report.prepare(suite, images, work, Alone())
    result = report.result(suite, images, work)
    assert "estimated" in result.title and any("estimate" in sentence for sentence in result.warnings)
    told = [part for one in result.images if not one.error for part in one.detail["sentences"]]
    assert {part["followed"] for part in told} == {True, False}
    assert all((part["percentile"] > 0.9) == part["followed"] for part in told if part["followed"] is not None)
    weights = [one.weights["recall"] for one in result.images]
    recall = np.dot([one.values["recall"] for one in result.images], weights) / sum(weights)
    assert 0.02 < recall < 0.25  # random weights: about the tenth that chance reaches
    assert result.images[3].error == "refused" and result.images[3].values == {"recall": 0}
    assert not any("say" in one.title for one in result.tables)  # it does not know what sentences are about


def judged(judge: str | SceneJudge, suite: Suite, images: list[Drawn], work: Path, **more: int) -> ScoreResult:
    score = SegmentAlignment(judge, **more)
    score.prepare(suite, images, work, Alone())
    return score.result(suite, images, work)
