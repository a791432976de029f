"""Sentences and pictures: claims, planted faults, the report by place, length and content; segment alignment; the scenes score."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from judged_scenes import Alone, Fault, pixels, planted_faults, put, scenes_suite
from PIL import Image
from tiny_clip import CONTEXT
from training_runs import records

from paradiffusion.compose import compose_train
from paradiffusion.data.shards import write_shards
from paradiffusion.errors import UserError
from paradiffusion.evaluation.estimates import Estimate
from paradiffusion.evaluation.records import Drawn, Score, ScoreResult, Table
from paradiffusion.evaluation.scores.scenes_score import ScenesScore
from paradiffusion.evaluation.scores.segments import SegmentAlignment, words_read
from paradiffusion.evaluation.scores.sentence_judges import ClipJudge, Judgement, SceneJudge, SentenceJudge, SentenceRow, place, third
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


def test_planted_faults_score_lowest_on_their_own_sentence_also_through_the_codec() -> None:
    faults = planted_faults(300)
    for kind in (True, False):
        found, alone = planted([fault for fault in faults if fault.recoloured is kind])
        assert found >= 0.95 and alone >= 0.95, (kind, found, alone)

    # What the nano codec leaves of the pictures, the best that nano can draw: it washes out stripes and faint dots.
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


@pytest.mark.parametrize("kind", [ScenesScore, lambda: SentenceReport(SceneJudge()), lambda: SegmentAlignment(SceneJudge())])
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


def test_training_logs_and_tells_alignment(train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    score = SegmentAlignment(ClipJudge(str(clip_folder)))
    work = tmp_path / "scores" / "segments"
    for rank in (0, 1):
        score.prepare(suite, images[rank::2], work, Alone(rank, 2))
    result = SegmentAlignment(ClipJudge(str(clip_folder))).result(suite, images, work)

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
    result = judged(ClipJudge(str(clip_folder)), suite, images, tmp_path / "scores" / "segments")
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
    result = judged(ClipJudge(str(clip_folder)), suite, images, work)
    lowest = min(part["score"] for one in result.images[:3] for part in one.detail["sentences"])
    assert lowest < 0, "so that 0 would be no failure"
    failed = result.images[3].values
    assert failed["mean"] == failed["minimum"] == lowest and failed["first"] == failed["percentile"] == 0
    assert failed["whole"] == min(0, *(one.values["whole"] for one in result.images[:3]))
    assert {one.name: one.worst for one in result.measures} == failed
    alone, own = Suite("mine", "Mine", suite.prompts[:1]), [images[0], Drawn("p0_1", "p0", tmp_path / "none.png")]
    result = SegmentAlignment(ClipJudge(str(clip_folder))).result(alone, own, work)  # of one prompt there is no retrieval to fail at
    assert [one.name for one in result.measures] == ["mean", "minimum", "whole"]
    assert not any("first" in one.values for one in result.images) and "not computed" in result.warnings[0]


def test_features_are_shared_and_kept(tmp_path: Path, clip_folder: Path) -> None:
    """Two scores look at the pictures once; another model looks again; a picture drawn anew is looked at again."""
    suite, images = small_suite(tmp_path / "images")
    scores = tmp_path / "scores"
    before = judged(ClipJudge(str(clip_folder)), suite, images, scores / "segments").images[0].values
    kept = sorted(scores.rglob("features.*"))
    report = SentenceReport(ClipJudge(str(clip_folder)))
    report.prepare(suite, images, scores / "sentences", Alone())
    assert "at least 10 other prompts' pictures" in report.result(suite, images, scores / "sentences").skipped
    assert kept and sorted(scores.rglob("features.*")) == kept
    Image.fromarray(np.zeros((50, 50, 3), np.uint8)).save(images[0].file)
    assert judged(ClipJudge(str(clip_folder)), suite, images, scores / "segments").images[0].values["mean"] != before["mean"]
    judged(ClipJudge(str(shutil.copytree(clip_folder, tmp_path / "another"))), suite, images, scores / "segments")
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


def judged(judge: SentenceJudge, suite: Suite, images: list[Drawn], work: Path, **more: int) -> ScoreResult:
    score = SegmentAlignment(judge, **more)
    score.prepare(suite, images, work, Alone())
    return score.result(suite, images, work)
