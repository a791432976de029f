"""The playground's models: a paragraph drawn, each of its sentences judged on the picture, and the picture without one of them.

The page is in ``playground_page.py``. Nothing here knows of it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from paradiffusion.checks import positive
from paradiffusion.config import FrozenConfig, SamplerConfig, option
from paradiffusion.errors import UserError
from paradiffusion.evaluation.drawing.checkpoint_pictures import CheckpointSource
from paradiffusion.evaluation.drawing.pipeline_pictures import ARGUMENTS, PipelineSource, resolution_of
from paradiffusion.evaluation.evaluate_options import EvaluateOptions
from paradiffusion.evaluation.records import Request
from paradiffusion.evaluation.reporting.cards import JudgedSentence, level_of
from paradiffusion.evaluation.scores.counterfactual import NOTHING, Counterfactual, Removal, removals_of, requests_of
from paradiffusion.evaluation.scores.sentence_judges import ClipJudge, NoJudge, SceneJudge
from paradiffusion.evaluation.subjects import subjects_of
from paradiffusion.evaluation.suites.suite import Suite, SuitePrompt
from paradiffusion.metrics.sentences import sentences
from paradiffusion.sampling.gallery import ImageRecord, Manifest, merge_manifests, read_manifests, save_png, write_gallery
from paradiffusion.sampling.pipeline import sampler_settings
from paradiffusion.sampling.prompts import MAX_SEED
from paradiffusion.sampling.run import disk_errors
from paradiffusion.scenes.sentence_truth import read_scene
from paradiffusion.scenes.world import scene_to_meta

PICTURES: Final = 4  # of one text, by each model
MAX_STEPS: Final = 250
JUDGEMENTS: Final = "sentences.jsonl"
_NOWHERE: Final = Suite("playground", "Playground", ())

Told = Callable[[float, str], None]  # a share of what is to be done, and what it is


@dataclass
class AppOptions:
    """The keys of the command line; app.py says what each is."""

    ckpt: str | None = None
    pipeline: str | None = None
    compare: str | None = None
    clip: str | None = None
    output_dir: str = "samples/playground"
    examples: str = "[data/prompts.txt,data/prompts_large.jsonl]"
    host: str = "127.0.0.1"
    port: int = 7860
    token: str | None = None
    hosts: str | None = None
    max_side: int = option(1024, accepts=positive)
    max_characters: int = option(4000, accepts=positive)
    unet: str = "unet"
    batch_size: int = option(4, accepts=positive)
    device: str | None = None
    dtype: str = "auto"
    threads: int | None = option(None, accepts=positive)
    offload_text_encoder: bool = False
    vae_tiling: bool = False
    text_encoder: FrozenConfig = field(default_factory=FrozenConfig)
    codec: FrozenConfig = field(default_factory=FrozenConfig)


@dataclass(frozen=True)
class Settings:
    """How a paragraph is drawn; None is the model's own."""

    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None


@dataclass
class Picture:
    """A picture, uint8 [H, W, 3], of model ``model`` and file ``name``; ``sentences`` are those of its text, as far as they are judged,
    and ``without`` its pictures of the same seed that leave one of them out."""

    model: int
    name: str
    text: str
    settings: Settings
    pixels: np.ndarray
    sentences: list[JudgedSentence]
    without: dict[int, np.ndarray] = field(default_factory=dict)


def sources_of(options: AppOptions) -> list[CheckpointSource | PipelineSource]:
    """The one or two models that the options name; nothing is loaded yet. UserError for others, and for what draws nothing."""
    if sum(map(bool, (options.ckpt, options.pipeline, options.compare))) > 1:
        raise UserError("ckpt=, pipeline= and compare= exclude one another; two models are compare=[a,b].")
    keys = ("compare", "pipeline", "unet", "batch_size", "device", "dtype", "threads", "offload_text_encoder", "vae_tiling",
            "text_encoder", "codec")  # fmt: skip
    chosen = EvaluateOptions(**{key: getattr(options, key) for key in keys})
    chosen.ckpt = options.ckpt or (None if options.pipeline or options.compare else "data/nano")
    found = [subject.source for subject in subjects_of(chosen)]
    drawing = [source for source in found if isinstance(source, CheckpointSource | PipelineSource)]
    if len(drawing) != len(found) or len(drawing) > 2 or (options.compare and len(drawing) < 2):
        raise UserError(f"compare={options.compare} is not understood; expected two models that draw, as in [a,b].")
    return drawing


class Playground:
    """One or two models and the folder that their pictures are saved in. One picture is drawn at a time, whoever asks."""

    def __init__(
        self, sources: Sequence[CheckpointSource | PipelineSource], folder: Path, clip: str | None = None,
        max_side: int = 1024, max_characters: int = 4000,
    ) -> None:  # fmt: skip
        """Load the models. Raises UserError as loading them does."""
        self.sources, self.folder = list(sources), folder
        self.max_side, self.max_characters = max_side, max_characters
        self.clip = None if clip is None else ClipJudge(clip, device=str(sources[0].config.device or "cpu"))
        self._given = [source.config for source in sources]
        self._lock = threading.Lock()
        for source in self.sources:
            source.models() if isinstance(source, CheckpointSource) else source.pipe()
        if self.clip is not None:
            self.clip.clip  # noqa: B018  loaded now, so that what is wrong with it is said before anybody waits

    def own(self, model: int) -> str:
        """What a model draws at where nobody says."""
        source = self.sources[model]
        if isinstance(source, PipelineSource):
            return f"{resolution_of(source.pipe())} pixels, steps and guidance its pipeline's own"
        models = source.models()
        return f"{models.resolution} pixels, {models.sampler.steps} steps, guidance {models.sampler.guidance:g}"

    def check(self, text: str, settings: Settings, count: int) -> None:
        """Raise UserError for what is empty, too long, too large or no number of its kind."""
        if not text.strip():
            raise UserError("there is no text; write a paragraph.")
        if len(text) > self.max_characters:
            raise UserError(f"the text has {len(text)} characters; at most {self.max_characters} are drawn here.")
        if not 0 <= settings.seed <= MAX_SEED - PICTURES - 1 or not 1 <= count <= PICTURES:
            raise UserError(f"seed {settings.seed} or {count} pictures is out of range; at most {PICTURES} are drawn.")
        if settings.steps is not None and not 1 <= settings.steps <= MAX_STEPS:
            raise UserError(f"{settings.steps} steps are out of range; expected 1 to {MAX_STEPS}.")
        for key in ("height", "width"):
            side = getattr(settings, key)
            if side is not None and not 1 <= side <= self.max_side:
                raise UserError(f"{key} {side} is out of range; expected at most {self.max_side} pixels.")

    def draw(self, text: str, settings: Settings, count: int, tell: Told) -> Iterator[Picture]:
        """``count`` pictures of ``text`` by each model, those of a seed one after the other; saved, and judged as far as the pixels alone
        tell. White space between sentences is drawn as one space, so that a sentence can be left out of it. UserError as ``check``,
        and for a size that a model cannot draw."""
        self.check(text, settings, count)
        text = " ".join(sentences(text.encode("utf-8", "replace").decode()))
        total = count * len(self.sources)
        for number in range(total):
            model, one = number % len(self.sources), replace(settings, seed=settings.seed + number // len(self.sources))
            where = f"picture {number + 1} of {total}"
            [(name, pixels)] = self._paint(model, [text], one, tell, where)
            picture = Picture(model, name, text, one, pixels, exactly_judged(text, pixels))
            self._note(picture)
            yield picture

    def without(self, picture: Picture, number: int, tell: Told) -> np.ndarray:
        """The picture of the same seed without sentence ``number``, drawn once. UserError where no other sentence is left."""
        if number not in picture.without:
            parts = [one.text for one in picture.sentences]
            rest = " ".join(parts[:number] + parts[number + 1 :])
            if not rest:
                raise UserError("the text has one sentence; without it nothing is left to draw.")
            [(_, picture.without[number])] = self._paint(
                picture.model, [rest], picture.settings, tell, "without it", {"left_out": parts[number], "of": picture.name}
            )  # fmt: skip
        return picture.without[number]

    def judge_rest(self, picture: Picture, tell: Told) -> None:
        """Judge the sentences that no scene tells the truth about: each is left out in turn, and CLIP, where there is one, says what
        becomes of its score, else the pixels whether anything changes at all. Up to 16 sentences; what is left stays unjudged."""
        parts = [one.text for one in picture.sentences]
        if len(parts) < 2 or all(one.level != "unknown" for one in picture.sentences):
            return
        prompt = SuitePrompt("text", picture.text)
        requests = requests_of(prompt, picture.settings.seed)
        seed = replace(picture.settings, seed=picture.settings.seed + 1)
        [(_, other)] = self._paint(picture.model, [picture.text], seed, tell, "another seed", {"of": picture.name})
        pictures = {"whole": picture.pixels, "seed": other}
        for name in requests:
            if name not in pictures:
                pictures[name] = self.without(picture, int(name.removeprefix("without_")), tell)
        judge = self.clip or NoJudge()
        with self._lock:  # of CLIP too there is one
            record = Counterfactual(_no_painter, judge, 1).compared(prompt, pictures)
        for removal in removals_of("text", len(parts), record):
            sentence = picture.sentences[removal.position]
            level, note = left_out_level(removal)
            sentence.notes.append(note)
            if sentence.level == "unknown":
                sentence.level = level
        self._note(picture)

    def finish(self) -> list[Path]:
        """Write each folder's page, as sample.py does; the folders that have pictures."""
        folders = [self.folder / source.name for source in self.sources if (self.folder / source.name).is_dir()]
        for folder in folders:
            write_gallery(folder, merge_manifests(folder), folder.name)
        return folders

    def _paint(
        self, model: int, texts: list[str], settings: Settings, tell: Told, what: str, also: dict[str, str] | None = None
    ) -> list[tuple[str, np.ndarray]]:  # fmt: skip
        """Draw and save ``texts``, one by one: the file's name and the picture of each."""
        source = self.sources[model]
        given = {key: value for key, value in asdict(settings).items() if key != "seed" and value is not None}
        whose = f"{what} by {source.label}" if len(self.sources) > 1 else what
        with self._lock, disk_errors(self.folder):
            source.config = replace(self._given[model], **given)
            told = self._told(source)
            steps = int(told["settings"].get("steps") or 0)
            source.on_step = lambda step: tell(min(step / steps, 1.0) if steps else 0.0, f"{whose}, step {step}")
            found = []
            for text in texts:
                tell(0.0, whose)
                request = Request(text, settings.seed, settings.height, settings.width)
                [pixels] = source.paint_for(_NOWHERE, [request])
                found.append((self._save(source, request, pixels, told, also or {}), pixels))
            return found

    def _told(self, source: CheckpointSource | PipelineSource) -> dict[str, Any]:
        """What decides a picture beside text, seed and size, as ImageRecord has it. UserError for settings that make no sense."""
        sampler_settings(source.config, SamplerConfig())
        if isinstance(source, CheckpointSource):
            models = source.models()
            settings = asdict(sampler_settings(source.config, models.sampler))
            dtype = str(models.dtype).removeprefix("torch.")
            return {"settings": settings, "checkpoint": str(source.checkpoint), "step": models.step, "dtype": dtype}
        settings = {key: value for key in ARGUMENTS if (value := getattr(source.config, key)) is not None}
        return {"settings": {**source.identity(), **settings}, "checkpoint": source.name, "step": 0, "dtype": source.config.dtype}

    def _save(
        self, source: CheckpointSource | PipelineSource, request: Request, pixels: np.ndarray, told: dict[str, Any],
        also: dict[str, str],
    ) -> str:  # fmt: skip
        """Save a picture with its settings under the folder's next number; its name."""
        folder = self.folder / source.name
        folder.mkdir(parents=True, exist_ok=True)
        last = max((record.order[0] for record in read_manifests(folder).values()), default=-1)
        height, width = pixels.shape[:2]
        record = ImageRecord(f"{last + 1:05d}", request.text, None, request.seed, height, width, **told)
        text = {key: value for key, value in asdict(record).items() if value is not None and key not in ("name", "bytes")}
        if isinstance(source, CheckpointSource):
            text["provenance"] = source.models().provenance
        size = save_png(folder / record.file, pixels, {**text, **also, "Software": "ParaDiffusion"})
        manifest = Manifest(folder / "manifest.jsonl")
        manifest.append(replace(record, bytes=size))
        manifest.close()
        return record.name

    def _note(self, picture: Picture) -> None:
        """Append what is known of a picture's sentences; of one picture the last line stands."""
        line = {"name": picture.name, "sentences": [asdict(one) for one in picture.sentences]}
        with (self.folder / self.sources[picture.model].name / JUDGEMENTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def exactly_judged(text: str, pixels: np.ndarray) -> list[JudgedSentence]:
    """The sentences of ``text``, those judged that can be read as a scene (``read_scene``), on a picture, uint8 [H, W, 3]."""
    parts = sentences(text)
    found = [JudgedSentence(part) for part in parts]
    scene, exact = read_scene(parts, *pixels.shape[:2])
    if scene is not None:
        prompt = SuitePrompt("text", text, meta={"scene": scene_to_meta(scene)})
        for one, sure, said in zip(found, exact, SceneJudge().judge(prompt, parts, pixels), strict=True):
            if sure and said is not None:
                one.level = level_of({"score": said.score, "followed": said.followed}, "share")
                facts = ", ".join(f"{name} {'yes' if value == 1 else 'no'}" for name, value in said.facts)
                one.notes.append(f"read as a scene, seen in the pixels: {facts}")
    return found


def left_out_level(removal: Removal) -> tuple[str, str]:
    """How a sentence fares that was left out, one of cards.MARKS, and why. That the picture changes without it does not say that
    it shows what the sentence says: without CLIP, followed in part is the most."""
    note = "another seed gives the same picture, so that no change can be measured"
    if removal.change is not None:
        note = f"without it the picture changes by {removal.change:.0%} of what another seed changes"
    if removal.matters is not None:
        fate = "stands out of" if removal.matters else "does not stand out of"
        return ("followed" if removal.matters else "ignored", f"{note}; its CLIP score falls by {removal.drop:.3f}, which {fate} the noise")
    if removal.change is None:
        return "unknown", note
    return "ignored" if removal.change < NOTHING else "partly", note


def _no_painter(requests: list[Request]) -> list[np.ndarray]:
    raise NotImplementedError  # the pictures are there already
