"""The playground: what it reads in a typed paragraph, draws, saves and refuses. Its page is tried in tests/browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, user_error
from official_models import make_ours
from PIL import Image

from paradiffusion.apps.playground import AppOptions, Playground, Settings, exactly_judged, sources_of
from paradiffusion.errors import UserError
from paradiffusion.metrics.sentences import sentences
from paradiffusion.scenes.captions import captions
from paradiffusion.scenes.drawing import draw
from paradiffusion.scenes.sentence_truth import follow, read_scene
from paradiffusion.scenes.world import COLOURS, Background, Scene, make_scene

TEXT = "A large red circle sits in the top left corner. Rain fell all night. The road was empty."


def scenes() -> Iterator[tuple[Scene, list[str]]]:
    """Scenes of both worlds, with the sentences of a clean caption."""
    for world in ("small", "large"):
        for number in range(5):
            scene = make_scene("small", 3, number, world)
            yield scene, sentences(captions(scene, 3, number)["clean"])


def test_a_sentence_is_judged_exactly_only_as_the_scene_itself_would() -> None:
    levels: list[str] = []
    for scene, parts in scenes():
        picture = np.asarray(draw(scene))
        found = exactly_judged(" ".join(parts), picture)
        truth = follow(scene, parts, picture)
        for one, true in zip(found, truth, strict=True):
            if one.level != "unknown":
                assert true is not None and true.followed and one.level == "followed", (scene, one)
                levels.append(one.level)
    assert len(levels) > 12


def test_no_sentence_is_followed_by_a_picture_in_other_colours() -> None:
    following = dict(zip(COLOURS, [*list(COLOURS)[1:], "red"], strict=True))
    judged = 0
    for scene, parts in scenes():
        ground = "white" if scene.background.colour != "white" else "navy"
        objects = tuple(replace(item, colour=following[item.colour]) for item in scene.objects)
        picture = np.asarray(draw(replace(scene, objects=objects, background=Background(ground, "plain"))))
        said = exactly_judged(" ".join(parts), picture)
        for one in said:
            if one.level != "unknown" and "count" not in one.notes[0]:
                judged += 1
                assert one.level != "followed", one
    assert judged > 12


@pytest.mark.parametrize(
    "text",
    [
        "A woman wears a red heart in the top left.",  # no word of the built-in scenes
        "A red circle is not in the top left corner.",
        "A red circle or a blue square is in the top left corner.",
        "A red circle is in the top left corner, above a blue square.",
        "A red circle is in the top left corner of the blue square in the bottom right.",
        "A red circle is to the left of a blue square.",
        "A red circle is in the top left corner. A red circle is in the bottom right corner.",
        "A red circle is in the top left corner. A blue square is in the top left corner.",
        "Two red circles are in the top left corner.",
    ],
)
def test_what_leaves_a_doubt_is_not_read(text: str) -> None:
    assert not any(read_scene(sentences(text), 64, 64)[1])


def test_places_of_nine_cells_and_two_objects_of_one_sentence_are_read() -> None:
    scene, exact = read_scene(["In the top left there is a red circle, and a small blue square is in the center."], 96, 96)
    assert exact == [True] and scene is not None and (scene.grid, scene.width) == (3, 96)
    assert [(one.colour, one.place, one.size) for one in scene.objects] == [("red", "top left", "medium"), ("blue", "centre", "small")]


def test_count_and_background_are_judged_where_every_object_is_known() -> None:
    known = "There is a red circle in the top left corner. The background is plain grey. We see three objects."
    assert read_scene(sentences(known), 64, 80)[1] == [True, True, True]
    more = "A blue square is at the top centre. A pink star lies to its right."
    assert read_scene(sentences(f"{known} {more}"), 64, 64)[1] == [True, False, False, True, False]


@pytest.fixture
def playground(tmp_path: Path, codec_folder: Path) -> Playground:
    make_ours(tmp_path / "step_000005", codec_folder)
    options = AppOptions(ckpt=str(tmp_path / "step_000005"), output_dir=str(tmp_path / "out"))
    return Playground(sources_of(options), tmp_path / "out", max_side=256, max_characters=200)


def test_pictures_are_judged_and_saved_with_their_settings(playground: Playground, tmp_path: Path) -> None:
    told: list[str] = []
    settings = Settings(seed=4, steps=2, guidance=2.0)
    first, second = playground.draw(TEXT, settings, 2, lambda share, what: told.append(what))
    assert "picture 2 of 2, step 2" in told and (second.settings.seed, len(first.sentences)) == (5, 3)
    assert [one.level for one in first.sentences[1:]] == ["unknown"] * 2 and first.sentences[0].level != "unknown"
    playground.judge_rest(first, lambda share, what: None)
    assert all(one.level != "unknown" and "changes by" in one.notes[-1] for one in first.sentences)
    before = len(told)
    without = playground.without(first, 1, lambda share, what: told.append(what))  # judging has drawn it
    assert len(told) == before and without.shape == first.pixels.shape
    folder = playground.finish()[0]
    assert folder.parent == tmp_path / "out" and (folder / "index.html").is_file()
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in rows] == [4, 5, 5, 4, 4, 4] and rows[0]["settings"]["steps"] == 2
    for row in rows:
        with Image.open(folder / row["file"]) as picture:
            assert (picture.info["prompt"], json.loads(picture.info["seed"])) == (row["prompt"], row["seed"])
            assert ("left_out" in picture.info) == (row["prompt"] != TEXT)
    with Image.open(folder / f"{first.name}.png") as picture:
        assert np.array_equal(np.asarray(picture), first.pixels)
    kept = [json.loads(line) for line in (folder / "sentences.jsonl").read_text().splitlines()]
    assert {row["name"]: row for row in kept}[first.name]["sentences"][1]["level"] == first.sentences[1].level
    [again] = playground.draw(TEXT, settings, 1, lambda share, what: None)
    assert np.array_equal(again.pixels, first.pixels) and again.name == "00006"


@pytest.mark.parametrize(
    ("text", "settings", "count"),
    [
        (" ", {}, 1),
        ("long " * 50, {}, 1),
        ("A cat.", {"height": 512}, 1),
        ("A cat.", {"width": 33}, 1),  # no multiple of what the model draws
        ("A cat.", {"steps": 0}, 1),
        ("A cat.", {"steps": 10_000}, 1),
        ("A cat.", {"guidance": -1.0}, 1),
        ("A cat.", {"seed": -1}, 1),
        ("A cat.", {}, 5),
    ],
)
def test_what_is_too_much_is_refused(playground: Playground, text: str, settings: dict[str, float], count: int) -> None:
    with pytest.raises(UserError):
        list(playground.draw(text, Settings(**settings), count, lambda share, what: None))  # type: ignore[arg-type]
    assert not list(playground.folder.rglob("*.png"))


def test_one_sentence_cannot_be_left_out(playground: Playground) -> None:
    [picture] = playground.draw("A cat.", Settings(steps=1), 1, lambda share, what: None)
    playground.judge_rest(picture, lambda share, what: None)
    assert picture.sentences[0].level == "unknown"
    with pytest.raises(UserError):
        playground.without(picture, 0, lambda share, what: None)


def test_models_that_cannot_be_played_with(tmp_path: Path) -> None:
    for options, word in (
        (AppOptions(ckpt="a", pipeline="b"), "exclude"),
        (AppOptions(ckpt=str(tmp_path)), str(tmp_path)),
        (AppOptions(compare=f"[{ROOT / 'data/nano'}]"), "two models"),
    ):
        user_error(word, sources_of, options)
