"""Cleaning captions as the web, spreadsheets and old tools leave them, with a word for everything that was mended."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import ftfy

from paradiffusion.data.captions import MISSING, clean, count_words

_FIX: Final = ftfy.TextFixerConfig(
    unescape_html=False,  # done below, and counted
    uncurl_quotes=False,
    fix_latin_ligatures=False,
    fix_character_width=False,
    remove_control_chars=False,
    normalization="NFC",
)
_UNSEEN: Final = re.compile(r"<(script|style)\b[^<>]*>.*?</\1\s*>|<!--.*?-->", re.IGNORECASE | re.DOTALL)
# A letter must follow, and no other "<": "a < b" and "<3" are text.
_TAG: Final = re.compile(r"</?[a-zA-Z][a-zA-Z0-9:-]*(?:\s[^<>]*)?/?>|<![a-zA-Z][^<>]*>")
_URL: Final = re.compile(r"\b(?:https?|ftp)://\S+|\bwww\.[\w-]+\.\S+", re.IGNORECASE)
_EMAIL: Final = re.compile(r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+\b")
_CAMERA: Final = r"(?:img|dsc[nf]?|dcim|pict?|photo|image|screen ?shot|untitled|p)[-_ ]?\d[\d_.: -]*(?:at [\d_.: -]+)?(?:\(\d+\))?"
_ENDING: Final = r"\.(?:jpe?g|png|webp|gif|bmp|tiff?|heic|avif|svg|psd|mp4|pdf)"
# One word, a path, or what cameras and screenshots call themselves; "a shirt with a dog.png" may be meant.
_FILE: Final = re.compile(rf"[^\s/\\]+{_ENDING}|(?:[a-z]:)?[^\s/\\]*[/\\].{{0,200}}{_ENDING}|{_CAMERA}(?:{_ENDING})?", re.IGNORECASE)
_LEFT_OVER: Final = re.compile(r"[\W_]*")
# Characters. Longer ones are whole pages in the wrong column, over which the patterns above would take minutes: our choice.
MAX_CAPTION: Final = 20_000


@dataclass
class Cleaned:
    """A caption after cleaning. ``problem`` is set, and ``text`` empty, where nothing usable is left."""

    text: str
    mended: list[str] = field(default_factory=list)
    problem: str = ""


def clean_caption(raw: str, min_words: int = 1, max_words: int | None = None) -> Cleaned:
    """Clean one caption.

    Wrongly decoded text is mended, HTML entities are resolved and tags taken out, addresses (URLs, e-mail) removed,
    control characters and runs of white space become one space. Problems: "empty caption", "caption is a missing value"
    (nan, null), "caption is an address", "caption is a file name", "caption too short" and "caption too long" (in words between
    spaces; and over MAX_CAPTION).
    """
    cleaned = Cleaned(raw)
    if len(raw) > MAX_CAPTION:
        return _problem(cleaned, "caption too long")
    _step(cleaned, "broken characters removed", _without_surrogates)
    _step(cleaned, "mojibake mended", lambda text: ftfy.fix_text(text, _FIX) if not text.isascii() else text)
    if MISSING.fullmatch(cleaned.text.strip()):  # before HTML goes, and <NA> with it
        return _problem(cleaned, "caption is a missing value")
    _step(cleaned, "HTML removed", _without_html)
    if not clean(cleaned.text):
        return _problem(cleaned, "empty caption")
    _step(cleaned, "address removed", lambda text: _EMAIL.sub(" ", _URL.sub(" ", text)))
    if "address removed" in cleaned.mended and _LEFT_OVER.fullmatch(cleaned.text):
        return _problem(cleaned, "caption is an address")
    if _FILE.fullmatch(clean(cleaned.text)):
        return _problem(cleaned, "caption is a file name")
    spaced = clean(cleaned.text)
    if spaced != cleaned.text.strip():
        cleaned.mended.append("control characters or white space tidied")
    cleaned.text = spaced
    words = count_words(spaced)
    # A caption of nothing but ASCII punctuation says nothing; symbols and emoji may.
    if words < min_words or not any(character.isalnum() or ord(character) > 127 for character in spaced):
        return _problem(cleaned, "caption too short")
    if max_words is not None and words > max_words:
        return _problem(cleaned, "caption too long")
    return cleaned


def _without_surrogates(text: str) -> str:
    """Pairs of UTF-16 halves, which JSON escapes may leave, become their character; lone ones go."""
    if text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "ignore")


def _without_html(text: str) -> str:
    # Twice, since what was escaped twice ("&amp;amp;") is common; only then are escaped tags tags.
    resolved = html.unescape(html.unescape(text)) if "&" in text else text
    return _TAG.sub(" ", _UNSEEN.sub(" ", resolved)) if "<" in resolved else resolved


def _step(cleaned: Cleaned, name: str, change: Callable[[str], str]) -> None:
    changed = change(cleaned.text)
    if changed != cleaned.text:
        cleaned.text = changed
        cleaned.mended.append(name)


def _problem(cleaned: Cleaned, problem: str) -> Cleaned:
    return Cleaned("", cleaned.mended, problem)
