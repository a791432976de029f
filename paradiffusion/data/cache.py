"""Cache of latents and text features: WebDataset tars that are written once, checked, and read in the place of the models.

A cache folder holds ``latents/`` and ``text/``, or is one of the two: ``key.json``, which says everything that made the
values, and a tar for each shard, with an index beside it. A tar is named after its shard's content, not its path, so that
shards may move, and equally named ones of several sources do not meet. Its members are ``NAME.safetensors``, NAME 16 hexadecimal
digits: of a sample's id and a hash of its picture (latents), or of a hash of the caption (features); of a shard that has changed
those that still hold are taken over. Each holds ``values`` ([2, C, h, w], mean and
standard deviation, or [L, D], unpadded), ``length`` (of text: tokens before any cut) and ``checksum``.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from paradiffusion.atomic import atomic_file, write_atomic
from paradiffusion.data.index import SampleIndex
from paradiffusion.data.shards import Place, ShardPath, Span, read_at
from paradiffusion.errors import UserError
from paradiffusion.randomness import seed_from

KINDS: Final = ("latents", "text")
KEY_FILE: Final = "key.json"
NULL_FILE: Final = "null.tar"
FORMAT_VERSION: Final = 3
# How an encoded image becomes the codec's input (see images.py): another number for another crop, filter or colour.
PIXELS_VERSION: Final = "crop 1, lanczos, JPEG reduced, on white, profiles to sRGB"
# A window of shards of each of several sources, latents and text.
_OPEN_FILES: Final = 64
_ABANDONED_SECONDS: Final = 86400.0
# Of each member where its bytes lie, by name; size 0 for a sample that could not be read. The last row is the tar itself.
_INDEX: Final = np.dtype([("name", "<u8"), ("offset", "<u8"), ("size", "<u8")])
_WHOLE: Final = 2**64 - 1

Add = Callable[..., None]  # see ``writing``


def picture_name(id: int, image_hash: int) -> int:
    """The name of a picture's member: of its sample, since crops are drawn by that, and of its bytes."""
    return id ^ image_hash


def caption_name(caption: str) -> int:
    """The name of a caption's member: a hash of its text, so that one that has changed since is not found."""
    return seed_from("caption", caption)


@dataclass(frozen=True)
class Entry:
    """``values`` in the shape and dtype that they were stored in; ``length`` as stored beside them."""

    values: Tensor
    length: int


@contextmanager
def writing(path: Path, dtype: torch.dtype) -> Iterator[Add]:
    """Write one tar of a cache and its index, whole or not at all: several commands may be at work on it. Gives ``add(name, values,
    length=0)``, which appends a member; ``values`` are None for a sample that could not be read, bytes for a member of another tar
    (``Members.stored``). Raises UserError when the disk is full or refuses."""
    rows: list[tuple[int, int, int]] = []

    def add(name: int, values: Tensor | bytes | None, length: int = 0) -> None:
        data = values if isinstance(values, bytes) else b""
        if isinstance(values, Tensor):
            values = values.detach().to("cpu", dtype).contiguous()
            facts = {"length": length, "checksum": checksum(name, length, values)}
            data = save({"values": values, **{key: torch.tensor(fact) for key, fact in facts.items()}})
        member = tarfile.TarInfo(f"{name:016x}.safetensors")
        member.size = len(data)
        rows.append((name, tar.offset + tarfile.BLOCKSIZE, len(data)))  # after its header
        if data:
            tar.addfile(member, io.BytesIO(data))

    try:
        with atomic_file(path, shared=True) as partial:
            with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
                yield add
            rows.append((_WHOLE, partial.stat().st_size, 0))
        with atomic_file(_index_of(path), shared=True) as partial, open(partial, "wb") as file:
            np.save(file, np.array(sorted(rows), _INDEX))
    except OSError as error:
        raise UserError(
            f"the cache's {path} could not be written ({error.strerror or error}); make room, then run the same command "
            "again: finished shards are kept."
        ) from None


def checksum(name: int, length: int, values: Tensor) -> int:
    """CRC-32 of an entry, by which a reader notices that a disk or a copy has changed it."""
    facts = f"{name} {length} {values.dtype} {list(values.shape)}".encode()
    return zlib.crc32(values.reshape(-1).view(torch.uint8).numpy().data, zlib.crc32(facts))


def _index_of(path: Path) -> Path:
    return path.with_suffix(".npy")


def is_whole(path: Path) -> bool:
    """Whether the tar is there as it was written; only one row of its index is read."""
    try:
        last = np.load(_index_of(path), mmap_mode="r")[-1]
        return bool(last["name"] == _WHOLE and last["offset"] == path.stat().st_size)
    except (OSError, ValueError, EOFError):
        return False


def remove_abandoned(folder: Path) -> None:
    """Remove what killed writers have left in ``folder``: partial files that nobody has written to for a day."""
    for partial in folder.glob(".*.part"):
        with suppress(OSError):  # Another process may do the same.
            if time.time() - partial.stat().st_mtime > _ABANDONED_SECONDS:
                partial.unlink()


class Members:
    """Reads single members of one tar. Raises OSError for one that is gone, ValueError for an index that is damaged.

    ``rows`` is the index: where the bytes of each member lie, sorted by name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = np.load(_index_of(path))[:-1]
        self._names = np.ascontiguousarray(self.rows["name"])
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed with the object

    def __contains__(self, name: int) -> bool:
        at = np.searchsorted(self._names, np.uint64(name))
        return bool(at < len(self._names) and self._names[at] == name)

    def stored(self, name: int) -> bytes:
        """The member of that name, which is there, as it lies in the tar; empty for a sample that could not be read."""
        row = self.rows[np.searchsorted(self._names, np.uint64(name))]
        return read_at(self._file, int(row["offset"]), int(row["size"]))

    def get(self, name: int) -> Entry | None:
        """The entry of that name; None where there is none. Raises ValueError for a sample that could not be read, and for an entry that is
        not as it was written."""
        if name not in self:
            return None
        if not (data := self.stored(name)):
            raise ValueError("did not decode when its latents were cached")
        try:
            tensors = load(data)
            entry = Entry(tensors["values"], int(tensors["length"]))
            if int(tensors["checksum"]) == checksum(name, entry.length, entry.values):
                return entry
        except (SafetensorError, KeyError, ValueError, RuntimeError, OverflowError):
            pass
        raise ValueError(f"has a damaged entry in the cache: delete {self.path.name} and run scripts/cache.py again")


class Former:
    """Members of the tars of a cache's folder that are not ``current``, those of today's shards: of shards that have changed, say.
    ``taken`` counts the members that were taken from each; who makes several shards may begin it anew."""

    def __init__(self, folder: Path, current: Sequence[Path]) -> None:
        others = set(folder.glob("*.tar")) - set(current) - {folder / NULL_FILE}
        self._shards = {path.name.rpartition("-")[0] for path in current}
        self._paths: list[Path] = []
        names: list[np.ndarray] = []
        for path in sorted(others):
            with suppress(OSError):  # another command may have dropped it just now, here and below
                if is_whole(path):
                    names.append(np.load(_index_of(path))[:-1]["name"])
                    self._paths.append(path)
        joined = np.concatenate([np.zeros(0, np.uint64), *names])
        order = np.argsort(joined, kind="stable")
        self._names = joined[order]
        self._of = np.repeat(np.arange(len(names)), [len(one) for one in names])[order]
        self._opened = lru_cache(_OPEN_FILES)(Members)
        self._sizes = {path: len(one) for path, one in zip(self._paths, names, strict=True)}
        self.taken: Counter[Path] = Counter()

    def give(self, name: int, add: Add) -> bool:
        """Add the member of that name; whether there is one."""
        at = int(np.searchsorted(self._names, np.uint64(name)))
        if at == len(self._names) or self._names[at] != name:
            return False
        path = self._paths[self._of[at]]
        try:
            data = self._opened(path).stored(name)
        except OSError:
            return False
        add(name, data)
        self.taken[path] += 1
        return True

    def drop(self, taken: Counter[Path]) -> None:
        """Remove the tars of shards of today of which most members were taken by others; those of other shards stay."""
        for path, count in taken.items():
            if path.name.rpartition("-")[0] in self._shards and 2 * count > self._sizes[path]:
                path.unlink(missing_ok=True)
                _index_of(path).unlink(missing_ok=True)


@dataclass(frozen=True)
class Stored:
    """What a cache has of b samples, in few tensors: each takes a file handle on its way between processes.

    Attributes:
        latents: [2, b, C, h, w], the posterior's mean and standard deviation before scaling; None where not cached.
        features: [sum of counts, D], those of all captions one after another; None where not cached.
        counts: rows of ``features`` of each sample; ``lengths``: tokens of its caption before any cut.
    """

    latents: Tensor | None
    features: Tensor | None
    counts: list[int]
    lengths: list[int]

    def pin_memory(self) -> Stored:
        """The same in pinned memory, from which it travels to a GPU while that computes."""
        latents, features = (None if t is None else t.pin_memory() for t in (self.latents, self.features))
        return replace(self, latents=latents, features=features)

    def text(self, slot: int) -> Entry:
        """The features [L, D] of one sample's caption."""
        assert self.features is not None
        start = sum(self.counts[:slot])
        return Entry(self.features[start : start + self.counts[slot]], self.lengths[slot])


def collate(samples: Sequence[Stored]) -> Stored:
    """Those of all ``samples``, which have the same parts, as one."""
    latents = [sample.latents for sample in samples if sample.latents is not None]
    features = [sample.features for sample in samples if sample.features is not None]
    return Stored(
        torch.cat(latents, dim=1) if latents else None,
        torch.cat(features) if features else None,
        [count for sample in samples for count in sample.counts],
        [length for sample in samples for length in sample.lengths],
    )


@dataclass
class Cache:
    """What the readers take in the place of images and captions.

    Attributes:
        latents, text: the tar of each shard; None for what is not cached.
        null: the null prompt's features [L, D], where text is cached.
    """

    latents: dict[ShardPath, Path] | None = None
    text: dict[ShardPath, Path] | None = None
    null: Entry | None = None

    def slim(self, place: Place) -> Place:
        """``place`` without its image, where no image has to be read."""
        return place if self.latents is None else replace(place, image=Span(0, 0))

    def read(self, place: Place, caption: str) -> Stored:
        """What is cached of one sample with that caption. Raises ValueError when it is not there, or is damaged; OSError when the file
        cannot be read."""
        latents, text = None, None
        if self.latents is not None:
            found = members_of(self.latents[place.shard]).get(picture_name(place.id, place.image_hash))
            if found is None:
                raise ValueError("is not in the cache")
            latents = found.values[:, None]
        if self.text is not None:
            members = members_of(self.text[place.shard])
            text = members.get(caption_name(caption))
            if text is None:
                raise ValueError("has a caption that is not in the cache, changed since: run scripts/cache.py again")
        if text is None:
            return Stored(latents, None, [], [])
        return Stored(latents, text.values, [len(text.values)], [text.length])


def members_of(path: Path) -> Members:
    """Those of a tar; the ones read last stay open."""
    found = os.stat(path)
    return _opened(path, found.st_dev, found.st_ino)


@lru_cache(_OPEN_FILES)
def _opened(path: Path, *identity: int) -> Members:
    return Members(path)  # ``identity`` (device, inode) tells one that was replaced


def folders_of(folder: Path) -> dict[str, Path]:
    """Of latents and text what ``folder`` holds: its subfolders of these names, or itself, where it has a key."""
    found = {kind: folder / kind for kind in KINDS if (folder / kind / KEY_FILE).is_file()}
    if not found and (folder / KEY_FILE).is_file():
        found = {kind: folder for kind in KINDS if read_key(folder).get("what") == kind}
    return found


def read_key(folder: Path) -> dict[str, Any]:
    """``key.json``: "what" it holds, "key" (everything that made it), and "about". Raises UserError for a damaged one, and for
    that of a cache in an earlier format."""
    path = folder / KEY_FILE
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if (version := stored["format_version"]) == FORMAT_VERSION:
            return dict(stored)
        reason = f"format_version {version}, and this repository reads {FORMAT_VERSION}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise UserError(
        f"{path} is no key of a cache ({reason}); delete {folder} and make it again: `python scripts/cache.py what={folder.name} "
        f"output={folder.parent}` with the other arguments of the training."
    )


def write_key(folder: Path, what: str, key: dict[str, Any], about: dict[str, Any]) -> None:
    """Write ``key.json``, whole or not at all."""
    content = {"format_version": FORMAT_VERSION, "what": what, "key": key, "about": about}
    write_atomic(folder / KEY_FILE, json.dumps(content, indent=1) + "\n", shared=True)


def file_names(index: SampleIndex, what: str) -> list[str]:
    """The name of each shard's file: its own name, and a hash of what the cached values are functions of besides the key.

    For latents these are ids (from which crops are drawn), and images' hashes and sizes; for text ids, and the captions' hashes and
    lengths.
    """
    starts = np.searchsorted(index.shard, np.arange(len(index.shards) + 1))
    names = []
    for shard, start, end in zip(index.shards, starts, starts[1:], strict=False):
        rows = slice(int(start), int(end))
        digest = hashlib.blake2b(np.ascontiguousarray(index.ids[rows]).tobytes(), digest_size=8)
        if what == "latents":
            for name in ("image_hash", "image_size", "width", "height"):
                digest.update(np.ascontiguousarray(index.table[name][rows]).tobytes())
        else:
            digest.update(np.ascontiguousarray(index.table["captions_hash"][rows]).tobytes())
            for kind, column in sorted(zip(index.kinds, index.words[rows].T, strict=True), key=lambda pair: pair[0]):
                if column.any():  # the columns of a joined index depend on the other shards, too
                    digest.update(kind.encode("utf-8", "surrogateescape") + np.ascontiguousarray(column).tobytes())
        stem = re.sub(r"[^\w.-]", "_", shard.stem)[:100]  # of a remote shard it may be anything
        names.append(f"{stem}-{digest.hexdigest()}.tar")
    return names
