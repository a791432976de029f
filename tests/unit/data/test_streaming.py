"""Shards without an index: batches out of a stream, with what cannot be read counted."""

from __future__ import annotations

import collections
import gc
import os
import pickle
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import user_error, wait_for
from data_fixtures import as_json, encoded, picture, sample, write_tar
from loader_fixtures import children
from remote_fixtures import Behaviour, serving

from paradiffusion.data.cache import Cache
from paradiffusion.data.images import assign_buckets, decode, make_buckets, to_array
from paradiffusion.data.index import index_head, load_index, read_sample
from paradiffusion.data.loader import Batch, LoaderSettings
from paradiffusion.data.remote import Storage
from paradiffusion.data.shards import expand_shards, write_shards
from paradiffusion.data.stream import StreamLoader
from paradiffusion.errors import UserError

BUCKETS = make_buckets(64, 16, 2.0)
SETTINGS = LoaderSettings(seed=1, workers=0, last_step=20)
BOTH = {"short": 1.0, "long": 1.0}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paradiffusion.data.remote._FIRST_WAIT", 0.001)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards((sample(number) for number in range(70)), folder, 20)
    return folder


def stream(url: str, settings: LoaderSettings = SETTINGS, weights: dict[str, float] | None = None) -> StreamLoader:
    shards = expand_shards(f"{url}{{000000..000003}}.tar", storage=Storage(retries=2))
    return StreamLoader(shards, 8, BUCKETS, weights or BOTH, settings)


def check(batches: list[Batch], folder: Path) -> None:
    """Every sample is whole: the pixels of its picture in its bucket, and a caption of its own of the kind that it says."""
    index = load_index(expand_shards(str(folder)))
    rows = {f"{index.shards[index.shard[row]].name}/{index.key(row)}": row for row in range(len(index))}
    for batch in batches:
        bucket = (batch.pixels.shape[2], batch.pixels.shape[3])
        for slot, key in enumerate(batch.keys):
            raw, identity = read_sample(index, rows[key]), int(index.ids[rows[key]])
            number = assign_buckets(index.width[[rows[key]]], index.height[[rows[key]]], BUCKETS)[0]
            assert BUCKETS[number] == bucket
            pixels = torch.from_numpy(to_array(decode(raw.image), bucket, identity).copy()).permute(2, 0, 1)
            assert torch.equal(batch.pixels[slot], pixels)
            assert batch.captions[slot] in ("", raw.meta["captions"][batch.kinds[slot]])


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_a_stream(folder: Path, workers: int) -> None:
    with serving(folder) as server:
        loader = stream(server.url, replace(SETTINGS, workers=workers, caption_dropout=0.2, accumulation=2))
        batches = list(loader)
        assert not any("index" in line for line in server.gets)
    assert [(batch.step, batch.micro) for batch in batches] == [(step, micro) for step in range(20) for micro in (0, 1)]
    assert all(len(batch.keys) == 4 and batch.weights.tolist() == [1.0] * 4 for batch in batches)
    assert {tuple(batch.slots.tolist()) for batch in batches} == {(0, 1, 2, 3), (4, 5, 6, 7)}
    assert not loader.report.bad and loader.report.read == 160
    check(batches, folder)
    kinds = collections.Counter(kind for batch in batches for kind in batch.kinds)
    assert 40 < kinds["short"] < 120
    assert 5 < sum(caption == "" for batch in batches for caption in batch.captions) < 70
    assert len({key.split("/")[0] for batch in batches[:6] for key in batch.keys}) > 1  # Shards are mixed.


def test_names_with_dots_and_side_files(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paradiffusion.data.stream._UNUSED", 50)
    picture = read_sample(load_index(expand_shards(str(folder))), 0).image
    write_tar(tmp_path / "x.tar", [
        ("cat.png", picture), ("cat.seg.png", picture), ("cat.txt", b"a cat"), ("img.v1.07.png", picture),
        ("img.v1.07.caption", b"with dots"), ("lost.png", picture),
    ])  # fmt: skip
    with serving(tmp_path) as server:
        shards = expand_shards(f"{server.url}x.tar", storage=Storage(retries=2))
        with closing(StreamLoader(shards, 2, BUCKETS, BOTH, SETTINGS)) as loader:
            batches = list(loader)
        write_tar(tmp_path / "x.tar", [("lost.png", picture), ("alone.txt", b"a cat")])
        with (
            closing(StreamLoader(shards, 2, BUCKETS, BOTH, SETTINGS)) as loader,
            pytest.raises(UserError, match="50 in a row are no picture with a caption"),
        ):
            list(loader)
    found = {(key, caption) for batch in batches for key, caption in zip(batch.keys, batch.captions, strict=True)}
    assert found - {(key, "") for key, _ in found} == {("x.tar/cat", "a cat"), ("x.tar/img.v1.07", "with dots")}


def test_all_ranks_take_the_same_number_of_steps(folder: Path) -> None:
    settings = replace(SETTINGS, world_size=2, first_step=5)
    with serving(folder) as server:
        ranks = [list(stream(server.url, replace(settings, rank=rank), {"long": 1.0, "clean": 0.0})) for rank in (0, 1)]
    assert [batch.step for batch in ranks[0]] == [batch.step for batch in ranks[1]] == list(range(5, 20))
    assert {tuple(batch.slots.tolist()) for batch in ranks[1]} == {(1, 3, 5, 7)}
    assert [batch.keys for batch in ranks[0]] != [batch.keys for batch in ranks[1]]
    assert {kind for batch in ranks[0] for kind in batch.kinds} == {"long"}, "kinds follow the weights"


@pytest.mark.parametrize("behaviour", [Behaviour(fail_every=3), Behaviour(cut_every=3)])
def test_errors_that_pass_are_passed(folder: Path, behaviour: Behaviour, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paradiffusion.data.stream._PIECE", 1 << 16)
    with serving(folder, behaviour) as server:
        loader = stream(server.url)
        check(list(loader), folder)
    assert not loader.report.bad and len(server.gets) > 10


def broken_shards(folder: Path) -> Path:
    """One shard cut short, one that is none, one with bad images, stray members and a pickle, and a whole one."""
    write_shards((sample(number) for number in range(60)), folder, 20)
    (folder / "000001.tar").write_bytes((folder / "000000.tar").read_bytes()[:60_000])
    (folder / "000002.tar").write_bytes(os.urandom(4000))
    members = [("p.pkl", pickle.dumps(os.getpid)), ("README", b"x"), ("lonely.json", as_json(caption="x"))]
    for number in range(12):
        image = b"<html>" if number % 3 == 0 else encoded(picture(number))
        members += [(f"{number:03d}.png", image), (f"{number:03d}.pyd", b"x"), (f"{number:03d}.txt", b"a thing")]
    write_tar(folder / "000003.tar", members)
    return folder


def test_what_cannot_be_read_is_counted(tmp_path: Path) -> None:
    with serving(broken_shards(tmp_path)) as server:
        loader = stream(server.url, replace(SETTINGS, max_bad_fraction=0.5, last_step=30))
        assert len(list(loader)) == 30
        report = loader.report
        assert report.read == 240 + report.bad.total() and report.bad.total() / report.read < 0.5
        reasons = {shard: reason for shard, reason in report.bad}
        assert reasons["000001.tar"] == reasons["000002.tar"] == "the shard is cut short, or no tar"
        assert "does not decode" in reasons["000003.tar"] and "000000.tar" not in reasons
        with pytest.raises(UserError, match="samples could not be read.*data.max_bad_fraction is 0.01"):
            list(stream(server.url, replace(SETTINGS, last_step=None)))


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_good_at_all(folder: Path, tmp_path: Path, workers: int) -> None:
    settings = replace(SETTINGS, max_bad_fraction=1.0, workers=workers)
    with serving(folder, Behaviour(status=404)) as server, pytest.raises(UserError, match="it is not there"):
        list(stream(server.url, settings))
    for number in range(4):
        write_tar(tmp_path / f"{number:06d}.tar", [(f"{n}.{e}", b"x") for n in range(30) for e in ("png", "txt")])
    with serving(tmp_path) as server, pytest.raises(UserError, match="does not decode"):
        list(stream(server.url, settings))


def test_the_head_stands_for_the_data_at_the_start(folder: Path) -> None:
    whole = load_index(expand_shards(str(folder)))
    with serving(folder) as server:
        shards = expand_shards(f"{server.url}{{000000..000003}}.tar")
        for samples in (7, 20, 50):
            head = index_head(shards, samples)
            assert len(head) == min(samples, 20) and head.ids.tolist() == whole.ids[: len(head)].tolist()
            assert read_sample(head, len(head) - 1).image == read_sample(whole, len(head) - 1).image
        server.status = 404
        user_error("cannot be read.*it is not there", index_head, shards)


def test_a_stream_that_nobody_needs_ends(folder: Path) -> None:
    user_error("cannot use a cache", stream, "http://nowhere/", replace(SETTINGS, cache=Cache.__new__(Cache)))

    def alive() -> tuple[int, int]:
        return sum(thread.name.startswith("batches") for thread in threading.enumerate()), len(children())

    gc.collect()
    wait_for(lambda: alive()[0] == 0, timeout=60)  # those of the tests before, each at its last batch
    before = alive()
    with serving(folder) as server:
        loader = stream(server.url, replace(SETTINGS, last_step=None, workers=1))
        next(loader)
        assert alive() == (before[0] + 1, before[1] + 1)
        del loader
        gc.collect()
        wait_for(lambda: alive() == before, timeout=60)
