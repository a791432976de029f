"""The commands of a plan: as processes to start here, and as text for a shell, for Slurm, or for another program."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from paradiffusion.errors import UserError
from paradiffusion.evaluation.ablation.plan import Plan, Unit
from paradiffusion.repository import ROOT, as_typed


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

    Not the later ones with dependencies between jobs: a training that its time limit stopped has saved and succeeded, as
    Slurm sees it, and the next stage would start from half of it.

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
