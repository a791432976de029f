"""The first pass over a chunk of items: captions cleaned; images checked before they are decoded, hashed, encoded anew where need be.

A chunk leaves four files: ``.bin`` (images that had to be fetched or encoded), ``.jsonl`` (a line for each item that may
become a sample), ``.npy`` (what choosing among those lines needs) and last ``.json`` (what was dropped and mended), which
says that the chunk is done.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import uuid
import warnings
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from PIL import Image, features

from paradiffusion.curation.building.cleaning import clean_caption
from paradiffusion.curation.building.items import Item
from paradiffusion.curation.building.places import EXTENSIONS, Dropped, Reader
from paradiffusion.data.images import FORMATS, BadImage, ColourProfile, decode, has_alpha, profile_of
from paradiffusion.randomness import seed_from, uniform
from paradiffusion.runner import Tell

if TYPE_CHECKING:
    from paradiffusion.curation.building.build_options import BuildOptions

# Beyond what shards may hold: read here, and encoded anew.
READABLE: Final = (*FORMATS, "GIF", "BMP", "TIFF") + (("AVIF",) if features.check("avif") else ())
# A phone's MPO is a JPEG with more behind it.
_STORED: Final = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_NAMED: Final = {"jpeg": "jpg", "jfif": "jpg", "tif": "tiff"}
_ORIENTATION: Final = 0x0112
# What the report says of colour profiles, before their name.
PROFILE_NOTES: Final = ("kept, and converted when read, from ", "converted from ")
_FLAT: Final = 2.0  # standard deviation of grey, of 255


@dataclass
class Picture:
    """An image as it will lie in a shard.

    ``is_original`` says that ``data`` are the bytes that came in. ``pixels`` is a hash of the upright RGB pixels as they
    came in, ``perceptual`` imagehash's pHash (None: not asked for, or the image is too flat to have one), ``notes`` what
    was done to it.
    """

    data: bytes
    extension: str
    width: int
    height: int
    is_original: bool
    pixels: bytes
    perceptual: int | None
    notes: list[str] = field(default_factory=list)


@dataclass
class _Facts:
    kind: str
    mode: str
    width: int
    height: int
    turned: bool
    frames: int
    see_through: bool
    profile: ColourProfile | None


def parse_colour(text: str) -> tuple[int, int, int]:
    """(red, green, blue) of "white", "black" or "#rrggbb"; ValueError for anything else."""
    named = {"white": (255, 255, 255), "black": (0, 0, 0)}
    if text in named:
        return named[text]
    if not re.fullmatch(r"#[0-9a-fA-F]{6}", text):
        raise ValueError(text)
    red, green, blue = bytes.fromhex(text[1:])
    return red, green, blue


def prepare(data: bytes, name: str, options: BuildOptions) -> Picture:
    """Decode, check, hash and, where need be, encode an image; ``name`` is only compared with what the content is.

    Raises Dropped: "not an image", "too many pixels", "too small", "too elongated" (all three before any pixel is
    decoded) and "does not decode".
    """
    facts = _look(data)
    _check(facts, options)
    try:
        image = decode(data, options.max_pixels, parse_colour(options.background), READABLE)
    except BadImage as error:
        raise Dropped("does not decode", str(error).removeprefix("does not decode: ")) from None
    # A PNG may carry its EXIF behind the pixels, where only decoding finds it.
    facts.turned = facts.turned or image.size != (facts.width, facts.height)
    notes = _notes(facts, name)
    pixels = hashlib.blake2b(np.asarray(image).data, digest_size=16, salt=b"%dx%d" % image.size)
    perceptual = _perceptual_hash(image) if options.distance() is not None else None
    scale = min(1.0, (options.max_side or math.inf) / max(image.size))
    if scale < 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
        notes.append("resized")
    # Whether a reader that knows only upright, opaque stills of 8 bits sees the same as ``decode``.
    plain = facts.mode in ("RGB", "L") and not facts.turned and not facts.see_through
    plain = plain and facts.frames == 1 and facts.kind in _STORED
    keeps = options.encode == "keep" and scale == 1 and plain
    notes += _profile_notes(facts.profile, keeps)
    encoded, extension = (data, _STORED[facts.kind]) if keeps else _encode(image, facts, options)
    if not keeps:
        notes.append(f"encoded as {extension}")
    return Picture(encoded, extension, image.width, image.height, keeps, pixels.digest(), perceptual, notes)


def _look(data: bytes) -> _Facts:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=READABLE) as image:
                turned = "exif" in image.info and image.getexif().get(_ORIENTATION, 1) in range(2, 9)
                frames = 1 if image.format == "MPO" else int(getattr(image, "n_frames", 1))
                kind, alpha, profile = str(image.format), has_alpha(image), profile_of(image)
                return _Facts(kind, image.mode, image.width, image.height, turned, frames, alpha, profile)
    except Image.DecompressionBombError as error:  # Pillow looks at the header, and has a limit of its own
        size = re.search(r"\d+ pixels", str(error))
        raise Dropped("too many pixels", size.group() if size else "") from None
    except Exception:  # as in data.images: Pillow's plugins raise nearly anything
        raise Dropped("not an image", _kind_of(data)) from None


def _kind_of(data: bytes) -> str:
    """A guess, for the report, at what the bytes are instead."""
    head = data[:512].lower()
    if head.lstrip().startswith((b"<!doctype html", b"<html")):
        return "a web page"
    if head.lstrip().startswith((b"<svg", b"<?xml")):
        return "SVG or XML"
    if head[4:12] in (b"ftypheic", b"ftypheix", b"ftypheim", b"ftypheis", b"ftyphevc", b"ftypmif1", b"ftypmsf1"):
        return "HEIC: convert it first, with heif-convert of libheif"
    if head.startswith((b"\xff\x0a", b"\0\0\0\x0cjxl ")):
        return "JPEG XL: convert it first, with djxl of libjxl"
    if head[4:12] in (b"ftypavif", b"ftypavis"):
        return "AVIF, which this Pillow does not read: install a newer one"
    if head[20:24] == b"jp2 " or data.startswith(b"\xff\x4f\xff\x51"):
        return "JPEG 2000: convert it first"
    return "text" if head and b"\0" not in head and head.isascii() else "unknown or damaged"


def _check(facts: _Facts, options: BuildOptions) -> None:
    short, long = sorted((facts.width, facts.height))
    size = f"{facts.width} x {facts.height}"
    if short < 1 or facts.width * facts.height > options.max_pixels:
        raise Dropped("too many pixels", size)
    if short < options.min_side:
        raise Dropped("too small", size)
    if options.max_aspect is not None and long > options.max_aspect * short:
        raise Dropped("too elongated", size)


def _notes(facts: _Facts, name: str) -> list[str]:
    extension = name.rpartition(".")[2].lower() if "." in name.rpartition("/")[2] else ""
    wrong = _NAMED.get(extension, extension) != _STORED.get(facts.kind, facts.kind.lower())
    found = (
        (extension in EXTENSIONS and wrong, "wrong extension"),
        (facts.turned, "turned upright"),
        (facts.see_through, "transparency laid on the background"),
        (facts.mode == "P", "palette converted"),
        (facts.mode == "CMYK", "CMYK converted"),
        (facts.mode.startswith(("I", "F")), "16-bit grey converted"),
        (facts.frames > 1 and facts.kind == "TIFF", "first page of several"),
        (facts.frames > 1 and facts.kind != "TIFF", "first frame of an animation"),
    )
    return [note for happened, note in found if happened]


def _profile_notes(profile: ColourProfile | None, keeps: bool) -> list[str]:
    if profile is None:
        return []
    if profile.transform is None:
        return ["unusable colour profile passed over"]
    # Bytes that are kept keep their profile, which training's decoder reads as this one does.
    kept, anew = PROFILE_NOTES
    return [f"{kept}{profile.name}" if keeps else f"{anew}{profile.name}"]


def _perceptual_hash(image: Image.Image) -> int | None:
    import imagehash  # brings SciPy: half a second that only needs it who asks for near-duplicates

    grey = image.convert("L").resize((32, 32), Image.Resampling.LANCZOS)
    if np.asarray(grey, dtype=np.float32).std() < _FLAT:
        return None  # the hash of an even area is its noise, and would make all of them one
    return int(str(imagehash.phash(grey)), 16)


def _encode(image: Image.Image, facts: _Facts, options: BuildOptions) -> tuple[bytes, str]:
    kind = options.encode
    if kind == "keep":  # what came without loss stays without
        kind = "jpeg" if facts.kind in ("JPEG", "MPO", "WEBP", "AVIF") else "png"
    image.info.pop("icc_profile", None)  # the pixels are sRGB's, which is what none means
    buffer = io.BytesIO()
    if kind == "png":
        image.save(buffer, "png", compress_level=6)
    elif kind == "webp":
        image.save(buffer, "webp", quality=options.quality, method=4)
    else:
        # From 90 on colour is worth its bytes: edges of saturated areas fray in 4:2:0.
        image.save(buffer, "jpeg", quality=options.quality, subsampling=0 if options.quality >= 90 else 2, optimize=True)
    return buffer.getvalue(), {"jpeg": "jpg"}.get(kind, kind)


EXAMPLES: Final = 5
ROW: Final = np.dtype(
    [("offset", "<i8"), ("length", "<u4"), ("key", "<u8"), ("pixels", "<u8", (2,)), ("perceptual", "<u8"),
     ("has_perceptual", "?"), ("is_val", "?"), ("width", "<i4"), ("height", "<i4"), ("bytes", "<u4")]
)  # fmt: skip


@dataclass
class Tally:
    """Counts of a chunk or of all: reasons with examples, and notes."""

    items: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    captions_dropped: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str, example: str) -> None:
        """Count one dropped item."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        shown = self.examples.setdefault(reason, [])
        if len(shown) < EXAMPLES:
            shown.append(example)

    def note(self, notes: list[str]) -> None:
        """Count what was mended on one item, each once."""
        for note in dict.fromkeys(notes):
            self.notes[note] = self.notes.get(note, 0) + 1

    def add(self, other: Tally) -> None:
        """Add what comes after."""
        self.items += other.items
        for mine, theirs in ((self.dropped, other.dropped), (self.notes, other.notes),
                             (self.captions_dropped, other.captions_dropped)):  # fmt: skip
            for name, count in theirs.items():
                mine[name] = mine.get(name, 0) + count
        for name, shown in other.examples.items():
            self.examples[name] = (self.examples.get(name, []) + shown)[:EXAMPLES]


def make_chunk(name: str, tell: Tell, work: Path, options: BuildOptions) -> Tally:
    """Do the first pass over one chunk of items in ``work``; a chunk that is done already is left alone."""
    result = work / "chunks" / name
    with suppress(FileNotFoundError, ValueError):
        done = Tally(**json.loads(result.with_suffix(".json").read_text(encoding="utf-8")))
        tell(found=done.items)
        return done
    tally, rows, at = Tally(), [], 0
    own = uuid.uuid4().hex  # on a cluster two processes may have one number
    names = {suffix: result.with_suffix(f"{suffix}.{own}") for suffix in (".bin", ".jsonl", ".npy", ".json")}
    try:
        with open(names[".bin"], "wb") as staged, open(names[".jsonl"], "wb") as lines:
            for item, captions, found in _fetched(work / "items" / f"{name}.jsonl", options, tally):
                tally.items += 1
                tell(1)
                try:
                    if isinstance(found, Dropped):
                        raise found
                    picture = prepare(found, item.name.removesuffix(")"), options)
                except Dropped as drop:
                    tally.drop(drop.reason, f"{item.name}: {drop.detail}" if drop.detail else item.name)
                    tell(**{drop.reason: 1})
                    continue
                tally.note(item.notes + picture.notes)
                line = _line(item, captions, picture, staged.tell())
                if line["at"] is not None:
                    staged.write(picture.data)
                encoded = json.dumps(line).encode() + b"\n"
                lines.write(encoded)
                rows.append(_row(item, picture, at, len(encoded), options.val))
                at += len(encoded)
        with open(names[".npy"], "wb") as file:
            np.save(file, np.array(rows, ROW), allow_pickle=False)
        names[".json"].write_text(json.dumps(asdict(tally)), encoding="utf-8")
        for suffix, partial in names.items():  # .json last: it says that the others are whole
            os.replace(partial, result.with_suffix(suffix))
        return tally
    finally:
        for partial in names.values():
            partial.unlink(missing_ok=True)


def _line(item: Item, captions: dict[str, str], picture: Picture, offset: int) -> dict[str, Any]:
    """What the second pass needs of a sample. ``at`` is its image in the .bin, or None: read ``place`` again."""
    source = item.place.path if item.place.kind == "url" else item.name
    sources = {kind: item.sources[kind] for kind in captions if kind in item.sources}
    size = {"width": picture.width, "height": picture.height}
    meta: dict[str, Any] = {"captions": captions, "caption_sources": sources, **size, "source": source}
    if item.extra:
        meta["extra"] = item.extra
    # What can be read again at no cost need not be staged.
    again = picture.is_original and item.place.kind in ("file", "span")
    return {
        "name": item.name,
        "key": item.key,
        "extension": picture.extension,
        "at": None if again else [offset, len(picture.data)],
        "place": asdict(item.place) if again else None,
        "crc": zlib.crc32(picture.data),
        # Names of files may hold bytes, and JSON escapes, that are no text; a shard's JSON is.
        "meta": json.loads(json.dumps(meta, ensure_ascii=False).encode("utf-8", "replace")),
    }


def _row(item: Item, picture: Picture, offset: int, length: int, val: float) -> tuple[Any, ...]:
    is_val = item.split == "val" or (item.split == "" and uniform("val", item.key) < val)
    pixels = tuple(np.frombuffer(picture.pixels, "<u8").tolist())
    perceptual = picture.perceptual
    return (
        offset, length, seed_from(item.key), pixels, perceptual or 0, perceptual is not None, is_val, picture.width,
        picture.height, len(picture.data),
    )  # fmt: skip


def _captions(item: Item, options: BuildOptions, tally: Tally) -> dict[str, str]:
    """The cleaned captions by kind; Dropped, with the first caption's problem, when none is left and one is needed."""
    kept: dict[str, str] = {}
    problems: list[tuple[str, str]] = []
    for kind, raw in item.captions.items():
        cleaned = clean_caption(raw, options.min_words, options.max_words)
        item.notes += [f"caption: {note}" for note in cleaned.mended]
        if cleaned.problem:
            problems.append((cleaned.problem, raw))
        else:
            kept[kind] = cleaned.text
    if not kept and options.uncaptioned == "drop":
        problem, raw = problems[0] if problems else ("no caption", "")
        raise Dropped("no caption" if problem == "empty caption" else problem, repr(raw[:80]) if raw.strip() else "")
    for problem, _ in problems:
        tally.captions_dropped[problem] = tally.captions_dropped.get(problem, 0) + 1
    return kept


# One for all chunks of a process: a table's cells are read on from the last place, and not from the start again.
_reader = lru_cache(maxsize=1)(Reader)


def _fetched(items: Path, options: BuildOptions, tally: Tally) -> Iterator[tuple[Item, dict[str, str], bytes | Dropped]]:
    """Items in order with their captions and bytes. URLs are fetched some ahead, by threads; captions come first, so that
    nothing is fetched for an item that has none."""
    reader = _reader(options.fetch_limits())

    def read(item: Item) -> bytes | Dropped:
        try:
            return reader.read(item.place)
        except Dropped as drop:
            return drop

    waiting: deque[tuple[Item, dict[str, str], Future[bytes | Dropped] | Dropped | None]] = deque()

    def first() -> tuple[Item, dict[str, str], bytes | Dropped]:
        item, captions, found = waiting.popleft()
        if found is None:
            return item, captions, read(item)
        return item, captions, found.result() if isinstance(found, Future) else found

    with ThreadPoolExecutor(options.threads) as pool, open(items, encoding="utf-8") as lines:
        for line in lines:
            item = Item.from_json(line)
            captions: dict[str, str] = {}
            found: Future[bytes | Dropped] | Dropped | None = None
            try:
                if item.split == "test":
                    raise Dropped("test split")
                if item.place.kind != "none":  # else the missing image is the reason to tell
                    captions = _captions(item, options, tally)
                    found = pool.submit(read, item) if item.place.kind == "url" else None
            except Dropped as drop:
                found = drop
            waiting.append((item, captions, found))
            if len(waiting) >= 2 * options.threads:
                yield first()
        while waiting:
            yield first()
