"""From prompts to a folder of images: jobs, batches, resume, stop, several processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT
from PIL import Image
from sampling_models import TinyModels, draw_as
from training_runs import free_port

from paradiffusion.config import SampleConfig, SamplerConfig
from paradiffusion.errors import UserError
from paradiffusion.sampling.pipeline import generate, make_batches, make_jobs
from paradiffusion.sampling.prompts import PromptRequest, read_prompts
from paradiffusion.sampling.run import (
    Processes,
    StopSignal,
    draw_all,
    joined_processes,
    output_folder,
    sample,
    stop_on_signals,
    written_alone,
)

PROMPTS = [f"a circle {'and a square ' * number}" for number in range(5)]


def requests_of(prompts: list[str]) -> list[PromptRequest]:
    return [PromptRequest(index, prompt, source=f"p.txt line {index + 1}") for index, prompt in enumerate(prompts)]


def configured(**values: object) -> SampleConfig:
    return SampleConfig(ckpt="runs/tiny", prompt_file="p.txt", **values)


def run(folder: Path, models: TinyModels | None = None, prompts: list[str] | None = None, **values: object) -> int:
    requests = requests_of(PROMPTS if prompts is None else prompts)
    return draw_all(models or TinyModels(), requests, configured(**values), folder, Processes(), StopSignal())


def rows_of(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def test_priority_is_line_then_command_line_then_checkpoint() -> None:
    models = TinyModels(sampler=SamplerConfig(solver="euler", steps=4, guidance=3.0))
    requests = [PromptRequest(0, "a", seed=9, height=16, steps=2, negative_prompt=""), PromptRequest(1, "b")]
    config = configured(seed=5, width=48, steps=6, guidance=2.0, negative_prompt="dull", images_per_prompt=2)
    jobs = make_jobs(requests, config, models)
    assert [job.name for job in jobs] == ["00000", "00000_1", "00001", "00001_1"]
    assert [job.seed for job in jobs] == [9, 10, 5, 6]
    assert [(job.height, job.width) for job in jobs] == [(16, 48)] * 2 + [(32, 48)] * 2
    assert [job.settings.steps for job in jobs] == [2, 2, 6, 6]
    assert {(job.settings.solver, job.settings.guidance) for job in jobs} == {("euler", 2.0)}
    assert [job.negative_prompt for job in jobs] == [None, None, "dull", "dull"]
    assert make_jobs(requests[1:], configured(), models)[0].settings == models.sampler
    config = configured(guidance=1.0, negative_prompt="dull")
    assert [job.negative_prompt for job in make_jobs(requests, config, models)] == [None, None], (
        "it has no effect, nor is it recorded"
    )


@pytest.mark.parametrize(
    ("of_line", "typed", "expected"),
    [
        (
            {"height": 100},
            {},
            "height=100 (p.txt line 1) cannot be drawn by this model; expected a multiple of 8, the ",
        ),
        ({"width": 3}, {}, "nearest being 8"),
        ({}, {"width": 70}, "width=70 (the command line)"),
        ({}, {"height": 100}, "nearest being 96 and 104"),
        ({"steps": 1001}, {}, "p.txt line 1: steps=1001 is more than the 1000 steps"),
        ({}, {"solver": "heun"}, "choose one of dpm, ddim, euler"),
        ({}, {"guidance_start": 0.9, "guidance_stop": 0.5}, "start first"),
        ({}, {"seed": -1}, "seed=-1 is out of range"),
    ],
)
def test_impossible_jobs_are_refused(of_line: dict[str, int], typed: dict[str, object], expected: str) -> None:
    with pytest.raises(UserError, match=re.escape(expected)):
        make_jobs([PromptRequest(0, "a", source="p.txt line 1", **of_line)], configured(**typed), TinyModels())


def test_batches_share_size_and_settings_and_keep_order() -> None:
    sizes = [32, 16, 32, 32, 16, 32]
    requests = [PromptRequest(index, "a", height=size) for index, size in enumerate(sizes)]
    batches = make_batches(make_jobs(requests, configured(), TinyModels()), 3)
    assert [[int(job.name) for job in batch] for batch in batches] == [[0, 2, 3], [5], [1, 4]]


def test_the_same_image_alone_and_in_a_batch() -> None:
    models = TinyModels()
    requests = [PromptRequest(i, p, seed=i, negative_prompt="dull" if i == 3 else None) for i, p in enumerate(PROMPTS)]
    jobs = make_jobs(requests, configured(images_per_prompt=2, height=16, width=40), models)
    alone = {job.name: image for job, image in generate(models, jobs, 1)}
    together = {job.name: image for job, image in generate(models, jobs, 8)}
    assert alone.keys() == together.keys() == {job.name for job in jobs}
    for name, image in alone.items():
        assert image.shape == (16, 40, 3) and image.dtype == np.uint8 and image.std() > 5
        assert np.abs(image.astype(int) - together[name]).max() <= 1
    assert np.abs(alone["00000"].astype(int) - alone["00000_1"]).max() > 10


def test_a_run_writes_images_manifest_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "out"
    long = "word " * 40
    assert run(folder, prompts=[*PROMPTS, long], batch_size=4) == 0
    names = [f"{number:05d}.png" for number in range(6)]
    assert sorted(path.name for path in folder.iterdir()) == [*names, "grid.png", "index.html", "manifest.jsonl"]
    assert [row["file"] for row in rows_of(folder)] == names
    said = capsys.readouterr().out
    assert (
        "6 images of 6 prompts" in said and "1 of 6 prompts are longer" in said and str(folder / "index.html") in said
    )
    with Image.open(folder / "00005.png") as image:
        assert image.info["prompt"] == long and image.info["checkpoint"] == "runs/tiny/stage1"
        assert json.loads(image.info["settings"])["steps"] == 4 and image.info["seed"] == "0"


def test_finished_images_are_not_drawn_again(tmp_path: Path) -> None:
    run(tmp_path)
    before = {path.name: (path.stat().st_mtime_ns, pixels(path)) for path in tmp_path.glob("0*.png")}
    models = TinyModels()
    run(tmp_path, models)
    assert models.rows_seen == []
    (tmp_path / "00002.png").unlink()
    run(tmp_path, models, prompts=[*PROMPTS, "one more"])
    assert sum(models.rows_seen) == 2 * 2 * 4  # two images, guided, four steps
    after = {path.name: (path.stat().st_mtime_ns, pixels(path)) for path in tmp_path.glob("0*.png")}
    assert len(after) == 6 and all(after[name][0] == before[name][0] for name in before if name != "00002.png")
    assert np.abs(after["00002.png"][1] - before["00002.png"][1]).max() <= 1  # now in a batch of two
    assert [row["name"] for row in rows_of(tmp_path)] == [f"{number:05d}" for number in range(6)]


def test_other_settings_in_the_same_folder_are_refused(tmp_path: Path) -> None:
    run(tmp_path, prompts=PROMPTS[:1])
    for values, models, changed in (
        ({"steps": 3}, TinyModels(), "steps=4 (now 3)"), ({"seed": 1}, TinyModels(), "seed=0 (now 1)"),
        ({}, TinyModels(step=8), "step=7 (now 8)"), ({"prompts": ["other"]}, TinyModels(), "(now other)"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=re.escape(changed) + ".*output_dir="):
            run(tmp_path, models, **{"prompts": PROMPTS[:1], **values})  # type: ignore[arg-type]


def test_a_signal_stops_between_steps_and_the_same_command_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = TinyModels()
    requests, config = requests_of(PROMPTS), configured(batch_size=2)
    handler = signal.getsignal(signal.SIGTERM)
    denoise, calls = models.denoise, []

    def interrupted(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 6:  # the second step of the second batch
            os.kill(os.getpid(), signal.SIGTERM)
        return denoise(*arguments)

    models.denoise = interrupted
    with stop_on_signals() as stop:
        assert draw_all(models, requests, config, tmp_path, Processes(), stop) == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is handler
    assert len(calls) == 6 and [row["name"] for row in rows_of(tmp_path)] == ["00000", "00001"]
    said = capsys.readouterr().out
    assert "Stopped with 2 of 5 images" in said and "same command" in said and (tmp_path / "index.html").is_file()
    run(tmp_path, batch_size=2)
    run(tmp_path / "whole")
    for name in ("00000.png", "00003.png"):
        assert np.abs(pixels(tmp_path / name) - pixels(tmp_path / "whole" / name)).max() <= 1


def test_two_commands_do_not_draw_into_one_folder(tmp_path: Path) -> None:
    out, said = tmp_path / "out", "another command is drawing into it"
    config = SampleConfig(ckpt=str(ROOT / "data" / "nano"), prompt="a", output_dir=str(out))
    with written_alone(out, Processes(), said):
        with pytest.raises(UserError, match=said), written_alone(out, Processes(), said):
            pass
        with written_alone(tmp_path / "other", Processes(), said):
            pass
        with pytest.raises(UserError, match=r"another command is drawing into .*out; wait for its end"):
            sample(config)
    with written_alone(out, Processes(), said):
        pass


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / ".00003.png.part").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"no space left.*same command again") as caught:
        run(tmp_path, batch_size=2)
    assert "\n" not in str(caught.value)
    assert [row["name"] for row in rows_of(tmp_path)] == ["00000", "00001", "00002"]
    models = TinyModels()
    assert run(tmp_path, models, batch_size=2) == 0
    assert len(rows_of(tmp_path)) == 5 and sum(models.rows_seen) == 2 * 2 * 4
    with pytest.raises(UserError, match="cannot be written"):
        run(tmp_path / "00003.png" / "out")


def test_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for ckpt, expected in (
        ("runs/nano", "runs/nano/samples"), ("runs/nano/stage2", "runs/nano/stage2/samples"), ("data/nano", "samples"),
        ("runs/nano/stage2/checkpoints/step_000060", "runs/nano/stage2/samples/step_000060"),
    ):  # fmt: skip
        assert output_folder(SampleConfig(ckpt=ckpt)) == Path(expected)
    assert output_folder(SampleConfig(ckpt="runs/nano", output_dir="out")) == Path("out")


def test_wrong_input_is_refused_before_models_are_looked_for(tmp_path: Path) -> None:
    empty = tmp_path / "p.txt"
    empty.write_text("\n")
    nowhere = str(tmp_path / "no-checkpoint")
    with pytest.raises(UserError, match="holds no prompts"):
        sample(SampleConfig(ckpt=nowhere, prompt_file=str(empty)))
    with pytest.raises(UserError, match="guidance=-1"):
        sample(SampleConfig(ckpt=nowhere, prompt="a", guidance=-1))
    with pytest.raises(UserError, match="expected one of prompt= and prompt_file="):
        sample(SampleConfig(ckpt=nowhere))


def test_a_launcher_without_an_address_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="RANK, MASTER_ADDR, MASTER_PORT is not set"), joined_processes():
        pass
    with pytest.raises(UserError, match="standard input"):
        sample(SampleConfig(ckpt="x", prompt_file="-"))


def test_two_processes_draw_the_same_images_as_one(tmp_path: Path) -> None:
    prompt_file = tmp_path / "p.jsonl"
    rows = [{"prompt": prompt, "seed": seed, "height": 16 + 16 * (seed % 2)} for seed, prompt in enumerate(PROMPTS)]
    prompt_file.write_text("\n".join(map(json.dumps, rows)))
    config, one, two = SampleConfig(ckpt="runs/tiny", prompt_file=str(prompt_file)), tmp_path / "one", tmp_path / "two"
    draw_all(TinyModels(), read_prompts(prompt_file=prompt_file), config, one, Processes(), StopSignal())
    context, port = multiprocessing.get_context("fork"), free_port()
    pair = [context.Process(target=draw_as, args=(rank, port, prompt_file, two)) for rank in range(2)]
    for process in pair:
        process.start()
    for process in pair:
        process.join(120)
    assert [process.exitcode for process in pair] == [0, 0]
    assert "5 images" in (tmp_path / "two.rank0").read_text() and not (tmp_path / "two.rank1").read_text()
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    assert [row["name"] for row in rows_of(two)] == [f"{number:05d}" for number in range(5)]
    for row in rows_of(two):
        assert np.abs(pixels(one / str(row["file"])) - pixels(two / str(row["file"]))).max() <= 1
