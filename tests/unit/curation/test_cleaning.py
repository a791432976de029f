"""Cleaning captions, and near-duplicates among hashes."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paradiffusion.curation.building.cleaning import clean_caption
from paradiffusion.curation.building.duplicates import near_duplicates
from paradiffusion.curation.building.items import Columns, key_of, pick_captions
from paradiffusion.data.captions import captions_of, count_words, decode_text


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("a  dog\n\ton\x00 a\u200b log ", "a dog on a log"),
        ("<p>a <b>red</b> house</p><br/>by the sea", "a red house by the sea"),
        ("salt &amp;amp; pepper &lt;3", "salt & pepper <3"),
        ("&lt;i&gt;slanted&lt;/i&gt; words", "slanted words"),
        ("<script>alert('x')</script>a lamp<!-- note --> shade", "a lamp shade"),
        ("5 < 6 and x<y, I <3 it", "5 < 6 and x<y, I <3 it"),
        ("write to Ann.Lee+x@mail.example.org about https://example.org/mill.jpg?x=1 now", "write to about now"),
        ("the schÃ¶n â€œquotedâ€\x9d word", "the schön “quoted” word"),
        ("一只红色的狐狸", "一只红色的狐狸"),
        ("lone \ud800surrogate and a pair \ud83e\udd8a", "lone surrogate and a pair 🦊"),
        ("a jpg file of a dog.png shirt", "a jpg file of a dog.png shirt"),
    ],
)
def test_what_a_caption_becomes(raw: str, expected: str) -> None:
    cleaned = clean_caption(raw)
    assert (cleaned.text, cleaned.problem) == (expected, "")
    again = clean_caption(expected)
    assert (again.text, again.mended) == (expected, [])
    assert bool(cleaned.mended) == (raw != expected)


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (" \n\x00", "empty caption"), ("<p></p>", "empty caption"), ("https://example.org/a.jpg", "caption is an address"),
        ("someone@example.org", "caption is an address"), ("IMG_20200101_123456.JPG", "caption is a file name"),
        ("DSC01234", "caption is a file name"), ("Screenshot 2020-01-01 at 10.22.png", "caption is a file name"),
        ("photos/2020/my holiday.jpeg", "caption is a file name"), ("C:\\pictures\\x.png", "caption is a file name"),
        ("-- ... --", "caption too short"), ("two words", "caption too short"), ("one two three four five six", "caption too long"),
    ],
)  # fmt: skip
def test_what_is_no_caption(raw: str, problem: str) -> None:
    cleaned = clean_caption(raw, min_words=1 if "." in raw and " " not in raw else 3, max_words=5)
    assert (cleaned.text, cleaned.problem) == ("", problem)


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_any_text_is_cleaned_to_one_line_of_text(raw: str) -> None:
    text = clean_caption(raw).text
    assert text == " ".join(text.split()) and text.encode("utf-8").decode() == text


def test_words_of_languages_without_spaces_are_signs() -> None:
    assert count_words("a  red, round thing") == 4 and count_words("un café") == 2
    assert count_words("一只红色的猫") == 6 and count_words("a 猫 and 犬") == 4 and count_words("รูป") == 3
    assert captions_of({"captions": {"long": "None", "short": "a nan"}}, b"") == {"short": "a nan"}


def test_encodings() -> None:
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        assert decode_text("grün 狐".encode(encoding))[0] == "grün 狐"
    assert decode_text("grün".encode("cp1252")) == ("grün", "cp1252")
    for text in ("Zwölf Äpfel – „süß“", "«l’été» à 20 °C, ½ mètre…", "col·lecció 3ª, Lego® 5×7",
                 "LEGO®Steine auf 3 m²Fläche, Düsseldorf•Köln, das„Wort“"):  # fmt: skip
        assert decode_text(text.encode("cp1252")) == (text, "cp1252")
    for data in (b"\x81\xff", "красный круг".encode("cp1251"), "红色的圆".encode("gb18030"), b"\x89PNG\0\0\0\r",
                 "кот и дом".encode("cp1251"), "žluťoučký kůň".encode("iso8859-2"), "naïve".encode("mac-roman"), "é".encode("utf-16")[:-1]):  # fmt: skip
        assert decode_text(data) == ("", "unknown"), "no guess is better than a wrong one"
    assert decode_text(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n") == ("", "unknown")
    assert decode_text("a red circle".encode("utf-16-be")) == ("a red circle", "utf-16-be")


@given(st.text(min_size=1), st.booleans())
@settings(max_examples=200, deadline=None)
def test_keys_are_ones_that_shards_take(name: str, is_path: bool) -> None:
    key = key_of(name, is_path)
    assert key and key.isascii() and "." not in key and not key.startswith("/") and key.rpartition("/")[2]
    assert len(key) < 200


def test_different_names_keep_different_keys() -> None:
    names = ["a b.png", "a_b.png", "a-b.png", "a/b.png", "a.b.png", "ä.png", "狐.png", "熊.png", "x" * 300, "x" * 301]
    assert len({key_of(name) for name in names}) == len(names)
    assert key_of("a/b.png") == "a/b" and key_of("./a/b.jpeg") == "a/b"


def test_columns_of_one_kind_are_joined() -> None:
    fields = {"label": "a fox", "tags": ["red", "", "quick"], "note": None, "deep": {"er": "text"}}
    columns = Columns({"label": "short", "tags": "short", "note": "clean", "deep.er": "long"})
    assert pick_captions(fields, columns, "column") == (
        {"short": "a fox, red, quick", "long": "text"},
        {"short": "column label + tags", "long": "column deep.er"},
    )


@given(st.data(), st.integers(0, 10))
@settings(max_examples=40, deadline=None)
def test_near_duplicates_are_what_comparing_all_pairs_finds(data: st.DataObject, distance: int) -> None:
    # Few bits that repeat in all bands, so that near ones are common.
    small = data.draw(st.lists(st.integers(0, (1 << 13) - 1), max_size=60))
    spread = data.draw(st.sampled_from([1, 0x1001001001, 0x8010020]))
    hashes = np.array([(value * spread) % (1 << 64) for value in small], np.uint64)
    found = near_duplicates(hashes, distance)
    kept: list[int] = []
    for number, value in enumerate(hashes.tolist()):
        close = [other for other in kept if (value ^ int(hashes[other])).bit_count() <= distance]
        assert (found[number] >= 0) == bool(close)
        assert not close or found[number] in close
        if not close:
            kept.append(number)


def test_near_duplicates_scale() -> None:
    """100,000 hashes at distance 4: 5 billion pairs, of which only those that share bands are looked at."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 1 << 63, 100_000, dtype=np.uint64)
    flips = np.uint64(1) << rng.integers(0, 63, 1000).astype(np.uint64)
    hashes[50_000:51_000] = hashes[:1000] ^ flips
    found = near_duplicates(hashes, 4)
    assert (found[50_000:51_000] == np.arange(1000)).all() and (found >= 0).sum() == 1000


@pytest.mark.parametrize("piece", ["<!--", "<script>", "a."])
def test_a_page_in_the_wrong_column_takes_no_time(piece: str) -> None:
    start = time.perf_counter()
    assert clean_caption(piece * 50_000).problem == "caption too long"
    assert time.perf_counter() - start < 1
