"""The judge of scenes: right on true pictures, strict where it must be; the unbound score and binding."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from paradiffusion.config import WORLDS
from paradiffusion.scenes.dataset import draw, make_scene
from paradiffusion.scenes.judge import SceneScore, by_objects, score, summarise, unbound
from paradiffusion.scenes.world import NINE_PLACES, PLACES, SETS, Background, Scene, SceneObject, scene_from_meta


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
    almost = replace(
        good, shape=2, colour_and_shape=2, all_right=False
    )  # counts as a picture of right colours, not as all right
    shares = summarise([good] * 30 + [bad] * 20 + [almost] * 10)
    assert (shares["all_colours"].share, shares["all_colours"].n, shares["all_right"].share) == (40 / 60, 60, 0.5)
    assert 0.3 < found["all_right"].low < 0.45 < 0.55 < found["all_right"].high < 0.7
    certain = summarise([good] * 10)["shape"]
    assert (certain.share, certain.low, certain.high) == (1, 1, 1)
    with pytest.raises(ValueError, match="no scores"):
        summarise([])
