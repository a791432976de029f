"""A program for which there is the pretended GPU: ``python tests/support/pretending.py PROGRAM ARGUMENTS...``, or ``-c CODE``."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pretended_gpu import pretend

import paradiffusion.budget.activations  # noqa: F401 - which counts for describe, by torch's own functions


def main(program: str, arguments: list[str]) -> None:
    with pretend():
        if program == "-c":
            exec(arguments[0], {"__name__": "__main__"})
            return
        sys.argv = [program, *arguments]
        runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
