"""Report of captioning: counts, rates, reasons and examples, from the files of the finished shards alone."""

from __future__ import annotations

import json
from bisect import bisect
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from paradiffusion.atomic import write_atomic
from paradiffusion.curation.captioning.caption_checks import NOTES, REASONS
from paradiffusion.curation.captioning.captioning import interval, read_lines
from paradiffusion.pages import markdown, markdown_table

# The paper's table for ParaImage-Big: mean words and the share of each band.
PAPER_MEAN: Final = 132.9
PAPER_BANDS: Final = {"under 50": 0.0, "50 to 100": 0.19, "100 to 150": 0.51, "150 to 200": 0.25, "over 200": 0.05}
_EXAMPLES, _UNCONFIRMED = 3, 50


def make_report(output: Path, stems: list[str], processes: int, endpoint_gpus: int, judged: bool) -> dict[str, Any]:
    """The content of report.json, from ``<stem>.jsonl`` of all shards that are done, and where ``judged`` of ``<stem>.judged.jsonl``.

    Shares are of ``samples`` unless said otherwise; ``seconds`` are those of all ``processes`` together; ``reasons`` and
    ``examples`` are of rejected answers. ``endpoint_gpus`` cannot be seen from here; 0 where unknown."""
    count, bands = Counter[str](), Counter[str]()  # what is counted once a sample; samples by their words
    reasons, accepted, notes = Counter[str](), Counter[str](), Counter[str]()
    answers, rejected = Counter[str](), Counter[str]()  # by template
    seconds, gpu_seconds = 0.0, 0.0
    models: dict[str, None] = {}
    examples: dict[str, list[dict[str, str]]] = {}
    done = [stem for stem in stems if (output / f"{stem}.jsonl").exists()]
    for stem, record in _records(output, done, ".jsonl"):
        count.update(samples=1, tokens=record["tokens"])
        models[f"{record['model']}@{record['revision']}"] = None
        seconds += record["seconds"]
        share = endpoint_gpus / processes if record["device"] == "endpoint" else float(record["device"] != "cpu")
        gpu_seconds += share * record["seconds"]
        for one in record["rejected"]:
            rejected[one["template"]] += 1
            reasons.update(one["found"])
            for name in one["found"]:
                if len(shown := examples.setdefault(name, [])) < _EXAMPLES:
                    shown.append({"shard": stem, "key": record["key"], "text": one["text"][:300]})
        answers.update(one["template"] for one in record["rejected"])
        if record["caption"] is not None:
            answers[record["template"]] += 1
            count.update(captioned=1, words=record["words"])
            bands[list(PAPER_BANDS)[bisect((50, 100, 150, 200), record["words"])]] += 1
            accepted.update(record["found"])
            notes.update(record["notes"])
    samples, captioned = count["samples"], count["captioned"]
    return {
        "shards": len(stems),
        "shards_done": len(done),
        "samples": samples,
        "captioned": captioned,
        "answers": answers.total(),
        "rejected_samples": 1 - captioned / samples if samples else 0.0,
        "rejected_answers": 1 - captioned / answers.total() if answers else 0.0,
        "seconds": seconds,
        "tokens": count["tokens"],
        "captions_per_hour": captioned * 3600 * processes / seconds if seconds else None,
        "captions_per_gpu_hour": captioned * 3600 / gpu_seconds if gpu_seconds else None,
        "processes": processes,
        "mean_words": count["words"] / captioned if captioned else None,
        "bands": {name: bands[name] / captioned for name in PAPER_BANDS} if captioned else {},
        "paper_bands": PAPER_BANDS,
        "paper_mean_words": PAPER_MEAN,
        "reasons": reasons,
        "found_in_accepted": accepted,
        "notes": notes,
        "templates": {name: {"answers": n, "rejected": rejected[name] / n} for name, n in sorted(answers.items())},
        "models": list(models),
        "examples": examples,
        "judged": _judged(output, stems) if judged else None,
    }


def _records(output: Path, stems: list[str], ending: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of the shards that have such a file, with their shard."""
    for stem in stems:
        yield from ((stem, record) for record in read_lines(output / f"{stem}{ending}"))


def _judged(output: Path, stems: list[str]) -> dict[str, Any]:
    """The second model's word: ``share`` is of the claims that got a yes, among those that got a yes or no, with its ``interval``
    of 95 %; ``unconfirmed`` are the first claims that got a no."""
    captions: dict[tuple[str, str], Counter[str]] = {}
    unconfirmed: list[dict[str, str]] = []
    judge = ""
    for stem, record in _records(output, stems, ".judged.jsonl"):
        judge = f"{record['judge']}@{record['revision']}"
        captions.setdefault((stem, record["key"]), Counter())[record["verdict"]] += 1
        if record["verdict"] == "no" and len(unconfirmed) < _UNCONFIRMED:
            unconfirmed.append({"shard": stem, "key": record["key"], "text": record["claim"]})
    total = sum(captions.values(), Counter[str]())
    clusters = [(one["yes"], one["yes"] + one["no"]) for one in captions.values() if one["yes"] + one["no"]]
    return {
        "judge": judge, "captions": len(captions), "claims": total.total(), "confirmed": total["yes"],
        "unclear": total["unclear"], "share": total["yes"] / (total["yes"] + total["no"]) if clusters else None,
        "interval": interval(clusters) if clusters else None, "unconfirmed": unconfirmed,
    }  # fmt: skip


def write_report(report: dict[str, Any], output: Path) -> Path:
    """``report.json`` and ``report.md`` in ``output``; returns the latter's path."""
    write_atomic(output / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    write_atomic(output / "report.md", as_markdown(report))
    return output / "report.md"


def as_markdown(report: dict[str, Any]) -> str:
    """The report for a person."""
    facts = [
        (f"captions per hour, with {report['processes']} process(es)", _number(report["captions_per_hour"])),
        ("captions per GPU-hour", _number(report["captions_per_gpu_hour"])),
        ("process-hours", f"{report['seconds'] / 3600:.3g}"),
        ("tokens generated", str(report["tokens"])),
        (f"mean words (ParaImage-Big: {report['paper_mean_words']})", _number(report["mean_words"])),
    ]
    bands = [(name, f"{report['bands'].get(name, 0):.0%}", f"{of:.0%}") for name, of in report["paper_bands"].items()]
    templates = [(markdown(n), str(t["answers"]), f"{t['rejected']:.1%}") for n, t in report["templates"].items()]
    ranked = sorted(report["reasons"].items(), key=lambda item: (-item[1], item[0]))
    rejected = [(name, str(n), f"{n / report['answers']:.1%}", REASONS.get(name, "")) for name, n in ranked]
    counted = {**report["found_in_accepted"], **report["notes"]}
    passed = [(name, str(count), REASONS.get(name) or NOTES.get(name, "")) for name, count in counted.items()]
    parts = [
        "# Captions",
        f"{report['captioned']} of {report['samples']} samples have a caption; {report['rejected_samples']:.1%} have none that "
        f"passed, and {report['rejected_answers']:.1%} of {report['answers']} answers were rejected. {report['shards_done']} of "
        f"{report['shards']} shards are done. Model: {', '.join(report['models']) or 'none yet'}.",
        markdown_table(("", ""), facts),
        markdown_table(("words", "here", "ParaImage-Big"), bands),
        markdown_table(("template", "answers", "rejected"), templates),
        markdown_table(("rejected for", "answers", "of all", ""), rejected or [("nothing", "0", "", "")]),
        *([markdown_table(("in captions that passed", "captions", ""), passed)] if passed else []),
    ]
    examples = [
        f"- {name}, {one['shard']}/{markdown(one['key'])}: {markdown(one['text']) or '(nothing)'}"
        for name, shown in sorted(report["examples"].items())
        for one in shown
    ]
    parts += ["## Examples of rejected answers", "\n".join(examples)] if examples else []
    return "\n\n".join([*parts, *(_judged_parts(report["judged"]) if report["judged"] else [])]) + "\n"


def _judged_parts(judged: dict[str, Any]) -> list[str]:
    share = "no claim got a yes or a no"
    if judged["interval"] is not None:
        low, high = judged["interval"]
        share = f"{judged['share']:.1%} confirmed (95 % interval {low:.1%} to {high:.1%})"
    said = (
        f"{judged['judge'] or 'no judge'}: {judged['claims']} sentences of {judged['captions']} captions, {share}, "
        f"{judged['unclear']} without a clear answer. Claims about one picture count as dependent in the interval."
    )
    unconfirmed = [f"- not confirmed, {one['shard']}/{markdown(one['key'])}: {markdown(one['text'])}" for one in judged["unconfirmed"]]
    return ["## Claims checked by a second model", said, *(["\n".join(unconfirmed)] if unconfirmed else [])]


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"
