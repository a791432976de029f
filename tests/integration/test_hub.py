"""Checkpoints on a hub, by its own client and a server on this machine: pushed with a card, then used from there by every program."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from commands import Command
from hub_server import Hub, hub_server, point_at
from official_models import make_official, make_ours
from PIL import Image

from paradiffusion.checkpoints.layouts import find_checkpoint
from paradiffusion.compose import compose_options
from paradiffusion.evaluation.evaluate_options import EvaluateOptions
from paradiffusion.evaluation.subjects import subjects_of

NAME = "me/tiny"
DRAW = ("prompt=A red circle.", "seed=3", "steps=2", "device=cpu")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with hub_server() as running:
        point_at(monkeypatch, running.url, tmp_path / "cache")
        yield running


@pytest.fixture(scope="module")
def ours(codec_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ours(tmp_path_factory.mktemp("ours") / "ours", codec_folder)


def picture(folder: Path) -> np.ndarray:
    return np.asarray(Image.open(folder / "00000.png"))


def refused(said: str, found: Any) -> None:
    assert found.returncode == 2 and "Traceback" not in found.stderr
    (line,) = found.stderr.strip().splitlines()
    assert re.search(said, line), line


def test_a_run_goes_to_the_hub_and_comes_back(
    hub: Hub, train: Command, command: Command, codec_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("stage=1")
    run, codec, here, back = tmp_path / "run", f"codec.path={codec_folder}", tmp_path / "here", tmp_path / "back"
    assert command("sample.py", f"ckpt={run}", f"output_dir={here}", *DRAW).returncode == 0
    judged = ("suite=scenes", "count=2", "scores=[scenes]", "steps=2", "device=cpu", codec)
    assert command("scripts/evaluate.py", f"ckpt={run}", *judged).returncode == 0
    publish = ("scripts/publish.py", f"ckpt={run}", f"hub={NAME}", "licence=apache-2.0", f"samples={here}")

    shown = command(*publish, "dry_run=true")
    assert shown.returncode == 0 and not hub.asked
    pushed = command(*publish)
    assert pushed.returncode == 0 and f"{hub.url}/{NAME}/commit/" in pushed.stdout
    files = hub.commits[NAME][-1]
    listed = {name: int(size.replace(",", "")) for size, name in re.findall(r"^ *([\d,]+)  (\S+)$", shown.stdout, re.M)}
    assert listed == {name: len(data) for name, data in files.items()}
    card = files["README.md"].decode()
    assert card in shown.stdout and str(tmp_path) not in card and b"run" not in files["samples/00000.png"]
    loss = json.loads((run / "stage1" / "summary.json").read_text())["validation"]["loss_long"]
    for words in (
        "license: apache-2.0", "ckpt=hf://me/tiny", "| preset, stage, step | nano, 1, 8 |", "the set web of the small world",
        f"| loss_long | {loss:.4f} |", "(2 steps, guidance", "![00000](samples/00000.png) | A red circle. | seed 3, 2 steps", "@article",
    ):  # fmt: skip
        assert words in card, words
    earlier = f"ckpt={run / 'stage1' / 'checkpoints' / 'step_000004'}"
    shown = command(publish[0], earlier, *publish[2:], "dry_run=true")  # what was measured and drawn is of another step
    assert "None were recorded" in shown.stdout and "None were drawn" in shown.stdout

    address = f"hf://{NAME}"
    assert command("sample.py", f"ckpt={address}", f"output_dir={back}", codec, *DRAW).returncode == 0
    assert np.array_equal(picture(back), picture(here))
    cached = {path.suffix for path in find_checkpoint(address).folder.rglob("*") if path.is_file()}
    assert cached == {".json", ".safetensors"}, "nothing else is fetched"
    record = json.loads((back / "manifest.jsonl").read_text())
    assert record["checkpoint"] == f"hf://{NAME}@{hub.sha(NAME)}"
    train("stage=2", f"init_from={address}", f"run_dir={tmp_path / 'second'}", "max_steps=4")
    assert command("scripts/evaluate.py", f"ckpt={address}", f"output_dir={tmp_path / 'out'}", *judged).returncode == 0
    subjects = subjects_of(compose_options(EvaluateOptions, [f"compare=[{address},own={run}]", "device=cpu"]))
    assert [subject.source and subject.source.label for subject in subjects] == ["me_tiny", "own"]
    assert command("scripts/export.py", f"ckpt={address}", "to=ours", f"output={tmp_path / 'copy'}").returncode == 0

    # The cache is enough without the network, and where it is not, one sentence says so.
    point_at(monkeypatch, hub.url, tmp_path / "cache", offline=True)
    asked = len(hub.asked)
    assert find_checkpoint(address).description["step"] == 8 and len(hub.asked) == asked
    refused("not whole in the cache", command("sample.py", "ckpt=hf://me/other", f"output_dir={back}", *DRAW))


def test_what_an_older_push_left_is_gone(hub: Hub, command: Command, ours: Path) -> None:
    """An adapter that stays behind would be applied; a file of the user's own is left alone."""
    assert command("scripts/publish.py", "--ckpt", str(ours), "--hub", NAME).returncode == 0
    first = hub.sha(NAME)
    hub.commits[NAME][-1]["notes.txt"] = b"mine"
    hub.commits[NAME][-1]["text_encoder_lora/other.safetensors"] = b"of before"
    assert command("scripts/publish.py", f"ckpt={ours}", f"hub={NAME}", "data=Two | sets").returncode == 0
    files = hub.commits[NAME][-1]
    assert "text_encoder_lora/other.safetensors" not in files and files["notes.txt"] == b"mine"
    assert r"Two \| sets" in files["README.md"].decode() and hub.sha(NAME) != first
    assert find_checkpoint(f"hf://{NAME}@{first}").folder.name == first


def test_a_language_model_never_goes_along(hub: Hub, command: Command, codec_folder: Path, tmp_path: Path) -> None:
    official = make_official(tmp_path / "weights", codec_folder, {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]})
    assert command("scripts/publish.py", f"ckpt={official}", f"hub={NAME}").returncode == 0
    files = hub.commits[NAME][-1]
    assert {name for name in files if name.endswith(".safetensors")} == {
        "unet/diffusion_pytorch_model.safetensors", "text_encoder_lora/adapter_model.safetensors"
    }  # fmt: skip
    card = files["README.md"].decode()
    assert "`meta-llama/Llama-2-7b-hf`" in card and "Neither is part of this repository" in card and "None was given" in card


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ((401, ""), "does not accept the token"), ((403, ""), "token does not allow"),
        ((403, "GatedRepo"), "has a gate; accept its licence"), ((404, "RepoNotFound"), "no such repository"),
        ((503, ""), "answers 503; try again"), (None, "cannot be reached"),
    ],
)  # fmt: skip
def test_a_hub_that_refuses(
    fault: tuple[int, str] | None, said: str, hub: Hub, command: Command, ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.fault = fault
    if fault is None:
        point_at(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    refused(f"hub={NAME} cannot be pushed to: .*{said}", command("scripts/publish.py", f"ckpt={ours}", f"hub={NAME}"))
    refused(f"ckpt=hf://{NAME} cannot be fetched: .*{said}", command("sample.py", f"ckpt=hf://{NAME}", *DRAW))
    assert not any("commit" in asked for asked in hub.asked)


def test_what_is_asked_for_wrongly(hub: Hub, command: Command, ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, said in (
        ([f"ckpt={ours}", "hub=tiny"], "expected hub=USER/NAME"), ([f"ckpt={ours}"], "output=<folder> or hub="),
        ([f"ckpt={ours}", f"output={tmp_path / 'x'}", "dry_run=true"], "add hub="), ([f"ckpt={ours}", "hubs=me/x"], "did you mean hub="),
    ):  # fmt: skip
        refused(said, command("scripts/publish.py", *arguments))
    for address, said in (("hf://tiny", "is no address"), (f"hf://{NAME}", "no such repository")):
        refused(said, command("sample.py", f"ckpt={address}", *DRAW))
    assert command("scripts/publish.py", f"ckpt={ours}", f"hub={NAME}").returncode == 0
    refused("no such revision", command("sample.py", f"ckpt=hf://{NAME}@v2", *DRAW))
    point_at(monkeypatch, hub.url, tmp_path / "cache", token=None)
    refused("needs a token, and there is none", command("scripts/publish.py", f"ckpt={ours}", f"hub={NAME}"))


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device", "file"), TypeError("a fault of ours")])
def test_what_is_no_fault_of_the_hub_is_not_told_as_one(fault: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", mock.Mock(side_effect=fault))
    with pytest.raises(type(fault)):
        find_checkpoint(f"hf://{NAME}")
