"""Remote shards: the same batches as from disk through errors that pass, a cache that keeps to its size, and streams without an index."""

from __future__ import annotations

import collections
import contextlib
import gc
import multiprocessing
import os
import pickle
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import psutil
import pytest
import torch
from commands import user_error, wait_for
from data_fixtures import as_json, encoded, picture, sample, shards_of, write_tar
from loader_fixtures import assert_same, children, plan_of
from remote_fixtures import Behaviour, serving

from paradiffusion.data import remote
from paradiffusion.data.cache import Cache
from paradiffusion.data.images import assign_buckets, decode, make_buckets, to_array
from paradiffusion.data.index import SampleIndex, build_indexes, index_head, index_shard, load_index, read_sample
from paradiffusion.data.loader import Batch, LoaderSettings, make_loader
from paradiffusion.data.remote import RemoteError, RemotePath, Storage, cached_copy, read_range, with_state
from paradiffusion.data.shards import expand_shards, write_shards
from paradiffusion.data.stream import StreamLoader
from paradiffusion.errors import UserError

SETTINGS = LoaderSettings(seed=1, workers=0, last_step=14)
FEW = Storage(retries=2)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> SampleIndex:
    return shards_of(tmp_path_factory.mktemp("shards"), 70)


@pytest.fixture
def folder(local: SampleIndex) -> Path:
    return Path(str(local.shards[0])).parent


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paradiffusion.data.remote._FIRST_WAIT", 0.001)


def remote_index(url: str, access: Storage = FEW) -> SampleIndex:
    return load_index(expand_shards(f"{url}{{000000..000003}}.tar", storage=access))


def load(index: SampleIndex, settings: LoaderSettings = SETTINGS) -> list[Batch]:
    loader = make_loader(index, plan_of(index), settings)
    batches = list(loader)
    assert not loader.report.bad
    return batches


def shard_of(server: Behaviour, number: int, access: Storage = FEW) -> RemotePath:
    return RemotePath(f"{server.url}00000{number}.tar", access)


@pytest.mark.parametrize("workers", [0, 3])
def test_the_same_batches_as_from_disk(local: SampleIndex, folder: Path, workers: int) -> None:
    with serving(folder) as server:
        index = remote_index(server.url)
        assert index.fingerprint() == local.fingerprint()
        assert [shard.name for shard in index.shards] == [shard.name for shard in local.shards]
        assert [str(shard) for shard in index.shards] == [f"{server.url}{shard.name}" for shard in local.shards]
        server.gets.clear()
        assert_same(load(local), load(index, replace(SETTINGS, workers=workers)))
        # One ranged request a sample: its image and JSON come together, nothing comes twice.
        assert len(server.gets) == 14 * 8 and all("bytes=" in line for line in server.gets)


def test_errors_that_pass_are_passed(local: SampleIndex, folder: Path) -> None:
    for behaviour in (Behaviour(fail_every=3), Behaviour(cut_every=3)):
        with serving(folder, behaviour) as server:
            assert_same(load(local), load(remote_index(server.url, Storage(retries=8))))
            assert len(server.gets) > 14 * 8 * 1.2


@pytest.mark.parametrize(
    ("behaviour", "tries", "said"),
    [
        (Behaviour(status=404), 1, "not there"),
        (Behaviour(status=403), 1, "access is denied"),
        (Behaviour(status=500), 3, "answers 500, after 3 tries"),
        (Behaviour(ranges=False), 1, "does not send pieces"),
    ],
    ids=lambda value: value.status if isinstance(value, Behaviour) else "",
)
def test_errors_that_stay_are_told_at_once(folder: Path, behaviour: Behaviour, tries: int, said: str) -> None:
    with serving(folder, behaviour) as server:
        with pytest.raises(RemoteError, match=said):
            read_range(shard_of(server, 0), 0, 10)
        assert len(server.gets) == tries
        if behaviour.status:
            user_error(rf"000000.tar cannot be read: .*{said}", load_index, [shard_of(server, 0)])


def test_nobody_listens() -> None:
    """To fsspec a connection that is refused is a file that was not found."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{one.getsockname()[1]}/a.tar"
    with pytest.raises(RemoteError, match=r"the connection fails .*, after 3 tries"):
        with_state(RemotePath(address, Storage(retries=2)))


def test_a_shard_that_is_replaced_is_noticed(tmp_path: Path) -> None:
    """By another of the same size, so that only its version tells: of two states no sample and no copy is joined."""
    access = Storage(retries=0, cache_dir=str(tmp_path / "cache"), cache_bytes=1 << 20)
    path = tmp_path / "a.tar"
    path.write_bytes(b"1" * 2000)
    with serving(tmp_path) as server:
        shard = with_state(RemotePath(f"{server.url}a.tar", access))
        assert shard.version and read_range(shard, 10, 4) == b"1111"
        path.write_bytes(b"2" * 2000)
        os.utime(path, ns=(1, 1))
        for read in (lambda: read_range(shard, 10, 4), lambda: cached_copy(shard)):
            with pytest.raises(RemoteError, match="replaced since it was indexed"):
                read()
        assert not kept(access) and read_range(with_state(shard), 10, 4) == b"2222"


def test_a_store_whose_library_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    remote._connect.cache_clear()
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)  # Classes that were imported before.
    with pytest.raises(UserError, match=r"^s3://bucket/a.tar cannot be read .*[Ii]nstall s3fs"):
        load_index(expand_shards("s3://bucket/a.tar"))


@pytest.mark.parametrize(("size", "most", "share"), [(20_000, 20, 2.1), (1_000_000, 25, 0.7)])
def test_what_indexing_asks_for(tmp_path: Path, size: int, most: int, share: float) -> None:
    """Small images: all of the shard in few requests, once to list it and once to look into it. Large ones: their heads."""
    head, members = encoded(picture(0, 8, 8)), []
    for number in range(10_000_000 // size):
        members += [(f"{number:03d}.json", as_json(caption=f"a {number}")), (f"{number:03d}.png", head + bytes(size))]
    path = write_tar(tmp_path / "a.tar", members)
    with serving(tmp_path) as server:
        remote = index_shard(RemotePath(f"{server.url}a.tar", FEW), folder=tmp_path / "indexes")
        pieces = [line for line in server.gets if "bytes=" in line and "index" not in line]
        assert len(pieces) <= most and server.bytes_sent < share * path.stat().st_size
    local = index_shard(path)
    assert (remote.table == local.table).all() and (remote.words == local.words).all()


@pytest.fixture
def memory(folder: Path) -> Iterator[str]:
    store = fsspec.filesystem("memory")
    for path in folder.iterdir():
        store.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    yield "memory://bucket/"
    store.rm("/bucket", recursive=True)


def test_another_store(local: SampleIndex, folder: Path, memory: str) -> None:
    for spec in (memory, f"{memory}*.tar", f"{memory}{{000000..000003}}.tar"):
        index = load_index(expand_shards(spec))
        assert index.fingerprint() == local.fingerprint()
    assert_same(load(local), load(index, replace(SETTINGS, workers=2)))
    assert expand_shards(f"file://{folder}/*.tar") == local.shards


def test_a_shard_that_has_become_shorter(memory: str) -> None:
    with pytest.raises(RemoteError, match="fewer bytes came"):
        read_range(RemotePath(f"{memory}000000.tar", Storage(retries=0)), 100, 1 << 30)


def test_without_an_index(local: SampleIndex, memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or with one of another state."""
    monkeypatch.setenv("PARADIFFUSION_CACHE", str(tmp_path / "cache"))
    store = fsspec.filesystem("memory")
    for number in (0, 2):
        store.rm(f"/bucket/00000{number}.index.npz")
    user_error(r"2 of the 4 remote shards.*index_shards.py.*data.streaming", load_index, expand_shards(memory))
    shards = expand_shards(memory, storage=Storage(index_dir=str(tmp_path / "indexes")))
    list(build_indexes(shards, folder=tmp_path / "indexes", processes=1))
    assert len(list((tmp_path / "indexes").iterdir())) == 2  # Those that lie beside their shards are good enough.
    assert load_index(shards).fingerprint() == local.fingerprint()
    other = write_shards((sample(number) for number in range(100, 107)), tmp_path, 20)[0]
    store.pipe_file("/bucket/000001.tar", other.read_bytes())
    user_error(r"1 of the 4 remote shards .*earlier state, the first one memory:/+bucket/000001", load_index, shards)


def test_names_of_remote_shards() -> None:
    path = RemotePath("https://host/a/b-{1}.tar?sig=x%2Fy")
    assert (path.name, path.stem) == ("b-{1}.tar", "b-{1}")
    assert str(path.sibling("b.index.npz")) == "https://host/a/b.index.npz?sig=x%2Fy"
    assert str(RemotePath("s3://bucket/x.tar").sibling("y")) == "s3://bucket/y"


def limited(folder: Path, shards: float, cache: Path, retries: int = 2) -> Storage:
    """Room for so many of the shards, which are of about equal sizes."""
    biggest = max(path.stat().st_size for path in folder.glob("*.tar"))
    return Storage(retries=retries, cache_dir=str(cache), cache_bytes=int(biggest * shards))


def kept(access: Storage) -> list[Path]:
    return sorted(Path(str(access.cache_dir)).glob("*.shard"))


def test_each_shard_is_fetched_once(local: SampleIndex, folder: Path, tmp_path: Path) -> None:
    access = limited(folder, 10, tmp_path)
    with serving(folder) as server:
        index = remote_index(server.url, access)
        server.gets.clear()
        for workers in (2, 0):
            assert_same(load(local), load(index, replace(SETTINGS, workers=workers)))
            assert len(server.gets) == 4 and len(kept(access)) == 4


def test_the_least_recently_used_shard_leaves(folder: Path, tmp_path: Path) -> None:
    """And what a killed process left goes with it; a shard that is larger than the cache is not kept."""
    access = limited(folder, 2.5, tmp_path)
    (tmp_path / "left.partial").write_bytes(bytes(access.cache_bytes))
    os.utime(tmp_path / "left.partial", (1, 1))
    with serving(folder) as server:
        shards = [with_state(shard_of(server, number, access)) for number in range(3)]
        for number in (0, 1, 0, 2, 0):
            copy = cached_copy(shards[number])
            assert copy is not None
            with copy:
                assert copy.read() == (folder / shards[number].name).read_bytes()
            time.sleep(0.01)
        assert [line.split()[0] for line in server.gets] == ["/000000.tar", "/000001.tar", "/000002.tar"]
        assert len(kept(access)) == 2 and not (tmp_path / "left.partial").exists()
        assert cached_copy(replace(shards[0], storage=replace(access, cache_bytes=1000))) is None


def test_half_a_shard_is_never_served(folder: Path, tmp_path: Path) -> None:
    access = limited(folder, 10, tmp_path, retries=0)
    with serving(folder, Behaviour(cut_every=1)) as server:
        shard = with_state(shard_of(server, 0, access))
        with pytest.raises(RemoteError):
            cached_copy(shard)
        assert not kept(access) and not list(tmp_path.glob("*.partial"))
        server.cut_every = 0
        copy = cached_copy(shard)
        assert copy is not None and copy.read() == (folder / "000000.tar").read_bytes()
        copy.close()
        (tmp_path / "file").write_text("no folder")
        with pytest.raises(RemoteError, match=r"^data.cache_dir=\S+file cannot be used \(.+\): make it usable"):
            cached_copy(shard_of(server, 0, replace(access, cache_dir=str(tmp_path / "file"))))


def test_two_processes_share_a_cache_that_is_too_small(local: SampleIndex, folder: Path, tmp_path: Path) -> None:
    access = limited(folder, 2.2, tmp_path)
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[tuple[int, int]] = context.Queue()

    def read_all(url: str, seed: int) -> None:
        """Counts pictures that are wrong, and the most that has lain in the cache."""
        index, wrong, most = remote_index(url, access), 0, 0
        for row in np.random.default_rng(seed).permutation(np.repeat(np.arange(len(index)), 2)).tolist():
            wrong += read_sample(index, row).image != sample(row).image
            with contextlib.suppress(FileNotFoundError):
                most = max(most, sum(path.stat().st_size for path in tmp_path.iterdir()))
        queue.put((wrong, most))

    with serving(folder) as server:
        readers = [context.Process(target=read_all, args=(server.url, seed)) for seed in range(2)]
        for reader in readers:
            reader.start()
        found = [queue.get(timeout=120) for _ in readers]
        for reader in readers:
            reader.join()
    assert [wrong for wrong, _ in found] == [0, 0]
    # Two may fetch at a time, and what is fetched counts before it is there.
    biggest = max(path.stat().st_size for path in folder.glob("*.tar"))
    assert max(most for _, most in found) <= access.cache_bytes * 1.001 + 2 * biggest
    assert 1 <= len(kept(access)) <= 2


def test_reading_side_by_side_and_apart(tmp_path: Path) -> None:
    """Members of a sample that lie far apart are read one by one, not with all between them."""
    images = [encoded(picture(number, 200, 200)) for number in range(4)]
    members = [(f"{n}.png", image) for n, image in enumerate(images)]
    members += [(f"{n}.json", as_json(captions={"short": f"thing {n}"})) for n in range(4)]
    load_index([write_tar(tmp_path / "000000.tar", members)])
    with serving(tmp_path) as server:
        index = load_index([shard_of(server, 0)])
        server.gets.clear()
        for row in range(4):
            read = read_sample(index, row)
            assert read.image == images[row] and read.meta["captions"] == {"short": f"thing {row}"}
        assert len(server.gets) == 4 * 2 - 1  # Only the last image and its JSON are near each other.


def test_open_files_are_kept_within_bounds(tmp_path: Path) -> None:
    index = load_index(write_shards((sample(number) for number in range(90)), tmp_path, 1))
    for row in range(90):
        assert read_sample(index, row).image == sample(row).image
    assert sum(str(tmp_path) in file.path for file in psutil.Process().open_files()) <= 64
    last = tmp_path / "000089.tar"
    whole = last.read_bytes()
    last.unlink()
    with pytest.raises(FileNotFoundError):
        read_sample(index, 89)
    last.write_bytes(whole)
    assert read_sample(index, 89).image == sample(89).image


BUCKETS = make_buckets(64, 16, 2.0)
STREAMED = LoaderSettings(seed=1, workers=0, last_step=20)
BOTH = {"short": 1.0, "long": 1.0}


def stream(url: str, settings: LoaderSettings = STREAMED, weights: dict[str, float] | None = None) -> StreamLoader:
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
        loader = stream(server.url, replace(STREAMED, workers=workers, caption_dropout=0.2, accumulation=2))
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
        ("img.v1.07.caption", b"with dots"), ("lost.png", picture), ("d.png", picture), ("d.png.text", b"behind the name"),
        ("e.png", picture), ("e.png.txt", b"the first"), ("e.txt", b"a second"), ("f.png", picture), ("f.txt", b"its own"), ("f.png.txt", b"x"),
    ])  # fmt: skip
    with serving(tmp_path) as server:
        shards = expand_shards(f"{server.url}x.tar", storage=Storage(retries=2))
        with closing(StreamLoader(shards, 2, BUCKETS, BOTH, STREAMED)) as loader:
            batches = list(loader)
            assert {reason for _, reason in loader.report.bad} <= {"no picture with a caption"}
        write_tar(tmp_path / "x.tar", [("lost.png", picture), ("alone.txt", b"a cat")])
        with (
            closing(StreamLoader(shards, 2, BUCKETS, BOTH, STREAMED)) as loader,
            pytest.raises(UserError, match="50 in a row are no picture with a caption"),
        ):
            list(loader)
    found = {(key, caption) for batch in batches for key, caption in zip(batch.keys, batch.captions, strict=True)}
    assert found - {(key, "") for key, _ in found} == {("x.tar/cat", "a cat"), ("x.tar/img.v1.07", "with dots"),
                                                         ("x.tar/d", "behind the name"), ("x.tar/e", "the first"),
                                                         ("x.tar/f", "its own")}  # fmt: skip


def test_all_ranks_take_the_same_number_of_steps(folder: Path) -> None:
    settings = replace(STREAMED, world_size=2, first_step=5)
    with serving(folder) as server:
        ranks = [list(stream(server.url, replace(settings, rank=rank), {"long": 1.0, "clean": 0.0})) for rank in (0, 1)]
    assert [batch.step for batch in ranks[0]] == [batch.step for batch in ranks[1]] == list(range(5, 20))
    assert {tuple(batch.slots.tolist()) for batch in ranks[1]} == {(1, 3, 5, 7)}
    assert [batch.keys for batch in ranks[0]] != [batch.keys for batch in ranks[1]]
    assert {kind for batch in ranks[0] for kind in batch.kinds} == {"long"}, "kinds follow the weights"


@pytest.mark.parametrize("behaviour", [Behaviour(fail_every=3), Behaviour(cut_every=3)])
def test_errors_that_pass_a_stream_are_passed(folder: Path, behaviour: Behaviour, monkeypatch: pytest.MonkeyPatch) -> None:
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
        loader = stream(server.url, replace(STREAMED, max_bad_fraction=0.5, last_step=30))
        assert len(list(loader)) == 30
        report = loader.report
        assert report.read == 240 + report.bad.total() and report.bad.total() / report.read < 0.5
        reasons = {shard: reason for shard, reason in report.bad}
        assert reasons["000001.tar"] == reasons["000002.tar"] == "the shard is cut short, or no tar"
        assert "does not decode" in reasons["000003.tar"] and "000000.tar" not in reasons
        with pytest.raises(UserError, match="samples could not be read.*data.max_bad_fraction is 0.01"):
            list(stream(server.url, replace(STREAMED, last_step=None)))


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_good_at_all(folder: Path, tmp_path: Path, workers: int) -> None:
    settings = replace(STREAMED, max_bad_fraction=1.0, workers=workers)
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
    user_error("cannot use a cache", stream, "http://nowhere/", replace(STREAMED, cache=Cache.__new__(Cache)))

    def alive() -> tuple[int, int]:
        return sum(thread.name.startswith("batches") for thread in threading.enumerate()), len(children())

    gc.collect()
    wait_for(lambda: alive()[0] == 0, timeout=60)  # those of the tests before, each at its last batch
    before = alive()
    with serving(folder) as server:
        loader = stream(server.url, replace(STREAMED, last_step=None, workers=1))
        next(loader)
        assert alive() == (before[0] + 1, before[1] + 1)
        del loader
        gc.collect()
        wait_for(lambda: alive() == before, timeout=60)
