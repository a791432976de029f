"""Building shards: the hostile folder, the same bytes on any number of processes, going on after a stop, the emoji."""

from __future__ import annotations

import fcntl
import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builds import make, samples, write_captioned
from commands import ROOT, Command, user_error, wait_for
from data_fixtures import encoded, picture
from hostile_folder import BLUE, EXPECTED, KEPT, RED, RENAMED, SIDE, make_hostile_folder
from PIL import Image
from programs import script
from ranks import Started
from training_runs import Train

from paradiffusion.curation.building import build as building
from paradiffusion.data.images import decode

EMOJI = ROOT.parent / "shared" / "assets" / "emoji"


def tars(folder: Path) -> dict[str, bytes]:
    """The bytes of all shards."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.tar"))}


def near(pixel: tuple[int, ...], colour: tuple[int, int, int], tolerance: int = 12) -> bool:
    return all(abs(a - b) <= tolerance for a, b in zip(pixel, colour, strict=True))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hostile_folder(tmp_path_factory.mktemp("hostile") / "folder")


def test_the_hostile_folder(hostile: Path, tmp_path: Path) -> None:
    report = make(hostile, tmp_path / "out", background="#00ff00")
    assert report.dropped == EXPECTED
    assert report.items == report.kept + sum(EXPECTED.values()) and report.kept == len(KEPT) + RENAMED
    found = samples(tmp_path / "out")
    assert set(found) >= KEPT and len(found) == report.kept
    images = {key: decode(sample.image) for key, sample in found.items()}
    assert all(images[key].size == (one.meta["width"], one.meta["height"]) for key, one in found.items())
    # What the pictures show.
    for key, place, colour in (
        ("cmyk", (9, 9), RED), ("animated", (9, 9), RED), ("animated", (SIDE - 9, 9), BLUE), ("rotated", (9, 9), RED),
        ("rotated", (9, 2 * SIDE - 9), BLUE), ("palette", (3, 3), (0, 255, 0)), ("palette", (90, 3), RED),
    ):  # fmt: skip
        assert near(images[key].getpixel(place), colour), key
    ramp = np.asarray(images["grey16"])[0, :, 0].astype(int)
    assert (ramp[0], ramp[-1]) == (0, 255) and abs(ramp[SIDE // 2] - 128) < 3 and (np.diff(ramp) >= 0).all()
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


def test_the_report_shows_what_went(hostile: Path, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    done = command("scripts/build_shards.py", f"input={hostile}", f"output={out}", "processes=2")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    content = json.loads((out / "report.json").read_text())
    assert content["dropped"] == EXPECTED
    assert content["examples"]["too many pixels"] == ["bomb.png: 900000000 pixels"]
    assert content["examples"]["folder linked again"][0].startswith("nested/loop")
    assert "copy.bmp: as a_first.png" in content["examples"]["exact duplicate"]
    for text in (done.stdout, (out / "report.md").read_text()):
        assert "| too many pixels | 1 | `bomb.png: 900000000 pixels` |" in text
    assert not (out / ".build").exists() and (out / "000000.index.npz").exists()
    # The same command again only shows the report, quickly and with the same words.
    capsys.readouterr()
    assert script("build_shards").main([f"input={hostile}", f"output={out}"]) == 0
    again = capsys.readouterr()
    assert again.out == done.stdout and "reading images" not in again.err
    user_error(r"min_side=32 \(was 64\)", make, hostile, out, min_side=32)


def test_a_stop_loses_nothing_and_processes_change_nothing(tmp_path: Path) -> None:
    """600 small pictures make two chunks; the stop comes between them."""
    plain, out = tmp_path / "in", tmp_path / "stopped"
    plain.mkdir()
    for number in range(600):
        (plain / f"{number:04d}.png").write_bytes(encoded(picture(number, 72, 64), compress_level=1))
        (plain / f"{number:04d}.txt").write_text(f"picture number {number}")
    options = {"encode": "jpeg", "near_duplicates": "2", "samples_per_shard": 300, "val": 0.05}
    report = make(plain, tmp_path / "whole", processes=2, **options)
    assert report.kept == report.items == 600 and 10 < report.val < 60 and report.train + report.val == 600
    whole = tars(tmp_path / "whole")
    assert len(whole) == 3 and "val/000000.tar" in whole
    arguments = [f"input={plain}", f"output={out}", *(f"{key}={value}" for key, value in options.items())]
    running = Started("scripts/build_shards.py", *arguments, "processes=1")
    wait_for(lambda: any(out.glob(".build/chunks/*.json")), interval=0.002)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130 and "Traceback" not in errors and "the same command goes on" in errors, errors
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob(".build/chunks/*.json")}
    assert len(kept) == 1 and not list(out.rglob("*.tar"))
    user_error(r"quality=80 \(was 95\)", make, plain, out, quality=80, **options)
    assert kept == {path.name: path.stat().st_mtime_ns for path in out.glob(".build/chunks/*.json")}
    assert make(plain, out, **options).kept == 600
    assert tars(out) == whole
    assert (out / "report.md").read_text() == (tmp_path / "whole" / "report.md").read_text()


def test_what_cannot_be_built_leaves_what_there_was(few: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("precious")
    user_error(r"thesis\.tex", make, few, tmp_path / "thesis")
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["thesis.tex"]
    user_error("is a file", make, few, tmp_path / "thesis" / "thesis.tex")
    user_error("no item that could be a sample, read as format=folder", make, tmp_path / "thesis", tmp_path / "out")
    assert not (tmp_path / "out").exists()

    (tmp_path / "out" / ".build").mkdir(parents=True)
    with (tmp_path / "out" / ".build" / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as a build does that is at work
        user_error("another process", make, few, tmp_path / "out")
    assert make(few, tmp_path / "out").kept == 6


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
    for number, grey in enumerate((10, 120, 240)):  # even areas have no perceptual hash: not each other's copies
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
        assert sample.extension == kind and decode(sample.image).size == (100, 50)
        assert (sample.meta["width"], sample.meta["height"]) == (100, 50)
    assert make(folder, tmp_path / "none", min_side=300).dropped == {"too small": 1}
    assert (tmp_path / "none" / "report.md").exists()
    assert make(folder, tmp_path / "limit", max_pixels=70_000).dropped == {"too many pixels": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "nowhere"}, "does not exist"), ({"background": "greenish"}, "no colour"), ({"val": 3.0}, "val=3.0"),
        ({"near_duplicates": "40"}, "near_duplicates=40"), ({"captions": "{a"}, "captions="), ({"captions": "[a, b]"}, "captions="),
        ({"format": "zip"}, "format=zip"), ({"max_side": 10}, "below min_side"), ({"processes": 0}, "processes=0"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_by_name(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    user_error(message, make, **{"source": tmp_path, "output": tmp_path / "out", **options})


@pytest.mark.skipif(not EMOJI.exists(), reason="the emoji archive is not here")
def test_the_emoji_archive_becomes_shards_and_trains(train: Train, tmp_path: Path) -> None:
    out = tmp_path / "emoji"
    table = json.loads((EMOJI / "captions.json").read_text())[:60]
    (tmp_path / "captions.json").write_text(json.dumps(table))
    report = make(
        tmp_path / "captions.json", out, root=str(EMOJI / "fluent-emoji-3d-1.1.0.tgz"), max_side=128,
        captions="{label: short, tags: long}", keep="[group]",
    )  # fmt: skip
    assert report.format == "table" and report.items == 60 and report.kept >= 58
    first = samples(out)["package/assets/1f600"]
    assert first.meta["captions"]["short"] == "grinning face"
    assert first.meta["captions"]["long"].startswith("cheerful, cheery, face, grin")
    assert first.meta["caption_sources"] == {"short": "column label", "long": "column tags"}
    assert first.meta["extra"] == {"group": "smileys"}
    image = decode(first.image)
    assert image.size == (128, 128) and image.getpixel((0, 0)) == (255, 255, 255)  # what was transparent
    red, green, blue = image.getpixel((64, 30))
    assert red > 180 and green > 120 and blue < 120  # a yellow face
    assert train("preset=nano", "stage=1", f"data.shards={out}", "max_steps=2", "batch_size=4") == 0


def test_a_picture_that_changes_under_way_is_noticed(few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = building.select

    def late(*arguments: Any) -> Any:
        (few / "a.png").write_bytes(encoded(picture(99, 90, 70)))
        return before(*arguments)

    monkeypatch.setattr(building, "select", late)
    user_error("is not what it was when it was first read", make, few, tmp_path / "out")


@pytest.mark.parametrize("last", ["build.json", "000000.tar", "000000.index.npz"])
def test_a_kill_leaves_nothing_in_the_way(last: str, few: Path, tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        replace = os.replace

        def killed(one: Any, other: Any) -> None:
            if str(other) == str(tmp_path / "out" / last):
                os.kill(os.getpid(), signal.SIGKILL)
            replace(one, other)

        os.replace = killed  # type: ignore[assignment]
        make(few, tmp_path / "out")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    make(few, tmp_path / "out")
    make(few, tmp_path / "whole")
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


@pytest.fixture
def few(tmp_path: Path) -> Path:
    return write_captioned(tmp_path / "few", *"abcdef")
