"""Programs as a user starts them, alone or on several ranks, in processes forked from one that has imported the libraries.

Importing them takes a process longer than a test's whole training. What only a new interpreter shows, and the launchers'
own processes, are tested in test_launches.py, test_resume.py and test_installed.py.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from commands import ROOT
from training_runs import free_port

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    ["accelerate.commands.accelerate_cli", "diffusers.models.autoencoders.autoencoder_kl",
     "diffusers.models.unets.unet_2d_condition", "ranks", "paradiffusion.scenes.alignment", "paradiffusion.sampling.run",
     "paradiffusion.training.trainer"]
)  # fmt: skip


class Started:
    """``program.py argument ...`` in the repository's root, with the methods of ``subprocess.Popen`` that the tests need."""

    def __init__(self, *command: str, start: Callable[..., object] = runpy.run_path, **environment: str) -> None:
        self.command = command
        self.files = [tempfile.NamedTemporaryFile("r") for _ in range(2)]  # noqa: SIM115
        names = [file.name for file in self.files]
        self.process = FORKED.Process(target=_run, args=(start, command, {**_outside(os.environ), **environment}, names))
        self.process.start()
        atexit.register(self.process.kill)  # before multiprocessing, which would wait for it, if its test has failed

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(int(self.process.pid or 0), number)

    def kill(self) -> None:
        self.process.kill()

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        """Wait for its end, by force after ``timeout`` seconds; what it has said to its two streams."""
        self.process.join(timeout)
        self.process.kill()
        self.process.join()
        said, complained = (Path(file.name).read_text() for file in self.files)
        return said, complained

    @property
    def returncode(self) -> int:
        return int(self.process.exitcode or 0)

    def completed(self, timeout: float) -> subprocess.CompletedProcess[str]:
        output, errors = self.communicate(timeout)
        return subprocess.CompletedProcess(self.command, self.returncode, output, errors)


def run_on_two(*command: str, timeout: float = 240, **environment: str) -> tuple[list[int], str]:
    """``program.py argument ...`` on two ranks of the CPU, with torchrun's environment: their exit statuses, and what both
    said to both streams. A rank that has not ended after ``timeout`` seconds is killed."""
    ranks = start_two(*command, **environment)
    said = ["".join(rank.communicate(timeout)) for rank in ranks]
    return [rank.returncode for rank in ranks], "".join(said)


def start_two(*command: str, **environment: str) -> list[Started]:
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"ACCELERATE_USE_CPU": "1", **environment}
    return [Started(*command, **common, RANK=rank, LOCAL_RANK=rank) for rank in "01"]


def launcher(kind: str) -> list[str]:
    """Two processes: torchrun for DDP on the CPU, else ``accelerate launch --config_file configs/launch/KIND.yaml``."""
    if kind == "ddp":  # Nothing says that there is no GPU: accelerate would let each process train by itself.
        return ["torchrun", "--nproc_per_node", "2", "--master_port", str(free_port())]
    settings = str(ROOT / "configs" / "launch" / kind) + ".yaml"
    return ["accelerate", "launch", "--quiet", "--num_processes", "2", "--main_process_port", str(free_port()),
            "--config_file", settings]  # fmt: skip


def launch(kind: str, *command: str, new_interpreters: bool = False) -> subprocess.CompletedProcess[str]:
    """A program by its launcher, which reads its own command line and configuration; its processes are forks of it, or
    what it starts by itself."""
    whole = [*launcher(kind), *command]
    if not new_interpreters:
        return Started(*whole, start=_launch).completed(timeout=400)
    whole[0] = str(Path(sys.executable).with_name(whole[0]))
    return subprocess.run(whole, cwd=ROOT, env=_outside(os.environ), capture_output=True, text=True, timeout=400, check=False)


def _outside(environment: Any) -> dict[str, str]:
    """Without what accelerate has set for the tests' own process."""
    return {key: value for key, value in environment.items() if not key.startswith("ACCELERATE_")}


def _run(start: Callable[..., object], command: tuple[str, ...], environment: dict[str, str], names: list[str]) -> None:
    for stream, name in enumerate(names, 1):
        with open(name, "w") as file:
            os.dup2(file.fileno(), stream)
    os.environ.clear()
    _run_rank(command, environment, start)


def _run_rank(command: Sequence[str], environment: dict[str, str], start: Callable[..., object] = runpy.run_path) -> None:
    os.environ |= environment
    os.chdir(ROOT)
    sys.argv = list(command)
    start(command[0], run_name="__main__")


def _launch(*_: Any, **__: Any) -> None:
    """The launcher's own command, but for the last thing that it does: starting its processes."""
    import torch.distributed.run
    from accelerate.commands import accelerate_cli

    torch.distributed.run.run = _fork_ranks
    if sys.argv[0] == "accelerate":
        accelerate_cli.main()
    else:
        torch.distributed.run.main(sys.argv[1:])


def _fork_ranks(arguments: Any) -> None:
    """The processes of a launch; the end of one that fails ends the others, as torchrun has it."""
    count, fork = int(arguments.nproc_per_node), multiprocessing.get_context("fork")
    command = [arguments.training_script, *arguments.training_script_args]
    common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(arguments.master_port)}  # fmt: skip
    ranks = [fork.Process(target=_run_rank, args=(command, {**common, "RANK": str(n), "LOCAL_RANK": str(n)})) for n in range(count)]  # fmt: skip
    for rank in ranks:
        rank.start()
    while running := [rank for rank in ranks if rank.is_alive()]:
        if any(rank.exitcode for rank in ranks):
            for rank in running:
                rank.terminate()
        wait([rank.sentinel for rank in running], timeout=0.1)  # a sentinel may fire before there is an exit code
    sys.exit(int(any(rank.exitcode for rank in ranks)))
