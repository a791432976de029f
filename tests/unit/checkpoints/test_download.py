"""Fetching from the hub, without one: what is said first, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import user_error
from huggingface_hub.utils import filter_repo_objects

from paradiffusion.text.sources import download as fetch
from scripts import download

OLD = ("google/t5-v1_1-xxl",)  # has its weights as .bin alone


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, dict[str, Any]]]:
    calls: list[tuple[str, dict[str, Any]]] = []

    def snapshot(hub: str, **arguments: Any) -> str:
        calls.append((hub, arguments))
        (tmp_path / "cache").mkdir(exist_ok=True)
        if "*.bin" not in arguments["allow_patterns"] and hub not in OLD:
            (tmp_path / "cache" / "model.safetensors").touch()
        return str(tmp_path / "cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    return calls


def test_a_dry_run_says_sizes_and_licences_and_fetches_nothing(hub: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert download.main(["what=all", "dry_run=true", "to=weights"]) == 0
    said = capsys.readouterr().out
    for words in ("meta-llama/Llama-2-7b-hf, about 13.5 GB, to weights/llm", "gate", "MIT", "38.5 GB", "Apache-2.0"):
        assert words in said
    assert not hub


def test_what_is_asked_for_is_fetched(hub: list[Any], tmp_path: Path) -> None:
    assert download.main(["what=vae", "yes=true"]) == 0
    assert download.main(["what=official", "yes=true", f"to={tmp_path}", "id=me/mine", "revision=abc"]) == 0
    (vae, first), (mine, second) = hub
    assert vae == "madebyollin/sdxl-vae-fp16-fix" and first["local_dir"] is None and first["revision"] is None
    assert mine == "me/mine" and second["local_dir"] == str(tmp_path / "official") and second["revision"] == "abc"
    assert not any("*.py" in pattern or pattern == "*" for pattern in second["allow_patterns"])


def test_old_weights_are_fetched_where_there_are_no_others(hub: list[Any]) -> None:
    assert download.main(["what=llm", f"id={OLD[0]}", "yes=true"]) == 0
    assert [call["allow_patterns"] == ["*.bin"] for _, call in hub] == [False, True]


@pytest.mark.parametrize(("subfolder", "wanted"), [(None, {"model.safetensors", "config.json", "tokenizer.model"}),
                                                   ("vae", {"vae/config.json", "vae/diffusion_pytorch_model.safetensors"})])  # fmt: skip
def test_of_a_repository_with_many_models_only_one_is_fetched(
    subfolder: str | None, wanted: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = [
        "model.safetensors", "config.json", "tokenizer.model", "model.onnx", "original/model.safetensors", "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors", "vae/old/config.json", "unet/config.json", "unet/model.safetensors",
    ]  # fmt: skip

    def snapshot(_: str, revision: str | None, **patterns: Any) -> str:
        for name in filter_repo_objects(there, **patterns):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert fetch("somebody/many", None, subfolder) == tmp_path
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == wanted


def test_nothing_is_fetched_unasked(hub: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    user_error("yes=true", download.main, ["what=llm"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: "no")
    user_error("nothing was fetched", download.main, ["what=llm"])
    assert not hub
    monkeypatch.setattr("builtins.input", lambda _: "Yes")
    assert download.main(["what=llm"]) == 0 and len(hub) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "what= is missing"), (["what=everything"], "llm, vae, official, all"),
        (["what=all", "id=a/b"], "choose one repository"), (["what=llm", "force=true"], "the keys are what, to, id"),
    ],
)  # fmt: skip
def test_wrong_keys(hub: list[Any], arguments: list[str], words: str) -> None:
    user_error(words, download.main, arguments)
    assert not hub


def test_a_hub_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    for message, words in (
        ("401 Client Error: gated repo", "accept its licence"), ("\nName or service not known\nmore", "not known.*try again"),
    ):  # fmt: skip

        def fail(*_: Any, said: str = message, **__: Any) -> str:
            raise OSError(said)

        monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
        user_error(words, download.main, ["what=llm", "yes=true"])
