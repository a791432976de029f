"""Duplicates: of a key, of equal pixels and of near perceptual hashes the first sample stays."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from math import comb, log2
from pathlib import Path
from typing import Any, Final

import numpy as np

from paradiffusion.curation.building.chunk import EXAMPLES, ROW, Tally


@dataclass(frozen=True)
class Lines:
    """Some lines of one chunk: int64 [n] and uint32 [n] into its .jsonl."""

    chunk: Path
    offsets: np.ndarray
    lengths: np.ndarray


@dataclass
class Selection:
    """What stays, in input order: ``train`` and ``val`` are rows (int64) of ``table``, ROW [N]; ``chunk`` int32 [N]."""

    chunks: Sequence[Path]
    table: np.ndarray
    chunk: np.ndarray
    train: np.ndarray
    val: np.ndarray
    tally: Tally

    def lines(self, rows: np.ndarray) -> list[Lines]:
        """Where these rows lie, chunk by chunk."""
        cuts = np.flatnonzero(np.diff(self.chunk[rows])) + 1
        return [
            Lines(self.chunks[self.chunk[group[0]]], self.table["offset"][group], self.table["length"][group])
            for group in np.split(rows, cuts)
            if len(group)
        ]

    def read(self, row: int) -> dict[str, Any]:
        """The line of one row."""
        with open(self.chunks[self.chunk[row]].with_suffix(".jsonl"), "rb") as file:
            file.seek(int(self.table["offset"][row]))
            content: dict[str, Any] = json.loads(file.read(int(self.table["length"][row])))
            return content


def select(chunks: Sequence[Path], without_copies: bool, distance: int | None) -> Selection:
    """Choose among the lines of all chunks (about 80 bytes of memory each).

    Of a key that comes twice the first in input order stays ("duplicate key"); then, where ``without_copies``, of equal
    pixels ("exact duplicate"), and within ``distance`` bits of perceptual hash ("near-duplicate").
    """
    tables = [np.load(chunk.with_suffix(".npy"), allow_pickle=False) for chunk in chunks]
    table = np.concatenate([np.zeros(0, ROW), *tables])
    number = np.repeat(np.arange(len(tables), dtype=np.int32), [len(part) for part in tables])
    rows = np.arange(len(table))
    selection = Selection(chunks, table, number, rows, rows[:0], Tally())
    rows = _without(selection, rows, _first_equal(table["key"][rows]), "duplicate key")
    if without_copies:
        pixels = np.ascontiguousarray(table["pixels"][rows]).view("V16").reshape(-1)
        rows = _without(selection, rows, _first_equal(pixels), "exact duplicate")
    if distance is not None:
        hashed = np.flatnonzero(table["has_perceptual"][rows])
        found = near_duplicates(table["perceptual"][rows][hashed], distance)
        witness = np.full(len(rows), -1, np.int64)
        witness[hashed] = np.where(found >= 0, hashed[found], -1)
        rows = _without(selection, rows, witness, "near-duplicate")
    is_val = table["is_val"][rows]
    selection.train, selection.val = rows[~is_val], rows[is_val]
    return selection


def _first_equal(values: np.ndarray) -> np.ndarray:
    """For each value the place of the first equal one before it, -1 where it is the first itself: int64 [n]."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    origin = first[inverse.reshape(-1)]
    return np.where(origin == np.arange(len(values)), -1, origin)


def _without(selection: Selection, rows: np.ndarray, witness: np.ndarray, reason: str) -> np.ndarray:
    """``rows`` without those that have a witness (a place in ``rows``), which are counted under ``reason``."""
    falling = np.flatnonzero(witness >= 0)
    for place in falling[:EXAMPLES]:
        dropped, kept = selection.read(int(rows[place])), selection.read(int(rows[witness[place]]))
        selection.tally.drop(reason, f"{dropped['name']}: as {kept['name']}")
    if len(falling):
        selection.tally.dropped[reason] = len(falling)
    return rows[witness < 0]


MAX_DISTANCE: Final = 10
_BITS: Final = 64
_AT_ONCE: Final = 1 << 22  # pairs compared at a time: 100 MB


def near_duplicates(hashes: np.ndarray, distance: int) -> np.ndarray:
    """For each hash the earlier one that makes it a near-duplicate, -1 where it stays: int64 [N].

    ``hashes`` is uint64 [N] in input order. In that order, a hash falls when it lies within ``distance`` bits of one
    that has stayed; so whatever falls has a witness, and chains of small changes do not pull everything together.
    A million random hashes take 0.3 s at distance 0, 3.3 s at 4 and 44 s at 8 on one core, and up to 0.5 GB.
    """
    unique, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    # Equal hashes stand or fall with the first of them; unique ones in the order of their first appearance.
    order = np.argsort(first, kind="stable")
    position = np.empty_like(order)
    position[order] = np.arange(len(order))
    by = _greedy(unique[order], distance) if distance > 0 else np.full(len(order), -1, np.int64)
    place = position[inverse.reshape(-1)]
    origin = first[order]
    witness = np.where(by[place] >= 0, origin[by[place]], origin[place])
    return np.where(witness == np.arange(len(hashes)), -1, witness)


def _greedy(hashes: np.ndarray, distance: int) -> np.ndarray:
    """As ``near_duplicates``, for hashes that are all different."""
    pairs = _close_pairs(hashes, distance)
    by = np.full(len(hashes), -1, np.int64)
    for later, earlier in zip(pairs[:, 0].tolist(), pairs[:, 1].tolist(), strict=True):
        if by[later] < 0 and by[earlier] < 0:
            by[later] = earlier
    return by


def _close_pairs(hashes: np.ndarray, distance: int) -> np.ndarray:
    """(later, earlier) of all pairs within ``distance`` bits, sorted: int64 [P, 2]."""
    bands, chosen = _bands(len(hashes), distance)
    edges = np.linspace(0, _BITS, bands + 1).astype(int)
    masks = [((1 << int(end)) - 1) ^ ((1 << int(start)) - 1) for start, end in pairwise(edges)]
    found = [np.zeros(0, np.int64)]
    for combination in combinations(masks, chosen):
        keys = hashes & np.uint64(sum(combination))
        order = np.argsort(keys)
        for first, second in _equal_neighbours(keys[order]):
            one, other = order[first], order[second]
            close = np.bitwise_count(hashes[one] ^ hashes[other]) <= distance
            one, other = one[close], other[close]
            found.append(np.maximum(one, other) * len(hashes) + np.minimum(one, other))
    pairs = np.unique(np.concatenate(found))
    return np.stack([pairs // max(len(hashes), 1), pairs % max(len(hashes), 1)], axis=1)


def _bands(count: int, distance: int) -> tuple[int, int]:
    """(m, k): into how many bands to cut, and how many of them to join to a key, for the least work."""

    def work(joined: int) -> float:
        bits = _BITS * joined / (distance + joined)
        return comb(distance + joined, joined) * count * (8 * log2(count + 2) + 15 * count / 2**bits)

    best = min(range(1, 7), key=work)
    return distance + best, best


def _equal_neighbours(keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions (i, j > i) of all pairs of equal values in sorted ``keys``, some at a time."""
    starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]]) if len(keys) else np.zeros(0, np.int64)
    sizes = np.diff(np.r_[starts, len(keys)])
    # How many equal ones follow each position.
    ends = np.repeat(starts + sizes, sizes)
    following = ends - np.arange(len(keys)) - 1
    total = np.r_[0, np.cumsum(following)]
    start = 0
    while start < len(keys):
        stop = max(start + 1, int(np.searchsorted(total, total[start] + _AT_ONCE, side="right")) - 1)
        counts = following[start:stop]
        first = np.repeat(np.arange(start, stop), counts)
        within = np.arange(len(first)) - np.repeat(total[start:stop] - total[start], counts)
        if len(first):
            yield first, first + 1 + within
        start = stop
