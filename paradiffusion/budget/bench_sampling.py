"""Time sampling and text encoding, beside the plain reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from paradiffusion.budget.bench_models import Bench, Row, make_row
from paradiffusion.budget.reference import padded, plain_sample
from paradiffusion.budget.synthetic import captions, random_models
from paradiffusion.budget.timing import interleave, release
from paradiffusion.config import SamplerConfig, TrainConfig
from paradiffusion.models.joint import build_joint
from paradiffusion.sampling.pipeline import InferenceModels, Job, draw
from paradiffusion.text.encoder import TextEncoder

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
    for arm, overrides in bench.arms().items():
        config = bench.config(1, overrides)
        presets = sampler_presets(bench, overrides)
        try:
            models = inference_models(config, bench.device)
            for size in BATCHES:
                yield from measure_batch(bench, models, arm, size, presets)
            del models
        except torch.OutOfMemoryError:
            yield Row("sampler", 1, arm, "ours", None, note=f"did not fit into the memory of {bench.device}")
        release()


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
    for arm, overrides in bench.arms().items():
        config = bench.config(2, overrides, "train_text=frozen")
        try:
            encoder = random_models(config, bench.device)[0].to(bench.device)
            yield from measure_reading(bench, encoder, arm)
            del encoder
        except torch.OutOfMemoryError:
            yield Row("text", 2, arm, "ours", None, note=f"did not fit into the memory of {bench.device}")
        release()


@torch.no_grad()
def measure_reading(bench: Bench, encoder: TextEncoder, arm: str) -> Iterator[Row]:
    texts = captions("long", TEXT_BATCH)
    tokens = encoder.tokenize(texts)
    real = int(tokens.mask.sum())

    @torch.no_grad()
    def ours(_: int) -> None:
        there = encoder.tokenize(texts).to(bench.device)
        encoder(there.ids, there.mask, there.prefix)

    @torch.no_grad()
    def plain(_: int) -> None:
        encoder(*padded(encoder, texts, bench.device), len(encoder.prefix_ids))

    timings = interleave(
        {"ours": ours, "reference": plain}, bench.settings.warmup, bench.settings.repeats, bench.device
    )
    for work, width in (("ours", tokens.ids.shape[1]), ("reference", encoder.limit + tokens.prefix)):
        compared = None if work == "reference" else timings["reference"]
        note = f"{TEXT_BATCH} x {width} tokens, {real / TEXT_BATCH:.0f} of them real on average"
        yield make_row(timings[work], "text", 2, arm, work, real, "tokens/s", compared, note=note)
