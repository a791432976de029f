"""Results of votes for people and programs: one page, the same as Markdown and JSON, and every vote as CSV."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter

from paradiffusion.atomic import atomic_file
from paradiffusion.errors import UserError
from paradiffusion.evaluation.estimates import Estimate
from paradiffusion.evaluation.records import read_record
from paradiffusion.evaluation.reporting.sections import Section, write_sections
from paradiffusion.evaluation.reporting.texts import difference_text, estimate_text, interval_text, value_text
from paradiffusion.evaluation.votes.vote_results import Answers, Rates, Results, outcomes
from paradiffusion.evaluation.votes.vote_store import Vote
from paradiffusion.evaluation.votes.vote_study import Study
from paradiffusion.pages import Cell, Grid, Group, text_grid

FORMAT_VERSION: Final = 1
STEM: Final = "results"
MOST_LISTED: Final = 200


def write_results(results: Results, folder: Path) -> Path:
    """Write results.html, results.md and results.json into ``folder``; the page's path."""
    return write_sections(folder, STEM, f"Votes: {results.study}", list(_sections(results)), results_record(results))


def results_record(results: Results) -> dict[str, Any]:
    return {"paradiffusion_votes": FORMAT_VERSION, **asdict(results)}


def read_results(path: Path) -> Results:
    """The results in a results.json. UserError for a file that is missing, damaged or another one."""
    fix = "name the results.json of a study of scripts/vote.py"

    def made(record: Any) -> Results:
        if not isinstance(record, dict) or "paradiffusion_votes" not in record:
            raise UserError(f"{path} holds no results of votes; {fix}.")
        return TypeAdapter(Results).validate_python(record)

    return read_record(path, made, fix)


def summary(results: Results) -> list[str]:
    """The main of it, a line each: who is preferred to whom."""
    lines = [f"screens voted on: {sum(r.done for r in results.raters)} of {sum(r.total for r in results.raters)}"]
    for answers in results.answers:
        for one in answers.rates:
            win, tie, loss = (estimate_text(share, "share") for share in (one.win, one.tie, one.loss))
            counted = f"{one.win.n} votes on {one.win.prompts} prompts"
            lines.append(f"{answers.question.name}: {one.set_a} {win}, tie {tie}, {one.set_b} {loss}, {counted}")
        if answers.strengths is not None and len(results.sets) > 2:
            shown = (f"{name} {estimate_text(one, 'number')}" for name, one in answers.strengths.sets.items())
            lines.append(f"{answers.question.name}, log strengths: {', '.join(shown)}")
    return lines


def _sections(results: Results) -> Iterator[Section]:
    done, total = sum(r.done for r in results.raters), sum(r.total for r in results.raters)
    asked = "one after the other over all pairs" if results.ask == "separately" else "together on one screen"
    yield Section(
        "",
        [
            f"{len(results.sets)} sets ({', '.join(results.sets)}), {results.prompts} prompts of {results.suite}, {results.pairs} "
            f"pairs, each seen by {results.repeats} of {len(results.raters)} raters; questions were asked {asked}.",
            "Intervals are 95 %, by bootstrap over prompts; one without width means that all prompts were alike, not that it is sure. "
            "Raters saw no names; sides were drawn by lot, half and half.",
        ],
        [f"Not finished: {done} of {total} screens are voted on."] if done < total else [],
    )
    for answers in results.answers:
        yield answers_section(answers)
    yield Section("Raters", tables=[("", _raters(results))])
    if results.failures:
        rows = [[name, prompt, str(number), why] for name, prompt, number, why in results.failures[:MOST_LISTED]]
        rest = len(results.failures) - len(rows)
        yield Section(
            "Missing pictures",
            [
                f"Pictures that could not be shown: {len(results.failures)}. Where the other picture was there it wins, else the two tie; "
                "such pairs count once for each rater to whom they fell." + (f" {rest} more are not listed." if rest else "")
            ],
            tables=[("", text_grid(["set", "prompt", "image", "why"], rows, words=4))],
        )
    if results.comments:
        rows = [list(row) for row in results.comments[:MOST_LISTED]]
        yield Section("Comments", tables=[("", text_grid(["rater", "prompt", "comment"], rows, words=3))])


def answers_section(answers: Answers) -> Section:
    question = answers.question
    lines = [f"“{question.text}”, asked {'beside the text' if question.shows_text else 'without the text'}."]
    if not answers.votes and not answers.missing:
        return Section(question.name, [*lines, "No votes yet."])
    missing = f", and {answers.missing} decided by a missing picture" if answers.missing else ""
    lines.append(f"{answers.votes} votes{missing}.")
    tables = [("", _rates_table({"": answers.rates}))]
    warnings = list(answers.warnings)
    if answers.strengths is not None:
        warnings += answers.strengths.warnings
        ordered = sorted(answers.strengths.sets.items(), key=lambda item: -item[1].mean)
        rows = [[Cell(name), _cell(one, "number"), _cell(_elo(one), "number"), Cell(str(one.n))] for name, one in ordered]
        note = (
            "Davidson's model (1970): Bradley and Terry's with ties. Natural logarithm, of mean 0 over the sets: a set "
            "1 above another gets 2.7 votes for each one of the other's, ties aside."
        )
        tables.append(("Strengths", Grid(["set", "log strength", "in Elo points", "votes"], [Group("", rows)], note)))
    for title, groups in (("By length of the prompt (words)", answers.by_band), ("By category", answers.by_category)):
        if groups:
            tables.append((title, _rates_table(groups)))
    tables.append(("How far to trust this", _trust_table(answers)))
    return Section(question.name, lines, warnings, tables)


def _rates_table(groups: dict[str, list[Rates]]) -> Grid:
    head = ["sets", "first wins", "tie", "second wins", "first minus second", "votes", "prompts", "first, tie, second"]
    made = []
    for name, rates in groups.items():
        rows = []
        for one in rates:
            shares = [_cell(share, "share") for share in (one.win, one.tie, one.loss)]
            shares.append(Cell(difference_text(one.margin, "share")))
            bar = Cell("", bar=(one.win.mean, one.tie.mean, one.loss.mean))
            sets = Cell(f"{one.set_a} against {one.set_b}")
            rows.append([sets, *shares, Cell(str(one.win.n)), Cell(str(one.win.prompts)), bar])
        made.append(Group(name, rows))
    return Grid(head, made)


def _trust_table(answers: Answers) -> Grid:
    trust = answers.reliability
    rows = [
        ("raters' agreement, Krippendorff's alpha (nominal; 1 is full, 0 is chance)", trust.alpha, "number"),
        ("two raters chose the same", trust.same, "share"),
        ("a rater chose the same again", trust.again, "share"),
        ("left among votes for a side (50 % where sides do not matter)", trust.left, "share"),
    ]
    made = [
        [Cell(name), *([Cell("not measured"), Cell("")] if one is None else [_cell(one, unit), Cell(str(one.n))])]
        for name, one, unit in rows
    ]
    return Grid(["", "", "n"], [Group("", made)])


def _raters(results: Results) -> Grid:
    rows = []
    for rater in results.raters:
        shares = ["" if value is None else f"{value:.0%}" for value in (rater.ties, rater.left)]
        seconds = "" if rater.seconds is None else f"{rater.seconds:g} s"
        rows.append([rater.name, f"{rater.done} of {rater.total}", str(rater.votes), seconds, *shares])
    return text_grid(["rater", "screens", "votes", "median time", "ties", "left"], rows)


def _cell(one: Estimate, unit: str) -> Cell:
    return Cell(value_text(one.mean, unit), (interval_text(one, unit),))


def _elo(one: Estimate) -> Estimate:
    low, mean, high = (400 / math.log(10) * value for value in (one.low, one.mean, one.high))
    return replace(one, low=low, mean=mean, high=high)


COLUMNS: Final = (
    "study", "rater", "prompt", "category", "band", "set_a", "set_b", "left", "question", "choice", "seconds", "at", "image",
    "occasion", "missing", "comment",
)  # fmt: skip


def write_csv(study: Study, votes: Sequence[Vote], comments: Mapping[tuple[str, str], str], path: Path) -> int:
    """Write a row for each vote, and for each pair that a missing picture decided (``missing`` is then 1, ``left`` empty); how many votes
    there were. ``choice`` is a, b or tie; ``occasion`` 1 where a rater saw the pair for the second time; ``at`` in UTC."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial, partial.open("w", encoding="utf-8", errors="replace", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for one in outcomes(study, votes, comments):
            row = {name: getattr(one, name) for name in COLUMNS if name != "study"}
            row |= {"study": study.name, "missing": int(one.missing), "comment": _harmless(one.comment)}
            writer.writerow(row)
    return len(votes)


def _harmless(text: str) -> str:
    """What a rater wrote, so that a spreadsheet shows it and does not compute it."""
    # A carriage return alone is not quoted by the csv module, and ends the row for most that read it.
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return f"'{text}" if text[:1] in "=+-@\t\n" and text else text
