"""Who says how well a picture follows a sentence: the ground truth of a built-in scene, or a CLIP model elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from paradiffusion.data.images import BadImage, decode
from paradiffusion.errors import UserError
from paradiffusion.evaluation.records import Drawn
from paradiffusion.evaluation.scores.image_features import clip_weights
from paradiffusion.evaluation.scores.scene_claims import claims
from paradiffusion.evaluation.scores.scene_truth import follow, object_of
from paradiffusion.evaluation.suites.suite import SuitePrompt
from paradiffusion.judges.clip import Clip, load_clip
from paradiffusion.scenes.judge import cell_of
from paradiffusion.scenes.world import Scene, scene_from_meta

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 as shares of the picture's width and height


@dataclass(frozen=True)
class Judgement:
    """How well a picture follows one sentence.

    Attributes:
        score: higher is better; what it means is the judge's (see ``SentenceJudge.unit``).
        followed: yes or no; None where the judge only compares.
        facts: (what it is about, 0 to 1), the single facts that the sentence states, where the judge knows them.
        kind: what the sentence is about, "" where the judge does not know.
    """

    score: float
    followed: bool | None = None
    facts: tuple[tuple[str, float], ...] = ()
    kind: str = ""


class SentenceJudge(Protocol):
    """Judges sentences one by one.

    Attributes:
        name: short, as a file name; title: as reports show it.
        unit: of its scores: "share" (0 to 1, 1 = all of it is shown) or "cosine".
        exact: whether it knows the truth; others estimate.
    """

    name: str
    unit: str
    exact: bool

    @property
    def title(self) -> str: ...

    def settings(self) -> dict[str, Any]:
        """What its scores depend on, as JSON; loads nothing."""
        ...

    def judge(self, prompt: SuitePrompt, sentences: Sequence[str], image: np.ndarray) -> list[Judgement | None]:
        """Each sentence of the prompt against a picture, uint8 [H, W, 3]; None where no picture could show it."""
        ...

    def kinds(self, prompt: SuitePrompt, sentences: Sequence[str]) -> list[str | None]:
        """What each sentence is about, "" where that is not known; None for those that are not judged."""
        ...

    def regions(self, prompt: SuitePrompt, sentences: Sequence[str]) -> list[tuple[Box, ...]]:
        """Where in the picture what each sentence speaks of belongs; () where that is not known, or everywhere."""
        ...


class SceneJudge:
    """The truth about a built-in scene: every fact of every sentence is looked up in the pixels (scene_truth.py)."""

    name = "truth"
    title = "the scene's ground truth"
    unit = "share"
    exact = True

    def settings(self) -> dict[str, Any]:
        return {"judge": self.name}

    def judge(self, prompt: SuitePrompt, sentences: Sequence[str], image: np.ndarray) -> list[Judgement | None]:
        found = follow(scene_of(prompt), sentences, image)
        return [
            None if one is None else Judgement(one.score, one.followed, one.facts, kind or "")
            for one, kind in zip(found, self.kinds(prompt, sentences), strict=True)
        ]

    def kinds(self, prompt: SuitePrompt, sentences: Sequence[str]) -> list[str | None]:
        return [claim.kind or None for claim in claims(sentences)]

    def regions(self, prompt: SuitePrompt, sentences: Sequence[str]) -> list[tuple[Box, ...]]:
        scene = scene_of(prompt)
        return [
            tuple(_cell_box(scene, item.place) for item in object_of(scene, claim)) if claim.kind != "relation" else ()
            for claim in claims(sentences)
        ]


def _cell_box(scene: Scene, place: str) -> Box:
    rows, columns = cell_of(place, scene.width, scene.height, scene.grid)
    width, height = scene.width, scene.height
    return columns.start / width, rows.start / height, columns.stop / width, rows.stop / height


def scene_of(prompt: SuitePrompt) -> Scene:
    """The ground truth of a prompt of the scenes suite; UserError for any other prompt."""
    if "scene" not in prompt.meta:
        raise UserError(
            f"the prompt {prompt.id} has no ground truth of a built-in scene; judge this suite with clip=<model> instead."
        )
    return scene_from_meta(prompt.meta["scene"])


class _KnowsNoScene:
    """What a judge says that does not know what sentences are about, nor where that belongs."""

    def kinds(self, prompt: SuitePrompt, sentences: Sequence[str]) -> list[str | None]:
        return ["" for _ in sentences]

    def regions(self, prompt: SuitePrompt, sentences: Sequence[str]) -> list[tuple[Box, ...]]:
        return [() for _ in sentences]


class NoJudge(_KnowsNoScene):
    """Nobody who could say how well a picture follows a sentence: what leaving it out changes can be measured all the same."""

    name = "none"
    title = "the picture's own change"
    unit = "number"
    exact = False

    def settings(self) -> dict[str, Any]:
        return {"judge": self.name}

    def judge(self, prompt: SuitePrompt, sentences: Sequence[str], image: np.ndarray) -> list[Judgement | None]:
        return [None for _ in sentences]


@dataclass
class ClipJudge(_KnowsNoScene):
    """Cosines of CLIP features of sentences and pictures (CLIPScore, arXiv 2104.08718, without its factor of 2.5).

    A cosine says little alone: sentences differ in how well any picture fits them. So it compares, and never says yes or no.

    Args:
        spec: as ``clip=`` takes it, see ``paradiffusion.judges.clip.load_clip``; the model is loaded at the first use.
    """

    spec: str
    device: str = "cpu"
    precision: str = "fp32"
    name: str = field(default="clip", init=False)
    unit: str = field(default="cosine", init=False)
    exact: bool = field(default=False, init=False)

    @property
    def title(self) -> str:
        return f"CLIP {self.spec}"

    def settings(self) -> dict[str, Any]:
        return {"judge": self.name, "clip": self.spec, "precision": self.precision, "weights": self._weights}

    @cached_property
    def _weights(self) -> str | None:
        return clip_weights(self.spec)

    @cached_property
    def clip(self) -> Clip:
        """The model."""
        return load_clip(self.spec, self.device, self.precision)

    def judge(self, prompt: SuitePrompt, sentences: Sequence[str], image: np.ndarray) -> list[Judgement | None]:
        texts, _ = self.texts(sentences)
        picture = self.clip.image_features(self.clip.prepare(Image.fromarray(image))[None])[0]
        return [Judgement(float(value)) for value in texts @ picture]

    def texts(self, sentences: Sequence[str]) -> tuple[torch.Tensor, list[bool]]:
        """Features [S, D] of unit length, and which sentences were cut; those of the last call are kept."""
        key = tuple(sentences)
        if self._last is None or self._last[0] != key:
            self._last = (key, self.clip.text_features(list(key)))
        return self._last[1]

    _last: tuple[tuple[str, ...], tuple[torch.Tensor, list[bool]]] | None = field(default=None, init=False, repr=False)


def read_picture(image: Drawn) -> np.ndarray | str:
    """The pixels, uint8 [H, W, 3], or why there are none."""
    if image.error:
        return image.error
    try:
        return np.asarray(decode(image.file.read_bytes()))
    except (OSError, BadImage) as error:
        return f"{image.file.name} cannot be read: {error.strerror if isinstance(error, OSError) else error}"
