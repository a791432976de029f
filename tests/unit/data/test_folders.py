"""A folder of pictures as the data: what is found, what is passed over and said, and what is looked at again."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builds import make
from commands import user_error
from data_fixtures import as_json, encoded, picture, write_tar
from loader_fixtures import assert_same, load

from paradiffusion.atomic import hold, locked
from paradiffusion.compose import compose_train
from paradiffusion.config import DataConfig
from paradiffusion.curation.journal import lock as journal_lock
from paradiffusion.data.folder import INDEX_NAME, FoundPicture, LookedAt, load_folder, look
from paradiffusion.data.index import SampleIndex, load_index, look_at, read_sample
from paradiffusion.data.loader import LoaderSettings
from paradiffusion.data.plan import describe_plan, make_plan
from paradiffusion.training.folder import locked as training_lock

SETTINGS = LoaderSettings(seed=1, workers=0, last_step=6)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("PARADIFFUSION_CACHE", str(folder))
    return folder


def put(folder: Path, name: str, text: str | None = None, json: bytes | None = None, size: tuple[int, int] = (64, 64)) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = "JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else path.suffix[1:].upper()
    path.write_bytes(encoded(picture(len(name), *size), kind))
    if text is not None:
        path.with_suffix(".txt").write_text(text)
    if json is not None:
        path.with_suffix(".json").write_bytes(json)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    root = tmp_path / "my pictures"
    for number in range(20):
        put(root, f"{number:02d}.png", text=f"thing {number}", size=(64, 64) if number % 2 else (96, 56))
    put(root, "sub/deeper/\u00e4 b.JPG", json=as_json(captions={"long": "a b c", "short": "a"}))
    put(root, "sub/one.two.webp", json=as_json(caption="with a dot"), text="the text wins")
    return root


def keys(index: SampleIndex) -> list[str]:
    return [index.key(row) for row in range(len(index))]


def test_what_is_found(pictures: Path, tmp_path: Path) -> None:
    index = load_folder(pictures)
    assert keys(index) == [f"{n:02d}.png" for n in range(20)] + ["sub/deeper/\u00e4 b.JPG", "sub/one.two.webp"]
    assert index.kinds == ["short", "long"] and list(index.width[:3]) == [96, 64, 96]
    one, other = read_sample(index, 20), read_sample(index, 21)
    assert one.extension == "jpg" and one.meta["captions"] == {"short": "a", "long": "a b c"}
    assert other.meta == {"caption": "with a dot", "captions": {"short": "the text wins"}}
    assert read_sample(index, 3).image == (pictures / "03.png").read_bytes()
    assert list(index.words[20]) == [1, 3]
    batches = load(index, SETTINGS)
    assert_same(batches, load(index, replace(SETTINGS, workers=2)))
    assert all(key.startswith("my pictures/") for batch in batches for key in batch.keys)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "more").symlink_to(pictures)
    assert len(load_folder(tmp_path / "other")) == 22


def test_hostile_folder(pictures: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (pictures / "loop").symlink_to(pictures)
    (pictures / "sub" / "again").symlink_to(pictures / "sub" / "deeper")
    (pictures / "gone.png").symlink_to(pictures / "nowhere")
    (pictures / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    (pictures / "broken.txt").write_text("a caption")
    (pictures / "notes.txt").write_text("no picture of this name")
    (pictures / "moving.gif").write_bytes(b"GIF89a")
    put(pictures, "mute.png")
    put(pictures, "empty.png", text=" \n")
    put(pictures, "list.png", json=b"[1, 2]")
    put(pictures, "nan.png", text="NaN")
    put(pictures, ".hidden/x.png", text="not seen")
    os.mkdir(pictures / "folder.png")
    os.mkfifo(pictures / "pipe.png")
    with open(os.fsencode(pictures) + b"/\xff\xfe.png", "wb") as file:
        file.write(b"x")
    index = load_folder(pictures)
    assert len(index) == 22
    (line,) = capfd.readouterr().err.splitlines()
    assert "22 pictures with captions" in line and "2 links to a folder seen already" in line
    assert "2 files that cannot be opened" in line and "1 files that are no picture (such as broken.jpg)" in line
    assert "1 gif files (scripts/build_shards.py reads them)" in line
    assert "1 files that are no part of a sample (such as notes.txt)" in line
    assert "4 pictures without a caption" in line and "1 names that are not UTF-8" in line
    assert load(index, SETTINGS)


def test_tables_of_captions_beside_the_pictures(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As the hub's image folders have them; what lies beside one picture wins over its row."""
    for name in ("a.png", "in/b.png", "in/c.png", "other/d.png", "mute.png"):
        put(tmp_path, name)
    (tmp_path / "in" / "c.txt").write_text("beside it")
    rows = [{"file_name": "a.png", "text": "an a"}, {"file_name": "./in/b.png", "captions": {"short": "b", "long": "a long b"}},
            {"file_name": "in/c.png", "text": "in the table"}]  # fmt: skip
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "other" / "captions.csv").write_bytes("filename;caption\nd.png;ein süßes d\n".encode("cp1252"))
    index = load_folder(tmp_path)
    captions = {index.key(row): read_sample(index, row).meta["captions"] for row in range(len(index))}
    assert captions == {
        "a.png": {"short": "an a"}, "in/b.png": {"short": "b", "long": "a long b"}, "in/c.png": {"short": "beside it"},
        "other/d.png": {"short": "ein süßes d"},
    }  # fmt: skip
    assert index.odd_text == 1
    assert "1 pictures without a caption (such as mute.png)" in capfd.readouterr().err
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, [{"file_name": "a.png", "text": "another a"}])))
    changed = load_folder(tmp_path)
    assert keys(changed) == ["a.png", "in/c.png", "other/d.png"]
    assert read_sample(changed, 0).meta["captions"] == {"short": "another a"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"picture": "a.png", "text": "an a"}))
    assert keys(load_folder(tmp_path)) == ["in/c.png", "other/d.png"]
    assert "metadata.jsonl is passed over: none of its columns (picture, text) names pictures" in capfd.readouterr().err


def test_two_pictures_for_one_caption(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In a folder, in a tar and for the builder the first by name is the sample, and the other is counted."""
    files = {"a.jpg": encoded(picture(1), "JPEG"), "a.png": encoded(picture(2)), "a.txt": b"an a",
             "b.jpg": encoded(picture(3), "JPEG"), "b.jpg.txt": b"one", "b.png": encoded(picture(4)), "b.png.txt": b"other"}  # fmt: skip
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    assert keys(load_folder(folder)) == ["a.jpg", "b.jpg", "b.png"]
    assert "1 files that are no part of a sample (such as a.png)" in capfd.readouterr().err
    write_tar(tmp_path / "pictures.tar", [(name, files[name]) for name in ("a.jpg", "a.png", "a.txt")])
    index = load_index([tmp_path / "pictures.tar"])
    assert [index.key(row) for row in range(len(index))] == ["a"] and read_sample(index, 0).extension == "jpg"
    for other in ("b.png", "b.png.txt"):  # which are a sample of their own here
        (folder / other).unlink()
    report = make(folder, tmp_path / "built")
    assert report.dropped["duplicate key"] == 1 and report.kept == 2


def test_the_usual_forms_of_a_picture_with_a_caption(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    forms = {
        "a.png": ("a.TXT", b"in capitals"), "b.jpg": ("b.jpg.txt", b"behind the whole name"), "c.jfif": ("c.txt", b"a JPEG"),
        "d.png": ("d.JSON", b'{"text": "by text"}'), "e.png": ("e.png.json", b'{"prompt": "by prompt"}'),
        "f.png": ("f.json", b'{"caption": ["the first", "another"]}'), "g.v1.07.png": ("g.v1.07.caption", b"with dots"),
        "h.png": ("h.txt", "un café".encode("cp1252")), "i.png": ("i.txt", "\u732b\u3068\u72ac".encode("utf-16")),
        "k.jpg": ("k.jpg.Txt", b"Txt"), "l.png": ("l.Json", b'["of a list", "another"]'), "m.png": ("m.text", "swe\u0301".encode("utf-8-sig")),
    }  # fmt: skip
    for name, (text, data) in forms.items():
        put(tmp_path, name.replace(".jfif", ".jpg"))
        (tmp_path / text).write_bytes(data)
    (tmp_path / "c.jpg").rename(tmp_path / "c.jfif")
    put(tmp_path, "j.png")
    put(tmp_path, "n.png")
    (tmp_path / "n.txt").write_bytes("\u017elu\u0165ou\u010dk\u00fd k\u016f\u0148".encode("iso8859-2"))
    (tmp_path / "j.txt").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    (tmp_path / "other.jsonl").write_text("{}\n")
    index = load_folder(tmp_path)
    found = {index.key(row): read_sample(index, row).meta["captions"]["short"] for row in range(len(index))}
    assert list(found) == list(forms)  # j and n are not among them
    assert list(found.values()) == [
        "in capitals", "behind the whole name", "a JPEG", "by text", "by prompt", "the first", "with dots", "un café", "\u732b\u3068\u72ac",
        "Txt", "of a list", "sw\u00e9",
    ]  # fmt: skip
    assert index.words[8:10].tolist() == [[3], [1]]  # without spaces each sign counts
    said = capfd.readouterr().err
    assert "2 pictures without a caption (such as j.png)" in said and "1 jsonl files (scripts/build_shards.py" in said
    assert index.odd_text == 2


def test_texts_in_the_way_of_kohyas_scripts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for folder, count in (("10_cat", 2), ("1_my dog", 3), ("2024", 1)):
        for number in range(count):
            put(tmp_path, f"{folder}/{number}.png")
            (tmp_path / folder / f"{number}.caption").write_text(f"first line {number}\nsecond line\n")
    (tmp_path / "2024" / "0.txt").write_text("this one is read")
    index = load_folder(tmp_path)
    assert read_sample(index, 0).meta["captions"] == {"short": "first line 0 second line"}
    assert read_sample(index, 5).meta["captions"] == {"short": "this one is read"}
    told = capfd.readouterr().err
    assert "(10_cat, 1_my dog) are taken as names, not as repeats" in told
    assert "For repeats (add the 1 pictures outside of these folders) give" in told
    found = {source.folder: source.weight for source in compose_train(shlex.split(told.partition(" give ")[2])).data.sources}
    assert found == {str(tmp_path / "10_cat"): 20, str(tmp_path / "1_my dog"): 3}
    load_folder(str(tmp_path / "10_cat"))
    assert not capfd.readouterr().err


def test_what_one_picture_loses_is_told_at_the_start(pictures: Path) -> None:
    config = DataConfig(resolution=64, bucket_multiple=16, max_aspect=2.0, captions={"short": 1.0})
    assert "crops:" not in describe_plan(make_plan(load_folder(pictures), config, 2, 0))
    put(pictures, "long.png", text="a panorama", size=(3000, 100))
    put(pictures, "icon.png", text="an icon", size=(8, 8))
    (line,) = describe_plan(make_plan(load_folder(pictures), config, 2, 0)).splitlines()[-1:]
    assert "crops: up to 94% of a picture's area is cut away (long.png)" in line and "up to 8.0 times enlarged (icon.png)" in line


def test_a_disk_without_locks(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert len(load_folder(pictures)) == 22
    # Nobody can be kept out there, and nobody is: whatever writes takes its lock by the same function.
    refusal = "held by another process"
    with open(pictures / "lock", "w") as file, locked(pictures, refusal), training_lock(pictures / "stage1"):
        assert hold(file) and hold(file, wait=True) and not hold(file, unsure=False)
        journal_lock(file, refusal)


def test_a_file_that_cannot_be_read_is_not_told_as_no_picture_and_is_tried_again(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(file: Any, image: Any) -> tuple[int, int, int]:
        if file.name.endswith("03.png"):
            raise OSError(errno.EIO, "Input/output error")
        return look_at(file, image)

    with monkeypatch.context() as patch:
        patch.setattr("paradiffusion.data.folder.look_at", broken)
        assert len(load_folder(pictures)) == 21
    assert "1 files that cannot be opened (such as 03.png)" in capfd.readouterr().err
    assert len(load_folder(pictures)) == 22 and not capfd.readouterr().err


def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    looked: list[str] = []

    def watched(root: Path, found: FoundPicture) -> LookedAt:
        looked.append(found.key)
        return look(root, found)

    monkeypatch.setattr("paradiffusion.data.folder.look", watched)
    return looked


def test_only_what_has_changed_is_looked_at_again(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = looked_at(monkeypatch)
    put(pictures, "mute.png")
    first = load_folder(pictures)
    assert len(looked) == 23
    looked.clear()
    assert load_folder(pictures).fingerprint() == first.fingerprint() and not looked
    (pictures / "07.txt").write_text("now five words are here")
    (pictures / "03.png").unlink()
    put(pictures, "mute.png", json=as_json(captions={"clean": "not mute any more"}))
    put(pictures, "00a.png", text="new")
    second = load_folder(pictures)
    assert sorted(looked) == ["00a.png", "07.png", "mute.png"]
    assert "03.png" not in keys(second) and len(second) == 23 and "clean" in second.kinds
    row = keys(second).index("07.png")
    assert second.words[row, second.kinds.index("short")] == 5 and read_sample(second, row).key == "07.png"
    # A sample is the same wherever it stands.
    ids = dict(zip(keys(first), first.ids.tolist(), strict=True))
    assert all(ids.get(key, number) == number for key, number in zip(keys(second), second.ids.tolist(), strict=True))
    os.remove(pictures / INDEX_NAME)
    fresh = load_folder(pictures)
    assert keys(fresh) == keys(second) and np.array_equal(fresh.ids, second.ids)


def test_damaged_and_unwritable_index(pictures: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = looked_at(monkeypatch)
    first = load_folder(pictures)
    for damage in (b"", b"PK\x03\x04 cut", (pictures / INDEX_NAME).read_bytes()[:400]):
        (pictures / INDEX_NAME).write_bytes(damage)
        assert load_folder(pictures).fingerprint() == first.fingerprint()
    (pictures / INDEX_NAME).unlink()
    (pictures / INDEX_NAME).mkdir()  # Nothing can be written there, not even by root.
    load_folder(pictures)
    looked.clear()
    assert load_folder(pictures).fingerprint() == first.fingerprint() and not looked
    assert list(cache.glob("index/*.folder.npz"))


def test_nothing_to_train_on(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("x")
    wrong = {"none": "does not exist", "file.txt": "is a file", ".": "no picture at all"}
    for folder, said in wrong.items():
        user_error(rf"^data.folder=.*{said}", load_folder, tmp_path / folder)
    put(tmp_path, "a.png")
    user_error("1 pictures without a caption", load_folder, tmp_path)


def test_on_the_command_line() -> None:
    data = compose_train(["stage=1", "data.folder=~/my {pictures}, all"]).data
    assert [source.folder for source in data.sources] == ["~/my {pictures}, all"]
    assert not data.demo and data.shards is None and data.val_shards is None
    assert compose_train(["preset=paper", "data.folder=/x"]).data.sources[0].folder == "/x"
    for other in ("data.shards=/y", "data.sources=[{folder: /y}]"):
        user_error("both data.folder and", compose_train, ["data.folder=/x", other])
