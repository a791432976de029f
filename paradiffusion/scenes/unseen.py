"""Held-out sentence forms of the built-in captions: how another person would write, in frames that no training set has.

Each form has a word that the grammar of training (grammar.py) has nowhere, and half of the places are named in new
phrases too. So following other words can be measured apart from following other scenes.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from paradiffusion.scenes.forms import Writer
from paradiffusion.scenes.grammar import Slots, direction_of, finished, placed
from paradiffusion.scenes.world import Scene, SceneObject, pick

# Slots as in grammar.py: {n} an object, {p} an adverbial of its place, {q} the place's name, {c} colour, {s} shape.
UNSEEN: dict[str, tuple[str, ...]] = {
    "one": (
        "{p} nestles {n}", "{n} perches {p}", "{n} has made itself comfortable {p}", "somebody pinned {n} {p}",
        "whoever lets their gaze rest {p} meets {n}", "were your finger to land {p}, it would touch {n}",
        "{q} could hardly do without {n}", "tucked away {p} we come upon {n}", "to come across {n}, try {p}",
        "{n} was glued {p} by my brother", "the honour of filling {q} goes to {n}",
        "with {n} the painter has brightened {q}", "nobody will overlook {n} {p}",
        "{q}, meanwhile, was handed over to {n}", "cover {q} with your thumb and {n} is hidden",
        "for {n} no spot seemed better than {q}", "{p} we run into @ {s} dressed in {c}",
        "{p} I spy @ {s}. {c} is what it wears", "@ {s} guards {q}. think of it in {c}",
        "{q} went to @ {s}. its maker dipped the brush into {c}",
        "have you discovered the {s} {p}? somebody must love {c}",
    ),
    "two": (
        "{n1}, parked {p1}, keeps an eye on {n2} {p2}", "{q1} got {n1}; {q2} got {n2}",
        "stick {n1} {p1} and, when the glue is dry, {n2} {p2}",
        "two inhabitants share this world: {n1}, dwelling {p1} together with {n2}, dwelling {p2}",
    ),
    "beside": (
        "hop a cell {way} and there waits {n}", "shoulder to shoulder with it, {at side}, somebody squeezed {n}",
        "a companion dwells {o of it}: {n}", "{o of it} squats {n}", "its buddy {at side} happens to be {n}",
    ),
    "ground": (
        "{gc} paper serves as the base", "wallpaper in {gc} covers whatever is left",
        "underneath, somebody spread {gc}", "whatever was left over got a coat of {gc}",
        "the tablecloth below them all turned out {gc}",
    ),
    "opening": (
        "let me tell you about {number}", "my daughter cut out {number} today", "yesterday's homework: {number}",
        "this postcard carries {number}",
    ),
    "n": ("@ {c} {s}", "@ {c} {s}", "@ {z} {c} {s}", "@ {t} {c} {s}", "@ {s} all in {c}", "@ {z} {s} wearing {c}"),
}  # fmt: skip
CORNER = (
    "over in the {v} {h}", "inside the {V} {h} corner", "within the {v} {h} corner", "off in the {V} {h}",
    "in the {V} {h} nook", "in the far {v} {h}", "way {u} in the {h}-hand corner", "at the extreme {v} {h}",
    "in the {h}-most spot of the {v} row",
)  # fmt: skip
ABOVE_OR_BELOW = ("midway along the {v}", "over at the {v}, midway,", "at the very {v}, between left and right,")
BESIDE = ("midway along the {h}", "over on the {h}, neither high nor low,", "half the way down on the {h}")
CENTRE = ("smack in the centre", "plumb in the middle", "at the hub of the picture", "amid everything, in the middle,")


def unseen_places(place: str, grid: int) -> tuple[str, ...]:
    """The adverbials of a place that no training caption has."""
    return placed(place, grid, CORNER, ABOVE_OR_BELOW, BESIDE, CENTRE)


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
