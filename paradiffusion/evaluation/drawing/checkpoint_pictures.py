"""Pictures of a suite from one of our checkpoints, through the one sampler."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paradiffusion.atomic import write_atomic
from paradiffusion.checkpoints.hub import PREFIX, address_of
from paradiffusion.checkpoints.layouts import open_layout
from paradiffusion.checkpoints.manifest import MANIFEST
from paradiffusion.config import SampleConfig, SamplerConfig
from paradiffusion.errors import UserError
from paradiffusion.evaluation.drawing.picture_source import Place, Source, file_stem, image_name, size_for
from paradiffusion.evaluation.records import Drawn, Painter, Request
from paradiffusion.evaluation.suites.suite import Suite
from paradiffusion.sampling.gallery import is_whole, read_manifests
from paradiffusion.sampling.pipeline import InferenceModels, Job, generate, load_models, make_jobs, sampler_settings
from paradiffusion.sampling.prompts import PromptRequest
from paradiffusion.sampling.run import Stopped, disk_errors, draw_all
from paradiffusion.text.sources import hash_ends

DRAWN = "drawn.json"
_WEIGHTS = (".safetensors", ".bin")


class CheckpointSource(Source):
    """A checkpoint, whose models are loaded when the first picture is asked for.

    ``checkpoint`` is as ``find_checkpoint`` finds it, ``given`` what the user wrote, which says whether a step was meant."""

    kind = "checkpoint"

    def __init__(self, checkpoint: Path, given: Path, config: SampleConfig, label: str | None) -> None:
        self.checkpoint, self.config = checkpoint, config
        self.pinned = given.resolve() == checkpoint.resolve()
        self.name = _name_of(checkpoint)
        self.label = label or readable(self.name, self.pinned)
        self.weights = weights_hash(checkpoint)
        self._models: InferenceModels | None = None

    @property
    def step(self) -> str | None:
        """The folder's name, "step_000400", where it is a step of a training stage."""
        return self.checkpoint.name if self.checkpoint.parent.name == "checkpoints" else None

    def home(self) -> Path | None:
        return None if self.step is None else self.checkpoint.parent.parent

    def identity(self) -> dict[str, Any]:
        config = self.config
        given = {key: value for key in _DECIDING if (value := getattr(config, key)) is not None}
        for part in ("text_encoder", "codec"):
            if dtype := getattr(config, part).dtype:
                given[f"{part}.dtype"] = dtype
        step = {} if self.step is None else {"step": int(self.step.removeprefix("step_"))}
        return {"weights": self.weights, **step, "unet": config.unet, "dtype": config.dtype, **given}

    def models(self) -> InferenceModels:
        """The loaded models. Raises UserError as ``load_models``."""
        if self._models is None:
            config = self.config
            self._models = load_models(open_layout(self.checkpoint, config.unet), config)
            # By its weights, not its path or name: a run that was moved or renamed is still the same one.
            self._models.checkpoint = f"weights {self.weights}"
        return self._models

    def draw(self, place: Place) -> tuple[list[Drawn], dict[str, Any]]:
        found = self._finished(place)
        agreed = place.processes.agree(int(found is None))  # a process that came later may see what the others do not
        if found is not None and not agreed:
            return found
        models = self.models()
        config = replace(self.config, images_per_prompt=place.images_per_prompt)
        requests, refused = requests_of(place.suite, config, models)
        draw_all(models, requests, config, place.pictures, place.processes, place.signal)
        if place.processes.agree(int(place.signal.came_at is not None)):
            raise Stopped
        source = {
            "checkpoint": str(self.checkpoint), "step": models.step, "weights": self.weights,
            "resolution": models.resolution, "settings": asdict(sampler_settings(config, models.sampler)),
            "negative_prompt": config.negative_prompt, "dtype": config.dtype,
            "cut_prompts": dict(Counter(p.category or "all" for p in place.suite.prompts if models.count_truncated([p.text]))) or 0,
            "provenance": models.provenance,
        }  # fmt: skip
        if place.first:
            text = json.dumps({"identity": self.identity(), "refused": refused, "source": source}, ensure_ascii=False)
            with disk_errors(place.folder):
                write_atomic(place.folder / DRAWN, text)
        place.processes.agree(0)
        images = drawn_images(place, refused)
        gone = [image.name for image in images if not image.error and not image.file.is_file()]
        if gone:
            raise UserError(f"{len(gone)} pictures, such as {gone[0]}, are not in {place.pictures}; run the same command again.")
        return images, source

    def _finished(self, place: Place) -> tuple[list[Drawn], dict[str, Any]] | None:
        """The images and their source where all are there already; the models need not be loaded then."""
        try:
            record = json.loads((place.folder / DRAWN).read_text(encoding="utf-8"))
            refused, source = dict(record["refused"]), dict(record["source"])
            if record["identity"] != json.loads(json.dumps(self.identity())):
                return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        records = read_manifests(place.pictures)
        images = drawn_images(place, refused)
        for image in images:
            drawn = records.get(image.file.stem)
            if not image.error and (drawn is None or drawn.seed != image.seed or not is_whole(place.pictures, drawn)):
                return None
        return images, {**source, "checkpoint": str(self.checkpoint)}

    def painter(self, suite: Suite) -> Painter:
        return partial(self.paint_for, suite)

    def paint_for(self, suite: Suite, requests: list[Request]) -> list[np.ndarray]:
        """Pictures, uint8 [H, W, 3]. Raises UserError for a size that the model cannot draw."""
        models, config = self.models(), replace(self.config, images_per_prompt=1)
        jobs: list[Job] = []
        for n, one in enumerate(requests):
            height, width = _size(suite, one.height, one.width, config, models)
            prompt = PromptRequest(n, one.text, seed=one.seed, height=height, width=width, source="a picture")
            jobs += make_jobs([prompt], config, models)
        tell = self.on_step
        on_step = None if tell is None else lambda step, _: tell(step)
        drawn = {job.name: image for job, image in generate(models, jobs, config.batch_size, on_step)}
        return [drawn[job.name] for job in jobs]

    def close(self) -> None:
        self._models = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


_DECIDING = (*(one.name for one in fields(SamplerConfig)), "negative_prompt", "height", "width")


def requests_of(suite: Suite, config: SampleConfig, models: InferenceModels) -> tuple[list[PromptRequest], dict[str, str]]:
    """The suite's prompts as the sampler takes them, and by id why others cannot be drawn. UserError where none can be, which is the
    settings' fault."""
    requests, refused, failure = [], {}, None
    for row, prompt in enumerate(suite.prompts):
        height, width = _size(suite, prompt.height, prompt.width, config, models)
        request = PromptRequest(row, prompt.text, seed=prompt.seed(suite.name), height=height, width=width, source=f"prompt {prompt.id}")
        try:
            make_jobs([request], config, models)
        except UserError as error:
            refused[prompt.id], failure = str(error), error
        else:
            requests.append(request)
    if failure is not None and not requests:
        raise failure
    return requests, refused


def _size(
    suite: Suite, height: int | None, width: int | None, config: SampleConfig, models: InferenceModels
) -> tuple[int | None, int | None]:
    """Height and width of a picture; what the command line says goes before what the suite says."""
    own = size_for(suite, height, width, models.resolution, models.multiple)
    return config.height or own[0], config.width or own[1]


def drawn_images(place: Place, refused: dict[str, str]) -> list[Drawn]:
    """All images of a suite in its order, whether drawn or refused."""
    images = []
    for row, prompt in enumerate(place.suite.prompts):
        for number in range(place.images_per_prompt):
            file = place.pictures / f"{file_stem(row, number)}.png"
            seed, error = prompt.seed(place.suite.name) + number, refused.get(prompt.id, "")
            images.append(Drawn(image_name(prompt, number), prompt.id, file, seed, error))
    return images


def weights_hash(checkpoint: Path) -> str:
    """A hash of a checkpoint's weights (16 hex digits): of its manifest's hashes, or of the ends of an official folder's files."""
    if (checkpoint / MANIFEST).is_file():
        files: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text())["files"]
        rows = [f"{name} {row['sha256']}\n" for name, row in sorted(files.items()) if not name.startswith("training_state")]
        return hashlib.sha256("".join(rows).encode()).hexdigest()[:16]
    files_found = [path for path in sorted(checkpoint.rglob("*")) if path.suffix in _WEIGHTS and path.is_file()]
    return hash_ends(files_found)


def _name_of(checkpoint: Path) -> str:
    """ "nano_stage3_step_000400" for a training step, "USER_NAME" of a hub, else the folder's own name."""
    if address := address_of(checkpoint):
        return address.removeprefix(PREFIX).partition("@")[0].replace("/", "_")
    parts: Sequence[str] = checkpoint.resolve().parts
    if checkpoint.parent.name == "checkpoints" and len(parts) > 3:
        return "_".join((*parts[-4:-2], parts[-1]))
    return parts[-1]


def readable(name: str, with_step: bool = False) -> str:
    """A label from a name: "nano stage 3", or "nano stage 3 step 400", from "nano_stage3_step_000400"."""
    match = re.fullmatch(r"(.+)_stage(\d)_step_(\d+)", name)
    if match is None:
        return name
    return f"{match[1]} stage {match[2]}" + (f" step {int(match[3])}" if with_step else "")
