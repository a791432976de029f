"""What a run makes of a data set: how often its steps go through each source, and with which captions."""

from __future__ import annotations

from dataclasses import dataclass

from paradiffusion.data.plan import BatchPlan


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
