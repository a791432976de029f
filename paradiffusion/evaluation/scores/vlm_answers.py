"""Answers of a vision-language model about a suite's pictures, asked once and kept.

Answers lie beside the scores' own folders, under a hash of what they depend on, so that scores that ask the same question
(the checklist, both DPG scores) share the answer, and each answer is bound to the bytes of its picture: a picture that was
replaced is looked at again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from paradiffusion.errors import UserError
from paradiffusion.evaluation.journal import Journal, read_journals
from paradiffusion.evaluation.records import Drawn, Run
from paradiffusion.evaluation.scores.image_features import read_picture
from paradiffusion.metrics.vlm import Answer, Decoding, Engine, Question, VlmOptions, answers_of, fit, open_engine, settings_of, spoken

_REFUSED_AT_START: Final = 16
_ENGINE: Final = "engine"  # the journal's line that says who answers


Ask = tuple[Drawn, str]  # a picture, and what the model is told about it, whole


@dataclass(frozen=True)
class Asker:
    """A model and the longest answer that a score wants of it, where ``options`` do not say.

    UserError for options that cannot be meant and a model that is nowhere, so that this is told before anything is drawn."""

    options: VlmOptions
    tokens: int

    def __post_init__(self) -> None:
        self.options.check()
        self.settings()

    @property
    def max_new_tokens(self) -> int:
        return self.options.max_new_tokens or self.tokens

    def settings(self) -> dict[str, Any]:
        """What the answers depend on, as JSON; no model is loaded. Raises UserError for a model that cannot be found."""
        return {**settings_of(self.options), "max_new_tokens": self.max_new_tokens}

    def folder(self, work: Path) -> Path:
        """Where the answers are kept, for a score whose own folder is ``work``."""
        digest = hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()[:12]
        return work.parent / f"vlm-answers-{digest}"

    def ask(self, asks: Sequence[Ask], work: Path, run: Run, title: str) -> None:
        """Put those of ``asks`` that have no answer yet; what befalls one picture is kept as its error. UserError where the model
        cannot go on, is another one than answered before, or takes no picture at all."""
        with Journal(self.folder(work), run.rank) as journal, run.bar(len(asks), title) as bar:
            missing = []
            for number, (image, prompt) in enumerate(asks):
                if number % 64 == 0:
                    run.check()
                digest, error = _identity(image)
                if not error and _picture_key(image, digest) not in journal.found:
                    key = _key(image, digest, prompt)
                    if not _holds_answer(journal.found.get(key)):
                        missing.append((key, (image, prompt)))
            bar.update(len(asks) - len(missing))
            if not missing:
                return
            engine, side = open_engine(self.options, Decoding(self.max_new_tokens))
            try:
                _bind(journal, engine)
                _Round(missing, engine, side, journal).work(run, bar)
            finally:
                engine.close()

    def heard(self, work: Path) -> Heard:
        return Heard(dict(read_journals(self.folder(work))))


@dataclass(frozen=True)
class Heard:
    found: dict[str, dict[str, Any]]

    def reply(self, image: Drawn, prompt: str) -> Answer:
        """The answer; a picture that is not there or does not decode has an error for each question."""
        digest, error = _identity(image)
        error = error or str(self.found.get(_picture_key(image, digest), {}).get("error", ""))
        record = self.found.get(_key(image, digest, prompt))
        if error:
            return Answer(error=error)
        if record is None or not _holds_answer(record):
            return Answer(error="the model wrote nothing about it")
        return Answer(spoken(str(record["text"])), finished=bool(record["finished"]), error=str(record["error"]))

    @property
    def engine(self) -> dict[str, Any]:
        """The model's name and revision as it gave them itself; {} where nobody was asked."""
        return {key: value for key, value in self.found.get(_ENGINE, {}).items() if value}


@dataclass
class _Round:
    """One process's questions to one engine."""

    missing: list[tuple[str, Ask]]
    engine: Engine
    side: int
    journal: Journal
    unread: list[tuple[int, str]] = field(default_factory=list)  # (number among missing, why)

    def work(self, run: Run, bar: Any) -> None:
        answered = False
        refused: list[tuple[int, Answer]] = []
        with closing(answers_of(self.engine, self._batches())) as groups:  # type: ignore[type-var]
            for group in groups:
                self._note_unread(bar)
                pairs = [(question.part, answer) for question, answer in group]
                answered = answered or any(not answer.error for _, answer in pairs)
                if not answered:  # kept back: what may be the model's fault is not yet written down as the pictures'
                    refused += pairs
                    self._check_refused(refused)
                    pairs = []
                elif refused:
                    pairs, refused = refused + pairs, []
                self._note(pairs, bar)
                run.check()
        self._note_unread(bar)
        # Of a few pictures, too, not all can be at fault, unless others of them were answered before a stop.
        known = any(record.get("text") for record in self.journal.found.values())
        several = len({self.missing[number][1][0].name for number, _ in refused}) > 1
        self._check_refused(refused, least=2 if several and not known else _REFUSED_AT_START)
        self._note(refused, bar)

    def _check_refused(self, refused: list[tuple[int, Answer]], least: int = _REFUSED_AT_START) -> None:
        """Raise UserError where the model, not the pictures, is at fault: it has answered nothing yet."""
        if len(refused) >= least:
            raise UserError(
                f"{self.engine.model} refused the first {len(refused)} questions ({refused[0][1].error}); check that it takes "
                "pictures, and image_side= and max_new_tokens=, then run the same command again."
            )

    def _note(self, pairs: list[tuple[int, Answer]], bar: Any) -> None:
        for number, answer in pairs:
            record = {"text": answer.text, "finished": answer.finished, "error": answer.error}
            if _holds_answer(record):
                self.journal.add(self.missing[number][0], record)
        bar.update(len(pairs))

    def _note_unread(self, bar: Any) -> None:
        for _ in range(len(self.unread)):
            number, why = self.unread.pop()
            image, _ = self.missing[number][1]
            key = _picture_key(image, _identity(image)[0])
            if key not in self.journal.found:
                self.journal.add(key, {"error": why})
            bar.update(1)

    def _batches(self) -> Iterator[list[Question]]:
        """The questions with their pictures; those about one picture follow each other, so that it is decoded once."""
        size = max(1, self.engine.batch_size)
        seen: Drawn | None = None
        for start in range(0, len(self.missing), size):
            batch = []
            for number in range(start, min(start + size, len(self.missing))):
                _, (image, prompt) = self.missing[number]
                if image is not seen:
                    seen, found = image, read_picture(image)
                    picture = found if isinstance(found, str) else fit(found, self.side)
                if isinstance(picture, str):
                    self.unread.append((number, picture))
                else:
                    batch.append(Question(number, number, picture, prompt, 0, 0.0))
            yield batch


def _holds_answer(record: dict[str, Any] | None) -> bool:
    """Whether a line says anything: a model that answers nothing, or is cut as it thinks, is asked again."""
    return record is not None and bool(record["error"] or spoken(str(record["text"])))


def _bind(journal: Journal, engine: Engine) -> None:
    """Note who answers, or see that it is who answered before."""
    now = {"model": engine.model, "revision": engine.revision}
    known = journal.found.get(_ENGINE)
    if known is None:
        journal.add(_ENGINE, now)
    elif known != now:
        raise UserError(
            f"answers so far came from {known.get('model')} ({known.get('revision')}), and now {engine.model} ({engine.revision}) "
            "would answer; name the one or the other, with served= or revision=, or delete the evaluation's scores folder."
        )


def _key(image: Drawn, digest: str, prompt: str) -> str:
    return f"{image.name}|{digest}|{hashlib.sha256(prompt.encode()).hexdigest()[:16]}"


def _picture_key(image: Drawn, digest: str) -> str:
    """The journal's line for a picture that does not decode."""
    return f"{image.name}|{digest}"


def _identity(image: Drawn) -> tuple[str, str]:
    """(a hash of the picture's bytes, "") or ("", why there is none)."""
    if image.error:
        return "", image.error
    try:
        stat = image.file.stat()
        return _hash(image.file, stat.st_size, stat.st_mtime_ns), ""
    except OSError as error:
        return "", f"the picture cannot be read ({error.strerror})"


@lru_cache(maxsize=1 << 17)  # every score asks for it, and for each question
def _hash(path: Path, size: int, changed: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
