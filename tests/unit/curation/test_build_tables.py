"""Tables as spreadsheets, pandas and hubs write them: what captions they come to, and what is refused in them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builds import captions, image, make, samples, write_table
from commands import user_error

from paradiffusion.curation.building.build import Report
from paradiffusion.curation.building.places import Dropped, FetchLimits, Place, Reader

Content = str | bytes | dict[str, Any] | pa.Table


class Table:
    """A folder with a.png, b.png and sub/c.png, in which tables are built from, each into an output of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.builds = folder / "in", 0
        (self.folder / "sub").mkdir(parents=True)
        for number, name in enumerate(("a", "b", "sub/c")):
            (self.folder / f"{name}.png").write_bytes(image(number))

    @property
    def output(self) -> Path:
        return self.folder.parent / f"out{self.builds}"

    def build(self, name: str, content: Content, **options: Any) -> Report:
        path = self.folder / name
        if isinstance(content, dict | pa.Table):
            pq.write_table(pa.table(content) if isinstance(content, dict) else content, path, row_group_size=2)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        self.builds += 1
        return make(path, self.output, **options)

    def captions(self, name: str, content: Content, **options: Any) -> dict[str, dict[str, str]]:
        return captions(self.output) if self.build(name, content, **options).kept else {}


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return Table(tmp_path)


ROWS: list[dict[str, Any]] = [
    {"path": "a.png", "title": "a first, with a comma", "story": "the long story of the first", "score": 5.5},
    {"path": "b.png", "title": "the second\nin two lines", "story": "", "score": 4.0},
    {"path": "missing.png", "title": "the third", "story": "x", "score": 3.0},
]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_tables_of_all_kinds(suffix: str, table: Table, tmp_path: Path) -> None:
    path, out = write_table(tmp_path / f"table{suffix}", ROWS), tmp_path / "out"
    report = make(path, out, root=str(table.folder), captions="{title: short, story: long}", keep="[score]")
    assert report.format == "table" and report.dropped == {"no image": 1}
    assert captions(out) == {
        "a": {"short": "a first, with a comma", "long": "the long story of the first"},
        "b": {"short": "the second in two lines"},
    }
    sample = samples(out)["a"]
    assert float(sample.meta["extra"]["score"]) == 5.5 and sample.image == image(0)
    assert sample.meta["caption_sources"] == {"short": "column title", "long": "column story"}


WORDS = {"a": {"short": "some words, and a comma"}}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("path;caption\na.png;some words, and a comma\n", WORDS),
        ("sep=;\r\npath;caption\r\na.png;some words, and a comma\r\n", WORDS),
        ("path\tcaption\r\na.png\tsome words, and a comma\r\n".encode("utf-16"), WORDS),
        ('\ufeffpath,caption\r\na.png,"some words,\r\nand a comma"\r\n', WORDS),
        ('path,caption\ra.png,"some words,\rand a comma"\r', WORDS),
        (',path,caption\n0,a.png,"some words, and a comma"\n', WORDS),  # pandas' index
        ('path,caption,,\na.png,"some words, and a comma",,\n', WORDS),
        ("path,caption,tags (x;y;z;w)\na.png,no delimiters in a name,x\n", {"a": {"short": "no delimiters in a name"}}),
        # A lone return within a line is damage, and no end of a line, after which a caption would be cut.
        ("path,caption\r\na.png,some\rwords\r\nb.png,other words\r\n", {"b": {"short": "other words"}}),
        ("path,caption\nsub\\c.png,written on Windows\n", {"sub/c": {"short": "written on Windows"}}),
        ("path,text,long_caption\na.png,a text,a long one\n", {"a": {"short": "a text", "long": "a long one"}}),
        ("path,caption\na.png,nan\nb.png,<NA>\nsub/c.png,a nan bread\n", {"sub/c": {"short": "a nan bread"}}),
        ("path,text\na.png,first words\na.png,again\n", {"a": {"short": "first words"}}),
        # Cells that hold JSON, and one that only begins like it.
        ('path,caption\na.png,"[""a dog"", ""a lawn""]"\nb.png,[sic] as it stands\n',
         {"a": {"short": "a dog, a lawn"}, "b": {"short": "[sic] as it stands"}}),
        ('path,captions\na.png,"{""long"": ""in many words""}"\n', {"a": {"long": "in many words"}}),
    ],
)  # fmt: skip
def test_what_spreadsheets_write(content: str | bytes, expected: dict[str, Any], table: Table) -> None:
    assert table.captions("t.csv", content) == expected


def test_captions_named_within_objects(table: Table) -> None:
    content = json.dumps({"a.png": "told", "b.png": {"caption": "as fields", "tags": ["x", "y"]}})
    found = table.captions("meta.json", content, captions="{caption: short, tags: short}")
    assert found == {"a": {"short": "told"}, "b": {"short": "as fields, x, y"}}
    objects = 'path,all\na.png,"{""long"": {""en"": ""in many words""}}"\nb.png,none of it\n'
    assert table.captions("t.csv", objects, captions="{all.long.en: long}") == {"a": {"long": "in many words"}}
    rows = "path,text,id\na.png,words here,x.1/y\nb.png,words there,x.2\n"
    assert all("." not in key for key in table.captions("t.csv", rows, key="id"))


def test_a_table_in_another_encoding_is_told(table: Table) -> None:
    report = table.build("t.csv", "path,text\nb.png,crème brûlée\n".encode("cp1252"))
    assert captions(table.output) == {"b": {"short": "crème brûlée"}} and report.mended == {"text not UTF-8, read as cp1252": 1}


def test_damaged_rows_are_counted(table: Table) -> None:
    report = table.build("t.csv", 'path,text\na.png,fine\nb.png,too,many\nc.png\n"b.png","fine\0 too"\n')
    assert report.dropped == {"row cannot be read": 2} and set(captions(table.output)) == {"a", "b"}
    report = table.build("t.jsonl", '{"path": "a.png", "text": "fine"}\n{"path": \n[1]\n\n{"path": "b.png", "text": 3}\n')
    assert report.dropped == {"row cannot be read": 2} and captions(table.output)["b"] == {"short": "3"}
    assert report.examples["row cannot be read"][0] == "t.jsonl line 2: no JSON object"
    rows = "".join(f"b{number}.png,some words\n" for number in range(1500))
    report = table.build("t.csv", f'path,caption\na.png,fine words\nb.png,"never closed\n{rows}')
    assert set(captions(table.output)) == {"a"} and report.dropped == {"row cannot be read": 1}
    assert "line 3: it goes on for 1501 lines: a quote is not closed" in report.examples["row cannot be read"][0]


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("t.csv", '\npath,caption\na.png,"two\nlines"\ngone.png,x y\n', "line 5"),
        ("t.jsonl", '\n{"file": "gone.png", "text": "x y"}\n', "line 2"),
        ("t.json", '[{"file": "gone.png", "text": "x y"}]', "row 1"),
        ("t.parquet", {"file": ["a.png", "gone.png"], "text": ["x y", "x y"]}, "row 2"),
    ],
)
def test_rows_are_called_as_an_editor_counts_them(name: str, content: Content, place: str, table: Table) -> None:
    report = table.build(name, content)
    assert report.examples["no image"] == [f"{name} {place} (gone.png): there is no such file"]


PICTURES = [{"bytes": image(number), "path": None} for number in range(2)]


@pytest.mark.parametrize(
    ("name", "content", "options", "said"),
    [
        ("t.csv", "path,caption,caption\na.png,one,two\n", {}, "has 'caption' twice"),
        ("t.jsonl", '{"path": "b.png", "text": "x"}\n\n{"path": "a.png", "text": "one", "text": "two"}\n', {},
         "has 'text' twice in one object .line 3."),
        ("t.json", '{"a.png": "one", "a.png": "two"}', {}, "has 'a.png' twice"),
        ("t.parquet", pa.table([["a.png"], ["x"], ["y"]], names=["path", "caption", "caption"]), {}, "has 'caption' twice"),
        ("t.csv", "path,caption\n", {}, "holds no row that can be read"),
        ("t.jsonl", "no JSON\n", {}, "holds no row that can be read"),
        ("bad.parquet", b"PAR1 nothing", {}, "no Parquet file"),
        ("bad.json", "{", {}, "no JSON"),
        ("t.csv", "path,words\na.png,something\n", {}, "path, words: say which with captions"),
        ("t.csv", "path,words\na.png,something\n", {"captions": "{wrods: short}"}, "captions= names the column 'wrods'"),
        ("t.csv", "path,words\na.png,x y\n", {"captions": "{words: short}", "image": "picture"}, "image= names"),
        ("t.parquet", {"left": PICTURES, "right": PICTURES, "text": ["x y", "x y"]}, {},
         "several columns that may hold images, left, right: say which with image="),
        ("t.parquet", {"path": pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff.png"]).buffers()), "caption": ["x y"]}, {},
         "none of its column's type"),
        ("t.csv", "path,caption\na.png,some words here\n", {"root": __file__}, r"\.py is no folder and no \.zip"),
        ("t.csv", "path,caption\na.png,some words here\n", {"format": "folder", "root": "."}, "root=. is of no use for format=folder"),
    ],
)  # fmt: skip
def test_a_wrong_table_is_one_sentence(name: str, content: Any, options: Any, said: str, table: Table) -> None:
    user_error(said, table.build, name, content, **options)
    assert not table.output.exists()


def test_a_table_that_is_refused_late_may_be_mended(table: Table) -> None:
    rows = [f'{{"path": "{name}.png", "text": "some words"}}\n' for name in ("a", "b") * 60]
    user_error("line 121", table.build, "t.jsonl", "".join(rows) + '{"path": "a.png", "text": "x y", "text": "z y"}\n')
    table.builds -= 1  # into the same output
    assert table.build("t.jsonl", "".join(rows)).kept == 2


def test_the_picture_among_columns_of_bytes(table: Table) -> None:
    masks, texts = [{"bytes": b"a mask", "path": None}] * 2, ["some words", "other words"]
    for content, options in (
        ({"conditioning_image": masks, "image": PICTURES, "text": texts}, {}),
        ({"image": PICTURES, "text": texts}, {"image": "image.bytes"}),
        # Text that was written as bytes is text.
        ({"jpg": [image(0), image(1)], "caption": [text.encode() for text in texts]}, {}),
        ({"pixels": [image(0), image(1)], "words": [text.encode() for text in texts]}, {"captions": "{words: short}"}),
    ):
        assert table.build("t.parquet", content, **options).kept == 2
        assert {one.image: one.meta["captions"]["short"] for one in samples(table.output).values()} == {
            image(0): "some words", image(1): "other words",
        }  # fmt: skip
    named = {"path": ["a.png"], "caption": ["some words here"], "md5": [b"\x01\x02"]}  # a path comes before unknown bytes
    assert table.captions("in.parquet", named) == {"a": {"short": "some words here"}}
    row = json.dumps({"image": "A" * 30_000, "caption": "some words here"})  # in text it does not flood the report
    report = json.dumps(asdict(table.build("in.jsonl", row + "\n")))
    assert len(report) < 3000 and "embedded pictures are read from Parquet" in report


def test_columns_that_nobody_asked_for_are_not_read(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    before = pq.ParquetFile.iter_batches

    def noted(self: pq.ParquetFile, *arguments: Any, **options: Any) -> Any:
        asked.append(sorted(options["columns"]))
        return before(self, *arguments, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", noted)
    content = {"path": ["a.png"], "caption": ["some words"], "embedding": [[0.5]], "score": [5], "meta": [{"t": "x y"}]}
    table.build("t.parquet", content, keep="[score]", captions="{caption: short, meta.t: long}")
    meta = samples(table.output)["a"].meta
    assert meta["extra"] == {"score": 5} and meta["captions"]["long"] == "x y"
    assert asked == [["caption", "meta", "path", "score"]]


def test_a_large_row_group_is_read_on_and_not_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"jpg": [bytes([number]) * 9 for number in range(100)]}), tmp_path / "t.parquet")
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", None)
    opened: list[int] = []
    before = pq.ParquetFile.iter_batches

    def noted(self: pq.ParquetFile, batch_size: int, *arguments: Any, **options: Any) -> Any:
        opened.append(batch_size)
        return before(self, batch_size, *arguments, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", noted)
    reader = Reader(FetchLimits(1 << 20))
    for number in (3, 4, 4, 60, 99, 5):
        assert reader.read(Place("cell", str(tmp_path / "t.parquet"), 0, number, "jpg")) == bytes([number]) * 9
    assert len(opened) == 2 and max(opened) < 100  # once from the start, and once more to go back
    with pytest.raises(Dropped, match="cannot be read"):
        reader.read(Place("cell", str(tmp_path / "t.parquet"), 0, 100, "jpg"))


def test_times_of_any_kind_in_a_parquet_table_do_no_harm(table: Table) -> None:
    columns = {
        "ns": pa.array([1_700_000_000_123_456_789], pa.timestamp("ns", tz="America/New_York")),
        "zone": pa.array([1], pa.timestamp("us", tz="Mars/Base")),
        "long": pa.array([2**62], pa.duration("ns")),
        "date": pa.array([2**60], pa.date64()),
    }
    assert table.build("t.parquet", {"path": ["a.png"], "caption": ["two words"], **columns}, keep="[ns]").kept == 1
    assert samples(table.output)["a"].meta["extra"] == {"ns": "2023-11-14 22:13:20.123456789"}
