"""Pictures of a suite from any text-to-image pipeline of diffusers."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paradiffusion.config import SampleConfig
from paradiffusion.errors import UserError
from paradiffusion.evaluation.drawing.checkpoint_pictures import drawn_images
from paradiffusion.evaluation.drawing.picture_source import Place, Source, size_for
from paradiffusion.evaluation.journal import Journal, read_journals
from paradiffusion.evaluation.records import Drawn, Painter, Request
from paradiffusion.evaluation.suites.suite import Suite, by_id
from paradiffusion.machine import choose_device, exact_float32
from paradiffusion.runner import make_bar
from paradiffusion.sampling.gallery import ImageRecord, Manifest, finished_names, merge_manifests, read_manifests, save_png
from paradiffusion.sampling.run import all_do, disk_errors
from paradiffusion.text.encoder import DTYPES
from paradiffusion.text.sources import hash_ends

OURS = "ParaDiffusionPipeline"
MULTIPLE = 16  # of the sides that scenes are drawn at: what latents of 8 pixels, in patches of two, need
# Our keys as pipelines call them; what a pipeline's signature lacks is refused, since it would be silently ignored.
ARGUMENTS = {"steps": "num_inference_steps", "guidance": "guidance_scale", "negative_prompt": "negative_prompt",
             "guidance_rescale": "guidance_rescale", "height": "height", "width": "width"}  # fmt: skip


class PipelineError(Exception):
    """The pipeline could not draw one prompt; the message says why."""


class PipelineSource(Source):
    """A pipeline (a folder, or an id on the hub), loaded when the first picture is asked for.

    Each image has noise from a generator of its own, so that it does not depend on the batch that it is drawn in."""

    kind = "pipeline"

    def __init__(self, path: str, config: SampleConfig, label: str | None) -> None:
        self.path, self.config = path, config
        folder = Path(path).expanduser()
        self.folder = folder if folder.is_dir() else None
        self.name = (folder.resolve().name if self.folder else path).replace("/", "--")
        self.label = label or self.name.replace("--", "/")
        for key in ("solver", "guidance_start", "guidance_stop", "guidance_sigma_min", "guidance_sigma_max", "score_bins"):
            if getattr(config, key) is not None:
                raise UserError(f"{key}= is for our checkpoints; a pipeline has a scheduler of its own, so leave it out.")
        self._pipe: Any = None

    def identity(self) -> dict[str, Any]:
        given = {key: value for key in ARGUMENTS if (value := getattr(self.config, key)) is not None}
        folder = self.folder
        weights = None if folder is None else hash_ends(sorted(folder.rglob("*.safetensors")))
        configs = None if folder is None else hash_ends(_configs(folder))
        return {"pipeline": self.name, "weights": weights, "configs": configs, "dtype": self.config.dtype, **given}

    def pipe(self) -> Any:
        """The loaded pipeline. Raises UserError for one that cannot be loaded, or takes no text."""
        if self._pipe is None:
            self._pipe = load_pipeline(self.path, self.config)
        return self._pipe

    def arguments(self) -> dict[str, Any]:
        """What every call is given, by the pipeline's names. Raises UserError for a key that it does not know."""
        known = inspect.signature(self.pipe().__call__).parameters
        given = {}
        for key, name in ARGUMENTS.items():
            value = getattr(self.config, key)
            if value is None:
                continue
            if name not in known:
                raise UserError(f"{key}={value} is not understood by {type(self.pipe()).__name__}; leave {key}= out.")
            given[name] = value
        return given

    def size(self, suite: Suite, height: int | None, width: int | None) -> dict[str, int]:
        """``height`` and ``width`` for one prompt; what the command line says goes before what the suite says."""
        known = inspect.signature(self.pipe().__call__).parameters
        if not {"height", "width"} <= known.keys():
            return {}
        square = resolution_of(self.pipe())
        own = size_for(suite, height, width, square, MULTIPLE)
        sides = (self.config.height or own[0], self.config.width or own[1])
        # Both or none: of a single one pipelines take no notice.
        return {} if sides == (None, None) else {"height": sides[0] or square, "width": sides[1] or square}

    def paint(self, texts: Sequence[str], seeds: Sequence[int], size: dict[str, int]) -> list[np.ndarray]:
        """Pictures of equal size, uint8 [H, W, 3]. Raises PipelineError for whatever the pipeline raises."""
        pipe, arguments = self.pipe(), {**self.arguments(), **size}
        if "negative_prompt" in arguments:
            arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(texts)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        if self.on_step is not None and "callback_on_step_end" in inspect.signature(pipe.__call__).parameters:
            arguments["callback_on_step_end"] = self._told
        try:
            with torch.no_grad():
                found = pipe(list(texts), generator=generators, output_type="pil", **arguments)
        except torch.OutOfMemoryError:
            raise PipelineError(f"{len(texts)} images did not fit into memory; lower batch_size= or the size") from None
        except Exception as error:  # other people's code, which raises anything
            raise PipelineError(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
        flags = getattr(found, "nsfw_content_detected", None)
        if len(texts) == 1 and flags and flags[0]:
            raise PipelineError("the pipeline's safety checker blanked it")
        if flags and any(flags):
            raise PipelineError("the safety checker blanked one of them")
        return [np.asarray(image.convert("RGB")) for image in found.images]

    def _told(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """What diffusers calls after each step."""
        if self.on_step is not None:
            self.on_step(step + 1)
        return tensors

    def draw(self, place: Place) -> tuple[list[Drawn], dict[str, Any]]:
        records = self._records(place)
        journal = place.folder / "drawing"
        with disk_errors(place.folder):
            place.pictures.mkdir(parents=True, exist_ok=True)
            finished = finished_names(place.pictures, list(records.values()))
        share = list(records.values())[place.processes.rank :: place.processes.size]
        share = [record for record in share if record.name not in finished]

        def draw() -> None:
            with disk_errors(place.folder):
                self._draw_share(place, share, journal)

        def merge() -> None:
            with disk_errors(place.folder):
                merge_manifests(place.pictures)

        all_do(place.processes, draw, after=merge)
        return self._found(place, journal)

    def _records(self, place: Place) -> dict[str, ImageRecord]:
        """What is to be drawn, by file. The pipeline says what it is at its true sizes when it draws."""
        identity, records, prompts = self.identity(), {}, by_id(place.suite.prompts)
        for image in drawn_images(place, {}):
            prompt = prompts[image.prompt]
            records[image.file.stem] = ImageRecord(
                image.file.stem, prompt.text, self.config.negative_prompt, int(image.seed or 0), prompt.height or 0,
                prompt.width or 0, identity, self.name, 0, self.config.dtype,
            )  # fmt: skip
        return records

    def _draw_share(self, place: Place, share: list[ImageRecord], folder: Path) -> None:
        if not share:
            return
        self.arguments()
        groups: dict[tuple[int, int], list[ImageRecord]] = {}
        for record in share:
            groups.setdefault((record.height, record.width), []).append(record)
        size, rank = self.config.batch_size, place.processes.rank
        batches = [rows[start : start + size] for rows in groups.values() for start in range(0, len(rows), size)]
        manifest = Manifest(place.pictures / f"manifest.rank{rank}.jsonl")
        bar = make_bar(f"drawing with {self.label}", "image", len(share), shown=rank == 0)
        with bar, Journal(folder, rank) as journal:
            try:
                for batch in batches:
                    for record, image in self._batch(place, batch):
                        if isinstance(image, str):
                            journal.add(record.name, {"error": image})
                        else:
                            about = {"prompt": record.prompt, "seed": record.seed, "checkpoint": self.name}
                            bytes_written = save_png(place.pictures / record.file, image, about)
                            manifest.append(ImageRecord(**{**record.__dict__, "bytes": bytes_written}))
                        bar.update()
            finally:
                manifest.close()

    def _batch(self, place: Place, batch: list[ImageRecord]) -> list[tuple[ImageRecord, np.ndarray | str]]:
        """Each record of a batch with its picture, or why there is none; a batch that fails is tried one by one."""
        place.signal.check()
        size = self.size(place.suite, batch[0].height or None, batch[0].width or None)
        try:
            images = self.paint([record.prompt for record in batch], [record.seed for record in batch], size)
            return list(zip(batch, images, strict=True))
        except PipelineError as error:
            if len(batch) == 1:
                return [(batch[0], f"the pipeline could not draw it ({error})")]
        return [found for record in batch for found in self._batch(place, [record])]

    def _found(self, place: Place, journal: Path) -> tuple[list[Drawn], dict[str, Any]]:
        errors = {name: str(row.get("error")) for name, row in read_journals(journal)}
        records = read_manifests(place.pictures)
        images = []
        for image in drawn_images(place, {}):
            stem = image.file.stem
            error = "" if stem in records else errors.get(stem, "it was not drawn")
            images.append(Drawn(image.name, image.prompt, image.file, image.seed, error))
        if images and all(image.error for image in images):
            raise UserError(f"{self.path} drew none of {len(images)} pictures: {images[0].error}; mend that and run again.")
        settings = {key: value for key in ARGUMENTS if (value := getattr(self.config, key)) is not None}
        source = {"pipeline": self.path, "weights": self.identity()["weights"], "settings": settings, "dtype": self.config.dtype}
        return images, source

    def painter(self, suite: Suite) -> Painter:
        return partial(self.paint_for, suite)

    def paint_for(self, suite: Suite, requests: list[Request]) -> list[np.ndarray]:
        """Pictures, uint8 [H, W, 3]. Raises UserError where the pipeline cannot draw one."""
        images = []
        for request in requests:
            size = self.size(suite, request.height, request.width)
            try:
                images += self.paint([request.text], [request.seed], size)
            except PipelineError as error:
                raise UserError(f"{self.label} could not draw {request.text[:60]!r}: {error}.") from None
        return images

    def close(self) -> None:
        self._pipe = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def load_pipeline(path: str, config: SampleConfig) -> Any:
    """A pipeline on its device, from safetensors and diffusers' own classes alone. UserError for what cannot be loaded so, or does not
    take a text."""
    from diffusers import DiffusionPipeline

    from paradiffusion.sampling.diffusers_pipeline import ParaDiffusionPipeline

    target = choose_device(config.device)
    if config.dtype == "float32":
        exact_float32()
    folder = Path(path).expanduser()
    source = str(folder) if folder.is_dir() else path
    try:
        ours = folder.is_dir() and json.loads((folder / "model_index.json").read_text()).get("_class_name") == OURS
        loader: Any = ParaDiffusionPipeline if ours else DiffusionPipeline
        pipe = loader.from_pretrained(source, use_safetensors=True, torch_dtype=DTYPES[config.dtype])
        pipe = pipe.to(target)
    except UserError:
        raise
    except Exception as error:  # the libraries below raise anything for a folder that is not what it claims to be
        reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        raise UserError(
            f"pipeline={path} cannot be loaded ({reason}); expected a diffusers folder with model_index.json and safetensors, "
            "or the id of one on the hub."
        ) from None
    parameters = inspect.signature(pipe.__call__).parameters
    if "prompt" not in parameters or "generator" not in parameters:
        raise UserError(f"pipeline={path} is a {type(pipe).__name__}, which draws no pictures from a text; name one that does.")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _configs(folder: Path) -> list[Path]:
    """The files of a pipeline's parts that are no weights: a scheduler is nothing else, and decides the pictures as much."""
    index = folder / "model_index.json"
    try:
        named = set(json.loads(index.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        named = set()  # which loading refuses
    parts = [path for path in folder.iterdir() if path.name in named and path.is_dir()]
    found = [file for part in parts for kind in ("*.json", "*.txt") for file in part.glob(kind)]
    return [index, *sorted(file for file in found if file.is_file())]


def resolution_of(pipe: Any) -> int:
    """The side in pixels of the square that a pipeline draws by default: its denoiser's sample size in latents times its
    autoencoder's factor."""
    if hasattr(pipe, "config") and "description" in pipe.config:
        return int(pipe.config["description"]["resolution"])
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    sample: Any = getattr(getattr(denoiser, "config", None), "sample_size", None)
    latents: Any = sample or getattr(pipe, "default_sample_size", None) or 64
    side = max(latents) if isinstance(latents, list | tuple) else latents
    return int(side * getattr(pipe, "vae_scale_factor", 8))
