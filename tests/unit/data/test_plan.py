"""The plan of batches: complete, seekable, mixed, the same for everybody."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from data_fixtures import sample, synthetic_index
from hypothesis import given, settings
from hypothesis import strategies as st

from paradiffusion.budget.bench_plan import PlanBench, make, make_index
from paradiffusion.data.captions import choose_kinds, clean, draw_kinds, drawable_kinds, expected_shares, is_dropped
from paradiffusion.data.images import assign_buckets, make_buckets
from paradiffusion.data.index import SampleIndex, load_index
from paradiffusion.data.plan import BatchPlan, GlobalBatch, Share
from paradiffusion.data.shards import write_shards
from paradiffusion.errors import UserError

BUCKETS = make_buckets(512, 64, 2.0)
MIX = {"short": 0.5, "long": 0.5}


def plan_of(index: SampleIndex, batch_size: int = 16, seed: int = 1, window_shards: int = 3) -> BatchPlan:
    return BatchPlan(index, batch_size, seed, BUCKETS, MIX, window_shards)


def step_by_step(plan: BatchPlan, last: int, first: int = 0) -> list[GlobalBatch]:
    return [plan.batch(step) for step in range(first, last)]


def test_samples_without_a_caption_are_left_out(tmp_path: Path) -> None:
    samples = [sample(number, {} if number % 3 == 0 else None) for number in range(30)]
    plan = plan_of(load_index(write_shards(samples, tmp_path / "a", 8)), batch_size=4)
    assert plan.left_out == 10 and plan.samples == 20 and sum(plan.bucket_sizes().values()) == 20
    rows = {int(row) for batch in step_by_step(plan, plan.first_step(3)) for row in batch.rows}
    assert rows == {row for row in range(30) if row % 3}
    with pytest.raises(UserError, match="None of the 5 samples"):
        plan_of(load_index(write_shards((sample(n, {}) for n in range(5)), tmp_path / "b", 8)))


def test_wrong_arguments() -> None:
    index = synthetic_index(10, 1)
    with pytest.raises(UserError, match="lnog"):
        BatchPlan(index, 4, 0, BUCKETS, {"lnog": 1.0})
    with pytest.raises(ValueError):
        plan_of(index).batch(-1)


def test_a_million_rows_take_little_memory() -> None:
    index = make_index(1_000_000, 200, 3)
    tracemalloc.start()
    batch = make(index, PlanBench(rows=1_000_000, shards=200)).batch(1_000_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    held = sum(value.nbytes for value in vars(index).values() if isinstance(value, np.ndarray))
    assert len(batch.rows) == 256 and batch.epochs[0] > 100 and peak < 120e6 and held < 105e6


KINDS = ["short", "long", "clean", "alt"]


def test_fall_back_to_a_kind_that_is_there() -> None:
    words = np.array([[3, 9, 5, 1], [3, 0, 5, 1], [3, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]])
    ids = np.arange(5, dtype=np.uint64)
    chosen = choose_kinds(words, KINDS, {"long": 1.0}, 0, 0, ids)
    assert chosen.dtype == np.int8 and chosen.tolist() == [1, 2, 0, 3, -1]
    assert choose_kinds(words, KINDS, {"clean": 1.0}, 0, 0, ids).tolist() == [2, 2, 0, 3, -1]
    # Of two weighted kinds the one that is there is taken, before one that nobody asked for.
    assert choose_kinds(words, KINDS, {"long": 1.0, "short": 0.0001}, 0, 0, ids).tolist() == [1, 0, 0, 3, -1]
    assert choose_kinds(words[:, :1], ["short"], {"long": 1.0}, 0, 0, ids).tolist() == [0, 0, 0, -1, -1]


def test_fall_backs_are_counted() -> None:
    """Of the samples with any caption: what the weights come to, and how many lack the kind that is drawn."""
    words = np.array([[3, 9], [3, 0], [3, 0], [3, 4], [0, 0], [0, 2]])
    found = expected_shares(words, ["short", "long"], {"short": 1.0, "long": 1.0})
    assert found.fell_back == {"short": 0.2, "long": 0.4}
    assert found.read == pytest.approx({"short": 0.5 * 0.8 + 0.5 * 0.4, "long": 0.5 * 0.2 + 0.5 * 0.6})
    assert expected_shares(words[:, :1], ["short"], {"clean": 2.0}).fell_back == {"clean": 1.0}
    ids = np.arange(1000, dtype=np.uint64)
    drawn = draw_kinds(["short"], {"clean": 1.0, "short": 1.0}, 0, 0, ids)
    assert {drawable_kinds(["short"])[kind] for kind in drawn} == {"clean", "short"}
    index = synthetic_index(400, 4)
    index.words[::4, 1] = 0
    plan = BatchPlan(index, 8, 1, BUCKETS, {"short": 1.0, "long": 3.0}, 4)
    counts = sum((plan.choices(step, np.arange(8)) for step in range(400)), Counter())
    assert set(counts) == {("data", kind, read) for kind, read in (("short",) * 2, ("long",) * 2, ("long", "short"))}
    long = counts["data", "long", "long"] + counts["data", "long", "short"]
    assert counts["data", "long", "short"] / long == pytest.approx(0.25, abs=0.03)
    assert plan.choices(3, np.array([0, 5])).total() == 2


def test_kinds_are_a_function_of_the_sample_not_of_its_row() -> None:
    words = np.ones((1000, 4), int)
    ids = np.random.default_rng(0).integers(0, 1 << 63, 1000, dtype=np.uint64)
    weights = {"short": 1.0, "long": 2.0, "alt": 1.0}
    chosen = choose_kinds(words, KINDS, weights, 5, 2, ids)
    assert (choose_kinds(words[::-1], KINDS, weights, 5, 2, ids[::-1])[::-1] == chosen).all()
    assert (choose_kinds(words, KINDS, weights, 5, 3, ids) != chosen).mean() > 0.5
    shares = np.bincount(chosen, minlength=4) / 1000
    assert np.abs(shares - [0.25, 0.5, 0.0, 0.25]).max() < 0.05


def test_clean_and_dropout() -> None:
    assert clean("  a\tb\r\n\n c\x00d\u2028e\u00a0f\ufeff ") == "a b c d e f"
    assert clean("x\ud800y") == "xy" and clean(" \n") == ""
    assert clean("\ufeffcafe\u0301 \u200eso\u00adlo\u2060\u202c\u061c\u2064\ufff9") == "caf\u00e9 solo"
    assert clean("\U0001f469\u200d\U0001f680") == "\U0001f469\u200d\U0001f680"  # a joiner makes one emoji of two
    assert clean('na\u00efve \U0001f600, {braces} "quotes"') == 'na\u00efve \U0001f600, {braces} "quotes"'
    dropped = [is_dropped(0, step, slot, 0.1) for step in range(50) for slot in range(100)]
    assert 0.08 < np.mean(dropped) < 0.12
    assert dropped == [is_dropped(0, step, slot, 0.1) for step in range(50) for slot in range(100)]
    assert not any(is_dropped(0, step, 0, 0.0) for step in range(99))
    assert all(is_dropped(0, step, 0, 1.0) for step in range(99))


THREE_BUCKETS = [(96, 48), (64, 64), (48, 96)]
PROPERTIES = settings(deadline=None, derandomize=True, max_examples=40)


@dataclass
class Case:
    """The arguments of a plan."""

    index: SampleIndex
    batch_size: int
    seed: int
    buckets: list[tuple[int, int]]
    captions: dict[str, float]
    window_shards: int
    shares: list[Share]

    def plan(self) -> BatchPlan:
        return BatchPlan(self.index, self.batch_size, self.seed, self.buckets, self.captions, self.window_shards, self.shares)

    @property
    def usable(self) -> np.ndarray:
        return self.index.words.any(axis=1)

    @property
    def source(self) -> np.ndarray:
        return self.index.shard_source[self.index.shard]

    @property
    def bucket(self) -> np.ndarray:
        return assign_buckets(self.index.width, self.index.height, self.buckets)


def index_of(counts: list[list[int]], kinds: list[str], missing: float, tokens: bool, seed: int) -> SampleIndex:
    """An index of ``counts[source][shard]`` samples that exist nowhere; the first of each source has a caption."""
    rng = np.random.default_rng(seed)
    per_shard = [count for shards in counts for count in shards]
    total = sum(per_shard)
    table = np.zeros(total, np.dtype([("width", "<i4"), ("height", "<i4")]))
    table["width"], table["height"] = rng.integers(0, 100, (2, total))
    words = (rng.integers(1, 50, (total, len(kinds))) * (rng.random((total, len(kinds))) >= missing)).astype(np.uint16)
    words[np.cumsum([0, *map(sum, counts)])[:-1], 0] = 5
    return SampleIndex(
        shards=[Path(f"{number}.tar") for number in range(len(per_shard))],
        shard=np.repeat(np.arange(len(per_shard), dtype=np.int32), per_shard),
        table=table,
        words=words,
        kinds=kinds,
        ids=rng.integers(0, 1 << 63, total, dtype=np.uint64),
        key_bytes=np.zeros(0, np.uint8),
        key_starts=np.zeros(total + 1, np.int64),
        tokens=np.where(words > 0, rng.integers(1, 9, words.shape), 0).astype(np.uint16) if tokens else None,
        tokenizer="some" if tokens else None,
        shard_source=np.repeat(np.arange(len(counts), dtype=np.int16), [len(shards) for shards in counts]),
        sources=[f"source {number}" for number in range(len(counts))],
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shards = st.lists(st.integers(0, 12), min_size=0, max_size=5)
    counts = [[draw(st.integers(1, 12)), *draw(shards)] for _ in range(draw(st.integers(1, 3)))]
    kinds = draw(st.sampled_from([["short"], ["short", "long"], ["alt", "long"]]))
    weights = st.fixed_dictionaries({kind: st.sampled_from([0.3, 1.0]) for kind in kinds})
    own = st.one_of(st.none(), weights)
    share = st.builds(Share, st.sampled_from([0.1, 0.7, 1.0, 3.0, 1 / 3]), own)
    return Case(
        index=index_of(counts, kinds, draw(st.sampled_from([0.0, 0.4])), draw(st.booleans()), draw(st.integers(0, 99))),
        batch_size=draw(st.integers(1, 9)),
        seed=draw(st.integers(0, 5)),
        buckets=THREE_BUCKETS[: draw(st.integers(1, 3))],
        captions=draw(weights),
        window_shards=draw(st.integers(1, 4)),
        shares=[draw(share) for _ in counts],
    )


def content(batch: GlobalBatch) -> tuple[object, ...]:
    return (
        batch.step, batch.epochs, batch.bucket, batch.rows.tolist(), batch.kinds.tolist(), batch.drawn.tolist()
    )  # fmt: skip


@given(cases(), st.integers(0, 9))
@PROPERTIES
def test_a_step_is_the_same_whenever_it_is_asked_for(case: Case, order_seed: int) -> None:
    """From the first step on, or in any order by fresh plans; captions of similar lengths stand together."""
    in_turn, jumping = case.plan(), case.plan()
    walked = [in_turn.batch(step) for step in range(40)]
    for step in (order := np.random.default_rng(order_seed).permutation(40).tolist()):
        assert content(jumping.batch(step)) == content(walked[step])
    assert content(case.plan().batch(order[0])) == content(walked[order[0]])
    for batch in walked:
        lengths = case.index.lengths[batch.rows, batch.kinds].tolist()
        assert lengths == sorted(lengths)


@given(cases())
@PROPERTIES
def test_nothing_is_lost_and_nothing_comes_more_often(case: Case) -> None:
    plan = case.plan()
    last = plan.first_step(3)
    times, by_bucket = Counter[int](), Counter[tuple[int, int]]()
    for step in range(min(last, 600)):
        batch = plan.batch(step)
        assert len(batch.rows) == len(batch.kinds) == len(batch.drawn) == case.batch_size
        assert {case.buckets[number] for number in case.bucket[batch.rows]} == {batch.bucket}
        assert (case.index.words[batch.rows, batch.kinds] > 0).all() and case.usable[batch.rows].all()
        times.update(batch.rows.tolist())
        by_bucket[batch.bucket] += case.batch_size
    if last > 600:
        return
    # A window has ended, three epochs of every source at least: what has come is served or waits, in its turn.
    positions = plan.schedule.positions(plan.schedule.first_window(3))
    assert sum(positions) - sum(by_bucket.values()) < len(case.buckets) * case.batch_size
    for number in range(len(case.shares)):
        for bucket in range(len(case.buckets)):
            rows = np.flatnonzero(case.usable & (case.source == number) & (case.bucket == bucket)).tolist()
            counts = [times[row] for row in rows]
            assert max(counts, default=0) - min(counts, default=0) <= 1
            # Three epochs have come; what waits is less than a batch.
            assert 3 * len(rows) - sum(counts) < case.batch_size


def test_what_waits_for_a_batch_is_of_all_sources() -> None:
    """So that none is behind its share: four of sixty samples wait at the end of an odd epoch."""
    index = index_of([[10] * 3] * 2, ["short"], 0.0, False, 0)
    plan = BatchPlan(index, 8, 1, [(64, 64)], {"short": 1.0}, 1, [Share(), Share()])
    for epoch in (1, 3, 5):
        rows = np.concatenate([plan.batch(step).rows for step in range(plan.first_step(epoch))])
        assert len(rows) == 60 * epoch - 4 and np.ptp(np.bincount(plan.source_of(rows))) <= 1
