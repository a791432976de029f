"""The report on a data set: figures that agree with a plain count, what is read from captions and pictures, and its page."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import chromium, in_browser, listen
from commands import user_error
from data_fixtures import as_json, encoded, picture, sample, synthetic_index, write_tar
from PIL import Image
from programs import script
from remote_fixtures import serving

from paradiffusion.compose import compose_train
from paradiffusion.config import TrainConfig
from paradiffusion.curation.inspecting.caption_figures import read_captions
from paradiffusion.curation.inspecting.histograms import distribution, nice_edges
from paradiffusion.curation.inspecting.inspect import (
    Inspection,
    InspectOptions,
    check_pictures,
    figures_json,
    inspect,
    kind_weights,
    run_of,
)
from paradiffusion.curation.inspecting.page import LONGEST_SHOWN, inspection_page
from paradiffusion.data.images import make_buckets
from paradiffusion.data.index import SampleIndex, TokenCounter, join_indexes, load_index, read_sample
from paradiffusion.data.plan import BatchPlan, Share
from paradiffusion.data.remote import Storage
from paradiffusion.data.shards import expand_shards, write_shards

NASTY = "<script>document.title='broken'</script> & \x07 <img src=x onerror=alert(1)>"
# A token is a letter: unlike words, so that the two cannot be taken for each other.
LETTERS = TokenCounter("letters", lambda texts: [len(text) for text in texts])


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 good samples in two shards, and a third with one of each fault."""
    folder = tmp_path_factory.mktemp("inspected")
    write_shards((sample(number) for number in range(80)), folder, 40)
    good = encoded(picture(1))
    write_tar(
        folder / "000002.tar",
        [
            ("nasty.png", good), ("nasty.json", as_json(captions={"short": NASTY})),
            ("twin.png", good), ("twin.json", as_json(captions={"short": "thing 7"})),
            ("cut.png", good[: len(good) // 2]), ("cut.json", as_json(captions={"short": "half a picture"})),
            ("none.png", good), ("none.json", as_json(source="web")),
            ("wide.png", encoded(picture(3, 300, 30))), ("wide.json", as_json(captions={"short": "a very wide thing"})),
            ("broken.png", good), ("broken.json", b"{nothing"),
            ("alone.json", as_json(caption="no image")), ("what.pickle", b"x"),
        ],
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def found(shards: Path) -> tuple[BatchPlan, Inspection]:
    plan = plan_of(shards)
    return plan, inspect(plan, [LETTERS], stage_of(42), InspectOptions(samples=90, captions=1000, check=100))


def stage_of(steps: int) -> TrainConfig:
    conditioning = ("max_tokens=64", "pad_multiple=8", "mask_padding=true")
    return compose_train(["data.shards=test", f"max_steps={steps}", *(f"conditioning.{one}" for one in conditioning)])


def plan_of(shards: Path) -> BatchPlan:
    return BatchPlan(load_index(expand_shards(shards)), 4, 0, make_buckets(64, 16, 2.0), {"short": 1.0, "long": 3.0})


def test_counts_buckets_and_worst_cases(found: tuple[BatchPlan, Inspection]) -> None:
    counts = found[1].counts
    assert counts["samples"] == 86 and counts["shards"] == 3
    assert (counts["without_caption"], counts["without_image"], counts["bad_json"]) == (2, 1, 1)
    assert counts["stray"] >= 1 and counts["bytes"] > 86 * 1000
    notes = " ".join(found[1].notes)
    assert "2 samples have no caption" in notes and "images that were decoded do not decode" in notes
    assert "1 entries have no image" in notes

    plan, report = found
    sizes = plan.bucket_sizes()
    assert {(row.height, row.width): row.samples for row in report.buckets} == sizes
    assert sum(row.share for row in report.buckets) == pytest.approx(1)
    # The samples of 64x64 fit their bucket whole; nothing of them is cropped, and nothing is enlarged.
    square = next(row for row in report.buckets if row.height == row.width)
    assert square.cropped < 0.2 and square.enlarged == 0
    assert report.images.formats == {"png": 86}
    assert report.images.short_side is not None and report.images.short_side.smallest == 30

    worst = {name: [s.key for s in samples] for name, samples in found[1].worst.items()}
    assert worst["most extreme aspects"][0] == "000002.tar/wide"
    assert "000002.tar/cut" in worst["images that do not decode"]
    assert set(worst["without a caption"]) == {"000002.tar/none", "000002.tar/broken"}
    assert ("000002.tar/cut", "does not decode: OSError") in found[1].undecodable
    longest = [max(s.words.values()) for s in found[1].worst["longest captions"]]
    assert longest == sorted(longest, reverse=True)
    assert longest[0] == max(kind.words.largest for kind in found[1].kinds if kind.words)


def test_words_and_tokens_are_those_of_a_plain_count(found: tuple[BatchPlan, Inspection]) -> None:
    plan, report = found
    texts: dict[str, list[str]] = {"short": [], "long": []}
    for row in range(len(plan.index)):
        for kind, text in read_sample(plan.index, row).meta["captions"].items():
            texts[kind].append(text)
    for kind in report.kinds:
        words = [len(text.split()) for text in texts[kind.kind]]
        assert kind.words is not None
        assert kind.samples == kind.words.n == len(words) == sum(kind.words.counts)
        assert kind.words.mean == pytest.approx(np.mean(words))
        assert (kind.words.smallest, kind.words.largest) == (min(words), max(words))
    assert [kind.weight for kind in report.kinds] == [0.25, 0.75]
    for row in report.tokens:
        letters = np.array([len(text) for text in texts[row.kind]])
        assert row.n == len(letters) and row.tokens.mean == pytest.approx(letters.mean())
        assert row.cut == {cut: (letters > cut).mean() for cut in (77, 256, 512)}
    assert report.repeated == [("thing 7", 2)]
    assert report.captions_read == 86


def test_padding_is_that_of_the_plan(found: tuple[BatchPlan, Inspection]) -> None:
    plan, report = found
    padding = report.padding
    assert padding is not None and padding.batches == int(plan.steps_per_epoch) == 21
    lengths, kinds = [], []
    for step in range(padding.batches):
        batch = plan.batch(step)
        names = [plan.index.kinds[kind] for kind in batch.kinds]
        captions = [read_sample(plan.index, int(row)).meta["captions"] for row in batch.rows]
        lengths.append([min(len(own[name]), 64) for own, name in zip(captions, names, strict=True)])
        kinds += names
    table = np.array(lengths)
    for share, multiple in ((padding.planned, 1), (padding.planned_rounded, 8)):
        computed = sum(min(-(-max(row) // multiple) * multiple, 64) * 4 for row in table)
        assert share == pytest.approx(1 - table.sum() / computed)
    assert padding.trained == padding.planned_rounded
    assert padding.to_limit == pytest.approx(1 - table.mean() / 64)
    assert padding.planned < padding.unsorted < padding.to_limit
    assert padding.kinds == {kind: kinds.count(kind) / len(kinds) for kind in set(kinds)}
    assert {kind.kind: kind.planned for kind in report.kinds} == padding.kinds


def test_caption_sample_says_how_many_it_read(shards: Path) -> None:
    plan = plan_of(shards)
    first, second = (inspect(plan, [LETTERS], stage_of(42), InspectOptions(samples=3, captions=20, check=5)) for _ in range(2))
    assert first.captions_read == 20 and max(row.n for row in first.tokens) <= 20
    assert figures_json(first) == figures_json(second), "a report is a function of its seed"
    assert "20 samples drawn from 86" in inspection_page(first)


def test_histograms() -> None:
    found = distribution(np.array([1, 1, 2, 3, 1000]), [0, 2, 4])
    assert found is not None and found.counts == [2, 3], "what lies beyond the last edge is in the last bin"
    assert distribution(np.array([])) is None
    for low, high in ((0, 5), (7, 7), (0, 65535), (300, 900)):
        edges = nice_edges(low, high)
        assert edges[0] <= low and edges[-1] > high and 10 <= len(edges) - 1 <= 24
    giant = distribution(np.array([*range(50, 110), 20_000]))
    assert giant is not None and sum(1 for count in giant.counts if count) >= 6, "one giant does not flatten it"
    assert giant.counts[-1] == 1 and sum(giant.counts) == 61 and giant.largest == 20_000


@in_browser
def test_page_is_shown_by_a_browser(found: tuple[BatchPlan, Inspection], tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(inspection_page(found[1]), encoding="utf-8")
    wrong: list[str] = []
    with chromium() as browser:
        tab = browser.new_page(viewport={"width": 1000, "height": 800})
        listen(tab, wrong)
        tab.goto(page.as_uri())
        assert tab.title() == "Data: test for stage 1 of nano", "a caption's markup is text"
        assert tab.locator("#samples article").count() == 86
        assert all(tab.evaluate("[...document.images].map(image => image.complete && image.naturalWidth)"))
        assert NASTY.split()[0] in tab.inner_text("#samples")
        for link in tab.locator("nav a").all():
            link.click()
            assert tab.locator(str(link.get_attribute("href"))).is_visible()
        tab.set_viewport_size({"width": 380, "height": 700})
        assert tab.evaluate("document.documentElement.scrollWidth") <= 380, "it fits a telephone"
        names = tab.locator("tbody th[scope=row]").evaluate_all("cells => cells.map(cell => cell.clientWidth)")
        assert min(names) >= 100, "a row's name is not squeezed to a letter a line"
    assert wrong == []


def test_command_writes_page_and_figures(shards: Path, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "made" / "report.html"
    more = ["samples=5", "check=10", "batch_size=4", "stage=2", "data.captions={short: 1, long: 3}"]
    status = script("inspect_data").main(["text_encoder=tiny", "tokenizers=[tiny]", f"data.shards={shards}", f"output={output}", *more])
    assert status == 0 and f"{output}: 86 samples" in capsys.readouterr().out
    assert sorted(os.listdir(output.parent)) == ["report.html", "report.json"]
    figures = json.loads(output.with_suffix(".json").read_text())
    assert figures["counts"]["samples"] == 86 and len(figures["shown"]) == 5
    assert {row["tokenizer"] for row in figures["tokens"]} == {"tiny"} and figures["padding"]["batch_size"] == 4
    html = output.read_text()
    assert "ParaImage-Big" in html and "132.9" in html and "1326 px" in html
    assert "http://" not in html and "https://" not in html
    output.with_suffix(".json").write_text("{}")
    user_error("holds no figures of this script", script("inspect_data").main, [f"output={output}"])


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("output=report.txt", "is no page"), ("output=/dev/null/report.html", "no folder that can be written to"),
        ("samples=-1", "samples=-1 is out of range"), ("samples=some", "samples=some: Value"), ("chek=3", "did you mean check"),
        ("tokenizers=[nothing]", "nothing is neither a folder nor one of .*smollm2"), ("tokenizers={tmp}", "tokenizer|config.json"),
        ("data.shards={tmp}/none.tar", "matches no|missing"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_one_sentence(argument: str, sentence: str, shards: Path, tmp_path: Path) -> None:
    given = ["text_encoder=tiny", f"data.shards={shards}", f"output={tmp_path / 'r.html'}"]
    user_error(sentence, script("inspect_data").main, [*given, argument.replace("{tmp}", str(tmp_path))])


def test_dark_flat_and_long_ones_are_found(odd: SampleIndex) -> None:
    found = check_pictures(odd, 100, 0)
    assert [odd.key(row) for row in found.dark] == ["dark"]
    assert {odd.key(row) for row in found.flat} == {"dark", "grey", "white"}
    assert found.checked == len(odd) and not found.undecodable
    report = inspected(odd)
    assert (report.dark, report.flat) == (1, 3)
    assert "3 of 86 images that were decoded are of nearly one colour" in " ".join(report.notes)
    worst = {name: [one.key.partition("/")[2] for one in rows] for name, rows in report.worst.items()}
    assert worst["very dark images"] == ["dark"] and worst["longest captions"][:2] == ["book", "chinese"]
    assert worst["captions of the most tokens, of those read"][:2] == ["book", "chinese"]


# --- captions and pictures of a set of oddities

FAMILY = "👩\u200d👩\u200d👧 a family"
BOOK = "word " * 4000
CHINESE = "木桌上有两个杯子和一碗橙子" * 30


def inspected(index: SampleIndex, steps: int = 10) -> Inspection:
    plan = BatchPlan(index, 4, 0, make_buckets(64, 16, 2.0), {"short": 1.0})
    return inspect(plan, [LETTERS], stage_of(steps), InspectOptions(samples=100, captions=1000, check=100))


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> SampleIndex:
    """80 captions, 60 of which begin alike, and one sample of each oddity."""
    members = []
    for number in range(80):
        text = f"In this image, we see number {number}" if number % 4 else f"thing {number} stands on its own"
        members += [(f"{number:03d}.png", encoded(picture(number))), (f"{number:03d}.json", as_json(captions={"short": text}))]
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
