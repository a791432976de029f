"""scripts/ablate.py: its keys, and a study from its file to its table."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Final

from paradiffusion.checks import choice
from paradiffusion.errors import UserError
from paradiffusion.evaluation.ablation.ablation_plan import (
    Compose,
    Extra,
    Launcher,
    Plan,
    Unit,
    as_json_lines,
    as_shell,
    as_slurm,
    heading,
    make_plan,
)
from paradiffusion.evaluation.ablation.ablation_study import OWN_KEYS, Study, key_of, read_study
from paradiffusion.evaluation.ablation.comparison import as_markdown, compare, write_comparison
from paradiffusion.evaluation.ablation.running import Outcome, finished_units, run_plan
from paradiffusion.evaluation.evaluate_options import split_list
from paradiffusion.evaluation.journal import read_journals
from paradiffusion.repository import find_shipped

FORMS: Final = ("no", "shell", "json", "slurm")
_STAGE: Final = re.compile(r"stage([123])\.(.+)", re.DOTALL)


@dataclass
class AblateOptions:
    """What scripts/ablate.py takes besides the overrides of train.py.

    Attributes:
        study: a YAML file, see study.py.
        output: the study's folder; None for runs/ablations/<its name>.
        only: names of settings to take; the baseline is always among them.
        seeds: in place of the study's.
        launch: a file for ``accelerate launch --config_file``; None for plain processes.
        launch_arguments: further arguments of the launcher, such as [--num_processes,4].
        keep_going: go on after a unit has failed, with all that does not need it.
        print: print the commands instead of running them, in one of FORMS ("true" for "shell").
        table: make the table of what is finished, and run nothing.
    """

    study: str | None = None
    output: str | None = None
    only: str | None = None
    seeds: str | None = None
    launch: str | None = None
    launch_arguments: str | None = None
    keep_going: bool = True
    print: str = "no"
    table: bool = False

    def check(self) -> None:
        """Raise UserError for missing or contradictory values."""
        if self.study is None:
            raise UserError("study= is missing; name a YAML file, such as study=configs/ablations/nano.yaml.")
        self.print = {"true": "shell", "false": "no"}.get(self.print.lower(), self.print)
        choice("print", self.print, FORMS)
        if self.table and self.print != "no":
            raise UserError("both table=true and print= are given; keep one of them.")
        if self.launch is not None and not Path(self.launch).is_file():
            raise UserError(
                f"launch={self.launch} is no file; choose one of configs/launch, such as configs/launch/ddp.yaml."
            )
        if self.launch is None and self.launch_arguments:
            raise UserError("launch_arguments= go with launch=, which is missing; name a file of configs/launch.")
        self.seed_list()

    def seed_list(self) -> tuple[int, ...]:
        """``seeds=`` as numbers, () where it is not given. Raises UserError for anything else."""
        given = split_list(self.seeds)
        if (
            not all(re.fullmatch(r"\d{1,9}", item, re.ASCII) for item in given)
            or len({*given}) < len(given)
            or (self.seeds is not None and not given)
        ):
            raise UserError(
                f"seeds={self.seeds} is not understood; expected whole numbers, each another, such as [0,1,2]."
            )
        return tuple(int(item) for item in given)

    @staticmethod
    def keys() -> list[str]:
        """Names of the keys."""
        return [one.name for one in fields(AblateOptions)]


def split(arguments: list[str]) -> tuple[list[str], Extra]:
    """Arguments that are AblateOptions', and overrides of train.py: ``key=value`` for all stages, ``stageN.key=value`` for
    one.

    Raises:
        UserError: for an override that the study itself sets.
    """
    own, overrides, per_stage, names = [], [], [], AblateOptions.keys()
    for argument in arguments:
        key = argument.partition("=")[0]
        if key in names:
            own.append(argument)
            continue
        if matched := _STAGE.fullmatch(argument):
            per_stage.append((int(matched[1]), matched[2]))
        else:
            overrides.append(argument)
        if key_of(matched[2] if matched else argument) in OWN_KEYS:
            raise UserError(f"{key} is set by the study itself; the study's file says stages, seeds and settings.")
    return own, Extra(tuple(overrides), tuple(per_stage))


def ablate(
    options: AblateOptions,
    extra: Extra,
    compose: Compose,
    check: Callable[[list[str], bool], None],
    again: Sequence[str],
) -> int:
    """Print the commands, or run what is not finished and write the table; 1 where something failed, 128 + the signal's number
    after a stop.

    Args:
        extra: overrides of train.py from the command line.
        compose: makes train.py's configuration of its arguments.
        check: refuses arguments that scripts/evaluate.py would refuse; where the second argument is true, a suite that is
            not there, too.
        again: this command's own arguments, for scripts that are printed.
    Raises:
        UserError: for a study, an override or a folder that is wrong, before anything is run.
    """
    study = _chosen_study(options)
    output = Path(options.output or f"runs/ablations/{study.name}").expanduser()
    plan = make_plan(study, output, extra, compose)
    runs = options.print == "no" and not options.table
    evaluations = [unit for unit in plan.units.values() if unit.kind == "evaluate"]
    for unit in {_evaluation_of(unit): unit for unit in reversed(evaluations)}.values():  # of equal ones the first
        _checked(unit, check, runs)
    launcher = Launcher(options.launch, tuple(split_list(options.launch_arguments)))
    finished = finished_units(plan, output) if output.is_dir() else set()
    if options.print != "no":
        rest = [argument for argument in again if not argument.startswith(("print=", "launch=", "launch_arguments="))]
        forms = {
            "shell": lambda: as_shell(plan, launcher, sorted(finished), rest),
            "json": lambda: as_json_lines(plan, launcher, sorted(finished)),
            "slurm": lambda: as_slurm(plan, launcher, sorted(finished), rest),
        }
        print(forms[options.print]())
        return 0
    if options.table:
        if not any(cell.trainings[-1] in finished for cell in plan.cells):
            raise UserError(f"{output} has no finished run of {study.name}; leave out table=true to run it.")
        return _finish(study, plan, output, finished, None, {})
    return _run_study(study, plan, output, launcher, options.keep_going, finished)


def _chosen_study(options: AblateOptions) -> Study:
    study = read_study(find_shipped(str(options.study)))
    if options.only:
        study = study.only(split_list(options.only))
    return replace(study, seeds=options.seed_list() or study.seeds)


def _evaluation_of(unit: Unit) -> tuple[str, ...]:
    """What an evaluation asks for, whatever it is asked of."""
    return tuple(a for a in unit.arguments if not a.startswith(("ckpt=", "label=", "output_dir=")))


def _checked(unit: Unit, check: Callable[[list[str], bool], None], runs: bool) -> None:
    try:
        check(list(unit.arguments[1:]), runs)
    except UserError as error:
        raise UserError(f"{unit.title}: {error}") from None


def _run_study(study: Study, plan: Plan, output: Path, launcher: Launcher, keep_going: bool, finished: set[str]) -> int:
    titles = {key: heading(unit) for key, unit in plan.units.items()}
    count = len(plan.units)
    print(
        f"{study.name}: {len(study.settings)} settings x {len(study.seeds)} seeds are {count} units, {len(finished)} of them "
        f"finished; output in {output}, each unit's own in {output / 'logs'}",
        flush=True,
    )
    _say_left_over(plan, output)

    def after(unit: Unit) -> None:
        """The table so far, so that a run of days can be looked at."""
        if unit.kind == "evaluate":
            write_comparison(output, compare(study, plan, finished_units(plan, output)), None, titles)

    outcome = run_plan(plan, output, launcher, keep_going, after)
    done = finished_units(plan, output)
    if outcome.stopped:
        print(f"stopped with {len(done)} of {count} units finished; run the same command again to go on.", flush=True)
        return outcome.stopped
    return _finish(study, plan, output, done, outcome, titles)


def _finish(
    study: Study, plan: Plan, output: Path, done: set[str], outcome: Outcome | None, titles: dict[str, str]
) -> int:
    """Write and print the table; 1 where something was run and is not finished."""
    comparison = compare(study, plan, done)
    path = write_comparison(output, comparison, outcome, titles)
    failed = outcome.failed.items() if outcome else ()
    print(as_markdown(comparison, [(titles[key], reason) for key, reason in failed]))
    print(f"the report is {path}")
    missing = len(plan.units) - len(done)
    if outcome is None or not missing:
        return 0
    print(
        f"{missing} of {len(plan.units)} units are not finished; run the same command again to try them.",
        file=sys.stderr,
    )
    return 1


def _say_left_over(plan: Plan, output: Path) -> None:
    """Name what was finished for an earlier version of the study: it stays, and is never mixed into the table."""
    left = [
        str(record.get("title", key))
        for key, record in dict(read_journals(output)).items()
        if key not in plan.units and record.get("outcome") == "done"
    ]
    if left:
        shown = "; ".join(left[:5]) + (f"; and {len(left) - 5} more" if len(left) > 5 else "")
        print(f"note: {len(left)} finished units belong to no setting as the study now is, and stay aside: {shown}")
