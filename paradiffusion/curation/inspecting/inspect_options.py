"""Options of the report on a data set (scripts/inspect_data.py), which come beside the keys of train.py."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from paradiffusion.checks import not_negative, positive
from paradiffusion.config import option
from paradiffusion.errors import UserError


@dataclass
class InspectOptions:
    """The keys beside those of train.py."""

    output: str = "report.html"
    tokenizers: str | None = None
    samples: int = option(40, accepts=not_negative)
    captions: int = option(20_000, accepts=positive)
    check: int = option(200, accepts=not_negative)

    def check_values(self) -> Path:
        """The page's path. Raises UserError for one that cannot be written."""
        path = Path(self.output).expanduser()
        if path.suffix.lower() not in (".html", ".htm") or path.is_dir():
            raise UserError(f"output={self.output} is no page; name a file such as output=report.html.")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            usable = os.access(path.parent, os.W_OK | os.X_OK)
        except OSError:
            usable = False
        if not usable:  # known before the data is read, which may take long
            raise UserError(
                f"output={self.output}: {path.parent} is no folder that can be written to; choose another one."
            )
        figures = path.with_suffix(".json")
        if figures.exists() and not _is_ours(figures):
            raise UserError(
                f"output={self.output}: {figures} is there already and holds no figures of this script; choose another name."
            )
        return path

    def tokenizer_names(self) -> list[str]:
        """What ``tokenizers=`` lists."""
        text = (self.tokenizers or "").strip()
        inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
        return [name.strip(" '\"") for name in inner.split(",") if name.strip(" '\"")]


def _is_ours(figures: Path) -> bool:
    """Whether a file holds an earlier report's figures, which may be replaced."""
    try:
        found = json.loads(figures.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and {"settings", "counts", "notes"} <= set(found)
