"""DPG-Bench's score, as its published code computes it and as it was meant.

The benchmark is ELLA's (arXiv 2403.05135); the code is dpg_bench/compute_dpg_bench.py of TencentQQGYLab/ELLA, at commit
025f650. Its procedure: four images for each of 1,065 prompts; each question asked of each image; the dependency rule; the
share of questions answered yes, averaged over a prompt's images and then over prompts; category scores over questions. Its
judge is mPLUG-large, which answers in free words, and anything but "yes" is no. Ours is whichever model is given, with
unclear answers counted as no, so numbers compare with published ones only where the judge is the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from paradiffusion.evaluation.estimates import mean, mean_rows
from paradiffusion.evaluation.records import Drawn, ImageScore, Measure, Run, ScoreResult, Table
from paradiffusion.evaluation.scores.checklist import (
    TOKENS,
    UNCLEAR_TO_MENTION,
    Answered,
    ask_questions,
    asked,
    no_questions,
    parents_first,
    read,
    with_rule,
)
from paradiffusion.evaluation.scores.sentence_judges import turn_of
from paradiffusion.evaluation.scores.vlm_answers import Asker
from paradiffusion.evaluation.suites.suite import ChecklistQuestion, Suite, SuitePrompt, by_id
from paradiffusion.metrics.vlm import VlmOptions


@dataclass(frozen=True)
class Quirks:
    """What the published code does that its paper does not say. Each can be switched off.

    Attributes:
        skip_first_row: the reader of the CSV passes over its first row of data, as if that were the header. The first
            prompt's first question is not asked, and where another one depends on it, looking that up fails.
        keep_last_block: rows of a prompt that do not follow each other begin it anew: only the last block is asked.
        file_order: the dependency rule goes through the questions once, in the order of the file: a question before its
            parent sees what the parent was answered, not whether the parent was ruled out.
        drop_failures: a prompt of which anything fails (a picture that does not open, the look-up above) is printed and left
            out of every mean; one whose picture is missing is not even printed.
        last_image_categories: category scores are those of the last of the prompt's images alone.
        raw_categories: category scores are taken before the dependency rule.
        tuple_categories: a question's category is what its tuple begins with, not what the CSV's columns for it say.

    Two things are as in the published code without being switched: a ruled-out question stays in the denominator, and
    prompts weigh the same whatever their number of questions, while questions weigh the same in the categories. One is not
    reproduced: on several processes, each goes through the categories in an order of its own (that of a set of strings) while
    gathering, so that scores of different categories can be mixed; ours are those of one process.
    """

    skip_first_row: bool = True
    keep_last_block: bool = True
    file_order: bool = True
    drop_failures: bool = True
    last_image_categories: bool = True
    raw_categories: bool = True
    tuple_categories: bool = True


PUBLISHED: Final = Quirks()
CORRECTED: Final = Quirks(**dict.fromkeys(Quirks.__dataclass_fields__, False))


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
        """The mean over images; 0 where there is none."""
        return sum(self.share(image) for image in self.images) / max(1, len(self.images))


def questions_of(prompt: SuitePrompt, quirks: Quirks) -> list[ChecklistQuestion]:
    """The questions that are asked of a prompt's images, in the order of the file: ``prompt.meta["dpg"]`` says in which row of the CSV
    each stands, and in "last_block" where the last unbroken run of this prompt's rows begins, if there are several."""
    place = prompt.meta.get("dpg", {})
    rows = place.get("row", {})  # of another suite than DPG-Bench there are none
    start = int(place.get("last_block", 0)) if quirks.keep_last_block else 0
    start = max(start, 1) if quirks.skip_first_row else start
    return [question for question in prompt.questions if rows.get(question.id, start) >= start]


def category_of(question: ChecklistQuestion, quirks: Quirks) -> tuple[str, str]:
    """(L1, L2) of a question, such as ("attribute", "attribute - color")."""
    if quirks.tuple_categories and question.about:
        fine = question.about.partition("(")[0].strip()
        return fine.partition("-")[0].strip(), fine
    broad = question.category or "other"
    return broad, f"{broad} - {question.detail}" if question.detail else broad


def asked_prompt(prompt: SuitePrompt, quirks: Quirks) -> SuitePrompt:
    """``prompt`` with the questions that are asked, without dependencies on any that are not."""
    asked = questions_of(prompt, quirks)
    known = {question.id for question in asked}
    kept = (replace(one, parents=tuple(parent for parent in one.parents if parent in known)) for one in asked)
    return replace(prompt, questions=tuple(kept))


def judge(prompt: SuitePrompt, answers: Mapping[str, tuple[list[Answered], str]], quirks: Quirks) -> JudgedPrompt:
    """The answers to one prompt's images with the rule applied; ``answers`` are by image, in order, with why the image failed."""
    ruled: dict[str, list[Answered]] = {}
    errors: dict[str, str] = {}
    for image, (found, error) in answers.items():
        try:
            ruled[image] = _in_file_order(found) if quirks.file_order else with_rule(asked_prompt(prompt, quirks), found)
        except KeyError as missing:
            ruled[image], error = found, error or f"question {missing.args[0]}, which another depends on, is not asked"
        errors[image] = error or ("" if found else "none of its prompt's questions is asked")
    if not quirks.drop_failures:
        return JudgedPrompt(prompt, ruled, errors)
    return JudgedPrompt(prompt, ruled, errors, next(filter(None, errors.values()), "" if answers else "it has no images"))


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
    """The score as the published code computes it, with ``quirks``: every one."""

    name = "dpg"
    what = "DPG-Bench, procedure as published"
    quirks = PUBLISHED

    def __init__(self, options: VlmOptions, quirks: Quirks | None = None) -> None:
        self.asker, self.quirks = Asker(options, TOKENS), quirks or self.quirks
        self.title = f"{self.what}, with {options.name} for mPLUG"

    def settings(self) -> dict[str, Any]:
        return {
            "model": self.asker.settings(), "instruction": asked("{question}"), "quirks": asdict(self.quirks),
        }  # fmt: skip

    def prepare(self, suite: Suite, images: list[Drawn], work: Path, run: Run) -> None:
        """See Score. Raises UserError for questions that depend on each other in a circle, where that matters."""
        prompts = by_id(suite.prompts)
        if not self.quirks.file_order:
            for prompt in suite.prompts:
                parents_first(asked_prompt(prompt, self.quirks))
        ask_questions(self.asker, images, lambda one: questions_of(prompts[one.prompt], self.quirks), work, run, self.name)

    def result(self, suite: Suite, images: list[Drawn], work: Path) -> ScoreResult:
        prompts = [prompt for prompt in suite.prompts if prompt.questions]
        if not prompts:
            return ScoreResult(self.name, self.title, skipped=no_questions(suite))
        heard, by_prompt, judged = self.asker.heard(work), dict[str, list[Drawn]](), []
        for image in images:
            by_prompt.setdefault(image.prompt, []).append(image)
        for prompt in prompts:
            own = sorted(by_prompt.get(prompt.id, []), key=turn_of)
            answers = {image.name: read(heard, image, questions_of(prompt, self.quirks)) for image in own}
            judged.append(judge(prompt, answers, self.quirks))
        measure = Measure(self.name, self.title, "share", worst=None if self.quirks.drop_failures else 0.0)
        kept = [one for one in judged if not one.dropped]
        return ScoreResult(
            self.name, self.title, formula=_formula(self.quirks), source=_SOURCE,
            settings={**self.settings(), "answered_by": heard.engine}, measures=[measure],
            images=[score for one in judged for score in _image_scores(one, self.name)],
            overall={self.name: mean([one.score for one in kept], [one.prompt.id for one in kept])} if kept else {},
            tables=_tables(kept, self.quirks), warnings=_remarks(judged),
        )  # fmt: skip


class DpgCorrected(DpgPublished):
    """The score as it was meant: every question and every image counts, in categories too, and failures count as 0."""

    name = "dpg_corrected"
    what = "DPG-Bench, corrected procedure"
    quirks = CORRECTED


def _image_scores(one: JudgedPrompt, name: str) -> list[ImageScore]:
    scores = []
    for image, answers in one.images.items():
        error = one.errors[image] or (f"its prompt is left out: {one.dropped}" if one.dropped else "")
        values = {} if one.dropped else {name: one.share(image)}
        detail = {} if one.errors[image] else {"questions": [answer.detail() for answer in answers]}
        scores.append(ImageScore(image, one.prompt.id, values, error=error, detail=detail))
    return scores


def _tables(kept: Sequence[JudgedPrompt], quirks: Quirks) -> list[Table]:
    """Category scores: L1 are the broad categories, L2 the finer ones, by the benchmark's own names."""
    rows: list[tuple[str, str, float, str]] = []  # L1, L2, score, prompt
    for one in kept:
        chosen = list(one.images.items())[-1:] if quirks.last_image_categories else one.images.items()
        for _, answers in chosen:
            for answer in answers:
                value = float(answer.verdict == "yes" if quirks.raw_categories else answer.is_yes)
                rows.append((*category_of(answer.question, quirks), value, one.prompt.id))
    parts = [
        "of the last image of each prompt" if quirks.last_image_categories else "of all images",
        "before the dependency rule" if quirks.raw_categories else "after the dependency rule",
    ]
    note = f"Mean over questions, {', '.join(parts)}."
    made = []
    for level, title, plot in ((0, "DPG-Bench, L1 categories", "bars"), (1, "DPG-Bench, L2 categories", "")):
        cells = mean_rows([(row[:2][level], row[2], row[3]) for row in rows], sorted({row[:2][level] for row in rows}))
        if cells:
            made.append(Table(title, ["Category", "Yes"], cells, note, plot=plot))
    return made


def _formula(quirks: Quirks) -> str:
    said = "Share of an image's questions answered yes, after the dependency rule; mean over a prompt's images, then over prompts."
    on = [name.replace("_", " ") for name, value in asdict(quirks).items() if value]
    return f"{said} With the published code's ways: {', '.join(on)}." if on else said


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
    if unclear > UNCLEAR_TO_MENTION:
        said.append(f"{unclear:.1%} of the answers were neither yes nor no; they count as no.")
    return said
