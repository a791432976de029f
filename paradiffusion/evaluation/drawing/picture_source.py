"""Interface of a source of pictures to judge: a checkpoint, a pipeline or a folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paradiffusion.evaluation.records import Drawn, Painter
from paradiffusion.evaluation.suites.suite import Suite, SuitePrompt
from paradiffusion.sampling.run import Processes, StopSignal

SCENE_BASE = 64  # pixels: the resolution that the sizes of the built-in scenes are for


@dataclass(frozen=True)
class Place:
    """Where one model's pictures of one suite go, and how many of each prompt."""

    suite: Suite
    images_per_prompt: int
    folder: Path
    processes: Processes
    signal: StopSignal

    @property
    def pictures(self) -> Path:
        return self.folder / "images"

    @property
    def first(self) -> bool:
        """Whether this is the process that writes what belongs to all."""
        return self.processes.rank == 0


class Source(ABC):
    """A checkpoint, a pipeline or a folder of pictures: its kind (of ``records.KINDS``), its label in reports, its folder's name."""

    kind: str
    label: str
    name: str
    on_step: Callable[[int], None] | None = None  # told after each step of ``painter``'s pictures how many are done

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What decides its pictures, as JSON; found without loading it."""

    @abstractmethod
    def draw(self, place: Place) -> tuple[list[Drawn], dict[str, Any]]:
        """Draw this process's share of what is not there yet; all images, in the order of the suite, and what they come from, as
        JSON. Stopped after a signal, in every process."""

    def home(self) -> Path | None:
        """The folder whose ``evaluation/`` holds its evaluations, such as a training stage's; None where there is none."""
        return None

    def images_of(self, suite: Suite) -> int:
        """How many pictures of each prompt it has, where nobody says."""
        return 1

    def painter(self, suite: Suite) -> Painter | None:
        """Draws further pictures; None for a folder of pictures."""
        return None

    def close(self) -> None:  # noqa: B027
        """Let its models go."""


def image_name(prompt: SuitePrompt, number: int) -> str:
    return f"{prompt.id}_{number}" if number else prompt.id


def file_stem(row: int, number: int) -> str:
    """The file of image ``number`` of the suite's prompt ``row``, as sample.py names it."""
    return f"{row:05d}_{number}" if number else f"{row:05d}"


def size_for(suite: Suite, height: int | None, width: int | None, resolution: int, multiple: int) -> tuple[int | None, int | None]:
    """(height, width) in pixels at which a model of ``resolution`` draws a prompt of ``suite``.

    Scenes are made of places on a canvas, so that their sizes grow with the model's; other suites say pixels.
    """
    if not is_scaled(suite):
        return height, width

    def scaled(side: int | None) -> int | None:
        return None if side is None else max(1, round(side * resolution / SCENE_BASE / multiple)) * multiple

    return scaled(height), scaled(width)


def is_scaled(suite: Suite) -> bool:
    """Whether the sizes of a suite are relative to the model's resolution: those of scenes are, unless they were set."""
    canvases = [prompt.meta.get("scene", {}) for prompt in suite.prompts]
    return all(
        bool(canvas) and (prompt.height, prompt.width) == (canvas.get("height"), canvas.get("width"))
        for prompt, canvas in zip(suite.prompts, canvases, strict=True)
    )
