"""scripts/cache.py as people run it: stopped and gone on with, and on two processes."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from commands import wait_for
from data_fixtures import sample
from ranks import Started, run_on_two

from paradiffusion.compose import compose_train
from paradiffusion.data.cache import Members, remove_abandoned, writing
from paradiffusion.data.shards import write_shards
from paradiffusion.errors import UserError
from paradiffusion.training.caching import CacheOptions, make_cache


@pytest.fixture(scope="module")
def arguments(tiny_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Twelve shards of four samples."""
    folder = tmp_path_factory.mktemp("caching_data")
    write_shards((sample(number) for number in range(48)), folder, 4)
    return [*tiny_arguments, "stage=1", f"data.shards={folder}"]


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_processes_make_what_one_makes(arguments: list[str], tmp_path: Path) -> None:
    ended, said = run_on_two("scripts/cache.py", *arguments, f"output={tmp_path / 'two'}")
    assert ended == [0, 0], said
    assert said.count("48 samples in 12 files") == 2  # latents and text, each told once
    assert make_cache(compose_train(arguments), CacheOptions(output=str(tmp_path / "one"))) == 0
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert len(one) == 2 * (2 * 12 + 1) + 2 and one == two  # each tar with its index, and a key


def test_a_stopped_run_goes_on_after_its_last_whole_shard(arguments: list[str], tmp_path: Path) -> None:
    # Large pictures one by one, so that there is time to stop.
    slow, folder = [*arguments, "data.resolution=256"], tmp_path / "cache" / "latents"
    more = ("what=latents", "at_once=1", "readers=1", f"output={tmp_path / 'cache'}")
    started = Started("scripts/cache.py", *slow, *more, ACCELERATE_USE_CPU="1")
    wait_for(lambda: len(list(folder.glob("0*.tar"))) >= 2 or started.poll() is not None, interval=0.01)
    started.send_signal(signal.SIGTERM)
    output, errors = started.communicate(timeout=120)
    assert started.returncode == 128 + signal.SIGTERM and "Traceback" not in errors, errors
    assert "stopped; finished shards are kept: run the same command again" in output
    before = {path: path.stat().st_mtime_ns for path in folder.glob("0*.tar")}
    assert 2 <= len(before) < 12 and not list(folder.glob(".*"))
    for name in ("cache", "whole"):
        assert (
            make_cache(compose_train(slow), CacheOptions(output=str(tmp_path / name), what="latents", at_once=1)) == 0
        )
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert files(folder) == files(tmp_path / "whole" / "latents")


def test_a_full_disk_is_one_sentence_and_leaves_nothing_behind(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # It stands for a disk: a larger file is refused by the system.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    said = r"one.tar could not be written \(.*\); make room, then run the same"
    try:
        with pytest.raises(UserError, match=said), writing(tmp_path / "one.tar", torch.float32) as add:
            add(1, torch.zeros(1 << 16))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_two_commands_at_work_on_one_shard(tmp_path: Path) -> None:
    """What the first has finished is whole, even where the second, which began later, is killed before its end."""
    path, values = tmp_path / "one.tar", [torch.full((64, 64), float(n)) for n in range(1, 20)]
    with pytest.raises(KeyboardInterrupt), writing(path, torch.float32) as second:
        second(0, values[0])
        with writing(path, torch.float32) as first:
            for name, value in enumerate(values):
                first(name, value)
        kept = Members(path)
        assert all(torch.equal(kept.get(name).values, value) for name, value in enumerate(values))  # type: ignore[union-attr]
        (left,) = tmp_path.glob(".*.part")
        remove_abandoned(tmp_path)
        assert left.exists()
        os.utime(left, (1.0, 1.0))
        remove_abandoned(tmp_path)
        assert sorted(found.name for found in tmp_path.iterdir()) == ["one.npy", "one.tar"]
        raise KeyboardInterrupt
