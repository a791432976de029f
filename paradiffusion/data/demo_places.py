"""Phrases of the grammar of captions for places, by themselves and relative to another object."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from paradiffusion.data.demo_scenes import SceneObject, row_and_column

# Adverbials of a place; {V} upper or lower, {v} top or bottom, {u} up or down, {h} left or right. One that ends in a comma
# closes it before what follows, and loses it before any other mark.
CORNER = (
    "in the {v} {h} corner", "in the {V} {h} corner", "in the {v}-{h} corner", "at the {v} {h}", "in the {v} {h}",
    "in the {V} {h}", "on the {v} {h}", "on the {V} {h}", "at the {V} {h}", "in the {h} {V} corner",
    "in the {V} {h} part", "in the {v} {h} part of the picture", "in the {V} {h} area", "in the {v} {h} area",
    "in the {v} {h} section", "in the {V} {h} region", "on the {V} {h} side", "on the {v} {h} side",
    "{u} in the {h} corner", "{u} on the {h}", "{u} on the {h} side", "{u} at the {h}", "high-or-low on the {h}",
    "on the {h}, at the {v},", "on the {h} at the {v}", "at the {v}, on the {h},", "at the {v} on the {h}",
    "on the {h} side, at the {v},", "at the {v} of the {h} side", "at the {v}, to the {h},", "to the {h} at the {v}",
    "on the {h}-hand side at the {v}", "at the {v} on the {h}-hand side", "near the {v} edge on the {h}",
    "by the {v} edge, on the {h},", "close to the {v} {h} corner", "near the {V} {h} corner", "next to the {v} {h} corner",
    "towards the {V} {h}", "toward the {v} {h}", "in the {v} row on the {h}", "in the {v} row at the {h}",
    "in the {v} row, on the {h},", "at the {h} end of the {v} row", "at the {h} of the {v} row",
    "in the {V} row on the {h}", "in the {h} column at the {v}", "at the {v} of the {h} column", "in the {h} column, at the {v},",
    "at the {h} end of the {v} edge", "where the {v} and {h} edges meet", "in the corner at the {v} {h}",
    "in the corner on the {v} {h}", "at the {v} {h} of the picture", "in the {V} {h} of the image", "at the {v}-{h}",
    "in the {v} {h} corner of the canvas", "in the {V} {h} corner of the picture", "at {v} {h}", "in the {h} corner at the {v}",
    "in the {h} corner of the {v} edge", "in the {v} corner on the {h}", "along the {v} edge, at the {h},",
)  # fmt: skip
CORNER_OF_FOUR = (
    "in the {v} {h} quarter", "in the {V} {h} quarter", "in the {V} {h} quadrant", "in the {h} half of the {v} row",
    "in the {V} half on the {h}", "in the {h} half at the {v}", "in the {V} half, on the {h},", "in the {v} {h} quadrant",
)  # fmt: skip
MIDDLE_ABOVE_OR_BELOW = (
    "at the {v} in the middle", "in the middle at the {v}", "at the {v} centre", "in the {v} centre", "at the {v} middle",
    "in the {V} middle", "in the {V} centre", "in the middle of the {v} row", "in the middle of the {v} edge",
    "in the centre of the {v} row", "in the {v} row, in the middle,", "in the {v} row in the centre",
    "at the {v}, in the middle,", "at the {v}, halfway between left and right,", "{u} in the middle", "centred at the {v}",
    "at the centre of the {v} edge", "near the {v} edge in the middle", "along the {v} edge, in the middle,",
    "in the middle column at the {v}", "at the {v} of the middle column", "in the centre column, at the {v},",
    "between the two {v} corners", "in the {v} middle", "in the {V} part, in the middle,", "in the centre at the {v}",
    "at the middle of the {v}", "at the {v} of the picture, in the middle,", "{u} in the centre", "by the {v} edge, in the centre,",
    "in the middle of the {V} part", "halfway along the {v} edge", "in the {V} row, in the centre,", "at the {v} middle of the image",
)  # fmt: skip
MIDDLE_BESIDE = (
    "on the {h} at mid-height", "on the {h}, halfway down,", "at the {h}, halfway up,", "in the middle {h}", "at the middle {h}",
    "at the centre {h}", "in the centre {h}", "in the middle row on the {h}", "in the middle row at the {h}",
    "at the {h} end of the middle row", "in the middle of the {h} column", "in the middle of the {h} edge",
    "in the middle of the {h} side", "on the {h} side in the middle", "on the {h} in the middle", "in the middle on the {h}",
    "on the {h}, in the middle,", "halfway down the {h} side", "halfway down the {h} edge", "halfway up the {h} side",
    "at the {h} edge, in the middle,", "at the {h} edge at half height", "between the two {h} corners",
    "in the {h} column, in the middle,", "in the {h} column at the centre", "on the {h}, at half height,", "in the {h} middle",
    "on the middle {h}", "at the {h} of the middle row", "in the central row on the {h}", "on the {h}-hand side, in the middle,",
    "near the {h} edge in the middle", "on the {h} side at mid-height", "by the {h} edge, halfway down,",
)  # fmt: skip
CENTRE = (
    "in the centre", "in the middle", "at the centre", "in the very centre", "in the exact middle", "in the centre of the picture",
    "in the middle of the picture", "right in the middle", "right in the centre", "in the very middle", "in the middle of the image",
    "in the middle of the canvas", "at the centre of the picture", "in the centre of the middle row", "in the middle of the middle row",
    "in the middle row, in the middle,", "in the middle row, in the centre,", "in the central cell", "at the very centre",
    "halfway between all four corners", "in the dead centre", "in the centre of everything", "in the central place",
    "at the central point", "at the midpoint of the picture", "in the middle column, halfway down,", "in the central spot",
    "at the picture's centre", "exactly in the middle", "just in the middle",
)  # fmt: skip
# Names of a place, which hold an object, and short labels.
CORNER_NAMED = (
    "the {v} {h} corner", "the {V} {h} corner", "the {v} {h}", "the {V} {h}", "the {v}-{h} corner", "the {V} {h} part",
    "the {h} end of the {v} row", "the {v} of the {h} column", "the {V} {h} area", "the corner at the {v} {h}",
    "the {v} {h} of the picture", "the {V} {h} corner of the picture", "the {h} corner at the {v}", "the {V} {h} section",
)  # fmt: skip
ABOVE_OR_BELOW_NAMED = (
    "the {v} centre", "the {v} middle", "the middle of the {v} row", "the centre of the {v} row", "the {V} middle",
    "the middle of the {v} edge", "the {v} of the middle column", "the place between the two {v} corners",
)  # fmt: skip
BESIDE_NAMED = (
    "the middle {h}", "the centre {h}", "the middle of the {h} column", "the {h} end of the middle row", "the middle of the {h} side",
    "the middle of the {h} edge", "the place between the two {h} corners", "the {h} of the middle row",
)  # fmt: skip
CENTRE_NAMED = (
    "the centre", "the middle", "the very centre", "the middle of the picture", "the centre of the picture", "the central cell",
    "the middle of the middle row", "the centre of the canvas",
)  # fmt: skip
CORNER_LABELS = (
    "{v} {h}",
    "{v} {h}",
    "{V} {h}",
    "{v}-{h} corner",
    "{V} {h} corner",
    "{v} {h} corner",
    "in the {v} {h}",
)
ABOVE_OR_BELOW_LABELS = ("{v} centre", "{v} middle", "{V} middle", "{v}, middle", "middle of the {v} row")
BESIDE_LABELS = ("middle {h}", "centre {h}", "{h} middle", "{h}, middle", "{h} of the middle row")
CENTRE_LABELS = ("centre", "middle", "in the centre", "in the middle", "very centre")

# Where something lies as seen from {o}; ITS are said of the object of the sentence before.
SIDE_OF = (
    "to the {h} of {o}", "to the {h} of {o}", "on the {h} of {o}", "{h} of {o}", "just {h} of {o}", "beside {o} on the {h}",
    "next to {o} on the {h}", "on the {h}-hand side of {o}", "immediately {h} of {o}", "directly to the {h} of {o}",
    "one place to the {h} of {o}", "one step to the {h} of {o}", "one column to the {h} of {o}", "next to {o}, to the {h},",
    "adjacent to {o} on the {h}", "at the {h} side of {o}", "close to {o} on its {h}", "one cell {h} of {o}",
)  # fmt: skip
SIDE_ITS = (
    "to its {h}", "to its {h}", "on its {h}", "at its {h}", "on its {h}-hand side", "to its immediate {h}", "directly to its {h}",
    "beside it, to the {h},", "a step further to the {h}", "one place further {h}", "one step {h}", "as its {h} neighbour",
    "at its {h} side", "further {h}, next to it,", "right next to it on the {h} side", "one column further to the {h}",
)  # fmt: skip
UP_OR_DOWN_OF = {
    "above": (
        "above {o}", "above {o}", "directly above {o}", "right above {o}", "just above {o}", "straight above {o}", "over {o}",
        "right over {o}", "one row above {o}", "one row up from {o}", "one step up from {o}", "immediately above {o}",
        "one place higher than {o}", "on top of {o}, one row up,", "one cell above {o}", "next above {o}",
    ),
    "below": (
        "below {o}", "below {o}", "directly below {o}", "right below {o}", "just below {o}", "under {o}", "right under {o}",
        "beneath {o}", "directly beneath {o}", "underneath {o}", "one row below {o}", "one row down from {o}",
        "one step down from {o}", "immediately below {o}", "straight below {o}", "one place lower than {o}", "one cell below {o}",
    ),
}  # fmt: skip
UP_OR_DOWN_ITS = {
    "above": ("one row further up", "one step higher", "one row higher", "right above", "one step up", "just above", "directly above"),
    "below": ("one row further down", "one step lower", "one row lower", "right below", "one step down", "just below", "directly beneath"),
}  # fmt: skip
# For each direction: the side, the way there, and where one is then.
SIDEWORDS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "left": ("left", ("to the left", "left"), ("on the left", "to the left")),
    "right": ("right", ("to the right", "right"), ("on the right", "to the right")),
    "above": ("upper", ("up", "upwards"), ("above", "upwards")),
    "below": ("lower", ("down", "downwards"), ("below", "downwards")),
}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


def placed(place: str, grid: int, corner: Sequence[str], above: Sequence[str], beside: Sequence[str],
           centre: Sequence[str]) -> tuple[str, ...]:  # fmt: skip
    """The forms for a place, filled in: ``above`` (or below) and ``beside`` are of the edges' middles."""
    row, column = row_and_column(place, grid)
    vertical, horizontal = (row == 0) - (row == grid - 1), (column == 0) - (column == grid - 1)
    forms = (corner if horizontal else above) if vertical else beside if horizontal else centre
    v, big_v, u, high = ("top", "upper", "up", "high up") if vertical > 0 else ("bottom", "lower", "down", "low down")
    h = "left" if horizontal > 0 else "right"
    return tuple(form.replace("high-or-low", high).format(v=v, V=big_v, u=u, h=h) for form in forms)


@cache
def place_phrases(place: str, grid: int) -> tuple[str, ...]:
    """The adverbials that say where a place is ("in the top left corner")."""
    corner = CORNER + CORNER_OF_FOUR if grid == 2 else CORNER
    return placed(place, grid, corner, MIDDLE_ABOVE_OR_BELOW, MIDDLE_BESIDE, CENTRE)


@cache
def place_names(place: str, grid: int) -> tuple[str, ...]:
    """The names of a place ("the top left corner")."""
    return placed(place, grid, CORNER_NAMED, ABOVE_OR_BELOW_NAMED, BESIDE_NAMED, CENTRE_NAMED)


@cache
def place_labels(place: str, grid: int) -> tuple[str, ...]:
    """What stands before a colon or in a list ("top left")."""
    return placed(place, grid, CORNER_LABELS, ABOVE_OR_BELOW_LABELS, BESIDE_LABELS, CENTRE_LABELS)


@cache
def phrases_of(direction: str) -> tuple[str, ...]:
    """How a thing is placed by another one, {o}, in a direction: "left", "right", "above" or "below"."""
    if direction in UP_OR_DOWN_OF:
        return UP_OR_DOWN_OF[direction]
    return tuple(form.replace("{h}", direction) for form in SIDE_OF)


@cache
def phrases_its(direction: str) -> tuple[str, ...]:
    """How a thing is placed by the object of the sentence before."""
    if direction in UP_OR_DOWN_ITS:
        return UP_OR_DOWN_ITS[direction]
    return tuple(form.replace("{h}", direction) for form in SIDE_ITS)


def direction_of(a: SceneObject, b: SceneObject, grid: int) -> str | None:
    """Where ``a`` is seen from ``b`` when it is in the next cell of its row or column."""
    (row_a, column_a), (row_b, column_b) = row_and_column(a.place, grid), row_and_column(b.place, grid)
    step = (row_a - row_b, column_a - column_b)
    return {(0, 1): "right", (0, -1): "left", (1, 0): "below", (-1, 0): "above"}.get(step)
