"""Ablation studies: named sets of train.py's overrides in a YAML file, the commands that they come to, and these as a script.

A training's folder is named after a hash of its effective configuration and of what it starts from. So two settings that
differ from stage 2 on share stage 1, and after a change of the study's file what did not change is found again.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import AfterValidator, ConfigDict, Field, Strict, TypeAdapter, ValidationError

from paradiffusion.config import TrainConfig, identity, keys_of, values_of
from paradiffusion.errors import UserError
from paradiffusion.evaluation.suites.suite_files import read_yaml
from paradiffusion.repository import ROOT, as_typed

Compose = Callable[[list[str]], TrainConfig]
# What each training of a study gets from the study itself, and each evaluation.
OWN_KEYS: Final = ("stage", "seed", "run_dir", "resume", "preflight")
_OWN_EVALUATE_KEYS: Final = ("ckpt", "pipeline", "images", "compare", "output_dir")
_FIX: Final = "correct the file, and put quotes around entries with braces, brackets or commas"


def key_of(argument: str) -> str:
    """The key of an override, without Hydra's marks."""
    return argument.partition("=")[0].lstrip("+~")


def is_own(override: str) -> bool:
    """Whether a training gets the key of an override from the study itself."""
    return key_of(override) in OWN_KEYS


def _rule(holds: Callable[[Any], bool], sentence: str) -> AfterValidator:
    """A check by pydantic; ``sentence`` says what a value does not hold to, with the value in place of {}, its key of {key}."""

    def check(value: Any) -> Any:
        if not holds(value):
            raise ValueError(sentence.format(value if isinstance(value, str) else list(value), key=key_of(str(value))))
        return value

    return AfterValidator(check)


def _not_own(keys: tuple[str, ...]) -> AfterValidator:
    return _rule(lambda text: key_of(text) not in keys, "{key} is set by the study itself, so it cannot be overridden")


# What a file may say.
_Name = Annotated[
    str,
    _rule(
        lambda text: re.fullmatch(r"\w[\w.-]{0,60}", text, re.ASCII) is not None,
        "it becomes part of folder names, so it takes letters, digits, '_', '-' and '.' alone",
    ),
]
_Argument = Annotated[str, _rule(lambda text: "=" in text, "'{}' is no key=value")]
_Overrides = tuple[Annotated[_Argument, _not_own(OWN_KEYS)], ...]
_Evaluate = tuple[Annotated[_Argument, _not_own(_OWN_EVALUATE_KEYS)], ...]
_Stage = Literal[1, 2, 3]
_Stages = Annotated[
    tuple[_Stage, ...],
    _rule(lambda s: bool(s) and list(s) == sorted({*s}), "{} must be stages in rising order, such as [1, 2, 3] or [1, 3]"),
]
_Seeds = Annotated[
    tuple[Annotated[int, Strict(), Field(ge=0, lt=10**9)], ...],
    _rule(lambda s: bool(s) and len({*s}) == len(s), "{} must be at least one, and each another"),
]
_KEYS: Final = ConfigDict(extra="forbid", coerce_numbers_to_str=True)


@dataclass(frozen=True)
class Setting:
    """One row of the table: ``overrides`` of train.py in all its ``stages`` (() for the study's), then ``per_stage`` in one;
    further arguments of scripts/evaluate.py; and for the table the ``group`` that it stands in, and a sentence."""

    __pydantic_config__: ClassVar[ConfigDict] = _KEYS

    name: _Name
    overrides: _Overrides = ()
    per_stage: dict[_Stage, _Overrides] = field(default_factory=dict)
    stages: _Stages = ()
    evaluate: _Evaluate = ()
    group: str = ""
    note: str = ""


@dataclass(frozen=True)
class Study:
    """A whole ablation, with the keys that configs/ablations/nano.yaml explains."""

    __pydantic_config__: ClassVar[ConfigDict] = _KEYS

    name: _Name
    settings: tuple[Setting, ...]
    baseline: str = ""
    title: str = ""
    base: _Overrides = ()
    per_stage: dict[_Stage, _Overrides] = field(default_factory=dict)
    seeds: _Seeds = (0, 1)
    stages: _Stages = (1, 2, 3)
    evaluate: _Evaluate = ()
    measures: tuple[str, ...] = ()

    def only(self, names: list[str]) -> Study:
        """The study with the baseline and these settings alone, in the file's order. Raises UserError for an unknown one."""
        known = [setting.name for setting in self.settings]
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"only: {unknown[0]} is no setting of {self.name}; choose from {', '.join(known)}.")
        kept = tuple(s for s in self.settings if s.name in names or s.name == self.baseline)
        return replace(self, settings=kept)


def read_study(path: Path) -> Study:
    """The study in a YAML file. UserError when there is none, or a key or value of it is not understood; the sentence names it."""
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"study={path} cannot be read ({getattr(error, 'strerror', 'no text')}); name a YAML file.") from None
    except ValueError as error:
        raise UserError(f"study={path} is not understood: {error}; {_FIX}.") from None
    if not isinstance(values, dict):
        raise UserError(f"study={path} is no mapping of keys to values; {_FIX}.")
    named = values.get("settings")
    if not isinstance(named, dict) or not named:
        raise UserError(f"study={path} has no settings; expected such as settings: {{baseline: {{}}, rank_16: {{note: LoRA}}}}.")
    values["settings"] = [_row(name, entry) for name, entry in named.items()]
    try:
        study = TypeAdapter(Study).validate_python({"name": path.stem, **_given(values)})
    except ValidationError as error:
        raise UserError(f"study={path}: {_sentence(error, list(named))}; {_FIX}.") from None
    known = [setting.name for setting in study.settings]
    if study.baseline and study.baseline not in known:
        raise UserError(f"study={path}: baseline: {study.baseline} is none of its settings, {', '.join(known)}; {_FIX}.")
    return replace(study, baseline=study.baseline or known[0])


def _given(values: dict[Any, Any]) -> dict[Any, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _row(name: Any, entry: Any) -> Any:
    """A setting with its name, which is the file's key of it and none of its own; one without anything is as the base."""
    if not isinstance(entry, dict | None):
        return entry
    return {("name: " if key == "name" else key): value for key, value in _given(entry or {}).items()} | {"name": name}


def _sentence(error: ValidationError, names: list[Any]) -> str:
    first = error.errors()[0]
    where = [str(part) for part in first["loc"]]
    if where[0] == "settings":
        where[1] = str(names[int(where[1])])
    if first["type"] == "unexpected_keyword_argument":
        keys = [one.name for one in fields(Setting if where[0] == "settings" else Study)]
        *inside, key = where
        return f"{': '.join([*inside, ''])}unknown key {key}; the keys are {', '.join(keys)}"
    said = first["msg"].removeprefix("Value error, ").replace("tuple", "list").rstrip(".")
    return f"{': '.join(where)}: {said} (found {first['input']!r})"


@dataclass(frozen=True)
class Unit:
    """One command.

    Attributes:
        key: what names it in the journal, "<kind>-<hash>"; ``needs`` is that of the training that it starts from, or None.
        folder: that it writes; ``arguments``: the program and its arguments, relative to the repository's root.
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

    @property
    def heading(self) -> str:
        return self.title + (f" (shared with {', '.join(dict.fromkeys(self.also))})" if self.also else "")


@dataclass(frozen=True)
class Cell:
    """One setting with one seed: its trainings, in order, its evaluation (None where nothing is evaluated), and what the study says of
    both."""

    setting: str
    seed: int
    trainings: tuple[str, ...]
    evaluation: str | None
    said: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """All units in an order in which each finds what it needs, and what belongs to which row."""

    units: dict[str, Unit]
    cells: tuple[Cell, ...]

    def without(self, places: Collection[tuple[str, int]]) -> Plan:
        """What is left where the cells of these settings and seeds are known."""
        left = tuple(cell for cell in self.cells if (cell.setting, cell.seed) not in places)
        needed = {key for cell in left for key in (*cell.trainings, cell.evaluation)}
        return Plan({key: unit for key, unit in self.units.items() if key in needed}, left)


@dataclass(frozen=True)
class Extra:
    """Overrides from the command line: of every training, and of one stage."""

    overrides: tuple[str, ...] = ()
    per_stage: tuple[tuple[int, str], ...] = ()


def make_plan(study: Study, output: Path, extra: Extra, compose: Compose) -> Plan:
    """What the study takes, seed by seed, so that the first seed's rows can be compared while the second is trained.

    ``compose`` makes train.py's configuration of its arguments. UserError for an override that it refuses, with setting and stage."""
    units: dict[str, Unit] = {}
    composed = cache(lambda given: compose(list(given)))  # most settings have most stages in common, and it is slow
    stages = {setting.name: _stages(study, setting, extra, composed) for setting in study.settings}

    def shared(name: str, new: Unit) -> str:
        known = units.get(new.key)
        units[new.key] = replace(known, also=(*known.also, name)) if known else new
        return new.key

    cells, keys = [], keys_of(TrainConfig)
    for seed in study.seeds:
        for setting in study.settings:
            name, parent, chain = setting.name, None, []
            for overrides, config in stages[name]:
                chain.append(shared(name, _training(name, seed, overrides, replace(config, seed=seed), parent, output)))
                parent = units[chain[-1]]
            assert parent is not None
            given = _last_of_each([*study.evaluate, *setting.evaluate])
            evaluation = shared(name, _evaluation(name, seed, given, parent, output)) if given else None
            said = [one for overrides, _ in stages[name] for one in overrides if keys.get(key_of(one), {}).get("free") != "always"]
            cells.append(Cell(name, seed, tuple(chain), evaluation, (*said, *given)))
    return Plan(units, tuple(cells))


def _stages(
    study: Study, setting: Setting, extra: Extra, compose: Callable[[tuple[str, ...]], TrainConfig]
) -> list[tuple[list[str], TrainConfig]]:
    """Overrides and configuration of each stage of a setting, without seed and start."""
    found: list[tuple[list[str], TrainConfig]] = []
    adapted = False
    for stage in setting.stages or study.stages:
        where = f"setting {setting.name}, stage {stage}"
        overrides = [*study.base, *extra.overrides, *study.per_stage.get(stage, ())]
        overrides += [argument for number, argument in extra.per_stage if number == stage]
        overrides += [*setting.overrides, *setting.per_stage.get(stage, ()), f"stage={stage}"]
        try:
            config = compose(tuple(_last_of_each(overrides)))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if config.train_text != "lora":  # so that settings with other adapters share the stages before them
            overrides = [o for o in overrides if not key_of(o).startswith("lora.")]
        _check_start(config, found[-1][1] if found else None, adapted, where, setting)
        adapted = adapted or config.train_text == "lora"
        found.append((_last_of_each(overrides), config))
    return found


def _training(name: str, seed: int, overrides: list[str], config: TrainConfig, parent: Unit | None, output: Path) -> Unit:
    needs = parent.key if parent else None
    digest = _identity(config, needs)
    folder = _folder(output / "trained", f"{name}-seed{seed}-stage{config.stage}", digest)
    start = [f"init_from={parent.checkpoints.as_posix()}"] if parent else []
    arguments = _last_of_each([*overrides, f"seed={seed}", *start, f"run_dir={folder.as_posix()}"])
    title = f"{name}, seed {seed}, stage {config.stage}"
    program = ("train.py", *arguments)
    return Unit(f"train-{digest}", "train", title, folder, program, needs, config.stage, config.max_steps)


def _evaluation(name: str, seed: int, given: list[str], last: Unit, output: Path) -> Unit:
    digest = _hash([last.key, sorted(given)])
    folder = _folder(output / "evaluated", f"{name}-seed{seed}", digest)
    label = [] if any(key_of(argument) == "label" for argument in given) else [f"label={name} seed {seed}"]
    ends = (f"ckpt={last.checkpoints.as_posix()}", *given, *label, f"output_dir={folder.as_posix()}")
    title, program = f"{name}, seed {seed}, evaluation", ("scripts/evaluate.py", *ends)
    return Unit(f"evaluate-{digest}", "evaluate", title, folder, program, last.key, last.stage)


def _last_of_each(overrides: list[str]) -> list[str]:
    """Of overrides with one key the last: Hydra refuses a group that is chosen twice."""
    found: dict[str, str] = {}
    for argument in overrides:
        found.pop(key_of(argument), None)
        found[key_of(argument)] = argument
    return list(found.values())


def _check_start(config: TrainConfig, before: TrainConfig | None, adapted: bool, where: str, setting: Setting) -> None:
    """Refuse what training would refuse only once the stage before is done, hours later."""
    if before is None:
        if config.stage != 1 and config.init_from is None:
            raise UserError(f"{where} is the first and starts from nothing; add stage 1 to its stages, or an init_from=.")
        return
    fix = f"{setting.name}: {{per_stage: {{{config.stage}: [train_text="
    if config.train_text == "adapter" and not adapted and before.train_text != "adapter":
        raise UserError(f"{where} has train_text=adapter, and no stage before it trains a LoRA adapter; write {fix}frozen]}}}}.")
    if config.train_text == "frozen" and (adapted or before.train_text == "adapter"):
        raise UserError(f"{where} would drop the LoRA adapter of the stage before; write {fix}adapter]}}}}.")
    old, new = (identity(one, "weights") | identity(one, "noise") for one in (before, config))
    for key, value in new.items():
        if old[key] != value:
            raise UserError(
                f"{where} says {key}={value}, and the stage that it starts from {old[key]}; set it for all stages of the setting alike."
            )


def _identity(config: TrainConfig, parent: str | None) -> str:
    """A hash of what decides the weights that come out."""
    keys = keys_of(TrainConfig)
    values = {key: value for key, value in values_of(config).items() if keys[key]["free"] != "always"}
    if config.train_text != "lora":
        values = {key: value for key, value in values.items() if not key.startswith("lora.")}
    return _hash(values | ({} if parent is None else {"init_from": parent}))


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _folder(parent: Path, name: str, digest: str) -> Path:
    """Where a unit writes: the folder that has its hash already, whatever setting it was first made for, or a new one."""
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
        options = ["--config_file", self.config_file, *self.arguments]
        return [sys.executable, "-m", "accelerate.commands.launch", *options, *program]

    def typed(self, unit: Unit) -> list[str]:
        """The unit as a person types it in the repository's root, within the environment."""
        if self.config_file is None:
            return ["python", *unit.arguments]
        return ["accelerate", "launch", "--config_file", self.config_file, *self.arguments, *unit.arguments]


def as_script(form: str, plan: Plan, launcher: Launcher, finished: Collection[str], again: Sequence[str]) -> str:
    """The commands in one of the forms of ``print=``, with ``again``, this program's own arguments, for the table at the end.

    shell: every unit that is not finished, in order. json: a JSON object a line for each unit. slurm: submits every unit that
    can start now; not the later ones with dependencies between jobs: a training that its time limit stopped goes on when it
    is submitted again, and what depends on it would never start.

    Raises:
        UserError: for slurm with a launcher's file, which scripts/slurm.sh replaces.
    """
    rest = [unit for unit in plan.units.values() if unit.key not in finished]
    table = shlex.join(["python", "scripts/ablate.py", *again])
    if form == "json":
        rows = [
            {"key": unit.key, "kind": unit.kind, "title": unit.title, "shared_with": list(unit.also), "needs": unit.needs,
             "folder": unit.folder.as_posix(), "command": launcher.typed(unit), "finished": unit.key in finished}
            for unit in plan.units.values()
        ]  # fmt: skip
        return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    if form == "shell":
        lines = [f"\n# {unit.heading}\n{shlex.join(launcher.typed(unit))}" for unit in rest]
        return as_typed("\n".join(["#!/usr/bin/env bash", "set -euo pipefail", *lines, f"\n# the table\n{table}"]))
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
    for unit in rest:
        if unit.needs is not None and unit.needs not in finished:
            continue
        wrapped = shlex.quote(shlex.join([".venv/bin/python", *unit.arguments]))
        submitted = f"scripts/slurm.sh {shlex.join(unit.arguments[1:])}"
        what = submitted if unit.kind == "train" else f"--nodes=1 --ntasks=1 --gpus=1 --wrap={wrapped}"
        lines.append(f"\n# {unit.heading}\nsbatch --job-name={shlex.quote(unit.folder.name)} {what}")
    return "\n".join([*lines, f"\n# when all of them are done, the table:\n# {table}"])
