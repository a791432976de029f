"""Images on disk, the page, contact sheets, and the manifest."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paradiffusion.errors import UserError
from paradiffusion.sampling import gallery
from paradiffusion.sampling.gallery import (
    ImageRecord,
    Manifest,
    contact_sheet,
    finished_names,
    merge_manifests,
    read_manifests,
    save_png,
    write_gallery,
)

PROMPT = 'a <script>alert("1")</script> & "red" circle, 日本\nnext line' + " word" * 200


def picture(height: int = 16, width: int = 24, value: int = 0) -> np.ndarray:
    image = np.full((height, width, 3), value, np.uint8)
    image[:, : width // 2] = (255, 10, 20)
    return image


def record(folder: Path, name: str, image: np.ndarray | None = None, **values: object) -> ImageRecord:
    """Write an image and give its record."""
    image = picture() if image is None else image
    made = ImageRecord(name, PROMPT, None, 3, *image.shape[:2], {"steps": 4, "guidance": 2.5}, "runs/a", 9)
    made = replace(made, **values)
    return replace(made, bytes=save_png(folder / made.file, image, {"prompt": made.prompt, "checkpoint": "runs/a"}))


class Page(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def sources(self) -> list[str]:
        return [str(values["src"]) for tag, values in self.tags if tag == "img"]


def test_png_carries_its_metadata_and_pixels(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    size = save_png(tmp_path / "00000.png", image, {"prompt": PROMPT, "seed": 3, "settings": {"steps": 4}})
    with Image.open(tmp_path / "00000.png") as read:
        assert np.array_equal(np.asarray(read), image)
        assert read.info["prompt"] == PROMPT
        assert json.loads(read.info["settings"]) == {"steps": 4} and read.info["seed"] == "3"
    assert size == (tmp_path / "00000.png").stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == ["00000.png"]


def test_a_full_disk_leaves_the_old_image_and_no_rest(tmp_path: Path) -> None:
    save_png(tmp_path / "00000.png", picture(), {})
    before = (tmp_path / "00000.png").read_bytes()
    (tmp_path / ".00000.png.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        save_png(tmp_path / "00000.png", picture(value=9), {})
    assert (tmp_path / "00000.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["00000.png"]


def test_page_is_self_contained_escaped_and_complete(tmp_path: Path) -> None:
    rows = [
        record(tmp_path, "00000"),
        record(tmp_path, "00000_1", seed=4),
        record(tmp_path, "00001", picture(700, 600), prompt="large", negative_prompt="<b>blurry"),
    ]
    path = write_gallery(tmp_path, rows, "runs/a <&>")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert "<script" not in text and PROMPT in page.text and "<b>blurry" in page.text and "runs/a <&>" in page.text
    assert not re.search(r'(src|href)="(https?:|//)', text)
    sources = page.sources()
    assert [source.split(";")[0] for source in sources] == ["data:image/png", "data:image/png", "data:image/jpeg"]
    images = [values for tag, values in page.tags if tag == "img"]
    assert [values.get("class") for values in images] == ["tiny", "tiny", None]
    assert [values["href"] for tag, values in page.tags if tag == "a"] == ["00000.png", "00000_1.png", "00001.png"]
    assert sum(tag == "article" for tag, _ in page.tags) == 2  # the images of one prompt share a card
    assert all(
        word in page.text for word in ("seed 3", "seed 4", "700x600", "guidance 2.5", "step 9", "3 images, 2 prompts")
    )
    assert "image-rendering: pixelated" in text and "color-scheme: light dark" in text


def test_large_runs_refer_to_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [record(tmp_path, f"{number:05d}", prompt=f"prompt {number}") for number in range(3)]
    monkeypatch.setattr(gallery, "MAX_EMBEDDED", 2)
    assert Page(write_gallery(tmp_path, rows, "t").read_text()).sources() == ["00000.png", "00001.png", "00002.png"]


def test_contact_sheet_places_images_in_rows() -> None:
    images = [np.full((8, 8, 3), value, np.uint8) for value in (10, 20, 30)]
    sheet = contact_sheet(images, columns=2, scale=2, gap=4)
    assert sheet.size == (2 * 20 + 4, 2 * 20 + 4)
    corners = [(4, 4), (24, 4), (4, 24), (24, 24)]
    assert [sheet.getpixel(at)[0] for at in corners] == [10, 20, 30, 255]


def test_contact_sheet_wraps_labels_under_their_image() -> None:
    images = [np.full((40, 80, 3), 128, np.uint8)] * 3
    plain = contact_sheet(images, columns=3)
    short = contact_sheet(images, columns=3, labels=["a", "b", "c"])
    long = contact_sheet(images, columns=3, labels=["a", "many words that need several lines", "x" * 60])
    assert plain.size[0] == short.size[0] == long.size[0]
    assert plain.size[1] < short.size[1] < long.size[1]
    pixels = np.asarray(long.convert("L"))
    assert pixels[50:, 8:16].min() < 128 and pixels[:, -8:].min() == 255  # text below, and none beyond the edge
    with pytest.raises(ValueError, match="3 images with 1 labels"):
        contact_sheet(images, 2, labels=["a"])


def test_manifest_survives_a_cut_line_and_joins_in_order(tmp_path: Path) -> None:
    rows = {name: record(tmp_path, name) for name in ("00010", "00002_1", "00002", "100000")}
    for path, names in (("manifest.rank1.jsonl", ["00010"]), ("manifest.rank0.jsonl", ["100000", "00002_1"])):
        manifest = Manifest(tmp_path / path)
        for name in names:
            manifest.append(rows[name])
        manifest.close()
    cut = tmp_path / "manifest.rank1.jsonl"
    cut.write_bytes(cut.read_bytes() + b'{"name": "0000')
    assert list(read_manifests(tmp_path)) == ["00002_1", "00010", "100000"]
    manifest = Manifest(cut)
    manifest.append(rows["00002"])
    manifest.close()
    assert [row.name for row in merge_manifests(tmp_path)] == ["00002", "00002_1", "00010", "100000"]
    lines = (tmp_path / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["file"] for line in lines] == ["00002.png", "00002_1.png", "00010.png", "100000.png"]
    assert json.loads(lines[0])["prompt"] == PROMPT and not list(tmp_path.glob("*rank*"))
    assert list(read_manifests(tmp_path).values()) == [rows[n] for n in ("00002", "00002_1", "00010", "100000")]


def test_finished_images_must_be_whole_and_the_same(tmp_path: Path) -> None:
    rows = [record(tmp_path, name) for name in ("00000", "00001", "00002")]
    manifest = Manifest(tmp_path / "manifest.jsonl")
    for row in rows:
        manifest.append(row)
    manifest.close()
    (tmp_path / "00001.png").unlink()
    (tmp_path / "00002.png").write_bytes(b"cut")
    wanted = [replace(row, bytes=0) for row in rows]
    assert finished_names(tmp_path, wanted) == {"00000"}
    changed = [replace(wanted[0], seed=4, settings={"steps": 5, "guidance": 2.5})]
    with pytest.raises(UserError, match=r"00000\.png was drawn with seed=3 \(now 4\); steps=4 \(now 5\).*output_dir="):
        finished_names(tmp_path, changed)


def test_foreign_images_are_not_overwritten(tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "00000.png")
    with pytest.raises(UserError, match=r"was not drawn by sample\.py"):
        finished_names(tmp_path, [ImageRecord("00000", "p", None, 0, 16, 24)])
    ours = record(tmp_path, "00001")  # the process ended before its line was written
    assert finished_names(tmp_path, [ours]) == set()
