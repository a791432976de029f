"""The built-in held-out scenes: paragraphs whose truth is known exactly."""

from __future__ import annotations

from pathlib import Path

from paradiffusion.data.demo_captions import KINDS, captions
from paradiffusion.data.demo_scenes import make_scene, scene_to_meta
from paradiffusion.errors import UserError
from paradiffusion.evaluation.suites.entry import SuiteEntry
from paradiffusion.evaluation.suites.suite import SuitePrompt


def read_scenes(entry: SuiteEntry, path: Path) -> list[SuitePrompt]:
    """The scenes that training validates on, with the same paragraphs and names as in data/demo/val; no file is read.

    Options: ``number`` of scenes, ``caption`` (one of ``KINDS``), ``world``, ``set`` and ``seed`` as in
    ``paradiffusion.data.demo``, and ``scale``, by which height and width of a scene's canvas are multiplied: at 1 they are
    the sizes at which nano draws. ``meta["scene"]`` is the truth, in pixels of the canvas; the category is the number of
    objects.
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
    prompts = []
    for number in range(options["number"]):
        scene = make_scene(options["set"], options["seed"], number, options["world"])
        objects = len(scene.objects)
        prompts.append(
            SuitePrompt(
                f"{options['set']}-{number:06d}",
                captions(scene, options["seed"], number)[options["caption"]],
                f"{objects} object{'s' if objects > 1 else ''}",
                height=scene.height * options["scale"],
                width=scene.width * options["scale"],
                meta={"scene": scene_to_meta(scene)},
            )
        )
    return prompts
