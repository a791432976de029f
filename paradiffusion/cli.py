"""The console command: from any folder, `paradiffusion train stage=1` is what `python train.py stage=1` is in a checkout.

Under a launcher: `accelerate launch -m paradiffusion.cli train stage=2`.
"""

from __future__ import annotations

import ast
import difflib
import runpy
import sys

from paradiffusion.entry import run
from paradiffusion.errors import UserError
from paradiffusion.repository import ROOT, as_typed

# Each ends with `run(main, help)` of its own; none is read before it is asked for.
PROGRAMS = {path.stem: path for path in (*(ROOT / f"{name}.py" for name in ("train", "sample", "app")), *sorted(ROOT.glob("scripts/*.py")))}


def main() -> None:
    """Run the program that the first argument names with the rest of them."""
    name = sys.argv[1].replace("-", "_") if len(sys.argv) > 1 else "help"
    if name not in PROGRAMS:
        run(no_program, overview)
    sys.argv[:2] = [f"paradiffusion {name}"]
    runpy.run_path(str(PROGRAMS[name]), run_name="__main__")


def no_program(arguments: list[str]) -> int:
    """What is said to an unknown name, or to none."""
    if arguments and arguments[0] != "help":
        close = difflib.get_close_matches(arguments[0], PROGRAMS, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(PROGRAMS)}."
        raise UserError(f"{arguments[0]} is no command; {hint}")
    print(as_typed(overview()))
    return 0


def overview() -> str:
    """Every command with the first line of its help."""
    lines = []
    for name, path in PROGRAMS.items():
        said = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]
        lines.append(f"  {name:<18}{said}")
    return "\n".join(["paradiffusion COMMAND [key=value ...]; --help after a command says what it takes.", *lines])


if __name__ == "__main__":
    main()
