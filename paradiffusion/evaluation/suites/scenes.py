"""The built-in held-out scenes, and scenes that people described: paragraphs whose truth is known exactly."""

from __future__ import annotations

import json
from pathlib import Path

from paradiffusion.errors import UserError
from paradiffusion.evaluation.suites.entry import SuiteEntry
from paradiffusion.evaluation.suites.suite import SuitePrompt
from paradiffusion.scenes.captions import KINDS, captions
from paradiffusion.scenes.world import Scene, make_scene, scene_from_meta, scene_to_meta


def read_scenes(entry: SuiteEntry, path: Path) -> list[SuitePrompt]:
    """The scenes that training validates on, with the same paragraphs and names as in data/demo/val; or with ``suite_path=``
    those of a file of JSON lines, each with its ``text`` and the keys of a scene, as data/paragraphs.jsonl has them.

    Options: ``number`` of scenes, ``caption`` (one of ``KINDS``), ``world``, ``set`` and ``seed`` as in
    ``paradiffusion.scenes.dataset``, and ``scale``, by which height and width of a scene's canvas are multiplied: at 1 they are
    the sizes at which nano draws. ``meta["scene"]`` is the truth, in pixels of the canvas; the category is the number of
    objects. Of a file, ``number`` and ``scale`` alone count.
    """
    options = entry.take({"number": 200, "world": "small", "set": "val", "seed": 0, "caption": "clean", "scale": 1})
    if options["caption"] not in KINDS:
        raise UserError(
            f"suite={entry.name}: caption={options['caption']} is unknown; choose one of {', '.join(KINDS)}."
        )
    if options["scale"] < 1 or options["number"] < 1:
        raise UserError(
            f"suite={entry.name}: scale and number are {options['scale']} and {options['number']}; expected 1 up."
        )
    if options["caption"] == "unseen" and options["set"] != "val":
        raise UserError(
            f"suite={entry.name}: only set=val has captions of unseen forms; leave set={options['set']} out."
        )
    if entry.path:
        return [
            _prompt(f"{path.stem}-{line:03d}", text, scene, options["scale"])
            for line, (text, scene) in enumerate(_written(path, entry.name)[: options["number"]], 1)
        ]
    prompts = []
    for number in range(options["number"]):
        scene = make_scene(options["set"], options["seed"], number, options["world"])
        text = captions(scene, options["seed"], number)[options["caption"]]
        prompts.append(_prompt(f"{options['set']}-{number:06d}", text, scene, options["scale"]))
    return prompts


def _prompt(name: str, text: str, scene: Scene, scale: int) -> SuitePrompt:
    objects = len(scene.objects)
    category, meta = f"{objects} object{'s' if objects > 1 else ''}", {"scene": scene_to_meta(scene)}
    return SuitePrompt(name, text, category, height=scene.height * scale, width=scene.width * scale, meta=meta)


def _written(path: Path, suite: str) -> list[tuple[str, Scene]]:
    """The paragraphs of a file with their scenes."""
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        return [(row["text"], scene_from_meta(row)) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, UserError) as error:
        raise UserError(
            f"suite={suite}: {path} holds no paragraphs with scenes ({error}); see data/paragraphs.jsonl."
        ) from None
