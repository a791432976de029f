"""What came out of captioning: counts, rates, reasons and examples, from the files of the finished shards alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from paradiffusion.atomic import write_atomic
from paradiffusion.curation.captioning.caption_checks import NOTES, REASONS
from paradiffusion.curation.captioning.caption_journal import read_lines
from paradiffusion.curation.captioning.caption_judge import interval

# The paper's table for ParaImage-Big: mean words and the share of each band.
PAPER_MEAN: Final = 132.9
PAPER_BANDS: Final = {"under 50": 0.0, "50 to 100": 0.19, "100 to 150": 0.51, "150 to 200": 0.25, "over 200": 0.05}
_EXAMPLES, _UNCONFIRMED = 3, 50


@dataclass
class Example:
    """A sample that shows a reason."""

    shard: str
    key: str
    text: str


@dataclass
class Judged:
    """The second model's word.

    Attributes:
        share: of the claims that got a yes, among those that got a yes or no; None without any.
        interval: of 95 %, or None.
        unconfirmed: the first claims that got a no.
    """

    judge: str
    captions: int
    claims: int
    confirmed: int
    unclear: int
    share: float | None
    interval: tuple[float, float] | None
    unconfirmed: list[Example]


@dataclass
class Report:
    """All of it. Shares are of ``samples`` unless said otherwise; ``seconds`` are those of all processes together."""

    shards: int = 0
    shards_done: int = 0
    samples: int = 0
    captioned: int = 0
    answers: int = 0
    rejected_samples: float = 0.0
    rejected_answers: float = 0.0
    seconds: float = 0.0
    tokens: int = 0
    captions_per_hour: float | None = None
    captions_per_gpu_hour: float | None = None
    processes: int = 1
    mean_words: float | None = None
    bands: dict[str, float] = field(default_factory=dict)
    paper_bands: dict[str, float] = field(default_factory=lambda: dict(PAPER_BANDS))
    paper_mean_words: float = PAPER_MEAN
    reasons: dict[str, int] = field(default_factory=dict)  # of rejected answers
    found_in_accepted: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    templates: dict[str, dict[str, float]] = field(default_factory=dict)
    models: list[str] = field(default_factory=list)
    examples: dict[str, list[Example]] = field(default_factory=dict)
    judged: Judged | None = None


def make_report(output: Path, stems: list[str], processes: int, endpoint_gpus: int, judged: bool) -> Report:
    """Read ``<stem>.jsonl`` of all shards that are done.

    Args:
        processes: that work side by side, for the rate.
        endpoint_gpus: GPUs behind an endpoint, which cannot be seen from here; 0 where unknown.
        judged: whether to read ``<stem>.judged.jsonl`` too.
    """
    report = Report(shards=len(stems), processes=processes)
    bands, words, gpu_seconds = Counter[str](), 0, 0.0
    tries: dict[str, list[int]] = {}  # template: [answers, rejected]
    for stem in stems:
        path = output / f"{stem}.jsonl"
        if not path.exists():
            continue
        report.shards_done += 1
        for record in read_lines(path):
            _count(report, stem, record, tries)
            if record["caption"] is not None:
                words += record["words"]
                bands[_band(record["words"])] += 1
            share = endpoint_gpus / processes if record["device"] == "endpoint" else float(record["device"] != "cpu")
            gpu_seconds += share * record["seconds"]
    _rates(report, gpu_seconds)
    if report.captioned:
        report.mean_words = words / report.captioned
        report.bands = {name: bands[name] / report.captioned for name in PAPER_BANDS}
    report.templates = {
        name: {"answers": answers, "rejected": bad / answers} for name, (answers, bad) in sorted(tries.items())
    }
    if judged:
        paths = [(stem, output / f"{stem}.judged.jsonl") for stem in stems]
        report.judged = _judged((stem, read_lines(path)) for stem, path in paths if path.exists())
    return report


def _count(report: Report, stem: str, record: dict[str, Any], tries: dict[str, list[int]]) -> None:
    report.samples += 1
    report.captioned += record["caption"] is not None
    report.seconds += record["seconds"]
    report.tokens += record["tokens"]
    model = f"{record['model']}@{record['revision']}"
    if model not in report.models:
        report.models.append(model)
    answers = [(one["template"], True) for one in record["rejected"]]
    answers += [(record["template"], False)] if record["caption"] is not None else []
    for template, rejected in answers:
        counted = tries.setdefault(template, [0, 0])
        counted[0] += 1
        counted[1] += rejected
    report.answers += len(answers)
    for one in record["rejected"]:
        for name in one["found"]:
            report.reasons[name] = report.reasons.get(name, 0) + 1
            examples = report.examples.setdefault(name, [])
            if len(examples) < _EXAMPLES:
                examples.append(Example(stem, record["key"], one["text"][:300]))
    if record["caption"] is not None:
        for name in record["found"]:
            report.found_in_accepted[name] = report.found_in_accepted.get(name, 0) + 1
        for name in record["notes"]:
            report.notes[name] = report.notes.get(name, 0) + 1


def _rates(report: Report, gpu_seconds: float) -> None:
    if report.samples:
        report.rejected_samples = 1 - report.captioned / report.samples
    if report.answers:
        report.rejected_answers = 1 - report.captioned / report.answers
    if report.seconds:
        report.captions_per_hour = report.captioned * 3600 * report.processes / report.seconds
    if gpu_seconds:
        report.captions_per_gpu_hour = report.captioned * 3600 / gpu_seconds


def _band(words: int) -> str:
    edges = (50, 100, 150, 200)
    return list(PAPER_BANDS)[sum(words >= edge for edge in edges)]


def _judged(shards: Iterable[tuple[str, list[dict[str, Any]]]]) -> Judged | None:
    clusters: list[tuple[int, int]] = []
    verdicts, judge, captions = Counter[str](), "", 0
    unconfirmed: list[Example] = []
    for stem, records in shards:
        by_key: dict[str, Counter[str]] = {}
        for record in records:
            judge = f"{record['judge']}@{record['revision']}"
            by_key.setdefault(record["key"], Counter())[record["verdict"]] += 1
            if record["verdict"] == "no" and len(unconfirmed) < _UNCONFIRMED:
                unconfirmed.append(Example(stem, record["key"], record["claim"]))
        for counted in by_key.values():
            captions += 1
            verdicts += counted
            clusters += [(counted["yes"], counted["yes"] + counted["no"])] if counted["yes"] + counted["no"] else []
    decided = verdicts["yes"] + verdicts["no"]
    return Judged(
        judge=judge, captions=captions, claims=verdicts.total(), confirmed=verdicts["yes"], unclear=verdicts["unclear"],
        share=verdicts["yes"] / decided if decided else None, interval=interval(clusters) if clusters else None,
        unconfirmed=unconfirmed,
    )  # fmt: skip


def write_report(report: Report, output: Path) -> Path:
    """``report.json`` and ``report.md`` in ``output``; returns the latter's path."""
    for name, text in (
        ("report.json", json.dumps(asdict(report), indent=2, ensure_ascii=False) + "\n"),
        ("report.md", as_markdown(report)),
    ):
        write_atomic(output / name, text)
    return output / "report.md"


def as_markdown(report: Report) -> str:
    """The report for a person."""
    lines = [
        "# Captions",
        "",
        f"{report.captioned} of {report.samples} samples have a caption; {report.rejected_samples:.1%} have none that passed, and "
        f"{report.rejected_answers:.1%} of {report.answers} answers were rejected. {report.shards_done} of {report.shards} shards "
        f"are done. Model: {', '.join(report.models) or 'none yet'}.",
        "",
        "| | |",
        "|---|---|",
        f"| captions per hour, with {report.processes} process(es) | {_number(report.captions_per_hour)} |",
        f"| captions per GPU-hour | {_number(report.captions_per_gpu_hour)} |",
        f"| process-hours | {report.seconds / 3600:.3g} |",
        f"| tokens generated | {report.tokens} |",
        f"| mean words (ParaImage-Big: {report.paper_mean_words}) | {_number(report.mean_words)} |",
        "",
        "| words | here | ParaImage-Big |",
        "|---|---|---|",
        *(f"| {name} | {report.bands.get(name, 0):.0%} | {paper:.0%} |" for name, paper in report.paper_bands.items()),
        "",
        "| template | answers | rejected |",
        "|---|---|---|",
        *(f"| {_cell(n)} | {t['answers']:.0f} | {t['rejected']:.1%} |" for n, t in report.templates.items()),
        "",
        "| rejected for | answers | of all | |",
        "|---|---|---|---|",
    ]
    ranked = sorted(report.reasons.items(), key=lambda item: (-item[1], item[0]))
    lines += [
        f"| {name} | {count} | {count / report.answers:.1%} | {REASONS.get(name, '')} |" for name, count in ranked
    ] or ["| nothing | 0 | | |"]
    counted = {**report.found_in_accepted, **report.notes}
    if counted:
        lines += ["", "| in captions that passed | captions | |", "|---|---|---|"]
        lines += [
            f"| {name} | {count} | {REASONS.get(name) or NOTES.get(name, '')} |" for name, count in counted.items()
        ]
    if report.examples:
        lines += ["", "## Examples of rejected answers", ""]
        lines += [
            f"- {name}, {example.shard}/{_cell(example.key)}: {_cell(example.text) or '(nothing)'}"
            for name, examples in sorted(report.examples.items())
            for example in examples
        ]
    return "\n".join(lines + (_judged_lines(report.judged) if report.judged else [])) + "\n"


def _judged_lines(judged: Judged) -> list[str]:
    share = "no claim got a yes or a no"
    if judged.share is not None and judged.interval is not None:
        low, high = judged.interval
        share = f"{judged.share:.1%} confirmed (95 % interval {low:.1%} to {high:.1%})"
    lines = [
        "", "## Claims checked by a second model", "",
        f"{judged.judge or 'no judge'}: {judged.claims} sentences of {judged.captions} captions, {share}, {judged.unclear} without "
        "a clear answer. Claims about one picture count as dependent in the interval.", "",
    ]  # fmt: skip
    return lines + [f"- not confirmed, {one.shard}/{_cell(one.key)}: {_cell(one.text)}" for one in judged.unconfirmed]


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def _cell(text: str) -> str:
    """A model's words, kept from being taken as Markdown or HTML."""
    escaped = "".join(f"\\{letter}" if letter in "\\`*_[]#|~" else letter for letter in " ".join(text.split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
