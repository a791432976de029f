"""Shards: what is written is read back; what is broken is named, counted or passed over."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from commands import user_error
from data_fixtures import as_json, encoded, picture, sample, shards_of, write_tar
from PIL import Image

from paradiffusion.data.index import index_shard, load_index, read_sample
from paradiffusion.data.shards import RawSample, expand_shards, write_shards
from paradiffusion.errors import UserError

IMAGE = encoded(picture(1, 40, 30), "JPEG")
CAPTION = as_json(captions={"short": "a cat"})


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text and text.endswith(".")
    return text


def test_round_trip(tmp_path: Path) -> None:
    samples = [sample(number) for number in range(25)]
    paths = write_shards(iter(samples), tmp_path / "a", 10)
    assert sorted((tmp_path / "a").iterdir()) == paths and [path.stem for path in paths] == ["000000", "000001", "000002"]
    again = write_shards(iter(samples), tmp_path / "b", 10)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths]
    index = load_index(paths)
    assert len(index) == 25 and index.kinds == ["short", "long"] and index.shard[-1] == 2
    for row in (0, 9, 10, 24, 13):
        read = read_sample(index, row)
        assert (read.key, read.image, read.extension) == (samples[row].key, samples[row].image, "png")
        expected = {kind: text.strip() for kind, text in samples[row].meta["captions"].items()}
        assert read.meta == samples[row].meta | {"captions": expected}
        assert (index.width[row], index.height[row]) == (samples[row].meta["width"], samples[row].meta["height"])
        assert list(index.words[row]) == [len(text.split()) for text in expected.values()]
    # An id is a function of the key and of the shard's name.
    other = load_index(write_shards((samples[n] for n in (7, 3, 5)), tmp_path / "c", 20))
    assert list(other.ids) == [index.ids[7], index.ids[3], index.ids[5]] and len(set(index.ids.tolist())) == 25


def test_writer_refuses_what_would_not_come_back(tmp_path: Path) -> None:
    for key, extension in (("a.b", "png"), ("/a", "png"), ("", "png"), ("a", "pyd")):
        with pytest.raises(ValueError):
            write_shards([RawSample(key, IMAGE, extension, {})], tmp_path, 5)
    with pytest.raises(ValueError, match="repeated"):
        write_shards([sample(1), sample(1)], tmp_path, 5)
    assert not list(tmp_path.iterdir())


def test_layouts_of_others(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "web.tar",
        [
            ("./000.jpg", IMAGE), ("./000.json", as_json(caption="from json", width=7)), ("./000.txt", b"from\n text"),
            ("sub/001.JPEG", IMAGE), ("sub/001.json", as_json(caption="only json here")),
            ("002.webp", encoded(picture(2, 50, 70), "WEBP")), ("002.txt", "tout \u00e0 fait".encode()),
            ("003.png", IMAGE), ("003.json", as_json(captions={"long": "x y"}, caption="z"))
        ],
    )  # fmt: skip
    index = load_index([path])
    samples = [read_sample(index, row) for row in range(len(index))]
    assert [one.key for one in samples] == ["000", "sub/001", "002", "003"]
    assert [one.extension for one in samples] == ["jpg", "jpeg", "webp", "png"]
    assert [one.meta["captions"] for one in samples] == [
        {"short": "from text"}, {"short": "only json here"}, {"short": "tout \u00e0 fait"},
        {"long": "x y", "short": "z"},
    ]  # fmt: skip
    # The picture is believed, not what the JSON says of it.
    assert list(index.width) == [40, 40, 50, 40] and list(index.height) == [30, 30, 70, 30]


def test_names_with_dots_and_the_usual_forms_of_captions_in_tars(tmp_path: Path) -> None:
    members = [
        ("img.v1.07.png", IMAGE), ("img.v1.07.txt", b"with dots"), ("a.png", IMAGE), ("a.seg.png", IMAGE), ("a.caption", b"by kohya"),
        ("b.JFIF", IMAGE), ("b.json", b'{"prompt": "by prompt"}'), ("c.png", IMAGE), ("c.txt", "un caf\u00e9".encode("cp1252")),
        ("e.png", IMAGE), ("e.caption", b"by kohya"), ("e.txt", b"goes before it"),
        ("d.png", IMAGE), ("d.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        ("f.v2.JPG", IMAGE), ("f.v2.JPG.txt", b"behind the name"), ("g.jpeg", IMAGE), ("g.Text", b"in .text"), ("h.webp", IMAGE),
        ("h.Json", b'"a text alone"'),
    ]  # fmt: skip
    index = load_index([write_tar(tmp_path / "x.tar", members)])
    found = {index.key(row): read_sample(index, row).meta["captions"] for row in range(len(index))}
    assert found == {
        "img.v1.07": {"short": "with dots"}, "a": {"short": "by kohya"}, "b": {"short": "by prompt"},
        "c": {"short": "un caf\u00e9"}, "d": {}, "e": {"short": "goes before it"},
        "f.v2": {"short": "behind the name"}, "g": {"short": "in .text"}, "h": {"short": "a text alone"},
    }  # fmt: skip
    assert (index.stray, index.odd_text) == (1, 2)
    again = load_index([tmp_path / "x.tar"])  # from what was kept
    assert (again.stray, again.odd_text) == (1, 2)


def test_stray_and_hostile_members_are_passed_over(tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(marker),)

    bomb = pickle.dumps(Bomb())
    members = [
        ("good.png", IMAGE), ("good.json", CAPTION), ("good.pkl", bomb), ("good.pyd", bomb), ("good.pth", bomb),
        ("../../escape.png", IMAGE), ("../../escape.json", CAPTION), ("/root.png", IMAGE), ("._mac.png", b"x"),
        ("README", b"hello"), ("lonely.json", CAPTION), ("good.jpg", IMAGE), ("mask.seg.png", IMAGE),
    ]  # fmt: skip
    path = write_tar(tmp_path / "x.tar", members)
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    index = load_index([path])
    assert len(index) == 1 and index.without_image == 1 and index.stray == 11
    assert read_sample(index, 0).key == "good" and read_sample(index, 0).meta["captions"] == {"short": "a cat"}
    assert not marker.exists() and not (tmp_path.parent / "escape.png").exists()


def test_captions_of_wrong_types(tmp_path: Path) -> None:
    deep = b"[" * 100_000 + b"]" * 100_000
    contents = [
        b"{not json", b"[1, 2]", deep, b"\xff\xfe\x00", as_json(captions=["a", "b"]), as_json(captions={"short": 7}),
        as_json(captions={"short": {"text": "x"}, "long": None}), as_json(captions="plain"), as_json(caption=["a"]),
        as_json(captions={"short": "", "long": " \n\t "}), as_json(),
        as_json(captions={"short": "a\x00b\ud800 \u200bc"}), as_json(captions={"long": "word " * 5000}),
    ]  # fmt: skip
    members = [m for n, data in enumerate(contents) for m in ((f"{n:02d}.png", IMAGE), (f"{n:02d}.json", data))]
    index = load_index([write_tar(tmp_path / "x.tar", members)])
    assert len(index) == len(contents) and index.bad_json == 3
    assert np.flatnonzero(index.words[:11].any(axis=1)).tolist() == [4, 7, 8]  # a text, or a list's first, is the short caption
    assert read_sample(index, 2).meta == {"captions": {}}
    assert read_sample(index, 11).meta["captions"] == {"short": "a b c"}
    assert dict(zip(index.kinds, index.words[12], strict=True))["long"] == 5000

    members = [m for n in range(20) for m in ((f"{n}.png", IMAGE), (f"{n}.json", as_json(captions={f"id{n}": "text"})))]
    with pytest.raises(UserError, match="kinds of captions") as error:
        load_index([write_tar(tmp_path / "x.tar", members)])
    one_line(error)


def member_ends(path: Path) -> list[int]:
    """Where the blocks of each sample end."""
    ends: dict[str, int] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            ends[member.name.split(".")[0]] = member.offset_data + member.size
    return list(ends.values())


@pytest.mark.parametrize("share", [0.05, 0.3, 0.77, None])
def test_truncated_tar(tmp_path: Path, share: float | None) -> None:
    """Cut anywhere, or (None) on a boundary between two samples."""
    (path,) = write_shards((sample(n) for n in range(12)), tmp_path, 20)
    whole, ends = path.read_bytes(), member_ends(path)
    size = int(len(whole) * share) if share else -(-ends[1] // 512) * 512
    path.write_bytes(whole[:size])
    expected = sum(end <= size for end in ends)
    with pytest.raises(UserError, match=rf"cut short after {expected} whole.*data\.allow_truncated=true") as error:
        index_shard(path)
    assert str(path) in one_line(error)
    assert len(index_shard(path, allow_truncated=True).table) == expected
    user_error("cut short", index_shard, path)  # Also when the index is there already.
    if expected:
        index = load_index([path], allow_truncated=True)
        assert index.truncated == (path,)
        for row in range(expected):
            read = read_sample(index, row)
            assert read.image == sample(row).image and read.meta["captions"]["short"] == f"thing {row}"


@pytest.mark.parametrize("size", [-512, -1024, 1 << 80])
def test_a_tar_whose_header_leads_back_or_out_of_it_is_cut_short_there(size: int, tmp_path: Path) -> None:
    (path,) = write_shards((sample(n) for n in range(2)), tmp_path, 20)
    header = bytearray(tarfile.TarInfo("z.png").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (b"\xff" if size < 0 else b"\x80") + (size % (1 << 88)).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    end = member_ends(path)[-1]
    path.write_bytes(path.read_bytes()[: end + -end % 512] + bytes(header) + bytes(1024))
    user_error("cut short after 2 whole", index_shard, path)


@pytest.mark.parametrize(("content", "said"), [(os.urandom(5000), "uncompressed tar"), (b"", "cut short after 0")])
def test_not_a_tar(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        load_index([path])
    one_line(error)
    with pytest.raises(UserError, match="hold no sample"):
        load_index([write_tar(path, [("a.txt", b"no image")])])


def test_index_is_kept_and_checked(tmp_path: Path) -> None:
    paths = write_shards((sample(n) for n in range(8)), tmp_path, 20)
    first = load_index(paths)
    stored = tmp_path / "000000.index.npz"
    stamp = stored.stat().st_mtime_ns
    assert load_index(paths).fingerprint() == first.fingerprint() and stored.stat().st_mtime_ns == stamp
    whole = stored.read_bytes()
    central = whole.index(b"PK\x01\x02")
    flipped = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(central, central + 46)]
    array = io.BytesIO()
    np.save(array, np.zeros(3))
    # A flipped bit of the table of contents says, among others, that a member is encrypted or compressed by other means.
    for damage in (b"", b"PK\x03\x04 cut", whole[:300], array.getvalue(), *flipped):
        stored.write_bytes(damage)
        assert load_index(paths).fingerprint() == first.fingerprint()
    with np.load(stored, allow_pickle=False) as good:
        arrays = dict(good)
    np.savez(stored, **(arrays | {"kinds": np.array([Path("x")], dtype=object)}))  # A pickle inside is not loaded.
    assert load_index(paths).fingerprint() == first.fingerprint()
    os.utime(paths[0], ns=(1, 1))
    assert load_index(paths).fingerprint() == first.fingerprint()
    assert not [path for path in tmp_path.iterdir() if path.suffix not in (".tar", ".npz")]


def test_index_of_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_shards((sample(n) for n in range(3)), tmp_path / "data", 20)
    (tmp_path / "data" / "000000.index.npz").mkdir()  # Nothing can be written there, not even by root.
    monkeypatch.setenv("PARADIFFUSION_CACHE", str(tmp_path / "cache"))
    stamps = set()
    for _ in range(2):
        assert len(load_index(paths)) == 3
        stamps |= {path.stat().st_mtime_ns for path in (tmp_path / "cache" / "index").iterdir()}
    assert len(stamps) == 1
    monkeypatch.setenv("PARADIFFUSION_CACHE", str(paths[0] / "no folder"))
    assert len(load_index(paths)) == 3


def test_expand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/00000.tar", "a/00001.tar", "a/00002.tar", "b c/x{1}.tar", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    three = [tmp_path / "a" / f"0000{n}.tar" for n in range(3)]
    assert expand_shards(f"{tmp_path}/a/{{00000..00002}}.tar") == three
    assert expand_shards(str(tmp_path / "a")) == expand_shards(f"{tmp_path}/a/*") == three
    assert expand_shards([f"{tmp_path}/a/0000[01].tar", str(three[2]), str(three[0])]) == three
    assert expand_shards(f"{tmp_path}/b c/x{{1}}.tar") == [tmp_path / "b c/x{1}.tar"]
    monkeypatch.chdir(tmp_path)
    assert expand_shards("a") == [Path("a") / path.name for path in three]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("pipe:cat x.tar", "command"), ("nowhere://host/x", "does not know"), ("nowhere/*.tar", "matches no .tar"),
        ("nowhere/{000..009}.tar", "matches no .tar"), ("a/{00000..00004}.tar", "missing, the first one a/00001.tar"),
        ("a/{00000..", "brace"), ([], "empty"), ("{0..99999999999}.tar", "over 1000000"), ("empty", "matches no .tar"),
        ("memory://empty/", "matches no .tar"),
        ("https://host/{0..99999999}.tar", "over 1000000"), ("https://host/{0..9.tar", "brace")
    ],
)  # fmt: skip
def test_expand_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str | list[str], said: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    Path("empty").mkdir()
    Path("a/00000.tar").write_bytes(b"")
    with pytest.raises(UserError, match=said) as error:
        expand_shards(spec)
    one_line(error)


def test_a_shard_that_shrinks_after_indexing(tmp_path: Path) -> None:
    index = shards_of(tmp_path, 4)
    path = index.shards[0]
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(OSError, match="shorter"):
        read_sample(index, 3)


def test_upright_sizes(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(picture(0, 40, 30), "JPEG", exif=exif)
    broken = IMAGE[:10]
    huge_head = encoded(picture(0, 40, 30), "JPEG", comment=b"x" * 60_000, icc_profile=b"y" * 60_000)
    members = [("a.jpg", turned), ("a.txt", b"x"), ("b.jpg", broken), ("b.txt", b"x"), ("c.jpg", huge_head)]
    index = load_index([write_tar(tmp_path / "x.tar", members)])
    assert list(index.width) == [30, 0, 40] and list(index.height) == [40, 0, 30]
    assert json.loads(json.dumps(read_sample(index, 1).meta)) == {"captions": {"short": "x"}}
