"""What shards are built from besides tables: folders, other people's sets, archives and addresses, and what is damaged in them."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import re
import socket
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builds import captions, image, make, pictures_site, samples, write_captioned, write_table
from commands import user_error
from data_fixtures import as_json, encoded, picture, write_tar

from paradiffusion.curation.building.build import Report
from paradiffusion.curation.building.places import Dropped, FetchLimits, fetch

# --- other people's sets


def test_parquet_with_the_images_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "repository" / "data"
    folder.mkdir(parents=True)
    for split, numbers in (("train", range(5)), ("validation", range(5, 7)), ("test", range(7, 8))):
        rows = [{"image": {"bytes": image(n), "path": f"{n}.png"}, "caption": f"number {n}"} for n in numbers]
        rows += [{"image": {"bytes": None, "path": "gone.png"}, "caption": "nothing there"}] if split == "train" else []
        write_table(folder / f"{split}-00000-of-00001.parquet", rows)
    report = make(tmp_path / "repository", tmp_path / "out", processes=2)
    assert (report.train, report.val, report.dropped) == (5, 2, {"no image": 1, "test split": 1})
    found = sorted(samples(tmp_path / "out").values(), key=lambda sample: sample.meta["captions"]["short"])
    assert [sample.image for sample in found] == [image(number) for number in range(5)]
    assert [value["short"] for value in captions(tmp_path / "out" / "val").values()] == ["number 5", "number 6"]


def test_parquet_that_names_its_pictures(tmp_path: Path) -> None:
    """As `datasets` writes pictures that it was given by path, some of them with their bytes; and img2dataset's own Parquet."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.png").write_bytes(image(1))
    rows = [{"image": {"bytes": None, "path": "a.png"}, "text": "an a"}, {"image": {"bytes": image(2), "path": "b.png"}, "text": "a b"},
            {"image": {"bytes": None, "path": "gone.png"}, "text": "nothing"}]  # fmt: skip
    write_table(folder / "train-00000-of-00001.parquet", rows)
    report = make(folder, tmp_path / "out")
    assert (report.kept, report.dropped) == (2, {"no image": 1})
    found = {sample.meta["captions"]["short"]: sample.image for sample in samples(tmp_path / "out").values()}
    assert found == {"an a": image(1), "a b": image(2)}
    other = tmp_path / "img2dataset"
    other.mkdir()
    write_table(other / "00000.parquet", [{"key": "000000000", "caption": "a b", "jpg": image(2), "url": "http://x/b.png"}])
    (other / "00000_stats.json").write_text("{}")
    assert make(other, tmp_path / "again").kept == 1


def test_img2dataset_output(tmp_path: Path) -> None:
    folder, keys = tmp_path / "laion", [f"0000000{number}" for number in range(5)]
    members = []
    for number, key in enumerate(keys[:3]):
        meta = as_json(url="http://x/y.jpg", caption=f"alt text {number}", key=key, status="success")
        members += [(f"{key}.jpg", image(number)), (f"{key}.txt", f"alt text {number}".encode()), (f"{key}.json", meta)]
    write_tar(folder / "00000.tar", members)
    (folder / "00000_stats.json").write_text("{}")
    rows = [{"key": key, "status": "success" if number < 3 else "failed_to_download",
             "error_message": None if number < 3 else "HTTP Error 404"} for number, key in enumerate(keys)]  # fmt: skip
    write_table(folder / "00000.parquet", rows)
    report = make(folder, tmp_path / "out", keep="[url]")
    assert report.format == "img2dataset" and report.items == 5 and report.dropped == {"not downloaded": 2}
    assert report.examples["not downloaded"][0] == "00000.tar/00000003: img2dataset: HTTP Error 404"
    assert captions(tmp_path / "out") == {key: {"short": f"alt text {number}"} for number, key in enumerate(keys[:3])}
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


def test_names_with_dots_in_a_tar(tmp_path: Path) -> None:
    """As training reads them: the last dot counts where a picture and a text agree in it, else the first."""
    members = [(f"img.v1.{n:02d}.{end}", image(n) if end == "jpg" else f"number {n}".encode()) for n in (7, 8) for end in ("jpg", "txt")]
    members += [("cat.jpg", image(1)), ("cat.seg.png", image(2)), ("cat.txt", b"a cat")]
    write_tar(tmp_path / "in" / "0.tar", members)
    assert make(tmp_path / "in", tmp_path / "out").kept == 3
    found = {value["short"] for value in captions(tmp_path / "out").values()}
    assert found == {"number 7", "number 8", "a cat"}


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
    user_error("metadata", make, tmp_path / "out", tmp_path / "no", format="imagefolder")


# --- folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_captioned(tmp_path / "in", "a", "b", "c")


def test_names_of_other_systems(folder: Path, tmp_path: Path) -> None:
    (folder / "D.PNG").write_bytes(image(3))
    (folder / "D.TXT").write_text("words of D")
    (folder / "e.v2.png").write_bytes(image(4))
    (folder / "e.v2.png.Json").write_text(json.dumps({"caption": "words of e"}))
    for name in ("._a.png", "._a.txt", ".DS_Store", "Thumbs.db", ".hidden.png"):
        (folder / name).write_bytes(b"\0\5\x16\7 not a picture")
    write_captioned(folder / ".trash", "f")
    report = make(folder, tmp_path / "out")
    assert report.items == report.kept == 5
    found = captions(tmp_path / "out")
    assert found["D"] == {"short": "words of D"} and {"short": "words of e"} in found.values()


def test_formats_that_are_not_read_say_how_to_convert_them(tmp_path: Path) -> None:
    heads = {"a.heic": b"\0\0\0\x24ftypheic", "b.HIF": b"\0\0\0\x24ftyphevc", "c.jxl": b"\xff\x0a",
             "d.jpg": b"\0\0\0\x0cJXL \r\n\x87\n", "e.jpg": encoded(picture(0, 72, 64), "JPEG2000")[:99]}  # fmt: skip
    folder = write_captioned(tmp_path / "in", "good")
    for name, head in heads.items():
        (folder / name).write_bytes(head + bytes(99))
        (folder / name).with_suffix(".txt").write_text("some words")
    report = make(folder, tmp_path / "out")
    assert report.kept == 1 and report.dropped == {"not an image": 5}
    shown = "\n".join(report.examples["not an image"])
    for words in ("heif-convert of libheif", "b.HIF: HEIC", "c.jxl: JPEG XL: convert it first, with djxl", "d.jpg: JPEG XL",
                  "e.jpg: JPEG 2000"):  # fmt: skip
        assert words in shown


def test_pages_of_a_tiff_are_told(folder: Path, tmp_path: Path) -> None:
    pages = [picture(number, 72, 64) for number in range(9, 12)]
    (folder / "a.png").unlink()
    (folder / "a.tif").write_bytes(encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:]))
    assert make(folder, tmp_path / "out").mended == {"encoded as png": 1, "first page of several": 1}


def test_a_folder_that_cannot_be_opened_is_told(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "locked").mkdir()
    before = os.scandir

    def refused(path: Any) -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return before(path)

    monkeypatch.setattr(os, "scandir", refused)
    report = make(folder, tmp_path / "out")
    assert report.kept == 3 and report.dropped == {"folder cannot be opened": 1}
    assert report.examples["folder cannot be opened"] == ["locked: not walked"]


def test_what_lies_beside_captioned_pictures_is_not_taken_for_the_input(folder: Path, tmp_path: Path) -> None:
    write_tar(folder / "backup.tar", [("x.png", image(9)), ("x.txt", b"of the backup")])
    user_error("captions beside them and tars too; .* format=folder or format=webdata", make, folder, tmp_path / "out")
    assert make(folder, tmp_path / "folder", format="folder").kept == 3
    assert make(folder, tmp_path / "tars", format="webdataset").kept == 1
    (folder / "backup.tar").unlink()
    (folder / "features").mkdir()
    pq.write_table(pa.table({"path": ["a.png"], "caption": ["x y"]}), folder / "features" / "all.parquet")
    user_error("format=folder or format=table", make, folder, tmp_path / "out")
    # A logo without a caption makes no folder of pictures.
    for path in folder.glob("*.txt"):
        path.unlink()
    (folder / "features" / "a.png").write_bytes(image(0))
    assert make(folder, tmp_path / "table").format == "table"


def test_an_output_within_the_input_is_no_part_of_it(folder: Path, tmp_path: Path) -> None:
    assert make(folder, folder / "shards").kept == make(folder, tmp_path / "again").kept == 3
    tables = tmp_path / "tables"
    # As a build that was stopped leaves it.
    (tables / "shards" / ".build" / "items").mkdir(parents=True)
    (tables / "shards" / ".build" / "items" / "00000-00000.jsonl").write_text('{"name": "a", "key": "a"}\n')
    for name in "ab":
        write_table(tables / f"{name}.jsonl", [{"path": str(folder / f"{name}.png"), "caption": "x y"}])
    report = make(tables, tables / "shards", format="table")
    assert (report.items, report.kept) == (2, 2)


def test_what_an_earlier_version_began_is_not_mixed_and_what_it_finished_is_told(folder: Path, tmp_path: Path) -> None:
    report = make(folder, tmp_path / "out")
    journal = tmp_path / "out" / "build.json"
    content = json.loads(journal.read_text())
    journal.write_text(json.dumps({**content, "version": content["version"] - 1}))
    assert make(folder, tmp_path / "out") == report
    journal.write_text(json.dumps({**content, "version": content["version"] - 1, "done": False}))
    user_error("of another version", make, folder, tmp_path / "out")


def test_a_full_disk_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("paradiffusion.curation.building.chunk.prepare", full)
        with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'out'}'"):
            make(folder, tmp_path / "out")
    assert make(folder, tmp_path / "out").kept == 3


# --- addresses


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[str]]]:
    monkeypatch.setenv("no_proxy", "*")
    with pictures_site() as found:
        yield found


def test_addresses_are_fetched(site: tuple[str, list[str]], tmp_path: Path) -> None:
    base, asked = site
    names = ["good.png", "flaky.png", "moved", "agent", "gone.png", "away", "round", "huge", "no-thanks", "short",
             "page.jpg", "nothing.jpg"]  # fmt: skip
    rows = [{"url": f"{base}/{name}", "caption": f"called {name}"} for name in names]
    rows += [{"url": "ftp://127.0.0.1/x.png", "caption": "called ftp"}, {"url": f"{base}/uncaptioned.png", "caption": ""},
             {"url": "http://[bad/x.png", "caption": "called bad"}]  # fmt: skip
    table = write_table(tmp_path / "t.csv", rows)
    report = make(table, tmp_path / "out", timeout=5, retries=1, max_megabytes=2, threads=4)
    assert report.dropped == {
        "not downloaded": 7, "file too large": 1, "no caption": 1, "empty file": 1, "not an image": 1,
    }  # fmt: skip
    assert {value["short"] for value in captions(tmp_path / "out").values()} == {f"called {name}" for name in names[:4]}
    assert asked.count("/flaky.png") == 2 and asked.count("/gone.png") == 1 and asked.count("/round") < 25
    assert "/uncaptioned.png" not in asked
    assert f"{base}/good.png" in {sample.meta["source"] for sample in samples(tmp_path / "out").values()}
    assert report.examples["not an image"] == [f"t.csv line 12 ({base}/page.jpg): a web page"]


@pytest.mark.parametrize(
    ("name", "detail"),
    [
        ("away", "redirected away from http"), ("round", "status 302"), ("gone.png", "status 404"),
        ("no-thanks", "the site asks not to be used for training"), ("short", "IncompleteRead|OSError"), ("busy", "status 429"),
    ],
)  # fmt: skip
def test_why_something_is_not_fetched(site: tuple[str, list[str]], name: str, detail: str) -> None:
    with pytest.raises(Dropped) as caught:
        fetch(f"{site[0]}/{name}", FetchLimits(1 << 20, timeout=5, retries=0))
    assert caught.value.reason == "not downloaded" and re.fullmatch(detail, caught.value.detail)


@pytest.mark.parametrize(
    ("address", "sent"),
    [
        ("/猫.jpg?größe=5&x=a b", "/%E7%8C%AB.jpg?gr%C3%B6%C3%9Fe=5&x=a%20b"),
        ("/already%20sent and not.jpg?a=%C3%9F", "/already%20sent%20and%20not.jpg?a=%C3%9F"),
    ],
)
def test_letters_of_all_alphabets(address: str, sent: str, site: tuple[str, list[str]]) -> None:
    assert fetch(site[0] + address, FetchLimits(1 << 20, timeout=5, retries=1)) and site[1] == [sent]


@pytest.mark.parametrize(("path", "pause"), [("/busy", 7.0), ("/date", 1.0)])
def test_a_busy_site_is_given_the_time_that_it_asks_for(
    path: str, pause: float, site: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("tenacity.nap.time.sleep", pauses.append)
    assert fetch(site[0] + path, FetchLimits(1 << 20, timeout=5, retries=1)) and pauses == [pause]


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


# --- archives


def by_table(archive: Path, names: list[str], **options: Any) -> Report:
    """A table of ``names`` in the archive, built into ``out`` beside it."""
    folder = archive.parent
    rows = [{"file": name, "text": f"words of {number}"} for number, name in enumerate(names)]
    return make(write_table(folder / "t.jsonl", rows), folder / "out", root=str(archive), **options)


@pytest.mark.parametrize("kind", ["tgz", "tar", "zip", "windows.zip"])
def test_archives_as_root(kind: str, tmp_path: Path) -> None:
    archive = tmp_path / f"images.{kind}"
    if kind.endswith("zip"):
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
            packed.writestr("in/a.png", image(1))
        if kind == "windows.zip":
            archive.write_bytes(archive.read_bytes().replace(b"in/a.png", b"in\\a.png"))
    else:
        (tmp_path / "a.png").write_bytes(image(1))
        with tarfile.open(archive, "w:gz" if kind == "tgz" else "w") as tar:
            tar.add(tmp_path / "a.png", "./in/a.png")
    report = by_table(archive, ["in/a.png", "in/b.png"])
    assert report.dropped == {"no image": 1} and captions(tmp_path / "out") == {"in/a": {"short": "words of 0"}}
    assert samples(tmp_path / "out")["in/a"].image == image(1)
    if kind != "tar":
        user_error("is an archive", make, archive, tmp_path / "alone")


def tar_of(*members: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def test_a_tgz_is_counted_while_it_is_unzipped(tmp_path: Path) -> None:
    archive = tmp_path / "big.tgz"
    archive.write_bytes(gzip.compress(tar_of(("a.png", image(1)), ("zeros", bytes(30_000_000))), 1))
    user_error(r"more than 0\.01 GB unzipped; give max_unzipped_gigabytes=", by_table, archive, ["a.png"], max_unzipped_gigabytes=0.01)
    assert not (tmp_path / "out").exists()
    assert by_table(archive, ["a.png"], max_unzipped_gigabytes=0.05).kept == 1


def test_links_and_devices_of_a_tar_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(image(7))
    archive = tmp_path / "a.tar"
    archive.write_bytes(tar_of(("real.png", image(1))))
    with tarfile.open(archive, "a") as tar:
        for name, kind, target in (("soft.png", tarfile.SYMTYPE, str(tmp_path / "secret.png")), ("pipe.png", tarfile.FIFOTYPE, ""),
                                   ("out.png", tarfile.LNKTYPE, "../secret.png"), ("zero.png", tarfile.CHRTYPE, ""),
                                   ("hard.png", tarfile.LNKTYPE, "./real.png")):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    names = ["real.png", "soft.png", "out.png", "pipe.png", "zero.png", "../secret.png", f"{tmp_path}/secret.png", "hard.png"]  # fmt: skip
    report = by_table(archive, names, duplicates="keep")
    # A hard link is how tar writes the same file under a second name.
    assert (report.kept, report.dropped) == (2, {"no image": 6})
    link, none = "a link in the archive, not followed", "no such member in the archive"
    shown = [(2, link), (3, link), (4, none), (5, none), (6, none)]
    assert report.examples["no image"] == [f"t.jsonl line {at} ({names[at - 1]}): {why}" for at, why in shown]


def test_a_damaged_archive_is_one_sentence(tmp_path: Path) -> None:
    for name in ("bad.tgz", "bad.zip", "bad.tar"):
        (tmp_path / name).write_bytes(b"\x1f\x8b\x08\x00 no archive at all" * 40)
        user_error("damaged archive", by_table, tmp_path / name, ["a.png"])
    user_error("cannot be read", make, tmp_path / "bad.tar", tmp_path / "out")


@pytest.mark.parametrize("kind", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_a_damaged_member_of_a_zip_is_a_row_of_the_report(kind: int, tmp_path: Path) -> None:
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w", kind) as members:
        members.writestr("good.png", image(1))
        members.writestr("bad.png", b"text " * 1000)
        at = members.getinfo("bad.png").header_offset + 30 + len("bad.png")
    data = bytearray(archive.read_bytes())
    data[at + 8 : at + 20] = b"\xff" * 12
    archive.write_bytes(data)
    report = by_table(archive, ["good.png", "bad.png"])
    assert (report.kept, report.dropped) == (1, {"cannot be read": 1})


@pytest.mark.parametrize("size", [-512, 1 << 80])
def test_a_tar_that_leads_back_or_out_of_itself_ends(size: int, tmp_path: Path) -> None:
    header = bytearray(tarfile.TarInfo("b.png").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (b"\xff" if size < 0 else b"\x80") + (size % (1 << 88)).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    whole = tar_of(("a.png", image(1)))
    (tmp_path / "in.tar").write_bytes(whole[: 512 + -(-len(image(1)) // 512) * 512] + bytes(header) + bytes(1024))
    assert make(tmp_path / "in.tar", tmp_path / "direct", uncaptioned="keep").kept == 1
    user_error("damaged archive", by_table, tmp_path / "in.tar", ["a.png"])


def test_a_truncated_tar_is_used_up_to_the_cut(tmp_path: Path) -> None:
    members = [(f"{n}.{kind}", data) for n in range(3) for kind, data in (("txt", b"words here"), ("png", image(n)))]
    (tmp_path / "cut.tar").write_bytes(tar_of(*members)[:-20_000])
    assert 1 <= make(tmp_path / "cut.tar", tmp_path / "out").kept < 3
