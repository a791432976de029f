"""Time the trainer's own steps, beside the plain reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from paradiffusion.budget.bench_models import Bench, Row, Timing, interleave, make_row, release
from paradiffusion.budget.flops import StageFlops, stage_flops
from paradiffusion.budget.reference import PlainTrainer
from paradiffusion.budget.synthetic import random_models
from paradiffusion.config import TrainConfig
from paradiffusion.data.loader import Batch
from paradiffusion.scenes.dataset import make_wanted
from paradiffusion.training.trainer import Trainer

GIVEN = "features and latents given"
# Batches of an epoch that are looked at.
MOST_BATCHES = 32


def measure_steps(bench: Bench) -> Iterator[Row]:
    """Rows of every stage and arm."""
    for stage in map(int, bench.settings.several("stages")):
        yield from bench.each_arm("step", stage, partial(measure_stage, bench, stage))


def measure_stage(bench: Bench, stage: int, arm: str, overrides: list[str]) -> Iterator[Row]:
    """One stage in one arm: ours, the reference, features given, and the switches."""
    settings = bench.settings
    config = bench.config(stage, overrides)
    bench.write_data(config.data.resolution)
    trainer = start(bench, config)
    try:
        batches = take_batches(trainer, settings.warmup, settings.repeats)
        ours = own_step(trainer, batches)
        # Alone first: beside it the reference's optimiser and average will take memory as well.
        alone = interleave({"ours": ours}, 1, 0, bench.device)["ours"].peak_gib
        works: dict[str, Callable[[int], object]] = {"ours": ours}
        if trainer.joint.text_encoder is None:
            works[GIVEN] = given_step(trainer, batches[settings.warmup + settings.repeats // 2])
        works["reference"] = plain_step(trainer, batches)
        timings = interleave(works, settings.warmup, settings.repeats, bench.device)
        yield from stage_rows(bench, trainer, stage, arm, batches, timings, alone)
        works.clear()
        release()
        # The switches concern the U-Net and its weights, which are the same in every arm.
        for switch in bench.settings.several("switches") if arm == next(iter(bench.arms())) else ():
            yield from measure_switch(bench, trainer, switch, stage, arm, ours)
    finally:
        trainer.close()
        trainer.accelerator.free_memory()


def start(bench: Bench, config: TrainConfig) -> Trainer:
    """The stage as train.py builds it, from random weights."""
    make_wanted(config.data)
    accelerator = bench.accelerate(config)
    models = random_models(config, bench.device)
    if config.train_text == "adapter":
        config = replace(config, train_text="frozen")  # the adapter is applied already, and comes from no checkpoint
    folder = Path(config.run_dir) / f"stage{config.stage}"
    folder.mkdir(parents=True)
    return Trainer(config, accelerator, folder=folder, frozen_models=models)


def take_batches(trainer: Trainer, warmup: int, repeats: int) -> list[Batch]:
    """A batch for each round. The measured ones go from the shortest captions of an epoch to the longest.

    They are read beforehand: how fast shards are read depends on the disk and the workers, not on what is measured here.
    """
    loader = trainer.loader()
    try:
        epoch = [next(loader) for _ in range(max(repeats, min(MOST_BATCHES, int(trainer.plan.steps_per_epoch))))]
    finally:
        loader.close()
    epoch.sort(key=lambda batch: sum(len(caption) for caption in batch.captions))
    measured = [epoch[int((number + 0.5) * len(epoch) / repeats)] for number in range(repeats)]
    return [measured[number % repeats] for number in range(warmup)] + measured


def own_step(trainer: Trainer, batches: list[Batch]) -> Callable[[int], object]:
    """One optimiser step of training."""

    def step(number: int) -> None:
        try:
            trainer.train_step(iter([batches[number]]))
        finally:
            trainer.engine.discard()  # where memory ran out

    return step


def given_step(trainer: Trainer, batch: Batch) -> Callable[[int], object]:
    """The same with text features and latents given, as a cache would."""
    inputs, engine = trainer.encode(batch), trainer.engine

    def step(number: int) -> None:
        try:
            engine.backward(engine.model(inputs).total)
            engine.clip()
            engine.update()
            trainer.ema.update(number)
        finally:
            engine.discard()

    return step


def plain_step(trainer: Trainer, batches: list[Batch]) -> Callable[[int], object]:
    """One step of the reference, which has an optimiser and an average of its own."""
    reference = PlainTrainer(trainer)
    return lambda number: reference.step(batches[number])


def stage_rows(
    bench: Bench, trainer: Trainer, stage: int, arm: str, batches: list[Batch], timings: dict[str, Timing], alone: float | None
) -> Iterator[Row]:  # fmt: skip
    config, encoder = trainer.config, trainer.encoder
    count, peak = config.batch_size, bench.peak(config.precision)
    measured = batches[bench.settings.warmup :]
    widths = [encoder.tokenize(batch.captions).ids.shape[1] for batch in measured]
    mean = round(sum(widths) / len(widths))
    middle = widths[len(widths) // 2]
    own, given, longest = (flops_at(config, width) for width in (mean, middle, encoder.limit))
    where = f"{count} x {batches[0].images.shape[-1]} px"
    plan = {
        "ours": (own.total().training, f"{where}, {mean} tokens on average", alone),
        GIVEN: (given.total("text", "vae").training, f"{where}, {middle} tokens", None),
        "reference": (longest.total().training, f"{where}, {encoder.limit} tokens", None),
    }
    for work, timing in timings.items():
        flop, note, peak_gib = plan[work]
        compared = None if work == "reference" else timings["reference"]
        yield make_row(timing, "step", stage, arm, work, count, reference=compared, flop=count * flop, peak=peak,
                       peak_gib=peak_gib, note=note)  # fmt: skip


def flops_at(config: TrainConfig, tokens: int) -> StageFlops:
    """FLOP of a sample whose caption is padded to ``tokens``."""
    return stage_flops(replace(config, conditioning=replace(config.conditioning, max_tokens=tokens)))


def measure_switch(
    bench: Bench, trainer: Trainer, switch: str, stage: int, arm: str, ours: Callable[[int], object]
) -> Iterator[Row]:  # fmt: skip
    """Our step with one switch and without it, in turn."""
    settings, count = bench.settings, trainer.config.batch_size
    if switch == "fused":
        yield from measure_fused(bench, trainer, stage, arm)
        return
    title = f"ours, {switch}=true"
    before: dict[str, Callable[[], object]]
    if switch == "channels_last":
        before = {
            "ours": partial(lay_out, trainer, torch.contiguous_format),
            title: partial(lay_out, trainer, torch.channels_last),
        }
    else:
        unet = trainer.joint.unet
        unet.compile()
        compiled = unet._compiled_call_impl
        before = {
            "ours": lambda: setattr(unet, "_compiled_call_impl", None),
            title: lambda: setattr(unet, "_compiled_call_impl", compiled),
        }
    try:
        before[title]()
        for number in range(settings.warmup + settings.repeats if switch == "compile" else 0):
            ours(number)  # every length of captions is compiled for itself
        timings = interleave({"ours": ours, title: ours}, settings.warmup, settings.repeats, bench.device, before)
        yield make_row(timings[title], "step", stage, arm, title, count, reference=timings["ours"], against="ours")
    except torch._dynamo.exc.TorchDynamoException as error:
        yield Row("step", stage, arm, title, None, note=f"torch.compile failed: {str(error).splitlines()[0][:120]}")
    finally:
        before["ours"]()


def lay_out(trainer: Trainer, memory_format: torch.memory_format) -> None:
    """Bring the U-Net's kernels, their moments and their averages into one memory layout: AdamW's and the average's
    kernels for many tensors at once want them alike."""
    trainer.joint.unet.to(memory_format=memory_format)
    for state in trainer.engine.optimizer.state.values():
        state.update({key: _laid_out(value, memory_format) for key, value in state.items()})
    trainer.ema.values[:] = [_laid_out(value, memory_format) for value in trainer.ema.values]


def _laid_out(tensor: Tensor, memory_format: torch.memory_format) -> Tensor:
    return tensor.contiguous(memory_format=memory_format) if tensor.ndim == 4 else tensor


def _update(optimizer: torch.optim.AdamW, _: int) -> None:
    optimizer.step()


def measure_fused(bench: Bench, trainer: Trainer, stage: int, arm: str) -> Iterator[Row]:
    """AdamW's update of all trained weights alone, fused and in PyTorch's default form."""
    parameters = [p.detach().clone() for p in trainer.joint.trained().values()]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    works: dict[str, Callable[[int], object]] = {}
    for fused in (True, False):
        optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=fused or None)
        works["AdamW update, fused" if fused else "AdamW update, default"] = partial(_update, optimizer)
    timings = interleave(works, bench.settings.warmup, bench.settings.repeats, bench.device)
    default = timings["AdamW update, default"]
    size = sum(p.numel() for p in parameters)
    for work, timing in timings.items():
        compared = None if timing is default else default
        yield make_row(timing, "update", stage, arm, work, size / 1e6, "M parameters/s", compared, "default")
