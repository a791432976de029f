"""runner=ray on clusters of several nodes, which are processes here: what the local runner makes, to the byte, though workers, nodes and
drivers are killed; and what a person is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from builds import write_captioned
from commands import ROOT, user_error, wait_for
from data_fixtures import encoded, picture
from evaluations import EXACT, copy_run, evaluate_here, make_run
from programs import script
from ray_stage import Stage, rank

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
pytest.importorskip("ray", reason="Ray is not installed: pip install 'paradiffusion[ray]'")
import psutil
import ray
from ray.cluster_utils import Cluster

from paradiffusion.compose import compose_train
from paradiffusion.curation.building.build import build
from paradiffusion.curation.building.build_options import BuildOptions
from paradiffusion.curation.choosing.scoring import Scoring, score_shards
from paradiffusion.data.shards import RawSample, expand_shards, write_shards
from paradiffusion.evaluation.records import read_evaluation
from paradiffusion.runner import RayOptions, make_bar, run_tasks
from paradiffusion.stopping import stop_on_signals
from paradiffusion.training.caching import CacheOptions, make_cache

pytestmark = pytest.mark.ray
STORE = {"object_store_memory": 100 << 20}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head without a processor, which lets the driver be killed alone, and two nodes of one each; the test is not a driver yet."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests" / "support"))
    monkeypatch.setenv("RAY_worker_niceness", "0")  # Ray's workers give way to all others, and tests run beside others
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **STORE})
    for _ in range(2):
        nodes.add_node(num_cpus=1, **STORE)
    yield nodes
    ray.shutdown()
    nodes.shutdown()


def stop_at_work(node: Any, folder: Path) -> psutil.Process:
    """The worker on a node, stopped by SIGSTOP at a file in ``folder``: elsewhere it might hold a lock that the others wait for."""
    found: list[psutil.Process] = []

    def is_at_one(process: psutil.Process) -> bool:
        paths = [Path(file.path) for file in process.open_files()]
        return any(path.is_relative_to(folder) and path.stat().st_size for path in paths)

    def look() -> bool:
        for process in psutil.Process(node.all_processes["raylet"][0].process.pid).children():
            with suppress(psutil.Error, OSError):
                if is_at_one(process):
                    process.suspend()
                    if is_at_one(process):
                        found.append(process)
                    else:
                        process.resume()
        return bool(found)

    wait_for(look, timeout=400, interval=0.02)
    return found[0]


def contents(folder: Path) -> dict[str, bytes]:
    """All files but reports; lines of captions without their times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if (path.is_file() and path.suffix in (".tar", ".npy", ".parquet", ".safetensors", ".jsonl")) or path.name == "key.json":
            data = path.read_bytes()
            if path.suffix == ".jsonl":
                lines = [json.loads(line) for line in data.decode().splitlines()]
                data = json.dumps([{key: value for key, value in line.items() if key != "seconds"} for line in lines]).encode()
            found[path.relative_to(folder).as_posix()] = data
    return found


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("command", "bar", "done"),
    [
        ("caption", "captions", "*.tar"),
        ("build_shards", "reading images", ".build/chunks/*.json"),
        ("build_shards", "writing shards", "*.tar"),
        ("cache", "latents", "latents/*.tar"),
        ("cache", "text features", "text/*.tar"),
    ],
)
def test_nothing_is_lost_or_done_twice_though_a_worker_a_node_and_the_driver_are_killed(
    command: str, bar: str, done: str, vlm: Path, tiny_arguments: list[str], cluster: Cluster, tmp_path: Path
) -> None:
    given, out, said = tmp_path / "in", tmp_path / "ray", tmp_path / "said.txt"
    pictures = (RawSample(f"{n:03d}", encoded(picture(n, 192, 192)), "png", {"captions": {"short": f"thing {n}"}}) for n in range(72))
    write_shards(pictures, given, 6)
    common = {
        "caption": [
            f"shards={given}", f"model={vlm}", "language=any", "min_words=1", "reject=empty", "batch_size=2", "max_new_tokens=40",
            "image_side=64",
        ],
        "build_shards": [f"input={given}", "encode=webp", "samples_per_shard=2", "processes=1"],
        "cache": [*tiny_arguments, "stage=1", f"data.shards={given}", "data.captions={short: 1}", "at_once=2", f"what={bar.split()[0]}"],
    }[command]  # fmt: skip
    assert script(command).main([*common, f"output={tmp_path / 'local'}"]) == 0

    def start() -> subprocess.Popen[bytes]:
        arguments = [sys.executable, f"scripts/{command}.py", *common, f"output={out}", "runner=ray", "runner_options={workers: 2}"]
        with said.open("ab") as file:
            return subprocess.Popen(arguments, cwd=ROOT, env={**os.environ, "RAY_ADDRESS": cluster.address}, stdout=file, stderr=file)

    def finished() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in out.glob(done)}

    driver = start()
    try:
        wait_for(lambda: bar in said.read_text() or driver.poll() is not None, timeout=400)
        first, second = cluster.worker_nodes
        one, _ = stop_at_work(first, out), stop_at_work(second, out)
        one.kill()
        one.wait()
        one, before = stop_at_work(first, out), finished()
        one.resume()
        wait_for(lambda: len(finished()) > len(before), timeout=400, interval=0.002)
        one.suspend()
        cluster.remove_node(second, allow_graceful=False)  # SIGKILL
        wait_for(lambda: said.read_text().count("a worker was lost") == 2 or driver.poll() is not None, timeout=400)
        assert driver.poll() is None, said.read_text()
    finally:
        driver.kill()
        driver.wait()
    one.resume()
    before = finished()
    assert start().wait(timeout=600) == 0, said.read_text()
    assert all(path.stat().st_mtime_ns == time for path, time in before.items() if path.exists()) and before
    assert contents(out) == contents(tmp_path / "local") and len(contents(out)) >= 12
    assert not list(out.glob(".*")) and not list(out.glob("*.journal"))


def test_shards_caches_and_scores_are_those_of_the_local_runner(
    cluster: Cluster, tiny_arguments: list[str], clip_folder: Path, tmp_path: Path
) -> None:
    keys = {"runner": "ray", "runner_options": f"{{address: '{cluster.address}'}}"}
    names = [f"{number:03d}" for number in range(30)]
    write_captioned(tmp_path / "in", *names)
    (tmp_path / "in" / "007.png").write_bytes(b"no picture")
    for name, more in (("local", {}), ("ray", keys)):
        folder, shards = tmp_path / name, tmp_path / "local" / "shards"
        # The second goes on with what a local run began.
        report = build(
            BuildOptions(input=str(tmp_path / "in"), output=str(folder / "shards"), samples_per_shard=8, val=0.1, processes=1, **more)
        )
        assert (report.kept, report.dropped) == (29, {"not an image": 1})
        train = compose_train([*tiny_arguments, "stage=1", f"data.shards={shards}", "data.captions={short: 1}"])
        assert make_cache(train, CacheOptions(output=str(folder / "cache"), **more)) == 0
        scoring = Scoring(str(clip_folder), threads=1)
        assert score_shards(expand_shards(shards), folder / "scores", scoring, 1, CacheOptions(**more).ray()) > 20
    local, found = contents(tmp_path / "local"), contents(tmp_path / "ray")
    assert found == local and len(found) > 20


def test_pictures_and_scores_are_those_of_the_local_runner(
    codec_folder: Path, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_run(tmp_path / "runs" / "tiny", codec_folder)
    monkeypatch.chdir(tmp_path)
    images, scores = {}, {}
    for name, more in (("one", ()), ("two", ("runner=ray", f"runner_options={{address: '{cluster.address}', workers: 2}}"))):
        run = copy_run(made, Path(name))
        assert evaluate_here(f"ckpt={run}", "suite=scenes", "count=6", "batch_size=1", EXACT, *more) == 0
        folder = run / "stage2" / "evaluation" / "scenes_count6"
        images[name] = {path.name: path.read_bytes() for path in (folder / "images").glob("0*.png")}
        scores[name] = [score.images for score in read_evaluation(folder).scores]
        assert (folder / "report.html").is_file()
    assert scores["one"] == scores["two"] and len(scores["one"]) == 3
    assert images["one"] == images["two"] and len(images["one"]) == 6


def test_order_progress_mistakes_and_a_task_that_kills_its_workers(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from paradiffusion import ray_pool

    def run(tasks: list[int], workers: int = 2, cpus: float = 1.0) -> list[int]:
        options = RayOptions(cluster.address, workers, cpus)
        return run_tasks(make_bar("squaring", "number", len(tasks)), Stage(tmp_path), tasks, lambda: None, options)

    with stop_on_signals() as stop:
        assert run(list(range(10))) == [number**2 for number in range(10)]
        assert signal.getsignal(signal.SIGTERM) == stop.handle  # Ray has one of its own
    said = capsys.readouterr().err
    assert "10/10" in said and "odd 50%" in said and said.count("a worker was lost") == 1
    user_error("task 11 cannot be done", run, [1, 11])
    assert run([13, 20, 21, 22, 23, 24], workers=6, cpus=0.25) == [169, 400, 441, 484, 529, 576]
    assert capsys.readouterr().err.count("a worker was lost") == 6  # none of the idle five is counted as killed by the task
    assert ray_pool.run_ranks(partial(rank, tmp_path), RayOptions(cluster.address, 2), lambda: None) == ["0", "0", "2"]
    assert capsys.readouterr().err.count("all begin again") == 1
    monkeypatch.setattr(ray_pool, "_DEATHS", 1)
    user_error("2 Ray workers died one after the other", run, [12])
    ray.shutdown()
    user_error(
        "no Ray cluster answers at 127.0.0.1:1", run_tasks, make_bar("", "", 1), Stage(tmp_path), [1], print, RayOptions("127.0.0.1:1")
    )
