"""Reports made of sections, the same as a page, as Markdown and as JSON: the results of votes, the table of an ablation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from paradiffusion.atomic import write_atomic
from paradiffusion.evaluation.records import finite
from paradiffusion.pages import Grid, Group, grid_markdown, markdown, render


@dataclass
class Section:
    """A part of a report: a title, or "" for the beginning; paragraphs; warnings; tables under titles of their own, or ""; and figures,
    which a page alone has."""

    title: str
    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    tables: list[tuple[str, Grid]] = field(default_factory=list)
    figures: list[Markup] = field(default_factory=list)


def write_sections(folder: Path, stem: str, title: str, sections: Sequence[Section], record: dict[str, Any]) -> Path:
    """Write the report as ``stem``.html, .md and .json (its numbers, ``record``) into ``folder``, each whole; the page's path."""
    contents = {
        ".json": json.dumps(finite(record), ensure_ascii=False, indent=1) + "\n",
        ".md": document_markdown(title, sections),
        ".html": render("evaluation/templates/sections.html", title=title, sections=sections),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, content in contents.items():
        write_atomic(folder / f"{stem}{suffix}", content)
    return folder / f"{stem}.html"


def document_markdown(title: str, sections: Sequence[Section]) -> str:
    return "\n\n".join([f"# {markdown(title)}", *(part for section in sections for part in section_markdown(section))]) + "\n"


def section_markdown(section: Section, level: int = 2) -> Iterator[str]:
    """Its parts, with a heading of ``level``."""
    if section.title:
        yield f"{'#' * level} {markdown(section.title)}"
    yield from map(markdown, section.lines)
    yield from (f"**{markdown(warning)}**" for warning in section.warnings)
    for title, grid in section.tables:
        yield from [f"{'#' * (level + 1)} {markdown(title)}"] if title else []
        yield grid_markdown(_without_bars(grid))


def _without_bars(grid: Grid) -> Grid:
    """Bars are drawn, and have no words."""
    if not any(cell.bar for group in grid.groups for row in group.rows for cell in row):
        return grid
    return Grid(grid.head[:-1], [Group(group.title, [row[:-1] for row in group.rows]) for group in grid.groups], grid.note)
