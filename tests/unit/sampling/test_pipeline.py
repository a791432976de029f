"""From prompts to a folder of images: jobs, batches, resume, stop; images on disk, the page, contact sheets, the manifest."""

from __future__ import annotations

import html
import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, user_error
from PIL import Image
from sampling_models import TinyModels

from paradiffusion.config import SampleConfig, SamplerConfig
from paradiffusion.errors import UserError
from paradiffusion.sampling import gallery
from paradiffusion.sampling.gallery import (
    ImageRecord,
    Manifest,
    contact_sheet,
    finished_names,
    merge_manifests,
    read_manifests,
    save_png,
    write_gallery,
)
from paradiffusion.sampling.pipeline import generate, make_batches, make_jobs
from paradiffusion.sampling.prompts import PromptRequest
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
    assert [job.negative_prompt for job in make_jobs(requests, config, models)] == [None, None], "it has no effect, nor is it recorded"


@pytest.mark.parametrize(
    ("of_line", "typed", "expected"),
    [
        ({"height": 100}, {}, "height=100 (p.txt line 1) cannot be drawn by this model; expected a multiple of 8, the "),
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
    assert "6 images of 6 prompts" in said and "1 of 6 prompts are longer" in said and str(folder / "index.html") in said
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


def test_a_signal_stops_between_steps_and_the_same_command_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
        user_error(r"another command is drawing into .*out; wait for its end", sample, config)
    with written_alone(out, Processes(), said):
        pass


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / ".00003.png.part").symlink_to("/dev/full")
    user_error(r"no space left.*same command again", run, tmp_path, batch_size=2)
    assert [row["name"] for row in rows_of(tmp_path)] == ["00000", "00001", "00002"]
    models = TinyModels()
    assert run(tmp_path, models, batch_size=2) == 0
    assert len(rows_of(tmp_path)) == 5 and sum(models.rows_seen) == 2 * 2 * 4
    user_error("cannot be written", run, tmp_path / "00003.png" / "out")


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
    user_error("holds no prompts", sample, SampleConfig(ckpt=nowhere, prompt_file=str(empty)))
    user_error("guidance=-1", sample, SampleConfig(ckpt=nowhere, prompt="a", guidance=-1))
    user_error("expected one of prompt= and prompt_file=", sample, SampleConfig(ckpt=nowhere))


def test_a_launcher_without_an_address_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="RANK, MASTER_ADDR, MASTER_PORT is not set"), joined_processes():
        pass
    user_error("standard input", sample, SampleConfig(ckpt="x", prompt_file="-"))


PROMPT = 'a <script>alert("1")</script> & "red" circle, 日本\nnext line' + " word" * 200


def picture(height: int = 16, width: int = 24, value: int = 0) -> np.ndarray:
    image = np.full((height, width, 3), value, np.uint8)
    image[:, : width // 2] = (255, 10, 20)
    return image


def record(folder: Path, name: str, image: np.ndarray | None = None, **values: object) -> ImageRecord:
    """Write an image and give its record."""
    image = picture() if image is None else image
    made = ImageRecord(name, PROMPT, None, 3, *image.shape[:2], {"steps": 4, "guidance": 2.5}, "runs/a", 9)
    made = replace(made, **values)
    return replace(made, bytes=save_png(folder / made.file, image, {"prompt": made.prompt, "checkpoint": "runs/a"}))


def test_png_carries_its_metadata_and_pixels(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    size = save_png(tmp_path / "00000.png", image, {"prompt": PROMPT, "seed": 3, "settings": {"steps": 4}})
    with Image.open(tmp_path / "00000.png") as read:
        assert np.array_equal(np.asarray(read), image)
        assert read.info["prompt"] == PROMPT
        assert json.loads(read.info["settings"]) == {"steps": 4} and read.info["seed"] == "3"
    assert size == (tmp_path / "00000.png").stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == ["00000.png"]


def sources(page: str) -> list[str]:
    return re.findall(r'<img[^>]* src="([^"]+)"', page)


def test_page_is_self_contained_escaped_and_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        record(tmp_path, "00000"),
        record(tmp_path, "00000_1", seed=4),
        record(tmp_path, "00001", picture(700, 600), prompt="large", negative_prompt="<b>blurry"),
    ]
    page = write_gallery(tmp_path, rows, "runs/a <&>").read_text(encoding="utf-8")
    text = html.unescape(re.sub(r"<[^>]*>", "", page))
    assert "<script" not in page and PROMPT in text and "<b>blurry" in text and "runs/a <&>" in text
    assert not re.search(r'(src|href)="(https?:|//)', page)
    assert [source.split(";")[0] for source in sources(page)] == ["data:image/png", "data:image/png", "data:image/jpeg"]
    assert re.findall(r'<a [^>]*href="([^"]+)"', page) == ["00000.png", "00000_1.png", "00001.png"]
    assert page.count("<article") == 2  # the images of one prompt share a card
    for word in ("seed 3", "seed 4", "700x600", "guidance 2.5", "step 9", "3 images, 2 prompts"):
        assert word in text
    assert page.count('class="tiny"') == 2 and "image-rendering: pixelated" in page

    rows = [record(tmp_path, f"{number:05d}", prompt=f"prompt {number}") for number in range(3)]
    monkeypatch.setattr(gallery, "MAX_EMBEDDED", 2)
    assert sources(write_gallery(tmp_path, rows, "t").read_text()) == ["00000.png", "00001.png", "00002.png"]


def test_contact_sheet_places_images_in_rows_with_labels_below() -> None:
    sheet = contact_sheet([np.full((8, 8, 3), value, np.uint8) for value in (10, 20, 30)], columns=2, scale=2, gap=4)
    assert sheet.size == (2 * 20 + 4, 2 * 20 + 4)
    assert [sheet.getpixel(at)[0] for at in ((4, 4), (24, 4), (4, 24), (24, 24))] == [10, 20, 30, 255]
    images = [np.full((40, 80, 3), 128, np.uint8)] * 3
    labels = (["", "", ""], ["a", "b", "c"], ["a", "many words that need several lines", "x" * 60])
    plain, short, long = (contact_sheet(images, columns=3, labels=one) for one in labels)
    assert plain.size[0] == short.size[0] == long.size[0] and plain.size[1] <= short.size[1] < long.size[1]
    pixels = np.asarray(long.convert("L"))
    assert pixels[50:, 8:16].min() < 128 and pixels[:, -8:].min() == 255  # text below, and none beyond the edge
    with pytest.raises(ValueError, match="3 images with 1 labels"):
        contact_sheet(images, 2, labels=["a"])


def append(path: Path, *rows: ImageRecord) -> None:
    manifest = Manifest(path)
    for row in rows:
        manifest.append(row)
    manifest.close()


def test_manifest_survives_a_cut_line_and_joins_in_order(tmp_path: Path) -> None:
    rows = {name: record(tmp_path, name) for name in ("00002", "00002_1", "00010", "100000")}
    cut = tmp_path / "manifest.rank1.jsonl"
    append(cut, rows["00010"])
    append(tmp_path / "manifest.rank0.jsonl", rows["100000"], rows["00002_1"])
    cut.write_bytes(cut.read_bytes() + b'{"name": "0000')
    assert list(read_manifests(tmp_path)) == ["00002_1", "00010", "100000"]
    append(cut, rows["00002"])
    assert merge_manifests(tmp_path) == list(rows.values()) == list(read_manifests(tmp_path).values())
    lines = (tmp_path / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["file"] for line in lines] == [f"{name}.png" for name in rows]
    assert json.loads(lines[0])["prompt"] == PROMPT and not list(tmp_path.glob("*rank*"))


def test_finished_images_must_be_whole_and_the_same(tmp_path: Path) -> None:
    rows = [record(tmp_path, name) for name in ("00000", "00001", "00002")]
    append(tmp_path / "manifest.jsonl", *rows)
    (tmp_path / "00001.png").unlink()
    (tmp_path / "00002.png").write_bytes(b"cut")
    wanted = [replace(row, bytes=0) for row in rows]
    assert finished_names(tmp_path, wanted) == {"00000"}
    changed = [replace(wanted[0], seed=4, settings={"steps": 5, "guidance": 2.5})]
    user_error(r"00000\.png was drawn with seed=3 \(now 4\); steps=4 \(now 5\).*output_dir=", finished_names, tmp_path, changed)

    (tmp_path / "manifest.jsonl").unlink()
    Image.fromarray(picture()).save(tmp_path / "00000.png")
    user_error(r"was not drawn by sample\.py", finished_names, tmp_path, [ImageRecord("00000", "p", None, 0, 16, 24)])
    ours = record(tmp_path, "00001")  # the process ended before its line was written
    assert finished_names(tmp_path, [ours]) == set()
