"""Captions of the built-in scenes: short web style, long paragraphs, clean human descriptions, and varied forms.

Every caption is a function of (seed, number, scene) and never says anything false. In the small world short, long and
clean ones are made of few templates; their paragraphs are complete: each object with colour, shape,
size, texture and place, and the background. All others come from the grammar (grammar.py). Word counts hold: the
required sentences are short enough together, and true but idle ones fill up to the least number of words.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

from paradiffusion.randomness import seed_from
from paradiffusion.scenes.grammar import Slots, Writer, direction_of, finished, listed, placed, varied, word_list, word_lists
from paradiffusion.scenes.world import PLACES, Background, Scene, SceneObject, is_held_out, pick, row_and_column

SHAPE_WORDS = word_lists("captions", "SHAPE_WORDS")
SIZE_WORDS = word_lists("captions", "SIZE_WORDS")
TEXTURE_BEFORE = word_lists("captions", "TEXTURE_BEFORE")
TEXTURE_AFTER = word_lists("captions", "TEXTURE_AFTER")
TEXTURE_STATED = word_lists("captions", "TEXTURE_STATED")
# {t} the place as "top left", {u} as "upper left".
_CORNER = ("in the {t} corner", "at the {t}", "in the {u}", "in the {u} corner", "in the {t} part", "in the {u} quarter")  # fmt: skip
_SHORT_CORNER = ("{t}", "{u}", "in {t} corner", "at the {t}")


def _phrases(forms: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    upper = {place: place.replace("top", "upper").replace("bottom", "lower") for place in PLACES}
    return {t: tuple(form.format(t=t, u=u) for form in forms) for t, u in upper.items()}


PLACE_WORDS, SHORT_PLACES = _phrases(_CORNER), _phrases(_SHORT_CORNER)
PATTERN_WORDS = word_lists("captions", "PATTERN_WORDS")
COUNTS = {int(count): said for count, said in word_lists("captions", "COUNTS").items()}
LONG_OBJECT = word_list("captions", "LONG_OBJECT")
LONG_SPLIT = word_list("captions", "LONG_SPLIT")
CLEAN_OBJECT = word_list("captions", "CLEAN_OBJECT")
PAIR = word_list("captions", "PAIR")
GROUND = word_list("captions", "GROUND")
INTROS = word_list("captions", "INTROS")
IDLE_LONG = word_list("captions", "IDLE_LONG")
IDLE_CLEAN = word_list("captions", "IDLE_CLEAN")
RELATIVE = word_list("captions", "RELATIVE")
REPEATED = word_list("captions", "REPEATED")
SHORT_OBJECT = word_list("captions", "SHORT_OBJECT")
SHORT_GROUND = word_list("captions", "SHORT_GROUND")
SHORT_OPENING = word_list("captions", "SHORT_OPENING")
SEPARATORS = word_list("captions", "SEPARATORS")


T = TypeVar("T")

KINDS = ("short", "long", "clean", "varied", "unseen")
# Least and most words of a caption.
WORDS: dict[str, tuple[int, int]] = {"short": (5, 15), "long": (50, 150), "clean": (40, 90), "varied": (8, 90),
         "unseen": (8, 120)}  # fmt: skip
LARGE_WORDS: dict[str, tuple[int, int]] = {"short": (5, 60), "long": (50, 250), "clean": (8, 250), "varied": (20, 250),
               "unseen": (8, 250)}  # fmt: skip


def captions(scene: Scene, seed: int, number: int) -> dict[str, str]:
    """One caption of each kind in KINDS, with word counts inside WORDS, or LARGE_WORDS for a grid of three by three.

    Of held-out forms ("unseen") only for the scenes of validation, whose compositions are held out too.
    """
    rng = {kind: random.Random(seed_from("caption", kind, seed, number)) for kind in KINDS}
    words = WORDS if scene.grid == 2 else LARGE_WORDS
    if scene.grid == 2:
        told = {"short": _short(scene, rng["short"]), "long": _long(scene, rng["long"]), "clean": _clean(scene, rng["clean"])}
    else:
        target = words["long"][0] + int(rng["long"].random() ** 1.5 * 100)
        idle = 0.2 + 0.6 * rng["long"].random()
        told = {
            "short": listed(scene, rng["short"], words["short"][1]),
            "long": varied(scene, rng["long"], (target, words["long"][1]), idle),
            "clean": varied(scene, rng["clean"], words["clean"], 0.0),
        }
    idle = max(0.0, 0.8 * rng["varied"].random() - 0.5)  # most writers keep to what they see
    told["varied"] = varied(scene, rng["varied"], words["varied"], idle)
    if all(is_held_out(item.shape, item.colour, item.place, scene.grid) for item in scene.objects):
        told["unseen"] = unseen(scene, rng["unseen"], words["unseen"][1])
    return told


def _count(parts: list[str]) -> int:
    return len(" ".join(parts).split())


def _shuffled(rng: random.Random, items: Sequence[T]) -> list[T]:
    return sorted(items, key=lambda _: rng.random())


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _with_article(phrase: str) -> str:
    """ "an orange ...", "a uniform ..."."""
    vowel = phrase[0] in "aeiou" and not phrase.startswith("uni")
    return f"{'an' if vowel else 'a'} {phrase}"


def _noun(item: SceneObject, rng: random.Random, adjectives: tuple[str, ...]) -> str:
    """The object without article: the given adjectives, its colour and its shape."""
    return " ".join([*adjectives, item.colour, pick(rng, SHAPE_WORDS[item.shape])])


def _full(item: SceneObject, rng: random.Random) -> str:
    """The object with its article and all attributes, at most 9 words."""
    size = pick(rng, SIZE_WORDS[item.size])
    before, after = pick(rng, TEXTURE_BEFORE[item.texture]), pick(rng, TEXTURE_AFTER[item.texture])
    form = int(rng.random() * 5)
    if form == 0:
        return _with_article(_noun(item, rng, (before, size)))
    if form in (1, 2):
        return _with_article(f"{_noun(item, rng, (size,))} {after}")
    return _with_article(_noun(item, rng, (size, before)))


def _place(item: SceneObject, rng: random.Random) -> str:
    """The place as an adverbial, at most 6 words (a comma inside is closed by none: it always ends a clause)."""
    return pick(rng, PLACE_WORDS[item.place])


def _ground(background: Background, rng: random.Random) -> str:
    """The background with its article, at most 7 words."""
    return _with_article(pick(rng, PATTERN_WORDS[background.pattern]).format(c=background.colour))


def _format(scene: Scene) -> str:
    return "square" if scene.width == scene.height else "wide" if scene.width > scene.height else "tall"


def _fill(template: str, **words: str) -> str:
    """Put words in; a capital letter in the template starts a sentence with them. A place with a comma that opens a
    sentence closes it with one ("On the left, halfway down, there is ...")."""
    values = {}
    for name, word in words.items():
        values[name] = word
        opening = f"{word}," if "," in word and f"{{{name[0].upper()}{name[1:]}}}," not in template else word
        values[name[0].upper() + name[1:]] = _capital(opening)
    return template.format(**values)


def _sentence(item: SceneObject, rng: random.Random, templates: tuple[str, ...]) -> str:
    return _fill(pick(rng, templates), n=_full(item, rng), p=_place(item, rng))


def _relation(a: SceneObject, b: SceneObject, grid: int) -> str:
    """Where ``a`` is seen from ``b``, by grid rows and columns."""
    row_a, column_a = row_and_column(a.place, grid)
    row_b, column_b = row_and_column(b.place, grid)
    parts = []
    if row_a != row_b:
        parts.append("above" if row_a < row_b else "below")
    if column_a != column_b:
        parts.append("to the left of" if column_a < column_b else "to the right of")
    return " and ".join(parts)


def _relative(scene: Scene, rng: random.Random) -> str:
    a, b = _shuffled(rng, scene.objects)[:2]
    relation = _relation(a, b, scene.grid)
    seen = relation.replace("to the left of", "further left").replace("to the right of", "further right")
    seen = seen.replace("above", "higher up").replace("below", "lower down")
    return pick(rng, RELATIVE).format(a=_noun(a, rng, ()), b=_noun(b, rng, ()), r=relation, x=seen)


def _repeated(scene: Scene, rng: random.Random) -> str:
    item = pick(rng, scene.objects)
    return pick(rng, REPEATED).format(a=_noun(item, rng, ()), s=pick(rng, SIZE_WORDS[item.size]),
                                      t=pick(rng, TEXTURE_STATED[item.texture]),
                                      p=_place(item, rng).replace(",", ""))  # fmt: skip


def _long(scene: Scene, rng: random.Random) -> str:
    """At most 14 + 4 * 22 + 13 = 115 words are required; idle ones are added up to a drawn length of 50 to 140."""
    body: list[str] = []
    for item in _shuffled(rng, scene.objects):
        if rng.random() < 0.3:
            words = {"n": _with_article(_noun(item, rng, ())), "p": _place(item, rng)}
            words |= {"s": pick(rng, SIZE_WORDS[item.size]), "t": pick(rng, TEXTURE_STATED[item.texture])}
            body.append(_fill(pick(rng, LONG_SPLIT), **words))
        else:
            body.append(_sentence(item, rng, LONG_OBJECT))
    return _paragraph(scene, rng, body, WORDS["long"], 50 + int(rng.random() ** 1.5 * 90), IDLE_LONG, rambling=0.6)


def _clean(scene: Scene, rng: random.Random) -> str:
    """At most 4 * 19 + 13 = 89 words are required; an introduction that would not fit beside them is left out."""
    items = _shuffled(rng, scene.objects)
    body: list[str] = []
    while items:
        if len(items) > 1 and rng.random() < 0.35:
            a, b = items.pop(), items.pop()
            words = {"n0": _full(a, rng), "p0": _place(a, rng), "n1": _full(b, rng), "p1": _place(b, rng)}
            body.append(_fill(pick(rng, PAIR), **words))
        else:
            body.append(_sentence(items.pop(), rng, CLEAN_OBJECT))
    return _paragraph(scene, rng, body, WORDS["clean"], 40 + int(rng.random() * 15), IDLE_CLEAN, rambling=0.25)


def _paragraph(scene: Scene, rng: random.Random, body: list[str], bounds: tuple[int, int], target: int,
               idle: tuple[str, ...], rambling: float) -> str:  # fmt: skip
    """Introduction, objects and background, filled with true but idle sentences up to ``target`` words."""
    least, most = bounds
    parts = list(body)
    intro = pick(rng, INTROS)
    words = {"f": _format(scene), "k": pick(rng, COUNTS[len(scene.objects)]), "b": _ground(scene.background, rng)}
    opening = intro.format(**words) if rng.random() < 0.75 else ""
    if "{b}" not in intro or not opening or _count([opening, *parts]) > most:  # the background must be told by a sentence of its own
        ground = _fill(pick(rng, GROUND), b=_ground(scene.background, rng))
        parts.insert(0 if rng.random() < 0.25 else len(parts), ground)
    if opening and _count([opening, *parts]) <= most:
        parts.insert(0, opening)
    spare = _shuffled(rng, idle)
    while spare and _count(parts) < max(least, target):
        if rng.random() < rambling and len(parts) < 12:
            extra = _relative(scene, rng) if len(scene.objects) > 1 and rng.random() < 0.6 else _repeated(scene, rng)
        else:
            extra = spare.pop()
        if extra not in parts and _count([*parts, extra]) <= most:
            parts.append(extra)
    return " ".join(parts)


def _short(scene: Scene, rng: random.Random) -> str:
    """Web style: some of the facts in any order, 5 to 15 words."""
    least, most = WORDS["short"]
    wordy = rng.random()  # how much of size and texture this writer mentions
    parts: list[str] = []
    for item in _shuffled(rng, scene.objects):
        part = _short_object(item, rng, wordy)
        if _count([*parts, part]) > most or (parts and rng.random() < 0.12):
            break
        parts.append(part)
    backdrop = pick(rng, ("background", "backdrop"))
    ground = f"{scene.background.colour} {backdrop}"
    if _count(parts) < least or (rng.random() < 0.5 and _count([*parts, ground]) + 3 <= most):
        parts.append(pick(rng, SHORT_GROUND).format(b=ground, a=_with_article(ground)))
    separator = pick(rng, SEPARATORS)
    if separator in (" and ", " / ") and _count(parts) + len(parts) - 1 > most:
        separator = ", "  # as words these would not fit
    text = separator.join(parts)
    opening = pick(rng, SHORT_OPENING)
    if rng.random() < 0.2 and _count([opening, text]) <= most:
        text = f"{opening} {text}"
    return _capital(text) if rng.random() < 0.4 else text


def _short_object(item: SceneObject, rng: random.Random, wordy: float) -> str:
    """At most 12 words, at least 3."""
    adjectives = [pick(rng, SIZE_WORDS[item.size])] if rng.random() < wordy else []
    if rng.random() < wordy and item.texture != "plain":
        adjectives.append(pick(rng, TEXTURE_BEFORE[item.texture]))
    noun = _noun(item, rng, tuple(adjectives))
    place = pick(rng, SHORT_PLACES[item.place])
    return pick(rng, SHORT_OBJECT).format(n=noun, a=_with_article(noun), p=place)


UNSEEN = word_lists("unseen", "UNSEEN")
UNSEEN_PLACES = [word_list("unseen", name) for name in ("CORNER", "ABOVE_OR_BELOW", "BESIDE", "CENTRE")]


def unseen_places(place: str, grid: int) -> tuple[str, ...]:
    """The adverbials of a place that no training caption has."""
    return placed(place, grid, *UNSEEN_PLACES)


def unseen(scene: Scene, rng: random.Random, most: int) -> str:
    """A caption of held-out forms, of ``most`` words at most: every object with colour, shape and place, and the background."""
    for _ in range(8):
        text = finished(_sentences(scene, rng), rng)
        if len(text.split()) <= most:
            break
    return text


def _sentences(scene: Scene, rng: random.Random) -> list[str]:
    writer = Writer(scene, rng)
    ground = {"gc": scene.background.colour, "number": writer.ground()["number"]}
    sentences = [_say("opening", rng, ground)] if rng.random() < 0.4 else []
    early = rng.random() < 0.35
    sentences += [_say("ground", rng, ground)] if early else []
    items = writer.ordered()
    last: SceneObject | None = None
    while items:
        item = items.pop(0)
        alone = True
        direction = direction_of(item, last, scene.grid) if last else None
        if direction and rng.random() < 0.45:
            sentences.append(_say("beside", rng, _slots(writer, item) | writer.beside(direction)))
        elif items and rng.random() < 0.2:
            pair: dict[str, str | Callable[[], str]] = {}
            for number, one in enumerate((item, items.pop(0)), 1):
                pair |= {f"{name}{number}": words for name, words in _slots(writer, one).items()}
            sentences.append(_say("two", rng, pair))
            alone = False
        else:
            sentences.append(_say("one", rng, _slots(writer, item)))
        last = item if alone else None
    return sentences if early else [*sentences, _say("ground", rng, ground)]


def _slots(writer: Writer, item: SceneObject) -> dict[str, str | Callable[[], str]]:
    slots = writer.slots(item)
    known, new = slots["p"], unseen_places(item.place, writer.grid)
    assert callable(known)
    slots["p"] = lambda: pick(writer.rng, new) if writer.chance(0.5) else known()
    slots["n"] = lambda: _say("n", writer.rng, slots)
    return slots


def _say(symbol: str, rng: random.Random, slots: Slots) -> str:
    def word(match: re.Match[str]) -> str:
        value = slots[match[1]]
        return value if isinstance(value, str) else value()

    return re.sub(r"\{([^}]+)\}", word, pick(rng, UNSEEN[symbol]))
