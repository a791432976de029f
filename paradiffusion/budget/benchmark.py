"""Benchmark of models: steps, sampling and text encoding beside the plain reference, as JSON and as a Markdown table."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from paradiffusion.budget.bench_models import GIB, Bench, BenchmarkSettings, Row, Timing, interleave, make_row, release
from paradiffusion.budget.flops import StageFlops, stage_flops
from paradiffusion.budget.memory import LAUNCHES, Fitter
from paradiffusion.budget.results import facts, machine, today, write_results
from paradiffusion.budget.synthetic import captions, random_models
from paradiffusion.checkpoints.manifest import checkpoints_of
from paradiffusion.config import SamplerConfig, TrainConfig
from paradiffusion.data.loader import Batch
from paradiffusion.models.joint import LossBatch, build_joint
from paradiffusion.models.unet import halve_frozen
from paradiffusion.pages import markdown_table
from paradiffusion.sampling.pipeline import InferenceModels, Job, compile_denoiser, draw
from paradiffusion.scenes.dataset import make_wanted
from paradiffusion.text.encoder import TextEncoder, compile_layers
from paradiffusion.text.tokenizer import tokenize_once
from paradiffusion.training.trainer import Trainer

# The released inference code's settings, and ours for speed: configs/sampler.
SAMPLERS = ("paper", "fast")
HEADER = [
    "what", "stage", "arm", "work", "median (range)", "rate", "speed-up", "TFLOP/s (MFU)", "peak GiB (describe's)",
    "reserved GiB", "settings",
]  # fmt: skip
BATCHES = (1, 8)
TEXT_BATCH = 8
GIVEN, LATENTS_GIVEN = "features and latents given", "latents given"
# Switches without a key of their own: the row is of the step without what it has.
UNDONE = {
    "reads": "numbers read in each micro-batch, copies waited for",
    "null_prompt": "null prompt read beside the others",
    "adapter_casts": "adapters' inputs cast to fp32 and back",
    "frozen_fp32": "frozen matrices of the U-Net in fp32",
    "cudnn_benchmark": "cudnn.benchmark off",
}
# Checkpoints of each kind whose time is taken, after one that is not: each may be of many gigabytes.
SAVES = 2
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
        # Alone first: beside it the reference's optimiser and average will take memory as well. Its state is made in the first step. Each
        # length asks the allocator for blocks of its own.
        release()
        alone = interleave({"ours": fullest_step(trainer, batches)}, settings.warmup, settings.repeats, bench.device)["ours"]
        works: dict[str, Callable[[int], object]] = {"ours": ours}
        given = GIVEN if trainer.joint.text_encoder is None else LATENTS_GIVEN
        works[given] = given_step(trainer, batches[settings.warmup + settings.repeats // 2])
        works["reference"] = plain_step(trainer, batches)
        timings = interleave(works, settings.warmup, settings.repeats, bench.device)
        yield from stage_rows(bench, trainer, stage, arm, batches, timings, alone)
        works.clear()
        release()
        # The switches concern the U-Net and its weights, which are the same in every arm.
        for switch in bench.settings.several("switches") if arm == next(iter(bench.arms())) else ():
            yield from measure_switch(bench, trainer, switch, stage, arm, batches)
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


def fullest_step(trainer: Trainer, batches: list[Batch]) -> Callable[[int], object]:
    """A step of two micro-batches: as ``describe`` counts, gradients are there while the second one's are taken."""

    def step(number: int) -> None:
        trainer.micro_batches = 2
        try:
            trainer.train_step(iter([batches[number]] * 2))
        finally:
            trainer.micro_batches = 1
            trainer.engine.discard()

    return step


def described_gib(config: TrainConfig, tokens: int) -> float:
    """What ``describe`` says of a step on one GPU whose captions have so many tokens, without the device's own context."""
    config = replace(config, conditioning=replace(config.conditioning, max_tokens=tokens))
    memory = Fitter([], lambda _: config, gpus=1).memory(LAUNCHES[0])
    return (memory.total - memory.context) / GIB


def given_step(trainer: Trainer, batch: Batch) -> Callable[[int], object]:
    """The same with latents given, and text features where the language model is frozen, as a cache would."""
    inputs, engine = trainer.encode(batch), trainer.engine
    all_well = torch.zeros((), dtype=torch.bool, device=trainer.device)

    def step(number: int) -> None:
        try:
            engine.backward(engine.model(inputs).total)
            engine.clip()
            engine.update(all_well)
            trainer.ema.update(number)
        finally:
            engine.discard()

    return step


def plain_step(trainer: Trainer, batches: list[Batch]) -> Callable[[int], object]:
    """One step of the reference, which has an optimiser and an average of its own."""
    reference = PlainTrainer(trainer)
    return lambda number: reference.step(batches[number])


def stage_rows(
    bench: Bench, trainer: Trainer, stage: int, arm: str, batches: list[Batch], timings: dict[str, Timing], alone: Timing
) -> Iterator[Row]:  # fmt: skip
    config, encoder = trainer.config, trainer.encoder
    count, peak = config.batch_size, bench.peak(config.precision)
    measured = batches[bench.settings.warmup :]
    widths = [encoder.tokenize(batch.captions).ids.shape[1] for batch in measured]
    mean = round(sum(widths) / len(widths))
    middle = widths[len(widths) // 2]
    own, given, longest = (flops_at(config, width) for width in (mean, middle, encoder.limit))
    where = f"{count} x {batches[0].images.shape[-1]} px"
    described = None if alone.peak_gib is None else described_gib(config, widths[-1])
    plan = {
        "ours": (own.total().training, f"{where}, {mean} tokens on average", alone),
        GIVEN: (given.total("text", "vae").training, f"{where}, {middle} tokens", None),
        LATENTS_GIVEN: (given.total("vae").training, f"{where}, {middle} tokens", None),
        "reference": (longest.total().training, f"{where}, {encoder.limit} tokens", None),
    }
    for work, timing in timings.items():
        flop, note, memory = plan[work]
        compared = None if work == "reference" else timings["reference"]
        yield make_row(timing, "step", stage, arm, work, count, reference=compared, flop=count * flop, peak=peak,
                       memory=memory, note=note, described_gib=described if work == "ours" else None)  # fmt: skip


def flops_at(config: TrainConfig, tokens: int) -> StageFlops:
    """FLOP of a sample whose caption is padded to ``tokens``."""
    return stage_flops(replace(config, conditioning=replace(config.conditioning, max_tokens=tokens)))


def measure_switch(
    bench: Bench, trainer: Trainer, switch: str, stage: int, arm: str, batches: list[Batch]
) -> Iterator[Row]:  # fmt: skip
    """Our step with one switch and without it, in turn."""
    settings, count, note = bench.settings, trainer.config.batch_size, ""
    if switch in ("fused", "async_save"):
        yield from (measure_fused if switch == "fused" else measure_saves)(bench, trainer, stage, arm, batches)
        return
    title = f"ours, {UNDONE.get(switch, f'{switch}=true')}"
    ours = own_step(trainer, batches)
    works: dict[str, Callable[[int], object]] = {"ours": ours, title: ours}
    before: dict[str, Callable[[], object]] | None = None
    if switch == "reads":
        count, note, ours = 2 * count, "steps of two micro-batches", fullest_step(trainer, batches)
        works = {"ours": ours, title: reading_at_once(trainer, ours)}
    elif switch == "null_prompt":
        note = f"one caption of {count} empty, or a single word"
        works = {work: own_step(trainer, with_first(trainer, batches, caption)) for work, caption in (("ours", ""), (title, "a"))}
    else:
        before = dict(zip(works, both_ways(trainer, switch), strict=True))
    try:
        if before is not None and switch == "compile":
            before[title]()
            for number in range(settings.warmup + settings.repeats):
                ours(number)  # every length of captions is compiled for itself
        timings = interleave(works, settings.warmup, settings.repeats, bench.device, before)
        yield make_row(timings[title], "step", stage, arm, title, count, reference=timings["ours"], against="ours", note=note)
    except torch._dynamo.exc.TorchDynamoException as error:
        yield Row("step", stage, arm, title, None, note=f"torch.compile failed: {str(error).splitlines()[0][:120]}")
    finally:
        if before is not None:
            before["ours"]()


def both_ways(trainer: Trainer, switch: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """What sets the trainer up as it was started, and what sets it up the other way."""
    unet, formats = trainer.joint.unet, (torch.contiguous_format, torch.channels_last)
    if switch == "compile":
        unet.compile()
        compile_layers(trainer.encoder.model)
        programs = {m: m._compiled_call_impl for model in (unet, trainer.encoder.model) for m in model.modules()}

        def compiled(yes: bool) -> None:
            for module, program in programs.items():
                module._compiled_call_impl = program if yes else None
            if trainer.device.type == "cuda":  # as the key does
                lay_out(trainer, formats[yes])

        return partial(compiled, False), partial(compiled, True)
    if switch == "channels_last":
        return partial(lay_out, trainer, formats[0]), partial(lay_out, trainer, formats[1])
    if switch == "cudnn_benchmark":
        return partial(setattr, torch.backends.cudnn, "benchmark", True), partial(setattr, torch.backends.cudnn, "benchmark", False)
    if switch == "frozen_fp32":
        return partial(halve_frozen, unet), partial(widen_frozen, unet)
    adapters = [module for module in trainer.joint.modules() if isinstance(module, BaseTunerLayer)]

    def cast(yes: bool) -> None:
        for adapter in adapters:
            adapter.cast_input_dtype_enabled = yes  # type: ignore[assignment]

    return partial(cast, False), partial(cast, True)


def widen_frozen(unet: nn.Module) -> None:
    """Undo ``halve_frozen``."""
    for parameter in unet.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.float()


def reading_at_once(trainer: Trainer, step: Callable[[int], object]) -> Callable[[int], object]:
    """``step`` whose host waits for each copy to the GPU, for each micro-batch's loss before its way back, and for the norm."""
    engine, places = trainer.engine, ("text.tokenizer", "training.inputs", "training.trainer")
    backward, clip = engine.backward, engine.clip

    def read(loss: Tensor) -> None:
        loss.item()
        backward(loss)

    def read_norm() -> Tensor | None:
        norm = clip()
        if norm is not None:
            norm.item()
        return norm

    def reading(number: int) -> None:
        with mock.patch.multiple(engine, backward=read, clip=read_norm), ExitStack() as stack:
            for place in places:
                stack.enter_context(mock.patch(f"paradiffusion.{place}.to_device", Tensor.to))
            step(number)

    return reading


def with_first(trainer: Trainer, batches: list[Batch], caption: str) -> list[Batch]:
    """The batches with another first caption."""
    texts = [[caption, *batch.captions[1:]] for batch in batches]
    tokens = [tokenize_once(trainer.encoder.tokenize, captions) for captions in texts]
    return [replace(batch, captions=c, tokens=t) for batch, c, t in zip(batches, texts, tokens, strict=True)]


def measure_saves(bench: Bench, trainer: Trainer, stage: int, arm: str, batches: list[Batch]) -> Iterator[Row]:
    """A step after which a checkpoint is taken, written beside the next one or waited for, and a step alone."""
    ours = own_step(trainer, batches)

    def saving(apart: bool, number: int) -> None:
        trainer.saves_apart = apart
        trainer.save(last=False)
        ours(number)

    waits = "ours, a checkpoint, async_save=false"
    works: dict[str, Callable[[int], object]] = {"ours": ours, waits: partial(saving, False)}
    works["ours, a checkpoint, async_save=true"] = partial(saving, True)
    rounds = min(1, bench.settings.warmup), min(SAVES, bench.settings.repeats)
    timings = interleave(works, *rounds, bench.device, dict.fromkeys(works, trainer.settle))
    trainer.settle()
    size = sum(file.stat().st_size for file in checkpoints_of(trainer.folder)[0].rglob("*") if file.is_file())
    alone = timings.pop("ours").seconds
    for work, timing in timings.items():
        stall = statistics.median(timing.seconds) - statistics.median(alone) if alone and timing.seconds else math.nan
        note = f"{size / 1e9:.2f} GB, {stall:+.3g} s beside a step alone"
        yield make_row(timing, "step", stage, arm, work, trainer.config.batch_size, note=note, against=waits,
                       reference=None if work == waits else timings[waits])  # fmt: skip


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


def measure_fused(bench: Bench, trainer: Trainer, stage: int, arm: str, _: list[Batch]) -> Iterator[Row]:
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


def inference_models(config: TrainConfig, device: torch.device) -> InferenceModels:
    """Random models of the configured sizes, as the sampler takes them: bfloat16 on a GPU, float32 on a processor."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    encoder, codec = random_models(config, device)
    joint = build_joint(replace(config, train_text="frozen"), encoder.width)
    joint.requires_grad_(False).eval().to(device, dtype)
    return InferenceModels(
        joint=joint, text_encoder=encoder.to(device), codec=codec.to(device), objective=joint.objective,
        sampler=config.sampler, resolution=config.data.resolution, device=device, dtype=dtype, checkpoint="", step=0,
        provenance={},
    )  # fmt: skip


def sampler_presets(bench: Bench, overrides: list[str]) -> dict[str, SamplerConfig]:
    """The settings to measure, the official ones first; with ``steps`` all shortened by the same share."""
    found = {name: bench.config(1, overrides, f"sampler={name}").sampler for name in bench.samplers}
    wanted = bench.settings.steps
    share = 1.0 if wanted is None else wanted / found[bench.samplers[0]].steps
    return {name: replace(s, steps=max(1, round(s.steps * share))) for name, s in found.items()}


def measure_sampler(bench: Bench) -> Iterator[Row]:
    """Seconds per batch of images, from prompt to pixels, at batch 1 and 8."""

    def measure(arm: str, overrides: list[str]) -> Iterator[Row]:
        models = inference_models(bench.config(1, overrides), bench.device)
        presets = sampler_presets(bench, overrides)
        for size in BATCHES:
            yield from measure_batch(bench, models, arm, size, presets)

    return bench.each_arm("sampler", 1, measure)


def measure_batch(
    bench: Bench, models: InferenceModels, arm: str, size: int, presets: dict[str, SamplerConfig]
) -> Iterator[Row]:  # fmt: skip
    side, rounds = models.resolution, bench.settings.warmup + bench.settings.repeats
    # New prompts in each round: what is kept from an earlier batch must not answer for them.
    prompts = captions("long", size * rounds, seed=size)
    works: dict[str, Callable[[int], object]] = {}
    for name, settings in presets.items():

        def sample(number: int, settings: SamplerConfig = settings) -> None:
            chosen = prompts[number * size : (number + 1) * size]
            draw(models, [Job(f"{j:05d}", prompt, j, side, side, settings) for j, prompt in enumerate(chosen)])

        works[f"ours, sampler={name}"] = sample
    official = presets[bench.samplers[0]]

    def plain(number: int) -> None:
        plain_sample(models, prompts[number * size : (number + 1) * size], range(size), side, official)

    works["reference"] = plain
    before: dict[str, Callable[[], object]] | None = None
    if "compile" in bench.settings.several("switches"):
        unet, title = models.joint.unet, f"ours, sampler={bench.samplers[0]}, compile=true"
        compile_denoiser(unet, bench.device)
        works[title] = works[f"ours, sampler={bench.samplers[0]}"]
        program = unet._compiled_call_impl
        before = {work: partial(setattr, unet, "_compiled_call_impl", program if work == title else None) for work in works}
    timings = interleave(works, bench.settings.warmup, bench.settings.repeats, bench.device, before)
    for work, timing in timings.items():
        settings = presets.get(work.rpartition("=")[2], official)
        note = f"batch {size}, {side} px, {settings.steps} steps, guidance {settings.guidance:g}"
        compared = None if work == "reference" else timings["reference"]
        yield make_row(timing, "sampler", 1, arm, work, size, "images/s", compared, note=note)


def measure_text(bench: Bench) -> Iterator[Row]:
    """Real tokens per second through the frozen language model, long captions, batch 8."""
    return bench.each_arm("text", 2, partial(measure_reading, bench))


@torch.no_grad()
def measure_reading(bench: Bench, arm: str, overrides: list[str]) -> Iterator[Row]:
    config = bench.config(2, overrides, "train_text=frozen")
    encoder = random_models(config, bench.device)[0].to(bench.device)
    texts = captions("long", TEXT_BATCH)
    tokens = encoder.tokenize(texts)
    real = int(tokens.mask.sum())

    def ours(_: int) -> None:
        there = encoder.tokenize(texts).to(bench.device)
        encoder(there.ids, there.mask, there.prefix)

    def plain(_: int) -> None:
        encoder(*padded(encoder, texts, bench.device), len(encoder.prefix_ids))

    timings = interleave({"ours": ours, "reference": plain}, bench.settings.warmup, bench.settings.repeats, bench.device)
    for work, width in (("ours", tokens.ids.shape[1]), ("reference", encoder.limit + tokens.prefix)):
        compared = None if work == "reference" else timings["reference"]
        note = f"{TEXT_BATCH} x {width} tokens, {real / TEXT_BATCH:.0f} of them real on average"
        yield make_row(timings[work], "text", 2, arm, work, real, "tokens/s", compared, note=note)


MEASURES = {"step": measure_steps, "sampler": measure_sampler, "text": measure_text}


def benchmark(settings: BenchmarkSettings, overrides: list[str], compose: Callable[[list[str]], TrainConfig]) -> tuple[Path, list[Row]]:
    """Run everything and write ``<output>/<name>.json`` and ``.md``, anew after each row: a run that is ended keeps what it has.

    Returns their stem and the rows. UserError for overrides that are wrong."""
    config = compose(["data.shards=unused", *overrides])  # refuses what is wrong before anything is built
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        bench = Bench(settings, overrides, compose, SAMPLERS, Path(folder))
        name = settings.name or f"{config.preset}_{device_slug(bench.device)}"
        document = {
            "date": today(),
            "machine": machine(bench.device.type),
            "command": " ".join(["python scripts/benchmark.py", *overrides, *settings.spelled()]),
            "precision": config.precision,
        }
        stem = Path(settings.output) / name
        for what in settings.several("what"):
            for row in MEASURES[what](bench):
                rows.append(row)
                print("  ".join(cell for cell in cells(row) if cell != "-"), flush=True)
                full = document | {"rows": [asdict(row) for row in rows]}
                stem = write_results(settings.output, name, full, as_markdown(document, rows))
    return stem, rows


def device_slug(device: torch.device) -> str:
    """ "cpu", or a GPU's name fit for a file."""
    if device.type == "cpu":
        return "cpu"
    name = torch.cuda.get_device_name(0).lower().replace("nvidia", "").strip()
    return "_".join("".join(c if c.isalnum() else " " for c in name).split())


def cells(row: Row) -> list[str]:
    """One row as text."""
    if row.median is None:
        return [row.what, str(row.stage), row.arm, row.work, *["-"] * 6, row.note]
    speedup = "-" if row.speedup is None else f"{row.speedup:.2f} x"
    if row.speedup is not None and row.against != "reference":
        speedup += f" of {row.against}"
    peak = "-" if row.peak_gib is None else f"{row.peak_gib:.1f}"
    peak += "" if row.described_gib is None else f" ({row.described_gib:.1f})"
    power = "-" if row.tflops is None else f"{row.tflops:.3g}" + ("" if row.mfu is None else f" ({row.mfu:.1%})")
    return [
        row.what, str(row.stage), row.arm, row.work, f"{row.median:.4g} s ({row.low:.4g} to {row.high:.4g})",
        f"{row.rate:,.4g} {row.unit}", speedup, power, peak,
        "-" if row.reserved_gib is None else f"{row.reserved_gib:.1f}", row.note,
    ]  # fmt: skip


def as_markdown(document: dict[str, Any], rows: Sequence[Row]) -> str:
    """The results for a person."""
    return (
        f"# {document['machine'].get('gpu', document['machine']['processor'])}, {document['date']}\n\n"
        f"{facts(document['machine'])}; precision {document['precision']}.\n\n```\n{document['command']}\n```\n\n"
        "Rate, speed-up (how many times faster than the plain reference in rounds that ran in turn) and TFLOP/s (forward and "
        "backward of the models, nothing twice) are over all rounds; their batches go from short captions to long ones.\n\n"
        f"{markdown_table(HEADER, map(cells, rows))}\n"
    )


def padded(encoder: TextEncoder, captions: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, L] with L the maximum, however short the captions are."""
    tokens = encoder.tokenize(list(captions))
    missing = encoder.limit + tokens.prefix - tokens.ids.shape[1]
    ids = F.pad(tokens.ids, (0, missing), value=encoder.pad_id)
    return ids.to(device), F.pad(tokens.mask, (0, missing)).to(device)


class PlainTrainer:
    """Optimiser steps of a stage's models, written straightforwardly, with an optimiser and an average of its own."""

    def __init__(self, ours: Trainer) -> None:
        config = ours.config.optimizer
        self.ours = ours
        self.parameters = list(ours.joint.trained().values())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay, eps=config.eps
        )
        self.ema: Any = EMAModel(self.parameters, decay=ours.config.ema_decay)

    def step(self, batch: Batch) -> float:
        """One step on ``batch``; returns the loss."""
        ours, device = self.ours, self.ours.device
        encoder, codec, joint = ours.encoder, ours.codec, ours.joint
        with torch.no_grad():
            images = batch.images.to(device, codec.vae.dtype)
            latents = codec.to_unit(codec.vae.encode(images).latent_dist.sample())
        noise = torch.randn_like(latents)
        times = joint.objective.times(torch.rand(len(latents), device=device), latents.shape[2:])
        ids, id_mask = padded(encoder, batch.captions, device)
        prefix = len(encoder.prefix_ids)
        inputs: dict[str, Any] = {
            "latents": latents,
            "noise": noise,
            "times": times,
            "weights": torch.ones(len(latents), device=device),
            "mask": id_mask[:, prefix:] if encoder.settings.mask_padding else None,
        }
        if joint.text_encoder is None:
            with torch.no_grad():
                inputs["features"] = encoder(ids, id_mask, prefix)
        else:
            inputs |= {"ids": ids, "id_mask": id_mask, "prefix": prefix}
        loss = ours.engine.model(LossBatch(**inputs)).total
        ours.accelerator.backward(loss)
        ours.accelerator.clip_grad_norm_(self.parameters, ours.config.optimizer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.parameters)
        return float(loss.item())


@torch.no_grad()
def plain_sample(models: InferenceModels, prompts: Sequence[str], seeds: Sequence[int], side: int, settings: SamplerConfig) -> Tensor:
    """Draw one batch of square images: uint8 [B, side, side, 3] on the CPU."""
    device, encoder, count = models.device, models.text_encoder, len(prompts)
    ids, id_mask = padded(encoder, [""] * count + list(prompts), device)
    prefix = len(encoder.prefix_ids)
    mask = id_mask[:, prefix:] if encoder.settings.mask_padding else None
    features = models.joint.refine(encoder(ids, id_mask, prefix).to(models.dtype), mask)

    scheduler = models.objective.scheduler(settings.solver)
    scheduler.set_timesteps(settings.steps, device=device)
    shape = models.codec.latent_shape(side, side)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    latents = torch.stack(noise).to(device) * getattr(scheduler, "init_noise_sigma", 1.0)
    for timestep in scheduler.timesteps:
        both = torch.cat([latents, latents])
        if hasattr(scheduler, "scale_model_input"):
            both = scheduler.scale_model_input(both, timestep)
        times = timestep.float().to(device).expand(2 * count)
        null, prompt = models.joint.denoise(both.to(models.dtype), times, features, mask).float().chunk(2)
        prediction = null + settings.guidance * (prompt - null)
        latents = scheduler.step(prediction, timestep, latents).prev_sample
    return models.decode(latents)
