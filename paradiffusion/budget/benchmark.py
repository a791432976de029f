"""Benchmark of models: steps, sampling and text encoding beside the plain reference, as JSON and as a Markdown table."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from paradiffusion.budget.bench_models import Bench, BenchmarkSettings, Row, interleave, make_row
from paradiffusion.budget.bench_step import measure_steps
from paradiffusion.budget.reference import padded, plain_sample
from paradiffusion.budget.results import facts, machine, today, write_results
from paradiffusion.budget.synthetic import captions, random_models
from paradiffusion.config import SamplerConfig, TrainConfig
from paradiffusion.models.joint import build_joint
from paradiffusion.pages import markdown_table
from paradiffusion.sampling.pipeline import InferenceModels, Job, draw

# The released inference code's settings, and ours for speed: configs/sampler.
SAMPLERS = ("paper", "fast")
HEADER = ["what", "stage", "arm", "work", "median (range)", "rate", "speed-up", "TFLOP/s (MFU)", "peak GiB", "settings"]
BATCHES = (1, 8)
TEXT_BATCH = 8


def inference_models(config: TrainConfig, device: torch.device) -> InferenceModels:
    """Random models of the configured sizes, as the sampler takes them: bfloat16 on a GPU, float32 on a processor."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    encoder, codec = random_models(config, device)
    joint = build_joint(replace(config, train_text="frozen"), encoder.width)
    joint.requires_grad_(False).eval().to(device, dtype)
    return InferenceModels(
        joint=joint,
        text_encoder=encoder.to(device),
        codec=codec.to(device),
        objective=joint.objective,
        sampler=config.sampler,
        resolution=config.data.resolution,
        device=device,
        dtype=dtype,
        checkpoint="",
        step=0,
        provenance={},
    )


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
    timings = interleave(works, bench.settings.warmup, bench.settings.repeats, bench.device)
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

    timings = interleave(
        {"ours": ours, "reference": plain}, bench.settings.warmup, bench.settings.repeats, bench.device
    )
    for work, width in (("ours", tokens.ids.shape[1]), ("reference", encoder.limit + tokens.prefix)):
        compared = None if work == "reference" else timings["reference"]
        note = f"{TEXT_BATCH} x {width} tokens, {real / TEXT_BATCH:.0f} of them real on average"
        yield make_row(timings[work], "text", 2, arm, work, real, "tokens/s", compared, note=note)


MEASURES = {"step": measure_steps, "sampler": measure_sampler, "text": measure_text}


def benchmark(
    settings: BenchmarkSettings, overrides: list[str], compose: Callable[[list[str]], TrainConfig]
) -> tuple[Path, list[Row]]:
    """Run everything and write ``<output>/<name>.json`` and ``.md``; returns their stem and the rows.

    Raises:
        UserError: for overrides that are wrong.
    """
    config = compose(["data.shards=unused", *overrides])  # refuses what is wrong before anything is built
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        bench = Bench(settings, overrides, compose, SAMPLERS, Path(folder))
        for what in settings.several("what"):
            for row in MEASURES[what](bench):
                rows.append(row)
                print("  ".join(cell for cell in cells(row) if cell != "-"), flush=True)
    document = {
        "date": today(),
        "machine": machine(bench.device.type),
        "command": " ".join(["python scripts/benchmark.py", *overrides, *settings.spelled()]),
        "precision": config.precision,
        "rows": [asdict(row) for row in rows],
    }
    name = settings.name or f"{config.preset}_{device_slug(bench.device)}"
    return write_results(settings.output, name, document, as_markdown(document, rows)), rows


def device_slug(device: torch.device) -> str:
    """ "cpu", or a GPU's name fit for a file."""
    if device.type == "cpu":
        return "cpu"
    name = torch.cuda.get_device_name(0).lower().replace("nvidia", "").strip()
    return "_".join("".join(c if c.isalnum() else " " for c in name).split())


def cells(row: Row) -> list[str]:
    """One row as text."""
    if row.median is None:
        return [row.what, str(row.stage), row.arm, row.work, "-", "-", "-", "-", "-", row.note]
    speedup = "-" if row.speedup is None else f"{row.speedup:.2f} x"
    if row.speedup is not None and row.against != "reference":
        speedup += f" of {row.against}"
    power = "-" if row.tflops is None else f"{row.tflops:.3g}" + ("" if row.mfu is None else f" ({row.mfu:.1%})")
    return [
        row.what, str(row.stage), row.arm, row.work, f"{row.median:.4g} s ({row.low:.4g} to {row.high:.4g})",
        f"{row.rate:,.4g} {row.unit}", speedup, power, "-" if row.peak_gib is None else f"{row.peak_gib:.1f}", row.note,
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
