"""What describes one of several sources of samples; the rest of the data's configuration is in ``config.py``."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from paradiffusion.checks import positive
from paradiffusion.errors import UserError

WORLDS = ("small", "large")  # of the built-in scenes


@dataclass
class SourceConfig:
    """One of several sets of samples that are mixed.

    Attributes:
        name: in the log and in messages; None for the end of its path.
        shards, folder: one of them, as in DataConfig.
        weight: its share of the samples, against the other sources' weights.
        captions: weights of caption kinds of its own; empty for those of DataConfig.
    """

    name: str | None = None
    shards: Any = None
    folder: str | None = None
    weight: float = 1.0
    captions: dict[str, float] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """``name``, or what is fixed of the last part of the path: "web" for "web/{000..099}.tar" and "web-{0..9}.tar"."""
        if self.name:
            return self.name
        path = self.folder or (self.shards if isinstance(self.shards, str) else next(iter(self.shards or ()), ""))
        parts = [re.split(r"[{*?\[]", part)[0].removesuffix(".tar").strip("-_. ") for part in str(path).split("/")]
        return next((part for part in reversed(parts) if part), "data")

    def check(self, key: str) -> None:
        if (self.shards is None) == (self.folder is None):
            found = "neither" if self.shards is None else "both"
            raise UserError(f"{key} has {found} of shards and folder; expected one of them.")
        positive(f"{key}.weight", self.weight)
        check_captions(f"{key}.captions", self.captions, optional=True)


def check_captions(key: str, weights: dict[str, float], *, optional: bool = False) -> None:
    """Raise UserError unless some caption kind has a weight, and none a negative one."""
    if optional and not weights:
        return
    if not weights or any(not weight >= 0 for weight in weights.values()) or not sum(weights.values()):
        raise UserError(
            f"{key}={weights} gives no caption kind a weight; expected for example {{short: 0.5, long: 0.5}}."
        )
