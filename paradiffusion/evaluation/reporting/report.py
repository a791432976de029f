"""The report of one evaluation, or of several side by side: report.html, report.md and report.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paradiffusion.atomic import write_atomic
from paradiffusion.evaluation.reporting.as_json import report_record
from paradiffusion.evaluation.reporting.as_markdown import report_markdown
from paradiffusion.evaluation.reporting.numbers import suite_numbers
from paradiffusion.evaluation.reporting.page import report_page
from paradiffusion.evaluation.result import Evaluation


def write_report(
    folder: Path,
    evaluations: Sequence[Evaluation],
    title: str | None = None,
    votes: Mapping[str, Any] | None = None,
    baseline: str | None = None,
) -> Path:
    """Write the report of ``evaluations`` into ``folder``; the path of its page.

    Evaluations of one suite are compared with each other, and each suite has a section of its own. The page is one file that
    needs nothing else; report.md has its tables, report.json its numbers (see ``as_json.report_record``).

    Args:
        title: None for one made of the labels and suites.
        votes: what people said of these images (see ``votes.vote_tables``).
        baseline: the label that differences are taken to; None for the first of each suite.
    Raises:
        ValueError: for no evaluations.
    """
    if not evaluations:
        raise ValueError("a report needs an evaluation")
    name = title or default_title(evaluations)
    suites = suite_numbers(evaluations, baseline)
    record = report_record(name, suites, votes)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "report.json", json.dumps(record, ensure_ascii=False, indent=1, allow_nan=False) + "\n")
    write_atomic(folder / "report.md", report_markdown(name, suites, votes))
    write_atomic(folder / "report.html", report_page(folder, name, suites, votes))
    return folder / "report.html"


def default_title(evaluations: Sequence[Evaluation]) -> str:
    """ "stage 1, stage 2 and stage 3 on Built-in scenes"."""
    labels = list(dict.fromkeys(evaluation.label for evaluation in evaluations))
    suites = list(dict.fromkeys(evaluation.suite.title for evaluation in evaluations))
    return f"{_listed(labels)} on {_listed(suites)}"


def _listed(names: Sequence[str]) -> str:
    if len(names) > 5:
        names = [*names[:4], f"{len(names) - 4} more"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
