"""Tables of a report: what was judged, scores by length and category, every prompt, failures, scores' own tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from paradiffusion.evaluation.estimates import Estimate
from paradiffusion.evaluation.records import Measure, Table
from paradiffusion.evaluation.reporting.cards import image_values, leading, short_title
from paradiffusion.evaluation.reporting.numbers import MeasureNumbers, Row, ScoreNumbers, SuiteNumbers
from paradiffusion.evaluation.reporting.texts import MISSING, cell_text, difference_text, excerpt, interval_text, setting_text, value_text
from paradiffusion.evaluation.suites.suite import BAND_NAMES, by_id
from paradiffusion.pages import Cell, Grid, Group, cells

MOST_FAILURES: Final = 200
MOST_PROMPTS: Final = 1000


def judged_grid(numbers: SuiteNumbers) -> Grid:
    """What was judged: each model, where its pictures come from, and how many there are."""
    rows = []
    for label, model in zip(numbers.labels, numbers.models, strict=True):
        source = "; ".join(f"{key}: {setting_text(key, value)}" for key, value in model.source.items())
        failed = sum(bool(drawn.error) for drawn in model.images)
        images = Cell(f"{len(model.images):,}", (f"{model.images_per_prompt} for each prompt",))
        failures = Cell(f"{failed:,}", mark="bad" if failed else "")
        rows.append([*cells([label, model.kind, source or MISSING]), images, failures])
    return Grid(["model", "kind", "source", "images", "not drawn"], [Group("", rows)], words=3)


def score_grid(numbers: SuiteNumbers) -> Grid:
    """Every measure over all prompts and by length: of several models a column for each, of one a column for each length."""
    measures = [
        (score, one) for score in numbers.scores for one in score.measures if any(value is not None for value in one.whole.estimates)
    ]
    if len(numbers.labels) == 1:
        return _lengths_across(numbers, measures)
    groups = []
    for score, one in measures:
        rows = [one.whole, *one.bands]
        if len(one.bands) == 1 and one.bands[0].prompts == one.whole.prompts:  # said instead of shown twice
            rows = [replace(one.whole, group=f"all prompts, {one.bands[0].group}")]
        groups.append(Group(_title(score, one), [_row(row, one.measure, numbers) for row in rows], main=1))
    return Grid(["length in words", "n", *numbers.labels], groups, _comparison_note(numbers))


def _lengths_across(numbers: SuiteNumbers, measures: Sequence[tuple[ScoreNumbers, MeasureNumbers]]) -> Grid:
    bands = [name for name in BAND_NAMES if any(row.group == name for _, one in measures for row in one.bands)]
    every = "all prompts"
    if len({prompt.band for prompt in numbers.suite.prompts}) == 1:
        every, bands = f"all prompts, {numbers.suite.prompts[0].band} words", []
    rows = []
    for score, one in measures:
        of = {row.group: row.estimates[0] for row in one.bands}
        row = [Cell(_title(score, one))]
        for value in (one.whole.estimates[0], *(of.get(band) for band in bands)):
            if value is None:
                row.append(Cell(MISSING))
                continue
            below = (interval_text(value, one.measure.unit), f"n {_count(value.n, value.prompts)}")
            row.append(Cell(value_text(value.mean, one.measure.unit), below))
        rows.append(row)
    head = ["score", every, *(f"{band} words" for band in bands)]
    return Grid(head, [Group("", rows)] if rows else [], _comparison_note(numbers))


def category_grid(numbers: SuiteNumbers) -> Grid:
    """Every measure by category; without groups where the suite has no categories."""
    groups = [
        Group(_title(score, one), [_row(row, one.measure, numbers) for row in one.categories])
        for score in numbers.scores
        for one in score.measures
        if one.categories
    ]
    return Grid(["category", "n", *numbers.labels], groups)


def own_grid(tables: Sequence[tuple[str, Table]]) -> Grid:
    """One table of a score's own, of each model that has it: (the model's label or "", the table)."""
    widest = max((table for _, table in tables), key=lambda table: len(table.head))
    groups = [Group(label, [[Cell(cell_text(cell, table.unit)) for cell in row] for row in table.rows]) for label, table in tables]
    notes = dict.fromkeys(table.note for _, table in tables if table.note)
    if len(notes) > 1:
        notes = dict.fromkeys(f"{label}: {table.note}" for label, table in tables if table.note)
    return Grid([str(text) for text in widest.head], groups, " ".join(notes))


def prompt_grid(numbers: SuiteNumbers, anchors: Mapping[str, str]) -> Grid:
    """Every prompt with its leading values, means over its images."""
    scores = [(score, measure, image_values(score, measure)) for score, measure in leading(numbers)]
    images: dict[str, list[str]] = {}
    owners = {drawn.name: drawn.prompt for model in numbers.models for drawn in model.images}
    for name in dict.fromkeys(drawn.name for model in numbers.models for drawn in model.images):
        images.setdefault(owners[name], []).append(name)
    rows = []
    for prompt in numbers.suite.prompts[:MOST_PROMPTS]:
        names = images.get(prompt.id, [])
        link = next((f"#{anchors[name]}" for name in names if name in anchors), "")
        words = Cell(f"{prompt.words}", order=prompt.words)
        row = [Cell(prompt.id, link=link), Cell(excerpt(prompt.text, 60)), Cell(prompt.category), words]
        for _, measure, values in scores:
            for model in range(len(numbers.models)):
                own = [values[name][model] for name in names if model in values.get(name, {})]
                value = sum(own) / len(own) if own else None
                row.append(Cell(value_text(value, measure.unit), order=value))
        rows.append(row)
    whose = [f": {label}" for label in numbers.labels] if len(numbers.labels) > 1 else [""]
    heads = [f"{short_title(score)}{label}" for score, _, _ in scores for label in whose]
    total = len(numbers.suite.prompts)
    note = f"{len(rows):,} of {total:,} prompts; evaluation.json has all." if len(rows) < total else ""
    return Grid(["prompt", "text", "category", "words", *heads], [Group("", rows)], note, words=3, sortable=True)


def failure_grid(numbers: SuiteNumbers) -> Grid:
    """Everything that failed, with the reason; without groups where nothing did."""
    failures, prompts = numbers.failures, by_id(numbers.suite.prompts)
    texts = {name: excerpt(prompt.text, 80) for name, prompt in prompts.items()}
    rows = [
        cells([image, numbers.labels[model], what, reason, texts.get(prompt, "")])
        for model, image, prompt, what, reason in failures[:MOST_FAILURES]
    ]
    note = f"{len(rows):,} of {len(failures):,} shown; report.json has all." if len(rows) < len(failures) else ""
    head = ["image", "model", "where", "reason", "prompt"]
    return Grid(head, [Group("", rows)] if rows else [], note, words=5)


def own_tables(numbers: SuiteNumbers, score: ScoreNumbers) -> list[list[tuple[str, Table]]]:
    """For each title, (label, table) of every model that has it; the label is "" where only one was asked, as for what is said of
    all models together."""
    many = sum(result is not None for result in score.results) > 1
    found: dict[str, list[tuple[str, Table]]] = {}
    for label, result in zip(numbers.labels, score.results, strict=True):
        for table in result.tables if result is not None else ():
            found.setdefault(table.title, []).append((label if many else "", table))
    return list(found.values())


def skipped(numbers: SuiteNumbers) -> list[tuple[str, str]]:
    """(score, why it was not computed), once for all models that say the same."""
    found: dict[tuple[str, str], list[str]] = {}
    for score in numbers.scores:
        for label, result in zip(numbers.labels, score.results, strict=True):
            if result is not None and result.skipped:
                found.setdefault((result.title, result.skipped), []).append(label)
    every = len(numbers.labels)
    return [(title if len(labels) == every else f"{title} ({', '.join(labels)})", why) for (title, why), labels in found.items()]


def warnings_of(numbers: SuiteNumbers, score: ScoreNumbers) -> list[str]:
    """The warnings of each model's result, with the labels of those that have it where not all do."""
    found: dict[str, list[str]] = {}
    for label, result in zip(numbers.labels, score.results, strict=True):
        for text in result.warnings if result is not None else ():
            found.setdefault(text, []).append(label)
    every = sum(result is not None for result in score.results)
    return [text if len(labels) == every else f"{', '.join(labels)}: {text}" for text, labels in found.items()]


def settings_lines(numbers: SuiteNumbers, score: ScoreNumbers) -> list[tuple[str, str]]:
    """A score's settings; one that differs between models is given for each of them."""
    lines = []
    known = [(label, r) for label, r in zip(numbers.labels, score.results, strict=True) if r is not None and not r.skipped]
    for key in dict.fromkeys(key for _, result in known for key in result.settings):
        texts = [(label, setting_text(key, result.settings.get(key))) for label, result in known]
        same = len({text for _, text in texts}) == 1
        lines.append((key, texts[0][1] if same else "; ".join(f"{label}: {text}" for label, text in texts)))
    return lines


def group_name(group: str) -> str:
    """How a row of Row.group is called."""
    return {"all": "all prompts", "none": "no category"}.get(group, group)


def _row(row: Row, measure: Measure, numbers: SuiteNumbers) -> list[Cell]:
    counts = list(dict.fromkeys((value.n, value.prompts) for value in row.estimates if value is not None))
    same = len(counts) == 1
    numbers_of = sorted(n for n, _ in counts)
    count = _count(*counts[0]) if same else f"{numbers_of[0]:,} to {numbers_of[-1]:,}" if counts else MISSING
    made = [Cell(group_name(row.group)), Cell(count)]
    for number, value in enumerate(row.estimates):
        small = [interval_text(value, measure.unit)]
        changed = difference_text(row.differences[number], measure.unit)
        small += [f"Δ {changed}"] if changed else []
        small += [f"n {_count(value.n, value.prompts)}"] if value is not None and not same else []
        text = value_text(value.mean if isinstance(value, Estimate) else None, measure.unit)
        made.append(Cell(text, tuple(small), "best" if row.best == number else ""))
    return made


def _count(n: int, prompts: int) -> str:
    return f"{n:,}" if n == prompts else f"{n:,} in {prompts:,} prompt{'s' * (prompts != 1)}"


def _title(score: ScoreNumbers, one: MeasureNumbers) -> str:
    better = " (lower is better)" if one.measure.higher_is_better is False else ""
    name = one.measure.title
    return f"{score.title}: {name}{better}" if name.lower() != score.title.lower() else f"{name}{better}"


def _comparison_note(numbers: SuiteNumbers) -> str:
    note = "Below each value its 95 % interval by bootstrap over prompts."
    if len(numbers.labels) > 1:
        note += (
            f" Δ is the difference to {numbers.labels[numbers.baseline]}, shares in percentage points, with the interval of the "
            "same prompts resampled for both. Best is marked only where the interval of the difference to the next best excludes 0."
        )
    unlike = [score for score in numbers.scores if score.unlike]
    note += "".join(
        f" {score.title}: the models were scored with different settings ({', '.join(score.unlike)}), so they are not compared."
        for score in unlike
    )
    return note
