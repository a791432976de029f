"""Latents and text features computed beforehand: where they lie, whether they fit, and how the readers take them.

A cache folder holds ``latents/`` and ``text/``, or is one of the two: ``key.json``, which says everything that made the
values, and one file for each shard (see cache_files.py). A shard's file is named after its content, not its path, so
that shards may move, and equally named ones of several sources do not meet.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from paradiffusion.atomic import write_atomic
from paradiffusion.data.cache_files import Entry, EntryFile, caption_name, sample_name
from paradiffusion.data.images import Bucket
from paradiffusion.data.index import SampleIndex
from paradiffusion.data.remote import RemotePath
from paradiffusion.data.shards import Place, ShardPath, Span
from paradiffusion.errors import UserError

KINDS: Final = ("latents", "text")
KEY_FILE: Final = "key.json"
NULL_FILE: Final = "null.safetensors"
FORMAT_VERSION: Final = 1
# How an encoded image becomes the codec's input (see images.py): another number for another crop, filter or colour.
PIXELS_VERSION: Final = "crop 1, lanczos, JPEG reduced, on white, profiles to sRGB"
# A window of shards of each of several sources, latents and text: to open one of 10,000 samples takes 0.7 ms.
_OPEN_FILES: Final = 64


@dataclass(frozen=True)
class Stored:
    """What a cache has of one sample: ``latents`` [2, C, h, w], the posterior's mean and standard deviation before
    scaling, and ``text``, the features [L, D] of its caption; None for what is not cached."""

    latents: Tensor | None
    text: Entry | None


@dataclass(frozen=True)
class StoredBatch:
    """What a cache has of b samples.

    Attributes:
        latents: [2, b, C, h, w], or None.
        features: [sum of counts, D], all captions' one after another, or None.
        counts: rows of ``features`` of each sample; ``lengths``: tokens of its caption before any cut.
    """

    latents: Tensor | None
    features: Tensor | None
    counts: list[int]
    lengths: list[int]

    def pin_memory(self) -> StoredBatch:
        """The same in pinned memory, from which it travels to a GPU while that computes."""
        latents, features = (None if t is None else t.pin_memory() for t in (self.latents, self.features))
        return replace(self, latents=latents, features=features)

    def text(self, slot: int) -> Entry:
        """The features [L, D] of one sample's caption."""
        assert self.features is not None
        start = sum(self.counts[:slot])
        return Entry(self.features[start : start + self.counts[slot]], self.lengths[slot])


@dataclass
class Cache:
    """What the readers take in the place of images and captions. Pickles, and opens files where it is used.

    Attributes:
        latents, text: the file of each shard; None for what is not cached.
        factor: of the codec, to see that latents fit their bucket.
        null: the null prompt's features [L, D], where text is cached.
    """

    latents: dict[ShardPath, Path] | None = None
    text: dict[ShardPath, Path] | None = None
    factor: int = 8
    null: Entry | None = None
    _open: OrderedDict[Path, EntryFile] = field(default_factory=OrderedDict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": OrderedDict()}

    def slim(self, place: Place) -> Place:
        """``place`` without its image, where no image has to be read."""
        return place if self.latents is None else replace(place, image=Span(0, 0))

    def read(self, place: Place, caption: str, bucket: Bucket) -> Stored:
        """What is cached of one sample with that caption.

        Raises:
            ValueError: when it is not there, or is damaged; OSError when the file cannot be read.
        """
        latents = text = None
        if self.latents is not None:
            file = self._file(self.latents[place.shard])
            found = file.get(sample_name(place.id))
            if found is None:
                is_bad = sample_name(place.id) in file.bad
                raise ValueError("did not decode when its latents were cached" if is_bad else "is not in the cache")
            latents, size = found.values, (bucket[0] // self.factor, bucket[1] // self.factor)
            if tuple(latents.shape[-2:]) != size:
                raise ValueError(f"has cached latents of {tuple(latents.shape[-2:])}, and its bucket needs {size}")
        if self.text is not None:
            file = self._file(self.text[place.shard])
            text = file.get(caption_name(caption))
            if text is None:
                # Captions of a remote shard cannot be compared with the cache at a bearable price.
                first = f"delete {file.path.name} and " if isinstance(place.shard, RemotePath) else ""
                raise ValueError(
                    f"has a caption that is not in the cache, changed since: {first}run scripts/cache.py again"
                )
        return Stored(latents, text)

    def _file(self, path: Path) -> EntryFile:
        if path in self._open:
            self._open.move_to_end(path)
        else:
            self._open[path] = EntryFile(path)
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
        return self._open[path]


def collate(samples: Sequence[Stored]) -> StoredBatch:
    """One batch, in few tensors: each takes a file handle on its way between processes."""
    latents = [sample.latents for sample in samples if sample.latents is not None]
    text = [sample.text for sample in samples if sample.text is not None]
    return StoredBatch(
        latents=torch.stack(latents, dim=1) if latents else None,
        features=torch.cat([entry.values for entry in text]) if text else None,
        counts=[len(entry.values) for entry in text],
        lengths=[entry.length for entry in text],
    )


def folders_of(folder: Path) -> dict[str, Path]:
    """Of latents and text what ``folder`` holds: its subfolders of these names, or itself, where it has a key."""
    found = {kind: folder / kind for kind in KINDS if (folder / kind / KEY_FILE).is_file()}
    if not found and (folder / KEY_FILE).is_file():
        found = {kind: folder for kind in KINDS if read_key(folder).get("what") == kind}
    return found


def read_key(folder: Path) -> dict[str, Any]:
    """``key.json``: "what" it holds, "key" (everything that made it), and "about". Raises UserError for a damaged one."""
    path = folder / KEY_FILE
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        version = stored["format_version"]
        if isinstance(stored["key"], dict) and isinstance(stored["what"], str) and version == FORMAT_VERSION:
            return dict(stored)
        reason = f"format_version {version}, and this repository reads {FORMAT_VERSION}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise UserError(f"{path} is no key of a cache ({reason}); delete that folder and make the cache again.")


def write_key(folder: Path, what: str, key: dict[str, Any], about: dict[str, Any]) -> None:
    """Write ``key.json``, whole or not at all."""
    content = {"format_version": FORMAT_VERSION, "what": what, "key": key, "about": about}
    write_atomic(folder / KEY_FILE, json.dumps(content, indent=1) + "\n", shared=True)


def find_difference(stored: dict[str, Any], wanted: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """The first part of ``wanted`` that ``stored`` says otherwise, with both values; caption kinds may be fewer."""
    for name, value in json.loads(json.dumps(wanted)).items():
        found = stored.get(name)
        if name == "data.captions" and isinstance(found, list) and set(value) <= set(found):
            continue
        if found != value:
            return name, found, value
    return None


def file_names(index: SampleIndex, what: str) -> list[str]:
    """The name of each shard's file: its own name, and a hash of what the cached values are functions of besides the key.

    For latents these are ids (from which crops are drawn) and images' sizes; for text ids and the captions' lengths. Where
    all of that is equal in two shards (small folders, whose files are numbered alike), their paths tell them apart.
    """
    starts = np.searchsorted(index.shard, np.arange(len(index.shards) + 1))
    columns = [name for name in ("image_size", "width", "height") if name in (index.table.dtype.names or ())]
    stems = []
    for shard, start, end in zip(index.shards, starts, starts[1:], strict=False):
        rows = slice(int(start), int(end))
        digest = hashlib.blake2b(np.ascontiguousarray(index.ids[rows]).tobytes(), digest_size=8)
        if what == "latents":
            for name in columns:
                digest.update(np.ascontiguousarray(index.table[name][rows]).tobytes())
        else:
            for kind, column in sorted(zip(index.kinds, index.words[rows].T, strict=True), key=lambda pair: pair[0]):
                if column.any():  # the columns of a joined index depend on the other shards, too
                    digest.update(kind.encode("utf-8", "surrogateescape") + np.ascontiguousarray(column).tobytes())
        stem = re.sub(r"[^\w.-]", "_", shard.stem)[:100]  # of a remote shard it may be anything
        stems.append(f"{stem}-{digest.hexdigest()}")
    shards_of: dict[str, set[ShardPath]] = {}
    for stem, shard in zip(stems, index.shards, strict=True):
        shards_of.setdefault(stem, set()).add(shard)
    pairs = zip(stems, index.shards, strict=True)
    return [f"{stem}{_path_mark(shard) if len(shards_of[stem]) > 1 else ''}.safetensors" for stem, shard in pairs]


def _path_mark(shard: ShardPath) -> str:
    path = str(shard) if isinstance(shard, RemotePath) else os.path.abspath(str(shard))
    return "-" + hashlib.blake2b(path.encode("utf-8", "surrogateescape"), digest_size=4).hexdigest()
