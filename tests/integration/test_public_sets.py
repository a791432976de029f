"""The commands of docs/data.md for public data sets, run as they stand on tiny look-alikes of what those sets publish."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from builds import pictures_site, write_table
from commands import ROOT
from data_fixtures import as_json, encoded, write_tar
from PIL import Image
from programs import script

from paradiffusion.data.index import load_index, read_sample
from paradiffusion.data.shards import expand_shards

SENTENCE = "a long wooden table by the window with two cups and a bowl of ripe oranges in the morning light"
WORDS = SENTENCE.split()


def text(number: int, words: int) -> str:
    return " ".join(WORDS[(number + at) % len(WORDS)] for at in range(words)) + "."


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    """A server of pictures, such as the addresses in a table point to."""
    with pytest.MonkeyPatch.context() as patched, pictures_site() as (address, _):
        patched.setenv("no_proxy", "*")
        yield address


def img2dataset(shard: int) -> list[tuple[str, bytes]]:
    members = []
    for number in range(4):
        key, words = f"{shard:05d}{number:04d}", text(number, 9)
        meta = as_json(key=key, status="success", url="", caption=words)
        members += [(f"{key}.jpg", picture(10 * shard + number)), (f"{key}.json", meta), (f"{key}.txt", words.encode())]
    return members


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory, web: str) -> Path:
    """What the download commands of the document leave, in miniature."""
    root = tmp_path_factory.mktemp("downloads")
    # Shards of img2dataset: cc12m's, and pd12m's, whose names begin at 00155 and which lie among its tables.
    for name, first in (("cc12m/cc12m-train-{:04d}.tar", 0), ("pd12m/{:05d}.tar", 155)):
        for shard in (first, first + 1):
            write_tar(root / name.format(shard), img2dataset(shard))
    (root / "pd12m/00155_stats.json").write_text("{}")

    rows = [
        {
            "uid": f"{number:032x}", "key": f"{number:09d}", "status": "success",
            "url": f"{web}/{number}.png" if number < 6 else f"{web}/gone.png",  # as a tenth of them are
            "original_caption": text(number, 8), "vlm_caption": text(number, 70),
        }
        for number in range(8)
    ]  # fmt: skip
    (root / "pixelprose/data").mkdir(parents=True)
    write_table(root / "pixelprose/data/vlm_captions_cc12m_00.parquet", rows)

    for subset in ("synthetic_enhanced_prompt_random_resolution", "curated"):
        members = []
        for number in range(5):
            meta = as_json(prompt=text(number, 12), enhanced_prompt=text(number, 60), image_generator="a model")
            members += [(f"{number:08d}.jpg", picture(40 + number + len(subset))), (f"{number:08d}.json", meta),
                        (f"{number:08d}.txt", text(number, 60).encode())]  # fmt: skip
        write_tar(root / f"fine-t2i/{subset}/train-000000.tar", members)

    (root / "docci/images").mkdir(parents=True)
    lines = []
    for number, split in enumerate(["train", "train", "train", "qual_dev", "test"]):
        name = f"{split}_{number:05d}.jpg"
        (root / "docci/images" / name).write_bytes(picture(70 + number))
        row = {"example_id": name[:-4], "split": split, "image_file": name, "description": text(number, 120)}
        lines.append(json.dumps(row) + "\n")
    (root / "docci/docci_descriptions.jsonlines").write_text("".join(lines))
    return root


def commands(script: str) -> list[str]:
    """The lines of the document's section on public sets that run ``script``."""
    section = (ROOT / "docs" / "data.md").read_text().partition("## Public sets")[2].partition("\n## ")[0]
    joined = re.sub(r"\\\n\s*", "", section)
    return [line.partition("  #")[0].strip() for line in joined.splitlines() if line.startswith(f"python {script}")]


def run_line(line: str) -> int:
    """The command in this process, in the folder that it is in."""
    _, program, *arguments = shlex.split(line)
    status: int = script(Path(program).stem).main(arguments)
    return status


def output_of(line: str) -> str:
    found = re.search(r"output=(\S+)", line)
    assert found is not None
    return found[1]


EXPECTED = {
    "pixelprose": ({"short", "long"}, 6, "long", 70),
    "fine-t2i": ({"short", "long"}, 5, "long", 60),
    "fine-t2i-curated": ({"clean"}, 5, "clean", 60),
    "docci": ({"clean"}, 5, "clean", 120),
}


@pytest.mark.parametrize("line", commands("scripts/build_shards.py"), ids=output_of)
def test_what_is_published_becomes_shards(line: str, downloads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {Path(output_of(one)).name for one in commands("scripts/build_shards.py")} == set(EXPECTED)
    monkeypatch.chdir(downloads)
    assert run_line(line) == 0
    kinds, count, kind, words = EXPECTED[Path(output_of(line)).name]
    folder = downloads / output_of(line)
    index = load_index(expand_shards([folder, *([folder / "val"] if (folder / "val").is_dir() else [])]))
    assert len(index) == count and set(index.kinds) == kinds
    assert all(len(read_sample(index, row).meta["captions"][kind].split()) == words for row in range(count))


@pytest.mark.parametrize(("name", "shards"), [("cc12m", ["cc12m-train-0000", "cc12m-train-0001"]), ("pd12m", ["00155", "00156"])])
def test_published_shards_are_used_as_they_are(downloads: Path, name: str, shards: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = [line for line in commands("scripts/index_shards.py") if f"shards={name} " in line]
    monkeypatch.chdir(downloads)
    assert run_line(line) == 0
    index = load_index(expand_shards(downloads / name))
    assert len(index) == 8 and index.kinds == ["short"] and index.tokens is not None
    assert index.bad_json == index.stray == index.without_image == 0
    assert sorted(path.name for path in (downloads / name).glob("*.npz")) == [f"{shard}.index.npz" for shard in shards]
    assert read_sample(index, 0).meta["captions"]["short"] == text(0, 9)


def picture(number: int) -> bytes:
    coarse = Image.fromarray(np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return encoded(coarse.resize((128, 96), Image.Resampling.BICUBIC), "JPEG", quality=92)
