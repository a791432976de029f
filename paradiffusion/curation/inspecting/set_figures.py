"""Figures of a data set: what its index tells of all samples, what a run makes of them, and what decoding some of them shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from PIL import ImageStat
from tqdm import tqdm

from paradiffusion.curation.inspecting.histograms import Distribution, distribution, usual_most
from paradiffusion.data.images import MAX_PIXELS, assign_buckets, decode
from paradiffusion.data.index import SampleIndex, read_sample
from paradiffusion.data.plan import BatchPlan
from paradiffusion.data.shards import IMAGE_EXTENSIONS

# Words, as the paper's table has them.
BANDS = {"50-100": (50, 100), "100-150": (100, 150), "150-200": (150, 200), "over 200": (200, 1 << 16)}
ASPECTS = [0.2, 0.33, 0.4, 0.5, 0.57, 0.67, 0.75, 0.8, 0.95, 1.05, 1.25, 1.34, 1.51, 1.78, 2.01, 2.5, 3.0, 5.0]


@dataclass(frozen=True)
class KindFigures:
    """Captions of one kind: how many samples have one, its configured weight and the share of it in planned batches,
    words, the share of each band of the paper's table."""

    kind: str
    samples: int
    weight: float
    planned: float
    words: Distribution | None
    bands: dict[str, float]


@dataclass(frozen=True)
class BucketFigures:
    """One aspect bucket: ``cropped`` is the mean share of an image's area that is cut away, ``enlarged`` the share of its
    images that are smaller than the bucket, ``batches`` how many an epoch brings on average."""

    height: int
    width: int
    samples: int
    share: float
    batches: float
    cropped: float
    enlarged: float


@dataclass(frozen=True)
class ImageFigures:
    """Sizes of the images whose header could be read, in pixels."""

    known: int
    short_side: Distribution | None
    megapixels: Distribution | None
    aspect: Distribution | None
    formats: dict[str, int]


def count_of(index: SampleIndex) -> dict[str, Any]:
    """What there is, and what was passed over when the shards were indexed."""
    size = sum(int(index.table[f"{part}_size"].sum(dtype=np.int64)) for part in ("image", "json", "text"))
    return {
        "samples": len(index),
        "shards": len(index.shards),
        "bytes": size,
        "sources": source_counts(index),
        "without_caption": int((~index.words.any(axis=1)).sum()),
        "without_image": index.without_image,
        "stray": index.stray,
        "bad_json": index.bad_json,
        "unreadable_header": int((index.width == 0).sum()),
        "truncated_shards": [str(shard) for shard in index.truncated],
    }


def source_counts(index: SampleIndex) -> dict[str, int]:
    """Samples of each source."""
    counts = np.bincount(index.shard_source[index.shard], minlength=len(index.sources))
    return {name: int(count) for name, count in zip(index.sources, counts, strict=True)}


def kinds_of(index: SampleIndex, weights: dict[str, float], planned: dict[str, float]) -> list[KindFigures]:
    """Words of each caption kind, over all samples."""
    figures = []
    total = sum(weights.values()) or 1.0
    for number, kind in enumerate(index.kinds):
        words = index.words[:, number]
        words = words[words > 0]
        bands = {
            name: float(((words >= low) & (words < high)).mean()) if len(words) else 0.0
            for name, (low, high) in BANDS.items()
        }
        weight = weights.get(kind, 0.0) / total
        figures.append(KindFigures(kind, len(words), weight, planned.get(kind, 0.0), distribution(words), bands))
    return figures


def images_of(index: SampleIndex) -> ImageFigures:
    """Sizes, aspects and formats, over all samples."""
    known = (index.width > 0) & (index.height > 0)
    width, height = index.width[known].astype(np.float64), index.height[known].astype(np.float64)
    formats = np.bincount(index.table["extension"], minlength=len(IMAGE_EXTENSIONS))
    return ImageFigures(
        known=int(known.sum()),
        short_side=distribution(np.minimum(width, height)),
        megapixels=distribution(width * height / 1e6, _megapixel_edges(width * height / 1e6)),
        aspect=distribution(width / height, ASPECTS) if len(width) else None,
        formats={name: int(count) for name, count in zip(IMAGE_EXTENSIONS, formats, strict=True) if count},
    )


def _megapixel_edges(values: np.ndarray) -> list[float]:
    high = usual_most(values) if len(values) else 1.0
    return np.linspace(0, max(high, 0.01), 25).tolist()


def buckets_of(plan: BatchPlan) -> list[BucketFigures]:
    """How the samples that can be used fall into the aspect buckets, and what that costs them."""
    index = plan.index
    usable = index.words.any(axis=1)
    number = assign_buckets(index.width, index.height, plan.buckets)
    figures = []
    for at, (tall, wide) in enumerate(plan.buckets):
        inside = usable & (number == at)
        known = inside & (index.width > 0) & (index.height > 0)
        width, height = index.width[known].astype(np.float64), index.height[known].astype(np.float64)
        ratio = (width / height) / (wide / tall)
        scale = np.maximum(wide / width, tall / height)
        figures.append(
            BucketFigures(
                height=tall,
                width=wide,
                samples=int(inside.sum()),
                share=float(inside.sum() / max(usable.sum(), 1)),
                batches=float(inside.sum() / plan.batch_size),
                cropped=float(1 - np.minimum(ratio, 1 / ratio).mean()) if len(ratio) else 0.0,
                enlarged=float((scale > 1).mean()) if len(scale) else 0.0,
            )
        )
    return figures


def extremes_of(index: SampleIndex, count: int = 6) -> dict[str, list[int]]:
    """Rows of the ``count`` worst cases of each sort, the worst first."""
    longest = index.words.max(axis=1) if len(index.kinds) else np.zeros(len(index), np.uint16)
    shortest = np.where(index.words > 0, index.words, np.iinfo(np.uint16).max).min(axis=1, initial=65535)
    known = (index.width > 0) & (index.height > 0)
    width, height = np.where(known, index.width, 1), np.where(known, index.height, 1)
    stretch = np.abs(np.log(width / height))
    area = width.astype(np.int64) * height
    largest = np.iinfo(np.int64).max
    return {
        "longest captions": _top(-longest.astype(np.int64), count, longest > 0),
        "shortest captions": _top(shortest, count, longest > 0),
        "most extreme aspects": _top(-stretch, count, stretch > 0),
        "smallest images": _top(np.where(known, area, largest), count, known),
        "without a caption": np.flatnonzero(longest == 0)[:count].tolist(),
    }


def _top(values: np.ndarray, count: int, allowed: np.ndarray) -> list[int]:
    """The rows with the smallest ``values`` among those ``allowed``."""
    rows = np.flatnonzero(allowed)
    if len(rows) > count:
        rows = rows[np.argpartition(values[rows], count)[:count]]
    return [int(row) for row in rows[np.argsort(values[rows], kind="stable")]]


def draw_rows(index: SampleIndex, count: int, seed: int) -> list[int]:
    """``count`` rows drawn by seed, fewer where there are fewer."""
    return np.random.default_rng(seed).choice(len(index), min(count, len(index)), replace=False).tolist()


@dataclass(frozen=True)
class RunFigures:
    """What ``steps`` steps see of one source: ``seen`` samples, which is ``epochs`` times all the ``samples`` that can be
    used, at its ``share`` of the batches."""

    source: str
    steps: int
    samples: int
    share: float
    seen: float
    epochs: float


def run_of(plan: BatchPlan, steps: int) -> list[RunFigures]:
    """What a run of ``steps`` steps sees, by source."""
    shares = source_shares(plan)
    total = steps * plan.batch_size
    return [
        RunFigures(name, steps, stream.size, share, total * share, total * share / stream.size)
        for name, stream, share in zip(plan.index.sources, plan.streams, shares, strict=True)
    ]


def source_shares(plan: BatchPlan) -> list[float]:
    """Each source's share of the batches."""
    total = sum(share.weight for share in plan.shares)
    return [share.weight / total for share in plan.shares]


def kind_weights(plan: BatchPlan) -> dict[str, float]:
    """The configured share of each caption kind over all batches, as drawn, before samples that lack it fall back:
    sources may have weights of their own."""
    weights: dict[str, float] = {}
    for share, own in zip(source_shares(plan), plan.captions, strict=True):
        for kind, weight in own.items():
            weights[kind] = weights.get(kind, 0.0) + share * weight / sum(own.values())
    return weights


# Our choices, of 255: below such a mean hardly anything is seen; a mild gradient over a picture deviates by more.
DARK, FLAT = 16.0, 6.0
_SHOWN: Final = 12


@dataclass(frozen=True)
class CheckedPictures:
    """Of ``checked`` pictures, rows with the reason of those that do not decode, and rows of those whose mean brightness is
    below ``DARK``, and of those whose brightness deviates by less than ``FLAT``, the worst first."""

    checked: int
    undecodable: list[tuple[int, str]]
    dark: list[int]
    flat: list[int]

    def worst(self) -> dict[str, list[int]]:
        """The rows to be shown, by what is wrong with them."""
        return {
            "images that do not decode": [row for row, _ in self.undecodable[:_SHOWN]],
            "very dark images": self.dark[:_SHOWN],
            "images of nearly one colour": self.flat[:_SHOWN],
        }


def check_pictures(index: SampleIndex, check: int, seed: int) -> CheckedPictures:
    """Decode ``check`` images at most, drawn by seed, and as many of those whose header could not be read."""
    known = np.flatnonzero(index.width > 0)
    drawn = np.random.default_rng(seed + 1).choice(known, min(check, len(known)), replace=False)
    rows = [*np.flatnonzero(index.width == 0)[:check].tolist(), *np.sort(drawn).tolist()]
    bad: list[tuple[int, str]] = []
    dark: list[tuple[float, int]] = []
    flat: list[tuple[float, int]] = []
    for row in tqdm(rows, desc="images", unit="image", mininterval=1, dynamic_ncols=True):
        try:
            brightness = ImageStat.Stat(decode(read_sample(index, row).image, MAX_PIXELS).convert("L"))
        except (OSError, ValueError) as error:
            bad.append((row, str(error)))
            continue
        (mean,), (deviation,) = brightness.mean, brightness.stddev
        if mean < DARK:
            dark.append((mean, row))
        if deviation < FLAT:
            flat.append((deviation, row))
    return CheckedPictures(len(rows), bad, dark=[row for _, row in sorted(dark)], flat=[row for _, row in sorted(flat)])
