"""One file of a cache: what a frozen model made of the samples of one shard, unpadded, in one safetensors file.

Its tensors: ``values`` (flat, all entries one after another), ``offsets`` int64 [m + 1] into it, ``shapes`` int32 [m, k],
``names`` int64 [m] (what an entry is looked up by), ``lengths`` int32 [m] (of text: tokens before any cut), ``checksums``
int64 [m] (CRC-32 of an entry's name, length, shape and bytes) and ``bad`` int64 (names of samples that could not be read).
Entries are written as they come and read one by one, so that neither side ever holds a shard in memory.
"""

from __future__ import annotations

import json
import os
import struct
import time
import uuid
import zlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from paradiffusion.errors import UserError
from paradiffusion.randomness import seed_from

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CODES: Final = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.int32: "I32",
}  # fmt: skip
# The header stands first and says how long the values are, which is known last: room is kept for it.
_HEADER: Final = 2048
_ABANDONED_SECONDS: Final = 86400.0
_DISK_FULL: Final = "make room, then run the same command again: finished shards are kept"


def sample_name(id: int) -> int:
    """The name of a sample's entry: its id, as the signed integer of the same bits."""
    return int(np.uint64(id).astype(np.int64))


def caption_name(caption: str) -> int:
    """The name of a caption's entry: a hash of its text, so that one that has changed since is not found."""
    return seed_from("caption", caption)


@dataclass(frozen=True)
class Entry:
    """``values`` in the shape and dtype that they were stored in; ``length`` as stored beside them."""

    values: Tensor
    length: int


class EntryWriter:
    """Writes one file, under a temporary name until ``close``; within ``with``, nothing is left behind by an error.

    Args:
        dtype: of the values.
    Raises:
        UserError: when the disk is full or refuses.
    """

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        self.path, self.dtype = path, dtype
        # A name of its own: of two commands at work on one shard, the second would empty the first one's file under it.
        self._partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
        self._names: list[int] = []
        self._lengths: list[int] = []
        self._shapes: list[tuple[int, ...]] = []
        self._checksums: list[int] = []
        self._offsets = [0]
        try:
            self._file = open(self._partial, "wb")  # noqa: SIM115 - closed by __exit__
            self._file.seek(_HEADER)
        except OSError as error:
            raise self._refused(error) from None

    def __enter__(self) -> EntryWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self._file.close()  # writes what is left in its buffer
        except OSError as reason:
            if kind is None:
                raise self._refused(reason) from None
        finally:
            self._partial.unlink(missing_ok=True)

    def add(self, name: int, values: Tensor, length: int = 0) -> None:
        """Append one entry."""
        values = values.to(self.dtype)
        self._names.append(name)
        self._lengths.append(length)
        self._shapes.append(tuple(values.shape))
        self._checksums.append(checksum(name, length, values))
        self._offsets.append(self._offsets[-1] + values.numel())
        self._write(values)

    def close(self, bad: Iterable[int] = ()) -> None:
        """Add the tables, and give the file its name."""
        # Later tables lie on whole words only if the values end on one.
        missing = -self._offsets[-1] % 8
        self._write(torch.zeros(missing, dtype=self.dtype))
        width = len(self._shapes[0]) if self._shapes else 0
        tables = {
            "offsets": torch.tensor(self._offsets, dtype=torch.int64),
            "names": torch.tensor(self._names, dtype=torch.int64),
            "bad": torch.tensor(list(bad), dtype=torch.int64),
            "checksums": torch.tensor(self._checksums, dtype=torch.int64),
            "shapes": torch.tensor(self._shapes, dtype=torch.int32).reshape(len(self._shapes), width),
            "lengths": torch.tensor(self._lengths, dtype=torch.int32),
        }
        count = self._offsets[-1] + missing
        at = count * self.dtype.itemsize
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}, "values": _described(self.dtype, [count], 0, at)}
        for name, table in tables.items():
            self._write(table)
            size = table.numel() * table.dtype.itemsize
            header[name] = _described(table.dtype, list(table.shape), at, at + size)
            at += size
        text = json.dumps(header, separators=(",", ":")).encode()
        assert len(text) <= _HEADER - 8
        try:
            self._file.seek(0)
            self._file.write((_HEADER - 8).to_bytes(8, "little") + text.ljust(_HEADER - 8))
            self._file.flush()
            os.fsync(self._file.fileno())
            os.replace(self._partial, self.path)
        except OSError as error:
            raise self._refused(error) from None

    def _write(self, values: Tensor) -> None:
        try:
            self._file.write(_bytes_of(values))
        except OSError as error:
            raise self._refused(error) from None

    def _refused(self, error: OSError) -> UserError:
        return UserError(f"the cache's {self.path} could not be written ({error.strerror or error}); {_DISK_FULL}.")


def checksum(name: int, length: int, values: Tensor) -> int:
    """CRC-32 of an entry, by which a reader notices that a disk or a copy has changed it."""
    facts = struct.pack(f"<{2 + values.ndim}q", name, length, *values.shape)
    return zlib.crc32(_bytes_of(values), zlib.crc32(facts))


def _bytes_of(values: Tensor) -> memoryview:
    return values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _described(dtype: torch.dtype, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": _CODES[dtype], "shape": shape, "data_offsets": [start, end]}


class EntryFile:
    """Reads single entries of one file. Raises ValueError for a file that is damaged, OSError for one that is gone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            handle = safe_open(path, framework="pt")
            self._values = handle.get_slice("values")
            # Arrays, not dictionaries: a reader keeps many files open, each with thousands of entries.
            tables = {name: handle.get_tensor(name).numpy() for name in ("names", "offsets", "shapes", "lengths")}
            self._order = np.argsort(tables["names"])
            self._names = tables["names"][self._order]
            self._offsets, self._shapes, self._lengths = tables["offsets"], tables["shapes"], tables["lengths"]
            self.bad = frozenset(handle.get_tensor("bad").tolist())
            # Files of an earlier version have none.
            self._checksums = handle.get_tensor("checksums").numpy() if "checksums" in handle.keys() else None  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path.name} is damaged: {str(error).splitlines()[0]}") from None

    def __len__(self) -> int:
        return len(self._names)

    def names(self) -> frozenset[int]:
        """The names of all entries."""
        return frozenset(self._names.tolist())

    def get(self, name: int) -> Entry | None:
        """The entry of that name; None where there is none. Raises ValueError for one that is not as it was written."""
        at = int(np.searchsorted(self._names, name))
        if at == len(self._names) or self._names[at] != name:
            return None
        row = int(self._order[at])
        length = int(self._lengths[row])
        try:
            flat: Tensor = self._values[int(self._offsets[row]) : int(self._offsets[row + 1])]
            values = flat.reshape(self._shapes[row].tolist())
        except (SafetensorError, RuntimeError, IndexError, OverflowError):  # An offset or a shape that cannot be.
            raise self._damaged() from None
        if self._checksums is not None and checksum(name, length, values) != self._checksums[row]:
            raise self._damaged()
        return Entry(values, length)

    def _damaged(self) -> ValueError:
        return ValueError(f"has a damaged entry in the cache: delete {self.path.name} and run scripts/cache.py again")


def remove_abandoned(folder: Path) -> None:
    """Remove what killed writers have left in ``folder``: partial files that nobody has written to for a day."""
    for partial in folder.glob(".*.partial"):
        with suppress(OSError):  # Another process may do the same.
            if time.time() - partial.stat().st_mtime > _ABANDONED_SECONDS:
                partial.unlink()


def is_whole(path: Path) -> bool:
    """Whether the file is there as it was written; only its header is read, which says how long it must be."""
    try:
        with safe_open(path, framework="pt") as handle:
            return {"values", "names", "offsets", "shapes", "lengths", "bad"} <= set(handle.keys())
    except (OSError, SafetensorError):
        return False
