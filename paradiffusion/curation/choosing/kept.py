"""Export of what reviewers kept, with its descriptions, as JSON lines, shards and a report."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from tqdm import tqdm

from paradiffusion.atomic import atomic_folder, locked
from paradiffusion.curation.choosing.candidates import Candidate, Candidates, start_caption
from paradiffusion.curation.choosing.decisions import DECISIONS, Standing, read_decisions
from paradiffusion.data.captions import clean, count_words
from paradiffusion.data.shards import RawSample, write_shards
from paradiffusion.errors import UserError

# ParaImage-Small in the authors' own table.
PAPER_MEAN: Final = 70.6
PAPER_SHARE: Final = 0.83  # of descriptions with 50 to 100 words
_KEPT: Final = ", kept by a person"
_BANDS: Final = ("under 50", "50-100", "100-150", "150-200", "over 200")


@dataclass
class ExportReport:
    """Counts of an export, and the descriptions' words beside the paper's."""

    candidates: int
    kept: int
    dropped: int
    undecided: int
    disagreed: int
    edited: int
    without_description: int
    unreadable: int
    mean_words: float
    bands: dict[str, float]  # share of the kept by words

    def lines(self) -> Iterator[str]:
        """The report as text."""
        yield f"{self.candidates} candidates: {self.kept} kept, {self.dropped} dropped, {self.undecided} undecided"
        yield f"  reviewers disagreed on {self.disagreed}; {self.edited} of the kept have an edited description"
        if self.without_description or self.unreadable:
            yield f"  left out: {self.without_description} without any description, {self.unreadable} unreadable"
        yield f"  {'words':<12}{'here':>8}{'paper':>8}"
        yield f"  {'mean':<12}{self.mean_words:>8.1f}{PAPER_MEAN:>8.1f}"
        for band, share in self.bands.items():
            paper = f"{PAPER_SHARE:.0%}" if band == "50-100" else ""
            yield f"  {band:<12}{share:>8.0%}{paper:>8}"


def export(work: Path, output: Path, samples_per_shard: int = 1000, votes: str = "majority") -> ExportReport:
    """Write what the reviewers kept in ``work`` to ``output``: shards, ``kept.jsonl`` and ``report.json``.

    The description is the caption of kind "clean", its source "person" where one wrote it; the other captions and all else
    in the samples' JSON stay. ``votes`` says what several reviewers' decisions come to; a tie is no keep. Raises UserError
    when nothing is kept, ``output`` holds something, or another export writes it.
    """
    output = output.absolute()  # "." has no name
    with locked(output, f"another export writes output={output} now; wait for it, or name another folder."):
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise UserError(f"output={output} is not empty; name a new folder, so that no shard of another export stays in it.")
        candidates = Candidates.load(work)
        standing = read_decisions(work / DECISIONS)
        verdicts = {one.sample: verdict(standing, one.sample, votes) for one in candidates.all}
        chosen = [one for one in candidates.all if verdicts[one.sample] is True]
        if not chosen:
            raise UserError(f"no candidate of {len(candidates.all)} in {work} is kept; keep some with action=review first.")
        written: list[dict[str, Any]] = []
        skipped: Counter[str] = Counter()
        bar = tqdm(chosen, "writing", unit="image", disable=None if len(chosen) > 500 else True)
        with atomic_folder(output) as partial:
            write_shards(_samples(candidates, standing, bar, written, skipped), partial, samples_per_shard)
            if not written:
                raise UserError(f"none of the {len(chosen)} kept candidates has an image and a description; write some first.")
            report = _report(candidates, standing, verdicts, written, skipped)
            lines = [json.dumps(one, ensure_ascii=False) for one in written]
            (partial / "kept.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            (partial / "report.json").write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    return report


def verdict(standing: Standing, sample: str, votes: str) -> bool | None:
    """Whether ``sample`` is kept; None where nobody has decided."""
    given = [fields["decision"] for fields in standing.of(sample).values() if fields.get("decision")]
    keeps = given.count("keep")
    if not given:
        return None
    return {"any": keeps > 0, "all": keeps == len(given), "majority": 2 * keeps > len(given)}[votes]


def description(standing: Standing, sample: str, captions: dict[str, str]) -> tuple[str, str | None]:
    """The text that was edited last, of those who kept the sample if they edited it, and its editor; else the first one."""
    start = start_caption(captions)[1]
    by = standing.samples.get(sample, {})
    edits = [(fields["caption"], name) for name, fields in by.items() if fields.get("caption")]
    kept = [edit for edit in edits if (given := by[edit[1]].get("decision")) and given.value == "keep"]
    for value, name in sorted(kept or edits, key=lambda edit: (edit[0].at, edit[0].revision), reverse=True):
        text = clean(value.value or "")
        if text:
            return text, name if text != clean(start) else None  # a text that was typed back is nobody's edit
    return start, None


def _samples(
    candidates: Candidates, standing: Standing, chosen: Iterable[Candidate], written: list[dict[str, Any]], skipped: Counter[str]
) -> Iterator[RawSample]:
    """The samples to write; what is written is told in ``written``, what cannot be in ``skipped``."""
    for candidate in chosen:
        sample = candidates.read(candidate)
        if sample is None:
            skipped["unreadable"] += 1
            continue
        captions = sample.meta["captions"]
        caption, editor = description(standing, candidate.sample, captions)
        if not caption:
            skipped["without"] += 1
            continue
        by = standing.of(candidate.sample)
        keepers = tuple(sorted(name for name, fields in by.items() if fields.get("decision") == "keep"))
        notes = {name: note for name, fields in by.items() if (note := fields.get("note"))}
        review: dict[str, Any] = {"reviewers": keepers, "editor": editor, "score": candidate.score}
        if earlier := sample.meta.get("review"):  # of an earlier round, with the key that it had then
            review["earlier"] = {"source_key": sample.meta.get("source_key"), "review": earlier}
        stored = sample.meta.get("caption_sources")
        sources = dict(stored) if isinstance(stored, dict) else {}
        kind = start_caption(captions)[0]
        unedited = f"{str(sources.get(kind, kind)).removesuffix(_KEPT)}{_KEPT}"
        sources["clean"] = "person" if editor or sources.get(kind) == "person" else unedited
        written.append(
            {"sample": candidate.sample, "shard": candidate.shard, "key": candidate.key, "caption": caption,
             "source": sources["clean"], "reviewers": keepers, "editor": editor, "notes": notes,
             "score": candidate.score, "scores": candidate.scores}
        )  # fmt: skip
        meta = {**sample.meta, "captions": {**captions, "clean": caption}, "caption_sources": sources, "review": review}
        if candidate.scores:  # by which training may tell the better ones (conditioning.scores)
            meta["scores"] = candidate.scores
        # Keys of several shards may be alike, and some have folders in them.
        yield RawSample(f"{len(written) - 1:06d}", sample.image, sample.extension, {**meta, "source_key": sample.key})


def _report(
    candidates: Candidates, standing: Standing, verdicts: dict[str, bool | None], written: list[dict[str, Any]],
    skipped: Counter[str],
) -> ExportReport:  # fmt: skip
    words = np.array([count_words(one["caption"]) for one in written])
    # As the paper's bands meet at their ends: 50 and 100 words belong to 50-100.
    numbers = np.digitize(words, (50, 101, 151, 201))
    bands = {name: float(np.mean(numbers == number)) for number, name in enumerate(_BANDS)}
    given = [{fields["decision"] for fields in standing.of(one.sample).values() if fields.get("decision")} for one in candidates.all]
    return ExportReport(
        candidates=len(candidates.all),
        kept=len(written),
        dropped=sum(value is False for value in verdicts.values()),
        undecided=sum(value is None for value in verdicts.values()),
        disagreed=sum(len(one) > 1 for one in given),
        edited=sum(one["editor"] is not None for one in written),
        without_description=skipped["without"],
        unreadable=skipped["unreadable"],
        mean_words=float(words.mean()),
        bands=bands,
    )
