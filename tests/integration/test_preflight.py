"""The preflight: the hardest batch, what it took, and nothing left behind."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from commands import Command, user_error
from training_runs import build_here, train_here

from paradiffusion.compose import compose_train
from paradiffusion.errors import UserError
from paradiffusion.training.engine import make_accelerator
from paradiffusion.training.preflight import Findings, hardest, preflight, report
from paradiffusion.training.trainer import Trainer


def run(arguments: list[str]) -> Findings:
    AcceleratorState._reset_state(reset_partial_state=True)
    config = compose_train(arguments)
    return preflight(config, make_accelerator(config))


def test_it_says_what_a_step_takes_and_leaves_nothing(tiny_arguments: list[str], tmp_path: Path, command: Command) -> None:
    arguments = [*tiny_arguments, f"run_dir={tmp_path / 'some' / 'run'}", "validation.images=2"]
    result = command("train.py", *arguments, "stage=2", "preflight=true")
    assert result.returncode == 0, result.stderr
    out = result.stdout
    assert "preflight of stage 2: bucket 64x64" in out
    assert re.search(r"peak memory +\d+\.\d+ GiB per process", out) and re.search(r"time per step +\d+\.\d+ s", out)
    assert re.search(r"checkpoint +0\.00\d GiB; .* \d+\.\d GiB are free", out)
    assert list(tmp_path.iterdir()) == []


def test_the_findings_are_those_of_the_run(tiny_arguments: list[str], tmp_path: Path) -> None:
    """Disk, words and bucket agree with what a real run does afterwards in the same folder."""
    arguments = [*tiny_arguments, f"run_dir={tmp_path / 'run'}", "micro_batch_size=2"]
    found = run([*arguments, "preflight=true"])
    assert train_here([*arguments, "max_steps=1"]) == 0
    checkpoint = tmp_path / "run" / "stage1" / "checkpoints" / "step_000001"
    size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    assert found.checkpoint == pytest.approx(size, rel=0.02)
    assert (found.height, found.width) == (64, 64) and found.device == "process"
    assert "validation      none, since data.val_shards is not set" in report(compose_train([*arguments, "data.val_shards=null"]), found)
    assert found.step > 0 and found.first_step > 0 and 0 < found.memory < 50
    before = sorted(path for path in tmp_path.rglob("*"))
    user_error("has checkpoints already", run, [*arguments, "preflight=true"])  # and leaves it alone
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_hardest_takes_the_largest_bucket_and_the_longest_captions(tiny_arguments: list[str], tmp_path: Path) -> None:
    plan = build_here([*tiny_arguments, f"run_dir={tmp_path}", "data.captions={long: 1.0}"]).plan
    bucket, rows, kinds = hardest(plan, 6)
    counts = plan.bucket_sizes()
    assert bucket[0] * bucket[1] == max(h * w for (h, w), count in counts.items() if count)
    assert set(rows) <= set(plan.rows_of(bucket)) and len(set(rows)) == 6
    long = plan.index.kinds.index("long")
    assert (kinds == long).all()
    words = np.sort(plan.index.words[plan.rows_of(bucket), long])
    assert sorted(plan.index.words[rows, long]) == words[-6:].tolist()
    # Fewer samples than a batch: they repeat.
    assert len(hardest(plan, 1000)[1]) == 1000


def test_out_of_memory_names_the_keys_and_leaves_nothing(
    tiny_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflow(*_: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")

    monkeypatch.setattr(Trainer, "train_step", overflow)
    with pytest.raises(UserError, match=r"tried to allocate 20.00 GiB.*lower micro_batch_size= first.*gradient_checkpointing"):
        run([*tiny_arguments, f"run_dir={tmp_path / 'run'}", "preflight=true"])
    assert list(tmp_path.iterdir()) == []
