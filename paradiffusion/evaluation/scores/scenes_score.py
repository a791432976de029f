"""The score of the built-in scenes: objects and backgrounds looked up in the pixels, without a learned model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paradiffusion.evaluation.estimates import ratio
from paradiffusion.evaluation.journal import read_journals
from paradiffusion.evaluation.records import Drawn, ImageScore, Measure, Run, ScoreResult, Table
from paradiffusion.evaluation.scores.image_features import looked_at, read_picture
from paradiffusion.evaluation.scores.sentence_judges import scene_of
from paradiffusion.evaluation.suites.suite import Suite, by_id
from paradiffusion.scenes.judge import SceneScore, score, sums_of, unbound
from paradiffusion.scenes.world import Scene

MEASURES = (
    Measure("colour_at_place", "Objects in the right colour at the right place", "share"),
    Measure("unbound", "The same, if the scene's colours were assigned to its places at random", "share", None, worst=None),
    Measure("binding", "Binding: 0 at that mark, 1 where all colours are in their place", worst=None),
    Measure("shape", "Objects in the right shape", "share"),
    Measure("colour_and_shape", "Objects in the right colour and shape", "share"),
    Measure("background", "Backgrounds in the right colour", "share"),
    Measure("all_colours", "Pictures in which all objects have the right colour at the right place", "share"),
    Measure("all_right", "Pictures in which all is right", "share"),
)
_BY_OBJECTS = ("colour_at_place", "unbound", "shape", "colour_and_shape", "all_colours", "all_right")


class ScenesScore:
    """Shares of objects, backgrounds and whole pictures that are right (``paradiffusion.scenes.judge``).

    They weigh as many as an image has objects, so that the mean is the share of all objects; the binding as many as its colours at
    random would get wrong."""

    name = "scenes"
    title = "Scenes: ground truth"

    def settings(self) -> dict[str, Any]:
        return {}

    def prepare(self, suite: Suite, images: list[Drawn], work: Path, run: Run) -> None:
        prompts = by_id(suite.prompts)

        def look(image: Drawn) -> dict[str, Any]:
            picture = read_picture(image)
            if isinstance(picture, str):
                return {"error": picture}
            return vars(score(scene_of(prompts[image.prompt]), np.asarray(picture)))

        looked_at(images, work, run, self.title, look)

    def result(self, suite: Suite, images: list[Drawn], work: Path) -> ScoreResult:
        prompts, found = by_id(suite.prompts), dict(read_journals(work))
        scores = []
        for image in images:
            record = found.get(image.name, {"error": "it was not looked at"})
            scores.append(_image_score(image, record, scene_of(prompts[image.prompt])))
        formula = (
            "Objects whose own colour leads in the grid cell of their place and covers at least 35 % of what it should; whose "
            "shape fits best among all shapes; backgrounds whose colour fills most of the area without objects. Binding is "
            "(s - u) / (1 - u) over scenes of two colours and more: s is the share of right colours, u the one that the scenes' "
            "colours would get at random places of theirs."
        )
        source = "this project: paradiffusion/scenes/judge.py"
        result = ScoreResult(self.name, self.title, formula, source, self.settings(), list(MEASURES), scores)
        result.tables = [_by_objects(suite, scores)]
        return result


def _image_score(image: Drawn, record: dict[str, Any], scene: Scene) -> ImageScore:
    if "error" in record:
        found = SceneScore(len(scene.objects), 0, 0, 0, False, 0, False, unbound(scene))
    else:
        counts = {key: value for key, value in record.items() if key != "stamp"}
        found = SceneScore(**{**counts, "unbound": unbound(scene)})  # which older records lack
    sums = {name: (above, below) for name, (above, below) in sums_of(found).items() if below}
    values = {name: above / below for name, (above, below) in sums.items()}
    weights = {name: float(below) for name, (_, below) in sums.items()}
    if "error" in record:
        return ImageScore(image.name, image.prompt, values, weights, image.error or record["error"])
    return ImageScore(image.name, image.prompt, values, weights, detail={"extra": found.extra})


def _by_objects(suite: Suite, scores: Sequence[ImageScore]) -> Table:
    counts = {prompt.id: len(scene_of(prompt).objects) for prompt in suite.prompts}
    rows: list[list[Any]] = []
    for count in sorted({counts[one.prompt] for one in scores}):
        members = [one for one in scores if counts[one.prompt] == count]
        owners = [one.prompt for one in members]
        weights = {name: [one.weights[name] for one in members] for name in _BY_OBJECTS}
        sums = {name: [one.values[name] * one.weights[name] for one in members] for name in _BY_OBJECTS}
        rows.append([str(count), *(ratio(sums[name], weights[name], owners) for name in _BY_OBJECTS)])
    head = ["objects", *(name.replace("_", " ") for name in _BY_OBJECTS)]
    return Table("Scenes by their number of objects", head, rows, plot="bars")
