"""Which cores and which GPU are a process's own, beside those that a launcher started with it."""

from __future__ import annotations

import os

import pytest
import torch

from paradiffusion.machine import choose_device, own_cores

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
