"""Does a picture show its scene? Judged from the ground truth and the pixels alone, without a learned model.

Pixels are named after the nearest palette colour in OKLab. An object is found when the leading object colour in the
grid cell of its place is its own and covers enough of it. Its shape is compared with all shapes, drawn by the same
code at its size and texture, after both were brought to equal centre and area. Pictures may be blurred or slightly
off in colour, as those of a small model are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image

from paradiffusion.randomness import seed_from
from paradiffusion.scenes.drawing import draw
from paradiffusion.scenes.world import BACKGROUNDS, CHALK, COLOURS, INK, SHAPES, Background, Scene, SceneObject, cell_box, places, radius_of

# A found object covers at least this share of the pixels that its colour covers in the true drawing.
COVERED = 0.35
LIGHTNESS_WEIGHT = 0.6  # light and shade vary more than hue in generated pictures
SHAPE_GRID = 24  # masks are compared at this resolution
_PALETTE: dict[str, tuple[int, int, int]] = {**COLOURS, **BACKGROUNDS, "ink": INK, "chalk": CHALK}
_COLOUR_NAMES = tuple(COLOURS)
_GROUND_NAMES = tuple(BACKGROUNDS)


@dataclass(frozen=True)
class SceneScore:
    """What one picture got right: counts of its objects, and whether background and everything are right.

    ``colour_and_shape`` counts objects with the right colour and the right shape at their place, ``extra`` the cells
    that should be empty and are not. ``all_right`` needs every object, the background and no extra object. ``unbound`` is
    the scene's, whatever the picture (see the function of this name).
    """

    objects: int
    colour_at_place: int
    shape: int
    colour_and_shape: int
    background: bool
    extra: int
    all_right: bool
    unbound: float


@dataclass(frozen=True)
class ObjectVerdict:
    """One object of a scene in a picture: something in an object's colour, whichever, is ``present`` in its cell; what leads there is
    of its own ``colour``, and enough of it; the ``shape`` there is its own. ``seen_...`` are what leads, and the shape that fits
    best, "" for none."""

    present: bool
    colour: bool
    shape: bool
    seen_colour: str
    seen_shape: str


@dataclass(frozen=True)
class PictureVerdict:
    """All objects of a scene, in its order, the colour of the ground, and how many cells hold what no object explains."""

    objects: tuple[ObjectVerdict, ...]
    ground: str
    extra: int


def judge_picture(scene: Scene, image: np.ndarray) -> PictureVerdict:
    """What of the scene a picture, uint8 [H, W, 3] of any size, shows."""
    pixels = on_canvas(image, scene.width, scene.height)
    names = _name_pixels(pixels)
    ground = _ground_name(scene, names)
    expected = _expected_names(scene)
    found = []
    for item in scene.objects:
        cell = cell_of(item.place, scene.width, scene.height, scene.grid)
        counts = _colour_counts(names[cell])
        own = _COLOUR_NAMES.index(item.colour)
        enough = COVERED * np.count_nonzero(expected[cell] == own)
        colour = bool(counts.argmax() == own and counts[own] >= enough) and ground != item.colour
        present = bool(counts.sum() >= enough)
        shape = _shape_name(pixels[cell], item, scene, ground) if present else ""
        leading = _COLOUR_NAMES[int(counts.argmax())]
        found.append(ObjectVerdict(present, colour, shape == item.shape, leading, shape))
    return PictureVerdict(tuple(found), ground, _extra_objects(scene, names))


def score(scene: Scene, image: np.ndarray) -> SceneScore:
    """Judge a picture, uint8 [H, W, 3] of any size, against the scene that its caption described."""
    found = judge_picture(scene, image)
    both = sum(item.colour and item.shape for item in found.objects)
    background = found.ground == scene.background.colour
    everything = both == len(scene.objects) and background and found.extra == 0
    colours, shapes = sum(item.colour for item in found.objects), sum(item.shape for item in found.objects)
    return SceneScore(len(scene.objects), colours, shapes, both, background, found.extra, everything, unbound(scene))


def unbound(scene: Scene) -> float:
    """How many objects have the right colour at the right place, on average over all ways to assign the scene's own colours
    to its own places: a colour of m among n objects is right m * m / n times. What is drawn by a model that knows which
    colours and places a text names, and not which belong together."""
    return sum(m * m for m in Counter(item.colour for item in scene.objects).values()) / max(1, len(scene.objects))


@dataclass(frozen=True)
class Share:
    """A share of ``n`` objects or scenes, with a bootstrap 95 % interval over scenes."""

    share: float
    low: float
    high: float
    n: int


def sums_of(one: SceneScore) -> dict[str, tuple[float, float]]:
    """By measure, what a scene adds to the numerator and to the denominator of its share; 0 of 0 where it has no say.

    ``binding`` is (colour_at_place - unbound) / (1 - unbound) over scenes of two colours and more: in the others, as in those
    of one object, there is nothing to bind.
    """
    above_unbound = (one.colour_at_place - one.unbound, one.objects - one.unbound)
    return {
        "colour_at_place": (one.colour_at_place, one.objects),
        "unbound": (one.unbound, one.objects),
        "binding": above_unbound if one.unbound < one.objects else (0, 0),
        "shape": (one.shape, one.objects),
        "colour_and_shape": (one.colour_and_shape, one.objects),
        "background": (one.background, 1),
        "all_colours": (one.colour_at_place == one.objects, 1),
        "all_right": (one.all_right, 1),
    }


def summarise(scores: Sequence[SceneScore], seed: int = 0, resamples: int = 1000) -> dict[str, Share]:
    """Shares of objects (colour_at_place, unbound, shape, colour_and_shape) and scenes (background, all_colours, all_right), and binding:
    1 where every colour is in its place, 0 where the scenes' colours are at places of theirs at random. Binding is left out
    where no scene has two colours.

    Scenes are resampled whole, since the objects of one picture are not independent. ValueError without scores.
    """
    if not scores:
        raise ValueError("there are no scores to summarise")
    rng = np.random.Generator(np.random.PCG64(seed_from("bootstrap", seed)))
    draws = rng.integers(0, len(scores), (resamples, len(scores)))
    objects = np.array([one.objects for one in scores])
    found = [sums_of(one) for one in scores]
    result = {}
    for name in found[0]:
        right, total = np.array([one[name] for one in found], dtype=float).T
        if not total.any():
            continue
        above, below = right[draws].sum(1), total[draws].sum(1)
        low, high = np.quantile(above[below > 0] / below[below > 0], (0.025, 0.975))
        n = len(scores) if name in ("background", "all_colours", "all_right") else objects[total > 0].sum()
        result[name] = Share(float(right.sum() / total.sum()), float(low), float(high), int(n))
    return result


def by_objects(scores: Sequence[SceneScore]) -> dict[int, dict[str, Share]]:
    """``summarise`` for each number of objects, in rising order."""
    counts = sorted({one.objects for one in scores})
    return {count: summarise([one for one in scores if one.objects == count]) for count in counts}


def on_canvas(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """The picture, uint8 [H, W, 3], brought to a scene's size."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected a uint8 picture [H, W, 3], found {image.dtype} {list(image.shape)}")
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def perceptual(rgb: np.ndarray) -> np.ndarray:
    """OKLab of sRGB bytes [..., 3] (B. Ottosson, 2020), float32, lightness weighted down."""
    linear = _LINEAR[rgb]
    cones = np.cbrt(linear @ _TO_CONES)
    return (cones @ _TO_LAB) * np.array([LIGHTNESS_WEIGHT, 1, 1], dtype=np.float32)


_STEPS = np.arange(256) / 255
_LINEAR = np.where(_STEPS <= 0.04045, _STEPS / 12.92, ((_STEPS + 0.055) / 1.055) ** 2.4).astype(np.float32)
_TO_CONES = np.array(
    [[0.4122214708, 0.5363325363, 0.0514459929],
     [0.2119034982, 0.6806995451, 0.1073969566],
     [0.0883024619, 0.2817188376, 0.6299787005]], dtype=np.float32).T  # fmt: skip
_TO_LAB = np.array(
    [[0.2104542553, 0.7936177850, -0.0040720468],
     [1.9779984951, -2.4285922050, 0.4505937099],
     [0.0259040371, 0.7827717662, -0.8086757660]], dtype=np.float32).T  # fmt: skip
_PALETTE_LAB = perceptual(np.array(list(_PALETTE.values()), dtype=np.uint8))


def _name_pixels(pixels: np.ndarray) -> np.ndarray:
    """Number of the nearest palette colour of each pixel, int [H, W]: object colours first, then backgrounds."""
    distance = ((perceptual(pixels)[..., None, :] - _PALETTE_LAB) ** 2).sum(-1)
    return distance.argmin(-1)


@lru_cache(maxsize=1024)
def _expected_names(scene: Scene) -> np.ndarray:
    return _name_pixels(np.asarray(draw(replace(scene, imperfection=0))))


def _colour_counts(names: np.ndarray) -> np.ndarray:
    return np.bincount(names.ravel(), minlength=len(_PALETTE))[: len(_COLOUR_NAMES)]


def cell_of(place: str, width: int, height: int, grid: int = 2) -> tuple[slice, slice]:
    """The rows and columns of a place's cell."""
    x0, y0, x1, y1 = (round(v) for v in cell_box(place, width, height, grid))
    return slice(y0, y1), slice(x0, x1)


def _ground_name(scene: Scene, names: np.ndarray) -> str:
    """The colour, of all in the palette, that fills most of the area without objects."""
    free = np.ones(names.shape, dtype=bool)
    for item in scene.objects:
        x0, y0, x1, y1 = (round(v) for v in item.box)
        free[max(0, y0 - 1) : y1 + 1, max(0, x0 - 1) : x1 + 1] = False
    counts = np.bincount(names[free], minlength=len(_PALETTE))
    name = list(_PALETTE)[int(counts.argmax())]
    return "white" if name == "chalk" else name


def _extra_objects(scene: Scene, names: np.ndarray) -> int:
    """Cells without an object in which one colour covers a good part of what the smallest object would."""
    limit = COVERED * np.pi * radius_of("small", scene.width, scene.height, scene.grid) ** 2
    taken = {item.place for item in scene.objects}
    free = (place for place in places(scene.grid) if place not in taken)
    cells = (cell_of(place, scene.width, scene.height, scene.grid) for place in free)
    return sum(bool(_colour_counts(names[cell]).max() >= limit) for cell in cells)


def _shape_name(cell: np.ndarray, item: SceneObject, scene: Scene, ground: str) -> str:
    """The shape whose drawing fits best; '' when there is nothing to compare."""
    seen = _normalised(presence_of(cell, item.colour, ground))
    if seen is None:
        return ""
    canvas = (scene.width, scene.height, scene.grid)
    templates = _templates(item.colour, item.size, item.texture, scene.background.colour, *canvas)
    overlap = np.minimum(seen, templates).sum((1, 2)) / np.maximum(seen, templates).sum((1, 2))
    return SHAPES[int(overlap.argmax())]


def presence_of(pixels: np.ndarray, colour: str, ground: str) -> np.ndarray:
    """How far each pixel is from the background, 0..1 [H, W]: 1 at the distance of the object's colour, or beyond.

    Linear in between, so that an edge that covers half a pixel counts half: small shapes differ by such edges only.
    """
    names = list(_PALETTE)
    back = _PALETTE_LAB[names.index(ground)]
    if ground in _GROUND_NAMES:
        near = np.abs(perceptual(pixels) - back).sum(-1) < 0.09  # the local ground, with its pattern and light
        back = np.median(perceptual(pixels)[near], axis=0) if near.sum() > 8 else back
    reach = np.linalg.norm(_PALETTE_LAB[names.index(colour)] - back)
    away = np.linalg.norm(perceptual(pixels) - back, axis=-1) / max(float(reach), 1e-6)
    return np.clip((away - 0.25) / 0.6, 0, 1)


def _normalised(mask: np.ndarray) -> np.ndarray | None:
    """The mask [H, W] moved to its centroid and scaled to a fixed area, float32 [G, G]; None when it is empty."""
    area = float(mask.sum())
    if area < 4:
        return None
    y, x = np.mgrid[: mask.shape[0], : mask.shape[1]]
    cx, cy = float((mask * x).sum()) / area, float((mask * y).sum()) / area
    step = (area**0.5 * 2) / SHAPE_GRID  # the grid spans twice the side of a square of equal area
    offset = step * (SHAPE_GRID - 1) / 2
    picture = Image.fromarray(np.pad(mask, 1).astype(np.float32))
    # Pillow maps the middle of output pixel (i + 0.5) to input coordinates whose pixel middles lie at k + 0.5.
    x_start, y_start = cx + 1.5 - offset - step / 2, cy + 1.5 - offset - step / 2
    size, numbers = (SHAPE_GRID, SHAPE_GRID), (step, 0, x_start, 0, step, y_start)
    return np.asarray(picture.transform(size, Image.Transform.AFFINE, numbers, Image.Resampling.BILINEAR))


@lru_cache(maxsize=4096)
def _templates(colour: str, size: str, texture: str, ground: str, width: int, height: int, grid: int) -> np.ndarray:
    """Masks of all shapes drawn in the middle of a cell with these attributes, [shapes, G, G]."""
    place = places(grid)[0]
    cell = cell_of(place, width, height, grid)
    x0, y0, x1, y1 = cell_box(place, width, height, grid)
    radius = radius_of(size, width, height, grid)
    masks = []
    for shape in SHAPES:
        item = SceneObject(shape, colour, size, texture, place, (x0 + x1) / 2, (y0 + y1) / 2, radius)
        picture = np.asarray(draw(Scene(width, height, Background(ground, "plain"), (item,))))
        mask = _normalised(presence_of(picture[cell], colour, ground))
        masks.append(np.zeros((SHAPE_GRID, SHAPE_GRID), np.float32) if mask is None else mask)
    return np.stack(masks)
