"""The items of an input before any image is looked at: a name, the place of the image, texts by kind."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from paradiffusion.curation.building.places import EXTENSIONS, Place
from paradiffusion.data.captions import ENCODING_NOTES, decode_text, parse_meta

# Columns and JSON fields that are captions unless captions= says otherwise, for each kind the first one that has text.
# Our choice, after the layouts of img2dataset, kohya's scripts and the data sets with synthetic captions.
KNOWN_CAPTIONS: Final = {
    "short": ("short", "caption", "text", "prompt", "txt", "alt_text", "alt", "title", "short_caption",
              "captions"),
    "long": (
        "long", "long_caption", "caption_long", "detailed_caption", "dense_caption", "recaption", "vlm_caption",
        "llm_caption", "description",
    ),
    "clean": ("clean", "clean_caption", "human_caption"),
}  # fmt: skip
_MAX_KEY: Final = 160


@dataclass
class Item:
    """One line of an input, where it stands there (``name``), what its sample is called, raw captions by kind and where each comes
    from, the columns kept, what was mended while reading; ``split`` is "train", "val" or "test" where the input knows splits."""

    name: str
    key: str
    place: Place
    captions: dict[str, str] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    split: str = ""

    def to_json(self) -> str:
        """One line; NaN and lone surrogates survive it."""
        return json.dumps({**vars(self), "place": vars(self.place)}, separators=(",", ":"))

    @staticmethod
    def from_json(line: str) -> Item:
        """What ``to_json`` wrote."""
        content = json.loads(line)
        return Item(**{**content, "place": Place(**content["place"])})


@dataclass(frozen=True)
class Columns:
    """Which columns or fields are what: ``captions`` from column to kind (None: known names), ``image``, ``key``, and those
    to ``keep``. ``may_lack_captions`` says that images without any are wanted."""

    captions: dict[str, str] | None = None
    image: str | None = None
    key: str | None = None
    keep: tuple[str, ...] = ()
    may_lack_captions: bool = False


def key_of(name: str, is_path: bool = True) -> str:
    """A sample's key from a path (without its extension) or an identifier: letters, digits, "_", "-" and "/" alone.

    A name that had to be changed for it gets 8 hex digits of its hash, so that different names keep different keys.
    """
    stem, dot, ending = name.rpartition(".")
    stem = stem if is_path and dot and ending.lower() in EXTENSIONS else name
    stem = re.sub(r"^(?:\./|/)+", "", stem.replace("\\", "/"))
    parts = [re.sub(r"[^\w-]+", "_", part) for part in stem.split("/") if part not in ("", ".")]
    key = "/".join(parts)
    # Combining marks and the like are no "\w" in tar tools of other languages; length is limited in all of them.
    if key == stem and 0 < len(key.encode()) <= _MAX_KEY and key.isascii():
        return key
    kept = key.encode("ascii", "ignore").decode()[-_MAX_KEY:].strip("/") or "sample"
    return f"{kept}-{hashlib.blake2b(stem.encode('utf-8', 'surrogatepass'), digest_size=4).hexdigest()}"


def text_of(value: Any) -> str:
    """A cell as text: lists joined by ", ", numbers as they print, "" for nothing and for objects."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, list | tuple):
        return ", ".join(part for part in map(text_of, value) if part)
    if value is None or isinstance(value, dict | bool) or value != value:
        return ""
    return str(value)


def field_of(fields: Mapping[str, Any], name: str) -> Any:
    """The field ``name``; with dots it may name one inside an object ("captions.long"), which a cell may hold as JSON. None
    where there is none."""
    if name in fields:
        return fields[name]
    first, dot, rest = name.partition(".")
    inner = _from_json(fields.get(first)) if dot else None
    return field_of(inner, rest) if isinstance(inner, Mapping) else None


def _from_json(value: Any) -> Any:
    """A cell of a table that has no lists or objects of its own; ``value`` itself where it is no such cell."""
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _caption_text(value: Any) -> str:
    found = _from_json(value)
    if isinstance(found, Mapping):
        return ""
    is_list = isinstance(found, list) and all(isinstance(part, str) for part in found)
    return text_of(found if is_list else value)


def pick_captions(fields: Mapping[str, Any], mapping: Columns, where: str) -> tuple[dict[str, str], dict[str, str]]:
    """Captions by kind and their sources ("column a + b") from the fields of one item.

    Fields that are mapped to one kind are joined by ", " in the order of the mapping. Without a mapping the known names
    are taken, and an object "captions" (as our own shards have it) first.
    """
    captions: dict[str, str] = {}
    sources: dict[str, str] = {}
    if mapping.captions is not None:
        for name, kind in mapping.captions.items():
            text = _caption_text(field_of(fields, name))
            if text.strip():
                captions[kind] = f"{captions[kind]}, {text}" if kind in captions else text
                sources[kind] = f"{sources[kind]} + {name}" if kind in sources else f"{where} {name}"
        return captions, sources
    own, told = _from_json(fields.get("captions")), fields.get("caption_sources")
    if isinstance(own, Mapping):
        captions = {str(kind): text for kind, text in own.items() if kind and isinstance(text, str) and text.strip()}
        known = told if isinstance(told, Mapping) else {}
        sources = {kind: text_of(known.get(kind)) or f"{where} captions.{kind}" for kind in captions}
    folded = {name.lower(): name for name in reversed(list(fields)) if isinstance(name, str)}
    for kind, names in KNOWN_CAPTIONS.items():
        for name in names:
            text = _caption_text(fields[folded[name]]) if kind not in captions and name in folded else ""
            if text.strip():
                captions[kind], sources[kind] = text, f"{where} {folded[name]}"
    return captions, sources


def pick_extra(fields: Mapping[str, Any], keep: Iterable[str]) -> dict[str, Any]:
    """The fields to keep, as JSON can hold them."""
    found = {name: field_of(fields, name) for name in keep}
    return {name: _plain(value) for name, value in found.items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def add_text(fields: dict[str, Any], notes: list[str], name: str, data: bytes, is_json: bool) -> None:
    """Add to ``fields`` what a text file beside an image holds: its text under ``name``, or all of a JSON object; and to
    ``notes`` what was odd about it."""
    text, encoding = decode_text(data)
    if encoding in ENCODING_NOTES and data:
        notes.append(ENCODING_NOTES[encoding])
    if not is_json:
        fields[name] = text
    elif (content := parse_meta(data)) is not None:
        fields.update(content)
    else:
        notes.append("JSON beside the image is damaged")
