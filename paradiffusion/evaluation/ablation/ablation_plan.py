"""From a study to the commands that it takes, in order: what settings have in common is trained once.

A training's folder is named after a hash of its effective configuration and of what it starts from. So two settings that
differ from stage 2 on share stage 1, and after a change of the study's file what did not change is found again.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paradiffusion.config import TrainConfig, identity, keys_of, values_of
from paradiffusion.errors import UserError
from paradiffusion.evaluation.ablation.ablation_study import Setting, Study, key_of
from paradiffusion.repository import ROOT, as_typed

Compose = Callable[[list[str]], TrainConfig]


@dataclass(frozen=True)
class Unit:
    """One command.

    Attributes:
        key: what names it in the journal: "<kind>-<hash>".
        title: for people, such as "baseline, seed 0, stage 2".
        folder: that it writes: a run of one stage, or an evaluation.
        arguments: the program and its arguments, relative to the repository's root.
        needs: the key of the training that it starts from, or None.
        stage, steps: of a training; the stage whose checkpoint is evaluated, and 0.
        also: further settings that share it.
    """

    key: str
    kind: str
    title: str
    folder: Path
    arguments: tuple[str, ...]
    needs: str | None
    stage: int
    steps: int = 0
    also: tuple[str, ...] = ()

    @property
    def checkpoints(self) -> Path:
        """The stage folder of a training: what the next stage's ``init_from=`` and ``ckpt=`` name."""
        return self.folder / f"stage{self.stage}"


@dataclass(frozen=True)
class Cell:
    """One setting with one seed: its trainings, in order, and its evaluation (None where nothing is evaluated)."""

    setting: str
    seed: int
    trainings: tuple[str, ...]
    evaluation: str | None


@dataclass(frozen=True)
class Plan:
    """All units in an order in which each finds what it needs, and what belongs to which row."""

    units: dict[str, Unit]
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Extra:
    """Overrides from the command line: of every training, and of one stage."""

    overrides: tuple[str, ...] = ()
    per_stage: tuple[tuple[int, str], ...] = ()

    def of(self, stage: int) -> list[str]:
        return [argument for number, argument in self.per_stage if number == stage]


def make_plan(study: Study, output: Path, extra: Extra, compose: Compose) -> Plan:
    """What the study takes, seed by seed, so that the first seed's rows can be compared while the second is trained.

    Args:
        output: the study's folder.
        compose: makes train.py's configuration of its arguments, and raises UserError for a wrong one.
    Raises:
        UserError: for an override that train.py would refuse, naming setting and stage.
    """
    units: dict[str, Unit] = {}
    cells = []
    # Most settings have most stages in common, and composing is the slow part.
    known: dict[tuple[str, ...], TrainConfig] = {}
    stages = {setting.name: _stages(study, setting, extra, compose, known) for setting in study.settings}
    for seed in study.seeds:
        for setting in study.settings:
            chain = _trainings(setting.name, seed, stages[setting.name], output, units)
            evaluation = _evaluation(study, setting, seed, output, units[chain[-1]], units)
            cells.append(Cell(setting.name, seed, tuple(chain), evaluation))
    return Plan(units, tuple(cells))


def _stages(
    study: Study, setting: Setting, extra: Extra, compose: Compose, known: dict[tuple[str, ...], TrainConfig]
) -> list[tuple[list[str], TrainConfig]]:
    """Overrides and configuration of each stage of a setting, without seed and start."""
    found: list[tuple[list[str], TrainConfig]] = []
    adapted = False
    for stage in setting.stages or study.stages:
        where = f"setting {setting.name}, stage {stage}"
        overrides = [*study.base, *extra.overrides, *study.per_stage.get(stage, ()), *extra.of(stage)]
        overrides += [*setting.overrides, *setting.per_stage.get(stage, ()), f"stage={stage}"]
        try:
            given = tuple(_last_of_each(overrides))
            config = known[given] if given in known else known.setdefault(given, compose(list(given)))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if config.train_text != "lora":  # so that settings with other adapters share the stages before them
            overrides = [o for o in overrides if not key_of(o).startswith("lora.")]
        _check_start(config, found[-1][1] if found else None, adapted, where, setting)
        adapted = adapted or config.train_text == "lora"
        found.append((_last_of_each(overrides), config))
    return found


def _trainings(
    name: str, seed: int, stages: list[tuple[list[str], TrainConfig]], output: Path, units: dict[str, Unit]
) -> list[str]:
    """Keys of the trainings of one setting with one seed, in order, each put into ``units`` where it is not there yet."""
    chain: list[str] = []
    for overrides, composed in stages:
        config = replace(composed, seed=seed)
        parent = units[chain[-1]] if chain else None
        key = f"train-{_identity(config, parent.key if parent else None)}"
        chain.append(key)
        if key in units:
            units[key] = replace(units[key], also=(*units[key].also, name))
            continue
        folder = _folder(output / "trained", f"{name}-seed{seed}-stage{config.stage}", key)
        start = [] if parent is None else [f"init_from={parent.checkpoints.as_posix()}"]
        arguments = _last_of_each([*overrides, f"seed={seed}", *start, f"run_dir={folder.as_posix()}"])
        title = f"{name}, seed {seed}, stage {config.stage}"
        needs = parent.key if parent else None
        units[key] = Unit(key, "train", title, folder, ("train.py", *arguments), needs, config.stage, config.max_steps)
    return chain


def _evaluation(
    study: Study, setting: Setting, seed: int, output: Path, last: Unit, units: dict[str, Unit]
) -> str | None:
    given = _last_of_each([*study.evaluate, *setting.evaluate])
    if not given:
        return None
    key = f"evaluate-{_hash([last.key, sorted(given)])}"
    if key in units:
        units[key] = replace(units[key], also=(*units[key].also, setting.name))
        return key
    folder = _folder(output / "evaluated", f"{setting.name}-seed{seed}", key)
    label = [] if any(key_of(argument) == "label" for argument in given) else [f"label={setting.name} seed {seed}"]
    ends = (f"ckpt={last.checkpoints.as_posix()}", *given, *label, f"output_dir={folder.as_posix()}")
    title = f"{setting.name}, seed {seed}, evaluation"
    units[key] = Unit(key, "evaluate", title, folder, ("scripts/evaluate.py", *ends), last.key, last.stage)
    return key


def _last_of_each(overrides: list[str]) -> list[str]:
    """Of overrides with one key the last: Hydra refuses a group that is chosen twice."""
    found: dict[str, str] = {}
    for argument in overrides:
        found.pop(key_of(argument), None)
        found[key_of(argument)] = argument
    return list(found.values())


def _check_start(config: TrainConfig, before: TrainConfig | None, adapted: bool, where: str, setting: Setting) -> None:
    """Refuse what training would refuse only once the stage before is done."""
    if before is None:
        if config.stage != 1 and config.init_from is None:
            raise UserError(
                f"{where} is the first and starts from nothing; add stage 1 to its stages, or an init_from=."
            )
        return
    fix = f"{setting.name}: {{per_stage: {{{config.stage}: [train_text="
    if config.train_text == "adapter" and not adapted and before.train_text != "adapter":
        raise UserError(
            f"{where} has train_text=adapter, and no stage before it trains a LoRA adapter; write {fix}frozen]}}}}."
        )
    if config.train_text == "frozen" and (adapted or before.train_text == "adapter"):
        raise UserError(f"{where} would drop the LoRA adapter of the stage before; write {fix}adapter]}}}}.")
    # Training refuses it too, but only hours later.
    old, new = (identity(one, "weights") | identity(one, "noise") for one in (before, config))
    for key, value in new.items():
        if old[key] != value:
            raise UserError(
                f"{where} says {key}={value}, and the stage that it starts from {old[key]}; set it for all stages of the "
                "setting alike."
            )


def _identity(config: TrainConfig, parent: str | None) -> str:
    """A hash of what decides the weights that come out."""
    keys = keys_of(TrainConfig)
    values = {key: value for key, value in values_of(config).items() if keys[key]["free"] != "always"}
    if config.train_text != "lora":
        values = {key: value for key, value in values.items() if not key.startswith("lora.")}
    if parent is not None:
        values["init_from"] = parent
    return _hash(values)


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _folder(parent: Path, name: str, key: str) -> Path:
    """Where a unit writes: the folder that has its hash already, whatever setting it was first made for, or a new one."""
    digest = key.rpartition("-")[2]
    return next(iter(sorted(parent.glob(f"*-{digest}"))), parent / f"{name}-{digest}")


@dataclass(frozen=True)
class Launcher:
    """How a program is started: alone, or by ``accelerate launch`` with a file of settings."""

    config_file: str | None = None
    arguments: tuple[str, ...] = ()

    def here(self, unit: Unit) -> list[str]:
        """The unit as this Python starts it, from any working folder."""
        program = [str(ROOT / unit.arguments[0]), *unit.arguments[1:]]
        if self.config_file is None:
            return [sys.executable, *program]
        return [sys.executable, "-m", "accelerate.commands.launch", *self._options(), *program]

    def typed(self, unit: Unit) -> list[str]:
        """The unit as a person types it in the repository's root, within the environment."""
        if self.config_file is None:
            return ["python", *unit.arguments]
        return ["accelerate", "launch", *self._options(), *unit.arguments]

    def _options(self) -> list[str]:
        return ["--config_file", str(self.config_file), *self.arguments]


def as_shell(plan: Plan, launcher: Launcher, finished: Sequence[str], again: Sequence[str]) -> str:
    """A script for bash: every unit that is not finished, in order, and the table."""
    lines = ["#!/usr/bin/env bash", "set -euo pipefail"]
    lines += [f"\n# {heading(unit)}\n{shlex.join(launcher.typed(unit))}" for unit in _open(plan, finished)]
    return as_typed("\n".join([*lines, f"\n# the table\n{shlex.join(_table(again))}"]))


def as_json_lines(plan: Plan, launcher: Launcher, finished: Sequence[str]) -> str:
    """One JSON object a line for each unit: key, kind, title, settings that share it, needs, folder, command, finished."""
    rows = [
        {
            "key": unit.key,
            "kind": unit.kind,
            "title": unit.title,
            "shared_with": list(unit.also),
            "needs": unit.needs,
            "folder": unit.folder.as_posix(),
            "command": launcher.typed(unit),
            "finished": unit.key in finished,
        }
        for unit in plan.units.values()
    ]
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


def as_slurm(plan: Plan, launcher: Launcher, finished: Sequence[str], again: Sequence[str]) -> str:
    """A script for bash that submits every unit that can start now.

    Not the later ones with dependencies between jobs: a training that its time limit stopped goes on when it is submitted
    again, and what depends on it would never start.

    Raises:
        UserError: for a launcher's file, which scripts/slurm.sh replaces.
    """
    if launcher.config_file is not None:
        raise UserError(
            "print=slurm takes no launch=, since scripts/slurm.sh starts the processes itself; say LAUNCH=zero2 (or another) "
            "in front of bash when you run the script that is printed."
        )
    lines = [
        "#!/usr/bin/env bash",
        "# What can start now. When these jobs have ended, print and run it again: the next stages are then in it, and every",
        "# training that its time limit stopped, which goes on. Nodes, GPUs and time: SBATCH_... variables, or scripts/slurm.sh.",
        "set -euo pipefail",
    ]
    for unit in _open(plan, finished):
        if unit.needs is not None and unit.needs not in finished:
            continue
        if unit.kind == "train":
            what = f"scripts/slurm.sh {shlex.join(unit.arguments[1:])}"
        else:
            what = (
                f"--nodes=1 --ntasks=1 --gpus=1 --wrap={shlex.quote(shlex.join(['.venv/bin/python', *unit.arguments]))}"
            )
        lines.append(f"\n# {heading(unit)}\nsbatch --job-name={shlex.quote(unit.folder.name)} {what}")
    lines.append(f"\n# when all of them are done, the table:\n# {shlex.join(_table(again))}")
    return "\n".join(lines)


def heading(unit: Unit) -> str:
    """The unit's title, with the settings that share it."""
    return unit.title + (f" (shared with {', '.join(dict.fromkeys(unit.also))})" if unit.also else "")


def _open(plan: Plan, finished: Sequence[str]) -> Iterable[Unit]:
    return (unit for unit in plan.units.values() if unit.key not in finished)


def _table(again: Sequence[str]) -> list[str]:
    """This program's own command for the table; evaluations that were made elsewhere are looked at again, and kept."""
    return ["python", "scripts/ablate.py", *again]
