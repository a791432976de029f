"""The review page, beyond its walk: long texts, going to a picture, names, and candidates that are chosen anew meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import chromium, in_browser
from commands import wait_for
from review_server import Server, at, decisions, logged, started, until
from tiny_clip import write_candidates

from paradiffusion.curation.choosing.review import MAX_TEXT
from paradiffusion.curation.choosing.selection import Choosing, choose


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with started(write_candidates(tmp_path / "work", [f"Number {n}." for n in range(6)])) as server:
        yield server


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
    assert "pictures 1 to 6" in page.inner_text("#status") and page.input_value("#number") == "5"
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
    server.kill()
    choose(server.work, Choosing(maximum={"aesthetic": 8.985}))  # what was number 2 comes first now
    server.start()
    # The page notices by itself, loads anew and stays at the second. (Asking its script meanwhile would race that.)
    page.wait_for_selector("#total:text-is('4')")
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
