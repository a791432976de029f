"""A folder of pictures with captions beside them, indexed in place: what people have before they have shards."""

from __future__ import annotations

import json
import os
import re
import shlex
import stat
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple

import numpy as np
from tqdm import tqdm

from paradiffusion.atomic import cached_index, locked
from paradiffusion.data.captions import captions_of, is_odd, parse_meta
from paradiffusion.data.index import DAMAGED, SampleIndex, arrays_of, assemble, index_of, look_at, save_arrays, tabulated
from paradiffusion.data.shards import IMAGE_EXTENSIONS, IN_TABLE, FolderPart, Span, TarEntry, names_beside, read_beside
from paradiffusion.data.tables import BESIDE, table_beside, told_by_table
from paradiffusion.errors import UserError

INDEX_NAME: Final = ".paradiffusion.index.npz"
_VERSION: Final = 5
_PER_PART: Final = 1000
_REPEATS: Final = re.compile(r"([1-9]\d{0,5})_.")
_TOLD_FOLDERS: Final = 8
_BUILD, _CONVERT = "scripts/build_shards.py reads them", "convert them first"
_OTHER_FILES: Final = {
    **dict.fromkeys(("csv", "tsv", "jsonl", "parquet"), _BUILD),
    "avif": _BUILD, "bmp": _BUILD, "gif": _BUILD, "tif": _BUILD, "tiff": _BUILD, "heic": _CONVERT, "heif": _CONVERT,
    "jxl": _CONVERT,
}  # fmt: skip
_LARGEST: Final = 1 << 30  # As of a member of a shard.
_SHOWN_FROM: Final = 500
_READERS: Final = 16


def load_folder(folder: str | Path, key: str = "data.folder") -> SampleIndex:
    """All pictures below ``folder`` that have a caption in a .txt, .caption or .json of the same name (``names_beside``), else in a
    table there or above them (metadata.jsonl, captions.csv and the like; ``tables.BESIDE``).

    The index is kept in the folder (``.paradiffusion.index.npz``), else in the user's cache; only files whose size or time
    has changed are looked at again. A sample's key is its path in the folder, and its id is a function of that alone. Up to
    1000 samples in the order of their paths stand for a shard. Hidden files are left alone; what is passed over is
    counted and told in one line. Raises UserError, which names ``key``, when there is no such folder or nothing to train on.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        found = "is a file" if root.exists() else "does not exist"
        raise UserError(f"{key}={folder} {found}: expected a folder of pictures with .txt or .json beside them.")
    with locked(root.resolve()):  # Of the processes of one machine the first looks at the files, others find its index.
        return _load(root, key)


def _load(root: Path, name: str) -> SampleIndex:
    passed_over: Counter[str] = Counter()
    table_beside.cache_clear()
    found = sorted(walk_pictures(root, passed_over), key=lambda one: one.key)
    # All pictures that were looked at are kept, also those of no use, so that they need not be looked at again.
    whole, stamps, faults = _read_stored(root) or _look_at(root, [])
    known = {(whole.key(row), *stamps[row].tolist()): row for row in np.flatnonzero(~faults[:, 2]).tolist()}
    rows = np.array([known.get((one.key, *one.stamps), -1) for one in found], np.int64)
    if (rows < 0).any() or len(whole) != len(found):
        new, *more = _look_at(root, [one for one, row in zip(found, rows, strict=True) if row < 0])
        order = np.where(rows < 0, len(whole) + np.cumsum(rows < 0) - 1, rows)
        parts = [part for part in (whole, new) if len(part)]
        whole = assemble(lambda: parts, root).take(order) if parts else whole
        stamps, faults = (np.concatenate(pair)[order] for pair in zip((stamps, faults), more, strict=True))
        arrays = {"version_of_folder": np.array(_VERSION), "stamps": stamps, "faults": faults, **arrays_of(whole)}
        any(save_arrays(place, arrays) for place in _places(root))  # Nowhere to write: it is made again next time.
    return _to_index(root, whole, faults, passed_over, name)


@dataclass
class FoundPicture:
    """A picture's files as the folder lists them: (size in bytes, time in ns) of image, JSON and text; -1: none. The text may be a
    row of a table (``told``)."""

    key: str
    stamps: tuple[int, int, int, int, int, int]
    told: bool = False


class LookedAt(NamedTuple):
    """What the files of a picture hold: (width, height, hash) of the picture, width 0 where it is none; its captions by kind; and whether
    its JSON cannot be read, its text is not UTF-8, and its files cannot be opened."""

    picture: tuple[int, int, int]
    captions: dict[str, str]
    faults: tuple[bool, bool, bool]


def walk_pictures(root: Path, passed_over: Counter[str]) -> Iterator[FoundPicture]:
    """Every picture below ``root``, links followed; a folder that was seen before is not walked again."""

    def complain(error: OSError) -> None:
        passed_over["folders that cannot be opened"] += 1

    seen, unused, example = {_identity(root)}, 0, ""
    for folder, below, files in os.walk(root, onerror=complain, followlinks=True):
        kept = []
        for name in sorted(below):
            if name.startswith("."):
                continue
            try:
                identity = _identity(Path(folder, name))
            except OSError as error:
                complain(error)
                continue
            if identity in seen:
                passed_over["links to a folder seen already"] += 1
                continue
            seen.add(identity)
            kept.append(name)
        below[:] = kept
        present, strays, claimed = set(files), set(files), set[str]()
        for name in sorted(files):
            stem, _, extension = name.rpartition(".")
            extension = extension.lower()
            if not stem or name.startswith(".") or name in BESIDE:
                strays.discard(name)
                continue
            if extension not in IMAGE_EXTENSIONS:
                if advice := _OTHER_FILES.get(extension):
                    passed_over[f"{extension} files ({advice})"] += 1
                    strays.discard(name)
                continue
            key = PurePosixPath(Path(folder, name).relative_to(root)).as_posix()
            beside = [next((side for side in names if side in present), "") for names in names_beside(name)]
            sides = {side for side in beside if side}
            if sides and sides <= claimed:
                continue  # Of two pictures with one caption the first is the sample, as in tars and for the builder.
            claimed |= sides
            strays -= {name, *sides}
            try:
                key.encode("utf-8")
                image = _stamp(Path(folder, name))
                stamps = [_stamp(Path(folder, side)) if side else (-1, -1) for side in beside]
                table = None if any(beside) else table_beside(Path(folder), root)
                stamps[1] = _stamp(table) if table else stamps[1]
            except UnicodeEncodeError:
                passed_over["names that are not UTF-8"] += 1
            except OSError:
                passed_over["files that cannot be opened"] += 1
            else:
                if image[0] < _LARGEST:
                    yield FoundPicture(key, (*image, *stamps[0], *stamps[1]), table is not None)
                else:
                    passed_over["files over 1 GiB"] += 1
        unused, example = unused + len(strays), example or min(strays, default="")
    if unused:
        example = example.encode("utf-8", "replace").decode()
        passed_over[f"files that are no part of a sample (such as {example})"] = unused


def _identity(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # A pipe of that name would be waited for, and never end.
        raise OSError("no regular file")
    return found.st_size, found.st_mtime_ns


def _look_at(root: Path, found: list[FoundPicture]) -> tuple[SampleIndex, np.ndarray, np.ndarray]:
    """Read the head of each picture, and its captions: their index, the stamps, int64 [n, 6], and faults, bool [n, 3]. By threads, since
    most of it is waiting for the disk."""
    shown = None if len(found) > _SHOWN_FROM else True
    with ThreadPoolExecutor(_READERS) as pool:
        looking = pool.map(lambda one: look(root, one), found)
        looked = list(tqdm(looking, "indexing pictures", len(found), unit="file", disable=shown))
    entries = []
    for one in found:
        image, meta, text = (Span(0, max(size, 0)) for size in one.stamps[::2])
        text.offset = IN_TABLE if one.told else 0
        entries.append(TarEntry(one.key, one.key.rpartition(".")[2].lower(), image, meta, text))
    index = tabulated(FolderPart(root, 0), entries, [saw.picture for saw in looked], [saw.captions for saw in looked])
    stamps = np.array([one.stamps for one in found], np.int64).reshape(len(found), 6)
    return index, stamps, np.array([saw.faults for saw in looked], bool).reshape(-1, 3)


def look(root: Path, found: FoundPicture) -> LookedAt:
    path = root / found.key
    try:
        with open(path, "rb") as file:
            picture = look_at(file, Span(0, found.stamps[0]))
        meta_bytes, text = read_beside(path, found.stamps[2] >= 0, found.stamps[4] >= 0 and not found.told)
        if found.told:
            captions, odd_text = told_by_table(root, found.key)
            return LookedAt(picture, captions, (False, odd_text, False))
    except OSError:
        return LookedAt((0, 0, 0), {}, (False, False, True))
    meta = parse_meta(meta_bytes) if meta_bytes else {}
    return LookedAt(picture, captions_of(meta or {}, text), (meta is None, is_odd(meta_bytes, text), False))


def _to_index(root: Path, whole: SampleIndex, faults: np.ndarray, passed_over: Counter[str], name: str) -> SampleIndex:
    readable, captioned = whole.width > 0, whole.words.any(axis=1)
    for what, which in (
        ("files that cannot be opened", faults[:, 2]),
        ("files that are no picture", ~readable & ~faults[:, 2]),
        ("pictures without a caption", readable & ~captioned),
    ):
        if len(unused := np.flatnonzero(which)):
            passed_over[f"{what} (such as {whole.key(unused[0])})"] += len(unused)
    told = ", ".join(f"{count} {reason}" for reason, count in passed_over.items() if count)
    rows = np.flatnonzero(readable & captioned)
    if not len(rows):
        told = told if len(whole) else ", ".join(["no picture at all", *([told] if told else [])])
        raise UserError(
            f"{name}={root} holds no picture with a caption ({told}): expected for example "
            "cat.jpg with cat.txt or cat.json beside it, or a metadata.jsonl with file_name and text."
        )
    if os.environ.get("RANK", "0") == "0" and told:
        print(f"{name}={root}: {len(rows)} pictures with captions; passed over: {told}", file=sys.stderr, flush=True)
    index = whole.take(rows)
    _tell_repeats(root, [index.key(row) for row in range(len(index))], name)
    used = np.flatnonzero(index.words.any(axis=0))
    parts = -(-len(rows) // _PER_PART)
    return replace(
        index, shards=[FolderPart(root, number) for number in range(parts)], words=index.words[:, used],
        shard=(np.arange(len(rows)) // _PER_PART).astype(np.int32), kinds=[index.kinds[column] for column in used],
        bad_json=int(faults[rows, 0].sum()), odd_text=int(faults[rows, 1].sum()), shard_source=np.zeros(parts, np.int16),
    )  # fmt: skip


def _tell_repeats(root: Path, keys: list[str], name: str) -> None:
    """Folders called 10_cat and 1_dog would be drawn 10 to 1 by kohya's scripts: say what does so here."""
    counts = Counter(key.partition("/")[0] for key in keys if "/" in key)
    repeats = {folder: int(found[1]) for folder in counts if (found := _REPEATS.match(folder))}
    if os.environ.get("RANK", "0") != "0" or len(set(repeats.values())) < 2:
        return
    sources = ", ".join(
        f"{{folder: {json.dumps(str(root / folder), ensure_ascii=False)}, weight: {number * counts[folder]}}}"
        for folder, number in list(repeats.items())[:_TOLD_FOLDERS]
    )
    more = ", ..." if len(repeats) > _TOLD_FOLDERS else ""
    left = len(keys) - sum(counts[folder] for folder in repeats)
    typed = shlex.quote(f"data.sources=[{sources}{more}]")
    rest = f" (add the {left} pictures outside of these folders)" if left else ""
    print(
        f"{name}={root}: the numbers in its folders' names ({', '.join(list(repeats)[:2])}) are taken as names, not as repeats: "
        f"each picture comes equally often. For repeats{rest} give {typed}",
        file=sys.stderr, flush=True,
    )  # fmt: skip


def _places(root: Path) -> list[Path]:
    return [root / INDEX_NAME, cached_index(root.resolve(), ".folder.npz")]


def _read_stored(root: Path) -> tuple[SampleIndex, np.ndarray, np.ndarray] | None:
    """What was kept, as ``_look_at`` returns it; None where there is nothing, or it is damaged."""
    for place in _places(root):
        try:
            with np.load(place, allow_pickle=False) as kept:
                index = index_of(FolderPart(root, 0), kept)
                if int(kept["version_of_folder"]) == _VERSION:
                    return index, kept["stamps"], kept["faults"]
        except (OSError, *DAMAGED):
            continue
    return None
