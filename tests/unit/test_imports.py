"""The one import rule: the core, which trains and samples, imports none of the rest."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from commands import ROOT

PACKAGE = ROOT / "paradiffusion"
REST = {"scenes", "judges", "evaluation", "curation", "apps", "budget"}
# What is left to be handed to the trainer by train.py: nothing may be added.
STILL: set[str] = set()


def imported_rooms(path: Path) -> Iterator[str]:
    """Rooms that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} has a relative import"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "paradiffusion" else [module]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("paradiffusion."))


def test_the_core_imports_none_of_the_rest() -> None:
    files = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
    core = {name: path for name, path in files.items() if name.split("/")[0] not in REST}
    assert len(core) > 50
    assert {name for name, path in core.items() if REST & set(imported_rooms(path))} == STILL
