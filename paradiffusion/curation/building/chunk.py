"""The first pass over a chunk of items: captions cleaned, images read, checked, hashed and staged.

A chunk leaves four files: ``.bin`` (images that had to be fetched or encoded), ``.jsonl`` (a line for each item that may
become a sample), ``.npy`` (what choosing among those lines needs) and last ``.json`` (what was dropped and mended), which
says that the chunk is done.
"""

from __future__ import annotations

import json
import os
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np

from paradiffusion.curation.building.cleaning import clean_caption
from paradiffusion.curation.building.items import Item
from paradiffusion.curation.building.places import Dropped, FetchLimits, Reader
from paradiffusion.curation.building.preparing import Picture, PictureRules, prepare
from paradiffusion.curation.pool import Tell
from paradiffusion.randomness import seed_from, uniform

EXAMPLES: Final = 5
ROW: Final = np.dtype(
    [("offset", "<i8"), ("length", "<u4"), ("key", "<u8"), ("pixels", "<u8", (2,)), ("perceptual", "<u8"),
     ("has_perceptual", "?"), ("is_val", "?"), ("width", "<i4"), ("height", "<i4"), ("bytes", "<u4")]
)  # fmt: skip


@dataclass(frozen=True)
class ItemRules:
    """What becomes of an item."""

    picture: PictureRules
    limits: FetchLimits
    threads: int
    min_words: int
    max_words: int | None
    may_lack_captions: bool
    val: float


@dataclass(frozen=True)
class ChunkTask:
    """Items of ``items`` (JSON lines); results are ``result`` with four suffixes."""

    items: Path
    result: Path
    rules: ItemRules


@dataclass
class Tally:
    """Counts of a chunk or of all: reasons with examples, and notes."""

    items: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    captions_dropped: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str, example: str) -> None:
        """Count one dropped item."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        shown = self.examples.setdefault(reason, [])
        if len(shown) < EXAMPLES:
            shown.append(example)

    def note(self, notes: list[str]) -> None:
        """Count what was mended on one item, each once."""
        for note in dict.fromkeys(notes):
            self.notes[note] = self.notes.get(note, 0) + 1

    def add(self, other: Tally) -> None:
        """Add what comes after."""
        self.items += other.items
        for mine, theirs in ((self.dropped, other.dropped), (self.notes, other.notes),
                             (self.captions_dropped, other.captions_dropped)):  # fmt: skip
            for name, count in theirs.items():
                mine[name] = mine.get(name, 0) + count
        for name, shown in other.examples.items():
            self.examples[name] = (self.examples.get(name, []) + shown)[:EXAMPLES]


def make_chunk(task: ChunkTask, tell: Tell) -> None:
    """Do the first pass over one chunk; a chunk that is done already is left alone."""
    if task.result.with_suffix(".json").exists():
        return
    tally, rows, at = Tally(), [], 0
    names = {
        suffix: task.result.with_suffix(f"{suffix}.{os.getpid()}") for suffix in (".bin", ".jsonl", ".npy", ".json")
    }
    try:
        with open(names[".bin"], "wb") as staged, open(names[".jsonl"], "wb") as lines:
            for item, captions, found in _fetched(task, tally):
                tally.items += 1
                tell(1)
                try:
                    if isinstance(found, Dropped):
                        raise found
                    picture = prepare(found, item.name.removesuffix(")"), task.rules.picture)
                except Dropped as drop:
                    tally.drop(drop.reason, f"{item.name}: {drop.detail}" if drop.detail else item.name)
                    continue
                tally.note(item.notes + picture.notes)
                line = _line(item, captions, picture, staged.tell())
                if line["at"] is not None:
                    staged.write(picture.data)
                encoded = json.dumps(line).encode() + b"\n"
                lines.write(encoded)
                rows.append(_row(item, picture, at, len(encoded), task.rules.val))
                at += len(encoded)
        with open(names[".npy"], "wb") as file:
            np.save(file, np.array(rows, ROW), allow_pickle=False)
        names[".json"].write_text(json.dumps(asdict(tally)), encoding="utf-8")
        for suffix, partial in names.items():  # .json last: it says that the others are whole
            os.replace(partial, task.result.with_suffix(suffix))
    finally:
        for partial in names.values():
            partial.unlink(missing_ok=True)


def _line(item: Item, captions: dict[str, str], picture: Picture, offset: int) -> dict[str, Any]:
    """What the second pass needs of a sample. ``at`` is its image in the .bin, or None: read ``place`` again."""
    source = item.place.path if item.place.kind == "url" else item.name
    meta: dict[str, Any] = {
        "captions": captions,
        "caption_sources": {kind: item.sources[kind] for kind in captions if kind in item.sources},
        "width": picture.width,
        "height": picture.height,
        "source": source,
    }
    if item.extra:
        meta["extra"] = item.extra
    again = picture.is_original and item.place.is_lasting()
    return {
        "name": item.name,
        "key": item.key,
        "extension": picture.extension,
        "at": None if again else [offset, len(picture.data)],
        "place": asdict(item.place) if again else None,
        "crc": zlib.crc32(picture.data),
        # Names of files may hold bytes, and JSON escapes, that are no text; a shard's JSON is.
        "meta": json.loads(json.dumps(meta, ensure_ascii=False).encode("utf-8", "replace")),
    }


def _row(item: Item, picture: Picture, offset: int, length: int, val: float) -> tuple[Any, ...]:
    is_val = item.split == "val" or (item.split == "" and uniform("val", item.key) < val)
    pixels = tuple(np.frombuffer(picture.pixels, "<u8").tolist())
    perceptual = picture.perceptual
    return (
        offset, length, seed_from(item.key), pixels, perceptual or 0, perceptual is not None, is_val, picture.width,
        picture.height, len(picture.data),
    )  # fmt: skip


def _captions(item: Item, rules: ItemRules, tally: Tally) -> dict[str, str]:
    """The cleaned captions by kind; Dropped, with the first caption's problem, when none is left and one is needed."""
    kept: dict[str, str] = {}
    problems: list[tuple[str, str]] = []
    for kind, raw in item.captions.items():
        cleaned = clean_caption(raw, rules.min_words, rules.max_words)
        item.notes += [f"caption: {note}" for note in cleaned.mended]
        if cleaned.problem:
            problems.append((cleaned.problem, raw))
        else:
            kept[kind] = cleaned.text
    if not kept and not rules.may_lack_captions:
        problem, raw = problems[0] if problems else ("no caption", "")
        raise Dropped("no caption" if problem == "empty caption" else problem, repr(raw[:80]) if raw.strip() else "")
    for problem, _ in problems:
        tally.captions_dropped[problem] = tally.captions_dropped.get(problem, 0) + 1
    return kept


@lru_cache(maxsize=1)
def _reader(limits: FetchLimits) -> Reader:
    """One for all chunks of a process: a table's cells are read on from the last place, and not from the start again."""
    return Reader(limits)


def _fetched(task: ChunkTask, tally: Tally) -> Iterator[tuple[Item, dict[str, str], bytes | Dropped]]:
    """Items in order with their captions and bytes. URLs are fetched some ahead, by threads; captions come first, so that
    nothing is fetched for an item that has none."""
    reader = _reader(task.rules.limits)

    def read(item: Item) -> bytes | Dropped:
        try:
            return reader.read(item.place)
        except Dropped as drop:
            return drop

    waiting: deque[tuple[Item, dict[str, str], Future[bytes | Dropped] | Dropped | None]] = deque()

    def first() -> tuple[Item, dict[str, str], bytes | Dropped]:
        item, captions, found = waiting.popleft()
        if found is None:
            return item, captions, read(item)
        return item, captions, found.result() if isinstance(found, Future) else found

    with ThreadPoolExecutor(task.rules.threads) as pool, open(task.items, encoding="utf-8") as lines:
        for line in lines:
            item = Item.from_json(line)
            captions: dict[str, str] = {}
            found: Future[bytes | Dropped] | Dropped | None = None
            try:
                if item.split == "test":
                    raise Dropped("test split")
                if item.place.kind != "none":  # else the missing image is the reason to tell
                    captions = _captions(item, task.rules, tally)
                    found = pool.submit(read, item) if item.place.kind == "url" else None
            except Dropped as drop:
                found = drop
            waiting.append((item, captions, found))
            if len(waiting) >= 2 * task.rules.threads:
                yield first()
        while waiting:
            yield first()
