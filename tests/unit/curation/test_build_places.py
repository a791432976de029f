"""Where the pictures of a table lie: addresses of the web and the sites' answers, archives, and what is damaged in them."""

from __future__ import annotations

import gzip
import io
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

import pytest
from builds import captions, image, make, pictures_site, samples, write_table

from paradiffusion.curation.building.build import Report
from paradiffusion.curation.building.places import Dropped, FetchLimits, fetch
from paradiffusion.errors import UserError

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
        with pytest.raises(UserError, match="is an archive"):
            make(archive, tmp_path / "alone")


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
    with pytest.raises(UserError, match=r"more than 0\.01 GB unzipped; give max_unzipped_gigabytes="):
        by_table(archive, ["a.png"], max_unzipped_gigabytes=0.01)
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
        with pytest.raises(UserError, match="damaged archive"):
            by_table(tmp_path / name, ["a.png"])
    with pytest.raises(UserError, match="cannot be read"):
        make(tmp_path / "bad.tar", tmp_path / "out")


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
    with pytest.raises(UserError, match="damaged archive"):
        by_table(tmp_path / "in.tar", ["a.png"])


def test_a_truncated_tar_is_used_up_to_the_cut(tmp_path: Path) -> None:
    members = [(f"{n}.{kind}", data) for n in range(3) for kind, data in (("txt", b"words here"), ("png", image(n)))]
    (tmp_path / "cut.tar").write_bytes(tar_of(*members)[:-20_000])
    assert 1 <= make(tmp_path / "cut.tar", tmp_path / "out").kept < 3
