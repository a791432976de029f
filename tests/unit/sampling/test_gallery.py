"""Images on disk, the page, contact sheets, and the manifest."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import user_error
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


def test_png_carries_its_metadata_and_pixels(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    size = save_png(tmp_path / "00000.png", image, {"prompt": PROMPT, "seed": 3, "settings": {"steps": 4}})
    with Image.open(tmp_path / "00000.png") as read:
        assert np.array_equal(np.asarray(read), image)
        assert read.info["prompt"] == PROMPT
        assert json.loads(read.info["settings"]) == {"steps": 4} and read.info["seed"] == "3"
    assert size == (tmp_path / "00000.png").stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == ["00000.png"]


def sources(page: str) -> list[str]:
    return re.findall(r'<img[^>]* src="([^"]+)"', page)


def test_page_is_self_contained_escaped_and_complete(tmp_path: Path) -> None:
    rows = [
        record(tmp_path, "00000"),
        record(tmp_path, "00000_1", seed=4),
        record(tmp_path, "00001", picture(700, 600), prompt="large", negative_prompt="<b>blurry"),
    ]
    page = write_gallery(tmp_path, rows, "runs/a <&>").read_text(encoding="utf-8")
    text = html.unescape(re.sub(r"<[^>]*>", "", page))
    assert "<script" not in page and PROMPT in text and "<b>blurry" in text and "runs/a <&>" in text
    assert not re.search(r'(src|href)="(https?:|//)', page)
    assert [source.split(";")[0] for source in sources(page)] == ["data:image/png", "data:image/png", "data:image/jpeg"]
    assert re.findall(r'<a [^>]*href="([^"]+)"', page) == ["00000.png", "00000_1.png", "00001.png"]
    assert page.count("<article") == 2  # the images of one prompt share a card
    for word in ("seed 3", "seed 4", "700x600", "guidance 2.5", "step 9", "3 images, 2 prompts"):
        assert word in text
    assert page.count('class="tiny"') == 2 and "image-rendering: pixelated" in page


def test_large_runs_refer_to_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [record(tmp_path, f"{number:05d}", prompt=f"prompt {number}") for number in range(3)]
    monkeypatch.setattr(gallery, "MAX_EMBEDDED", 2)
    assert sources(write_gallery(tmp_path, rows, "t").read_text()) == ["00000.png", "00001.png", "00002.png"]


def test_contact_sheet_places_images_in_rows_with_labels_below() -> None:
    sheet = contact_sheet([np.full((8, 8, 3), value, np.uint8) for value in (10, 20, 30)], columns=2, scale=2, gap=4)
    assert sheet.size == (2 * 20 + 4, 2 * 20 + 4)
    assert [sheet.getpixel(at)[0] for at in ((4, 4), (24, 4), (4, 24), (24, 24))] == [10, 20, 30, 255]
    images = [np.full((40, 80, 3), 128, np.uint8)] * 3
    labels = (["", "", ""], ["a", "b", "c"], ["a", "many words that need several lines", "x" * 60])
    plain, short, long = (contact_sheet(images, columns=3, labels=one) for one in labels)
    assert plain.size[0] == short.size[0] == long.size[0] and plain.size[1] <= short.size[1] < long.size[1]
    pixels = np.asarray(long.convert("L"))
    assert pixels[50:, 8:16].min() < 128 and pixels[:, -8:].min() == 255  # text below, and none beyond the edge
    with pytest.raises(ValueError, match="3 images with 1 labels"):
        contact_sheet(images, 2, labels=["a"])


def append(path: Path, *rows: ImageRecord) -> None:
    manifest = Manifest(path)
    for row in rows:
        manifest.append(row)
    manifest.close()


def test_manifest_survives_a_cut_line_and_joins_in_order(tmp_path: Path) -> None:
    rows = {name: record(tmp_path, name) for name in ("00002", "00002_1", "00010", "100000")}
    cut = tmp_path / "manifest.rank1.jsonl"
    append(cut, rows["00010"])
    append(tmp_path / "manifest.rank0.jsonl", rows["100000"], rows["00002_1"])
    cut.write_bytes(cut.read_bytes() + b'{"name": "0000')
    assert list(read_manifests(tmp_path)) == ["00002_1", "00010", "100000"]
    append(cut, rows["00002"])
    assert merge_manifests(tmp_path) == list(rows.values()) == list(read_manifests(tmp_path).values())
    lines = (tmp_path / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["file"] for line in lines] == [f"{name}.png" for name in rows]
    assert json.loads(lines[0])["prompt"] == PROMPT and not list(tmp_path.glob("*rank*"))


def test_finished_images_must_be_whole_and_the_same(tmp_path: Path) -> None:
    rows = [record(tmp_path, name) for name in ("00000", "00001", "00002")]
    append(tmp_path / "manifest.jsonl", *rows)
    (tmp_path / "00001.png").unlink()
    (tmp_path / "00002.png").write_bytes(b"cut")
    wanted = [replace(row, bytes=0) for row in rows]
    assert finished_names(tmp_path, wanted) == {"00000"}
    changed = [replace(wanted[0], seed=4, settings={"steps": 5, "guidance": 2.5})]
    with pytest.raises(UserError, match=r"00000\.png was drawn with seed=3 \(now 4\); steps=4 \(now 5\).*output_dir="):
        finished_names(tmp_path, changed)


def test_foreign_images_are_not_overwritten(tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "00000.png")
    user_error(r"was not drawn by sample\.py", finished_names, tmp_path, [ImageRecord("00000", "p", None, 0, 16, 24)])
    ours = record(tmp_path, "00001")  # the process ended before its line was written
    assert finished_names(tmp_path, [ours]) == set()
