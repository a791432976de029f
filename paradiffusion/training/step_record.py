"""Record of a training step: digests of what it saw (samples_seen/), its samples with their losses, and the page of them.

A line of ``samples_seen/rankN_fromSTEP.jsonl`` is one step of one process, samples in the order in which it took them. By the
digests a replay is known to be the same to the byte; they cost about a millisecond per megabyte of pixels.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple, TextIO

import torch
from PIL import Image

from paradiffusion.atomic import write_atomic
from paradiffusion.config import TrainConfig
from paradiffusion.data.captions import is_dropped
from paradiffusion.data.loader import Batch, LoaderSettings, make_loader
from paradiffusion.data.plan import BatchPlan
from paradiffusion.data.shards import read_place
from paradiffusion.pages import render, thumbnail_uri
from paradiffusion.sampling.gallery import save_png
from paradiffusion.training.inputs import Inputs

SEEN_FOLDER: Final = "samples_seen"
PAGE, LINES, FACTS, IMAGES = "index.html", "samples.jsonl", "replay.json", "images"
MAX_EMBEDDED: Final = 600  # pictures; a page with more shows those with the smaller losses by their files
COLUMNS: Final = ("slots", "keys", "pixels", "captions", "weights")  # of a line: the fields of Seen


class Seen(NamedTuple):
    """One sample as a step saw it: digests of the cropped ``pixels`` with their size ("" where no image was decoded, since its latents came
    from a cache, whose key names everything that made them) and of the ``caption`` as it went to the tokenizer, empty where it was
    dropped; ``weight`` is 0 where another sample stands in for one that could not be read."""

    slot: int
    key: str
    pixels: str
    caption: str
    weight: float


def has_pixels(batch: Batch) -> bool:
    """Whether the images were decoded: cached latents come without them."""
    return batch.pixels.numel() > 0


def digest(data: bytes, shape: tuple[int, ...] = ()) -> str:
    """BLAKE2b of ``data`` and its shape, 16 hexadecimal digits."""
    return hashlib.blake2b(repr(shape).encode() + data, digest_size=8).hexdigest()


def seen_in(batch: Batch) -> list[Seen]:
    """What a micro-batch holds."""
    pixels = [digest(row.numpy().tobytes(), tuple(row.shape)) if has_pixels(batch) else "" for row in batch.pixels]
    captions = [digest(caption.encode("utf-8", "surrogatepass")) for caption in batch.captions]
    columns = (batch.slots.tolist(), batch.keys, pixels, captions, batch.weights.tolist())
    return [Seen(*row) for row in zip(*columns, strict=True)]


def line_of(step: int, rank: int, world_size: int, batches: Sequence[Batch]) -> str:
    """One process's line for a step, with its end."""
    row = {"step": step, "rank": rank, "world_size": world_size, "micro_batches": len(batches)}
    columns = zip(*(sample for batch in batches for sample in seen_in(batch)), strict=True)
    return json.dumps(row | dict(zip(COLUMNS, columns, strict=True))) + "\n"


def open_seen(folder: Path, rank: int, first_step: int) -> TextIO:
    """Where one process of a run that begins at ``first_step``, in the stage ``folder``, writes its lines."""
    path = folder / SEEN_FOLDER / f"rank{rank}_from{first_step:06d}.jsonl"
    path.parent.mkdir(exist_ok=True)
    return path.open("w", buffering=1, encoding="utf-8")  # each line is on the disk at once


@dataclass
class ReplayedSample:
    """One sample of a step, as a person looks at it: which process (``rank``) had it, in which micro-batch.

    ``caption`` is as chosen, whole; ``kept`` what the text encoder read of it, decoded from the tokens, "" where the caption was dropped;
    ``tokens`` counts all, ``limit`` what is kept at most. ``time`` is in the objective's own units, ``noise_share`` the same from 0 (clean)
    to 1 (noise), with ``repeats`` the first; ``loss`` is unweighted, the mean over ``repeats``; ``weight`` is 0 where the sample stands in
    for one that could not be read. ``image`` is its file beside the page, pixels as they are given to the VAE, None where its latents
    came from a cache and it could not be read; ``thumbnail`` a data URI.
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
    loss: float
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
    """A step, whole: what is told of it, by name and in order (``facts``), and how sure it is that this is what the step saw, in one
    sentence (``verdict``) and in a word (``certain``: "identical", "different" or "unknown")."""

    title: str
    step: int
    facts: dict[str, Any]
    verdict: str
    certain: str
    samples: list[ReplayedSample]


def samples_of(batch: Batch, rank: int, times: torch.Tensor, errors: torch.Tensor, inputs: Inputs, plan: BatchPlan) -> list[ReplayedSample]:
    """What there is to say of a micro-batch's samples, with the objective's times and the model's errors [R * b]; pictures are named,
    not written."""
    encoder, config = inputs.encoder, inputs.config
    texts = encoder.tokenize(batch.captions)
    rows = plan.batch(batch.step).rows
    losses = errors.view(-1, len(batch.keys)).mean(0).tolist()
    height, width = batch.pixels.shape[-2:] if has_pixels(batch) else (0, 0)
    samples = []
    for i, slot in enumerate(batch.slots.tolist()):
        weight, caption, kept, time = float(batch.weights[i]), batch.captions[i], "", float(times[i])
        # By the draw, which tells dropped captions from empty ones.
        dropped = is_dropped(plan.seed, batch.step, slot, config.data.caption_dropout)
        # The batch has only the empty text; what was dropped lies in the shard. A stream has another sample in its place.
        if dropped and weight:
            place = plan.index.place(int(rows[slot]))
            same = f"{place.shard.name}/{place.key}" == batch.keys[i]
            caption = read_place(place).meta["captions"].get(batch.kinds[i], "") if same else ""
        if not dropped:
            real = texts.ids[i, texts.prefix :][texts.mask[i, texts.prefix :]]
            kept = encoder.tokenizer.decode(real.tolist(), skip_special_tokens=True).strip()
        image, thumbnail = None, ""
        if has_pixels(batch):
            image, thumbnail = f"{IMAGES}/{slot:05d}.png", thumbnail_uri(Image.fromarray(_array(batch.pixels[i])))
        samples.append(
            ReplayedSample(
                slot, rank, batch.micro, batch.keys[i], batch.kinds[i], caption, dropped, kept, texts.lengths[i], encoder.limit,
                time, time / config.objective.train_timesteps, weight, losses[i], image, height, width, thumbnail,
            )
        )  # fmt: skip
    return samples


def _array(pixels: torch.Tensor) -> Any:
    return pixels.permute(1, 2, 0).contiguous().numpy()


def read_again(config: TrainConfig, plan: BatchPlan, step: int, rank: int, world: int, parts: int) -> Iterator[Batch]:
    """One process's ``parts`` micro-batches of a step, with their pictures, from the shards."""
    settings = LoaderSettings(
        config.seed, step, step + 1, rank, world, parts, config.data.caption_dropout,
        max_bad_fraction=1.0, workers=0,  # one step says nothing of their share, and bad samples are looked for
    )  # fmt: skip
    with closing(make_loader(plan.index, plan, settings)) as loader:
        yield from loader


def facts_of(samples: Sequence[ReplayedSample], processes: int, micro_batches: int) -> dict[str, Any]:
    """What is told of every step. The mean loss is that of the samples that could be read, unweighted, as in log.jsonl."""
    losses = [sample.loss for sample in samples if sample.weight]
    return {
        "samples": f"{len(samples)}, over {processes} process(es) x {micro_batches} micro-batch(es)",
        "mean loss": sum(losses) / len(losses) if losses else None,
        "captions dropped": sum(sample.dropped for sample in samples),
        "captions cut": sum(sample.truncated for sample in samples),
        "unreadable": sum(not sample.weight for sample in samples),
    }


def write_images(folder: Path, batch: Batch) -> None:
    """The crops of a micro-batch as PNG, which keeps every pixel, named by slot."""
    if has_pixels(batch):
        (folder / IMAGES).mkdir(parents=True, exist_ok=True)
        for slot, pixels, key in zip(batch.slots.tolist(), batch.pixels, batch.keys, strict=True):
            record = {"key": key, "step": batch.step, "slot": slot}
            save_png(folder / IMAGES / f"{slot:05d}.png", _array(pixels), record)


def write_replay(folder: Path, replay: Replay) -> Path:
    """Write the page, the JSON lines and the facts; returns the page's path. Samples whose loss is no number come first, then
    from the largest loss down."""
    folder.mkdir(parents=True, exist_ok=True)
    ordered = sorted(replay.samples, key=lambda s: (-s.loss if math.isfinite(s.loss) else -math.inf, s.slot))
    rows = [_finite(asdict(sample) | {"truncated": sample.truncated}) for sample in ordered]
    lines = [json.dumps({k: v for k, v in row.items() if k != "thumbnail"}, ensure_ascii=False) for row in rows]
    write_atomic(folder / LINES, "".join(f"{line}\n" for line in lines))
    facts = {"step": replay.step, "certain": replay.certain, "verdict": replay.verdict, **replay.facts}
    write_atomic(folder / FACTS, json.dumps(_finite(facts), indent=1, ensure_ascii=False) + "\n")
    dots = [sample for sample in ordered if math.isfinite(sample.loss)]
    page = render(
        "training/step_record.html", title=replay.title, replay=replay, samples=ordered, dots=dots,
        highest=max((sample.loss for sample in dots), default=0.0) or 1.0, embedded=MAX_EMBEDDED,
    )  # fmt: skip
    write_atomic(folder / PAGE, page)
    return folder / PAGE


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no word for what is not a number: such values become texts ("nan", "inf")."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
