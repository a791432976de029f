"""A step as a person looks at it: its samples with their losses, as a page, pictures and JSON lines in one folder."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from paradiffusion.atomic import write_atomic
from paradiffusion.data.captions import is_dropped
from paradiffusion.data.images import decode, to_array
from paradiffusion.data.index import read_sample
from paradiffusion.data.loader import Batch, join_pixels
from paradiffusion.data.plan import BatchPlan
from paradiffusion.data.shards import read_place
from paradiffusion.pages import thumbnail_uri
from paradiffusion.sampling.gallery import save_png
from paradiffusion.text.encoder import TextEncoder
from paradiffusion.training.replay_page import page_of
from paradiffusion.training.seen import has_pixels

PAGE, LINES, FACTS, IMAGES = "index.html", "samples.jsonl", "replay.json", "images"


@dataclass
class ReplayedSample:
    """One sample of a step.

    Attributes:
        rank, micro: which process had it, in which of its micro-batches.
        caption: as chosen, whole; ``kept`` is what the text encoder read of it, decoded from the tokens, "" where the
            caption was dropped; ``tokens`` counts all, ``limit`` what is kept at most.
        time: in the objective's own units; ``noise_share`` the same from 0 (clean) to 1 (noise).
        loss: unweighted; None where there was no checkpoint to take it with.
        weight: 0 where the sample stands in for one that could not be read.
        image: its file beside the page, pixels as they are given to the autoencoder; None where its latents came from a
            cache and it could not be read.
        thumbnail: a data URI.
    """

    slot: int
    rank: int
    micro: int
    key: str
    kind: str
    caption: str
    dropped: bool
    kept: str
    tokens: int
    limit: int
    time: float
    noise_share: float
    weight: float
    loss: float | None
    image: str | None
    height: int
    width: int
    thumbnail: str = field(default="", repr=False)

    @property
    def truncated(self) -> bool:
        """Whether the text encoder did not read all of the caption."""
        return self.tokens > self.limit and not self.dropped


@dataclass
class Replay:
    """A step, whole.

    Attributes:
        facts: name and value of what is told of the step, in order.
        verdict: one sentence on how sure it is that this is what the step saw; ``certain`` says so in a word:
            "identical", "different" or "unknown".
    """

    title: str
    step: int
    facts: dict[str, Any]
    verdict: str
    certain: str
    samples: list[ReplayedSample]

    def by_loss(self) -> list[ReplayedSample]:
        """The samples, those whose loss is no number first, then from the largest loss down; by slot without losses."""

        def order(sample: ReplayedSample) -> tuple[float, int]:
            loss = sample.loss
            if loss is None:
                return 0.0, sample.slot
            return (-math.inf if not math.isfinite(loss) else -loss), sample.slot

        return sorted(self.samples, key=order)


def samples_of(
    batch: Batch,
    rank: int,
    times: torch.Tensor,
    errors: torch.Tensor | None,
    encoder: TextEncoder,
    plan: BatchPlan,
    train_timesteps: int,
    dropout: float,
) -> list[ReplayedSample]:
    """What there is to say of a micro-batch's samples; pictures are named, not written.

    Args:
        times, errors: [b], of the objective and of the model (None: no losses).
        dropout: the share of captions that are dropped, which tells dropped ones from empty ones.
    """
    texts = encoder.tokenize(batch.captions)
    rows = plan.batch(batch.step).rows
    pictured = has_pixels(batch)
    samples = []
    for i, slot in enumerate(batch.slots.tolist()):
        weight = float(batch.weights[i])
        dropped = is_dropped(plan.seed, batch.step, slot, dropout)
        caption = batch.captions[i]
        if dropped and weight:  # The batch has only the empty text; what was dropped lies in the shard.
            caption = _whole_caption(plan, int(rows[slot]), batch.keys[i], batch.kinds[i])
        kept = "" if dropped else _kept(encoder, texts.ids[i], texts.mask[i], texts.prefix)
        pixels = batch.pixels[i] if pictured else batch.pixels
        samples.append(
            ReplayedSample(
                slot=slot,
                rank=rank,
                micro=batch.micro,
                key=batch.keys[i],
                kind=batch.kinds[i],
                caption=caption,
                dropped=dropped,
                kept=kept,
                tokens=texts.lengths[i],
                limit=encoder.limit,
                time=float(times[i]),
                noise_share=float(times[i]) / train_timesteps,
                weight=weight,
                loss=None if errors is None else float(errors[i]),
                image=f"{IMAGES}/{slot:05d}.png" if pictured else None,
                height=pixels.shape[-2] if pictured else 0,
                width=pixels.shape[-1] if pictured else 0,
                thumbnail=thumbnail_uri(_picture(pixels)) if pictured else "",
            )
        )
    return samples


def _key(plan: BatchPlan, row: int) -> str:
    """The sample's name as batches have it."""
    return f"{plan.index.shards[plan.index.shard[row]].name}/{plan.index.key(row)}"


def _whole_caption(plan: BatchPlan, row: int, key: str, kind: str) -> str:
    """The caption of the sample ``key`` as it was chosen, "" where the plan has another in its place (a stream)."""
    if _key(plan, row) != key:
        return ""
    caption: str = read_sample(plan.index, row).meta["captions"].get(kind, "")
    return caption


def with_pictures(batch: Batch, plan: BatchPlan) -> Batch:
    """``batch`` with the pictures that its cached latents were made of, from the shards; as it is where one cannot be read."""
    if has_pixels(batch):
        return batch
    planned = plan.batch(batch.step)
    by_key = {_key(plan, row): row for row in planned.rows.tolist()}
    pictures = []
    try:
        for slot, key in zip(batch.slots.tolist(), batch.keys, strict=True):
            row = int(planned.rows[slot])
            # In a slot of weight 0 stands another sample of the step.
            place = plan.index.place(row if _key(plan, row) == key else by_key[key])
            image = decode(read_place(place).image, cover=planned.bucket)
            pictures.append(to_array(image, planned.bucket, place.id))
    except (OSError, ValueError, KeyError):
        return batch
    return replace(batch, pixels=join_pixels(pictures))


def _kept(encoder: TextEncoder, ids: torch.Tensor, mask: torch.Tensor, prefix: int) -> str:
    """The text that the kept tokens spell; the instruction before it is left out."""
    real = ids[prefix:][mask[prefix:]].tolist()
    text: str = encoder.tokenizer.decode(real, skip_special_tokens=True)
    return text.strip()


def _picture(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def write_images(folder: Path, batch: Batch) -> None:
    """The crops of a micro-batch as PNG, which keeps every pixel, named by slot."""
    if not has_pixels(batch):
        return
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    for slot, pixels, key in zip(batch.slots.tolist(), batch.pixels, batch.keys, strict=True):
        array = pixels.permute(1, 2, 0).contiguous().numpy()
        save_png(folder / IMAGES / f"{slot:05d}.png", array, {"key": key, "step": batch.step, "slot": slot})


def write_replay(folder: Path, replay: Replay) -> Path:
    """Write the page, the JSON lines (from the largest loss down) and the facts; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    ordered = replay.by_loss()
    write_atomic(folder / LINES, "".join(json.dumps(_as_row(s), ensure_ascii=False) + "\n" for s in ordered))
    facts = {"step": replay.step, "certain": replay.certain, "verdict": replay.verdict, **replay.facts}
    write_atomic(folder / FACTS, json.dumps(_finite(facts), indent=1, ensure_ascii=False) + "\n")
    write_atomic(folder / PAGE, page_of(replay.title, replay.facts, replay.verdict, replay.certain, ordered))
    return folder / PAGE


def _as_row(sample: ReplayedSample) -> dict[str, Any]:
    row = asdict(sample)
    del row["thumbnail"]
    row["truncated"] = sample.truncated
    return _finite(row)


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no word for what is not a number: such values become texts ("nan", "inf")."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def mean_loss(samples: Sequence[ReplayedSample]) -> float | None:
    """The mean unweighted loss of the samples that could be read, as log.jsonl reports it; None without losses."""
    losses = [sample.loss for sample in samples if sample.weight and sample.loss is not None]
    return sum(losses) / len(losses) if losses else None
