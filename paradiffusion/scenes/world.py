"""Scenes of the built-in data set: what stands where.

A scene is a handful of coloured shapes, each inside its own cell of a grid, on a muted background: up to four on a grid
of two by two in the small world, up to nine on one of three by three in the large world. It is a value: the same
(set, seed, number, world) gives the same scene, and the same scene gives the same pixels (drawing.py), so that a
picture can be judged against the scene without any learned model. Combinations of shape, colour and place are divided
into trained and held-out ones, so that the validation set asks for compositions which training never showed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from paradiffusion.config import WORLDS
from paradiffusion.errors import UserError
from paradiffusion.randomness import seed_from

Rgb = tuple[int, int, int]
T = TypeVar("T")

# Object colours are saturated and backgrounds muted; the nearest two of all 13 lie 0.13 apart in OKLab.
COLOURS: dict[str, Rgb] = {
    "red": (216, 32, 40),
    "orange": (250, 136, 16),
    "yellow": (252, 224, 48),
    "green": (36, 160, 64),
    "cyan": (48, 208, 224),
    "blue": (36, 84, 224),
    "purple": (132, 44, 176),
    "pink": (255, 128, 192),
}
BACKGROUNDS: dict[str, Rgb] = {
    "white": (246, 246, 244),
    "grey": (158, 160, 164),
    "beige": (222, 204, 168),
    "navy": (26, 32, 66),
    "brown": (88, 62, 48),
}
DARK_BACKGROUNDS = ("navy", "brown")
PATTERNS = ("plain", "gradient", "dots", "stripes")
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "heart", "ring")
SIZES: dict[str, float] = {"small": 0.55, "medium": 0.72, "large": 0.92}  # diameter / shorter side of the cell
TEXTURES = ("plain", "striped", "outlined")
PLACES = ("top left", "top right", "bottom left", "bottom right")
NINE_PLACES = (
    "top left", "top centre", "top right", "middle left", "centre", "middle right", "bottom left", "bottom centre",
    "bottom right",
)  # fmt: skip
INK: Rgb = (24, 24, 28)
CHALK: Rgb = (252, 252, 252)

SNAP = 16  # centres and radii lie on a grid of 1/16 pixel, so that boxes in JSON restore them exactly
HELD_OUT_SHARE = 8  # one triple (shape, colour, place) in eight is kept for validation


@dataclass(frozen=True)
class SetRules:
    """How the scenes of one set are drawn: canvas base, weights of 1, 2, ... objects, imperfections, held-out triples.

    ``grid`` is the number of cells along a side; only a grid of two by two has wide and tall canvases too.
    """

    base: int
    counts: tuple[int, ...]
    imperfect: bool
    held_out: bool
    grid: int = 2


# Where one object stands alone there is nothing to bind: most of the training scenes have several.
SETS: dict[str, SetRules] = {
    "web": SetRules(64, (20, 25, 30, 25), imperfect=True, held_out=False),
    "big": SetRules(64, (10, 25, 30, 35), imperfect=True, held_out=False),
    "small": SetRules(128, (10, 25, 30, 35), imperfect=False, held_out=False),
    "val": SetRules(64, (25, 25, 25, 25), imperfect=False, held_out=True),
}
# The same sets in the large world; cells are as large as those of the small one.
LARGE_SETS: dict[str, SetRules] = {
    "web": SetRules(96, (14, 14, 13, 12, 11, 10, 9, 9, 8), imperfect=True, held_out=False, grid=3),
    "big": SetRules(96, (1,) * 9, imperfect=True, held_out=False, grid=3),
    "small": SetRules(192, (1,) * 9, imperfect=False, held_out=False, grid=3),
    "val": SetRules(96, (1,) * 9, imperfect=False, held_out=True, grid=3),
}


@dataclass(frozen=True)
class SceneObject:
    """One shape; centre and radius (half the side of its box) in pixels of the canvas."""

    shape: str
    colour: str
    size: str
    texture: str
    place: str
    cx: float
    cy: float
    radius: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """x0, y0, x1, y1 in pixels."""
        return (self.cx - self.radius, self.cy - self.radius, self.cx + self.radius, self.cy + self.radius)


@dataclass(frozen=True)
class Background:
    """The background's colour (a key of BACKGROUNDS) and its faint pattern (one of PATTERNS)."""

    colour: str
    pattern: str


@dataclass(frozen=True)
class Scene:
    """What a picture shows. ``imperfection`` 0 is a clean drawing, any other number seeds small shifts of colour.

    ``grid`` is the number of cells along a side, which the places of its objects belong to.
    """

    width: int
    height: int
    background: Background
    objects: tuple[SceneObject, ...]
    imperfection: int = 0
    grid: int = 2


def places(grid: int) -> tuple[str, ...]:
    """The names of the cells of a grid of 2 or 3 cells along a side, row by row."""
    return {2: PLACES, 3: NINE_PLACES}[grid]


def row_and_column(place: str, grid: int) -> tuple[int, int]:
    """Where the cell of a place lies, counted from the top left, from 0."""
    return divmod(places(grid).index(place), grid)


def is_held_out(shape: str, colour: str, place: str, grid: int = 2) -> bool:
    """Whether this triple belongs to validation: in every place, each colour with one shape and each shape with one colour.

    So every pair of attributes is seen in training, and no colour is likelier than another in a place of validation,
    which would raise the score that chance reaches.
    """
    return (SHAPES.index(shape) + 3 * list(COLOURS).index(colour) + 2 * places(grid).index(place)) % HELD_OUT_SHARE == 0


@cache
def _allowed(place: str, held_out: bool, grid: int) -> tuple[tuple[str, str], ...]:
    pairs = ((shape, colour) for shape in SHAPES for colour in COLOURS)
    return tuple(pair for pair in pairs if is_held_out(*pair, place, grid) == held_out)


def cell_box(place: str, width: int, height: int, grid: int = 2) -> tuple[float, float, float, float]:
    """The cell of a place as x0, y0, x1, y1 in pixels."""
    row, column = row_and_column(place, grid)
    return (column * width / grid, row * height / grid, (column + 1) * width / grid, (row + 1) * height / grid)


def radius_of(size: str, width: int, height: int, grid: int = 2) -> float:
    """Half the box side of an object of this size on this canvas, in pixels."""
    return math.floor(SIZES[size] * min(width, height) / grid / 2 * SNAP) / SNAP


def make_scene(set_name: str, seed: int, number: int, world: str = "small") -> Scene:
    """Scene ``number`` of a set; a function of the four arguments. UserError for an unknown set or world."""
    if set_name not in SETS:
        raise UserError(f"Unknown demo set '{set_name}', expected one of {', '.join(SETS)}; choose one of these.")
    if world not in WORLDS:
        raise UserError(f"Unknown demo world '{world}', expected one of {', '.join(WORLDS)}; choose one of these.")
    rules = SETS[set_name] if world == "small" else LARGE_SETS[set_name]
    rng = random.Random(seed_from("scene", *(() if world == "small" else (world,)), set_name, seed, number))
    base, grid = rules.base, rules.grid
    shapes = [(base, base), (base * 5 // 4, base * 3 // 4), (base * 3 // 4, base * 5 // 4)]
    width, height = rng.choices(shapes, weights=(60, 20, 20))[0] if grid == 2 else (base, base)
    count = rng.choices(range(1, len(rules.counts) + 1), weights=rules.counts)[0]
    background = Background(pick(rng, tuple(BACKGROUNDS)), pick(rng, PATTERNS))
    objects: list[SceneObject] = []
    for place in rng.sample(places(grid), count):
        taken = {(other.shape, other.colour) for other in objects}  # so that "the red circle" names one object
        shape, colour = pick(rng, [pair for pair in _allowed(place, rules.held_out, grid) if pair not in taken])
        objects.append(_put(rng, shape, colour, place, width, height, grid))
    imperfection = rng.randrange(1, 1 << 31) if rules.imperfect else 0
    return Scene(width, height, background, tuple(objects), imperfection, grid)


def pick(rng: random.Random, options: Sequence[T]) -> T:
    """One of the options; unlike ``random.choice`` defined by one ``random()``, whose stream Python guarantees."""
    return options[int(rng.random() * len(options))]


def _put(rng: random.Random, shape: str, colour: str, place: str, width: int, height: int, grid: int) -> SceneObject:
    size, texture = pick(rng, tuple(SIZES)), pick(rng, TEXTURES)
    radius = radius_of(size, width, height, grid)
    x0, y0, x1, y1 = cell_box(place, width, height, grid)
    margin = radius + 0.02 * min(width, height) / grid
    cx = _snap(x0 + margin + rng.random() * max(0.0, x1 - x0 - 2 * margin))
    cy = _snap(y0 + margin + rng.random() * max(0.0, y1 - y0 - 2 * margin))
    return SceneObject(shape, colour, size, texture, place, cx, cy, radius)


def _snap(value: float) -> float:
    return round(value * SNAP) / SNAP


def scene_to_meta(scene: Scene) -> dict[str, Any]:
    """The ground truth as plain JSON; ``scene_from_meta`` restores the scene exactly. ``grid`` is left out where it is 2."""
    objects = [
        {"shape": o.shape, "colour": o.colour, "size": o.size, "texture": o.texture, "place": o.place,
         "box": list(o.box)}
        for o in scene.objects
    ]  # fmt: skip
    background = {"colour": scene.background.colour, "pattern": scene.background.pattern}
    grid = {} if scene.grid == 2 else {"grid": scene.grid}
    return {"width": scene.width, "height": scene.height, **grid, "background": background, "objects": objects,
            "imperfection": scene.imperfection}  # fmt: skip


def scene_from_meta(meta: dict[str, Any]) -> Scene:
    """The scene of a sample's JSON. UserError when it holds no scene.

    What a person who writes a scene down may leave out: an object's size (medium), texture (plain) and box (the middle of
    its cell), and the background's pattern (plain).
    """
    try:
        width, height, grid = meta["width"], meta["height"], meta.get("grid", 2)
        objects = tuple(_object_from_meta(one, width, height, grid) for one in meta["objects"])
        background = Background(meta["background"]["colour"], meta["background"].get("pattern", "plain"))
        return Scene(width, height, background, objects, meta.get("imperfection", 0), grid)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise UserError(
            f"This sample's JSON holds no scene ({type(error).__name__}: {error}), expected one of the built-in data "
            "set; build it with scripts/make_demo_data.py."
        ) from error


def _object_from_meta(meta: dict[str, Any], width: int, height: int, grid: int) -> SceneObject:
    size, place = meta.get("size", "medium"), meta["place"]
    if "box" in meta:
        x0, y0, x1, y1 = meta["box"]
        radius = (x1 - x0) / 2
    else:
        x0, y0, x1, y1 = cell_box(place, width, height, grid)
        radius = radius_of(size, width, height, grid)
    texture = meta.get("texture", "plain")
    return SceneObject(meta["shape"], meta["colour"], size, texture, place, (x0 + x1) / 2, (y0 + y1) / 2, radius)
