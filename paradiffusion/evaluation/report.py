"""Tables of what a run measured about itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from paradiffusion.errors import UserError

MEASURES = ("colour_at_place", "binding", "shape", "colour_and_shape", "background", "all_right")
HEAD = ("", "steps", "time", "loss short", "loss long", *(name.replace("_", " ") for name in MEASURES))


def stage_table(run_dir: Path) -> str:
    """The stages of a run, one row each, with the unbound score, codec and true pictures below: as Markdown.

    Raises:
        UserError: when no stage of the run is complete.
    """
    summaries = [json.loads(path.read_text()) for path in sorted(run_dir.glob("stage[0-9]/summary.json"))]
    if not summaries:
        raise UserError(f"{run_dir} holds no finished stage; run `python train.py stage=1 run_dir={run_dir}` first.")
    named = {f"stage {summary['stage']}": summary for summary in summaries}
    numbers = {name: _numbers(summary) for name, summary in named.items()}
    return _tables(numbers, {name: summary["alignment"] for name, summary in named.items()})


def alignment_table(name: str, alignment: dict[str, Any]) -> str:
    """One checkpoint's alignment (see Validation.alignment) beside the unbound score, codec and true pictures: as Markdown."""
    return _tables({name: [""] * 4}, {name: alignment})


def alignment_text(alignment: dict[str, Any]) -> str:
    """The alignment's colours (see Validation.alignment) as one line, and one for the captions in unseen words."""
    lines = [f"right colour at the right place: {_colours(alignment['drawn'])}"]
    counts = (f"{count} {found['colour_at_place']['share']:.1%}" for count, found in alignment["by_objects"].items())
    lines[0] += f"; by number of objects: {', '.join(counts)}"
    lines[0] += f"; colour and shape {alignment['drawn']['colour_and_shape']['share']:.1%}"
    lines[0] += f"; true pictures {alignment['true']['colour_at_place']['share']:.1%}"
    if "unseen" in alignment:
        lines.append(f"the same from paragraphs in unseen words: {_colours(alignment['unseen'])}")
    return "\n".join(lines)


def _colours(shares: dict[str, dict[str, float]]) -> str:
    right = shares["colour_at_place"]
    text = f"{_share(right)} of {right['n']} objects, unbound {shares['unbound']['share']:.1%}"
    return f"{text}, binding {_number(shares['binding'])}" if "binding" in shares else text


def _tables(numbers: dict[str, list[str]], alignments: dict[str, dict[str, Any]]) -> str:
    """The table of all measures, and the one of colour-at-place by number of objects."""
    empty = [""] * 4
    rows = []
    for name, alignment in alignments.items():
        rows.append([name, *numbers[name], *_cells(alignment.get("drawn", {}))])
        if "unseen" in alignment:
            rows.append([f"{name}, unseen words", *empty, *_cells(alignment["unseen"])])
    scored = {name: alignment for name, alignment in alignments.items() if alignment}
    if not scored:
        return _markdown([list(HEAD), *rows])
    last = list(scored.values())[-1]
    rows += [
        ["unbound (its colours at random)", *empty, f"{last['drawn']['unbound']['share']:.1%}", "0.00", *empty],
        ["codec's reconstructions", *empty, *_cells(last["codec"])],
        ["true pictures", *empty, *_cells(last["true"])],
    ]
    counts = list(last["by_objects"])
    by_objects = [["colour at place, by objects", *counts]]
    for name, alignment in scored.items():
        found = alignment["by_objects"]
        by_objects.append([name, *(_share(found[count]["colour_at_place"]) for count in counts)])
    by_objects.append(["unbound", *(f"{last['by_objects'][count]['unbound']['share']:.1%}" for count in counts)])
    note = f"{last['scenes']} held-out scenes; in brackets the 95 % interval by bootstrap over scenes."
    return f"{_markdown([list(HEAD), *rows])}\n\n{_markdown(by_objects)}\n\n{note}"


def _markdown(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _numbers(summary: dict[str, Any]) -> list[str]:
    """Steps, time and losses of a stage."""
    losses = summary["validation"]
    shown = (f"{losses[key]:.4f}" if key in losses else "" for key in ("loss_short", "loss_long"))
    return [str(summary["steps"]), f"{summary['seconds'] / 60:.1f} min", *shown]


def _cells(shares: dict[str, dict[str, float]]) -> list[str]:
    return [
        "" if name not in shares else _number(shares[name]) if name == "binding" else _share(shares[name])
        for name in MEASURES
    ]


def _share(value: dict[str, float]) -> str:
    return f"{value['share']:.1%} ({value['low']:.0%}-{value['high']:.0%})"


def _number(value: dict[str, float]) -> str:
    return f"{value['share']:.2f} ({value['low']:.2f} to {value['high']:.2f})"
