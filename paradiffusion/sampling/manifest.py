"""What was drawn: one JSON line for each finished image, so that a run can be stopped and continued."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from paradiffusion.atomic import write_atomic
from paradiffusion.errors import UserError
from paradiffusion.sampling.pipeline import Job, Models

NAME = "manifest.jsonl"


@dataclass(frozen=True)
class ImageRecord:
    """One image: what it was drawn from, and where it lies.

    Attributes:
        settings: the SamplerConfig as a dictionary.
        bytes: size of the file; another size means that the file is not the one that was written.
    """

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


def record_of(job: Job, models: Models) -> ImageRecord:
    """The record of an image before it is drawn."""
    return ImageRecord(
        name=job.name,
        prompt=job.prompt,
        negative_prompt=job.negative_prompt,
        seed=job.seed,
        height=job.height,
        width=job.width,
        settings=asdict(job.settings),
        checkpoint=models.checkpoint,
        step=models.step,
        dtype=str(models.dtype).removeprefix("torch."),
    )


class Manifest:
    """A file of ImageRecords that is appended to; each line is on its way to the disk before ``append`` returns."""

    def __init__(self, path: Path) -> None:
        _drop_cut_line(path)
        self._file = path.open("ab", buffering=0)  # a buffer would try a failed line again when the file is closed

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
    paths = [folder / NAME, *sorted(folder.glob("manifest.rank*.jsonl"))]
    found: dict[str, ImageRecord] = {}
    for path in paths:
        if path.is_file():
            for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
                record = _parse(line)
                if record is not None:
                    found[record.name] = record
    return {record.name: record for record in sorted(found.values(), key=lambda record: record.order)}


def merge_manifests(folder: Path) -> list[ImageRecord]:
    """Join the files of all processes into one in the order of the images, and return its records.

    The files of the processes go only once the joined one has its final name.
    """
    records = [record for record in read_manifests(folder).values() if is_whole(folder, record)]
    write_atomic(folder / NAME, "".join(map(_line, records)))
    for path in folder.glob("manifest.rank*.jsonl"):
        path.unlink()
    return records


def is_whole(folder: Path, record: ImageRecord) -> bool:
    """Whether the image's file is there with the size that was written."""
    path = folder / record.file
    return path.is_file() and path.stat().st_size == record.bytes


def finished_names(folder: Path, wanted: Sequence[ImageRecord]) -> set[str]:
    """Names of the wanted images that the folder already holds.

    Raises:
        UserError: when the folder holds an image of a wanted name that was drawn otherwise, or is not ours.
    """
    found = read_manifests(folder)
    finished = set()
    for record in wanted:
        path = folder / record.file
        if not path.exists():
            continue
        if record.name not in found:
            if not _is_ours(path):
                raise UserError(
                    f"{path} was not drawn by sample.py and would be overwritten; choose another output_dir=."
                )
            continue  # the process ended between the image and its line
        changes = _changes(found[record.name], record)
        if changes:
            raise UserError(
                f"{path} was drawn with {'; '.join(changes)}; choose another output_dir=, or the same values to continue."
            )
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


def _drop_cut_line(path: Path) -> None:
    """Cut off what follows the last line feed, or the next record would be glued to it."""
    if path.is_file():
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(path, whole)


def _changes(old: ImageRecord, new: ImageRecord) -> list[str]:
    before, now = old.identity(), new.identity()

    def shown(value: Any) -> str:
        return str(value) if len(str(value)) < 60 else f"{str(value)[:57]}..."

    return [
        f"{key}={shown(before.get(key))} (now {shown(now.get(key))})"
        for key in dict.fromkeys([*now, *before])
        if before.get(key) != now.get(key)
    ]


def _is_ours(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            return "prompt" in image.info and "checkpoint" in image.info
    except OSError:
        return False
