"""Tables of what a run measured about itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from paradiffusion.errors import UserError

MEASURES = ("colour_at_place", "shape", "background", "all_right")
HEAD = ("", "steps", "time", "loss short", "loss long", "colour at place", "shape", "background", "all right")


def stage_table(run_dir: Path) -> str:
    """The stages of a run, one row each, with chance, true pictures and codec below: as Markdown.

    Raises:
        UserError: when no stage of the run is complete.
    """
    summaries = [json.loads(path.read_text()) for path in sorted(run_dir.glob("stage[0-9]/summary.json"))]
    if not summaries:
        raise UserError(f"{run_dir} holds no finished stage; run `python train.py stage=1 run_dir={run_dir}` first.")
    rows = [_stage_row(summary) for summary in summaries]
    scored = [summary["alignment"] for summary in summaries if summary["alignment"]]
    if scored:
        last = scored[-1]
        rows.append(["chance (another scene's picture)", *[""] * 4, *(f"{last['chance'][m]:.1%}" for m in MEASURES)])
        rows.append(["codec's reconstructions", *[""] * 4, *(_share(last["codec"][m]) for m in MEASURES)])
        rows.append(["true pictures", *[""] * 4, *(_share(last["true"][m]) for m in MEASURES)])
    widths = [max(len(row[i]) for row in [list(HEAD), *rows]) for i in range(len(HEAD))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    head = "| " + " | ".join(cell.ljust(width) for cell, width in zip(HEAD, widths, strict=True)) + " |"
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    note = (
        f"\n{scored[-1]['scenes']} held-out scenes; in brackets the 95 % interval by bootstrap over scenes."
        if scored
        else ""
    )
    return "\n".join([head, rule, *lines]) + note


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
