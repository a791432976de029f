"""The inspection of a data set, put together: figures, what is worth a look, and samples to look at."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from tqdm import tqdm

from paradiffusion.curation.inspecting.caption_figures import (
    CaptionSample,
    OpeningFigures,
    PaddingFigures,
    TextLimits,
    TokenFigures,
    measure_padding,
    most_tokens,
    read_captions,
    tokens_of,
)
from paradiffusion.curation.inspecting.set_figures import (
    BucketFigures,
    CheckedPictures,
    ImageFigures,
    KindFigures,
    RunFigures,
    buckets_of,
    check_pictures,
    count_of,
    draw_rows,
    extremes_of,
    images_of,
    kind_weights,
    kinds_of,
    run_of,
)
from paradiffusion.data.images import assign_buckets, decode
from paradiffusion.data.index import SampleIndex, TokenCounter, read_sample
from paradiffusion.data.plan import BatchPlan
from paradiffusion.pages import thumbnail_uri


@dataclass(frozen=True)
class InspectSettings:
    """How much is looked at: ``samples`` on the page, ``captions`` read at most, ``check`` images decoded; ``stage``,
    ``resolution`` and ``steps`` (of the whole run) are those of the configuration, for the page."""

    title: str
    stage: int
    resolution: int
    steps: int
    samples: int = 40
    captions: int = 20_000
    check: int = 200
    seed: int = 0


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
    """Everything that the page shows and report.json holds."""

    settings: InspectSettings
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

    def as_json(self) -> dict[str, Any]:
        """The figures, without pictures."""
        document = asdict(self)
        for sample in [*document["shown"], *(row for rows in document["worst"].values() for row in rows)]:
            del sample["thumbnail"]
        return document


def inspect(plan: BatchPlan, counters: list[TokenCounter], limits: TextLimits, settings: InspectSettings) -> Inspection:
    """Look at a data set as the stage's ``plan`` would train on it; the first tokenizer is the stage's own.

    Raises:
        OSError: never for a single sample: what cannot be read is counted and shown.
        UserError: when nothing can be trained on, as BatchPlan does.
    """
    index = plan.index
    read = read_captions(index, counters, settings.captions, settings.seed)
    padding = measure_padding(plan, counters[0], limits, settings.seed) if counters else None
    pictures = check_pictures(index, settings.check, settings.seed)
    kinds = kinds_of(index, kind_weights(plan), padding.kinds if padding else {})
    counts, images, buckets, run = count_of(index), images_of(index), buckets_of(plan), run_of(plan, settings.steps)
    worst = {name: rows for name, rows in {**extremes_of(index), **pictures.worst()}.items() if rows}
    by_tokens = most_tokens(read, 6)
    if not set(by_tokens) <= set(worst.get("longest captions", ())):  # else the same cards again
        worst["captions of the most tokens, of those read"] = by_tokens
    chosen = draw_rows(index, settings.samples, settings.seed)
    wanted = dict.fromkeys([*chosen, *(row for rows in worst.values() for row in rows)])
    bar = tqdm(wanted, desc="pictures", unit="image", mininterval=1, dynamic_ncols=True)
    shown = {row: show(plan, row, counters) for row in bar}
    return Inspection(
        settings=settings,
        batch_size=plan.batch_size,
        run=run,
        counts=counts,
        kinds=kinds,
        tokens=tokens_of(index, read),
        images=images,
        buckets=buckets,
        padding=padding,
        openings=read.openings,
        captions_read=len(read.rows),
        repeated=read.repeated,
        repeated_share=read.repeats / max(read.captions, 1),
        checked=pictures.checked,
        undecodable=[(_name(index, row), reason) for row, reason in pictures.undecodable],
        dark=len(pictures.dark),
        flat=len(pictures.flat),
        notes=notes_of(plan, counts, buckets, padding, read, pictures, run),
        shown=[shown[row] for row in chosen],
        worst={name: [shown[row] for row in rows] for name, rows in worst.items()},
    )


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
    return ShownSample(
        row=row,
        key=_name(index, row),
        source=index.sources[int(index.shard_source[index.shard[row]])],
        width=width,
        height=height,
        bytes=int(index.table["image_size"][row]),
        bucket=f"{bucket[1]}x{bucket[0]}",
        captions=captions,
        tokens={kind: {name: n[at] for name, n in counted.items()} for at, kind in enumerate(captions)},
        words={kind: len(text.split()) for kind, text in captions.items()},
        error=error,
        thumbnail=thumbnail,
    )


def _name(index: SampleIndex, row: int) -> str:
    return f"{index.shards[index.shard[row]].name}/{index.key(row)}"


def figures_json(found: Inspection) -> str:
    """The figures as one JSON document, readable in any language."""
    return json.dumps(found.as_json(), indent=1, ensure_ascii=False) + "\n"


# Our choices: from here on it is worth a look. Alike openings need enough captions to be no accident.
_OPENING_SHARE: Final = 0.1
_FEWEST_OPENINGS: Final = 50
_MANY_EPOCHS: Final = 100
_BAD_SHARE: Final = 0.01


def notes_of(
    plan: BatchPlan,
    counts: dict[str, Any],
    buckets: list[BucketFigures],
    padding: PaddingFigures | None,
    read: CaptionSample,
    pictures: CheckedPictures,
    run: list[RunFigures],
) -> list[str]:
    """One sentence for each thing that stands out."""
    return [
        *_damage(counts, read, pictures),
        *_pictures(buckets, pictures),
        *_captions(padding, read),
        *_run(plan, counts["samples"], buckets, run),
    ]


def _damage(counts: dict[str, Any], read: CaptionSample, pictures: CheckedPictures) -> list[str]:
    notes = []
    if counts["truncated_shards"]:
        notes.append(f"{len(counts['truncated_shards'])} shards are cut short: fetch them again.")
    if counts["without_caption"]:
        notes.append(f"{counts['without_caption']:,} samples have no caption and are left out of training.")
    if counts["without_image"] or counts["bad_json"]:
        notes.append(
            f"{counts['without_image']:,} entries have no image, and {counts['bad_json']:,} have a JSON that is not readable."
        )
    if pictures.undecodable:
        notes.append(
            f"{len(pictures.undecodable):,} of {pictures.checked:,} images that were decoded do not decode: see the worst cases."
        )
    if read.unreadable:
        notes.append(
            f"{read.unreadable:,} samples could not be read: their shards are gone, or shorter than they were."
        )
    return notes


def _pictures(buckets: list[BucketFigures], pictures: CheckedPictures) -> list[str]:
    notes = []
    samples = max(sum(bucket.samples for bucket in buckets), 1)
    enlarged = sum(bucket.enlarged * bucket.samples for bucket in buckets) / samples
    if enlarged > 0.1:
        notes.append(f"{enlarged:.0%} of the images are smaller than their bucket and are enlarged, which blurs them.")
    cropped = sum(bucket.cropped * bucket.samples for bucket in buckets) / samples
    if cropped > 0.1:
        notes.append(f"{cropped:.0%} of the images' area is cropped away: captions may tell of what is not seen.")
    for rows, what in ((pictures.dark, "very dark"), (pictures.flat, "of nearly one colour")):
        if len(rows) > _BAD_SHARE * pictures.checked:
            notes.append(
                f"{len(rows):,} of {pictures.checked:,} images that were decoded are {what}: see the worst cases."
            )
    return notes


def _captions(padding: PaddingFigures | None, read: CaptionSample) -> list[str]:
    notes = []
    if padding is not None and padding.cut > 0.02:
        notes.append(
            f"{padding.cut:.1%} of the captions are longer than conditioning.max_tokens={padding.limit} and lose their end."
        )
    if read.captions and read.repeats > 0.02 * read.captions:
        notes.append(
            f"{read.repeats / read.captions:.1%} of the captions that were read repeat another one word for word."
        )
    for opening in read.openings:
        if opening.n >= _FEWEST_OPENINGS and opening.most and opening.most[0][1] > _OPENING_SHARE:
            words, share = opening.most[0]
            notes.append(
                f"{share:.0%} of the {opening.kind} captions begin with “{words}”: prompts will not, unless that is cut off."
            )
    return notes


def _run(plan: BatchPlan, samples: int, buckets: list[BucketFigures], run: list[RunFigures]) -> list[str]:
    notes = []
    waiting = [bucket for bucket in buckets if 0 < bucket.samples < plan.batch_size]
    if waiting:
        inside = sum(bucket.samples for bucket in waiting)
        notes.append(
            f"{len(waiting)} of {len(buckets)} buckets have fewer samples than a batch of {plan.batch_size} ({inside:,} samples "
            "in all), which therefore wait over several epochs: a smaller data.max_aspect or batch_size helps."
        )
    if samples < plan.batch_size:
        notes.append(f"There are fewer samples ({samples}) than a batch has ({plan.batch_size}).")
    for source in run:
        if source.epochs > _MANY_EPOCHS:
            of = f" of {source.source}" if len(run) > 1 else ""
            notes.append(
                f"max_steps={source.steps} of batch_size={plan.batch_size} show every sample{of} {source.epochs:,.0f} times."
            )
    return notes
