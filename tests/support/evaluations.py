"""Tiny checkpoints in the layout of a training run, and evaluations of them within the tests' own process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from official_models import MODERN, make_ours
from programs import script

EXACT = "scores=[scenes,sentences,segments]"  # without a model, and without drawing anything more


def evaluate_here(*arguments: str) -> int:
    """What ``scripts/evaluate.py`` does with these arguments; a UserError comes through."""
    status: int = script("evaluate").main(list(arguments))
    return status


def make_run(folder: Path, codec_folder: Path) -> Path:
    """A run of two stages with a checkpoint each: of a flow, and of the paper's kind."""
    make_ours(folder / "stage1" / "checkpoints" / "step_000005", codec_folder, **MODERN)
    make_ours(folder / "stage2" / "checkpoints" / "step_000005", codec_folder)
    return folder


def copy_run(run: Path, to: Path) -> Path:
    """The same run elsewhere, without what was evaluated."""
    shutil.copytree(run, to, ignore=shutil.ignore_patterns("evaluation"))
    return to


def record_in(folder: Path) -> Any:
    """evaluation.json, as JSON."""
    return json.loads((folder / "evaluation.json").read_text())


def write_prompts(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A .jsonl of prompts, as sample.py takes it."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
