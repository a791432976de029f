"""The best checkpoint that is kept, the end of a stage that gets no better, and prompts of the user's own that cannot be read."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from commands import user_error
from ranks import run_on_two
from training_runs import Train, at_step, newest, records, sample_here, steps_saved

from paradiffusion.checkpoints.layouts import find_checkpoint
from paradiffusion.compose import compose_train
from paradiffusion.errors import UserError
from paradiffusion.training import trainer as training
from paradiffusion.training.trainer import Trainer
from paradiffusion.training.validation import Validation

BEST = ("keep_best=loss_long", "validate_every=2", "checkpoint_every=3", "keep_last=1", "log_every=1")


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """The held-out loss at each step, to be filled in; 9 at others."""
    found: dict[int, float] = {}
    validate = Trainer.validate

    def validated(trainer: Trainer) -> Any:
        value = found.get(trainer.state.step, 9.0)
        monkeypatch.setattr(Validation, "losses", lambda *_: ({"loss_long": value}, [(value, 0.5, 10)]))
        return validate(trainer)

    monkeypatch.setattr(Trainer, "validate", validated)
    return found


def test_the_best_checkpoint_is_kept_over_stops_and_drawn_from(
    train: Train, tmp_path: Path, losses: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = tmp_path / "run" / "stage1"
    losses |= {2: 4.0, 4: 3.0, 6: 3.0, 8: float("nan"), 12: 2.0}
    for calls, saved in ((4, [2, 4]), (3, [4, 7])):
        with monkeypatch.context() as patched:
            patched.setattr(Trainer, "train_step", at_step(calls, lambda: os.kill(os.getpid(), signal.SIGINT)))
            assert train("max_steps=14", *BEST) == 128 + signal.SIGINT
        assert steps_saved(stage) == saved
    # The stop at step 4 came before its validation, which was made up for; as good is not better; NaN is nothing.
    assert (stage / "best").read_text().strip() == "checkpoints/step_000004"
    assert train("max_steps=9", *BEST) == 0
    assert steps_saved(stage) == [4, 9]
    assert json.loads((stage / "summary.json").read_text())["best"] == {"step": 4, "loss_long": 3.0}
    out = tmp_path / "out"
    assert sample_here(f"ckpt={stage / 'best'}", "prompt=a red circle", "steps=2", f"output_dir={out}") == 0
    assert json.loads((out / "manifest.jsonl").read_text())["step"] == 4
    assert find_checkpoint(stage).folder == newest(stage) == find_checkpoint(stage / "checkpoints" / "latest").folder
    assert train("max_steps=14", *BEST) == 0
    assert steps_saved(stage) == [12, 14]
    shutil.rmtree(stage / "checkpoints" / "step_000012")
    user_error("best holds no checkpoint", find_checkpoint, stage / "best")


def test_a_stage_that_gets_no_better_ends_as_if_done(
    train: Train, tmp_path: Path, losses: dict[int, float], capsys: pytest.CaptureFixture[str]
) -> None:
    stage = tmp_path / "run" / "stage1"
    losses |= {2: 2.0, 4: 1.0, 6: 3.0, 8: 4.0}
    ended = ("max_steps=90", *BEST, "patience=2")
    for _ in range(2):  # the second time there is nothing to do
        assert train(*ended) == 0
        assert steps_saved(stage) == [4, 8] and [row["step"] for row in records(stage)] == list(range(1, 9))
        assert [row["step"] for row in records(stage, "validation")] == [2, 4, 6, 8]
    said = capsys.readouterr().out
    assert said.count("stage 1 ends at step 8 of 90: after step 4 (its loss_long is 1.0000) 2 validations") == 1
    assert "stage 1 is complete at step 8" in said
    summary = json.loads((stage / "summary.json").read_text())
    assert summary["steps"] == 8 and summary["patience"] == 2 and summary["validation"] == {"loss_long": 4.0}
    assert train("stage=2", "max_steps=1") == 0
    said = capsys.readouterr().out
    assert "starting from" in said and "not the end" not in said
    assert train("stage=1", *ended[:-1], "patience=3") == 0  # goes on
    assert json.loads((stage / "summary.json").read_text())["steps"] == 10


def test_binding_is_scored_at_each_validation(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ("max_steps=4", "validate_every=2", "keep_best=binding")
    assert train(*chosen, "validation.scenes=8") == 0
    stage = tmp_path / "run" / "stage1"
    scores = {row["step"]: row["binding"] for row in records(stage, "validation")}
    summary = json.loads((stage / "summary.json").read_text())
    assert set(scores) == {2, 4} and scores[4] == summary["alignment"]["drawn"]["binding"]["share"]
    assert summary["best"] == {"step": min(scores, key=lambda step: -scores[step]), "binding": max(scores.values())}
    found = {2: 0.1, 4: 0.3, 6: 0.2}
    with monkeypatch.context() as patched:
        patched.setattr(Validation, "binding", lambda _, models: {"binding": found[models.step]})
        assert train("max_steps=6", *chosen[1:], "validation.scenes=8", f"run_dir={tmp_path / 'more'}") == 0
    best = json.loads((tmp_path / "more" / "stage1" / "summary.json").read_text())["best"]
    assert best == {"step": 4, "binding": 0.3}  # more is better
    with pytest.raises(UserError, match=r"binding .* two colours"):  # the first scene has one object
        train(*chosen, "validation.scenes=1", f"run_dir={tmp_path / 'other'}")


def test_two_processes_keep_the_same_best_and_end_together(tiny_arguments: list[str], tmp_path: Path) -> None:
    still = ("optimizer.lr=1e-30", "optimizer.lr_conditioning=1e-30")  # nothing is learned: the first is the best
    ended, said = run_on_two("train.py", *tiny_arguments, *still, *BEST, "patience=2", "max_steps=40", f"run_dir={tmp_path}")
    assert ended == [0, 0], said
    assert "stage 1 ends at step 6 of 40: after step 2 " in said
    assert steps_saved(tmp_path / "stage1") == [2, 6]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["patience=2"], "patience=2 counts"),
        (["keep_best=loss_long", "data.val_shards=null"], r"data\.val_shards"),
        (["keep_best=binding", "validation.scenes=0"], r"validation\.scenes"),
        (["keep_best=fid"], "loss_long, binding"),
    ],
)
def test_a_best_without_a_measure_is_refused(arguments: list[str], said: str) -> None:
    user_error(said, compose_train, arguments)


@pytest.mark.parametrize(("content", "said"), [(None, "does not exist"), ("\n", "holds no prompts")])
def test_prompts_that_cannot_be_read_are_told_before_models_are_loaded(
    content: str | None, said: str, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr(training, "load_text_encoder", lambda *_, **__: pytest.fail("a model was loaded"))
    user_error(rf"validation\.prompts=.*{said}", train, f"validation.prompts={path}")
