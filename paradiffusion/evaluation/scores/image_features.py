"""Features of images by any model, made once and kept in files, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
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
    store = FeatureStore(work, run.rank)
    waiting = [image for image in images if store.notes.get(image.name, {}).get("stamp") != stamp_of(image)]
    if not waiting:
        return
    with run.bar(len(waiting), title) as bar, ThreadPoolExecutor(_READERS) as pool:
        try:
            for batch, read in _read_ahead(waiting, extractor.prepare, batch_size, pool):
                store.add(*_featured(batch, read, extractor.features))
                bar.update(len(batch))
                if store.due():
                    store.flush()
                    run.check()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            store.flush()  # what is done is kept, however the loop ends


def read_features(work: Path, names: Sequence[str]) -> tuple[list[str], np.ndarray, dict[str, str]]:
    """What ``image_features`` of all processes left in ``work`` about the images with these names: those that have features, in order;
    float32 [N, D] of them, [0, 0] for none; and why each of the others failed."""
    store = FeatureStore(work)
    found = [name for name in dict.fromkeys(names) if name in store]
    failed = {name: store.notes.get(name, {}).get("error", "no features were made") for name in names if name not in store}
    return found, store.features(found), failed


class FeatureStore:
    """Features of pictures, or of texts, by name: a folder of files of some seconds' work of one process, each whole or not there.

    Attributes:
        notes: by name, as JSON, what was said with it; of two files that know a name the newer holds. An "error" in it says why the
            name has no features.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self._folder = folder
        # Two evaluations at once may share a reference's features: neither writes over what the other found.
        self._owner = f"rank{rank}-{secrets.token_hex(4)}"
        self.notes: dict[str, dict[str, Any]] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        files = sorted(folder.glob("features.*.rank*.safetensors"))  # from old to new
        self._number = 1 + max((int(path.name.split(".")[1]) for path in files), default=-1)
        for path in files:
            try:
                with safe_open(path, framework="pt") as file:
                    self._note(path, json.loads((file.metadata() or {})["notes"]))
            except (OSError, ValueError, KeyError, SafetensorError):
                continue  # damaged: what it held is made again
        self._clear()

    def _note(self, path: Path, notes: dict[str, dict[str, Any]]) -> None:
        self.notes |= notes
        good = [name for name, note in notes.items() if "error" not in note]
        self._places |= {name: (path, row) for row, name in enumerate(good)}

    def _clear(self) -> None:
        self._new: dict[str, dict[str, Any]] = {}
        self._rows: list[torch.Tensor] = []
        self._since = time.monotonic()

    def __contains__(self, name: str) -> bool:
        """Whether there are features of ``name``."""
        return name in self._places and "error" not in self.notes[name]

    def features(self, names: Sequence[str]) -> np.ndarray:
        """float32 [N, D] of ``names``, [0, 0] for none. KeyError for one that has none."""
        wanted: dict[Path, dict[str, int]] = {}
        for name in names:
            path, row = self._places[name]
            wanted.setdefault(path, {})[name] = row
        rows: dict[str, np.ndarray] = {}
        for path, held in wanted.items():
            with safe_open(path, framework="pt") as file:
                features = file.get_tensor("features").numpy()
            rows |= {name: features[row] for name, row in held.items()}
        return np.stack([rows[name] for name in names]) if names else np.zeros((0, 0), np.float32)

    def add(self, notes: dict[str, dict[str, Any]], rows: torch.Tensor) -> None:
        """``rows`` [B, D] are those of the names in ``notes`` that have no error, in order; on disk after ``flush``."""
        self._new |= notes
        self._rows += [rows] if len(rows) else []

    def due(self) -> bool:
        return time.monotonic() - self._since > _SECONDS

    def flush(self) -> None:
        if self._new:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"features.{self._number:06d}.{self._owner}.safetensors"
            tensors = {"features": torch.cat(self._rows).contiguous()} if self._rows else {}
            with atomic_file(path) as partial:
                # As bytes, since a full disk is then an OSError as everywhere else.
                partial.write_bytes(save(tensors, metadata={"notes": json.dumps(self._new)}))
            self._note(path, self._new)
            self._number += 1
        self._clear()


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
) -> tuple[dict[str, dict[str, Any]], torch.Tensor]:
    """Notes on the images of ``batch``, and the rows [B, D] of those that have features."""
    notes: dict[str, dict[str, Any]] = {image.name: {"stamp": stamp_of(image)} for image in batch}
    tensors = {}
    for image, what in zip(batch, read, strict=True):
        if isinstance(what, str):
            notes[image.name]["error"] = what
        else:
            tensors[image.name] = what
    if not tensors:
        return notes, torch.zeros(0)
    with torch.inference_mode():
        rows = features(torch.stack([*tensors.values()])).float().cpu()  # [B, D]
    finite = rows.isfinite().all(dim=1)
    for name, good in zip(tensors, finite, strict=True):
        if not good:
            notes[name]["error"] = "its features are not finite"
    return notes, rows[finite]
