"""Words, phrases of places and sentence parts of the grammar of captions, combined by the hundred (forms.py puts them together)."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache

from paradiffusion.scenes.world import SceneObject, pick, row_and_column

Slots = Mapping[str, str | Callable[[], str]]

SHAPES_SAID: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "circle", "circle", "circle", "disc", "round shape"),
    "square": ("square", "square", "square", "square", "box", "square shape"),
    "triangle": ("triangle", "triangle", "triangle", "triangle", "triangular shape"),
    "star": ("star", "star", "star", "star", "five-pointed star", "star shape"),
    "diamond": ("diamond", "diamond", "diamond", "diamond", "rhombus", "lozenge", "diamond shape"),
    "cross": ("cross", "cross", "cross", "cross", "plus sign", "plus", "cross shape"),
    "heart": ("heart", "heart", "heart", "heart", "heart shape", "heart symbol"),
    "ring": ("ring", "ring", "ring", "ring", "hoop", "ring shape", "hollow circle"),
}
SIZES_SAID: dict[str, tuple[str, ...]] = {
    "small": ("small", "small", "little", "tiny", "rather small", "miniature", "compact"),
    "medium": ("medium-sized", "mid-sized", "medium", "average-sized", "moderately sized", "middle-sized"),
    "large": ("large", "large", "big", "big", "huge", "sizeable", "very large", "great"),
}
SIZES_STATED: dict[str, tuple[str, ...]] = {
    "small": ("small", "quite small", "small in size", "tiny", "rather little", "of small size", "not very big"),
    "medium": ("medium-sized", "of medium size", "of average size", "neither big nor small", "middling in size"),
    "large": ("large", "quite large", "large in size", "big", "rather big", "of large size", "huge"),
}
TEXTURES_SAID: dict[str, tuple[str, ...]] = {
    "plain": ("plain", "solid", "uniform", "flat", "evenly coloured", "unpatterned"),
    "striped": ("striped", "striped", "stripy", "diagonally striped", "hatched", "lined"),
    "outlined": ("outlined", "outlined", "boldly outlined", "thickly outlined", "framed", "bordered"),
}
TEXTURES_AFTER: dict[str, tuple[str, ...]] = {
    "plain": ("with a plain surface", "in one solid colour", "without any pattern", "with an even fill"),
    "striped": (
        "with stripes", "with diagonal stripes", "covered in stripes", "with slanted lines", "with stripes across it",
    ),
    "outlined": (
        "with an outline", "with a thick outline", "with a bold edge", "with a border", "inside a thick outline",
    ),
}  # fmt: skip
TEXTURES_STATED: dict[str, tuple[str, ...]] = {
    "plain": ("has a plain surface", "is filled evenly", "shows no pattern", "is of one solid colour"),
    "striped": ("has stripes", "has diagonal stripes", "is covered in stripes", "is striped", "carries slanted lines"),
    "outlined": ("has an outline", "has a thick outline", "is framed by a bold line", "is outlined", "has a bold border"),
}  # fmt: skip
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

RULES: dict[str, tuple[str, ...]] = {
    "there": (
        "there is", "there is", "there is", "there's", "there's", "we have", "we see", "you see", "you can see", "one sees",
        "I see", "I can see", "we find", "you find", "one finds", "you will find", "we notice", "one can make out", "you get",
        "one notices", "I can spot", "you will notice", "we can spot", "you may see", "we are shown", "the picture has",
        "the picture shows", "the image shows", "the artist has put", "somebody has drawn", "I have drawn", "they have placed",
        "one can see", "someone painted", "we can find", "the drawing has",
    ),
    "wish": (
        "put", "place", "draw", "paint", "add", "set", "position", "show", "I want", "I would like", "please draw", "please put",
        "imagine", "picture", "make", "please add", "we need", "I'd like to see", "let us have", "include", "insert", "render",
    ),
    "lies": (
        "is", "is", "is", "sits", "sits", "lies", "stands", "rests", "appears", "hangs", "floats", "is placed", "is located",
        "is positioned", "is found", "is seen", "is drawn", "is painted", "is shown", "is set", "waits", "stays", "is visible",
        "can be seen", "can be found", "has been put", "has been placed", "has been drawn", "has its place",
        "is situated", "lives", "hovers", "is to be found", "is to be seen", "is arranged", "is displayed", "was put", "was painted",
        "is put", "remains", "is spotted", "may be seen",
    ),
    "ends": (
        "can be seen", "is visible", "appears", "is shown", "has been drawn", "can be found", "waits", "sits", "stands",
        "has been painted", "is displayed", "has its place", "rests", "is placed", "is found", "catches the eye",
    ),
    "lying": (
        "placed", "located", "drawn", "set", "positioned", "sitting", "standing", "lying", "resting", "painted", "hanging", "floating",
        "visible", "that sits", "that lies", "that is placed", "which is located", "situated",
    ),
    "holds": (
        "holds", "holds", "contains", "contains", "shows", "shows", "has", "has", "carries", "features", "bears", "is home to",
        "is occupied by", "is taken by", "is filled by", "presents", "displays", "houses", "hosts", "is reserved for", "is marked by",
        "is decorated with", "gives room to", "offers", "belongs to", "keeps", "includes", "is used for", "is given to",
    ),
    "fills": (
        "occupies", "occupies", "takes", "takes up", "marks", "decorates", "claims", "adorns", "fills", "is given", "has taken",
        "dominates", "uses",
    ),
    "thing": ("shape", "shape", "object", "figure", "form", "item", "element", "thing"),
    "you see": ("you see", "we see", "one sees", "you find", "I see", "there is", "we find", "you notice"),
    "and": (", and", ", and", " and", ", while", ", while", ", whereas", ";", ", but", ", and then"),
    "colour": ("{c}", "{c}", "{c}", "{c}", "{c}", "{c}", "{c}", "bright {c}", "vivid {c}"),
    # An object with its article ("@ " becomes "a" or "an"): all of what is said of it stands with the noun.
    "n": (
        *("@ {colour} {s}",) * 7, "@ {s} in {colour}", "@ {s}, {c} in colour,", "@ {s} coloured {c}", "@ {s} painted in {c}",
        "@ {s} of {c} colour", "@ {s} that is {c}", "@ {s}, which is {c},", "@ {c}-coloured {s}", "@ {s} painted {c}",
        "@ {s} ({c})", "one {colour} {s}", "the {c} {s}",
    ),
    "n size": (
        *("@ {z} {colour} {s}",) * 7, "@ {c} {s}, {Z},", "@ {s}, {Z} and {c},", "@ {s}, {c} and {Z},", "@ {z} {s} in {colour}",
        "@ {z} {s} coloured {c}", "@ {z} {s}, painted {c},", "@ {s} that is {Z} and {c}", "@ {colour}, {z} {s}", "@ {z} {s} of {c} colour",
        "@ {colour} {s} that is {Z}", "@ {z} {s} ({c})", "@ {c} {s}, which is {Z},", "one {z} {c} {s}", "the {z} {c} {s}",
        "@ {z}, {c} {s}",
    ),
    "n texture": (
        *("@ {t} {colour} {s}",) * 4, "@ {c} {s} {T}", "@ {c} {s} {T}", "@ {c}, {t} {s}", "@ {s} in {c} {T}", "@ {colour} {s}, which {S},",
        "@ {c} and {t} {s}", "@ {t} {s} in {colour}", "@ {s}, {c} and {t},", "@ {t} {s} of {c} colour", "@ {c} {s} that {S}",
        "the {t} {c} {s}",
    ),
    "n both": (
        *("@ {z} {t} {colour} {s}",) * 3, "@ {z} {c} {s} {T}", "@ {z} {c} {s} {T}", "@ {t}, {z} {c} {s}", "@ {z}, {t} {s} in {c}",
        "@ {z} {s} in {colour} {T}", "@ {s}, {Z} and {c}, {T},", "@ {t} {c} {s}, {Z},", "@ {c} {s} that is {Z} and {S}",
        "@ {z} {c} {s}, which {S},", "the {z} {c} {s} {T}", "@ {z}, {t}, {c} {s}", "@ {t} {c} {s} of {sizes} size",
    ),
    # An object whose colour comes later, and what is said of it then.
    "u": ("@ {s}", "@ {s}", "@ {s}", "@ {z} {s}", "one {s}"),
    "is": (
        "is {colour}", "is {colour}", "is {colour}", "is coloured {c}", "is painted {c}", "has the colour {c}", "is all {c}",
        "has been painted {c}", "is {c} in colour",
    ),
    "is size": ("is {c} and {Z}", "is {Z} and {c}", "is {colour} and also {Z}", "is {c}, and {Z}", "is {Z}, and its colour is {c}"),
    "is texture": ("is {c} and {t}", "is {t} and {c}", "is {c} and {S}", "{S} and is {c}", "is {c}, and it {S}"),
    "is both": ("is {c}, {Z} and {t}", "is {Z}, {c} and {t}", "is {Z} and {c}, and it {S}", "{S}, is {c} and {Z}"),
    "it is": (
        "it {is it}", "it {is it}", "it {is it}", "its colour is {c}", "this {s} {is it}", "this one {is it}", "{c} is its colour",
        "the {s} {is it}", "it was painted {c}", "its colour is {c}, and it is {Z}", "it comes in {c}", "they made it {c}",
    ),
    "located": ("{there} {u} {p}", "{p} {there} {u}", "{p} {lies} {u}", "{p} {lies} {u}", "{u} {lies} {p}", "{u} {lies} {p}"),
    # One object at a place that any adverbial can name, also one relative to another object.
    "one": (
        *("{there} {n} {p}",) * 6, *("{p} {there} {n}",) * 5, *("{p}, {there} {n}",) * 3, *("{n} {lies} {p}",) * 12,
        *("{p} {lies} {n}",) * 8, *("{p}, {n} {ends}",) * 4, *("{there} {n} {lying} {p}",) * 3, "{n}, {lying} {p}",
        *("{wish} {n} {p}",) * 4, "{p}, {wish} {n}", "{p} {wish} {n}", "the {thing} {p} is {n}", "the {thing} {lying} {p} is {n}",
        "what {lies} {p} is {n}", "{n} is what {you see} {p}", "look {p} and {you see} {n}", "look {p}: {n}",
        *("the {s} {p} {is it}",) * 3, "the {s} {lying} {p} {is it}", "the {c} {thing} {p} is @ {s}", "{c} is the colour of the {s} {p}",
        "the colour of the {s} {p} is {c}", *("the {c} {s} {lies} {p}",) * 4, "{p} {there} something {c}, namely @ {s}",
        *("{located}. {it is}",) * 10, *("{located}, which {is it}",) * 2, "{located}; {it is}", "{located}, and it {is it}",
        "{p} {there} something {c}. it is @ {s}", "{p} {lies} something {c}: @ {s}", "the {thing} {p} is @ {s}. {it is}",
        "{there} {n simple} {p}. it is {Z}", "{n simple} {lies} {p}. it {S}", "{p} {lies} {n simple}. it is {Z}, and it {S}",
        "{n} {p}", "{p}, {n}",
    ),
    # One object in a place that has a name.
    "one here": (
        *("{q} {holds} {n}",) * 8, *("{n} {fills} {q}",) * 4, *("{k}: {n}",) * 3, "{q} is where {n} {ends}", "{q}: {n}",
        "{q} {holds} {u}. {it is}", "{q} {holds} {u}, which {is it}", "in {q}, {there} {n}", "{u} {fills} {q}. {it is}",
        "as for {q}, {there} {n}", "for {q}, {wish} {n}", "{n} belongs in {q}", "{q} {holds} {n simple}. it is {Z}",
        "{q} is {c}: {there} @ {s} there", "{q} {holds} @ {s} in {c}",
    ),
    # Beside the object of the sentence before, without an adverbial.
    "neighbour": (
        "its {side} neighbour is {n}", "its neighbour {at side} is {n}", "{n} is its neighbour {at side}", "the next one {at side} is {n}",
        "going one step {way}, {there} {n}", "one step {way} brings you to {n}", "go one step {way} and you find {n}",
        "move one place {way}: {n}", "the place {o of it} {holds} {n}", "the {s} {o of it} {is it}", "{n} comes next {at side}",
        "it is followed {at side} by {n}", "if you go one step {way}, you meet {n}", "next {at side} comes {n}",
    ),
    # The same, but of an object that goes on to be called "it": no "it" may follow.
    "has neighbour": (
        "it has {n} {o of it}", "it has {n} as its neighbour {at side}", "it {lies} {o of n}", "it has {n} next to it {at side}",
        "it borders on {n} {at side}",
    ),
    "two": (
        *("{n1} {lies} {p1}{and} {n2} {lies} {p2}",) * 4, *("{p1} {lies} {n1}{and} {p2} {lies} {n2}",) * 3,
        *("{p1} {there} {n1}{and} {p2} {n2}",) * 2, *("{there} {n1} {p1} and {n2} {p2}",) * 2, "{p1} {there} {n1}{and} {p2} {there} {n2}",
        "{q1} {holds} {n1}{and} {q2} {holds} {n2}", "{q1} {holds} {n1}{and} {q2} {n2}", "{n1} {fills} {q1}{and} {n2} {fills} {q2}",
        "{n1} and {n2} {lie} {p1} and {p2}, respectively", "{wish} {n1} {p1} and {n2} {p2}", "{n1} {p1} and {n2} {p2}",
        "the {s1} {p1} is {c1}{and} the {s2} {p2} is {c2}", "{k1}: {n1}; {k2}: {n2}", "as a pair, {n1} {p1} and {n2} {p2}",
        "{q1} and {q2} are taken, the former by {n1} and the latter by {n2}", "{n1} {lies} {p1}, {n2} {p2}",
    ),
    "lie": ("sit", "lie", "stand", "are", "are placed", "can be seen", "are drawn", "are located", "appear", "rest"),
    # A row or column: {r} its name, {m} its objects, each at its place there, {l} all of them in order where it is full.
    "several": (
        "{r} {holds} {m}", "{r} {holds} {m}", "in {r} {there} {m}", "in {r}, {there} {m}", "{there} {m} in {r}", "{r}: {m}",
        "in {r}, {wish} {m}", "for {r}, {wish} {m}", "{r} is made of {m}", "{r} has this: {m}",
    ),
    "in order": (
        "{order}, {r} {holds} {l}", "{r} {holds} {l}, {order}", "in {r}, {order}, {there} {l}", "{r}, {order}: {l}",
        "in {r} {there} {l}, in this order {order}", "{r} {holds} {l} ({order})", "read {order}, {r} {holds} {l}",
        "{order}, in {r}, {there} {l}", "{r} is made of {l} ({order})",
    ),
    "pattern": ("", "", "{pattern}"),
    "ground noun": ("background", "background", "background", "backdrop", "ground", "canvas", "field", "surface"),
    "g": ("@ {gc} {ground noun}", "@ {gc} {ground noun}", "@ {pattern} {gc} {ground noun}", "@ {gc} {ground noun} {with pattern}",
          "@ {pattern}, {gc} {ground noun}"),
    "bare g": ("{gc}", "{pattern} {gc}", "@ {gc} {ground noun}", "{gc} {ground noun}", "@ {gc} {ground noun} {with pattern}"),
    "ground": (
        "the background is {gc}", "the background is {gc}", "the background is {pattern} and {gc}", "the background is {gc} {with pattern}",
        "everything is set on {g}", "everything is drawn on {g}", "behind it all is {g}", "{gc} is the colour of the background",
        "the rest is {gc}", "the rest of the picture is {gc}", "all this on {g}", "all of this is on {g}", "{g} lies behind everything",
        "the picture has {g}", "the scene is set against {g}", "for the background, {gc} was chosen", "the backdrop is {gc}",
        "use {g}", "paint the background {gc}", "make the background {gc}", "the canvas is {gc}", "the whole thing is on {g}",
        "the colour behind it all is {gc}", "the scene has {g}", "the whole is painted on {g}", "around and behind there is only {gc}",
        "what lies behind is {gc}", "as a background, {g} is used", "they chose {g} for the picture", "the ground of the picture is {gc}",
        "as for the background, it is {gc}", "there is {g} behind everything", "one sees {g} throughout", "the surface behind is {gc}",
        "the page is {gc}", "the sheet is {gc}", "the wall behind is {gc}", "the drawing is on {gc}", "{gc} fills all the rest",
    ),
    "on ground": (
        "on {g}", "on {g}", "against {g}", "in front of {g}", "over {g}", "upon {g}", "on {gc}", "against {gc}", "on a sheet of {gc}",
        "on a {gc} page", "set on {g}", "with {g}",
    ),
    "this": ("this", "the", "the", "this simple", "the small", "our"),
    "picture": ("picture", "picture", "image", "drawing", "illustration", "graphic", "scene", "composition", "design", "artwork"),
    "shows": ("shows", "contains", "presents", "depicts", "has", "consists of", "is made of", "features", "displays", "holds"),
    "kind": ("", "", "geometric ", "simple ", "coloured ", "flat ", "abstract "),
    "opening": (
        "{this} {picture} {shows} {number}", "{this} {picture} {shows} {number} on {g}", "@ {picture} of {number}",
        "@ {picture} with {number} on {g}", "here is @ {picture} with {number}", "we look at @ {picture} of {number}",
        "{number}, nothing more", "{number} on {g}", "{number} {make} up {this} {picture}", "you see {number}", "there {are} {number} here",
        "imagine {g} with {number}", "please draw {number} on {g}", "{this} {picture} is simple: {number} on {g}",
        "it is @ {picture} that {shows} {number}", "draw @ {picture} with {number}", "{number} can be seen against {g}",
        "I describe @ {picture} of {number} on {g}", "in {this} {picture} {number} {are} placed on {g}", "what do we see? {number}",
    ),
    "bare opening": (
        "here is what you see", "let me describe the picture", "the picture is simple", "this is a flat drawing", "look at this picture",
        "a simple design", "what do we see here", "this is what it looks like", "a picture to describe", "this is an abstract picture",
    ),
    "empty": (
        "nothing is {p}", "there is nothing {p}", "{q} is empty", "{q} stays free", "{q} is left blank", "{q} has nothing in it",
        "no shape is {p}", "leave {q} empty", "{p}, nothing can be seen", "we find nothing {p}", "{q} remains vacant",
    ),
    "known": (
        "the {a} is {o of b}", "the {a} {lies} {o of b}", "so the {a} is {o of b}", "this means that the {a} is {o of b}",
        "{o of b} you have seen the {a}", "note that the {a} is {o of b}", "the {a}, then, is {o of b}",
    ),
    "first": ("first,", "to begin with,", "first of all,", "let us start:", "to start,"),
    "then": (
        "then", "next,", "also,", "furthermore,", "in addition,", "besides,", "moreover,", "after that,", "and", "further,",
        "apart from that,", "now", "as well,", "beyond that,", "what is more,",
    ),
    "last": ("finally,", "lastly,", "last of all,", "in the end,", "to finish,", "and finally,", "and"),
    # Idle sentences: true of every scene.
    "idle": (
        "the {layout} is {calm}", "the {layout} is {calm}", "the {layout} looks {calm}", "the {layout} seems {calm} and {calm}",
        "the {layout} is meant to be {calm}", "overall, the {layout} feels {calm}", "nothing else {ends0}", "nothing else {ends0}",
        "there is no {missing} {anywhere}", "there are no {missings} {anywhere}", "I see no {missings}", "no {missing} {ends0}",
        "the rest is {vacant}", "all other space is {vacant}", "what remains of the {picture} is {vacant}", "every shape keeps to itself",
        "none of the shapes touches the edge", "no shape touches another", "the viewer looks at it straight from the front",
        "everything is flat, without depth", "one understands it at a glance", "it could be a poster or a card",
        "a child could have cut it out of paper", "it reminds one of a puzzle", "that is all there is to see",
        "the forms are easy to tell apart", "the style is {calm}", "it was made with a few clear forms",
        "no story is told, only forms and colours", "such pictures are made to be described",
    ),
    "layout": ("composition", "layout", "arrangement", "drawing", "design", "whole", "overall impression", "picture", "scene"),
    "calm": ("calm", "simple", "clear", "tidy", "plain to read", "uncluttered", "minimal", "abstract", "quiet",
             "easy to understand", "flat and graphic", "orderly"),
    "ends0": ("appears", "is shown", "can be seen", "is visible", "is drawn", "was added", "can be found", "is needed"),
    "missing": ("text", "person", "animal", "shadow", "photograph", "landscape", "writing", "frame", "signature"),
    "missings": ("people", "animals", "letters", "shadows", "further objects", "buildings", "words", "other shapes"),
    "anywhere": ("anywhere", "here", "in it", "at all", "in the {picture}", "to be seen"),
    "vacant": ("empty", "left free", "free of shapes", "bare", "without any object", "unused"),
}  # fmt: skip
PATTERNS_SAID: dict[str, tuple[str, ...]] = {
    "plain": ("plain", "flat", "uniform", "even", "empty"),
    "gradient": ("softly shaded", "gently graded", "gradient", "smoothly shaded"),
    "dots": ("dotted", "faintly dotted", "lightly dotted", "spotted"),
    "stripes": ("banded", "faintly banded", "lightly striped", "vertically banded"),
}
PATTERNS_AFTER: dict[str, tuple[str, ...]] = {
    "plain": ("without a pattern", "without any texture", "of one tone"),
    "gradient": ("with a soft gradient", "with a gradient", "that changes softly in brightness"),
    "dots": ("with faint dots", "with a dot pattern", "with small pale dots"),
    "stripes": ("with faint vertical bands", "with faint upright bands", "with pale upright stripes"),
}
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
    "{v} {h}", "{v} {h}", "{V} {h}", "{v}-{h} corner", "{V} {h} corner", "{v} {h} corner", "in the {v} {h}",
)  # fmt: skip
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
