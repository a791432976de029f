"""scripts/ablate.py: a study from its file to its table."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from paradiffusion.errors import UserError
from paradiffusion.evaluation.ablation.collecting import compare
from paradiffusion.evaluation.ablation.commands import Launcher, as_json_lines, as_shell, as_slurm, heading
from paradiffusion.evaluation.ablation.options import AblateOptions
from paradiffusion.evaluation.ablation.plan import Compose, Extra, Plan, Unit, make_plan
from paradiffusion.evaluation.ablation.presenting import as_markdown, write_comparison
from paradiffusion.evaluation.ablation.running import Outcome, finished_units, run_plan
from paradiffusion.evaluation.ablation.study import Study, read_study
from paradiffusion.evaluation.journal import read_journals
from paradiffusion.evaluation.options import split_list
from paradiffusion.repository import find_shipped


def ablate(
    options: AblateOptions,
    extra: Extra,
    compose: Compose,
    check: Callable[[list[str], bool], None],
    again: Sequence[str],
) -> int:
    """Print the commands, or run what is not finished and write the table; 1 where something failed, 130 after a stop.

    Args:
        extra: overrides of train.py from the command line.
        compose: makes train.py's configuration of its arguments.
        check: refuses arguments that scripts/evaluate.py would refuse; where the second argument is true, a suite that is
            not there, too.
        again: this command's own arguments, for scripts that are printed.
    Raises:
        UserError: for a study, an override or a folder that is wrong, before anything is run.
    """
    study = _study(options)
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
        return _table_alone(study, plan, output, finished)
    return _run(study, plan, output, launcher, options.keep_going, finished)


def _study(options: AblateOptions) -> Study:
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


def _run(study: Study, plan: Plan, output: Path, launcher: Launcher, keep_going: bool, finished: set[str]) -> int:
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
        return 130
    return _finish(study, plan, output, done, outcome, titles)


def _finish(study: Study, plan: Plan, output: Path, done: set[str], outcome: Outcome, titles: dict[str, str]) -> int:
    comparison = compare(study, plan, done)
    path = write_comparison(output, comparison, outcome, titles)
    print(as_markdown(comparison, [(titles[key], reason) for key, reason in outcome.failed.items()]))
    print(f"the report is {path}")
    if len(done) < len(plan.units):
        missing = len(plan.units) - len(done)
        print(
            f"{missing} of {len(plan.units)} units are not finished; run the same command again to try them.",
            file=sys.stderr,
        )
        return 1
    return 0


def _table_alone(study: Study, plan: Plan, output: Path, finished: set[str]) -> int:
    if not any(cell.trainings[-1] in finished for cell in plan.cells):
        raise UserError(f"{output} has no finished run of {study.name}; leave out table=true to run it.")
    comparison = compare(study, plan, finished)
    path = write_comparison(output, comparison, None, {})
    print(as_markdown(comparison, []))
    print(f"the report is {path}")
    return 0


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
