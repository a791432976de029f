"""The files of a folder of pictures: which there are, in which state, and what they hold."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Final

from tqdm import tqdm

from paradiffusion.data.captions import captions_of, parse_meta
from paradiffusion.data.images import probe_size
from paradiffusion.data.tars import IMAGE_EXTENSIONS

_HEAD_BYTES: Final = 1 << 16
_BUILD, _CONVERT = "scripts/build_shards.py reads them", "convert them first"
_OTHER_PICTURES: Final = {
    "avif": _BUILD, "bmp": _BUILD, "gif": _BUILD, "tif": _BUILD, "tiff": _BUILD, "heic": _CONVERT, "heif": _CONVERT,
    "jxl": _CONVERT,
}  # fmt: skip
_LARGEST: Final = 1 << 30  # As of a member of a shard.
_SHOWN_FROM: Final = 500
_READERS: Final = 16


@dataclass
class FoundPicture:
    """A picture's files as the folder lists them: (size in bytes, time in ns) of image, JSON and text; -1: none."""

    key: str
    stamps: tuple[int, int, int, int, int, int]


@dataclass
class LookedAt:
    """What the files of a picture hold; ``width`` 0 where it is no picture."""

    width: int = 0
    height: int = 0
    captions: dict[str, str] = field(default_factory=dict)
    bad_json: bool = False


def walk_pictures(root: Path, passed_over: Counter[str]) -> Iterator[FoundPicture]:
    """Every picture below ``root``, links followed; a folder that was seen before is not walked again."""

    def complain(error: OSError) -> None:
        passed_over["folders that cannot be opened"] += 1

    seen = {_identity(root)}
    for folder, below, files in os.walk(root, onerror=complain, followlinks=True):
        kept = []
        for name in sorted(below):
            if name.startswith("."):
                continue
            try:
                identity = _identity(Path(folder, name))
            except OSError:
                passed_over["folders that cannot be opened"] += 1
                continue
            if identity in seen:
                passed_over["links to a folder seen already"] += 1
                continue
            seen.add(identity)
            kept.append(name)
        below[:] = kept
        present = set(files)
        for name in files:
            stem, dot, extension = name.rpartition(".")
            if not stem or not dot or name.startswith("."):
                continue
            if extension.lower() not in IMAGE_EXTENSIONS:
                if advice := _OTHER_PICTURES.get(extension.lower()):
                    passed_over[f"{extension.lower()} pictures ({advice})"] += 1
                continue
            key = PurePosixPath(Path(folder, name).relative_to(root)).as_posix()
            try:
                key.encode("utf-8")
                stamps = [_stamp(Path(folder, name))]
                for sides in beside(stem):
                    side = next((side for side in sides if side in present), None)
                    stamps.append(_stamp(Path(folder, side)) if side else (-1, -1))
            except UnicodeEncodeError:
                passed_over["names that are not UTF-8"] += 1
                continue
            except OSError:
                passed_over["files that cannot be opened"] += 1
                continue
            if stamps[0][0] >= _LARGEST:
                passed_over["files over 1 GiB"] += 1
                continue
            yield FoundPicture(key, (*stamps[0], *stamps[1], *stamps[2]))


def beside(stem: str) -> tuple[tuple[str], tuple[str, str]]:
    """What the files with a picture's captions may be called: its JSON, and its text; the first that is there is read."""
    return (f"{stem}.json",), (f"{stem}.txt", f"{stem}.caption")  # The latter is the habit of kohya's scripts.


def _identity(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # A pipe of that name would be waited for, and never end.
        raise OSError("no regular file")
    return found.st_size, found.st_mtime_ns


def look_at(root: Path, found: list[FoundPicture]) -> list[LookedAt]:
    """Read the head of each picture, and its captions. Threads, since most of it is waiting for the disk."""
    with (
        ThreadPoolExecutor(_READERS) as pool,
        tqdm(
            total=len(found), desc="indexing pictures", unit="file", disable=None if len(found) > _SHOWN_FROM else True
        ) as bar,
    ):
        looked = []
        for one in pool.map(lambda one: look(root, one), found):
            looked.append(one)
            bar.update()
        return looked


def look(root: Path, found: FoundPicture) -> LookedAt:
    path = root / found.key
    try:
        with open(path, "rb") as file:
            width, height = probe_size(file.read(_HEAD_BYTES))
            if not width and found.stamps[0] > _HEAD_BYTES:
                file.seek(0)
                width, height = probe_size(file.read())
        meta_bytes, text = read_beside(path, found.stamps[2] >= 0, found.stamps[4] >= 0)
    except OSError:
        return LookedAt()
    meta = parse_meta(meta_bytes) if meta_bytes else {}
    return LookedAt(width, height, captions_of(meta or {}, text), meta is None)


def read_beside(path: Path, json: bool, text: bool) -> tuple[bytes, bytes]:
    """The JSON and the text beside a picture, those that are asked for. Raises OSError when one is not there."""
    pairs = zip(beside(path.stem), (json, text), strict=True)
    meta, caption = (
        _read_first([path.with_name(name) for name in names]) if wanted else b"" for names, wanted in pairs
    )
    return meta, caption


def _read_first(paths: list[Path]) -> bytes:
    for path in paths[:-1]:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            continue
    return paths[-1].read_bytes()
