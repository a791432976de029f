"""A study of human votes: which pairs of pictures are shown to whom, balanced, fixed in study.json before the first vote."""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from paradiffusion.atomic import write_atomic
from paradiffusion.errors import UserError
from paradiffusion.evaluation.records import relative_file
from paradiffusion.randomness import permutation

STUDY: Final = "study.json"
FORMAT_VERSION: Final = 1
TIE: Final = "tie"


@dataclass(frozen=True)
class Question:
    """What is asked of each pair; ``shows_text`` where the rater is shown the prompt with it."""

    name: str
    text: str
    shows_text: bool = True


QUESTIONS: Final = (
    Question("faithfulness", "Which picture follows the text better?"),
    Question("appeal", "Which picture looks better?", shows_text=False),
)


@dataclass(frozen=True)
class Picture:
    """One picture of a set: its file below the set's root and the BLAKE2 hash of its bytes, or why there is none."""

    file: str
    digest: str = ""
    error: str = ""


@dataclass(frozen=True)
class PictureSet:
    """The pictures of one model: for each prompt's id, one or more."""

    name: str
    root: Path
    pictures: dict[str, list[Picture]]


@dataclass(frozen=True)
class VotedPrompt:
    """A prompt, with what its votes are grouped by."""

    id: str
    text: str
    category: str
    band: str


@dataclass(frozen=True)
class Pair:
    """Image number ``image`` of two sets for one prompt; ``set_a`` is the one that was named first."""

    prompt: str
    image: int
    set_a: str
    set_b: str


@dataclass(frozen=True)
class Task:
    """A pair as one rater meets it.

    Attributes:
        pair: its number in the study.
        occasion: 0, or 1 where the rater sees it a second time.
        round: which questions are asked of it, as ``Study.asked`` has them.
        flipped: ``set_b`` is on the left.
    """

    pair: int
    occasion: int
    round: int
    flipped: bool

    @property
    def key(self) -> str:
        """Its name among the rater's votes, the same after every start."""
        return f"{self.pair}.{self.occasion}.{self.round}"


@dataclass(frozen=True)
class Study:
    """A study, as study.json keeps it.

    Attributes:
        settings: what the command line asked for, to be compared when the study is opened again.
        ask: "separately" (each question in a round of its own) or "together" (one after the other on one screen).
        tasks: by rater, in the order in which they are shown.
    """

    folder: Path
    title: str
    suite: str
    settings: dict[str, Any]
    ask: str
    questions: tuple[Question, ...]
    prompts: dict[str, VotedPrompt]
    sets: dict[str, PictureSet]
    pairs: list[Pair]
    tasks: dict[str, list[Task]]

    @property
    def name(self) -> str:
        return self.folder.absolute().name

    def asked(self, round_number: int) -> tuple[Question, ...]:
        """The questions of a round."""
        return self.questions if self.ask == "together" else (self.questions[round_number],)

    def picture(self, pair: Pair, name: str) -> Picture:
        """The picture of set ``name`` in ``pair``."""
        return self.sets[name].pictures[pair.prompt][pair.image]

    def settled(self, pair: Pair) -> str | None:
        """What is decided without a rater: a missing picture loses ("a" or "b" wins), two of them tie; None where both
        pictures are there."""
        missing = (bool(self.picture(pair, pair.set_a).error), bool(self.picture(pair, pair.set_b).error))
        return {(True, False): "b", (False, True): "a", (True, True): TIE, (False, False): None}[missing]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the pairs and of who sees them how: votes of another study are not read as this one's."""
        rows = [[asdict(pair) for pair in self.pairs], {r: [asdict(t) for t in ts] for r, ts in self.tasks.items()}]
        return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]

    def failures(self) -> list[tuple[str, str, int, str]]:
        """(set, prompt, image, why) of all pictures that are missing."""
        used = dict.fromkeys((name, p.prompt, p.image) for p in self.pairs for name in (p.set_a, p.set_b))
        found = [(*key, self.sets[key[0]].pictures[key[1]][key[2]].error) for key in used]
        return [row for row in found if row[3]]


def write_study(study: Study) -> Path:
    """Write study.json, whole or not at all; its path. Folders of pictures are kept relative to the study's."""
    record = {
        "paradiffusion_study": FORMAT_VERSION,
        "title": study.title,
        "suite": study.suite,
        "settings": study.settings,
        "ask": study.ask,
        "questions": [asdict(question) for question in study.questions],
        "prompts": [asdict(prompt) for prompt in study.prompts.values()],
        "sets": [
            {
                "name": one.name,
                "root": relative_file(one.root, study.folder),
                "pictures": {key: [asdict(picture) for picture in row] for key, row in one.pictures.items()},
            }
            for one in study.sets.values()
        ],
        "pairs": [[p.prompt, p.image, p.set_a, p.set_b] for p in study.pairs],
        "tasks": {
            rater: [[t.pair, t.occasion, t.round, int(t.flipped)] for t in tasks]
            for rater, tasks in study.tasks.items()
        },
    }
    study.folder.mkdir(parents=True, exist_ok=True)
    path = study.folder / STUDY
    write_atomic(path, json.dumps(record, ensure_ascii=False) + "\n")
    return path


def read_study(folder: Path) -> Study:
    """The study in ``folder``.

    Raises:
        UserError: where there is none, or it is damaged.
    """
    path = folder / STUDY
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder} holds no {STUDY}; begin a study there with action=serve, sets= and raters=, see --help."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not whole JSON"
        raise UserError(f"{path} cannot be read ({reason}); bring it back from a copy.") from None
    if not isinstance(record, dict) or record.get("paradiffusion_study") != FORMAT_VERSION:
        raise UserError(f"{path} is no study of version {FORMAT_VERSION}; name another folder with study=.")
    try:
        study = _study_from(record, folder)
        for tasks in study.tasks.values():
            for task in tasks:
                study.settled(study.pairs[task.pair])
                study.asked(task.round)
        return study
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); bring it back from a copy.") from None


def _study_from(record: dict[str, Any], folder: Path) -> Study:
    sets = [
        PictureSet(
            row["name"],
            Path(os.path.normpath(folder.absolute() / row["root"])),
            {key: [Picture(**picture) for picture in pictures] for key, pictures in row["pictures"].items()},
        )
        for row in record["sets"]
    ]
    return Study(
        folder=folder,
        title=record["title"],
        suite=record["suite"],
        settings=dict(record["settings"]),
        ask=record["ask"],
        questions=tuple(Question(**row) for row in record["questions"]),
        prompts={row["id"]: VotedPrompt(**row) for row in record["prompts"]},
        sets={one.name: one for one in sets},
        pairs=[Pair(*row) for row in record["pairs"]],
        tasks={
            rater: [Task(pair, occasion, number, bool(flipped)) for pair, occasion, number, flipped in tasks]
            for rater, tasks in record["tasks"].items()
        },
    )


def all_pairs(prompts: Sequence[str], sets: Sequence[str], images: int) -> list[Pair]:
    """Every two of ``sets`` for every prompt and image, grouped by the two sets."""
    return [
        Pair(prompt, image, first, second)
        for number, first in enumerate(sets)
        for second in sets[number + 1 :]
        for prompt in prompts
        for image in range(images)
    ]


def spread(pairs: Sequence[Pair], most: int, seed: int) -> list[Pair]:
    """At most ``most`` of ``pairs``: from every two sets the same number, within one, of prompts drawn by ``seed``."""
    groups = _by_sets(pairs)
    chosen: set[int] = set()
    orders = [[numbers[i] for i in permutation(len(numbers), "pairs", seed, *sets)] for sets, numbers in groups.items()]
    for step in range(max(map(len, orders), default=0)):
        for order in orders:
            if step < len(order) and len(chosen) < most:
                chosen.add(order[step])
    return [pair for number, pair in enumerate(pairs) if number in chosen]


def assign(
    pairs: Sequence[Pair], raters: Sequence[str], repeats: int, rounds: int, retest: int, seed: int
) -> dict[str, list[Task]]:
    """Each rater's tasks, in order.

    Each pair goes to ``repeats`` different raters. From every two sets each rater gets the same number, within
    ``repeats``, and so over all; who shares a pair with whom is drawn. Rounds come one after the other, each in an order
    of its own. Half of a rater's pairs of two sets have the first set on the left, in each round anew.

    Args:
        retest: pairs that each rater sees a second time, at the end of each round, in an order and on sides of their own.
    Raises:
        UserError: for more repeats than raters.
    """
    if repeats > len(raters):
        raise UserError(f"repeats={repeats} needs as many raters, and there are {len(raters)}; name more with raters=.")
    seen: dict[str, list[int]] = {rater: [] for rater in raters}
    place = 0
    for sets, numbers in _by_sets(pairs).items():
        for step in permutation(len(numbers), "assignment", seed, *sets):
            # A round of as many pairs as raters gives each rater `repeats` of them.
            turn = permutation(len(raters), "raters", seed, place // len(raters))
            for copy in range(repeats):
                seen[raters[turn[(place + copy) % len(raters)]]].append(numbers[step])
            place += 1
    return {rater: _tasks_of(pairs, numbers, rater, rounds, retest, seed) for rater, numbers in seen.items()}


def _tasks_of(
    pairs: Sequence[Pair], numbers: Sequence[int], rater: str, rounds: int, retest: int, seed: int
) -> list[Task]:
    again = [numbers[i] for i in permutation(len(numbers), "again", seed, rater)[:retest]]
    tasks = []
    for round_number in range(rounds):
        for occasion, shown in enumerate((numbers, again)):
            part = (seed, rater, round_number, occasion)
            flipped = _sides(pairs, shown, *part)
            order = permutation(len(shown), "order", *part)
            tasks += [Task(shown[i], occasion, round_number, flipped[shown[i]]) for i in order]
    return tasks


def _sides(pairs: Sequence[Pair], numbers: Sequence[int], *part: int | str) -> dict[int, bool]:
    """Which pairs are shown with their sides exchanged: half of each two sets, within one."""
    flipped = {}
    for sets, members in _by_sets([pairs[number] for number in numbers]).items():
        order = permutation(len(members), "sides", *part, *sets)
        odd = int(permutation(2, "odd side", *part, *sets)[0])
        for place, member in enumerate(order):
            flipped[numbers[members[member]]] = bool((place + odd) % 2)
    return flipped


def _by_sets(pairs: Sequence[Pair]) -> dict[tuple[str, str], list[int]]:
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for number, pair in enumerate(pairs):
        groups[pair.set_a, pair.set_b].append(number)
    return groups
