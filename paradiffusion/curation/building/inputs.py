"""Inputs of a build: folders with captions beside the images, tables, tars; their parts, and the items of each part in order."""

from __future__ import annotations

import glob
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from paradiffusion.curation.building.items import (
    KNOWN_CAPTIONS,
    Columns,
    Item,
    add_text,
    field_of,
    key_of,
    pick_captions,
    pick_extra,
    text_of,
)
from paradiffusion.curation.building.places import EXTENSIONS, Archive, Place, is_archive
from paradiffusion.data.shards import PARTS, expand_shards
from paradiffusion.data.tables import FILE_NAMES, SUFFIXES, Row, byte_columns, columns_of, read_rows
from paradiffusion.errors import UserError

FORMATS: Final = ("auto", "folder", "table", "img2dataset", "webdataset", "imagefolder")
_ARCHIVES: Final = (".tgz", ".tar.gz", ".zip")
_SPLITS: Final = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test",
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A piece of the input that one process lists: ``kind`` is "folder", "table", "img2dataset" or "webdataset".

    ``root`` is what relative paths in a table are relative to; ``prefix`` is a folder before the keys; ``image`` the column
    of the images, where the format knows it; ``split`` as in Item.
    """

    kind: str
    path: Path
    root: Path
    prefix: str = ""
    split: str = ""
    image: str | None = None


def find_parts(spec: str, kind: str, columns: Columns, root: str | None) -> tuple[str, list[Part]]:
    """The format (told or found out) and the parts of an input. Raises UserError where it is not what it is said to be."""
    paths = _paths(spec)
    kind = _detect(spec, paths) if kind == "auto" else kind
    base = Path(root).expanduser() if root else None
    ignored = {"root": root} if kind != "table" else {}
    if kind == "folder":
        ignored |= {"image": columns.image, "key": columns.key}
    for key, value in ignored.items():
        if value is not None:
            raise UserError(f"{key}={value} is of no use for format={kind}; leave it out, or say another format=.")
    if base is not None and not (base.is_dir() or is_archive(base)):
        what = "is no folder and no .zip, .tar or .tgz" if base.exists() else "does not exist"
        raise UserError(f"root={root} {what}; expected the folder or archive that the table's paths start from.")
    if kind in ("folder", "imagefolder") and not all(path.is_dir() for path in paths):
        raise UserError(f"input={spec} is no folder, expected one for format={kind}.")
    if kind == "folder":
        return kind, [Part(kind, path, path, path.name if len(paths) > 1 else "") for path in paths]
    if kind == "imagefolder":
        parts = [part for path in paths for part in _image_folder(path)]
    elif kind == "table":
        tables = [table for path in paths for table in (_tables_in(path) if path.is_dir() else [path])]
        if not tables:
            raise UserError(f"input={spec} holds no table; expected {', '.join(SUFFIXES)}.")
        # Tables in several folders may speak of other files by the same relative path.
        apart = base is None and len({path.parent for path in tables}) > 1
        parts = [Part("table", path, base or path.parent, path.parent.name if apart else "", _split_of(path.stem)) for path in tables]
    else:
        tars = [Path(str(path)) for path in expand_shards([str(path) for path in paths], "input")]
        # img2dataset's keys are unique in the whole output; others begin anew in each tar.
        return kind, [Part(kind, path, path.parent, "" if kind == "img2dataset" else path.stem) for path in tars]
    for part in parts:
        check_columns(part.path, _columns(part, columns))
    return kind, parts


def _columns(part: Part, columns: Columns) -> Columns:
    return columns if part.image is None else replace(columns, image=part.image)


def items_of(part: Part, columns: Columns, archive: Archive | None = None) -> Iterator[Item]:
    """The items of one part in their order. ``archive`` holds the images of a table whose root is an archive."""
    if part.kind == "folder":
        items = folder_items(part.path, columns)
    elif part.kind == "table":
        items = table_items(part.path, part.root, _columns(part, columns), archive)
    else:
        items = tar_items(part.path, columns, with_table=part.kind == "img2dataset")
    prefix = key_of(part.prefix, is_path=False) + "/" if part.prefix else ""
    for item in items:
        item.key = prefix + item.key
        item.split = item.split or part.split
        yield item


def _paths(spec: str) -> list[Path]:
    text = os.path.expanduser(spec)
    if text.startswith("pipe:") or "://" in text:
        raise UserError(f"input={spec} is not a local path; fetch the folder, tables or tars, or mount them.")
    if Path(text).exists():
        return [Path(text)]
    if ".tar" in text:
        return [Path(str(path)) for path in expand_shards(spec, "input")]
    found = sorted(Path(match) for match in glob.glob(text, recursive=True))
    if not found:
        raise UserError(f"input={spec} does not exist (looked from {Path.cwd()}); expected a folder, a table or tars.")
    return found


def _detect(spec: str, paths: Sequence[Path]) -> str:
    first = paths[0]
    if first.is_file():
        name = first.name.lower()
        if name.endswith(_ARCHIVES):
            raise UserError(f"input={spec} is an archive; give the table that names its members, with root={first.name}, or unpack it.")
        if name.endswith(".tar"):
            return "img2dataset" if _stats_beside(first.parent) else "webdataset"
        if not name.endswith(SUFFIXES):
            raise UserError(f"input={spec} is no table ({', '.join(SUFFIXES)}) and no .tar; say format=, if it is one.")
        return "table"
    if _metadata_files(first):
        return "imagefolder"
    if any(first.glob("*.tar")):
        found = "img2dataset" if _stats_beside(first) else "webdataset"
    # A repository of tables alone, as data sets lie on the hub (data/train-00000-of-00010.parquet).
    # Beside img2dataset's statistics only those that hold the pictures themselves.
    elif (table := next((one for one in _tables_in(first) if one.suffix.lower() == ".parquet"), None)) and (
        not _stats_beside(first) or byte_columns(table)
    ):
        found = "table"
    else:
        return "folder"
    if has_captioned_picture(first):
        what = "tables" if found == "table" else "tars"
        raise UserError(
            f"input={spec} holds pictures with captions beside them and {what} too; say which is meant with format=folder or "
            f"format={found}."
        )
    return found


def _stats_beside(folder: Path) -> bool:
    """Whether img2dataset was here: it writes NNNNN_stats.json for each shard."""
    return any(folder.glob("*_stats.json"))


def _metadata_files(folder: Path) -> list[Path]:
    """metadata.csv, .jsonl or .parquet in ``folder`` and the folders of its splits; one for each folder."""
    found: dict[Path, Path] = {}
    for level in ("", "*/"):
        for suffix in (".csv", ".jsonl", ".parquet"):
            for path in sorted(folder.glob(f"{level}metadata{suffix}")):
                found.setdefault(path.parent, path)
    return sorted(found.values())


def _image_folder(folder: Path) -> list[Part]:
    tables = _metadata_files(folder)
    if not tables:
        raise UserError(
            f"{folder} holds no metadata.csv, .jsonl or .parquet with a column file_name, as an image folder of datasets "
            "does; use format=folder for captions in files beside the images."
        )
    parts = []
    for path in tables:
        prefix = "" if path.parent == folder else path.parent.relative_to(folder).as_posix()
        parts.append(Part("table", path, path.parent, prefix, _split_of(prefix), "file_name"))
    return parts


def _tables_in(folder: Path) -> list[Path]:
    """Tables at any depth, hidden folders aside: an output within the input keeps tables of its own in one."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in (".parquet", ".csv", ".tsv", ".jsonl"))
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def _split_of(name: str) -> str:
    """The split that a folder or a file such as ``validation-00000-of-00001`` is named after; "" for none."""
    return _SPLITS.get(name.lower().partition("-")[0], "")


# kohya's scripts write .caption; img2dataset's output format "files" writes .txt and .json.
_SIDECARS: Final = tuple(extension for extension, part in PARTS.items() if part == "text")
_MAX_SIDECAR: Final = 1 << 22
# Telephones' pictures and the like: the report says how to convert them.
_NOT_READ: Final = ("heic", "heif", "hif", "jxl")


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
        name = Path(os.path.relpath(found.path, root)).as_posix()
        if found.problem:
            yield Item(name, key_of(name, is_path=False), Place("none", found.problem, member="not walked"))
            continue
        fields, notes = _sidecars(found)
        captions, sources = pick_captions(fields, columns, "file")
        yield Item(name, key_of(name), Place("file", found.path), captions, sources, pick_extra(fields, columns.keep), notes)


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
    names = {kind: found.texts.get(f"{stem}.{kind}") or found.texts.get(f"{name}.{kind}") for kind in (*_SIDECARS, "json")}
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


_TEXTS: Final = (*_SIDECARS, "json")
_MAX_TEXT: Final = 1 << 22


def tar_items(path: Path, columns: Columns, with_table: bool) -> Iterator[Item]:
    """The samples of a tar in the order of their first member; ``with_table``, it is img2dataset's, and rows of the Parquet file
    beside it whose download failed become items too.

    A sample is what shares the path up to the first dot of the file name. The first member with an image's extension
    (``columns.image`` names another, such as "edited.png") is the image; text members are fields by their extension
    ("txt", "long.txt"), and so are the fields of its JSON. Whatever else lies there, pickles among it, is passed over."""
    table = path.with_suffix(".parquet")
    rows = read_rows(table) if with_table and table.is_file() else ()
    done: set[str] = set()
    for key, members in _samples(path).items():
        fields, notes = _fields(path, members)
        done.add(key.rpartition("/")[2])
        captions, sources = pick_captions(fields, columns, "tar")
        wanted = (columns.image or "").lower()
        images = [one for one in members if (one == wanted if wanted else one.rpartition(".")[2] in EXTENSIONS)]
        image = images[0] if images else None
        if image is None and not captions:
            continue  # a folder's readme, not a sample
        place = Place("none", "no image", member="no member with an image's extension")
        if image is not None:
            place = Place("span", str(path), members[image][0], members[image][1])
        name = f"{path.name}/{key}" + (f".{image}" if image else "")
        given = text_of(fields.get(columns.key)) if columns.key else ""
        extra = pick_extra(fields, columns.keep)
        yield Item(name, key_of(given or key, is_path=False), place, captions, sources, extra, notes)
    for key, row in {text_of(row.fields.get("key")): row.fields for row in rows}.items():
        if key not in done and row.get("status") not in (None, "success"):
            why = text_of(row.get("error_message")) or text_of(row.get("status"))
            place = Place("none", "not downloaded", member=f"img2dataset: {why[:80]}")
            yield Item(f"{path.name}/{key}", key_of(key, is_path=False), place)


Members = dict[str, tuple[int, int]]


def _samples(path: Path) -> dict[str, Members]:
    """Members (extension to offset and size) by key: up to the first dot, or to the last where an image and a text agree in that
    (img.v1.07.jpg, img.v1.07.txt). A tar that is cut short is read up to the cut."""
    members: list[tuple[str, str, int, int]] = []  # folder with its slash, name, offset, size
    kinds: dict[str, set[str]] = {}  # by name without the last extension
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            try:
                for member in tar:
                    if member.size < 0:  # leads back to where it has been
                        break
                    name = member.name.removeprefix("./")
                    folder, slash, base = name.rpartition("/")
                    stem, _, extension = base.rpartition(".")
                    whole = member.offset_data + member.size <= size
                    if stem and extension and member.isreg() and not member.issparse() and whole:
                        members.append((folder + slash, base, member.offset_data, member.size))
                        kind = "image" if extension.lower() in EXTENSIONS else PARTS.get(extension.lower(), "")
                        kinds.setdefault(folder + slash + stem, set()).add(kind)
            except (tarfile.ReadError, ValueError):  # ValueError: a size that no file has
                pass
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{path} cannot be read as an uncompressed tar ({error}); unzip it, or leave it out.") from None
    found: dict[str, Members] = {}
    for folder, base, offset, length in members:
        stem, _, extension = base.rpartition(".")
        if not ("image" in (there := kinds[folder + stem]) and there & {"json", "text"}):
            stem, _, extension = base.partition(".")
        if stem:
            found.setdefault(folder + stem, {}).setdefault(extension.lower(), (offset, length))
    return found


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


# In the order in which they are looked for; a table with both has the files already.
_MAX_SHOWN: Final = 200  # characters of a path in reports: our choice
_MAX_PATH: Final = 4096  # as Linux has it
_IMAGES: Final = (*FILE_NAMES, "jpg", "png", "webp", "url", "image_url", "img_url")


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
        raise UserError(f"No column of {path} is known to hold captions; {shown}: say which with captions='{{column: short}}'.")


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
            beside = _place(location, root, archive)
            otherwise = beside.path if beside.kind == "file" else ""
            place = Place("cell", str(path), row.cell[0], row.cell[1], image, otherwise)
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
    texts = [*(columns.captions or (name for names in KNOWN_CAPTIONS.values() for name in names)), columns.key, *columns.keep]
    # Some programs write all text as bytes.
    cells = [name for name in cells if name not in texts and name.lower() not in texts]
    if (found := _known_image(cells)) is not None:
        return found, True
    if (found := _known_image([name for name in there if name not in cells])) is not None:
        return found, False
    if len(cells) == 1:
        return cells[0], True
    if cells:
        raise UserError(f"{path} has several columns that may hold images, {', '.join(cells[:20])}: say which with image=.")
    raise UserError(f"No column of {path} is known to hold images; it has {', '.join(there[:20]) or 'none'}: say which with image=.")


def _known_image(names: list[str]) -> str | None:
    folded = {name.lower(): name for name in reversed(names)}
    return next((folded[name] for name in _IMAGES if name in folded), None)


def _place(location: str, root: Path, archive: Archive | None) -> Place:
    if not location:
        return Place("none", "no image", member="the cell is empty")
    if "://" in location:
        return Place("url", location)
    if len(location) > _MAX_PATH:
        return Place("none", "no image", member="the cell is no path; embedded pictures are read from Parquet columns of bytes")
    if archive is not None:
        return archive.place(location)
    path = os.path.join(root, os.path.expanduser(location))
    if "\\" in location and not os.path.exists(path):  # written on Windows
        path = path.replace("\\", "/")
    return Place("file", path)
