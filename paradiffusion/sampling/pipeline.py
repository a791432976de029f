"""From prompts to pixels: jobs, batches of equal size and settings, text -> latents -> images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from paradiffusion.config import SampleConfig, SamplerConfig
from paradiffusion.diffusion.objective import Objective
from paradiffusion.errors import UserError
from paradiffusion.sampling.prompts import MAX_SEED, PromptRequest
from paradiffusion.sampling.sampler import sample_latents
from paradiffusion.text.conditioning import Conditioning


class Models(Protocol):
    """Everything that drawing needs from a checkpoint.

    Attributes:
        sampler: the checkpoint's default settings.
        latent_channels, factor: of the codec; factor is in pixels per latent.
        multiple: height and width must be multiples of it, in pixels.
        resolution: default height and width, in pixels.
        checkpoint, step, provenance: what the images are recorded as made by.
    """

    objective: Objective
    sampler: SamplerConfig
    resolution: int
    device: torch.device
    dtype: torch.dtype
    checkpoint: str
    step: int
    provenance: dict[str, Any]

    @property
    def latent_channels(self) -> int: ...

    @property
    def factor(self) -> int: ...

    @property
    def multiple(self) -> int: ...

    def denoise(self, latents: Tensor, times: Tensor, features: Tensor, mask: Tensor | None, /) -> Tensor:
        """The prediction, [B, C, h, w]."""
        ...

    def encode(self, prompts: list[str], /) -> Conditioning:
        """Conditioning of B prompts with the null prompt, on the models' device."""
        ...

    def encode_ahead(self, prompts: list[str], /) -> None:
        """Encode prompts that ``encode`` will be asked for, so that it need not."""
        ...

    def decode(self, latents: Tensor, /) -> Tensor:
        """Images, uint8 [B, H, W, 3] on the CPU."""
        ...

    def count_truncated(self, prompts: list[str], /) -> int:
        """How many of the prompts are longer than the text encoder's limit."""
        ...


@dataclass(frozen=True)
class Job:
    """One image to draw; height and width in pixels."""

    name: str
    prompt: str
    seed: int
    height: int
    width: int
    settings: SamplerConfig
    negative_prompt: str | None = None


def sampler_settings(
    config: SampleConfig, defaults: SamplerConfig, request: PromptRequest | None = None
) -> SamplerConfig:
    """Settings of one prompt: its line's value, else the command line's, else the checkpoint's.

    Raises:
        UserError: for a value out of range.
    """
    keys = [one.name for one in fields(SamplerConfig)]
    chosen = {key: value for key in keys if (value := getattr(config, key)) is not None}
    if request is not None:
        chosen |= {key: value for key in ("steps", "guidance") if (value := getattr(request, key)) is not None}
    settings = replace(defaults, **chosen)
    settings.check()
    return settings


def make_jobs(requests: Sequence[PromptRequest], config: SampleConfig, models: Models) -> list[Job]:
    """One job for each image, in the order of the prompts; image j of a prompt has the prompt's seed + j.

    Raises:
        UserError: for a size, solver or number of steps that the models cannot take; it names the prompt's line.
    """
    jobs = []
    checked: set[tuple[str, int]] = set()
    for request in requests:
        settings = sampler_settings(config, models.sampler, request)
        if (settings.solver, settings.steps) not in checked:
            _check_settings(settings, request, models)
            checked.add((settings.solver, settings.steps))
        height, width = (_side(key, request, config, models) for key in ("height", "width"))
        seed = config.seed if request.seed is None else request.seed
        if not 0 <= seed <= MAX_SEED - config.images_per_prompt:
            raise UserError(
                f"{request.source}: seed={seed} is out of range; expected 0 to {MAX_SEED} minus the images."
            )
        negative = config.negative_prompt if request.negative_prompt is None else request.negative_prompt
        for image in range(config.images_per_prompt):
            name = f"{request.index:05d}" + (f"_{image}" if image else "")
            # An empty negative prompt is the null prompt, so a line can switch the command line's off.
            jobs.append(Job(name, request.prompt, seed + image, height, width, settings, negative or None))
    return jobs


def _check_settings(settings: SamplerConfig, request: PromptRequest, models: Models) -> None:
    objective = models.objective
    objective.scheduler(settings.solver)  # refuses a solver that the objective does not have
    if settings.steps > objective.config.train_timesteps:
        raise UserError(
            f"{request.source}: steps={settings.steps} is more than the {objective.config.train_timesteps} steps of the "
            "noise schedule; expected fewer, such as steps=50."
        )


def _side(key: str, request: PromptRequest, config: SampleConfig, models: Models) -> int:
    """Height or width of a request in pixels."""
    value, source = getattr(request, key), request.source
    if value is None:
        value, source = getattr(config, key), "the command line"
    if value is None:
        return models.resolution
    if value < 1 or value % models.multiple:
        below = value // models.multiple * models.multiple
        nearest = [str(size) for size in (below, below + models.multiple) if size > 0]
        raise UserError(
            f"{key}={value} ({source}) cannot be drawn by this model; expected a multiple of {models.multiple}, "
            f"the nearest being {' and '.join(nearest)}."
        )
    return int(value)


def ordered(jobs: Sequence[Job]) -> list[Job]:
    """Jobs of equal size and settings side by side, kinds in order of first appearance, and in order within a kind."""
    groups: dict[tuple[Any, ...], list[Job]] = {}
    for job in jobs:
        groups.setdefault(_kind(job), []).append(job)
    return [job for group in groups.values() for job in group]


def _kind(job: Job) -> tuple[Any, ...]:
    return (job.height, job.width, job.negative_prompt is None, *astuple(job.settings))


def make_batches(jobs: Sequence[Job], batch_size: int) -> list[list[Job]]:
    """Batches of at most ``batch_size`` jobs that share size and settings."""
    batches: list[list[Job]] = []
    for job in ordered(jobs):
        if not batches or len(batches[-1]) == batch_size or _kind(batches[-1][0]) != _kind(job):
            batches.append([])
        batches[-1].append(job)
    return batches


@torch.no_grad()
def draw(models: Models, batch: Sequence[Job], on_step: Callable[[int, Tensor], None] | None = None) -> np.ndarray:
    """Draw one batch of ``make_batches``: uint8 [B, H, W, 3].

    Raises:
        UserError: when the model's numbers overflow, or the batch does not fit into memory.
    """
    first = batch[0]
    shape = (models.latent_channels, first.height // models.factor, first.width // models.factor)
    try:
        conditioning = encode_prompts(models, [job.prompt for job in batch])
        negatives = [job.negative_prompt for job in batch if job.negative_prompt is not None]
        latents = sample_latents(
            models.denoise,
            models.objective,
            conditioning,
            [job.seed for job in batch],
            shape,
            first.settings,
            models.device,
            models.dtype,
            negative=encode_prompts(models, negatives) if negatives else None,
            on_step=on_step,
        )
        if not torch.isfinite(latents).all():
            raise UserError(
                f"image {first.name} overflowed to NaN in {models.dtype}; try dtype=bfloat16 or dtype=float32."
            )
        return models.decode(latents).numpy()
    except torch.OutOfMemoryError:
        raise UserError(
            f"{len(batch)} images of {first.height}x{first.width} did not fit into the memory of {models.device}; "
            "lower batch_size= or the size."
        ) from None


def encode_prompts(models: Models, prompts: list[str]) -> Conditioning:
    """Conditioning of each prompt; equal prompts, such as several images of one, go through the LLM once."""
    rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
    conditioning = models.encode(list(rows))
    return conditioning if len(rows) == len(prompts) else conditioning.select([rows[prompt] for prompt in prompts])


def generate(models: Models, jobs: Sequence[Job], batch_size: int) -> Iterator[tuple[Job, np.ndarray]]:
    """Draw all jobs and yield each with its image, uint8 [H, W, 3], in the order of ``ordered``."""
    for batch in make_batches(jobs, batch_size):
        yield from zip(batch, draw(models, batch), strict=True)
