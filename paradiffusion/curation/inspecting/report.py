"""The inspection of a data set, put together: figures, what is worth a look, and samples to look at."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from tqdm import tqdm

from paradiffusion.curation.inspecting.caption_figures import (
    OpeningFigures,
    TokenFigures,
    most_tokens,
    read_captions,
    tokens_of,
)
from paradiffusion.curation.inspecting.inspection import (
    BucketFigures,
    ImageFigures,
    KindFigures,
    buckets_of,
    count_of,
    draw_rows,
    extremes_of,
    images_of,
    kinds_of,
)
from paradiffusion.curation.inspecting.notes import notes_of
from paradiffusion.curation.inspecting.padding import PaddingFigures, TextLimits, measure_padding
from paradiffusion.curation.inspecting.picture_checks import check_pictures
from paradiffusion.curation.inspecting.schedule import RunFigures, kind_weights, run_of
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
