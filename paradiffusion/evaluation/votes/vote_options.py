"""The keys of scripts/vote.py, and which action each belongs to."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any, Final

import yaml

from paradiffusion.checks import choice, positive
from paradiffusion.errors import UserError
from paradiffusion.evaluation.suites.suite_files import read_yaml
from paradiffusion.evaluation.votes.vote_study import QUESTIONS, Question

SERVING: Final = ("host", "port", "hosts")
# What makes a study what it is: fixed when it begins.
STUDY_KEYS: Final = (
    "sets", "suite", "suite_path", "raters", "title", "questions", "without_text", "ask", "repeats", "retest",
    "pairs_per_rater", "images_per_prompt", "count", "seed",
)  # fmt: skip
ACTIONS: Final = {
    "serve": (*STUDY_KEYS, *SERVING),
    "tokens": ("host", "port"),
    "results": ("seed", "output"),
    "export": ("output",),
}
MOST_RATERS: Final = 200


@dataclass
class VoteOptions:
    """The keys of the command line; scripts/vote.py says what each is."""

    action: str | None = None
    study: str | None = None
    sets: str | None = None
    suite: str | None = None
    suite_path: str | None = None
    raters: str | None = None
    title: str = "Which picture?"
    questions: str | None = None
    without_text: str = "[appeal]"
    ask: str = "separately"
    repeats: int | None = None
    retest: int = 0
    pairs_per_rater: int | None = None
    images_per_prompt: int = 1
    count: int | None = None
    seed: int = 0
    host: str = "127.0.0.1"
    port: int = 8766
    hosts: str | None = None
    output: str | None = None
    given: list[str] = field(default_factory=list, metadata={"internal": True})

    def check(self) -> None:
        """Raise UserError for missing, misplaced or impossible values."""
        if self.action is None:
            raise UserError(f"action= is missing; expected action={'|'.join(ACTIONS)} study=<folder>; see --help.")
        choice("action", self.action, tuple(ACTIONS))
        if not self.study:
            raise UserError("study= is missing; name the folder where the study's votes lie, such as study=votes.")
        for key in self.given:
            if key not in ("action", "study", *ACTIONS[self.action]):
                owners = [action for action, keys in ACTIONS.items() if key in keys]
                raise UserError(
                    f"{key}= belongs to action={owners[0]}, and does nothing in action={self.action}; leave it out."
                )
        choice("ask", self.ask, ("separately", "together"))
        for key in ("repeats", "pairs_per_rater", "images_per_prompt", "count"):
            if getattr(self, key) is not None:
                positive(key, getattr(self, key))
        positive("retest", self.retest, zero=True)
        if not 0 <= self.port < 1 << 16:
            raise UserError(f"port={self.port} is out of range; expected 0 to 65535.")
        if not 1 <= len(self.title.strip()) <= 200:
            raise UserError("title= is a text of 1 to 200 characters, which raters see at the top of the page.")
        self.asked()
        self.host_names()

    def set_paths(self) -> dict[str, str]:
        """The sets' folders by name, at least two."""
        example = "sets='{ours: runs/nano/stage3/evaluation/scenes, other: pictures/other}'"
        if not self.sets:
            raise UserError(f"sets= is missing, and there is no study yet; name what is compared: {example}.")
        value = _yaml("sets", self.sets, example)
        if not isinstance(value, dict) or not all(isinstance(path, str) for path in value.values()):
            raise UserError(f"sets={self.sets} is not understood; expected names and folders: {example}.")
        paths = {str(name).strip(): path for name, path in value.items()}
        if len(paths) < len(value):
            raise UserError(f"sets={self.sets} has one name twice, spaces aside; give each set a name of its own.")
        if len(paths) < 2:
            raise UserError(f"sets={self.sets} names {len(paths)}; expected at least two to compare: {example}.")
        for name in paths:
            _name_of("sets", name)
        return paths

    def rater_names(self) -> list[str]:
        """Who votes, each once."""
        names = _names("raters", self.raters, "raters=[anna,ben]")
        if not names:
            raise UserError(
                "raters= is missing, and there is no study yet; name who votes, each gets an address: raters=[anna,ben]."
            )
        if len(names) > MOST_RATERS:
            raise UserError(f"raters= names {len(names)}; expected at most {MOST_RATERS}.")
        for name in names:
            _name_of("raters", name)
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"raters= names {twice[0]} twice; give each rater a name of their own.")
        return names

    def asked(self) -> tuple[Question, ...]:
        """The questions, in order."""
        example = "questions='{faithfulness: Which picture follows the text better?}'"
        without = _names("without_text", self.without_text, "without_text=[appeal]")
        known = {question.name: question.text for question in QUESTIONS}
        if self.questions is None:
            texts = dict(known)
        else:
            value = _yaml("questions", _quote_texts(self.questions), example)
            value = [value] if isinstance(value, str) else value
            if isinstance(value, list):
                for name in value:
                    if not isinstance(name, str) or name not in known:
                        raise UserError(
                            f"the question {name} is unknown; choose of {', '.join(known)}, or write it: {example}."
                        )
                value = {name: known[name] for name in value}
            if not isinstance(value, dict) or not value or not all(isinstance(text, str) for text in value.values()):
                raise UserError(f"questions={self.questions} is not understood; expected {example}.")
            texts = {str(name).strip(): text.strip() for name, text in value.items()}
        if "without_text" in self.given and (unknown := [name for name in without if name not in texts]):
            raise UserError(f"without_text= names {unknown[0]}, which is not asked; choose of {', '.join(texts)}.")
        for name, text in texts.items():
            _name_of("questions", name)
            if not 1 <= len(text) <= 500:
                raise UserError(f"the question {name} has {len(text)} characters; expected 1 to 500.")
        return tuple(Question(name, text, name not in without) for name, text in texts.items())

    def host_names(self) -> tuple[str, ...]:
        """Names besides its own that this machine is opened under."""
        return tuple(_names("hosts", self.hosts, "hosts=[votes.lab.example]"))

    def settings(self) -> dict[str, Any]:
        """What study.json keeps of the command line, to be compared when the study is opened again."""
        return {
            "sets": self.set_paths(),
            "suite": self.suite,
            "suite_path": self.suite_path,
            "raters": self.rater_names(),
            "title": self.title,
            "questions": {question.name: question.text for question in self.asked()},
            "without_text": [question.name for question in self.asked() if not question.shows_text],
            **{key: getattr(self, key) for key in STUDY_KEYS[7:]},
        }

    def changed(self, settings: dict[str, Any]) -> list[str]:
        """Keys that were given now and differ from ``settings`` of a study that has begun."""
        values = {
            "sets": lambda: self.set_paths(),
            "raters": lambda: self.rater_names(),
            "questions": lambda: {question.name: question.text for question in self.asked()},
            "without_text": lambda: [question.name for question in self.asked() if not question.shows_text],
        }
        keys = [key for key in self.given if key in STUDY_KEYS]
        return [key for key in keys if (values[key]() if key in values else getattr(self, key)) != settings.get(key)]


def _yaml(key: str, text: str, example: str) -> Any:
    try:
        return read_yaml(text)
    except yaml.YAMLError as error:
        reason = f" ({error.problem})" if isinstance(error, yaml.MarkedYAMLError) and error.problem else ""
        shown = text if len(text) <= 200 else f"{text[:200]}..."
        raise UserError(f"{key}={shown} is not understood{reason}; expected {example}.") from None


def _quote_texts(text: str) -> str:
    """Quotes around the texts of a mapping: to YAML the "?" that ends a question means something else, and so does a comma."""
    value = r"([^'\"\s].*?)(?=\s*(?:,\s*[\w -]+:\s|\}\s*$))"
    return re.sub(r"([{,]\s*[\w -]+:\s+)" + value, lambda match: match[1] + json.dumps(match[2]), text)


def _names(key: str, text: str | None, example: str) -> list[str]:
    if text is None:
        return []
    value = _yaml(key, text, example)
    value = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(one, str | int) and not isinstance(one, bool) for one in value):
        raise UserError(f"{key}={text} is not understood; expected {example}.")
    return [str(one).strip() for one in value]


def _name_of(key: str, name: str) -> None:
    if not 1 <= len(name) <= 60 or not name.isprintable():
        raise UserError(f"{key}= has the name {name!r}; expected 1 to 60 printable characters.")
