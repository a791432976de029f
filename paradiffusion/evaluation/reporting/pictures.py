"""Pictures inside a report: small copies as data URIs, until the page is as large as it may become."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote

from PIL import Image

from paradiffusion.data.images import BadImage, decode
from paradiffusion.evaluation.records import Drawn
from paradiffusion.evaluation.reporting.texts import excerpt, html
from paradiffusion.pages import thumbnail_uri

SIDE: Final = 320  # pixels
TINY: Final = 128  # pixels of the longer side; smaller pictures are shown enlarged with hard edges
MAX_FILE: Final = 200_000_000  # bytes


@dataclass
class Album:
    """What a report's pictures may weigh.

    Attributes:
        folder: where the report lies; pictures link to their files from there.
        left: bytes that pictures may still take.
    """

    folder: Path
    left: int

    def figure(self, drawn: Drawn | None, alt: str) -> str:
        """One picture, or a box with the reason why there is none."""
        if drawn is None:
            return _box("not among this model's images")
        if drawn.error:
            return _box(drawn.error)
        try:
            picture = _read(drawn.file)
        except FileNotFoundError:
            return _box(f"{drawn.file.name} is missing")
        except (OSError, BadImage) as error:
            reason = (error.strerror if isinstance(error, OSError) else "") or str(error)
            return _box(f"{drawn.file.name}: {reason}")
        uri = thumbnail_uri(picture, SIDE)
        self.left -= len(uri)
        tiny = ' class="tiny"' if max(picture.size) <= TINY else ""
        image = (
            f'<img src="{uri}" width="{picture.width}" height="{picture.height}"{tiny} alt="{html(excerpt(alt, 160))}">'
        )
        link = _link(drawn.file, self.folder)
        return f'<a href="{html(link)}">{image}</a>' if link else image


def _read(path: Path) -> Image.Image:
    if path.stat().st_size > MAX_FILE:
        raise BadImage(f"over {MAX_FILE:,} bytes")
    return decode(path.read_bytes(), cover=(SIDE, SIDE))


def _box(reason: str) -> str:
    return f'<div class="missing"><b>no picture</b><span>{html(excerpt(reason, 300))}</span></div>'


def _link(file: Path, folder: Path) -> str:
    """The file's address relative to the report, so that a folder that is copied whole keeps its links."""
    try:
        return quote(Path(os.path.relpath(file, folder)).as_posix())
    except ValueError:  # another drive
        return ""
