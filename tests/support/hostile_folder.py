"""A folder with everything that goes wrong in folders of images, and what is to become of each file."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
from data_fixtures import encoded, picture
from PIL import Image

RED, BLUE = (255, 0, 0), (0, 0, 255)
SIDE = 96

# Reasons and how many files of the folder each is for.
EXPECTED = {
    "caption is a file name": 1,
    "caption is an address": 1,
    "cannot be read": 2,
    "does not decode": 1,
    "duplicate key": 1,
    "empty file": 1,
    "exact duplicate": 1,
    "folder linked again": 1,
    "no caption": 1,
    "not an image": 1,
    "too elongated": 1,
    "too many pixels": 1,
    "too small": 1,
}
KEPT = {
    "a_first", "animated", "cmyk", "grey16", "latin", "nested/deep/pipe_caption", "palette", "rotated", "twice", "wrong",
}  # fmt: skip
RENAMED = 2  # a path with spaces and letters of three alphabets; one that is no UTF-8


def halves(left: tuple[int, int, int] = RED, right: tuple[int, int, int] = BLUE, side: int = SIDE) -> Image.Image:
    """Left and right half in two colours."""
    image = Image.new("RGB", (side, side), right)
    image.paste(left, (0, 0, side // 2, side))
    return image


def bomb() -> bytes:
    """A PNG of 30,000 x 30,000 pixels in about 110 kB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    side = 30_000
    packer = zlib.compressobj(1)
    row = bytes(1 + (side + 7) // 8) * 100
    pixels = b"".join([packer.compress(row) for _ in range(side // 100)] + [packer.flush()])
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def make_hostile_folder(folder: Path) -> Path:
    """Write it. Every image but ``lonely.png`` has a caption."""
    folder.mkdir(parents=True)

    def put(name: str | bytes, data: bytes, caption: str | bytes | None = "a plain caption") -> None:
        path = os.path.join(os.fsencode(folder), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)
        if caption is not None:
            with open(os.path.splitext(path)[0] + b".txt", "wb") as file:
                file.write(caption.encode() if isinstance(caption, str) else caption)

    noise = encoded(picture(1, SIDE, SIDE))
    put("a_first.png", noise)
    put("copy.bmp", encoded(picture(1, SIDE, SIDE), "BMP"))
    put("truncated.jpg", encoded(picture(2, SIDE, SIDE), "JPEG")[:-400])
    put("bomb.png", bomb())
    put("dot.png", encoded(picture(3, 1, 1)))
    put("ribbon.png", encoded(picture(4, 20 * SIDE, SIDE)))
    ramp = np.repeat(np.linspace(0, 65535, SIDE).astype(np.uint16)[None], SIDE, axis=0)
    put("grey16.png", encoded(Image.fromarray(ramp)))
    put("cmyk.jpg", encoded(Image.new("CMYK", (SIDE, SIDE), (0, 255, 255, 0)), "JPEG", quality=95))
    put("animated.webp", encoded(halves(), "WEBP", save_all=True, append_images=[halves(BLUE, RED)], lossless=True))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: left goes up
    wide = Image.new("RGB", (2 * SIDE, SIDE), BLUE)
    wide.paste(RED, (0, 0, SIDE, SIDE))
    put("rotated.jpg", encoded(wide, "JPEG", exif=exif, quality=95, subsampling=0))
    put("wrong.jpg", encoded(picture(5, SIDE, SIDE)))
    put("latin.png", encoded(picture(6, SIDE, SIDE)), "un café très chaud".encode("cp1252"))
    put("twice.jpg", encoded(picture(7, SIDE, SIDE), "JPEG"))
    put("twice.png", encoded(picture(8, SIDE, SIDE)))
    put("mit Leerzeichen/ünï код 图.png", encoded(picture(9, SIDE, SIDE)))
    put(b"latin\xe9name.png", encoded(picture(10, SIDE, SIDE)))
    put("empty.jpg", b"")
    put("words.jpg", b"this is no picture")
    palette = halves(BLUE, RED).convert("P", palette=Image.Palette.ADAPTIVE)
    put("palette.png", encoded(palette, transparency=palette.getpixel((0, 0))))
    put("lonely.png", encoded(picture(11, SIDE, SIDE)), None)
    put("address.png", encoded(picture(12, SIDE, SIDE)), "https://example.org/a/b?c=d")
    put("named.png", encoded(picture(13, SIDE, SIDE)), "IMG_20190101.JPG")
    put("nested/deep/pipe_caption.png", encoded(picture(14, SIDE, SIDE)), "a caption\x00 with\r\ncontrol <b>characters</b>")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "pipe.txt").write_text("a pipe that nobody writes to")
    os.symlink("self.jpg", folder / "self.jpg")
    (folder / "self.txt").write_text("a link to itself")
    os.symlink("..", folder / "nested" / "loop")
    (folder / "readme.md").write_text("not an image, and passed over")
    return folder
