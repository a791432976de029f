"""Scores of stored pictures are the numbers that the code of 4daf0f7 gave, before the house was rebuilt (tests/support/stored_pictures)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from judged_scenes import Alone
from tiny_clip import write_clip

from paradiffusion.evaluation.records import Drawn, Score, estimate
from paradiffusion.evaluation.scores.scenes_score import ScenesScore
from paradiffusion.evaluation.scores.segments import SegmentAlignment
from paradiffusion.evaluation.scores.sentence_judges import ClipJudge, SceneJudge
from paradiffusion.evaluation.scores.sentence_report import SentenceReport
from paradiffusion.evaluation.scores.set_quality import FrechetClip
from paradiffusion.evaluation.suites.suite import Suite, SuitePrompt

STORED = Path(__file__).parents[2] / "support" / "stored_pictures"


def measured(score: Score, work: Path) -> dict[str, list[float]]:
    """(mean, low, high, n) of each measure; a number of the whole set under the score's own name."""
    rows = [json.loads(line) for line in (STORED / "prompts.jsonl").read_text().splitlines()]
    suite = Suite("stored", "Stored", tuple(SuitePrompt(r["id"], r["text"], meta={"scene": r["scene"]}) for r in rows))
    images = [Drawn(r["id"], r["id"], STORED / f"{number:05d}.png", number) for number, r in enumerate(rows)]
    score.prepare(suite, images, work, Alone())
    result = score.result(suite, images, work)
    found = {measure.name: estimate(result, measure) for measure in result.measures}
    return {name: [one.mean, one.low, one.high, one.n] for name, one in found.items() if one is not None}


def scores(folder: Path) -> dict[str, Score]:
    clip = str(write_clip(folder / "clip"))
    return {
        "scenes": ScenesScore(),
        "sentences by the truth": SentenceReport(SceneJudge()),
        "segments by the truth": SegmentAlignment(SceneJudge()),
        "segments by CLIP": SegmentAlignment(ClipJudge(clip)),
        "CLIP-FD": FrechetClip(STORED / "reference", spec=clip),
    }


def test_scores_of_stored_pictures_are_those_of_before(tmp_path: Path) -> None:
    kept: dict[str, Any] = json.loads((STORED / "scores.json").read_text())
    found = {name: measured(score, tmp_path / name / "work") for name, score in scores(tmp_path).items()}
    assert found.keys() == kept.keys()
    for name, values in kept.items():
        assert found[name].keys() >= values.keys(), name  # later code measures more
        room = 1e-3 if name == "CLIP-FD" else 1e-6
        for measure, numbers in values.items():
            assert found[name][measure] == pytest.approx(numbers, abs=room), (name, measure)
