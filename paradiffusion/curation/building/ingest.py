"""What an input consists of: its format, its parts (folders, tables, tars), and the items of each part in order."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from paradiffusion.curation.building.archives import Archive, is_archive
from paradiffusion.curation.building.ingest_folder import folder_items, has_captioned_picture
from paradiffusion.curation.building.ingest_table import check_columns, table_items
from paradiffusion.curation.building.ingest_tar import tar_items
from paradiffusion.curation.building.items import Columns, Item, key_of
from paradiffusion.curation.building.tables import SUFFIXES
from paradiffusion.data.shards import expand_shards
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
    if kind == "folder":
        _expect_folders(spec, paths, kind)
        return kind, [Part(kind, path, path, path.name if len(paths) > 1 else "") for path in paths]
    if kind == "imagefolder":
        _expect_folders(spec, paths, kind)
        parts = [part for path in paths for part in _image_folder(path)]
    elif kind == "table":
        tables = [table for path in paths for table in (_tables_in(path) if path.is_dir() else [path])]
        if not tables:
            raise UserError(f"input={spec} holds no table; expected {', '.join(SUFFIXES)}.")
        # Tables in several folders may speak of other files by the same relative path.
        apart = base is None and len({path.parent for path in tables}) > 1
        parts = [
            Part("table", path, base or path.parent, path.parent.name if apart else "", _split_of(path.stem))
            for path in tables
        ]
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
            raise UserError(
                f"input={spec} is an archive; give the table that names its members, with root={first.name}, or unpack it."
            )
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
    elif not _stats_beside(first) and any(path.suffix.lower() == ".parquet" for path in _tables_in(first)):
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


def _expect_folders(spec: str, paths: Sequence[Path], kind: str) -> None:
    if not all(path.is_dir() for path in paths):
        raise UserError(f"input={spec} is no folder, expected one for format={kind}.")
