"""A varied choice: clusters of image features, one picture of each in turn, and no two that are nearly the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from sklearn.cluster import MiniBatchKMeans

from paradiffusion.randomness import seed_from

# Our choice: centres do not move any more with more rows than these, and memory and time stay bounded.
_FITTED: Final = 100_000
_FITTED_EACH: Final = 32
_FEW_CLUSTERS: Final = 1000  # beyond these, further starts and passes cost minutes
_BLOCK: Final = 1 << 14


@dataclass
class Choice:
    """Chosen rows, the best first in each round, and how many were passed over as near-duplicates of chosen ones."""

    rows: np.ndarray  # int64 [M]
    duplicates: int


def clusters_of(features: np.ndarray, count: int, seed: int) -> np.ndarray:
    """int32 [N]: the cluster of each of the ``features`` [N, D] of unit length, which may be float16; fewer clusters where
    there are fewer rows.

    The centres are fitted to at most ``_FITTED`` rows, or ``_FITTED_EACH`` for each cluster, drawn with ``seed``.
    """
    total = len(features)
    count = min(count, total)
    if count <= 1:
        return np.zeros(total, np.int32)
    seed = seed_from("clusters", seed) % (1 << 32)
    few = count <= _FEW_CLUSTERS
    means = MiniBatchKMeans(
        count, random_state=seed, batch_size=max(1024, 3 * count), n_init=3 if few else 1, max_iter=100 if few else 10
    )
    drawn = max(_FITTED, _FITTED_EACH * count)
    if total <= drawn:
        return means.fit_predict(features.astype(np.float32)).astype(np.int32)
    means.fit(features[np.sort(np.random.default_rng(seed).choice(total, drawn, replace=False))].astype(np.float32))
    found = np.empty(total, np.int32)
    for start in range(0, total, _BLOCK):
        found[start : start + _BLOCK] = means.predict(features[start : start + _BLOCK].astype(np.float32))
    return found


def choose_varied(
    scores: np.ndarray,
    features: np.ndarray,
    clusters: np.ndarray,
    count: int | None = None,
    per_cluster: int | None = None,
    max_similarity: float | None = None,
    advance: Callable[[int], object] = int,
) -> Choice:
    """Choose up to ``count`` rows: in each round the best remaining one of every cluster, clusters by their best score.

    Args:
        scores: [N], higher is better; equal scores go by row.
        features: [N, D] of unit length, float16 or float32; may be [N, 0] where ``max_similarity`` is None.
        clusters: int [N].
        per_cluster: at most so many of each cluster.
        max_similarity: a row whose cosine with a chosen one is above this is passed over, and its cluster's next taken.
        advance: called with the number of rows looked at.
    """
    order = np.lexsort((np.arange(len(scores)), -scores))
    # Each cluster's rows from the best down, by one sort: thousands of clusters are no thousands of passes.
    grouped = order[np.argsort(clusters[order], kind="stable")]
    names, starts = np.unique(clusters[grouped], return_index=True)
    parts = dict(zip(names.tolist(), np.split(grouped, starts[1:]), strict=True))
    _, first = np.unique(clusters[order], return_index=True)
    queues = {name: parts[name] for name in names[np.argsort(first)].tolist()}
    positions = dict.fromkeys(queues, 0)
    taken = dict.fromkeys(queues, 0)
    limit = len(scores) if count is None else min(count, len(scores))
    chosen: list[int] = []
    kept = np.zeros((limit if max_similarity is not None else 0, features.shape[1]), np.float32)
    duplicates = 0
    open_clusters = list(queues)
    while open_clusters and len(chosen) < limit:
        for name in list(open_clusters):
            row = -1
            while positions[name] < len(queues[name]):
                candidate = int(queues[name][positions[name]])
                positions[name] += 1
                advance(1)
                near = max_similarity is not None and bool(
                    (kept[: len(chosen)] @ features[candidate].astype(np.float32) > max_similarity).any()
                )
                duplicates += near
                if not near:
                    row = candidate
                    break
            if row >= 0:
                if max_similarity is not None:
                    kept[len(chosen)] = features[row]
                chosen.append(row)
                taken[name] += 1
            if row < 0 or taken[name] == per_cluster:
                open_clusters.remove(name)
            if len(chosen) == limit:
                break
    return Choice(np.array(chosen, np.int64), duplicates)
