"""The sentence report: what sentences claim, planted faults found, recall by place, length and content; the scenes score."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from judged_scenes import Alone, Fault, pixels, planted_faults, put, scenes_suite
from training_runs import records

from paradiffusion.compose import compose_train
from paradiffusion.data.shards import write_shards
from paradiffusion.errors import UserError
from paradiffusion.evaluation.estimates import Estimate
from paradiffusion.evaluation.records import Drawn, Score, ScoreResult, Table
from paradiffusion.evaluation.scores.scenes_score import ScenesScore
from paradiffusion.evaluation.scores.segments import SegmentAlignment
from paradiffusion.evaluation.scores.sentence_judges import SceneJudge, place, third
from paradiffusion.evaluation.scores.sentence_report import SentenceReport
from paradiffusion.evaluation.suites.suite import Suite, SuitePrompt
from paradiffusion.metrics.sentences import sentences
from paradiffusion.models.codec import load_codec
from paradiffusion.scenes.alignment import sentence_recall, stage_table
from paradiffusion.scenes.dataset import captions, demo_samples, make_scene, scene_from_meta
from paradiffusion.scenes.judge import score, summarise
from paradiffusion.scenes.sentence_truth import claims, follow
from paradiffusion.scenes.world import Background, Scene, SceneObject
from paradiffusion.training.trainer import open_data
from paradiffusion.training.validation import read_held_out, reconstruct


def test_claims_are_what_captions_say() -> None:
    """Every object, size, texture, background and count that a caption states is read, and nothing that is not so."""
    for number in range(300):
        scene = make_scene("val", 1, number // 2, ("small", "large")[number % 2])
        objects = {(item.colour, item.shape): item for item in scene.objects}
        for kind, text in captions(scene, 1, number // 2).items():
            told = claims(sentences(text))
            mentions = [mention for claim in told for mention in claim.mentions]
            for one in mentions:
                item = objects[one.colour, one.shape]
                assert one.size in (None, item.size) and one.texture in (None, item.texture), text
            assert {claim.ground for claim in told} <= {None, scene.background.colour}
            assert {claim.pattern for claim in told} <= {None, scene.background.pattern}
            assert {claim.count for claim in told} <= {None, len(scene.objects)}
            if kind in ("long", "clean") and scene.grid == 2:  # of the grammar's forms only some are read
                for name, item in objects.items():
                    said = {(one.size, one.texture) for one in mentions if (one.colour, one.shape) == name}
                    assert item.size in [size for size, _ in said] and item.texture in [own for _, own in said], text
                assert scene.background.pattern in [claim.pattern for claim in told]


def test_claims_of_single_sentences() -> None:
    text = (
        "This wide picture shows two shapes on a plain navy background. In the upper left we find a pink disc, tiny in size. "
        "It has diagonal stripes. The composition is calm. The pink circle is above the red plus sign. It is set against a "
        "uniform navy background."
    )
    first, disc, it, idle, relation, ground = claims(sentences(text))
    assert (first.kind, first.count, first.ground, first.pattern) == ("background", 2, "navy", "plain")
    assert disc.kind == "object" and disc.names("pink", "circle") and disc.mentions[0].size == "small"
    assert it.kind == "attributes" and it.mentions[0].texture == "striped" and not it.mentions[0].named
    assert idle.kind == "" and idle.mentions == ()
    assert relation.kind == "relation" and relation.relation and relation.names("red", "cross")
    assert ground.kind == "background" and ground.mentions == ()  # "uniform" is here no texture of the last object


def test_true_pictures_fulfil_every_sentence() -> None:
    judged = right = 0
    for number in range(60):
        scene = make_scene("val", 2, number)
        for text in captions(scene, 2, number).values():
            found = [one for one in follow(scene, sentences(text), pixels(scene)) if one is not None]
            judged += len(found)
            right += sum(one.score == 1 for one in found)
    assert judged > 500 and right / judged >= 0.99


def planted(faults: list[Fault], show: Callable[[Scene], np.ndarray] = pixels) -> tuple[float, float]:
    """Shares of faults that are found: the sentence that introduces the object is among the lowest, and each of these
    speaks of that object; and of the faults of which one sentence alone speaks, those where it is the only lowest."""
    found, alone = [], []
    for fault in faults:
        parts = sentences(fault.text)
        scores = [None if one is None else one.score for one in follow(fault.scene, parts, show(fault.shown))]
        lowest = min(value for value in scores if value is not None)
        minimal = [number for number, value in enumerate(scores) if value == lowest]
        speaking = [n for n, one in enumerate(claims(parts)) if one.names(fault.item.colour, fault.item.shape)]
        found.append(speaking[0] in minimal and set(minimal) <= set(speaking))
        if len(speaking) == 1:
            alone.append(minimal == speaking)
    assert len(alone) > len(faults) / 4
    return float(np.mean(found)), float(np.mean(alone))


def test_planted_faults_score_lowest_on_their_own_sentence() -> None:
    faults = planted_faults(300)
    for kind in (True, False):
        found, alone = planted([fault for fault in faults if fault.recoloured is kind])
        assert found >= 0.95 and alone >= 0.95, (kind, found, alone)


def test_planted_faults_are_found_through_the_codec() -> None:
    """What the nano codec leaves of the pictures, the best that nano can draw: it washes out stripes and faint dots."""
    codec = load_codec(compose_train(["stage=1"]).codec)

    def rebuilt(scene: Scene) -> np.ndarray:
        return reconstruct(codec, pixels(scene), torch.device("cpu"))

    found, _ = planted(planted_faults(60), rebuilt)
    assert found >= 0.85


def one_object(**changes: object) -> Scene:
    item = SceneObject("circle", "red", "large", "plain", "top left", 16.0, 16.0, 14.5)
    return Scene(64, 64, Background("grey", "dots"), (replace(item, **changes),))  # type: ignore[arg-type]


def test_each_fact_is_seen_by_itself() -> None:
    scene = one_object()
    text = [
        "A large red circle in one solid colour is at the top left.", "It is large.", "The scene has a grey background with "
        "faint dots.", "A square drawing of one shape.", "Nothing else appears in the picture.",
    ]  # fmt: skip
    # Details count half: colour 1, shape 1, size 1/2, texture 1/2.
    for shown, expected in (
        (scene, [1, 1, 1, 1]),
        (one_object(texture="striped"), [2.5 / 3, 1, 1, 1]),
        (one_object(texture="outlined"), [2.5 / 3, 1, 1, 1]),
        (one_object(size="small", radius=8.75), [2.5 / 3, 1 / 1.5, 1, 1]),
        (one_object(colour="blue"), [0, 1, 1, 1]),  # a large blue circle is large
        (replace(scene, objects=()), [0, 0, 1, 1 / 1.5]),
        (replace(scene, background=Background("grey", "stripes")), [1, 1, 1 / 1.5, 1]),
        (replace(scene, background=Background("navy", "dots")), [1, 1, 0, 1]),
    ):
        found = follow(scene, text, pixels(shown))
        assert found[4] is None
        assert [one.score for one in found if one is not None] == pytest.approx(expected), shown
    assert facts_of(scene, text[0], one_object(shape="star")).score == pytest.approx(2 / 3)
    wrong = facts_of(scene, text[0], one_object(texture="striped"))
    assert wrong.followed and dict(wrong.facts)["texture"] == 0
    # Colour and shape hold, and the outline is a detail beside them; a sentence of nothing but the size says nothing else.
    assert facts_of(scene, "The red circle has a thick outline.", scene).followed
    assert not facts_of(scene, text[1], one_object(size="small", radius=8.75), before=text[:1]).followed
    # Relations need both objects.
    second = SceneObject("star", "blue", "medium", "plain", "bottom right", 48.0, 48.0, 11.5)
    two = replace(scene, objects=(*scene.objects, second))
    said = "The red circle is above and to the left of the blue star."
    right, half = facts_of(two, said, two), facts_of(two, said, scene)
    assert right.score == 1 and right.followed and ("relation", 1.0) in right.facts
    assert half.score == 0.5 and not half.followed and ("relation", 0.0) in half.facts


def facts_of(scene: Scene, sentence: str, shown: Scene, before: Sequence[str] = ()) -> Any:
    """What the last sentence of a text comes to on a picture of ``shown``."""
    return follow(scene, [*before, sentence], pixels(shown))[-1]


# --- the score over a suite ---


def cell(table: Table, row: str, column: int = 1) -> Estimate:
    found = next(one for one in table.rows if one[0] == row)[column]
    assert isinstance(found, Estimate)
    return found


def table(result: ScoreResult, beginning: str) -> Table:
    return next(one for one in result.tables if one.title.startswith(beginning))


def run(report: SentenceReport, suite: Suite, images: list[Drawn], work: Path) -> ScoreResult:
    report.prepare(suite, images, work, Alone())
    return report.result(suite, images, work)


def test_report_of_a_model_that_forgets_its_last_sentences(tmp_path: Path) -> None:
    """Pictures whose last named object is missing: recall falls with the place in the paragraph, and for objects only."""
    suite = scenes_suite(60)
    shown = []
    for prompt in suite.prompts:
        scene = scene_from_meta(prompt.meta["scene"])
        last = [claim for claim in claims(sentences(prompt.text)) if claim.kind == "object"][-1].mentions[-1]
        kept = tuple(item for item in scene.objects if (item.colour, item.shape) != (last.colour, last.shape))
        shown.append(pixels(replace(scene, objects=kept)))
    images = put(tmp_path / "images", suite, lambda number: shown[number])
    result = run(SentenceReport(SceneJudge()), suite, images, tmp_path / "scores" / "sentences")
    true = put(tmp_path / "true", suite, lambda number: pixels(make_scene("val", 0, number)))
    whole = run(SentenceReport(SceneJudge()), suite, true, tmp_path / "x" / "sentences")

    assert all(one.values["recall"] == 1 for one in whole.images if one.values)
    kinds = table(result, "Sentences followed, by what they say")
    # Backgrounds are all right; the sentences that speak of them are not, where they also say how many shapes there are.
    assert cell(kinds, "background").mean > 0.8 and cell(kinds, "object").mean < 0.75 and cell(kinds, "count").mean == 0
    assert kinds.rows[0][2] < 0.15  # chance: other scenes' pictures seldom show the same object at the same place
    assert cell(table(whole, "Sentences followed, by what they say"), "object").mean == 1
    weights = [one.weights["recall"] for one in result.images]
    places = table(result, "Sentences followed, by place").rows
    assert sum(row[1].n for row in places) == sum(weights)  # every judged sentence is in one row
    followed = sum(row[1].mean * row[1].n for row in places)
    assert followed == pytest.approx(np.dot([one.values["recall"] for one in result.images], weights))
    facts = table(result, "Single facts")
    assert cell(facts, "background").mean == 1 and 0 < cell(facts, "colour at place").mean < 1
    for one in result.images:
        missed = [part for part in one.detail["sentences"] if part["followed"] is False]
        assert missed and all({"text", "score", "cut", "position", "facts"} <= set(part) for part in missed)
    assert {part.plot for part in result.tables} == {"bars", "lines"}
    assert [place(number) for number in (0, 1, 2, 3, 7, 8, 30)] == [
        "1st", "2nd", "3rd", "4th", "8th", "9th and later", "9th and later",
    ]  # fmt: skip
    thirds = [[third(number, count) for number in range(count)] for count in (1, 2, 4)]
    first, middle, last_third = "first third", "middle third", "last third"
    assert thirds == [[middle], [first, last_third], [first, middle, middle, last_third]]


def test_images_that_failed_count_as_not_followed(tmp_path: Path) -> None:
    suite = scenes_suite(12)
    images = put(tmp_path / "images", suite, lambda number: pixels(make_scene("val", 0, number)))
    images[2].file.write_bytes(b"no picture")
    images[5] = replace(images[5], file=tmp_path / "gone.png", error="the model refused it")
    result = run(SentenceReport(SceneJudge()), suite, images, tmp_path / "scores" / "sentences")
    assert [one.image for one in result.images if one.error] == ["scene-2", "scene-5"]
    assert result.images[5].error == "the model refused it" and "cannot be read" in result.images[2].error
    assert result.images[2].values == {"recall": 0, "facts": 0}
    judged = sum(claim.kind != "" for claim in claims(sentences(suite.prompts[2].text)))
    assert result.images[2].weights["recall"] == judged
    total = sum(one.weights["recall"] for one in result.images)
    rows = table(result, "Sentences followed, by third").rows
    assert sum(row[1].n for row in rows) == total
    lost = result.images[2].weights["recall"] + result.images[5].weights["recall"]
    assert sum(row[1].mean * row[1].n for row in rows) == pytest.approx(total - lost)
    with pytest.raises(UserError, match=r"has no ground truth .* clip="):
        run(SentenceReport(SceneJudge()), Suite("mine", "", (SuitePrompt("a", "A cat."),)), [replace(images[0],
            name="a", prompt="a")], tmp_path / "other" / "sentences")  # fmt: skip


def test_a_stopped_report_goes_on(tmp_path: Path) -> None:
    suite = scenes_suite(8)
    images = put(tmp_path / "images", suite, lambda number: pixels(make_scene("val", 0, number)))
    work = tmp_path / "scores" / "sentences"
    with pytest.raises(KeyboardInterrupt):
        SentenceReport(SceneJudge()).prepare(suite, images, work, Alone(stop_after=3))
    result = run(SentenceReport(SceneJudge()), suite, images, work)
    assert not any(one.error for one in result.images)
    lines = (work / "journal.rank0.jsonl").read_text().splitlines()
    assert [json.loads(line)["turn"] for line in lines] == [0] * 4 + [1] * 4, "what was seen is not looked at again"
    # Two processes, each its share, find the same.
    again = put(tmp_path / "images", suite, lambda number: pixels(make_scene("val", 0, number)))
    shared = tmp_path / "two" / "sentences"
    for rank in (0, 1):
        SentenceReport(SceneJudge()).prepare(suite, again[rank::2], shared, Alone(rank, 2))
    assert SentenceReport(SceneJudge()).result(suite, again, shared).images == result.images


# --- the scenes score ---


def test_scenes_score_is_that_of_score_scenes(tmp_path: Path) -> None:
    """The same shares as ``scenes.summarise``, which scripts/score_scenes.py prints, on the same pictures."""
    suite = scenes_suite(40)
    scenes = [scene_from_meta(prompt.meta["scene"]) for prompt in suite.prompts]
    shown = [pixels(make_scene("val", 0, number + (number % 3 == 0))) for number in range(40)]
    images = put(tmp_path / "images", suite, lambda number: shown[number])
    judge = ScenesScore()
    judge.prepare(suite, images, tmp_path / "scenes", Alone())
    result = judge.result(suite, images, tmp_path / "scenes")
    expected = summarise([score(scene, picture) for scene, picture in zip(scenes, shown, strict=True)])
    for name, share in expected.items():
        weights = [one.weights.get(name, 0.0) for one in result.images]
        found = np.dot([one.values.get(name, 0.0) for one in result.images], weights) / sum(weights)
        assert found == pytest.approx(share.share) and (name == "binding" or sum(weights) == share.n)
    by_objects = table(result, "Scenes by their number").rows
    assert [row[0] for row in by_objects] == ["1", "2", "3", "4"]
    assert by_objects[0][2].mean == 1 > by_objects[1][2].mean > by_objects[3][2].mean > 0.25
    images[0].file.unlink()
    judge.prepare(suite, images, tmp_path / "again", Alone())
    failed = judge.result(suite, images, tmp_path / "again").images[0]
    assert failed.error and failed.weights["shape"] == len(scenes[0].objects)
    assert failed.values["colour_at_place"] == failed.values["all_right"] == 0 < failed.values["unbound"]
    without = summarise([replace(score(scenes[0], shown[0]), colour_at_place=0)])
    assert failed.values.get("binding") == (without["binding"].share if "binding" in without else None)


@pytest.mark.parametrize(
    "kind", [ScenesScore, lambda: SentenceReport(SceneJudge()), lambda: SegmentAlignment(SceneJudge())]
)
def test_a_picture_that_changed_is_looked_at_again(kind: Callable[[], Score], tmp_path: Path) -> None:
    suite = scenes_suite(4)
    images = put(tmp_path / "images", suite, lambda number: pixels(make_scene("val", 0, number)))
    judge, work = kind(), tmp_path / "work"

    def errors() -> list[bool]:
        judge.prepare(suite, images, work, Alone())
        return [bool(one.error) for one in judge.result(suite, images, work).images]

    assert errors() == [False] * 4
    whole = images[1].file.read_bytes()
    images[1].file.write_bytes(bytes(len(whole)))
    os.utime(images[1].file, ns=(1, 1))  # the clock of some file systems is coarse
    assert errors() == [False, True, False, False]
    images[1].file.unlink()
    assert errors() == [False, True, False, False]
    images[1].file.write_bytes(whole)
    assert errors() == [False] * 4


# --- the first numbers at validation ---


def test_recall_of_validation_is_the_report_s(tmp_path: Path) -> None:
    suite = scenes_suite(20)
    scenes = [scene_from_meta(prompt.meta["scene"]) for prompt in suite.prompts]
    shown = [pixels(replace(scene, objects=scene.objects[:-1])) for scene in scenes]
    found = sentence_recall([prompt.text for prompt in suite.prompts], scenes, shown)
    images = put(tmp_path / "images", suite, lambda number: shown[number])
    result = run(SentenceReport(SceneJudge(), others=0), suite, images, tmp_path / "scores" / "sentences")
    thirds = table(result, "Sentences followed, by third")
    for part in ("first", "middle", "last"):
        expected = cell(thirds, f"{part} third")
        assert (found[part]["share"], found[part]["n"]) == (pytest.approx(expected.mean), expected.n)
    assert found["all"]["n"] == sum(found[part]["n"] for part in ("first", "middle", "last"))
    assert 0 < found["all"]["low"] < found["all"]["share"] < found["all"]["high"] < 1


def test_training_logs_and_tells_alignment(
    train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = list(demo_samples("val", 8))
    for sample in held_out[:2]:
        del sample.meta["captions"]["unseen"]
    write_shards(iter(held_out), tmp_path / "val", 8)
    more = ("validation.scenes=5", "validation.unseen=7", "max_steps=4", "validate_every=2")
    assert train("stage=1", "validation.images=3", f"data.val_shards={tmp_path / 'val'}", *more) == 0
    folder = tmp_path / "run" / "stage1"
    for kind in ("validation", "alignment"):
        rows = records(folder, kind)
        assert rows and all(0 <= row["sentences_all"] <= 1 and "sentences_first" in row for row in rows)
    alignment = json.loads((folder / "summary.json").read_text())["alignment"]
    assert set(alignment["sentences"]) >= {"first", "last", "all"}
    assert {"share", "low", "high", "n"} == set(alignment["sentences"]["all"])

    scenes = [scene_from_meta(sample.meta) for sample in held_out]
    logged, printed = records(folder, "alignment")[0], capsys.readouterr().out
    # Two of the seven have no such caption.
    for name, prefix, members in (("drawn", "", scenes[:5]), ("unseen", "unseen_", scenes[2:7])):
        marks, found = summarise([score(scene, pixels(scene)) for scene in members]), alignment[name]
        assert found["unbound"] == pytest.approx(vars(marks["unbound"]))
        assert found["colour_at_place"]["n"] == sum(len(scene.objects) for scene in members)
        assert found["binding"]["share"] < marks["binding"].share == 1
        assert all(logged[prefix + measure] == one["share"] for measure, one in found.items())
        assert f"unbound {found['unbound']['share']:.1%}, binding {found['binding']['share']:.2f}" in printed
    tables = stage_table(tmp_path / "run")
    for row in ("stage 1 ", "stage 1, unseen words", "unbound (its colours at random)", "codec's", "true pictures"):
        assert f"\n| {row}" in tables
    assert "| colour at place, by objects" in tables


def test_the_kind_of_caption_that_validation_draws_from(tiny_arguments: list[str]) -> None:
    for kind in ("short", "clean", "nowhere"):
        config = compose_train([*tiny_arguments, "stage=1", f"validation.paragraph={kind}"])
        for number, item in enumerate(read_held_out(open_data(config)[1], config, 5)):
            written = captions(make_scene("val", 0, number), 0, number)
            longest = max(written.values(), key=lambda text: len(text.split()))
            assert item.paragraph == written.get(kind, longest) and item.unseen == written["unseen"]
