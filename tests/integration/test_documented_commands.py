"""Every command of README.md and docs/, with steps and counts cut down; what cannot run here is named, with the test that has it."""

from __future__ import annotations

import io
import re
import runpy
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.state import AcceleratorState
from commands import ROOT
from data_fixtures import picture
from official_models import make_official
from training_runs import KEPT_HANDLERS, SMALL

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STARTS = ("python ", "accelerate ", "torchrun ", "cat ", "pip ", "make ", "hf ", "mkdir ", "paradiffusion ")
# By how a command begins: what is not run here, and why.
LEFT_OUT = {
    "make ": "the environment, then commands that are here",
    "pip ": "installs packages; test_installed.py",
    "paradiffusion ": "test_installed.py",
    "accelerate launch -m paradiffusion.cli": "test_installed.py",
    "hf ": "needs the network; test_public_sets.py has what follows it",
    "mkdir docci": "needs the network; test_public_sets.py has what follows it",
    "python scripts/index_shards.py": "test_public_sets.py, and unit/data/test_index_shards.py with a server",
    "python scripts/build_shards.py input=pixelprose": "test_public_sets.py",
    "python scripts/build_shards.py input=fine-t2i": "test_public_sets.py",
    "python scripts/build_shards.py input=docci": "test_public_sets.py",
    "python scripts/vote.py": "people vote; browser/test_vote.py",
    "python scripts/select.py": "needs CLIP's weights, and people; unit/curation/test_select.py and browser/test_review.py",
    "python scripts/caption.py": "needs a model of 8 B or a server; test_caption.py and test_caption_endpoint.py",
    "accelerate launch scripts/caption.py": "needs a model of 8 B; test_caption.py",
    "python scripts/evaluate.py pipeline=": "needs a pipeline from the hub; test_drawing_sources.py",
    "python scripts/evaluate.py images=": "needs CLIP's weights; test_drawing_sources.py",
    "torchrun --nproc_per_node 8 scripts/evaluate.py": "needs CLIP's weights; test_evaluate_processes.py",
    "python scripts/benchmark.py": "measures; test_benchmark.py",
}
SCENES = "data.demo_sizes={web: 48, big: 48, small: 24, val: 12}"
NANO = [
    "text_encoder=tiny", "unet=tiny", "codec.path=codec", "codec.latent_channels=4", "conditioning.refiner_width=32",
    "conditioning.refiner_heads=2", "conditioning.refiner_layers=1", "validation.samples=4", "validation.images=0",
    "validation.scenes=0", "data.workers=0", "batch_size=4", "max_steps=2", "log_every=1", "checkpoint_every=2",
    "log_samples=true", "precision=fp32", "keep_gb=0", "optimizer.schedule=constant", "threads=1",
]  # fmt: skip
FROZEN = ["text_encoder=tiny", *SMALL, "codec.path=codec"]
PAPER = [
    "codec.scaling_factor=null", "codec.dtype=float32", "text_encoder.dtype=float32", "precision=fp32", "data.resolution=32",
    "data.bucket_multiple=16", "data.max_aspect=1", "conditioning.max_tokens=64", "validation.samples=0", "validation.images=0",
    "data.workers=0", "batch_size=2", "micro_batch_size=2", "max_steps=2", "log_every=1", "checkpoint_every=2", "threads=1",
]  # fmt: skip
# What a command names and this machine lacks.
IN_PLACE_OF = {
    "/data/web/{00000..00099}.tar": "shards/web",
    "s3://bucket/web/{00000..09999}.tar": "shards/web",
    "/data/held_out": "shards/web",
    "/scratch": "scratch",
    "smollm2_135m": "tiny",
    "48210": "1",
}


def documented() -> list[str]:
    """Commands of the documents' code blocks, once each, without comments and with their lines joined."""
    found = []
    for document in DOCUMENTS:
        for block in re.findall(r"^```\w*\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL):
            for line in re.sub(r"\s*(  #[^\n]*)?\\\n\s+", " ", block).splitlines():
                typed = re.sub(r"\s{2,}#.*", "", line).strip()
                parts = [typed] if typed.startswith("mkdir") else typed.split(" && ")
                found += [part for part in parts if part.startswith(STARTS)]
    return list(dict.fromkeys(found))


def program_and_arguments(command: str) -> tuple[str, list[str]]:
    """The program, without a launcher in front of it, and its arguments, cut down."""
    words = [IN_PLACE_OF.get(word, word) for word in shlex.split(command)]
    start = next(number for number, word in enumerate(words) if word.endswith(".py"))
    program, arguments = words[start], words[start + 1 :]
    for end, name in IN_PLACE_OF.items():
        arguments = [argument.replace(end, name) for argument in arguments]
    stage_3 = "stage=3" in arguments
    shards = "shards/small" if stage_3 else "shards/big" if "stage=2" in arguments else "shards/web"
    arguments = [re.sub(r"^data\.shards=\.\.\.$", f"data.shards={shards}", argument) for argument in arguments]
    return program, [*arguments, *cuts(program, arguments)]


def cuts(program: str, arguments: list[str]) -> list[str]:
    """What makes a command small enough for a test."""
    given = {argument.partition("=")[0] for argument in arguments}
    if program in ("train.py", "scripts/cache.py", "scripts/inspect_data.py") and not given & {"--cfg", "--help"}:
        if "preset=paper" in arguments:
            extra = [*(FROZEN if "init_from" not in given else []), *PAPER]
        else:
            sources = ["data.sources=[{name: web, shards: shards/web}, {name: big, shards: shards/big}]"]
            own = given & {"data.shards", "data.sources", "data.folder"} or "recipe=both_worlds" in arguments
            extra = [*NANO, *([] if own else [SCENES]), *(sources if "recipe=both_worlds" in arguments else [])]
        if "preflight" in given:
            extra.append("init_from=weights/official")
        return extra
    return {
        "sample.py": ["steps=1", "threads=1"],
        "scripts/evaluate.py": ["suite=scenes", "count=2", "steps=1", "scores=[scenes,sentences]", "threads=1"],
        "scripts/ablate.py": ["print=true"],
        "scripts/download.py": ["dry_run=true"],
        "scripts/score_scenes.py": ["--scenes", "2"],
        "scripts/make_demo_data.py": ["--web", "48", "--big", "48", "--small", "24", "--val", "12", "--processes", "1"],
        "scripts/build_shards.py": ["processes=1"],
    }.get(program, [])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, demo_folder: Path, codec_folder: Path) -> Path:
    """What the documents take to be there: pictures, prompts, shards and weights; the commands make the rest, in their order."""
    home = tmp_path_factory.mktemp("documented")
    for name in ("web", "big", "small"):
        shutil.copytree(demo_folder / name, home / "shards" / name)
    shutil.copytree(codec_folder, home / "codec")
    make_official(home / "weights" / "official", codec_folder)
    pictures = home / "pictures"
    pictures.mkdir()
    rows = ["image,title,story"]
    for number in range(12):
        picture(number, 96, 96).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(f"a picture of noise, number {number}")
        rows.append(f"pictures/{number}.png,noise {number},a long story about noise number {number}")
    (home / "list.csv").write_text("\n".join(rows))
    (home / "prompts.txt").write_text("a red circle\na blue square\n")
    (home / "prompts.csv").write_text("prompt\na red circle\n")
    (home / "cases.jsonl").write_text('{"prompt": "a red circle", "seed": 3}\n')
    return home


@pytest.fixture
def there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Started in that folder, which is the person's home too; handlers of signals are put back."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    handlers = {number: signal.getsignal(number) for number in KEPT_HANDLERS}
    yield folder
    for number, handler in handlers.items():
        signal.signal(number, handler)


COMMANDS = documented()


def left_out(command: str) -> bool:
    return any(command.startswith(start) for start in LEFT_OUT)


@pytest.mark.parametrize("command", [command for command in COMMANDS if not left_out(command)])
def test_it_runs(command: str, there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "captions.json" in command:
        pytest.skip("the emoji; test_build_shards.py")
    program, arguments = program_and_arguments(command)
    if command.startswith("cat "):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO((there / "prompts.txt").read_bytes())))
    monkeypatch.setattr(sys, "argv", [str(ROOT / program), *arguments])
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / program), run_name="__main__")
    assert not ended.value.code, f"{command}, as {program} {shlex.join(arguments)}"


def test_nothing_is_left_out_that_no_document_has() -> None:
    assert len(COMMANDS) > 60
    for start in LEFT_OUT:
        assert any(command.startswith(start) for command in COMMANDS), start
