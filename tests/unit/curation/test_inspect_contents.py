"""The report on a data set, what is read from captions and pictures, and what the configured run makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from data_fixtures import as_json, encoded, picture, sample, synthetic_index, write_tar
from PIL import Image
from remote_fixtures import serving

from paradiffusion.curation.inspecting.caption_figures import TextLimits, read_captions
from paradiffusion.curation.inspecting.histograms import distribution
from paradiffusion.curation.inspecting.inspect import (
    Inspection,
    InspectSettings,
    check_pictures,
    figures_json,
    inspect,
    kind_weights,
    run_of,
)
from paradiffusion.curation.inspecting.page import inspection_page
from paradiffusion.curation.inspecting.page_parts import LONGEST_SHOWN
from paradiffusion.data.images import make_buckets
from paradiffusion.data.index import SampleIndex, TokenCounter, join_indexes, load_index
from paradiffusion.data.plan import BatchPlan, Share
from paradiffusion.data.remote import Storage
from paradiffusion.data.shards import expand_shards, write_shards

LETTERS = TokenCounter("letters", lambda texts: [len(text) for text in texts])
FAMILY = "👩\u200d👩\u200d👧 a family"
BOOK = "word " * 4000
CHINESE = "木桌上有两个杯子和一碗橙子" * 30


def inspected(index: SampleIndex, steps: int = 10) -> Inspection:
    plan = BatchPlan(index, 4, 0, make_buckets(64, 16, 2.0), {"short": 1.0})
    settings = InspectSettings("test", 1, 64, steps=steps, samples=100, captions=1000, check=100)
    return inspect(plan, [LETTERS], TextLimits(64, 8, True), settings)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> SampleIndex:
    """80 captions, 60 of which begin alike, and one sample of each oddity."""
    members = []
    for number in range(80):
        text = f"In this image, we see number {number}" if number % 4 else f"thing {number} stands on its own"
        members += [
            (f"{number:03d}.png", encoded(picture(number))),
            (f"{number:03d}.json", as_json(captions={"short": text})),
        ]
    for name, image, caption in (
        ("dark", Image.new("RGB", (64, 64), (3, 3, 3)), "night"),
        ("grey", Image.new("RGB", (64, 64), (128, 128, 128)), "fog"),
        ("white", Image.new("RGB", (64, 64), (255, 255, 255)), "snow"),
        ("emoji", picture(90), FAMILY),
        ("book", picture(92), BOOK),
        ("chinese", picture(93), CHINESE),
    ):
        members += [(f"{name}.png", encoded(image)), (f"{name}.json", as_json(captions={"short": caption}))]
    return load_index(expand_shards(write_tar(tmp_path_factory.mktemp("odd") / "000000.tar", members)))


def test_captions_that_begin_alike_are_found(odd: SampleIndex) -> None:
    (opening,) = read_captions(odd, [], 1000, 0).openings
    assert opening.n == 80 + 1, "captions of four words and fewer have no more than they begin with; the book has"
    assert opening.most[0] == ("in this image, we", 60 / opening.n)
    assert all(share * opening.n > 1.5 for _, share in opening.most), "what comes once is no habit"
    notes = " ".join(inspected(odd).notes)
    assert "74% of the short captions begin with “in this image, we”" in notes


def test_equal_captions_are_counted_without_keeping_the_others(tmp_path: Path) -> None:
    texts = ["a"] * 5 + ["b"] * 2 + ["c", "d", "e"]
    write_shards((sample(n, {"short": text, "long": text}) for n, text in enumerate(texts)), tmp_path, 10)
    read = read_captions(load_index(expand_shards(tmp_path)), [], 100, 0)
    assert (read.captions, read.repeats, read.repeated) == (10, 5, [("a", 5), ("b", 2)])


def test_dark_and_flat_pictures_are_found(odd: SampleIndex) -> None:
    found = check_pictures(odd, 100, 0)
    assert [odd.key(row) for row in found.dark] == ["dark"]
    assert {odd.key(row) for row in found.flat} == {"dark", "grey", "white"}
    assert found.checked == len(odd) and not found.undecodable
    report = inspected(odd)
    assert (report.dark, report.flat) == (1, 3)
    assert [one.key for one in report.worst["very dark images"]] == ["000000.tar/dark"]
    assert "3 of 86 images that were decoded are of nearly one colour" in " ".join(report.notes)


def test_the_longest_text_is_found_by_its_tokens_too(odd: SampleIndex) -> None:
    worst = {name: [one.key.partition("/")[2] for one in rows] for name, rows in inspected(odd).worst.items()}
    assert "chinese" not in worst["longest captions"]
    assert worst["captions of the most tokens, of those read"][:2] == ["book", "chinese"]


def test_page_and_figures_hold_what_captions_may_hold(odd: SampleIndex) -> None:
    report = inspected(odd)
    html = inspection_page(report)
    assert FAMILY in html, "an emoji's parts stay joined"
    assert len(BOOK) > LONGEST_SHOWN and BOOK.strip() not in html
    assert f"{len(BOOK.strip()) - LONGEST_SHOWN:,} more characters" in html
    figures = json.loads(figures_json(report).encode("utf-8"))
    texts = {one["key"]: one["captions"]["short"] for one in figures["shown"]}
    assert texts["000000.tar/emoji"] == FAMILY and texts["000000.tar/book"] == BOOK.strip()


def test_epochs_of_a_run_are_what_the_plan_serves() -> None:
    sources = [synthetic_index(400, 4, seed=1), synthetic_index(60, 1, seed=2)]
    shares = [Share(3.0, {"long": 1.0}), Share(1.0)]
    plan = BatchPlan(join_indexes(sources, ["web", "mine"]), 8, 0, make_buckets(64, 16, 2.0), {"short": 1.0}, 2, shares)
    steps = 400
    run = run_of(plan, steps)
    assert [(row.source, row.samples, row.share) for row in run] == [("web", 400, 0.75), ("mine", 60, 0.25)]
    assert [row.epochs for row in run] == [6.0, pytest.approx(13.333, abs=1e-3)]
    served = np.bincount(np.concatenate([plan.source_of(plan.batch(step).rows) for step in range(steps)]))
    assert [row.seen for row in run] == [pytest.approx(count, rel=0.1) for count in served.tolist()]
    assert kind_weights(plan) == {"long": 0.75, "short": 0.25}, "a source's own captions count"


def test_a_set_that_is_shown_very_often_is_said_so(odd: SampleIndex) -> None:
    assert not any("show every sample" in note for note in inspected(odd).notes)
    report = inspected(odd, steps=10_000)
    assert "max_steps=10000 of batch_size=4 show every sample 465 times" in " ".join(report.notes)
    assert "40,000" in inspection_page(report)


def test_one_giant_does_not_flatten_a_histogram() -> None:
    found = distribution(np.array([*range(50, 110), 20_000]))
    assert found is not None and sum(1 for count in found.counts if count) >= 6
    assert found.counts[-1] == 1 and sum(found.counts) == 61 and found.largest == 20_000


def test_captions_from_a_web_server_are_those_of_the_disk(tmp_path: Path) -> None:
    write_shards((sample(number) for number in range(40)), tmp_path, 20)
    local = load_index(expand_shards(tmp_path))
    with serving(tmp_path) as server:
        urls = [f"{server.url}{shard.name}" for shard in sorted(tmp_path.glob("*.tar"))]
        remote = load_index(expand_shards(urls, storage=Storage(retries=0)))
        near, far = (read_captions(index, [LETTERS], 30, 3) for index in (local, remote))
        assert near.tokens["letters"].tolist() == far.tokens["letters"].tolist()
        assert (near.repeated, near.openings, far.unreadable) == (far.repeated, far.openings, 0)
        server.status = 404
        assert read_captions(remote, [LETTERS], 30, 3).unreadable == 30
