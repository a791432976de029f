"""The candidates of a selection, and their images and captions, read from the shards."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from paradiffusion.curation.choosing.score_files import located
from paradiffusion.curation.journal import read_journal
from paradiffusion.data.captions import count_words
from paradiffusion.data.index import SampleIndex, load_index, read_sample
from paradiffusion.data.shards import RawSample, expand_shards
from paradiffusion.errors import UserError

CANDIDATES: Final = "candidates.jsonl"
# Which caption a person starts from: one written by people, else the longest.
_FIRST: Final = "clean"


@dataclass(frozen=True)
class Candidate:
    """One candidate: ``sample`` is its stable name, ``shard`` that of its shard (see shard_root.py), ``number`` its place in
    the list, ``row`` that in the index."""

    number: int
    sample: str
    shard: str
    key: str
    row: int
    score: float
    cluster: int
    scores: dict[str, float]


@dataclass
class Candidates:
    """All candidates of a working folder, in their order."""

    all: list[Candidate]
    by_sample: dict[str, Candidate]
    index: SampleIndex

    @classmethod
    def load(cls, work: Path) -> Candidates:
        """The candidates in ``work``. Raises UserError when there are none, or their images are no longer there."""
        entries = _entries(work / CANDIDATES)
        shards = list(dict.fromkeys(entry["shard"] for entry in entries))
        names = dict(zip(located(work, shards), shards, strict=True))
        index = load_index(expand_shards(list(names), "shards"), allow_truncated=True)
        rows = _rows(index, names, {(entry["shard"], entry["key"]) for entry in entries})
        missing = [entry for entry in entries if (entry["shard"], entry["key"]) not in rows]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(entries)} candidates are no longer in their shards, the first one {missing[0]['key']} "
                f"of {missing[0]['shard']}; score and choose again."
            )
        candidates = [
            Candidate(
                number, entry["sample"], entry["shard"], entry["key"], rows[entry["shard"], entry["key"]],
                entry.get("score", 0.0), entry.get("cluster", 0), entry.get("scores", {}),
            )
            for number, entry in enumerate(entries)
        ]  # fmt: skip
        return cls(candidates, {candidate.sample: candidate for candidate in candidates}, index)

    def read(self, candidate: Candidate) -> RawSample | None:
        """Image and captions; None when the shard can no longer be read."""
        try:
            return read_sample(self.index, candidate.row)
        except OSError:
            return None

    def describe(self, candidate: Candidate) -> dict[str, Any]:
        """What the page shows beside the picture."""
        sample = self.read(candidate)
        captions: dict[str, str] = sample.meta["captions"] if sample else {}
        return {
            "number": candidate.number, "sample": candidate.sample, "key": candidate.key,
            "shard": Path(candidate.shard).name, "score": candidate.score, "cluster": candidate.cluster,
            "scores": candidate.scores, "captions": captions, "caption": start_caption(captions)[1],
        }  # fmt: skip


def sample_name(shard: str, key: str) -> str:
    """A short stable name of a sample, under which decisions about it are kept."""
    return hashlib.blake2b(f"{shard}\x1f{key}".encode("utf-8", "replace"), digest_size=8).hexdigest()


def start_caption(captions: dict[str, str]) -> tuple[str, str]:
    """The kind and text of the description that a person starts from; both empty where there is no caption."""
    kind = _FIRST if _FIRST in captions else max(captions, key=lambda name: count_words(captions[name]), default="")
    return kind, captions.get(kind, "")


def _entries(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        raise UserError(f"{path.parent} holds no candidates; make them with action=choose folder={path.parent}.")
    entries, damaged = read_journal(path)
    whole = all(isinstance(entry.get(name), str) for entry in entries for name in ("sample", "shard", "key"))
    if damaged or not entries or not whole:
        raise UserError(f"{path} is empty or holds a line that is no candidate; make it anew with action=choose.")
    return entries


def _rows(index: SampleIndex, names: dict[str, str], wanted: set[tuple[str, str]]) -> dict[tuple[str, str], int]:
    """The index rows of the ``wanted`` samples (shard, key); ``names`` of the shards by their places."""
    found: dict[tuple[str, str], int] = {}
    shards = [names.get(str(shard), str(shard)) for shard in index.shards]
    for row, number in enumerate(index.shard.tolist()):
        if (sample := (shards[number], index.key(row))) in wanted:
            found.setdefault(sample, row)
    return found
