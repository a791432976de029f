"""Colour profiles: telephones write Display P3, cameras Adobe RGB, printers' files inks; training sees sRGB.

A reader that passes over an embedded ICC profile shows such pictures dull. The conversion is LittleCMS's, through Pillow.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from PIL import Image, ImageCms

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
    if not data:
        return None
    found = _read(bytes(data))
    # Of a grey picture the profile may be that of the RGB it was made from; else the two must be about the same.
    if found is not None and (found.mode == "CMYK") != (image.mode == "CMYK"):
        return ColourProfile(found.name, found.mode, None)
    if found is not None and found.mode == "L" and not _is_grey(image):
        return ColourProfile(found.name, found.mode, None)
    return found


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


def _is_grey(image: Image.Image) -> bool:
    return image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I")


@lru_cache(maxsize=16)
def _read(data: bytes) -> ColourProfile | None:
    """None for sRGB, by what the profile does to colours and not by its name."""
    try:
        if len(data) > _MAX_PROFILE:
            raise ValueError("too large")
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        mode = _MODES[str(profile.profile.xcolor_space).strip()]
        transform = ImageCms.buildTransform(profile, _srgb(), mode, "RGB", _INTENT, _FLAGS)
    except Exception:  # a profile is somebody else's file: LittleCMS and Pillow raise several kinds
        return ColourProfile("", "RGB", None)
    return None if _is_srgb(mode, transform) else ColourProfile(_name(profile), mode, transform)


@lru_cache(maxsize=1)
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


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
