"""One image on its way into a shard: looked at before it is decoded, measured, hashed, and encoded anew where need be."""

from __future__ import annotations

import hashlib
import io
import math
import re
import warnings
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from PIL import Image, features

from paradiffusion.curation.building.places import Dropped
from paradiffusion.data.images import FORMATS, BadImage, ColourProfile, decode, has_alpha, profile_of

# Beyond what shards may hold: read here, and encoded anew.
READABLE: Final = (*FORMATS, "GIF", "BMP", "TIFF") + (("AVIF",) if features.check("avif") else ())
EXTENSIONS: Final = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jfif")
_STORED: Final = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
}  # a phone's MPO is a JPEG with more behind it
_NAMED: Final = {"jpeg": "jpg", "jfif": "jpg", "tif": "tiff"}
_ORIENTATION: Final = 0x0112
# What the report says of colour profiles, before their name.
PROFILE_NOTES: Final = ("kept, and converted when read, from ", "converted from ")
_FLAT: Final = 2.0  # standard deviation of grey, of 255


@dataclass(frozen=True)
class PictureRules:
    """What happens to an image; ``background`` is (red, green, blue), sides and pixels are those of the upright image."""

    min_side: int = 64
    max_side: int | None = None
    max_aspect: float | None = 4.0
    max_pixels: int = 100_000_000
    background: tuple[int, int, int] = (255, 255, 255)
    encode: str = "keep"
    quality: int = 95
    perceptual: bool = True


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


def parse_colour(text: str) -> tuple[int, int, int] | None:
    """(red, green, blue) of "white", "black" or "#rrggbb"; None for anything else."""
    named = {"white": (255, 255, 255), "black": (0, 0, 0)}
    if text in named:
        return named[text]
    if not re.fullmatch(r"#[0-9a-fA-F]{6}", text):
        return None
    red, green, blue = bytes.fromhex(text[1:])
    return red, green, blue


def prepare(data: bytes, name: str, rules: PictureRules) -> Picture:
    """Decode, check, hash and, where need be, encode an image; ``name`` is only compared with what the content is.

    Raises Dropped: "not an image", "too many pixels", "too small", "too elongated" (all three before any pixel is
    decoded) and "does not decode".
    """
    facts = _look(data)
    _check(facts, rules)
    try:
        image = decode(data, rules.max_pixels, rules.background, READABLE)
    except BadImage as error:
        raise Dropped("does not decode", str(error).removeprefix("does not decode: ")) from None
    # A PNG may carry its EXIF behind the pixels, where only decoding finds it.
    facts.turned = facts.turned or image.size != (facts.width, facts.height)
    notes = _notes(facts, name)
    pixels = hashlib.blake2b(np.asarray(image).data, digest_size=16, salt=b"%dx%d" % image.size)
    perceptual = _perceptual_hash(image) if rules.perceptual else None
    scale = min(1.0, (rules.max_side or math.inf) / max(image.size))
    if scale < 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
        notes.append("resized")
    keeps = rules.encode == "keep" and scale == 1 and _is_plain(facts)
    notes += _profile_notes(facts.profile, keeps)
    encoded, extension = (data, _STORED[facts.kind]) if keeps else _encode(image, facts, rules)
    if not keeps:
        notes.append(f"encoded as {extension}")
    return Picture(encoded, extension, image.width, image.height, keeps, pixels.digest(), perceptual, notes)


def _look(data: bytes) -> _Facts:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=READABLE) as image:
                turned = "exif" in image.info and image.getexif().get(_ORIENTATION, 1) in range(2, 9)
                return _Facts(
                    kind=str(image.format),
                    mode=image.mode,
                    width=image.width,
                    height=image.height,
                    turned=turned,
                    frames=1 if image.format == "MPO" else int(getattr(image, "n_frames", 1)),
                    see_through=has_alpha(image),
                    profile=profile_of(image),
                )
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


def _check(facts: _Facts, rules: PictureRules) -> None:
    short, long = sorted((facts.width, facts.height))
    size = f"{facts.width} x {facts.height}"
    if short < 1 or facts.width * facts.height > rules.max_pixels:
        raise Dropped("too many pixels", size)
    if short < rules.min_side:
        raise Dropped("too small", size)
    if rules.max_aspect is not None and long > rules.max_aspect * short:
        raise Dropped("too elongated", size)


def _is_plain(facts: _Facts) -> bool:
    """Whether a reader that knows only upright, opaque stills of 8 bits sees the same as ``decode``."""
    plain = facts.mode in ("RGB", "L") and not facts.turned and not facts.see_through
    return plain and facts.frames == 1 and facts.kind in _STORED


def _notes(facts: _Facts, name: str) -> list[str]:
    notes = []
    extension = name.rpartition(".")[2].lower() if "." in name.rpartition("/")[2] else ""
    if extension in EXTENSIONS and _NAMED.get(extension, extension) != _STORED.get(facts.kind, facts.kind.lower()):
        notes.append("wrong extension")
    for happened, note in (
        (facts.turned, "turned upright"),
        (facts.see_through, "transparency laid on the background"),
        (facts.mode == "P", "palette converted"),
        (facts.mode == "CMYK", "CMYK converted"),
        (facts.mode.startswith(("I", "F")), "16-bit grey converted"),
        (facts.frames > 1 and facts.kind == "TIFF", "first page of several"),
        (facts.frames > 1 and facts.kind != "TIFF", "first frame of an animation"),
    ):
        if happened:
            notes.append(note)
    return notes


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


def _encode(image: Image.Image, facts: _Facts, rules: PictureRules) -> tuple[bytes, str]:
    kind = rules.encode
    if kind == "keep":  # what came without loss stays without
        kind = "jpeg" if facts.kind in ("JPEG", "MPO", "WEBP", "AVIF") else "png"
    image.info.pop("icc_profile", None)  # the pixels are sRGB's, which is what none means
    buffer = io.BytesIO()
    if kind == "png":
        image.save(buffer, "png", compress_level=6)
    elif kind == "webp":
        image.save(buffer, "webp", quality=rules.quality, method=4)
    else:
        # From 90 on colour is worth its bytes: edges of saturated areas fray in 4:2:0.
        image.save(buffer, "jpeg", quality=rules.quality, subsampling=0 if rules.quality >= 90 else 2, optimize=True)
    return buffer.getvalue(), {"jpeg": "jpg"}.get(kind, kind)
