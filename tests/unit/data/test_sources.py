"""Several sources: their mixture, the same for every number of processes and workers, and what a user says and sees."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import user_error
from data_fixtures import sample
from training_runs import Train, records

from paradiffusion.compose import compose_train, parse_sources
from paradiffusion.config import DataConfig, SourceConfig
from paradiffusion.data.index import SampleIndex, join_indexes, load_index
from paradiffusion.data.loader import LoaderSettings, make_loader
from paradiffusion.data.plan import BatchPlan, Share, describe_plan, make_plan, open_index
from paradiffusion.data.shards import expand_shards, write_shards
from paradiffusion.errors import UserError
from paradiffusion.training.log import mixture, mixture_line

# Every fourth sample is one of these shapes: see data_fixtures.SIZES.
TWO_BUCKETS = [(64, 64), (48, 80)]
SETTINGS = LoaderSettings(seed=1, workers=0, caption_dropout=0.2)
COUNTS = {"web": (40, 0.6), "book": (24, 0.3), "mine": (10, 0.1)}


def write_source(folder: Path, first: int, count: int, lacking: int = 0) -> Path:
    """A folder of shards of 8 samples each, the last ``lacking`` of them without a long caption."""
    samples = (
        sample(number, {"short": f"thing {number}"} if number >= first + count - lacking else None)
        for number in range(first, first + count)
    )
    write_shards(samples, folder, 8)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sources, of samples that are numbered through."""
    root, first = tmp_path_factory.mktemp("sources"), 0
    for name, (count, _) in COUNTS.items():
        write_source(root / name, first, count, lacking=6 if name == "book" else 0)
        first += count
    return root


@pytest.fixture(scope="module")
def index(folder: Path) -> SampleIndex:
    return join_indexes([load_index(expand_shards(folder / name)) for name in COUNTS], list(COUNTS))


def plan_of(index: SampleIndex) -> BatchPlan:
    shares = [Share(weight) for _, weight in COUNTS.values()]
    return BatchPlan(index, 8, 1, TWO_BUCKETS, {"short": 0.5, "long": 0.5}, 2, shares)


Seen = dict[int, list[tuple[str, str, str, str]]]


def run(index: SampleIndex, first: int, last: int, world_size: int, workers: int, accumulation: int = 1) -> Seen:
    """What all processes of one launch see in each slot of each step: key, kind, caption and a hash of the pixels."""
    seen: Seen = {step: [("", "", "", "")] * 8 for step in range(first, last)}
    settings = replace(SETTINGS, first_step=first, last_step=last, world_size=world_size, workers=workers, accumulation=accumulation)
    for rank in range(world_size):
        loader = make_loader(index, plan_of(index), replace(settings, rank=rank))
        for batch in loader:
            for place, slot in enumerate(batch.slots.tolist()):
                assert seen[batch.step][slot] == ("", "", "", ""), "two processes read the same slot"
                pixels = hashlib.blake2b(batch.pixels[place].numpy().tobytes(), digest_size=8).hexdigest()
                seen[batch.step][slot] = (batch.keys[place], batch.kinds[place], batch.captions[place], pixels)
        loader.close()
    return seen


def test_every_launch_sees_the_same(index: SampleIndex) -> None:
    """Two epochs of every source: for 1, 2 and 4 processes, 0, 1 and 3 workers, and stopped and resumed on others."""
    plan = plan_of(index)
    last = plan.first_step(2)
    assert last > 15 and {plan.batch(step).bucket for step in range(last)} == set(TWO_BUCKETS)
    mixed = [len(set(plan.source_of(plan.batch(step).rows).tolist())) > 1 for step in range(30)]
    assert np.mean(mixed) > 0.8, "a batch holds samples of several sources"
    whole = run(index, 0, last, 1, 0)
    assert {kind for slots in whole.values() for _, kind, _, _ in slots} == {"short", "long"}
    assert run(index, 0, last, 4, 1) == run(index, 0, last, 2, 0, accumulation=2) == whole
    stops, pieces = [0, 3, 4, 11, last], dict[int, list[tuple[str, str, str, str]]]()
    for first, stop, (world_size, workers) in zip(stops, stops[1:], ((2, 1), (4, 0), (1, 3), (2, 0)), strict=False):
        pieces |= run(index, first, stop, world_size, workers)
    assert pieces == whole


def test_one_source_is_as_its_shards_alone(folder: Path) -> None:
    data = DataConfig(shards=str(folder / "web"), captions={"short": 1.0, "long": 2.0}, window_shards=2)
    listed = replace(data, shards=None, sources=[SourceConfig(shards=str(folder / "web"), weight=0.3)])
    one, other = (make_plan(open_index(config), config, 4, 7) for config in (data, listed))
    assert other.index.sources == ["web"]
    for step in range(40):
        a, b = one.batch(step), other.batch(step)
        assert (a.rows == b.rows).all() and (a.kinds == b.kinds).all() and a.epoch == b.epoch


def test_captions_of_a_source(folder: Path) -> None:
    """A source's own caption weights; what falls back is told by kind."""
    mine = SourceConfig(shards=str(folder / "mine"), captions={"short": 1.0})
    data = DataConfig(captions={"long": 1.0}, sources=[SourceConfig(shards=str(folder / "book")), mine])
    plan = make_plan(open_index(data), data, 4, 0)
    counts = sum((plan.choices(step, np.arange(4)) for step in range(200)), Counter[tuple[str, str, str]]())
    assert set(counts) == {("book", "long", "long"), ("book", "long", "short"), ("mine", "short", "short")}
    assert counts.total() == 800
    record = mixture(counts)
    assert record["source/book"] == pytest.approx(0.5, abs=0.02) and record["fell_back/short"] == 0.0
    assert record["fell_back/long"] == pytest.approx(0.25, abs=0.03)  # 6 of the 24 have no long one.
    assert record["caption/short"] == pytest.approx(0.625, abs=0.03)
    expected = plan.expected_kinds()
    assert expected["book"].fell_back == {"long": 0.25} and expected["mine"].read == {"short": 1.0}
    assert "25.0% lack long" in describe_plan(plan) and "book 50.0% (24 samples" in describe_plan(plan)
    assert mixture_line(record).startswith("  sources book 5") and "drawn but missing" in mixture_line(record)
    assert mixture_line(mixture(Counter({("data", "long", "long"): 3, ("data", "short", "short"): 1}))) == ""


def test_what_is_typed() -> None:
    """Paths with the braces of a range, in the middle of a list of mappings; nothing of the built-in scenes is left."""
    typed = "data.sources=[{name: web, shards: /a/{00000..00099}.tar, weight: 0.7}, {folder: ~/my pictures, captions: {long: 1}}]"
    data = compose_train([typed]).data
    assert [source.title for source in data.sources] == ["web", "my pictures"]
    assert data.sources[0].shards == "/a/{00000..00099}.tar" and data.sources[1].folder == "~/my pictures"
    assert [source.weight for source in data.sources] == [0.7, 1.0] and data.sources[1].captions == {"long": 1.0}
    assert data.shards is None and data.val_shards is None and not data.demo
    (named,) = compose_train(["preset=paper", "data.sources=[{shards: s3://b/web-{0..9}.tar}]"]).data.sources
    assert named.title == "web" and compose_train([typed, "data.val_shards=/held"]).data.val_shards == "/held"
    assert parse_sources("[{shards: [/x.tar, '/y/{0..1}.tar']}]") == [{"shards": ["/x.tar", "/y/{0..1}.tar"]}]
    assert parse_sources("[{shards: /a/[0-9]*.tar, folder: null}]") == [{"shards": "/a/[0-9]*.tar", "folder": None}]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("[/a]", "not a list of mappings"), ("{shards: /a}", "not a list of mappings"), ("[{shards: /a", "not understood"),
        ("[{shards: /a, wieght: 1}]", "data.sources\\[0\\].wieght is unknown"), ("[{weight: 1}]", "neither of shards and folder"),
        ("[{shards: /a, weight: 0}]", "weight=0.0 is out of range"), ("[{shards: /a, weight: much}]", "could not be converted"),
        ("[{shards: /a}, {shards: /b/a}]", "two sources called a"), ("[{shards: /a, folder: /b}]", "both of shards and folder"),
        ("[{shards: /a, captions: {long: -1}}]", "no caption kind a weight"),
        ("[{shards: /a}] data.shards=/b", "both data.shards and data.sources"),
    ],
)  # fmt: skip
def test_what_is_typed_wrongly(typed: str, said: str) -> None:
    text, _, beside = typed.partition(" data.")
    user_error(said, compose_train, [f"data.sources={text}", *([f"data.{beside}"] if beside else [])])


def test_a_source_that_cannot_be_used(folder: Path, tmp_path: Path, index: SampleIndex) -> None:
    write_shards((sample(number, {}) for number in range(5)), tmp_path / "silent", 8)
    sources = [SourceConfig(shards=str(folder / "web")), SourceConfig(shards=str(tmp_path / "silent"))]
    data = DataConfig(captions={"short": 1.0}, sources=sources)
    user_error("None of the 5 samples in the source silent", make_plan, open_index(data), data, 4, 0)
    with pytest.raises(UserError, match=r"data.sources\[1\].shards"):
        open_index(replace(data, sources=[sources[0], SourceConfig(shards=str(tmp_path / "nowhere"))]))
    with pytest.raises(UserError, match="'lnog' is in no sample"):
        BatchPlan(index, 4, 0, TWO_BUCKETS, {"short": 1.0}, shares=[Share(), Share(1.0, {"lnog": 1.0}), Share()])


def test_training_on_sources(train: Train, demo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the command line to the log, over a stop; other weights are refused by name on resume."""

    def sources(weight: float) -> str:
        both = f"{{shards: {demo_folder}/web, weight: {weight}}}, {{shards: {demo_folder}/big, weight: 1}}"
        return f"data.sources=[{both}]"

    common = ["data.captions={short: 0.5, long: 0.5}", "validation.samples=0", "log_samples=true"]
    assert train(sources(3), *common, "max_steps=4") == 0
    said = capsys.readouterr().out
    assert "sources: web 75.0% (120 samples" in said and "captions of" in said
    assert train(sources(3), *common, "max_steps=8") == 0
    rows = records(tmp_path / "run/stage1")
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    for row in rows:
        assert row["source/web"] + row["source/big"] == pytest.approx(1)
        assert sum(value for key, value in row.items() if key.startswith("caption/")) == pytest.approx(1)
    assert 0.55 <= np.mean([row["source/web"] for row in rows]) <= 0.95
    with pytest.raises(UserError, match=r"data\.sources"):
        train(sources(2), *common, "max_steps=9")
