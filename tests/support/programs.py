"""The programs of scripts/ within the tests' own process, and in forks of it: killed in their middle, or as ranks of one launch."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from accelerate.state import AcceleratorState
from commands import ROOT, wait_for
from training_runs import free_port

from paradiffusion.entry import run


def script(name: str) -> Any:
    """NAME.py or scripts/NAME.py as a module, under a name that hides none; a UserError of its ``main`` comes through."""
    path = next(path for path in (ROOT / f"{name}.py", ROOT / "scripts" / f"{name}.py") if path.is_file())
    spec = importlib.util.spec_from_file_location(f"{name}_script", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def fork(program: str | Callable[[list[str]], int], arguments: list[str], said: Path, **environment: str) -> int:
    """Begin scripts/PROGRAM.py, or a ``main``, in a fork of this process that prints into the file ``said``; its number.

    It spares the seconds in which a new interpreter imports torch. No backward pass may have run here before.
    """
    main = script(program).main if isinstance(program, str) else program
    child = os.fork()
    if not child:
        _child(main, ["program", *arguments], said, environment)
    return child


def _child(main: Callable[[list[str]], int], argv: list[str], said: Path, environment: dict[str, str]) -> NoReturn:
    status = 1
    try:
        file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(file, stream)
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", closefd=False) for stream in (1, 2))
        sys.argv = argv
        os.environ.update(environment)
        AcceleratorState._reset_state(reset_partial_state=True)
        run(main)
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def end(child: int, condition: Callable[[], bool] | None = None, number: int = signal.SIGKILL) -> int:
    """Wait for a fork's end, before which it is sent ``number`` as soon as ``condition()`` holds; its exit code."""
    if condition is not None:
        wait_for(lambda: condition() or _has_ended(child), interval=0.002)
        os.kill(child, number)
    wait_for(partial(_has_ended, child), interval=0.01)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _has_ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def two_ranks(name: str, arguments: list[str], folder: Path) -> tuple[list[int], list[str]]:
    """Exit codes and output of scripts/NAME.py as the two processes of one launch."""
    launch = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "1"}
    launch["MASTER_PORT"] = str(free_port())
    said = [folder / f"rank{rank}.txt" for rank in range(2)]
    children = [fork(name, arguments, said[n], RANK=str(n), LOCAL_RANK=str(n), **launch) for n in range(2)]
    return [end(child) for child in children], [path.read_text() for path in said]
