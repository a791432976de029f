"""DDP, ZeRO-2 and ZeRO-3 on two processes: the same losses as one process, from the commands that a user types."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ROOT
from ranks import launch
from safetensors.torch import load_file
from spoiled_train import spoil
from training_runs import build_here, drawn_here, newest, records, steps_saved, train_here

from paradiffusion.training.trainer import Trainer

STEPS, HALF = 12, 7  # of four samples; an epoch of the small set of scenes
# Where stage 2 is stopped, and where it ends. A step under ZeRO-3 on processors takes half a second.
LENGTHS = {"ddp": (HALF, STEPS), "zero2": (HALF, STEPS), "zero3": (2, 4)}
# Micro-batches of one sample: 1 process x 4 accumulated beside 2 x 2.
SETTINGS = [
    "log_every=1", "checkpoint_every=4", "validate_every=4", "micro_batch_size=1", "keep_last=9", "log_samples=true",
    "optimizer.warmup_steps=4", "conditioning.max_tokens=64",  # attention over 256 tokens would cost more than it tells here
]  # fmt: skip
KINDS = ("ddp", "zero2", "zero3")
# ZeRO-3 is experimental: what it must keep is the model, not the last bits.
PRECISION = {"ddp": 1e-5, "zero2": 1e-5, "zero3": 1e-4}


def train_on_two(kind: str, *arguments: str, new_interpreters: bool = False) -> str:
    result = launch(kind, "train.py", *arguments, new_interpreters=new_interpreters)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    label = {"ddp": "DDP", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}[kind]
    accumulated = 2 if "micro_batch_size=1" in arguments else 1
    assert f"{label}, 2 process(es) x {accumulated} micro-batch(es)" in result.stdout
    assert "trained: 0.00 M" not in result.stdout
    return result.stdout


def losses_of(stage: Path) -> list[float]:
    rows = records(stage)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def keys_of(stage: Path) -> dict[int, list[str]]:
    """Sample keys of each step over all processes. A step that was done again after a stop counts once."""
    found: dict[int, dict[int, list[str]]] = {}
    files = sorted((stage / "samples_seen").glob("*.jsonl"), key=lambda path: path.stem.partition("from")[2])
    for path in files:
        for row in map(json.loads, path.read_text().splitlines()):
            found.setdefault(row["step"], {})[row["rank"]] = row["keys"]
    return {step: sorted(key for keys in ranks.values() for key in keys) for step, ranks in sorted(found.items())}


@pytest.fixture(scope="module")
def settings(tiny_arguments: list[str], demo_folder: Path) -> list[str]:
    data = [f"data.shards={demo_folder / 'small'}", f"data.val_shards={demo_folder / 'val'}", "data.captions={short: 1, long: 1}"]
    return [*tiny_arguments, *SETTINGS, *data]


@pytest.fixture(scope="module")
def alone(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stages 1 and 2 in one process, never stopped."""
    run = tmp_path_factory.mktemp("alone") / "run"
    for stage in (1, 2):
        assert train_here([*settings, f"max_steps={STEPS}", f"stage={stage}", f"run_dir={run}"]) == 0
    return run


@pytest.fixture(scope="module", params=KINDS)
def launched(
    request: pytest.FixtureRequest, settings: list[str], alone: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """Stage 2 up to where it is stopped, on two processes, from the same weights as the run that it is compared with."""
    kind: str = request.param
    run = tmp_path_factory.mktemp(kind) / "run"
    more = (f"run_dir={run}", "stage=2", f"max_steps={LENGTHS[kind][0]}", f"init_from={alone / 'stage1'}")
    train_on_two(kind, *settings, *more, "async_save=true", new_interpreters=kind == "ddp")
    return kind, run


@pytest.fixture(scope="module")
def resumed(launched: tuple[str, Path], settings: list[str], alone: Path) -> tuple[str, Path]:
    """Stage 2 taken to its end by the same launch, in a copy of the run."""
    kind, run = launched
    copy = run.with_name("resumed")
    shutil.copytree(run, copy)
    more = (f"run_dir={copy}", "stage=2", f"max_steps={LENGTHS[kind][1]}", f"init_from={alone / 'stage1'}")
    assert "resuming from" in train_on_two(kind, *settings, *more)
    return kind, copy


def test_losses_are_those_of_one_process(resumed: tuple[str, Path], alone: Path) -> None:
    kind, copy = resumed
    theirs, ours, steps = alone / "stage2", copy / "stage2", LENGTHS[kind][1]
    assert len(losses_of(ours)) == steps
    assert losses_of(ours) == pytest.approx(losses_of(theirs)[:steps], rel=PRECISION[kind])
    norms = [[row["gradient_norm"] for row in records(stage)[:steps]] for stage in (ours, theirs)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    for key in ("truncated_count", "images_seen", "bad_samples"):
        assert [row[key] for row in records(ours)] == [row[key] for row in records(theirs)[:steps]]
    # The average, validated at step 4, was taken out and put back in the midst of the run.
    held_out = [{row["step"]: row["loss_long"] for row in records(stage, "validation")}[4] for stage in (ours, theirs)]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-4)


def test_checkpoint_holds_the_whole_adapter_and_draws_what_one_process_trained(
    resumed: tuple[str, Path], alone: Path, tmp_path: Path
) -> None:
    ours = newest(resumed[1] / "stage2")
    theirs = alone / "stage2" / "checkpoints" / ours.name
    adapter = load_file(ours / "text_encoder_lora" / "adapter_model.safetensors")
    # B begins at zero and A does not: an adapter that was not gathered, or not trained, has zeros in both or in B.
    assert adapter and all(tensor.numel() and tensor.abs().max() > 0 for tensor in adapter.values())
    files = sorted(theirs.rglob("*.safetensors"))
    assert files
    for path in files:
        one, two = load_file(path), load_file(ours / path.relative_to(theirs))
        assert one.keys() == two.keys() and not any("base_layer" in name or "embed_tokens" in name for name in two)
        # Adam divides by a gradient's size, so that rounding moves weights whose gradient is rounding: compare the whole.
        apart = sum(float((one[name].double() - two[name].double()).square().sum()) for name in one)
        assert apart <= 1e-6 * sum(float(one[name].double().square().sum()) for name in one)
    assert sum(path.stat().st_size for path in ours.rglob("*.safetensors")) < 5e6
    images = []
    for name, checkpoint in (("ours", ours), ("theirs", theirs)):
        images.append(drawn_here(tmp_path / name, f"ckpt={checkpoint}", "prompt=a red circle at the left", "steps=4"))
    assert images[0].std() > 1 and np.abs(images[0] - images[1]).max() <= 2


def test_one_process_goes_on_where_two_stopped(launched: tuple[str, Path], settings: list[str], alone: Path, tmp_path: Path) -> None:
    kind, run = launched
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    arguments = [*settings, f"run_dir={copy}", "stage=2", f"init_from={alone / 'stage1'}", f"max_steps={STEPS}"]
    assert train_here(arguments) == 0
    assert losses_of(copy / "stage2") == pytest.approx(losses_of(alone / "stage2"), rel=PRECISION[kind])
    check_samples(copy / "stage2", alone / "stage2", arguments)


def test_muon_takes_the_steps_of_one_process(settings: list[str], tmp_path: Path) -> None:
    """nano's own optimiser, under DDP; its bfloat16 iterations make more of the last bits than AdamW."""
    muon = [*settings, "optimizer.name=muon", "max_steps=6"]
    assert train_here([*muon, f"run_dir={tmp_path / 'one'}"]) == 0
    train_on_two("ddp", *muon, f"run_dir={tmp_path / 'two'}")
    one, two = (losses_of(tmp_path / run / "stage1") for run in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-3)


def test_two_processes_go_on_where_one_stopped(settings: list[str], alone: Path, tmp_path: Path) -> None:
    arguments = [*settings, f"run_dir={tmp_path / 'run'}", "stage=2", f"init_from={alone / 'stage1'}"]
    # Micro-batches may differ too.
    assert train_here([*arguments, "micro_batch_size=2", f"max_steps={HALF}"]) == 0
    train_on_two("zero2", *arguments, f"max_steps={STEPS}")
    folder = tmp_path / "run" / "stage2"
    assert steps_saved(folder) == [4, HALF, 8, STEPS]
    assert losses_of(folder) == pytest.approx(losses_of(alone / "stage2"), rel=1e-5)
    check_samples(folder, alone / "stage2", arguments)


def check_samples(stage: Path, reference: Path, arguments: list[str]) -> None:
    """The same samples in every step, each once an epoch: leftovers of the first are in the second, nothing twice."""
    seen, expected = keys_of(stage), keys_of(reference)
    assert list(seen) == list(range(STEPS)) and seen == expected
    plan = build_here([argument for argument in arguments if argument != "log_samples=true"]).plan
    counts = Counter(key for keys in seen.values() for key in keys)
    assert counts.total() == STEPS * 4 == plan.samples
    epoch_ends = plan.first_step(1)
    assert 0 < epoch_ends <= STEPS
    first = [key for step in range(epoch_ends) for key in seen[step]]
    assert len(first) == len(set(first)), "a sample came twice within the first epoch"
    waiting = plan.samples - len(first)
    # What waited at the end of the epoch comes before anything of its bucket comes again.
    assert len(counts) >= plan.samples - waiting and waiting < 4 * len(plan.buckets)


# Under ZeRO-3 with the language model within the joint module and outside, from a checkpoint and fresh.
@pytest.mark.parametrize(
    ("kind", "stage", "init", "more"),
    [
        ("zero3", 2, "stage1", ["text_encoder.dtype=bfloat16"]), ("zero3", 2, "scratch", []), ("zero3", 3, "stage2", ["unet.lora_rank=2"]),
        ("ddp", 2, "stage1", ["unet.lora_rank=2", "precision=bf16"]), ("zero2", 2, "stage1", ["unet.lora_rank=2", "precision=bf16"]),
    ],
    ids=["zero3 with an adapter", "zero3 fresh", "zero3 applying an adapter", "ddp", "zero2"],
)  # fmt: skip
def test_weights_of_one_process_are_made_once_or_cut_one_at_a_time(
    kind: str, stage: int, init: str, more: list[str], settings: list[str], alone: Path, tmp_path: Path
) -> None:
    init_from = f"init_from={init if init == 'scratch' else alone / init}"
    arguments = [*settings, "keep_gb=0", f"stage={stage}", init_from, *more]
    trainer = build_here([*arguments, f"run_dir={tmp_path / 'one'}"])
    trainer.close()
    expected = {**dict(trainer.joint.named_parameters()), **dict(trainer.joint.named_buffers())}
    result = launch(kind, "tests/support/built_models.py", str(tmp_path), *arguments, f"run_dir={tmp_path / 'two'}")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    for rank in range(2):
        found = load_file(tmp_path / f"{rank}.safetensors")
        assert found.keys() == expected.keys()
        assert all(found[name].dtype == e.dtype and torch.equal(found[name], e) for name, e in expected.items())
    main, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    if kind == "zero3":  # the process that has none to begin with: its half, and one whole tensor
        assert other["held"] <= 0.5 * other["all"] + other["largest"] + 4096 < 0.9 * other["all"]
    else:  # the main process alone makes them
        assert main["held"] > 0 == other["held"]


@pytest.mark.parametrize(("kind", "on_spike", "skipped"), [("zero2_offload", "rollback", [3, 4]), ("zero2", "skip", [4])])
def test_nothing_of_a_spike_is_left(
    kind: str, on_spike: str, skipped: list[int], settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither weights, moments nor gradients: offloaded ones would be added to those of the next step."""
    arguments = [*settings, "checkpoint_every=3", "max_steps=7", f"on_spike={on_spike}"]
    monkeypatch.setattr(Trainer, "encode", Trainer.encode)  # put back afterwards
    spoil(4)
    assert train_here([*arguments, f"run_dir={tmp_path / 'one'}"]) == 0
    result = launch(kind, "tests/support/spoiled_train.py", "4", *arguments, f"run_dir={tmp_path / 'two'}")
    assert result.returncode == 0, result.stderr[-4000:]
    said = "going on from the weights of" if on_spike == "rollback" else "its update is skipped"
    assert result.stdout.count(said) == 1
    one, two = (losses_of(tmp_path / name / "stage1") for name in ("one", "two"))
    assert math.isnan(one.pop(4)) and math.isnan(two.pop(4)) and two == pytest.approx(one, rel=1e-5)
    for name in ("one", "two"):
        assert json.loads((tmp_path / name / "stage1" / "summary.json").read_text())["skipped_steps"] == skipped


def test_a_launcher_that_contradicts_is_refused(tiny_arguments: list[str], tmp_path: Path) -> None:
    text = (ROOT / "configs" / "launch" / "zero2.yaml").read_text()
    settings = tmp_path / "launch.yaml"  # an absolute path, which stands for itself
    settings.write_text(text.replace("  zero_stage: 2\n", "  zero_stage: 2\n  gradient_accumulation_steps: 4\n"))
    result = launch(str(settings.with_suffix("")), "train.py", *tiny_arguments, f"run_dir={tmp_path / 'run'}")
    # torch's launcher prints a traceback of its own over any exit but 0; none comes from here.
    assert result.returncode != 0 and "paradiffusion/" not in result.stdout + result.stderr
    assert result.stderr.count("error: the launch configuration says gradient_accumulation_steps=4") == 1
    assert not (tmp_path / "run").exists()


def test_a_stage_of_distillation_takes_the_steps_of_one_process(settings: list[str], alone: Path, tmp_path: Path) -> None:
    """The teacher, with stage 2's adapter, stands whole in each process; the student is cut by ZeRO."""
    stage = [
        *settings,
        "stage=4",
        "objective.distill_steps=2",
        "objective.distill_substeps=2",
        f"init_from={alone / 'stage2'}",
        "max_steps=3",
    ]
    assert train_here([*stage, f"run_dir={tmp_path / 'one'}"]) == 0
    train_on_two("zero3", *stage, f"run_dir={tmp_path / 'two'}")
    one, two = (losses_of(tmp_path / run / "stage4") for run in ("one", "two"))
    assert two == pytest.approx(one, rel=PRECISION["zero3"])
