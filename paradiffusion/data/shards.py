"""WebDataset shards: write them, find them, index them, read one sample by its place.

A shard is a plain tar of ``key.png`` (or jpg, jpeg, webp) beside ``key.json`` (captions by kind and whatever else is
known) or ``key.txt`` (one caption, as img2dataset writes it). Nothing in a shard is ever executed or unpacked to disk:
members of any other kind, pickles among them, are passed over.
"""

from __future__ import annotations

import glob
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Final

from braceexpand import braceexpand
from webdataset.writer import TarWriter

from paradiffusion.data.places import FolderPart, Place, RawSample, ShardPath, read_place
from paradiffusion.data.sample_index import SampleIndex, join_indexes, load_index
from paradiffusion.data.shard_index import ShardIndex, TokenCounter, index_shard
from paradiffusion.data.storage import RemotePath, Storage, is_remote, list_remote
from paradiffusion.data.tars import IMAGE_EXTENSIONS, Span
from paradiffusion.errors import UserError

__all__ = [
    "IMAGE_EXTENSIONS", "FolderPart", "Place", "RawSample", "RemotePath", "SampleIndex", "ShardIndex", "ShardPath", "Span",
    "Storage", "TokenCounter", "expand_shards", "index_shard", "join_indexes", "load_index", "read_place", "read_sample",
    "write_shards",
]  # fmt: skip

_MAX_SHARDS: Final = 1_000_000


def write_shards(samples: Iterable[RawSample], folder: Path, samples_per_shard: int) -> list[Path]:
    """Write ``samples`` as ``000000.tar``, ``000001.tar``, ... and return the paths.

    The bytes are a function of the samples (fixed times and owners). Each shard is written to a temporary name and
    renamed, so that a reader never sees half of one. Raises ValueError for a key or extension that would not be read
    back as it was written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    remaining: Iterator[RawSample] = iter(samples)
    for first in remaining:  # none of them is held longer than its turn
        path = folder / f"{len(paths):06d}.tar"
        _write_shard(chain([first], islice(remaining, samples_per_shard - 1)), path)
        paths.append(path)
    return paths


def _write_shard(samples: Iterable[RawSample], path: Path) -> None:
    seen: set[str] = set()
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file, TarWriter(file, mtime=0.0, encoder=False) as tar:
            for sample in samples:
                base = sample.key.rpartition("/")[2]
                if not base or "." in sample.key or sample.key.startswith("/") or sample.key in seen:
                    raise ValueError(f"key {sample.key!r} is empty, repeated, absolute or has a dot in it")
                if sample.extension not in IMAGE_EXTENSIONS:
                    raise ValueError(f"extension {sample.extension!r} is not one of {', '.join(IMAGE_EXTENSIONS)}")
                seen.add(sample.key)
                meta = json.dumps(sample.meta, ensure_ascii=False).encode()
                tar.write({"__key__": sample.key, sample.extension: sample.image, "json": meta})
        # A rewrite within the clock's resolution would leave an index that looks fresh.
        path.with_suffix(".index.npz").unlink(missing_ok=True)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def expand_shards(
    spec: str | Path | Sequence[str | Path], key: str = "data.shards", storage: Storage | None = None
) -> list[Path | RemotePath]:
    """The shards that ``spec`` names, sorted, each once.

    Each part is a tar, a folder (all ``*.tar`` in it), a glob, or a range such as ``web/{00000..00099}.tar``; local, or a
    URL of a store that fsspec knows. The shards of a range of URLs are not looked for here. Raises UserError when a part
    matches nothing, a named local shard is missing, or a part is a command; it names ``key``.
    """
    parts = [spec] if isinstance(spec, str | Path) else list(spec)
    shards = {shard for part in parts for shard in _expand_part(str(part).strip(), key, storage or Storage())}
    if not shards:
        raise UserError(f"{key} is empty: name a folder of .tar shards, a glob, or a range {{00000..00099}}.tar.")
    return sorted(shards, key=str)


def _expand_part(part: str, key: str, storage: Storage) -> Sequence[Path | RemotePath]:
    if part.startswith("pipe:"):
        raise UserError(f"{key}={part} is a command to run, which is refused: give the path of .tar files.")
    if "::" in part:
        raise UserError(f"{key}={part} is a chain of stores, which is refused: give the plain URL of .tar files.")
    if is_remote(part):
        return _expand_remote(part, key, storage)
    part = os.path.expanduser(part.removeprefix("file://"))
    names = [part] if os.path.exists(part) else _expand_braces(part, key)
    shards: list[Path] = []
    missing: list[str] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            shards += path.glob("*.tar")
        elif path.exists():
            shards.append(path)
        elif glob.has_magic(name):
            shards += [Path(match) for match in glob.glob(name, recursive=True) if match.endswith(".tar")]
        else:
            missing.append(name)
    if not shards:
        raise UserError(f"{key}={part} matches no .tar file: check the path (from {Path.cwd()}) and the range.")
    if missing:
        raise UserError(
            f"{key}={part} names {len(names)} shards, of which {len(missing)} are missing, "
            f"the first one {missing[0]}: correct the range or fetch what is missing."
        )
    return shards


def _expand_remote(part: str, key: str, storage: Storage) -> list[RemotePath]:
    shards: list[RemotePath] = []
    for url in _expand_braces(part, key):
        if not any(mark in url for mark in "*[") and RemotePath(url).name.endswith(".tar"):
            shards.append(RemotePath(url, storage))
        else:
            shards += list_remote(url, storage)
    if not shards:
        raise UserError(f"{key}={part} matches no .tar file: check the URL, or name the shards by a range.")
    return shards


def _expand_braces(part: str, key: str) -> list[str]:
    counts = [abs(int(last) - int(first)) + 1 for first, last in re.findall(r"(\d{1,18})\.\.(\d{1,18})", part)]
    if math.prod(counts) > _MAX_SHARDS:  # Asked first: the expansion of a slip of the keyboard would fill the memory.
        raise UserError(f"{key}={part} names over {_MAX_SHARDS} shards: check the range in the braces.")
    try:
        return list(braceexpand(part))
    except ValueError as error:
        raise UserError(f"{key}={part} has a brace without its partner: write {{00000..00099}}.tar.") from error


def read_sample(index: SampleIndex, row: int) -> RawSample:
    """Read one sample by its offsets. Raises OSError when the shard is gone or shorter than its index says."""
    return read_place(index.place(row))
