"""A grammar of captions for the built-in scenes: words, places and sentence parts, combined by the hundred.

Few templates teach a model those templates; what people write follows none of them. So a sentence is put together from
parts: a place in one of dozens of phrases, an object whose colour stands before or after the noun, a verb, an order.
An object beside one that was named is often placed by it ("to its right", "one row below the red star").
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from paradiffusion.scenes.grammar import (
    NUMBERS,
    OPPOSITE,
    PATTERNS_AFTER,
    PATTERNS_SAID,
    SHAPES_SAID,
    SIDEWORDS,
    SIZES_SAID,
    SIZES_STATED,
    TEXTURES_AFTER,
    TEXTURES_SAID,
    TEXTURES_STATED,
    Slots,
    direction_of,
    finished,
    phrases_its,
    phrases_of,
    place_labels,
    place_names,
    place_phrases,
    say,
    with_articles,
)  # fmt: skip
from paradiffusion.scenes.world import Scene, SceneObject, pick, places, row_and_column


class Writer:
    """One caption of a scene: its draws, what it has said, and how much its writer tells of sizes and textures."""

    def __init__(self, scene: Scene, rng: random.Random, terse: bool = False) -> None:
        self.scene, self.rng, self.grid = scene, rng, scene.grid
        self.sizes, self.textures = (0.0, 0.0) if terse else (pick(rng, (0, 0.5, 0.8)), pick(rng, (0, 0.3, 0.7)))
        self.last: SceneObject | None = None  # what "it" means in the next sentence
        self.named: list[SceneObject] = []
        # How often a thing is placed by its neighbour: in the large world a third of all are.
        self.relates = pick(rng, (0.15, 0.4, 0.85) if scene.grid == 2 else (0.6, 1.0, 1.0))

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
            if near and self.chance(0.3 * self.relates):
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
        ends = (
            (("left", "on the left"), ("right", "on the right"))
            if along
            else (("top", "at the top"), ("bottom", "at the bottom"))
        )
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
            slots: Slots = {
                "p": lambda: self.pick(place_phrases(place, self.grid)),
                "q": lambda: self.pick(place_names(place, self.grid)),
            }
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
            text = (
                writer.line(unit)
                if len(unit) > 2 or (writer.chance(0.5) and _aligned(unit, scene.grid))
                else writer.pair(*unit)
            )
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
