"""Grammar of captions: words, phrases of places and sentence parts (words.toml), combined by the hundred."""

from __future__ import annotations

import itertools
import random
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from paradiffusion.scenes.world import BACKGROUNDS, COLOURS, NINE_PLACES, Scene, SceneObject, is_held_out, pick, places, row_and_column

Slots = Mapping[str, str | Callable[[], str]]

Words = tuple[str, ...]


@cache
def _lists() -> dict[str, Any]:
    return tomllib.loads((Path(__file__).parent / "words.toml").read_text(encoding="utf-8"))


@cache
def all_words() -> frozenset[str]:
    """Every word that training captions are made of, in lower case."""
    text = (Path(__file__).parent / "words.toml").read_text(encoding="utf-8").partition("\n[unseen]")[0]
    text = re.sub(r"^#.*|\{[^}]*\}", " ", text, flags=re.MULTILINE)
    return frozenset(re.findall(r"[a-z]+", " ".join([text, *COLOURS, *BACKGROUNDS, *NINE_PLACES, "upper lower"]).lower()))


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


class Writer:
    """One caption of a scene: its draws, what it has said, and how much its writer tells of sizes and textures."""

    def __init__(self, scene: Scene, rng: random.Random, terse: bool = False) -> None:
        self.scene, self.rng, self.grid = scene, rng, scene.grid
        self.sizes, self.textures = (0.0, 0.0) if terse else (pick(rng, (0, 0.5, 0.8)), pick(rng, (0, 0.3, 0.7)))
        self.last: SceneObject | None = None  # what "it" means in the next sentence
        self.named: list[SceneObject] = []
        # How often a thing is placed by its neighbour: in the large world a third of all are.
        self.relates = pick(rng, (0.15, 0.4, 0.85) if scene.grid == 2 else (0.6, 1.0, 1.0))
        # A thing named earlier is the hardest to stand beside, and no more than a few in a hundred do where writers choose. The scenes
        # that the large world is learned from have it wherever it fits.
        held_out = any(is_held_out(item.shape, item.colour, item.place, scene.grid) for item in scene.objects)
        self.by_name = self.relates * (0.3 if scene.grid == 2 or held_out else 1.0)

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def pick(self, options: Sequence[str]) -> str:
        return pick(self.rng, options)

    def say(self, symbol: str, slots: Slots) -> str:
        return say(symbol, self.rng, slots)

    def slots(self, item: SceneObject, place: Callable[[], str] | None = None) -> dict[str, str | Callable[[], str]]:
        """The words of one object; ``place`` in place of one of its own phrases."""
        slots: dict[str, str | Callable[[], str]] = {
            "c": item.colour,
            "s": self.pick(SHAPES_SAID[item.shape]),  # the same word in both clauses
            "sizes": item.size,
            "z": lambda: self.pick(SIZES_SAID[item.size]),
            "Z": lambda: self.pick(SIZES_STATED[item.size]),
            "t": lambda: self.pick(TEXTURES_SAID[item.texture]),
            "T": lambda: self.pick(TEXTURES_AFTER[item.texture]),
            "S": lambda: self.pick(TEXTURES_STATED[item.texture]),
            "p": place or (lambda: self.pick(place_phrases(item.place, self.grid))),
            "q": lambda: self.pick(place_names(item.place, self.grid)),
            "k": lambda: self.pick(place_labels(item.place, self.grid)),
        }
        slots["n"] = lambda: self._attributed("n", slots)
        slots["n simple"] = lambda: say("n", self.rng, {name: words for name, words in slots.items() if name != "n"})
        slots["is it"] = lambda: self._attributed("is", slots)
        return slots

    def _attributed(self, symbol: str, slots: Slots) -> str:
        size, texture = self.chance(self.sizes), self.chance(self.textures)
        symbol += (" both" if texture else " size") if size else " texture" if texture else ""
        return say(symbol, self.rng, {name: words for name, words in slots.items() if name != symbol})

    def object(self, item: SceneObject) -> str:
        """A sentence, or two, on one object; often placed by the object of the sentence before where it stands beside it."""
        last = self.last
        direction = direction_of(item, last, self.grid) if last else None
        self.last = item
        if last and direction and self.chance(self.relates):
            text = self._beside(item, last, direction)
        else:
            near = [(other, way) for other in self.named if (way := direction_of(item, other, self.grid))]
            if near and self.chance(self.by_name):
                other, way = pick(self.rng, near)
                name = self.name(other)
                text = self.say("one", self.slots(item, lambda: self.pick(phrases_of(way)).format(o=name)))
            else:
                text = self.say("one" if self.chance(0.72) else "one here", self.slots(item))
        self.named.append(item)
        return text

    def name(self, item: SceneObject) -> str:
        """The one object of this colour and shape."""
        return f"the {item.colour} {self.pick(SHAPES_SAID[item.shape])}"

    def _beside(self, item: SceneObject, last: SceneObject, direction: str) -> str:
        """``item`` by the object of the sentence before."""
        kind = self.rng.random()
        slots = self.slots(item)
        if kind < 0.66:
            it = self.pick(("it", "it", "it", "this one", "that", f"this {last.shape}", self.name(last)))
            forms = phrases_its(direction) if self.chance(0.45) else phrases_of(direction)
            slots["p"] = lambda: self.pick(forms).format(o=it)
            return self.say("one", slots)
        slots |= self.beside(direction)
        slots["o of n"] = lambda: self.pick(phrases_of(OPPOSITE[direction])).format(o=self.say("n", slots))
        if kind < 0.86:
            return self.say("neighbour", slots)
        self.last = None
        return self.say("has neighbour", slots)

    def beside(self, direction: str) -> dict[str, str | Callable[[], str]]:
        """The words for what lies in a direction of the object of the sentence before."""
        side, ways, at = SIDEWORDS[direction]
        return {
            "side": side,
            "way": lambda: self.pick(ways),
            "at side": lambda: self.pick(at),
            "o of it": lambda: self.pick(phrases_of(direction)).format(o="it"),
        }

    def pair(self, one: SceneObject, two: SceneObject) -> str:
        """A sentence on two objects."""
        slots: dict[str, str | Callable[[], str]] = {}
        for number, item in enumerate((one, two), 1):
            slots |= {f"{name}{number}": words for name, words in self.slots(item).items()}
        self.last = None
        self.named += [one, two]
        return self.say("two", slots)

    def line(self, items: Sequence[SceneObject]) -> str:
        """A sentence on objects of one row, or of one column, in their order."""
        cells = [row_and_column(item.place, self.grid) for item in items]
        along = int(cells[0][0] == cells[1][0])  # 1: a row, whose objects differ by column
        ends = (("left", "on the left"), ("right", "on the right")) if along else (("top", "at the top"), ("bottom", "at the bottom"))
        row = ("top", "middle", "bottom") if along else ("left", "middle", "right")
        number = cells[0][1 - along] if self.grid == 3 else 2 * cells[0][1 - along]
        name = f"the {row[number]} {'row' if along else 'column'}"
        if along and number != 1 and self.chance(0.3):
            name = f"the {'upper' if number == 0 else 'lower'} row"
        told = [self.say("n", self.slots(item)) for item in items]
        at = [cell[along] if self.grid == 3 else 2 * cell[along] for cell in cells]
        where = [ends[0][1], "in the middle", ends[1][1]]
        placed = [f"{words} {where[k]}" for words, k in zip(told, at, strict=True)]
        self.last = None
        self.named += items
        orders = ("from left to right",) if along else ("from top to bottom", "going down")
        slots: Slots = {"r": name, "m": _listed(placed), "l": _listed(told), "order": lambda: self.pick(orders)}
        full = len(items) == self.grid and not any("," in words for words in told)
        return self.say("in order" if full and self.chance(0.5) else "several", slots)

    def ground(self) -> dict[str, str | Callable[[], str]]:
        """The words of the background and of the number of objects."""
        background, count = self.scene.background, len(self.scene.objects)
        nouns = ("shape", "object", "figure", "form", "element")
        return {
            "gc": background.colour,
            "pattern": lambda: self.pick(PATTERNS_SAID[background.pattern]),
            "with pattern": lambda: self.pick(PATTERNS_AFTER[background.pattern]),
            "are": "are" if count > 1 else "is",
            "make": "make" if count > 1 else "makes",
            "number": lambda: f"{NUMBERS[count]} {self.say('kind', {})}{self.pick(nouns)}{'s' if count > 1 else ''}",
        }

    def idle(self) -> str:
        """A true sentence that no object needs: on empty places, on what lies where, or on nothing."""
        free = [place for place in places(self.grid) if place not in {item.place for item in self.scene.objects}]
        if free and self.chance(0.2):
            place = self.pick(free)
            slots: Slots = {"p": lambda: self.pick(place_phrases(place, self.grid)), "q": lambda: self.pick(place_names(place, self.grid))}
            return self.say("empty", slots)
        near = [(a, b, way) for a in self.named for b in self.named if (way := direction_of(a, b, self.grid))]
        if near and self.chance(0.25):
            a, b, way = pick(self.rng, near)
            first, second = self.name(a)[4:], self.name(b)
            return self.say("known", {"a": first, "o of b": lambda: self.pick(phrases_of(way)).format(o=second)})
        return self.say("idle", {})

    def ordered(self) -> list[SceneObject]:
        """The objects as a writer might go through them: at random, by rows, by columns, or from neighbour to neighbour."""
        items = list(self.scene.objects)
        kind = self.rng.random() ** (1 if self.grid == 2 else 0.35)
        if kind < 0.3:
            return sorted(items, key=lambda item: row_and_column(item.place, self.grid))
        if kind < 0.38:
            return sorted(items, key=lambda item: row_and_column(item.place, self.grid)[::-1])
        items.sort(key=lambda _: self.rng.random())
        if kind < 0.53:
            return items
        walk = [items.pop()]
        while items:
            near = [item for item in items if direction_of(item, walk[-1], self.grid)]
            walk.append(near[0] if near else items[0])
            items.remove(walk[-1])
        return walk

    def units(self) -> list[list[SceneObject]]:
        """The objects in the order in which they are told, those together that one sentence tells of."""
        items, units = self.ordered(), []
        lines = 0.4 if self.chance(0.2) else 0.03
        pairs = 0.5 if self.chance(0.12) else 0.06
        while items:
            first = items[0]
            cells = {item.place: row_and_column(item.place, self.grid) for item in items}
            axis = int(self.chance(0.4))
            line = [item for item in items if cells[item.place][axis] == cells[first.place][axis]]
            if len(line) > 1 and self.chance(lines):
                unit = sorted(line, key=lambda item: cells[item.place])
            else:
                unit = items[:2] if len(items) > 1 and self.chance(pairs) else [first]
            units.append(unit)
            items = [item for item in items if item not in unit]
        return units


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def paragraph(scene: Scene, rng: random.Random, idle: float, terse: bool = False) -> list[str]:
    """The sentences of a caption: every object with colour, shape and place, and the background; ``idle`` sentences for each that tells
    something, on average; where ``terse``, without sizes, textures and openings."""
    writer = Writer(scene, rng, terse)
    ground = writer.ground()
    sentences: list[str] = []
    opening = "" if terse or writer.chance(0.45) else "opening"
    if opening:
        sentences.append(writer.say(opening if writer.chance(0.85) else "bare opening", ground))
    said = bool(sentences) and f"{scene.background.colour}" in sentences[0]
    units = writer.units()
    where = -1 if said else pick(rng, (0, 0, 0, len(units), len(units), len(units), int(rng.random() * len(units))))
    for number, unit in enumerate(units):
        lead = ""
        if number == where:
            if number == 0 and writer.chance(0.5):
                lead = writer.say("on ground", ground) + ", "
            else:
                sentences.append(writer.say("ground", ground))
                writer.last = None
        if len(unit) == 1:
            text = writer.object(unit[0])
        else:
            text = writer.line(unit) if len(unit) > 2 or (writer.chance(0.5) and _aligned(unit, scene.grid)) else writer.pair(*unit)
        word = ""
        if not lead and len(units) > 1 and writer.chance(0.15):
            word = writer.say("first" if number == 0 else "last" if number == len(units) - 1 else "then", {}) + " "
        sentences.append(lead + word + text)
        if idle and writer.chance(idle):
            sentences.append(writer.idle())
            writer.last = None
    if where == len(units):
        if writer.chance(0.2):
            sentences[-1] += ", all " + writer.say("on ground", ground)
        else:
            sentences.append(writer.say("ground", ground))
    return sentences


def _aligned(items: Sequence[SceneObject], grid: int) -> bool:
    one, two = (row_and_column(item.place, grid) for item in items)
    return one < two and (one[0] == two[0] or one[1] == two[1])


def varied(scene: Scene, rng: random.Random, bounds: tuple[int, int], idle: float) -> str:
    """A caption of ``bounds`` words at least and at most in one of very many forms; see ``paragraph``."""
    least, most = bounds
    for attempt in range(8):
        sentences = paragraph(scene, rng, idle if attempt < 4 else 0.0, terse=attempt > 1)
        filler = Writer(scene, rng)
        while sum(len(sentence.split()) for sentence in sentences) < least:
            sentence = filler.idle()
            if sentence not in sentences:
                sentences.append(sentence)
        text = finished(sentences, rng)
        if len(text.split()) <= most:
            break
    return text


def lengthened(text: str, scene: Scene, rng: random.Random, words: int) -> str:
    """A caption of the scene in the midst of sentences that are true of it and that no object needs, ``words`` words or a few more. The
    caption stays in one piece, since its sentences refer to each other."""
    writer = Writer(scene, rng)
    around: tuple[list[str], list[str]] = ([], [])
    while len(text.split()) + sum(len(sentence.split()) for sentence in itertools.chain(*around)) < words:
        pick(rng, around).append(writer.idle())
    before, after = (finished(sentences, rng) if sentences else "" for sentences in around)
    return " ".join([before, text, after]).strip()


def listed(scene: Scene, rng: random.Random, most: int) -> str:
    """A list in web style of all objects and the background, in ``most`` words at most."""
    for attempt in range(4):
        writer = Writer(scene, rng, terse=attempt > 1)
        form = writer.pick(("{n} {k}", "{n} {k}", "{k} {n}", "{k}: {n}"))
        items = []
        for item in writer.ordered():
            slots = writer.slots(item)
            size = f"{say('z', rng, slots)} " if writer.chance(writer.sizes) else ""
            texture = f"{say('t', rng, slots)} " if writer.chance(writer.textures) else ""
            label = place_labels(item.place, scene.grid)[int(rng.random() * 3)]
            items.append(form.format(n=f"{size}{texture}{item.colour} {say('s', rng, slots)}", k=label))
        back = writer.say("bare g", writer.ground())
        items.insert(0 if writer.chance(0.3) else len(items), back if "ground" in back else f"{back} background")
        text = with_articles(writer.pick((", ", ", ", "; ", " / ")).join(items))
        if len(text.split()) <= most:
            break
    return text
