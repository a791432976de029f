"""What a person should look at before training, in sentences."""

from __future__ import annotations

from typing import Any, Final

from paradiffusion.curation.inspecting.caption_figures import CaptionSample
from paradiffusion.curation.inspecting.inspection import BucketFigures
from paradiffusion.curation.inspecting.padding import PaddingFigures
from paradiffusion.curation.inspecting.picture_checks import CheckedPictures
from paradiffusion.curation.inspecting.schedule import RunFigures
from paradiffusion.data.plan import BatchPlan

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
