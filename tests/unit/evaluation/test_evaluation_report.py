"""Reports of evaluations: their numbers, in the JSON, the Markdown and the page."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import user_error
from report_fixtures import FID, SHARE, Page, evaluation, suite, written

from paradiffusion.evaluation.estimates import Estimate, difference, mean
from paradiffusion.evaluation.records import Evaluation, ImageScore, ScoreResult, Table
from paradiffusion.evaluation.votes.vote_report import read_results, write_results
from paradiffusion.evaluation.votes.vote_results import Answers, Rates, Reliability, Results, Strengths
from paradiffusion.evaluation.votes.vote_study import Question


def test_numbers_of_one_evaluation(tmp_path: Path) -> None:
    of = suite()
    made = evaluation(tmp_path / "images", of)
    page, text, record = written(tmp_path / "out", made)
    rights = [(i % 4) / 4 for i in range(12)]
    whole = mean(rights, [p.id for p in of.prompts])
    long = mean(rights[1::2], [p.id for p in of.prompts[1::2]])

    (found,) = record["suites"]
    assert record["schema"] == 1 and record["title"] == "stage 1 on The fruit suite" and record["votes"] is None
    assert (found["name"], found["prompts"], found["fingerprint"]) == ("fruit", 12, of.fingerprint)
    assert found["bands"] == {"up to 25": 6, "26-77": 6} and found["categories"] == {"still life": 6, "people": 6}
    assert found["models"][0] == {
        "label": "stage 1", "kind": "checkpoint", "source": {"checkpoint": "runs/nano", "step": 60},
        "images_per_prompt": 1, "images": 12, "not_drawn": 0,
    }  # fmt: skip
    (score,) = found["scores"]
    (measure,) = score["measures"]
    assert (score["formula"], score["source"], measure["unit"]) == ("rights over things", "our own", "share")
    assert measure["all"]["values"]["stage 1"] == vars(whole), "not rounded"
    assert measure["bands"]["26-77"]["values"]["stage 1"] == vars(long)
    assert list(measure["bands"]) == ["up to 25", "26-77"] and set(measure["categories"]) == {"still life", "people"}

    shown = Page(page).text
    for where in (shown, text):
        assert f"{100 * whole.mean:.1f} %" in where and f"{100 * whole.low:.1f} to {100 * whole.high:.1f}" in where
        assert f"{100 * long.mean:.1f} %" in where and "26-77" in where and "n 12" in where
        assert all(word in where for word in ("rights over things", "our own", "runs/nano", "step: 60", "made up"))
    assert page.count("<svg") == 2, "against length, and by category"


def test_the_curve_over_lengths_marks_where_a_checkpoint_cuts(tmp_path: Path) -> None:
    of = suite()
    lengths = [replace(p, category=f"{words} words") for p, words in zip(of.prompts, [200, 50, 400] * 4, strict=True)]
    of = replace(of, prompts=tuple(lengths))
    made = [evaluation(tmp_path / "images", of, label) for label in ("whole", "short")]
    made[1].source["cut_prompts"] = {"400 words": 3}
    page = written(tmp_path / "out", *made)[0]
    assert "by length, ringed where prompts were cut" in page and f"{SHARE.title}, by category" not in page
    said = next(text for text in re.findall(r'aria-label="([^"]*)"', page) if "ringed" in text)
    whole, short = said.split("; ")
    assert "(cut)" not in whole and short.count("(cut)") == 1 and "(cut)" in short.partition("400 words")[2]
    assert whole.index("50 words") < whole.index("200 words") < whole.index("400 words")
    del made[1].source["cut_prompts"]
    other = written(tmp_path / "other", *made)[0]
    assert "ringed" not in other and page.count("<use") == other.count("<use") + 1


def test_models_are_compared_by_paired_differences(tmp_path: Path) -> None:
    of = suite(count=40)
    rng = np.random.default_rng(0)
    hard = rng.uniform(0, 0.6, 40)  # what a prompt costs every model: two intervals side by side overlap widely
    models = {"a": hard, "b": hard + 0.1 + rng.normal(0, 0.02, 40), "c": hard + 0.1 + rng.normal(0, 0.02, 40)}
    made = [evaluation(tmp_path / "images", of, label, list(map(float, v))) for label, v in models.items()]
    page, text, record = written(tmp_path / "out", *made)
    row = record["suites"][0]["scores"][0]["measures"][0]["all"]
    ids = [p.id for p in of.prompts]
    assert row["differences"] == {other: vars(difference(list(models["a"]), ids, list(models[other]), ids)) for other in ("b", "c")}
    assert row["values"]["a"]["high"] > row["values"]["b"]["low"] and row["differences"]["b"]["low"] > 0.08
    assert row["best"] is None, "b and c differ by chance alone"
    row = written(tmp_path / "out", *made[:2])[2]["suites"][0]["scores"][0]["measures"][0]
    assert row["all"]["best"] == "b" and row["bands"]["26-77"]["best"] == "b"
    assert record["suites"][0]["baseline"] == "a"
    other = written(tmp_path / "out", *made, baseline="c")[2]["suites"][0]
    assert other["baseline"] == "c" and set(other["scores"][0]["measures"][0]["all"]["differences"]) == {"a", "b"}
    assert "Δ +10." in Page(page).text and "Δ +10." in text


def test_best_is_the_lowest_where_lower_is_better_and_rests_on_enough_prompts(tmp_path: Path) -> None:
    # An interval of few prompts that are alike has no width, and says nothing.
    for count, best in ((8, "a"), (3, None)):
        of = suite(count=count)
        made = [evaluation(tmp_path / "images", of, x, [v] * count) for x, v in (("a", 0.2), ("b", 0.4))]
        for one in made:
            one.scores[0].measures = [replace(SHARE, higher_is_better=False)]
        found = written(tmp_path / "out", *made)[2]["suites"][0]["scores"][0]["measures"][0]["all"]
        assert found["best"] == best


def test_what_is_unlike_is_not_compared(tmp_path: Path) -> None:
    made = [evaluation(tmp_path / "images", suite(), label, [v] * 12) for label, v in (("a", 0.1), ("b", 0.9))]
    made[1].scores[0].settings = {"judge": "another"}
    page, _, record = written(tmp_path / "out", *made)
    score = record["suites"][0]["scores"][0]
    assert score["unlike"] == ["judge"] and score["measures"][0]["all"]["differences"] == {"b": None}
    assert score["measures"][0]["all"]["best"] is None
    assert "scored with different settings (judge)" in Page(page).text
    # Nor are other prompts under one name.
    made = [evaluation(tmp_path / str(n), suite(count=n), f"m{n}") for n in (12, 8)]
    found = written(tmp_path / "out", *made)[2]["suites"]
    assert [[m["label"] for m in s["models"]] for s in found] == [["m12"], ["m8"]]


def test_numbers_of_the_whole_set(pair: list[Evaluation], tmp_path: Path) -> None:
    for one, value in zip(pair, (31.25, 28.5), strict=True):
        overall = {"fid": Estimate(value, value - 2, value + 2, 12, 12)}
        warnings = ["Fewer than 2,000 images."]
        one.scores.append(ScoreResult("fid", "FID", measures=[FID], overall=overall, warnings=warnings))
        # An overall number with a formula of its own beside images whose plain mean is another one.
        one.scores[0].overall = {"right": Estimate(value / 100, 0.2, 0.4, 12, 12)}
    page, text, record = written(tmp_path / "out", *pair)
    truth, fid = record["suites"][0]["scores"]
    assert truth["measures"][0]["all"]["values"]["a"]["mean"] == 0.3125
    assert truth["measures"][0]["all"]["differences"] == {"b": None}, "that of the images would be 0"
    assert fid["measures"][0]["all"]["values"]["b"]["mean"] == 28.5 and fid["measures"][0]["bands"] == {}
    for where in (Page(page).text, text):
        assert "31.25" in where and "lower is better" in where and where.count("Fewer than 2,000 images.") == 1


def test_rows_of_a_markdown_table_have_as_many_cells_as_its_head(tmp_path: Path) -> None:
    made = [evaluation(tmp_path / "images", suite(), label) for label in ("a|b", "c\\|d")]
    first = written(tmp_path / "out", *made)
    blocks = [block.splitlines() for block in first[1].split("\n\n") if block.startswith("|")]
    assert len(blocks) == 3
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in block}) == 1
    assert written(tmp_path / "two", *made) == first, "the same evaluations give the same bytes"


def test_failures_stay_in_the_mean_and_are_listed(tmp_path: Path) -> None:
    made = evaluation(tmp_path / "images", suite(), rights=[1.0] * 12)
    made.images[3] = replace(made.images[3], error="the model refuses 4096 x 4096 pixels")
    for number, reason in ((3, "no picture"), (5, "the server did not answer")):
        made.scores[0].images[number] = ImageScore(f"p{number:03d}", f"p{number:03d}", {"right": 0.0}, error=reason)
    page, text, record = written(tmp_path / "out", made)
    found = record["suites"][0]
    assert found["scores"][0]["measures"][0]["all"]["values"]["stage 1"]["mean"] == pytest.approx(10 / 12)
    assert found["models"][0]["not_drawn"] == 1
    assert [(f["image"], f["failed_at"], f["reason"]) for f in found["failures"]] == [
        ("p003", "drawing", "the model refuses 4096 x 4096 pixels"),
        ("p005", "Truth score", "the server did not answer"),
    ]
    for where in (Page(page).text, text):
        assert "the server did not answer" in where and "the model refuses 4096 x 4096 pixels" in where
    assert "2 failures" in page


def test_skipped_scores_say_why(pair: list[Evaluation], tmp_path: Path) -> None:
    reason = "no clip= was given; name a model."
    for one in pair:
        one.scores.append(ScoreResult("clip", "CLIP alignment", skipped=reason))
    pair[0].scores.append(ScoreResult("seen", "Seen by a", skipped="only there."))
    page, text, record = written(tmp_path / "out", *pair)
    for where in (Page(page).text, text.replace("\\", "")):
        assert where.count(reason) == 1 and "Seen by a (a)" in where and "only there." in where
    assert [r["skipped"] for r in record["suites"][0]["scores"][1]["results"]] == [reason] * 2
    page, _, record = written(tmp_path / "out", replace(pair[0], scores=[]))
    assert "No score was computed." in page and record["suites"][0]["scores"] == [] and page.count("<img") == 12


def test_what_is_no_number_is_null_and_no_key_is_shown(tmp_path: Path) -> None:
    made = evaluation(tmp_path / "images", suite(count=2), rights=[0.5, math.nan])
    made.source["settings"] = {"api_key": "sk-secret", "steps": 30}
    made.scores[0].settings["endpoint_token"] = "sk-secret"
    rows = [["x", math.nan], ["y", Estimate(math.inf, math.nan, math.nan, 1, 1)], ["z", None]]
    made.scores[0].tables = [Table("T", ["a", "b"], rows)]
    page, text, record = written(tmp_path / "out", made)
    assert "sk-secret" not in page + text + json.dumps(record)
    score = record["suites"][0]["scores"][0]
    assert score["measures"][0]["all"]["values"]["stage 1"]["n"] == 1
    assert [row[1] and row[1]["mean"] for row in score["results"][0]["tables"][0]["rows"]] == [None] * 3


def test_own_tables_of_models_stand_together(pair: list[Evaluation], tmp_path: Path) -> None:
    for one in pair:
        rows = [[place, mean([0.2, 0.8], ["x", "y"]), 1234] for place in ("first", "second")]
        table = Table("Recall by position", ["sentence", "followed", "n"], rows, "A note.", plot="lines")
        one.scores[0].tables = [table]
    page, text, _ = written(tmp_path / "out", *pair)
    assert text.count("#### Recall by position") == 1 and text.count("| first | 50.0 %") == 2 and "1,234" in text
    assert 'aria-label="Recall by position. a: first 50.0 %' in page and text.count("A note.") == 1
    pair[1].scores[0].tables[0].note = "Another."
    assert "a: A note. b: Another." in written(tmp_path / "out", *pair)[1]


def test_votes_are_shown(tmp_path: Path) -> None:
    share, strength = (Estimate(mean, mean - 0.1, mean + 0.1, 60, 12) for mean in (0.5, 0.3))
    rate = Rates("ours", "sdxl", share, share, share, share)
    question = Question("faithfulness", "Which shows more of the text?")
    strengths = Strengths({"sdxl": replace(strength, mean=-0.3), "ours": strength}, share, [])
    answers = Answers(question, [rate], {}, {"26-77": [rate]}, strengths, Reliability(None, share, None, None), 60, 0, ["few raters"])
    results = Results("votes", "Which?", "fruit", 12, 12, 2, "separately", ["ours", "sdxl"], [], [answers], [])
    write_results(results, tmp_path)
    assert read_results(tmp_path / "results.json") == results
    made = evaluation(tmp_path / "images", suite())
    page, text, record = written(tmp_path / "out", made, votes=read_results(tmp_path / "results.json"))
    for where in (Page(page).text, text):
        assert all(word in where for word in ("ours against sdxl", "50.0 %", "40.0 to 60.0", "faithfulness", "few raters"))
    assert record["votes"]["answers"][0]["rates"][0]["win"]["mean"] == 0.5
    assert text.index("| ours | 0.30") < text.index("| sdxl | −0.30"), "the strongest first"
    none = replace(results, answers=[replace(answers, votes=0)])
    assert "No votes yet" in written(tmp_path / "out", made, votes=none)[0]


def test_votes_are_read_from_what_the_vote_command_wrote(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    user_error(r"results\.json cannot be read", read_results, path)
    for wrong in ("{", "[]", '{"schema": 1}'):
        path.write_text(wrong)
        user_error(r"results\.json", read_results, path)
    for answers in ({"rates": 3, "strengths": []}, 7):
        path.write_text(json.dumps({"paradiffusion_votes": 1, "answers": [answers]}))
        user_error("is damaged", read_results, path)


@pytest.fixture
def pair(tmp_path: Path) -> list[Evaluation]:
    """The same evaluation of two models, a and b."""
    return [evaluation(tmp_path / "images", suite(), label) for label in ("a", "b")]
