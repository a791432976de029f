"""Building shards: the hostile folder, the same bytes on any number of processes, going on after a stop, the emoji."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import ROOT, wait_for
from data_fixtures import encoded, picture
from hostile_folder import BLUE, EXPECTED, KEPT, RED, RENAMED, SIDE, make_hostile_folder
from PIL import Image

from paradiffusion.curation.building import build as building
from paradiffusion.curation.building.build import build
from paradiffusion.curation.building.build_options import BuildOptions
from paradiffusion.curation.building.build_report import Report
from paradiffusion.data.images import decode
from paradiffusion.data.index import load_index, read_sample
from paradiffusion.data.shards import RawSample, expand_shards
from paradiffusion.errors import UserError

EMOJI = ROOT.parent / "shared" / "assets" / "emoji"


def make(source: Path, output: Path, **options: object) -> Report:
    """Build in this process."""
    return build(BuildOptions(input=str(source), output=str(output), **{"processes": 1, **options}))  # type: ignore[arg-type]


def samples(folder: Path) -> dict[str, RawSample]:
    """All samples below a folder by key."""
    index = load_index(expand_shards(folder))
    return {index.key(row): read_sample(index, row) for row in range(len(index))}


def tars(folder: Path) -> dict[str, bytes]:
    """The bytes of all shards."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.tar"))}


def has_new(folder: Path, pattern: str, count: int) -> bool:
    """Whether more files than ``count`` have come."""
    return len(list(folder.glob(pattern))) > count


def near(pixel: tuple[int, ...], colour: tuple[int, int, int], tolerance: int = 12) -> bool:
    return all(abs(a - b) <= tolerance for a, b in zip(pixel, colour, strict=True))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hostile_folder(tmp_path_factory.mktemp("hostile") / "folder")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,100 small noisy pictures, which make three chunks."""
    folder = tmp_path_factory.mktemp("plain") / "folder"
    folder.mkdir()
    for number in range(1100):
        (folder / f"{number:04d}.png").write_bytes(encoded(picture(number, 72, 64), compress_level=1))
        (folder / f"{number:04d}.txt").write_text(f"picture number {number}")
    return folder


def test_the_hostile_folder(hostile: Path, tmp_path: Path) -> None:
    report = make(hostile, tmp_path / "out", background="#00ff00")
    assert report.dropped == EXPECTED
    assert report.items == report.kept + sum(EXPECTED.values()) and report.kept == len(KEPT) + RENAMED
    found = samples(tmp_path / "out")
    assert set(found) >= KEPT and len(found) == report.kept
    images = {key: decode(sample.image) for key, sample in found.items()}
    for key, sample in found.items():
        size = (sample.meta["width"], sample.meta["height"])
        assert images[key].size == size, key
    # What the pictures show.
    assert near(images["cmyk"].getpixel((9, 9)), RED)
    assert near(images["animated"].getpixel((9, 9)), RED) and near(images["animated"].getpixel((SIDE - 9, 9)), BLUE)
    assert images["rotated"].size == (SIDE, 2 * SIDE)
    assert near(images["rotated"].getpixel((9, 9)), RED) and near(images["rotated"].getpixel((9, 2 * SIDE - 9)), BLUE)
    assert near(images["palette"].getpixel((3, 3)), (0, 255, 0)) and near(images["palette"].getpixel((90, 3)), RED)
    ramp = np.asarray(images["grey16"])[0, :, 0]
    assert (
        ramp[0] == 0
        and ramp[-1] == 255
        and abs(int(ramp[SIDE // 2]) - 128) < 3
        and (np.diff(ramp.astype(int)) >= 0).all()
    )
    # Bytes that are fine stay as they are; the content says what they are.
    assert found["wrong"].image == (hostile / "wrong.jpg").read_bytes() and found["wrong"].extension == "png"
    assert found["twice"].image == (hostile / "twice.jpg").read_bytes()
    assert found["latin"].meta["captions"] == {"short": "un café très chaud"}
    assert found["nested/deep/pipe_caption"].meta["captions"] == {"short": "a caption with control characters"}
    assert found["latin"].meta["caption_sources"] == {"short": "file txt"}
    for note in ("wrong extension", "turned upright", "first frame of an animation", "16-bit grey converted",
                 "CMYK converted", "palette converted", "text not UTF-8, read as cp1252"):  # fmt: skip
        assert report.mended[note] == 1, note
    (renamed,) = [key for key in found if key.startswith("mit_Leerzeichen/")]
    assert found[renamed].meta["source"] == "mit Leerzeichen/ünï код 图.png"


def test_the_report_shows_what_went(
    hostile: Path, command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = command("scripts/build_shards.py", f"input={hostile}", f"output={out}", "processes=2")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    content = json.loads((out / "report.json").read_text())
    assert content["dropped"] == EXPECTED
    assert content["examples"]["too many pixels"] == ["bomb.png: 900000000 pixels"]
    assert content["examples"]["folder linked again"][0].startswith("nested/loop")
    assert "copy.bmp: as a_first.png" in content["examples"]["exact duplicate"]
    for text in (done.stdout, (out / "report.md").read_text()):
        assert "| too many pixels | 1 | `bomb.png: 900000000 pixels` |" in text
    assert not (out / ".build").exists() and (out / "000000.index.npz").exists()
    # The same command again only shows the report, quickly and with the same words.
    again = command("scripts/build_shards.py", f"input={hostile}", f"output={out}")
    assert again.returncode == 0 and again.stdout == done.stdout and "reading images" not in again.stderr
    with pytest.raises(UserError, match=r"min_side=32 \(was 64\)"):
        make(hostile, out, min_side=32)


def test_a_stop_loses_nothing_and_processes_change_nothing(plain: Path, tmp_path: Path) -> None:
    options = {"encode": "webp", "near_duplicates": "2", "samples_per_shard": 300, "val": 0.05}
    report = make(plain, tmp_path / "whole", processes=3, **options)
    assert report.kept == report.items == 1100 and 20 < report.val < 100 and report.train + report.val == 1100
    whole = tars(tmp_path / "whole")
    assert len(whole) == 5 and "val/000000.tar" in whole
    out = tmp_path / "stopped"
    arguments = [f"input={plain}", f"output={out}", *(f"{key}={value}" for key, value in options.items())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for number, processes in ((signal.SIGINT, 1), (signal.SIGTERM, 2)):
        before = any(out.glob(".build/chunks/*.json"))
        running = subprocess.Popen(
            [sys.executable, "scripts/build_shards.py", *arguments, f"processes={processes}"], cwd=ROOT, env=environment,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        # The first stop comes after the first chunk, the second as soon as there is something new.
        suffix = "*.bin*" if before else "*.json"
        wait_for(partial(has_new, out / ".build" / "chunks", suffix, len(list(out.glob(f".build/chunks/{suffix}")))))
        running.send_signal(number)
        _, errors = running.communicate(timeout=60)
        assert running.returncode == 130 and "Traceback" not in errors and "the same command goes on" in errors, errors
        assert not list(out.rglob("*.tar"))
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob(".build/chunks/*.json")}
    assert kept
    with pytest.raises(UserError, match=r"quality=80 \(was 95\)"):
        make(plain, out, quality=80, **options)
    assert kept == {path.name: path.stat().st_mtime_ns for path in out.glob(".build/chunks/*.json")}
    assert make(plain, out, **options).kept == 1100
    assert tars(out) == whole
    assert (out / "report.md").read_text() == (tmp_path / "whole" / "report.md").read_text()


def test_two_builds_of_one_folder_do_not_mix(plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    running = subprocess.Popen(
        [sys.executable, "scripts/build_shards.py", f"input={plain}", f"output={out}", "encode=webp", "processes=1"],
        cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for(lambda: (out / ".build" / "items").exists())
        with pytest.raises(UserError, match="another process"):
            make(plain, out, encode="webp")
    finally:
        running.terminate()
        running.wait(60)


def test_a_folder_of_something_else_is_left_alone(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        make(plain, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match="is a file"):
        make(plain, tmp_path / "thesis.tex")


def test_an_input_without_images_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("a caption alone")
    with pytest.raises(UserError, match="no item that could be a sample, read as format=folder"):
        make(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_near_duplicates_go_and_the_first_stays(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        rough = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        smooth = rough.resize((256, 192), Image.Resampling.BICUBIC)
        smooth.save(folder / f"{name}_1.png")
        smooth.save(folder / f"{name}_2.jpg", quality=40)
        smooth.resize((128, 96)).save(folder / f"{name}_3.webp", quality=60)
    for number, grey in enumerate(
        (10, 120, 240)
    ):  # even areas have no perceptual hash, and are not each other's copies
        Image.new("RGB", (96, 96), (grey,) * 3).save(folder / f"even_{number}.png")
    for path in list(folder.iterdir()):
        path.with_suffix(".txt").write_text(f"a picture called {path.stem}")
    report = make(folder, tmp_path / "out", near_duplicates="4")
    assert report.dropped == {"near-duplicate": 4}
    assert set(samples(tmp_path / "out")) == {"a_1", "b_1", "even_0", "even_1", "even_2"}
    assert "b_2.jpg: as b_1.png" in report.examples["near-duplicate"]
    assert make(folder, tmp_path / "all").kept == 9


def test_sizes_and_encodings(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    picture(0, 400, 200).save(folder / "wide.png")
    (folder / "wide.txt").write_text("a wide picture")
    for encode, kind in (("keep", "png"), ("jpeg", "jpg"), ("webp", "webp"), ("png", "png")):
        make(folder, tmp_path / encode, encode=encode, max_side=100)
        (sample,) = samples(tmp_path / encode).values()
        assert sample.extension == kind and decode(sample.image).size == (100, 50) == (
            sample.meta["width"],
            sample.meta["height"],
        )
    assert make(folder, tmp_path / "none", min_side=300).dropped == {"too small": 1}
    assert (tmp_path / "none" / "report.md").exists()
    assert make(folder, tmp_path / "limit", max_pixels=70_000).dropped == {"too many pixels": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input": "nowhere"}, "does not exist"),
        ({"background": "greenish"}, "no colour"),
        ({"near_duplicates": "40"}, "near_duplicates=40"),
        ({"captions": "{a"}, "captions="),
        ({"captions": "[a, b]"}, "captions="),
        ({"format": "zip"}, "format=zip"),
        ({"val": 3.0}, "val=3.0"),
        ({"max_side": 10}, "below min_side"),
        ({"processes": 0}, "processes=0"),
    ],
)
def test_wrong_options_are_refused_by_name(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        build(BuildOptions(**{"input": str(tmp_path), "output": str(tmp_path / "out"), **options}))  # type: ignore[arg-type]


@pytest.mark.skipif(not EMOJI.exists(), reason="the emoji archive is not here")
def test_the_emoji_archive_becomes_shards_and_trains(train: Callable[..., int], tmp_path: Path) -> None:
    out = tmp_path / "emoji"
    table = json.loads((EMOJI / "captions.json").read_text())[:300]
    (tmp_path / "captions.json").write_text(json.dumps(table))
    report = make(
        tmp_path / "captions.json", out, root=str(EMOJI / "fluent-emoji-3d-1.1.0.tgz"), max_side=128,
        captions="{label: short, tags: long}", keep="[group]",
    )  # fmt: skip
    assert report.format == "table" and report.items == 300 and report.kept >= 298
    found = samples(out)
    first = found["package/assets/1f600"]
    assert first.meta["captions"]["short"] == "grinning face"
    assert first.meta["captions"]["long"].startswith("cheerful, cheery, face, grin")
    assert first.meta["caption_sources"] == {"short": "column label", "long": "column tags"}
    assert first.meta["extra"] == {"group": "smileys"}
    image = decode(first.image)
    assert image.size == (128, 128) and image.getpixel((0, 0)) == (255, 255, 255)  # what was transparent
    red, green, blue = image.getpixel((64, 30))
    assert red > 180 and green > 120 and blue < 120  # a yellow face
    assert train("preset=nano", "stage=1", f"data.shards={out}", "max_steps=2", "batch_size=4") == 0


def test_a_picture_that_changes_under_way_is_noticed(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "in"
    shutil.copytree(plain, source)
    first = min(path for path in source.rglob("*") if path.suffix in (".png", ".jpg"))
    before = building.select

    def late(*arguments: Any) -> Any:
        first.write_bytes(encoded(picture(99, 90, 70), "PNG"))
        return before(*arguments)

    monkeypatch.setattr(building, "select", late)
    with pytest.raises(UserError, match="is not what it was when it was first read"):
        make(source, tmp_path / "out", processes=1)


@pytest.mark.parametrize("last", ["build.json", "000000.tar", "000000.index.npz"])
def test_a_kill_leaves_nothing_in_the_way(last: str, plain: Path, tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        replace = os.replace

        def killed(one: Any, other: Any) -> None:
            if str(other) == str(tmp_path / "out" / last):
                os.kill(os.getpid(), signal.SIGKILL)
            replace(one, other)

        os.replace = killed  # type: ignore[assignment]
        make(plain, tmp_path / "out", processes=1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    make(plain, tmp_path / "out", processes=1)
    make(plain, tmp_path / "whole", processes=1)
    assert tars(tmp_path / "out") == tars(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(tmp_path / "whole"))


def test_a_profile_of_inks_is_not_put_on_rgb(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    image = Image.fromarray(np.arange(96 * 96 * 3, dtype=np.uint8).reshape(96, 96, 3))
    image.convert("CMYK").save(tmp_path / "in" / "a.tif", icc_profile=b"\0" * 16 + b"CMYK" + b"\0" * 108)
    (tmp_path / "in" / "a.txt").write_text("two words")
    make(tmp_path / "in", tmp_path / "out")
    (one,) = samples(tmp_path / "out").values()
    with Image.open(io.BytesIO(one.image)) as stored:
        assert stored.mode == "RGB" and "icc_profile" not in stored.info
