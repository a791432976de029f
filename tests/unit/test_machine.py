"""Which cores and which GPU are a process's own, beside those that a launcher started with it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from accelerate.state import AcceleratorState
from commands import Command

from paradiffusion.compose import compose_train
from paradiffusion.machine import choose_device, own_cores, settled_dtype, start_method
from paradiffusion.training.engine import make_accelerator

TASK = {"SLURM_NTASKS": "16", "WORLD_SIZE": "16", "SLURM_CPUS_ON_NODE": "96", "LOCAL_WORLD_SIZE": "8"}


@pytest.mark.parametrize(
    ("affinity", "environment", "expected"),
    [
        (96, {}, 96),
        (96, {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, 12),
        (96, {"WORLD_SIZE": "4"}, 24),  # a launcher that says no more is on one machine
        (4, {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, 1),
        (12, TASK, 12),  # bound
        (96, TASK, 12),  # on a cluster that binds no task
        (96, {**TASK, "SLURM_NTASKS": "2"}, 12),  # a launcher of eight on each node
    ],
)
def test_a_process_has_its_share_of_the_cores(
    affinity: int, environment: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(affinity)), raising=False)
    for name in TASK:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert own_cores() == expected


@pytest.mark.parametrize(
    ("name", "local", "chosen", "current"),
    [
        (None, None, "cuda", None),
        (None, "3", "cuda:3", 3),
        ("cuda", "5", "cuda:1", 1),  # more processes than GPUs: in turn
        ("cuda:2", "3", "cuda:2", 2),
        ("cuda:1", None, "cuda:1", 1),
        ("cpu", "3", "cpu", None),
    ],
)
def test_each_process_takes_a_gpu_of_its_own_and_makes_it_the_current_one(
    name: str | None, local: str | None, chosen: str, current: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int | None] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: taken.append(device.index))
    for variable in ("LOCAL_RANK", "RANK"):
        monkeypatch.delenv(variable, raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_RANK", local)
    assert choose_device(name) == torch.device(chosen)
    assert taken == ([] if current is None else [current])


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is such a GPU here")
def test_a_gpu_of_apple_that_is_not_there_is_one_sentence(command: Command) -> None:
    for program in (("sample.py", "ckpt=data/nano", "prompt=A red circle."), ("scripts/evaluate.py", "ckpt=data/nano", "suite=scenes")):
        said = command(*program, "device=mps")
        assert said.returncode == 2 and said.stderr.count("\n") == 1 and "device=mps is not to be had here" in said.stderr


def test_processes_begin_as_the_system_and_the_program_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for system, chosen, begins in (("linux", None, "fork"), ("linux", "spawn", "spawn"), ("darwin", None, "spawn")):
        monkeypatch.setattr("sys.platform", system)
        monkeypatch.setattr("multiprocessing.get_start_method", lambda allow_none, chosen=chosen: chosen)
        assert start_method() == begins


def test_a_gpu_that_cannot_be_used_says_so_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(device: torch.device) -> None:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", busy)
    with pytest.raises(RuntimeError, match="busy"):
        choose_device("cuda:0")


@pytest.fixture
def switches() -> Iterator[None]:
    """torch's own, as they are by default, before and after."""

    def put_back() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = True, False
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.enable_cudnn_sdp(True)
        torch.backends.cudnn.benchmark = False

    put_back()
    yield
    put_back()


@pytest.mark.usefixtures("switches")
def test_fp32_is_no_tf32() -> None:
    for precision, rounded in (("bf16", True), ("fp32", False)):
        AcceleratorState._reset_state(reset_partial_state=True)
        make_accelerator(compose_train([f"precision={precision}"]))
        assert torch.backends.cudnn.allow_tf32 is rounded
    assert torch.backends.cuda.matmul.allow_tf32 is False


@pytest.mark.usefixtures("switches")
def test_deterministic_is_asked_of_torch_and_its_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    make_accelerator(compose_train(["precision=fp32"]))
    assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    assert torch.backends.cudnn.benchmark
    make_accelerator(compose_train(["precision=fp32", "deterministic=true"]))
    assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cuda.cudnn_sdp_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and not torch.backends.cudnn.benchmark


@pytest.mark.usefixtures("switches")
def test_a_compiled_model_is_exchanged_in_few_buffers() -> None:
    for compiled, megabytes in (("false", 25), ("true", 512)):
        AcceleratorState._reset_state(reset_partial_state=True)
        handler = make_accelerator(compose_train(["precision=fp32", f"compile={compiled}"])).ddp_handler
        assert handler is not None and handler.bucket_cap_mb == megabytes


def test_an_open_dtype_is_bfloat16_on_a_gpu_alone() -> None:
    assert settled_dtype("auto", torch.device("cuda:1")) == "bfloat16"
    assert settled_dtype("auto", torch.device("cpu")) == settled_dtype("float32", torch.device("cuda")) == "float32"
