"""Stage 4: guided sampling distilled into few steps of one forward, from the command line to the exports."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import user_error
from diffusers import UNet2DConditionModel
from training_runs import Train, assert_same_bits, build_here, drawn_here, newest, records, sample_here, train_here

from paradiffusion.checkpoints.layouts import open_layout
from paradiffusion.compose import compose_train
from paradiffusion.diffusion.objective import unmix
from paradiffusion.models.unet import SCALE_LAYER, SCALE_WIDTH
from paradiffusion.sampling.diffusers_pipeline import ParaDiffusionPipeline
from paradiffusion.sampling.sampler import sample_latents
from paradiffusion.text.conditioning import Conditioning
from paradiffusion.training.distillation import Teacher
from paradiffusion.training.inputs import Inputs
from paradiffusion.training.log import Meters
from paradiffusion.training.trainer import Trainer
from scripts.export import main as export

# Both kinds of prediction; and guidance as a checkpoint may have it, with a rescale and an interval.
ARMS = {"modern": [], "paper": ["objective=paper", "conditioning=paper", "conditioning.max_tokens=32", "sampler.guidance_rescale=0.5",
        "sampler.guidance_stop=0.6"]}  # fmt: skip
STAGE = ["stage=4", "objective.distill_steps=2", "objective.distill_substeps=3", "objective.distill_guidance=[1,4]", "sampler.steps=2"]
PROMPT = "a red circle at the left of a blue square"


@pytest.fixture(scope="module")
def arguments(tiny_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """By arm, those of a stage 4 from a stage 1 of a few steps."""
    found = {}
    for arm, own in ARMS.items():
        run = tmp_path_factory.mktemp(arm) / "run"
        assert train_here([*tiny_arguments, *own, "sampler.guidance=2.5", f"run_dir={run}"]) == 0
        own = [one for one in own if not one.startswith("sampler.")]
        found[arm] = [*tiny_arguments, *own, *STAGE, "sampler.guidance=2.5", f"init_from={run / 'stage1'}"]
    return found


@pytest.fixture(scope="module")
def student(arguments: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("student") / "run"
    assert train_here([*arguments["modern"], f"run_dir={run}"]) == 0
    return run / "stage4"


def ready(arguments: list[str], run: Path) -> tuple[Trainer, Teacher, Any]:
    """A stage 4 before its first step, its teacher, and a batch of data."""
    trainer = build_here([*arguments, f"run_dir={run}"])
    assert trainer.teacher is not None
    on_data: Inputs = replace(trainer.inputs, teacher=None)
    return trainer, trainer.teacher, on_data(next(iter(trainer.loader())), Meters())


@pytest.mark.parametrize("arm", ARMS)
def test_it_begins_as_the_teacher_without_guidance(arm: str, arguments: dict[str, list[str]], tmp_path: Path) -> None:
    trainer, teacher, batch = ready(arguments[arm], tmp_path / "run")

    def forward(joint: Any, *scales: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            text = joint.refine(batch.features, batch.mask)
            return joint.denoise(batch.latents, batch.times, text, batch.mask, None, *scales)

    assert torch.equal(forward(trainer.joint, torch.tensor([1.0, 2.0, 3.0, 4.0])), forward(teacher.joint))
    # What is trained reaches the scale: its layer is no longer zero.
    trainer.train_step(trainer.loader())
    assert trainer.joint.unet.get_submodule(SCALE_LAYER).weight.any()
    two = [forward(trainer.joint, torch.full((4,), scale)) for scale in (1.0, 4.0)]
    assert not torch.equal(*two)


@pytest.mark.parametrize("arm", ARMS)
def test_the_teacher_goes_where_its_sampler_goes(arm: str, arguments: dict[str, list[str]], tmp_path: Path) -> None:
    """A window's end is where as many guided steps of the sampler lead from its start, with the checkpoint's rescale and interval."""
    _, teacher, batch = ready(arguments[arm], tmp_path / "run")
    objective = teacher.joint.objective
    first = replace(batch, times=torch.full((4,), objective.config.train_timesteps - 1.0))
    learned = teacher(first, torch.full((4,), 2.5))
    _, alpha, sigma, guided = teacher.grid(batch.latents.shape[-2:])
    assert guided.tolist() == [True] * 6 + [False] if arm == "modern" else [True] * 4 + [False] * 3
    start = alpha[0] * batch.latents + sigma[0] * batch.noise
    states: list[torch.Tensor] = []
    objective.schedulers = lambda solver, **given: objective.usual_scheduler(solver, solver_order=1, **given)
    text = teacher.joint.refine(batch.features, batch.mask)
    sample_latents(
        teacher.joint.denoise, objective, Conditioning(text, batch.mask, teacher.null, teacher.null_mask), [0] * 4,
        batch.latents.shape[1:], replace(teacher.settings, steps=6, guidance=2.5), "cpu", torch.float32,
        lambda _, latents: states.append(latents), noise=start,
    )  # fmt: skip
    for step, state in ((0, start), (3, states[2])):  # the way is straight between these
        torch.testing.assert_close(alpha[step] * learned.latents + sigma[step] * learned.noise, state, rtol=1e-3, atol=2e-4)
    # The scale counts, and each sample has its own window.
    assert (teacher(first, torch.ones(4)).latents - learned.latents).abs().max() > 1e-3
    mixed = teacher(replace(first, times=first.times * torch.tensor([1.0, 1.0, 0.2, 0.2])), torch.full((4,), 2.5))
    same = [bool(torch.isclose(*pair, atol=1e-5).all()) for pair in zip(mixed.noise, learned.noise, strict=True)]
    assert same == [True, True, False, False]


@pytest.mark.parametrize("arm", ARMS)
def test_a_student_that_learned_all_is_drawn_from_window_to_window(arm: str, arguments: dict[str, list[str]], tmp_path: Path) -> None:
    """Each step goes straight through one of the teacher's windows: no memory of the window before bends it (which
    DPM-Solver has from the second step on, but in the last)."""
    trainer, teacher, batch = ready([*arguments[arm], "objective.distill_steps=4", "sampler.steps=4"], tmp_path / "run")
    objective, count = trainer.joint.objective, trainer.config.objective.distill_substeps
    times, alpha, sigma, _ = (row[::count] for row in teacher.grid(batch.latents.shape[-2:]))
    ends = torch.randn(len(times), 1, *batch.latents.shape[1:], generator=torch.Generator().manual_seed(0))

    def learned(noised: torch.Tensor, now: torch.Tensor, *_: torch.Tensor | None) -> torch.Tensor:
        step = int((times[:-1] - now[0]).abs().argmin())
        clean, noise = unmix(ends[step], (alpha[step], sigma[step]), ends[step + 1], (alpha[step + 1], sigma[step + 1]))
        return objective.target(clean, noise, now)

    text = Conditioning(*[torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.bool)] * 2)
    given = replace(teacher.settings, steps=len(times) - 1, guidance=2.5, guidance_rescale=0.0, guidance_stop=1.0)
    drawn = sample_latents(learned, objective, text, [0], batch.latents.shape[1:], given, "cpu", torch.float32, noise=ends[0])
    torch.testing.assert_close(drawn, ends[-1], rtol=1e-3, atol=2e-3)


def test_the_text_is_read_as_the_teacher_reads_it(student: Path, arguments: dict[str, list[str]]) -> None:
    start = Path(next(one for one in arguments["modern"] if one.startswith("init_from=")).partition("=")[2])
    before, after = (open_layout(newest(stage)).weights() for stage in (start, student))
    refiner = {name for name in before if name.startswith("refiner.")}
    assert refiner and all(torch.equal(before[name], after[name]) for name in refiner)
    assert any(not torch.equal(before[name], after[name]) for name in before if name.startswith("unet."))


@pytest.mark.parametrize("arm", ARMS)
def test_training_brings_it_nearer_to_the_guided_teacher(arm: str, arguments: dict[str, list[str]], tmp_path: Path) -> None:
    given = ["max_steps=24", "ema_decay=0.8", "optimizer.lr=3e-4", "validation.samples=16", "validation.batch_size=16"]
    trainer, _, _ = ready([*arguments[arm], *given], tmp_path / "run")
    before = trainer.validate()
    assert trainer.train()
    after = records(tmp_path / "run" / "stage4", "validation")[-1]
    assert all(after[key] < 0.95 * before[key] for key in ("loss_short", "loss_long")), (before, after)


def test_stopped_and_resumed_ends_in_the_same_bits(student: Path, arguments: dict[str, list[str]], tmp_path: Path) -> None:
    given = arguments["modern"]
    for steps in (3, 8):
        trainer = build_here([*given, f"run_dir={tmp_path / 'run'}"])
        assert trainer.train(lambda trainer=trainer, steps=steps: trainer.state.step + 1 >= steps) == (steps == 8)  # type: ignore[misc]
    assert_same_bits(newest(student), newest(tmp_path / "run" / "stage4"))


def test_another_teacher_ends_a_resumed_stage(
    student: Path, arguments: dict[str, list[str]], tiny_arguments: list[str], tmp_path: Path
) -> None:
    assert train_here([*tiny_arguments, "seed=3", f"run_dir={tmp_path}"]) == 0
    user_error("facts.teacher", train_here, [*arguments["modern"], f"init_from={tmp_path / 'stage1'}", f"run_dir={student.parent}"])


def test_one_forward_a_step(student: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[tuple[int, torch.Size]] = []
    forward = UNet2DConditionModel.forward

    def counted(unet: Any, sample: torch.Tensor, *given: Any, **named: Any) -> Any:
        seen.append((len(sample), named["timestep_cond"].shape))
        return forward(unet, sample, *given, **named)

    monkeypatch.setattr(UNet2DConditionModel, "forward", counted)
    pictures = []
    for name, *more in (("own",), ("four", "steps=4"), ("weak", "guidance=1")):
        del seen[:]
        pictures.append(drawn_here(tmp_path / name, f"ckpt={student}", f"prompt={PROMPT}", *more))
        assert seen == [(1, (1, SCALE_WIDTH))] * (4 if name == "four" else 2)
    assert not np.array_equal(pictures[0], pictures[2])


def test_what_it_cannot_do_is_said(student: Path, arguments: dict[str, list[str]], train: Train, tmp_path: Path) -> None:
    for said, *asked in (
        ("negative_prompt needs guidance", "negative_prompt=blue"), ("expected 1.0 to 4.0", "guidance=7.5"),
        ("guidance_stop=0.8 has no place", "sampler=fast"), ("solver=euler has no place", "solver=euler"),
    ):  # fmt: skip
        user_error(said, sample_here, f"ckpt={student}", f"prompt={PROMPT}", f"output_dir={tmp_path / 'out'}", *asked)
    given = arguments["modern"]
    user_error("is distilled, with its guidance within", train, "stage=2", f"init_from={student}")
    user_error("distils a trained model", train_here, [*given, "init_from=scratch", f"run_dir={tmp_path / 'new'}"])
    unet = open_layout(newest(student)).unet
    user_error("a U-Net alone", train_here, [*given, f"init_from={unet}", f"run_dir={tmp_path / 'new'}"])


@pytest.mark.parametrize("override", ["train_text=lora", "repeats=2", "sampler.solver=euler", "sampler.guidance=9", "unet=pixart",
    "objective.layout_share=0.5", "objective.distill_guidance=[3]", "objective.distill_guidance=[4,2]"])  # fmt: skip
def test_what_cannot_be_distilled_is_refused(override: str, tiny_arguments: list[str]) -> None:
    said = user_error("objective.distill_", compose_train, [*tiny_arguments, *STAGE, override])
    assert override.partition("=")[0].replace("unet", "unet.class_name") in said


def test_it_is_exported(student: Path, arguments: dict[str, list[str]], tmp_path: Path) -> None:
    def drawn(ckpt: Path) -> np.ndarray:
        return drawn_here(tmp_path / "of" / ckpt.name, f"ckpt={ckpt}", f"prompt={PROMPT}", "seed=5")

    expected = drawn(student)
    for layout in ("ours", "pipeline"):
        assert export([f"ckpt={student}", f"to={layout}", f"output={tmp_path / layout}"]) == 0
        assert np.abs(drawn(tmp_path / layout) - expected).max() <= 1
    pipe = ParaDiffusionPipeline.from_pretrained(str(tmp_path / "pipeline"))
    image = pipe(PROMPT, generator=torch.Generator().manual_seed(5)).images[0]
    assert np.abs(np.asarray(image).astype(int) - expected).max() <= 1
    user_error("negative_prompt needs guidance", pipe, PROMPT, negative_prompt="blue")
    alone: Any = UNet2DConditionModel.from_pretrained(tmp_path / "ours" / "unet")
    assert alone.get_submodule(SCALE_LAYER).weight.any()
    run = tmp_path / "paper"
    assert train_here([*arguments["paper"], "max_steps=1", "unet.coordinates=0", f"run_dir={run}"]) == 0
    said = user_error(
        "the embedding of a guidance scale", export, [f"ckpt={run}", "to=official", f"output={tmp_path / 'o'}", "frozen=none"]
    )
    assert "coordinates" not in said
    run = tmp_path / "adapter"
    assert train_here([*arguments["modern"], "max_steps=1", "unet.lora_rank=2", f"run_dir={run}"]) == 0
    user_error("the embedding of a guidance scale", export, [f"ckpt={run}", "to=lora", f"output={tmp_path / 'l'}"])
