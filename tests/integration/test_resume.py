"""Stop anywhere and start again: the same bits come out, a damaged checkpoint is passed over, two writers never meet."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import user_error, wait_for
from programs import end, fork, script
from ranks import Started
from training_runs import Train, assert_same_bits, at_step, newest, records, steps_saved, tensors, train_here

from paradiffusion.checkpoints.manifest import find_fault, write_manifest
from paradiffusion.compose import compose_train
from paradiffusion.config import OPTIMIZERS
from paradiffusion.errors import UserError
from paradiffusion.training import folder
from paradiffusion.training.folder import check_unchanged, locked, record_config
from paradiffusion.training.trainer import Trainer

# The command of the issue, at a size of two seconds; every step is logged, so that a test can see where it stands.
FIRST = ["stage=1", "max_steps=40", "seed=1", "checkpoint_every=10", "log_every=1", "optimizer.schedule=constant"]
SECOND = ["stage=2", "max_steps=30", "seed=1", "checkpoint_every=7", "log_every=1", "optimizer.schedule=cosine"]


def logged(stage: Path) -> int:
    """The last step of log.jsonl so far."""
    try:
        return len((stage / "log.jsonl").read_text().splitlines())
    except FileNotFoundError:
        return 0


def kill_when(process: Started, condition: Callable[[], bool]) -> None:
    """SIGKILL as soon as ``condition()`` holds, which must be before the process ends by itself."""
    wait_for(lambda: condition() or process.poll() is not None, interval=0.001)
    assert process.poll() is None, process.communicate()
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def first_run(tiny_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 1 without a stop, saved only at its end."""
    run = tmp_path_factory.mktemp("first") / "run"
    assert train_here([*tiny_arguments, *FIRST, "checkpoint_every=40", f"run_dir={run}"]) == 0
    return run


@pytest.fixture(scope="module")
def second_run(first_run: Path, tiny_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 2 without a stop, from that stage 1."""
    run = tmp_path_factory.mktemp("second") / "run"
    start_from = f"init_from={newest(first_run / 'stage1')}"
    assert train_here([*tiny_arguments, *SECOND, "checkpoint_every=30", start_from, f"run_dir={run}"]) == 0
    return run


def test_stage_1_killed_ends_in_the_same_bits(first_run: Path, tiny_arguments: list[str], tmp_path: Path) -> None:
    """Three times, twice in the midst of saving: while nothing else is done, and while steps are."""
    stage, arguments = tmp_path / "run" / "stage1", [*tiny_arguments, *FIRST, f"run_dir={tmp_path / 'run'}"]
    for apart, moment in (
        ("true", lambda: logged(stage) >= 13),
        ("true", (stage / "checkpoints" / ".writing_step_000020").exists),
        ("false", (stage / "checkpoints" / ".writing_step_000030").exists),
    ):
        kill_when(Started("train.py", *arguments, f"async_save={apart}"), moment)
        assert all(find_fault(stage / "checkpoints" / f"step_{step:06d}") is None for step in steps_saved(stage))
    last = Started("train.py", *arguments)
    output, errors = last.communicate(timeout=300)
    assert last.returncode == 0, output + errors
    assert "resuming from" in output and "40 of 40" not in output
    assert_same_bits(newest(first_run / "stage1"), newest(stage))
    # Steps that were done again are logged once, and to the same loss.
    assert [row["step"] for row in records(stage)] == list(range(1, 41))
    assert [row["loss"] for row in records(stage)] == [row["loss"] for row in records(first_run / "stage1")]
    assert len(records(stage, "validation")) == 1


def test_a_signal_saves_and_leaves_quietly(second_run: Path, first_run: Path, tiny_arguments: list[str], tmp_path: Path) -> None:
    # Stage 2, whose learning rate falls over the whole run: it must go on where it was, not from the start.
    start_from = f"init_from={newest(first_run / 'stage1')}"
    arguments = [*tiny_arguments, *SECOND, "checkpoint_every=100", start_from, f"run_dir={tmp_path / 'run'}"]
    stage = tmp_path / "run" / "stage2"
    process = Started("train.py", *arguments)
    wait_for(lambda: logged(stage) >= 2 or process.poll() is not None, interval=0.001)
    process.send_signal(signal.SIGINT)
    time.sleep(0.01)
    process.send_signal(signal.SIGINT)  # torchrun passes on what the terminal has sent already
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGINT, output + errors
    assert output.rstrip().endswith("run the same command again to go on.") and "Traceback" not in output + errors
    (step,) = steps_saved(stage)
    assert 2 <= step < 30 and f"stopped at step {step}" in output
    assert train_here(arguments) == 0
    assert_same_bits(newest(second_run / "stage2"), newest(stage))
    assert [row["step"] for row in records(stage)] == list(range(1, 31))
    assert (newest(stage) / "text_encoder_lora" / "adapter_model.safetensors").is_file()


def test_a_stage_that_starts_from_one_that_has_not_ended_says_so(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", at_step(3, lambda: os.kill(os.getpid(), signal.SIGINT)))
        assert train("stage=1") == 128 + signal.SIGINT
    assert train("stage=2", "max_steps=1") == 0
    assert "step_000003 (step 3 of 8: not the end of that stage)" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "run" / "stage2")
    assert train("stage=1") == 0 and train("stage=2", "max_steps=1") == 0
    said = capsys.readouterr().out
    assert "starting from" in said and "not the end" not in said


# A stage that was stopped, and one that was done at that moment: neither way does the demo go on.
@pytest.mark.parametrize(("status", "expected"), [("stop.status", signal.SIGTERM), ("0", signal.SIGINT)])
def test_the_demo_lets_its_stage_save_before_it_leaves(tmp_path: Path, status: str, expected: int) -> None:
    saving = (
        "import pathlib, signal, sys, time; from paradiffusion.stopping import stop_on_signals\n"
        "with stop_on_signals() as stop:\n"
        "    pathlib.Path(sys.argv[1], 'begun').touch()\n"
        "    while stop.came_at is None: time.sleep(0.01)\n"
        "    time.sleep(1); pathlib.Path(sys.argv[1], 'saved').touch(); sys.exit({status})"
    ).replace("{status}", status)
    command = [sys.executable, "-c", saving, str(tmp_path)]
    child = fork(lambda _: int(script("run_demo").run_to_its_end(command)), [], tmp_path / "said.txt")
    assert end(child, (tmp_path / "begun").exists, signal.SIGINT) == 128 + expected
    assert (tmp_path / "saved").exists()


def test_many_stops_and_other_intervals_change_nothing(
    first_run: Path, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM at three steps; then a run that is done, of fewer steps; then the rest, with other intervals."""
    stage = tmp_path / "run" / "stage1"
    for every, stop in ((7, 3), (1000, 20), (4, 9)):
        monkeypatch.setattr(Trainer, "train_step", at_step(stop, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        asked = (f"checkpoint_every={every}", f"validate_every={every}", "log_every=5", "async_save=true")
        assert train(*FIRST, *asked) == 128 + signal.SIGTERM
        assert newest(stage).name != "step_000040"
    monkeypatch.undo()
    assert train(*FIRST, "max_steps=36") == 0 and (stage / "summary.json").is_file()
    assert train(*FIRST, "checkpoint_every=13", "validation.samples=2", "data.workers=1", "micro_batch_size=4") == 0
    assert_same_bits(newest(first_run / "stage1"), newest(stage))


def test_a_checkpoint_written_while_steps_run_is_that_of_its_own_step(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["max_steps=10", "checkpoint_every=3", "keep_last=9", "log_every=1"]
    assert train(*arguments, f"run_dir={tmp_path / 'waited'}") == 0
    stage, write, beside = tmp_path / "apart" / "stage1", folder.write_checkpoint, []

    def late(*arguments: Any) -> Path:
        step = arguments[5]["step"]
        if step < 10:  # the last is waited for
            wait_for(lambda: logged(stage) > step)
            beside.append(step)
        return write(*arguments)

    monkeypatch.setattr(folder, "write_checkpoint", late)
    assert train(*arguments, f"run_dir={tmp_path / 'apart'}", "async_save=true", "ema_device=cpu") == 0
    assert beside == [3, 6, 9] and steps_saved(stage) == [3, 6, 9, 10]
    for checkpoint in (stage / "checkpoints").glob("step_*"):
        assert_same_bits(tmp_path / "waited" / "stage1" / "checkpoints" / checkpoint.name, checkpoint)
        assert find_fault(checkpoint) is None


# One with an average of its own, one with tensors of its own; all are in tests/unit/training/test_ema_optim.py.
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_schedulefree", "adamw4bit_torchao"])
def test_every_kind_of_optimizer_comes_back_whole(optimizer: str, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = OPTIMIZERS[optimizer].path.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    eager = torch.compiler.set_stance("force_eager")  # torchao's kernels would take a minute to compile
    # What frozen models made is kept while it fits (other entries than before the stop), or kept whole.
    arguments = [f"optimizer.name={optimizer}", f"keep_gb={1e-4 if optimizer == 'adamw' else 1}", "max_steps=8"]
    arguments += ["optimizer.schedule=linear", "unet.arguments.cross_attention_dim=128"]
    with eager, monkeypatch.context() as patched:
        assert train(*arguments, f"run_dir={tmp_path / 'whole'}") == 0
        patched.setattr(Trainer, "train_step", at_step(5, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        # Looked at before it is stopped: what is validated is not what is trained.
        status = train(*arguments, f"run_dir={tmp_path / 'stopped'}", "validate_every=3", "ema_device=cpu")
        assert status == 128 + signal.SIGTERM and newest(tmp_path / "stopped" / "stage1").name == "step_000005"
        patched.undo()
        assert train(*arguments, f"run_dir={tmp_path / 'stopped'}") == 0
    ended = newest(tmp_path / "whole" / "stage1")
    assert_same_bits(ended, newest(tmp_path / "stopped" / "stage1"))
    assert any(":exp_avg.codes/" in name for name in tensors(ended)) == (package == "torchao")


@pytest.fixture(scope="module")
def stopped_run(tiny_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps of stage 1 with checkpoints of steps 4, 8 and 12, to be copied and damaged."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    assert train_here([*tiny_arguments, "max_steps=12", "keep_last=3", f"run_dir={run}"]) == 0
    assert steps_saved(run / "stage1") == [4, 8, 12]
    return run


@pytest.fixture
def stage(stopped_run: Path, tmp_path: Path) -> Path:
    """A copy of it where ``train`` goes on."""
    shutil.copytree(stopped_run, tmp_path / "run")
    return tmp_path / "run" / "stage1"


def cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("file", "damage", "complaint"),
    [
        ("unet/diffusion_pytorch_model.safetensors", cut, "has {cut} bytes instead of {size}"),
        ("training_state/optimizer.safetensors", Path.unlink, "training_state/optimizer.safetensors is missing"),
        ("training_state/model.safetensors", flip, "model.safetensors has other content than was written"),
        ("manifest.json", cut, "manifest.json is not readable"),
    ],
)
def test_damaged_checkpoint_is_named_and_passed_over(
    file: str, damage: Callable[[Path], object], complaint: str, stage: Path, stopped_run: Path, train: Train,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    damaged = stage / "checkpoints" / "step_000012"
    size = (damaged / file).stat().st_size
    damage(damaged / file)
    assert train("max_steps=12", "keep_last=3") == 0
    output = capsys.readouterr().out
    assert f"{damaged} is passed over: " in output and "step_000008, step 8 of 12" in output
    assert complaint.format(size=size, cut=size // 2) in output
    assert find_fault(damaged) is None  # written anew
    assert_same_bits(stopped_run / "stage1" / "checkpoints" / "step_000012", damaged)


def test_a_second_writer_and_a_folder_without_a_whole_checkpoint_are_refused(stage: Path, train: Train) -> None:
    with locked(stage), pytest.raises(UserError, match=rf"written by another run \(process {os.getpid()}\)"):
        train("max_steps=16")
    assert steps_saved(stage) == [4, 8, 12]
    shutil.copytree(stage.parent, stage.parent.with_name("free"))
    assert train("max_steps=13", f"run_dir={stage.parent.with_name('free')}") == 0  # the lock goes with its holder

    checkpoints = [stage / "checkpoints" / f"step_{step:06d}" for step in (4, 8, 12)]
    for checkpoint in checkpoints:
        cut(checkpoint / "training_state" / "model.safetensors")
    user_error(r"every checkpoint in .*stage1 is damaged; delete", train, "max_steps=16")
    assert steps_saved(stage) == [4, 8, 12]  # nothing was deleted
    for checkpoint in checkpoints:
        shutil.rmtree(checkpoint / "training_state")
        write_manifest(checkpoint)
    user_error(r"holds weights but no training_state.*init_from=", train, "max_steps=16")


def test_resume_refuses_another_run_by_name(stage: Path, tiny_arguments: list[str], train: Train) -> None:
    facts = json.loads((stage / "config.json").read_text())["facts"]
    for argument, key in (
        ("seed=5", "seed"), ("batch_size=8", "batch_size"), ("conditioning=paper", "conditioning.layer_tap"),
        ("objective=paper", "objective.density"), ("optimizer.lr=0.5", "optimizer.lr"), ("precision=bf16", "precision"),
        ("text_encoder.dtype=bfloat16", "text_encoder.dtype"), ("unet.coordinates=2", "unet.coordinates"),
    ):  # fmt: skip
        config = compose_train([*tiny_arguments, f"run_dir={stage.parent}", argument])
        said = rf"was begun with {re.escape(key)}=\S+, and this command says .*choose another run_dir="
        user_error(said, check_unchanged, config, stage, facts)
    user_error(r"was begun with ema_decay=\S+, and this command says 0\.5", train, "max_steps=16", "ema_decay=0.5")
    assert steps_saved(stage) == [4, 8, 12]


def test_a_run_goes_on_though_keys_that_it_did_without_are_gone(stage: Path, train: Train) -> None:
    path = stage / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "unet": {**config["unet"], "pooled_text": True, "attention_gain": 1.0}}))
    user_error(r"was begun with unet\.pooled_text=True, and this command says False", train, "max_steps=13")
    path.write_text(json.dumps({**config, "unet": {**config["unet"], "pooled_text": False, "attention_gain": 1.0}}))
    assert train("max_steps=13") == 0
    assert steps_saved(stage)[-1] == 13


# How it is computed, where its data and models lie, and how the run goes on.
FREE = """gradient_checkpointing=true unet.plain_attention=true optimizer.fused=false compile=true ema_device=cpu keep_gb=1
    micro_batch_size=2 conditioning.pad_multiple=64 data.cache=elsewhere data.cache_dir=elsewhere text_encoder.path=elsewhere
    codec.hub=elsewhere data.shards=elsewhere data.index_dir=elsewhere validation.images=3 sampler.steps=3 on_spike=skip
    preset=paper"""


def test_what_changes_no_mathematics_is_free_on_resume(stage: Path, tiny_arguments: list[str]) -> None:
    facts = json.loads((stage / "config.json").read_text())["facts"]
    for argument in FREE.split():
        key, _, value = argument.partition("=")
        config = compose_train([*tiny_arguments, f"run_dir={stage.parent}"])
        part, _, name = key.rpartition(".")
        holder = getattr(config, part) if part else config
        assert str(getattr(holder, name)) != value
        setattr(holder, name, yaml.safe_load(value))
        check_unchanged(config, stage, facts)
    # Of streamed data nothing tells that it is the same.
    config = compose_train([*tiny_arguments, f"run_dir={stage.parent}", "data.streaming=true"])
    record_config(config, stage, {})
    check_unchanged(config, stage)
    config.data.shards = "elsewhere"
    user_error(r"begun with data\.shards=", check_unchanged, config, stage)


def test_the_advice_for_a_full_memory_goes_on_with_the_same_losses(stage: Path, train: Train, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "run", tmp_path / "saving")
    assert train("max_steps=16", "log_every=1") == 0
    saving = ["gradient_checkpointing=true", "unet.plain_attention=true", "micro_batch_size=2", "ema_device=cpu"]
    assert train("max_steps=16", "log_every=1", *saving, "optimizer.fused=false", f"run_dir={tmp_path / 'saving'}") == 0
    losses = [[row["loss"] for row in records(tmp_path / run / "stage1")[-4:]] for run in ("run", "saving")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_resume_false_refuses_a_folder_that_is_in_use(stage: Path, train: Train) -> None:
    user_error(r"resume=false, but .*stage1 already holds checkpoints", train, "max_steps=16", "resume=false")
    shutil.rmtree(stage)
    assert train("max_steps=2", "resume=false") == 0
