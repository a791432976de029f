"""The truth of sentences: how far a built-in scene's picture fulfils each one of its caption, by ground truth and pixels alone.

The facts of a sentence are what it says of objects (there in its colour, shape, size, texture), of how two of them lie to
each other, of the background and of the number of objects. Its score is the mean over the things it speaks of, each the
weighted mean over its facts (FAINT); the thing that a sentence names must be there (no red circle, no shape of the red circle).

Claims are read from the words that captions are made of (scenes/captions.py). Of the many forms of grammar.py those are read
that name a colour right before its shape; no other thing is claimed by a sentence that says its colour elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from PIL import Image

from paradiffusion.scenes.drawing import draw, mix, pattern_strength
from paradiffusion.scenes.grammar import all_words, place_labels, place_names, place_phrases, word_lists
from paradiffusion.scenes.judge import ObjectVerdict, cell_of, judge_picture, on_canvas, perceptual, presence_of
from paradiffusion.scenes.world import (
    BACKGROUNDS,
    CHALK,
    COLOURS,
    DARK_BACKGROUNDS,
    INK,
    PATTERNS,
    PLACES,
    SIZES,
    TEXTURES,
    Background,
    Scene,
    SceneObject,
    cell_box,
    places,
    radius_of,
)

# What a sentence is about, as tables show it; a sentence of none of these is idle: no picture shows whether it holds.
KINDS: Final = ("object", "attributes", "relation", "background", "count")


@dataclass(frozen=True)
class Mention:
    """An object that a sentence speaks of; size and texture are None where the sentence does not say them.

    ``named`` is False for "It is small": the thing is meant, but neither its colour nor its shape are said.
    """

    colour: str
    shape: str
    size: str | None = None
    texture: str | None = None
    named: bool = True


@dataclass(frozen=True)
class Claim:
    """What one sentence says: ``kind`` is one of KINDS, or "" for an idle sentence; ``relation`` where one of its two objects lies as seen
    from the other. What of background and number of objects is not spoken of is None."""

    kind: str
    mentions: tuple[Mention, ...] = ()
    relation: bool = False
    ground: str | None = None
    pattern: str | None = None
    count: int | None = None

    def names(self, colour: str, shape: str) -> bool:
        """Whether it speaks of this object."""
        return any((one.colour, one.shape) == (colour, shape) for one in self.mentions)


def _meanings(*names: str) -> list[tuple[str, str]]:
    """(words, meaning) of tables of words.toml ("SHAPE_WORDS" of templates, "SHAPES_SAID" of the grammar), longer words first, so
    that "boldly outlined" is not read as "outlined" and left half."""
    tables = [word_lists("grammar" if "S_" in name else "captions", name) for name in names]
    pairs = {(words, meaning) for table in tables for meaning, forms in table.items() for words in forms}
    return sorted(pairs, key=lambda pair: (-len(pair[0]), pair[0]))


def _any(words: Sequence[str]) -> str:
    return "|".join(re.escape(word) for word in words)


_SHAPES: Final = _meanings("SHAPE_WORDS", "SHAPES_SAID")
_SIZES: Final = _meanings("SIZE_WORDS", "SIZES_SAID", "SIZES_STATED")
_TEXTURES: Final = _meanings("TEXTURE_BEFORE", "TEXTURE_AFTER", "TEXTURE_STATED", "TEXTURES_SAID", "TEXTURES_AFTER", "TEXTURES_STATED")
_COUNTS: Final = _meanings("COUNTS")
_PATTERNS: Final = _meanings("PATTERN_WORDS")
# "an orange, boldly outlined" never occurs: a colour stands before its shape, other attributes before both or after them.
_NOUN: Final = re.compile(
    rf"\b(?P<before>(?:(?:{_any([w for w, _ in _meanings('SIZE_WORDS', 'TEXTURE_BEFORE', 'SIZES_SAID', 'TEXTURES_SAID')])}),?\s+)*)"
    rf"(?P<colour>{_any(tuple(COLOURS))})\s+(?P<shape>{_any([w for w, _ in _SHAPES])})\b"
    rf"(?P<after>\s+(?:{_any([w for w, _ in _meanings('TEXTURE_AFTER', 'TEXTURES_AFTER')])})\b)?",
    re.IGNORECASE,
)
_GROUND: Final = re.compile(rf"\b({_any(tuple(BACKGROUNDS))})\b", re.IGNORECASE)
_ANY_SHAPE: Final = re.compile(rf"\b(?:{_any([w for w, _ in _SHAPES])})\b", re.IGNORECASE)
_PLACE: Final = re.compile(
    r"\b(?:top|upper|bottom|lower)[ -](?:left|right)\b|"
    + _any([w for grid in (2, 3) for p in places(grid) for w in (*place_phrases(p, grid), *place_names(p, grid))]),
    re.IGNORECASE,
)
_REFERS: Final = re.compile(r"^(?:it|this [\w-]+ shape)\b", re.IGNORECASE)
_RELATION: Final = re.compile(r"\b(?:above|below|to the (?:left|right) of|further (?:left|right)|higher up|lower down)\b", re.IGNORECASE)


def claims(sentences: Sequence[str]) -> list[Claim]:
    """What each sentence of a caption claims; "It ..." is said of the one object that the sentence before it is about."""
    found: list[Claim] = []
    last: Mention | None = None
    for sentence in sentences:
        claim = _claim(sentence, last)
        found.append(claim)
        last = claim.mentions[0] if len(claim.mentions) == 1 and _one_thing(sentence) else None
    return found


def _claim(sentence: str, last: Mention | None) -> Claim:
    nouns = list(_NOUN.finditer(sentence))
    ground = _GROUND.search(sentence)
    alone = len(nouns) == 1 and ground is None and _one_thing(sentence)
    mentions = tuple(_mention(noun, sentence if alone else noun.group()) for noun in nouns)
    if not _ANY_SHAPE.search(sentence) and not ground and last is not None and _REFERS.match(sentence):
        size, texture = _meaning(_SIZES, sentence), _meaning(_TEXTURES, sentence)
        if size or texture:
            mentions = (Mention(last.colour, last.shape, size, texture, named=False),)
    relation = len(mentions) == 2 and bool(_RELATION.search(sentence))
    count = None if mentions else _meaning(_COUNTS, sentence)
    kind = ""
    if mentions:
        kind = "relation" if relation else "object" if _places(sentence) else "attributes"
    elif ground or count:
        kind = "background" if ground else "count"
    colour = ground.group(1).lower() if ground else None
    return Claim(kind, mentions, relation, colour, _pattern_said(sentence, colour), int(count) if count else None)


def _one_thing(sentence: str) -> bool:
    """Whether it has no more than one shape: "a star to the left of the red square" says nothing else of the square."""
    return len(_ANY_SHAPE.findall(sentence)) <= 1


def _mention(noun: re.Match[str], text: str) -> Mention:
    shape = _meaning(_SHAPES, noun["shape"])
    assert shape is not None  # the expression is made of the same words
    return Mention(noun["colour"].lower(), shape, _meaning(_SIZES, text), _meaning(_TEXTURES, text))


def _places(sentence: str) -> bool:
    return bool(_PLACE.search(sentence))


def _pattern_said(sentence: str, ground: str | None) -> str | None:
    if ground is None:
        return None
    lower = sentence.lower()
    return next((pattern for form, pattern in _PATTERNS if form.format(c=ground) in lower), None)


def _meaning(table: list[tuple[str, str]], text: str) -> str | None:
    """What the longest of the table's words that stands in ``text`` means."""
    lower = text.lower()
    return next((meaning for words, meaning in table if re.search(rf"\b{re.escape(words)}\b", lower)), None)


# What single facts are about, as tables show it.
FACTS: Final = ("there", "colour at place", "shape", "size", "texture", "relation", "background", "pattern", "count")
# What a thing looks like in detail counts half of what it is: the nano codec alone blurs away many stripes and faint dots.
DETAILS: Final = ("size", "texture", "pattern")
FAINT: Final = 0.5


@dataclass(frozen=True)
class Followed:
    """How far a picture fulfils one sentence: 0 to 1, 1 where every fact holds; and (one of FACTS, how far it holds)."""

    score: float
    facts: tuple[tuple[str, float], ...]

    @property
    def followed(self) -> bool:
        """Whether all that it says holds; details (DETAILS) are passed over where it says more than these."""
        main = [value for name, value in self.facts if name not in DETAILS and name != "there"]
        return all(value == 1 for value in main or [value for _, value in self.facts])


@dataclass(frozen=True)
class SeenPicture:
    """What a picture shows of a scene: its objects in the scene's order, each with size and texture, the ground, and how many
    objects there are."""

    objects: tuple[tuple[ObjectVerdict, str, str], ...]
    ground: str
    pattern: str
    count: int


def follow(scene: Scene, sentences: Sequence[str], image: np.ndarray) -> list[Followed | None]:
    """How far ``image``, uint8 [H, W, 3] of any size, fulfils each sentence of a caption of ``scene``. None for a sentence that no
    picture can show to be wrong ("The composition is calm."), or whose object the scene does not have."""
    said = claims(sentences)
    seen = look(scene, image)
    return [_followed(scene, claim, seen) for claim in said]


def look(scene: Scene, image: np.ndarray) -> SeenPicture:
    """All that ``follow`` needs to know of a picture."""
    pixels = on_canvas(image, scene.width, scene.height)
    verdict = judge_picture(scene, pixels)
    objects = []
    for item, found in zip(scene.objects, verdict.objects, strict=True):
        size, texture = _size_and_texture(pixels, item, found, verdict.ground, scene) if found.present else ("", "")
        objects.append((found, size, texture))
    count = sum(found.present for found, _, _ in objects) + verdict.extra
    return SeenPicture(tuple(objects), verdict.ground, _pattern(pixels, scene, verdict.ground), count)


def _followed(scene: Scene, claim: Claim, seen: SeenPicture) -> Followed | None:
    things = [facts for mention in claim.mentions if (facts := _of_object(scene, mention, seen)) is not None]
    # Objects are not searched for: each is where the caption puts it, or it counts as not there. So a relation holds where
    # both objects of it are there; it is listed, but adds nothing to the mean, of which they are a part already.
    related = [("relation", float(all(facts[0][1] for facts in things)))] if claim.relation and len(things) == 2 else []
    if claim.ground is not None:
        right = float(seen.ground == claim.ground)
        facts = [("background", right)]
        if claim.pattern is not None:
            facts.append(("pattern", right * (seen.pattern == claim.pattern)))
        things.append(facts)
    if claim.count is not None:
        # Each object too many or too few costs the same, and less than a sentence about two objects loses of which one is
        # missing: of all that it counts, one is wrong. Our choice.
        things.append([("count", 1 / (1 + abs(seen.count - claim.count) / (claim.count + 1)))])
    if not things:
        return None
    means = [_mean(facts) for facts in things]
    return Followed(sum(means) / len(means), (*(fact for facts in things for fact in facts), *related))


def _mean(facts: list[tuple[str, float]]) -> float:
    weights = [FAINT if name in DETAILS else 1.0 for name, _ in facts]
    return sum(weight * value for weight, (_, value) in zip(weights, facts, strict=True)) / sum(weights)


def _of_object(scene: Scene, mention: Mention, seen: SeenPicture) -> list[tuple[str, float]] | None:
    """Facts on one object. Where the sentence names it, nothing of it holds without its colour at its place; "It is small"
    holds of a thing in another colour too."""
    for item, (found, size, texture) in zip(scene.objects, seen.objects, strict=True):
        if (item.colour, item.shape) == (mention.colour, mention.shape):
            there = found.colour if mention.named else found.present
            facts = [("colour at place", there), ("shape", there and found.shape)] if mention.named else [("there", there)]
            if mention.size is not None:
                facts.append(("size", there and size == mention.size))
            if mention.texture is not None:
                facts.append(("texture", there and texture == mention.texture))
            return [(name, float(value)) for name, value in facts]
    return None


def _size_and_texture(pixels: np.ndarray, item: SceneObject, seen: ObjectVerdict, ground: str, scene: Scene) -> tuple[str, str]:
    """The size whose area, and the texture whose drawing in the same spot, come nearest."""
    cell = cell_of(item.place, scene.width, scene.height, scene.grid)
    mask = presence_of(pixels[cell], seen.seen_colour, ground)
    area, middle = _area_and_middle(mask)
    back = ground if ground in BACKGROUNDS else scene.background.colour
    # Areas differ by shape, and small shapes are easily taken for one another: that which is asked for is tried first, and
    # the one that was seen only where that does not give the right size. Stripes and outlines stand out from the ground as
    # the rest does, so plain drawings will do.
    for shape in (item.shape, seen.seen_shape or item.shape):
        looks = (shape, seen.seen_colour, back, scene.width, scene.height, scene.grid)
        size = min(SIZES, key=lambda name: abs(np.log(area / _model(name, "plain", *looks).area)))
        if size == item.size:
            break
    found = perceptual(pixels[cell])
    errors = {}
    for texture in TEXTURES:
        model = _model(size, texture, *looks)
        shift = middle[0] - model.middle[0], middle[1] - model.middle[1]
        errors[texture] = float((np.abs(found - _moved(model.picture, shift)).sum(-1) * mask).sum())
    return size, min(errors, key=lambda texture: errors[texture])


@dataclass(frozen=True)
class _Model:
    """An object drawn in the middle of its cell: OKLab [h, w, 3], the area and middle of what stands out."""

    picture: np.ndarray
    area: float
    middle: tuple[float, float]


@lru_cache(maxsize=8192)
def _model(size: str, texture: str, shape: str, colour: str, ground: str, width: int, height: int, grid: int) -> _Model:
    place = places(grid)[0]
    cell = cell_of(place, width, height, grid)
    rows, columns = cell
    cx, cy = (columns.start + columns.stop) / 2, (rows.start + rows.stop) / 2
    item = SceneObject(shape, colour, size, texture, place, cx, cy, radius_of(size, width, height, grid))
    picture = np.asarray(draw(Scene(width, height, Background(ground, "plain"), (item,))))[cell]
    return _Model(perceptual(picture), *_area_and_middle(presence_of(picture, colour, ground)))


def _area_and_middle(mask: np.ndarray) -> tuple[float, tuple[float, float]]:
    """The sum of a mask [h, w], at least 1, and its centre of mass (x, y)."""
    area = max(float(mask.sum()), 1.0)
    y, x = np.mgrid[: mask.shape[0], : mask.shape[1]]
    return area, (float((mask * x).sum()) / area, float((mask * y).sum()) / area)


def _moved(picture: np.ndarray, shift: tuple[float, float]) -> np.ndarray:
    """OKLab [h, w, 3] moved by fractions of pixels to the right and down; its edge is continued."""
    pad = 2 + int(np.ceil(max(abs(shift[0]), abs(shift[1]))))
    padded = np.pad(picture, ((pad, pad), (pad, pad), (0, 0)), mode="edge")
    numbers = (1, 0, pad - shift[0], 0, 1, pad - shift[1])
    size = (picture.shape[1], picture.shape[0])
    planes = [
        Image.fromarray(np.ascontiguousarray(padded[..., plane])).transform(
            size, Image.Transform.AFFINE, numbers, Image.Resampling.BILINEAR
        )
        for plane in range(3)
    ]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1)


def _pattern(pixels: np.ndarray, scene: Scene, ground: str) -> str:
    """The background's pattern: that which, taken off the free area, leaves the least light and shade.

    Only what no object covers is looked at, where the pattern is not washed out by their edges.
    """
    if ground not in BACKGROUNDS:
        return ""
    free = _free(scene, 2)
    if free.mean() < 0.05:  # four large objects fill a square canvas
        free = _free(scene, 0)
    light = perceptual(pixels)[..., 0][free]
    dark = ground in DARK_BACKGROUNDS
    plain, shaded = BACKGROUNDS[ground], mix(BACKGROUNDS[ground], CHALK if dark else INK, 0.11)
    ends = perceptual(np.array([plain, shaded], dtype=np.uint8))[:, 0]
    left = {}
    for pattern in PATTERNS:
        strength = pattern_strength(scene.width, scene.height, pattern)[free]
        left[pattern] = float(np.var(light - (ends[1] - ends[0]) * strength))
    return min(left, key=lambda pattern: left[pattern])


def _free(scene: Scene, margin: int) -> np.ndarray:
    """Where no object of the scene is nearer than ``margin`` pixels, bool [H, W]."""
    free = np.ones((scene.height, scene.width), dtype=bool)
    for item in scene.objects:
        x0, y0, x1, y1 = (round(v) for v in item.box)
        free[max(0, y0 - margin) : y1 + margin, max(0, x0 - margin) : x1 + margin] = False
    return free


def object_of(scene: Scene, claim: Claim) -> list[SceneObject]:
    """The objects of the scene that a sentence speaks of."""
    return [item for item in scene.objects if claim.names(item.colour, item.shape)]


# Longer phrases first: "in the middle of the top row" is not the middle. Hyphens are spaces here.
_PLACES_SAID: Final = {
    phrase.replace("-", " ").rstrip(","): place
    for grid in (2, 3)
    for place in places(grid)
    for say in (place_labels, place_names, place_phrases)
    for phrase in say(place, grid)
}
_SAID_PLACE: Final = re.compile(rf"\b(?:{_any(sorted(_PLACES_SAID, key=lambda phrase: -len(phrase)))})\b", re.IGNORECASE)
_TEXTURE_SAID: Final = re.compile(rf"\b(?:{_any([words.replace('-', ' ') for words, _ in _TEXTURES])})\b", re.IGNORECASE)
# What is left of a sentence without its objects and places must not say more of where things are, nor doubt what it says.
_MORE: Final = re.compile(
    r"\b(?:left|right|top|bottom|upper|lower|above|below|under|over|beside|next|near|between|opposite|middle|cent(?:re|er)|central|"
    r"corners?|rows?|columns?|edges?|sides?|hal(?:f|ves)|neighbour\w*|adj\w+|higher|further|no|not|never|without|neither|nor|either|or|if|"
    r"except|instead|unlike|both|all|them|other)\b",
    re.IGNORECASE,
)
_INSIDE: Final = re.compile(r"@\s+of\s+(?:an?|the)\s+#")  # "in the corner of the blue square"
_CELL: Final = 32  # pixels of a cell's side in the built-in scenes


def read_scene(sentences: Sequence[str], height: int, width: int) -> tuple[Scene | None, list[bool]]:
    """The scene that a typed paragraph describes for a picture of ``height`` x ``width`` pixels, None where it names no object outright;
    and of which sentences it tells the whole truth.

    Only what leaves no doubt is read: all words are the captions' own, each object has its colour, shape and place said in one
    sentence, no two share a place. Where one thing lies as seen from another is not read. Background and count are, where every
    object is known. The cells are nine where a place says so, or there are more than four objects; else four."""
    sentences = [text.replace("center", "centre").replace("color", "colour") for text in sentences]
    said = claims(sentences)
    plain = [set(re.findall(r"[a-z]+", text.lower())) <= all_words() for text in sentences]
    placed = [_placed(text, claim) if ok else None for text, claim, ok in zip(sentences, said, plain, strict=True)]
    found: dict[tuple[str, str], set[str]] = {}
    sizes: dict[tuple[str, str], str] = {}
    for pairs in placed:
        for mention, place in pairs or ():
            found.setdefault((mention.colour, mention.shape), set()).add(place)
            sizes.setdefault((mention.colour, mention.shape), mention.size or "medium")
    taken = [place for where in found.values() for place in where]
    known = {key: next(iter(where)) for key, where in found.items() if len(where) == 1 and taken.count(*where) == 1}
    if not known:
        return None, [False for _ in sentences]
    grounds = {claim.ground for claim in said if claim.ground is not None}
    grid = 2 if len(known) <= len(PLACES) and set(known.values()) <= set(PLACES) else 3
    every = all((one.colour, one.shape) in known for claim in said for one in claim.mentions) and all(
        len(_ANY_SHAPE.findall(text)) <= len(claim.mentions) or claim.kind in ("background", "count")  # "this square picture"
        for text, claim in zip(sentences, said, strict=True)
    )
    if grid == 2 and not every:  # what else there is may stand in one of nine cells, and reach into a quarter
        return None, [False for _ in sentences]
    whole = every and all(plain) and len(grounds) <= 1
    exact = []
    for text, claim, ok, pairs in zip(sentences, said, plain, placed, strict=True):
        told = all((one.colour, one.shape) in known for one in claim.mentions) and (whole or claim.ground is None)
        outright = pairs is not None if claim.kind == "object" else not _MORE.search(_rest(text))
        exact.append(ok and told and outright and claim.kind not in ("", "relation") and (whole or claim.kind != "count"))
    across, down = (round(2 * _CELL * grid * side / (height + width)) for side in (width, height))
    objects = []
    for (colour, shape), place in known.items():
        x0, y0, x1, y1 = cell_box(place, across, down, grid)
        size = sizes[colour, shape]
        radius = radius_of(size, across, down, grid)
        objects.append(SceneObject(shape, colour, size, "plain", place, (x0 + x1) / 2, (y0 + y1) / 2, radius))
    ground = Background(next(iter(grounds), None) or "white", "plain")
    return Scene(across, down, ground, tuple(objects), grid=grid), exact


def _placed(text: str, claim: Claim) -> list[tuple[Mention, str]] | None:
    """Each object that a sentence names with its place, where both stand in turn and nothing else is said of places; else None."""
    nouns = {noun.start(): mention for noun, mention in zip(_NOUN.finditer(text), claim.mentions, strict=False)}
    where = {one.start(): _PLACES_SAID[one[0].lower()] for one in _SAID_PLACE.finditer(text.replace("-", " "))}
    turns = sorted({**nouns, **where}.items())
    pairs = list(zip(turns[::2], turns[1::2], strict=False))
    kept = [(nouns.get(a, nouns.get(b)), where.get(a, where.get(b))) for (a, _), (b, _) in pairs]
    rest = _rest(text)
    if len(turns) == 2 * len(nouns) > 0 and not (claim.relation or _MORE.search(rest) or _ANY_SHAPE.search(rest) or _INSIDE.search(rest)):
        good = [(mention, place) for mention, place in kept if mention is not None and place is not None]
        return good if len(good) == len(nouns) else None
    return None


def _rest(text: str) -> str:
    """A sentence with # for its objects and @ for its places, without textures."""
    return _TEXTURE_SAID.sub(" ", _SAID_PLACE.sub(" @ ", _NOUN.sub(" # ", text).replace("-", " ")))
