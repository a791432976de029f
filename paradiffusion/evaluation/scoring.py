"""The scores of one model on one suite: prepared by all processes, joined by the first, resumable."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from paradiffusion.atomic import write_atomic
from paradiffusion.errors import UserError
from paradiffusion.evaluation.drawing.picture_source import Place
from paradiffusion.evaluation.records import Drawn, Score, ScoreResult
from paradiffusion.sampling.run import ANOTHER, Stopped, StopSignal, disk_errors, first_does

SETTINGS = "settings.json"
LAST = ("counterfactual",)  # it draws, so that the model that is judged must be in memory beside the judge


@dataclass
class Running:
    """``records.Run`` of these processes."""

    rank: int
    size: int
    signal: StopSignal

    def bar(self, total: int, title: str) -> Any:
        """A tqdm bar of the first process; a context manager."""
        interval = 0.5 if sys.stderr.isatty() else 10.0  # a log file need not hold every step
        return tqdm(total=total, desc=title, disable=self.rank > 0, dynamic_ncols=True, mininterval=interval)

    def check(self) -> None:
        """Stopped once a signal came."""
        self.signal.check()


def score_all(
    scores: Sequence[Score | ScoreResult], images: list[Drawn], source: dict[str, Any], place: Place
) -> tuple[list[ScoreResult], list[str]]:
    """Each score's result, in order, and a sentence for each that could not be computed.

    A score that fails does not keep the others from being computed. The results are whole in the first process alone.

    Raises:
        Stopped: after a signal, in every process.
    """
    results = {score.name: score for score in scores if isinstance(score, ScoreResult)}
    failures = []
    for score in sorted(scores, key=lambda score: score.name in LAST):
        if isinstance(score, ScoreResult):
            continue
        try:
            results[score.name] = _score(score, images, source, place)
        except UserError as error:
            results[score.name] = ScoreResult(score.name, score.title, skipped=str(error))
            failures.append(f"{score.name}: {error}")
    return [results[score.name] for score in scores], failures


def _score(score: Score, images: list[Drawn], source: dict[str, Any], place: Place) -> ScoreResult:
    work, processes = place.folder / "scores" / score.name, place.processes
    run = Running(processes.rank, processes.size, place.signal)

    def bind() -> None:
        """Empty what was found under other settings, or about other pictures."""
        failed = {image.name: image.error for image in images if image.error}
        about = {"fingerprint": place.suite.fingerprint, "failed": failed, "content": source.get("content")}
        text = json.dumps({"settings": score.settings(), "about": _digest(about)}, ensure_ascii=False, sort_keys=True)
        kept = work / SETTINGS
        with disk_errors(place.folder):
            if not kept.is_file() or kept.read_text(encoding="utf-8") != text:
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir(parents=True)
                write_atomic(kept, text)

    first_does(processes, bind)
    status, failure = 0, None
    try:
        with disk_errors(place.folder):
            score.prepare(place.suite, images[processes.rank :: processes.size], work, run)
    except Stopped:
        status = 1
    except UserError as error:
        processes.tell(error)
        status, failure = 2, error
    status = processes.agree(status)
    if status == 1:
        raise Stopped
    if failure is not None or status == 2:
        raise failure or UserError(ANOTHER)
    found: list[ScoreResult] = []

    def join() -> None:
        with disk_errors(place.folder):
            found.append(without_nan(score.result(place.suite, images, work)))

    first_does(processes, join)
    return found[0] if found else ScoreResult(score.name, score.title)


def without_nan(result: ScoreResult) -> ScoreResult:
    """An image with a value that is no finite number, as half precision may give, failed: it must not leave the mean."""
    worst = {measure.name: measure.worst for measure in result.measures}
    for one in result.images:
        bad = sorted(name for name, value in one.values.items() if not math.isfinite(value))
        for name in bad:
            least = worst.get(name)
            if least is None:
                del one.values[name]
            else:
                one.values[name] = least
        if bad and not one.error:
            one.error = f"{' and '.join(bad)} came out as no finite number"
    return result


def _digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()[:16]
