"""The page of a report: pictures, marked sentences, hostile text, and how a browser shows it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
from browser import chromium, in_browser, listen
from PIL import Image
from report_fixtures import COSINE, HOSTILE, SHARE, Page, evaluation, suite, written

from paradiffusion.evaluation.estimates import mean
from paradiffusion.evaluation.records import Drawn, ImageScore, ScoreResult, Table
from paradiffusion.evaluation.reporting.evaluation_report import write_report
from paradiffusion.pages import render


def test_hostile_text_is_text(tmp_path: Path) -> None:
    of = suite(count=2)
    prompts = tuple(replace(p, text=f"{HOSTILE} {i}", category=HOSTILE) for i, p in enumerate(of.prompts))
    of = replace(of, prompts=prompts, title=HOSTILE, source=HOSTILE)
    made = evaluation(tmp_path / "images", of, HOSTILE)
    made.source = {"checkpoint": HOSTILE, HOSTILE: "x"}
    score = made.scores[0]
    score.title = score.formula = score.source = HOSTILE
    score.warnings, score.settings = [HOSTILE], {HOSTILE: HOSTILE}
    score.measures = [replace(SHARE, title=HOSTILE)]
    score.tables = [Table(HOSTILE, [HOSTILE, HOSTILE], [[HOSTILE, mean([0.5], ["p"])]] * 2, HOSTILE, plot="bars")]
    questions = [{"id": "q", "text": HOSTILE, "answer": HOSTILE, "yes": True, "counted": True}]
    sentence = {"text": HOSTILE, "score": 0.5, "followed": None, "position": 0}
    score.images[0].detail = {"questions": questions, "caption": HOSTILE, "reason": HOSTILE, "sentences": [sentence]}
    score.images[1].error = HOSTILE
    made.images[1] = replace(made.images[1], error=HOSTILE)
    made.scores.append(ScoreResult("left", HOSTILE, skipped=HOSTILE))
    page, text, record = written(tmp_path / "out", made, evaluation(tmp_path / "images", of, "b"))
    seen = Page(page)
    assert not seen.open and [tag for tag, _ in seen.tags].count("script") == 1
    assert not [a for _, attrs in seen.tags for a in attrs if a.startswith("on")]
    assert not [a for tag, a in seen.tags if tag == "img" and not str(a["src"]).startswith("data:image/")]
    assert 'alert("x")' in seen.text and "\u202e" not in page + text and "\x1b" not in page + text
    assert "<script>" not in text and "<img" not in text and "[l](" not in text
    for line in text.splitlines():
        if line.startswith("|"):
            cells = re.split(r"(?<!\\)\|", line)
            assert len(cells) > 2
    assert HOSTILE in record["title"] and record["suites"][0]["models"][0]["source"]["checkpoint"] == HOSTILE


def test_missing_and_broken_pictures_show_why(tmp_path: Path) -> None:
    made = evaluation(tmp_path / "images", suite(count=4))
    made.images[0].file.unlink()
    made.images[1].file.write_bytes(b"no picture at all")
    made.images[2] = replace(made.images[2], error="out of memory")
    page = written(tmp_path / "out", made)[0]
    first, second, third = re.findall(r'<div class="missing"><b>no picture</b><span>([^<]*)</span>', page)
    assert first == "00000.png is missing" and "00001.png: does not decode" in second and third == "out of memory"
    # The text beside it, and in the table.
    assert page.count("<img") == 1 and page.count("A red apple lies here. 0.") == 2
    assert 'class="legend"' not in page, "no sentence was judged"
    assert str(tmp_path) not in page, "no path of this machine"


def test_two_suites_and_three_models(tmp_path: Path) -> None:
    fruit, birds = suite(), suite("birds", 6, ())
    labels = ("one", "two " + "x" * 80, "two " + "x" * 80)
    made = [evaluation(tmp_path / of.name, of, label) for of in (fruit, birds) for label in labels]
    page, text, record = written(tmp_path / "out", *made)
    assert record["title"] == f"one and {labels[1]} on The fruit suite and The birds suite"
    assert [s["name"] for s in record["suites"]] == ["fruit", "birds"]
    assert [m["label"] for m in record["suites"][1]["models"]] == ["one", labels[1], f"{labels[1]} (2)"]
    assert 'id="suite-fruit-categories"' in page and 'id="suite-birds-categories"' not in page, "birds have none"
    assert text.count("### By category") == 1
    seen = Page(page)
    ids = [attrs["id"] for _, attrs in seen.tags if "id" in attrs]
    assert len(ids) == len(set(ids)), "ids of figures included"
    targets = {str(attrs["href"])[1:] for tag, attrs in seen.tags if tag == "a" and str(attrs["href"]).startswith("#")}
    assert targets <= set(ids) and "suite-birds-pictures" in targets
    assert all(attrs.get("aria-label") for tag, attrs in seen.tags if tag == "svg")
    assert all(attrs.get("alt") for tag, attrs in seen.tags if tag == "img")
    figures = page.split("<svg")[1:]
    assert len(figures) > 1
    for figure in figures:  # every model is in the legends, and none runs over the edge
        texts = re.findall(r"<text[^>]*>([^<]*)</text>", figure.partition("</svg>")[0])
        assert {"one", "two"} <= {text.strip().partition(" ")[0] for text in texts} and max(map(len, texts)) <= 30


def test_sentences_are_marked_by_what_the_scores_say(tmp_path: Path) -> None:
    of = suite(count=1)
    text = "First there is <one>.  Then two!\nThird is cut. The last."
    of = replace(of, prompts=(replace(of.prompts[0], text=text),))
    made = evaluation(tmp_path / "images", of)
    said = [("First there is <one>.", 0, 1.0, True), ("Then two!", 1, 0.5, False), ("The last.", 3, 0.1, False)]
    made.scores[0].images[0].detail = {
        "sentences": [
            {"cut": False, "text": text, "position": position, "score": score, "followed": followed}
            for text, position, score, followed in said
        ]
    }
    row = {"text": "Third is cut.", "position": 2, "score": 0.21, "followed": None, "cut": True, "percentile": 0.75}
    other = {"text": "Then two!", "position": 1, "score": 0.3, "followed": None, "change": 0.25, "matters": False}
    images = [ImageScore("p000", "p000", {"fit": 0.2}, detail={"sentences": [other, row]})]
    made.scores.append(ScoreResult("clip", "CLIP", measures=[COSINE], images=images))
    page = written(tmp_path / "out", made)[0]
    (paragraph,) = re.findall(r'<p class="paragraph".*?</p>', page, re.S)
    marks = re.findall(r'<span class="s (\w+)" tabindex="0"><sup[^>]*>(.)\u2060</sup>([^<]*)<', paragraph)
    assert marks == [
        ("followed", "✓", "First there is &lt;one&gt;."), ("partly", "◐", "Then two!"),
        ("unknown", "?", "Third is cut."), ("ignored", "✗", "The last."),
    ]  # fmt: skip
    tips = re.findall(r'<span class="tip" role="note">(.*?)</span></span></span>', paragraph)
    assert "changes by 25.0 %" in tips[1] and "was ignored" in tips[1] and "Truth score: 50.0 %" in tips[1]
    assert "CLIP: 0.210" in tips[2] and "better than 75.0 %" in tips[2] and "its end was not read" in tips[2]
    bare = re.sub(r'<span class="tip".*?</span></span>|<sup.*?</sup>|<[^>]+>', "", paragraph)
    assert bare == "First there is &lt;one&gt;.  Then two!\nThird is cut. The last.", "nothing of the prompt is lost"


def test_checklist_answers_and_captions_are_shown(tmp_path: Path) -> None:
    made = evaluation(tmp_path / "images", suite(count=1))
    made.scores[0].images[0].detail = {
        "questions": [
            {"id": "1", "text": "Is there a temple?", "answer": "No.", "yes": False, "counted": True},
            {"id": "2", "text": "Is it golden?", "answer": "yes", "yes": True, "counted": False},
            {"id": "3", "text": "Is there a tree?", "answer": "yes", "yes": True, "counted": True},
        ],
        "caption": "A tree.",
    }
    page = written(tmp_path / "out", made)[0]
    items = [" ".join(re.sub("<[^>]+>", " ", one).split()) for one in re.findall(r"<li class=.*?</li>", page)]
    assert items[0] == "✗ Is there a temple? No."
    assert items[1].startswith("⊘ Is it golden? yes counts as no, since") and items[2] == "✓ Is there a tree? yes"
    assert "Truth score: 1 of 3" in page and "A tree." in page


def test_the_worst_and_the_best_pictures_are_shown_and_how_many(tmp_path: Path) -> None:
    rights = [0.5] * 200
    rights[77], rights[78] = 0.0, 1.0
    page = written(tmp_path / "out", evaluation(tmp_path / "images", suite(count=200), rights=rights))[0]
    groups = {
        name: re.findall(r"<h5>(p\d+) <small>", content)
        for name, content in re.findall(r'<details class="group" id="suite-fruit-(\w+)".*?</summary>(.*?)</article></details>', page, re.S)
    }
    assert len(groups["spread"]) == 12 and groups["worst"][0] == "p077" and groups["best"][0] == "p078"
    shown = sum(map(len, groups.values()))
    assert f"{shown} of 200 shown" in page and shown == page.count("<img") <= 40
    assert "best: Truth score" in page and "worst: Truth score" in page


def test_a_large_report_stays_small(tmp_path: Path) -> None:
    of = suite(count=200)
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    Image.fromarray(noise).save(tmp_path / "images" / "00000.png", compress_level=1)
    made = []
    for step, label in enumerate("abcdef", 2):
        one = evaluation(tmp_path / "images", replace(of, prompts=of.prompts[:1]), label, [0.5])
        images = [Drawn(p.id, p.id, tmp_path / "images" / "00000.png", 1) for p in of.prompts]
        rows = [ImageScore(p.id, p.id, {"right": (i * step % 13) / 12}) for i, p in enumerate(of.prompts)]
        made.append(replace(one, suite=of, images=images, scores=[replace(one.scores[0], images=rows)]))
    page = written(tmp_path / "out", *made)[0]
    assert 5_000_000 < len(page) < 8_000_000
    found = re.search(r"(\d+) of 200 shown", page)
    assert found is not None and 6 <= int(found[1]) < 60
    for group in ("spread", "differ", "worst", "best"):
        assert f'id="suite-fruit-{group}"' in page, "a full page leaves no group out"


def test_text_on_pages_is_readable() -> None:
    """A contrast of at least 4.5 (WCAG 2.1, 1.4.3) on the page and on cards, light and dark."""
    light, dark = re.findall(r":root \{([^}]*)\}", render("templates/document.html", title=""))
    for block, grounds in ((light, (255, 247)), (dark, (18, 32))):  # Chromium's Canvas, alone and under --card
        colours = dict(re.findall(r"--(soft|good|bad|unsure|mark): (#[0-9a-f]{3,6});", block))
        assert len(colours) == 5
        for name, colour in colours.items():
            for ground in grounds:
                low, high = sorted((_luminance(colour), _luminance(f"#{ground:02x}{ground:02x}{ground:02x}")))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (name, colour, ground)


def _luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@in_browser
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    of = suite(count=60)
    of = replace(of, prompts=(replace(of.prompts[0], text=HOSTILE), *of.prompts[1:]))
    made = []
    for label, step in (("stage 1", 4), ("stage 2", 7), (HOSTILE[:30] + "z" * 60, 9)):
        one = evaluation(tmp_path / "images", of, label, [(i * step % 11) / 10 for i in range(60)])
        for prompt, row in zip(of.prompts, one.scores[0].images, strict=True):
            row.detail = {"sentences": [{"text": prompt.text, "position": 0, "score": 0.2, "followed": False}]}
        made.append(one)
    made[0].images[0].file.unlink()
    path, wrong = write_report(tmp_path / "out", made), []
    with chromium() as browser:
        tab = browser.new_page(viewport={"width": 1200, "height": 900})
        listen(tab, wrong)
        tab.goto(path.as_uri())
        assert tab.title().startswith("stage 1, stage 2 and ")
        assert tab.evaluate("[...document.images].every(image => image.complete && image.naturalWidth)")
        # Several of the Tab key's stops are sentences; the figures show while one has the focus.
        sentence = tab.locator(".paragraph .s").first
        tip = sentence.locator(".tip")
        assert not tip.is_visible()
        sentence.focus()
        assert tip.is_visible() and "Truth score: 20.0 %" in tip.inner_text()
        # A prompt of the long table leads to its card, though that is folded away.
        worst = tab.locator("#suite-fruit-worst article").first
        assert not worst.is_visible()
        tab.locator("#suite-fruit-prompts summary").click()
        tab.locator(f'#suite-fruit-prompts a[href="#{worst.get_attribute("id")}"]').click()
        worst.wait_for(state="visible", timeout=5000)
        words = tab.locator("table.sortable thead button", has_text="words")
        words.press("Enter")
        first = tab.locator("table.sortable tbody tr").first.locator("td").nth(2)
        shortest = int(first.inner_text())
        words.press("Enter")
        assert shortest < int(first.inner_text())
        tab.set_viewport_size({"width": 380, "height": 700})
        assert tab.evaluate("document.documentElement.scrollWidth") <= 380, "it fits a telephone"
        bare = browser.new_page(java_script_enabled=False)
        bare.goto(path.as_uri())
        bare.locator("#suite-fruit-worst > summary").click()
        assert bare.locator("#suite-fruit-worst article").first.is_visible(), "it can be read without a script"
    assert wrong == []
