"""A selection that is taken up again: after a mistake, after its shards were moved, in a second round; and large ones."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from data_fixtures import encoded, picture
from tiny_clip import write_candidates, write_clip

from paradiffusion.curation.choosing import selection
from paradiffusion.curation.choosing.candidates import Candidates
from paradiffusion.curation.choosing.decisions import DecisionLog
from paradiffusion.curation.choosing.kept import export
from paradiffusion.curation.choosing.score_files import load_scores, move_root, scored_names
from paradiffusion.curation.choosing.scoring import Scoring, score_shards
from paradiffusion.curation.choosing.select_steps import SelectOptions, run_step
from paradiffusion.curation.choosing.selection import Choosing, choose, choose_varied, clusters_of
from paradiffusion.data.index import load_index, read_sample
from paradiffusion.data.shards import RawSample, expand_shards, write_shards
from paradiffusion.errors import UserError
from paradiffusion.metrics.clip import Clip


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "tiny")


def write_samples(folder: Path, *keys: str) -> None:
    samples = [
        RawSample(key, encoded(picture(number)), "png", {"captions": {"long": f"a {key}"}, "licence": "CC0"})
        for number, key in enumerate(keys)
    ]
    write_shards(samples, folder, 10)


def keep_all(work: Path, **changes: str) -> None:
    """A person keeps every candidate, and edits the first one as ``changes`` say."""
    log = DecisionLog(work / "decisions.jsonl")
    for number, one in enumerate(Candidates.load(work).all):
        fields = {"decision": "keep", **(changes if number == 0 else {})}
        log.record({"event": one.sample, "sample": one.sample, "reviewer": "anna", "at": 1, "set": fields})
    log.close()


def test_a_model_that_could_not_be_loaded_does_not_bind_the_folder(clip_folder: Path, tmp_path: Path) -> None:
    write_samples(tmp_path / "shards", "cat")
    shards, work = expand_shards(tmp_path / "shards"), tmp_path / "work"
    with pytest.raises(UserError, match="could not be loaded"):
        score_shards(shards, work, Scoring("nonsense:openai"))
    assert score_shards(shards, work, Scoring(str(clip_folder))) == 1
    with pytest.raises(UserError, match="holds scores made with clip="):
        score_shards(shards, work, Scoring("nonsense:openai"))
    (work / "scoring.json").write_text('{"clip"')
    with pytest.raises(UserError, match=r"scoring\.json cannot be read"):
        score_shards(shards, work, Scoring(str(clip_folder)))


def test_a_root_that_holds_none_of_the_shards_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    write_samples(tmp_path / "a", "cat")
    work, scoring = tmp_path / "work", Scoring(str(clip_folder))
    assert score_shards(expand_shards(tmp_path / "a"), work, scoring) == 1
    (tmp_path / "a2").mkdir()
    (tmp_path / "a" / "000000.tar").rename(tmp_path / "a2" / "000000.tar")  # the folder stays, as a mount point does
    with pytest.raises(UserError, match="add shard_root="):
        score_shards(expand_shards(tmp_path / "a2"), work, scoring)
    with pytest.raises(UserError, match="holds none of the shards that were scored from"):
        move_root(work, str(tmp_path), scored_names(work))
    move_root(work, str(tmp_path / "a2"), scored_names(work))
    assert score_shards(expand_shards(tmp_path / "a2"), work, scoring) == 0


def test_a_selection_goes_on_after_its_shards_were_moved(clip_folder: Path, tmp_path: Path) -> None:
    for place in ("here/a", "here/b"):
        write_samples(tmp_path / place, "cat", "dog")
    work, scoring = tmp_path / "work", Scoring(str(clip_folder))
    shards = expand_shards([tmp_path / "here" / "a", tmp_path / "here" / "b"])
    assert score_shards(shards, work, scoring) == 4
    choose(work, Choosing())
    before = (work / "candidates.jsonl").read_bytes()
    assert {json.loads(line)["shard"] for line in before.splitlines()} == {"a/000000.tar", "b/000000.tar"}
    keep_all(work)

    (tmp_path / "here").rename(tmp_path / "there")
    moved = expand_shards([tmp_path / "there" / "a", tmp_path / "there" / "b"])
    here = str(tmp_path / "here")
    with pytest.raises(UserError, match=f"2 of 2 shards .*what was in {here}"):
        export(work, tmp_path / "out")
    with pytest.raises(UserError, match=f"from the folder {here}"):  # each picture would be a candidate twice
        score_shards(moved, work, scoring)
    assert len(load_scores(work)) == 4

    def step(action: str, root: Path, **keys: str) -> int:
        return run_step(SelectOptions(action=action, folder=str(work), shard_root=str(root), **keys))

    with pytest.raises(UserError, match="is no folder"):
        step("choose", tmp_path / "nowhere")
    assert step("export", tmp_path / "there", output=str(tmp_path / "out")) == 0
    assert len(load_index(expand_shards(tmp_path / "out"))) == 4
    assert score_shards(moved, work, scoring) == 0  # recorded: nothing is asked or done again
    choose(work, Choosing())
    assert (work / "candidates.jsonl").read_bytes() == before  # the same samples under the same names


def test_a_folder_whose_shards_are_named_by_whole_paths_is_read(tmp_path: Path) -> None:
    work = write_candidates(tmp_path / "work", ["a", "b"])
    assert not (work / "scoring.json").exists() and len(Candidates.load(work).all) == 2
    with pytest.raises(UserError, match="records no folder of shards"):
        run_step(SelectOptions(action="choose", folder=str(work), shard_root=str(tmp_path)))
    shutil.rmtree(tmp_path / "shards")
    with pytest.raises(UserError, match=r"1 of 1 shards .* are missing; bring them back"):
        Candidates.load(work)


def test_a_second_round_keeps_what_the_first_one_knew(clip_folder: Path, tmp_path: Path) -> None:
    write_samples(tmp_path / "shards", "cat", "dog")
    images = [read_sample(load_index(expand_shards(tmp_path / "shards")), row).image for row in range(2)]
    source = tmp_path / "shards"
    for turn in ("first", "second"):
        score_shards(expand_shards(source), tmp_path / turn, Scoring(str(clip_folder)))
        choose(tmp_path / turn, Choosing(weights={"words": 1.0}))
        # Typed back in the second round: still the text of the first.
        keep_all(tmp_path / turn, caption="A person wrote this.")
        source = tmp_path / f"{turn}_shards"
        export(tmp_path / turn, source)
    index = load_index(expand_shards(source))
    edited, kept = read_sample(index, 0), read_sample(index, 1)
    assert [edited.image, kept.image] == images
    assert (
        edited.meta["captions"] == {"long": "a cat", "clean": "A person wrote this."}
        and edited.meta["licence"] == "CC0"
    )
    assert edited.meta["caption_sources"]["clean"] == "person"
    assert kept.meta["caption_sources"]["clean"] == "long, kept by a person"
    assert edited.meta["review"]["editor"] is None
    earlier = edited.meta["review"]["earlier"]
    assert earlier["source_key"] == "cat" and earlier["review"]["editor"] == "anna"


def test_two_exports_at_once_do_not_mix(tmp_path: Path) -> None:
    work = write_candidates(tmp_path / "work", ["a", "b"])
    keep_all(work)
    other = tmp_path / ".out.part"
    other.mkdir()
    (other / "000007.tar.partial").write_bytes(b"half")
    lock = os.open(other, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)  # as an export does that is at work
    with pytest.raises(UserError, match="another export writes"):
        export(work, tmp_path / "out")
    assert (other / "000007.tar.partial").exists()
    os.close(lock)  # it was killed
    assert export(work, tmp_path / "out").kept == 2
    assert not list((tmp_path / "out").glob("*.partial"))


def test_where_nothing_passes_the_threshold_and_the_scores_are_told(tmp_path: Path) -> None:
    work = write_candidates(tmp_path / "work", ["a"] * 11)
    with pytest.raises(UserError) as raised:
        choose(work, Choosing(minimum={"aesthetic": 8.95}, maximum={"aesthetic": 8.905}))
    told = str(raised.value)
    assert "aesthetic <= 8.905 removes 10 by itself (aesthetic >= 8.95 5)" in told
    assert "between 8.9 and 9 (10 % below 8.91, half below 8.95, 90 % below 8.99)" in told
    with pytest.raises(UserError, match="did you mean 'aesthetic'"):
        choose(work, Choosing(minimum={"asthetic": 5}))
    with pytest.raises(UserError, match="text_detector="):
        choose(work, Choosing(maximum={"text_area": 0.1}))
    lines = list(choose(work, Choosing(count=50)).lines())
    assert any("ranked by aesthetic" in line for line in lines) and any("fewer than count=50" in line for line in lines)


def test_features_that_overflowed_make_a_row_and_no_crash(
    clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_samples(tmp_path / "shards", "cat", "dog", "cow")
    real = Clip.image_features

    def overflown(self: Clip, pixels: torch.Tensor) -> torch.Tensor:
        features = real(self, pixels).clone()
        features[1:2] = torch.nan
        return features

    calls = iter([real, overflown])  # the probe, the batch, and then what is left of it
    monkeypatch.setattr(Clip, "image_features", lambda self, pixels: next(calls, real)(self, pixels))
    score_shards(expand_shards(tmp_path / "shards"), tmp_path / "work", Scoring(str(clip_folder)))
    table = load_scores(tmp_path / "work")
    assert table.unreadable.tolist() == [False, True, False]
    report = choose(tmp_path / "work", Choosing(clusters=2, weights={"words": 1.0}))
    assert (report.unreadable, report.chosen) == (1, 2)


def test_clusters_of_many_rows_are_those_of_the_centres_of_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_FITTED", 100)
    monkeypatch.setattr(selection, "_BLOCK", 64)
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, 500)
    features = (np.eye(8)[truth] + 0.05 * rng.standard_normal((500, 8))).astype(np.float16)
    found = clusters_of(features, 4, seed=1)
    assert len({(a, b) for a, b in zip(truth, found, strict=True)}) == 4
    assert (found == clusters_of(features, 4, seed=1)).all()
    choice = choose_varied(rng.random(500), features, found, count=8, max_similarity=2.0)
    assert sorted(np.bincount(truth[choice.rows]).tolist()) == [2, 2, 2, 2]
