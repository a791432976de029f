"""Run a plan's commands one after another; what is finished is not run again, however the last run ended."""

from __future__ import annotations

import ctypes
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from tqdm import tqdm

from paradiffusion.atomic import hold
from paradiffusion.errors import UserError
from paradiffusion.evaluation.ablation.ablation_plan import Launcher, Plan, Unit, heading
from paradiffusion.evaluation.journal import Journal, read_journals
from paradiffusion.evaluation.records import NAME
from paradiffusion.stopping import StopSignal, stop_on_signals

_DEATH_SIGNAL: Final = 1  # PR_SET_PDEATHSIG of prctl(2)
_POLL_SECONDS: Final = 0.2


@dataclass(frozen=True)
class Outcome:
    """How a run of the plan ended: units that failed with their reasons, those that were not run for want of them, and
    the status of the signal that ended it (0: none did)."""

    failed: dict[str, str]
    blocked: tuple[str, ...]
    stopped: int


def finished_units(plan: Plan, output: Path) -> set[str]:
    """Keys of units whose results are there: a training by its own summary, an evaluation by the journal too, since its
    command may write several."""
    journal = dict(read_journals(output))
    return {
        unit.key
        for unit in plan.units.values()
        if (_trained(unit) if unit.kind == "train" else _evaluated(unit, journal.get(unit.key, {})))
    }


def run_plan(plan: Plan, output: Path, launcher: Launcher, keep_going: bool, after: Callable[[Unit], None]) -> Outcome:
    """Run what is not finished, in the plan's order. Ctrl-C and SIGTERM are passed on, and end it once the command has saved.

    Args:
        after: called when a unit is finished.
    Raises:
        UserError: when another process runs a study in ``output``.
    """
    failed: dict[str, str] = {}
    blocked: list[str] = []
    with _only_one(output), stop_on_signals() as stop, Journal(output) as journal:
        done = finished_units(plan, output)
        bar = _bar(len(plan.units), len(done))
        with bar:
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
                    bar.write(f"failed: {heading(unit)}: {reason}", file=sys.stderr)
                    if not keep_going:
                        break
                    continue
                done.add(unit.key)
                bar.update()
                after(unit)
    return Outcome(failed, tuple(blocked), 0 if stop.came_at is None else stop.status)


def log_of(unit: Unit, output: Path) -> Path:
    """Where all that a unit prints is kept."""
    return output / "logs" / f"{unit.folder.name}.log"


def _trained(unit: Unit) -> bool:
    try:
        return int(json.loads((unit.checkpoints / "summary.json").read_text())["steps"]) == unit.steps
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _evaluated(unit: Unit, record: dict[str, Any]) -> bool:
    return record.get("outcome") == "done" and any(unit.folder.rglob(NAME))


def _run(unit: Unit, output: Path, launcher: Launcher, stop: StopSignal, bar: tqdm[Any]) -> str:
    """Run one unit to its end; "" when it is finished, else why not."""
    log = log_of(unit, output)
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
            pass_fds=(lock.fileno(),), preexec_fn=_end_with_parent,
        )  # fmt: skip
        status = _wait(process, stop, log, bar)
    if status == 0:
        complete = _trained(unit) if unit.kind == "train" else any(unit.folder.rglob(NAME))
        return "" if complete else f"it ended before it was finished; see {log}"
    return f"{_last_words(log, start)} (status {status}, see {log})"


def _wait(process: subprocess.Popen[bytes], stop: StopSignal, log: Path, bar: tqdm[Any]) -> int:
    told = False
    looked = 0.0
    shown = bar.postfix
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
        if sys.stderr.isatty() and time.monotonic() - looked > 1:
            looked = time.monotonic()
            bar.set_postfix_str(f"{shown} | {_last_line(log)[:70]}")


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


def _last_words(log: Path, start: int) -> str:
    """Its error, or the last line that it printed."""
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - 20_000))
        lines = [line.strip() for line in file.read().decode("utf-8", "replace").replace("\r", "\n").split("\n")]
    errors = [line for line in lines if line.startswith("error: ")]
    said = [line for line in lines if line]
    return (errors[-1].removeprefix("error: ") if errors else said[-1] if said else "it said nothing")[:400]


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 1000))
        lines = file.read().decode("utf-8", "replace").replace("\r", "\n").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


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


def _bar(total: int, done: int) -> tqdm[Any]:
    """Units with time left; in a log file, a line every half minute at most."""
    slow = not sys.stderr.isatty()
    return tqdm(
        total=total, initial=done, desc="ablation", unit="unit", dynamic_ncols=not slow, smoothing=0,
        mininterval=30 if slow else 0.2, maxinterval=60 if slow else 10,
    )  # fmt: skip
