"""Tables as spreadsheets, pandas and hubs write them, and what is refused in them."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_fixtures import encoded, picture

from paradiffusion.curation.building.build import build
from paradiffusion.curation.building.build_options import BuildOptions
from paradiffusion.curation.building.build_report import Report
from paradiffusion.curation.building.places import Dropped, FetchLimits, Place, Reader
from paradiffusion.data.index import load_index, read_sample
from paradiffusion.data.shards import RawSample, expand_shards
from paradiffusion.errors import UserError


def image(number: int) -> bytes:
    return encoded(picture(number, 72, 64))


class Table:
    """A folder with a.png, b.png and sub/c.png, in which tables are built from."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.builds = folder / "in", 0
        (self.folder / "sub").mkdir(parents=True)
        for number, name in enumerate(("a", "b", "sub/c")):
            (self.folder / f"{name}.png").write_bytes(image(number))

    def build(
        self, name: str, content: str | bytes | dict[str, Any], **options: Any
    ) -> tuple[Report, dict[str, RawSample]]:
        path = self.folder / name
        if isinstance(content, dict):
            pq.write_table(pa.table(content), path, row_group_size=2)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        self.builds += 1
        output = self.folder.parent / f"out{self.builds}"
        report = build(BuildOptions(input=str(path), output=str(output), **{"processes": 1, **options}))
        if not report.kept:
            return report, {}
        index = load_index(expand_shards(output))
        return report, {index.key(row): read_sample(index, row) for row in range(len(index))}

    def captions(self, name: str, content: str | bytes | dict[str, Any], **options: Any) -> dict[str, dict[str, str]]:
        return {key: sample.meta["captions"] for key, sample in self.build(name, content, **options)[1].items()}


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return Table(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "path;caption\na.png;some words, and a comma\n",
        "sep=;\r\npath;caption\r\na.png;some words, and a comma\r\n",
        "path\tcaption\na.png\tsome words, and a comma\n",
        "path\tcaption\r\na.png\tsome words, and a comma\r\n".encode("utf-16"),
        '\ufeffpath,caption\r\na.png,"some words,\r\nand a comma"\r\n',
        'path,caption\ra.png,"some words,\rand a comma"\r',
        ',path,caption\n0,a.png,"some words, and a comma"\n',  # pandas' index
        'path,caption\na.png,"some words, and a comma",\n',
        'path,caption,,\na.png,"some words, and a comma",,\n',
    ],
)
def test_what_spreadsheets_write(content: str | bytes, table: Table) -> None:
    assert table.captions("t.csv", content) == {"a": {"short": "some words, and a comma"}}


@pytest.mark.parametrize(
    ("name", "content", "column"),
    [
        ("t.csv", "path,caption,caption\na.png,one,two\n", "caption"),
        ("t.tsv", "path\tcaption\tpath\na.png\tone\ta.png\n", "path"),
        ("t.jsonl", '{"path": "b.png", "text": "x"}\n\n{"path": "a.png", "text": "one", "text": "two"}\n', "text"),
        ("t.json", '{"a.png": "one", "a.png": "two"}', "a.png"),
        ("t.parquet", pa.table([["a.png"], ["one"], ["two"]], names=["path", "caption", "caption"]), "caption"),
    ],
)
def test_two_columns_of_one_name_are_refused(name: str, content: Any, column: str, table: Table) -> None:
    if isinstance(content, pa.Table):
        buffer = io.BytesIO()
        pq.write_table(content, buffer)
        content = buffer.getvalue()
    with pytest.raises(
        UserError, match=f"has '{column}' twice{' in one object .line 3.' if name == 't.jsonl' else ''}"
    ):
        table.build(name, content)
    assert not (table.folder.parent / "out1" / "build.json").exists()


def test_rows_are_called_as_an_editor_counts_them(table: Table) -> None:
    gone = "there is no such file"
    report, _ = table.build("t.csv", '\npath,caption\na.png,"two\nlines"\ngone.png,x y\n')
    assert report.examples["no image"] == [f"t.csv line 5 (gone.png): {gone}"]
    report, _ = table.build("t.jsonl", '\n{"file": "gone.png", "text": "x y"}\n')
    assert report.examples["no image"] == [f"t.jsonl line 2 (gone.png): {gone}"]
    report, _ = table.build("t.json", '[{"file": "gone.png", "text": "x y"}]')
    assert report.examples["no image"] == [f"t.json row 1 (gone.png): {gone}"]
    report, _ = table.build("t.parquet", {"file": ["a.png", "gone.png"], "text": ["x y", "x y"]})
    assert report.examples["no image"] == [f"t.parquet row 2 (gone.png): {gone}"]


def test_a_quote_that_is_not_closed_is_said_to_be_one(table: Table) -> None:
    rows = "".join(f"b{number}.png,some words\n" for number in range(1500))
    report, found = table.build("t.csv", f'path,caption\na.png,fine words\nb.png,"never closed\n{rows}')
    assert list(found) == ["a"] and report.dropped == {"row cannot be read": 1}
    assert "line 3: it goes on for 1501 lines: a quote is not closed" in report.examples["row cannot be read"][0]


def test_values_that_are_missing_are_no_captions(table: Table) -> None:
    content = "path,caption\na.png,nan\nb.png,<NA>\nsub/c.png,a nan bread\n"
    report, found = table.build("t.csv", content)
    assert report.dropped == {"caption is a missing value": 2} and set(found) == {"sub/c"}


def test_cells_that_hold_json(table: Table) -> None:
    lists = 'path,caption\na.png,"[""a dog"", ""a lawn""]"\nb.png,[sic] as it stands\n'
    assert table.captions("t.csv", lists) == {"a": {"short": "a dog, a lawn"}, "b": {"short": "[sic] as it stands"}}
    objects = 'path,all\na.png,"{""long"": {""en"": ""in many words""}}"\nb.png,none of it\n'
    assert table.captions("t.csv", objects, captions="{all.long.en: long}") == {"a": {"long": "in many words"}}
    own = 'path,captions\na.png,"{""long"": ""in many words""}"\nb.png,plain words\n'
    assert table.captions("t.csv", own) == {"a": {"long": "in many words"}, "b": {"short": "plain words"}}


def test_paths_written_on_windows(table: Table) -> None:
    assert table.captions("t.csv", "path,caption\nsub\\c.png,some words\n") == {"sub/c": {"short": "some words"}}


def test_a_table_without_rows_is_said_to_be_one(table: Table) -> None:
    for name, content in (("t.csv", "path,caption\n"), ("t.csv", ""), ("t.jsonl", "no JSON\n")):
        with pytest.raises(UserError, match="holds no row that can be read"):
            table.build(name, content)


def test_the_picture_among_columns_of_bytes(table: Table) -> None:
    pictures = [{"bytes": image(number), "path": None} for number in range(2)]
    masks = [{"bytes": b"a mask", "path": None}] * 2
    texts = ["some words", "other words"]
    report, found = table.build("t.parquet", {"conditioning_image": masks, "image": pictures, "text": texts})
    assert report.kept == 2 and {sample.image for sample in found.values()} == {image(0), image(1)}
    with pytest.raises(UserError, match="several columns that may hold images, left, right: say which with image="):
        table.build("t.parquet", {"left": pictures, "right": pictures, "text": texts})
    # Text that was written as bytes is text.
    content = {"jpg": [image(0), image(1)], "caption": [text.encode() for text in texts]}
    assert sorted(value["short"] for value in table.captions("t.parquet", content).values()) == sorted(texts)
    content = {"pixels": [image(0), image(1)], "words": [text.encode() for text in texts]}
    found_words = table.captions("t.parquet", content, captions="{words: long}")
    assert sorted(value["long"] for value in found_words.values()) == sorted(texts)


def test_columns_that_nobody_asked_for_are_not_read(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    before = pq.ParquetFile.iter_batches

    def noted(self: pq.ParquetFile, *arguments: Any, **options: Any) -> Any:
        asked.append(sorted(options["columns"]))
        return before(self, *arguments, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", noted)
    content = {
        "path": ["a.png"],
        "caption": ["some words"],
        "embedding": [[0.5] * 9],
        "score": [5],
        "meta": [{"t": "x y"}],
    }
    _, found = table.build("t.parquet", content, keep="[score]", captions="{caption: short, meta.t: long}")
    assert found["a"].meta["extra"] == {"score": 5} and found["a"].meta["captions"]["long"] == "x y"
    assert asked == [["caption", "meta", "path", "score"]]


def test_a_table_that_is_refused_late_may_be_mended(table: Table) -> None:
    rows = [f'{{"path": "{name}.png", "text": "some words"}}\n' for name in ("a", "b") * 60]
    with pytest.raises(UserError, match="line 121"):
        table.build("t.jsonl", "".join(rows) + '{"path": "a.png", "text": "x y", "text": "z y"}\n')
    table.builds -= 1  # into the same output
    assert table.build("t.jsonl", "".join(rows))[0].kept == 2


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


def test_a_lone_return_within_a_line_is_damage(table: Table) -> None:
    """And no end of a line, after which a caption would be cut."""
    kept = table.captions("in.csv", "path,caption\r\na.png,some\rwords here\r\nb.png,other words here\r\n")
    assert kept == {"b": {"short": "other words here"}}


def test_semicolons_in_a_name_are_no_delimiters(table: Table) -> None:
    kept = table.captions("in.csv", "path,caption,tags (x;y;z;w)\na.png,some words here,x\n")
    assert kept == {"a": {"short": "some words here"}}


def test_a_named_path_comes_before_unknown_bytes(table: Table) -> None:
    content = {"path": ["a.png"], "caption": ["some words here"], "md5": [b"\x01\x02"]}
    assert table.captions("in.parquet", content) == {"a": {"short": "some words here"}}


def test_the_bytes_within_a_column_may_be_named(table: Table) -> None:
    content = {"image": [{"bytes": image(9), "path": None}], "caption": ["some words here"]}
    report, samples = table.build("in.parquet", content, image="image.bytes")
    assert report.kept == 1 and [sample.image for sample in samples.values()] == [image(9)]


def test_a_picture_in_text_does_not_flood_the_report(table: Table) -> None:
    row = json.dumps({"image": "A" * 30_000, "caption": "some words here"})
    report, _ = table.build("in.jsonl", row + "\n")
    assert not report.kept and len(json.dumps(asdict(report))) < 3000
    assert "embedded pictures are read from Parquet" in json.dumps(asdict(report))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"format": "folder", "image": "noimage"}, "image=noimage is of no use for format=folder"),
        ({"format": "folder", "root": "."}, "root=. is of no use for format=folder"),
    ],
)
def test_options_that_nothing_reads_are_refused(table: Table, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        build(BuildOptions(input=str(table.folder), output=str(table.folder.parent / "out"), **options))


def test_a_root_of_another_kind(table: Table) -> None:
    with pytest.raises(UserError, match=r"a\.png is no folder and no \.zip"):
        table.build("in.csv", "path,caption\na.png,some words here\n", root=str(table.folder / "a.png"))


def test_a_refused_table_leaves_a_folder_that_is_a_link(table: Table, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out1").symlink_to(tmp_path / "real")
    with pytest.raises(UserError, match="twice"):
        table.build("in.jsonl", '{"path": "a.png", "caption": "a", "caption": "b"}\n')
    assert list((tmp_path / "real").iterdir()) == []
