"""scripts/slurm.sh: what it tells each process. Slurm's own programs are stood in for; the training is real."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT
from training_runs import records

SRUN = """#!/usr/bin/env bash
# One process a task on this machine, as srun starts them.
while [[ "$1" == --* ]]; do shift; done
status=0; pids=()
for task in $(seq 0 $((SLURM_NTASKS - 1))); do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit $status
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", "#!/usr/bin/env bash\necho localhost\necho other\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    job = {"JOB_ID": str(os.getpid()), "JOB_NODELIST": "localhost", "NTASKS": "2", "NTASKS_PER_NODE": "2"}
    ours = {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHON": sys.executable, "ACCELERATE_USE_CPU": "1"}
    return {**os.environ, **{f"SLURM_{name}": value for name, value in job.items()}, **ours}


def submit(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / "slurm.sh"), *arguments], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip


def test_two_tasks_train_together(environment: dict[str, str], tiny_arguments: list[str], tmp_path: Path) -> None:
    """With DeepSpeed, and an argument with characters that a shell would take for its own."""
    environment = {key: value for key, value in environment.items() if key != "ACCELERATE_USE_CPU"} | {
        "LAUNCH": "zero2"
    }
    more = (f"run_dir={tmp_path / 'a run'}", "max_steps=2", "data.captions={short: 1.0}")
    result = submit(environment, *tiny_arguments, *more)
    assert result.returncode == 0, result.stderr
    assert "ZeRO-2, 2 process(es) x 1 micro-batch(es)" in result.stdout
    assert [row["step"] for row in records(tmp_path / "a run" / "stage1")] == [2]


@pytest.mark.parametrize(
    ("change", "said"),
    [({"LAUNCH": "zero4"}, "choose one of ddp, zero2"), ({"SLURM_SUBMIT_DIR": "/"}, "holds no train.py")],
)
def test_mistakes_are_one_sentence(environment: dict[str, str], change: dict[str, str], said: str) -> None:
    result = submit({**environment, **change}, "stage=1")
    assert result.returncode == 2 and said in result.stderr and result.stderr.count("\n") == 1
