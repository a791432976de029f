"""DPG-Bench's score, as its published code computes it and as it was meant.

The benchmark is ELLA's (arXiv 2403.05135); the code is dpg_bench/compute_dpg_bench.py of TencentQQGYLab/ELLA, at commit
025f650. Its procedure: four images for each of 1,065 prompts; each question asked of each image; the dependency rule; the
share of questions answered yes, averaged over a prompt's images and then over prompts; category scores over questions. Its
judge is mPLUG-large, which answers in free words, and anything but "yes" is no. Ours is whichever model is given, with
unclear answers counted as no, so numbers compare with published ones only where the judge is the same.

The published code has ways (``QUIRKS``) of which the paper says nothing:
    skip first row: the reader of the CSV passes over its first row of data, as if that were the header. The first prompt's first
        question is not asked, and where another one depends on it, looking that up fails.
    keep last block: rows of a prompt that do not follow each other begin it anew: only the last block is asked.
    file order: the dependency rule goes through the questions once, in the order of the file: a question before its parent sees what
        the parent was answered, not whether the parent was ruled out.
    drop failures: a prompt of which anything fails (a picture that does not open, the look-up above) is printed and left out of every
        mean; one whose picture is missing is not even printed.
    last image categories: category scores are those of the last of the prompt's images alone.
    raw categories: category scores are taken before the dependency rule.
    tuple categories: a question's category is what its tuple begins with, not what the CSV's columns for it say.

Two things the corrected score has too: a ruled-out question stays in the denominator, and prompts weigh the same whatever their number
of questions, while questions weigh the same in the categories. One is not reproduced: on several processes, each goes through the
categories in an order of its own (that of a set of strings) while gathering, so that scores of different categories can be mixed; ours
are those of one process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Final

from paradiffusion.evaluation.estimates import mean, mean_rows
from paradiffusion.evaluation.records import Drawn, ImageScore, Measure, Run, ScoreResult, Table
from paradiffusion.evaluation.scores import checklist
from paradiffusion.evaluation.scores.checklist import Answered
from paradiffusion.evaluation.scores.sentence_judges import turn_of
from paradiffusion.evaluation.scores.vlm_answers import Asker
from paradiffusion.evaluation.suites.suite import ChecklistQuestion, Suite, SuitePrompt, by_id
from paradiffusion.metrics.vlm import VlmOptions

QUIRKS: Final = (
    "skip first row", "keep last block", "file order", "drop failures", "last image categories", "raw categories", "tuple categories",
)  # fmt: skip


@dataclass(frozen=True)
class JudgedPrompt:
    """A prompt's answers: by image, with the rule applied, in the images' order; by image why it failed; and why the prompt is in no mean,
    "" where it is."""

    prompt: SuitePrompt
    images: Mapping[str, list[Answered]]
    errors: Mapping[str, str]
    dropped: str = ""

    def share(self, image: str) -> float:
        """The image's score; 0 where it failed."""
        answers = self.images[image]
        return 0.0 if self.errors[image] or not answers else sum(one.is_yes for one in answers) / len(answers)

    @property
    def score(self) -> float:
        return sum(self.share(image) for image in self.images) / max(1, len(self.images))


def questions_of(prompt: SuitePrompt, published: bool) -> list[ChecklistQuestion]:
    """The questions that are asked of a prompt's images, in the order of the file: ``prompt.meta["dpg"]`` says in which row of the CSV
    each stands, and in "last_block" where the last unbroken run of this prompt's rows begins, if there are several."""
    place = prompt.meta.get("dpg", {})
    rows = place.get("row", {})  # of another suite than DPG-Bench there are none
    start = max(1, int(place.get("last_block", 0))) if published else 0
    return [question for question in prompt.questions if rows.get(question.id, start) >= start]


def category_of(question: ChecklistQuestion, published: bool) -> tuple[str, str]:
    """(L1, L2) of a question, such as ("attribute", "attribute - color")."""
    if published and question.about:
        fine = question.about.partition("(")[0].strip()
        return fine.partition("-")[0].strip(), fine
    broad = question.category or "other"
    return broad, f"{broad} - {question.detail}" if question.detail else broad


def with_known_parents(prompt: SuitePrompt) -> SuitePrompt:
    """``prompt`` without dependencies on questions that it has not."""
    known = {question.id for question in prompt.questions}
    kept = (replace(one, parents=tuple(parent for parent in one.parents if parent in known)) for one in prompt.questions)
    return replace(prompt, questions=tuple(kept))


def judge(prompt: SuitePrompt, answers: Mapping[str, tuple[list[Answered], str]], published: bool) -> JudgedPrompt:
    """The answers to one prompt's images with the rule applied; ``answers`` are by image, in order, with why the image failed."""
    ruled: dict[str, list[Answered]] = {}
    errors: dict[str, str] = {}
    for image, (found, error) in answers.items():
        try:
            ruled[image] = _in_file_order(found) if published else checklist.with_rule(with_known_parents(prompt), found)
        except KeyError as missing:
            ruled[image], error = found, error or f"question {missing.args[0]}, which another depends on, is not asked"
        errors[image] = error or ("" if found else "none of its prompt's questions is asked")
    failure = next(filter(None, errors.values()), "" if answers else "it has no images")
    return JudgedPrompt(prompt, ruled, errors, failure if published else "")


def _in_file_order(answers: list[Answered]) -> list[Answered]:
    """The rule in one pass over the file's rows. Raises KeyError for a parent that was not asked, as the code does."""
    yes = {one.question.id: one.verdict == "yes" for one in answers}
    counted = {}
    for one in answers:
        # all() stops at the first no, so that a parent that is missing behind it goes unnoticed, as with theirs.
        counted[one.question.id] = all(yes[parent] for parent in one.question.parents)
        yes[one.question.id] &= counted[one.question.id]
    return [replace(one, counted=counted[one.question.id]) for one in answers]


PROMPTS: Final = 1065
IMAGES: Final = 4
_SOURCE: Final = "DPG-Bench (arXiv 2403.05135), dpg_bench/compute_dpg_bench.py of TencentQQGYLab/ELLA"


class DpgPublished:
    """The score as the published code computes it, with all QUIRKS."""

    name = "dpg"
    what = "DPG-Bench, procedure as published"
    published = True

    def __init__(self, options: VlmOptions) -> None:
        self.asker = Asker(options, checklist.TOKENS)
        self.title = f"{self.what}, with {options.name} for mPLUG"

    def settings(self) -> dict[str, Any]:
        quirks = list(QUIRKS) if self.published else []
        return {"model": self.asker.settings(), "instruction": checklist.asked("{question}"), "quirks": quirks}

    def prepare(self, suite: Suite, images: list[Drawn], work: Path, run: Run) -> None:
        """See Score. Raises UserError for questions that depend on each other in a circle, where that matters."""
        prompts = by_id(suite.prompts)
        if not self.published:
            for prompt in suite.prompts:
                checklist.parents_first(with_known_parents(prompt))
        checklist.ask_questions(self.asker, images, lambda one: questions_of(prompts[one.prompt], self.published), work, run, self.name)

    def result(self, suite: Suite, images: list[Drawn], work: Path) -> ScoreResult:
        prompts = [prompt for prompt in suite.prompts if prompt.questions]
        if not prompts:
            return ScoreResult(self.name, self.title, skipped=checklist.no_questions(suite))
        heard, by_prompt, judged = self.asker.heard(work), dict[str, list[Drawn]](), []
        for image in images:
            by_prompt.setdefault(image.prompt, []).append(image)
        for prompt in prompts:
            own = sorted(by_prompt.get(prompt.id, []), key=turn_of)
            answers = {image.name: checklist.read(heard, image, questions_of(prompt, self.published)) for image in own}
            judged.append(judge(prompt, answers, self.published))
        measure = Measure(self.name, self.title, "share", worst=None if self.published else 0.0)
        kept = [one for one in judged if not one.dropped]
        return ScoreResult(
            self.name, self.title, formula=_formula(self.published), source=_SOURCE,
            settings={**self.settings(), "answered_by": heard.engine}, measures=[measure],
            images=[score for one in judged for score in _image_scores(one, self.name)],
            overall={self.name: mean([one.score for one in kept], [one.prompt.id for one in kept])} if kept else {},
            tables=_tables(kept, self.published), warnings=_remarks(judged),
        )  # fmt: skip


class DpgCorrected(DpgPublished):
    """The score as it was meant: every question and every image counts, in categories too, and failures count as 0."""

    name = "dpg_corrected"
    what = "DPG-Bench, corrected procedure"
    published = False


def _image_scores(one: JudgedPrompt, name: str) -> list[ImageScore]:
    scores = []
    for image, answers in one.images.items():
        error = one.errors[image] or (f"its prompt is left out: {one.dropped}" if one.dropped else "")
        values = {} if one.dropped else {name: one.share(image)}
        detail = {} if one.errors[image] else {"questions": [answer.detail() for answer in answers]}
        scores.append(ImageScore(image, one.prompt.id, values, error=error, detail=detail))
    return scores


def _tables(kept: Sequence[JudgedPrompt], published: bool) -> list[Table]:
    """Category scores: L1 are the broad categories, L2 the finer ones, by the benchmark's own names."""
    rows: list[tuple[str, str, float, str]] = []  # L1, L2, score, prompt
    for one in kept:
        chosen = list(one.images.values())
        for answer in chain(*(chosen[-1:] if published else chosen)):
            value = float(answer.verdict == "yes" if published else answer.is_yes)
            rows.append((*category_of(answer.question, published), value, one.prompt.id))
    part = "of the last image of each prompt, before the dependency rule" if published else "of all images, after the dependency rule"
    note = f"Mean over questions, {part}."
    made = []
    for level, title, plot in ((0, "DPG-Bench, L1 categories", "bars"), (1, "DPG-Bench, L2 categories", "")):
        cells = mean_rows([(row[:2][level], row[2], row[3]) for row in rows], sorted({row[:2][level] for row in rows}))
        if cells:
            made.append(Table(title, ["Category", "Yes"], cells, note, plot=plot))
    return made


def _formula(published: bool) -> str:
    said = "Share of an image's questions answered yes, after the dependency rule; mean over a prompt's images, then over prompts."
    return f"{said} With the published code's ways: {', '.join(QUIRKS)}." if published else said


def _remarks(judged: Sequence[JudgedPrompt]) -> list[str]:
    said = ["The judge is another than mPLUG-large, the benchmark's: compare only scores with the same judge."]
    if dropped := [one for one in judged if one.dropped]:
        said.append(
            f"{len(dropped)} of {len(judged)} prompts are left out of the mean, as the published code does "
            f"({dropped[0].prompt.id}: {dropped[0].dropped})."
        )
    if failed := sum(bool(error) for one in judged for error in one.errors.values()):
        said.append(f"{failed} images failed.")
    if others := [one for one in judged if len(one.images) != IMAGES]:
        said.append(f"Published scores take {IMAGES} images for each prompt; here {len(others[0].images)} are taken.")
    if len(judged) != PROMPTS:
        said.append(f"Published scores are over {PROMPTS:,} prompts; these are over {len(judged):,}.")
    answers = [one for part in judged for group in part.images.values() for one in group]
    unclear = sum(one.verdict == "unclear" for one in answers) / max(1, len(answers))
    if unclear > checklist.UNCLEAR_TO_MENTION:
        said.append(f"{unclear:.1%} of the answers were neither yes nor no; they count as no.")
    return said
