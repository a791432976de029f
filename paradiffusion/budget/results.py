"""Results of a benchmark on disk: FILE.json and FILE.md, with what they were measured on."""

from __future__ import annotations

import datetime
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil  # which accelerate brings

from paradiffusion.errors import UserError
from paradiffusion.machine import cores
from paradiffusion.pages import markdown_table
from paradiffusion.repository import PACKAGE

# Where torch's settings stand for it; the second is the older name.
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


class Results:
    """The rows of a benchmark. Both files are written anew with each, so that a run that is ended keeps what it has.

    Args:
        settings: has the folder ``output``, and in ``name`` the files' common one.
        title, about, head: of FILE.md: its heading, how to read it, and the table's columns.
        document: what FILE.json holds besides the rows, beginning with ``machine`` and ``command``.
    """

    def __init__(self, settings: Any, title: str, about: str, head: Sequence[str], document: dict[str, Any]) -> None:
        self.stem = Path(settings.output) / settings.name
        self.document = {"date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"), **document, "rows": []}
        facts = ", ".join(f"{key} {value}" for key, value in document["machine"].items())
        self.text = f"# {title}, {self.document['date']}\n\n{facts}.\n\n```\n{document['command']}\n```\n\n{about}\n\n"
        self.head, self.cells = head, list[list[str]]()

    def add(self, row: dict[str, Any], cells: list[str]) -> None:
        """Write and print one row: ``row`` for a program, ``cells`` for a person."""
        self.document["rows"].append(row)
        self.cells.append(cells)
        print("  ".join(cell for cell in cells if cell != "-"), flush=True)
        self.stem.parent.mkdir(parents=True, exist_ok=True)
        self.stem.with_suffix(".json").write_text(json.dumps(self.document, indent=1) + "\n")
        self.stem.with_suffix(".md").write_text(f"{self.text}{markdown_table(self.head, self.cells)}\n")


def answer_of(module: str, *arguments: str, python: str = sys.executable) -> dict[str, Any]:
    """The JSON object that ``python -m module`` prints last, in a process of its own with one thread. UserError where it prints none."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    line, pipe = [python, "-m", module, *arguments], subprocess.PIPE
    child = subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, cwd=PACKAGE.parent, env=environment, start_new_session=True)
    try:
        out, errors = child.communicate()
    finally:  # with its workers: some libraries' outlive it, and would slow whatever is measured next
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL) if hasattr(os, "killpg") else child.kill()
    found = [row for row in out.splitlines() if row.startswith("{")]  # other lines are what its libraries print
    if not found:
        last = (errors.strip().splitlines() or ["no word"])[-1]
        raise UserError(f"{' '.join(line[:4])} ended before it had measured ({last}); try it alone to see more.")
    return json.loads(found[-1])  # type: ignore[no-any-return]


def spread(values: Sequence[float], form: str, unit: str = "") -> str:
    """Median and range: "0.52 s (0.41 to 0.73)"."""
    return f"{statistics.median(values):{form}}{unit} ({min(values):{form}} to {max(values):{form}})"


def machine(device: str = "cpu") -> dict[str, Any]:
    """What it ran on, and with; the load average says how busy other work kept it."""
    import torch  # without which the processes of bench_plan.py measure

    libraries = ("torch", "diffusers", "transformers", "accelerate", "peft", "numpy")
    facts: dict[str, Any] = {
        "processor": processor(), "cores": cores(), "threads": torch.get_num_threads(), "python": platform.python_version(),
        **{name: version(name) for name in libraries}, "load average": round(psutil.getloadavg()[0], 1),
    }  # fmt: skip
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(0)
        facts["gpu_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
        facts["cuda"] = torch.version.cuda
        facts["allocator"] = next((os.environ[key] for key in ALLOCATOR if key in os.environ), "default")
    return facts


def processor() -> str:
    """The processor's model, as the system names it."""
    with suppress(OSError):
        for row in Path("/proc/cpuinfo").read_text().splitlines():
            if row.startswith("model name"):
                return row.partition(":")[2].strip()
    return platform.processor() or platform.machine()
