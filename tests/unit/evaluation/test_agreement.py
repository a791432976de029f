"""Agreement of scores with people: scorers and voters whose agreement is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import user_error

from paradiffusion.evaluation.estimates import Estimate
from paradiffusion.evaluation.records import Drawn, Evaluation, ImageScore, Measure, ScoreResult, Table
from paradiffusion.evaluation.scores.agreement import HumanPair, agreement, read_pairs
from paradiffusion.evaluation.suites.suite import Suite, SuitePrompt

COUNT = 40
PROMPTS = tuple(SuitePrompt(f"p{number}", f"a picture of thing {number}") for number in range(COUNT))
SUITE = Suite("things", "Things", PROMPTS)
# How good each picture is, which people see and a perfect scorer too.
QUALITY = np.random.default_rng(0).normal(size=(2, COUNT))
NOISE = np.random.default_rng(1).normal(size=(2, COUNT))
SCORERS = {"perfect": QUALITY, "inverted": -QUALITY, "random": NOISE, "constant": np.zeros((2, COUNT))}


def evaluation(number: int, label: str, failed: set[int] | None = None, lower: bool = False) -> Evaluation:
    """One set's scores, in which the pictures ``failed`` count as the worst."""
    failed = failed or set()
    scores = []
    for name, values in SCORERS.items():
        measure = Measure(name, name.title(), higher_is_better=not lower, worst=99.0 if lower else -99.0)
        images = [
            ImageScore(p.id, p.id, {name: measure.worst if i in failed else (-1 if lower else 1) * values[number, i]})  # type: ignore[dict-item]
            for i, p in enumerate(PROMPTS)
        ]
        scores.append(ScoreResult(name, name.title(), measures=[measure], images=images))
    scores.append(ScoreResult("fid", "FID", measures=[Measure("fid", "FID", worst=None)], overall={}))
    images = [Drawn(p.id, p.id, Path(f"{p.id}.png")) for p in PROMPTS]
    return Evaluation(label, "images", {}, SUITE, 1, images, scores)


def vote(number: int, question: str = "faithfulness", rater: str = "anna", turned: bool = False) -> HumanPair:
    """What a rater says who sees the quality."""
    a_wins = QUALITY[0, number] > QUALITY[1, number]
    if turned:
        return HumanPair(f"p{number}", "theirs", "ours", int(not a_wins), int(a_wins), 0, question, rater)
    return HumanPair(f"p{number}", "ours", "theirs", int(a_wins), int(not a_wins), 0, question, rater)


def rows(table: Table) -> dict[str, Estimate]:
    return {row[0]: row[1] for row in table.rows}


@pytest.mark.parametrize("lower", [False, True])
def test_known_scorers_agree_as_they_must(lower: bool) -> None:
    sets = [evaluation(0, "Ours", lower=lower), evaluation(1, "theirs", lower=lower)]
    result = agreement(sets, [vote(number, turned=number % 3 == 0) for number in range(COUNT)])
    (shares,) = map(rows, result.tables)
    assert not result.warnings and not result.skipped
    assert (shares["Perfect"].mean, shares["Perfect"].low) == (1, 1)
    assert shares["Inverted"].mean == 0
    assert shares["Random"].low < 0.5 < shares["Random"].high
    assert shares["Constant"].mean == 0.5
    assert next(iter(shares)) == "Perfect" and list(shares)[-1] == "Inverted", "the best is first"
    assert "FID" not in shares, "a number of the whole set prefers no picture"
    assert result.tables[0].rows[0][2:] == [COUNT, 0] and result.tables[0].rows[-1][2] == COUNT
    assert next(row for row in result.tables[0].rows if row[0] == "Constant")[3] == COUNT
    # A failed picture loses its pairs.
    wins = [number for number in range(COUNT) if QUALITY[0, number] > QUALITY[1, number]]
    shares = rows(agreement(two_sets(failed=set(wins[:3])), [vote(number) for number in range(COUNT)]).tables[0])
    assert shares["Perfect"].mean == pytest.approx(1 - 3 / COUNT) and shares["Perfect"].n == COUNT


def test_questions_are_apart_and_ties_of_people_are_undecided() -> None:
    ties = [HumanPair(f"p{number}", "ours", "theirs", 0, 0, 1, "appeal", "anna") for number in range(10)]
    pairs = [*[vote(number) for number in range(20)], *ties, vote(20, "appeal"), vote(21, "appeal")]
    first, second = agreement(two_sets(), pairs).tables
    assert first.title.endswith("faithfulness") and second.title.endswith("appeal")
    assert rows(first)["Perfect"].n == 20 and rows(second)["Perfect"].n == 2
    assert "12 pairs, 10 of them undecided" in second.note
    # Counts are votes, and mostly ties is a tie.
    counted = [HumanPair(f"p{n}", "ours", "theirs", *votes) for n, votes in enumerate([(3, 1, 4), (2, 2, 0), (3, 1, 5)])]
    table = agreement(two_sets(), counted).tables[0]
    assert rows(table)["Perfect"].n == 1 and "3 pairs, 2 of them undecided" in table.note


def test_the_majority_decides_and_the_others_are_the_ceiling() -> None:
    sets, pairs = two_sets(), []
    for number in range(COUNT):
        right = vote(number, rater="anna")
        wrong = HumanPair(right.prompt, "ours", "theirs", right.b, right.a, 0, right.question, "carl")
        pairs += [right, vote(number, rater="ben", turned=True), wrong]
    shares = rows(agreement(sets, pairs).tables[0])
    assert shares["Perfect"].mean == 1 and shares["Perfect"].n == COUNT
    # anna's others are ben and carl, who tie; carl's are two against him: only his votes have a majority of others.
    assert (shares["another person"].mean, shares["another person"].n) == (0, COUNT)
    four = agreement(sets, [*pairs, *[vote(number, rater="dora") for number in range(COUNT)]])
    assert rows(four.tables[0])["another person"].mean == pytest.approx(3 / 4)


def test_votes_on_other_pictures_are_counted_or_refused() -> None:
    sets = two_sets()
    foreign = [HumanPair("p1", "ours", "sdxl", 1, 0, 0), HumanPair("nothing", "ours", "theirs", 1, 0, 0)]
    second = HumanPair("p2", "ours", "theirs", 1, 0, 0, number=1)
    assert "3 of 4 rows" in agreement(sets, [vote(0), *foreign, second]).warnings[0]
    none = agreement(sets, foreign)
    assert "sdxl" in none.skipped and "theirs" in none.skipped and not none.tables
    by_text = agreement(sets, [HumanPair(PROMPTS[3].text, "ours", "theirs", 1, 0, 0)])
    assert rows(by_text.tables[0])["Perfect"].n == 1


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_layouts(tmp_path: Path) -> None:
    exported = written(
        tmp_path / "votes.csv",
        "study,rater,prompt,category,band,set_a,set_b,left,question,choice,seconds,at,image,occasion\n"
        "first,anna,p1,,,ours,theirs,b,appeal,a,2.5,now,0,0\nfirst,anna,p1,,,ours,theirs,b,appeal,b,2.5,now,0,1\n"
        'first,ben,"p2",,,ours,theirs,,appeal,tie,,,1,0\n',
    )
    one, two = read_pairs(exported)
    assert (one.a, one.b, one.ties, one.rater, one.question, one.number) == (1, 0, 0, "anna", "appeal", 0)
    assert (two.ties, two.number) == (1, 1)
    lines = [
        {"prompt": "a long text", "set_a": "ours", "set_b": "theirs", "image": 1, "choice": "b"},
        {"prompt": "p1", "set_a": "ours", "set_b": "theirs", "votes_a": 3, "votes_b": 1, "ties": 2},
        {"prompt": "p1", "set_a": "ours", "set_b": "theirs", "votes_a": 0, "votes_b": 0},
        {"prompt": "p1", "ranks": {"x": 1, "y": 2, "z": 2}, "rater": "dora"},
    ]
    found = read_pairs(written(tmp_path / "pairs.jsonl", "\n".join(json.dumps(line) for line in lines) + "\n\n"))
    assert (found[0].set_a, found[0].number, found[0].b) == ("ours", 1, 1)
    assert (found[1].a, found[1].b, found[1].ties) == (3, 1, 2)
    ranked = {(pair.set_a, pair.set_b): (pair.a, pair.b, pair.ties) for pair in found[2:]}
    assert ranked == {("x", "y"): (1, 0, 0), ("x", "z"): (1, 0, 0), ("y", "z"): (0, 0, 1)}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("votes.txt", "", "is no table"),
        ("votes.csv", "", "holds no pairs"),
        ("votes.csv", "prompt,set_a,set_b,choice\n", "holds no pairs"),
        ("votes.csv", "prompt,set_a,set_b\np1,a,b\n", r"line 2: choice is missing"),
        ("votes.csv", "prompt,set_a,set_b,choice\np1,ours,theirs,left\n", r"line 2: the choice is left"),
        ("votes.csv", "prompt,set_a,set_b,choice\np1,ours,ours,a\n", "both sides are ours"),
        ("votes.csv", "prompt,image_a,image_b,choice\np1,1.png,2.png,a\n", "set_a is missing"),
        ("votes.jsonl", "{broken\n", "line 1 .*no JSON object"),
        ("votes.jsonl", '{"prompt": "p", "set_a": "x", "set_b": "y", "votes_a": -1, "votes_b": 2}\n', "-1 votes"),
        ("votes.jsonl", '{"prompt": "p", "ranks": {"x": NaN, "y": 1}}\n', "line 1: a rank is no number"),
    ],
)
def test_a_wrong_file_is_refused_by_its_line(tmp_path: Path, name: str, text: str, said: str) -> None:
    user_error(said, read_pairs, written(tmp_path / name, text))


def two_sets(**changes: Any) -> list[Evaluation]:
    return [evaluation(0, "ours", **changes), evaluation(1, "theirs")]
