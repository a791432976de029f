"""Captions of a sample: reading, cleaning, which kind is read, and when it is dropped."""

from __future__ import annotations

import codecs
import json
import re
import unicodedata
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from paradiffusion.errors import UserError
from paradiffusion.randomness import uniform, uniforms

# From short to long. A sample that lacks the drawn kind is read with the nearest kind that it has.
FAMILY: Final = ("short", "clean", "long", "varied")
_NEAREST: Final = {
    "long": ("long", "clean", "short"),
    "clean": ("clean", "long", "short"),
    "short": ("short", "clean", "long"),
    "varied": ("varied", "long", "clean", "short"),
}
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b\ufeff]")
LFS_POINTER: Final = b"version https://git-lfs.github.com/spec/"
# What is said of a text that is not in UTF-8, by its encoding.
ENCODING_NOTES: Final = {
    "cp1252": "text not UTF-8, read as cp1252", "unknown": "text in an encoding that cannot be told, left out",
}  # fmt: skip
_MARKS: Final = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16's, which is its beginning
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# What is written with other letters than Latin ones has runs of bytes that are no ASCII, three letters or four of any kind.
_FOREIGN = re.compile(rb"[\x80-\xff]{4}|[\xc0-\xff]{3}")
# Signs that stand before small letters, in a word, where Central European text, or that of old Macs and DOS, is read as
# Windows-1252.
_SIGNS: Final = r"\xa1-\xa3\xa5\xa6\xa9\xab\xac\xae-\xb3\xb6\xb9\xbb-\xbf\u201a\u201e\u2020-\u2022\u02c6\u2030\u2039\u203a\u02dc"
_WITHIN = re.compile(rf"[^\W\d_][{_SIGNS}][a-z\xdf-\xff]")
# What programs write for a cell without a value.
MISSING: Final = re.compile(r"nan|none|null|n/a|<na>|#n/a|undefined", re.IGNORECASE)
# Signs of languages that put no spaces between words: Chinese, Japanese, Thai, Lao, Khmer, Burmese.
_UNSPACED: Final = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
# Soft hyphens, word joiners, marks of writing direction and the like. The joiner within an emoji is a part of it.
_INVISIBLE = re.compile(r"[\u00ad\u061c\u180e\u200e\u200f\u202a-\u202e\u2060-\u206f\ufff9-\ufffb]")


def decode_text(data: bytes) -> tuple[str, str]:
    """Text and its encoding: by its byte order mark, else UTF-8, UTF-16 or Windows-1252 ("cp1252"); "" and "unknown" for what none
    of them explains, and for a Git LFS pointer in a text's place."""
    if data.startswith(LFS_POINTER):
        return "", "unknown"
    mark, marked = next(((mark, [encoding]) for mark, encoding in _MARKS if data.startswith(mark)), (b"", []))
    zeros = {"utf-16-le": data[1::2], "utf-16-be": data[::2]}  # of Latin letters, every other byte
    wide = [name for name, part in zeros.items() if part.count(0) * 2 > len(part)]
    last = ["cp1252"] if b"\0" not in data and not _FOREIGN.search(data) else []
    for encoding in marked or wide or ["utf-8", *last]:
        with suppress(UnicodeDecodeError):
            text = data[len(mark) :].decode(encoding)
            if encoding != "cp1252" or not _WITHIN.search(text):
                return text, encoding
    return "", "unknown"


def is_odd(*texts: bytes) -> bool:
    """Whether any of a sample's texts is in another encoding than UTF-8."""
    return any(text and decode_text(text)[1] != "utf-8" for text in texts)


def clean(text: str) -> str:
    """``text`` as it is read, of captions in training and of prompts: on one line, control characters as spaces, runs of white
    space as one, accents composed (NFC), without invisible characters and lone surrogates.

    Surrogates, which a JSON file may hold, would stop the tokeniser.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFC", _INVISIBLE.sub("", text.encode("utf-8", "ignore").decode()))
    return " ".join(_CONTROL.sub(" ", text).split())


def count_words(text: str) -> int:
    """Words between spaces; of languages without them each sign, which is about a token."""
    return len((text if text.isascii() else _UNSPACED.sub(r" \g<0> ", text)).split())


def parse_meta(data: bytes) -> dict[str, Any] | None:
    """The object in a sample's JSON, of a text or a list one with it as the caption; None where there is none."""
    try:
        meta = json.loads(decode_text(data)[0])
    except (ValueError, RecursionError):
        return None
    return meta if isinstance(meta, dict) else {"caption": meta} if isinstance(meta, str | list) else None


def captions_of(meta: dict[str, Any], text: bytes) -> dict[str, str]:
    """The cleaned captions by kind, none empty or "nan": the JSON's "captions", with "short" from the text, or from the JSON's "caption",
    "text" or "prompt"; of a list the first."""
    captions = meta.get("captions")
    found = dict(captions) if isinstance(captions, dict) else {}
    named = [captions, *(meta.get(name) for name in ("caption", "text", "prompt"))]
    texts = (one[0] if isinstance(one, list) and one else one for one in named)
    found.setdefault("short", decode_text(text)[0] or next((one for one in texts if isinstance(one, str) and one.strip()), ""))
    cleaned = {kind: clean(value) for kind, value in found.items() if kind and isinstance(value, str)}
    return {kind: value for kind, value in cleaned.items() if value and not MISSING.fullmatch(value)}


def drawable_kinds(kinds: list[str]) -> list[str]:
    """What can be drawn from data that has ``kinds``: those, then what may be asked for and is always fallen back from."""
    return [*kinds, *(name for name in FAMILY if name not in kinds)]


def draw_kinds(kinds: list[str], weights: dict[str, float], seed: int, epoch: int, ids: np.ndarray) -> np.ndarray:
    """Draw a caption kind for each of the samples ``ids`` (uint64 [N]), whatever captions they have.

    A function of (seed, epoch, sample id). Returns int8 [N], indices into ``drawable_kinds(kinds)``. Raises UserError for weights of a
    kind that exists nowhere.
    """
    drawable = check_weights(kinds, weights)
    shares = np.cumsum([weights[kind] for kind in drawable])
    drawn = np.searchsorted(shares[:-1] / shares[-1], uniforms(ids, "caption kind", seed, epoch), side="right")
    names = drawable_kinds(kinds)
    return np.array([names.index(kind) for kind in drawable], np.int8)[drawn]


def settle_kinds(words: np.ndarray, kinds: list[str], weights: dict[str, float], drawn: np.ndarray) -> np.ndarray:
    """The kind that each sample is read with, given the one ``drawn`` (int8 [N], see ``draw_kinds``).

    ``words`` is int [N, K], the words of each sample's caption of each of the K ``kinds`` (0: it has none). Returns int8
    [N], indices into ``kinds``, -1 where a sample has no caption at all. Where the drawn kind is absent, the nearest
    weighted kind is taken (long, clean, short in the order of length), then any other.
    """
    chosen = np.full(len(words), -1, np.int8)
    for number, kind in enumerate(drawable_kinds(kinds)):
        todo = np.flatnonzero(drawn == number)
        for candidate in _candidates(kind, kinds, weights) if len(todo) else ():
            column = kinds.index(candidate)
            there = words[todo, column] > 0
            chosen[todo[there]] = column
            todo = todo[~there]
    return chosen


def choose_kinds(words: np.ndarray, kinds: list[str], weights: dict[str, float], seed: int, epoch: int, ids: np.ndarray) -> np.ndarray:
    """The caption kind that each sample is read with: drawn (``draw_kinds``), then settled (``settle_kinds``)."""
    return settle_kinds(words, kinds, weights, draw_kinds(kinds, weights, seed, epoch, ids))


@dataclass(frozen=True)
class KindShares:
    """``read``: share of the samples by the kind they are read with. ``fell_back``: of those for which a kind is drawn,
    the share that is read with another one; by the kind drawn."""

    read: dict[str, float]
    fell_back: dict[str, float]


def expected_shares(words: np.ndarray, kinds: list[str], weights: dict[str, float]) -> KindShares:
    """What ``weights`` come to over samples with captions of ``words`` (int [N, K]), fall-backs told, by expectation."""
    words = words[words.any(axis=1)]  # Samples without a caption are not read.
    count, total = max(len(words), 1), sum(weights.values())
    read: dict[str, float] = {}
    fell_back: dict[str, float] = {}
    for kind in check_weights(kinds, weights):
        drawn = np.full(len(words), drawable_kinds(kinds).index(kind), np.int8)
        settled = settle_kinds(words, kinds, weights, drawn)
        for column in np.unique(settled):
            part = float((settled == column).sum()) / count
            read[kinds[column]] = read.get(kinds[column], 0.0) + part * weights[kind] / total
        fell_back[kind] = float((settled != drawn).sum()) / count
    return KindShares(read, fell_back)


def is_dropped(seed: int, step: int, slot: int, probability: float) -> bool:
    """Whether the caption in ``slot`` of the global batch of ``step`` is replaced by the empty one."""
    return uniform("caption dropout", seed, step, slot) < probability


def _candidates(kind: str, kinds: list[str], weights: dict[str, float]) -> list[str]:
    """The kinds to try for a draw of ``kind``, the best first; only such as the data has."""
    ordered = [kind, *_NEAREST.get(kind, ()), *FAMILY, *kinds]
    weighted = [name for name in ordered if weights.get(name, 0) > 0]
    return [name for name in dict.fromkeys([kind, *weighted, *ordered]) if name in kinds]


def check_weights(kinds: list[str], weights: dict[str, float]) -> list[str]:
    """The kinds that are drawn, in the order of ``weights``. Raises UserError for a kind that exists nowhere."""
    known = drawable_kinds(kinds)
    if unknown := next((name for name in weights if name not in known), None):
        raise UserError(f"The caption kind {unknown!r} is in no sample: choose among {', '.join(known)} in data.captions.")
    return [name for name, weight in weights.items() if weight > 0]
