"""WebDataset shards: write them, find them, list what a tar holds, read one sample by its place.

A shard is a plain tar of ``key.png`` (or another of IMAGE_EXTENSIONS) beside ``key.json`` (captions by kind and whatever else is
known) or ``key.txt`` (one caption, as img2dataset writes it); the key is the path up to the first dot of the file name, or to
the last where only that makes a sample.
Nothing in a shard is ever executed or unpacked to disk: members of any other kind, pickles among them, are passed over.
"""

from __future__ import annotations

import glob
import json
import math
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeAlias

from braceexpand import braceexpand
from webdataset.writer import TarWriter

from paradiffusion.atomic import atomic_file
from paradiffusion.data.captions import captions_of, parse_meta
from paradiffusion.data.remote import RemotePath, Storage, cached_copy, is_remote, list_remote, read_range
from paradiffusion.data.tables import told_by_table
from paradiffusion.errors import UserError

IMAGE_EXTENSIONS: Final = ("jpg", "jpeg", "png", "webp", "jfif")
# What a file is of its sample, by its extension in small letters: in tars, folders and streams. kohya's scripts write .caption.
PARTS: Final = {"json": "json", "txt": "text", "caption": "text", "text": "text", **dict.fromkeys(IMAGE_EXTENSIONS, "image")}
_MAX_SHARDS: Final = 1_000_000
_BLOCK: Final = 512
_MAX_MEMBER: Final = 1 << 30  # Larger files are no images; sizes are stored in 32 bits.
_OPEN_FILES: Final = 64
# The offset of a text that is no file of its own but a row of a table beside a folder's pictures.
IN_TABLE: Final = 1
# Samples that are put together at a time where a tar is read through: cat.seg.png may lie between cat.jpg and cat.txt.
_AT_ONCE: Final = 2
# Members of a sample that lie further apart are read one by one: what is between them would be read for nothing.
_MOST_BETWEEN: Final = 1 << 16


@dataclass
class RawSample:
    """One sample as it lies in a shard.

    ``key`` names it within its shard; ``image`` is the encoded file, ``extension`` one of ``IMAGE_EXTENSIONS``;
    ``meta`` is the content of ``key.json``, where ``meta["captions"]`` maps a kind ("short", "long", "clean") to text.
    """

    key: str
    image: bytes
    extension: str
    meta: dict[str, Any]


@dataclass(frozen=True, order=True)
class FolderPart:
    """Some of a folder's pictures, which stand for a shard. A sample's key is its path in ``root``, with the suffix."""

    root: Path
    number: int

    def __str__(self) -> str:
        return str(self.root)

    @property
    def name(self) -> str:
        """The folder's name, for people; the key says the rest."""
        return self.root.name

    stem = name


ShardPath: TypeAlias = Path | RemotePath | FolderPart


@dataclass
class Span:
    """A piece of a shard: ``size`` bytes from byte ``offset``; size 0 where there is none."""

    offset: int = 0
    size: int = 0


@dataclass(frozen=True)
class Place:
    """Where one sample lies, enough to read it without an index. ``id`` is stable: of its key and shard's name;
    ``image_hash`` is of the picture's bytes, 0 where it is not known."""

    shard: ShardPath
    key: str
    id: int
    extension: str
    image: Span
    json: Span
    text: Span
    image_hash: int = 0


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
    with atomic_file(path) as partial:
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
    shards: list[Path | RemotePath] = []
    missing: list[str] = []
    where = "check the URL, or name the shards by a range"
    if not (remote := is_remote(part)):
        part = os.path.expanduser(part.removeprefix("file://"))
        where = f"check the path (from {Path.cwd()}) and the range"
    names = [part] if not remote and os.path.exists(part) else _expand_braces(part, key)
    for name in names:
        path = Path(name)
        if remote:
            named = not any(mark in name for mark in "*[") and RemotePath(name).name.endswith(".tar")
            shards += [RemotePath(name, storage)] if named else list_remote(name, storage)
        elif path.is_dir():
            shards += path.glob("*.tar")
        elif path.exists():
            shards.append(path)
        elif glob.has_magic(name):
            shards += [Path(match) for match in glob.glob(name, recursive=True) if match.endswith(".tar")]
        else:
            missing.append(name)
    if not shards:
        raise UserError(f"{key}={part} matches no .tar file: {where}.")
    if missing:
        raise UserError(
            f"{key}={part} names {len(names)} shards, of which {len(missing)} are missing, "
            f"the first one {missing[0]}: correct the range or fetch what is missing."
        )
    return shards


def _expand_braces(part: str, key: str) -> list[str]:
    counts = [abs(int(last) - int(first)) + 1 for first, last in re.findall(r"(\d{1,18})\.\.(\d{1,18})", part)]
    if math.prod(counts) > _MAX_SHARDS:  # Asked first: the expansion of a slip of the keyboard would fill the memory.
        raise UserError(f"{key}={part} names over {_MAX_SHARDS} shards: check the range in the braces.")
    try:
        return list(braceexpand(part))
    except ValueError as error:
        raise UserError(f"{key}={part} has a brace without its partner: write {{00000..00099}}.tar.") from error


@dataclass
class TarEntry:
    """Where one sample lies in its tar. ``extension`` is "" while no image was found."""

    key: str
    extension: str = ""
    image: Span = field(default_factory=Span)
    json: Span = field(default_factory=Span)
    text: Span = field(default_factory=Span)
    is_txt: bool = False  # the text, which then goes before a .caption

    @property
    def whole(self) -> bool:
        """Whether there are a picture and a text or JSON."""
        return bool(self.extension and (self.json.size or self.text.size))


@dataclass
class Listing:
    """What one tar holds.

    ``entries`` are the samples with an image, in the order of the tar; ``without_image`` counts keys with only a JSON
    or text, ``stray`` files that are no part of a sample (other kinds, paths that leave the folder, repeated names).
    """

    entries: list[TarEntry]
    without_image: int
    stray: int
    truncated: bool


def list_tar(file: BinaryIO, name: str, at_most: int | None = None) -> Listing:
    """List the samples of a plain (uncompressed) tar, open as ``file``, without reading their contents.

    A tar that is cut short is listed up to the cut, with ``truncated`` set. Raises UserError, which calls it ``name``,
    when it is no plain tar. With ``at_most``, only so many samples from the start are listed.
    """
    found: dict[str, TarEntry] = {}
    stray, last = 0, ""
    truncated = False
    try:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if size < _BLOCK:
            return Listing([], 0, 0, truncated=True)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            try:
                for member in tar:
                    # A negative size, which a header can claim, would lead back to where reading was.
                    if member.size < 0 or member.offset_data + member.size > size:
                        truncated = True
                        break
                    if member.isdir():
                        continue
                    if at_most is not None and len(found) > at_most:
                        break
                    key = _add(found, member)
                    stray, last = stray + (not key), key or last
            except tarfile.ReadError:
                truncated = True
            # tarfile ends quietly at a header that it cannot read; a whole tar ends in a block of zeros.
            end = tar.offset
        if at_most is not None and len(found) > at_most:
            del found[last]  # The first that is over, of which only one member was seen.
        elif not truncated:
            file.seek(end)
            truncated = file.read(_BLOCK) != bytes(_BLOCK)
    except (OSError, tarfile.TarError, ValueError) as error:
        raise UserError(
            f"The shard {name} cannot be read as an uncompressed tar ({error}): unpack it if it is compressed, "
            "or leave it out of data.shards."
        ) from error
    if truncated and last and not found[last].whole:  # It may lack what came after the cut.
        del found[last]
    # Of a name with further dots both must be there: cat.seg.png is a mask of cat, img.v1.07.jpg with its .txt a sample.
    for key in [key for key in found if "." in key.rpartition("/")[2]]:
        entry = found[key]
        if not entry.whole:
            stray += sum(bool(span.size) for span in (entry.image, entry.json, entry.text))
            del found[key]
    entries = [entry for entry in found.values() if entry.extension]
    return Listing(entries, len(found) - len(entries), stray, truncated)


def read_through(file: BinaryIO) -> Iterator[RawSample]:
    """The samples of a tar, read once from front to back: files of one sample may have another one's first file between them.

    A sample without a picture has empty ``image``. Raises tarfile.TarError for what is no plain tar or is cut short, and what reading
    raises.
    """
    found: dict[str, TarEntry] = {}
    contents: dict[str, dict[int, bytes]] = {}

    def finished(key: str) -> Iterator[RawSample]:
        entry, held = found.pop(key), contents.pop(key)
        image, meta_bytes, text = (held.get(span.offset, b"") for span in (entry.image, entry.json, entry.text))
        if entry.whole or "." not in key.rpartition("/")[2]:  # as in ``list_tar``
            meta = parse_meta(meta_bytes) or {}
            yield RawSample(key, image, entry.extension, {**meta, "captions": captions_of(meta, text)})

    with tarfile.open(fileobj=file, mode="r|") as tar:
        for member in tar:
            if key := _add(found, member):
                content = tar.extractfile(member)
                assert content is not None  # of a plain file
                contents.setdefault(key, {})[member.offset_data] = content.read()
            if len(found) > _AT_ONCE:
                yield from finished(next(iter(found)))
    for key in list(found):
        yield from finished(key)


def split_member(name: str) -> tuple[str, str]:
    """A member's key and extension in small letters: up to the first dot, as WebDataset has it, or to the last where only that
    gives a part of a sample (img.v1.07.jpg); of a text behind a whole name (cat.jpg.txt) without the picture's ending."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    if extension.lower() not in PARTS and extension.lower().rpartition(".")[2] in PARTS:
        stem, _, extension = base.rpartition(".")
        name, _, ending = stem.rpartition(".")
        beside = PARTS[extension.lower()] != "image" and PARTS.get(ending.lower()) == "image"
        stem = name if beside else stem
    return folder + slash + stem, extension.lower()


def _add(found: dict[str, TarEntry], member: tarfile.TarInfo) -> str:
    """Put a member into its sample; its key, or "" for a stray file."""
    name = member.name.removeprefix("./")
    key, extension = split_member(name)
    folder, _, stem = key.rpartition("/")
    part = PARTS.get(extension)
    plain = member.isreg() and not member.issparse() and member.size < _MAX_MEMBER
    if not stem or not part or not plain or name.startswith("/") or ".." in folder.split("/"):
        return ""
    entry = found.setdefault(key, TarEntry(key))
    # Of two texts a .txt is read, as beside pictures in folders.
    if getattr(entry, part).size and not (part == "text" and extension == "txt" and not entry.is_txt):
        return ""
    if part == "text":
        entry.is_txt = extension == "txt"
    setattr(entry, part, Span(member.offset_data, member.size))
    entry.extension = extension if part == "image" else entry.extension
    return key


def read_place(place: Place) -> RawSample:
    """The sample that lies there; the captions in ``meta`` are cleaned, and those of a text file are of kind "short".

    Raises OSError when the shard is gone or shorter than its index says.
    """
    shard = place.shard
    if isinstance(shard, FolderPart):
        path = shard.root / place.key
        told = place.text.offset == IN_TABLE
        meta_bytes, text = read_beside(path, place.json.size > 0, place.text.size > 0 and not told)
        image = path.read_bytes() if place.image.size else b""
        if told:
            return RawSample(place.key, image, place.extension, {"captions": told_by_table(shard.root, place.key)[0]})
    elif not isinstance(shard, RemotePath):
        found = os.stat(shard)
        file = _opened(str(shard), found.st_dev, found.st_ino)
        image, meta_bytes, text = _read_spans(place, partial(read_at, file))
    elif (copy := cached_copy(shard)) is None:
        image, meta_bytes, text = _read_spans(place, lambda offset, size: read_range(shard, offset, size))
    else:
        with copy:  # Not kept open: what leaves the cache must free its room.
            image, meta_bytes, text = _read_spans(place, partial(read_at, copy))
    meta = parse_meta(meta_bytes) or {}
    return RawSample(place.key, image, place.extension, {**meta, "captions": captions_of(meta, text)})


def read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    """``size`` bytes of a file that several threads may read, from ``offset``."""
    if hasattr(os, "pread"):
        return os.pread(file.fileno(), size, offset)
    with open(file.name, "rb", buffering=0) as own:  # Windows
        own.seek(offset)
        return own.read(size)


def _read_spans(place: Place, read: Callable[[int, int], bytes]) -> tuple[bytes, bytes, bytes]:
    """Image, JSON and text of a tar: one read where they lie side by side, as they do unless somebody sorted by kind."""
    spans = (place.image, place.json, place.text)
    present = [span for span in spans if span.size]
    start = min((span.offset for span in present), default=0)
    end = max((span.offset + span.size for span in present), default=0)
    if end - start > sum(span.size for span in present) + _MOST_BETWEEN:
        pieces = [read(span.offset, span.size) if span.size else b"" for span in spans]
    else:
        whole = memoryview(read(start, end - start))
        pieces = [bytes(whole[span.offset - start :][: span.size]) if span.size else b"" for span in spans]
    if any(len(piece) < span.size for piece, span in zip(pieces, spans, strict=True)):
        raise OSError("the shard is shorter than when it was indexed")
    return pieces[0], pieces[1], pieces[2]


def names_beside(name: str) -> tuple[list[str], list[str]]:
    """How the JSON and the text of a picture ``name`` may be called, the first that is there being taken: cat.txt, cat.TXT,
    cat.Txt, cat.caption, cat.jpg.txt."""

    def names(kind: str) -> list[str]:
        endings = [extension for extension, part in PARTS.items() if part == kind]
        cased = [one for ending in endings for one in (ending, ending.upper(), ending.capitalize())]
        return [f"{stem}.{ending}" for stem in (name.rpartition(".")[0], name) for ending in cased]

    return names("json"), names("text")


def read_beside(path: Path, json: bool, text: bool) -> tuple[bytes, bytes]:
    """The JSON and the text beside a picture, those that are asked for. Raises OSError when one is not there."""

    def read(names: list[str]) -> bytes:
        for name in names[:-1]:
            with suppress(FileNotFoundError):
                return path.with_name(name).read_bytes()
        return path.with_name(names[-1]).read_bytes()

    jsons, texts = names_beside(path.name)
    return read(jsons) if json else b"", read(texts) if text else b""


@lru_cache(_OPEN_FILES)
def _opened(path: str, *identity: int) -> BinaryIO:
    """The local files read last stay open, since on network disks opening one costs as much as reading a sample of it.
    ``identity`` (device, inode) tells a file that was replaced; one that is pushed out closes when its last reader ends."""
    return open(path, "rb", buffering=0)
