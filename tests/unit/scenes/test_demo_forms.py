"""The grammar of captions: what it says is true, it says it in very many ways, and held-out forms are none of them."""

from __future__ import annotations

import re
from functools import cache

import pytest

from paradiffusion.config import WORLDS
from paradiffusion.metrics.sentences import sentences
from paradiffusion.scenes.captions import LARGE_WORDS, UNSEEN, WORDS, unseen_places
from paradiffusion.scenes.dataset import captions, make_scene
from paradiffusion.scenes.grammar import (
    PATTERNS_AFTER,
    PATTERNS_SAID,
    RULES,
    SHAPES_SAID,
    SIZES_SAID,
    SIZES_STATED,
    TEXTURES_AFTER,
    TEXTURES_SAID,
    TEXTURES_STATED,
    phrases_its,
    phrases_of,
    place_labels,
    place_names,
    place_phrases,
)
from paradiffusion.scenes.world import BACKGROUNDS, COLOURS, Scene, SceneObject, places, row_and_column

STEPS = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}
GRIDS = {"small": 2, "large": 3}


def any_of(words: object) -> str:
    """A regular expression for the longest of some words."""
    return "|".join(re.escape(word) for word in sorted(set(words), key=len, reverse=True))  # type: ignore[call-overload]


def words_of(*tables: dict[str, tuple[str, ...]]) -> list[str]:
    return [word for table in tables for words in table.values() for word in words]


def plain(text: str) -> str:
    """Lower case and British spelling."""
    for american, british in (("center", "centre"), ("centreed", "centred"), ("color", "colour"), ("gray", "grey")):
        text = text.lower().replace(american, british)
    return text


COLOUR = rf"\b({any_of(COLOURS)})\b"
SHAPES = {word: shape for shape, words in SHAPES_SAID.items() for word in words}
NAME = rf"the ({any_of(COLOURS)}) ({any_of(SHAPES)})"


@cache
def place_words(grid: int) -> dict[str, str]:
    """Every phrase, name and label of a place."""
    return {
        words.rstrip(","): place
        for place in places(grid)
        for words in (*place_labels(place, grid), *place_names(place, grid), *place_phrases(place, grid), *unseen_places(place, grid))
    }


@cache
def relation_words() -> dict[str, str]:
    """Every phrase that places a thing by the object of the sentence before, or by {o}, and its direction."""
    return {words.rstrip(","): direction for direction in STEPS for words in (*phrases_its(direction), *phrases_of(direction))}


def scenes(world: str, set_name: str, count: int) -> list[Scene]:
    return [make_scene(set_name, 0, number, world) for number in range(count)]


def shown(scene: Scene, colour: str, shape: str) -> SceneObject:
    (found,) = (item for item in scene.objects if (item.colour, item.shape) == (colour, shape))
    return found


@cache
def patterns(grid: int) -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
    """Places; relations to a named object; relations to the object of the sentence before."""
    it = rf"(?:it|that|this one|this (?:{any_of(SHAPES)}))"
    of = [words for words in relation_words() if "{o}" in words]
    named = any_of(of).replace(r"\{o\}", NAME.replace("(", "(?:"))
    of_it = "|".join(re.escape(words).replace(r"\{o\}", it) for words in sorted(of, key=len, reverse=True))
    its = any_of(words for words in relation_words() if "{o}" not in words)
    return (re.compile(rf"\b(?:{any_of(place_words(grid))})\b"), re.compile(rf"\b(?:{named})\b"), re.compile(rf"\b(?:{of_it}|{its})\b"))


def direction_in(phrase: str) -> str:
    generic = re.sub(rf"{NAME}|\b(?:it|that|this one|this (?:{any_of(SHAPES)}))\b", "{o}", phrase)
    return relation_words().get(generic) or relation_words()[phrase]


def read(scene: Scene, text: str) -> list[tuple[SceneObject, str]]:
    """Each object whose sentence speaks of it alone, with the place where its words put it."""
    place, named, its = patterns(scene.grid)
    found: list[tuple[SceneObject, str]] = []
    last: tuple[SceneObject, str] | None = None
    turned = re.compile(rf"(?:(?:{any_of([*RULES['first'], *RULES['then'], *RULES['last']])}) )?it ")
    pending: tuple[str, str] | None = None  # the place and shape of a thing whose colour is told in the next sentence
    for sentence in re.split(r"(?<=[.?!]) ", plain(text)):
        sentence = re.sub(rf"\b(?:{any_of(words_of(SIZES_SAID))})\b", "", sentence)  # "middle-sized" is no place
        relation = named.search(sentence)
        other = re.search(NAME, relation.group()) if relation else None
        rest = named.sub(" ", sentence, count=1)
        beside = None if relation else its.search(rest)
        rest = its.sub(" ", rest, count=1) if beside else rest
        if (relation or beside) and turned.match(sentence):  # "it stands below a red star": of what goes on to be "it"
            last = None
            continue
        spots = place.findall(rest)
        rest = place.sub(" ", rest)
        colours, shapes = set(re.findall(COLOUR, rest)), set(re.findall(rf"\b({any_of(SHAPES)})\b", rest))
        before, last = last, None
        if pending and len(colours) == 1 and len(shapes) <= 1 and not spots and not relation and not beside:
            item = shown(scene, colours.pop(), SHAPES[pending[1]])
            last = (item, pending[0])
        pending = None
        if last is None and len(shapes) == 1 and len(spots) + bool(relation) + bool(beside and before) == 1:
            where = place_words(scene.grid)[spots[0]] if spots else None
            base = None
            if other and relation:
                base, phrase = shown(scene, other[1], SHAPES[other[2]]).place, relation.group()
            elif beside and before:
                base, phrase = before[1], beside.group()
            if base is not None:
                step = STEPS[direction_in(phrase)]
                row, column = (a + b for a, b in zip(row_and_column(base, scene.grid), step, strict=True))
                where = places(scene.grid)[row * scene.grid + column]
            (shape,) = shapes
            if where and len(colours) == 1:
                last = (shown(scene, colours.pop(), SHAPES[shape]), where)
            elif where and not colours and re.search(r"\b(row|column) (holds|has)\b", rest) is None:
                pending = (where, shape)
        if last:
            found.append(last)
    return found


@pytest.mark.parametrize(
    ("world", "kind"),
    [
        ("small", "long"),
        ("small", "clean"),
        ("small", "varied"),
        ("small", "unseen"),
        ("large", "varied"),
        ("large", "unseen"),
        ("large", "clean"),
    ],
)
def test_objects_are_where_their_sentences_put_them(world: str, kind: str) -> None:
    objects = seen = 0
    for number, scene in enumerate(scenes(world, "val" if kind == "unseen" else "big", 300)):
        text = captions(scene, 0, number)[kind]
        # Which two directions a sentence means at once, test_demo.py reads.
        told = read(scene, " ".join(one for one in sentences(text) if " and to the " not in one))
        for item, place in told:
            assert item.place == place, (item, place, text)
        objects, seen = objects + len(scene.objects), seen + len({item for item, _ in told})
    assert seen > 0.35 * objects


@pytest.mark.parametrize("world", WORLDS)
def test_captions_name_every_object_and_the_background_in_their_bounds(world: str) -> None:
    bounds = {"small": WORDS, "large": LARGE_WORDS}[world]
    for number, scene in enumerate([*scenes(world, "big", 200), *scenes(world, "val", 200)]):
        told = captions(scene, 0, number)
        assert set(told) == set(bounds) - ({"unseen"} if number < 200 else set())
        for kind in set(told) if world == "large" else {"varied", "unseen"} & set(told):
            text = told[kind]
            assert bounds[kind][0] <= len(text.split()) <= bounds[kind][1], text
            assert not re.search(r"[{}@]|  |,[,.;:]|\ba [aeio]|\ban [^aeiou]", text), text
            words = plain(text)
            assert set(re.findall(COLOUR, words)) == {item.colour for item in scene.objects}, text
            assert set(re.findall(rf"\b({any_of(BACKGROUNDS)})\b", words)) == {scene.background.colour}, text
            shapes = {SHAPES[word] for word in re.findall(rf"\b({any_of(SHAPES)})\b", words)}
            assert shapes == {item.shape for item in scene.objects}, text
        assert captions(scene, 0, number) == told


def test_the_large_worlds_training_leans_on_things_named_before_and_its_held_out_paragraphs_on_few() -> None:
    def named(set_name: str) -> float:
        """Colours that a caption says beyond one for each object: of things named again, by which others are placed."""
        made = [(scene, plain(captions(scene, 0, n)["varied"])) for n, scene in enumerate(scenes("large", set_name, 300))]
        again = sum(len(re.findall(COLOUR, text)) - len(scene.objects) for scene, text in made)
        return again / sum(len(scene.objects) for scene, _ in made)

    assert named("small") > 1.4 * named("val")
    assert abs(named("small") - named("web")) < 0.05


def test_a_phrase_names_one_place_of_its_grid() -> None:
    for grid in GRIDS.values():
        for function in (place_phrases, place_names, place_labels, unseen_places):
            every = [words for place in places(grid) for words in set(function(place, grid))]
            assert len(every) == len(set(every))
            assert min(len(set(place_phrases(place, grid))) for place in places(grid)) >= 25


@cache
def attributes() -> list[tuple[re.Pattern[str], str]]:
    sizes, after = words_of(SIZES_SAID, SIZES_STATED), words_of(TEXTURES_AFTER, TEXTURES_STATED, PATTERNS_AFTER)
    looks = [*words_of(TEXTURES_SAID, PATTERNS_SAID), "bright", "vivid"]
    tables = [(after, "T"), (sizes, "Z"), (looks, "T"), (list(COLOURS), "C"), (list(BACKGROUNDS), "G"), (list(SHAPES), "S"),
              (["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"], "N"), (["an"], "a")]  # fmt: skip
    return [(re.compile(rf"\b(?:{any_of(words)})\b"), slot) for words, slot in tables]


def skeletons(text: str, grid: int) -> list[str]:
    """The sentences of a caption with slots in the place of places, attributes, shapes and numbers."""
    text = patterns(grid)[0].sub("P", plain(text))
    for pattern, slot in attributes():
        text = pattern.sub(slot, text)
    text = re.sub(r"\b(?:a|the) ((?:[TZ],? )*)C S\b", "O", text)
    return re.split(r"(?<=[.?!]) ", text)


def frames(skeleton: str) -> set[str]:
    """What stands between an object and a place."""
    return set(re.findall(r"(?:\b[OS] ([a-z' ]+) P\b)|(?:\bP ([a-z' ]+) (?:O|a S)\b)", skeleton)) - {("", "")}


@pytest.mark.parametrize("world", WORLDS)
def test_training_has_hundreds_of_sentence_forms_and_none_of_the_held_out_ones(world: str) -> None:
    def forms(set_name: str, kind: str, count: int) -> list[str]:
        told = (captions(scene, 0, number)[kind] for number, scene in enumerate(scenes(world, set_name, count)))
        return [skeleton for text in told for skeleton in skeletons(text, GRIDS[world])]

    trained, asked = forms("web", "varied", 1200), forms("val", "unseen", 300)
    assert len(set(trained)) > 1200 and len(set(asked)) > 40
    assert not set(trained) & set(asked)
    frame = {one for skeleton in asked for one in frames(skeleton)}
    assert len(frame) > 8 and not frame & {one for skeleton in trained for one in frames(skeleton)}


def test_each_held_out_form_has_a_word_that_training_has_not() -> None:
    def words(form: str) -> set[str]:
        return set(re.findall(r"[a-z']+", re.sub(r"\{[^}]+\}", " ", form.lower())))

    known = {word for forms in RULES.values() for form in forms for word in words(form)}
    for symbol, forms in UNSEEN.items():
        for form in forms if symbol != "n" else ():
            assert words(form) - known, form
    assert sum(len(UNSEEN[symbol]) for symbol in ("one", "two", "beside")) >= 16
