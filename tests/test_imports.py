"""The order of the rooms: each imports only from earlier ones, and no file outgrows its subject."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "paradiffusion"
# Rooms of one line do not know each other.
ORDER = [
    {"errors", "randomness", "atomic", "machine"},
    {"checks"},
    {"model_config", "data_config"},
    {"config"},
    {"data", "text", "diffusion", "judges"},
    {"models"},
    {"sampling"},
    {"evaluation"},
    {"training"},
    {"budget"},
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
# Free of models: compose may be imported where no torch is wanted, entry before anything else.
TOP = {"compose": {"config", "errors", "machine"}, "entry": {"errors"}}
# The refiner holds the layout head that reads its tokens.
BESIDE = {("text/refiner.py", "models")}
# Curation works on data, and on what judges say of it, alone.
ONLY = {"curation": {"errors", "randomness", "atomic", "machine", "checks", "config", "data", "judges"}}
FILES = sorted(PACKAGE.rglob("*.py"))
MAXIMUM_LINES = 400


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> Iterator[tuple[str, int]]:
    """Rooms that a file imports, wherever in it, with the line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} has a relative import"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "paradiffusion" else [module]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "paradiffusion" and rest:
                yield rest.partition(".")[0], node.lineno


def test_every_room_has_its_place() -> None:
    assert len(FILES) > 30
    rooms = {room_of(path) for path in FILES} - {"__init__"}
    assert rooms <= {*LEVEL, *TOP, *ONLY}, "give a new room its place in the order"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_room_imports_only_from_earlier_ones(path: Path) -> None:
    room = room_of(path)
    for other, line in imported_rooms(path):
        place = f"paradiffusion/{path.relative_to(PACKAGE)}:{line} imports {other}"
        if room in TOP or room in ONLY:
            assert other in {**TOP, **ONLY}[room] | {room}, place
        else:
            beside = (path.relative_to(PACKAGE).as_posix(), other) in BESIDE
            assert other == room or beside or LEVEL.get(other, len(ORDER)) < LEVEL[room], place


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_files_stay_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAXIMUM_LINES, f"{path.name} has {lines} lines: it has more than one subject"
