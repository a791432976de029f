"""How many of the tokens that a text encoder is given are padding, in planned batches and in unsorted ones."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from paradiffusion.curation.inspecting.caption_figures import read_texts
from paradiffusion.data.index import TokenCounter
from paradiffusion.data.plan import BatchPlan

# Captions that are tokenised for it at most; where an epoch has more, batches all over it are taken.
MOST_CAPTIONS = 8192


@dataclass(frozen=True)
class TextLimits:
    """How the stage pads: ``limit`` tokens at most; ``masked``: to the longest of the batch, rounded up to a multiple of
    ``multiple``; else always to the limit."""

    limit: int
    multiple: int
    masked: bool


@dataclass(frozen=True)
class PaddingFigures:
    """Padded tokens as a share of all tokens that are computed, over ``batches`` batches of ``batch_size`` captions.

    Attributes:
        planned, unsorted: padded to the longest caption of each batch, in planned batches, and in batches of the same
            captions in random order.
        planned_rounded, unsorted_rounded: the same, rounded up as training does to keep the number of shapes small.
        to_limit: every caption padded to the limit.
        trained: which of these the configured stage has.
        kinds, sources: share of each caption kind, and of each source, in the batches.
    """

    tokenizer: str
    batches: int
    of_batches: int
    batch_size: int
    limit: int
    multiple: int
    planned: float
    unsorted: float
    planned_rounded: float
    unsorted_rounded: float
    to_limit: float
    trained: float
    kinds: dict[str, float]
    sources: dict[str, float]
    cut: float


def measure_padding(plan: BatchPlan, counter: TokenCounter, limits: TextLimits, seed: int) -> PaddingFigures:
    """Tokenise the captions of planned batches, evenly from the first epoch, and count."""
    index, size = plan.index, plan.batch_size
    # At least one batch, also of a set that is smaller than that.
    epoch = max(1, int(plan.steps_per_epoch))
    steps = np.unique(np.linspace(0, epoch - 1, min(epoch, max(1, MOST_CAPTIONS // size))).astype(np.int64))
    lengths = np.zeros((len(steps), size), np.int64)
    kinds: Counter[str] = Counter()
    origins = np.zeros(len(index.sources), np.int64)
    for number, step in enumerate(tqdm(steps, desc="batches", unit="batch", mininterval=1, dynamic_ncols=True)):
        batch = plan.batch(int(step))
        origins += np.bincount(index.shard_source[index.shard[batch.rows]], minlength=len(origins))
        names = [index.kinds[kind] for kind in batch.kinds]
        kinds.update(names)
        found = zip(read_texts(index, batch.rows), names, strict=True)
        lengths[number] = counter.count([(captions or {}).get(name, "") for captions, name in found])
    cut = np.minimum(lengths, limits.limit)
    shuffled = np.random.default_rng(seed).permutation(cut.reshape(-1)).reshape(cut.shape)
    planned, planned_rounded = (_padded(cut, multiple, limits.limit) for multiple in (1, limits.multiple))
    to_limit = 1 - float(cut.sum() / (cut.size * limits.limit))
    return PaddingFigures(
        tokenizer=counter.name,
        batches=len(steps),
        of_batches=epoch,
        batch_size=size,
        limit=limits.limit,
        multiple=limits.multiple,
        planned=planned,
        unsorted=_padded(shuffled, 1, limits.limit),
        planned_rounded=planned_rounded,
        unsorted_rounded=_padded(shuffled, limits.multiple, limits.limit),
        to_limit=to_limit,
        trained=planned_rounded if limits.masked else to_limit,
        kinds={kind: count / kinds.total() for kind, count in kinds.most_common()},
        sources={name: float(n / origins.sum()) for name, n in zip(index.sources, origins, strict=True)},
        cut=float((lengths > limits.limit).mean()),
    )


def _padded(lengths: np.ndarray, multiple: int, limit: int) -> float:
    """The share of padding in batches of captions with ``lengths`` [batches, B], each padded to its longest."""
    longest = np.minimum(-(-np.maximum(lengths.max(axis=1), 1) // multiple) * multiple, limit)
    return float(1 - lengths.sum() / (longest.sum() * lengths.shape[1]))
