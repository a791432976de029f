"""Images: decode what the web holds, choose an aspect bucket, resize and crop into it."""

from __future__ import annotations

import io
import math
import warnings
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final

import numpy as np
from PIL import Image, ImageCms, ImageOps

from paradiffusion.config import DataConfig
from paradiffusion.errors import UserError
from paradiffusion.randomness import uniform

Bucket = tuple[int, int]
"""(height, width) in pixels."""

MAX_PIXELS: Final = 100_000_000
FORMATS: Final = ("JPEG", "PNG", "WEBP")
"""What a shard may hold, by Pillow's names."""
_ORIENTATION: Final = 0x0112
# In an image's info: its width and height where they are no whole pixels, after decoding at a fraction of its size.
_EXTENT: Final = "extent"


class BadImage(ValueError):
    """The bytes are no image that can be used; the message says why in a few words."""


def decode(
    data: bytes, max_pixels: int = MAX_PIXELS, background: tuple[int, int, int] = (255, 255, 255),
    formats: tuple[str, ...] = FORMATS, cover: Bucket | None = None,
) -> Image.Image:  # fmt: skip
    """Decode JPEG, PNG or WebP (or others of Pillow's ``formats``) into an upright RGB image.

    EXIF rotation is applied, transparency laid on ``background``, palettes, CMYK, 16-bit greys and colours of an embedded
    profile converted to sRGB, and of an animation the first frame is taken. Raises BadImage for anything that does not
    decode or has over ``max_pixels``.

    With ``cover``, what ``to_array`` is going to make of it, a far larger JPEG is decoded at 1/2, 1/4 or 1/8 of its size,
    which its blocks allow, but never below twice the size to which it is resized then: the same picture to the eye
    (measured: 42 to 49 dB), several times as fast, and the same each time.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=formats) as image:
                if image.width * image.height > max_pixels:
                    raise BadImage(f"{image.width} x {image.height} pixels, over the limit of {max_pixels}")
                if cover is not None:
                    _decode_smaller(image, cover)
                image.load()
                ImageOps.exif_transpose(image, in_place=True)  # A copy would cost a tenth of the decoding.
                return _to_rgb(image, background)
    except BadImage:
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything on bytes that are not what they claim to be.
        raise BadImage(f"does not decode: {type(error).__name__}") from error


def probe_size(data: bytes) -> tuple[int, int]:
    """(width, height) of an encoded image as it stands upright; (0, 0) if that cannot be told.

    The first bytes of a JPEG or PNG are enough, unless its metadata is large; WebP needs all.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                # Only with EXIF at hand: to look for it, a PNG would decode its pixels.
                turned = "exif" in image.info and image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
                return (image.height, image.width) if turned else (image.width, image.height)
    except Exception:  # As in decode(), which tells the error when the sample is read.
        return 0, 0


def _decode_smaller(image: Image.Image, cover: Bucket) -> None:
    """Ask for a smaller decoding, where the format has one."""
    if image.format != "JPEG":
        return
    orientation, (width, height) = image.getexif().get(_ORIENTATION, 1), image.size
    tall, wide = cover[::-1] if orientation in (5, 6, 7, 8) else cover
    scale = 2 * max(wide / width, tall / height)
    # Turned round, a last column that is partly filled would come first.
    if scale > 0.5 or (orientation != 1 and (width % 8 or height % 8)):
        return
    drafted = image.draft(None, (math.ceil(width * scale), math.ceil(height * scale)))
    if drafted is not None and orientation == 1:
        image.info[_EXTENT] = drafted[1][2:]


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise BadImage("32-bit values, of which nobody says what is white")
    profile = profile_of(image)
    if image.mode.startswith("I"):  # 16-bit greys: Pillow's own conversion would clip them to white.
        grey = np.clip(np.asarray(image, dtype=np.int64) >> 8, 0, 255).astype(np.uint8)
        image = Image.fromarray(grey)
    if profile is not None:
        image = to_srgb(image, profile)
    if has_alpha(image):
        with_alpha = image.convert("RGBA")
        opaque = Image.new("RGBA", image.size, (*background, 255))
        return Image.alpha_composite(opaque, with_alpha).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def make_buckets(resolution: int, multiple: int, max_aspect: float) -> list[Bucket]:
    """The sizes (height, width) that batches may have, sorted from tall to wide.

    Sides are multiples of ``multiple`` pixels, areas near ``resolution ** 2`` and at most 10 % over it, long to short
    side at most ``max_aspect``. The square is among them. One bucket for each short side, since finer ones would only
    spread the data over more batches. Raises UserError when the square is no multiple.
    """
    if multiple < 1 or resolution < multiple or resolution % multiple:
        raise UserError(
            f"resolution={resolution} is not a multiple of {multiple} pixels, which the model needs: "
            f"try {max(multiple, round(resolution / max(multiple, 1)) * multiple)}."
        )
    area = resolution * resolution
    buckets: set[Bucket] = {(resolution, resolution)}
    for short in range(resolution - multiple, 0, -multiple):
        long = round(area / short / multiple) * multiple
        if short * long > 1.1 * area:
            long -= multiple
        if long > max_aspect * short:
            break
        if short * long >= 0.8 * area:
            buckets |= {(short, long), (long, short)}
    return sorted(buckets, key=lambda bucket: bucket[1] / bucket[0])


def buckets_of(data: DataConfig) -> list[Bucket]:
    """The buckets of ``data.resolution`` and of each of ``data.lower_resolutions``, from tall to wide."""
    levels = [data.resolution, *data.lower_resolutions]
    buckets = [bucket for level in levels for bucket in make_buckets(level, data.bucket_multiple, data.max_aspect)]
    return sorted(dict.fromkeys(buckets), key=lambda bucket: (bucket[1] / bucket[0], bucket[0]))


def assign_buckets(width: np.ndarray, height: np.ndarray, buckets: list[Bucket]) -> np.ndarray:
    """Index of the bucket whose aspect is nearest on a log scale: int16 with the shape of ``width``.

    Where ``buckets`` are of several resolutions, each of which has its square, an image goes to the largest that has no
    more pixels than it, else to the lowest. Unknown sizes (0) are taken as square.
    """
    sides = np.array(sorted(tall for tall, wide in buckets if tall == wide))
    if len(sides) < 2:
        return _nearest_aspect(width, height, buckets)
    # Areas of one resolution differ by less than those of two (see DataConfig.check).
    areas = np.array([tall * wide for tall, wide in buckets])
    level_of = np.abs(np.log(areas[:, None] / sides**2)).argmin(axis=1)
    level = np.searchsorted(sides**2, width.astype(np.int64) * height, side="right") - 1
    level = np.maximum(level, 0)
    assigned = np.zeros(len(level), np.int16)
    for number in range(len(sides)):
        members = np.flatnonzero(level_of == number)
        inside = level == number
        nearest = _nearest_aspect(width[inside], height[inside], [buckets[member] for member in members])
        assigned[inside] = members.astype(np.int16)[nearest]
    return assigned


def fitted(width: np.ndarray, height: np.ndarray, tall: Any, wide: Any) -> tuple[np.ndarray, np.ndarray]:
    """Of images of known sizes in buckets of ``tall`` x ``wide``: the share of each one's area that is cropped away, and by how much
    its sides are enlarged (below 1: made smaller)."""
    width, height = width.astype(np.float64), height.astype(np.float64)
    ratio = (width / height) / (wide / tall)
    return 1 - np.minimum(ratio, 1 / ratio), np.maximum(wide / width, tall / height)


def _nearest_aspect(width: np.ndarray, height: np.ndarray, buckets: list[Bucket]) -> np.ndarray:
    logs = np.array([math.log(wide / tall) for tall, wide in buckets])
    order = np.argsort(logs, kind="stable")
    between = (logs[order][1:] + logs[order][:-1]) / 2
    known = (width > 0) & (height > 0)
    aspect = np.log(np.where(known, width, 1) / np.where(known, height, 1))
    return order.astype(np.int16)[np.searchsorted(between, aspect)]


def to_array(image: Image.Image, bucket: Bucket, crop_seed: int) -> np.ndarray:
    """Resize ``image`` to cover ``bucket`` and crop it there: uint8 [H, W, 3].

    Resampling is antialiased (Lanczos). The crop's place is a function of ``crop_seed`` alone: rerunning, caching or
    another number of processes see the same picture.
    """
    tall, wide = bucket
    width, height = image.info.get(_EXTENT, image.size)
    scale = max(wide / width, tall / height)
    crop_width, crop_height = min(wide / scale, width), min(tall / scale, height)
    left = uniform("crop left", int(crop_seed)) * (width - crop_width)
    top = uniform("crop top", int(crop_seed)) * (height - crop_height)
    box = (left, top, min(left + crop_width, width), min(top + crop_height, height))
    return np.asarray(image.resize((wide, tall), Image.Resampling.LANCZOS, box=box), dtype=np.uint8)


# Colour profiles: telephones write Display P3, cameras Adobe RGB, printers' files inks; training sees sRGB. A reader that
# passes over an embedded ICC profile shows such pictures dull. The conversion is LittleCMS's, through Pillow.

_MAX_PROFILE: Final = 1 << 23  # bytes; those of inks, the largest, have about 3 MB. Our choice.
_MAX_NAME: Final = 40
# 8-bit levels by which a profile may differ from sRGB and be taken for it: its many editions round their curves differently.
_SAME: Final = 2
_MODES: Final = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
# What photo editors convert with: colours both can show stay as they are, and black stays black.
_INTENT: Final = ImageCms.Intent.RELATIVE_COLORIMETRIC
_FLAGS: Final = ImageCms.Flags.BLACKPOINTCOMPENSATION
_TRANSPARENT: Final = ("RGBA", "LA", "PA", "La", "RGBa")


@dataclass(frozen=True)
class ColourProfile:
    """An embedded profile that is not sRGB's: its ``name``, the Pillow ``mode`` whose values it is about, and the
    ``transform`` of these to sRGB; None where the profile is damaged or about other colours than the image has."""

    name: str
    mode: str
    transform: ImageCms.ImageCmsTransform | None


def profile_of(image: Image.Image) -> ColourProfile | None:
    """The colour profile that ``image`` carries; None for none and for sRGB."""
    data = image.info.get("icc_profile")
    found = _read(bytes(data)) if data else None
    if found is None:
        return None
    # Of a grey picture the profile may be that of the RGB it was made from; else the two must be about the same.
    is_grey = image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I")
    fits = (found.mode == "CMYK") == (image.mode == "CMYK") and (is_grey or found.mode != "L")
    return found if fits else replace(found, transform=None)


def has_alpha(image: Image.Image) -> bool:
    """Whether some of ``image`` may be transparent."""
    return image.mode in _TRANSPARENT or "transparency" in image.info


def to_srgb(image: Image.Image, profile: ColourProfile) -> Image.Image:
    """``image`` as RGB, or RGBA where it has transparency, in sRGB; as it is where the profile is of no use."""
    if profile.transform is None:
        return image
    alpha = image.convert("RGBA").getchannel("A") if has_alpha(image) else None
    plain = image.convert({"RGBa": "RGBA", "La": "LA"}.get(image.mode, image.mode)).convert(profile.mode)
    converted = ImageCms.applyTransform(plain, profile.transform)
    assert converted is not None  # in place it would be
    converted.info = {name: value for name, value in image.info.items() if name not in ("icc_profile", "transparency")}
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


@lru_cache(maxsize=16)
def _read(data: bytes) -> ColourProfile | None:
    """None for sRGB, by what the profile does to colours and not by its name."""
    try:
        if len(data) > _MAX_PROFILE:
            raise ValueError("too large")
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        mode = _MODES[str(profile.profile.xcolor_space).strip()]
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB", _INTENT, _FLAGS)
    except Exception:  # a profile is somebody else's file: LittleCMS and Pillow raise several kinds
        return ColourProfile("", "RGB", None)
    return None if _is_srgb(mode, transform) else ColourProfile(_name(profile), mode, transform)


def _is_srgb(mode: str, transform: ImageCms.ImageCmsTransform) -> bool:
    if mode == "CMYK":
        return False
    if mode == "L":
        probe = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    else:
        levels = np.linspace(0, 255, 9).round().astype(np.uint8)
        probe = Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3))
    converted = ImageCms.applyTransform(probe, transform)
    assert converted is not None
    before, after = np.asarray(probe.convert("RGB"), np.int16), np.asarray(converted, np.int16)
    return int(np.abs(after - before).max()) <= _SAME


def _name(profile: ImageCms.ImageCmsProfile) -> str:
    try:
        told = ImageCms.getProfileDescription(profile)
    except ImageCms.PyCMSError:
        told = ""
    plain = "".join(character if character.isprintable() else " " for character in told)
    return " ".join(plain.split())[:_MAX_NAME] or "a profile without a name"
