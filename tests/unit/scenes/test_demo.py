"""The built-in data set: scenes, drawings, captions, shards; and the judge: right on true pictures, strict where it must be."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import multiprocessing
import multiprocessing.process
import re
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, user_error, wait_for
from PIL import Image, ImageFilter

from paradiffusion.config import WORLDS
from paradiffusion.scenes.captions import SHAPE_WORDS
from paradiffusion.scenes.dataset import captions, demo_samples, draw, ensure_demo_data, make_scene, scene_to_meta
from paradiffusion.scenes.judge import SceneScore, by_objects, judge_picture, score, summarise, unbound
from paradiffusion.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    LARGE_SETS,
    NINE_PLACES,
    PLACES,
    SETS,
    SHAPES,
    Background,
    Scene,
    SceneObject,
    cell_box,
    is_held_out,
    places,
    scene_from_meta,
)
from scripts.make_demo_data import main as make_demo_data

SIZES_SMALL = {"web": 110, "val": 30}
# Of truth, captions, pixels and the judge's words.
HELD_OUT = [
    "cf383a6807f28aae7d38e80e85a10e16", "8e0d9d84be53b4d1d1ee9fc440faa2b1", "3158d5b24972e46ae90b160a7fdbfb82",
    "d3f6c3dca9e7862a6266867636bd78bb",
]  # fmt: skip


def scenes(set_name: str, count: int, world: str = "small") -> list[Scene]:
    return [make_scene(set_name, 0, number, world) for number in range(count)]


def test_scenes_are_functions_of_set_seed_and_number() -> None:
    assert make_scene("web", 3, 7) == make_scene("web", 3, 7)
    assert len({make_scene(name, seed, n) for name in SETS for seed in (0, 1) for n in range(20)}) == 160
    scene = make_scene("web", 3, 7)
    assert draw(scene).tobytes() == draw(scene).tobytes()
    user_error("'weh'.*web", make_scene, "weh", 0, 0)
    user_error("'huge'.*large", make_scene, "web", 0, 0, "huge")


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("set_name", list(SETS))
def test_objects_lie_in_the_cell_of_their_place_and_never_touch(set_name: str, world: str) -> None:
    rules = (SETS if world == "small" else LARGE_SETS)[set_name]
    base, grid = rules.base, rules.grid
    canvases = {(base, base), (base * 5 // 4, base * 3 // 4), (base * 3 // 4, base * 5 // 4)}
    drawn = scenes(set_name, 300, world)
    assert {(scene.width, scene.height) for scene in drawn} == (canvases if world == "small" else {(base, base)})
    assert {len(scene.objects) for scene in drawn} == set(range(1, grid * grid + 1))
    for scene in drawn:
        assert len({item.place for item in scene.objects}) == len(scene.objects)
        assert len({(item.shape, item.colour) for item in scene.objects}) == len(scene.objects)
        for item in scene.objects:
            x0, y0, x1, y1 = cell_box(item.place, scene.width, scene.height, grid)
            left, top, right, bottom = item.box
            assert x0 < left < right < x1 and y0 < top < bottom < y1


@pytest.mark.parametrize("world", WORLDS)
def test_training_and_validation_share_no_triple_but_every_pair(world: str) -> None:
    grid = 2 if world == "small" else 3
    trained = {
        (item.shape, item.colour, item.place)
        for name in ("web", "big", "small")
        for scene in scenes(name, 1500, world)
        for item in scene.objects
    }
    asked = {(item.shape, item.colour, item.place) for scene in scenes("val", 400, world) for item in scene.objects}
    assert not trained & asked
    assert all(is_held_out(*triple, grid) for triple in asked)
    assert not any(is_held_out(*triple, grid) for triple in trained)
    held = sum(is_held_out(*triple, grid) for triple in itertools.product(SHAPES, COLOURS, places(grid)))
    assert 0.08 < held / (len(SHAPES) * len(COLOURS) * grid * grid) < 0.18
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert {(t[first], t[second]) for t in asked} <= {(t[first], t[second]) for t in trained}
    assert {t[2] for t in asked} == set(places(grid)) and {t[0] for t in asked} == set(SHAPES)


def test_held_out_scenes_are_those_that_earlier_scores_were_measured_on() -> None:
    """Of commit 4daf0f7: truth, captions, pixels, and what the judge says of true pictures and of the next scene's."""
    found = [hashlib.sha256() for _ in range(4)]
    held_out = scenes("val", 100)
    pictures = [np.asarray(draw(scene)) for scene in held_out]
    for number, scene in enumerate(held_out):
        told = {kind: text for kind, text in captions(scene, 0, number).items() if kind in ("short", "long", "clean")}
        found[0].update(json.dumps(scene_to_meta(scene), sort_keys=True).encode())
        found[1].update(json.dumps(told, sort_keys=True).encode())
        found[2].update(pictures[number].tobytes())
        for shown in (number, (number + 1) % 100):
            found[3].update(repr(judge_picture(scene, pictures[shown])).encode())
    assert [one.hexdigest()[:32] for one in found] == HELD_OUT


def mentioned(text: str) -> set[tuple[str, str]]:
    """The (colour, shape) pairs that stand side by side in a caption."""
    words = {synonym: shape for shape, synonyms in SHAPE_WORDS.items() for synonym in synonyms}
    pattern = rf"\b({'|'.join(COLOURS)}) ({'|'.join(words)})\b"
    return {(colour, words[word]) for colour, word in re.findall(pattern, text.lower())}


@pytest.mark.parametrize("set_name", list(SETS))
def test_captions_keep_their_lengths_and_say_nothing_false(set_name: str) -> None:
    bounds = {"short": (5, 15), "long": (50, 150), "clean": (40, 90)}  # test_demo_forms.py reads the others
    for number, scene in enumerate(scenes(set_name, 300)):
        told = captions(scene, 0, number)
        shown = {(item.colour, item.shape) for item in scene.objects}
        for kind, (least, most) in bounds.items():
            text = told[kind]
            assert least <= len(text.split()) <= most, text
            assert "{" not in text and "  " not in text and ",," not in text
            assert mentioned(text) <= shown and mentioned(text), text
            assert set(re.findall(rf"\b({'|'.join(COLOURS)})\b", text.lower())) <= {colour for colour, _ in shown}, text
            assert set(re.findall(rf"\b({'|'.join(BACKGROUNDS)})\b", text.lower())) <= {scene.background.colour}, text
        for kind in ("long", "clean"):
            assert mentioned(told[kind]) == shown and scene.background.colour in told[kind]


def test_relative_places_agree_with_the_grid() -> None:
    words = {synonym: shape for shape, synonyms in SHAPE_WORDS.items() for synonym in synonyms}
    name = rf"({'|'.join(COLOURS)}) ({'|'.join(words)})"
    relation = r"((?:above|below)?(?: and )?(?:to the (?:left|right) of)?)"
    found = 0
    for number, scene in enumerate(scenes("big", 400)):
        places = {(item.colour, item.shape): divmod(PLACES.index(item.place), 2) for item in scene.objects}
        text = captions(scene, 0, number)["long"]
        for c1, s1, said, c2, s2 in re.findall(rf"[Tt]he {name} (?:is|lies|can be found) {relation} the {name}", text):
            row, column = (a - b for a, b in zip(places[c1, words[s1]], places[c2, words[s2]], strict=True))
            assert ("above" in said, "below" in said) == (row < 0, row > 0), text
            assert ("left" in said, "right" in said) == (column < 0, column > 0), text
            found += 1
    assert found > 50


def test_samples_hold_picture_and_truth() -> None:
    one, two = list(demo_samples("val", 2, seed=4))
    (again,) = demo_samples("val", 1, seed=4, first=1)
    assert one.key != two.key and again == two and two.extension == "png"
    scene = make_scene("val", 4, 1)
    assert scene_from_meta(two.meta) == scene and two.meta["captions"] == captions(scene, 4, 1)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(two.image))), np.asarray(draw(scene)))

    for name in SETS:
        for scene in [*scenes(name, 50), *scenes(name, 20, "large")]:
            assert scene_from_meta(json.loads(json.dumps(scene_to_meta(scene)))) == scene
    user_error("holds no scene", scene_from_meta, {"captions": {}, "width": 64, "height": 64})


def digests(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).digest() for path in files}


@pytest.fixture(scope="module", autouse=True)
def small_shards() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("paradiffusion.scenes.dataset.SAMPLES_PER_SHARD", 50)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of web and one of val, made by one process."""
    folder = tmp_path_factory.mktemp("demo") / "whole"
    ensure_demo_data(folder, SIZES_SMALL, 0, processes=1)
    return folder


def making(folder: Path) -> multiprocessing.process.BaseProcess:
    """A process of its own that makes the same, started."""
    process = multiprocessing.get_context("fork").Process(target=ensure_demo_data, args=(folder, SIZES_SMALL, 0, 1))
    process.start()
    return process


def test_the_bytes_do_not_depend_on_processes_and_a_second_call_does_nothing(whole: Path, tmp_path: Path) -> None:
    made = ensure_demo_data(tmp_path / "two", SIZES_SMALL, 0, processes=2)
    assert digests(tmp_path / "two") == digests(whole)
    assert sorted(path.name for path in made["web"].iterdir()) == ["000000.tar", "000001.tar", "000002.tar"]
    with tarfile.open(made["web"] / "000002.tar") as tar:
        assert len([name for name in tar.getnames() if name.endswith(".png")]) == 10
    before = (tmp_path / "two" / "demo.json").stat().st_mtime_ns
    assert ensure_demo_data(tmp_path / "two", SIZES_SMALL, 0) == made
    assert (tmp_path / "two" / "demo.json").stat().st_mtime_ns == before


def test_other_sizes_and_missing_shards_build_anew(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    ensure_demo_data(folder, {"val": 20}, 0)
    first = digests(folder)
    (folder / "val" / "000000.tar").unlink()
    ensure_demo_data(folder, {"val": 20}, 0)
    assert digests(folder) == first
    ensure_demo_data(folder, {"web": 10}, 0)
    assert set(digests(folder)) == {"web/000000.tar", "demo.json"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [".demo.lock", "demo"]

    ensure_demo_data(tmp_path / "more" / "demo", {"small": 3, "val": 2}, 0)
    before = (tmp_path / "more" / "demo" / "small" / "000000.tar").stat().st_mtime_ns
    assert list(ensure_demo_data(tmp_path / "more" / "demo", {"val": 2}, 0)) == ["val"]
    assert (tmp_path / "more" / "demo" / "small" / "000000.tar").stat().st_mtime_ns == before


def test_an_interrupted_build_goes_on_and_two_may_start_at_once(whole: Path, tmp_path: Path) -> None:
    process = making(tmp_path / "cut")
    first = tmp_path / ".cut.building" / "web" / "000000.tar"
    wait_for(first.exists, interval=0.001)
    process.kill()
    process.join()
    assert not (tmp_path / "cut").exists()
    written = first.stat().st_mtime_ns
    ensure_demo_data(tmp_path / "cut", SIZES_SMALL, 0)
    assert digests(tmp_path / "cut") == digests(whole)
    assert (tmp_path / "cut" / "web" / "000000.tar").stat().st_mtime_ns == written

    pair = [making(tmp_path / "demo") for _ in range(2)]
    for process in pair:
        process.join()
    assert [process.exitcode for process in pair] == [0, 0] and digests(tmp_path / "demo") == digests(whole)


def test_a_folder_of_others_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "photo.jpg").write_bytes(b"x")
    user_error("photo.jpg", ensure_demo_data, folder, {"val": 5}, 0)
    assert (folder / "photo.jpg").exists()
    for sizes in ({}, {"vall": 3}, {"val": 0}):
        user_error("Demo sizes", ensure_demo_data, tmp_path / "new", sizes, 0)
    user_error("cannot be made in .* choose another folder", ensure_demo_data, folder / "photo.jpg" / "demo", SIZES_SMALL, 0, processes=1)


def test_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--folder", str(tmp_path / "demo"), "--web", "12", "--big", "3", "--small", "0", "--val", "4"]
    assert make_demo_data(small) == 0 and "web: 12 pictures" in capsys.readouterr().out
    assert json.loads((tmp_path / "demo" / "demo.json").read_text())["sizes"] == {"web": 12, "big": 3, "val": 4}
    assert make_demo_data([*small, "--world", "large"]) == 0
    with tarfile.open(tmp_path / "demo" / "val" / "000000.tar") as tar:
        texts = [tar.extractfile(name) for name in tar.getnames() if name.endswith(".json")]
        assert [json.loads(text.read())["grid"] for text in texts if text] == [3] * 4
    user_error("'web': -1", make_demo_data, ["--web", "-1"])


def test_paragraphs_written_by_hand_hold_their_scenes() -> None:
    rows = [json.loads(line) for line in (ROOT / "data" / "paragraphs.jsonl").read_text().splitlines()]
    assert [row["world"] for row in rows] == ["small"] * 20 + ["large"] * 20
    for row in rows:
        scene, text = scene_from_meta(row), row["text"].lower()
        assert all(item.place in places(scene.grid) and item.colour in text for item in scene.objects)
        assert scene.background.colour in text and score(scene, np.asarray(draw(scene))).all_right
        assert set(re.findall(rf"\b({'|'.join(COLOURS)})\b", text)) == {item.colour for item in scene.objects}

    rows = [json.loads(line) for line in (ROOT / "data" / "prompts_large.jsonl").read_text().splitlines()]
    found = [(number, make_scene("val", 0, number, "large")) for number in range(40)]
    large = [(number, scene) for number, scene in found if len(scene.objects) >= 6][: len(rows)]
    told = [captions(scene, 0, number)["varied"] for number, scene in large]
    assert rows == [{"prompt": text, "height": 96, "width": 96} for text in told] and len(rows) == 8


def pixels(scene: Scene) -> np.ndarray:
    return np.asarray(draw(scene))


def one_object(**changes: object) -> Scene:
    item = SceneObject("circle", "red", "large", "plain", "top left", 16.0, 16.0, 14.5)
    return Scene(64, 64, Background("grey", "plain"), (replace(item, **changes),))  # type: ignore[arg-type]


def judged(drawn: list[Scene]) -> list[SceneScore]:
    return [score(scene, pixels(scene)) for scene in drawn]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("set_name", list(SETS))
def test_true_pictures_are_right(set_name: str, world: str) -> None:
    count = 80 if (SETS[set_name].base, world) == (64, "small") else 30
    found = summarise(judged([make_scene(set_name, 1, number, world) for number in range(count)]))
    least = {"colour_at_place": 0.99, "background": 0.99, "shape": 0.97, "all_right": 0.95}
    assert all(found[name].share >= share for name, share in least.items()), found


def test_blurred_and_shifted_pictures_are_still_right() -> None:
    noise = np.random.Generator(np.random.PCG64(0))
    scores = []
    for scene in (make_scene("web", 2, number) for number in range(80)):
        soft = np.asarray(draw(scene).filter(ImageFilter.GaussianBlur(1.0 * min(scene.width, scene.height) / 64)))
        rough = soft * 0.93 + 8 + noise.normal(0, 6, soft.shape)
        scores.append(score(scene, rough.clip(0, 255).astype(np.uint8)))
    found = summarise(scores)
    assert found["colour_at_place"].share >= 0.97 <= found["background"].share and found["shape"].share >= 0.93


def recoloured_at_random(scene: Scene, rng: np.random.Generator) -> Scene:
    colours = rng.permutation([item.colour for item in scene.objects])
    return replace(scene, objects=tuple(replace(o, colour=str(c)) for o, c in zip(scene.objects, colours, strict=True)))


def test_unbound_is_what_random_assignments_of_the_own_colours_get() -> None:
    drawn = [make_scene("val", 0, number) for number in range(100)]
    rng = np.random.Generator(np.random.PCG64(0))
    simulated: dict[int, list[float]] = {}
    for scene in drawn:
        colours = np.array([item.colour for item in scene.objects])
        turns = rng.permuted(np.tile(colours, (2000, 1)), axis=1)
        simulated.setdefault(len(colours), []).append(float((turns == colours).sum(1).mean()))
    found = judged(drawn)
    assert [one.unbound for one in found] == [unbound(scene) for scene in drawn]
    for count, shares in by_objects(found).items():
        assert shares["unbound"].share == pytest.approx(np.mean(simulated[count]) / count, abs=0.01)
    objects = sum(len(scene.objects) for scene in drawn)
    assert summarise(found)["unbound"].share == pytest.approx(sum(map(sum, simulated.values())) / objects, abs=0.005)


def test_binding_is_one_for_true_pictures_and_none_for_colours_at_random_places() -> None:
    drawn = [make_scene("val", 0, number) for number in range(150)]
    rng = np.random.Generator(np.random.PCG64(1))
    true = summarise(judged(drawn))["binding"]
    shuffled = [score(scene, pixels(recoloured_at_random(scene, rng))) for scene in drawn]
    found = summarise(shuffled)
    assert true.share > 0.99 and true.low <= true.share <= true.high
    assert true.n == sum(one.objects for one in shuffled if one.unbound < one.objects) < found["colour_at_place"].n
    assert abs(found["binding"].share) < 0.08 and found["binding"].low < 0 < found["binding"].high
    assert found["colour_at_place"].low < found["unbound"].share < found["colour_at_place"].high
    four = next(scene for scene in drawn if len(scene.objects) == 4)
    alike = replace(four, objects=tuple(replace(item, colour="red") for item in four.objects))
    nothing_to_bind = summarise([*(one for one in shuffled if one.objects == 1), score(alike, pixels(four))])
    assert "binding" not in nothing_to_bind and nothing_to_bind["unbound"].share == 1


def test_each_fault_is_seen_by_its_own_measure() -> None:
    scene = one_object()
    right = SceneScore(1, 1, 1, 1, True, 0, True, 1)
    assert score(scene, pixels(scene)) == right
    colour = score(scene, pixels(one_object(colour="green")))
    assert (colour.colour_at_place, colour.shape, colour.colour_and_shape, colour.all_right) == (0, 1, 0, False)
    shape = score(scene, pixels(one_object(shape="star")))
    assert (shape.colour_at_place, shape.shape, shape.background, shape.all_right) == (1, 0, True, False)
    place = score(scene, pixels(one_object(place="top right", cx=48.0)))
    assert (place.colour_at_place, place.shape, place.extra) == (0, 0, 1)
    ground = score(scene, pixels(replace(scene, background=Background("navy", "plain"))))
    assert (ground.colour_at_place, ground.shape, ground.background, ground.all_right) == (1, 1, False, False)
    more = replace(scene, objects=(*scene.objects, *one_object(colour="blue", place="bottom left", cy=48.0).objects))
    extra = score(scene, pixels(more))
    assert extra == replace(right, extra=1, all_right=False)
    fewer = score(more, pixels(scene))
    assert (fewer.objects, fewer.colour_at_place, fewer.all_right) == (2, 1, False)


@pytest.mark.parametrize("colour", [(158, 160, 164), (216, 32, 40), (0, 0, 0)])
def test_an_empty_picture_shows_no_object(colour: tuple[int, int, int]) -> None:
    found = score(one_object(), np.full((64, 64, 3), colour, dtype=np.uint8))
    assert (found.colour_at_place, found.colour_and_shape, found.all_right) == (0, 0, False)
    assert found.background == (colour == (158, 160, 164))


@pytest.mark.parametrize("shape", ["circle", "square", "triangle", "star", "diamond", "cross", "heart", "ring"])
@pytest.mark.parametrize("place", ["top left", "bottom right"])
def test_shapes_are_told_apart_at_another_place_and_size_in_the_cell(shape: str, place: str) -> None:
    row, column = divmod(PLACES.index(place), 2)
    left, top = column * 32, row * 32
    truth = one_object(shape=shape, place=place, cx=left + 16.5, cy=top + 16.5)
    drawn = one_object(shape=shape, place=place, cx=left + 14.6, cy=top + 17.4, size="medium", radius=11.5)
    assert score(truth, pixels(drawn)).colour_and_shape == 1


def test_each_cell_of_three_by_three_is_judged_by_itself() -> None:
    """One object moved from cell to cell is right in its own cell and extra in every other."""
    about = {"width": 96, "height": 96, "grid": 3, "background": {"colour": "grey"}}
    scenes = [
        scene_from_meta({**about, "objects": [{"shape": "star", "colour": "red", "place": place}]}) for place in NINE_PLACES
    ]  # fmt: skip
    for asked in scenes:
        for shown in scenes:
            found = score(asked, pixels(shown))
            assert found.all_right == (asked == shown) and found.extra == (asked != shown)


def test_pictures_of_another_size_are_brought_to_the_canvas() -> None:
    scene = make_scene("val", 0, 0)
    double = np.asarray(draw(scene).resize((scene.width * 2, scene.height * 2), Image.Resampling.BICUBIC))
    assert score(scene, double).all_right
    with pytest.raises(ValueError, match="uint8"):
        score(scene, pixels(scene).astype(np.float32))


def test_summary_counts_objects_and_scenes_with_an_interval() -> None:
    good, bad = SceneScore(3, 3, 3, 3, True, 0, True, 1), SceneScore(1, 0, 0, 0, False, 1, False, 1)
    found = summarise([good] * 30 + [bad] * 30)
    assert found["colour_at_place"].share == 0.75 and found["colour_at_place"].n == 120
    assert found["all_right"].share == 0.5 and found["all_right"].n == 60
    almost = replace(good, shape=2, colour_and_shape=2, all_right=False)  # counts as a picture of right colours, not as all right
    shares = summarise([good] * 30 + [bad] * 20 + [almost] * 10)
    assert (shares["all_colours"].share, shares["all_colours"].n, shares["all_right"].share) == (40 / 60, 60, 0.5)
    assert 0.3 < found["all_right"].low < 0.45 < 0.55 < found["all_right"].high < 0.7
    certain = summarise([good] * 10)["shape"]
    assert (certain.share, certain.low, certain.high) == (1, 1, 1)
    with pytest.raises(ValueError, match="no scores"):
        summarise([])
