"""What is seen only in the pictures themselves, of as many as are decoded: such as do not decode, dark ones, flat ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import ImageStat
from tqdm import tqdm

from paradiffusion.data.images import MAX_PIXELS, decode
from paradiffusion.data.index import SampleIndex, read_sample

# Our choices, of 255: below such a mean hardly anything is seen; a mild gradient over a picture deviates by more.
DARK, FLAT = 16.0, 6.0
_SHOWN: Final = 12


@dataclass(frozen=True)
class CheckedPictures:
    """Of ``checked`` pictures, rows with the reason of those that do not decode, and rows of those whose mean brightness is
    below ``DARK``, and of those whose brightness deviates by less than ``FLAT``, the worst first."""

    checked: int
    undecodable: list[tuple[int, str]]
    dark: list[int]
    flat: list[int]

    def worst(self) -> dict[str, list[int]]:
        """The rows to be shown, by what is wrong with them."""
        return {
            "images that do not decode": [row for row, _ in self.undecodable[:_SHOWN]],
            "very dark images": self.dark[:_SHOWN],
            "images of nearly one colour": self.flat[:_SHOWN],
        }


def check_pictures(index: SampleIndex, check: int, seed: int) -> CheckedPictures:
    """Decode ``check`` images at most, drawn by seed, and as many of those whose header could not be read."""
    known = np.flatnonzero(index.width > 0)
    drawn = np.random.default_rng(seed + 1).choice(known, min(check, len(known)), replace=False)
    rows = [*np.flatnonzero(index.width == 0)[:check].tolist(), *np.sort(drawn).tolist()]
    bad: list[tuple[int, str]] = []
    dark: list[tuple[float, int]] = []
    flat: list[tuple[float, int]] = []
    for row in tqdm(rows, desc="images", unit="image", mininterval=1, dynamic_ncols=True):
        try:
            brightness = ImageStat.Stat(decode(read_sample(index, row).image, MAX_PIXELS).convert("L"))
        except (OSError, ValueError) as error:
            bad.append((row, str(error)))
            continue
        (mean,), (deviation,) = brightness.mean, brightness.stddev
        if mean < DARK:
            dark.append((mean, row))
        if deviation < FLAT:
            flat.append((deviation, row))
    return CheckedPictures(len(rows), bad, dark=[row for _, row in sorted(dark)], flat=[row for _, row in sorted(flat)])
