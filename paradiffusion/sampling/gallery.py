"""Images on disk: PNG with metadata, the record of what was drawn, the gallery page, contact sheets."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from paradiffusion.atomic import atomic_file, write_atomic
from paradiffusion.config import SamplerConfig
from paradiffusion.errors import UserError
from paradiffusion.pages import render, thumbnail_uri

NAME = "manifest.jsonl"
MAX_EMBEDDED = 400  # images; a page with more refers to the files, or no browser opens it
THUMBNAIL = 512  # pixels of the longer side; embedded images are not larger, the file is one click away
MAX_GRID = 32  # images; a picture with more is too large to look at
GRID_CELL = 256  # pixels that a tiny image is enlarged to in the grid
TINY = 192  # pixels of the longer side; smaller images are shown enlarged with hard edges

# Not worth a reader's time, and what a record means that was written before there was such a setting.
DEFAULTS = {key: value for key, value in asdict(SamplerConfig()).items() if key.startswith(("guidance_", "score_"))}


@dataclass(frozen=True)
class ImageRecord:
    """One image: what it was drawn from (``settings``: the SamplerConfig as a dictionary), and where it lies. Another size than
    ``bytes`` means that the file is not the one that was written."""

    name: str
    prompt: str
    negative_prompt: str | None
    seed: int
    height: int
    width: int
    settings: dict[str, Any] = field(default_factory=dict)
    checkpoint: str = ""
    step: int = 0
    dtype: str = "float32"
    bytes: int = 0

    @property
    def file(self) -> str:
        return f"{self.name}.png"

    @property
    def order(self) -> tuple[int, ...]:
        """Place among the images: prompt, then image of the prompt."""
        return tuple(int(part) for part in self.name.split("_"))

    def identity(self) -> dict[str, Any]:
        """All that decides the pixels, flat."""
        values = asdict(self)
        settings = values.pop("settings")
        del values["bytes"]
        return {**values, **settings}


class Manifest:
    """A file of ImageRecords that is appended to; each line is on its way to the disk before ``append`` returns."""

    def __init__(self, path: Path) -> None:
        cut = path.is_file() and not path.read_bytes().endswith(b"\n")
        self._file = path.open("ab", buffering=0)  # a buffer would try a failed line again when the file is closed
        if cut:  # or the next record would be glued to half a line
            self._file.write(b"\n")

    def append(self, record: ImageRecord) -> None:
        rest = memoryview(_line(record).encode("utf-8"))
        while rest:
            rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        self._file.close()


def read_manifests(folder: Path) -> dict[str, ImageRecord]:
    """The records in a folder by name, those of every process included, in the order of the images.

    A line that cannot be read, such as the last one after a full disk, is passed over: its image is drawn again.
    """
    paths = [*folder.glob(NAME), *sorted(folder.glob("manifest.rank*.jsonl"))]
    lines = (line for path in paths for line in path.read_text(encoding="utf-8", errors="replace").split("\n"))
    found = {record.name: record for line in lines if (record := _parse(line)) is not None}
    return dict(sorted(found.items(), key=lambda item: item[1].order))


def merge_manifests(folder: Path) -> list[ImageRecord]:
    """Join the files of all processes into one in the order of the images, and return its records."""
    records = [record for record in read_manifests(folder).values() if is_whole(folder, record)]
    write_atomic(folder / NAME, "".join(map(_line, records)))
    for path in folder.glob("manifest.rank*.jsonl"):  # only once the joined one has its name
        path.unlink()
    return records


def is_whole(folder: Path, record: ImageRecord) -> bool:
    """Whether the image's file is there with the size that was written."""
    path = folder / record.file
    return path.is_file() and path.stat().st_size == record.bytes


def finished_names(folder: Path, wanted: Sequence[ImageRecord]) -> set[str]:
    """Names of the wanted images that the folder already holds. Raises UserError when the folder holds an image of a wanted
    name that was drawn otherwise, or is not ours."""
    found = read_manifests(folder)
    finished = set()
    for record in wanted:
        path = folder / record.file
        if not path.exists():
            continue
        if record.name not in found:  # the process may have ended between the image and its line
            if _is_ours(path):
                continue
            raise UserError(f"{path} was not drawn by sample.py and would be overwritten; choose another output_dir=.")
        before, now = found[record.name].identity(), record.identity()
        changes = [
            f"{key}={_shown(before.get(key))} (now {_shown(now.get(key))})"
            for key in {**now, **before}
            if before.get(key, DEFAULTS.get(key)) != now.get(key)
        ]
        if changes:
            raise UserError(f"{path} was drawn with {'; '.join(changes)}; choose another output_dir=, or the same values to continue.")
        if is_whole(folder, found[record.name]):
            finished.add(record.name)
    return finished


def _line(record: ImageRecord) -> str:
    return json.dumps({"name": record.name, "file": record.file, **asdict(record)}, ensure_ascii=False) + "\n"


def _parse(line: str) -> ImageRecord | None:
    try:
        row = json.loads(line)
        del row["file"]
        record = ImageRecord(**row)
        record.order  # noqa: B018  a name that is not ours is not an image of ours
        return record
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _shown(value: Any) -> str:
    return str(value) if len(str(value)) < 60 else f"{str(value)[:57]}..."


def _is_ours(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            return "prompt" in image.info and "checkpoint" in image.info
    except OSError:
        return False


def save_png(path: Path, image: np.ndarray, metadata: Mapping[str, Any]) -> int:
    """Write ``image``, uint8 [H, W, 3], with ``metadata`` as PNG text, and return the file's size in bytes.

    Text is stored as UTF-8 (iTXt), everything else as JSON. The file gets its name when it is whole.
    """
    info = PngInfo()
    for key, value in metadata.items():
        info.add_itxt(key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    with atomic_file(path) as partial:
        with partial.open("wb") as file:
            Image.fromarray(image).save(file, format="PNG", pnginfo=info)
        return partial.stat().st_size


def write_gallery(folder: Path, rows: Sequence[ImageRecord], title: str) -> Path:
    """Write ``index.html`` for the images of ``folder`` and return its path.

    Up to MAX_EMBEDDED images the page is self-contained. Images of one prompt share a card.
    """
    cards = [list(g) for _, g in groupby(rows, key=lambda row: (row.order[0], row.prompt, row.negative_prompt))]
    page = render(
        "sampling/templates/gallery.html", title=title, images=len(rows), cards=cards, tiny=TINY,
        shown=lambda row: thumbnail_uri(_opened(folder, row), THUMBNAIL) if len(rows) <= MAX_EMBEDDED else row.file,
        settings=lambda row: ", ".join(f"{k} {v}" for k, v in row.settings.items() if v != DEFAULTS.get(k)),
    )  # fmt: skip
    write_atomic(folder / "index.html", page)
    return folder / "index.html"


def write_grid(folder: Path, rows: Sequence[ImageRecord]) -> None:
    """Write ``grid.png``, the images of ``folder`` with their prompts in one picture, unless they are more than MAX_GRID."""
    if not 0 < len(rows) <= MAX_GRID:
        return
    pictures = [_opened(folder, row) for row in rows]
    scale = max(1, GRID_CELL // max(max(picture.size) for picture in pictures))
    sheet = contact_sheet(pictures, columns=4, labels=[row.prompt for row in rows], scale=scale)
    with atomic_file(folder / "grid.png") as partial:
        sheet.save(partial, format="PNG", optimize=True)


def _opened(folder: Path, record: ImageRecord) -> Image.Image:
    return Image.open(folder / record.file).convert("RGB")


def contact_sheet(
    images: Sequence[np.ndarray | Image.Image], columns: int, labels: Sequence[str] | None = None, scale: int = 1,
    font_size: int = 12, gap: int = 8,
) -> Image.Image:  # fmt: skip
    """A grid of images on white, row by row, each centred in its cell.

    Args:
        images: uint8 [H, W, 3] arrays or pictures, of any sizes.
        labels: one text under each image, wrapped to the width of its cell and cut off at its edge.
        scale: whole number by which the images are enlarged with hard edges.
        gap: pixels between the cells.
    Raises:
        ValueError: for no images, or another number of labels than images.
    """
    if not images or (labels is not None and len(labels) != len(images)):
        raise ValueError(f"{len(images)} images with {None if labels is None else len(labels)} labels")
    sources = [image if isinstance(image, Image.Image) else Image.fromarray(image) for image in images]
    pictures = [ImageOps.scale(source.convert("RGB"), scale, Image.Resampling.NEAREST) for source in sources]
    width, columns = max(picture.width for picture in pictures), min(columns, len(pictures))
    font = ImageFont.load_default(font_size)
    letters = max(1, int(width / font.getlength("n")))  # on a line, about
    texts = ["\n".join(textwrap.wrap(label, letters)) for label in labels or [""] * len(pictures)]
    rows = []  # of each its top, the height of its pictures, and that of the texts below
    bottom = gap
    for start in range(0, len(pictures), columns):
        height = max(picture.height for picture in pictures[start : start + columns])
        lines = max(text.count("\n") + 1 if text else 0 for text in texts[start : start + columns])
        rows.append((bottom, height, round(font_size * 1.35) * lines))
        bottom += height + rows[-1][2] + gap
    sheet = Image.new("RGB", (columns * (width + gap) + gap, bottom), "white")
    for number, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        top, height, note = rows[number // columns]
        cell = Image.new("RGB", (width, height + note), "white")
        cell.paste(picture, ((width - picture.width) // 2, (height - picture.height) // 2))
        ImageDraw.Draw(cell).multiline_text((0, height + 2), text, "black", font, spacing=round(font_size * 0.15))
        sheet.paste(cell, (gap + number % columns * (width + gap), top))
    return sheet
