"""Folders of pictures as telephones, other systems and other programs leave them."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_fixtures import encoded, picture, write_tar

from paradiffusion.curation.building.build import build
from paradiffusion.curation.building.build_options import BuildOptions
from paradiffusion.curation.building.build_report import Report
from paradiffusion.data.index import load_index, read_sample
from paradiffusion.data.shards import expand_shards
from paradiffusion.errors import UserError


def make(source: Path, output: Path, **options: Any) -> Report:
    return build(BuildOptions(input=str(source), output=str(output), **{"processes": 1, **options}))


def captions(folder: Path) -> dict[str, dict[str, str]]:
    index = load_index(expand_shards(folder))
    return {index.key(row): read_sample(index, row).meta["captions"] for row in range(len(index))}


def image(number: int) -> bytes:
    return encoded(picture(number, 72, 64))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """a.png to c.png with a text each."""
    found = tmp_path / "in"
    found.mkdir()
    for number, name in enumerate("abc"):
        (found / f"{name}.png").write_bytes(image(number))
        (found / f"{name}.txt").write_text(f"words of {name}")
    return found


def test_names_of_other_systems(folder: Path, tmp_path: Path) -> None:
    (folder / "D.PNG").write_bytes(image(3))
    (folder / "D.TXT").write_text("words of D")
    (folder / "e.v2.png").write_bytes(image(4))
    (folder / "e.v2.png.Json").write_text(json.dumps({"caption": "words of e"}))
    for name in ("._a.png", "._a.txt", ".DS_Store", "Thumbs.db", ".hidden.png"):
        (folder / name).write_bytes(b"\0\5\x16\7 not a picture")
    (folder / ".trash").mkdir()
    (folder / ".trash" / "f.png").write_bytes(image(5))
    report = make(folder, tmp_path / "out")
    assert report.items == report.kept == 5
    found = captions(tmp_path / "out")
    assert found["D"] == {"short": "words of D"} and {"short": "words of e"} in found.values()


def test_formats_that_are_not_read_say_how_to_convert_them(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    heads = {"a.heic": b"\0\0\0\x24ftypheic", "b.HIF": b"\0\0\0\x24ftyphevc", "c.jxl": b"\xff\x0a",
             "d.jpg": b"\0\0\0\x0cJXL \r\n\x87\n", "e.jpg": encoded(picture(0, 72, 64), "JPEG2000")[:99],
             "f.jpg": b"\n <!DOCTYPE html>"}  # fmt: skip
    for name, head in heads.items():
        (folder / name).write_bytes(head + bytes(99))
        (folder / name).with_suffix(".txt").write_text("some words")
    report = make(folder, tmp_path / "out")
    assert report.kept == 0 and report.dropped == {"not an image": 6}
    report = make(folder, tmp_path / "again")  # five examples of six are shown
    shown = "\n".join(report.examples["not an image"])
    for words in ("heif-convert of libheif", "b.HIF: HEIC", "c.jxl: JPEG XL: convert it first, with djxl", "d.jpg: JPEG XL",
                  "e.jpg: JPEG 2000"):  # fmt: skip
        assert words in shown


def test_pages_of_a_tiff_are_told(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pages = [picture(number, 72, 64) for number in range(3)]
    (tmp_path / "in" / "a.tif").write_bytes(encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:]))
    (tmp_path / "in" / "a.txt").write_text("some words")
    assert make(tmp_path / "in", tmp_path / "out").mended == {"encoded as png": 1, "first page of several": 1}


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
    with pytest.raises(
        UserError, match="pictures with captions beside them and tars too; .* format=folder or format=webdata"
    ):
        make(folder, tmp_path / "out")
    assert make(folder, tmp_path / "folder", format="folder").kept == 3
    assert make(folder, tmp_path / "tars", format="webdataset").kept == 1
    (folder / "backup.tar").unlink()
    (folder / "features").mkdir()
    pq.write_table(pa.table({"path": ["a.png"], "caption": ["x y"]}), folder / "features" / "all.parquet")
    with pytest.raises(UserError, match="format=folder or format=table"):
        make(folder, tmp_path / "out")
    # A logo without a caption makes no folder of pictures.
    for path in folder.glob("*.txt"):
        path.unlink()
    (folder / "features" / "a.png").write_bytes(image(0))
    assert make(folder, tmp_path / "table").format == "table"


def test_an_output_within_the_input_is_no_part_of_it(folder: Path, tmp_path: Path) -> None:
    assert make(folder, folder / "shards").kept == 3
    assert make(folder, tmp_path / "again").kept == 3
    tables = tmp_path / "tables"
    tables.mkdir()
    for name in "ab":
        (tables / f"{name}.jsonl").write_text(
            json.dumps({"path": str(folder / f"{name}.png"), "caption": "x y"}) + "\n"
        )
    # As a build that was stopped leaves it.
    (tables / "shards" / ".build" / "items").mkdir(parents=True)
    (tables / "shards" / ".build" / "items" / "00000-00000.jsonl").write_text('{"name": "a", "key": "a"}\n')
    report = make(tables, tables / "shards", format="table")
    assert (report.items, report.kept) == (2, 2)


def test_what_an_earlier_version_began_is_not_mixed_and_what_it_finished_is_told(folder: Path, tmp_path: Path) -> None:
    report = make(folder, tmp_path / "out")
    journal = tmp_path / "out" / "build.json"
    content = json.loads(journal.read_text())
    journal.write_text(json.dumps({**content, "version": content["version"] - 1}))
    assert make(folder, tmp_path / "out") == report
    journal.write_text(json.dumps({**content, "version": content["version"] - 1, "done": False}))
    with pytest.raises(UserError, match="of another version"):
        make(folder, tmp_path / "out")


def test_a_full_disk_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("paradiffusion.curation.building.chunk.prepare", full)
        with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'out'}'"):
            make(folder, tmp_path / "out")
    assert make(folder, tmp_path / "out").kept == 3
