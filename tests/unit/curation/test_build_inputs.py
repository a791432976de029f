"""What shards are built from: tables of all kinds, addresses, archives, other people's tars, image folders."""

from __future__ import annotations

import csv
import json
import re
import socket
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_fixtures import as_json, encoded, picture, write_tar

from paradiffusion.curation.building.build import build
from paradiffusion.curation.building.build_options import BuildOptions
from paradiffusion.curation.building.build_report import Report
from paradiffusion.curation.building.places import Dropped, FetchLimits, fetch
from paradiffusion.data.index import load_index, read_sample
from paradiffusion.data.shards import RawSample, expand_shards
from paradiffusion.errors import UserError


def make(source: Path | str, output: Path, **options: Any) -> Report:
    return build(BuildOptions(input=str(source), output=str(output), **{"processes": 1, **options}))


def samples(folder: Path) -> dict[str, RawSample]:
    index = load_index(expand_shards(folder))
    return {index.key(row): read_sample(index, row) for row in range(len(index))}


def captions(folder: Path) -> dict[str, dict[str, str]]:
    return {key: sample.meta["captions"] for key, sample in samples(folder).items()}


def image(number: int) -> bytes:
    return encoded(picture(number, 72, 64))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """a.png to d.png in a folder."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, name in enumerate("abcd"):
        (folder / f"{name}.png").write_bytes(image(number))
    return folder


ROWS: list[dict[str, Any]] = [
    {"path": "a.png", "title": "a first, with a comma", "story": "the long story of the first", "score": 5.5},
    {"path": "b.png", "title": "the second\nin two lines", "story": "", "score": 4.0},
    {"path": "missing.png", "title": "the third", "story": "x", "score": 3.0},
]
WANTED = {
    "a": {"short": "a first, with a comma", "long": "the long story of the first"},
    "b": {"short": "the second in two lines"},
}


def write_table(path: Path, rows: list[dict[str, Any]], encoding: str = "utf-8") -> Path:
    """One of the kinds of tables, by the name."""
    if path.suffix in (".csv", ".tsv"):
        with open(path, "w", newline="", encoding=encoding) as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding=encoding)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding=encoding)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_tables(suffix: str, pictures: Path, tmp_path: Path) -> None:
    table = write_table(tmp_path / f"table{suffix}", ROWS)
    report = make(table, tmp_path / "out", root=str(pictures), captions="{title: short, story: long}", keep="[score]")
    assert report.format == "table" and report.dropped == {"no image": 1}
    assert captions(tmp_path / "out") == WANTED
    sample = samples(tmp_path / "out")["a"]
    assert float(sample.meta["extra"]["score"]) == 5.5
    assert sample.meta["caption_sources"] == {"short": "column title", "long": "column story"}
    assert sample.image == (pictures / "a.png").read_bytes()


def test_known_columns_need_no_mapping(pictures: Path, tmp_path: Path) -> None:
    rows = [{"file_name": "a.png", "text": "a text", "long_caption": "a long one", "id": "x.1/y"},
            {"file_name": "b.png", "text": "", "long_caption": "another", "id": "x.2"}]  # fmt: skip
    make(write_table(pictures / "table.csv", rows), tmp_path / "out", key="id")
    found = captions(tmp_path / "out")
    assert sorted(found.values(), key=str) == [{"long": "another"}, {"short": "a text", "long": "a long one"}]
    assert all("." not in key for key in found) and len({key[-8:] for key in found}) == 2


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1252"])
def test_tables_in_other_encodings(encoding: str, pictures: Path, tmp_path: Path) -> None:
    rows = [{"path": "a.png", "text": "plain"}, {"path": "b.png", "text": "crème brûlée"}]
    report = make(write_table(pictures / "table.csv", rows, encoding), tmp_path / "out")
    assert captions(tmp_path / "out")["b"] == {"short": "crème brûlée"}
    assert report.mended == ({"text not UTF-8, read as cp1252": 1} if encoding == "cp1252" else {})


def test_damaged_rows_are_counted(pictures: Path, tmp_path: Path) -> None:
    (pictures / "t.csv").write_text('path,text\na.png,fine\nb.png,too,many\nc.png\n"d.png","fine\0 too"\n')
    report = make(pictures / "t.csv", tmp_path / "one")
    assert report.dropped == {"row cannot be read": 2} and set(captions(tmp_path / "one")) == {"a", "d"}
    (pictures / "t.jsonl").write_text(
        '{"path": "a.png", "text": "fine"}\n{"path": \n[1]\n\n{"path": "d.png", "text": 3}\n'
    )
    report = make(pictures / "t.jsonl", tmp_path / "two")
    assert report.dropped == {"row cannot be read": 2} and captions(tmp_path / "two")["d"] == {"short": "3"}
    assert report.examples["row cannot be read"][0] == "t.jsonl line 2: no JSON object"


def test_one_key_one_sample(pictures: Path, tmp_path: Path) -> None:
    rows = [{"path": "a.png", "text": "first"}, {"path": "a.png", "text": "again"}, {"path": "b.png", "text": "other"}]
    report = make(write_table(pictures / "t.csv", rows), tmp_path / "out")
    assert report.dropped == {"duplicate key": 1} and captions(tmp_path / "out")["a"] == {"short": "first"}


def test_json_from_files_to_captions(pictures: Path, tmp_path: Path) -> None:
    (pictures / "meta.json").write_text(
        json.dumps({"a.png": "told", "b.png": {"caption": "as fields", "tags": ["x", "y"]}})
    )
    make(pictures / "meta.json", tmp_path / "out", captions="{caption: short, tags: short}")
    assert captions(tmp_path / "out") == {"a": {"short": "told"}, "b": {"short": "as fields, x, y"}}


@pytest.mark.parametrize("kind", ["tgz", "tar", "zip"])
def test_archives_as_root(kind: str, pictures: Path, tmp_path: Path) -> None:
    archive = tmp_path / f"images.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
            packed.write(pictures / "a.png", "in/a.png")
    else:
        with tarfile.open(archive, "w:gz" if kind == "tgz" else "w") as tar:
            tar.add(pictures / "a.png", "./in/a.png")
    rows = [{"file": "in/a.png", "text": "there"}, {"file": "in/b.png", "text": "not there"}]
    report = make(write_table(tmp_path / "t.jsonl", rows), tmp_path / "out", root=str(archive))
    assert report.dropped == {"no image": 1} and captions(tmp_path / "out") == {"in/a": {"short": "there"}}
    assert samples(tmp_path / "out")["in/a"].image == (pictures / "a.png").read_bytes()
    if kind != "tar":
        with pytest.raises(UserError, match="is an archive"):
            make(archive, tmp_path / "alone")


def test_a_damaged_archive_or_table_is_one_sentence(tmp_path: Path) -> None:
    rows = write_table(tmp_path / "t.jsonl", [{"file": "a.png", "text": "x"}])
    for name in ("bad.tgz", "bad.zip", "bad.tar"):
        (tmp_path / name).write_bytes(b"\x1f\x8b\x08\x00 no archive at all" * 40)
        with pytest.raises(UserError, match="damaged archive"):
            make(rows, tmp_path / f"out-{name}", root=str(tmp_path / name))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match="no Parquet file"):
        make(tmp_path / "bad.parquet", tmp_path / "out")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="no JSON"):
        make(tmp_path / "bad.json", tmp_path / "out")


def test_columns_that_are_not_there_are_named(pictures: Path, tmp_path: Path) -> None:
    table = write_table(pictures / "t.csv", [{"path": "a.png", "words": "something"}])
    with pytest.raises(UserError, match="path, words: say which with captions"):
        make(table, tmp_path / "out")
    with pytest.raises(UserError, match=r"captions= names the column 'wrods'"):
        make(table, tmp_path / "out", captions="{wrods: short}")
    with pytest.raises(UserError, match="image= names"):
        make(table, tmp_path / "out", captions="{words: short}", image="picture")
    assert not (tmp_path / "out").exists()
    assert make(table, tmp_path / "out", uncaptioned="keep").kept == 1 and captions(tmp_path / "out") == {"a": {}}


def test_parquet_with_the_images_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "repository" / "data"
    folder.mkdir(parents=True)
    for split, numbers in (("train", range(5)), ("validation", range(5, 7)), ("test", range(7, 8))):
        rows = [
            {"image": {"bytes": image(number), "path": f"{number}.png"}, "caption": f"number {number}"}
            for number in numbers
        ]
        rows += [{"image": {"bytes": None, "path": "gone.png"}, "caption": "nothing there"}] if split == "train" else []
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet", row_group_size=2)
    report = make(tmp_path / "repository", tmp_path / "out", processes=2)
    assert (report.train, report.val, report.dropped) == (5, 2, {"no image": 1, "test split": 1})
    found = sorted(samples(tmp_path / "out").values(), key=lambda sample: sample.meta["captions"]["short"])
    assert [sample.image for sample in found] == [image(number) for number in range(5)]
    assert [value["short"] for value in captions(tmp_path / "out" / "val").values()] == ["number 5", "number 6"]


def test_img2dataset_output(tmp_path: Path) -> None:
    folder = tmp_path / "laion"
    folder.mkdir()
    members = []
    for number in range(3):
        key = f"0000000{number}"
        meta = as_json(
            url="http://x/y.jpg", caption=f"alt text {number}", key=key, status="success", width=72, height=64
        )
        members += [(f"{key}.jpg", image(number)), (f"{key}.txt", f"alt text {number}".encode()), (f"{key}.json", meta)]
    write_tar(folder / "00000.tar", members)
    (folder / "00000_stats.json").write_text("{}")
    rows = [{"key": f"0000000{number}", "status": "success" if number < 3 else "failed_to_download",
             "error_message": None if number < 3 else "HTTP Error 404"} for number in range(5)]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), folder / "00000.parquet")
    report = make(folder, tmp_path / "out", keep="[url]")
    assert report.format == "img2dataset" and report.items == 5 and report.dropped == {"not downloaded": 2}
    assert report.examples["not downloaded"][0] == "00000.tar/00000003: img2dataset: HTTP Error 404"
    assert captions(tmp_path / "out") == {f"0000000{number}": {"short": f"alt text {number}"} for number in range(3)}
    assert samples(tmp_path / "out")["00000001"].meta["extra"] == {"url": "http://x/y.jpg"}


def test_any_webdataset(tmp_path: Path) -> None:
    for shard in range(2):
        members = [("./deep/s1.source.png", image(10 * shard)), ("./deep/s1.edited.png", image(10 * shard + 1)),
                   ("./deep/s1.long.txt", b"a longer text"), ("./deep/s1.pyd", b"\x80\x04never read."),
                   ("./deep/s1.json", as_json(blip={"text": f"of shard {shard}"})), ("./deep/readme.txt", b"ignored")]  # fmt: skip
        write_tar(tmp_path / "in" / f"{shard:04d}.tar", members)
    spec = f"{tmp_path}/in/{{0000..0001}}.tar"
    report = make(spec, tmp_path / "out", captions="{blip.text: short, long.txt: long}", image="edited.png")
    assert report.format == "webdataset"
    assert captions(tmp_path / "out") == {
        f"{shard:04d}/deep/s1": {"short": f"of shard {shard}", "long": "a longer text"} for shard in range(2)
    }
    assert samples(tmp_path / "out")["0001/deep/s1"].image == image(11)
    # Our own shards go in as they came out.
    assert make(tmp_path / "out", tmp_path / "again").format == "webdataset"
    found = samples(tmp_path / "again")["000000/0001/deep/s1"].meta
    assert found["captions"]["long"] == "a longer text" and found["caption_sources"]["short"] == "tar blip.text"


def test_image_folder_of_datasets(tmp_path: Path) -> None:
    for split, number in (("train", 0), ("validation", 1)):
        folder = tmp_path / "in" / split
        folder.mkdir(parents=True)
        (folder / "0001.png").write_bytes(image(number))
        write_table(folder / "metadata.csv", [{"file_name": "0001.png", "text": f"of {split}"}])
    report = make(tmp_path / "in", tmp_path / "out")
    assert report.format == "imagefolder" and (report.train, report.val) == (1, 1)
    assert captions(tmp_path / "out") == {"train/0001": {"short": "of train"}}
    assert captions(tmp_path / "out" / "val") == {"validation/0001": {"short": "of validation"}}
    with pytest.raises(UserError, match="metadata"):
        make(tmp_path / "out", tmp_path / "no", format="imagefolder")


class _Site(BaseHTTPRequestHandler):
    asked: dict[str, int]

    def do_GET(self) -> None:
        path = self.path
        count = self.asked[path] = self.asked.get(path, 0) + 1
        if path in ("/away", "/round", "/moved"):
            self.send_response(302)
            self.send_header(
                "Location", {"/away": "ftp://127.0.0.1/x.png", "/round": "/round", "/moved": "/5.png"}[path]
            )
            self.end_headers()
            return
        if path == "/gone.png" or (path == "/flaky.png" and count == 1):
            self.send_error(404 if path == "/gone.png" else 503)
            return
        data = b"x" * (3 << 20) if path == "/huge" else image({"/flaky.png": 60}.get(path, len(path)))
        self.send_response(200)
        if path == "/no-thanks":
            self.send_header("X-Robots-Tag", "noai, noimageai")
        self.send_header("Content-Length", str(len(data) + (100 if path == "/short" else 0)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, dict[str, int]]]:
    monkeypatch.setenv("no_proxy", "*")
    handler = type("Site", (_Site,), {"asked": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler.asked  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()


def test_addresses_are_fetched(site: tuple[str, dict[str, int]], tmp_path: Path) -> None:
    base, asked = site
    names = ["good.png", "flaky.png", "moved", "gone.png", "away", "round", "huge", "no-thanks", "short"]
    rows = [{"url": f"{base}/{name}", "caption": f"called {name}"} for name in names]
    rows += [{"url": "ftp://127.0.0.1/x.png", "caption": "called ftp"}, {"url": f"{base}/uncaptioned.png", "caption": ""},
             {"url": "http://[bad/x.png", "caption": "called bad"}]  # fmt: skip
    table = write_table(tmp_path / "t.csv", rows)
    report = make(table, tmp_path / "out", timeout=5, retries=1, max_megabytes=2, threads=4)
    assert report.dropped == {"not downloaded": 7, "file too large": 1, "no caption": 1}
    assert sorted(value["short"] for value in captions(tmp_path / "out").values()) == [
        "called flaky.png",
        "called good.png",
        "called moved",
    ]
    assert asked["/flaky.png"] == 2 and asked["/gone.png"] == 1 and asked["/round"] < 25
    assert "/uncaptioned.png" not in asked
    sources = {sample.meta["source"] for sample in samples(tmp_path / "out").values()}
    assert f"{base}/good.png" in sources


@pytest.mark.parametrize(
    ("name", "detail"),
    [
        ("away", "redirected away from http"),
        ("round", "status 302"),
        ("gone.png", "status 404"),
        ("no-thanks", "the site asks not to be used for training"),
        ("short", "IncompleteRead|OSError"),
    ],
)
def test_why_something_is_not_fetched(site: tuple[str, dict[str, int]], name: str, detail: str) -> None:
    with pytest.raises(Dropped) as caught:
        fetch(f"{site[0]}/{name}", FetchLimits(1 << 20, timeout=5, retries=0))
    assert caught.value.reason == "not downloaded" and re.fullmatch(detail, caught.value.detail)


def test_a_truncated_tar_is_used_up_to_the_cut(tmp_path: Path) -> None:
    members = [
        (f"{number}.{kind}", data)
        for number in range(3)
        for kind, data in (("txt", b"words here"), ("png", image(number)))
    ]
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) - 20_000])
    report = make(tmp_path / "cut.tar", tmp_path / "out")
    assert 1 <= report.kept < 3
    (tmp_path / "zipped.tar").write_bytes(b"\x1f\x8b" + bytes(5000))
    with pytest.raises(UserError, match="cannot be read"):
        make(tmp_path / "zipped.tar", tmp_path / "other")


def test_a_damaged_member_of_a_zip_is_a_row_of_the_report(pictures: Path, tmp_path: Path) -> None:
    for kind in (zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
        archive = tmp_path / f"{kind}.zip"
        with zipfile.ZipFile(archive, "w", kind) as members:
            members.writestr("good.png", image(1))
            members.writestr("bad.png", b"text " * 1000)
            at = members.getinfo("bad.png").header_offset + 30 + len("bad.png")
        data = bytearray(archive.read_bytes())
        data[at + 8 : at + 20] = b"\xff" * 12
        archive.write_bytes(data)
        table = write_table(
            tmp_path / f"{kind}.csv", [{"path": f"{n}.png", "caption": "two words"} for n in ("good", "bad")]
        )
        report = make(table, tmp_path / str(kind), root=str(archive))
        assert (report.kept, report.dropped) == (1, {"cannot be read": 1})


@pytest.mark.parametrize("size", [-512, -1024, 1 << 80])
def test_a_tar_that_leads_back_or_out_of_itself_ends(size: int, tmp_path: Path) -> None:
    good, bad = tarfile.TarInfo("a.png"), tarfile.TarInfo("b.png")
    good.size = len(image(1))
    header = bytearray(bad.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (b"\xff" if size < 0 else b"\x80") + (size % (1 << 88)).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    body = good.tobuf(tarfile.GNU_FORMAT) + image(1) + bytes(-len(image(1)) % 512) + bytes(header) + bytes(1024)
    (tmp_path / "in.tar").write_bytes(body)
    report = make(tmp_path / "in.tar", tmp_path / "out", uncaptioned="keep")
    assert report.kept == 1
    table = write_table(tmp_path / "list.csv", [{"path": "a.png", "caption": "two words"}])
    with pytest.raises(UserError, match="damaged archive"):
        make(table, tmp_path / "by table", root=str(tmp_path / "in.tar"))


def test_times_of_any_kind_in_a_parquet_table_do_no_harm(pictures: Path, tmp_path: Path) -> None:
    columns = {
        "ns": pa.array([1_700_000_000_123_456_789], pa.timestamp("ns", tz="America/New_York")),
        "zone": pa.array([1], pa.timestamp("us", tz="Mars/Base")),
        "long": pa.array([2**62], pa.duration("ns")),
        "date": pa.array([2**60], pa.date64()),
        "time": pa.array([5], pa.time64("ns")),
    }
    (tmp_path / "a.png").write_bytes(image(1))
    pq.write_table(pa.table({"path": ["a.png"], "caption": ["two words"], **columns}), tmp_path / "t.parquet")
    assert make(tmp_path / "t.parquet", tmp_path / "out", keep="[ns]").kept == 1
    (one,) = samples(tmp_path / "out").values()
    assert one.meta["extra"] == {"ns": "2023-11-14 22:13:20.123456789"}
    text = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff.png"]).buffers())
    pq.write_table(pa.table({"path": text, "caption": ["two words"]}), tmp_path / "u.parquet")
    with pytest.raises(UserError, match="none of its column's type"):
        make(tmp_path / "u.parquet", tmp_path / "other")


def test_a_server_that_drips_its_headers_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")

    def drip(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection, suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            for _ in range(150):
                connection.sendall(b"x")
                time.sleep(0.1)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=drip, args=(listening,), daemon=True).start()
        start = time.perf_counter()
        with pytest.raises(Dropped):
            fetch(f"http://127.0.0.1:{listening.getsockname()[1]}/x", FetchLimits(1 << 20, timeout=0.25, retries=0))
        assert time.perf_counter() - start < 8


def test_pictures_that_cannot_be_read_are_counted_too(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(image(1))
    (tmp_path / "in" / "b.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    for name in "ab":
        (tmp_path / "in" / f"{name}.txt").write_text("two words")
    report = make(tmp_path / "in", tmp_path / "out")
    assert (report.items, report.kept, report.dropped) == (2, 1, {"not an image": 1})
    assert "HEIC: convert it first, with heif-convert" in report.examples["not an image"][0]
