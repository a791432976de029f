"""Results of votes for people and programs: one page, the same as Markdown, and as JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from paradiffusion.atomic import write_atomic
from paradiffusion.evaluation.estimates import Estimate
from paradiffusion.evaluation.reporting.texts import plain
from paradiffusion.evaluation.votes.results import Answers, Rates, Results
from paradiffusion.pages import page, page_text

FORMAT_VERSION: Final = 1
STEM: Final = "results"
MOST_LISTED: Final = 200
_STYLE: Final = """
body { max-width: 76rem; } h2 { font-size: 1.2rem; margin: 2rem 0 .3rem; } h3 { font-size: 1rem; margin: 1.3rem 0 .3rem; }
p { margin: .3rem 0; max-width: 60rem; } .note { color: var(--soft); } .warn { color: var(--bad); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .3rem 0; }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; } td small { color: var(--soft); white-space: nowrap; }
.bar { display: flex; width: 14rem; height: .8rem; border-radius: .2rem; overflow: hidden; margin-top: .35rem; }
.bar i { display: block; } .bar .a { background: #2f6fc4; } .bar .t { background: #9aa0a866; } .bar .b { background: #d98a1f; }
@media print { .wide { overflow: visible; } }
"""


@dataclass
class _Table:
    title: str
    head: list[str]
    rows: list[list[str]]
    bars: list[tuple[float, float, float]] = field(default_factory=list)
    note: str = ""


@dataclass
class _Section:
    title: str
    lines: list[str]
    warnings: list[str]
    tables: list[_Table]


def write_results(results: Results, folder: Path) -> Path:
    """Write results.html, results.md and results.json into ``folder``; the page's path."""
    sections = list(_sections(results))
    heading = f"Votes: {results.study}"
    record = {"paradiffusion_votes": FORMAT_VERSION, **_plain(asdict(results))}
    contents = {
        ".html": page(heading, _STYLE, _html(heading, sections)),
        ".md": _markdown(heading, sections),
        ".json": json.dumps(record, ensure_ascii=False, indent=1) + "\n",
    }
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, content in contents.items():
        write_atomic(folder / f"{STEM}{suffix}", content)
    return folder / f"{STEM}.html"


def summary(results: Results) -> list[str]:
    """The main of it, a line each: who is preferred to whom."""
    lines = [f"screens voted on: {sum(r.done for r in results.raters)} of {sum(r.total for r in results.raters)}"]
    for answers in results.answers:
        for one in answers.rates:
            lines.append(
                f"{answers.question.name}: {one.set_a} {_share(one.win)}, tie {_share(one.tie)}, {one.set_b} {_share(one.loss)}, "
                f"{one.win.n} votes on {one.win.prompts} prompts"
            )
        if answers.strengths is not None and len(results.sets) > 2:
            shown = (f"{name} {_number(one)}" for name, one in answers.strengths.sets.items())
            lines.append(f"{answers.question.name}, log strengths: {', '.join(shown)}")
    return lines


def _sections(results: Results) -> Iterator[_Section]:
    done, total = sum(r.done for r in results.raters), sum(r.total for r in results.raters)
    asked = "one after the other over all pairs" if results.ask == "separately" else "together on one screen"
    yield _Section(
        "",
        [
            f"{len(results.sets)} sets ({', '.join(results.sets)}), {results.prompts} prompts of {results.suite}, {results.pairs} "
            f"pairs, each seen by {results.repeats} of {len(results.raters)} raters; questions were asked {asked}.",
            "Intervals are 95 %, by bootstrap over prompts; one without width means that all prompts were alike, not that it is sure. "
            "Raters saw no names; sides were drawn by lot, half and half.",
        ],
        [f"Not finished: {done} of {total} screens are voted on."] if done < total else [],
        [],
    )
    for answers in results.answers:
        yield _answers(answers)
    yield _Section("Raters", [], [], [_raters(results)])
    if results.failures:
        rows = [[name, prompt, str(number), why] for name, prompt, number, why in results.failures[:MOST_LISTED]]
        rest = len(results.failures) - len(rows)
        yield _Section(
            "Missing pictures",
            [
                f"Pictures that could not be shown: {len(results.failures)}. Where the other picture was there it wins, else the two tie; "
                "such pairs count once for each rater to whom they fell."
                + (f" {rest} more are not listed." if rest else "")
            ],
            [],
            [_Table("", ["set", "prompt", "image", "why"], rows)],
        )
    if results.comments:
        rows = [list(row) for row in results.comments[:MOST_LISTED]]
        yield _Section("Comments", [], [], [_Table("", ["rater", "prompt", "comment"], rows)])


def _answers(answers: Answers) -> _Section:
    question = answers.question
    lines = [f"“{question.text}”, asked {'beside the text' if question.shows_text else 'without the text'}."]
    if not answers.votes and not answers.missing:
        return _Section(question.name, [*lines, "No votes yet."], [], [])
    missing = f", and {answers.missing} decided by a missing picture" if answers.missing else ""
    lines.append(f"{answers.votes} votes{missing}.")
    tables = [_rates_table("", {"": answers.rates})]
    warnings = list(answers.warnings)
    if answers.strengths is not None:
        warnings += answers.strengths.warnings
        ordered = sorted(answers.strengths.sets.items(), key=lambda item: -item[1].mean)
        rows = [[name, _number(one), _number(one, 400 / math.log(10), 0), str(one.n)] for name, one in ordered]
        tables.append(
            _Table(
                "Strengths",
                ["set", "log strength", "in Elo points", "votes"],
                rows,
                note="Davidson's model (1970): Bradley and Terry's with ties. Natural logarithm, of mean 0 over the sets: a set "
                "1 above another gets 2.7 votes for each one of the other's, ties aside.",
            )
        )
    for title, groups in (("By length of the prompt (words)", answers.by_band), ("By category", answers.by_category)):
        if groups:
            tables.append(_rates_table(title, groups))
    tables.append(_trust_table(answers))
    return _Section(question.name, lines, warnings, tables)


def _rates_table(title: str, groups: dict[str, list[Rates]]) -> _Table:
    head = ["", "sets", "first wins", "tie", "second wins", "first minus second", "votes", "prompts"]
    rows, bars = [], []
    for name, rates in groups.items():
        for one in rates:
            cells = [_share(one.win), _share(one.tie), _share(one.loss), _share(one.margin, signed=True)]
            rows.append([name, f"{one.set_a} against {one.set_b}", *cells, str(one.win.n), str(one.win.prompts)])
            bars.append((one.win.mean, one.tie.mean, one.loss.mean))
    if not any(row[0] for row in rows):
        head, rows = head[1:], [row[1:] for row in rows]
    return _Table(title, head, rows, bars)


def _trust_table(answers: Answers) -> _Table:
    trust = answers.reliability
    rows = [
        ["raters' agreement, Krippendorff's alpha (nominal; 1 is full, 0 is chance)", _or_none(trust.alpha, _number)],
        ["two raters chose the same", _or_none(trust.same, _share)],
        ["a rater chose the same again", _or_none(trust.again, _share)],
        ["left among votes for a side (50 % where sides do not matter)", _or_none(trust.left, _share)],
    ]
    return _Table("How far to trust this", ["", "", "n"], rows)


def _raters(results: Results) -> _Table:
    rows = []
    for rater in results.raters:
        shares = ["" if value is None else f"{value:.0%}" for value in (rater.ties, rater.left)]
        seconds = "" if rater.seconds is None else f"{rater.seconds:g} s"
        rows.append([rater.name, f"{rater.done} of {rater.total}", str(rater.votes), seconds, *shares])
    return _Table("", ["rater", "screens", "votes", "median time", "ties", "left"], rows)


def _or_none(estimate: Estimate | None, show: Any) -> str:
    return "not measured" if estimate is None else f"{show(estimate)}\t{estimate.n}"


def _share(one: Estimate, signed: bool = False) -> str:
    form = "+.1f" if signed else ".1f"
    return f"{100 * one.mean:{form}} % [{100 * one.low:{form}}, {100 * one.high:{form}}]"


def _number(one: Estimate, factor: float = 1.0, digits: int = 2) -> str:
    return f"{factor * one.mean:.{digits}f} [{factor * one.low:.{digits}f}, {factor * one.high:.{digits}f}]"


def _cells(row: Sequence[str], width: int) -> list[str]:
    cells = [part for cell in row for part in cell.split("\t")]
    return cells + [""] * (width - len(cells))


def _markdown(heading: str, sections: Sequence[_Section]) -> str:
    def cell(text: str) -> str:
        text = plain(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
        return text.replace("](", "]\\(")  # a rater's comment makes no link, and loads no picture

    lines = [f"# {cell(heading)}"]
    for section in sections:
        lines += ["", f"## {cell(section.title)}"] if section.title else []
        lines += ["", *map(cell, section.lines)] if section.lines else []
        lines += [f"\n**{cell(warning)}**" for warning in section.warnings]
        for table in section.tables:
            lines += ["", f"### {cell(table.title)}"] if table.title else []
            lines += ["", f"| {' | '.join(table.head)} |", f"|{'---|' * len(table.head)}"]
            lines += [f"| {' | '.join(map(cell, _cells(row, len(table.head))))} |" for row in table.rows]
            lines += ["", cell(table.note)] if table.note else []
    return "\n".join(lines) + "\n"


def _html(heading: str, sections: Sequence[_Section]) -> str:
    parts = [f"<h1>{page_text(heading)}</h1>"]
    for number, section in enumerate(sections):
        parts.append(f'<section id="part{number}">')
        parts += [f"<h2>{page_text(section.title)}</h2>"] if section.title else []
        parts += [f"<p>{page_text(line)}</p>" for line in section.lines]
        parts += [f'<p class="warn">{page_text(warning)}</p>' for warning in section.warnings]
        for table in section.tables:
            parts += [f"<h3>{page_text(table.title)}</h3>"] if table.title else []
            parts.append(_html_table(table))
            parts += [f'<p class="note">{page_text(table.note)}</p>'] if table.note else []
        parts.append("</section>")
    return "\n".join(parts)


def _html_table(table: _Table) -> str:
    head = "".join(f'<th scope="col">{page_text(cell)}</th>' for cell in table.head)
    rows = []
    for number, row in enumerate(table.rows):
        cells = "".join(f"<td>{_html_cell(cell)}</td>" for cell in _cells(row, len(table.head)))
        if table.bars:
            win, tie, loss = (f"{100 * value:.2f}%" for value in table.bars[number])
            cells += (
                f'<td><span class="bar" role="img" aria-label="wins {win}, ties {tie}, losses {loss}"><i class="a" style="width:'
                f'{win}"></i><i class="t" style="width:{tie}"></i><i class="b" style="width:{loss}"></i></span></td>'
            )
        rows.append(f"<tr>{cells}</tr>")
    extra = '<th scope="col">first, tie, second</th>' if table.bars else ""
    label = page_text(table.title or "results")
    return f'<div class="wide" tabindex="0" role="region" aria-label="{label}"><table><thead><tr>{head}{extra}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _html_cell(text: str) -> str:
    """A cell; an interval stands below its estimate."""
    found = re.fullmatch(r"([-+\d.]+(?: %)?) (\[[-+\d., ]+\])", text)
    return f"{page_text(found[1])}<br><small>{page_text(found[2])}</small>" if found else page_text(text)


def _plain(value: Any) -> Any:
    """``value`` as JSON takes it, with null for what is not finite."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
