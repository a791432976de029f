"""Ablation studies as YAML files: named sets of overrides, trained with several seeds and evaluated."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

import yaml
from pydantic import AfterValidator, ConfigDict, Field, Strict, TypeAdapter, ValidationError

from paradiffusion.errors import UserError
from paradiffusion.evaluation.suites.suite_files import read_yaml

STAGES: Final = (1, 2, 3)
# What each training of a study gets from the study itself.
OWN_KEYS: Final = ("stage", "seed", "run_dir", "resume", "preflight")
# And each evaluation.
_OWN_EVALUATE_KEYS: Final = ("ckpt", "pipeline", "images", "compare", "output_dir")
_FIX: Final = "correct the file, and put quotes around entries with braces, brackets or commas"


def key_of(argument: str) -> str:
    """The key of an override, without Hydra's marks."""
    return argument.partition("=")[0].lstrip("+~")


def _argument(text: str, own: tuple[str, ...]) -> str:
    if "=" not in text:
        raise ValueError(f"{text!r} is no key=value")
    if key_of(text) in own:
        raise ValueError(f"{key_of(text)} is set by the study itself, so it cannot be overridden")
    return text


def _folder_name(text: str) -> str:
    if not re.fullmatch(r"\w[\w.-]{0,60}", text, re.ASCII):
        raise ValueError("it becomes part of folder names, so it takes letters, digits, '_', '-' and '.' alone")
    return text


def _distinct(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if not seeds or len({*seeds}) < len(seeds):
        raise ValueError(f"{list(seeds)} must be at least one, and each another")
    return seeds


def _rising(stages: tuple[int, ...]) -> tuple[int, ...]:
    if not stages or list(stages) != sorted({*stages}):
        raise ValueError(f"{list(stages)} must be stages in rising order, such as [1, 2, 3] or [1, 3]")
    return stages


# What a file may say; pydantic checks it.
_Name = Annotated[str, AfterValidator(_folder_name)]
_Overrides = tuple[Annotated[str, AfterValidator(lambda text: _argument(text, OWN_KEYS))], ...]
_Evaluate = tuple[Annotated[str, AfterValidator(lambda text: _argument(text, _OWN_EVALUATE_KEYS))], ...]
_Stage = Literal[1, 2, 3]
_Stages = Annotated[tuple[_Stage, ...], AfterValidator(_rising)]
_Seeds = Annotated[tuple[Annotated[int, Strict(), Field(ge=0, lt=10**9)], ...], AfterValidator(_distinct)]
_KEYS: Final = ConfigDict(extra="forbid", coerce_numbers_to_str=True)


@dataclass(frozen=True)
class Setting:
    """One row of the table.

    Attributes:
        overrides: of train.py, in all its stages; ``per_stage`` those of one stage, after them.
        stages: which it trains, each from the one before in this list; () for the study's.
        evaluate: further arguments of scripts/evaluate.py.
        group: what it varies, such as "LoRA rank": the rows of a group stand together.
        note: a sentence for the table.
    """

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
    """A whole ablation.

    Attributes:
        base, per_stage: overrides of every setting, before its own.
        baseline: the setting that the others are compared with; a file that names none means its first.
        evaluate: arguments of scripts/evaluate.py, the same for all.
        measures: those that the table shows, each ``score/measure`` or ``suite/score/measure``; () for all.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _KEYS

    name: _Name
    settings: tuple[Setting, ...]
    baseline: str = ""
    title: str = ""
    base: _Overrides = ()
    per_stage: dict[_Stage, _Overrides] = field(default_factory=dict)
    seeds: _Seeds = (0, 1)
    stages: _Stages = STAGES
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
    """The study in a YAML file.

    Raises:
        UserError: when there is none, or a key or value of it is not understood; the sentence names it.
    """
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"study={path} cannot be read ({getattr(error, 'strerror', 'no text')}); name a YAML file."
        ) from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" in line {where.line + 1}" if where is not None else ""
        reason = getattr(error, "problem", None) or "it is no YAML"
        raise UserError(f"study={path} is not understood{line}: {reason}; {_FIX}.") from None
    if not isinstance(values, dict):
        raise UserError(f"study={path} is no mapping of keys to values; {_FIX}.")
    named = values.get("settings")
    if not isinstance(named, dict) or not named:
        raise UserError(
            f"study={path} has no settings; expected such as settings: {{baseline: {{}}, rank_16: {{note: LoRA}}}}."
        )
    values["settings"] = [_row(name, entry) for name, entry in named.items()]
    try:
        study = TypeAdapter(Study).validate_python({"name": path.stem, **_given(values)})
    except ValidationError as error:
        raise UserError(f"study={path}: {_sentence(error, list(named))}; {_FIX}.") from None
    known = [setting.name for setting in study.settings]
    if study.baseline and study.baseline not in known:
        raise UserError(
            f"study={path}: baseline: {study.baseline} is none of its settings, {', '.join(known)}; {_FIX}."
        )
    return replace(study, baseline=study.baseline or known[0])


def _given(values: dict[Any, Any]) -> dict[Any, Any]:
    """The keys that have a value."""
    return {key: value for key, value in values.items() if value is not None}


def _row(name: Any, entry: Any) -> Any:
    """A setting with its name, which is the file's key of it and none of its own; one without anything is as the base."""
    if not isinstance(entry, dict | None):
        return entry
    return {("name: " if key == "name" else key): value for key, value in _given(entry or {}).items()} | {"name": name}


def _sentence(error: ValidationError, names: list[Any]) -> str:
    """What is wrong first, and where."""
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
