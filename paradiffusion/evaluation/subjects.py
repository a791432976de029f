"""Subjects of an evaluation: from the command line's words to models, pipelines and pictures, and the folders of their results."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from paradiffusion.atomic import write_atomic
from paradiffusion.checkpoints.hub import PREFIX
from paradiffusion.checkpoints.layouts import Official, find_checkpoint
from paradiffusion.errors import UserError
from paradiffusion.evaluation.drawing.checkpoint_pictures import CheckpointSource
from paradiffusion.evaluation.drawing.picture_folder import KINDS, PicturesSource
from paradiffusion.evaluation.drawing.picture_source import Place, Source
from paradiffusion.evaluation.evaluate_options import EvaluateOptions
from paradiffusion.evaluation.records import NAME, Evaluation, read_evaluation, read_record
from paradiffusion.evaluation.suites.suite import Suite
from paradiffusion.sampling.run import disk_errors

HUB: Final = "hub:"
ELSEWHERE: Final = Path("runs/evaluation")
SUITE: Final = "suite.json"


@dataclass(frozen=True)
class Subject:
    """One of what is judged: a source of pictures, or an evaluation that was made before; ``label`` is the user's, or None."""

    label: str | None
    source: Source | None = None
    made: Path | None = None


def subjects_of(options: EvaluateOptions) -> list[Subject]:
    """What the options name, in order; nothing is loaded yet. UserError for
    what is no checkpoint, pipeline, evaluation or folder of pictures."""
    if options.ckpt:
        return [Subject(options.label, _checkpoint(options, options.ckpt, "ckpt", options.label))]
    if options.pipeline:
        return [Subject(options.label, _pipeline(options, options.pipeline, options.label))]
    if options.images:
        return [Subject(options.label, PicturesSource(Path(options.images), options.label))]
    subjects = [_compared(options, label, path) for label, path in options.compared()]
    drawn = [subject.source for subject in subjects if subject.source is not None]
    for key in ("label", "name"):
        value = [getattr(one, key) for one in drawn]
        if twice := [one for one in value if value.count(one) > 1]:
            raise UserError(f"compare= has two of the {key} {twice[0]}; give each a name of its own, as in compare=[a=...,b=...].")
    return subjects


def _compared(options: EvaluateOptions, label: str | None, path: str) -> Subject:
    folder = Path(path).expanduser()
    if path.startswith(HUB):
        return Subject(label, _pipeline(options, path.removeprefix(HUB), label))
    if path.startswith(PREFIX):
        return Subject(label, _checkpoint(options, path, "compare", label))
    if not folder.is_dir():
        raise UserError(
            f"compare= names {path}, which is no folder; expected a run, a stage, a checkpoint, an evaluation's folder, a "
            f"pipeline's, a folder of pictures, or on the hub {PREFIX}USER/NAME for a checkpoint and {HUB}<id> for a pipeline."
        )
    if (folder / NAME).is_file():
        return Subject(label, made=folder)
    if (folder / "model_index.json").is_file() and not (folder / "checkpoint.json").is_file():
        return Subject(label, _pipeline(options, path, label))
    trained = (folder / "checkpoint.json").is_file() or (folder / "checkpoints").is_dir() or any(folder.glob("stage[0-9]"))
    if not trained and not Official.fits(folder):
        if any(file.suffix.lower() in KINDS for file in folder.rglob("*")):
            return Subject(label, PicturesSource(folder, label))
        raise UserError(
            f"compare= names {path}, which holds neither a checkpoint, nor a pipeline (model_index.json), nor an evaluation "
            f"({NAME}), nor pictures; name a folder that does."
        )
    return Subject(label, _checkpoint(options, path, "compare", label))


def _checkpoint(options: EvaluateOptions, path: str, key: str, label: str | None) -> CheckpointSource:
    checkpoint = find_checkpoint(path, key).folder
    return CheckpointSource(checkpoint, Path(path).expanduser(), options.sampling(str(checkpoint)), label)


def _pipeline(options: EvaluateOptions, path: str, label: str | None) -> Source:
    from paradiffusion.evaluation.drawing.pipeline_pictures import PipelineSource

    folder = Path(path).expanduser()
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise UserError(
            f"pipeline={path} holds no model_index.json; expected a diffusers pipeline's folder, or ckpt= for a checkpoint of ours."
        )
    return PipelineSource(path, options.sampling(path), label)


def base_folder(source: Source) -> Path:
    """The folder that holds a source's evaluations, one a suite: beside a training stage's checkpoints, those of a step that
    was named in a folder of that step; else runs/evaluation/<name>."""
    home = source.home()
    if home is None:
        return ELSEWHERE / source.name
    pinned = isinstance(source, CheckpointSource) and source.pinned and source.step
    return home / "evaluation" / pinned if pinned else home / "evaluation"


def suite_folder(suite: Suite, count: int | None) -> str:
    """The name of a suite's folder; a part of a suite has a folder of its own."""
    return suite.name if count is None else f"{suite.name}_count{count}"


def joint_folder(bases: Sequence[Path], names: Sequence[str]) -> Path:
    """Where a comparison lies: ``runs/NAME/evaluation`` for stages of one run, else runs/evaluation/<names>."""
    stages = [base.parent if base.name == "evaluation" else base.parent.parent for base in bases]
    runs = {Path(os.path.normpath(stage)).parent for stage in stages}
    of_one_run = len(runs) == 1 and all(stage.name.startswith("stage") for stage in stages)
    return runs.pop() / "evaluation" if of_one_run else ELSEWHERE / "_vs_".join(names)[:120]


def bind_folder(place: Place, source: Source, own: bool) -> None:
    """Note in the folder what its pictures depend on, or see that it is what is asked for now. By the first process.

    Where the folder is the source's default one (``own``), a stage that trained on gets a new one: what an earlier step gave is
    moved to evaluation/step_.../<suite>, where that step's own evaluation would lie. UserError, which names what differs, where the
    folder belongs to another suite, other weights or other settings."""
    suite = place.suite
    record: dict[str, Any] = {
        "suite": suite.name, "prompts": len(suite.prompts), "fingerprint": suite.fingerprint, "kind": source.kind,
        **source.identity(),
    }  # fmt: skip
    record = json.loads(json.dumps(record))
    path = place.folder / SUITE
    before: dict[str, Any] | None = None
    if path.is_file():
        before = read_record(path, dict, "move the folder away, or choose another output_dir=")
    with disk_errors(place.folder):
        follows = own and isinstance(source, CheckpointSource) and source.step is not None and not source.pinned
        # of other weights of the same stage
        earlier = before is not None and isinstance(before.get("step"), int) and before.get("weights") != record.get("weights")
        if before is not None and follows and earlier:
            _set_aside(place.folder, before, record)
            before = None
        if before is not None and before != record:
            changes = [
                f"other prompts of suite={suite.name}" if key == "fingerprint" else f"{key}={before.get(key)} (now {record.get(key)})"
                for key in dict.fromkeys([*record, *before])
                if before.get(key) != record.get(key)
            ]
            raise UserError(
                f"{place.folder} was made with {'; '.join(changes)}; choose another output_dir=, or the same values to continue."
            )
        place.folder.mkdir(parents=True, exist_ok=True)
        if before is None:
            write_atomic(path, json.dumps(record, ensure_ascii=False))


def _set_aside(folder: Path, before: dict[str, Any], record: dict[str, Any]) -> None:
    name = f"step_{before['step']:06d}"
    if before["step"] == record.get("step"):  # trained anew
        name += f"_{str(before.get('weights'))[:8]}"
    target = folder.parent / name / folder.name
    if target.exists():
        raise UserError(f"{folder} is of the step {before['step']}, and {target} is there already; move one of them away.")
    target.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(target)
    print(f"The evaluation of step {before['step']} is now in {target}.", flush=True)


def made_before(subject: Subject, suites: Sequence[Suite]) -> Evaluation:
    """The evaluation that a compared folder holds. UserError where it is damaged, or of another suite than those asked for."""
    assert subject.made is not None
    found = read_evaluation(subject.made)
    fitting = {suite.name: suite for suite in suites}
    if suites and found.suite.name not in fitting:
        raise UserError(
            f"{subject.made} is an evaluation on {found.suite.name}, and suite= asks for {', '.join(fitting)}; name one of those."
        )
    if suites and found.suite.fingerprint != fitting[found.suite.name].fingerprint:
        raise UserError(
            f"{subject.made} has {len(found.suite.prompts)} prompts of {found.suite.name} and not the same as asked for now "
            f"({len(fitting[found.suite.name].prompts)}); evaluate it again, or leave suite= and count= out."
        )
    return replace(found, label=subject.label or found.label)
