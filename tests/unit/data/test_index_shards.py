"""Indexes of many shards: by several processes, by one process of a machine, and by the command line."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import ROOT, user_error, wait_for
from data_fixtures import as_json, encoded, picture, sample, shards_of, write_tar
from remote_fixtures import serving

import paradiffusion.data.index
from paradiffusion.data.index import SampleIndex, TokenCounter, build_indexes, index_shard, join_indexes, load_index
from paradiffusion.data.plan import BatchPlan
from paradiffusion.data.remote import Storage
from paradiffusion.data.shards import expand_shards, write_shards
from scripts import index_shards as script

LETTERS = TokenCounter("letters", lambda texts: [len(text) for text in texts])


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARADIFFUSION_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def index_shards(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The script within this process."""
    monkeypatch.setattr(signal, "signal", lambda *both: None)
    return lambda *arguments: int(script.main(list(arguments)))


def many(folder: Path, count: int = 12) -> list[Path]:
    return write_shards((sample(number) for number in range(count * 2)), folder, 2)


def test_several_processes_make_the_same(tmp_path: Path) -> None:
    one, other = many(tmp_path / "a"), many(tmp_path / "b")
    assert all(isinstance(index, SampleIndex) for index in build_indexes(other, LETTERS, processes=3))
    # What is stored has tokens.
    list(build_indexes(one, LETTERS))
    assert load_index(one).fingerprint() == load_index(other).fingerprint()
    assert sorted(path.name for path in (tmp_path / "b").glob("*.npz")) == [f"{n:06d}.index.npz" for n in range(12)]


def test_an_error_of_another_process_comes_through(
    tmp_path: Path, index_shards: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Training stops at a bad shard; the script goes on past it."""
    paths = many(tmp_path)
    paths[5].write_bytes(os.urandom(3000))
    user_error(r"000005.tar cannot be read as an uncompressed tar", load_index, paths)
    paths[1].write_bytes(paths[1].read_bytes()[:-9000])
    assert index_shards(f"shards={tmp_path}") == 1
    told = capsys.readouterr().out
    assert "11 shards" in told and "not indexed: The shard" in told and f"cut short: {paths[1]}" in told


def test_the_first_process_of_a_machine_makes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who comes second waits for the first, and finds all of them."""
    paths = many(tmp_path / "data")
    store = paradiffusion.data.index._store

    def watched(path: Path, *rest: Any) -> None:
        with open(tmp_path / "stored", "a") as file:
            file.write(f"{path.name}\n")
        store(path, *rest)

    monkeypatch.setattr("paradiffusion.data.index._store", watched)
    context = multiprocessing.get_context("fork")
    racers = [context.Process(target=load_index, args=(paths,)) for _ in range(3)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(60)
        assert racer.exitcode == 0
    assert sorted((tmp_path / "stored").read_text().split()) == [path.name for path in paths]


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 20 samples on an index is a large one."""
    monkeypatch.setattr("paradiffusion.data.index._MAPPED_FROM", 20)


def same_index(one: SampleIndex, other: SampleIndex) -> bool:
    arrays = ("shard", "table", "words", "ids", "key_bytes", "key_starts", "shard_source")
    equal = all(np.array_equal(getattr(one, name), getattr(other, name)) for name in arrays)
    rest = ("shards", "kinds", "tokenizer", "sources", "truncated", "stray", "without_image", "bad_json")
    return equal and all(getattr(one, name) == getattr(other, name) for name in rest)


def test_a_large_index_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = many(tmp_path)
    small = load_index(paths)
    monkeypatch.setattr("paradiffusion.data.index._MAPPED_FROM", 20)
    large = load_index(paths)
    assert small.columns is None and large.columns is not None and large.columns.parent == tmp_path
    assert same_index(small, large) and large.fingerprint() == small.fingerprint()
    assert not large.table.flags.writeable and not large.words.flags.owndata
    with monkeypatch.context() as patch:
        patch.setattr("paradiffusion.data.index._parse", lambda *_: pytest.fail("the parts are not read again"))
        assert same_index(load_index(paths), small)
    plans = [BatchPlan(index, 4, 1, [(64, 64), (64, 96)], {"long": 1.0}, 3) for index in (small, large, load_index(paths))]
    for plan in plans[1:]:
        assert all(np.array_equal(plans[0].batch(n).rows, plan.batch(n).rows) for n in range(40))
        assert plan.bucket_sizes() == plans[0].bucket_sizes() and plan.expected_kinds() == plans[0].expected_kinds()


def test_mapped_columns_follow_the_shards(tmp_path: Path, mapped: None) -> None:
    paths = many(tmp_path)
    first = load_index(paths)
    assert first.columns is not None
    write_shards([sample(99), sample(98)], tmp_path / "new", 2)[0].replace(paths[3])
    second = load_index(paths)
    assert second.columns == first.columns and second.key(6) == "000099" and second.state() != first.state()
    assert first.key(6) == "000006"  # Who has mapped the old one keeps it.
    list(build_indexes(paths, LETTERS))
    counted = load_index(paths)
    assert counted.tokens is not None and counted.tokenizer == "letters"
    (counted.columns / "facts.json").write_text("{")
    assert same_index(load_index(paths), counted)
    assert len(list(tmp_path.glob("*.columns"))) == 1 and not list(tmp_path.glob(".*"))
    paths[5].write_bytes(paths[5].read_bytes()[:-9000])
    for _ in range(2):
        user_error("000005.tar is cut short after 1 whole", load_index, paths)
        assert len(load_index(paths, allow_truncated=True)) == 23


def test_mapped_columns_elsewhere(
    tmp_path: Path, mapped: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = many(tmp_path / "data")
    assert load_index(paths, index_dir=str(tmp_path)).columns.parent == tmp_path  # type: ignore[union-attr]
    with serving(tmp_path / "data") as server:
        shards = expand_shards(f"{server.url}{{000000..000011}}.tar", storage=Storage(index_dir=str(tmp_path / "data")))
        for remote in (load_index(shards), load_index(shards)):
            assert remote.columns is not None and remote.columns.parent == tmp_path / "data"
            assert remote.shards[0].size and remote.fingerprint() == load_index(paths).fingerprint()  # type: ignore[union-attr]
    assert not capsys.readouterr().err

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("paradiffusion.data.columns._write_columns", refuse)
    index = load_index(many(tmp_path / "b"))
    assert index.columns is None and len(index) == 24
    assert "No space left on device): each process holds this index in its own memory" in capsys.readouterr().err


def test_large_sources_are_joined_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    indexes = [load_index(many(tmp_path / "a")), load_index(many(tmp_path / "b", 7))]
    small = join_indexes(indexes, ["a", "b"])
    monkeypatch.setattr("paradiffusion.data.index._MAPPED_FROM", 20)
    joined = join_indexes([load_index(index.shards) for index in indexes], ["a", "b"])
    assert joined.columns is not None and joined.columns.parent == tmp_path / "a" and small.columns is None
    assert same_index(joined, small) and joined.fingerprint() == small.fingerprint()
    renamed = join_indexes([load_index(index.shards) for index in indexes], ["a", "c"])
    assert renamed.columns == joined.columns and renamed.fingerprint() != joined.fingerprint()


def test_tokens(tmp_path: Path) -> None:
    index = shards_of(tmp_path, 50)
    assert index.tokens is None and index.lengths is index.words
    list(build_indexes(expand_shards(tmp_path), LETTERS))
    counted = load_index(expand_shards(tmp_path))
    assert counted.tokens is not None and counted.tokenizer == "letters" and counted.lengths is counted.tokens
    assert counted.tokens[:, counted.kinds.index("short")].tolist() == [len(f"thing {number}") for number in range(50)]
    assert counted.fingerprint() != index.fingerprint()
    assert load_index(expand_shards(tmp_path)).fingerprint() == counted.fingerprint()
    # Of two tokenizers, or of some shards alone, they say nothing.
    index_shard(tmp_path / "000001.tar", counter=TokenCounter("other", lambda texts: [7] * len(texts)))
    mixed = load_index(expand_shards(tmp_path))
    assert mixed.tokens is None and mixed.tokenizer is None and mixed.fingerprint() == index.fingerprint()


def test_joined_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = shards_of(tmp_path / "a", 30), shards_of(tmp_path / "b", 45)
    members = [("x.png", encoded(picture(1))), ("x.json", as_json(captions={"clean": "a b", "short": "c"}))]
    third = index_shard(write_tar(tmp_path / "c" / "x.tar", members), counter=LETTERS)
    joined = join_indexes([one, third, other], ["one", "third", "other"])
    assert joined.kinds == ["short", "long", "clean"] and joined.tokens is None
    assert joined.sources == ["one", "third", "other"] and joined.shard_source.tolist() == [0, 0, 1, 2, 2, 2]
    assert joined.ids.tolist() == [*one.ids.tolist(), *third.ids.tolist(), *other.ids.tolist()]
    assert joined.key(30) == "x" and joined.words[30].tolist() == [1, 0, 2]
    for row, (index, there) in {29: (one, 29), 30: (third, 0), 75: (other, 44)}.items():
        assert joined.place(row) == index.place(there)
    assert np.array_equal(joined.shard[1:] >= joined.shard[:-1], np.ones(75, bool))
    whole, moved = joined.fingerprint(), joined.shard_source.copy()
    moved[-1] = 0
    assert replace(joined, shard_source=moved).fingerprint() != whole, "the source of every shard takes part"
    monkeypatch.setattr("paradiffusion.data.index._ROWS_AT_ONCE", 2)
    assert joined.fingerprint() == whole, "in whatever pieces"
    prints = {joined.fingerprint(), join_indexes([one, third, other], ["one", "third", "another"]).fingerprint()}
    assert len(prints | {join_indexes([one, other, third], ["one", "third", "other"]).fingerprint()}) == 3
    assert join_indexes([one], ["one"]).fingerprint() == one.fingerprint()


def test_script(tmp_path: Path, index_shards: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    paths = many(tmp_path / "data", 3)
    write_tar(tmp_path / "data" / "odd.tar", [("a.png", encoded(picture(1))), ("b.json", b"{}"), ("c.exe", b"x")])
    output = tmp_path / "indexes"
    common = (f"shards={tmp_path}/data", f"output={output}", "tokenizer=tiny", "processes=1")
    assert index_shards(*common) == 0
    told = capsys.readouterr().out
    for part in ("4 shards, 7 samples, 1 of them without a caption", "kind long: 6, ", " tokens on average",
                 "1 keys without an image", "1 files that are no part of a sample", "data.index_dir="):  # fmt: skip
        assert part in told
    stamps = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    assert index_shards(*common) == 0 and told.endswith(capsys.readouterr().out)
    assert len(stamps) == 4 and stamps == {path: path.stat().st_mtime_ns for path in output.iterdir()}
    index = load_index(paths, index_dir=str(output))
    assert index.tokenizer == "tiny" and index.tokens is not None and index.tokens.any(axis=1).all()
    assert not list((tmp_path / "data").glob("*.npz"))


def test_script_on_remote_shards(tmp_path: Path, index_shards: Callable[..., int]) -> None:
    paths = many(tmp_path / "data", 3)
    with serving(tmp_path / "data") as server:
        spec = f"{server.url}{{000000..000002}}.tar"
        user_error("output= is missing", index_shards, f"shards={spec}")
        assert index_shards(f"shards={spec}", f"output={tmp_path / 'indexes'}") == 0
        remote = load_index(expand_shards(spec), index_dir=str(tmp_path / "indexes"))
        assert remote.fingerprint() == load_index(paths).fingerprint()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "shards= is missing"), (["shards=/nowhere"], "shards=/nowhere matches no .tar"),
        (["shards={data}", "tokenizer=nothing"], "neither a folder nor one of"), (["shards={data}", "processes=0"], "processes"),
        (["shards={data}", "output={data}/000000.tar"], "is a file"), (["shard={data}"], "not understood"),
        (["shards={data}/*/*.tar", "output={data}"], "have one name"),
    ],
)  # fmt: skip
def test_script_refuses(tmp_path: Path, index_shards: Callable[..., int], arguments: list[str], said: str) -> None:
    for folder in (tmp_path, tmp_path / "a", tmp_path / "b"):
        many(folder, 1)
    user_error(said, index_shards, *(argument.format(data=tmp_path) for argument in arguments))


def test_script_can_be_stopped(tmp_path: Path) -> None:
    """SIGTERM ends it, and its processes with it, without a traceback; what was made stays."""
    many(tmp_path, 300)
    with subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "index_shards.py"), f"shards={tmp_path}", "processes=2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        wait_for(lambda: len(list(tmp_path.glob("*.npz"))) >= 5, timeout=60, interval=0.002)
        process.send_signal(signal.SIGTERM)
        told, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in errors and "interrupted" in errors, errors
    assert 5 <= len(list(tmp_path.glob("*.npz"))) < 300 and not list(tmp_path.glob(".*.npz.*")) and told == ""
