"""Long captions for the samples of shards: questions to an engine, a journal, checks, and the shards written again."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from tqdm import tqdm

from paradiffusion.curation.captioning.caption_checks import UNREADABLE, Verdict, judge_text
from paradiffusion.curation.captioning.caption_journal import Entry, Journal, read_lines, write_lines
from paradiffusion.curation.captioning.caption_options import CaptionOptions
from paradiffusion.curation.captioning.caption_prompts import Template, draw
from paradiffusion.data.images import BadImage, decode
from paradiffusion.data.index import SampleIndex, read_sample
from paradiffusion.data.shards import RawSample, write_shards
from paradiffusion.errors import UserError
from paradiffusion.metrics.vlm import Answer, Engine, Question, fit
from paradiffusion.randomness import seed_from

# A retry that takes the likeliest token again would only repeat itself where there is one template.
RETRY_TEMPERATURE: Final = 0.7
_REFUSED_AT_START: Final = 16


@dataclass
class Task:
    """A question to come: about the sample of ``row`` in the index."""

    row: int
    part: int
    prompt: str
    seed: int
    temperature: float


@dataclass
class Work:
    """What all shards of this process share.

    Attributes:
        index: of this process's shards.
        side: the long side, in pixels, of what the model is shown.
        check_stop: raises once a signal has come.
        bar: moves by one for each answer.
        refused: errors in a row before the first answer.
        noted, rejected: answers of this run, and those of them that were rejected, for the bar.
    """

    options: CaptionOptions
    output: Path
    index: SampleIndex
    templates: list[Template]
    side: int
    check_stop: Callable[[], None]
    bar: tqdm[Any]
    refused: int = 0
    answered: bool = field(default=False)
    noted: int = 0
    rejected: int = 0

    def rows(self, number: int) -> range:
        """The rows of shard ``number``."""
        first, last = np.searchsorted(self.index.shard, [number, number + 1])
        return range(int(first), int(last))


def make_bar(total: int, what: str, shown: bool) -> tqdm[Any]:
    """A bar with rate and time left; in a log file, a line every half minute."""
    slow = not sys.stderr.isatty()
    return tqdm(
        total=total, desc=what, unit="img", disable=not shown, smoothing=0.05, dynamic_ncols=not slow,
        mininterval=30 if slow else 0.2, maxinterval=60 if slow else 10,
    )  # fmt: skip


def check_names(shards: Sequence[Any], options: CaptionOptions) -> None:
    """Raise UserError where two shards, or a shard and what is written for it, would share a name."""
    seen: dict[str, Any] = {}
    output = Path(str(options.output)).expanduser().resolve()
    for shard in shards:
        if shard.stem in seen:
            raise UserError(
                f"the shards {seen[shard.stem]} and {shard} have the same name, and so would their captions; caption each set "
                "into an output= of its own."
            )
        seen[shard.stem] = shard
        if options.write == "shards" and isinstance(shard, Path) and shard.resolve().parent == output:
            raise UserError(
                f"output={options.output} is the folder of {shard}, which would be overwritten; choose another."
            )


def caption_shard(work: Work, engine: Engine, number: int) -> None:
    """Caption one shard, from where it was left, and write ``<shard>.jsonl`` and, if asked for, ``<shard>.tar``.

    Raises:
        UserError: where the engine cannot go on, or another process is at this shard.
    """
    shard, rows = work.index.shards[number], work.rows(number)
    lines, path = work.output / f"{shard.stem}.jsonl", work.output / f"{shard.stem}.journal"
    target = work.output / f"{shard.stem}.tar"
    judged = [work.output / f"{shard.stem}{end}" for end in (".judged.jsonl", ".judging")]
    wanted = work.options.write == "shards" and bool(rows)
    if lines.exists():
        work.bar.update(len(rows))
        _read_records(work, number, lines)
    if not lines.exists() or (wanted and not target.exists()):
        with Journal(path) as journal:  # held while the tar is written too: two would write one temporary file
            if not lines.exists():  # else another process has written them between our look and its lock
                _ask_all(work, engine, journal, rows)
                for old in (target, *judged):  # of lines that were deleted; a server need not say the same again
                    old.unlink(missing_ok=True)
                write_lines(lines, [_record(work, engine, journal, rows, row) for row in rows])
            if wanted and not target.exists():
                _write_captioned(work, rows, _read_records(work, number, lines), target)
    path.unlink(missing_ok=True)


def _read_records(work: Work, number: int, lines: Path) -> list[dict[str, Any]]:
    """A shard's lines. Raises UserError where they are of other samples."""
    records = read_lines(lines)
    if [record["key"] for record in records] != [work.index.key(row) for row in work.rows(number)]:
        raise UserError(
            f"the shard {work.index.shards[number]} has changed since it was captioned; delete {lines}, or restore the shard."
        )
    return records


def _ask_all(work: Work, engine: Engine, journal: Journal, rows: range) -> None:
    """All attempts at the captions of one shard that ``journal`` has not."""
    check_journal(work, journal, rows)
    work.bar.update(sum(part == 0 for _, part in journal.entries))
    for attempt in range(work.options.retries + 1):
        tasks = _tasks(work, journal, rows, attempt)
        if attempt:
            work.bar.total = (work.bar.total or 0) + len(tasks)
            work.bar.update(sum((task.row - rows.start, attempt) in journal.entries for task in tasks))

        def rejects(entry: Entry) -> bool:
            return _verdict(work, rows.start + entry.row, entry).rejected

        ask(work, engine, journal, tasks, rows.start, rejects)


def check_journal(work: Work, journal: Journal, rows: range) -> None:
    """Raise UserError where answers would go to other pictures than they were given for."""
    for row, part in journal.entries:
        if row >= len(rows) or journal.entries[row, part].key != work.index.key(rows[row]):
            raise UserError(
                f"a shard has changed since its captions were begun; delete {journal.path}, or restore the shard."
            )


def ask(
    work: Work,
    engine: Engine,
    journal: Journal,
    tasks: list[Task],
    first: int,
    rejects: Callable[[Entry], bool] | None = None,
) -> None:
    """Put the questions that ``journal`` has no answer to, pictures of like size together.

    The bar shows the share of the answers that ``rejects``, so that nobody learns after days that the model does not suit.

    Whole batches are asked again where one answer of them is missing: an answer may depend on its neighbours by rounding,
    and a resumed run is to write what an uninterrupted one does.
    """
    width, height = work.index.width, work.index.height

    def size(task: Task) -> tuple[float, float, int, int]:
        wide, tall = max(1, int(width[task.row])), max(1, int(height[task.row]))
        scale = min(1.0, work.side / max(wide, tall))
        return wide * tall * scale * scale, wide / tall, task.row, task.part

    ordered = sorted(tasks, key=size)
    batches = [ordered[at : at + engine.batch_size] for at in range(0, len(ordered), engine.batch_size)]
    missing = [batch for batch in batches if any((t.row - first, t.part) not in journal.entries for t in batch)]
    unread: list[tuple[Question | Task, Answer]] = []
    last = time.monotonic()
    with closing(engine.answers(_questions(work, missing, unread))) as answers:  # type: ignore[type-var]
        for group in answers:
            pairs: list[tuple[Question | Task, Answer]] = [*group, *_drain(unread)]
            now = time.monotonic()
            _show(work, _note(work, engine, journal, pairs, first, now - last), rejects)
            if pairs:
                last = now
            _watch_refusals(work, engine, [answer for _, answer in group])
            work.check_stop()
    _show(work, _note(work, engine, journal, _drain(unread), first, time.monotonic() - last), rejects)


def _questions(
    work: Work, batches: list[list[Task]], unread: list[tuple[Question | Task, Answer]]
) -> Iterator[list[Question]]:
    """Batches with their pictures; what does not decode goes to ``unread``."""
    known: tuple[int, Any] = (-1, None)  # the claims about one picture follow each other
    for batch in batches:
        questions = []
        for task in batch:
            if task.row != known[0]:
                try:
                    known = task.row, fit(decode(read_sample(work.index, task.row).image), work.side)
                except (BadImage, OSError) as error:
                    unread.append((task, Answer(error=str(error)[:200] or type(error).__name__)))
                    continue
            questions.append(Question(task.row, task.part, known[1], task.prompt, task.seed, task.temperature))
        yield questions


def _drain(unread: list[tuple[Question | Task, Answer]]) -> list[tuple[Question | Task, Answer]]:
    return [unread.pop() for _ in range(len(unread))]


def _note(
    work: Work,
    engine: Engine,
    journal: Journal,
    pairs: list[tuple[Question | Task, Answer]],
    first: int,
    seconds: float,
) -> list[Entry]:
    """Write answers to the journal, but those that it holds already; returns the new ones."""
    entries = []
    for asked, answer in pairs:
        if (asked.row - first, asked.part) in journal.entries:
            continue
        # Surrogates, which a server's JSON can hold, have no UTF-8.
        text = answer.text.encode("utf-8", "replace").decode()
        entry = Entry(
            row=asked.row - first,
            part=asked.part,
            key=work.index.key(asked.row),
            text=text,
            tokens=answer.tokens,
            finished=answer.finished,
            error=answer.error.encode("utf-8", "replace").decode(),
            seconds=round(seconds / len(pairs), 4),
            device=engine.device,
        )
        entries.append(entry)
    if entries:
        journal.add(entries)
    return entries


def _show(work: Work, entries: list[Entry], rejects: Callable[[Entry], bool] | None) -> None:
    """Move the bar."""
    if entries and rejects is not None:
        work.noted += len(entries)
        work.rejected += sum(map(rejects, entries))
        work.bar.set_postfix_str(f"rejected {work.rejected / work.noted:.0%}", refresh=False)
    work.bar.update(len(entries))


def _watch_refusals(work: Work, engine: Engine, answers: list[Answer]) -> None:
    """Raise UserError where no picture at all gets an answer, instead of rejecting a whole data set."""
    work.answered = work.answered or any(not answer.error for answer in answers)
    work.refused += sum(bool(answer.error) for answer in answers)
    if not work.answered and work.refused >= _REFUSED_AT_START:
        raise UserError(
            f"{engine.model} refused the first {work.refused} pictures ({next(a.error for a in answers if a.error)}); check that "
            "it takes pictures, image_side= and max_new_tokens=, and remove the output folder before you try again."
        )


def _template(work: Work, row: int, attempt: int) -> Template:
    """The template of an attempt; a retry takes one that the sample has not had."""
    identity = int(work.index.ids[row])
    used: list[str] = []
    for number in range(attempt):
        used.append(draw(work.templates, number, work.options.seed, identity, used=frozenset(used)).name)
    return draw(work.templates, attempt, work.options.seed, identity, used=frozenset(used))


def _tasks(work: Work, journal: Journal, rows: range, attempt: int) -> list[Task]:
    """The questions of one attempt: all samples first, then those whose answers were rejected so far."""
    tasks = []
    for row in rows:
        before = [journal.entries[row - rows.start, number] for number in range(attempt)
                  if (row - rows.start, number) in journal.entries]  # fmt: skip
        if len(before) < attempt or any(entry.error for entry in before):
            continue
        if any(not _verdict(work, row, entry).rejected for entry in before):
            continue
        temperature = work.options.temperature
        tasks.append(
            Task(
                row,
                attempt,
                _template(work, row, attempt).prompt(),
                seed_from("caption", work.options.seed, int(work.index.ids[row]), attempt),
                max(temperature, RETRY_TEMPERATURE) if attempt else temperature,
            )
        )
    return tasks


def _verdict(work: Work, row: int, entry: Entry) -> Verdict:
    if entry.error:
        return Verdict("", 0, [UNREADABLE], rejected=True)
    return judge_text(entry.text, entry.finished, work.options.limits(_template(work, row, entry.part)))


def _record(work: Work, engine: Engine, journal: Journal, rows: range, row: int) -> dict[str, Any]:
    """What is known of a sample's caption in the end; ``caption`` is None where none passed."""
    entries = [journal.entries[row - rows.start, part] for part in range(work.options.retries + 1)
               if (row - rows.start, part) in journal.entries]  # fmt: skip
    verdicts = [_verdict(work, row, entry) for entry in entries]
    tries = list(zip(entries, verdicts, strict=True))
    good = next(((entry, verdict) for entry, verdict in tries if not verdict.rejected), None)
    last, verdict = good or tries[-1]
    rejected = [
        {"template": _template(work, row, e.part).name, "found": v.found, "text": v.text or e.error}
        for e, v in tries
        if v.rejected
    ]
    return {
        "key": work.index.key(row),
        "caption": verdict.text if good else None,
        "kind": work.options.kind,
        "template": _template(work, row, last.part).name,
        "model": engine.model,
        "revision": engine.revision,
        "words": verdict.words,
        "found": verdict.found,
        "notes": verdict.notes,
        "rejected": rejected,
        "tokens": sum(entry.tokens for entry in entries),
        "seconds": round(sum(entry.seconds for entry in entries), 4),
        "device": last.device,
    }


def _write_captioned(work: Work, rows: range, records: list[dict[str, Any]], target: Path) -> None:
    """The shard again with its new captions; a sample whose caption was rejected keeps what it has."""
    folder = target.with_name(f".{target.stem}.partial")
    try:
        write_shards(_captioned(work, rows, records), folder, len(rows))
        target.with_suffix(".index.npz").unlink(missing_ok=True)
        os.replace(folder / "000000.tar", target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _captioned(work: Work, rows: range, records: list[dict[str, Any]]) -> Iterator[RawSample]:
    for row, record in zip(rows, records, strict=True):
        work.check_stop()
        sample = read_sample(work.index, row)
        if record["caption"] is not None:
            sources = sample.meta.get("caption_sources")
            source = f"{record['model']}@{record['revision']}, prompt {record['template']}"
            sample.meta["captions"] = {**sample.meta["captions"], record["kind"]: record["caption"]}
            sample.meta["caption_sources"] = {**(sources if isinstance(sources, dict) else {}), record["kind"]: source}
        yield sample
