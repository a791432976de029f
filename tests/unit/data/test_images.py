"""Decoding, aspect buckets and crops; and colour profiles: what a picture's numbers mean is read before they are trained on."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from colour_profiles import ADOBE_RGB, DISPLAY_P3, grey_profile, ink_profile, rgb_profile
from data_fixtures import encoded, picture
from PIL import Image, ImageCms

from paradiffusion.curation.building.build import build
from paradiffusion.curation.building.build_options import BuildOptions
from paradiffusion.data.images import BadImage, assign_buckets, decode, make_buckets, probe_size, to_array
from paradiffusion.data.index import load_index, read_sample
from paradiffusion.data.shards import RawSample, expand_shards
from paradiffusion.errors import UserError

RED, WHITE = (255, 0, 0), (255, 255, 255)


def first_pixel(data: bytes) -> tuple[int, ...]:
    image = decode(data)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def shade(mode: str, value: object) -> Image.Image:
    return Image.new(mode, (8, 8), value)  # type: ignore[arg-type]


PALETTE = shade("RGB", RED).convert("P", palette=Image.Palette.ADAPTIVE)


@pytest.mark.parametrize(
    ("data", "seen"),
    [
        (encoded(shade("RGBA", (255, 0, 0, 0))), WHITE), (encoded(shade("RGBA", (255, 0, 0, 255))), RED),
        (encoded(shade("RGBA", (0, 0, 0, 128)), "WEBP", lossless=True), (127,) * 3), (encoded(shade("LA", (0, 0))), WHITE),
        (encoded(shade("L", 77)), (77,) * 3), (encoded(shade("1", 1)), WHITE), (encoded(PALETTE), RED),
        (encoded(PALETTE, transparency=PALETTE.getpixel((0, 0))), WHITE),
        *((encoded(Image.fromarray(np.full((8, 8), deep, np.uint16))), (grey,) * 3)
          for deep, grey in ((0, 0), (0x8000, 128), (0xFFFF, 255))),
    ],
)  # fmt: skip
def test_modes(data: bytes, seen: tuple[int, int, int]) -> None:
    assert first_pixel(data) == seen


def test_exif_rotation_and_first_frame() -> None:
    image = Image.new("RGB", (20, 10))
    image.paste(RED, (0, 0, 5, 5))
    exif = Image.Exif()
    exif[0x0112] = 6  # To be turned a quarter clockwise: the left upper corner goes to the right.
    data = encoded(image, "JPEG", exif=exif, quality=95, subsampling=0)
    upright = decode(data)
    assert upright.size == (10, 20) == probe_size(data)
    assert upright.getpixel((8, 1))[0] > 200 and upright.getpixel((1, 1))[0] < 50
    frames = [Image.new("RGB", (8, 8), RED), Image.new("RGB", (8, 8), (0, 0, 255))]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert first_pixel(data) == RED and probe_size(data) == (8, 8)


def test_bad_images(recwarn: pytest.WarningsRecorder) -> None:
    good, png = encoded(picture(0, 64, 64), "JPEG"), encoded(picture(0, 64, 64))
    gif = encoded(Image.new("P", (8, 8)), "GIF")
    for data in (b"", b"<html>404</html>", good[: len(good) // 2], png[:100], png[:30] + b"\0" * 500, gif):
        with pytest.raises(BadImage, match="does not decode"):
            decode(data)
    for data in (b"", b"<html>", png[:12]):
        assert probe_size(data) == (0, 0)
    with pytest.raises(BadImage, match="over the limit"):
        decode(png, max_pixels=64 * 64 - 1)

    buffer = io.BytesIO()
    Image.new("1", (14_000, 14_000)).save(buffer, "PNG")
    with pytest.raises(BadImage):
        decode(buffer.getvalue())
    assert not recwarn.list


@pytest.mark.parametrize(
    ("resolution", "multiple", "aspect", "count"),
    [(64, 16, 2.0, 3), (64, 8, 2.0, 5), (512, 64, 2.0, 5), (1024, 64, 2.0, 9), (256, 32, 1.0, 1)],
)
def test_buckets(resolution: int, multiple: int, aspect: float, count: int) -> None:
    buckets = make_buckets(resolution, multiple, aspect)
    assert (resolution, resolution) in buckets and len(set(buckets)) == len(buckets) == count
    for height, width in buckets:
        assert height % multiple == 0 and width % multiple == 0
        assert 0.8 * resolution**2 <= height * width <= 1.1 * resolution**2
        assert max(height, width) / min(height, width) <= aspect
        assert (width, height) in buckets


@pytest.mark.parametrize("wrong", [(100, 16, 2.0), (8, 16, 2.0), (64, 0, 2.0)])
def test_impossible_buckets(wrong: tuple[int, int, float]) -> None:
    with pytest.raises(UserError):
        make_buckets(*wrong)


def test_assign() -> None:
    buckets = [(64, 64), (48, 80), (80, 48)]  # The order is the caller's.
    width = np.array([64, 1000, 300, 80, 48, 1, 10_000, 0, 75])
    height = np.array([64, 1000, 500, 48, 80, 9999, 3, 55, 64])
    assert list(assign_buckets(width, height, buckets)) == [0, 0, 2, 1, 2, 2, 1, 0, 0]
    assert list(assign_buckets(width[:2], height[:2], [(48, 80)])) == [0, 0]


def test_an_image_goes_to_the_largest_resolution_that_does_not_enlarge_it() -> None:
    levels = {bucket: side for side in (512, 256, 1024) for bucket in make_buckets(side, 64, 2.0)}
    width = np.array([512, 511, 1024, 4000, 100, 0, 2048, 700, 340])
    height = np.array([512, 512, 1024, 3000, 100, 9, 512, 380, 170])
    chosen = [list(levels)[number] for number in assign_buckets(width, height, list(levels))]
    assert [levels[bucket] for bucket in chosen] == [512, 256, 1024, 1024, 256, 256, 1024, 512, 256]
    for place, bucket in enumerate(chosen):
        alone = make_buckets(levels[bucket], 64, 2.0)  # Within it the aspect decides, as where there is no other.
        assert bucket == alone[int(assign_buckets(width[[place]], height[[place]], alone)[0])]


def test_to_array_covers_antialiases_and_does_not_stretch() -> None:
    image = picture(3, 80, 48)
    assert np.array_equal(to_array(image, (48, 80), 5), np.asarray(image)), "exact where it can be"
    checks = Image.fromarray(np.tile(np.array([[0, 255], [255, 0]], np.uint8), (256, 256))).convert("RGB")
    small = to_array(checks, (64, 64), 0)
    assert small.shape == (64, 64, 3) and small.dtype == np.uint8
    assert abs(small.astype(int) - 127).max() < 10  # Without antialiasing: black or white.
    square = Image.new("RGB", (300, 100))
    square.paste((255, 255, 255), (100, 0, 200, 100))
    for seed in range(10):
        row = to_array(square, (50, 100), seed)[25, :, 0]
        assert abs((row > 127).sum() - 50) <= 1  # As wide as high, whole in every crop.
    for size in ((1, 1), (1, 500), (2000, 3)):
        assert to_array(Image.new("RGB", size, RED), (48, 80), 9).reshape(-1, 3).tolist() == [list(RED)] * 48 * 80


def test_the_crop_is_a_function_of_its_seed() -> None:
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (32, 1))).convert("RGB")
    left = [int(to_array(ramp, (32, 32), seed)[0, 0, 0]) for seed in range(60)]
    assert left == [int(to_array(ramp, (32, 32), np.uint64(seed))[0, 0, 0]) for seed in range(60)]
    assert min(left) < 40 and max(left) > 180 and len(set(left)) > 30  # All over the picture, never past its end.
    assert all(int(to_array(ramp, (32, 32), seed)[0, -1, 0]) == start + 31 for seed, start in list(enumerate(left))[:5])
    upright = ramp.rotate(90, expand=True)
    assert len({int(to_array(upright, (32, 32), seed)[0, 0, 0]) for seed in range(30)}) > 15


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_values_without_a_white_are_no_black_picture(kind: type) -> None:
    data = encoded(Image.fromarray(np.ones((64, 64), kind)), "TIFF")
    with pytest.raises(BadImage, match="32-bit"):
        decode(data, formats=("TIFF",))
    grey = encoded(Image.fromarray(np.full((64, 64), 0x8000, np.uint16)), "TIFF")
    assert decode(grey, formats=("TIFF",)).getpixel((0, 0)) == (128, 128, 128)


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
