"""Self-contained pages: Jinja2 templates with their style and script inlined, tables for a page and for Markdown, thumbnails."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

ROOT: Final = Path(__file__).parent
# Below this side a picture is embedded as it is; a JPEG of so few pixels would show its own blocks.
_EXACT_SIDE: Final = 128
_JOINERS: Final = "\u200c\u200d"  # not printable by themselves; families of emoji and Persian words are written with them


def render(template: str, **values: Any) -> str:
    """The HTML of a template, named by its path below the package; all text in ``values`` is escaped by ``page_text``."""
    return _ENVIRONMENT.get_template(template).render(values)


def page_text(text: str) -> str:
    """``text`` for a page: markup escaped, and control characters, which HTML does not allow, replaced."""
    return escape("".join(map(_allowed, text.replace("\r\n", "\n"))))


def _allowed(c: str) -> str:
    if c.isprintable() or c in "\n\t" or c in _JOINERS:
        return c
    return " " if c.isspace() else "\ufffd"


def plain(text: str) -> str:
    """``text`` on one line, without control characters, and without marks that turn the direction of what follows."""
    return "".join(map(_allowed, " ".join(text.split())))


def thumbnail_uri(image: Image.Image, side: int = 320) -> str:
    """An RGB ``image`` as a data URI, its longer side at most ``side`` pixels: PNG where it is tiny, else JPEG."""
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if max(small.size) <= _EXACT_SIDE:
        kind = "png"
        small.save(buffer, "PNG", optimize=True)
    else:
        kind = "jpeg"
        small.save(buffer, "JPEG", quality=86)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


@dataclass(frozen=True)
class Cell:
    """A cell: its main text, smaller lines below, and a mark, which is its class on a page ("best", "bad", "better", ...).

    Attributes:
        link: the id of what it leads to on the page, or "".
        order: the number that it is sorted by.
        bar: shares that are drawn side by side in it.
    """

    text: str
    small: tuple[str, ...] = ()
    mark: str = ""
    link: str = ""
    order: float | None = None
    bar: tuple[float, ...] = ()


@dataclass(frozen=True)
class Group:
    """Rows under a heading of their own; the first cell of each row heads it. ``main`` rows are set off from the others."""

    title: str
    rows: list[list[Cell]]
    main: int = 0


@dataclass(frozen=True)
class Grid:
    """A table. ``words`` columns hold text, the others numbers; ``note`` stands below."""

    head: list[str]
    groups: list[Group] = field(default_factory=list)
    note: str = ""
    words: int = 1
    sortable: bool = False


def cells(texts: Iterable[str]) -> list[Cell]:
    """Cells of nothing but text."""
    return [Cell(text) for text in texts]


def text_grid(head: Sequence[str], rows: Iterable[Sequence[str]], note: str = "", words: int = 1) -> Grid:
    """A table of nothing but text."""
    return Grid(list(head), [Group("", [cells(row) for row in rows])], note, words)


def markdown(text: str) -> str:
    """Foreign text for a cell of a Markdown table: nothing in it is markup or HTML, and it stays on its line."""
    return re.sub(r"([\\`*_\[\]|~#!$])", r"\\\1", escape(plain(text), quote=False))


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], words: int | None = None) -> str:
    """A Markdown table of texts that are Markdown already; after the first ``words`` columns (None: all) numbers stand right."""
    marks = ["---" if words is None or i < words else "---:" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, marks, *rows))


def grid_markdown(grid: Grid) -> str:
    """``grid`` as a Markdown table; a group's title is a row in bold."""
    rows: list[list[str]] = []
    for group in grid.groups:
        if group.title:
            rows.append([f"**{markdown(group.title)}**", *[""] * (len(grid.head) - 1)])
        rows += [[_markdown_cell(cell) for cell in row] for row in group.rows]
    note = f"\n\n{markdown(grid.note)}" if grid.note else ""
    return markdown_table([markdown(text) for text in grid.head], rows, grid.words) + note


def _markdown_cell(cell: Cell) -> str:
    text = markdown(cell.text)
    text = f"**{text}** best" if cell.mark == "best" else text
    small = "; ".join(markdown(line) for line in cell.small if line)
    return f"{text} ({small})" if small else text


def _finalized(value: Any) -> Any:
    return Markup(page_text(value)) if type(value) is str else value


def _source(name: str) -> Markup:
    """A file as it stands: a style or a script, which Jinja's own marks must not be looked for in."""
    return Markup((ROOT / name).read_text(encoding="utf-8").strip())


_ENVIRONMENT: Final = Environment(
    loader=FileSystemLoader(ROOT), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined,
    finalize=_finalized,
)  # fmt: skip
_ENVIRONMENT.globals["source"] = _source
