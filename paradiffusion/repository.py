"""Paths of configs/, data/ and the programs, in a checkout and in an installed package."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

PACKAGE: Final = Path(__file__).resolve().parent
INSTALLED: Final = PACKAGE / "shipped"  # made by setup.py when a wheel is built; in a checkout there is none
ROOT: Final = INSTALLED if INSTALLED.is_dir() else PACKAGE.parent


def find_shipped(path: str | Path) -> Path:
    """``path`` as given; or, where nothing lies there and it begins with data/ or configs/, what is shipped by that name."""
    path = Path(path).expanduser()
    shipped = path.parts[:1] in (("data",), ("configs",)) and not path.exists() and (ROOT / path).exists()
    return ROOT / path if shipped else path


def as_typed(text: str) -> str:
    """``text`` with the commands in it as this installation has them: `python scripts/cache.py` is `paradiffusion cache`
    where there is no checkout, and under a launcher `-m paradiffusion.cli cache`."""
    if ROOT != INSTALLED:
        return text
    text = re.sub(r"((?:accelerate launch|torchrun)\b[^\n`;]*? )(?:scripts/)?(\w+)\.py\b", r"\1-m paradiffusion.cli \2", text)
    return re.sub(r"\b(?:python |(?=scripts/))(?:scripts/)?(\w+)\.py\b", r"paradiffusion \1", text)
