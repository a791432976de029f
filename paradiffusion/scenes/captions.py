"""Captions of the built-in scenes: short web style, long paragraphs, clean human descriptions, and varied forms.

Every caption is a function of (seed, number, scene) and never says anything false. In the small world short, long and
clean ones are made of few templates; their paragraphs are complete: each object with colour, shape,
size, texture and place, and the background. All others come from the grammar (forms.py). Word counts hold: the
required sentences are short enough together, and true but idle ones fill up to the least number of words.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from paradiffusion.randomness import seed_from
from paradiffusion.scenes.forms import listed, varied
from paradiffusion.scenes.unseen import unseen
from paradiffusion.scenes.world import PLACES, Background, Scene, SceneObject, is_held_out, pick, row_and_column

SHAPE_WORDS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "circle", "circle", "disc"),
    "square": ("square", "square", "square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "diamond": ("diamond", "diamond", "diamond", "rhombus"),
    "cross": ("cross", "cross", "plus sign"),
    "heart": ("heart",),
    "ring": ("ring", "ring", "ring", "hoop"),
}
SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "small", "little", "tiny"),
    "medium": ("medium-sized", "mid-sized", "medium"),
    "large": ("large", "large", "big"),
}
TEXTURE_BEFORE: dict[str, tuple[str, ...]] = {
    "plain": ("plain", "solid", "uniform"),
    "striped": ("striped", "striped", "diagonally striped"),
    "outlined": ("outlined", "boldly outlined", "thickly outlined"),
}
TEXTURE_AFTER: dict[str, tuple[str, ...]] = {
    "plain": ("with a plain surface", "in one solid colour", "with a uniform fill"),
    "striped": ("with diagonal stripes", "with stripes across it", "covered in stripes"),
    "outlined": ("with a thick outline", "with a bold outline", "with an outline around it"),
}
TEXTURE_STATED: dict[str, tuple[str, ...]] = {
    "plain": ("has a plain surface", "is filled with one solid colour", "has a uniform fill"),
    "striped": ("has diagonal stripes", "is covered in stripes", "is striped from side to side"),
    "outlined": ("has a thick outline", "is framed by a bold outline", "has an outline around it"),
}
# {t} the place as "top left", {u} as "upper left".
_CORNER = ("in the {t} corner", "at the {t}", "in the {u}", "in the {u} corner", "in the {t} part", "in the {u} quarter")  # fmt: skip
_SHORT_CORNER = ("{t}", "{u}", "in {t} corner", "at the {t}")


def _phrases(forms: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    upper = {place: place.replace("top", "upper").replace("bottom", "lower") for place in PLACES}
    return {t: tuple(form.format(t=t, u=u) for form in forms) for t, u in upper.items()}


PLACE_WORDS, SHORT_PLACES = _phrases(_CORNER), _phrases(_SHORT_CORNER)
PATTERN_WORDS: dict[str, tuple[str, ...]] = {
    "plain": ("plain {c} background", "flat {c} background", "uniform {c} background"),
    "gradient": ("{c} background with a soft gradient", "softly shaded {c} background", "{c} gradient background"),
    "dots": ("{c} background with faint dots", "faintly dotted {c} background", "{c} background with a dot pattern"),
    "stripes": (
        "{c} background with faint vertical bands", "{c} background with faint upright bands", "banded {c} background",
    ),
}  # fmt: skip

# {n} the object with its article, {N} the same at the start of a sentence, {p} / {P} its place.
LONG_OBJECT = (
    "{P} there is {n}.", "{P} sits {n}.", "{P} we find {n}.", "{P}, {n} can be seen.", "{P} one notices {n}.",
    "{P} you can see {n}.", "{N} sits {p}.", "{N} is placed {p}.", "There is {n} {p}.", "{N} appears {p}.",
    "You can see {n} {p}.", "The picture shows {n} {p}.", "{N} has been drawn {p}.", "Also visible is {n} {p}.",
)  # fmt: skip
LONG_SPLIT = (
    "{P} there is {n}. It is {s} and {t}.", "{N} sits {p}. It is {s}, and it {t}.",
    "{P} we find {n}, {s} in size. It {t}.", "{N} is located {p}. This {s} shape {t}.",
    "There is {n} {p}. It {t} and is {s}.", "{P} stands {n}, which {t}. It is {s}.",
)  # fmt: skip
CLEAN_OBJECT = (
    "{N} lies {p}.", "{P} lies {n}.", "{P} is {n}.", "{N} is {p}.", "{P} there is {n}.", "{N} stands {p}.",
    "{P} stands {n}.", "{N} can be found {p}.", "{P}, there is {n}.", "{N} rests {p}.", "{P} rests {n}.",
    "{N} is positioned {p}.", "{P} appears {n}.",
)  # fmt: skip
PAIR = (
    "{N0} is {p0}, while {n1} is {p1}.", "{P0} is {n0}, and {p1} is {n1}.", "{N0} sits {p0} and {n1} {p1}.",
    "{P0} there is {n0}; {p1} there is {n1}.",
)  # fmt: skip
GROUND = (
    "The whole scene is set on {b}.", "Everything is drawn on {b}.", "Behind it all is {b}.",
    "All of this lies on {b}.", "The scene has {b}.", "It is set against {b}.", "The picture has {b}.",
    "The backdrop is {b}.", "{B} fills the rest of the picture.", "{B} lies behind everything.",
    "{B} surrounds what is shown.", "One sees {b} throughout.",
)  # fmt: skip
INTROS = (
    "This {f} picture shows {k} on {b}.", "The {f} image shows {k} against {b}.", "A {f} drawing of {k}.",
    "We see a {f} picture with {k}.", "This is a simple {f} drawing with {k}.", "The {f} illustration contains {k}.",
    "Here is a {f} image that contains {k}.", "A {f} canvas carries {k}.", "This {f} graphic presents {k}.",
    "The {f} picture is made of {k}.", "In this {f} image there is a scene with {k}.",
    "A minimal {f} composition of {k}.",
)  # fmt: skip
IDLE_LONG = (
    "The style is flat and graphic, with clean shapes.", "Nothing else is shown in the picture.",
    "The composition is simple and easy to read.", "The overall impression is calm and uncluttered.",
    "There is no text and there are no people in the image.", "The rest of the canvas remains empty.",
    "It looks like a simple piece of graphic design.", "The arrangement leaves plenty of empty space.",
    "The geometric forms stand out clearly from what lies behind them.",
    "The viewer sees everything straight from the front.", "The scene contains no further elements or details.",
    "Overall, the image feels tidy and easy to understand.",
    "There is no sense of depth, since everything is drawn flat.",
    "The drawing is abstract and does not depict a real place.",
)  # fmt: skip
IDLE_CLEAN = (
    "Nothing else appears in the picture.", "The rest of the canvas is empty.", "There is no text anywhere.",
    "The drawing is flat and simple.", "No other shape is present in this scene.",
    "The composition is calm and uncluttered.", "Everything is seen straight from the front.",
    "The remaining area is left free of any shape.",
)  # fmt: skip
COUNTS = {
    1: ("a single shape", "one shape", "just one object", "a lone geometric shape"),
    2: ("two shapes", "a pair of objects", "two separate objects", "two geometric shapes"),
    3: ("three shapes", "three objects", "a group of three shapes", "three geometric shapes"),
    4: ("four shapes", "four objects", "a group of four shapes", "four geometric shapes"),
}

RELATIVE = (
    "The {a} is {r} the {b}.", "Seen from the {b}, the {a} is {x}.", "The {a} can be found {r} the {b}.",
    "Note that the {a} is {r} the {b}.", "Compared with the {b}, the {a} is placed {x}.",
    "Thus the {a} lies {r} the {b}.",
)  # fmt: skip
REPEATED = (
    "The {a} is {s}.", "As for the {a}, it {t}.", "The {a}, seen {p}, is {s}.", "Looking closely, the {a} {t}.",
    "It is worth noting that the {a} {t}.", "The {a} {p} is easy to spot.",
)  # fmt: skip

# {n} the object without article, {a} with it.
SHORT_OBJECT = ("{n} {p}", "{n} {p}", "{p} {n}", "{p}: {n}", "{n}, {p}", "{a} {p}", "{p} {a}", "{p} is {a}")
SHORT_GROUND = ("{b}", "{b}", "on {a}", "all on {a}", "with {a}")
SHORT_OPENING = ("drawing of", "picture:", "clipart,", "simple graphic,", "vector art:", "image of", "design with")
SEPARATORS = (", ", ", ", " and ", "; ", " / ")


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
        told = {
            "short": _short(scene, rng["short"]),
            "long": _long(scene, rng["long"]),
            "clean": _clean(scene, rng["clean"]),
        }
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
    if (
        "{b}" not in intro or not opening or _count([opening, *parts]) > most
    ):  # the background must be told by a sentence of its own
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
