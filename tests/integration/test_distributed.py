"""Two processes, a launcher, and scripts/slurm.sh: the same as one process, and nothing left running. For losses see test_launches.py."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, user_error, wait_for
from data_fixtures import half_unreadable
from PIL import Image
from ranks import run_on_two
from training_runs import newest, records, sample_here, steps_saved, train_here

from paradiffusion.checkpoints.manifest import find_fault
from paradiffusion.training.engine import check_gpus
from paradiffusion.training.folder import locked

LENGTH = ["max_steps=2", "log_every=1", "checkpoint_every=2", "validation.samples=0"]


@pytest.fixture(scope="module")
def alone(tiny_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stages 1 and 2 on one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    for stage in (1, 2):
        assert train_here([*tiny_arguments, *LENGTH, f"stage={stage}", f"run_dir={run}"]) == 0
    return run


def test_two_processes_draw_what_one_draws(alone: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "a red circle" + " and a blue square" * number, "seed": number} for number in range(5)]
    lines[3] |= {"height": 48, "width": 80}
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = (f"ckpt={alone}", f"prompt_file={prompts}", "steps=4")
    ended, said = run_on_two("sample.py", *arguments, "threads=1", "batch_size=2", f"output_dir={tmp_path / 'two'}")
    assert ended == [0, 0], said
    assert sample_here(*arguments, "batch_size=8", f"output_dir={tmp_path / 'one'}") == 0
    rows = [json.loads(line) for line in (tmp_path / "two" / "manifest.jsonl").read_text().splitlines()]
    assert sorted(row["prompt"] for row in rows) == sorted(str(line["prompt"]) for line in lines)
    for number in range(5):
        one, two = (np.asarray(Image.open(tmp_path / folder / f"{number:05d}.png")).astype(int) for folder in ("one", "two"))
        assert one.shape == two.shape and np.abs(one - two).max() <= 1


def test_two_processes_lose_what_one_loses_where_samples_cannot_be_read(tiny_arguments: list[str], tmp_path: Path) -> None:
    arguments = [
        *tiny_arguments, f"data.shards={half_unreadable(tmp_path / 'bad')}", "data.max_bad_fraction=0.9", "log_every=1", "max_steps=4",
    ]  # fmt: skip
    assert train_here([*arguments, f"run_dir={tmp_path / 'one'}"]) == 0
    ended, said = run_on_two("train.py", *arguments, f"run_dir={tmp_path / 'two'}")
    assert ended == [0, 0], said
    one, two = (records(tmp_path / name / "stage1") for name in ("one", "two"))
    assert any(row["bad_samples"] for row in one)
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-5)
    assert [row["gradient_norm"] for row in two] == pytest.approx([row["gradient_norm"] for row in one], rel=1e-4)


def test_accelerate_launch_uses_all_cores_and_leaves_nothing_behind(
    alone: Path, tiny_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the README has it, without a configuration file; killed, it leaves a whole checkpoint, and no process that reads data."""
    arguments = [argument for argument in tiny_arguments if argument not in ("threads=1", "data.workers=0")]
    run, stage = tmp_path / "run", tmp_path / "run" / "stage2"
    arguments += ["data.workers=1", "stage=2", f"init_from={alone / 'stage1'}", f"run_dir={run}", "log_every=1"]
    # The launcher sets one thread itself; ours are not to be what decides.
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    launched = subprocess.Popen(
        [str(Path(sys.executable).with_name("accelerate")), "launch", "--quiet", "train.py", *arguments, "max_steps=100000",
         "checkpoint_every=100000"], cwd=ROOT, env={**environment, "ACCELERATE_USE_CPU": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_for(lambda: ((stage / "log.jsonl").exists() and bool(records(stage))) or launched.poll() is not None)
    assert launched.poll() is None, launched.communicate()[0]
    launched.send_signal(signal.SIGKILL)
    output, _ = launched.communicate(timeout=120)  # the pipe ends with the last process that holds it
    (step,) = steps_saved(stage)
    assert f"stopped at step {step}, which is saved" in output and find_fault(newest(stage)) is None
    with locked(stage):
        pass
    threads = int(re.findall(r"(\d+) thread\(s\) each", output)[0])
    assert threads == len(os.sched_getaffinity(0))
    assert "1 process(es) x 1 micro-batch(es)" in output and "fp32" in output
    assert train_here([*arguments, f"max_steps={step + 2}", "threads=1"]) == 0
    assert "resuming from" in capsys.readouterr().out and steps_saved(stage)[-1] == step + 2


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    check_gpus(4)
    user_error(r"^8 processes .* has 4 GPU\(s\).*--num_processes 4", check_gpus, 8)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    check_gpus(8)
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    check_gpus(8)


APART = """
from accelerate import Accelerator
from data_fixtures import synthetic_index
from paradiffusion.entry import run
from paradiffusion.training.trainer import check_same_data
accelerator = Accelerator(cpu=True)
check_same_data(synthetic_index(50, 2, 0), accelerator)
print("the same", flush=True)
run(lambda _: check_same_data(synthetic_index(50, 2, accelerator.process_index), accelerator), lambda: "")
"""


def test_processes_with_other_data_do_not_train_together(tmp_path: Path) -> None:
    """Of an index that one machine lacks, or a picture that is added while a run starts."""
    program = tmp_path / "apart.py"
    program.write_text(APART)
    ended, said = run_on_two(str(program))
    assert 0 not in ended and said.count("the same\n") == 2
    assert "process 1 found other samples than process 0" in said


DDP = """
import json, os, sys, torch
from accelerate.utils import gather_object
from training_runs import build_here
from paradiffusion.training import trainer as module
took, take_statistics = [], module.take_statistics
module.take_statistics = lambda *arguments: (took.append(os.environ["RANK"]), take_statistics(*arguments))
trainer = build_here(json.loads(sys.argv[1]))
refiner = trainer.joint.refiner
assert gather_object(took) == ["0"], took
means = gather_object([refiner.mean])
assert means[0].abs().sum() > 0 and torch.equal(*means) and torch.equal(*gather_object([refiner.std]))
assert trainer.engine.kind == "DDP" and trainer.micro_batches == 2
loader, trained = trainer.loader(), trainer.joint.trained().values()
for _ in range(2):  # DDP lays its buckets out anew in the second
    trainer.train_step(loader)
places = [parameter.grad.data_ptr() for parameter in trained]
trainer.gradients(loader)
assert places == [parameter.grad.data_ptr() for parameter in trained], "gradients beside the buckets"
trainer.close()
print("all held", flush=True)
"""


def test_ddp_shares_what_one_process_has_counted_and_holds_gradients_once(tiny_arguments: list[str], tmp_path: Path) -> None:
    program = tmp_path / "ddp.py"
    program.write_text(DDP)
    arguments = [*tiny_arguments, "batch_size=4", "micro_batch_size=1", f"run_dir={tmp_path / 'run'}"]
    ended, said = run_on_two(str(program), json.dumps(arguments))
    assert ended == [0, 0] and said.count("all held\n") == 2, said


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
    environment = {key: value for key, value in environment.items() if key != "ACCELERATE_USE_CPU"} | {"LAUNCH": "zero2"}
    more = (f"run_dir={tmp_path / 'a run'}", "max_steps=2", "data.captions={short: 1.0}")
    result = submit(environment, *tiny_arguments, *more)
    assert result.returncode == 0, result.stderr
    assert "ZeRO-2, 2 process(es) x 1 micro-batch(es)" in result.stdout
    assert [row["step"] for row in records(tmp_path / "a run" / "stage1")] == [2]


def test_tasks_get_the_cores_that_the_job_asks_for(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "bin" / "srun").write_text('#!/usr/bin/env bash\necho "$@"\n')
    assert "--cpus-per-task=12" in submit({**environment, "SLURM_CPUS_PER_TASK": "12"}).stdout
    assert "--cpus-per-task" not in submit(environment).stdout  # as with --cpus-per-gpu


@pytest.mark.parametrize(
    ("change", "said"), [({"LAUNCH": "zero4"}, "choose one of ddp, zero2"), ({"SLURM_SUBMIT_DIR": "/"}, "holds no train.py")]
)
def test_mistakes_are_one_sentence(environment: dict[str, str], change: dict[str, str], said: str) -> None:
    result = submit({**environment, **change}, "stage=1")
    assert result.returncode == 2 and said in result.stderr and result.stderr.count("\n") == 1
