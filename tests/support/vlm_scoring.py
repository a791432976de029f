"""What the tests of scores by vision-language models share: scenes with checklists, and a server that looks at pixels."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from chat_server import NAME, Asked, ChatServer
from PIL import Image

from paradiffusion.evaluation.records import Drawn
from paradiffusion.evaluation.suites.suite import ChecklistQuestion, Suite, SuitePrompt
from paradiffusion.metrics.vlm import VlmOptions
from paradiffusion.scenes.drawing import draw
from paradiffusion.scenes.world import COLOURS, Scene, cell_box, make_scene


def options_for(server: ChatServer, **more: Any) -> VlmOptions:
    """The server as the judge."""
    return VlmOptions(engine="endpoint", endpoint=server.url, served=NAME, retry_wait=0.02, tries=2, concurrency=3, **more)


def scene_prompt(number: int) -> tuple[SuitePrompt, Scene]:
    """A held-out scene, with a checklist of its objects (is it there) and of their colours."""
    scene = make_scene("val", 3, number)
    questions = []
    for index, one in enumerate(scene.objects):
        thing = f"the shape at the {one.place}"
        questions += [
            ChecklistQuestion(f"c{index}", f"Is {thing} {one.colour}?", "attribute", "colour", (f"o{index}",)),
            ChecklistQuestion(f"o{index}", f"Is there something where {thing} is said to be?", "entity"),
        ]
    text = ", ".join(f"a {one.colour} {one.shape} at the {one.place}" for one in scene.objects)
    return SuitePrompt(f"scene{number}", text, questions=tuple(questions)), scene


def faulty(scene: Scene, fault: str) -> Scene:
    """The scene with its first object recoloured or removed, or as it is."""
    first, *rest = scene.objects
    if fault == "recoloured":
        return replace(scene, objects=(replace(first, colour="cyan" if first.colour == "red" else "red"), *rest))
    return replace(scene, objects=tuple(rest)) if fault == "removed" else scene


def draw_scenes(folder: Path, count: int, fault: str = "") -> tuple[Suite, list[Drawn]]:
    """A suite of scenes, and their pictures in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts, images = [], []
    for number in range(count):
        prompt, scene = scene_prompt(number)
        file = folder / f"{number:05d}.png"
        draw(faulty(scene, fault)).save(file)
        prompts.append(prompt)
        images.append(Drawn(prompt.id, prompt.id, file))
    return Suite("tiny", "Tiny", tuple(prompts)), images


def look(asked: Asked) -> tuple[str, str]:
    """What a truthful judge answers to the questions of ``scene_prompt``, from the pixels of the picture that it was sent."""
    with Image.open(io.BytesIO(asked.image)) as image:
        pixels = np.asarray(image.convert("RGB"), dtype=int)
    place = re.search(r"at the ((?:top|bottom) (?:left|right))", asked.prompt)
    assert place is not None, asked.prompt
    height, width, _ = pixels.shape
    x0, y0, x1, y1 = (round(edge) for edge in cell_box(place[1], width, height))
    cell = pixels[y0:y1, x0:x1]
    names = list(COLOURS)
    distance = np.abs(cell[:, :, None] - np.array([COLOURS[name] for name in names])).sum(-1)  # [h, w, colours]
    counts = np.bincount(distance.argmin(-1)[distance.min(-1) < 60], minlength=len(names))
    colour = names[int(counts.argmax())] if counts.max() > 12 else None
    wanted = re.search(r"is said to be\?", asked.prompt)
    if wanted:
        return ("Yes, there is." if colour else "No."), "stop"
    said = re.search(r"(?:left|right) (\w+)\?", asked.prompt)
    assert said is not None, asked.prompt
    return ("**Yes**" if colour == said[1] else "no, it has another colour"), "stop"
