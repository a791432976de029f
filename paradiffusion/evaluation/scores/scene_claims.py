"""What the sentences of a scene's caption claim, read from the words that captions are made of (data/captions.py).

Of the many forms of grammar.py those are read that name a colour right before its shape; no other thing is claimed by
a sentence that says its colour elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from paradiffusion.scenes.captions import (
    COUNTS,
    PATTERN_WORDS,
    SHAPE_WORDS,
    SIZE_WORDS,
    TEXTURE_AFTER,
    TEXTURE_BEFORE,
    TEXTURE_STATED,
)
from paradiffusion.scenes.grammar import (
    SHAPES_SAID,
    SIZES_SAID,
    SIZES_STATED,
    TEXTURES_AFTER,
    TEXTURES_SAID,
    TEXTURES_STATED,
    place_names,
    place_phrases,
)
from paradiffusion.scenes.world import BACKGROUNDS, COLOURS, places

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
    """What one sentence says.

    Attributes:
        kind: one of KINDS, or "" for an idle sentence.
        relation: it says where one of its two objects lies as seen from the other.
        ground, pattern: of the background; None where it is not spoken of.
        count: how many objects there are, None where it is not said.
    """

    kind: str
    mentions: tuple[Mention, ...] = ()
    relation: bool = False
    ground: str | None = None
    pattern: str | None = None
    count: int | None = None

    def names(self, colour: str, shape: str) -> bool:
        """Whether it speaks of this object."""
        return any((one.colour, one.shape) == (colour, shape) for one in self.mentions)


def _meanings(*tables: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    """(words, meaning), longer words first, so that "boldly outlined" is not read as "outlined" and left half."""
    pairs = {(words, meaning) for table in tables for meaning, forms in table.items() for words in forms}
    return sorted(pairs, key=lambda pair: (-len(pair[0]), pair[0]))


def _any(words: Sequence[str]) -> str:
    return "|".join(re.escape(word) for word in words)


_SHAPES: Final = _meanings(SHAPE_WORDS, SHAPES_SAID)
_SIZES: Final = _meanings(SIZE_WORDS, SIZES_SAID, SIZES_STATED)
_TEXTURES: Final = _meanings(
    TEXTURE_BEFORE, TEXTURE_AFTER, TEXTURE_STATED, TEXTURES_SAID, TEXTURES_AFTER, TEXTURES_STATED
)
_COUNTS: Final = _meanings({str(number): words for number, words in COUNTS.items()})
_PATTERNS: Final = _meanings(PATTERN_WORDS)
# "an orange, boldly outlined" never occurs: a colour stands before its shape, other attributes before both or after them.
_NOUN: Final = re.compile(
    rf"\b(?P<before>(?:(?:{_any([w for w, _ in _meanings(SIZE_WORDS, TEXTURE_BEFORE, SIZES_SAID, TEXTURES_SAID)])}),?\s+)*)"
    rf"(?P<colour>{_any(tuple(COLOURS))})\s+(?P<shape>{_any([w for w, _ in _SHAPES])})\b"
    rf"(?P<after>\s+(?:{_any([w for w, _ in _meanings(TEXTURE_AFTER, TEXTURES_AFTER)])})\b)?",
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
_RELATION: Final = re.compile(
    r"\b(?:above|below|to the (?:left|right) of|further (?:left|right)|higher up|lower down)\b", re.IGNORECASE
)


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
    return Claim(kind, mentions, relation, colour, _pattern(sentence, colour), int(count) if count else None)


def _one_thing(sentence: str) -> bool:
    """Whether it has no more than one shape: "a star to the left of the red square" says nothing else of the square."""
    return len(_ANY_SHAPE.findall(sentence)) <= 1


def _mention(noun: re.Match[str], text: str) -> Mention:
    shape = _meaning(_SHAPES, noun["shape"])
    assert shape is not None  # the expression is made of the same words
    return Mention(noun["colour"].lower(), shape, _meaning(_SIZES, text), _meaning(_TEXTURES, text))


def _places(sentence: str) -> bool:
    return bool(_PLACE.search(sentence))


def _pattern(sentence: str, ground: str | None) -> str | None:
    if ground is None:
        return None
    lower = sentence.lower()
    return next((pattern for form, pattern in _PATTERNS if form.format(c=ground) in lower), None)


def _meaning(table: list[tuple[str, str]], text: str) -> str | None:
    """What the longest of the table's words that stands in ``text`` means."""
    lower = text.lower()
    return next((meaning for words, meaning in table if re.search(rf"\b{re.escape(words)}\b", lower)), None)
