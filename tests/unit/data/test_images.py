"""Decoding, aspect buckets and crops."""

from __future__ import annotations

import io

import numpy as np
import pytest
from data_fixtures import encoded, picture
from PIL import Image

from paradiffusion.data.images import BadImage, assign_buckets, decode, make_buckets, probe_size, to_array
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


def test_bad_images() -> None:
    good, png = encoded(picture(0, 64, 64), "JPEG"), encoded(picture(0, 64, 64))
    gif = encoded(Image.new("P", (8, 8)), "GIF")
    for data in (b"", b"<html>404</html>", good[: len(good) // 2], png[:100], png[:30] + b"\0" * 500, gif):
        with pytest.raises(BadImage, match="does not decode"):
            decode(data)
    for data in (b"", b"<html>", png[:12]):
        assert probe_size(data) == (0, 0)
    with pytest.raises(BadImage, match="over the limit"):
        decode(png, max_pixels=64 * 64 - 1)


def test_a_bomb_is_not_unpacked(recwarn: pytest.WarningsRecorder) -> None:
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


@pytest.mark.parametrize("wrong", [(100, 16, 2.0), (8, 16, 2.0), (64, 0, 2.0), (64, 16, 0.5)])
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
