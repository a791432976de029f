"""The built-in data set: four sets of drawn scenes with captions in each of two worlds, written as WebDataset shards.

``web`` stands for stage 1's web pairs, ``big`` for stage 2's paragraphs, ``small`` for stage 3's few fine pictures at
double size, ``val`` for validation with compositions that no training set shows. Each shard is a function of (seed,
set, number), so its bytes do not depend on how many processes drew it.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from paradiffusion.atomic import hold
from paradiffusion.config import WORLDS, DataConfig
from paradiffusion.data.shards import RawSample, write_shards
from paradiffusion.errors import UserError
from paradiffusion.machine import cores
from paradiffusion.runner import Tell, make_bar, run_tasks
from paradiffusion.scenes.captions import KINDS, captions
from paradiffusion.scenes.drawing import cleanliness, draw
from paradiffusion.scenes.world import SETS, Scene, make_scene, scene_from_meta, scene_to_meta

__all__ = [
    "DEFAULT_SIZES", "KINDS", "SETS", "WORLDS", "Scene", "captions", "demo_samples", "draw", "ensure_demo_data",
    "make_scene", "scene_from_meta", "scene_to_meta",
]  # fmt: skip

VERSION = 5  # raise it when scenes, captions or their layout change, so that old folders are drawn anew
DEFAULT_SIZES = {
    "small": {"web": 8_000, "big": 4_000, "small": 6_000, "val": 500},
    "large": {"web": 16_000, "big": 8_000, "small": 4_000, "val": 500},
}
SAMPLES_PER_SHARD = 500
NOTE = "demo.json"


def demo_samples(set_name: str, count: int, seed: int = 0, first: int = 0, world: str = "small") -> Iterator[RawSample]:
    """Samples ``first`` to ``first + count - 1`` of a set: a PNG, and its captions, ground truth and cleanliness as JSON."""
    for number in range(first, first + count):
        scene = make_scene(set_name, seed, number, world)
        data, picture = io.BytesIO(), draw(scene)
        picture.save(data, "png", compress_level=3)
        scores = {"cleanliness": round(cleanliness(scene, picture), 3)}
        meta = {"captions": captions(scene, seed, number), **scene_to_meta(scene), "scores": scores}
        yield RawSample(f"{set_name}-{number:06d}", data.getvalue(), "png", meta)


def ensure_demo_data(folder: Path, sizes: dict[str, int] | None = None, seed: int = 0,
                     processes: int | None = None, world: str = "small") -> dict[str, Path]:  # fmt: skip
    """Make sure that ``folder`` holds the sets of a world with these sizes, and give the folder of each set.

    Shards are drawn in a folder beside it, which takes its name at the end: a folder is whole or not there. An
    interrupted build goes on where it stopped; of two processes, one builds and the other waits for it. A demo folder
    of other sizes or another world is replaced; further sets in it stay. UserError for wrong sizes, an unknown world, or a
    folder that holds anything else.
    """
    folder = Path(folder).resolve()  # what a link names may be replaced, a link to a folder not
    if world not in WORLDS:
        raise UserError(f"Unknown demo world '{world}', expected one of {', '.join(WORLDS)}; choose one of these.")
    wanted = _checked(DEFAULT_SIZES[world] if sizes is None else sizes)
    note: dict[str, Any] = {"version": VERSION, "world": world, "seed": seed, "sizes": wanted}
    if not _fits(folder, note):
        with _lock(folder.parent / f".{folder.name}.lock"):
            if not _fits(folder, note):  # it may have been built while this process waited
                _refuse_foreign(folder)
                _build(folder, note, processes)
    return {name: folder / name for name in note["sizes"]}


def make_wanted(data: DataConfig) -> None:
    """The built-in scenes that ``data`` reads, made when they are missing."""
    wanted = [data.shards] if isinstance(data.shards, str) else list(data.shards or ())
    if data.demo and any(str(spec).startswith(data.demo_folder) for spec in wanted):
        ensure_demo_data(Path(data.demo_folder), dict(data.demo_sizes) or None, world=data.world)


def _checked(sizes: dict[str, int]) -> dict[str, int]:
    unknown = sorted(set(sizes) - set(SETS))
    if unknown or not sizes or any(size < 1 for size in sizes.values()):
        raise UserError(
            f"Demo sizes {sizes} cannot be built, expected at least 1 sample for one or more of {', '.join(SETS)}; "
            "leave out the sets that are not wanted."
        )
    return {name: int(sizes[name]) for name in SETS if name in sizes}


def _shard_names(size: int) -> list[str]:
    return [f"{number:06d}.tar" for number in range(-(-size // SAMPLES_PER_SHARD))]


def _fits(folder: Path, note: dict[str, Any]) -> bool:
    found = _read_note(folder / NOTE)
    if not isinstance(found, dict) or found != note | {"sizes": found.get("sizes")}:
        return False
    if not isinstance(found["sizes"], dict) or not note["sizes"].items() <= found["sizes"].items():
        return False
    shards = [folder / name / shard for name, size in note["sizes"].items() for shard in _shard_names(size)]
    return all(shard.is_file() for shard in shards)


def _read_note(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"'{folder}' is a file, expected a folder for the demo data; choose another name.")
    entries = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
    foreign = [name for name in entries if name not in (*SETS, NOTE)]
    if foreign or (entries and NOTE not in entries):
        raise UserError(
            f"Folder '{folder}' holds '{(foreign or entries)[0]}', which is not of a finished demo data set, expected "
            "a new or empty folder; choose another one or empty it."
        )


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Wait for and hold an exclusive lock; the operating system drops it when this process dies."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise UserError(
            f"The demo data cannot be made in '{path.parent}' ({error.strerror}); choose another folder (data.demo_folder=)."
        ) from None
    try:
        hold(handle, wait=True)
        yield
    finally:
        os.close(handle)


def _build(folder: Path, note: dict[str, Any], processes: int | None) -> None:
    building = folder.with_name(f".{folder.name}.building")
    if building.exists() and _read_note(building / "plan.json") != note:
        shutil.rmtree(building)  # left by a build with other sizes
    building.mkdir(exist_ok=True)
    (building / "plan.json").write_text(json.dumps(note))
    tasks = []
    for name, size in note["sizes"].items():
        for number, shard in enumerate(_shard_names(size)):
            if not (building / name / shard).exists():
                first = number * SAMPLES_PER_SHARD
                count = min(SAMPLES_PER_SHARD, size - first)
                tasks.append((building / name / shard, name, first, count, note["seed"], note["world"]))
    total = sum(note["sizes"].values())
    done = total - sum(task[3] for task in tasks)
    # Forked children start at once and need no importable main module; they only draw, and touch no torch state. They end with
    # this process, whose lock they hold too.
    bar = make_bar("drawing the demo data", "pictures", total, done, shown=sys.stderr.isatty())
    run_tasks(bar, _draw_shard, tasks, lambda: None, processes or cores())
    for left in building.glob("*/.*"):  # of builds that were killed in the midst of a shard
        shutil.rmtree(left, ignore_errors=True)
    (building / "plan.json").replace(building / NOTE)
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        building.rename(folder)
        shutil.rmtree(old)
    else:
        building.rename(folder)


Task = tuple[Path, str, int, int, int, str]  # shard, set, first sample, samples, seed, world


def _draw_shard(task: Task, tell: Tell) -> None:
    shard, set_name, first, count, seed, world = task
    part = shard.with_name(f".{shard.stem}.{os.getpid()}")
    (written,) = write_shards(demo_samples(set_name, count, seed, first, world), part, SAMPLES_PER_SHARD)
    written.replace(shard)
    shutil.rmtree(part)
    tell(count)
