"""A study of human votes: the sets of pictures that are compared, and which pairs are shown to whom, balanced, fixed in
study.json before the first vote."""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, Final, NamedTuple

from pydantic import TypeAdapter

from paradiffusion.atomic import write_atomic
from paradiffusion.data.images import BadImage, decode
from paradiffusion.errors import UserError
from paradiffusion.evaluation.records import NAME, read_evaluation, read_record, relative_file
from paradiffusion.evaluation.suites.suite import Suite, SuitePrompt
from paradiffusion.randomness import permutation
from paradiffusion.runner import make_bar

STUDY: Final = "study.json"
FORMAT_VERSION: Final = 1
TIE: Final = "tie"
ABSENT: Final = "there is no such picture"


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


class Pair(NamedTuple):
    """Image number ``image`` of two sets for one prompt; ``set_a`` is the one that was named first."""

    prompt: str
    image: int
    set_a: str
    set_b: str


class Task(NamedTuple):
    """A pair (by its number) as one rater meets it: ``occasion`` is 1 where it is seen a second time, ``round`` says which questions are
    asked (``Study.asked``), and ``flipped`` that ``set_b`` is on the left."""

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
    """A study, as study.json keeps it. ``settings`` are what the command line asked for, to be compared when it is opened again; ``ask``
    is "separately" (each question in a round of its own) or "together"; ``tasks`` are by rater, in the order that they are shown in."""

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
        return self.sets[name].pictures[pair.prompt][pair.image]

    def settled(self, pair: Pair) -> str | None:
        """What is decided without a rater: a missing picture loses ("a" or "b" wins), two of them tie; None where both
        pictures are there."""
        missing = (bool(self.picture(pair, pair.set_a).error), bool(self.picture(pair, pair.set_b).error))
        return {(True, False): "b", (False, True): "a", (True, True): TIE, (False, False): None}[missing]

    def sides(self, task: Task) -> tuple[str, str]:
        """The sets on the left and on the right."""
        pair = self.pairs[task.pair]
        return (pair.set_b, pair.set_a) if task.flipped else (pair.set_a, pair.set_b)

    def shown(self, rater: str) -> list[Task]:
        """The rater's tasks that no missing picture settles."""
        return [task for task in self.tasks[rater] if self.settled(self.pairs[task.pair]) is None]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the pairs and of who sees them how: votes of another study are not read as this one's."""
        rows = [[pair._asdict() for pair in self.pairs], {r: [t._asdict() for t in ts] for r, ts in self.tasks.items()}]
        return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]

    def failures(self) -> list[tuple[str, str, int, str]]:
        """(set, prompt, image, why) of all pictures that are missing."""
        used = dict.fromkeys((name, p.prompt, p.image) for p in self.pairs for name in (p.set_a, p.set_b))
        return [(*key, why) for key in used if (why := self.sets[key[0]].pictures[key[1]][key[2]].error)]


def write_study(study: Study) -> Path:
    """Write study.json, whole or not at all; its path. Folders of pictures are kept relative to the study's."""
    sets = [{"name": one.name, "root": relative_file(one.root, study.folder), "pictures": one.pictures} for one in study.sets.values()]
    record = {
        "paradiffusion_study": FORMAT_VERSION,
        **{key: getattr(study, key) for key in ("title", "suite", "settings", "ask", "questions", "pairs", "tasks")},
        "prompts": [*study.prompts.values()], "sets": sets,
    }  # fmt: skip
    study.folder.mkdir(parents=True, exist_ok=True)
    path = study.folder / STUDY
    write_atomic(path, json.dumps(record, ensure_ascii=False, default=asdict) + "\n")
    return path


def read_study(folder: Path) -> Study:
    """The study in ``folder``. UserError where there is none, or it is damaged."""
    path = folder / STUDY

    def made(record: Any) -> Study:
        if not isinstance(record, dict) or record.get("paradiffusion_study") != FORMAT_VERSION:
            raise UserError(f"{path} is no study of version {FORMAT_VERSION}; name another folder with study=.")
        sets = {row["name"]: {**row, "root": os.path.normpath(folder.absolute() / row["root"])} for row in record["sets"]}
        prompts = {row["id"]: row for row in record["prompts"]}
        study = TypeAdapter(Study).validate_python({**record, "folder": folder, "sets": sets, "prompts": prompts})
        for task in chain(*study.tasks.values()):
            study.settled(study.pairs[task.pair])
            study.asked(task.round)
        return study

    missing = f"{folder} holds no {STUDY}; begin a study there with action=serve, sets= and raters=, see --help."
    return read_record(path, made, "bring it back from a copy", missing)


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


def assign(pairs: Sequence[Pair], raters: Sequence[str], repeats: int, rounds: int, retest: int, seed: int) -> dict[str, list[Task]]:
    """Each rater's tasks, in order. UserError for more repeats than raters.

    Each pair goes to ``repeats`` different raters. From every two sets each rater gets the same number, within
    ``repeats``, and so over all; who shares a pair with whom is drawn. Rounds come one after the other, each in an order
    of its own, with ``retest`` pairs seen a second time at its end. Half of a rater's pairs of two sets have the first set on the
    left, in each round anew."""
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


def _tasks_of(pairs: Sequence[Pair], numbers: Sequence[int], rater: str, rounds: int, retest: int, seed: int) -> list[Task]:
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


@dataclass(frozen=True)
class Source:
    """A set before its files were looked at: for each prompt's id the files, or why there is none. ``suite`` is what it was made for;
    None for a folder of pictures, which does not say."""

    name: str
    root: Path
    suite: Suite | None
    files: dict[str, list[Path | str]]


def open_sources(paths: dict[str, str], suite: Suite | None) -> list[Source]:
    """The sets under their names. ``suite`` is needed where no set is an evaluation; evaluations of another one are refused. UserError
    for what is no folder, sets of different suites, or no suite at all."""
    folders = {name: Path(path).expanduser() for name, path in paths.items()}
    for name, folder in folders.items():
        if not folder.is_dir():
            raise UserError(
                f"the set {name} is no folder: {folder}; name an evaluation's folder, or one of pictures named after the prompts."
            )
    evaluations = {name: _from_evaluation(name, f) for name, f in folders.items() if (f / NAME).is_file()}
    for name, source in evaluations.items():
        assert source.suite is not None
        suite = suite or source.suite
        if source.suite.name != suite.name:
            raise UserError(
                f"the set {name} was drawn for the suite {source.suite.name}, and not for {suite.name}; compare sets of one suite."
            )
    if suite is None:
        raise UserError("suite= is missing: no set is the folder of an evaluation, which would say what its prompts are.")
    return [evaluations.get(name) or _from_folder(name, folder, suite) for name, folder in folders.items()]


def common_suite(sources: Sequence[Source], suite: Suite | None) -> Suite:
    """The prompts that all evaluations were made for, in the suite's order. UserError where there are none, or one id stands for two
    texts."""
    made = [(source.name, source.suite) for source in sources if source.suite is not None]
    first = suite or made[0][1]
    known = {name: {prompt.id: prompt.text for prompt in one.prompts} for name, one in made}
    for prompt in first.prompts:
        for name, texts in known.items():
            if texts.get(prompt.id, prompt.text) != prompt.text:
                raise UserError(f"the prompt {prompt.id} has another text in the set {name}; draw the sets from the same prompts.")
    prompts = tuple(prompt for prompt in first.prompts if all(prompt.id in texts for texts in known.values()))
    if not prompts:
        raise UserError("the sets have no prompt in common; draw them from the same suite with the same count=.")
    return Suite(first.name, first.name, prompts)


def look_at(source: Source, prompts: Sequence[SuitePrompt], images: int) -> PictureSet:
    """Decode each picture once, so that one that cannot be shown is known before the first vote."""
    files = [file for p in prompts for file in [*source.files.get(p.id, []), *[ABSENT] * images][:images]]
    pool, found = ThreadPoolExecutor(min(4, os.cpu_count() or 1)), []
    try:
        with make_bar(f"pictures of {source.name}", "picture", len(files)) as bar:
            for picture in pool.map(partial(_looked_at, root=source.root), files):
                found.append(picture)
                bar.update()
    finally:  # after Ctrl-C too, which would else wait for all
        pool.shutdown(cancel_futures=True)
    return PictureSet(source.name, source.root, {p.id: found[n * images : (n + 1) * images] for n, p in enumerate(prompts)})


def read_picture(root: Path, picture: Picture) -> bytes:
    """The file's bytes, the very ones that the study began with. BadImage where they changed, cannot be read, or the path leads
    out of ``root``."""
    data = _bytes(root / picture.file, root)
    if digest_of(data) != picture.digest:
        raise BadImage("it is not the picture that the study began with")
    return data


def digest_of(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _looked_at(file: Path | str, root: Path) -> Picture:
    if isinstance(file, str):
        return Picture("", error=file)
    relative = Path(os.path.relpath(file, root)).as_posix()
    try:
        data = _bytes(file, root)
        decode(data)
    except BadImage as error:
        return Picture(relative, error=str(error))
    return Picture(relative, digest_of(data))


def _bytes(file: Path, root: Path) -> bytes:
    try:
        # Resolved: neither ".." nor a symbolic link leads out of the set's folder.
        inside = file.resolve(strict=True)
        if not inside.is_relative_to(root.resolve()) or not inside.is_file():
            raise BadImage("it lies outside of the set's folder")
        return inside.read_bytes()
    except (OSError, RuntimeError) as error:  # RuntimeError: links that go round
        raise BadImage(getattr(error, "strerror", None) or "it cannot be opened") from None


def _from_evaluation(name: str, folder: Path) -> Source:
    evaluation = read_evaluation(folder)
    files: dict[str, list[Path | str]] = {prompt.id: [] for prompt in evaluation.suite.prompts}
    for drawn in evaluation.images:
        files.setdefault(drawn.prompt, []).append(drawn.error or drawn.file.absolute())
    root = folder.absolute()
    if evaluation.kind == "images":  # these lie where they were found
        places = {str(file.parent) for row in files.values() for file in row if isinstance(file, Path)}
        root = Path(os.path.commonpath(places)) if places else root
    return Source(name, root, evaluation.suite, files)


def _from_folder(name: str, folder: Path, suite: Suite) -> Source:
    """A folder of pictures, matched with the prompts as scripts/evaluate.py does it."""
    from paradiffusion.evaluation.drawing.picture_folder import match_pictures

    root = folder.absolute()
    try:
        matching = match_pictures(root, suite)
    except UserError as error:  # which speaks of a key that belongs to the other script
        raise UserError(str(error).replace(f"images={root}", f"the set {name} ({folder})")) from None
    if matching.strangers:
        print(f"{name}: {len(matching.strangers)} pictures belong to no prompt, such as {matching.strangers[0]}; they are left out.")
    files: dict[str, list[Path | str]] = {key: [file or ABSENT for file in row] for key, row in matching.files.items()}
    return Source(name, root, None, files)
