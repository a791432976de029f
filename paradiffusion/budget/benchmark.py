"""Benchmark of models: steps, sampling and text encoding beside the plain reference, as JSON and as a Markdown table."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from paradiffusion.budget.bench_models import (
    GIB,
    SWITCHES,
    Bench,
    BenchmarkSettings,
    Row,
    Timing,
    interleave,
    make_row,
    parse_settings,
    release,
    several,
)
from paradiffusion.budget.flops import stage_flops
from paradiffusion.budget.memory import LAUNCHES, Fitter
from paradiffusion.budget.results import Results, machine
from paradiffusion.budget.synthetic import captions, random_models
from paradiffusion.checkpoints.manifest import checkpoints_of
from paradiffusion.compose import compose_train
from paradiffusion.config import SamplerConfig, TrainConfig, keys_of
from paradiffusion.data.loader import Batch
from paradiffusion.models.joint import LossBatch, build_joint
from paradiffusion.models.unet import halve_frozen
from paradiffusion.sampling.pipeline import InferenceModels, Job, compile_denoiser, draw
from paradiffusion.scenes.dataset import make_wanted
from paradiffusion.text.encoder import TextEncoder, compile_layers
from paradiffusion.text.tokenizer import Tokens, tokenize_once
from paradiffusion.training.trainer import Trainer

# The released inference code's settings, and ours for speed: configs/sampler.
SAMPLERS = ("paper", "fast")
HEADER = [
    "what", "stage", "arm", "work", "median (range)", "rate", "speed-up", "TFLOP/s (MFU)", "peak GiB (describe's)",
    "reserved GiB", "settings",
]  # fmt: skip
ABOUT = (
    "Rate, speed-up (how many times faster than the plain reference in rounds that ran in turn) and TFLOP/s (forward and backward of the "
    "models, nothing twice) are over all rounds; their batches go from short captions to long ones."
)
BATCHES = (1, 8)
TEXT_BATCH = 8
GIVEN, LATENTS_GIVEN = "features and latents given", "latents given"
# Checkpoints of each kind whose time is taken, after one that is not: each may be of many gigabytes.
SAVES = 2
# Batches of an epoch that are looked at.
MOST_BATCHES = 32


def benchmark(arguments: Sequence[str]) -> tuple[Path, list[Row]]:
    """Run everything and write ``<output>/<name>.json`` and ``.md``; returns their stem and the rows. UserError for arguments that are
    wrong."""
    settings, overrides = parse_settings(arguments)
    # Refuses what is wrong before anything is built.
    config = compose_train(["data.shards=unused", *overrides], tuple(keys_of(BenchmarkSettings)))
    shown = {key: value for key, value in asdict(settings).items() if key not in ("output", "name") and value is not None}
    ran_on, rows = machine(str(settings.device)), list[Row]()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        bench = Bench(settings, overrides, Path(folder))
        named = replace(settings, name=settings.name or f"{config.preset}_{device_slug(bench.device)}")
        command = " ".join(["python scripts/benchmark.py", *overrides, *(f"{key}={value}" for key, value in shown.items())])
        about = f"Precision {config.precision}. {ABOUT}"
        document = {"machine": ran_on, "command": command, "precision": config.precision}
        results = Results(named, ran_on.get("gpu", ran_on["processor"]), about, HEADER, document)
        for row in measure(bench):
            rows.append(row)
            results.add(asdict(row), cells(row))
    return results.stem, rows


def measure(bench: Bench) -> Iterator[Row]:
    """Rows of all that is asked for, in every arm; what does not fit says so, and the others go on."""
    stages = {"step": [*map(int, several(bench.settings.stages))], "sampler": [1], "text": [2]}
    measures = {"step": measure_stage, "sampler": measure_sampler, "text": measure_reading}
    for what in several(bench.settings.what):
        for stage, (arm, overrides) in product(stages[what], bench.arms().items()):
            try:
                for row in measures[what](bench, stage, overrides):
                    yield replace(row, what=row.what or what, stage=stage, arm=arm)
            except torch.OutOfMemoryError:
                yield Row(what, stage, arm, "ours", note=f"did not fit into the memory of {bench.device}")
            release()


def measure_stage(bench: Bench, stage: int, overrides: list[str]) -> Iterator[Row]:
    """One stage in one arm: ours, the reference, features given, and the switches."""
    settings = bench.settings
    config = bench.config(stage, overrides)
    bench.write_data(config.data.resolution)
    trainer = start(bench, config)
    try:
        batches = take_batches(trainer, settings.warmup, settings.repeats)
        # Alone first: beside it the reference's optimiser and average will take memory as well. Its state is made in the first step. Each
        # length asks the allocator for blocks of its own.
        release()
        alone = bench.time({"ours": own_step(trainer, batches, 2)})["ours"]
        given = GIVEN if trainer.joint.text_encoder is None else LATENTS_GIVEN
        works: dict[str, Callable[[int], object]] = {
            "ours": own_step(trainer, batches),
            given: given_step(trainer, batches[settings.warmup + settings.repeats // 2]),
            "reference": plain_step(trainer, batches),
        }
        yield from stage_rows(bench, trainer, batches, bench.time(works), alone)
        works.clear()
        release()
        # The switches concern the U-Net and its weights, which are the same in every arm.
        for switch in several(settings.switches) if overrides == next(iter(bench.arms().values())) else ():
            yield from measure_switch(bench, trainer, switch, batches)
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


def own_step(trainer: Trainer, batches: list[Batch], micro_batches: int = 1) -> Callable[[int], object]:
    """One optimiser step of training. Of two micro-batches it takes the memory that ``describe`` counts: gradients are there while the
    second one's are taken."""

    def step(number: int) -> None:
        trainer.micro_batches = micro_batches
        try:
            trainer.train_step(iter([batches[number]] * micro_batches))
        finally:
            trainer.micro_batches = 1
            trainer.engine.discard()  # where memory ran out

    return step


def described_gib(config: TrainConfig, tokens: int) -> float:
    """What ``describe`` says of a step on one GPU whose captions have so many tokens, without the device's own context."""
    memory = Fitter([], gpus=1).memory_of(at_length(config, tokens), LAUNCHES[0])
    return (memory.total - memory.context) / GIB


def at_length(config: TrainConfig, tokens: int) -> TrainConfig:
    """``config`` with captions that are padded to ``tokens``."""
    return replace(config, conditioning=replace(config.conditioning, max_tokens=tokens))


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


def stage_rows(bench: Bench, trainer: Trainer, batches: list[Batch], timings: dict[str, Timing], alone: Timing) -> Iterator[Row]:
    """Rows of a stage's works; ours has the memory of the steps that were taken ``alone``."""
    config, encoder = trainer.config, trainer.encoder
    count, peak = config.batch_size, bench.peak(config.precision)
    widths = [encoder.tokenize(batch.captions).ids.shape[1] for batch in batches[bench.settings.warmup :]]
    middle = widths[len(widths) // 2]
    # How long captions are, and what is not computed.
    plan: dict[str, tuple[int, list[str]]] = {
        "ours": (round(statistics.fmean(widths)), []),
        GIVEN: (middle, ["text", "vae"]),
        LATENTS_GIVEN: (middle, ["vae"]),
        "reference": (encoder.limit, []),
    }
    for work in timings:
        tokens, left_out = plan[work]
        flop = count * stage_flops(at_length(config, tokens)).total(*left_out).training
        note = f"{count} x {batches[0].images.shape[-1]} px, {tokens} tokens"
        if work != "ours":
            yield make_row(timings, work, count, flop=flop, peak=peak, note=note)
            continue
        row = make_row(timings, work, count, flop=flop, peak=peak, note=f"{note} on average")
        described = None if alone.peak_gib is None else described_gib(config, widths[-1])
        yield replace(row, peak_gib=alone.peak_gib, reserved_gib=alone.reserved_gib, described_gib=described)


def measure_switch(bench: Bench, trainer: Trainer, switch: str, batches: list[Batch]) -> Iterator[Row]:
    """Our step with one switch and without it, in turn."""
    count, note = trainer.config.batch_size, ""
    if switch in ("fused", "async_save"):
        yield from measure_fused(bench, trainer) if switch == "fused" else measure_saves(bench, trainer, batches)
        return
    title = f"ours, {SWITCHES[switch]}"
    ours = own_step(trainer, batches)
    works: dict[str, Callable[[int], object]] = {"ours": ours, title: ours}
    before: dict[str, Callable[[], object]] | None = None
    if switch == "reads":
        count, note, ours = 2 * count, "steps of two micro-batches", own_step(trainer, batches, 2)
        works = {"ours": ours, title: reading_at_once(trainer, ours)}
    elif switch == "null_prompt":
        note = f"one caption of {count} empty, or a single word"
        works = {work: own_step(trainer, with_first(trainer, batches, caption)) for work, caption in (("ours", ""), (title, "a"))}
    else:
        other_way = changing(trainer, switch)
        before = {"ours": partial(other_way, False), title: partial(other_way, True)}
    try:
        if before is not None and switch == "compile":
            before[title]()
            for number in range(len(batches)):
                ours(number)  # every length of captions is compiled for itself
        yield make_row(bench.time(works, before), title, count, against="ours", note=note)
    except torch._dynamo.exc.TorchDynamoException as error:
        yield Row(work=title, note=f"torch.compile failed: {str(error).splitlines()[0][:120]}")
    finally:
        if before is not None:
            before["ours"]()


def changing(trainer: Trainer, switch: str) -> Callable[[bool], object]:
    """What sets the trainer up the other way (True), and as it was started (False)."""
    unet, formats = trainer.joint.unet, (torch.contiguous_format, torch.channels_last)
    if switch == "compile":
        unet.compile()
        compile_layers(trainer.encoder.model)
        swap = swapping(unet, trainer.encoder.model)

        def compiled(yes: bool) -> None:
            swap(yes)
            if trainer.device.type == "cuda":  # as the key does
                lay_out(trainer, formats[yes])

        return compiled
    if switch == "channels_last":
        return lambda yes: lay_out(trainer, formats[yes])
    if switch == "cudnn_benchmark":
        return lambda yes: setattr(torch.backends.cudnn, "benchmark", not yes)
    if switch == "frozen_fp32":
        return lambda yes: widen_frozen(unet) if yes else halve_frozen(unet)
    adapters = [module for module in trainer.joint.modules() if isinstance(module, BaseTunerLayer)]

    def cast(yes: bool) -> None:
        for adapter in adapters:
            adapter.cast_input_dtype_enabled = yes  # type: ignore[assignment]

    return cast


def swapping(*models: nn.Module) -> Callable[[bool], None]:
    """What lets the models run as they are compiled now (True), or eagerly (False)."""
    programs = {module: module._compiled_call_impl for model in models for module in model.modules()}

    def swap(compiled: bool) -> None:
        for module, program in programs.items():
            module._compiled_call_impl = program if compiled else None

    return swap


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


def measure_saves(bench: Bench, trainer: Trainer, batches: list[Batch]) -> Iterator[Row]:
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
        yield make_row(timings, work, trainer.config.batch_size, against=waits, note=note)


def lay_out(trainer: Trainer, memory_format: torch.memory_format) -> None:
    """Bring the U-Net's kernels, their moments and their averages into one memory layout: AdamW's and the average's
    kernels for many tensors at once want them alike."""
    trainer.joint.unet.to(memory_format=memory_format)
    for state in trainer.engine.optimizer.state.values():
        state.update({key: _laid_out(value, memory_format) for key, value in state.items()})
    trainer.ema.values[:] = [_laid_out(value, memory_format) for value in trainer.ema.values]


def _laid_out(tensor: Tensor, memory_format: torch.memory_format) -> Tensor:
    return tensor.contiguous(memory_format=memory_format) if tensor.ndim == 4 else tensor


def measure_fused(bench: Bench, trainer: Trainer) -> Iterator[Row]:
    """AdamW's update of all trained weights alone, fused and in PyTorch's default form."""
    parameters = [p.detach().clone() for p in trainer.joint.trained().values()]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)

    def update(optimizer: torch.optim.Optimizer, _: int) -> None:
        optimizer.step()

    default = "AdamW update, default"
    made = {name: torch.optim.AdamW(parameters, lr=1e-6, fused=name != default or None) for name in ("AdamW update, fused", default)}
    timings = bench.time({name: partial(update, optimizer) for name, optimizer in made.items()})
    size = sum(p.numel() for p in parameters)
    for work in timings:
        yield make_row(timings, work, size / 1e6, "M parameters/s", default, what="update")


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
    found = {name: bench.config(1, overrides, f"sampler={name}").sampler for name in SAMPLERS}
    wanted = bench.settings.steps
    share = 1.0 if wanted is None else wanted / found[SAMPLERS[0]].steps
    return {name: replace(s, steps=max(1, round(s.steps * share))) for name, s in found.items()}


def measure_sampler(bench: Bench, stage: int, overrides: list[str]) -> Iterator[Row]:
    """Seconds per batch of images, from prompt to pixels, at batch 1 and 8."""
    models = inference_models(bench.config(stage, overrides), bench.device)
    presets = sampler_presets(bench, overrides)
    for size in BATCHES:
        yield from measure_batch(bench, models, size, presets)


def measure_batch(bench: Bench, models: InferenceModels, size: int, presets: dict[str, SamplerConfig]) -> Iterator[Row]:
    side, rounds = models.resolution, bench.settings.warmup + bench.settings.repeats
    # New prompts in each round: what is kept from an earlier batch must not answer for them.
    prompts = captions("long", size * rounds, seed=size)
    official = presets[SAMPLERS[0]]

    def sample(settings: SamplerConfig, number: int) -> None:
        chosen = prompts[number * size : (number + 1) * size]
        draw(models, [Job(f"{j:05d}", prompt, j, side, side, settings) for j, prompt in enumerate(chosen)])

    def plain(number: int) -> None:
        plain_sample(models, prompts[number * size : (number + 1) * size], range(size), side, official)

    works: dict[str, Callable[[int], object]] = {f"ours, sampler={name}": partial(sample, settings) for name, settings in presets.items()}
    works["reference"] = plain
    before: dict[str, Callable[[], object]] | None = None
    if "compile" in several(bench.settings.switches):
        title = f"ours, sampler={SAMPLERS[0]}, compile=true"
        works[title] = partial(sample, official)
        compile_denoiser(models.joint.unet, bench.device)
        swap = swapping(models.joint.unet)
        before = {work: partial(swap, work == title) for work in works}
    timings = bench.time(works, before)
    for work in timings:
        settings = presets.get(work.rpartition("=")[2], official)
        note = f"batch {size}, {side} px, {settings.steps} steps, guidance {settings.guidance:g}"
        yield make_row(timings, work, size, "images/s", note=note)


@torch.no_grad()
def measure_reading(bench: Bench, stage: int, overrides: list[str]) -> Iterator[Row]:
    """Real tokens per second through the frozen language model, long captions, batch 8."""
    config = bench.config(stage, overrides, "train_text=frozen")
    encoder = random_models(config, bench.device)[0].to(bench.device)
    texts = captions("long", TEXT_BATCH)
    ways: dict[str, Callable[[], Tokens]] = {
        "ours": lambda: encoder.tokenize(texts).to(bench.device),
        "reference": lambda: padded(encoder, texts, bench.device),
    }

    def read(tokenized: Callable[[], Tokens], _: int) -> None:
        tokens = tokenized()
        encoder(tokens.ids, tokens.mask, tokens.prefix)

    timings = bench.time({work: partial(read, tokenized) for work, tokenized in ways.items()})
    for work, tokenized in ways.items():
        tokens = tokenized()
        real = int(tokens.mask.sum())
        note = f"{TEXT_BATCH} x {tokens.ids.shape[1]} tokens, {real / TEXT_BATCH:.0f} of them real on average"
        yield make_row(timings, work, real, "tokens/s", note=note)


def device_slug(device: torch.device) -> str:
    """ "cpu", or a GPU's name fit for a file."""
    if device.type == "cpu":
        return "cpu"
    name = torch.cuda.get_device_name(0).lower().replace("nvidia", "").strip()
    return "_".join("".join(c if c.isalnum() else " " for c in name).split())


def shown(value: float | None, form: str, unit: str = "") -> str:
    """A number as text; "-" for None."""
    return "-" if value is None else f"{value:{form}}{unit}"


def cells(row: Row) -> list[str]:
    """One row as text."""
    if row.median is None:
        return [row.what, str(row.stage), row.arm, row.work, *["-"] * 6, row.note]
    described = "" if row.described_gib is None else f" ({row.described_gib:.1f})"
    mfu = "" if row.mfu is None else f" ({row.mfu:.1%})"
    return [
        row.what, str(row.stage), row.arm, row.work, f"{row.median:.4g} s ({row.low:.4g} to {row.high:.4g})",
        f"{row.rate:,.4g} {row.unit}", shown(row.speedup, ".2f", " x" if row.against == "reference" else f" x of {row.against}"),
        shown(row.tflops, ".3g", mfu), shown(row.peak_gib, ".1f", described), shown(row.reserved_gib, ".1f"), row.note,
    ]  # fmt: skip


def padded(encoder: TextEncoder, captions: Sequence[str], device: torch.device) -> Tokens:
    """Captions' tokens on ``device``, ids and mask [B, L] with L the maximum, however short the captions are."""
    tokens = encoder.tokenize(list(captions))
    missing = encoder.limit + tokens.prefix - tokens.ids.shape[1]
    ids = F.pad(tokens.ids, (0, missing), value=encoder.pad_id)
    return replace(tokens, ids=ids.to(device), mask=F.pad(tokens.mask, (0, missing)).to(device))


def plain_step(trainer: Trainer, batches: list[Batch]) -> Callable[[int], object]:
    """One optimiser step of a stage's models, written straightforwardly, with an optimiser and an average of its own."""
    config, device = trainer.config.optimizer, trainer.device
    encoder, codec, joint = trainer.encoder, trainer.codec, trainer.joint
    parameters = list(joint.trained().values())
    betas = (config.beta1, config.beta2)
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=betas, weight_decay=config.weight_decay, eps=config.eps)
    ema: Any = EMAModel(parameters, decay=trainer.config.ema_decay)

    def step(number: int) -> None:
        batch = batches[number]
        with torch.no_grad():
            images = batch.images.to(device, codec.vae.dtype)
            latents = codec.to_unit(codec.vae.encode(images).latent_dist.sample())
        tokens = padded(encoder, batch.captions, device)
        inputs: dict[str, Any] = {
            "latents": latents,
            "noise": torch.randn_like(latents),
            "times": joint.objective.times(torch.rand(len(latents), device=device), latents.shape[2:]),
            "weights": torch.ones(len(latents), device=device),
            "mask": encoder.feature_mask(tokens),
        }
        if joint.text_encoder is None:
            with torch.no_grad():
                inputs["features"] = encoder(tokens.ids, tokens.mask, tokens.prefix)
        else:
            inputs |= {"ids": tokens.ids, "id_mask": tokens.mask, "prefix": tokens.prefix}
        loss = trainer.engine.model(LossBatch(**inputs)).total
        trainer.accelerator.backward(loss)
        trainer.accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(parameters)
        loss.item()

    return step


@torch.no_grad()
def plain_sample(models: InferenceModels, prompts: Sequence[str], seeds: Sequence[int], side: int, settings: SamplerConfig) -> Tensor:
    """Draw one batch of square images: uint8 [B, side, side, 3] on the CPU."""
    device, encoder, count = models.device, models.text_encoder, len(prompts)
    tokens = padded(encoder, [""] * count + list(prompts), device)
    mask = encoder.feature_mask(tokens)
    features = models.joint.refine(encoder(tokens.ids, tokens.mask, tokens.prefix).to(models.dtype), mask)

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
