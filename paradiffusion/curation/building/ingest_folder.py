"""Items of a folder of images with captions in files of the same name beside them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from paradiffusion.curation.building.items import Columns, Item, add_text, key_of, pick_captions, pick_extra
from paradiffusion.curation.building.pictures import EXTENSIONS
from paradiffusion.curation.building.places import Place

# kohya's scripts write .caption; img2dataset's output format "files" writes .txt and .json.
_SIDECARS: Final = ("txt", "caption")
_MAX_SIDECAR: Final = 1 << 22
_NOT_READ: Final = (
    "heic",
    "heif",
    "hif",
    "jxl",
)  # telephones' pictures and the like: the report says how to convert them


@dataclass
class _Found:
    """An image, or a folder with the ``problem`` for which it was not walked. ``texts`` are the files beside the images of
    its folder: names by name, with the extension in small letters."""

    path: str
    problem: str = ""
    texts: dict[str, str] = field(default_factory=dict)


def folder_items(folder: Path, columns: Columns) -> Iterator[Item]:
    """Every image below ``folder``, sorted by path, with the text of ``a.txt`` / ``a.caption`` and the fields of ``a.json``.

    Links are followed, each folder is walked once; a link to a folder that was walked already, and a folder that cannot be
    opened, is an item of its own, so that the report shows it. A name that two images share (a.jpg, a.png) gives both one
    key: one caption cannot be known to be about both.
    """
    root = str(folder)
    for found in _walk(root, {_identity(root)}):
        name = os.path.relpath(found.path, root)
        if found.problem:
            yield Item(name, key_of(name, is_path=False), Place("none", found.problem, member="not walked"))
            continue
        fields, notes = _sidecars(found)
        captions, sources = pick_captions(fields, columns, "file")
        yield Item(
            name, key_of(name), Place("file", found.path), captions, sources, pick_extra(fields, columns.keep), notes
        )


def has_captioned_picture(folder: Path) -> bool:
    """Whether some image below ``folder`` has a text beside it."""
    found = _walk(str(folder), {_identity(str(folder))})
    return any(not one.problem and any(_text_names(one)) for one in found)


def _identity(folder: str) -> tuple[int, int]:
    stat = os.stat(folder)
    return stat.st_dev, stat.st_ino


def _walk(folder: str, seen: set[tuple[int, int]]) -> Iterator[_Found]:
    """Images and folders that are not walked, depth first in the order of names."""
    try:
        with os.scandir(folder) as listed:
            # hidden: thumbnails, trash, and what macOS writes beside files (._a.jpg)
            entries = sorted((entry for entry in listed if not entry.name.startswith(".")), key=lambda one: one.name)
    except OSError:
        yield _Found(folder, "folder cannot be opened")
        return
    texts: dict[str, str] = {}
    for entry in entries:
        stem, _, extension = entry.name.rpartition(".")
        if extension.lower() in (*_SIDECARS, "json") and _is(entry, "file"):  # a pipe would wait for ever
            texts.setdefault(f"{stem}.{extension.lower()}", entry.name)
    for entry in entries:
        if _is(entry, "dir"):
            identity = _identity(entry.path)
            if identity in seen:
                yield _Found(entry.path, "folder linked again")
            else:
                seen.add(identity)
                yield from _walk(entry.path, seen)
        elif "." in entry.name and entry.name.rpartition(".")[2].lower() in (*EXTENSIONS, *_NOT_READ):
            yield _Found(entry.path, texts=texts)


def _is(entry: os.DirEntry[str], kind: str) -> bool:
    try:
        return entry.is_dir() if kind == "dir" else entry.is_file()
    except OSError:  # a link to itself
        return False


def _text_names(found: _Found) -> dict[str, str]:
    """The text files beside an image by extension: ``a.txt``, else ``a.jpg.txt``."""
    name = os.path.basename(found.path)
    stem = name.rpartition(".")[0]
    names = {
        kind: found.texts.get(f"{stem}.{kind}") or found.texts.get(f"{name}.{kind}") for kind in (*_SIDECARS, "json")
    }
    return {kind: beside for kind, beside in names.items() if beside}


def _sidecars(found: _Found) -> tuple[dict[str, Any], list[str]]:
    """The fields beside an image: "txt" and "caption" from text files, and all of its JSON; and notes."""
    fields: dict[str, Any] = {}
    notes: list[str] = []
    for kind, name in _text_names(found).items():
        try:
            with open(os.path.join(os.path.dirname(found.path), name), "rb") as file:
                data = file.read(_MAX_SIDECAR)
        except OSError:
            notes.append("text beside the image cannot be read")
            continue
        add_text(fields, notes, kind, data, kind == "json")
    return fields, notes
