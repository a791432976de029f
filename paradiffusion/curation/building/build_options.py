"""The options of building shards, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from paradiffusion.checks import fraction, not_negative, not_understood, on_disk, one_of, parsed, positive
from paradiffusion.config import check_values, option
from paradiffusion.curation.building.chunk import parse_colour
from paradiffusion.curation.building.duplicates import MAX_DISTANCE
from paradiffusion.curation.building.inputs import FORMATS
from paradiffusion.curation.building.items import Columns
from paradiffusion.curation.building.places import FetchLimits
from paradiffusion.data.images import MAX_PIXELS
from paradiffusion.errors import UserError
from paradiffusion.runner import RunnerKeys

# What may differ when a build goes on: it changes no byte of the result.
FREE: Final = ("output", "processes", "threads", "timeout", "retries", "max_unzipped_gigabytes", "runner", "runner_options")

_CAPTIONS, _KEEP = "{column: short, other: long}", "[column, other]"


@dataclass
class BuildOptions(RunnerKeys):
    """The keys of scripts/build_shards.py, which explains them."""

    input: str | None = None
    output: str | None = option(None, accepts=on_disk)
    format: str = option("auto", accepts=one_of(*FORMATS))
    root: str | None = None
    image: str | None = None
    captions: str | None = None
    key: str | None = None
    keep: str | None = None
    uncaptioned: str = option("drop", accepts=one_of("drop", "keep"))
    min_words: int = option(1, accepts=not_negative)
    max_words: int | None = option(None, accepts=positive)
    min_side: int = option(64, accepts=not_negative)
    max_side: int | None = option(None, accepts=positive)
    max_aspect: float | None = 4.0
    max_pixels: int = option(MAX_PIXELS, accepts=positive)
    max_megabytes: int = option(100, accepts=positive)
    max_unzipped_gigabytes: float = option(100.0, accepts=positive)
    background: str = "white"
    encode: str = option("keep", accepts=one_of("keep", "jpeg", "webp", "png"))
    quality: int = 95
    duplicates: str = option("drop", accepts=one_of("drop", "keep"))
    near_duplicates: str = "off"
    samples_per_shard: int = option(1000, accepts=positive)
    val: float = option(0.0, accepts=fraction)
    tokenizer: str | None = None
    processes: int | None = option(None, accepts=positive)
    threads: int = option(16, accepts=positive)
    timeout: float = option(10.0, accepts=positive)
    retries: int = option(2, accepts=not_negative)

    def check(self) -> None:
        """Raise UserError for what cannot be meant."""
        for key in ("input", "output"):
            if not getattr(self, key):
                raise UserError(f"{key}= is missing; expected input=<folder, table or tars> output=<new folder>.")
        check_values(self)
        try:
            parse_colour(self.background)
        except ValueError:
            raise UserError(f"background={self.background} is no colour; expected white, black or '#rrggbb'.") from None
        for wrong, sentence in (
            (not 1 <= self.quality <= 100, f"quality={self.quality} is out of range; expected 1 to 100"),
            (self.max_pixels > MAX_PIXELS,
             f"max_pixels={self.max_pixels} is more than training reads; give {MAX_PIXELS} or less"),
            (self.max_aspect is not None and not 1 <= self.max_aspect < math.inf,
             f"max_aspect={self.max_aspect}: expected the long side over the short, from 1"),
            ((self.max_side or math.inf) < self.min_side,
             f"max_side={self.max_side} is below min_side={self.min_side}"),
            ((self.max_words or math.inf) < self.min_words,
             f"max_words={self.max_words} is below min_words={self.min_words}"),
        ):  # fmt: skip
            if wrong:
                raise UserError(f"{sentence}.")
        self.distance()
        self.columns()
        self.ray()

    def distance(self) -> int | None:
        """The Hamming distance up to which images are near-duplicates; None for off."""
        if self.near_duplicates.lower() in ("off", "false", "none"):
            return None
        if not self.near_duplicates.isdigit() or int(self.near_duplicates) > MAX_DISTANCE:
            raise UserError(f"near_duplicates={self.near_duplicates} is not understood; expected off or 0 to {MAX_DISTANCE} bits of 64.")
        return int(self.near_duplicates)

    def columns(self) -> Columns:
        """Which columns are what."""
        captions = parsed("captions", self.captions, _CAPTIONS)
        if captions is not None and not (isinstance(captions, Mapping) and captions and _all_text(captions.values())):
            raise not_understood("captions", self.captions, _CAPTIONS)
        keep = parsed("keep", self.keep, _KEEP)
        keep = [keep] if isinstance(keep, str) else keep or []
        if not isinstance(keep, list) or not _all_text(keep):
            raise not_understood("keep", self.keep, _KEEP)
        mapped = None if captions is None else {str(column): kind for column, kind in captions.items()}
        return Columns(mapped, self.image, self.key, tuple(keep), self.uncaptioned == "keep")

    def fetch_limits(self) -> FetchLimits:
        """How images are fetched."""
        return FetchLimits(self.max_megabytes << 20, self.timeout, self.retries)


def _all_text(values: Any) -> bool:
    return all(isinstance(value, str) and value for value in values)
