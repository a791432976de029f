"""The keys and the four actions of scripts/vote.py: serve (which begins a study, or goes on with one), tokens, results, export."""

from __future__ import annotations

import json
import re
import secrets
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from paradiffusion.checks import choice, not_negative, not_understood, one_of, positive, step_of
from paradiffusion.config import check_values, option
from paradiffusion.errors import UserError
from paradiffusion.evaluation.suites.suite import Suite
from paradiffusion.evaluation.suites.suite_files import read_yaml
from paradiffusion.evaluation.votes import vote_study
from paradiffusion.evaluation.votes.vote_store import VOTES, Store
from paradiffusion.evaluation.votes.vote_study import QUESTIONS, STUDY, Question, Study, VotedPrompt, read_study, write_study

SERVING: Final = ("host", "port", "hosts")
# What makes a study what it is: fixed when it begins.
STUDY_KEYS: Final = (
    "sets", "suite", "suite_path", "raters", "title", "questions", "without_text", "ask", "repeats", "retest",
    "pairs_per_rater", "images_per_prompt", "count", "seed",
)  # fmt: skip
ACTIONS: Final = {"serve": (*STUDY_KEYS, *SERVING), "tokens": ("host", "port"), "results": ("seed", "output"), "export": ("output",)}
USUAL_REPEATS: Final = 2  # our choice: the least that shows how far raters agree


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
    ask: str = option("separately", accepts=one_of("separately", "together"))
    repeats: int | None = option(None, accepts=positive)
    retest: int = option(0, accepts=not_negative)
    pairs_per_rater: int | None = option(None, accepts=positive)
    images_per_prompt: int = option(1, accepts=positive)
    count: int | None = option(None, accepts=positive)
    seed: int = 0
    host: str = "127.0.0.1"
    port: int = 8766
    hosts: str | None = None
    output: str | None = None
    given: list[str] = field(default_factory=list, metadata={"internal": True})

    def check(self) -> None:
        step_of(self.action, self.given, ACTIONS)
        if not self.study:
            raise UserError("study= is missing; name the folder where the study's votes lie, such as study=votes.")
        check_values(self)
        self.asked()
        self.host_names()

    def set_paths(self) -> dict[str, str]:
        """The sets' folders by name, at least two."""
        example = "{ours: runs/nano/stage3/evaluation/scenes, other: pictures/other}"
        if not self.sets:
            raise UserError(f"sets= is missing, and there is no study yet; name what is compared: sets='{example}'.")
        paths = _texts("sets", _yaml("sets", self.sets, example), example)
        if len(paths) < 2:
            raise not_understood("sets", self.sets, example)
        return paths

    def rater_names(self) -> list[str]:
        """Who votes, each once."""
        if not self.raters:
            raise UserError("raters= is missing, and there is no study yet; name who votes: raters=[anna,ben].")
        names = _names("raters", self.raters, "[anna, ben]")
        if not names or len({*names}) < len(names):
            raise not_understood("raters", self.raters, "[anna, ben]")
        return names

    def asked(self) -> tuple[Question, ...]:
        example = "{faithfulness: Which picture follows the text better?}"
        texts = known = {question.name: question.text for question in QUESTIONS}
        if self.questions is not None:
            value = _yaml("questions", _quote_texts(self.questions), example)
            if not isinstance(value, dict):  # of the known ones, some or another order
                names = _names("questions", self.questions, "[appeal]")
                for name in names:
                    choice("questions", name, tuple(known))
                value = {name: known[name] for name in names}
            texts = _texts("questions", value, example)
        without = _names("without_text", self.without_text, "[appeal]")
        for name in without if "without_text" in self.given else ():
            choice("without_text", name, tuple(texts))
        return tuple(Question(name, text, name not in without) for name, text in texts.items())

    def host_names(self) -> tuple[str, ...]:
        return tuple(_names("hosts", self.hosts, "[votes.lab.example]"))

    def setting(self, key: str) -> Any:
        """What study.json keeps of ``key``, to be compared when the study is opened again."""
        made = {
            "sets": self.set_paths,
            "raters": self.rater_names,
            "questions": lambda: {question.name: question.text for question in self.asked()},
            "without_text": lambda: [question.name for question in self.asked() if not question.shows_text],
        }
        return made[key]() if key in made else getattr(self, key)


def _yaml(key: str, text: str | None, example: str) -> Any:
    try:
        return None if text is None else read_yaml(text)
    except ValueError as error:
        raise UserError(f"{key}={str(text)[:200]} is not understood ({error}); expected {key}='{example}'.") from None


def _quote_texts(text: str) -> str:
    """Quotes around the texts of a mapping: to YAML the "?" that ends a question means something else, and so does a comma."""
    value = r"([^'\"\s].*?)(?=\s*(?:,\s*[\w -]+:\s|\}\s*$))"
    return re.sub(r"([{,]\s*[\w -]+:\s+)" + value, lambda match: match[1] + json.dumps(match[2]), text)


def _names(key: str, text: str | None, example: str) -> list[str]:
    value = _yaml(key, text, example)
    value = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(one, str | int) and _is_name(str(one).strip()) for one in value):
        raise not_understood(key, text, example)
    return [str(one).strip() for one in value]


def _texts(key: str, value: Any, example: str) -> dict[str, str]:
    found = {str(name).strip(): text for name, text in value.items()} if isinstance(value, dict) else {}
    if not found or not all(_is_name(name) and isinstance(text, str) for name, text in found.items()):
        raise not_understood(key, None if value is None else str(value), example)
    return {name: text.strip() for name, text in found.items()}


def _is_name(text: str) -> bool:
    """Whether a page can show ``text`` as the name of a set, a question or a rater."""
    return 1 <= len(text) <= 60 and text.isprintable()


def open_study(options: VoteOptions, suite: Suite | None = None) -> Study:
    """The study in ``study=``, begun with the other keys where there is none yet; ``suite`` is what ``suite=`` names, loaded, None where
    the sets' evaluations say it. UserError for keys that differ from those that it began with, and for what cannot be compared."""
    folder = Path(str(options.study)).expanduser()
    if not (folder / STUDY).exists():
        if (folder / VOTES).exists():
            raise UserError(f"{folder} holds votes and no {STUDY}; bring that back from a copy, or choose another study=.")
        study = make_study(options, folder, suite)
        write_study(study)
        return study
    study = read_study(folder)
    given = [key for key in options.given if key in STUDY_KEYS]
    if changed := [key for key in given if options.setting(key) != study.settings.get(key)]:
        raise UserError(
            f"the study {folder} began with another {changed[0]}=, and is fixed since; leave {' and '.join(f'{c}=' for c in changed)} "
            "out to go on with it, or choose another study= folder."
        )
    return study


def make_study(options: VoteOptions, folder: Path, suite: Suite | None = None) -> Study:
    """Look at the sets' pictures and decide who sees which pairs. Raises UserError."""
    settings = {key: options.setting(key) for key in STUDY_KEYS}
    # Sides that follow from names and a known seed could be computed by a rater; study.json keeps what was drawn.
    seed = options.seed if "seed" in options.given else secrets.randbelow(1 << 31)
    raters = options.rater_names()
    repeats = options.repeats or min(USUAL_REPEATS, len(raters))
    sources = vote_study.open_sources(options.set_paths(), suite)
    common = vote_study.common_suite(sources, suite).first(options.count)
    pairs = vote_study.all_pairs([prompt.id for prompt in common.prompts], [source.name for source in sources], options.images_per_prompt)
    if options.pairs_per_rater is not None:
        pairs = vote_study.spread(pairs, max(1, options.pairs_per_rater * len(raters) // repeats), seed)
    shown = {pair.prompt for pair in pairs}
    prompts = [prompt for prompt in common.prompts if prompt.id in shown]
    questions = options.asked()
    rounds = 1 if options.ask == "together" else len(questions)
    voted = {p.id: VotedPrompt(p.id, p.text, p.category, p.band) for p in prompts}
    tasks = vote_study.assign(pairs, raters, repeats, rounds, options.retest, seed)
    sets = [vote_study.look_at(source, prompts, options.images_per_prompt) for source in sources]
    named = {one.name: one for one in sets}
    title = options.title.strip()
    study = Study(folder, title, common.name, settings, options.ask, questions, voted, named, pairs, tasks)
    check_set_names(study)
    for one in sets:
        if all(picture.error for row in one.pictures.values() for picture in row):
            reason = next(iter(one.pictures.values()))[0].error
            raise UserError(f"the set {one.name} has no picture of these prompts that can be shown ({reason}); look at its folder.")
    return study


def check_set_names(study: Study) -> None:
    """Raises UserError where a text that raters read names a set, which would tell them whose picture is whose."""
    texts = [study.title, *(part for q in study.questions for part in (q.name, q.text)), *study.tasks]
    for name in study.sets:
        if len(name) > 2 and any(name.lower() in text.lower() for text in texts):
            raise UserError(f"the set's name {name} stands in the title, a question or a rater's name, which raters see; reword it.")


def run_action(options: VoteOptions, suite: Suite | None = None) -> int:
    """Do what ``options`` name, checked; the exit status. UserError for what cannot be done, and for files that cannot be read or
    written, such as an ``output=`` that is a folder."""
    try:
        if options.action == "serve":
            return serve(options, suite)
        study = read_study(Path(str(options.study)).expanduser())
        return {"tokens": tokens, "results": results, "export": export}[str(options.action)](study, options)
    except OSError as error:
        place = error.filename2 or error.filename or options.study
        raise UserError(
            f"{place} cannot be used ({error.strerror or error}); make room for it, or choose another study= or output=."
        ) from None


def serve(options: VoteOptions, suite: Suite | None) -> int:
    from paradiffusion.apps.vote import serve_votes

    study = open_study(options, suite)
    serve_votes(study, options.host, options.port, options.host_names(), about(study))
    return 0


def about(study: Study) -> list[str]:
    """What there is to vote on, in a few lines."""
    counts = sorted({len(study.shown(rater)) for rater in study.tasks})  # as the raters' pages count them
    lines = [
        f"{len(study.prompts)} prompts of {study.suite}, {len(study.sets)} sets, {len(study.pairs)} pairs; "
        f"{' to '.join(map(str, counts[:: max(len(counts) - 1, 1)]))} screens for each of {len(study.tasks)} raters."
    ]
    if failures := study.failures():
        name, prompt, _, why = failures[0]
        lines.append(f"missing pictures: {len(failures)}, such as that of {name} for {prompt} ({why}); where only one is there, it wins.")
    return lines


def tokens(study: Study, options: VoteOptions) -> int:
    from paradiffusion.apps.vote import addresses

    for line in addresses(study, options.host, options.port):
        print(line)
    return 0


def results(study: Study, options: VoteOptions) -> int:
    """Count what there is; the server may go on meanwhile."""
    from paradiffusion.evaluation.votes.vote_report import summary, write_results
    from paradiffusion.evaluation.votes.vote_results import results_of

    with closing(Store(study)) as store:
        found = results_of(study, store.votes(), store.comments(), options.seed)
    folder = Path(options.output).expanduser() if options.output else study.folder
    page = write_results(found, folder)
    for line in summary(found):
        print(line)
    print(f"See {page}; the same is in {page.with_suffix('.md').name} and {page.with_suffix('.json').name} beside it.")
    return 0


def export(study: Study, options: VoteOptions) -> int:
    from paradiffusion.evaluation.votes.vote_report import write_csv

    path = Path(options.output).expanduser() if options.output else study.folder / "votes.csv"
    with closing(Store(study)) as store:
        count = write_csv(study, store.votes(), store.comments(), path)
    print(f"{count} votes of {study.folder / VOTES} are in {path}.")
    return 0
