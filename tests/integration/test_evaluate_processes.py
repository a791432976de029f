"""scripts/evaluate.py as processes: two that share the work, one that is killed, and help."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, wait_for
from evaluations import EXACT, SCRIPT, evaluate_here, make_run
from PIL import Image
from training_runs import free_port

from paradiffusion.evaluation.suites.load import suites

Command = Callable[..., subprocess.CompletedProcess[str]]
SIX = ("suite=scenes", "count=6", EXACT)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, codec_folder: Path) -> Path:
    return make_run(tmp_path_factory.mktemp("evaluate") / "runs" / "tiny", codec_folder)


def pictures(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in (folder / "images").glob("0*.png")}


def test_two_processes_give_what_one_gives(made: Path, tmp_path: Path, command: Command) -> None:
    arguments = (f"ckpt={made}", *SIX, "counterfactual=2", "scores=[scenes,sentences,segments,counterfactual]")
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    done = command(*launcher, str(SCRIPT), *arguments, f"output_dir={tmp_path / 'two'}", "threads=1")
    assert done.returncode == 0, done.stderr
    assert evaluate_here(*arguments, f"output_dir={tmp_path / 'one'}") == 0
    one, two = pictures(tmp_path / "one"), pictures(tmp_path / "two")
    assert one.keys() == two.keys() and len(one) == 6
    # Their batches are not of one size, which rounds differently.
    assert all(np.abs(image - two[name]).max() <= 1 for name, image in one.items())
    # Of the same pictures both say the same.
    shutil.copytree(tmp_path / "two" / "images", tmp_path / "again" / "images")
    assert evaluate_here(*arguments, f"output_dir={tmp_path / 'again'}") == 0
    again, two_said = ((tmp_path / name / "evaluation.json").read_bytes() for name in ("again", "two"))
    assert again == two_said
    assert done.stdout.count("Look at") == 2  # the pictures, and the report: said once


def test_killed_and_started_again(made: Path, tmp_path: Path) -> None:
    arguments = [f"ckpt={made}", *SIX[:2], "scores=[]", f"output_dir={tmp_path / 'out'}", "batch_size=1", "steps=40"]
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    images = tmp_path / "out" / "images"
    try:
        wait_for(lambda: len(list(images.glob("0*.png"))) > 1 or process.poll() is not None, interval=0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    lines = [line for path in images.glob("manifest*.jsonl") for line in path.read_text().splitlines()]
    finished = {row["file"]: (images / row["file"]).stat().st_mtime_ns for row in map(json.loads, lines)}
    assert 1 <= len(finished) < 6
    assert evaluate_here(*arguments) == 0
    assert len(list(images.glob("0*.png"))) == 6
    assert all((images / name).stat().st_mtime_ns == at for name, at in finished.items())  # nothing is drawn twice


def test_help_and_mistakes_as_a_user_sees_them(command: Command, tmp_path: Path) -> None:
    shown = command("scripts/evaluate.py", "--help").stdout
    from paradiffusion.evaluation.options import EvaluateOptions

    for key in EvaluateOptions.__dataclass_fields__:
        assert f"{key}=" in shown or f"{key}." in shown, key
    assert all(name in shown for name in suites())
    wrong = command("scripts/evaluate.py", "ckpt=nowhere", "suite=scenes", f"output_dir={tmp_path}")
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr.startswith("error: ckpt=nowhere holds no checkpoint") and wrong.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []
