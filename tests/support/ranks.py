"""Programs on several ranks: processes forked from one that has imported the libraries, with torchrun's environment.

Importing them takes a process longer than a test's whole training. The launchers' own commands are tested in test_launches.py.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
from pathlib import Path

from commands import ROOT
from training_runs import free_port

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    ["diffusers.models.autoencoders.autoencoder_kl", "diffusers.models.unets.unet_2d_condition", "ranks",
     "paradiffusion.scenes.alignment", "paradiffusion.sampling.run", "paradiffusion.training.trainer"]
)  # fmt: skip


def run_on_two(*command: str, timeout: float = 240, **environment: str) -> tuple[list[int], str]:
    """``program.py argument ...`` on two ranks of the CPU: their exit statuses, and what both said to both streams.

    A rank that has not ended after ``timeout`` seconds is killed.
    """
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"ACCELERATE_USE_CPU": "1", **environment}
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / rank for rank in "01"]
        ranks = [
            FORKED.Process(target=_run, args=(command, {**common, "RANK": file.name, "LOCAL_RANK": file.name}, file))
            for file in files
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(timeout)
            rank.kill()
            rank.join()
        return [int(rank.exitcode or 0) for rank in ranks], "".join(file.read_text() for file in files)


def _run(command: tuple[str, ...], environment: dict[str, str], said: Path) -> None:
    for key in [key for key in os.environ if key.startswith("ACCELERATE_")]:
        del os.environ[key]
    os.environ |= environment
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(ROOT)
    sys.argv = list(command)
    runpy.run_path(command[0], run_name="__main__")
