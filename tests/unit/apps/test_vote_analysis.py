"""Votes: who sees what, how they are kept, and what they come to on cases whose answer is known."""

from __future__ import annotations

import csv
import json
import re
import sqlite3
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import user_error
from vote_studies import HOSTILE, SECRET, evaluation_of, study_of, suite_of, virtual_study, vote_for, votes_for, write_picture  # fmt: skip

from paradiffusion.errors import UserError
from paradiffusion.evaluation.scores.agreement import read_pairs
from paradiffusion.evaluation.suites.suite import Suite, SuitePrompt
from paradiffusion.evaluation.votes.vote_actions import VoteOptions, about, open_study, run_action
from paradiffusion.evaluation.votes.vote_report import summary, write_csv, write_results
from paradiffusion.evaluation.votes.vote_results import alpha_of, fit_davidson, outcomes, rates_of, results_of, strengths_of
from paradiffusion.evaluation.votes.vote_store import Refusal, Store, Vote
from paradiffusion.evaluation.votes.vote_study import all_pairs, assign, read_study, spread

# --- who sees what


@pytest.mark.parametrize(("sets", "raters", "repeats"), [(2, 2, 1), (4, 5, 3), (3, 3, 1)])
def test_pairs_are_shared_out_evenly_and_a_function_of_the_seed(sets: int, raters: int, repeats: int) -> None:
    names, people = [f"s{n}" for n in range(sets)], [f"r{n}" for n in range(raters)]
    pairs = all_pairs([f"p{n}" for n in range(60)], names, 1)
    tasks = assign(pairs, people, repeats, rounds=2, retest=4, seed=1)
    for number in range(len(pairs)):
        seen = [r for r, own in tasks.items() for t in own if (t.pair, t.occasion, t.round) == (number, 0, 0)]
        assert len(seen) == len(set(seen)) == repeats
    counts = [sum(not t.occasion and not t.round for t in own) for own in tasks.values()]
    assert max(counts) - min(counts) <= repeats
    for own in tasks.values():
        first = [t for t in own if t.occasion == 0 and t.round == 0]
        groups = Counter((pairs[t.pair].set_a, pairs[t.pair].set_b) for t in first)
        assert max(groups.values()) - min(groups.values()) <= 2 * repeats  # from every two sets alike
        flipped = Counter((pairs[t.pair].set_a, pairs[t.pair].set_b) for t in first if t.flipped)
        assert all(abs(2 * flipped[group] - count) <= 1 for group, count in groups.items())  # half on each side
        assert [t.round for t in own] == sorted(t.round for t in own)
        assert [t.pair for t in first] != sorted(t.pair for t in first)
        assert sum(t.occasion for t in own) == 2 * 4 and len({t.key for t in own}) == len(own)
        second = {t.pair: t.flipped for t in own if t.round == 1 and t.occasion == 0}
        assert {t.pair: t.flipped for t in first} != second and set(second) == {t.pair for t in first}
    assert tasks == assign(pairs, people, repeats, 2, 4, 1) != assign(pairs, people, repeats, 2, 4, 2)
    few = spread(pairs, 7 * sets, seed=3)  # fewer pairs are drawn from every two sets alike
    alike = Counter((pair.set_a, pair.set_b) for pair in few).values()
    assert len(few) == 7 * sets and max(alike) - min(alike) <= 1 and few == [pair for pair in pairs if pair in few]


def options_for(root: Path, *names: str, **values: object) -> VoteOptions:
    sets = json.dumps({name: str(root / name) for name in names})
    options = VoteOptions(action="serve", study=str(root / "votes"), sets=sets, raters="[anna, ben]")
    options = replace(options, **values)
    options.check()
    return options


def test_a_study_is_fixed_when_it_begins_and_read_again_as_it_was(tmp_path: Path) -> None:
    made = study_of(tmp_path, missing={"street-01": "the model refused it"}, retest=1)
    assert made.failures() == [(f"{SECRET}-0", "street-01", 0, "the model refused it")]
    again = read_study(tmp_path / "votes")
    assert again == replace(made, folder=again.folder) and again.fingerprint == made.fingerprint
    assert str(tmp_path) not in json.dumps([row["root"] for row in json.loads(
        (tmp_path / "votes/study.json").read_text())["sets"]])  # the two folders can be moved together  # fmt: skip
    same = VoteOptions(action="serve", study=str(tmp_path / "votes"), given=["action", "study"])
    assert open_study(same).fingerprint == made.fingerprint
    other = VoteOptions(action="serve", study=str(tmp_path / "votes"), raters="[anna, carl]", seed=5, given=["raters", "seed"])
    user_error("began with another raters=.*leave raters= and seed= out", open_study, other)
    (tmp_path / "votes/study.json").write_text('{"paradiffusion_study": 1, "sets": 3}')
    user_error("is damaged", read_study, tmp_path / "votes")
    (tmp_path / "votes/study.json").unlink()
    (tmp_path / "votes/votes.sqlite").write_bytes(b"")
    user_error("holds votes and no study", open_study, options_for(tmp_path, f"{SECRET}-0", f"{SECRET}-1"))


def test_folders_of_pictures_are_matched_and_what_is_missing_or_broken_or_leads_out_is_known(tmp_path: Path) -> None:
    suite = suite_of(4)
    evaluation_of(tmp_path / "one", suite)
    for name in ("street-00", "00001", "street-02", "stranger"):
        write_picture(tmp_path / "two" / f"{name}.png", 7)
    (tmp_path / "two/street-02.png").write_bytes(b"\x89PNG no picture")
    write_picture(tmp_path / "elsewhere/street-03.png", 9)
    (tmp_path / "two/street-03.png").symlink_to(tmp_path / "elsewhere/street-03.png")
    study = open_study(options_for(tmp_path, "one", "two"), suite)
    assert [(name, prompt) for name, prompt, _, _ in study.failures()] == [("two", "street-02"), ("two", "street-03")]
    assert "outside" in study.failures()[1][3]
    assert study.settled(study.pairs[0]) is None and study.settled(study.pairs[2]) == "a"


def test_sets_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    suite = suite_of(3)
    reworded = (replace(suite.prompts[0], text="new"), *suite.prompts[1:])
    for name, own in (("one", suite), ("nano", suite), ("other", Suite("lanes", "Lanes", suite.prompts)),
                      ("reworded", Suite(suite.name, "", reworded)), ("fewer", Suite(suite.name, "", suite.prompts[:2]))):  # fmt: skip
        evaluation_of(tmp_path / name, own)
    evaluation_of(tmp_path / "none", suite, {prompt.id: "out of memory" for prompt in suite.prompts})
    for name in ("empty", "elsewhere"):
        (tmp_path / name).mkdir()
    for first, second, title, message in (
        ("one", "other", "", "the set other was drawn for the suite lanes, and not for streets"),
        ("one", "reworded", "", "the prompt street-00 has another text in the set reworded"),
        ("one", "none", "", r"the set none has no picture .*\(out of memory\)"),
        ("one", "absent", "", "the set absent is no folder"),
        ("one", "empty", "", r"the set empty .* holds no picture"),
        ("empty", "elsewhere", "", "suite= is missing"),
        ("one", "nano", "Is Nano better?", "the set's name nano stands in"),
    ):
        user_error(message, open_study, options_for(tmp_path, first, second, **({"title": title} if title else {})))
    assert not (tmp_path / "votes").exists()
    # An evaluation with count=: what both have is compared.
    assert len(open_study(options_for(tmp_path, "one", "fewer")).prompts) == 2


# --- what is kept


def test_a_vote_is_written_once_and_may_be_changed_until_the_rater_goes_on(tmp_path: Path) -> None:
    study = study_of(tmp_path, 2)
    store = Store(study)
    task = study.tasks["anna"][0].key
    for choice, stamp, seconds in (("left", 10, 2.0), ("left", 10, 9.0), ("tie", 12, 3.0), ("left", 11, 4.0)):
        store.put(Vote("anna", task, "faithfulness", choice, stamp, seconds))  # the last was sent before the third
    (kept,) = store.votes()
    assert (kept.choice, kept.stamp, kept.seconds) == ("tie", 12, 3.0)
    store.comment("anna", task, "hard")
    store.finish("anna", task)
    store.finish("anna", task)
    for write in (lambda: store.put(replace(kept, choice="left", stamp=99)), lambda: store.comment("anna", task, "no")):
        with pytest.raises(Refusal, match="gone on"):
            write()
    store.put(replace(kept, rater="ben"))  # whose task of this name is another's
    store.reopen("ben")  # nothing to go back to
    assert store.finished("anna") == {task}
    store.reopen("anna")
    store.put(replace(kept, choice="right", stamp=99))
    assert [v.choice for v in store.votes("anna")] == ["right"] and store.comments() == {("anna", task): "hard"}
    with pytest.raises(sqlite3.Error):
        store.put(replace(kept, choice="both"))  # and nothing is left half done
    store.put(replace(kept, rater="ben", choice="left", stamp=99))
    assert store._base.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL: a power cut loses nothing either
    store.close()
    assert sqlite3.connect(store.path).execute("PRAGMA journal_mode").fetchone() == ("wal",)
    user_error("votes of another study", Store, replace(study, pairs=study.pairs[:1]))
    (study.folder / "votes.sqlite").write_bytes(b"no database at all, but long enough to be looked at" * 40)
    user_error("cannot be used", Store, study)


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_many_writers_lose_nothing(tmp_path: Path) -> None:
    study = study_of(tmp_path, 2)
    stores = [Store(study), Store(study)]  # as two servers, or a server and action=results

    def write(number: int) -> None:
        for task in range(15):
            stores[number % 2].put(Vote(f"r{number}", str(task), "q", "left", task, 1.0))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stores[0].votes()) == 90 == len({(v.rater, v.task) for v in stores[1].votes()})
    for store in stores:
        store.close()


# --- what they come to


def test_davidson_fits_known_tables() -> None:
    # Two sets: strengths differ by log(wins/losses), and ties are v sqrt(p1 p2): closed form, apart from the weak prior.
    strengths, tie = fit_davidson(np.array([[[6000.0, 2000.0, 1000.0]]]), [(0, 1)], 2)
    assert strengths[0, 0] - strengths[0, 1] == pytest.approx(np.log(3), abs=1e-3)
    assert tie[0] == pytest.approx(np.log(1000 / np.sqrt(6000 * 2000)), abs=1e-3)
    # Three sets in exact proportion to known strengths, without ties: Bradley and Terry's own case.
    known, pairs = np.array([0.7, -0.1, -0.6]), [(0, 1), (0, 2), (1, 2)]
    chance = [1 / (1 + np.exp(known[j] - known[i])) for i, j in pairs]
    exact = np.array([[[1e6 * p, 1e6 * (1 - p), 0] for p in chance]])
    assert np.allclose(fit_davidson(exact, pairs, 3)[0][0], known, atol=2e-3)
    # A set that won everything: finite, and many tables at once are as each alone.
    tables = np.random.default_rng(0).integers(0, 9, (5, 3, 3)).astype(float)
    tables[0] = [[30, 0, 0], [30, 0, 0], [5, 5, 0]]
    together = fit_davidson(tables, pairs, 3)[0]
    assert np.allclose(together, np.concatenate([fit_davidson(t[None], pairs, 3)[0] for t in tables]), atol=1e-6)
    assert np.isfinite(together).all() and together[0, 0] > 2 and np.allclose(together.sum(1), 0)


def test_a_simulated_study_gives_its_strengths_back_and_intervals_hold_them() -> None:
    known = {"first": 0.8, "second": 0.0, "third": -0.8}
    rng = np.random.default_rng(5)
    held, rates_held, studies = Counter[str](), 0, 60
    # P(first beats second) of the model below, without what prompts add.
    odds = np.exp([0.4, -0.4, -0.7])
    for number in range(studies):
        study = virtual_study(60, list(known), raters=3, repeats=2, seed=number)
        found = outcomes(study, votes_for(study, known, -0.7, rng), {})
        strengths = strengths_of(found, list(known), number)
        assert strengths is not None and strengths.warnings == []
        for name, value in known.items():
            held[name] += strengths.sets[name].low <= value <= strengths.sets[name].high
        held["tie"] += strengths.tie.low <= -0.7 <= strengths.tie.high
        rate = rates_of(found, ["first", "second"], number)[0].win
        rates_held += rate.low <= odds[0] / odds.sum() <= rate.high
    # 95 % of 60 studies, within three standard errors of that count (1.7).
    for count in (*held.values(), rates_held):
        assert count >= 52, (held, rates_held)
    assert sum(held.values()) < 4 * studies  # and not since they hold everything


def test_what_strengths_cannot_say_is_said() -> None:
    study = virtual_study(8, ["a", "b", "c"], raters=1)

    def strengths(answer: dict[tuple[str, str], str]) -> list[str]:
        votes = []
        for task in study.tasks["rater 0"]:
            pair = study.pairs[task.pair]
            if (pair.set_a, pair.set_b) in answer:
                votes.append(vote_for(task, "rater 0", answer[pair.set_a, pair.set_b]))
        found = strengths_of(outcomes(study, votes, {}), list(study.sets))
        assert found is not None and all(np.isfinite(one.mean) for one in found.sets.values())
        return found.warnings

    assert "strengths say nothing across" in strengths({("a", "b"): "tie"})[0]
    assert "never lost" in strengths({("a", "b"): "a", ("a", "c"): "a", ("b", "c"): "tie"})[0]
    assert strengths({("a", "b"): "a", ("a", "c"): "b", ("b", "c"): "a"}) == []
    assert strengths_of([], ["a", "b"]) is None


def test_krippendorffs_alpha_on_his_own_example() -> None:
    # Four observers, twelve units, five values: nominal alpha 0.743 (Krippendorff, Computing alpha-reliability, 2011).
    rows = ["123321412...", "123322412 5.3", ".33323422 51.", "123324412 51."]
    rows = [row.replace(" ", "") for row in rows]
    given = [(unit, int(c) - 1) for row in rows for unit, c in enumerate(row) if c != "."]
    found = alpha_of([u for u, _ in given], [v for _, v in given], [str(u) for u, _ in given], 5)
    assert found is not None and found.mean == pytest.approx(0.743, abs=5e-4) and found.n == 40  # one unit has one value
    assert found.low < 0.743 < found.high <= 1
    assert alpha_of([0, 0, 1, 1], [0, 0, 1, 1], ["p", "p", "q", "q"], 3).mean == 1  # type: ignore[union-attr]
    assert alpha_of([0, 1], [0, 1], ["p", "q"], 3) is None and alpha_of([0, 0], [1, 1], ["p", "p"], 3) is None


def test_a_missing_picture_loses_and_two_tie_once_raters_have_come_past_them(tmp_path: Path) -> None:
    suite = suite_of(5)
    evaluation_of(tmp_path / "one", suite, {"street-01": "x", "street-02": "x"})
    evaluation_of(tmp_path / "two", suite, {"street-02": "x", "street-03": "x"})
    study = open_study(options_for(tmp_path, "one", "two", ask="together"))
    asked = [question.name for question in study.questions]
    assert outcomes(study, [], {}) == []  # nobody has come past anything
    assert "5 pairs; 2 screens for each of 2 raters" in about(study)[0], "as a rater's page counts them"
    votes = []
    for rater, tasks in study.tasks.items():
        for task in [t for t in tasks if study.settled(study.pairs[t.pair]) is None]:
            votes += [vote_for(task, rater, "a", name) for name in asked]
            found = [one for one in outcomes(study, votes, {}) if one.missing and one.rater == rater]
            place = [t.pair for t in tasks].index(task.pair)
            before = [t for t in tasks[:place] if study.settled(study.pairs[t.pair]) is not None]
            last = len(votes) % (2 * len(asked)) == 0
            assert len(found) == len(asked) * (3 if last else len(before))
    results = results_of(study, votes, {})
    rates = results.answers[0].rates[0]
    assert (rates.win.n, results.answers[0].votes, results.answers[0].missing) == (10, 4, 6)
    assert (rates.win.mean, rates.tie.mean, rates.loss.mean) == (0.6, 0.2, 0.2)
    assert rates.margin.mean == pytest.approx(0.4)
    assert [rater.done for rater in results.raters] == [rater.total for rater in results.raters] == [2, 2]


def test_agreement_reads_of_the_csv_what_people_said_and_nothing_else(tmp_path: Path) -> None:
    study = study_of(tmp_path, 4, missing={"street-01": "gone"}, retest=1)
    votes = [
        vote_for(task, rater, "b")
        for rater, tasks in study.tasks.items()
        for task in tasks
        if task.round == 0 and study.settled(study.pairs[task.pair]) is None
    ]
    write_csv(study, votes, {}, tmp_path / "votes.csv")
    pairs = read_pairs(tmp_path / "votes.csv")
    assert Counter((one.prompt, one.rater, one.a, one.b, one.ties) for one in pairs) == {
        (f"street-{number:02d}", rater, 0, 1, 0): 1 for number in (0, 2, 3) for rater in ("anna", "ben")
    }


def test_sides_and_second_looks_are_told_apart_from_preference() -> None:
    study = virtual_study(40, ["a", "b"], raters=2, repeats=2)
    left = [Vote(rater, task.key, "faithfulness", "left", 1, 1.0) for rater, own in study.tasks.items() for task in own]
    answers = results_of(study, left, {}).answers[0]
    assert answers.reliability.left is not None and answers.reliability.left.mean == 1
    assert answers.rates[0].win.mean == pytest.approx(0.5, abs=0.02)  # sides are balanced
    assert "leaned to the left" in " ".join(answers.warnings)
    always = [vote_for(task, rater, "a") for rater, own in study.tasks.items() for task in own]
    fair = results_of(study, always, {}).answers[0].reliability
    assert fair.left is not None and fair.left.mean == 0.5 and fair.same is not None and fair.same.mean == 1
    assert fair.alpha is None and fair.again is None
    again = virtual_study(40, ["a", "b"], raters=1)
    again = replace(again, tasks=assign(again.pairs, ["r"], 1, 1, 10, 0))
    votes = [vote_for(t, "r", "b" if t.occasion and t.pair % 2 else "a") for t in again.tasks["r"]]
    told = results_of(again, votes, {}).answers[0]
    second = [t.pair for t in again.tasks["r"] if t.occasion]
    assert told.reliability.again is not None and told.reliability.again.n == 10
    assert told.reliability.again.mean == pytest.approx(sum(pair % 2 == 0 for pair in second) / 10)
    assert told.rates[0].win.mean == 1 and told.rates[0].win.n == 40  # a second look counts for nothing else


def test_reports_and_the_csv_say_the_same_and_escape_what_people_wrote(tmp_path: Path) -> None:
    names = ["<b>one</b>", "two | three"]
    study = replace(virtual_study(12, names, raters=2, repeats=2), folder=tmp_path / "a | study")
    votes = votes_for(study, {names[0]: 1, names[1]: 0}, -1, np.random.default_rng(1))
    comments = {(votes[0].rater, votes[0].task): "=1+1 " + HOSTILE}
    results = results_of(study, votes, comments)
    page = write_results(results, tmp_path / "out").read_text()
    assert "<b>one</b>" not in page and "&lt;b&gt;one" in page and "<script" not in page and "window.hit" in page
    win = json.loads((tmp_path / "out/results.json").read_text())["answers"][0]["rates"][0]["win"]
    counted = Counter(one.choice for one in outcomes(study, votes, {}))
    assert win["mean"] == counted["a"] / 24 and win["n"] == 24 and win["prompts"] == 12
    text = (tmp_path / "out/results.md").read_text()
    assert f"{100 * win['mean']:.1f} % ({100 * win['low']:.1f} to {100 * win['high']:.1f})" in text
    assert "two \\| three" in text and f"faithfulness: {names[0]} {100 * win['mean']:.1f} %" in summary(results)[1]
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    for table in tables:
        assert len({row.replace("\\|", "").count("|") for row in table.splitlines() if row.startswith("|")}) == 1

    assert write_csv(study, votes, comments, tmp_path / "votes.csv") == 24
    rows = read_rows(tmp_path / "votes.csv")
    assert list(rows[0])[:12] == [
        "study", "rater", "prompt", "category", "band", "set_a", "set_b", "left", "question", "choice", "seconds", "at",
    ]  # fmt: skip
    assert Counter(row["choice"] for row in rows) == counted and {row["left"] for row in rows} == set(names)
    assert rows[0]["comment"] == "'=1+1 " + HOSTILE
    comments = {(votes[0].rater, votes[0].task): "a lamp\r=1+1 ![x](http://example.org/x.png)"}
    write_csv(study, votes, comments, tmp_path / "votes.csv")
    rows = read_rows(tmp_path / "votes.csv")
    assert len(rows) == 24 and rows[0]["comment"].startswith("a lamp\n=1+1 ")  # no row of the rater's own making
    write_results(results_of(study, votes, comments), tmp_path / "out")
    assert not re.search(r"(?<!\\)\]\(", (tmp_path / "out/results.md").read_text())
    empty = write_results(results_of(study, [], {}), tmp_path / "none").read_text()
    assert "No votes yet." in empty and "Not finished: 0 of 24" in empty


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"action": None}, "action= is missing"), ({"action": "count"}, "action=count is unknown"),
        ({"study": None}, "study= is missing"), ({"action": "results", "given": ["host"]}, "host= belongs to action=serve"),
        ({"ask": "both"}, "ask=both"), ({"repeats": 0}, "repeats=0"),
        ({"retest": -1}, "retest=-1"), ({"questions": "[beauty]"}, "questions=beauty is unknown"),
        ({"questions": "{"}, "questions={ is not understood"), ({"questions": "[5"}, "is not understood"),
        ({"questions": "[[a]]"}, "is not understood"), ({"questions": "{f: one, f: two}"}, "f stands twice"),
        ({"hosts": "[2024-99-99]"}, "month must be in"), ({"questions": "[" * 3000}, "nested too deeply"),
        ({"without_text": "[appeel]", "given": ["without_text"]}, "without_text=appeel is unknown"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_in_a_sentence(values: dict[str, object], message: str) -> None:
    options = replace(VoteOptions(action="serve", study="votes"), **values)
    with pytest.raises(UserError) as caught:
        options.check()
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("sets", "raters", "message"),
    [
        (None, "[a]", "sets= is missing"), ("{one: x}", "[a]", "sets={one: x} is not understood"), ("[x, y]", "[a]", "sets=["),
        ("{a: x, b: y}", None, "raters= is missing"), ("{a: x, b: y}", "[anna, anna]", "raters=[anna, anna] is not understood"),
        ("{a: x, b: y, a: z}", "[a]", "a stands twice"),
        ("{a: x, b: y}", '["\\t"]', "raters=["), ("{a: x, b: y}", "{r: s}", "is not understood"),
    ],
)  # fmt: skip
def test_a_study_without_sets_or_raters_is_refused(sets: str | None, raters: str | None, message: str, tmp_path: Path) -> None:
    options = VoteOptions(action="serve", study=str(tmp_path / "votes"), sets=sets, raters=raters)
    with pytest.raises(UserError) as caught:
        open_study(options, Suite("s", "s", (SuitePrompt("p", "text"),)))
    assert message in str(caught.value) and not (tmp_path / "votes").exists()


def test_what_cannot_be_written_is_said_in_a_sentence(tmp_path: Path) -> None:
    study = study_of(tmp_path, 2)
    (tmp_path / "file").write_text("")
    for options in (
        VoteOptions(action="export", study=str(study.folder), output=str(tmp_path)),
        VoteOptions(action="results", study=str(study.folder), output=str(tmp_path / "file")),
        options_for(tmp_path, f"{SECRET}-0", f"{SECRET}-1", study=str(tmp_path / "file")),
    ):
        user_error("cannot be used", run_action, options)
    assert (tmp_path / "file").read_text() == "" and not list(tmp_path.parent.glob(".*.part"))


def test_questions_and_rounds_can_be_chosen(tmp_path: Path) -> None:
    study = study_of(tmp_path, 2, questions="{count: Which has the right number of things?}", repeats=1)
    assert [q.name for q in study.questions] == ["count"] and study.questions[0].shows_text
    assert sum(map(len, study.tasks.values())) == 2
    two = VoteOptions(questions="{one: Which, of these, is it?, two: 'And, that?'}").asked()
    assert [(q.name, q.text) for q in two] == [("one", "Which, of these, is it?"), ("two", "And, that?")]
    with pytest.raises(UserError, match="repeats=3 needs as many raters"):
        open_study(replace(options_for(tmp_path, f"{SECRET}-0", f"{SECRET}-1", repeats=3), study=str(tmp_path / "new")))
