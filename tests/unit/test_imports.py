"""The one import rule: the core, which trains and samples, imports none of the rest."""

from __future__ import annotations

import ast
import importlib
import os
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import ROOT

from paradiffusion.entry import EXTRA_OF, run

PACKAGE = ROOT / "paradiffusion"
REST = {"scenes", "metrics", "evaluation", "curation", "apps", "budget"}
# What is left to be handed to the trainer by train.py: nothing may be added.
STILL: set[str] = set()


def imported_rooms(path: Path) -> Iterator[str]:
    """Rooms that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} has a relative import"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "paradiffusion" else [module]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("paradiffusion."))


def test_the_core_imports_none_of_the_rest() -> None:
    files = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
    core = {name: path for name, path in files.items() if name.split("/")[0] not in REST}
    assert len(core) > 50
    assert {name for name, path in core.items() if REST & set(imported_rooms(path))} == STILL


@pytest.mark.parametrize(
    ("package", "module", "extra"),
    [
        ("matplotlib", "evaluation.evaluate", "evaluation"),  # before anything is drawn
        ("torchmetrics", "evaluation.scores.set_quality", "evaluation"),
        ("torch_fidelity", "metrics.inception", "evaluation"),
        ("sentence_transformers", "metrics.text_embedding", "evaluation"),
        ("openai", "metrics.endpoint", "curation"),
        ("tenacity", "curation.building.places", "curation"),
        ("pyarrow", "curation.choosing.score_files", "curation"),
        ("starlette", "apps.vote", "apps"),
        ("gradio", "apps.playground_page", "apps"),
        ("ray", "ray_pool", "ray"),
    ],
)
def test_a_package_that_is_missing_is_named_with_its_extra(
    package: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    for name in (module, "evaluation.reporting.evaluation_report", "evaluation.reporting.figures"):
        monkeypatch.delitem(sys.modules, f"paradiffusion.{name}", raising=False)
    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(SystemExit) as ended:
        run(lambda _: bool(importlib.import_module(f"paradiffusion.{module}")))
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1
    assert f"the module {package}" in said and f"paradiffusion[{extra}]" in said


@pytest.mark.parametrize("own", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_memory_of_a_gpu_grows_in_place_unless_a_user_says_otherwise(own: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    for name in names:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    if own is not None:
        monkeypatch.setenv(own, "backend:native")
    monkeypatch.setattr(sys, "argv", ["program"])
    found: dict[str, str] = {}
    with pytest.raises(SystemExit):
        run(lambda _: found.update({name: os.environ[name] for name in names if name in os.environ}) or 0)
    assert found == ({"PYTORCH_ALLOC_CONF": "expandable_segments:True"} if own is None else {own: "backend:native"})


def test_extras_are_those_of_the_project() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    called = {"sklearn": "scikit-learn"}
    for module, extra in EXTRA_OF.items():
        name = called.get(module, module).replace("_", "-")
        brought = {re.split(r"[<>=]", line)[0].lower().replace("_", "-").removesuffix("-torch") for line in extras[extra]}
        assert name in brought, (module, extra)
