"""The review page: decisions on disk, what the server refuses, and the page in a real browser, through crashes."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Program, Served, in_browser, listen, refuses_bodies, refuses_strangers, serves_no_files
from commands import user_error, wait_for
from tiny_clip import write_candidates

from paradiffusion.apps.review import MAX_TEXT, Review, open_review, review_app
from paradiffusion.curation.choosing.decisions import DecisionLog, read_decisions
from paradiffusion.curation.choosing.kept import export
from paradiffusion.curation.choosing.selection import Choosing, choose

LONG = "A red barn stands at the edge of a field. " * 7  # 70 words


def event(name: str, sample: str = "s", reviewer: str = "anna", at: int = 1, **changes: str | None) -> dict[str, Any]:
    return {"event": name, "sample": sample, "reviewer": reviewer, "at": at, "set": changes}


# --- the log


def test_the_log_survives_a_torn_line_and_writes_no_event_twice(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    log = DecisionLog(path)
    log.record(event("a", decision="keep"))
    log.record(event("b", at=2, caption="ein Bär \ud800"))
    log.record(event("a", decision="drop"))
    log.close()
    with path.open("ab") as file:
        file.write(b'{"event": "c", "sam')  # as a power cut leaves it
    log = DecisionLog(path)
    log.record(event("d", at=3, note="after"))
    log.record(event("b", at=2, caption="again"))
    log.close()
    standing = read_decisions(path)
    assert standing.of("s") == {"anna": {"decision": "keep", "caption": "ein Bär \ud800", "note": "after"}}
    assert standing.events == {"a", "b", "d"}
    assert path.read_bytes().count(b"\n") == 4


def test_the_last_decision_of_each_reviewer_counts_and_a_late_one_does_not(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path / "decisions.jsonl")
    user_error("open in another review", DecisionLog, tmp_path / "decisions.jsonl")
    log.record(event("1", at=100, decision="keep"))
    log.record(event("2", at=50, decision="drop"))  # waited in the queue of a closed tab
    log.record(event("3", at=60, reviewer="ben", decision="drop"))
    assert log.standing.of("s") == {"anna": {"decision": "keep"}, "ben": {"decision": "drop"}}
    assert log.conflicts("s", "anna", {"decision": "drop"}, base=0) == {"decision": "keep"}
    assert log.conflicts("s", "anna", {"decision": "drop"}, base=1) == {}
    # A clock that runs ahead does not make its decision the last for ever.
    log.record(event("4", at=1 << 52, decision="drop"))
    time.sleep(0.002)
    log.record(event("5", at=time.time_ns() // 1_000_000, decision="keep"))
    assert log.standing.of("s")["anna"] == {"decision": "keep"}
    assert len(logged(tmp_path)) == 5
    log.close()


@pytest.fixture
def served(review: Review) -> Iterator[Served]:
    served = Served(review_app(review), review.token)
    yield served
    served.close()
    review.log.close()


# --- the server


@pytest.fixture
def review(tmp_path: Path) -> Review:
    return open_review(write_candidates(tmp_path / "work", ["<script>alert(1)</script> in a caption", LONG, LONG]), "anna")


def body_of(review: Review, **changes: Any) -> dict[str, Any]:
    base = {"event": "e", "sample": review.candidates.all[0].sample, "reviewer": "anna", "at": 5, "base": 0}
    return {**base, "set": {"decision": "keep"}, **changes}


def test_the_server_shows_what_it_should(review: Review, served: Served, tmp_path: Path) -> None:
    status, page, headers = served.ask(f"/?token={review.token}", X_Token=None)
    assert status == 200 and b"<title>work: review</title>" in page and review.token.encode() not in page
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and headers["X-Content-Type-Options"] == "nosniff"
    status, image, headers = served.ask("/image/1")
    assert (status, headers["Content-Type"]) == (200, "image/png") and image.startswith(b"\x89PNG")
    about = json.loads(served.ask("/api/candidate/0")[1])
    assert about["caption"] == "<script>alert(1)</script> in a caption" and about["key"] == "picture-0"
    answer = json.loads(served.ask("/api/decision", body_of(review))[1])
    assert answer == {"revision": 1, "by": {"anna": {"decision": "keep"}}, "conflicts": {}}
    assert decisions(tmp_path / "work") == {"picture-0": {"decision": "keep"}}
    state = json.loads(served.ask("/api/state?since=0")[1])
    assert len(state["samples"]) == 3 and state["revision"] == 1
    known = f"/api/state?since=1&listing={state['listing']}"
    assert json.loads(served.ask(known)[1]) == {"revision": 1, "changed": {}, "listing": state["listing"]}
    # A picture is asked for by number and sample: a page that knows another list gets no other sample's picture.
    assert [served.ask(f"/image/1?sample={state['samples'][n]}")[0] for n in (1, 0)] == [200, 409]
    # Half a character does not stop the export.
    changes = {"decision": "keep", "note": "cut \ud83d", "caption": "a \udc00 text"}
    assert served.ask("/api/decision", body_of(review, reviewer="ann\ud800", set=changes))[0] == 200
    assert export(tmp_path / "work", tmp_path / "out").kept == 1


def test_what_is_no_decision_is_refused(review: Review, served: Served, tmp_path: Path) -> None:
    good = body_of(review)
    refuses_strangers(served, [("/", None), ("/api/state", None), ("/image/0", None), ("/api/decision", good)])
    serves_no_files(served, [
        "/image/../decisions.jsonl", "/image/..%2f.review_token", "/../../etc/passwd", "/image/-1", "/image/99", "/image/0x1",
        "/.review_token", "/api/candidate/", "/image/1%00", "/image/1111111111", "/static/", "/static/..%2freview.py",
    ])  # fmt: skip
    refuses_bodies(served, "/api/decision", good, [
        {"set": {"decision": "maybe"}}, {"set": {"path": "x"}}, {"set": {"caption": 5}}, {"set": {"note": "x" * MAX_TEXT}},
        {"at": "5"}, {"at": True}, {"at": -1}, {"at": 1e300}, {"base": None}, {"reviewer": " "}, {"reviewer": "x" * 61},
        {"event": ""}, {"sample": 7},
    ])  # fmt: skip
    assert served.ask("/api/decision", {**good, "sample": "unknown"})[0] == 404
    assert logged(tmp_path / "work") == []


def test_a_decision_that_cannot_be_written_is_not_acknowledged(
    review: Review, served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.ask("/api/decision", body_of(review, event="first"))
    real = os.write

    def full(file: int, data: bytes) -> int:
        if data.startswith(b'{"event"'):
            real(file, data[:20])
            raise OSError(28, "No space left on device")
        return real(file, data)

    monkeypatch.setattr("paradiffusion.curation.journal.os.write", full)
    status, body, _ = served.ask("/api/decision", body_of(review, event="second", at=6))
    assert status == 507 and b"No space left" in body
    monkeypatch.undo()
    assert served.ask("/api/decision", body_of(review, event="second", at=6))[0] == 200
    assert [one["event"] for one in logged(tmp_path / "work")] == ["first", "second"]  # and no half line between


# --- in the browser


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    captions = ["<script>window.hit = 1</script><img src=x onerror='window.hit = 1'>", *[f"Number {n}. {LONG}" for n in range(1, 8)]]
    server = Server(write_candidates(tmp_path / "work", captions)).start()
    yield server
    server.close()


@in_browser
def test_a_walk_with_the_keyboard_and_a_reload_in_the_middle(server: Server, browser: Any) -> None:
    page, wrong = browser.new_page(), []
    listen(page, wrong)
    page.goto(server.url)
    at(page, 0)
    assert "<script>" in page.input_value("#caption") and page.evaluate("window.hit") is None
    assert page.evaluate("document.getElementById('image').naturalWidth") == 96
    page.keyboard.press("k")
    at(page, 1)
    assert decisions(server.work)["picture-0"] == {"decision": "keep"}  # on disk before the next picture is there
    assert "72 words (50–100)" in page.inner_text("#words")
    page.keyboard.press("d")
    at(page, 2)
    page.keyboard.press("u")  # takes the drop back
    at(page, 1)
    wait_for(lambda: decisions(server.work)["picture-1"] == {"decision": None})
    page.keyboard.press("ArrowRight")
    at(page, 2)
    page.keyboard.press("ArrowLeft")
    at(page, 1)  # not 0, which is decided

    text = "A kind old dog, and k d u are letters here."
    page.keyboard.press("e")
    page.keyboard.press("Control+a")
    page.keyboard.type(text)
    assert "below 50" in page.inner_text("#words")
    wait_for(lambda: decisions(server.work)["picture-1"].get("caption") == text)
    page.keyboard.type(" More.")
    page.keyboard.press("Escape")  # leaving saves at once
    page.keyboard.press("n")
    page.keyboard.type("out of focus?")
    page.reload()  # in the middle of a word
    at(page, 1)
    assert (page.input_value("#caption"), page.input_value("#note")) == (f"{text} More.", "out of focus?")
    assert page.inner_text("#counts") == "1 of 8 decided, 1 kept"
    page.keyboard.press("k")
    at(page, 2)
    kept = {"decision": "keep", "caption": f"{text} More.", "note": "out of focus?"}
    assert decisions(server.work)["picture-1"] == kept
    for number in range(2, 8):
        page.keyboard.press("d")
        at(page, number + 1 if number < 7 else "done")
    assert "All 8 candidates are decided: 2 kept" in page.inner_text("#done")
    assert page.is_disabled("#caption")  # what is typed there would be no picture's
    page.select_option("#filter", "keep")
    at(page, 0)
    assert wrong == []
    names = [one["event"] for one in logged(server.work)]
    assert len(names) == len(set(names))
    page.close()
    assert server.end(signal.SIGTERM) == 0


@in_browser
def test_a_server_that_is_killed_loses_nothing_that_it_acknowledged_or_was_sent(server: Server, browser: Any) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(server.url)
    at(page, 0)
    for number in range(3):
        page.keyboard.press("kdk"[number])
        at(page, number + 1)
    server.end()
    assert [decisions(server.work)[f"picture-{n}"]["decision"] for n in range(3)] == ["keep", "drop", "keep"]
    page.keyboard.press("e")
    page.keyboard.press("End")
    page.keyboard.type(" Typed while it was away.")
    page.keyboard.press("Escape")
    page.keyboard.press("k")
    page.wait_for_selector("#status.bad")
    assert "does not answer" in page.inner_text("#status")
    time.sleep(0.5)
    page.keyboard.press("d")  # waits for the first: nothing is shown, and nothing decided, over it
    assert page.evaluate("document.body.dataset.number") == "3"
    server.start()
    at(page, 4)
    stored = decisions(server.work)["picture-3"]
    assert stored["decision"] == "keep" and str(stored["caption"]).endswith("Typed while it was away.")

    server.end()  # and now the tab is closed before the server is back
    page.keyboard.press("d")
    page.wait_for_selector("#status.bad")
    page.close()
    server.start()
    page = context.new_page()
    page.goto(server.url)
    wait_for(lambda: decisions(server.work).get("picture-4") == {"decision": "drop"}, timeout=20)
    names = [one["event"] for one in logged(server.work)]
    assert len(names) == len(set(names)) and "picture-5" not in decisions(server.work)
    assert [decisions(server.work)[f"picture-{n}"]["decision"] for n in range(3)] == ["keep", "drop", "keep"]
    context.close()


@in_browser
def test_two_tabs_and_two_reviewers_see_each_other(server: Server, browser: Any) -> None:
    context = browser.new_context()
    first, second = context.new_page(), context.new_page()
    for page in (first, second):
        page.goto(server.url)
        at(page, 0)
    second.evaluate("poll = async () => {}")  # hears nothing of the others, as within a second and a half
    first.fill("#caption", "text of the first tab")
    first.keyboard.press("Escape")
    wait_for(lambda: decisions(server.work).get("picture-0") == {"caption": "text of the first tab"})
    second.fill("#caption", "text of the second tab")
    second.wait_for_selector("#notice:not([hidden])")
    assert "text of the first tab" in second.inner_text("#notice-text")
    wait_for(lambda: decisions(server.work)["picture-0"] == {"caption": "text of the second tab"})
    until(first, "document.getElementById('caption').value === 'text of the second tab'")
    assert "changed in another tab" in first.inner_text("#notice-text")
    second.click("#theirs")
    wait_for(lambda: decisions(server.work)["picture-0"] == {"caption": "text of the first tab"})

    other = browser.new_page()
    other.goto(server.url)
    at(other, 0)
    other.fill("#reviewer", "ben")
    other.press("#reviewer", "Enter")
    until(other, "document.getElementById('caption').value.startsWith('<script>')")  # anna's text is hers
    other.evaluate("document.activeElement.blur()")
    other.keyboard.press("d")
    at(other, 1)
    until(first, "document.getElementById('others').textContent === 'ben: drop'")
    assert decisions(server.work, "ben") == {"picture-0": {"decision": "drop"}}
    assert "decision" not in decisions(server.work)["picture-0"]
    other.close()
    context.close()


@in_browser
def test_five_thousand_words_are_kept_and_a_longer_text_stops_the_walk(server: Server, browser: Any) -> None:
    page = browser.new_page()
    page.goto(server.url)
    at(page, 0)
    # 5,000 words on few lines: the driver types each line break by itself.
    story = ("Zwölf \U0001f98a im Schnee. " * 250 + "\n") * 5
    page.fill("#caption", story)
    page.keyboard.press("Escape")
    page.keyboard.press("k")
    at(page, 1)
    assert decisions(server.work)["picture-0"] == {"decision": "keep", "caption": story}

    page.fill("#caption", "word " * (MAX_TEXT // 5 + 1))
    assert "bytes too long" in page.inner_text("#status")
    page.keyboard.press("Escape")
    for key in ("k", "ArrowRight", "u"):
        page.keyboard.press(key)
        assert page.evaluate("document.body.dataset.number") == "1"  # nothing is left behind unsaved
    assert len(page.input_value("#caption")) > MAX_TEXT and "picture-1" not in decisions(server.work)
    page.fill("#caption", "short enough")
    page.keyboard.press("Escape")
    page.keyboard.press("k")
    at(page, 2)
    assert decisions(server.work)["picture-1"] == {"decision": "keep", "caption": "short enough"}
    page.close()


@in_browser
def test_going_to_a_picture_by_its_number_and_keys_after_a_name(server: Server, browser: Any) -> None:
    page = browser.new_page()
    page.goto(server.url)
    at(page, 0)
    page.keyboard.press("g")
    page.keyboard.type("4")
    page.keyboard.press("Enter")
    at(page, 3)
    assert page.url.endswith("#4")
    page.keyboard.press("K")  # caps lock
    at(page, 4)
    assert decisions(server.work)["picture-3"] == {"decision": "keep"}
    page.fill("#number", "99")
    page.press("#number", "Enter")
    assert "pictures 1 to 8" in page.inner_text("#status") and page.input_value("#number") == "5"
    page.evaluate("location.hash = '#2'")  # a link, or the address changed by hand
    at(page, 1)
    page.fill("#reviewer", "ben")
    page.press("#reviewer", "Enter")
    until(page, "document.activeElement === document.body")  # the next key decides, and is no letter of the name
    page.keyboard.press("d")
    wait_for(lambda: decisions(server.work, "ben") == {"picture-1": {"decision": "drop"}})
    page.close()


@in_browser
def test_no_decision_falls_on_another_picture_when_candidates_are_chosen_anew(server: Server, browser: Any) -> None:
    page = browser.new_page()
    page.goto(server.url)
    at(page, 0)
    width = "document.getElementById('image').naturalHeight"
    assert page.evaluate(width) == 96
    page.keyboard.press("k")
    at(page, 1)
    server.end()
    choose(server.work, Choosing(maximum={"aesthetic": 8.985}))  # what was number 2 comes first now
    server.start()
    # The page notices by itself, loads anew and stays at the second. (Asking its script meanwhile would race that.)
    page.wait_for_selector("#total:text-is('6')")
    page.wait_for_selector("#key:has-text('picture-3')")
    at(page, 1)
    page.evaluate("location.hash = '#1'")
    at(page, 0)
    assert "picture-2" in page.inner_text("#key")
    assert page.evaluate(width) == 80  # its own picture, not the one that the browser keeps under number 1
    page.keyboard.press("d")
    at(page, 1)
    assert decisions(server.work) == {"picture-0": {"decision": "keep"}, "picture-2": {"decision": "drop"}}
    assert len(logged(server.work)) == 2
    page.close()


def logged(work: Path) -> list[dict[str, Any]]:
    """The events on disk."""
    path = work / "decisions.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def decisions(work: Path, reviewer: str = "anna") -> dict[str, dict[str, str | None]]:
    """key -> fields, as they stand on disk for one reviewer."""
    keys = {one["sample"]: one["key"] for one in logged(work)}
    standing = read_decisions(work / "decisions.jsonl")
    return {keys[name]: standing.of(name)[reviewer] for name in keys if reviewer in standing.of(name)}


class Server(Program):
    """The review of the candidates in ``work``."""

    def __init__(self, work: Path) -> None:
        super().__init__("scripts/select.py", "action=review", f"folder={work}", "reviewer=anna")
        self.work = work

    @property
    def url(self) -> str:
        return self.urls[0]


def at(page: Any, number: int | str) -> None:
    page.wait_for_selector(f"body[data-number='{number}']")


def until(page: Any, condition: str) -> None:
    """Wait for a condition in the page, whose policy forbids playwright's own way (eval)."""
    wait_for(lambda: page.evaluate(condition), timeout=20)
