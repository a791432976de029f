"""Words, phrases of places and sentence parts of the grammar of captions (words.toml), combined by the hundred by forms.py."""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from paradiffusion.scenes.world import SceneObject, pick, row_and_column

Slots = Mapping[str, str | Callable[[], str]]

Words = tuple[str, ...]


@cache
def _lists() -> dict[str, Any]:
    return tomllib.loads((Path(__file__).parent / "words.toml").read_text(encoding="utf-8"))


def word_list(*names: str) -> Words:
    """A list of words.toml by the names of its tables; "7* ..." is a phrase that stands seven times."""
    value: Any = _lists()
    for name in names:
        value = value[name]
    weighed = (re.fullmatch(r"(?:(\d+)\* )?(.*)", phrase, re.DOTALL) for phrase in value)
    return tuple(found[2] for found in weighed if found for _ in range(int(found[1] or 1)))


def word_lists(room: str, name: str) -> dict[str, Words]:
    """The lists of a table of words.toml, by their names."""
    return {key: word_list(room, name, key) for key in _lists()[room][name]}


SHAPES_SAID = word_lists("grammar", "SHAPES_SAID")
SIZES_SAID = word_lists("grammar", "SIZES_SAID")
SIZES_STATED = word_lists("grammar", "SIZES_STATED")
TEXTURES_SAID = word_lists("grammar", "TEXTURES_SAID")
TEXTURES_AFTER = word_lists("grammar", "TEXTURES_AFTER")
TEXTURES_STATED = word_lists("grammar", "TEXTURES_STATED")
PATTERNS_SAID = word_lists("grammar", "PATTERNS_SAID")
PATTERNS_AFTER = word_lists("grammar", "PATTERNS_AFTER")
RULES = word_lists("grammar", "RULES")
NUMBERS = word_list("grammar", "NUMBERS")
# All productions as literals and symbols in turn.
_RULES = {symbol: [re.split(r"\{([^}]+)\}", form) for form in forms] for symbol, forms in RULES.items()}
_ARTICLE = re.compile(r"@ (?=(un[^i]|[aeio])?)")
_LOOSE_COMMA = re.compile(r",(?=\s*[,.;:?!)])")
_AMERICAN = (("centred", "centered"), ("centre", "center"), ("colour", "color"), ("grey", "gray"))


def say(symbol: str, rng: random.Random, slots: Slots) -> str:
    """A sentence part: the slot of that name, or one of the symbol's productions."""
    if symbol in slots:
        value = slots[symbol]
        return value if isinstance(value, str) else value()
    parts = pick(rng, _RULES[symbol])
    return "".join([say(part, rng, slots) if at % 2 else part for at, part in enumerate(parts)])


def finished(sentences: Sequence[str], rng: random.Random) -> str:
    """The paragraph of these sentences, with articles, capitals and marks; some in American spelling or lower case."""
    text = _LOOSE_COMMA.sub("", with_articles(". ".join(sentences) + "."))
    text = re.sub(r"(^|[.?!] )([a-z])", lambda match: match[1] + match[2].upper(), text).replace("?.", "?")
    if rng.random() < 0.25:
        for british, american in _AMERICAN:
            text = text.replace(british, american).replace(british.capitalize(), american.capitalize())
    return text.lower() if rng.random() < 0.03 else text


def with_articles(text: str) -> str:
    """The text with "a" or "an" for each "@"."""
    return _ARTICLE.sub(lambda match: "an " if match[1] else "a ", text)


# Adverbials of a place, its names, which hold an object, and short labels: in a corner, at the middle of an edge, in the centre.
_ADVERBIALS, _NAMES, _LABELS = (
    [word_list("grammar", name) for name in names]
    for names in (
        ("CORNER", "MIDDLE_ABOVE_OR_BELOW", "MIDDLE_BESIDE", "CENTRE"),
        ("CORNER_NAMED", "ABOVE_OR_BELOW_NAMED", "BESIDE_NAMED", "CENTRE_NAMED"),
        ("CORNER_LABELS", "ABOVE_OR_BELOW_LABELS", "BESIDE_LABELS", "CENTRE_LABELS"),
    )
)
# Where something lies as seen from {o}; ITS are said of the object of the sentence before.
SIDE_OF, SIDE_ITS = word_list("grammar", "SIDE_OF"), word_list("grammar", "SIDE_ITS")
UP_OR_DOWN_OF, UP_OR_DOWN_ITS = word_lists("grammar", "UP_OR_DOWN_OF"), word_lists("grammar", "UP_OR_DOWN_ITS")
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
    corner, *rest = _ADVERBIALS
    return placed(place, grid, corner + word_list("grammar", "CORNER_OF_FOUR") if grid == 2 else corner, *rest)


@cache
def place_names(place: str, grid: int) -> tuple[str, ...]:
    """The names of a place ("the top left corner")."""
    return placed(place, grid, *_NAMES)


@cache
def place_labels(place: str, grid: int) -> tuple[str, ...]:
    """What stands before a colon or in a list ("top left")."""
    return placed(place, grid, *_LABELS)


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
