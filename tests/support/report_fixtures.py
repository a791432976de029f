"""Evaluations made of known values, and their reports, for the tests of reports."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from paradiffusion.evaluation.records import Drawn, Evaluation, ImageScore, Measure, ScoreResult
from paradiffusion.evaluation.reporting.evaluation_report import write_report
from paradiffusion.evaluation.suites.suite import Suite, SuitePrompt

HOSTILE = '<script>alert("x")</script> | `a` **b** \u202ecba\u202c \x1b[31m <img src=x onerror=alert(1)> \'"&amp; $x$ [l](http://e.org)'
SHARE = Measure("right", "Things that are right", "share")
COSINE = Measure("fit", "Cosine of text and picture", "cosine", worst=-1.0)
FID = Measure("fid", "FID", "number", higher_is_better=False, worst=None)


def suite(name: str = "fruit", count: int = 12, categories: Sequence[str] = ("still life", "people")) -> Suite:
    """Prompts of 5 and of 60 words in turn."""
    prompts = []
    for number in range(count):
        sentences = "A red apple lies here. " if number % 2 == 0 else "A red apple lies upon the old table. " * 7 + "Then dusk."
        category = categories[number % len(categories)] if categories else ""
        prompts.append(SuitePrompt(f"p{number:03d}", f"{sentences.strip()} {number}.", category))
    return Suite(name, f"The {name} suite", tuple(prompts), source="made up", licence="none")


def evaluation(folder: Path, of: Suite, label: str = "stage 1", rights: Sequence[float] | None = None, **changes: Any) -> Evaluation:
    """An evaluation in which image i is right by ``rights[i]``; its pictures are written into ``folder``."""
    rights = [(i % 4) / 4 for i in range(len(of.prompts))] if rights is None else rights
    folder.mkdir(parents=True, exist_ok=True)
    images = []
    for number, prompt in enumerate(of.prompts):
        file = folder / f"{number:05d}.png"
        if not file.exists():
            Image.fromarray(np.full((48, 64, 3), number * 9 % 256, np.uint8)).save(file)
        images.append(Drawn(prompt.id, prompt.id, file, prompt.seed(of.name)))
    rows = [ImageScore(p.id, p.id, {"right": right}) for p, right in zip(of.prompts, rights, strict=True)]
    score = ScoreResult("truth", "Truth score", "rights over things", "our own", {"judge": "truth"}, [SHARE], rows)
    made = Evaluation(label, "checkpoint", {"checkpoint": "runs/nano", "step": 60}, of, 1, images, [score])
    return replace(made, **changes)


def written(folder: Path, *evaluations: Evaluation, **options: Any) -> tuple[str, str, dict[str, Any]]:
    """The page, the Markdown and the JSON."""
    path = write_report(folder, list(evaluations), **options)
    assert path == folder / "report.html"
    assert sorted(p.name for p in folder.iterdir() if p.is_file()) == ["report.html", "report.json", "report.md"]
    record = json.loads((folder / "report.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    return path.read_text(), (folder / "report.md").read_text(), record


class Page(HTMLParser):
    """What a browser would make of a page, in short."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing that is open"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())
