"""Held-out sentence forms of the built-in captions: how another person would write, in frames that no training set has.

Each form has a word that the grammar of training (grammar.py) has nowhere, and half of the places are named in new
phrases too. So following other words can be measured apart from following other scenes.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from paradiffusion.scenes.forms import Writer
from paradiffusion.scenes.grammar import Slots, direction_of, finished, placed, word_list, word_lists
from paradiffusion.scenes.world import Scene, SceneObject, pick

UNSEEN = word_lists("unseen", "UNSEEN")
PLACES = [word_list("unseen", name) for name in ("CORNER", "ABOVE_OR_BELOW", "BESIDE", "CENTRE")]


def unseen_places(place: str, grid: int) -> tuple[str, ...]:
    """The adverbials of a place that no training caption has."""
    return placed(place, grid, *PLACES)


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
