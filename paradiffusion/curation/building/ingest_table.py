"""Items of a table: an image column (paths, URLs or the files themselves) and caption columns."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from paradiffusion.curation.building.archives import Archive
from paradiffusion.curation.building.items import (
    KNOWN_CAPTIONS,
    Columns,
    Item,
    field_of,
    key_of,
    pick_captions,
    pick_extra,
    text_of,
)
from paradiffusion.curation.building.parquet import byte_columns
from paradiffusion.curation.building.places import Place
from paradiffusion.curation.building.rows import Row
from paradiffusion.curation.building.tables import columns_of, read_rows
from paradiffusion.errors import UserError

# In the order in which they are looked for; a table with both has the files already.
_MAX_SHOWN: Final = 200  # characters of a path in reports: our choice
_MAX_PATH: Final = 4096  # as Linux has it
_IMAGES: Final = (
    "file_name", "filename", "file", "file_path", "filepath", "image_path", "img_path", "path", "image", "img", "jpg",
    "png", "webp", "url", "image_url", "img_url",
)  # fmt: skip


def check_columns(path: Path, columns: Columns) -> None:
    """Raise UserError when a table lacks a column that was named, or an image column that can be recognised."""
    there = columns_of(path)
    if not there:
        raise UserError(f"{path} holds no row that can be read; expected a row for each image, or leave the file out.")
    shown = f"it has {', '.join(there[:20])}"
    named = {"image": columns.image, "key": columns.key}
    for option, name in [*named.items(), *(("captions", name) for name in columns.captions or {}),
                         *(("keep", name) for name in columns.keep)]:  # fmt: skip
        if name is not None and name not in there and name.partition(".")[0] not in there:
            raise UserError(f"{option}= names the column {name!r}, which {path} does not have; {shown}.")
    _image_column(path, there, columns)
    known = {name for names in KNOWN_CAPTIONS.values() for name in names}
    if columns.captions is None and not columns.may_lack_captions and not known & {name.lower() for name in there}:
        raise UserError(
            f"No column of {path} is known to hold captions; {shown}: say which with captions='{{column: short}}'."
        )


def table_items(path: Path, root: Path, columns: Columns, archive: Archive | None) -> Iterator[Item]:
    """An item for each row.

    A sample is called by the column ``key``, else by the image's path, else by its row ("web/row-000017"). Paths are
    relative to ``root``, or are members of ``archive``.
    """
    there = columns_of(path)
    image, is_cell = _image_column(path, there, columns)
    for row in read_rows(path, _wanted(there, image, columns), image if is_cell else None):
        name = f"{path.name} {row.place}"
        value = field_of(row.fields, image)
        location = text_of(value.get("path") if isinstance(value, dict) else value).strip()
        if row.problem:
            yield Item(name, _key(path, row, None, ""), Place("none", "row cannot be read", member=row.problem))
            continue
        if is_cell:
            place = Place("cell", str(path), row.cell[0], row.cell[1], image)
        else:
            place = _place(location, root, archive)
            shown = location if len(location) <= _MAX_SHOWN else f"{location[:_MAX_SHOWN]}..."
            name = f"{name} ({shown})" if location else name
        captions, sources = pick_captions(row.fields, columns, "column")
        yield Item(
            name, _key(path, row, columns.key, location if not is_cell else ""), place, captions, sources,
            pick_extra(row.fields, columns.keep), row.notes,
        )  # fmt: skip


def _key(path: Path, row: Row, column: str | None, location: str) -> str:
    identifier = text_of(field_of(row.fields, column)) if column else ""
    if identifier:
        return key_of(identifier, is_path=False)
    if location and "://" not in location and not os.path.isabs(location):
        return key_of(location)
    return f"{key_of(path.name)}/row-{row.number:06d}"


def _wanted(there: list[str], image: str, columns: Columns) -> set[str]:
    """The columns to read: a table of embeddings would take minutes otherwise. A name with dots begins with a column's."""
    named = [image, *([columns.key] if columns.key else []), *columns.keep, *(columns.captions or {})]
    wanted = {name if name in there else name.partition(".")[0] for name in named}
    if columns.captions is None:
        known = {"caption_sources", *(name for names in KNOWN_CAPTIONS.values() for name in names)}
        wanted |= {name for name in there if name.lower() in known}
    return wanted


def _image_column(path: Path, there: list[str], columns: Columns) -> tuple[str, bool]:
    """The column of the images, and whether its cells hold the files themselves."""
    cells = byte_columns(path) if path.suffix.lower() == ".parquet" else []
    if columns.image is not None:
        stem, _, field = columns.image.rpartition(".")
        if field == "bytes" and stem in cells:
            return stem, True
        return columns.image, columns.image in cells
    texts = [
        *(columns.captions or (name for names in KNOWN_CAPTIONS.values() for name in names)),
        columns.key,
        *columns.keep,
    ]
    # Some programs write all text as bytes.
    cells = [name for name in cells if name not in texts and name.lower() not in texts]
    if (found := _known_image(cells)) is not None:
        return found, True
    if (found := _known_image([name for name in there if name not in cells])) is not None:
        return found, False
    if len(cells) == 1:
        return cells[0], True
    if cells:
        raise UserError(
            f"{path} has several columns that may hold images, {', '.join(cells[:20])}: say which with image=."
        )
    raise UserError(
        f"No column of {path} is known to hold images; it has {', '.join(there[:20]) or 'none'}: say which with image=."
    )


def _known_image(names: list[str]) -> str | None:
    folded = {name.lower(): name for name in reversed(names)}
    return next((folded[name] for name in _IMAGES if name in folded), None)


def _place(location: str, root: Path, archive: Archive | None) -> Place:
    if not location:
        return Place("none", "no image", member="the cell is empty")
    if "://" in location:
        return Place("url", location)
    if len(location) > _MAX_PATH:
        return Place(
            "none", "no image", member="the cell is no path; embedded pictures are read from Parquet columns of bytes"
        )
    if archive is not None:
        return archive.place(location)
    path = os.path.join(root, os.path.expanduser(location))
    if "\\" in location and not os.path.exists(path):  # written on Windows
        path = path.replace("\\", "/")
    return Place("file", path)


def fields_of_table(path: Path, key: str) -> dict[str, dict[str, Any]]:
    """The rows of a small table by the column ``key``."""
    return {text_of(row.fields.get(key)): row.fields for row in read_rows(path)}
