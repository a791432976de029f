"""The checklist score: the dependency rule, the reading of answers, and pictures whose right answers are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_server import Asked, ChatServer
from commands import user_error
from judged_scenes import Alone
from PIL import Image
from vlm_scoring import draw_scenes, look, options_for

from paradiffusion.errors import UserError
from paradiffusion.evaluation.records import Drawn, ScoreResult
from paradiffusion.evaluation.scores.checklist import Answered, Checklist, verdict, with_rule
from paradiffusion.evaluation.suites.suite import ChecklistQuestion, Suite, SuitePrompt
from paradiffusion.metrics.vlm import VlmOptions


@pytest.fixture
def server(server: ChatServer) -> ChatServer:
    server.answer = look
    return server


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
        (tree(a="", b="", c="ab", d="b", e=""), "a", "abde"),  # several roots
    ],
)
def test_what_depends_on_a_no_does_not_count(questions: SuitePrompt, no: str, counted: str) -> None:
    image = Drawn("p", "p", Path("p.png"))
    answers = [Answered(image, question, "", "no" if question.id in no else "yes") for question in questions.questions]
    assert "".join(sorted(one.question.id for one in with_rule(questions, answers) if one.counted)) == counted


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        (tree(a="", b="x"), r"checklist of trees, question b depends on x, which is not there"),
        (tree(a="c", b="a", c="b"), r"checklist of trees, .* circle \((a -> c -> b -> a|b -> a -> c -> b|c -> b -> a -> c)\)"),
    ],
)  # fmt: skip
def test_a_wrong_checklist_is_refused_before_a_question(questions: SuitePrompt, message: str, tmp_path: Path) -> None:
    score = Checklist(VlmOptions(engine="endpoint", endpoint="http://127.0.0.1:9/v1", served="nobody"))
    with pytest.raises(UserError, match=message):
        asked(score, Suite("s", "S", (questions,)), [Drawn("a", questions.id, tmp_path / "a.png")], tmp_path)


@pytest.mark.parametrize(
    ("expected", "texts"),
    [
        ("yes", ["yes", " **Yes**, there is a dog.", "YES!", "Answer: yes", "True", "<think>Is it? No. maybe no.</think>\n\nYes",
                 "It has four legs and barks. Answer: Yes.", "Yes, no other colour is there"]),
        ("no", ["The answer is no.", "No, it is blue", '"No"', "False.", "I see a cat.\nNo", "Final answer: **No**"]),
        ("unclear", ["<think>I begin to think and yes", "yes/no", "Yes and no.", "No idea.", "not sure", "", "Nothing", "yesterday",
                     "It is a dog", "No way to tell", "42", "是"]),
    ],
)  # fmt: skip
def test_answers_are_read(expected: str, texts: list[str]) -> None:
    assert {text: verdict(text) for text in texts} == dict.fromkeys(texts, expected)


def asked(score: Checklist, suite: Suite, images: list[Drawn], folder: Path, run: Alone | None = None) -> ScoreResult:
    """What the score comes to, once what it has to ask is asked."""
    work = folder / "scores" / "checklist"
    score.prepare(suite, images, work, run or Alone())
    return score.result(suite, images, work)


def rows(result: ScoreResult) -> dict[str, list[Any]]:
    return {row[0]: row for row in result.tables[0].rows}


def test_a_right_picture_gets_all_and_a_planted_fault_costs_what_it_should(server: ChatServer, tmp_path: Path) -> None:
    results, count = {}, 6
    for fault in ("", "recoloured", "removed"):
        suite, images = draw_scenes(tmp_path / f"images{fault}", count, fault)
        results[fault] = asked(Checklist(options_for(server)), suite, images, tmp_path / f"scores{fault}")
    objects = [len(prompt.questions) // 2 for prompt in suite.prompts]
    assert means(results[""]) == [1.0] * count and not results[""].warnings
    assert means(results["recoloured"]) == pytest.approx([1 - 1 / (2 * n) for n in objects])
    assert means(results["removed"]) == pytest.approx([1 - 2 / (2 * n) for n in objects])
    removed = rows(results["removed"])
    assert removed["attribute"][4] == 0 and removed["entity"][1].mean < 1  # a no that does not count was no yes to lose
    # The mean over questions weighs an image by its questions.
    one = results["recoloured"].images[0]
    assert one.weights["checklist_by_question"] == 2 * objects[0] and one.prompt == suite.prompts[0].id
    wrong = [question for question in one.detail["questions"] if not question["yes"]]
    assert [(q["id"], q["category"], q["counted"], q["answer"]) for q in wrong] == [("c0", "attribute", True, "no, it has another colour")]
    table = rows(results["recoloured"])
    assert table["entity"][1].mean == 1 and table["entity"][2] == sum(objects)
    found = table["attribute"][1]
    assert found.mean == pytest.approx(1 - count / sum(objects)) and found.low < found.mean < found.high
    assert (found.n, found.prompts) == (sum(objects), count)
    assert table["all"][2] == 2 * sum(objects) and table["all"][3:] == [0, 0]
    assert results[""].settings["answered_by"] == {"model": "tiny-vlm", "revision": "served"}


def test_the_rule_takes_a_yes_away(server: ChatServer, tmp_path: Path) -> None:
    """A judge that sees colours everywhere: without their objects they do not count."""
    server.answer = lambda asked: look(asked) if "said to be" in asked.prompt else ("yes", "stop")
    suite, images = draw_scenes(tmp_path / "images", 6, "removed")
    result = asked(Checklist(options_for(server)), suite, images, tmp_path)
    objects = [len(prompt.questions) // 2 for prompt in suite.prompts]
    assert means(result) == pytest.approx([1 - 2 / (2 * n) for n in objects])
    assert means(result, "checklist_without_rule") == pytest.approx([1 - 1 / (2 * n) for n in objects])
    assert rows(result)["attribute"][4] == pytest.approx(6 / sum(objects)) and rows(result)["entity"][4] == 0
    lost = [q for score in result.images for q in score.detail["questions"] if q["yes"] and not q["counted"]]
    assert [question["id"] for question in lost] == ["c0"] * 6


def test_failures_count_as_0_and_are_listed_and_unclear_answers_as_no(server: ChatServer, tmp_path: Path) -> None:
    suite, images = draw_scenes(tmp_path / "images", 6)
    images[0].file.write_bytes(b"no picture")
    images[1].file.unlink()
    images[2] = Drawn(images[2].name, images[2].prompt, images[2].file, error="the prompt is too long for this model")
    suite = Suite(suite.name, suite.title, (*suite.prompts, SuitePrompt("plain", "no questions")))
    Image.new("RGB", (96, 48)).save(images[4].file)
    server.answer = lambda asked: ("perhaps", "stop") if asked.size() == (96, 48) else look(asked)
    # The server refuses the first question, about a picture that is fine.
    server.faults = {0: (400, b'{"error": {"message": "unsafe picture"}}', 0)}
    images = [images[5], *images[:5], Drawn("plain", "plain", images[5].file)]
    score = Checklist(options_for(server))
    result = asked(score, suite, images, tmp_path)
    assert [one.prompt for one in result.images] == ["scene5", "scene0", "scene1", "scene2", "scene3", "scene4"]
    assert [one.error for one in result.images] == [
        "status 400: unsafe picture", "00000.png cannot be read: does not decode: UnidentifiedImageError",
        "the picture cannot be read (No such file or directory)", "the prompt is too long for this model", "", "",
    ]  # fmt: skip
    assert means(result) == [0, 0, 0, 0, 1, 0]
    assert all(one.values == dict.fromkeys(result.images[0].values, 0.0) for one in result.images[:4])
    assert "4 of 6 images failed" in result.warnings[1] and "neither yes nor no" in result.warnings[0]
    questions = [len(prompt.questions) for prompt in suite.prompts]
    assert result.images[1].weights["checklist_by_question"] == questions[0]
    whole = rows(result)["all"]
    assert whole[1].mean == pytest.approx(questions[3] / sum(questions)) and whole[2] == sum(questions)
    assert whole[3] == pytest.approx(questions[4] / sum(questions))
    # What was refused is kept: nothing is asked again, but about a picture that has been replaced, be it by a good one.
    before = len(server.asked)
    asked(Checklist(options_for(server)), suite, images, tmp_path)
    assert len(server.asked) == before
    draw_scenes(tmp_path / "images", 1)
    assert means(asked(score, suite, images, tmp_path))[1] == 1 and len(server.asked) == before + questions[0]
    draw_scenes(tmp_path / "images", 1, "recoloured")
    assert means(asked(score, suite, images, tmp_path))[1] < 1


def test_a_model_that_takes_no_picture_at_all_is_no_set_of_failures(server: ChatServer, tmp_path: Path) -> None:
    suite, images = draw_scenes(tmp_path / "images", 2)
    server.faults = {number: (400, b'{"error": {"message": "no vision"}}', 0) for number in range(200)}
    score = Checklist(options_for(server))
    with pytest.raises(UserError, match=r"tiny-vlm refused the first \d+ questions \(status 400: no vision\)"):
        asked(score, suite, images, tmp_path)
    server.faults = {}  # nothing of it was held against the pictures
    assert means(asked(score, suite, images, tmp_path)) == [1.0] * 2
    plain = Suite("plain", "Plain", (SuitePrompt("a", "a dog"),))
    count = len(server.asked)
    none = asked(score, plain, [Drawn("a", "a", tmp_path / "a.png")], tmp_path / "plain")
    assert "plain has no questions" in none.skipped and len(server.asked) == count


@pytest.mark.parametrize("silence", [None, "", "<think>Is it red? Let me look", "I see a shape\n</think>\n\n", "<seed:think>A cut"])
def test_a_judge_that_only_thinks_is_no_judge_and_its_silence_no_answer(server: ChatServer, tmp_path: Path, silence: str | None) -> None:
    suite, images = draw_scenes(tmp_path / "images", 3)
    score = Checklist(options_for(server))
    server.answer = lambda asked: (silence, "length" if silence else "stop")
    with pytest.raises(UserError, match="tiny-vlm gave 5 answers without a word.*enable_thinking=false"):
        asked(score, suite, images, tmp_path)
    # To one question it is a failure of that picture, which is listed, and asked again once the server is repaired.
    silenced: list[tuple[bytes, str]] = []

    def mostly(asked: Asked) -> tuple[str | None, str]:
        if not silenced:
            silenced.append((asked.image, asked.prompt))
        return (silence, "stop") if (asked.image, asked.prompt) == silenced[0] else look(asked)

    server.answer = mostly
    result = asked(score, suite, images, tmp_path)
    assert sorted(means(result)) == [0, 1, 1] and "1 of 3 images failed" in " ".join(result.warnings)
    server.answer, before = look, len(server.asked)
    assert means(asked(score, suite, images, tmp_path)) == [1.0] * 3 and len(server.asked) == before + 1


def test_two_processes_share_the_questions_and_a_stop_loses_none(server: ChatServer, tmp_path: Path) -> None:
    suite, images = draw_scenes(tmp_path / "images", 8)
    score = Checklist(options_for(server, max_new_tokens=5))
    with pytest.raises(KeyboardInterrupt):
        asked(score, suite, images[::2], tmp_path, Alone(0, 2, stop_after=4))
    asked(score, suite, images[1::2], tmp_path, Alone(1, 2))
    asked(score, suite, images[::2], tmp_path, Alone(0, 2))
    questions = sum(len(prompt.questions) for prompt in suite.prompts)
    assert questions <= len(server.asked) <= questions + 3  # those under way at the stop are asked again
    assert server.asked[0].body["max_tokens"] == 5
    count = len(server.asked)
    (journal, *_) = tmp_path.glob("scores/vlm-answers-*/journal.rank0.jsonl")
    with journal.open("ab") as file:
        file.write(b'{"key": "torn')  # a machine that loses its power
    # Another number of processes finds all of it.
    alone = asked(Checklist(options_for(server, max_new_tokens=5)), suite, images, tmp_path)
    assert len(server.asked) == count and means(alone) == [1.0] * 8
    asked(Checklist(options_for(server, max_new_tokens=6)), suite, images[:1], tmp_path)  # other settings, other answers
    assert len(server.asked) == count + len(suite.prompts[0].questions)


def test_another_model_behind_the_address_does_not_mix_its_answers_in(server: ChatServer, tmp_path: Path) -> None:
    suite, images = draw_scenes(tmp_path / "images", 2)
    options = VlmOptions(engine="endpoint", endpoint=server.url)
    asked(Checklist(options), suite, images[:1], tmp_path)
    server.models = ["larger-vlm"]
    user_error(r"came from tiny-vlm .* now larger-vlm", asked, Checklist(options), suite, images, tmp_path)


def test_a_local_model_answers_in_batches(vlm: Path, tmp_path: Path) -> None:
    suite, images = draw_scenes(tmp_path / "images", 3)
    score = Checklist(VlmOptions(model=str(vlm), batch_size=4, device="cpu", max_new_tokens=3))
    settings = score.settings()
    assert settings["model"]["model"] == "tiny-qwen" and len(settings["model"]["revision"]) == 16
    assert settings == json.loads(json.dumps(settings))
    result = asked(score, suite, images, tmp_path)
    assert not any(one.error for one in result.images)
    assert result.settings["answered_by"]["revision"] == settings["model"]["revision"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "nowhere", "key": "vlm"}, r"vlm=nowhere is neither a folder"), ({"engine": "endpoint"}, "needs endpoint="),
        ({"engine": "endpoint", "endpoint": "localhost:8000"}, "is no address; expected one such as http://"),
        ({"engine": "endpoint", "endpoint": "http://x/v1", "api_key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY names an environment"),
        ({"served": "a"}, "are for engine=endpoint"), ({"engine": "ollama"}, "engine=ollama is unknown"),
        ({"batch_size": 0}, "batch_size=0 is out of range"),
    ],
)  # fmt: skip
def test_what_cannot_answer_is_told_before_anything_is_drawn(options: dict[str, Any], message: str) -> None:
    user_error(message, Checklist, VlmOptions(**options))
