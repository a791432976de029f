"""DPG-Bench's score: the published code's ways by small cases in which they make the difference."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from chat_server import Asked, ChatServer
from commands import user_error
from judged_scenes import Alone
from PIL import Image
from vlm_scoring import options_for

from paradiffusion.evaluation.records import Drawn, ScoreResult
from paradiffusion.evaluation.scores.checklist import Answered, Checklist
from paradiffusion.evaluation.scores.dpg_bench import DpgCorrected, DpgPublished, JudgedPrompt, judge, questions_of
from paradiffusion.evaluation.scores.sentence_judges import turn_of
from paradiffusion.evaluation.suites.suite import ChecklistQuestion, Suite, SuitePrompt

PUBLISHED, CORRECTED = True, False


def prompt(first_row: int, *questions: tuple[str, str], last_block: int | None = None, name: str = "p") -> SuitePrompt:
    """A prompt whose questions are (id, parents) in the order of the file, from row ``first_row`` on."""
    made = tuple(
        ChecklistQuestion(number, f"{name}: is {number} so?", "entity" if not parents else "attribute", "whole" if not parents
                          else "color", tuple(parents), f"{'entity - whole' if not parents else 'attribute - color'} (x, {number})")
        for number, parents in questions
    )  # fmt: skip
    rows = {question.id: first_row + number for number, question in enumerate(made)}
    place = {"rows": first_row, "row": rows} | ({} if last_block is None else {"last_block": last_block})
    return SuitePrompt(name, f"the prompt {name}", questions=made, meta={"dpg": place})


def judged(one: SuitePrompt, published: bool, *images: str, errors: tuple[str, ...] = ()) -> JudgedPrompt:
    """``one`` with images for which the questions in each text are answered yes."""
    answers = {}
    for number, yes in enumerate(images):
        image = Drawn(f"{one.id}_{number}", one.id, Path("none.png"))
        asked = [Answered(image, question, "", "yes" if question.id in yes else "no") for question in questions_of(one, published)]
        answers[image.name] = asked, errors[number] if errors else ""
    return judge(one, answers, published)


def test_the_rule_in_the_order_of_the_file() -> None:
    """A chain, written from its end: c sees that b was answered yes, not that b is ruled out by a's no."""
    chain = prompt(5, ("3", "2"), ("2", "1"), ("1", ""))
    for published, score in ((CORRECTED, 0), (PUBLISHED, 1 / 3)):
        assert judged(chain, published, "23").score == pytest.approx(score)
    downwards = prompt(5, ("1", ""), ("2", "1"), ("3", "2"))  # parents first: both agree
    for published in (CORRECTED, PUBLISHED):
        assert judged(downwards, published, "23").score == 0
        assert judged(downwards, published, "123").score == 1
        # A question that is ruled out stays in the denominator.
        assert judged(prompt(5, ("1", ""), ("2", "1"), ("3", "")), published, "23").score == pytest.approx(1 / 3)


def test_the_first_row_is_passed_over() -> None:
    free = prompt(0, ("1", ""), ("2", ""), ("3", ""))
    assert [one.id for one in questions_of(free, PUBLISHED)] == ["2", "3"]
    assert judged(free, CORRECTED, "2").score == pytest.approx(1 / 3)
    assert judged(free, PUBLISHED, "2").score == 1 / 2 and not judged(free, PUBLISHED, "2").dropped
    assert [one.id for one in questions_of(replace(free, meta={}), PUBLISHED)] == ["1", "2", "3"]  # of another suite
    # Only the last unbroken run of rows is asked.
    scattered = prompt(4, ("1", ""), ("2", ""), ("3", ""), last_block=6)
    assert [one.id for one in questions_of(scattered, PUBLISHED)] == ["3"]
    assert [one.id for one in questions_of(scattered, CORRECTED)] == ["1", "2", "3"]
    assert judged(scattered, PUBLISHED, "3").score == 1


def test_what_depends_on_the_first_row_fails_and_takes_its_prompt_along() -> None:
    held = prompt(0, ("1", ""), ("2", "1"), ("3", ""))
    found = judged(held, PUBLISHED, "123", "123")
    assert "question 1, which another depends on, is not asked" in found.dropped
    assert judged(held, CORRECTED, "123", "23").score == pytest.approx((1 + 1 / 3) / 2)
    # The look-up ends at the first parent that is a no, and then it does not fail.
    two = prompt(0, ("1", ""), ("2", ""), ("3", "21"))
    assert not judged(two, PUBLISHED, "3").dropped and judged(two, PUBLISHED, "3").score == 0
    assert judged(two, PUBLISHED, "23").dropped
    assert judged(prompt(0, ("1", "")), PUBLISHED, "1").dropped == "none of its prompt's questions is asked"
    one = prompt(5, ("1", ""), ("2", ""))
    images, errors = ("12", "12", "12", "12"), ("", "no picture", "", "")
    assert judged(one, PUBLISHED, *images, errors=errors).dropped == "no picture"
    assert judged(one, CORRECTED, *images, errors=errors).score == 3 / 4
    assert judged(one, PUBLISHED).dropped == "it has no images" and judged(one, CORRECTED).score == 0


# The table of a whole run: what is answered yes, by prompt and image.
YES = {0: ["12", "12", "12", "12"], 1: ["123", "123", "123", "23"], 2: ["1", "12", "1", "1"]}
SUITE = Suite(
    "dpg", "DPG-Bench",
    (
        prompt(0, ("1", ""), ("2", "1"), name="a"),
        prompt(2, ("1", ""), ("2", "1"), ("3", "1"), name="b"),
        prompt(5, ("1", ""), ("2", "1"), name="c"),
    ),
    measures=("dpg",),
)  # fmt: skip


def answer(asked: Asked) -> tuple[str, str]:
    """From the picture's one colour: the number of its prompt and its own."""
    with Image.open(io.BytesIO(asked.image)) as picture:
        red, green, _ = np.asarray(picture.convert("RGB"), dtype=float).mean((0, 1))
    number = asked.prompt[asked.prompt.index(": is ") + 5]
    return ("yes" if number in YES[round(red / 60)][round(green / 60)] else "no"), "stop"


@pytest.fixture
def server(server: ChatServer) -> ChatServer:
    server.answer = answer
    return server


@pytest.fixture
def images(tmp_path: Path) -> list[Drawn]:
    made = []
    for row, one in enumerate(SUITE.prompts):
        for number in range(4):
            name = one.id if not number else f"{one.id}_{number}"
            Image.new("RGB", (32, 32), (60 * row, 60 * number, 0)).save(tmp_path / f"{name}.png")
            made.append(Drawn(name, one.id, tmp_path / f"{name}.png"))
    names = ["p_10", "p", "p_2", "p_1"]  # which are counted, not spelled
    assert [one.name for one in sorted([Drawn(n, "p", Path("x")) for n in names], key=turn_of)] == ["p", "p_1", "p_2", "p_10"]
    return made


def cells(result: ScoreResult, table: int = 0) -> dict[str, float]:
    return {row[0]: round(row[1].mean, 6) for row in result.tables[table].rows}


def run(score: DpgPublished | DpgCorrected | Checklist, images: list[Drawn], folder: Path, suite: Suite = SUITE) -> ScoreResult:
    work = folder / "scores" / score.name
    score.prepare(suite, images, work, Alone())
    return score.result(suite, images, work)


def test_both_procedures_over_a_suite(server: ChatServer, images: list[Drawn], tmp_path: Path) -> None:
    published = run(DpgPublished(options_for(server)), images, tmp_path)
    # a: its first question is passed over, so it fails. b: 1, 1, 1, 0 (2 and 3 without 1). c: 1/2, 1, 1/2, 1/2.
    assert published.overall["dpg"].mean == pytest.approx((3 / 4 + 5 / 8) / 2)
    assert published.overall["dpg"].prompts == 2
    # Of the last images, as answered: b says 2 and 3 but not 1, c says 1.
    assert cells(published) == {"entity": 0.5, "attribute": round(2 / 3, 6)}
    assert cells(published, 1) == {"entity - whole": 0.5, "attribute - color": round(2 / 3, 6)}
    assert [one.values for one in published.images[:4]] == [{}] * 4 and "not asked" in published.images[0].error
    assert [one.values["dpg"] for one in published.images[4:]] == [1, 1, 1, 0, 0.5, 1, 0.5, 0.5]
    assert [q["counted"] for q in published.images[7].detail["questions"]] == [True, False, False]
    said = " ".join(published.warnings)
    assert "1 of 3 prompts are left out of the mean" in said and "over 1,065 prompts; these are over 3" in said
    assert "take 4 images" not in said and "mPLUG" in published.warnings[0]
    assert published.title == "DPG-Bench, procedure as published, with tiny-vlm for mPLUG"
    assert published.measures[0].worst is None

    count = len(server.asked)
    assert count == 4 + 12 + 8  # the first row is not asked
    corrected = run(DpgCorrected(options_for(server)), images, tmp_path)
    assert len(server.asked) == count + 4  # only what was not asked before
    assert corrected.overall["dpg_corrected"].mean == pytest.approx((1 + 3 / 4 + 5 / 8) / 3)
    # All images, after the rule: entities 4 + 3 + 4 of 12; attributes 4 + 6 + 1 of 4 + 8 + 4.
    assert cells(corrected) == {"entity": round(11 / 12, 6), "attribute": round(11 / 16, 6)}
    assert not any("left out" in one for one in corrected.warnings)
    assert run(Checklist(options_for(server)), images, tmp_path).images[7].values["checklist"] == 0
    assert len(server.asked) == count + 4


def test_categories_come_from_the_tuples_as_published(server: ChatServer, images: list[Drawn], tmp_path: Path) -> None:
    def renamed(one: SuitePrompt) -> SuitePrompt:
        return replace(one, questions=tuple(replace(q, about="atribute - color(x)") for q in one.questions))

    suite = replace(SUITE, prompts=tuple(map(renamed, SUITE.prompts)))
    for kind, names in ((DpgPublished, {"atribute"}), (DpgCorrected, {"entity", "attribute"})):
        assert set(cells(run(kind(options_for(server)), images, tmp_path, suite))) == names


def test_a_missing_picture_and_fewer_than_four(server: ChatServer, images: list[Drawn], tmp_path: Path) -> None:
    images[5].file.unlink()
    published = run(DpgPublished(options_for(server)), images, tmp_path)
    assert published.overall["dpg"].mean == pytest.approx(5 / 8)
    assert "2 of 3 prompts are left out" in published.warnings[1]
    corrected = run(DpgCorrected(options_for(server)), images, tmp_path)
    assert corrected.overall["dpg_corrected"].mean == pytest.approx((1 + 2 / 4 + 5 / 8) / 3)
    assert corrected.images[5].values == {"dpg_corrected": 0} and "cannot be read" in corrected.images[5].error
    published = run(DpgPublished(options_for(server)), images[::4], tmp_path)
    assert "take 4 images for each prompt; here 1 are taken" in " ".join(published.warnings)
    assert published.overall["dpg"].mean == pytest.approx(0.75)


def test_a_circle_is_refused_where_it_matters(server: ChatServer, images: list[Drawn], tmp_path: Path) -> None:
    suite = replace(SUITE, prompts=(prompt(5, ("1", "2"), ("2", "1"), name="a"),))
    user_error("circle", run, DpgCorrected(options_for(server)), images[:4], tmp_path, suite)
    assert run(DpgPublished(options_for(server)), images[:4], tmp_path, suite).overall["dpg"].mean == 1
