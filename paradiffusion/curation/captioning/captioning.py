"""Long captions for the samples of shards: questions to a model, a journal of its answers, checks, the shards written again; and
the claims of captions, checked by a second model.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np

from paradiffusion.atomic import write_atomic
from paradiffusion.curation.captioning.caption_checks import UNREADABLE, Verdict, judge_text
from paradiffusion.curation.captioning.caption_options import CaptionOptions, Template, bind_judge, bind_output, draw
from paradiffusion.curation.journal import Journal, read_journal
from paradiffusion.data.images import BadImage, decode
from paradiffusion.data.index import SampleIndex, load_index, read_sample
from paradiffusion.data.shards import RawSample, write_shards
from paradiffusion.errors import UserError
from paradiffusion.metrics.sentences import sentences
from paradiffusion.metrics.vlm import Answer, Decoding, Engine, Question, VlmOptions, answers_of, fit, open_engine, spoken
from paradiffusion.randomness import seed_from, uniform
from paradiffusion.runner import Tell

# A retry that takes the likeliest token again would only repeat itself where there is one template.
RETRY_TEMPERATURE: Final = 0.7
DECODING: Final = Decoding(max_new_tokens=16)  # of the second model
PROMPT: Final = (
    'Look at the picture and judge this statement about it: "{claim}" Is every part of it visibly true? Answer with one word, yes or no.'
)
_REFUSED_AT_START: Final = 16
_YES, _NO = re.compile(r"^\W*(?:yes|true|correct)\b", re.I), re.compile(r"^\W*(?:no|not|false|incorrect)\b", re.I)


@dataclass
class Entry:
    """One answer as it came; what it is worth is judged anew whenever it is read.

    ``row`` is the sample, counted within its shard, ``part`` the attempt, or the number of the claim; ``seconds`` are this process's time
    for it: those of all entries add up to the time spent."""

    row: int
    part: int
    key: str
    text: str
    tokens: int
    finished: bool
    error: str
    seconds: float
    device: str


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
    """What all shards of this process share, the ``index`` being theirs alone. ``side`` is the long side, in pixels, of what the model is
    shown; ``refused`` counts errors in a row before the first answer; ``tell`` is that of the shard that is being done."""

    options: CaptionOptions
    output: Path
    index: SampleIndex
    templates: list[Template]
    side: int
    tell: Tell
    refused: int = 0
    answered: bool = False

    def rows(self, number: int) -> range:
        """The rows of shard ``number``."""
        first, last = np.searchsorted(self.index.shard, [number, number + 1])
        return range(int(first), int(last))


class Answers:
    """The answers about one shard, in a journal that one process holds until ``close``: a killed captioner goes on after its last
    line. ``entries`` are by (row in the shard, part). Raises UserError where another process is at it."""

    def __init__(self, work: Work, engine: Engine, number: int, path: Path) -> None:
        self.work, self.engine, self.rows, self.path = work, engine, work.rows(number), path
        self._journal = Journal(path, f"another process is at work on {path}; wait for it, or give each its own shards or output=.")
        self.close = self._journal.close
        self.entries: dict[tuple[int, int], Entry] = {}
        for record in read_journal(path)[0]:
            with suppress(TypeError):  # damaged: it is asked for again
                entry = Entry(**record)
                self.entries[entry.row, entry.part] = entry
        self._unread: list[tuple[Question | Task, Answer]] = []

    def has(self, task: Task | Question) -> bool:
        """Whether a question is answered."""
        return (task.row - self.rows.start, task.part) in self.entries

    def tries(self, row: int) -> list[Entry]:
        """The answers about the sample of ``row`` in the index, by attempt."""
        found = (self.entries.get((row - self.rows.start, part)) for part in range(self.work.options.retries + 1))
        return [entry for entry in found if entry is not None]

    def check(self) -> None:
        """Raise UserError where answers would go to other pictures than they were given for."""
        for (row, _), entry in self.entries.items():
            if row >= len(self.rows) or entry.key != self.work.index.key(self.rows[row]):
                raise UserError(f"a shard has changed since its captions were begun; delete {self.path}, or restore the shard.")

    def ask(self, tasks: list[Task], rejects: Callable[[Entry], bool] | None = None) -> None:
        """Put the questions that have no answer, pictures of like size together.

        It tells how many of the answers ``rejects``, so that nobody learns after days that the model does not suit.

        Whole batches are asked again where one answer of them is missing: an answer may depend on its neighbours by rounding,
        and a resumed run is to write what an uninterrupted one does.
        """
        width, height = self.work.index.width, self.work.index.height

        def size(task: Task) -> tuple[float, float, int, int]:
            wide, tall = max(1, int(width[task.row])), max(1, int(height[task.row]))
            scale = min(1.0, self.work.side / max(wide, tall))
            return wide * tall * scale * scale, wide / tall, task.row, task.part

        ordered, at_once = sorted(tasks, key=size), self.engine.batch_size
        batches = [ordered[at : at + at_once] for at in range(0, len(ordered), at_once)]
        missing = [batch for batch in batches if not all(map(self.has, batch))]
        last = time.monotonic()
        with closing(answers_of(self.engine, self._questions(missing))) as answers:  # type: ignore[type-var]
            for group in answers:
                now = time.monotonic()
                if self._note(group, now - last, rejects):
                    last = now
                self._watch_refusals([answer for _, answer in group])
                self.work.tell()
        self._note([], time.monotonic() - last, rejects)

    def _questions(self, batches: list[list[Task]]) -> Iterator[list[Question]]:
        """Batches with their pictures; what does not decode is answered by its error."""
        known: tuple[int, Any] = (-1, None)  # the claims about one picture follow each other
        for batch in batches:
            questions = []
            for task in batch:
                if task.row != known[0]:
                    try:
                        known = task.row, fit(decode(read_sample(self.work.index, task.row).image), self.work.side)
                    except (BadImage, OSError) as error:
                        self._unread.append((task, Answer(error=str(error)[:200] or type(error).__name__)))
                        continue
                questions.append(Question(task.row, task.part, known[1], task.prompt, task.seed, task.temperature))
            yield questions

    def _note(self, group: Sequence[tuple[Question | Task, Answer]], seconds: float, rejects: Callable[[Entry], bool] | None) -> bool:
        """Write answers to the journal, but those that it holds already, and tell of them; whether there were any."""
        pairs, self._unread = [*group, *self._unread[::-1]], []
        entries = []
        for asked, answer in pairs:
            if not self.has(asked):
                # Surrogates, which a server's JSON can hold, have no UTF-8.
                text, error = (said.encode("utf-8", "replace").decode() for said in (answer.text, answer.error))
                place = (asked.row - self.rows.start, asked.part, self.work.index.key(asked.row))
                each, device = round(seconds / len(pairs), 4), self.engine.device
                entries.append(Entry(*place, text, answer.tokens, answer.finished, error, each, device))
        if entries:
            self._journal.add(map(asdict, entries))
            self.entries.update({(entry.row, entry.part): entry for entry in entries})
            kinds = {"unreadable": sum(bool(entry.error) for entry in entries)}
            kinds |= {"rejected": sum(map(rejects, entries))} if rejects is not None else {}
            self.work.tell(len(entries), **kinds)
        return bool(pairs)

    def _watch_refusals(self, answers: list[Answer]) -> None:
        """Raise UserError where no picture at all gets an answer, instead of rejecting a whole data set."""
        work = self.work
        work.answered = work.answered or any(not answer.error for answer in answers)
        work.refused += sum(bool(answer.error) for answer in answers)
        if not work.answered and work.refused >= _REFUSED_AT_START:
            raise UserError(
                f"{self.engine.model} refused the first {work.refused} pictures ({next(a.error for a in answers if a.error)}); check "
                "that it takes pictures, image_side= and max_new_tokens=, and remove the output folder before you try again."
            )


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """A file of JSON lines, whole or not at all."""
    write_atomic(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What ``write_lines`` wrote. Raises UserError where the file is damaged."""
    records, damaged = read_journal(path)
    if damaged or not all("key" in record for record in records):
        raise UserError(f"{path} holds a damaged line; delete it, and run the same command again.")
    return records


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
            raise UserError(f"output={options.output} is the folder of {shard}, which would be overwritten; choose another.")


def caption_shard(work: Work, engine: Engine, number: int) -> None:
    """Caption one shard, from where it was left, and write ``<shard>.jsonl`` and, if asked for, ``<shard>.tar``. UserError where the
    engine cannot go on, or another process is at this shard."""
    shard, rows = work.index.shards[number], work.rows(number)
    lines, path = work.output / f"{shard.stem}.jsonl", work.output / f"{shard.stem}.journal"
    target = work.output / f"{shard.stem}.tar"
    judged = [work.output / f"{shard.stem}{end}" for end in (".judged.jsonl", ".judging")]
    wanted = work.options.write == "shards" and bool(rows)
    if lines.exists():
        work.tell(found=len(rows))
        _read_records(work, number, lines)
    if not lines.exists() or (wanted and not target.exists()):
        # Held while the tar is written too: two would write one temporary file.
        with closing(Answers(work, engine, number, path)) as answers:
            if not lines.exists():  # else another process has written them between our look and its lock
                _ask_all(answers)
                for old in (target, *judged):  # of lines that were deleted; a server need not say the same again
                    old.unlink(missing_ok=True)
                write_lines(lines, [_record(answers, row) for row in rows])
            if wanted and not target.exists():
                _write_captioned(work, rows, _read_records(work, number, lines), target)
    path.unlink(missing_ok=True)


def _read_records(work: Work, number: int, lines: Path) -> list[dict[str, Any]]:
    """A shard's lines. Raises UserError where they are of other samples."""
    records = read_lines(lines)
    if [record["key"] for record in records] != [work.index.key(row) for row in work.rows(number)]:
        raise UserError(f"the shard {work.index.shards[number]} has changed since it was captioned; delete {lines}, or restore the shard.")
    return records


def _ask_all(answers: Answers) -> None:
    """All attempts at the captions of one shard that are not answered yet."""
    work, first = answers.work, answers.rows.start
    answers.check()
    work.tell(found=sum(part == 0 for _, part in answers.entries))
    for attempt in range(work.options.retries + 1):
        tasks = _tasks(answers, attempt)
        if attempt:
            work.tell(found=sum(map(answers.has, tasks)), more=len(tasks))
        answers.ask(tasks, lambda entry: _verdict(work, first + entry.row, entry).rejected)


def _template(work: Work, row: int, attempt: int) -> Template:
    """The template of an attempt; a retry takes one that the sample has not had."""
    identity = int(work.index.ids[row])
    used: frozenset[str] = frozenset()
    for number in range(attempt):
        used |= {draw(work.templates, number, work.options.seed, identity, used=used).name}
    return draw(work.templates, attempt, work.options.seed, identity, used=used)


def _tasks(answers: Answers, attempt: int) -> list[Task]:
    """The questions of one attempt: all samples first, then those whose answers were rejected so far."""
    work, tasks = answers.work, []
    temperature = work.options.temperature
    for row in answers.rows:
        before = answers.tries(row)[:attempt]
        if len(before) < attempt or any(e.error or not _verdict(work, row, e).rejected for e in before):
            continue
        seed = seed_from("caption", work.options.seed, int(work.index.ids[row]), attempt)
        warmth = max(temperature, RETRY_TEMPERATURE) if attempt else temperature
        tasks.append(Task(row, attempt, _template(work, row, attempt).prompt(), seed, warmth))
    return tasks


def _verdict(work: Work, row: int, entry: Entry) -> Verdict:
    if entry.error:
        return Verdict("", 0, [UNREADABLE], rejected=True)
    return judge_text(entry.text, entry.finished, work.options.limits(_template(work, row, entry.part)))


def _record(answers: Answers, row: int) -> dict[str, Any]:
    """What is known of a sample's caption in the end; ``caption`` is None where none passed."""
    work, engine = answers.work, answers.engine
    tries = [(entry, _verdict(work, row, entry)) for entry in answers.tries(row)]
    good = next(((entry, verdict) for entry, verdict in tries if not verdict.rejected), None)
    last, verdict = good or tries[-1]
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
        "rejected": [
            {"template": _template(work, row, e.part).name, "found": v.found, "text": v.text or e.error} for e, v in tries if v.rejected
        ],
        "tokens": sum(entry.tokens for entry, _ in tries),
        "seconds": round(sum(entry.seconds for entry, _ in tries), 4),
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
        work.tell()
        sample = read_sample(work.index, row)
        if record["caption"] is not None:
            sources = sample.meta.get("caption_sources")
            source = f"{record['model']}@{record['revision']}, prompt {record['template']}"
            sample.meta["captions"] = {**sample.meta["captions"], record["kind"]: record["caption"]}
            sample.meta["caption_sources"] = {**(sources if isinstance(sources, dict) else {}), record["kind"]: source}
        yield sample


def judge_shard(work: Work, engine: Engine, number: int) -> None:
    """Check a sample of the captions of one shard, sentence by sentence: ``<shard>.judged.jsonl``.

    A caption is among those checked by a draw from its identity, so that the choice does not depend on the run.
    """
    shard, rows = work.index.shards[number], work.rows(number)
    target, path = work.output / f"{shard.stem}.judged.jsonl", work.output / f"{shard.stem}.judging"
    if not target.exists():
        chosen, tasks = _claims(work, number)
        work.tell(more=len(tasks))
        with closing(Answers(work, engine, number, path)) as answers:
            if not target.exists():  # else another process has written it between our look and its lock
                answers.check()
                answers.ask(tasks)
                records = []
                for part, (row, template, claim) in enumerate(chosen):
                    entry = answers.entries[row - rows.start, part]
                    said = spoken(entry.text)
                    verdict = "yes" if _YES.match(said) else "no" if _NO.match(said) else "unclear"
                    records.append(
                        {"key": entry.key, "template": template, "claim": claim, "verdict": verdict, "answer": entry.text,
                         "judge": engine.model, "revision": engine.revision, "seconds": entry.seconds}
                    )  # fmt: skip
                write_lines(target, records)
    path.unlink(missing_ok=True)


def _claims(work: Work, number: int) -> tuple[list[tuple[int, str, str]], list[Task]]:
    """(row, template, claim) of the sentences to check, and the questions about them."""
    shard, rows = work.index.shards[number], work.rows(number)
    chosen: list[tuple[int, str, str]] = []
    tasks = []
    for row, record in zip(rows, read_lines(work.output / f"{shard.stem}.jsonl"), strict=True):
        identity = int(work.index.ids[row])
        if record["caption"] is None or uniform("judge", work.options.seed, identity) >= work.options.judge_share:
            continue
        for claim in sentences(record["caption"]):
            seed = seed_from("judge", work.options.seed, identity, len(chosen))
            tasks.append(Task(row, len(chosen), PROMPT.replace("{claim}", claim.replace('"', "'")), seed, 0.0))
            chosen.append((row, record["template"], claim))
    return chosen, tasks


@dataclass
class Captioner:
    """The stage that captions shards by their numbers, or with ``judges`` checks the claims of their captions. Its index and its model are
    opened where they are used, and do not travel with it. UserError where they cannot be had, or the output holds others' captions."""

    options: CaptionOptions
    templates: list[Template]
    shards: list[Any]
    judges: bool = False

    def __call__(self, number: int, tell: Tell) -> None:
        engine, work = self.opened
        work.tell = tell
        (judge_shard if self.judges else caption_shard)(work, engine, number)

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def index(self) -> SampleIndex:
        return load_index(self.shards, self.options.allow_truncated, key="shards")

    @cached_property
    def opened(self) -> tuple[Engine, Work]:
        """The model, and what all shards share."""
        options, output = self.options, Path(str(self.options.output)).expanduser()
        decoding = DECODING if self.judges else Decoding(options.max_new_tokens, options.top_p)
        engine, side = open_engine(judge_options(options) if self.judges else vlm_options(options), decoding)
        try:
            if self.judges:
                bind_judge(output, options, engine, side)
            else:
                bind_output(output, options, engine, self.templates, side)
        except BaseException:
            engine.close()
            raise
        return engine, Work(options, output, self.index, self.templates, side, lambda *_, **__: None)

    def close(self) -> None:
        """Give the model back."""
        if "opened" in vars(self):
            self.opened[0].close()


def vlm_options(options: CaptionOptions) -> VlmOptions:
    """The captioner among the script's keys."""
    return VlmOptions(**{field.name: getattr(options, field.name) for field in fields(VlmOptions)})


def judge_options(options: CaptionOptions) -> VlmOptions:
    """The second model among the script's keys; a server that is not named is the captioner's."""
    kind = options.engine_of(True)
    judge = replace(
        vlm_options(options), engine=kind, model=str(options.judge), served=options.judge, key="judge", revision=options.judge_revision
    )
    if kind == "endpoint":
        url = options.judge_endpoint or options.endpoint
        if not url:
            raise UserError("judge_engine=endpoint needs judge_endpoint=, such as http://localhost:8000/v1.")
        # The captioner's key goes to the captioner's server alone.
        key = options.judge_api_key_env or (options.api_key_env if url == options.endpoint else None)
        judge = replace(judge, endpoint=url, api_key_env=key)
    return judge


def interval(clusters: list[tuple[int, int]]) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, from (confirmed, claims) of each caption; ValueError where there is no claim.

    Claims about one picture stand or fall together, so their number is divided by the design effect (at least 1): the
    variance of the share between captions over that of as many independent claims."""
    total = sum(claims for _, claims in clusters)
    share = sum(confirmed for confirmed, _ in clusters) / total if total else math.nan
    if not total:
        raise ValueError("no claims")
    effect = 1.0
    if len(clusters) > 1 and 0 < share < 1:
        spread = sum((confirmed - share * claims) ** 2 for confirmed, claims in clusters) / total**2
        spread *= len(clusters) / (len(clusters) - 1)
        effect = max(1.0, spread / (share * (1 - share) / (total - 1)))
    n, z = total / effect, 1.959964
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
