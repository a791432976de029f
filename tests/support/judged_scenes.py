"""Scenes as a suite with pictures on disk, planted faults, and a program that paints what it reads."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from paradiffusion.evaluation.records import Drawn, Request
from paradiffusion.evaluation.suites.suite import Suite, SuitePrompt
from paradiffusion.metrics.sentences import sentences
from paradiffusion.scenes.dataset import captions, draw, make_scene, scene_to_meta
from paradiffusion.scenes.sentence_truth import Claim, claims
from paradiffusion.scenes.world import BACKGROUNDS, COLOURS, PLACES, Background, Scene, SceneObject, cell_box, radius_of


class Bar:
    def __init__(self) -> None:
        self.count = 0

    def update(self, count: int = 1) -> None:
        self.count += count


@dataclass
class Alone:
    """``records.Run`` of one process; ``stop_after`` checks it stops with KeyboardInterrupt."""

    rank: int = 0
    size: int = 1
    stop_after: int | None = None
    bars: list[Bar] = field(default_factory=list)

    def bar(self, total: int, title: str) -> Any:
        self.bars.append(Bar())
        return nullcontext(self.bars[-1])

    def check(self) -> None:
        if self.stop_after is not None:
            self.stop_after -= 1
            if self.stop_after < 0:
                raise KeyboardInterrupt


def scenes_suite(count: int, kind: str = "clean", set_name: str = "val") -> Suite:
    prompts = []
    for number in range(count):
        scene = make_scene(set_name, 0, number)
        prompts.append(
            SuitePrompt(
                f"scene-{number}", captions(scene, 0, number)[kind], f"{len(scene.objects)} objects",
                scene.height, scene.width, meta={"scene": scene_to_meta(scene)},
            )
        )  # fmt: skip
    return Suite("scenes", "Scenes", tuple(prompts))


def pixels(scene: Scene) -> np.ndarray:
    return np.asarray(draw(scene))


def without(scene: Scene, item: SceneObject) -> Scene:
    """The scene in which one object is missing."""
    return replace(scene, objects=tuple(one for one in scene.objects if one != item))


def recoloured(scene: Scene, item: SceneObject, colour: str) -> Scene:
    """The scene in which one object has another colour."""
    changed = replace(item, colour=colour)
    return replace(scene, objects=tuple(changed if one == item else one for one in scene.objects))


def put(folder: Path, suite: Suite, picture_of: Callable[[int], np.ndarray]) -> list[Drawn]:
    """Picture i of ``picture_of`` on disk for prompt i."""
    folder.mkdir(parents=True, exist_ok=True)
    images = []
    for number, prompt in enumerate(suite.prompts):
        file = folder / f"{number:05d}.png"
        Image.fromarray(picture_of(number)).save(file)
        images.append(Drawn(prompt.id, prompt.id, file, seed=number))
    return images


@dataclass(frozen=True)
class Fault:
    """One object of a scene removed or recoloured, and what a caption of the true scene says."""

    scene: Scene
    shown: Scene
    item: SceneObject
    text: str
    recoloured: bool


def planted_faults(count: int, kinds: tuple[str, ...] = ("long", "clean")) -> list[Fault]:
    """``count`` faults, removed and recoloured in turn."""
    found: list[Fault] = []
    number = 0
    while len(found) < count:
        scene, rng = make_scene("val", 5, number), random.Random(number)
        texts = captions(scene, 5, number)
        for kind in kinds:
            item = rng.choice(scene.objects)
            taken = {(one.colour, one.shape) for one in scene.objects}
            colour = rng.choice([name for name in COLOURS if (name, item.shape) not in taken])
            found.append(Fault(scene, without(scene, item), item, texts[kind], False))
            found.append(Fault(scene, recoloured(scene, item, colour), item, texts[kind], True))
        number += 1
    return found[:count]


_AT = re.compile(r"\b(top|upper|bottom|lower)[ -](left|right)\b", re.IGNORECASE)


@dataclass
class Reader:
    """A painter that paints what it reads, and nothing of the sentences that it is deaf to.

    What no sentence says it makes up from the seed: the background, and where in its cell an object stands.

    Args:
        deaf: of a claim, whether it passes it over.
        words: it reads only so many words of a text, as CLIP reads 77 tokens.
    """

    deaf: Callable[[Claim], bool] = lambda claim: False
    words: int | None = None
    asked: list[Request] = field(default_factory=list)

    def __call__(self, requests: list[Request]) -> list[np.ndarray]:
        self.asked += requests
        return [pixels(self._scene(request)) for request in requests]

    def _scene(self, request: Request) -> Scene:
        height, width = request.height or 64, request.width or 64
        rng = random.Random(request.seed)
        colour = rng.choice(list(BACKGROUNDS))
        shifts = {place: (rng.random() * 4 - 2, rng.random() * 4 - 2) for place in PLACES}
        pattern, objects = "plain", {}
        text = " ".join(request.text.split()[: self.words])
        parts = sentences(text)
        for sentence, claim in zip(parts, claims(parts), strict=True):
            if self.deaf(claim):
                continue
            colour, pattern = claim.ground or colour, claim.pattern or pattern
            places = [_place(match) for match in _AT.finditer(sentence)]
            for mention, place in zip(claim.mentions, places, strict=False):
                x0, y0, x1, y1 = cell_box(place, width, height)
                radius = radius_of(mention.size or "medium", width, height) * 0.9
                cx, cy = (x0 + x1) / 2 + shifts[place][0], (y0 + y1) / 2 + shifts[place][1]
                texture = mention.texture or "plain"
                objects[place] = SceneObject(mention.shape, mention.colour, mention.size or "medium", texture, place, cx, cy, radius)
        return Scene(width, height, Background(colour, pattern), tuple(objects[place] for place in sorted(objects)))


def _place(match: re.Match[str]) -> str:
    row = "top" if match[1].lower() in ("top", "upper") else "bottom"
    return f"{row} {match[2].lower()}"
