"""Pictures that come from elsewhere: folders named after the prompts, and pipelines of diffusers."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import user_error
from evaluations import evaluate_here, record_in, write_prompts
from official_models import MODERN, make_ours
from PIL import Image
from pydantic import TypeAdapter
from tiny_encoders import make_tokenizer

from paradiffusion.checkpoints.export import export_pipeline
from paradiffusion.checkpoints.layouts import open_layout
from paradiffusion.errors import UserError
from paradiffusion.evaluation.drawing.checkpoint_pictures import CheckpointSource
from paradiffusion.evaluation.drawing.picture_folder import match_pictures
from paradiffusion.evaluation.drawing.picture_source import size_for
from paradiffusion.evaluation.drawing.pipeline_pictures import PipelineSource
from paradiffusion.evaluation.evaluate_options import EvaluateOptions
from paradiffusion.evaluation.records import Request
from paradiffusion.evaluation.suites.load import load_suite
from paradiffusion.evaluation.suites.suite import Suite, SuitePrompt

SUITE = Suite(
    "birds", "Birds",
    (
        SuitePrompt("heron", "A grey heron.", meta={"image": "bird_17.jpg"}), SuitePrompt("heron_1", "Another heron."),
        SuitePrompt("wren", "A wren on a twig."),
    ),
)  # fmt: skip


def firsts(folder: Path, suite: Suite) -> dict[str, str]:
    """The name of each prompt's first picture."""
    return {key: files[0].name for key, files in match_pictures(folder, suite).files.items() if files[0]}


def put(folder: Path, *names: str, colour: str = "red") -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 16), colour).save(folder / name)
    return folder


def matched(folder: Path) -> dict[str, list[str | None]]:
    found = match_pictures(folder, SUITE).files
    return {key: [file and file.relative_to(folder).as_posix() for file in files] for key, files in found.items()}


def test_names_of_pictures(tmp_path: Path) -> None:
    by_id = put(tmp_path / "ids", "heron.png", "heron_1.webp", "heron_2.png", "wren-1.jpg", "wren-2.JPG", "owl.png")
    # "heron_1" is a prompt, and no second picture of "heron"; a folder may count from 1
    expected: dict[str, list[str | None]] = {
        "heron": ["heron.png", None, "heron_2.png"],
        "heron_1": ["heron_1.webp"],
        "wren": ["wren-1.jpg", "wren-2.JPG"],
    }
    assert matched(by_id) == expected
    assert match_pictures(by_id, SUITE).strangers == ["owl.png"]
    rows = put(tmp_path / "rows", "00000.png", "00000_1.png", "00002.png", "00003.png")
    assert matched(rows) == {"heron": ["00000.png", "00000_1.png"], "wren": ["00002.png"]}
    assert match_pictures(rows, SUITE).strangers == ["00003.png"]
    assert matched(put(tmp_path / "own", "bird_17.png", "bird_17_1.png")) == {"heron": ["bird_17.png", "bird_17_1.png"]}
    inside = put(tmp_path / "inside", "00002/samples/0000.png", "00002/samples/0001.png", "wrens/a.png")
    assert matched(inside) == {"wren": ["00002/samples/0000.png", "00002/samples/0001.png"]}
    twice = put(tmp_path / "twice", "wren.jpg", "wren.png")
    assert match_pictures(twice, SUITE).strangers == ["wren.png"]
    assert match_pictures(inside, SUITE).usual() == 2 and match_pictures(twice, SUITE).usual() == 1


def test_rows_are_of_the_whole_suite(tmp_path: Path) -> None:
    """Whoever drew all prompts and judges some of them has numbered all of them."""
    whole = Suite("n", "N", tuple(SuitePrompt(f"p{number}", f"bird {number}") for number in range(6)))
    folder = put(tmp_path / "rows", *(f"{number:05d}.png" for number in range(6)))
    for some in (whole.first(3), TypeAdapter(Suite).validate_python(json.loads(json.dumps(asdict(whole.first(3)))))):
        assert firsts(folder, some) == {"p0": "00000.png", "p2": "00002.png", "p4": "00004.png"}
        assert match_pictures(folder, some).strangers == ["00001.png", "00003.png", "00005.png"]
    assert whole.first(4).first(2).rows == (0, 3)
    # Rows mean nothing where ids look like them.
    suite = Suite("n", "N", (SuitePrompt("00001", "one"), SuitePrompt("00000", "two")))
    assert firsts(folder, suite) == {"00000": "00000.png", "00001": "00001.png"}


def test_a_manifest_says_what_each_picture_shows(tmp_path: Path) -> None:
    """A folder that sample.py drew from another order of the prompts."""
    folder = put(tmp_path, "00000.png", "00001.png", "00001_1.png", "00002.png", "grid.png")
    row = {"negative_prompt": None, "seed": 0, "height": 16, "width": 24}

    def manifest(**texts: str) -> None:
        lines = [{"name": name, "file": f"{name}.png", "prompt": text, **row} for name, text in texts.items()]
        write_prompts(folder / "manifest.jsonl", lines)

    manifest(**{"00000": "A wren on a twig.", "00001": "A grey heron.", "00001_1": "A grey heron.", "00002": "a cat"})
    assert matched(folder) == {"wren": ["00000.png"], "heron": ["00001.png", "00001_1.png"]}
    assert match_pictures(folder, SUITE).strangers == ["00002.png"]
    manifest(**dict.fromkeys(["00000", "00001", "00001_1", "00002"], "a cat"))
    user_error(r"by its manifest.jsonl show other prompts than suite=", match_pictures, folder, SUITE)
    with pytest.raises(UserError, match=r"expected names such as heron.png or 00000.png or bird_17.png"):
        match_pictures(put(tmp_path / "other", "x.png"), SUITE)


def test_a_folder_of_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    folder = put(Path("theirs"), "val-000000.png", "val-000001.jpg", "val-000001_1.jpg", "cat.png")
    (folder / "val-000002.png").write_bytes(b"<script>no picture</script>")
    arguments = (f"images={folder}", "suite=scenes", "suite_options={number: 4}", "scores=[scenes]")
    assert evaluate_here(*arguments) == 0
    printed = capsys.readouterr().out
    assert "2 of 4 images failed and count as failures: val-000002, val-000003" in printed
    assert "2 pictures are not used, since they are named after no wanted image: cat.png, val-000001_1.jpg" in printed
    home = Path("runs/evaluation/theirs/scenes")
    record = record_in(home)
    assert [image["error"] for image in record["images"]] == [
        "", "", "the picture cannot be read (does not decode: UnidentifiedImageError)", "there is no picture of this name"
    ]  # fmt: skip
    assert record["source"]["missing"] == 1 and record["source"]["broken"] == 1
    last = {row["image"]: row for row in record["scores"][0]["images"]}["val-000003"]
    assert last["error"] and last["values"]["colour_at_place"] == 0

    put(folder, "val-000002.png")  # mended: what was noted about it is forgotten
    assert evaluate_here(*arguments) == 0
    again = {row["image"]: row for row in record_in(home)["scores"][0]["images"]}
    assert again["val-000002"]["error"] == "" and again["val-000003"]["error"]
    put(folder, "val-000000.png", colour="blue")  # another picture under the old name
    settings = home / "scores" / "scenes" / "settings.json"
    before = settings.read_text()
    evaluate_here(*arguments)
    assert settings.read_text() != before

    Path("bare").mkdir()
    for pictures, words in (
        (put(Path("elsewhere/theirs"), "val-000000.png"), "scenes was made with images="),
        (put(Path("wrong"), "x.png"), "holds 1 pictures, such as x.png, and none named after a prompt of suite=scenes"),
        (Path("bare"), "images=bare holds no picture"),
    ):
        user_error(words, evaluate_here, f"images={pictures}", *arguments[1:])


def test_scenes_grow_with_the_model() -> None:
    scenes = load_suite("scenes", count=3)
    assert size_for(scenes, 56, 72, 128, 8) == (112, 144)
    assert size_for(scenes, 56, 72, 64, 16) == (64, 64)  # to what the model can draw
    larger = load_suite("scenes", count=3, options={"scale": 2})
    assert size_for(larger, 112, 144, 128, 8) == (112, 144)  # pixels, as the user said
    assert size_for(SUITE, 40, 48, 512, 8) == (40, 48)


# ---- pipelines


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion of a few thousand random weights."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = tmp_path_factory.mktemp("pipelines")
    tokenizer = make_tokenizer("clip_text_model")
    tokenizer.model_max_length, pieces = 24, len(tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16, norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=2,
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
        )  # fmt: skip
        config = CLIPTextConfig(
            vocab_size=pieces, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=24, bos_token_id=pieces - 2, eos_token_id=pieces - 1, pad_token_id=pieces - 1,
        )  # fmt: skip
        text = CLIPTextModel(config)
    pipe = StableDiffusionPipeline(
        vae, text, tokenizer, unet, DDIMScheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder / "tiny_sd", safe_serialization=True)
    return folder / "tiny_sd"


def pixels(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted((folder / "images").glob("0*.png"))]


@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows: list[dict[str, Any]] = [{"prompt": f"bird number {'i' * number}"} for number in range(3)]
    return write_prompts(Path("birds.jsonl"), [*rows, {"prompt": "a wide one", "height": 16, "width": 32}])


def test_any_pipeline_is_drawn_with(pipeline: Path, prompts: Path) -> None:
    arguments = (f"pipeline={pipeline}", f"suite={prompts}", "steps=2", "guidance=3", "scores=[]")
    assert evaluate_here(*arguments, "images_per_prompt=2", "batch_size=4") == 0
    home = Path("runs/evaluation/tiny_sd/birds")
    record = record_in(home)
    assert (record["kind"], record["label"], record["source"]["settings"]) == (
        "pipeline", "tiny_sd", {"steps": 2, "guidance": 3.0}
    )  # fmt: skip
    assert not any(image["error"] for image in record["images"]) and len(record["images"]) == 8
    drawn = pixels(home)
    assert [image.shape[:2] for image in drawn] == [(16, 16)] * 6 + [(16, 32)] * 2
    assert not np.array_equal(drawn[0], drawn[1])
    evaluate_here(*arguments, "images_per_prompt=2", "batch_size=1", "output_dir=single")
    for one, other in zip(drawn, pixels(Path("single")), strict=True):  # an image does not depend on its batch
        assert np.abs(one.astype(int) - other).max() <= 1

    times = {path.name: path.stat().st_mtime_ns for path in (home / "images").glob("0*.png")}
    (home / "images" / "00001.png").unlink()
    evaluate_here(*arguments, "images_per_prompt=2", "batch_size=4")
    after = {path.name: path.stat().st_mtime_ns for path in (home / "images").glob("0*.png")}
    assert [name for name, at in after.items() if at != times[name]] == ["00001.png"]
    user_error(r"was made with steps=2 \(now 3\)", evaluate_here, *arguments[:2], "steps=3", "guidance=3", "scores=[]")
    shutil.copytree(pipeline, "tiny_sd")
    scheduler = Path("tiny_sd/scheduler/scheduler_config.json")
    scheduler.write_text(scheduler.read_text().replace('"epsilon"', '"v_prediction"'))
    with pytest.raises(UserError, match="was made with configs="):  # which draws otherwise with the same weights
        evaluate_here("pipeline=tiny_sd", *arguments[1:], "images_per_prompt=2")


def test_a_pipeline_that_fails_for_one_prompt(
    pipeline: Path, tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_prompts(prompts, [{"prompt": "a bird"}, {"prompt": "odd", "height": 13, "width": 16}])
    arguments = (f"pipeline={pipeline}", f"suite={prompts}", "steps=1", "scores=[]")
    assert evaluate_here(*arguments) == 0
    images = record_in(Path("runs/evaluation/tiny_sd/birds"))["images"]
    assert images[0]["error"] == "" and "the pipeline could not draw it (ValueError" in images[1]["error"]
    assert "1 of 2 images failed" in capsys.readouterr().out
    from diffusers import StableDiffusionPipeline

    encode = StableDiffusionPipeline.encode_prompt

    def refusing(self: Any, prompt: list[str], *arguments: Any, **more: Any) -> Any:
        if any("dodo" in text for text in prompt):
            raise RuntimeError("extinct\nlong ago")
        return encode(self, prompt, *arguments, **more)

    monkeypatch.setattr(StableDiffusionPipeline, "encode_prompt", refusing)
    write_prompts(prompts, [{"prompt": "a bird"}, {"prompt": "a dodo"}, {"prompt": "a wren"}])
    evaluate_here(*arguments, "output_dir=one_batch")  # the others of its batch are drawn
    errors = [image["error"] for image in record_in(Path("one_batch"))["images"]]
    assert errors == ["", "the pipeline could not draw it (RuntimeError: extinct long ago)", ""]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    evaluate_here(*arguments, "output_dir=one_batch")  # what failed is tried again
    assert not any(image["error"] for image in record_in(Path("one_batch"))["images"])
    write_prompts(prompts, [{"prompt": "odd", "height": 13, "width": 16}])
    user_error("drew none of 1 pictures: the pipeline could not draw it", evaluate_here, *arguments, "output_dir=none")


def test_what_is_no_pipeline(pipeline: Path, prompts: Path) -> None:
    shutil.copytree(pipeline, "broken")
    Path("broken/unet/diffusion_pytorch_model.safetensors").unlink()
    for arguments, words in {
        "pipeline=broken": "pipeline=broken cannot be loaded",
        "pipeline=nobody/has-this": "pipeline=nobody/has-this cannot be loaded",
        f"pipeline={pipeline} solver=dpm": "solver= is for our checkpoints",
        f"pipeline={pipeline} negative_prompt=x guidance_rescale=0.5 height=13": "drew none of 4 pictures",
    }.items():
        user_error(words, evaluate_here, *arguments.split(), f"suite={prompts}", "scores=[]")


def test_our_own_pipeline_and_the_painters(codec_folder: Path, prompts: Path) -> None:
    """An exported pipeline is drawn through its class; both painters draw the suite's very pictures again."""
    checkpoint = make_ours(Path("ours"), codec_folder, **MODERN)
    export_pipeline(open_layout(checkpoint), Path("exported"))
    suite = ("suite=scenes", "count=2", "scores=[]")
    assert evaluate_here(f"pipeline={Path('exported')}", *suite, "output_dir=a", "steps=3", "guidance=4") == 0
    assert evaluate_here(f"ckpt={checkpoint}", *suite, "output_dir=b") == 0
    scenes = load_suite("scenes", count=2)
    config = EvaluateOptions(steps=3, guidance=4).sampling()
    requests = [Request(p.text, p.seed("scenes"), p.height, p.width) for p in scenes.prompts]
    ours, exported = (CheckpointSource(checkpoint, checkpoint, config, None), PipelineSource("exported", config, None))
    for drawn in (pixels(Path("a")), *(source.painter(scenes)(requests) for source in (ours, exported))):
        for one, other in zip(drawn, pixels(Path("b")), strict=True):
            assert np.abs(one.astype(int) - other).max() <= 1
