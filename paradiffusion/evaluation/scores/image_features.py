"""Features of images by any model, made once and kept in files, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from paradiffusion.atomic import atomic_file
from paradiffusion.data.images import BadImage, decode
from paradiffusion.evaluation.journal import Journal
from paradiffusion.evaluation.records import Drawn, Run
from paradiffusion.metrics.clip import Clip
from paradiffusion.text.sources import hash_ends

_SECONDS: Final = 10.0  # of work that a kill may cost
_READERS: Final = 4


@dataclass(frozen=True)
class Extractor:
    """A model that gives features of pictures.

    Attributes:
        prepare: an RGB image of any size to a float tensor that stacks with those of others.
        features: tensors [B, ...] from ``prepare`` to float features [B, D] that do not depend on the batch.
    """

    prepare: Callable[[Image.Image], torch.Tensor]
    features: Callable[[torch.Tensor], torch.Tensor]


def clip_extractor(clip: Clip) -> Extractor:
    """Image features of ``clip``, of unit length, whose products with those of sentences are cosines."""
    return Extractor(clip.prepare, clip.image_features)


def clip_weights(spec: str) -> str | None:
    """A hash of the weights of the CLIP model that ``spec`` names where they lie on this disk, since a folder may be filled
    anew under its old name; None elsewhere."""
    path, named = Path(spec).expanduser(), Path(spec.partition(":")[2]).expanduser()
    files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin")) if path.is_dir() else [named]
    files = [file for file in files if file.is_file()]
    return hash_ends(files) if files else None


def image_features(
    images: Sequence[Drawn], extractor: Extractor, work: Path, run: Run, batch_size: int = 32, title: str = "features"
) -> None:
    """Features of those of ``images`` that ``work`` does not hold yet, kept there; every process gives its share.

    An image that was not drawn, that cannot be read, or whose features are not finite is kept as failed, with the reason.
    A file that has changed since (its size or time) is looked at again."""
    work.mkdir(parents=True, exist_ok=True)
    known = {name: stamp for chunk in _chunks(work) for name, stamp in _notes(chunk).stamps.items()}
    waiting = [image for image in images if known.get(image.name) != stamp_of(image)]
    if not waiting:
        return
    writer = _Writer(work, run.rank)
    with run.bar(len(waiting), title) as bar, ThreadPoolExecutor(_READERS) as pool:
        try:
            for batch, read in _read_ahead(waiting, extractor.prepare, batch_size, pool):
                writer.add(*_featured(batch, read, extractor.features))
                bar.update(len(batch))
                if writer.due():
                    writer.flush()
                    run.check()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            writer.flush()  # what is done is kept, however the loop ends


def read_features(work: Path, names: Sequence[str]) -> tuple[list[str], np.ndarray, dict[str, str]]:
    """What ``image_features`` of all processes left in ``work`` about the images with these names: those that have features, in order;
    float32 [N, D] of them, [0, 0] for none; and why each of the others failed."""
    place: dict[str, tuple[Path, int]] = {}
    errors: dict[str, str] = {}
    for chunk in _chunks(work):  # from old to new, so that the newest holds
        notes = _notes(chunk)
        for row, name in enumerate(notes.names):
            place[name] = (chunk, row)
            errors.pop(name, None)
        for name, reason in notes.errors.items():
            errors[name] = reason
            place.pop(name, None)
    found = [name for name in dict.fromkeys(names) if name in place]
    failed = {name: errors.get(name, "no features were made") for name in names if name not in place}
    wanted: dict[Path, list[str]] = {}
    for name in found:
        wanted.setdefault(place[name][0], []).append(name)
    rows: dict[str, np.ndarray] = {}
    for chunk, held in wanted.items():
        with safe_open(chunk, framework="pt") as file:
            features = file.get_tensor("features").numpy()
        rows |= {name: features[place[name][1]] for name in held}
    return found, np.stack([rows[name] for name in found]) if found else np.zeros((0, 0), np.float32), failed


@dataclass
class _Notes:
    """What is known of the images of one file: ``names`` are those of its rows."""

    names: list[str] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)
    stamps: dict[str, str] = field(default_factory=dict)


class _Writer:
    """Gathers features and writes them as files of one process, each whole or not there."""

    def __init__(self, work: Path, rank: int) -> None:
        self.work = work
        # Two evaluations at once may share a reference's features: neither writes over what the other found.
        self.owner = f"rank{rank}-{secrets.token_hex(4)}"
        # Above all that any process left before: of two files that know an image, the later made holds.
        self.number = 1 + max((int(path.name.split(".")[1]) for path in _chunks(work)), default=-1)
        self.notes = _Notes()
        self.rows: list[torch.Tensor] = []
        self.since = time.monotonic()

    def add(self, notes: _Notes, rows: torch.Tensor | None) -> None:
        self.notes.names += notes.names
        self.notes.errors |= notes.errors
        self.notes.stamps |= notes.stamps
        if rows is not None:
            self.rows.append(rows)

    def due(self) -> bool:
        return time.monotonic() - self.since > _SECONDS

    def flush(self) -> None:
        if self.notes.stamps:
            tensors = {"features": torch.cat(self.rows).contiguous()} if self.rows else {}
            path = self.work / f"features.{self.number:06d}.{self.owner}.safetensors"
            with atomic_file(path) as partial:
                # As bytes, since a full disk is then an OSError as everywhere else.
                partial.write_bytes(save(tensors, metadata={"images": json.dumps(vars(self.notes))}))
            self.number += 1
        self.notes, self.rows, self.since = _Notes(), [], time.monotonic()


def _chunks(work: Path) -> list[Path]:
    """The files of ``work``, from old to new."""
    return sorted(work.glob("features.*.rank*.safetensors"))


def _notes(chunk: Path) -> _Notes:
    """What ``chunk`` says of its images; nothing where it is damaged, so that they are looked at again."""
    try:
        with safe_open(chunk, framework="pt") as file:
            return _Notes(**json.loads((file.metadata() or {})["images"]))
    except (OSError, ValueError, TypeError, KeyError, SafetensorError):
        return _Notes()


def looked_at(images: Sequence[Drawn], work: Path, run: Run, title: str, look: Callable[[Drawn], dict[str, Any]]) -> None:
    """Keep in ``work``'s journal what ``look`` finds in each image that was not looked at, or is another picture since."""
    with Journal(work, run.rank) as journal, run.bar(len(images), title) as bar:
        for image in images:
            stamp = stamp_of(image)
            if journal.found.get(image.name, {}).get("stamp") != stamp:
                journal.add(image.name, {**look(image), "stamp": stamp})
                run.check()
            bar.update(1)


def read_picture(image: Drawn) -> Image.Image | str:
    """The picture in RGB, or why there is none."""
    if image.error:
        return image.error
    try:
        return decode(image.file.read_bytes())
    except (OSError, BadImage) as error:
        return f"{image.file.name} cannot be read: {error.strerror if isinstance(error, OSError) else error}"


def stamp_of(image: Drawn) -> str:
    """What changes when the picture is another one; "" for no picture."""
    if image.error:
        return ""
    try:
        status = image.file.stat()
    except OSError:
        return ""
    return f"{status.st_size}-{status.st_mtime_ns}"


def _read_ahead(
    images: list[Drawn], prepare: Callable[[Image.Image], torch.Tensor], batch_size: int, pool: ThreadPoolExecutor
) -> Iterator[tuple[list[Drawn], list[torch.Tensor | str]]]:
    """Batches with what was read; the next one is read while the model works on this one."""
    batches = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    ahead: list[Future[Any]] = [pool.submit(_read, image, prepare) for image in batches[0]] if batches else []
    for number, batch in enumerate(batches):
        now = ahead
        ahead = [pool.submit(_read, image, prepare) for following in batches[number + 1 : number + 2] for image in following]
        yield batch, [future.result() for future in now]


def _read(image: Drawn, prepare: Callable[[Image.Image], torch.Tensor]) -> torch.Tensor | str:
    """The prepared picture, or why there is none."""
    picture = read_picture(image)
    if isinstance(picture, str):
        return picture
    try:
        return prepare(picture)
    except Exception as error:  # one odd picture, of 1 x 4000 pixels, must not end the evaluation
        return f"{image.file.name} cannot be prepared ({type(error).__name__}: {error})"


def _featured(
    batch: Sequence[Drawn], read: list[torch.Tensor | str], features: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[_Notes, torch.Tensor | None]:
    """Notes on the images of ``batch``, and the rows of those that have features."""
    notes = _Notes(stamps={image.name: stamp_of(image) for image in batch})
    notes.errors = {image.name: what for image, what in zip(batch, read, strict=True) if isinstance(what, str)}
    tensors = [(image.name, what) for image, what in zip(batch, read, strict=True) if isinstance(what, torch.Tensor)]
    if not tensors:
        return notes, None
    with torch.inference_mode():
        rows = features(torch.stack([tensor for _, tensor in tensors])).float().cpu()  # [B, D]
    finite = rows.isfinite().all(dim=1)
    notes.names = [name for (name, _), good in zip(tensors, finite, strict=True) if good]
    notes.errors |= {name: "its features are not finite" for (name, _), good in zip(tensors, finite, strict=True) if not good}
    return notes, rows[finite] if finite.any() else None
