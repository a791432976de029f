"""Colour profiles: what a picture's numbers mean is read before they are trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from colour_profiles import ADOBE_RGB, DISPLAY_P3, grey_profile, ink_profile, rgb_profile
from data_fixtures import encoded, picture
from PIL import Image, ImageCms

from paradiffusion.curation.building.build import build
from paradiffusion.curation.building.build_options import BuildOptions
from paradiffusion.data.images import decode, to_array
from paradiffusion.data.index import load_index, read_sample
from paradiffusion.data.shards import RawSample, expand_shards

P3, ADOBE = rgb_profile(*DISPLAY_P3), rgb_profile(*ADOBE_RGB)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SIZE = (96, 80)


def shown(image: Image.Image, kind: str = "PNG", **options: Any) -> tuple[int, ...]:
    """The first pixel as training sees it."""
    result = decode(encoded(image, kind, **options), formats=("JPEG", "PNG", "WEBP", "TIFF"))
    assert result.mode == "RGB" and "icc_profile" not in result.info
    return tuple(result.getpixel((0, 0)))


def near(one: tuple[int, ...], other: tuple[int, ...], by: int = 3) -> bool:
    return all(abs(a - b) <= by for a, b in zip(one, other, strict=True))


# What the definitions of the two spaces give, computed by hand: linear light through the primaries into sRGB's.
@pytest.mark.parametrize(("profile", "colour"), [(P3, (220, 0, 51)), (ADOBE, (233, 24, 58))])
def test_wide_colours_come_out_as_they_were_seen(profile: bytes, colour: tuple[int, int, int]) -> None:
    dull = Image.new("RGB", SIZE, (200, 30, 60))
    assert near(shown(dull, icc_profile=profile), colour)
    assert near(shown(dull, "WEBP", icc_profile=profile, lossless=True), colour)
    assert near(shown(dull, "JPEG", icc_profile=profile, quality=95, subsampling=0), colour, by=5)
    assert shown(Image.new("RGB", SIZE, (255, 255, 255)), icc_profile=profile) == (255, 255, 255)


def test_a_profile_goes_with_every_kind_of_picture() -> None:
    dull, colour = Image.new("RGB", SIZE, (200, 30, 60)), (220, 0, 51)
    assert near(shown(dull.convert("P", palette=Image.Palette.ADAPTIVE), icc_profile=P3), colour)
    assert near(shown(Image.new("RGBA", SIZE, (200, 30, 60, 255)), icc_profile=P3), colour)
    assert shown(Image.new("RGBA", SIZE, (200, 30, 60, 0)), icc_profile=P3) == (255, 255, 255)
    half = shown(Image.new("RGBA", SIZE, (200, 30, 60, 128)), icc_profile=P3)
    assert near(half, tuple(round((value + 255) / 2) for value in colour))
    assert shown(dull, icc_profile=P3, transparency=(200, 30, 60)) == (255, 255, 255)
    # A grey that kept the profile of the colours that it was made from, and greys with a curve of their own.
    assert near(shown(Image.new("L", SIZE, 100), icc_profile=P3), (100, 100, 100))
    steep = grey_profile("Gray Gamma 1.8", 1.8)
    assert near(shown(Image.new("L", SIZE, 100), icc_profile=steep), (119, 119, 119))
    assert near(shown(Image.new("LA", SIZE, (100, 255)), icc_profile=steep), (119, 119, 119))
    deep = Image.fromarray(np.full((8, 8), 100 << 8, np.uint16))
    assert near(shown(deep, icc_profile=steep), (119, 119, 119))


def test_inks_are_mixed_as_their_printer_does() -> None:
    red = Image.new("CMYK", SIZE, (0, 255, 255, 0))
    assert near(shown(red, "JPEG", quality=95), (255, 0, 0), by=15)
    pressed = shown(red, "JPEG", quality=95, icc_profile=ink_profile("Some press"))
    assert near(pressed, (207, 29, 0), by=8)
    assert shown(Image.new("CMYK", SIZE, 0), "TIFF", icc_profile=ink_profile("Some press")) == (255, 255, 255)


@pytest.mark.parametrize("profile", [b"no profile at all" * 20, P3[:200], bytes(9_000_000), ink_profile("Inks"),
                                     grey_profile("Grey", 1.8), SRGB])  # fmt: skip
def test_a_profile_of_no_use_changes_nothing(profile: bytes) -> None:
    data = encoded(picture(3, *SIZE), "JPEG", icc_profile=profile)
    assert np.array_equal(np.asarray(decode(data)), np.asarray(decode(encoded(picture(3, *SIZE), "JPEG"))))


def test_a_picture_decoded_smaller_keeps_its_extent() -> None:
    rough = picture(4, 40, 30).resize((1001, 751), Image.Resampling.BICUBIC)
    plain, wide = (encoded(rough, "JPEG", quality=95, icc_profile=profile) for profile in (b"", P3))
    small = decode(wide, cover=(64, 64))
    assert small.width < 1001 and small.info["extent"] == decode(plain, cover=(64, 64)).info["extent"]
    whole, part = to_array(decode(wide), (64, 64), 1), to_array(small, (64, 64), 1)
    assert abs(whole.astype(int) - part).mean() < 2


def test_building_counts_and_converts(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    profiles = {"a": P3, "b": P3, "c": ADOBE, "d": SRGB, "e": b"", "f": b"damaged" * 30}
    for number, (name, profile) in enumerate(profiles.items()):
        (folder / f"{name}.png").write_bytes(encoded(picture(number, *SIZE), icc_profile=profile))
        (folder / f"{name}.txt").write_text(f"a picture called {name}")

    def made(output: str, **options: Any) -> tuple[dict[str, int], dict[str, RawSample]]:
        report = build(BuildOptions(input=str(folder), output=str(tmp_path / output), processes=1, **options))
        index = load_index(expand_shards(tmp_path / output))
        return report.mended, {index.key(row): read_sample(index, row) for row in range(len(index))}

    mended, kept = made("kept")
    assert mended == {"kept, and converted when read, from Display P3": 2, "unusable colour profile passed over": 1,
                      "kept, and converted when read, from Adobe RGB (1998)": 1}  # fmt: skip
    mended, anew = made("anew", encode="png")
    assert mended == {"encoded as png": 6, "converted from Display P3": 2, "converted from Adobe RGB (1998)": 1,
                      "unusable colour profile passed over": 1}  # fmt: skip
    for name in profiles:
        assert kept[name].image == (folder / f"{name}.png").read_bytes() and b"iCCP" not in anew[name].image
        assert np.array_equal(np.asarray(decode(anew[name].image)), np.asarray(decode(kept[name].image)))
    # The same pixels under two profiles are two pictures; the same picture under two profiles is one.
    for name, data in (("g", encoded(picture(0, *SIZE))), ("h", anew["a"].image)):
        (folder / f"{name}.png").write_bytes(data)
        (folder / f"{name}.txt").write_text("once more")
    report = build(BuildOptions(input=str(folder), output=str(tmp_path / "again"), processes=1))
    assert report.dropped == {"exact duplicate": 1} and report.kept == 7
