"""What training, sampling and exports gave before the house was rebuilt (equivalence.json), and must give after it.

    EQUIVALENCE=write python -m pytest tests/integration/test_equivalence.py     # writes the file anew: only where a digit is meant to change

Losses agree to 1e-6 on one machine; processors of other kinds add numbers in another order, and what is asserted leaves room for that.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from training_runs import USUAL_STATISTICS, records, sample_here, train_here

from paradiffusion.training import start
from scripts.export import main as export

KEPT = Path(__file__).with_name("equivalence.json")
STEPS, CURVE = 8, 30  # of each stage; of nano's first stage, the golden curve
SHORT = [
    "batch_size=4", f"max_steps={STEPS}", "log_every=1", f"checkpoint_every={STEPS}", f"validate_every={STEPS}",
    "validation.samples=8", "validation.images=0", "validation.scenes=0", "validation.unseen=0", "precision=fp32",
    "threads=1", "data.workers=0", "optimizer.warmup_steps=5", "optimizer.schedule=constant", "objective.layout_share=0",
    "repeats=1",
]  # fmt: skip
PAPER = ["conditioning=paper", "objective=paper", "unet.coordinates=0"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, tiny_arguments: list[str], demo_folder: Path) -> dict[str, Any]:
    """All three stages of nano on its real language model and codec, and of the paper's arm at tiny size, in fp32 on one thread;
    nano's refiner takes its statistics of as many captions as a user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "STATISTICS_CAPTIONS", USUAL_STATISTICS)
        found = measure(tmp_path_factory.mktemp("arms"), tiny_arguments)
    if os.environ.get("EQUIVALENCE") == "write":
        KEPT.write_text("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in found.items()) + "\n}\n")
    return found


def measure(folder: Path, tiny_arguments: list[str]) -> dict[str, Any]:
    """By arm and stage: losses, gradient norms, losses of held-out samples, pictures and the files of exports."""
    found: dict[str, Any] = {}
    data = [argument for argument in tiny_arguments if argument.startswith("data.demo_")]
    arms = {"nano": ["preset=nano", *data, *SHORT], "paper": [*tiny_arguments, *PAPER, *SHORT]}
    for arm, arguments in arms.items():
        run = folder / arm / "run"
        for stage in (1, 2, 3):
            assert train_here([*arguments, f"run_dir={run}", f"stage={stage}"]) == 0
            rows = [row for row in records(run / f"stage{stage}") if row["kind"] == "train"]
            found[f"{arm} stage {stage} losses"] = [row["loss"] for row in rows]
            found[f"{arm} stage {stage} gradient norms"] = [row["gradient_norm"] for row in rows]
            summary = json.loads((run / f"stage{stage}/summary.json").read_text())["validation"]
            found[f"{arm} stage {stage} held out"] = [summary["loss_short"], summary["loss_long"]]
        prompts = run / "prompts.txt"
        prompts.write_text("a red circle at the top left\n\na large blue star and a small pink ring\n")
        drawn = (f"prompt_file={prompts}", f"output_dir={run}/pictures", "steps=6", "threads=1")
        assert sample_here(f"ckpt={run}", *drawn) == 0
        for number, path in enumerate(sorted((run / "pictures").rglob("0*.png"))):
            pixels = np.asarray(Image.open(path).convert("RGB").resize((16, 16), Image.Resampling.BOX))
            found[f"{arm} picture {number}"] = pixels.flatten().tolist()
        found[f"{arm} exports"] = exports_of(run, ["pipeline", "ours", *(["official"] if arm == "paper" else [])])
        if arm == "nano":  # the golden curve: stage 1 goes on from where the others began
            assert train_here([*arguments, f"run_dir={run}", f"max_steps={CURVE}", "validation.samples=0"]) == 0
            for key, what in (("loss", "losses"), ("gradient_norm", "gradient norms")):
                found[f"nano stage 1 {what}"] = [row[key] for row in records(run / "stage1")]
    return found


def exports_of(run: Path, layouts: list[str]) -> dict[str, Any]:
    """By layout, file and tensor: shape, and the sum of absolute values."""
    tensors: dict[str, Any] = {}
    for layout in layouts:
        folder = run.parent / layout
        assert export([f"ckpt={run}", f"to={layout}", f"output={folder}", "frozen=none"]) == 0
        for path in sorted(folder.rglob("*.safetensors")):
            values = load_file(path)
            if path.name == "adapter_model.safetensors":  # under PEFT's names; the same again is there for other loaders
                values = {n: value for n, value in values.items() if re.match(r"base_model\.model\.(?!model\.)", n)}
            names = {name: [list(v.shape), v.double().abs().sum().item()] for name, v in sorted(values.items())}
            tensors[f"{layout}/{path.relative_to(folder)}"] = {
                "tensors": len(names),
                "digest": names_digest(names),
                "sum": sum(total for _, total in names.values()),
            }
    return tensors


def names_digest(names: dict[str, list[Any]]) -> str:
    text = json.dumps([(name, shape) for name, (shape, _) in names.items()])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(KEPT.read_text())
    return found


@pytest.mark.parametrize("arm", ["nano", "paper"])
def test_losses_pictures_and_exports_are_those_that_were_kept(arm: str, measured: dict[str, Any], kept: dict[str, Any]) -> None:
    for stage in (1, 2, 3):
        for what, room in (("losses", 1e-3), ("held out", 1e-3), ("gradient norms", 1e-2)):
            name = f"{arm} stage {stage} {what}"
            assert measured[name] == pytest.approx(kept[name], rel=room), name
    numbers = [name for name in kept if name.startswith(f"{arm} picture")]
    assert len(numbers) == 2
    for name in numbers:
        assert np.abs(np.subtract(measured[name], kept[name])).max() <= 2, name
    given, expected = measured[f"{arm} exports"], kept[f"{arm} exports"]
    assert given.keys() == expected.keys()
    for path, values in expected.items():
        assert given[path] == {**values, "sum": pytest.approx(values["sum"], rel=1e-4)}, path
