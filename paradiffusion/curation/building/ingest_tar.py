"""Items of a tar of samples: any WebDataset, and img2dataset's with the table of what it could not download."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from paradiffusion.curation.building.ingest_table import fields_of_table
from paradiffusion.curation.building.items import Columns, Item, add_text, key_of, pick_captions, pick_extra, text_of
from paradiffusion.curation.building.pictures import EXTENSIONS
from paradiffusion.curation.building.places import Place
from paradiffusion.errors import UserError

_TEXTS: Final = ("txt", "caption", "text", "json")
_MAX_TEXT: Final = 1 << 22


def tar_items(path: Path, columns: Columns, with_table: bool) -> Iterator[Item]:
    """The samples of a tar in the order of their first member.

    A sample is what shares the path up to the first dot of the file name. The first member with an image's extension
    (``columns.image`` names another, such as "edited.png") is the image; text members are fields by their extension
    ("txt", "long.txt"), and so are the fields of its JSON. Whatever else lies there, pickles among it, is passed over.

    Args:
        with_table: the tar is img2dataset's: rows of the Parquet file beside it whose download failed become items too.
    """
    rows = _rows_beside(path) if with_table else {}
    done: set[str] = set()
    for key, members in _samples(path).items():
        fields, notes = _fields(path, members)
        done.add(key.rpartition("/")[2])
        captions, sources = pick_captions(fields, columns, "tar")
        image = _image_of(members, columns.image)
        if image is None and not captions:
            continue  # a folder's readme, not a sample
        place = Place("none", "no image", member="no member with an image's extension")
        if image is not None:
            place = Place("span", str(path), members[image][0], members[image][1])
        name = f"{path.name}/{key}" + (f".{image}" if image else "")
        given = text_of(fields.get(columns.key)) if columns.key else ""
        extra = pick_extra(fields, columns.keep)
        yield Item(name, key_of(given or key, is_path=False), place, captions, sources, extra, notes)
    for key, row in rows.items():
        if key not in done and row.get("status") not in (None, "success"):
            why = text_of(row.get("error_message")) or text_of(row.get("status"))
            place = Place("none", "not downloaded", member=f"img2dataset: {why[:80]}")
            yield Item(f"{path.name}/{key}", key_of(key, is_path=False), place)


Members = dict[str, tuple[int, int]]


def _samples(path: Path) -> dict[str, Members]:
    """Members (extension to offset and size) by key. A tar that is cut short is read up to the cut."""
    found: dict[str, Members] = {}
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            try:
                for member in tar:
                    if member.size < 0:  # leads back to where it has been
                        break
                    name = member.name.removeprefix("./")
                    folder, slash, base = name.rpartition("/")
                    stem, _, extension = base.partition(".")
                    whole = member.offset_data + member.size <= size
                    if stem and extension and member.isreg() and not member.issparse() and whole:
                        found.setdefault(folder + slash + stem, {}).setdefault(
                            extension.lower(), (member.offset_data, member.size)
                        )
            except (tarfile.ReadError, ValueError):  # ValueError: a size that no file has
                pass
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{path} cannot be read as an uncompressed tar ({error}); unzip it, or leave it out.") from None
    return found


def _image_of(members: Members, wanted: str | None) -> str | None:
    if wanted is not None:
        return wanted.lower() if wanted.lower() in members else None
    return next((extension for extension in members if extension.rpartition(".")[2] in EXTENSIONS), None)


def _fields(path: Path, members: Members) -> tuple[dict[str, Any], list[str]]:
    fields: dict[str, Any] = {}
    notes: list[str] = []
    with open(path, "rb") as file:
        for extension, (offset, size) in members.items():
            kind = extension.rpartition(".")[2]
            if kind not in _TEXTS or size > _MAX_TEXT:
                continue
            file.seek(offset)
            add_text(fields, notes, extension, file.read(size), kind == "json")
    return fields, notes


def _rows_beside(path: Path) -> dict[str, dict[str, Any]]:
    table = path.with_suffix(".parquet")
    return fields_of_table(table, "key") if table.is_file() else {}
