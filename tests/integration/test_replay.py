"""A step again from the run's folder, identical to what it saw, and the page that a loss spike leaves behind."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from browser import chromium, in_browser
from commands import user_error
from data_fixtures import encoded, half_unreadable
from PIL import Image
from ranks import run_on_two
from spoiled_train import spoil_latents
from training_runs import Train, records, train_here

from paradiffusion.compose import compose_options, compose_train
from paradiffusion.curation.inspecting.replay import Replay, ReplayOptions, read_seen, replay
from paradiffusion.data.index import load_index, read_sample
from paradiffusion.data.shards import RawSample, expand_shards, write_shards
from paradiffusion.errors import UserError
from paradiffusion.training import spikes
from paradiffusion.training.caching import CacheOptions, make_cache
from paradiffusion.training.step_record import digest
from paradiffusion.training.trainer import Trainer

RECORDED = ["log_samples=true", "log_every=1", "validate_every=100", "data.caption_dropout=0.4"]


def replay_here(*arguments: str) -> tuple[Replay, Path]:
    """What scripts/replay.py does with these arguments; a UserError comes through."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return replay(compose_options(ReplayOptions, list(arguments)))


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file of a run but its replays."""
    files = (path for path in folder.rglob("*") if path.is_file() and "replay" not in path.parts)
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


@pytest.fixture(scope="module")
def own_shards(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the small set of scenes that a test may spoil."""
    index = load_index(expand_shards(demo_folder / "web"))
    folder = tmp_path_factory.mktemp("own")
    write_shards((read_sample(index, row) for row in range(48)), folder, 16)
    return folder


@pytest.fixture(scope="module")
def stage(tiny_arguments: list[str], own_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps with a checkpoint after the fourth, in two micro-batches, with everything recorded."""
    run = tmp_path_factory.mktemp("replayed") / "run"
    arguments = [*tiny_arguments, *RECORDED, f"data.shards={own_shards}", "micro_batch_size=2", "max_steps=6"]
    assert train_here([*arguments, f"run_dir={run}", "conditioning.max_tokens=24"]) == 0
    return run / "stage1"


def logged(stage: Path, step: int) -> float:
    """The loss that the log has for exactly this step."""
    return next(float(row["loss"]) for row in records(stage) if row["step"] == step + 1)


def test_replay_is_what_the_step_saw(stage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = state_of(stage)
    found, page = replay_here(f"run={stage}", "step=4")
    assert state_of(stage) == before, "a replay must leave the run alone"
    assert page == stage / "replay" / "step_000004" / "index.html"
    assert found.certain == "identical" and "all 4 slots" in found.verdict
    # Right after the checkpoint of step 4 the losses are those of the step: of its weights, not of their average.
    assert found.facts["losses"] == "with the weights that the step had, those of step_000004"
    assert found.facts["mean loss"] == pytest.approx(logged(stage, 4), rel=1e-6)
    assert [(s.rank, s.micro) for s in sorted(found.samples, key=lambda s: s.slot)] == [(0, 0), (0, 0), (0, 1), (0, 1)]


def test_page_lines_and_pictures(stage: Path) -> None:
    _, page = replay_here(f"run={stage.parent}", "step=5", f"output={stage.parent / 'elsewhere'}")
    rows = [json.loads(line) for line in page.with_name("samples.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows]
    assert losses == sorted(losses, reverse=True) and len(rows) == 4
    html = page.read_text()
    places = [html.index(f'id="slot{row["slot"]}"') for row in rows]
    assert places == sorted(places)
    assert "<script" not in html and "http" not in html.replace("http-equiv", "")
    seen = read_seen(stage, 5)
    assert seen is not None
    for row in rows:
        pixels = np.asarray(Image.open(page.parent / row["image"]))
        assert pixels.shape == (row["height"], row["width"], 3)
        found_digest = digest(pixels.transpose(2, 0, 1).tobytes(), (3, row["height"], row["width"]))
        assert found_digest == seen.samples[row["slot"]].pixels, "the picture holds the very pixels of the step"
        assert row["caption"], "a dropped caption is shown as well"
        assert row["dropped"] == (row["kept"] == "")
        assert 0 <= row["noise_share"] <= 1
    samples = [s for step in range(3) for s in replay_here(f"run={stage}", f"step={step}")[0].samples]
    assert any(s.dropped for s in samples) and any(s.truncated for s in samples)
    for sample in samples:
        if sample.truncated:
            assert sample.kept and len(sample.kept) < len(sample.caption)
        elif not sample.dropped:
            assert sample.tokens <= sample.limit and sample.kept.split() == sample.caption.split()


@in_browser
def test_page_is_shown_by_a_browser(stage: Path, tmp_path: Path) -> None:
    found, page = replay_here(f"run={stage}", "step=3", f"output={tmp_path}")
    said: list[str] = []
    with chromium() as browser:
        tab = browser.new_page(viewport={"width": 900, "height": 700})
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda asked: None if asked.url.startswith(("file:", "data:")) else said.append(asked.url))
        tab.goto(page.as_uri())
        assert tab.title() == found.title and "Identical" in tab.inner_text("[role=status]")
        assert all(tab.evaluate("[...document.images].map(image => image.complete && image.naturalWidth)"))
        assert tab.locator("main article img").count() == 4 == tab.locator("svg circle").count()
        tab.locator("svg a").last.click()  # A dot leads to its sample.
        assert tab.locator(tab.evaluate("location.hash")).is_visible()
        tab.set_viewport_size({"width": 380, "height": 700})
        assert tab.evaluate("document.documentElement.scrollWidth") <= 380, "it fits a telephone"
    assert said == []


@pytest.fixture
def spoil_shards(own_shards: Path) -> Iterator[Callable[[Callable[[RawSample], None]], None]]:
    """Changes every sample of the run's data, until the test ends."""
    kept = {path: path.read_bytes() for path in own_shards.glob("*.tar")}
    index = load_index(expand_shards(own_shards))
    samples = [read_sample(index, row) for row in range(48)]

    def spoil(change: Callable[[RawSample], None]) -> None:
        for sample in samples:
            change(sample)
        write_shards(samples, own_shards, 16)

    yield spoil
    for path, data in kept.items():
        path.write_bytes(data)


def more_words(sample: RawSample) -> None:
    sample.meta["captions"] = {kind: f"{text} too" for kind, text in sample.meta["captions"].items()}


def red(sample: RawSample) -> None:
    """Same size and words."""
    sample.image, sample.extension = encoded(Image.new("RGB", Image.open(io.BytesIO(sample.image)).size, "red")), "png"


@pytest.mark.parametrize(("change", "said", "unsaid"), [
    (more_words, "another caption", "other pixels"), (red, "other pixels", "another caption"),
])  # fmt: skip
def test_changed_data_is_noticed(
    change: Callable[[RawSample], None], said: str, unsaid: str, stage: Path, tmp_path: Path,
    spoil_shards: Callable[[Callable[[RawSample], None]], None],
) -> None:  # fmt: skip
    spoil_shards(change)
    arguments = [f"run={stage}", "step=2", f"output={tmp_path / 'out'}"]
    user_error(r"the data has changed since .*fingerprint.*force=true", replay_here, *arguments)
    assert not (tmp_path / "out").exists()
    found, _ = replay_here(*arguments, "force=true")
    assert found.certain == "different"
    slots = [sample.slot for sample in found.samples if change is red or not sample.dropped]
    assert slots and all(f"slot {slot} (" in found.verdict for slot in slots)
    assert found.verdict.count(said) == len(slots) and unsaid not in found.verdict


def test_digests_do_not_depend_on_the_number_of_processes(stage: Path, tmp_path: Path) -> None:
    recorded = read_seen(stage, 3)
    assert recorded is not None and recorded.world_size == 1 and recorded.micro_batches == 2
    found, _ = replay_here(f"run={stage}", "step=3", "world=2", f"ckpt={stage}", f"output={tmp_path / 'two'}")
    assert found.certain == "identical" and {sample.rank for sample in found.samples} == {0, 1}


def test_a_step_without_records_and_stages_with_an_adapter(train: Train, tmp_path: Path) -> None:
    assert train("max_steps=2", "checkpoint_every=2") == 0
    found, _ = replay_here(f"run={tmp_path / 'run' / 'stage1'}", "step=1")
    assert found.certain == "unknown" and "log_samples=true" in found.verdict
    assert "the oldest there is, after the step" in found.facts["losses"]

    # The adapter that stage 2 trains, and that stage 3 applies, is in the losses.
    for stage in (2, 3):
        arguments = [f"stage={stage}", *RECORDED, "max_steps=3", "checkpoint_every=2", "optimizer.lr_lora=0.01"]
        assert train(*arguments, "optimizer.warmup_steps=0") == 0
        found, _ = replay_here(f"run={tmp_path / 'run' / f'stage{stage}'}", "step=2")
        assert found.certain == "identical"
        assert found.facts["mean loss"] == pytest.approx(logged(tmp_path / "run" / f"stage{stage}", 2), rel=1e-6)
        # Before the first checkpoint: with the weights that the stage started from, wherever the run lies now.
        moved = tmp_path / f"moved{stage}"
        shutil.copytree(tmp_path / "run", moved)
        shutil.rmtree(moved / f"stage{stage}" / "checkpoints")
        first, _ = replay_here(f"run={moved / f'stage{stage}'}", "step=0")
        assert "would start from now, since there is no checkpoint" in first.facts["losses"]
        assert first.facts["mean loss"] == pytest.approx(logged(moved / f"stage{stage}", 0), rel=1e-6)


def test_the_mean_losses_are_those_of_training_where_samples_cannot_be_read(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the samples that could be read: unweighted, as in the log, and weighted by the noise, as was trained on."""
    trained, train_step = [], Trainer.train_step

    def noted(trainer: Trainer, *given: Any) -> tuple[float, bool]:
        trained.append(train_step(trainer, *given))
        return trained[-1]

    monkeypatch.setattr(Trainer, "train_step", noted)
    bad = [f"data.shards={half_unreadable(tmp_path / 'bad')}", "data.max_bad_fraction=0.9", "micro_batch_size=2"]
    arguments = [*bad, "objective=paper", "objective.min_snr_gamma=1", "repeats=2", "max_steps=4"]
    assert train(*RECORDED, *arguments, "checkpoint_every=1", "keep_last=9") == 0
    replay_here(f"run={tmp_path / 'run' / 'stage1'}", "step=0")  # with the EMA weights of the first checkpoint
    unreadable = set()
    for step in range(1, 4):
        facts = replay_here(f"run={tmp_path / 'run' / 'stage1'}", f"step={step}")[0].facts
        assert facts["mean loss"] == pytest.approx(logged(tmp_path / "run" / "stage1", step), rel=1e-6)
        assert facts["mean loss, weighted as trained"] == pytest.approx(trained[step][0], rel=1e-6)
        assert facts["mean loss"] != pytest.approx(trained[step][0], rel=1e-2)
        unreadable.add(facts["unreadable"])
    assert unreadable & {1, 2, 3}


def test_shards_that_have_moved(stage: Path, own_shards: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    own_shards.rename(moved)
    try:
        with pytest.raises(UserError, match=r"data.shards=.* matches no .tar file.*name their place with shards="):
            replay_here(f"run={stage}", "step=2", f"output={tmp_path / 'out'}")
        found, _ = replay_here(f"run={stage}", "step=2", f"output={tmp_path / 'out'}", f"shards={moved}")
        assert found.certain == "identical"
    finally:
        moved.rename(own_shards)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("step=1", "run= is missing"), ("run={stage}", "step= is missing"), ("run={stage} step=-1", "step=-1 is out of range"),
        ("run={stage} step=6", "step=6 is beyond the run .*the last one is 5"), ("run={stage} step=two", "step=two: Value.*Integer"),
        ("run={stage}/.. step=1 world=3", "not a whole multiple"), ("run={stage} step=1 world=0", "world=0 is out of range"),
        ("run={stage}/checkpoints step=1", "holds no config.json"), ("run=nowhere step=1", "run=nowhere holds no config.json"),
        ("run={stage} step=1 ckpt=nowhere", "ckpt=nowhere holds no checkpoint"),
        ("run={stage} step=1 output={stage}/config.json", "is a file"),
        ("run={stage} step=1 output={stage}/config.json/inside", "config.json is a file"),
        ("run={stage} stepp=1", "'stepp=1' is not understood"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_one_sentence(arguments: str, sentence: str, stage: Path) -> None:
    user_error(sentence, replay_here, *(argument.replace("{stage}", str(stage)) for argument in arguments.split()))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def same_pictures(spike: Path, page: Path) -> None:
    """The pictures of the run and those of the replay are the same to the byte."""
    for path in (spike / "images").iterdir():
        assert path.read_bytes() == (page.parent / "images" / path.name).read_bytes()


@pytest.mark.parametrize("cached", [False, True])
def test_spike_leaves_its_page(
    cached: bool, train: Train, tiny_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """With its pictures, also where only their latents were read; the replay by hand lies beside it."""
    cache, stage = tmp_path / "cache", tmp_path / "run" / "stage1"
    if cached:
        assert make_cache(compose_train([*tiny_arguments, "stage=1"]), CacheOptions(output=str(cache))) == 0
    seen = spoil_latents(monkeypatch, {5}, math.nan)
    assert train("on_spike=skip", "max_steps=6", "log_samples=true", *([f"data.cache={cache}"] if cached else [])) == 0
    folder = stage / "replay" / "step_000005" / "spike"
    assert f"{folder / 'index.html'} shows them" in capsys.readouterr().out
    rows = rows_of(folder)
    assert [row["key"] for row in rows] == seen[5] and {row["loss"] for row in rows} == {"nan"}
    html = (folder / "index.html").read_text()
    assert "loss spike at step 5" in html and html.count("data:image/") == 4 == len(list((folder / "images").glob("*.png")))
    found, page = replay_here(f"run={stage}", "step=5")
    assert found.certain == "identical" and ("its latents came from a cache" in found.verdict) == cached
    assert (folder / "index.html").read_text() == html
    same_pictures(folder, page)


def test_pages_of_spikes_are_few_and_never_stop_a_run(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil_latents(monkeypatch, set(range(1, 8)), math.nan)
    assert train("on_spike=skip", "max_steps=9") == 0
    stage = tmp_path / "run" / "stage1"
    assert len(list(stage.glob("replay/step_*/spike/index.html"))) == spikes.MAX_PAGES == 5

    def broken(*_: Any) -> Path:
        raise OSError("no space left on device")

    monkeypatch.setattr(spikes, "write_replay", broken)
    capsys.readouterr()
    assert train("on_spike=skip", f"run_dir={tmp_path / 'other'}", "max_steps=3") == 0
    out = capsys.readouterr().out
    assert "warning: the page of step 1 could not be written (OSError: no space left on device)." in out
    assert "its update is skipped" in out and "shows them" not in out


def test_two_processes_write_one_page_and_are_replayed(tiny_arguments: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [*tiny_arguments, "log_samples=true", "on_spike=skip", "max_steps=4", f"run_dir={run}"]
    ended, said = run_on_two("tests/support/spoiled_train.py", "2", *arguments)
    assert ended == [0, 0], said[-4000:]
    folder = run / "stage1" / "replay" / "step_000002" / "spike"
    assert said.count(f"{folder / 'index.html'} shows them") == 1
    assert sorted((row["slot"], row["rank"]) for row in rows_of(folder)) == [(0, 0), (1, 1), (2, 0), (3, 1)]
    assert len(list((folder / "images").glob("*.png"))) == 4
    found, page = replay_here(f"run={run / 'stage1'}", "step=2")
    assert found.certain == "identical" and {(s.slot, s.rank) for s in found.samples} == {(s, s % 2) for s in range(4)}
    same_pictures(folder, page)
