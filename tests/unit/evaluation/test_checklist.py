"""The checklist score: the dependency rule, the reading of answers, and pictures whose right answers are known."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer, chat_server
from commands import ROOT, wait_for
from PIL import Image
from tiny_vlm import write_vlm
from vlm_scoring import LoneRun, draw_scenes, look, options_for

from paradiffusion.errors import UserError
from paradiffusion.evaluation.records import Drawn, ScoreResult
from paradiffusion.evaluation.scores.checklist import Checklist
from paradiffusion.evaluation.scores.dependencies import apply_rule, parents_first
from paradiffusion.evaluation.scores.yes_no import verdict
from paradiffusion.evaluation.suites.suite import ChecklistQuestion, Suite, SuitePrompt
from paradiffusion.judges.choose import VlmOptions


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with chat_server() as running:
        running.answer = look
        yield running


def tree(**parents: str) -> SuitePrompt:
    """A prompt whose questions depend on each other: ``tree(a="", b="a")``."""
    questions = (ChecklistQuestion(name, f"Is {name} there?", parents=tuple(above)) for name, above in parents.items())
    return SuitePrompt("trees", "trees", questions=tuple(questions))


def means(result: ScoreResult, measure: str = "checklist") -> list[float]:
    return [score.values[measure] for score in result.images]


@pytest.mark.parametrize(
    ("questions", "no", "counted"),
    [
        (tree(a="", b="a", c="b", d="c"), "", "abcd"),
        (tree(a="", b="a", c="b", d="c"), "b", "ab"),  # what depends on a question that does not count does not count
        (tree(d="c", c="b", b="a", a=""), "a", "a"),  # whatever their order
        (tree(a="", b="a", c="a", d="bc"), "c", "abc"),  # a diamond: one of two parents is enough
        (tree(a="", b="a", c="a", d="bc"), "a", "a"),
        (tree(a="", b="", c="ab", d="b", e=""), "a", "abde"),  # several roots
        (tree(a="", b="", c="ab", d="b", e=""), "e", "abcde"),
        (tree(a=""), "a", "a"),
    ],
)
def test_what_depends_on_a_no_does_not_count(questions: SuitePrompt, no: str, counted: str) -> None:
    yes = {question.id: question.id not in no for question in questions.questions}
    found = apply_rule(parents_first(questions), yes)
    assert "".join(sorted(name for name, counts in found.items() if counts)) == counted


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        (tree(a="", b="x"), r"checklist of trees, question b depends on x, which is not there"),
        (tree(a="c", b="a", c="b"), r"checklist of trees, .* circle \((a -> c -> b -> a|b -> a -> c -> b|c -> b -> a -> c)\)"),
        (tree(a="a"), r"circle \(a -> a\)"),
        (SuitePrompt("p", "p", questions=(ChecklistQuestion("1", "x"), ChecklistQuestion("1", "y"))), "two questions 1"),
    ],
)  # fmt: skip
def test_a_wrong_checklist_is_refused_before_a_question(questions: SuitePrompt, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        parents_first(questions)
    score = Checklist(VlmOptions(engine="endpoint", endpoint="http://127.0.0.1:9/v1", served="nobody"))
    with pytest.raises(UserError, match=message):
        score.prepare(
            Suite("s", "S", (questions,)), [Drawn("a", questions.id, tmp_path / "a.png")], tmp_path, LoneRun()
        )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("yes", "yes"), ("Yes.", "yes"), (" **Yes**, there is a dog.", "yes"), ("YES!", "yes"), ("Answer: yes", "yes"),
        ("The answer is no.", "no"), ("no", "no"), ("No, it is blue", "no"), ('"No"', "no"), ("True", "yes"), ("False.", "no"),
        ("<think>Is it? No. Yes, maybe no.</think>\n\nYes", "yes"), ("<think>I begin to think and yes", "unclear"),
        ("It has four legs and barks. Answer: Yes.", "yes"), ("I see a cat.\nNo", "no"), ("yes/no", "unclear"),
        ("Yes and no.", "unclear"), ("No idea.", "unclear"), ("not sure", "unclear"), ("", "unclear"), ("maybe", "unclear"),
        ("Nothing", "unclear"), ("yesterday", "unclear"), ("It is a dog", "unclear"), ("No way to tell", "unclear"),
        ("Final answer: **No**", "no"), ("Yes, no other colour is there", "yes"), ("42", "unclear"), ("是", "unclear"),
    ],
)  # fmt: skip
def test_answers_are_read(text: str, expected: str) -> None:
    assert verdict(text) == expected


def test_a_right_picture_gets_all_and_a_planted_fault_costs_what_it_should(server: ChatServer, tmp_path: Path) -> None:
    results, count = {}, 12
    for fault in ("", "recoloured", "removed"):
        suite, images = draw_scenes(tmp_path / f"images{fault}", count, fault)
        score = Checklist(options_for(server))
        score.prepare(suite, images, tmp_path / f"scores{fault}" / "checklist", LoneRun())
        results[fault] = score.result(suite, images, tmp_path / f"scores{fault}" / "checklist")
    objects = [len(prompt.questions) // 2 for prompt in suite.prompts]
    assert set(objects) == {1, 2, 3, 4}
    assert means(results[""]) == [1.0] * count and not results[""].warnings
    assert means(results["recoloured"]) == pytest.approx([1 - 1 / (2 * n) for n in objects])
    assert means(results["removed"]) == pytest.approx([1 - 2 / (2 * n) for n in objects])
    removed = {row[0]: row for row in results["removed"].tables[0].rows}
    assert removed["attribute"][4] == 0 and removed["entity"][1].mean < 1  # a no that does not count was no yes to lose
    # The mean over questions weighs an image by its questions.
    one = results["recoloured"].images[0]
    assert one.weights["checklist_by_question"] == 2 * objects[0] and one.prompt == suite.prompts[0].id
    wrong = [question for question in one.detail["questions"] if not question["yes"]]
    assert [(q["id"], q["category"], q["counted"], q["answer"]) for q in wrong] == [
        ("c0", "attribute", True, "no, it has another colour")
    ]
    table = {row[0]: row for row in results["recoloured"].tables[0].rows}
    assert table["entity"][1].mean == 1 and table["entity"][2] == sum(objects)
    assert table["attribute"][1].mean == pytest.approx(1 - count / sum(objects))
    assert table["attribute"][1].low < table["attribute"][1].mean < table["attribute"][1].high
    assert table["attribute"][1].n == sum(objects) and table["attribute"][1].prompts == count
    assert table["all"][2] == 2 * sum(objects) and table["all"][3:] == [0, 0]
    assert results[""].settings["answered_by"] == {"model": "tiny-vlm", "revision": "served"}


def test_the_rule_takes_a_yes_away(server: ChatServer, tmp_path: Path) -> None:
    """A judge that sees colours everywhere: without their objects they do not count."""
    server.answer = lambda asked: look(asked) if "said to be" in asked.prompt else ("yes", "stop")
    suite, images = draw_scenes(tmp_path / "images", 6, "removed")
    score = Checklist(options_for(server))
    score.prepare(suite, images, tmp_path / "scores" / "checklist", LoneRun())
    result = score.result(suite, images, tmp_path / "scores" / "checklist")
    objects = [len(prompt.questions) // 2 for prompt in suite.prompts]
    assert means(result) == pytest.approx([1 - 2 / (2 * n) for n in objects])
    assert means(result, "checklist_without_rule") == pytest.approx([1 - 1 / (2 * n) for n in objects])
    table = {row[0]: row for row in result.tables[0].rows}
    assert table["attribute"][4] == pytest.approx(6 / sum(objects)) and table["entity"][4] == 0
    lost = [q for score in result.images for q in score.detail["questions"] if q["yes"] and not q["counted"]]
    assert [question["id"] for question in lost] == ["c0"] * 6


def test_failures_count_as_0_and_are_listed_and_unclear_answers_as_no(server: ChatServer, tmp_path: Path) -> None:
    suite, images = draw_scenes(tmp_path / "images", 6)
    images[0].file.write_bytes(b"no picture")
    images[1].file.unlink()
    images[2] = Drawn(images[2].name, images[2].prompt, images[2].file, error="the prompt is too long for this model")
    suite = Suite(suite.name, suite.title, (*suite.prompts, SuitePrompt("plain", "no questions")))
    images.append(Drawn("plain", "plain", images[5].file))

    Image.new("RGB", (96, 48)).save(images[4].file)
    server.answer = lambda asked: ("perhaps", "stop") if asked.size() == (96, 48) else look(asked)
    # The server refuses the first question, about a picture that is fine.
    server.faults = {0: (400, b'{"error": {"message": "unsafe picture"}}', 0)}
    images = [images[5], *images[:5], images[6]]
    score, work = Checklist(options_for(server)), tmp_path / "scores" / "checklist"
    score.prepare(suite, images, work, LoneRun())
    result = score.result(suite, images, work)
    assert [one.prompt for one in result.images] == ["scene5", "scene0", "scene1", "scene2", "scene3", "scene4"]
    assert [one.error for one in result.images] == [
        "status 400: unsafe picture", "does not decode: UnidentifiedImageError",
        "the picture cannot be read (No such file or directory)", "the prompt is too long for this model", "", "",
    ]  # fmt: skip
    assert means(result) == [0, 0, 0, 0, 1, 0]
    assert all(one.values == dict.fromkeys(result.images[0].values, 0.0) for one in result.images[:4])
    assert result.images[1].weights["checklist_by_question"] == len(suite.prompts[0].questions)
    assert "4 of 6 images failed" in result.warnings[1] and "neither yes nor no" in result.warnings[0]
    table = {row[0]: row for row in result.tables[0].rows}
    questions = sum(len(prompt.questions) for prompt in suite.prompts)
    assert table["all"][1].mean == pytest.approx(len(suite.prompts[3].questions) / questions)
    assert table["all"][2] == questions and table["all"][3] == pytest.approx(
        len(suite.prompts[4].questions) / questions
    )
    # What was refused is kept: nothing is asked again, but about a picture that has been replaced.
    before = len(server.asked)
    Checklist(options_for(server)).prepare(suite, images, work, LoneRun())
    assert len(server.asked) == before
    draw_scenes(tmp_path / "images", 1)
    score.prepare(suite, images, work, LoneRun())
    assert len(server.asked) == before + len(suite.prompts[0].questions)
    assert means(score.result(suite, images, work))[1] == 1
    recoloured, _ = draw_scenes(tmp_path / "images", 1, "recoloured")  # a good picture in the place of a good one
    score.prepare(suite, images, work, LoneRun())
    assert means(score.result(suite, images, work))[1] < 1 and recoloured.prompts[0] == suite.prompts[0]


@pytest.mark.parametrize("pictures", [12, 2])
def test_a_model_that_takes_no_picture_at_all_is_no_set_of_failures(
    server: ChatServer, tmp_path: Path, pictures: int
) -> None:
    suite, images = draw_scenes(tmp_path / "images", pictures)
    server.faults = {number: (400, b'{"error": {"message": "no vision"}}', 0) for number in range(200)}
    score, work = Checklist(options_for(server)), tmp_path / "scores" / "checklist"
    with pytest.raises(UserError, match=r"tiny-vlm refused the first \d+ questions \(status 400: no vision\)"):
        score.prepare(suite, images, work, LoneRun())
    server.faults = {}
    score.prepare(suite, images, work, LoneRun())  # nothing of it was held against the pictures
    assert means(score.result(suite, images, work)) == [1.0] * pictures


def test_a_suite_without_checklists_has_no_such_score(server: ChatServer, tmp_path: Path) -> None:
    suite = Suite("plain", "Plain", (SuitePrompt("a", "a dog"),))
    score, images = Checklist(options_for(server)), [Drawn("a", "a", tmp_path / "a.png")]
    score.prepare(suite, images, tmp_path / "scores" / "checklist", LoneRun())
    assert "plain has no questions" in score.result(suite, images, tmp_path / "scores" / "checklist").skipped
    assert not server.asked


def test_two_processes_share_the_questions_and_a_stop_loses_none(server: ChatServer, tmp_path: Path) -> None:
    suite, images = draw_scenes(tmp_path / "images", 8)
    work = tmp_path / "scores" / "checklist"
    score = Checklist(options_for(server, max_new_tokens=5))
    with pytest.raises(InterruptedError):
        score.prepare(suite, images[::2], work, LoneRun(0, 2, checks_left=4))
    score.prepare(suite, images[1::2], work, LoneRun(1, 2))
    score.prepare(suite, images[::2], work, LoneRun(0, 2))
    questions = sum(len(prompt.questions) for prompt in suite.prompts)
    assert questions <= len(server.asked) <= questions + 3  # those under way at the stop are asked again
    assert server.asked[0].body["max_tokens"] == 5
    asked_so_far = len(server.asked)
    alone = Checklist(options_for(server, max_new_tokens=5))
    alone.prepare(suite, images, work, LoneRun())  # another number of processes finds all of it
    assert len(server.asked) == asked_so_far
    assert means(alone.result(suite, images, work)) == [1.0] * 8
    other = Checklist(options_for(server, max_new_tokens=6))  # other settings, other answers
    other.prepare(suite, images[:1], work, LoneRun())
    assert len(server.asked) == asked_so_far + len(suite.prompts[0].questions)


def test_another_model_behind_the_address_does_not_mix_its_answers_in(server: ChatServer, tmp_path: Path) -> None:
    suite, images = draw_scenes(tmp_path / "images", 2)
    options = VlmOptions(engine="endpoint", endpoint=server.url)
    Checklist(options).prepare(suite, images[:1], tmp_path / "scores" / "checklist", LoneRun())
    server.models = ["larger-vlm"]
    with pytest.raises(UserError, match=r"came from tiny-vlm .* now larger-vlm"):
        Checklist(options).prepare(suite, images, tmp_path / "scores" / "checklist", LoneRun())


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, "tests/support")
from vlm_scoring import LoneRun, draw_scenes
from paradiffusion.evaluation.scores.checklist import Checklist
from paradiffusion.judges.choose import VlmOptions
folder = Path(sys.argv[2])
suite, images = draw_scenes(folder / "images", 10)
options = VlmOptions(engine="endpoint", endpoint=sys.argv[1], concurrency=1)
Checklist(options).prepare(suite, images, folder / "scores" / "checklist", LoneRun())
"""


def test_a_killed_run_asks_nothing_twice(server: ChatServer, tmp_path: Path) -> None:
    server.answer = lambda asked: (time.sleep(0.05), look(asked))[1]  # type: ignore[func-returns-value]
    process = subprocess.Popen([sys.executable, "-c", KILLED, server.url, str(tmp_path)], cwd=ROOT, env={**os.environ})
    wait_for(lambda: len(server.asked) >= 8, interval=0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    (journal,) = tmp_path.glob("scores/vlm-answers-*/journal.rank0.jsonl")
    with journal.open("ab") as file:
        file.write(b'{"key": "torn')  # a machine that loses its power
    suite, images = draw_scenes(tmp_path / "images", 10)
    score = Checklist(VlmOptions(engine="endpoint", endpoint=server.url, concurrency=1))
    score.prepare(suite, images, tmp_path / "scores" / "checklist", LoneRun())
    questions = sum(len(prompt.questions) for prompt in suite.prompts)
    assert questions <= len(server.asked) <= questions + 1
    assert means(score.result(suite, images, tmp_path / "scores" / "checklist")) == [1.0] * 10
    assert all(json.loads(line) for line in journal.read_text().splitlines())


def test_a_local_model_answers_in_batches(tmp_path: Path) -> None:
    vlm = write_vlm(tmp_path / "tiny-qwen")
    suite, images = draw_scenes(tmp_path / "images", 3)
    score = Checklist(VlmOptions(model=str(vlm), batch_size=4, device="cpu", max_new_tokens=3))
    assert score.settings()["model"]["model"] == "tiny-qwen" and len(score.settings()["model"]["revision"]) == 16
    assert score.settings() == json.loads(json.dumps(score.settings()))
    score.prepare(suite, images, tmp_path / "scores" / "checklist", LoneRun())
    result = score.result(suite, images, tmp_path / "scores" / "checklist")
    assert not any(one.error for one in result.images)
    assert result.settings["answered_by"]["revision"] == score.settings()["model"]["revision"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "nowhere", "key": "vlm"}, r"vlm=nowhere is neither a folder"),
        ({"engine": "endpoint"}, "engine=endpoint needs endpoint="),
        ({"engine": "endpoint", "endpoint": "localhost:8000"}, "is no address; expected one such as http://"),
        (
            {"engine": "endpoint", "endpoint": "http://x/v1", "api_key_env": "NO_SUCH_KEY"},
            "NO_SUCH_KEY names an environment",
        ),
        ({"served": "a"}, "are for engine=endpoint"),
        ({"engine": "ollama"}, "engine=ollama is unknown"),
        ({"batch_size": 0}, "batch_size=0 is out of range"),
    ],
)
def test_what_cannot_answer_is_told_before_anything_is_drawn(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Checklist(VlmOptions(**options))
