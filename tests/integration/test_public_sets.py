"""The commands of docs/data.md for public data sets, run as they stand on tiny look-alikes of what those sets publish."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import ROOT
from PIL import Image

from paradiffusion.data.index import load_index, read_sample
from paradiffusion.data.shards import expand_shards

SENTENCE = "a long wooden table by the window with two cups and a bowl of ripe oranges in the morning light"
WORDS = SENTENCE.split()


def picture(number: int, side: int = 96) -> bytes:
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    file = io.BytesIO()
    coarse.resize((side * 4 // 3, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=92)
    return file.getvalue()


def text(number: int, words: int) -> str:
    return " ".join(WORDS[(number + at) % len(WORDS)] for at in range(words)) + "."


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of pictures, such as the addresses in a table point to."""
    folder = tmp_path_factory.mktemp("web")
    for number in range(6):
        (folder / f"{number}.jpg").write_bytes(picture(100 + number))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def img2dataset(shard: int) -> dict[str, bytes]:
    members = {}
    for number in range(4):
        key = f"{shard:05d}{number:04d}"
        meta = {"key": key, "status": "success", "url": "", "caption": text(number, 9)}
        members |= {
            f"{key}.jpg": picture(10 * shard + number),
            f"{key}.json": json.dumps(meta).encode(),
            f"{key}.txt": text(number, 9).encode(),
        }
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

    table = {
        "uid": [f"{number:032x}" for number in range(8)],
        "url": [f"{web}/{number}.jpg" for number in range(8)],  # the last two are gone, as a tenth of them are
        "key": [f"{number:09d}" for number in range(8)],
        "status": ["success"] * 8,
        "original_caption": [text(number, 8) for number in range(8)],
        "vlm_caption": [text(number, 70) for number in range(8)],
    }
    (root / "pixelprose/data").mkdir(parents=True)
    pq.write_table(pa.table(table), root / "pixelprose/data/vlm_captions_cc12m_00.parquet")

    for subset in ("synthetic_enhanced_prompt_random_resolution", "curated"):
        members = {}
        for number in range(5):
            meta = {"prompt": text(number, 12), "enhanced_prompt": text(number, 60), "image_generator": "a model"}
            members |= {
                f"{number:08d}.jpg": picture(40 + number + len(subset)),
                f"{number:08d}.json": json.dumps(meta).encode(),
                f"{number:08d}.txt": text(number, 60).encode(),
            }
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


def run_line(line: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    _, script, *arguments = shlex.split(line)
    program = [sys.executable, str(ROOT / script), *arguments]
    return subprocess.run(
        program, cwd=cwd, env={**os.environ, "no_proxy": "*"}, capture_output=True, text=True, timeout=300, check=False
    )


EXPECTED = {
    "pixelprose": ({"short", "long"}, 6, "long", 70),
    "fine-t2i": ({"short", "long"}, 5, "long", 60),
    "fine-t2i-curated": ({"clean"}, 5, "clean", 60),
    "docci": ({"clean"}, 5, "clean", 120),
}


@pytest.mark.parametrize("line", commands("scripts/build_shards.py"))
def test_what_is_published_becomes_shards(line: str, downloads: Path) -> None:
    output = re.search(r"output=(\S+)", line)
    assert output is not None
    done = run_line(line, downloads)
    assert done.returncode == 0, done.stderr
    kinds, count, kind, words = EXPECTED[Path(output[1]).name]
    folder = downloads / output[1]
    index = load_index(expand_shards([folder, *([folder / "val"] if (folder / "val").is_dir() else [])]))
    assert len(index) == count and set(index.kinds) == kinds
    assert all(len(read_sample(index, row).meta["captions"][kind].split()) == words for row in range(count))


def test_every_set_of_the_document_was_tried() -> None:
    names = {
        Path(match[1]).name
        for line in commands("scripts/build_shards.py")
        if (match := re.search(r"output=(\S+)", line))
    }
    assert names == set(EXPECTED)


@pytest.mark.parametrize(
    ("name", "shards"), [("cc12m", ["cc12m-train-0000", "cc12m-train-0001"]), ("pd12m", ["00155", "00156"])]
)
def test_published_shards_are_used_as_they_are(downloads: Path, name: str, shards: list[str]) -> None:
    (line,) = [line for line in commands("scripts/index_shards.py") if f"shards={name} " in line]
    done = run_line(line, downloads)
    assert done.returncode == 0, done.stderr
    index = load_index(expand_shards(downloads / name))
    assert len(index) == 8 and index.kinds == ["short"] and index.tokens is not None
    assert index.bad_json == index.stray == index.without_image == 0
    assert sorted(path.name for path in (downloads / name).glob("*.npz")) == [f"{shard}.index.npz" for shard in shards]
    assert read_sample(index, 0).meta["captions"]["short"] == text(0, 9)
