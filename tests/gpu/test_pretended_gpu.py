"""Set-up, steps, EMA and validation of each stage on the pretended GPU; `PARADIFFUSION_FULL_SIZE=1 pytest tests/gpu` does the same at
the paper's size, a minute each, and holds the peak of memory against what `describe` says."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState
from official_models import make_official
from pretended_gpu import Gpu, needs_its_torch, pretend
from torch import Tensor

from paradiffusion.budget.benchmark import own_step, reading_at_once, take_batches, with_first
from paradiffusion.budget.memory import LAUNCHES, Fitter
from paradiffusion.budget.synthetic import CAPTION_WORDS, random_models, write_samples
from paradiffusion.checkpoints.layouts import open_layout
from paradiffusion.compose import compose_train
from paradiffusion.config import SampleConfig, TrainConfig
from paradiffusion.models.joint import build_joint
from paradiffusion.sampling.pipeline import Job, draw, load_models
from paradiffusion.text.encoder import TextEncoder, load_text_encoder
from paradiffusion.training import trainer as trainer_module
from paradiffusion.training.engine import make_accelerator
from paradiffusion.training.folder import stage_folder
from paradiffusion.training.preflight import batches, hardest
from paradiffusion.training.trainer import Trainer

pytestmark = needs_its_torch
FULL_SIZE = os.environ.get("PARADIFFUSION_FULL_SIZE") == "1"

ARMS = {
    "paper": ["conditioning=paper"],
    "masked": ["conditioning=paper", "conditioning.mask_padding=true"],
    "modern": ["conditioning=modern", "conditioning.layout_patch=4"],
}
CHECKPOINTING, LORA = "gradient_checkpointing={}".format, "unet.lora_rank=2"
CASES = [
    (1, "paper", CHECKPOINTING("false")),
    (1, "modern", CHECKPOINTING("false")),
    (2, "paper", CHECKPOINTING("true")),
    (2, "masked", CHECKPOINTING("false"), LORA),
    (2, "modern", CHECKPOINTING("half")),
    (3, "masked", CHECKPOINTING("false"), "ema_device=cpu"),
    (3, "modern", CHECKPOINTING("false"), LORA),
]
each_case = pytest.mark.parametrize(
    ("stage", "arm", "more"), [pytest.param(stage, arm, more, id=f"{stage}-{arm}") for stage, arm, *more in CASES]
)
# The paper's blocks and text path, small.
TINY = [
    "text_encoder=tiny", "text_encoder.dtype=bfloat16", "data.resolution=64", "data.bucket_multiple=16", "micro_batch_size=2",
    "unet.arguments.block_out_channels=[16,32]", "unet.arguments.layers_per_block=1", "unet.arguments.cross_attention_dim=32",
    "unet.arguments.mid_block_type=null", "conditioning.refiner_layers=1", "conditioning.layout_layers=1",
    "unet.arguments.down_block_types=[ResnetDownsampleBlock2D,SimpleCrossAttnDownBlock2D]",
    "unet.arguments.up_block_types=[SimpleCrossAttnUpBlock2D,ResnetUpsampleBlock2D]",
    "unet.arguments.attention_head_dim=8", "unet.arguments.norm_num_groups=8", "conditioning.refiner_width=32", "lora.rank=2",
]  # fmt: skip


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    with pretend() as made:
        yield made


def options(stage: int, arm: str, *more: str) -> list[str]:
    """Overrides of train.py."""
    # A language model whose adapter is applied, as `random_models` makes it, needs no checkpoint to take it from.
    return ["preset=paper", f"stage={stage}", "init_from=scratch", *ARMS[arm], *more, "data.max_aspect=1", "data.workers=0",
            "validation.samples=2", "validation.images=2", "sampler.steps=2", "threads=1"]  # fmt: skip


def stage_of(config: TrainConfig, folder: Path, device: str) -> Trainer:
    """A stage of two micro-batches a step, with random frozen models made on ``device``."""
    assert config.micro_batch_size is not None
    size, side = 2 * config.micro_batch_size, config.data.resolution
    write_samples(folder / "shards", size, side, side)  # equal captions would go through the language model once
    data = replace(config.data, shards=str(folder / "shards"), val_shards=str(folder / "shards"))
    config = replace(config, data=data, run_dir=str(folder / "run"), batch_size=size)
    stage_folder(config).mkdir(parents=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    models = random_models(config, torch.device(device))
    models[0].register_forward_pre_hook(only_on_gpu)
    if config.train_text == "adapter":
        config = replace(config, train_text="frozen")
    return Trainer(config, make_accelerator(config), frozen_models=models)


def uncast(adapter: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
    assert given[0].dtype == torch.bfloat16, "an input that is cast for autocast to cast it back"


def only_on_gpu(encoder: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
    assert given[0].device.type == "cuda", "a language model that reads on the CPU"


def follow(trainer: Trainer, gpu: Gpu) -> None:
    """Let counts be kept by the trainer's phases, and look at the gradients when they are whole."""
    enter, update = trainer.enter, trainer.engine.update

    def entered(phase: str, keys: list[str] | None = None) -> None:
        gpu.phase = phase
        enter(phase, keys)

    def updated(left_out: Tensor) -> float | None:
        trained = trainer.joint.trained()
        assert trained and all(p.grad is not None for p in trained.values())
        for name, parameter in trained.items():
            assert parameter.dtype == parameter.grad.dtype == torch.float32, name
            assert parameter.device.type == parameter.grad.device.type == "cuda", name
        norm = update(left_out)
        gpu.phase = "all of the step is asked for"
        return norm

    trainer.enter, trainer.engine.update = entered, updated  # type: ignore[method-assign]


@each_case
def test_a_stage_runs_on_a_gpu(gpu: Gpu, stage: int, arm: str, more: list[str], tmp_path: Path) -> None:
    config = compose_train([*options(stage, arm, *TINY, *more), "codec.path=null", "data.shards=unused"])
    with mock.patch("paradiffusion.budget.empty.codec_arguments", return_value=VAE):
        # As loaded, on the CPU; or as a benchmark, and 4 bits, have it.
        trainer = stage_of(config, tmp_path, "cuda" if stage == 2 else "cpu")
    for name, module in trainer.joint.named_modules():
        if name.startswith("text_encoder.") and name.endswith("lora_A.default"):
            module.register_forward_pre_hook(uncast)
    follow(trainer, gpu)
    loader = trainer.loader()
    trainer.train_step(loader)  # what is done once is done
    gpu.forget()
    trainer.train_step(loader)
    assert {phase for phase, _ in gpu.reads} == {"all of the step is asked for"}
    assert not [line for phase, line in gpu.blocking if phase != "all of the step is asked for"]
    assert not [line for _, line in gpu.blocking if "ema" in line]
    assert all(value.device.type == (config.ema_device or "cuda") for value in trainer.ema.values)
    assert trainer.validate().keys() >= {"loss_short", "loss_long"}
    trainer.close()


def test_what_compiling_brings_along(gpu: Gpu, codec_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, object]]] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: asked.append((type(self).__name__, how)))
    config = compose_train([*options(1, "masked", *TINY), "codec.path=null", "data.shards=unused", "compile=true"])
    with mock.patch("paradiffusion.budget.empty.codec_arguments", return_value=VAE):
        trainer = stage_of(config, tmp_path, "cuda")
    trainer.close()
    assert asked == [("UNet2DConditionModel", {}), *[("LlamaDecoderLayer", {})] * 2]
    asked.clear()
    models = load_models(open_layout(make_official(tmp_path / "weights", codec_folder)), SampleConfig(compile=True))
    assert asked == [("UNet2DConditionModel", {"dynamic": False, "mode": "reduce-overhead"})]
    for joint in (trainer.joint, models.joint):
        assert joint.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_the_null_prompt_is_read_once_in_a_run(gpu: Gpu, tmp_path: Path) -> None:
    dropped = [*options(1, "masked", *TINY), "codec.path=null", "data.shards=unused", "data.caption_dropout=1"]
    with mock.patch("paradiffusion.budget.empty.codec_arguments", return_value=VAE):
        trainer = stage_of(compose_train(dropped), tmp_path, "cuda")
    reads: list[int] = []
    trainer.encoder.register_forward_hook(lambda _, given, __: reads.append(len(given[0])))
    loader = trainer.loader()
    for _ in range(2):
        trainer.train_step(loader)
    assert reads == [1]
    trainer.close()


def test_the_benchmark_undoes_what_its_rows_say(gpu: Gpu, tmp_path: Path) -> None:
    given = [*options(1, "masked", *TINY), "codec.path=null", "data.shards=unused", "data.caption_dropout=0"]
    with mock.patch("paradiffusion.budget.empty.codec_arguments", return_value=VAE):
        trainer = stage_of(compose_train(given), tmp_path, "cuda")
    follow(trainer, gpu)
    batches = take_batches(trainer, 0, 1)
    ours = own_step(trainer, batches, 2)

    def waits(step: Callable[[int], object]) -> list[int]:
        gpu.forget()
        step(0)
        counted = (gpu.reads, gpu.blocking)
        return [sum(n for (phase, _), n in c.items() if phase != "all of the step is asked for") for c in counted]

    ours(0)
    assert waits(ours) == [0, 0]
    reads, copies = waits(reading_at_once(trainer, ours))
    assert reads == 3 and copies >= 2 * 5, "two losses and a norm; latents, noise, times, weights and ids of each"
    assert waits(ours) == [0, 0]

    rows: list[int] = []
    trainer.encoder.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
    for caption, expected in (("", [1, 1]), ("", [1]), ("a", [2])):
        rows.clear()
        own_step(trainer, with_first(trainer, batches, caption))(0)
        assert rows == expected
    trainer.close()


def test_the_language_model_is_read_to_the_gpu_tensor_by_tensor(
    gpu: Gpu, codec_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # in this thread, which pretends
    write_samples(tmp_path / "shards", 4, 64, 64)
    small = [*options(2, "paper", *TINY), f"codec.path={codec_folder}", "codec.scaling_factor=null", "batch_size=4"]
    config = compose_train([*small, f"data.shards={tmp_path / 'shards'}", f"run_dir={tmp_path / 'run'}"])
    stage_folder(config).mkdir(parents=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    encoders = []

    def load(*given: object, **more: object) -> TextEncoder:
        encoder = load_text_encoder(*given, **more)  # type: ignore[arg-type]
        encoders.append({p.device.type for p in encoder.parameters()})
        return encoder

    monkeypatch.setattr(trainer_module, "load_text_encoder", load)
    Trainer(config, make_accelerator(config)).close()
    assert encoders == [{"cuda"}]


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_an_image_is_drawn_on_a_gpu(gpu: Gpu, dtype: str, codec_folder: Path, tmp_path: Path) -> None:
    """In bfloat16 unless told otherwise; nothing is waited for from the first step of the denoiser to the last."""
    models = load_models(open_layout(make_official(tmp_path / "weights", codec_folder)), SampleConfig(dtype=dtype))
    assert (models.device.type, models.dtype) == ("cuda", torch.bfloat16 if dtype == "auto" else torch.float32)
    settings = replace(models.sampler, steps=4)
    jobs = [Job(str(seed), "a red circle", seed, 64, 64, settings) for seed in range(2)]

    def on_step(step: int, _: torch.Tensor) -> None:
        gpu.phase = "step" if step < settings.steps else "decode"

    assert draw(models, jobs, on_step).shape == (2, 64, 64, 3)
    waited = [line for phase, line in (*gpu.reads, *gpu.blocking) if phase == "step"]
    assert not waited


VAE = dict(
    block_out_channels=(8, 8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    latent_channels=4, layers_per_block=1, norm_num_groups=4, sample_size=64,
)  # fmt: skip


@pytest.mark.skipif(not FULL_SIZE, reason="a minute each: PARADIFFUSION_FULL_SIZE=1")
@each_case
def test_the_papers_size_peaks_where_describe_says(stage: int, arm: str, more: list[str], tmp_path: Path) -> None:
    given = [*options(stage, arm, *more), "data.shards=unused"]
    config = compose_train(given)
    expected = Fitter(given, gpus=1).memory(LAUNCHES[0])  # on the meta device, not on this one

    def backward(loss: torch.Tensor) -> None:
        scaled = loss / trainer.micro_batches
        loss.detach_()  # torch's own engine empties the graph on its way; here the loss would keep it whole
        scaled.backward()

    def on_gpu(*arguments: object) -> object:  # made there at once, or this machine would hold 5 GB of numbers
        with torch.device("cuda"):
            return build_joint(*arguments)  # type: ignore[arg-type]

    with pretend() as gpu:
        longest = dict.fromkeys(CAPTION_WORDS, (config.conditioning.max_tokens, 0))  # a word has one token or more
        with mock.patch("paradiffusion.training.start.build_joint", on_gpu), mock.patch.dict(CAPTION_WORDS, longest):
            trainer = stage_of(config, tmp_path, "cuda")
        trainer.frozen.clear()  # kept for checkpoints where models are made, which is the CPU elsewhere
        trainer.engine.backward = backward  # type: ignore[method-assign]
        for _ in range(2):  # the optimiser's state is made in the first
            gpu.peak = gpu.live
            trainer.train_step(batches(trainer, *hardest(trainer.plan, trainer.config.batch_size)))
        trainer.close()
    assert gpu.peak == pytest.approx(expected.total - expected.context, rel=0.02)
