"""Archives as the root of a table's paths: what is in them, how large they may get, and where their links lead."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from data_fixtures import encoded, picture

from paradiffusion.curation.building.build import build
from paradiffusion.curation.building.build_options import BuildOptions
from paradiffusion.curation.building.build_report import Report
from paradiffusion.errors import UserError


def make(folder: Path, archive: Path, names: list[str], output: str = "out", **options: Any) -> Report:
    table = folder / "t.jsonl"
    table.write_text(
        "".join(json.dumps({"file": name, "text": f"words of {number}"}) + "\n" for number, name in enumerate(names))
    )
    given = {"input": str(table), "output": str(folder / output), "root": str(archive), "processes": 1, **options}
    return build(BuildOptions(**given))


def image(number: int) -> bytes:
    return encoded(picture(number, 72, 64))


def test_a_tgz_is_counted_while_it_is_unzipped(tmp_path: Path) -> None:
    archive = tmp_path / "big.tgz"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in (("a.png", image(1)), ("zeros", bytes(30_000_000))):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    archive.write_bytes(gzip.compress(buffer.getvalue(), 1))
    assert archive.stat().st_size < 1_000_000
    with pytest.raises(UserError, match=r"more than 0\.01 GB unzipped; give max_unzipped_gigabytes="):
        make(tmp_path, archive, ["a.png"], max_unzipped_gigabytes=0.01)
    assert not list((tmp_path / "out").rglob("archive*"))
    assert not (tmp_path / "out").exists()
    assert make(tmp_path, archive, ["a.png"], max_unzipped_gigabytes=0.05).kept == 1
    with pytest.raises(UserError, match="max_unzipped_gigabytes=0"):
        make(tmp_path, archive, ["a.png"], max_unzipped_gigabytes=0)


def test_links_and_devices_of_a_tar_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(image(7))
    archive = tmp_path / "a.tar"
    with tarfile.open(archive, "w") as tar:
        info = tarfile.TarInfo("real.png")
        info.size = len(image(1))
        tar.addfile(info, io.BytesIO(image(1)))
        for name, kind, target in (("soft.png", tarfile.SYMTYPE, str(tmp_path / "secret.png")), ("pipe.png", tarfile.FIFOTYPE, ""),
                                   ("out.png", tarfile.LNKTYPE, "../secret.png"), ("zero.png", tarfile.CHRTYPE, ""),
                                   ("hard.png", tarfile.LNKTYPE, "./real.png")):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    names = [
        "real.png",
        "soft.png",
        "out.png",
        "pipe.png",
        "zero.png",
        "../secret.png",
        str(tmp_path / "secret.png"),
        "hard.png",
    ]
    report = make(tmp_path, archive, names, duplicates="keep")
    # A hard link is how tar writes the same file under a second name.
    assert (report.kept, report.dropped) == (2, {"no image": 6})
    link, none = "a link in the archive, not followed", "no such member in the archive"
    shown = [
        f"t.jsonl line {at} ({names[at - 1]}): {why}"
        for at, why in ((2, link), (3, link), (4, none), (5, none), (6, none))
    ]
    assert report.examples["no image"] == shown


def test_a_zip_from_windows(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.writestr("in/b.png", image(1))
    data = (tmp_path / "a.zip").read_bytes().replace(b"in/b.png", b"in\\b.png")
    (tmp_path / "a.zip").write_bytes(data)
    assert make(tmp_path, tmp_path / "a.zip", ["in/b.png"]).kept == 1
    assert make(tmp_path, tmp_path / "a.zip", ["in\\b.png"], "other").kept == 1
