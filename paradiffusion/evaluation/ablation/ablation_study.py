"""Ablation studies as YAML files: named sets of overrides, trained with several seeds and evaluated."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn

import yaml

from paradiffusion.errors import UserError
from paradiffusion.evaluation.suites.suite_files import read_yaml

STAGES: Final = (1, 2, 3)
# What each training of a study gets from the study itself.
OWN_KEYS: Final = ("stage", "seed", "run_dir", "resume", "preflight")
# And each evaluation.
_OWN_EVALUATE_KEYS: Final = ("ckpt", "pipeline", "images", "compare", "output_dir")
_STUDY_KEYS: Final = (
    "name", "title", "base", "per_stage", "settings", "baseline", "seeds", "stages", "evaluate", "measures",
)  # fmt: skip
_SETTING_KEYS: Final = ("overrides", "per_stage", "stages", "evaluate", "group", "note")


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

    name: str
    overrides: tuple[str, ...] = ()
    per_stage: dict[int, tuple[str, ...]] = field(default_factory=dict)
    stages: tuple[int, ...] = ()
    evaluate: tuple[str, ...] = ()
    group: str = ""
    note: str = ""


@dataclass(frozen=True)
class Study:
    """A whole ablation.

    Attributes:
        base, per_stage: overrides of every setting, before its own.
        baseline: the setting that the others are compared with.
        evaluate: arguments of scripts/evaluate.py, the same for all.
        measures: those that the table shows, each ``score/measure`` or ``suite/score/measure``; () for all.
    """

    name: str
    settings: tuple[Setting, ...]
    baseline: str
    title: str = ""
    base: tuple[str, ...] = ()
    per_stage: dict[int, tuple[str, ...]] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1)
    stages: tuple[int, ...] = STAGES
    evaluate: tuple[str, ...] = ()
    measures: tuple[str, ...] = ()

    def only(self, names: list[str]) -> Study:
        """The study with the baseline and these settings alone, in the file's order. Raises UserError for an unknown one."""
        known = [setting.name for setting in self.settings]
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"only: {unknown[0]} is no setting of {self.name}; choose from {', '.join(known)}.")
        kept = tuple(s for s in self.settings if s.name in names or s.name == self.baseline)
        return Study(
            self.name, kept, self.baseline, self.title, self.base, self.per_stage, self.seeds, self.stages, self.evaluate,
            self.measures,
        )  # fmt: skip


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
        raise UserError(
            f"study={path} is not understood{line}: {reason}; correct the file, and put quotes around entries with braces, "
            "brackets or commas."
        ) from None
    read = _Reader(path)
    values = read.mapping("the study", values, _STUDY_KEYS)
    settings = tuple(
        _setting(read, name, entry) for name, entry in read.mapping("settings", values.get("settings")).items()
    )
    if not settings:
        read.refuse(
            "it has no settings; expected such as settings: {baseline: {}, rank_16: {overrides: [lora.rank=16]}}"
        )
    baseline = read.text("baseline", values.get("baseline"), settings[0].name)
    if baseline not in {setting.name for setting in settings}:
        read.refuse(f"baseline: {baseline} is none of its settings, {', '.join(s.name for s in settings)}")
    seeds = read.integers("seeds", values.get("seeds", [0, 1]))
    if not seeds or len({*seeds}) < len(seeds):
        read.refuse(f"seeds: {list(seeds)} must be at least one, and each another")
    return Study(
        name=read.name("name", read.text("name", values.get("name"), path.stem)),
        title=read.text("title", values.get("title")),
        base=read.arguments("base", values.get("base"), own=OWN_KEYS),
        per_stage=read.stages_of("per_stage", values.get("per_stage")),
        settings=settings,
        baseline=baseline,
        seeds=seeds,
        stages=read.stages("stages", values.get("stages", list(STAGES))),
        evaluate=read.arguments("evaluate", values.get("evaluate"), own=_OWN_EVALUATE_KEYS),
        measures=read.texts("measures", values.get("measures")),
    )


def key_of(argument: str) -> str:
    """The key of an override, without Hydra's marks."""
    return argument.partition("=")[0].lstrip("+~")


def _setting(read: _Reader, name: Any, entry: Any) -> Setting:
    where = f"settings: {name}"
    name = read.text(where, name)
    values = read.mapping(where, entry or {}, _SETTING_KEYS)
    return Setting(
        name=read.name(where, name),
        overrides=read.arguments(f"{where}: overrides", values.get("overrides"), own=OWN_KEYS),
        per_stage=read.stages_of(f"{where}: per_stage", values.get("per_stage")),
        stages=read.stages(f"{where}: stages", values["stages"]) if "stages" in values else (),
        evaluate=read.arguments(f"{where}: evaluate", values.get("evaluate"), own=_OWN_EVALUATE_KEYS),
        group=read.text(f"{where}: group", values.get("group")),
        note=read.text(f"{where}: note", values.get("note")),
    )


class _Reader:
    """Parts of one file, and refusals that name it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def refuse(self, what: str) -> NoReturn:
        raise UserError(f"study={self.path}: {what}; correct the file.")

    def mapping(self, where: str, values: Any, known: tuple[str, ...] = ()) -> dict[Any, Any]:
        if not isinstance(values, dict):
            self.refuse(f"{where} is no mapping of keys to values")
        if known and (unknown := [key for key in values if key not in known]):
            self.refuse(f"{where} has the unknown key {unknown[0]}; the keys are {', '.join(known)}")
        found: dict[Any, Any] = values
        return found

    def name(self, where: str, text: str) -> str:
        if not re.fullmatch(r"\w[\w.-]{0,60}", text, re.ASCII):
            self.refuse(
                f"{where}: {text!r} becomes part of folder names, so it takes letters, digits, '_', '-' and '.' alone"
            )
        return text

    def text(self, where: str, value: Any, otherwise: str = "") -> str:
        """A text; ``otherwise`` for an entry without one. To YAML a bare ``no`` or ``on`` is none."""
        if value is not None and (isinstance(value, bool) or not isinstance(value, str | int | float)):
            self.refuse(f"{where}: {value} is no text; put quotes around it")
        return otherwise if value is None else str(value)

    def texts(self, where: str, values: Any) -> tuple[str, ...]:
        if values is None:
            return ()
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            self.refuse(f"{where} is no list of texts; put quotes around an entry with braces, brackets or commas")
        return tuple(values)

    def arguments(self, where: str, values: Any, own: tuple[str, ...]) -> tuple[str, ...]:
        found = self.texts(where, values)
        for argument in found:
            if not argument.partition("=")[1]:
                self.refuse(f"{where}: {argument!r} is no key=value")
            if key_of(argument) in own:
                self.refuse(f"{where}: {key_of(argument)} is set by the study itself, so it cannot be overridden")
        return found

    def integers(self, where: str, values: Any) -> tuple[int, ...]:
        if not isinstance(values, list) or not all(
            isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 10**9 for v in values
        ):
            self.refuse(f"{where} is no list of whole numbers of at least 0 and at most nine digits")
        return tuple(values)

    def stages(self, where: str, values: Any) -> tuple[int, ...]:
        found = self.integers(where, values)
        if not found or any(stage not in STAGES for stage in found) or list(found) != sorted({*found}):
            self.refuse(f"{where}: {list(found)} must be stages in rising order, such as [1, 2, 3] or [1, 3]")
        return found

    def stages_of(self, where: str, values: Any) -> dict[int, tuple[str, ...]]:
        found = {}
        for stage, entry in self.mapping(where, values or {}).items():
            if stage not in STAGES:
                self.refuse(f"{where}: {stage} is no stage; expected 1, 2 or 3")
            found[int(stage)] = self.arguments(f"{where}: {stage}", entry, own=OWN_KEYS)
        return found
