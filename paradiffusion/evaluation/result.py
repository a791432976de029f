"""What an evaluation leaves behind: one model on one suite, as evaluation.json."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from paradiffusion.atomic import write_atomic
from paradiffusion.errors import UserError
from paradiffusion.evaluation.estimates import Estimate, ratio
from paradiffusion.evaluation.records import Drawn, ImageScore, Measure, ScoreResult, Table
from paradiffusion.evaluation.suites.suite import ChecklistQuestion, Suite, SuitePrompt

NAME: Final = "evaluation.json"
FORMAT_VERSION: Final = 1
KINDS: Final = ("checkpoint", "pipeline", "images")


@dataclass
class Evaluation:
    """One model on one suite.

    Attributes:
        label: how reports call it: "stage 3", a model's name.
        kind: "checkpoint", "pipeline" or "images".
        source: where the images come from, as JSON: checkpoint, step, settings, dtype.
        suite: whole, with its prompts.
        images: one for each wanted image, in the order of the suite; files are relative to the folder in JSON.
        scores: in the order that they were computed in, skipped ones included.
    """

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
        row["file"] = _relative(Path(row["file"]), folder)
    # Key order is kept: asdict follows the fields, so that two equal evaluations are equal bytes.
    text = json.dumps({"paradiffusion_evaluation": FORMAT_VERSION, **_plain(record)}, ensure_ascii=False, indent=1)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / NAME, text + "\n")
    return folder / NAME


def read_evaluation(folder: Path) -> Evaluation:
    """The evaluation that ``folder`` holds; its files are absolute or relative to the working folder, as ``folder`` is.

    Raises:
        UserError: where evaluation.json is missing, damaged, or not one of ours.
    """
    path = folder / NAME
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no {NAME}; expected a folder that scripts/evaluate.py has filled, so run it first."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not whole JSON"
        raise UserError(f"{path} cannot be read ({reason}); run scripts/evaluate.py again to write it anew.") from None
    version = record.get("paradiffusion_evaluation") if isinstance(record, dict) else None
    if not isinstance(version, int):
        raise UserError(f"{path} was not written by scripts/evaluate.py; name the folder of an evaluation.")
    if version > FORMAT_VERSION:
        raise UserError(
            f"{path} has the version {version}, newer than {FORMAT_VERSION}, so this repository must be updated to read it."
        )
    try:
        return _evaluation(record, folder)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}); run scripts/evaluate.py again to write it anew."
        ) from None


def estimate(result: ScoreResult, measure: Measure, images: Sequence[ImageScore] | None = None) -> Estimate | None:
    """A measure's mean with its 95 % interval.

    Args:
        images: some of ``result.images``; None for the whole set, for which ``result.overall`` goes first.
    Returns:
        None where nothing was measured, as for a checklist on prompts without questions.
    """
    if images is None and measure.name in result.overall:
        return result.overall[measure.name]
    rows = [
        (row.values[measure.name], row.weights.get(measure.name, 1.0), row.prompt)
        for row in (result.images if images is None else images)
        if measure.name in row.values and math.isfinite(row.values[measure.name])
    ]
    if not sum(weight for _, weight, _ in rows) > 0:
        return None
    return ratio([v * w for v, w, _ in rows], [w for _, w, _ in rows], [prompt for _, _, prompt in rows])


def grouped(
    result: ScoreResult,
    measure: Measure,
    group_of: Callable[[SuitePrompt], str],
    prompts: Iterable[SuitePrompt],
) -> dict[str, Estimate]:
    """The estimate of each group of prompts, such as a length band, in the order of the groups' first prompts; a group
    without a value is absent."""
    groups = {prompt.id: group_of(prompt) for prompt in prompts}
    rows: dict[str, list[ImageScore]] = {name: [] for name in groups.values()}
    for row in result.images:
        if row.prompt in groups:
            rows[groups[row.prompt]].append(row)
    found = {name: estimate(result, measure, images) for name, images in rows.items()}
    return {name: value for name, value in found.items() if value is not None}


def _relative(file: Path, folder: Path) -> str:
    try:
        return Path(os.path.relpath(file, folder)).as_posix()
    except ValueError:  # another drive
        return file.absolute().as_posix()


def _plain(value: Any) -> Any:
    """``value`` as JSON takes it: numbers of NumPy as Python's, what is not finite as null, for which JSON has no word."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if hasattr(value, "item"):
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


def _evaluation(record: dict[str, Any], folder: Path) -> Evaluation:
    return Evaluation(
        label=str(record["label"]),
        kind=str(record["kind"]),
        source=dict(record["source"]),
        suite=suite_from(record["suite"]),
        images_per_prompt=int(record["images_per_prompt"]),
        images=[Drawn(**{**row, "file": folder / row["file"]}) for row in record["images"]],
        scores=[_score(row) for row in record["scores"]],
    )


def suite_from(record: dict[str, Any]) -> Suite:
    """A suite from the JSON that ``dataclasses.asdict`` makes of it. KeyError or TypeError where it is damaged."""
    prompts = tuple(
        SuitePrompt(
            **{
                **row,
                "questions": tuple(
                    ChecklistQuestion(**{**question, "parents": tuple(question["parents"])})
                    for question in row["questions"]
                ),
            }
        )
        for row in record["prompts"]
    )
    rows = tuple(record.get("rows", ()))
    return Suite(**{**record, "prompts": prompts, "measures": tuple(record["measures"]), "rows": rows})


def _score(record: dict[str, Any]) -> ScoreResult:
    images = [ImageScore(**{**row, "values": _numbers(row["values"])}) for row in record["images"]]
    tables = [
        Table(**{**row, "rows": [[_cell(cell) for cell in cells] for cells in row["rows"]]}) for row in record["tables"]
    ]
    return ScoreResult(
        **{
            **record,
            "measures": [Measure(**row) for row in record["measures"]],
            "images": images,
            "overall": {name: Estimate(**_numbers(row)) for name, row in record["overall"].items()},
            "tables": tables,
        }
    )


def _numbers(values: dict[str, Any]) -> dict[str, Any]:
    return {name: math.nan if value is None else value for name, value in values.items()}


def _cell(cell: Any) -> Any:
    """A table's cell; an Estimate is stored as its fields."""
    if isinstance(cell, dict) and cell.keys() == Estimate.__dataclass_fields__.keys():
        return Estimate(**_numbers(cell))
    return cell
