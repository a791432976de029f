"""Tables of what a run measured about itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from paradiffusion.errors import UserError

MEASURES = ("colour_at_place", "shape", "background", "all_right")
HEAD = ("", "steps", "time", "loss short", "loss long", "colour at place", "shape", "background", "all right")


def stage_table(run_dir: Path) -> str:
    """The stages of a run, one row each, with chance, codec and true pictures below: as Markdown.

    Raises:
        UserError: when no stage of the run is complete.
    """
    summaries = [json.loads(path.read_text()) for path in sorted(run_dir.glob("stage[0-9]/summary.json"))]
    if not summaries:
        raise UserError(f"{run_dir} holds no finished stage; run `python train.py stage=1 run_dir={run_dir}` first.")
    rows = [_stage_row(summary) for summary in summaries]
    scored = [summary["alignment"] for summary in summaries if summary["alignment"]]
    return _table(rows, scored[-1] if scored else None)


def alignment_table(name: str, alignment: dict[str, Any]) -> str:
    """One checkpoint's alignment (see Validation.alignment) beside chance, codec and true pictures: as Markdown."""
    return _table([[name, *[""] * 4, *(_share(alignment["drawn"][measure]) for measure in MEASURES)]], alignment)


def _table(rows: list[list[str]], alignment: dict[str, Any] | None) -> str:
    note = ""
    if alignment is not None:
        rows += [
            ["chance (another scene's picture)", *[""] * 4, *(f"{alignment['chance'][m]:.1%}" for m in MEASURES)],
            ["codec's reconstructions", *[""] * 4, *(_share(alignment["codec"][m]) for m in MEASURES)],
            ["true pictures", *[""] * 4, *(_share(alignment["true"][m]) for m in MEASURES)],
        ]
        note = f"\n{alignment['scenes']} held-out scenes; in brackets the 95 % interval by bootstrap over scenes."
    widths = [max(len(row[i]) for row in [list(HEAD), *rows]) for i in range(len(HEAD))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in [HEAD, *rows]]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + note


def _stage_row(summary: dict[str, Any]) -> list[str]:
    losses = summary["validation"]
    alignment = summary["alignment"]
    return [
        f"stage {summary['stage']}",
        str(summary["steps"]),
        f"{summary['seconds'] / 60:.1f} min",
        *(f"{losses[key]:.4f}" if key in losses else "" for key in ("loss_short", "loss_long")),
        *(_share(alignment["drawn"][measure]) if alignment else "" for measure in MEASURES),
    ]


def _share(value: dict[str, float]) -> str:
    return f"{value['share']:.1%} ({value['low']:.0%}-{value['high']:.0%})"
