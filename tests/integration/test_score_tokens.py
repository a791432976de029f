"""conditioning.scores from the shards' JSON to pictures and exports: exact on resume, dropped with captions, asked for in sampling."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from commands import user_error
from training_runs import assert_same_bits, build_here, drawn_here, newest, records, sample_here, tensors, train_here

from paradiffusion.checkpoints.layouts import find_checkpoint
from paradiffusion.data.index import load_index, read_sample
from paradiffusion.data.shards import expand_shards
from paradiffusion.sampling.diffusers_pipeline import ParaDiffusionPipeline
from paradiffusion.sampling.pipeline import load_models
from paradiffusion.scenes.drawing import cleanliness, draw
from paradiffusion.scenes.world import make_scene
from scripts.cache import main as cache
from scripts.describe import main as describe
from scripts.export import main as export

SCORES = "conditioning.scores={cleanliness: 4}"
PROMPT = "a red circle at the left of a blue square"
EDGES, TOKENS = "refiner/model.safetensors:scores.edges", "refiner/model.safetensors:scores.tokens"


@pytest.fixture(scope="module")
def arguments(tiny_arguments: list[str]) -> list[str]:
    return [*tiny_arguments, SCORES, "data.caption_dropout=0.5", "optimizer.lr_conditioning=0.02", "validate_every=4"]


@pytest.fixture(scope="module")
def run(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 1 of eight steps, stopped after four and resumed."""
    folder = tmp_path_factory.mktemp("scores") / "run"
    for steps in (4, 8):
        assert train_here([*arguments, f"max_steps={steps}", f"run_dir={folder}"]) == 0
    return folder


def stored(demo_folder: Path, name: str = "web") -> list[float]:
    """The scores in a set's JSON, in order."""
    index = load_index(expand_shards(str(demo_folder / name)))
    return [read_sample(index, row).meta["scores"]["cleanliness"] for row in range(len(index))]


def drawn(checkpoint: Path, folder: Path, *asked: str) -> np.ndarray:
    return drawn_here(folder, f"ckpt={checkpoint}", f"prompt={PROMPT}", "steps=3", "threads=1", *asked)


def test_scenes_say_how_clean_they_are_drawn(demo_folder: Path) -> None:
    web, val = stored(demo_folder), stored(demo_folder, "val")
    assert set(val) == {0.0} and max(web) < 0 and len(set(web)) > 100
    scene = make_scene("web", 0, 3)
    assert cleanliness(scene, draw(scene)) == pytest.approx(web[3], abs=1e-3)


def test_a_resumed_run_and_the_next_stage_have_the_same_bins(run: Path, arguments: list[str], demo_folder: Path, tmp_path: Path) -> None:
    assert train_here([*arguments, f"run_dir={tmp_path / 'whole'}"]) == 0
    assert_same_bits(newest(run / "stage1"), newest(tmp_path / "whole" / "stage1"))
    edges = tensors(newest(run / "stage1"))[EDGES]
    values = torch.tensor(stored(demo_folder))
    sizes = torch.bucketize(values, edges[0], right=True).bincount(minlength=4)
    assert (sizes / len(values) - 0.25).abs().max() < 0.03
    assert train_here([*arguments, f"run_dir={run}", "stage=2", "max_steps=2"]) == 0  # of the set "big", whose scores are others
    assert torch.equal(tensors(newest(run / "stage2"))[EDGES], edges)
    said = user_error("conditioning.scores", train_here, [*arguments, f"run_dir={run}", "stage=3", "conditioning.scores={}"])
    assert "cleanliness" in said


def test_all_bins_are_learned_and_the_losses_are_finite(run: Path, arguments: list[str], tmp_path: Path) -> None:
    assert train_here([*arguments, f"run_dir={tmp_path / 'one'}", "max_steps=1", "checkpoint_every=1"]) == 0
    first, last = (tensors(newest(folder / "stage1"))[TOKENS] for folder in (tmp_path / "one", run))
    assert ((first - last).abs().amax(-1) > 1e-4).all()
    assert all(np.isfinite(row["loss"]) for row in records(run / "stage1")) and records(run / "stage1", "validation")


@pytest.mark.parametrize("kept", ["", "keep_gb=1", "data.cache", "data.workers=1", "data.streaming=true"])
def test_a_sample_is_told_its_own_score_unless_its_caption_is_dropped(
    kept: str, run: Path, arguments: list[str], demo_folder: Path, tmp_path: Path
) -> None:
    given = [*arguments, f"run_dir={run}", "max_steps=12", "batch_size=16", "resume=false", f"init_from={newest(run / 'stage1')}"]
    given = [one for one in given if not one.startswith("run_dir=")] + [f"run_dir={tmp_path / 'run'}"]
    if kept == "data.cache":
        assert cache([*given, "what=both", f"output={tmp_path / 'cache'}"]) == 0
        kept = f"data.cache={tmp_path / 'cache'}"
    trainer = build_here([*given, *([kept] if kept else [])])
    batches, edges = trainer.loader(), trainer.joint.score_tokens.edges[0]  # type: ignore[union-attr]
    own = {f"000000.tar/web-{number:06d}": score for number, score in enumerate(stored(demo_folder))}
    seen = set()
    for _ in range(3):
        batch = next(batches)
        scores = trainer.encode(batch).scores
        assert scores is not None
        for key, caption, told in zip(batch.keys, batch.captions, scores[:, 0].tolist(), strict=True):
            assert told == (1 + int(torch.bucketize(torch.tensor(own[key]), edges, right=True)) if caption else 0)
            seen.add(told)
    batches.close()
    trainer.close()
    assert seen == {0, 1, 2, 3, 4}


def test_sampling_asks_for_the_highest_bin_unless_it_is_told(run: Path, arguments: list[str], tmp_path: Path) -> None:
    stage = run / "stage1"
    best = drawn(stage, tmp_path / "best")
    assert np.array_equal(drawn(stage, tmp_path / "same", "score_bins={cleanliness: 4}"), best)
    worst = drawn(stage, tmp_path / "worst", "score_bins={cleanliness: 1}")
    assert not np.array_equal(worst, best)
    own = [*arguments, f"run_dir={tmp_path / 'low'}", "sampler.score_bins={cleanliness: 1}", "max_steps=1"]
    assert train_here(own) == 0 and load_models(find_checkpoint(tmp_path / "low")).sampler.score_bins == {"cleanliness": 1}
    models = load_models(find_checkpoint(stage))
    tokens = models.joint.score_tokens.tokens[0]  # type: ignore[union-attr]
    told, untold = models.encode([PROMPT, "a star"], {}), models.encode([PROMPT])
    assert told.mask is not None and told.mask[:, 0].all() and told.null_mask is not None and told.null_mask[:, 0].all()
    assert torch.equal(told.features[:, 0], tokens[[4, 4]]) and torch.equal(untold.features[0, 0], tokens[0])
    assert torch.equal(told.null_features[:, 0], tokens[[0]]) and torch.equal(told.null_features, untold.null_features)
    # The negative prompt takes the null prompt's place, and says as little of scores.
    negative = drawn(stage, tmp_path / "negative", "negative_prompt=blue", "guidance=3")
    assert not np.array_equal(negative, best)
    for wrong in ("{cleanliness: 5}", "{sharpness: 1}"):
        asked = (f"ckpt={stage}", f"prompt={PROMPT}", f"output_dir={tmp_path / 'wrong'}", f"score_bins={wrong}")
        assert "cleanliness: 0 to 4" in user_error("score_bins=", sample_here, *asked)


def test_it_is_exported(run: Path, tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    stage, low = run / "stage1", "score_bins={cleanliness: 1}"
    expected = drawn(stage, tmp_path / "mine", low)
    for layout in ("ours", "pipeline"):
        assert export([f"ckpt={stage}", f"to={layout}", f"output={tmp_path / layout}"]) == 0
        assert np.abs(drawn(tmp_path / layout, tmp_path / "of" / layout, low) - expected).max() <= 1
    pipe = ParaDiffusionPipeline.from_pretrained(str(tmp_path / "pipeline"))
    for asked in ({"score_bins": {"cleanliness": 1}}, {"score_bins": {"cleanliness": 4}}, {}):
        image = pipe(PROMPT, num_inference_steps=3, generator=torch.Generator().manual_seed(0), **asked).images[0]
        same = np.abs(np.asarray(image).astype(int) - expected).max() <= 1
        assert same == (asked.get("score_bins") == {"cleanliness": 1})
    user_error("score_bins={cleanliness: 9}", pipe, PROMPT, score_bins={"cleanliness": 9})
    user_error("tokens of scores", export, [f"ckpt={stage}", "to=official", f"output={tmp_path / 'official'}"])
    capsys.readouterr()
    assert describe([*arguments, "format=json"]) == 0
    with_scores = capsys.readouterr().out
    assert describe([*(one for one in arguments if one != SCORES), "format=json"]) == 0
    assert with_scores != capsys.readouterr().out


def test_a_student_is_distilled_with_its_scores(run: Path, arguments: list[str], tmp_path: Path) -> None:
    stage = ["stage=4", "objective.distill_steps=2", "objective.distill_substeps=2", "objective.distill_guidance=[1,4]", "sampler.steps=2"]
    given = [*arguments, *stage, "sampler.guidance=2.5", f"init_from={run / 'stage1'}", f"run_dir={tmp_path / 'run'}", "max_steps=2"]
    assert train_here(given) == 0
    student = tmp_path / "run" / "stage4"
    best = drawn(student, tmp_path / "best", "steps=2")
    assert not np.array_equal(drawn(student, tmp_path / "worst", "steps=2", "score_bins={cleanliness: 1}"), best)
