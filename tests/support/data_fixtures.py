"""Small shards for the tests of the data room."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from paradiffusion.data.index import ROW, SampleIndex, load_index
from paradiffusion.data.shards import RawSample, expand_shards, write_shards
from paradiffusion.randomness import seed_from
from paradiffusion.scenes.dataset import demo_samples

SIZES = ((64, 64), (96, 56), (56, 96), (80, 64))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    """Noise, another for each seed."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def half_unreadable(folder: Path, count: int = 40) -> Path:
    """Shards of built-in scenes, every third of which is cut: its header still tells the size, so that it is planned, and read."""
    scenes = enumerate(demo_samples("web", count))
    cut = (replace(one, image=one.image[: len(one.image) // (2 if number % 3 == 0 else 1)]) for number, one in scenes)
    write_shards(cut, folder, count)
    return folder


def sample(number: int, captions: dict[str, str] | None = None) -> RawSample:
    """Sample ``number``: one of four sizes, with a short and a long caption that carry the number."""
    width, height = SIZES[number % len(SIZES)]
    if captions is None:
        captions = {"short": f"thing {number}", "long": f"thing {number} " + "word " * (number % 13)}
    image = encoded(picture(number, width, height))
    return RawSample(f"{number:06d}", image, "png", {"captions": captions, "width": width, "height": height})


def shards_of(folder: Path, count: int, per_shard: int = 20) -> SampleIndex:
    """``count`` samples, written and indexed."""
    write_shards((sample(number) for number in range(count)), folder, per_shard)
    return load_index(expand_shards(folder))


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A tar of exactly these members, as somebody else's tool might write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def as_json(**content: object) -> bytes:
    """The bytes of a JSON object."""
    return json.dumps(content).encode()


def synthetic_index(count: int, shards: int, seed: int = 0) -> SampleIndex:
    """An index of ``count`` samples that exist nowhere: for planning, which reads nothing."""
    rng = np.random.default_rng(seed)
    table = np.zeros(count, ROW)
    table["width"] = rng.integers(300, 900, count)
    table["height"] = rng.integers(300, 900, count)
    return SampleIndex(
        shards=[Path(f"{number:05d}.tar") for number in range(shards)],
        shard=(np.arange(count) * shards // count).astype(np.int32),
        table=table,
        words=rng.integers(1, 200, (count, 2)).astype(np.uint16),
        kinds=["short", "long"],
        ids=rng.integers(0, 1 << 63, count, dtype=np.uint64) ^ np.uint64(seed_from("synthetic")),
        key_bytes=np.zeros(0, np.uint8),
        key_starts=np.zeros(count + 1, np.int64),
    )
