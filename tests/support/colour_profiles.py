"""ICC profiles as telephones, cameras and printers embed them, written byte by byte."""

from __future__ import annotations

import struct

# Red, green and blue under D50, as the publishers' profiles have them, and the exponent of the curve.
DISPLAY_P3 = ("Display P3", ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)), 2.2)
ADOBE_RGB = ("Adobe RGB (1998)", ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)), 2.2)
_D50 = (0.9642, 1.0, 0.8249)


def _fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def _profile(space: bytes, kind: bytes, name: str, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    text = name.encode()
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text) + 1) + text + b"\0" + bytes(78),
        b"wtpt": b"XYZ \0\0\0\0" + _fixed(*_D50),
        b"cprt": b"text\0\0\0\0none\0",
        **tags,
    }
    at, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for tag, content in tags.items():
        table += tag + struct.pack(">II", at + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    size = at + len(body)
    head = struct.pack(">I4sI4s4s4s", size, bytes(4), 0x02400000, kind, space, connection) + bytes(12) + b"acsp"
    head = head + bytes(68 - len(head)) + _fixed(*_D50)
    return head + bytes(128 - len(head)) + struct.pack(">I", len(tags)) + table + body


def rgb_profile(name: str, primaries: tuple[tuple[float, float, float], ...], gamma: float) -> bytes:
    """A display's: three primaries and one curve."""
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    tags = {tag: b"XYZ \0\0\0\0" + _fixed(*xyz) for tag, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True)}
    return _profile(b"RGB ", b"mntr", name, b"XYZ ", {**tags, b"rTRC": curve, b"gTRC": curve, b"bTRC": curve})


def grey_profile(name: str, gamma: float) -> bytes:
    """A grey one with a curve."""
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    return _profile(b"GRAY", b"mntr", name, b"XYZ ", {b"kTRC": curve})


def ink_profile(name: str, lightness_of_cyan: int = 62) -> bytes:
    """A printer's, of 16 corners: every ink takes its part of the lightness and pulls the colour its way."""
    grid = b""
    for corner in range(16):
        c, m, y, k = (corner >> shift & 1 for shift in (3, 2, 1, 0))
        lightness = 100 * (1 - c * (1 - lightness_of_cyan / 100)) * (1 - 0.5 * m) * (1 - 0.1 * y) * (1 - 0.9 * k)
        tint = 1 - 0.9 * k
        a, b = tint * (-35 * c + 70 * m - 5 * y), tint * (-50 * c - 5 * m + 90 * y)
        grid += bytes(min(255, max(0, round(v))) for v in (lightness * 2.55, a + 128, b + 128))
    line = bytes(range(256))
    lut = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + _fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + line * 4 + grid + line * 3
    return _profile(b"CMYK", b"prtr", name, b"Lab ", {b"A2B0": lut})
