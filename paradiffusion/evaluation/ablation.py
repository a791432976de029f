"""Ablations: scripts/ablate.py's keys, and a study from its file to its table.

The plan's commands run one after another; what is finished is not run again, however the last run ended.
"""

from __future__ import annotations

import ctypes
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import IO, Any, Final

from tqdm import tqdm

from paradiffusion.atomic import hold
from paradiffusion.checks import choice, split_list
from paradiffusion.errors import UserError
from paradiffusion.evaluation.ablation_plan import Compose, Extra, Launcher, Plan, Study, Unit, as_script, is_own, make_plan, read_study
from paradiffusion.evaluation.ablation_results import add_results, read_results
from paradiffusion.evaluation.ablation_table import Comparison, as_markdown, compare, stage_summary, write_comparison
from paradiffusion.evaluation.journal import Journal, read_journals
from paradiffusion.evaluation.records import NAME
from paradiffusion.repository import find_shipped
from paradiffusion.runner import make_bar
from paradiffusion.stopping import StopSignal, stop_on_signals

_STAGE: Final = re.compile(r"stage([123])\.(.+)", re.DOTALL)
_DEATH_SIGNAL: Final = 1  # PR_SET_PDEATHSIG of prctl(2)
_POLL_SECONDS: Final = 0.2


@dataclass
class AblateOptions:
    """What scripts/ablate.py takes besides the overrides of train.py; it says what each is."""

    study: str | None = None
    output: str | None = None
    only: str | None = None
    seeds: str | None = None
    launch: str | None = None
    launch_arguments: str | None = None
    keep_going: bool = True
    print: str = "no"
    table: bool = False
    results: str | None = None

    def check(self) -> None:
        if self.study is None:
            raise UserError("study= is missing; name a YAML file, such as study=configs/ablations/nano.yaml.")
        self.print = {"true": "shell", "false": "no"}.get(self.print.lower(), self.print)
        choice("print", self.print, ("no", "shell", "json", "slurm"))
        for wrong, sentence in (
            (self.table and self.print != "no", "both table=true and print= are given; keep one of them"),
            (self.launch and not Path(self.launch).is_file(), f"launch={self.launch} is no file; choose one of configs/launch"),
            (self.launch_arguments and not self.launch, "launch_arguments= go with launch=, which is missing"),
        ):
            if wrong:
                raise UserError(f"{sentence}.")
        self.seed_list()

    def seed_list(self) -> tuple[int, ...]:
        """``seeds=`` as numbers, () where it is not given. Raises UserError for anything else."""
        given = split_list(self.seeds)
        if (
            not all(re.fullmatch(r"\d{1,9}", item, re.ASCII) for item in given)
            or len({*given}) < len(given)
            or (self.seeds is not None and not given)
        ):
            raise UserError(f"seeds={self.seeds} is not understood; expected whole numbers, each another, such as [0,1,2].")
        return tuple(int(item) for item in given)

    @staticmethod
    def keys() -> list[str]:
        return [one.name for one in fields(AblateOptions)]


def split(arguments: list[str]) -> tuple[list[str], Extra]:
    """Arguments that are AblateOptions', and overrides of train.py: ``key=value`` for all stages, ``stageN.key=value`` for one.
    UserError for an override that the study itself sets."""
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
        if is_own(matched[2] if matched else argument):
            raise UserError(f"{key} is set by the study itself; the study's file says stages, seeds and settings.")
    return own, Extra(tuple(overrides), tuple(per_stage))


def ablate(options: AblateOptions, extra: Extra, compose: Compose, check: Callable[[list[str], bool], None], again: Sequence[str]) -> int:
    """Print the commands, or run what is not finished and write the table; 1 where something failed, 128 + the signal's number
    after a stop. UserError for a study, an override or a folder that is wrong, before anything is run.

    Args:
        extra: overrides of train.py from the command line; ``compose`` makes its configuration of its arguments.
        check: refuses arguments that scripts/evaluate.py would refuse; a suite that is not there, too, where its second is true.
        again: this command's own arguments, for scripts that are printed.
    """
    study = read_study(find_shipped(str(options.study)))
    if options.only:
        study = study.only(split_list(options.only))
    study = replace(study, seeds=options.seed_list() or study.seeds)
    output = Path(options.output or f"runs/ablations/{study.name}").expanduser()
    plan = make_plan(study, output, extra, compose)
    # Evaluations by what they ask for, whatever it is asked of; of equal ones the first.
    asked: dict[tuple[str, ...], Unit] = {}
    for unit in plan.units.values():
        if unit.kind == "evaluate":
            own = ("ckpt=", "label=", "output_dir=")
            asked.setdefault(tuple(a for a in unit.arguments if not a.startswith(own)), unit)
    for unit in asked.values():
        try:
            check(list(unit.arguments[1:]), options.print == "no" and not options.table)
        except UserError as error:
            raise UserError(f"{unit.title}: {error}") from None
    launcher = Launcher(options.launch, tuple(split_list(options.launch_arguments)))
    results = Path(options.results).expanduser() if options.results else None
    kept = read_results(results, plan) if results else {}
    left = plan.without(kept)
    known = {*plan.units} - {*left.units}

    def finished_now() -> set[str]:
        return known | (finished_units(left, output) if output.is_dir() else set())

    def table() -> Comparison:
        """The table so far, for a run of days can be looked at; results that are new are kept."""
        comparison = compare(study, plan, finished_now(), kept)
        if results:
            new = {(one.setting, one.seed): one for one in comparison.results if one.whole and (one.setting, one.seed) not in kept}
            add_results(results, new.values(), comparison.columns)
            kept.update(new)
        return comparison

    finished = finished_now()
    if options.print != "no":
        rest = [argument for argument in again if not argument.startswith(("print=", "launch=", "launch_arguments="))]
        print(as_script(options.print, plan, launcher, finished, rest))
        return 0
    outcome = Outcome()
    if not options.table:
        _say_what_is_there(study, plan, output, finished)

        def after(unit: Unit) -> None:
            if unit.kind == "evaluate":
                write_comparison(output, table(), [])

        outcome = run_plan(left, output, launcher, options.keep_going, after)
        finished = finished_now()
        if outcome.stopped:
            count = f"{len(finished)} of {len(plan.units)}"
            print(f"stopped with {count} units finished; run the same command again to go on.", flush=True)
            return outcome.stopped
    elif not any(cell.trainings[-1] in finished for cell in plan.cells):
        raise UserError(f"{output} has no finished run of {study.name}; leave out table=true to run it.")
    comparison = table()
    failures = [(plan.units[key].heading, reason) for key, reason in outcome.failed.items()]
    failures += [(plan.units[key].heading, "not run, since what it starts from failed") for key in outcome.blocked]
    path = write_comparison(output, comparison, failures)
    print(as_markdown(comparison, failures))
    print(f"the report is {path}")
    missing = len(plan.units) - len(finished)
    if options.table or not missing:
        return 0
    text = f"{missing} of {len(plan.units)} units are not finished; run the same command again to try them."
    print(text, file=sys.stderr)
    return 1


def _say_what_is_there(study: Study, plan: Plan, output: Path, finished: set[str]) -> None:
    """Name what is finished, and what was for an earlier version of the study: it stays, and is never mixed into the table."""
    print(
        f"{study.name}: {len(study.settings)} settings x {len(study.seeds)} seeds are {len(plan.units)} units, {len(finished)} of "
        f"them finished; output in {output}, each unit's own in {output / 'logs'}",
        flush=True,
    )
    left = [
        str(record.get("title", key))
        for key, record in dict(read_journals(output)).items()
        if key not in plan.units and record.get("outcome") == "done"
    ]
    if left:
        shown = "; ".join(left[:5]) + (f"; and {len(left) - 5} more" if len(left) > 5 else "")
        print(f"note: {len(left)} finished units belong to no setting as the study now is, and stay aside: {shown}")


@dataclass(frozen=True)
class Outcome:
    """How a run of the plan ended: units that failed with their reasons, those that were not run for want of them, and
    the status of the signal that ended it (0: none did)."""

    failed: dict[str, str] = field(default_factory=dict)
    blocked: tuple[str, ...] = ()
    stopped: int = 0


def finished_units(plan: Plan, output: Path) -> set[str]:
    """Keys of units whose results are there: a training by its own summary, an evaluation by the journal too, since its
    command may write several."""
    done = {key for key, record in dict(read_journals(output)).items() if record.get("outcome") == "done"}
    return {unit.key for unit in plan.units.values() if _complete(unit) and (unit.kind == "train" or unit.key in done)}


def _complete(unit: Unit) -> bool:
    if unit.kind == "train":
        summary = stage_summary(unit.checkpoints)
        return summary.get("steps") == unit.steps or "patience" in summary
    return any(unit.folder.rglob(NAME))


def run_plan(plan: Plan, output: Path, launcher: Launcher, keep_going: bool, after: Callable[[Unit], None]) -> Outcome:
    """Run what is not finished, in the plan's order, and call ``after`` with each unit that is. Ctrl-C and SIGTERM are passed on, and
    end it once the command has saved. UserError when another process runs a study in ``output``."""
    failed: dict[str, str] = {}
    blocked: list[str] = []
    with _only_one(output), stop_on_signals() as stop, Journal(output) as journal:
        done = finished_units(plan, output)
        with make_bar("ablation", "unit", len(plan.units), len(done)) as bar:
            for unit in plan.units.values():
                if unit.key in done:
                    continue
                if unit.needs is not None and unit.needs not in done:
                    blocked.append(unit.key)
                    continue
                began = time.monotonic()
                bar.set_postfix_str(unit.title, refresh=sys.stderr.isatty())
                reason = _run(unit, output, launcher, stop, bar)
                if stop.came_at is not None:
                    break
                seconds = round(time.monotonic() - began, 1)
                record: dict[str, Any] = {"title": unit.title, "seconds": seconds, "command": launcher.typed(unit)}
                journal.add(unit.key, {"outcome": "failed" if reason else "done", **record, "reason": reason})
                if reason:
                    failed[unit.key] = reason
                    bar.write(f"failed: {unit.heading}: {reason}", file=sys.stderr)
                    if not keep_going:
                        break
                    continue
                done.add(unit.key)
                bar.update()
                after(unit)
    return Outcome(failed, tuple(blocked), 0 if stop.came_at is None else stop.status)


def _run(unit: Unit, output: Path, launcher: Launcher, stop: StopSignal, bar: tqdm[Any]) -> str:
    """Run one unit to its end; "" when it is finished, else why not."""
    log = output / "logs" / f"{unit.folder.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out, (output / ".unit.lock").open("a+") as lock:
        _wait_for_orphan(lock, unit, stop, bar)
        if stop.came_at is not None:
            return "stopped"
        out.write(f"\n$ {shlex.join(launcher.typed(unit))}\n".encode())
        out.flush()
        start = out.tell()
        # In a session of its own, so that a terminal's Ctrl-C reaches it once, through us. The lock goes with it: it is held
        # for as long as the command lives, even when we are killed.
        process = subprocess.Popen(
            launcher.here(unit), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            pass_fds=() if sys.platform == "win32" else (lock.fileno(),),
            preexec_fn=None if sys.platform == "win32" else _end_with_parent,
        )  # fmt: skip
        status = _wait(process, stop)
    if status == 0:
        return "" if _complete(unit) else f"it ended before it was finished; see {log}"
    lines = _last_lines(log, start)
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    said = (errors or lines or ["it said nothing"])[-1][:400]
    return f"{said} (status {status}, see {log})"


def _wait(process: subprocess.Popen[bytes], stop: StopSignal) -> int:
    told = False
    while True:
        try:
            return process.wait(_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        except KeyboardInterrupt:  # a second Ctrl-C: it does not save any more
            process.kill()
        if stop.came_at is not None and not told:
            process.terminate()
            told = True


def _end_with_parent() -> None:
    """In the new process: be asked to save and leave when its parent dies, so that nothing trains on unseen (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGTERM)


def _wait_for_orphan(lock: IO[str], unit: Unit, stop: StopSignal, bar: tqdm[Any]) -> None:
    """Wait for a command that a killed run has left behind, and for whoever writes the stage that is to be trained."""
    said = False
    own = unit.checkpoints / ".lock"
    with ExitStack() as stack:
        held = [lock]
        if unit.kind == "train" and own.is_file():  # a launcher does not hand our lock on to its processes
            held.append(stack.enter_context(own.open("a+")))
        while not all(hold(one) for one in held) and stop.came_at is None:
            if not said:
                bar.write("waiting for a command that an earlier run has started, until it has saved.", file=sys.stderr)
                said = True
            time.sleep(_POLL_SECONDS)


def _last_lines(log: Path, start: int) -> list[str]:
    """What stands in the log from ``start`` on, in its last 20,000 bytes."""
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - 20_000))
        lines = file.read().decode("utf-8", "replace").replace("\r", "\n").split("\n")
    return [line.strip() for line in lines if line.strip()]


@contextmanager
def _only_one(output: Path) -> Iterator[None]:
    try:
        output.mkdir(parents=True, exist_ok=True)
        file = (output / ".lock").open("a+")
    except OSError as error:
        raise UserError(f"output={output} cannot be written ({error.strerror}); choose another folder.") from None
    with file:
        if not hold(file):
            raise UserError(f"{output} is in use by another scripts/ablate.py; wait for it, or choose another output=.")
        yield
