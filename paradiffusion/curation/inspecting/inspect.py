"""Inspection of a data set: figures of its index, its run and its pictures, what is worth a look, and samples to look at."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Final

import numpy as np
from PIL import ImageStat
from tqdm import tqdm

from paradiffusion.checks import not_negative, positive
from paradiffusion.config import TrainConfig, option
from paradiffusion.curation.inspecting.caption_figures import (
    CaptionSample,
    OpeningFigures,
    PaddingFigures,
    TokenFigures,
    measure_padding,
    most_tokens,
    read_captions,
    tokens_of,
)
from paradiffusion.curation.inspecting.histograms import Distribution, distribution, usual_most
from paradiffusion.curation.journal import read_object
from paradiffusion.data.captions import count_words
from paradiffusion.data.images import MAX_PIXELS, assign_buckets, decode, fitted
from paradiffusion.data.index import COUNTS, SampleIndex, TokenCounter, read_sample
from paradiffusion.data.plan import BatchPlan
from paradiffusion.data.shards import IMAGE_EXTENSIONS
from paradiffusion.errors import UserError
from paradiffusion.pages import thumbnail_uri

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
    counts = np.bincount(index.shard_source[index.shard], minlength=len(index.sources))
    size = sum(int(index.table[f"{part}_size"].sum(dtype=np.int64)) for part in ("image", "json", "text"))
    return {
        "samples": len(index), "shards": len(index.shards), "bytes": size,
        "sources": {name: int(count) for name, count in zip(index.sources, counts, strict=True)},
        "without_caption": int((~index.words.any(axis=1)).sum()),
        **{name: getattr(index, name) for name in COUNTS},
        "unreadable_header": int((index.width == 0).sum()),
        "truncated_shards": [str(shard) for shard in index.truncated],
    }  # fmt: skip


def kinds_of(index: SampleIndex, weights: dict[str, float], planned: dict[str, float]) -> list[KindFigures]:
    """Words of each caption kind, over all samples."""
    figures = []
    total = sum(weights.values()) or 1.0
    for number, kind in enumerate(index.kinds):
        words = index.words[:, number]
        words = words[words > 0]
        bands = {name: float(((words >= low) & (words < high)).mean()) if len(words) else 0.0 for name, (low, high) in BANDS.items()}
        weight = weights.get(kind, 0.0) / total
        figures.append(KindFigures(kind, len(words), weight, planned.get(kind, 0.0), distribution(words), bands))
    return figures


def images_of(index: SampleIndex) -> ImageFigures:
    """Sizes, aspects and formats, over all samples."""
    known = (index.width > 0) & (index.height > 0)
    width, height = index.width[known].astype(np.float64), index.height[known].astype(np.float64)
    area = width * height / 1e6
    edges = np.linspace(0, max(usual_most(area) if len(area) else 1.0, 0.01), 25).tolist()
    formats = np.bincount(index.table["extension"], minlength=len(IMAGE_EXTENSIONS))
    return ImageFigures(
        known=int(known.sum()),
        short_side=distribution(np.minimum(width, height)),
        megapixels=distribution(area, edges),
        aspect=distribution(width / height, ASPECTS),
        formats={name: int(count) for name, count in zip(IMAGE_EXTENSIONS, formats, strict=True) if count},
    )


def buckets_of(plan: BatchPlan) -> list[BucketFigures]:
    """How the samples that can be used fall into the aspect buckets, and what that costs them."""
    index = plan.index
    usable = index.words.any(axis=1)
    number = assign_buckets(index.width, index.height, plan.buckets)
    figures = []
    for at, (tall, wide) in enumerate(plan.buckets):
        inside = usable & (number == at)
        known = inside & (index.width > 0) & (index.height > 0)
        ratio, scale = fitted(index.width[known], index.height[known], tall, wide)
        samples = int(inside.sum())
        cropped = float(ratio.mean()) if len(ratio) else 0.0
        enlarged = float((scale > 1).mean()) if len(scale) else 0.0
        share = samples / max(int(usable.sum()), 1)
        figures.append(BucketFigures(tall, wide, samples, share, samples / plan.batch_size, cropped, enlarged))
    return figures


def extremes_of(index: SampleIndex, count: int = 6) -> dict[str, list[int]]:
    """Rows of the ``count`` worst cases of each sort, the worst first."""
    longest = index.words.max(axis=1, initial=0)
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


def check_pictures(index: SampleIndex, check: int, seed: int) -> CheckedPictures:
    """Decode ``check`` images at most, drawn by seed, and as many of those whose header could not be read."""
    known = np.flatnonzero(index.width > 0)
    drawn = np.random.default_rng(seed + 1).choice(known, min(check, len(known)), replace=False)
    rows = [*np.flatnonzero(index.width == 0)[:check].tolist(), *np.sort(drawn).tolist()]
    bad: list[tuple[int, str]] = []
    decoded: list[tuple[int, ImageStat.Stat]] = []
    for row in tqdm(rows, desc="images", unit="image", mininterval=1, dynamic_ncols=True):
        try:
            decoded.append((row, ImageStat.Stat(decode(read_sample(index, row).image, MAX_PIXELS).convert("L"))))
        except (OSError, ValueError) as error:
            bad.append((row, str(error)))
    dark = sorted((of.mean[0], row) for row, of in decoded if of.mean[0] < DARK)
    flat = sorted((of.stddev[0], row) for row, of in decoded if of.stddev[0] < FLAT)
    return CheckedPictures(len(rows), bad, dark=[row for _, row in dark], flat=[row for _, row in flat])


@dataclass(frozen=True)
class ShownSample:
    """A sample to look at. ``error`` says why its picture is not there; ``tokens[kind]`` maps tokenizers to counts."""

    row: int
    key: str
    source: str
    width: int
    height: int
    bytes: int
    bucket: str
    captions: dict[str, str]
    tokens: dict[str, dict[str, int]]
    words: dict[str, int]
    error: str | None = None
    thumbnail: str = field(default="", repr=False)


@dataclass(frozen=True)
class Inspection:
    """Everything that the page shows and report.json holds. ``settings`` say how much was looked at, and for which stage."""

    settings: dict[str, Any]
    batch_size: int
    run: list[RunFigures]
    counts: dict[str, Any]
    kinds: list[KindFigures]
    tokens: list[TokenFigures]
    images: ImageFigures
    buckets: list[BucketFigures]
    padding: PaddingFigures | None
    openings: list[OpeningFigures]
    captions_read: int
    repeated: list[tuple[str, int]]
    repeated_share: float
    checked: int
    undecodable: list[tuple[str, str]]
    dark: int
    flat: int
    notes: list[str]
    shown: list[ShownSample]
    worst: dict[str, list[ShownSample]]


def inspect(plan: BatchPlan, counters: list[TokenCounter], config: TrainConfig, asked: InspectOptions) -> Inspection:
    """Look at a data set as the stage's ``plan`` would train on it; the first tokenizer is the stage's own. What cannot be read is counted
    and shown; UserError when nothing can be trained on, as BatchPlan does."""
    index, seed = plan.index, config.seed
    read = read_captions(index, counters, asked.captions, seed)
    padding = measure_padding(plan, counters[0], config.conditioning, seed) if counters else None
    pictures = check_pictures(index, asked.check, seed)
    kinds = kinds_of(index, kind_weights(plan), padding.kinds if padding else {})
    counts, images, buckets, run = count_of(index), images_of(index), buckets_of(plan), run_of(plan, config.max_steps)
    worst = {
        **extremes_of(index), "images that do not decode": [row for row, _ in pictures.undecodable[:_SHOWN]],
        "very dark images": pictures.dark[:_SHOWN], "images of nearly one colour": pictures.flat[:_SHOWN],
    }  # fmt: skip
    worst = {name: rows for name, rows in worst.items() if rows}
    by_tokens = most_tokens(read, 6)
    if not set(by_tokens) <= set(worst.get("longest captions", ())):  # else the same cards again
        worst["captions of the most tokens, of those read"] = by_tokens
    chosen = np.random.default_rng(seed).choice(len(index), min(asked.samples, len(index)), replace=False).tolist()
    wanted = dict.fromkeys([*chosen, *(row for rows in worst.values() for row in rows)])
    bar = tqdm(wanted, desc="pictures", unit="image", mininterval=1, dynamic_ncols=True)
    shown = {row: show(plan, row, counters) for row in bar}
    settings = {
        "title": title_of(config), "stage": config.stage, "resolution": config.data.resolution, "steps": config.max_steps,
        "samples": asked.samples, "captions": asked.captions, "check": asked.check, "seed": seed,
    }  # fmt: skip
    return Inspection(
        settings=settings, batch_size=plan.batch_size, run=run, counts=counts, kinds=kinds, tokens=tokens_of(index, read),
        images=images, buckets=buckets, padding=padding, openings=read.openings, captions_read=len(read.rows),
        repeated=read.repeated, repeated_share=read.repeats / max(read.captions, 1), checked=pictures.checked,
        undecodable=[(_name(index, row), reason) for row, reason in pictures.undecodable],
        dark=len(pictures.dark), flat=len(pictures.flat),
        notes=list(notes_of(plan, counts, buckets, padding, read, pictures, run)), shown=[shown[row] for row in chosen],
        worst={name: [shown[row] for row in rows] for name, rows in worst.items()},
    )  # fmt: skip


def show(plan: BatchPlan, row: int, counters: list[TokenCounter]) -> ShownSample:
    """One sample with a small picture, all its captions and their tokens."""
    index = plan.index
    width, height = int(index.width[row]), int(index.height[row])
    bucket = plan.buckets[int(assign_buckets(index.width[row : row + 1], index.height[row : row + 1], plan.buckets)[0])]
    captions: dict[str, str] = {}
    error, thumbnail = None, ""
    try:
        raw = read_sample(index, row)
        captions = raw.meta["captions"]
        thumbnail = thumbnail_uri(decode(raw.image))
    except (OSError, ValueError) as caught:
        error = str(caught)
    counted = {counter.name: counter.count(list(captions.values())) if captions else [] for counter in counters}
    source, size = index.sources[int(index.shard_source[index.shard[row]])], int(index.table["image_size"][row])
    tokens = {kind: {name: n[at] for name, n in counted.items()} for at, kind in enumerate(captions)}
    words = {kind: count_words(text) for kind, text in captions.items()}
    return ShownSample(
        row, _name(index, row), source, width, height, size, f"{bucket[1]}x{bucket[0]}", captions, tokens, words, error,
        thumbnail,
    )  # fmt: skip


def _name(index: SampleIndex, row: int) -> str:
    return f"{index.shards[index.shard[row]].name}/{index.key(row)}"


def title_of(config: TrainConfig) -> str:
    """What the page is called: where the data lies, and for which stage it was looked at."""
    where = " + ".join(source.title for source in config.data.sources) or str(config.data.folder or config.data.shards)
    return f"{where} for stage {config.stage} of {config.preset}"


def figures_json(found: Inspection) -> str:
    """The figures, without pictures, as one JSON document, readable in any language."""
    document = asdict(found)
    for sample in [*document["shown"], *(row for rows in document["worst"].values() for row in rows)]:
        del sample["thumbnail"]
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


# Our choices: from here on it is worth a look. Alike openings need enough captions to be no accident.
_OPENING_SHARE: Final = 0.1
_FEWEST_OPENINGS: Final = 50
_MANY_EPOCHS: Final = 100
_BAD_SHARE: Final = 0.01


def notes_of(
    plan: BatchPlan, counts: dict[str, Any], buckets: list[BucketFigures], padding: PaddingFigures | None,
    read: CaptionSample, pictures: CheckedPictures, run: list[RunFigures],
) -> Iterator[str]:  # fmt: skip
    """One sentence for each thing that stands out: damage, pictures, captions, the run."""
    if counts["truncated_shards"]:
        yield f"{len(counts['truncated_shards'])} shards are cut short: fetch them again."
    if counts["without_caption"]:
        yield f"{counts['without_caption']:,} samples have no caption and are left out of training."
    if counts["without_image"] or counts["bad_json"]:
        bad = counts["bad_json"]
        yield f"{counts['without_image']:,} entries have no image, and {bad:,} have a JSON that is not readable."
    decoded = f"of {pictures.checked:,} images that were decoded"
    if pictures.undecodable:
        yield f"{len(pictures.undecodable):,} {decoded} do not decode: see the worst cases."
    if read.unreadable:
        yield f"{read.unreadable:,} samples could not be read: their shards are gone, or shorter than they were."
    samples = max(sum(bucket.samples for bucket in buckets), 1)
    enlarged = sum(bucket.enlarged * bucket.samples for bucket in buckets) / samples
    if enlarged > 0.1:
        yield f"{enlarged:.0%} of the images are smaller than their bucket and are enlarged, which blurs them."
    cropped = sum(bucket.cropped * bucket.samples for bucket in buckets) / samples
    if cropped > 0.1:
        yield f"{cropped:.0%} of the images' area is cropped away: captions may tell of what is not seen."
    for rows, what in ((pictures.dark, "very dark"), (pictures.flat, "of nearly one colour")):
        if len(rows) > _BAD_SHARE * pictures.checked:
            yield f"{len(rows):,} {decoded} are {what}: see the worst cases."
    if padding is not None and padding.cut > 0.02:
        limit = f"conditioning.max_tokens={padding.limit}"
        yield f"{padding.cut:.1%} of the captions are longer than {limit} and lose their end."
    if read.captions and read.repeats > 0.02 * read.captions:
        share = read.repeats / read.captions
        yield f"{share:.1%} of the captions that were read repeat another one word for word."
    for opening in read.openings:
        words, share = opening.most[0] if opening.most else ("", 0.0)
        if opening.n >= _FEWEST_OPENINGS and share > _OPENING_SHARE:
            begin = f"of the {opening.kind} captions begin with “{words}”"
            yield f"{share:.0%} {begin}: prompts will not, unless that is cut off."
    waiting = [bucket.samples for bucket in buckets if 0 < bucket.samples < plan.batch_size]
    if waiting:
        yield (
            f"{len(waiting)} of {len(buckets)} buckets have fewer samples than a batch of {plan.batch_size} "
            f"({sum(waiting):,} samples in all), which therefore wait over several epochs: a smaller data.max_aspect or "
            "batch_size helps."
        )
    if counts["samples"] < plan.batch_size:
        yield f"There are fewer samples ({counts['samples']}) than a batch has ({plan.batch_size})."
    for source in run:
        if source.epochs > _MANY_EPOCHS:
            shown = f"every sample of {source.source}" if len(run) > 1 else "every sample"
            yield f"max_steps={source.steps} of batch_size={plan.batch_size} show {shown} {source.epochs:,.0f} times."


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
        try:  # known before the data is read, which may take long
            path.parent.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=path.parent).close()
        except OSError:
            raise UserError(f"output={self.output}: {path.parent} is no folder that can be written to; choose another one.") from None
        figures = path.with_suffix(".json")  # an earlier report's may be replaced
        if figures.exists() and not {"settings", "counts", "notes"} <= set(read_object(figures, "choose another name for output=")):
            raise UserError(f"output={self.output}: {figures} is there already and holds no figures of this script; choose another name.")
        return path
