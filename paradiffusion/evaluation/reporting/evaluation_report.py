"""The report of one evaluation, or of several side by side: report.html, report.md and report.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from paradiffusion.atomic import write_atomic
from paradiffusion.evaluation.estimates import Estimate
from paradiffusion.evaluation.records import Evaluation, finite
from paradiffusion.evaluation.reporting import report_tables as tables
from paradiffusion.evaluation.reporting.cards import MARKS, Album, picture_cards
from paradiffusion.evaluation.reporting.figures import measure_figures, table_figures
from paradiffusion.evaluation.reporting.numbers import MeasureNumbers, Row, ScoreNumbers, SuiteNumbers, suite_numbers
from paradiffusion.evaluation.reporting.sections import section_markdown
from paradiffusion.evaluation.reporting.texts import setting_text
from paradiffusion.evaluation.suites.suite import Suite
from paradiffusion.evaluation.votes.vote_report import answers_section, results_record
from paradiffusion.evaluation.votes.vote_results import Results
from paradiffusion.pages import grid_markdown, markdown, render

PICTURE_BYTES: Final = 5_500_000  # of a page, so that it stays below 8 MB with 400 prompts and three models
SCHEMA: Final = 1
SECTIONS: Final = {
    "judged": "What was judged",
    "scores": "Scores",
    "categories": "By category",
    "each": "Each score",
    "pictures": "Pictures",
    "prompts": "Every prompt",
    "failures": "Failures",
}


def write_report(folder: Path, evaluations: Sequence[Evaluation], votes: Results | None = None, baseline: str | None = None) -> Path:
    """Write the report of ``evaluations`` into ``folder``; the path of its page. ValueError for no evaluations.

    Evaluations of one suite are compared with each other, and each suite has a section of its own. The page is one file that
    needs nothing else; report.md has its tables, report.json its numbers (see ``report_record``).

    Args:
        votes: what people said of these images.
        baseline: the label that differences are taken to; None for the first of each suite.
    """
    if not evaluations:
        raise ValueError("a report needs an evaluation")
    name = default_title(evaluations)
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


def report_page(folder: Path, title: str, suites: Sequence[SuiteNumbers], votes: Results | None) -> str:
    """The HTML of a report that will lie in ``folder``."""
    album = Album(folder, PICTURE_BYTES)
    said = None if votes is None else [answers_section(one) for one in votes.answers]
    return render(
        "evaluation/templates/report.html", title=" ".join(title.split()), sections=SECTIONS, marks=MARKS, votes=said,
        suites=[_suite_page(numbers, album, PICTURE_BYTES // len(suites)) for numbers in suites],
    )  # fmt: skip


def _suite_page(numbers: SuiteNumbers, album: Album, budget: int) -> dict[str, Any]:
    """What the page shows of one suite; ``present`` are the SECTIONS that are not empty."""
    suite = numbers.suite
    pictures, anchors = picture_cards(numbers, album, budget)
    words = sorted(prompt.words for prompt in suite.prompts)
    length = f" of {words[0]} to {words[-1]} words, median {words[len(words) // 2]}" if words else ""
    each = [_score_page(numbers, score, i) for i, score in enumerate(numbers.scores) if not score.described.skipped]
    categories = tables.category_grid(numbers)
    empty = {"each": not each, "categories": not categories.groups}
    return {
        "anchor": numbers.anchor,
        "title": suite.title,
        "present": [name for name in SECTIONS if not empty.get(name)],
        "about": _about(suite, f"{len(words):,} prompts{length}."),
        "judged": tables.judged_grid(numbers),
        "scores": tables.score_grid(numbers),
        "skipped": tables.skipped(numbers),
        "categories": categories,
        "each": each,
        "pictures": pictures,
        "prompts": tables.prompt_grid(numbers, anchors),
        "failures": tables.failure_grid(numbers),
        "failed": len(numbers.failures),
    }


def _about(suite: Suite, counted: str) -> str:
    source = f" Source: {suite.source.rstrip('.')}." if suite.source else ""
    return f"{counted}{source}" + (f" Licence: {suite.licence.rstrip('.')}." if suite.licence else "")


def _score_page(numbers: SuiteNumbers, score: ScoreNumbers, place: int) -> dict[str, Any]:
    result, anchor = score.described, f"{numbers.anchor}-score-{place}"
    figures = [measure_figures(numbers, score, one, f"{anchor}-{number}") for number, one in enumerate(score.measures)]
    return {
        "anchor": anchor,
        "title": score.title,
        "warnings": tables.warnings_of(numbers, score),
        "about": [(name, text) for name, text in (("Formula", result.formula), ("Source", result.source)) if text],
        "settings": tables.settings_lines(numbers, score),
        "figures": figures[0] if figures else [],
        "further": [figure for made in figures[1:] for figure in made],
        "tables": [
            (found[0][1].title, tables.own_grid(found), table_figures(found, f"{anchor}-own-{number}"))
            for number, found in enumerate(tables.own_tables(numbers, score))
        ],
    }


def report_markdown(title: str, suites: Sequence[SuiteNumbers], votes: Results | None) -> str:
    parts = [f"# {markdown(title)}", *(part for numbers in suites for part in _suite_markdown(numbers))]
    if votes is not None:
        parts += ["## Human votes", *(part for one in votes.answers for part in section_markdown(answers_section(one), 3))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _suite_markdown(numbers: SuiteNumbers) -> list[str]:
    suite, parts = numbers.suite, [f"## {markdown(numbers.suite.title)}"]
    parts.append(markdown(_about(suite, f"{len(suite.prompts):,} prompts.")))
    parts.append(grid_markdown(tables.judged_grid(numbers)))
    scores = tables.score_grid(numbers)
    parts += ["### Scores", grid_markdown(scores)] if scores.groups else []
    left = tables.skipped(numbers)
    parts += ["Not computed:\n\n" + "\n".join(f"- {markdown(a)}: {markdown(b)}" for a, b in left)] if left else []
    categories = tables.category_grid(numbers)
    parts += ["### By category", grid_markdown(categories)] if categories.groups else []
    for score in numbers.scores:
        if not score.described.skipped:
            parts += _score_markdown(numbers, score)
    failures = tables.failure_grid(numbers)
    parts += ["### Failures", grid_markdown(failures) if failures.groups else "Nothing failed."]
    return parts


def _score_markdown(numbers: SuiteNumbers, score: ScoreNumbers) -> list[str]:
    result = score.described
    lines = [f"- {name}: {markdown(text)}" for name, text in (("Formula", result.formula), ("Source", result.source)) if text]
    settings = "; ".join(f"{markdown(key)} = {markdown(text)}" for key, text in tables.settings_lines(numbers, score))
    lines += [f"- Settings: {settings}"] if settings else []
    lines += [f"- **Note:** {markdown(text)}" for text in tables.warnings_of(numbers, score)]
    parts = [f"### {markdown(score.title)}", "\n".join(lines)]
    for found in tables.own_tables(numbers, score):
        parts += [f"#### {markdown(found[0][1].title)}", grid_markdown(tables.own_grid(found))]
    return parts


def report_record(title: str, suites: Sequence[SuiteNumbers], votes: Results | None) -> dict[str, Any]:
    """The report as JSON values.

    ``schema``: 1. ``title``. ``suites``: a list of
        ``name``, ``title``, ``source``, ``licence``, ``fingerprint``, ``prompts`` (their number), ``bands`` and
        ``categories`` (number of prompts by name), ``baseline`` (a label), ``models``, ``scores``, ``failures``.
    ``models``: ``label`` (unique in its suite), ``kind``, ``source``, ``images_per_prompt``, ``images``, ``not_drawn``.
    ``scores``: ``name``, ``title``, ``formula``, ``source``, ``unlike`` (settings by which models differ, so that they are
        not compared), ``results`` (``model``, ``settings``, ``warnings``, ``skipped``, ``tables``) and ``measures``.
    ``measures``: ``name``, ``title``, ``unit``, ``higher_is_better``, ``all`` (a row), ``bands`` and ``categories`` (rows by
        name). A row holds ``prompts``, ``best`` (a label or null), ``values`` and ``differences`` by label. A value is
        ``mean``, ``low``, ``high``, ``n``, ``prompts``, or null where nothing was measured; a difference is to the baseline.
    ``failures``: ``model``, ``image``, ``prompt``, ``failed_at``, ``reason``.
    ``votes``: what the vote command found, or null.
    What is not a finite number is null.
    """
    record = {"schema": SCHEMA, "title": title, "suites": [*map(_suite_record, suites)], "votes": votes and results_record(votes)}
    return {key: finite(value) for key, value in record.items()}


def _suite_record(numbers: SuiteNumbers) -> dict[str, Any]:
    prompts = numbers.suite.prompts
    return {
        **_fields(numbers.suite, "name", "title", "source", "licence", "fingerprint"),
        "prompts": len(prompts),
        "bands": _counts([prompt.band for prompt in prompts]),
        "categories": _counts([prompt.category for prompt in prompts]),
        "baseline": numbers.labels[numbers.baseline],
        "models": [
            {
                "label": label,
                "kind": model.kind,
                "source": _settings(model.source),
                "images_per_prompt": model.images_per_prompt,
                "images": len(model.images),
                "not_drawn": sum(bool(drawn.error) for drawn in model.images),
            }
            for label, model in zip(numbers.labels, numbers.models, strict=True)
        ],
        "scores": [_score_record(numbers, score) for score in numbers.scores],
        "failures": [
            {"model": numbers.labels[model], "image": image, "prompt": prompt, "failed_at": what, "reason": reason}
            for model, image, prompt, what, reason in numbers.failures
        ],
    }


def _score_record(numbers: SuiteNumbers, score: ScoreNumbers) -> dict[str, Any]:
    return {
        **_fields(score, "name", "title"),
        **_fields(score.described, "formula", "source"),
        "unlike": list(score.unlike),
        "results": [
            {
                "model": label,
                "settings": _settings(result.settings),
                **_fields(result, "warnings", "skipped"),
                "tables": [asdict(table) for table in result.tables],
            }
            for label, result in zip(numbers.labels, score.results, strict=True)
            if result is not None
        ],
        "measures": [_measure(numbers, one) for one in score.measures],
    }


def _fields(of: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(of, name) for name in names}


def _measure(numbers: SuiteNumbers, one: MeasureNumbers) -> dict[str, Any]:
    return {
        **_fields(one.measure, "name", "title", "unit", "higher_is_better"),
        "all": _row(numbers, one.whole),
        "bands": {row.group: _row(numbers, row) for row in one.bands},
        "categories": {row.group: _row(numbers, row) for row in one.categories},
    }


def _row(numbers: SuiteNumbers, row: Row) -> dict[str, Any]:
    def by_label(values: Sequence[Estimate | None]) -> dict[str, Any]:
        return {label: value and asdict(value) for label, value in zip(numbers.labels, values, strict=True)}

    differences = by_label(row.differences)
    del differences[numbers.labels[numbers.baseline]]
    best = None if row.best is None else numbers.labels[row.best]
    return {"prompts": row.prompts, "best": best, "values": by_label(row.estimates), "differences": differences}


def _settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without what stands under a secret's name."""
    return {
        key: _settings(value) if isinstance(value, Mapping) else value
        for key, value in settings.items()
        if isinstance(value, Mapping) or setting_text(key, "shown") == "shown"
    }


def _counts(names: Sequence[str]) -> dict[str, int]:
    return {name: names.count(name) for name in dict.fromkeys(names) if name}
