"""Choice of candidates from scores: thresholds, a weighted rank, a varied choice, and a report of what each step removed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

import numpy as np
from scipy.stats import rankdata
from sklearn.cluster import MiniBatchKMeans
from tqdm import tqdm

from paradiffusion.atomic import write_atomic
from paradiffusion.curation.choosing.candidates import CANDIDATES, sample_name
from paradiffusion.curation.choosing.score_files import ScoreTable, load_scores
from paradiffusion.errors import UserError
from paradiffusion.randomness import seed_from

# A file that is no JPEG has not been harmed by one, as far as can be seen; every other missing value fails a threshold.
_PASSES_WITHOUT: Final = ("jpeg_quality",)
# Scores that are there only with a model of the user's.
_BY_MODEL: Final = {"aesthetic": "aesthetic=<head>", "text_area": "text_detector=<folder>"}


@dataclass(frozen=True)
class Choosing:
    """How candidates are chosen: thresholds by column; the weights of the columns' ranks (0 worst, 1 best of what passed; negative
    where less is better); groups of alike pictures to take from in turn (1: none), at most so many of each; and the cosine of CLIP
    features above which two pictures are the same."""

    minimum: dict[str, float] = field(default_factory=dict)
    maximum: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    count: int | None = None
    clusters: int = 1
    per_cluster: int | None = None
    max_similarity: float | None = None
    seed: int = 0

    def check(self, columns: Mapping[str, Any]) -> None:
        """Raise UserError for what cannot be done with these ``columns``."""
        for key, given in (("min", self.minimum), ("max", self.maximum), ("weights", self.weights)):
            for name in given:
                if name not in columns:
                    raise UserError(
                        f"{key} names {name!r}, which was not scored; {_hint(name, columns)}the scores are {', '.join(columns)}."
                    )
        if self.max_similarity is not None and not -1 <= self.max_similarity <= 1:
            raise UserError(f"max_similarity={self.max_similarity} is out of range; expected a cosine, such as 0.95.")


@dataclass
class Removed:
    """What one threshold on the score ``name`` does: ``alone``, and ``then`` after those before it."""

    name: str
    rule: str
    alone: int
    then: int


@dataclass
class Report:
    """How the candidates came about; counts of samples, and medians of the scores before and after."""

    samples: int
    unreadable: int
    removed: list[Removed]
    passed: int
    duplicates: int
    clusters: int
    chosen: int
    medians: dict[str, tuple[float | None, float | None]]
    weights: dict[str, float]  # by which the best were told
    choosing: Choosing

    def lines(self) -> Iterator[str]:
        """The report as text."""
        yield f"{self.samples} samples scored, {self.unreadable} of them unreadable"
        for one in self.removed:
            yield f"  {one.rule}: removes {one.then} ({one.alone} by itself)"
        yield f"{self.passed} passed; {self.duplicates} passed over as near-duplicates; {self.clusters} clusters"
        ranked = ", ".join(f"{name} ({weight:g})" for name, weight in self.weights.items())
        yield f"{self.chosen} candidates chosen, ranked by {ranked or 'nothing: their order is that of the shards'}"
        if self.choosing.count is not None and self.chosen < self.choosing.count:
            yield f"  fewer than count={self.choosing.count}: that is all that is left"
        for name, (before, after) in self.medians.items():
            yield f"  median {name}: {_shown(before)} of all, {_shown(after)} of the candidates"


def choose(work: Path, choosing: Choosing) -> Report:
    """Write ``candidates.jsonl`` and ``choice.json`` into ``work``, from the scores there. Raises UserError."""
    table = load_scores(work)
    choosing.check(table.columns)
    passed, removed = apply_thresholds(table, choosing)
    rows = np.flatnonzero(passed)
    if not len(rows):
        raise UserError(_nothing_left(table, removed))
    weights = choosing.weights or default_weights(table)
    scores = weighted_rank(table, rows, weights)
    varied = choosing.clusters > 1 or choosing.max_similarity is not None
    features = table.features(rows) if varied else np.zeros((len(rows), 0), np.float32)
    clusters = clusters_of(features, choosing.clusters, choosing.seed)
    choice = choose_varied(scores, features, clusters, choosing.count, choosing.per_cluster, choosing.max_similarity)
    chosen = rows[choice.rows]
    report = Report(
        samples=len(table),
        unreadable=int(table.unreadable.sum()),
        removed=removed,
        passed=len(rows),
        duplicates=choice.duplicates,
        clusters=len(np.unique(clusters)),
        chosen=len(chosen),
        medians={name: (_median(values), _median(values[chosen])) for name, values in table.columns.items()},
        weights=weights,
        choosing=choosing,
    )
    _write(work, table, chosen, scores[choice.rows], clusters[choice.rows])
    write_atomic(work / "choice.json", json.dumps(asdict(report), indent=2) + "\n")
    return report


def apply_thresholds(table: ScoreTable, choosing: Choosing) -> tuple[np.ndarray, list[Removed]]:
    """bool [N], which samples pass, and what each threshold removed. A sample without the value fails it."""
    passed = ~table.unreadable
    removed: list[Removed] = []
    rules = [(name, ">=", value) for name, value in choosing.minimum.items()]
    rules += [(name, "<=", value) for name, value in choosing.maximum.items()]
    for name, sign, value in rules:
        column = table.columns[name]
        good = column >= value if sign == ">=" else column <= value
        if name in _PASSES_WITHOUT:
            good |= np.isnan(column)
        alone, then = int((~good & ~table.unreadable).sum()), int((passed & ~good).sum())
        removed.append(Removed(name, f"{name} {sign} {value:g}", alone, then))
        passed &= good
    return passed, removed


def weighted_rank(table: ScoreTable, rows: np.ndarray, weights: Mapping[str, float]) -> np.ndarray:
    """float64 [len(rows)]: the weighted mean of ranks among ``rows``, 0 to 1, a rank of 1 being the best.

    Ranks, not values: scores of different units add up, and no outlier rules. A missing value ranks as the worst.
    """
    total = sum(abs(weight) for weight in weights.values())
    result = np.zeros(len(rows))
    for name, weight in weights.items():
        values = table.columns[name][rows] * (1 if weight >= 0 else -1)
        ranks = rankdata(np.where(np.isnan(values), -np.inf, values), method="average") - 1
        ranks = np.where(np.isnan(values), 0, ranks)
        result += abs(weight) / total * ranks / max(1, len(rows) - 1) if total else 0
    return result


def default_weights(table: ScoreTable) -> dict[str, float]:
    """Without weights: the aesthetic score, else the captions' agreement, else the sharpness."""
    for name in ("aesthetic", "agreement_mean", "sharpness"):
        if name in table.columns and not np.isnan(table.columns[name]).all():
            return {name: 1.0}
    return {}


def _write(work: Path, table: ScoreTable, chosen: np.ndarray, scores: np.ndarray, clusters: np.ndarray) -> None:
    keys = table.keys.take(chosen).to_pylist()
    lines = []
    for number, (row, key) in enumerate(zip(chosen.tolist(), keys, strict=True)):
        shard = table.shards[table.shard[row]]
        entry = {
            "sample": sample_name(shard, key), "shard": shard, "key": key, "score": round(float(scores[number]), 6),
            "cluster": int(clusters[number]),
            "scores": {name: float(f"{column[row]:.6g}") for name, column in table.columns.items() if not np.isnan(column[row])},
        }  # fmt: skip
        lines.append(json.dumps(entry, ensure_ascii=False))
    write_atomic(work / CANDIDATES, "\n".join(lines) + "\n")


def _hint(name: str, columns: Mapping[str, Any]) -> str:
    """What to do about a score that is not there."""
    if near := get_close_matches(name, columns, 1):
        return f"did you mean {near[0]!r}? "
    if name in _BY_MODEL:
        return f"it takes action=score with {_BY_MODEL[name]}, into a folder of its own; "
    return ""


def _nothing_left(table: ScoreTable, removed: list[Removed]) -> str:
    """One sentence on why no sample passes: the threshold that cuts most by itself, and how its score is spread."""
    if not removed:
        return f"none of the {len(table)} samples has a readable image; look at the column error in scores/*.parquet."
    most = max(removed, key=lambda one: one.alone)
    values = table.columns[most.name]
    known = values[~np.isnan(values)]
    if len(known):
        low, first, half, last, high = np.quantile(known, (0, 0.1, 0.5, 0.9, 1))
        spread = f"lies between {low:.4g} and {high:.4g} (10 % below {first:.4g}, half below {half:.4g}, 90 % below {last:.4g})"
    else:
        spread = "is missing everywhere"
    others = "; ".join(f"{one.rule} {one.alone}" for one in removed if one is not most)
    return (
        f"no sample is left of {len(table)}: {most.rule} removes {most.alone} by itself{f' ({others})' if others else ''}; "
        f"{most.name} {spread}; loosen a threshold. Nothing was written."
    )


def _median(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else None


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


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
    means = MiniBatchKMeans(count, random_state=seed, batch_size=max(1024, 3 * count), n_init=3 if few else 1, max_iter=100 if few else 10)
    drawn = min(total, max(_FITTED, _FITTED_EACH * count))
    means.fit(features[np.sort(np.random.default_rng(seed).choice(total, drawn, replace=False))].astype(np.float32))
    parts = (features[start : start + _BLOCK].astype(np.float32) for start in range(0, total, _BLOCK))
    return np.concatenate([means.predict(part) for part in parts]).astype(np.int32)


def choose_varied(
    scores: np.ndarray,
    features: np.ndarray,
    clusters: np.ndarray,
    count: int | None = None,
    per_cluster: int | None = None,
    max_similarity: float | None = None,
) -> Choice:
    """Choose up to ``count`` rows: in each round the best remaining one of every cluster, clusters by their best score.

    ``scores`` [N], higher is better, equal ones by row; ``features`` [N, D] of unit length, [N, 0] where ``max_similarity`` is None;
    ``clusters`` int [N], at most ``per_cluster`` of each. A row whose cosine with a chosen one is above ``max_similarity`` is passed
    over, and its cluster's next taken."""
    order = np.lexsort((np.arange(len(scores)), -scores))
    # Each cluster's rows from the best down, by one sort: thousands of clusters are no thousands of passes.
    grouped = order[np.argsort(clusters[order], kind="stable")]
    starts = np.unique(clusters[grouped], return_index=True)[1]
    parts = np.split(grouped, starts[1:]) if len(grouped) else []
    queues = [iter(part) for part in sorted(parts, key=lambda part: (-scores[part[0]], part[0]))]
    limit = len(scores) if count is None else min(count, len(scores))
    chosen: list[int] = []
    kept = np.zeros((limit if max_similarity is not None else 0, features.shape[1]), np.float32)
    duplicates, turn = 0, 0
    bar = tqdm(total=len(scores), desc="choosing", unit="image", disable=None if len(scores) > 10_000 else True)
    while queues and len(chosen) < limit and turn != per_cluster:
        open_queues, turn = [], turn + 1
        for queue in queues:
            for row in queue:
                if len(chosen) == limit:
                    break
                bar.update()
                if max_similarity is not None:
                    if (kept[: len(chosen)] @ features[row].astype(np.float32) > max_similarity).any():
                        duplicates += 1
                        continue
                    kept[len(chosen)] = features[row]
                chosen.append(int(row))
                open_queues.append(queue)
                break
        queues = open_queues
    bar.close()
    return Choice(np.array(chosen, np.int64), duplicates)
