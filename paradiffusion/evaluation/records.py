"""Records of an evaluation: images, scores, what passes between drawing, scoring and reporting, and evaluation.json."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from pydantic import TypeAdapter

from paradiffusion.atomic import write_atomic
from paradiffusion.errors import UserError, reason_of
from paradiffusion.evaluation.estimates import Estimate, Number, ratio
from paradiffusion.evaluation.suites.suite import Suite
from paradiffusion.runner import make_bar
from paradiffusion.stopping import StopSignal

T = TypeVar("T")


@dataclass(frozen=True)
class Drawn:
    """One image of a suite: its name (the prompt's id, with "_1", "_2", ... for the further ones of a prompt), the prompt's id, its file
    (which may be missing or broken), and why there is no picture, "" where there is one."""

    name: str
    prompt: str
    file: Path
    seed: int | None = None
    error: str = ""


@dataclass(frozen=True)
class Measure:
    """One number that a score gives each image, or the whole set. ``unit`` is "share" (0 to 1, shown in per cent), "cosine" (-1 to 1) or
    "number"; ``higher_is_better`` is None for what is no merit of a model, such as what chance reaches; ``worst`` what an image that failed
    counts as, None for a number of the whole set."""

    name: str
    title: str
    unit: str = "number"
    higher_is_better: bool | None = True
    worst: float | None = 0.0


@dataclass
class ImageScore:
    """What one image got.

    Attributes:
        values: by measure; one that does not apply to this image (no checklist) is absent.
        weights: by measure, where an image counts for more than 1 (its questions, its objects), which ``values`` are then means over.
        error: why it failed; ``values`` then hold each measure's ``worst``.
        detail: for the report, as JSON; the keys in use are those of ``paradiffusion.evaluation.reporting``.
    """

    image: str
    prompt: str
    values: dict[str, Number]
    weights: dict[str, float] = field(default_factory=dict)
    error: str = ""
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass
class Table:
    """A table of a score's own, such as recall by position. Cells are texts, numbers or Estimates; ``plot`` names the kind
    of figure that shows it too ("bars", "lines" or "")."""

    title: str
    head: list[str]
    rows: list[list[Estimate | bool | int | float | str | None]]
    note: str = ""
    unit: str = "share"
    plot: str = ""


@dataclass
class ScoreResult:
    """All that one score found.

    Attributes:
        settings: what it depends on: models, revisions, prompts.
        overall: estimates of the whole set, for measures that no single image has (FID), or whose mean is no mean over images.
        warnings: sentences that a reader must see beside the numbers.
        skipped: why it was not computed; everything else is then empty.
    """

    name: str
    title: str
    formula: str = ""
    source: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    measures: list[Measure] = field(default_factory=list)
    images: list[ImageScore] = field(default_factory=list)
    overall: dict[str, Estimate] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    skipped: str = ""


@dataclass
class Run:
    """The running evaluation, as a score sees it: which process this is, of how many, and its progress bar."""

    rank: int
    size: int
    signal: StopSignal

    def bar(self, total: int, title: str) -> Any:
        """A tqdm bar, shown by the first process alone; a context manager."""
        return make_bar(title, "it", total, shown=self.rank == 0)

    def check(self) -> None:
        """Raises Stopped when the run is to stop; called between pieces of work that are on disk."""
        self.signal.check()


class Score(Protocol):
    """A score. It is made with its models not yet loaded; ``settings`` does not load them.

    ``prepare`` is called in every process with its share of the images, and keeps what it learns in ``work``, a folder of
    its own, so that after a stop it goes on there. ``result`` is called in the first process once all have prepared.
    """

    name: str
    title: str

    def settings(self) -> dict[str, Any]:
        """What its numbers depend on, as JSON; ``work`` is emptied when it differs from what is kept there."""

    def prepare(self, suite: Suite, images: list[Drawn], work: Path, run: Run) -> None:
        """Look at ``images``, this process's share. An image that cannot be read is noted as failed, never raised."""

    def result(self, suite: Suite, images: list[Drawn], work: Path) -> ScoreResult:
        """The numbers over all ``images``, from what all processes left in ``work``."""


@dataclass(frozen=True)
class Request:
    """A picture to paint; height and width in pixels, None for the model's own."""

    text: str
    seed: int
    height: int | None = None
    width: int | None = None


# Draws further pictures, uint8 [H, W, 3], one for each request; the same request gives the same picture.
Painter = Callable[[list[Request]], list[Any]]

NAME: Final = "evaluation.json"
FORMAT_VERSION: Final = 1
KINDS: Final = ("checkpoint", "pipeline", "images")


@dataclass
class Evaluation:
    """One model on one suite: how reports call it, its ``kind`` (one of KINDS), where the images come from (checkpoint, step, settings,
    as JSON), an entry of ``images`` for each wanted one in the suite's order, and ``scores``, skipped ones included."""

    label: str
    kind: str
    source: dict[str, Any]
    suite: Suite
    images_per_prompt: int
    images: list[Drawn]
    scores: list[ScoreResult] = field(default_factory=list)

    def score(self, name: str) -> ScoreResult | None:
        """The score of a name, None where it is not among these."""
        return next((score for score in self.scores if score.name == name), None)


def write_evaluation(folder: Path, evaluation: Evaluation) -> Path:
    """Write evaluation.json into ``folder``, under a temporary name first; its path."""
    record = asdict(evaluation)
    for row in record["images"]:
        row["file"] = relative_file(Path(row["file"]), folder)
    # Key order is kept: asdict follows the fields, so that two equal evaluations are equal bytes.
    text = json.dumps({"paradiffusion_evaluation": FORMAT_VERSION, **finite(record)}, ensure_ascii=False, indent=1)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / NAME, text + "\n")
    return folder / NAME


def read_evaluation(folder: Path) -> Evaluation:
    """The evaluation that ``folder`` holds; its files are absolute or relative to the working folder, as ``folder`` is. UserError
    where evaluation.json is missing, damaged, or not one of ours."""
    path = folder / NAME

    def made(record: Any) -> Evaluation:
        version = record.get("paradiffusion_evaluation") if isinstance(record, dict) else None
        if not isinstance(version, int):
            raise UserError(f"{path} was not written by scripts/evaluate.py; name the folder of an evaluation.")
        if version > FORMAT_VERSION:
            raise UserError(
                f"{path} has the version {version}, newer than {FORMAT_VERSION}, so this repository must be updated to read it."
            )
        found = TypeAdapter(Evaluation).validate_python(record)
        found.images = [replace(image, file=folder / image.file) for image in found.images]
        return found

    missing = f"{folder} holds no {NAME}; expected a folder that scripts/evaluate.py has filled, so run it first."
    return read_record(path, made, "run scripts/evaluate.py again to write it anew", missing)


def read_record(path: Path, make: Callable[[Any], T], fix: str, missing: str = "") -> T:
    """What ``make`` makes of the JSON at ``path``. UserError with ``fix`` where that is damaged, or no file can be read, with ``missing``
    where there is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if missing and isinstance(error, FileNotFoundError | NotADirectoryError):
            raise UserError(missing) from None
        reason = error.strerror if isinstance(error, OSError) else "it is not whole JSON"
        raise UserError(f"{path} cannot be read ({reason}); {fix}.") from None
    try:
        return make(record)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {reason_of(error)}); {fix}.") from None


def estimate(result: ScoreResult, measure: Measure, images: Sequence[ImageScore] | None = None) -> Estimate | None:
    """A measure's mean with its 95 % interval over some of ``result.images``, or, where ``images`` is None, over the whole set, for
    which ``result.overall`` goes first; None where nothing was measured, as for a checklist on prompts without questions."""
    if images is None and measure.name in result.overall:
        return result.overall[measure.name]
    rows = measured(measure, result.images if images is None else images)
    return ratio([v * w for v, w, _ in rows], [w for _, w, _ in rows], [prompt for _, _, prompt in rows]) if rows else None


def measured(measure: Measure, images: Sequence[ImageScore]) -> list[tuple[float, float, str]]:
    """(value, weight, prompt) of each image that counts."""
    found = [
        (image.values[measure.name], image.weights.get(measure.name, 1.0), image.prompt)
        for image in images
        if math.isfinite(image.values.get(measure.name, math.nan))
    ]
    return [row for row in found if row[1] > 0]


def relative_file(file: Path, folder: Path) -> str:
    """``file`` as seen from ``folder``, so that a folder that is copied whole keeps its links; absolute on another drive."""
    try:
        return Path(os.path.relpath(file, folder)).as_posix()
    except ValueError:  # another drive
        return file.absolute().as_posix()


def finite(value: Any) -> Any:
    """``value`` with null for every number that JSON cannot write."""
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, int | str) or value is None:
        return value
    return finite(value.item()) if hasattr(value, "item") else str(value)
