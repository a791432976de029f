"""The checklist score: yes/no questions about each picture, answered by a vision-language model, with the dependency rule."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, Final

from paradiffusion.errors import UserError
from paradiffusion.evaluation.estimates import ratio
from paradiffusion.evaluation.records import Drawn, ImageScore, Measure, Run, ScoreResult, Table
from paradiffusion.evaluation.scores.vlm_answers import Asker, Heard
from paradiffusion.evaluation.suites.suite import ChecklistQuestion, Suite, SuitePrompt, by_id
from paradiffusion.metrics.vlm import VlmOptions, spoken

TOKENS: Final = 16
_INSTRUCTION: Final = "Look at the picture and answer this question with one word, yes or no: {question}"

_YES: Final = r"(?:yes|yeah|yep|true|correct)"
_NO: Final = r"(?:no|nope|false|incorrect)"
# Before the word: "Answer:", "The answer is", quotes, markdown's stars.
_LEAD: Final = r"^\W*(?:(?:(?:the|my|final)\s+)*answer(?:\s+is)?\W*)?"
_BOTH: Final = re.compile(_LEAD + rf"(?:{_YES}|{_NO})\W*(?:/|\band\b|\bor\b|\|)\W*(?:{_YES}|{_NO})\b", re.I)
_FIRST: Final = re.compile(_LEAD + rf"(?:(?P<yes>{_YES})|(?P<no>{_NO}))\b(?!\s+(?:idea|way|clue|answer))", re.I)
_LAST: Final = re.compile(
    rf"\banswer(?:\s+is)?\W*(?:(?P<yes>{_YES})|(?P<no>{_NO}))\W*$|(?:^|\n)\W*(?:(?P<yes2>{_YES})|(?P<no2>{_NO}))\W*$", re.I
)


def asked(question: str) -> str:
    return _INSTRUCTION.replace("{question}", " ".join(question.split()))


def verdict(answer: str) -> str:
    """ "yes", "no" or "unclear".

    The first word counts ("No, it is blue."), or one that stands alone at the end ("... Answer: yes"); what a
    model thinks before is passed over. Whatever takes no side, or both, is unclear.
    """
    text = spoken(answer)
    if _BOTH.search(text):
        return "unclear"
    match = _FIRST.search(text) or _LAST.search(text)
    if match is None:
        return "unclear"
    groups = match.groupdict()
    return "yes" if groups.get("yes") or groups.get("yes2") else "no"


def parents_first(prompt: SuitePrompt) -> list[ChecklistQuestion]:
    """A prompt's questions, each after all of its parents. UserError for a parent that is not among them, or parents in a circle."""
    by_id = {question.id: question for question in prompt.questions}
    for question in prompt.questions:
        for parent in question.parents:
            if parent not in by_id:
                raise UserError(
                    f"in the checklist of {prompt.id}, question {question.id} depends on {parent}, which is not there; expected the "
                    "id of another question of the same prompt."
                )
    try:
        order = TopologicalSorter({question.id: question.parents for question in prompt.questions}).static_order()
        return [by_id[name] for name in order]
    except CycleError as error:
        circle = " -> ".join(reversed(error.args[1]))
        raise UserError(
            f"in the checklist of {prompt.id}, questions depend on each other in a circle ({circle}); remove one dependency."
        ) from None


UNCLEAR_TO_MENTION: Final = 0.02  # our choice
_SHOWN: Final = 200  # characters of an answer that reports keep
_MEASURES: Final = (
    Measure("checklist", "Checklist, mean over prompts", "share"),
    Measure("checklist_by_question", "Checklist, mean over questions", "share"),
    Measure("checklist_without_rule", "Checklist as answered, without the dependency rule", "share"),
)


@dataclass(frozen=True)
class Answered:
    """A question about one picture, with its answer.

    Attributes:
        verdict: "yes", "no" or "unclear", which counts as no.
        counted: False where a question that it depends on was not answered yes; it is no "yes" then.
    """

    image: Drawn
    question: ChecklistQuestion
    text: str
    verdict: str
    counted: bool = True

    @property
    def is_yes(self) -> bool:
        return self.counted and self.verdict == "yes"

    def detail(self) -> dict[str, Any]:
        return {
            "id": self.question.id, "text": self.question.text, "answer": self.text.strip()[:_SHOWN] or self.verdict,
            "yes": self.verdict == "yes", "counted": self.counted, "category": self.question.category,
        }  # fmt: skip


class Checklist:
    """Share of a picture's questions that are answered yes, where no question counts whose object is not there.

    An image's score is the mean over its questions, after the dependency rule, as in Davidsonian Scene
    Graph (arXiv 2310.18235) and DPG-Bench (arXiv 2403.05135). ``checklist`` is the mean of those over prompts, as DPG-Bench
    takes it, ``checklist_by_question`` weighs each image by its questions.
    """

    name = "checklist"

    def __init__(self, options: VlmOptions) -> None:
        self.asker = Asker(options, TOKENS)
        self.title = f"Checklist, answered by {options.name}"

    def settings(self) -> dict[str, Any]:
        return {"model": self.asker.settings(), "instruction": asked("{question}")}

    def prepare(self, suite: Suite, images: list[Drawn], work: Path, run: Run) -> None:
        """See Score. Raises UserError for questions that depend on each other wrongly."""
        prompts = by_id(suite.prompts)
        for prompt in suite.prompts:
            parents_first(prompt)
        ask_questions(self.asker, images, lambda image: prompts[image.prompt].questions, work, run, self.name)

    def result(self, suite: Suite, images: list[Drawn], work: Path) -> ScoreResult:
        if not any(prompt.questions for prompt in suite.prompts):
            return ScoreResult(self.name, self.title, skipped=no_questions(suite))
        prompts, heard = by_id(suite.prompts), self.asker.heard(work)
        scores, rows = [], []
        for image in images:
            if prompt := prompts[image.prompt] if prompts[image.prompt].questions else None:
                answers, error = read(heard, image, prompt.questions)
                answers = with_rule(prompt, answers)
                scores.append(_score(image, answers, error))
                rows += answers
        return ScoreResult(
            self.name, self.title,
            formula="Share of an image's questions answered yes; a question counts as no where one that it depends on is not "
            "a yes. Unclear answers count as no, failed images as 0. Mean over prompts, and over questions.",
            source="our wording of the questions' instruction; rule as in DSG (arXiv 2310.18235), DPG-Bench (arXiv 2403.05135)",
            settings={**self.settings(), "answered_by": heard.engine},
            measures=list(_MEASURES), images=scores, tables=tables(rows), warnings=remarks(rows, scores),
        )  # fmt: skip


def ask_questions(
    asker: Asker, images: Sequence[Drawn], questions: Callable[[Drawn], Sequence[ChecklistQuestion]], work: Path, run: Run,
    title: str,
) -> None:  # fmt: skip
    """Ask the questions of each image that have no answer yet."""
    asks = [(image, asked(question.text)) for image in images for question in questions(image)]
    if asks:
        asker.ask(asks, work, run, title)


def read(heard: Heard, image: Drawn, questions: Sequence[ChecklistQuestion]) -> tuple[list[Answered], str]:
    """The answers about one image, and why it failed; a failed image's questions are all answered no."""
    replies = [heard.reply(image, asked(question.text)) for question in questions]
    error = next((reply.error for reply in replies if reply.error), "")
    return [
        Answered(image, question, reply.text, "no" if error else verdict(reply.text))
        for question, reply in zip(questions, replies, strict=True)
    ], error


def with_rule(prompt: SuitePrompt, answers: Sequence[Answered]) -> list[Answered]:
    """The answers with the dependency rule: one counts where all of its parents count and were answered yes. One that does not count is
    no "yes", whatever the answer was; so what depends on it does not count either."""
    yes = {one.question.id: one.verdict == "yes" for one in answers}
    counted: dict[str, bool] = {}
    for question in parents_first(prompt):
        counted[question.id] = all(counted[parent] and yes[parent] for parent in question.parents)
    return [replace(one, counted=counted[one.question.id]) for one in answers]


def _score(image: Drawn, answers: Sequence[Answered], error: str) -> ImageScore:
    weights = {"checklist_by_question": float(len(answers))}
    if error:
        return ImageScore(image.name, image.prompt, {one.name: 0.0 for one in _MEASURES}, weights, error)
    share = sum(one.is_yes for one in answers) / len(answers)
    plain = sum(one.verdict == "yes" for one in answers) / len(answers)
    values = {"checklist": share, "checklist_by_question": share, "checklist_without_rule": plain}
    return ImageScore(image.name, image.prompt, values, weights, detail={"questions": [one.detail() for one in answers]})


def tables(rows: Sequence[Answered]) -> list[Table]:
    """Shares by category and, where there are finer ones, by those."""
    head = ["Category", "Yes", "Questions", "Unclear", "Lost by the rule"]
    note = (
        "Mean over questions. Unclear answers count as no; lost by the rule: answered yes, but something that the question "
        "depends on was not."
    )
    made = [Table("Checklist by category", head, _rows(rows, _category), note, plot="bars")]
    if len({_finer(one) for one in rows}) > len({_category(one) for one in rows}):
        made.append(Table("Checklist by finer category", head, _rows(rows, _finer), note))
    return made


def _category(one: Answered) -> str:
    return one.question.category or "other"


def _finer(one: Answered) -> str:
    return f"{_category(one)} - {one.question.detail}" if one.question.detail else _category(one)


def _rows(rows: Sequence[Answered], group_of: Callable[[Answered], str]) -> list[list[Any]]:
    found = []
    for group in [*sorted({group_of(one) for one in rows}), None]:
        part = [one for one in rows if group is None or group_of(one) == group]
        prompts = [one.image.prompt for one in part]
        yes = ratio([float(one.is_yes) for one in part], [1.0] * len(part), prompts)
        unclear = sum(one.verdict == "unclear" for one in part) / len(part)
        lost = sum(one.verdict == "yes" and not one.counted for one in part) / len(part)
        found.append([group or "all", yes, len(part), unclear, lost])
    return found


def remarks(rows: Sequence[Answered], scores: Sequence[ImageScore]) -> list[str]:
    said = []
    unclear = sum(one.verdict == "unclear" for one in rows) / max(1, len(rows))
    if unclear > UNCLEAR_TO_MENTION:
        said.append(f"{unclear:.1%} of the answers were neither yes nor no; they count as no.")
    if failed := sum(bool(score.error) for score in scores):
        said.append(f"{failed} of {len(scores)} images failed; they count as 0 and are listed.")
    return said


def no_questions(suite: Suite) -> str:
    return f"the suite {suite.name} has no questions; choose one with checklists, such as paraprompts, dpg or geneval."
