"""From prompts to pixels: the models that a checkpoint describes, jobs, batches of one size, text -> latents -> images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paradiffusion.checkpoints.layouts import Layout, check_complete, copy_tensors, load_adapter, objective_of, parse
from paradiffusion.checks import finite
from paradiffusion.config import CodecConfig, ConditioningConfig, LoraConfig, SampleConfig, SamplerConfig, TextEncoderConfig, check_bins
from paradiffusion.diffusion.objective import Objective
from paradiffusion.errors import UserError
from paradiffusion.machine import choose_device, exact_float32, settled_dtype
from paradiffusion.models.codec import Codec, load_codec
from paradiffusion.models.joint import JointModel
from paradiffusion.models.unet import DENOISERS, class_of, drawn_multiple, read_width
from paradiffusion.sampling.prompts import MAX_SEED, PromptRequest
from paradiffusion.sampling.sampler import against, check_distilled, sample_latents
from paradiffusion.text.conditioning import Conditioning, pad_length
from paradiffusion.text.encoder import DTYPES, TextEncoder, load_text_encoder
from paradiffusion.text.families import lacks
from paradiffusion.text.refiner import Refiner

# Features of a prompt take 2 MB at the paper's size in half precision.
KEPT_PROMPTS = 64


@dataclass
class InferenceModels:
    """Everything that a prompt passes on its way to an image, loaded from a checkpoint or lent by the training loop.

    What a prompt is encoded to depends on the prompt and the weights alone, so it is kept: of the null prompt as long as
    this object lives, of the latest ``KEPT_PROMPTS`` others until newer ones come. Weights that change need a new object.

    Attributes:
        sampler, resolution: the checkpoint's default settings, height and width.
        checkpoint, step, provenance: what the images are recorded as made by.
        offload: keep the text encoder on the CPU but while prompts are encoded.
        estimated: the features that the layout head read last, the size that it was asked for, and its estimate.
    """

    joint: JointModel
    text_encoder: TextEncoder
    codec: Codec
    objective: Objective
    sampler: SamplerConfig
    resolution: int
    device: torch.device
    dtype: torch.dtype
    checkpoint: str
    step: int
    provenance: dict[str, Any]
    offload: bool = False
    kept: dict[str, Tensor] = field(default_factory=dict)
    estimated: tuple[Tensor, torch.Size, Tensor | None] | None = None

    @property
    def latent_channels(self) -> int:
        return self.codec.config.latent_channels

    @property
    def factor(self) -> int:
        """Pixels per latent."""
        return self.codec.config.factor

    @property
    def multiple(self) -> int:
        """An image's sides must be multiples of this many pixels."""
        return self.factor * drawn_multiple(self.joint.unet)

    def count_truncated(self, prompts: list[str]) -> int:
        """How many prompts lose text at the encoder's maximum."""
        return self.text_encoder.tokenize(prompts).truncated

    @torch.no_grad()
    def encode(self, prompts: list[str], score_bins: Mapping[str, int] | None = None) -> Conditioning:
        """Refined features of prompts and of the null prompt (the encoded empty string), which is told no scores. The prompts are told
        those of ``score_bins`` and the highest of others; None: as the null prompt. Raises UserError for bins that there are not."""
        scores = self.text_encoder.settings.scores
        check_bins("score_bins", dict(score_bins or {}), scores)
        asked = [] if score_bins is None else [score_bins.get(name, highest) for name, highest in scores.items()]
        self.encode_ahead(prompts)
        return Conditioning(*self._batch(prompts, asked), *self._batch([""]))

    @torch.no_grad()
    def encode_ahead(self, prompts: list[str]) -> None:
        """Encode the prompts that are not kept yet, and keep them; many at once where the text encoder is offloaded."""
        wanted = dict.fromkeys(prompt for prompt in prompts if prompt)
        for prompt in wanted:
            if prompt in self.kept:
                self.kept[prompt] = self.kept.pop(prompt)  # to the end: the first are the next to go
        missing = [prompt for prompt in ("", *wanted) if prompt not in self.kept]
        if not missing:
            return
        if self.offload:
            self.text_encoder.to(self.device)
        # One prompt at a time: a language model in bfloat16 rounds differently in another batch, and an image must not
        # depend on its neighbours. The denoiser, which takes nearly all of the time, works in batches.
        for prompt in missing:
            self.kept[prompt] = self._one(prompt)
            finite(self.kept[prompt], f"the features of {prompt[:40]!r}", "text_encoder.dtype")
        newest = max(KEPT_PROMPTS, len(wanted))
        for prompt in [prompt for prompt in self.kept if prompt][:-newest]:
            del self.kept[prompt]
        if self.offload:
            self.text_encoder.to("cpu")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _one(self, prompt: str) -> Tensor:
        """Refined features of a prompt, [1, L, D]; L is its own length where padding is masked."""
        tokens = self.text_encoder.tokenize([prompt]).to(self.device)
        masked, prefix = self.text_encoder.settings.mask_padding, tokens.prefix
        length = int(tokens.mask.sum()) if masked else None
        ids, mask = tokens.ids[:, :length], tokens.mask[:, :length]
        features = self.text_encoder(ids, mask, prefix).to(self.dtype)
        return self.joint.refine(features, mask[:, prefix:] if masked else None)

    def _batch(self, prompts: list[str], bins: Sequence[int] = ()) -> tuple[Tensor, Tensor | None]:
        """Kept features of several prompts, padded to the length that they have as a batch, with their mask; behind tokens of their
        scores' ``bins``, where the model has scores (none: unknown)."""
        tokens = self.text_encoder.tokenize(prompts).to(self.device)
        width = tokens.ids.shape[1] - tokens.prefix
        rows = [pad_length(self.kept[prompt], width) for prompt in prompts]
        told = torch.tensor(bins, device=self.device) if bins else None
        return self.joint.with_scores(torch.cat(rows), self.text_encoder.feature_mask(tokens), told)

    @torch.no_grad()
    def denoise(self, latents: Tensor, times: Tensor, features: Tensor, mask: Tensor | None, scales: Tensor | None = None) -> Tensor:
        """The denoiser's prediction, [B, C, h, w]."""
        size = latents.shape[-2:]
        # The estimate is made once for all steps.
        if self.estimated is None or self.estimated[0] is not features or self.estimated[1] != size:
            self.estimated = features, size, self.joint.estimate(features, mask, *size)
        return self.joint.denoise(latents, times, features, mask, self.estimated[2], scales)

    def decode(self, latents: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] on the CPU."""
        images = self.codec.decode(latents.to(self.device))
        return ((images + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).to("cpu", torch.uint8)


def load_models(checkpoint: Layout, config: SampleConfig | None = None, device: str | None = None) -> InferenceModels:
    """Build everything that a checkpoint describes, ready to sample, on ``device`` where ``config`` names none (see
    ``choose_device``). Raises UserError when a part is missing, damaged, or not the one that the checkpoint was trained with."""
    config = config or SampleConfig()
    checkpoint.place(config.text_encoder.path, config.codec.path)
    description = checkpoint.description
    encoder_config = parse(TextEncoderConfig, description["text_encoder"])
    codec_config = parse(CodecConfig, description["codec"])
    encoder_config.dtype = config.text_encoder.dtype or encoder_config.dtype
    codec_config.dtype = config.codec.dtype or codec_config.dtype
    if lacks(encoder_config.quantization) is not None:
        encoder_config.quantization = None  # trained with fewer bits, but whole weights draw as well
    target = choose_device(config.device or device)
    dtype = DTYPES[settled_dtype(config.dtype, target)]
    if dtype == torch.float32:
        exact_float32()

    codec = load_codec(codec_config, description["codec"]["hash"])
    conditioning = parse(ConditioningConfig, description["conditioning"])
    encoder = load_text_encoder(encoder_config, conditioning, description["text_encoder"]["hash"])
    state, lora = checkpoint.weights(), description["lora"]
    if lora is not None:
        load_adapter(encoder, state, parse(LoraConfig, lora), lora.get("settings"))
    joint = load_joint(checkpoint, state, encoder.width).to(target, dtype)
    unet = joint.unet
    encoder.to("cpu" if config.offload_text_encoder else target)
    codec.to(target)
    if config.channels_last or (config.compile and target.type == "cuda"):
        unet.to(memory_format=torch.channels_last)
    if config.compile:
        compile_denoiser(unet, target)
    if config.vae_tiling:
        codec.vae.enable_tiling()
    return InferenceModels(
        joint, encoder, codec, joint.objective, parse(SamplerConfig, description["sampler"]), description["resolution"],
        target, dtype, checkpoint.name, description["step"], description["provenance"], config.offload_text_encoder,
    )  # fmt: skip


def load_joint(checkpoint: Layout, state: dict[str, Tensor], encoder_width: int) -> JointModel:
    """The joint module that a checkpoint describes with its weights, ``state``, frozen, on the CPU. Raises UserError where a part is
    missing, or the text encoder in use gives features of another width."""
    description = checkpoint.description
    conditioning = parse(ConditioningConfig, description["conditioning"])
    unet: Any = DENOISERS[class_of(checkpoint.unet_config)].made.from_config(checkpoint.unet_config)
    refiner = None if checkpoint.refiner_config is None else Refiner(**checkpoint.refiner_config)
    positions = conditioning.key_positions
    joint = JointModel(unet, refiner, objective_of(description), description["coordinates"], key_positions=positions)
    takes = read_width(checkpoint.unet_config)
    if (width := conditioning.refiner_width if refiner else encoder_width) != takes:
        raise UserError(
            f"the U-Net of {checkpoint.folder} reads features of width {takes}, and the text encoder in use gives {width}; set "
            "text_encoder.path=<folder> to the language model that it was trained with."
        )
    check_complete(set(joint.state_dict()), state)
    copy_tensors(joint, {name: tensor for name, tensor in state.items() if not name.startswith("text_encoder.")})
    return joint.requires_grad_(False).eval()


def compile_denoiser(unet: Any, device: torch.device) -> None:
    """Compile it at its first call, once for each shape: steps with and without guidance would otherwise share one program for any. CUDA
    graphs replay it without the processor, which at batch 1 is what a step waits for."""
    unet.compile(dynamic=False, mode="reduce-overhead" if device.type == "cuda" else None)


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

    @property
    def kind(self) -> tuple[Any, ...]:
        """Jobs of one kind can be drawn in one batch."""
        return (self.height, self.width, self.negative_prompt is None, repr(self.settings))


def sampler_settings(config: SampleConfig, defaults: SamplerConfig, request: PromptRequest | None = None) -> SamplerConfig:
    """Settings of one prompt: its line's value, else the command line's, else the checkpoint's. Raises UserError for a value
    out of range."""
    keys = [one.name for one in fields(SamplerConfig)]
    chosen = {key: value for key in keys if (value := getattr(config, key)) is not None}
    if request is not None:
        chosen |= {key: value for key in ("steps", "guidance") if (value := getattr(request, key)) is not None}
    settings = replace(defaults, **chosen)
    settings.check()
    return settings


def make_jobs(requests: Sequence[PromptRequest], config: SampleConfig, models: InferenceModels) -> list[Job]:
    """One job for each image, in the order of the prompts; image j of a prompt has the prompt's seed + j. Raises UserError for
    a size, solver or number of steps that the models cannot take; it names the prompt's line."""
    jobs = []
    objective = models.objective
    for request in requests:
        settings = sampler_settings(config, models.sampler, request)
        if settings.steps > objective.config.train_timesteps:
            raise UserError(
                f"{request.source}: steps={settings.steps} is more than the {objective.config.train_timesteps} steps of the "
                "noise schedule; expected fewer, such as steps=50."
            )
        height, width = (_side(key, request, config, models) for key in ("height", "width"))
        seed = config.seed if request.seed is None else request.seed
        if not 0 <= seed <= MAX_SEED - config.images_per_prompt:
            raise UserError(f"{request.source}: seed={seed} is out of range; expected 0 to {MAX_SEED} minus the images.")
        check_distilled(objective, settings, models.sampler, bool(negative_of(request, config)))
        negative = negative_of(request, config) if is_guided(settings.guidance, objective) else None
        for image in range(config.images_per_prompt):
            name = f"{request.index:05d}" + (f"_{image}" if image else "")
            jobs.append(Job(name, request.prompt, seed + image, height, width, settings, negative))
    for solver in {job.settings.solver for job in jobs}:
        objective.scheduler(solver)  # refuses one that the objective does not have
    return jobs


def negative_of(request: PromptRequest, config: SampleConfig) -> str | None:
    """The request's negative prompt; an empty one is the null prompt, so a line can switch the command line's off."""
    return (config.negative_prompt if request.negative_prompt is None else request.negative_prompt) or None


def is_guided(guidance: float, objective: Objective) -> bool:
    """Whether the null prompt, or the negative one in its place, has a part in the pictures."""
    return guidance != 1.0 and guidance >= objective.guided_from


def _side(key: str, request: PromptRequest, config: SampleConfig, models: InferenceModels) -> int:
    """Height or width of a request in pixels."""
    value, source = getattr(request, key), request.source
    if value is None:
        value, source = getattr(config, key), "the command line"
    return models.resolution if value is None else checked_side(key, value, models.multiple, f" ({source})")


def checked_side(key: str, value: int, multiple: int, source: str = "") -> int:
    """``value``, a height or width in pixels. Raises UserError where it is no multiple of ``multiple``."""
    if value < 1 or value % multiple:
        below = value // multiple * multiple
        nearest = [str(size) for size in (below, below + multiple) if size > 0]
        raise UserError(
            f"{key}={value}{source} cannot be drawn by this model; expected a multiple of {multiple}, the nearest being "
            f"{' and '.join(nearest)}."
        )
    return int(value)


def ordered(jobs: Sequence[Job]) -> list[Job]:
    """Jobs of equal size and settings side by side, kinds in order of first appearance, and in order within a kind."""
    places = {kind: place for place, kind in enumerate(dict.fromkeys(job.kind for job in jobs))}
    return sorted(jobs, key=lambda job: places[job.kind])


def make_batches(jobs: Sequence[Job], batch_size: int) -> list[list[Job]]:
    """Batches of at most ``batch_size`` jobs that share size and settings."""
    groups = [list(group) for _, group in groupby(ordered(jobs), key=lambda job: job.kind)]
    return [group[start : start + batch_size] for group in groups for start in range(0, len(group), batch_size)]


@torch.no_grad()
def draw(models: InferenceModels, batch: Sequence[Job], on_step: Callable[[int, Tensor], None] | None = None) -> np.ndarray:
    """Draw one batch of ``make_batches``: uint8 [B, H, W, 3]. Raises UserError when the model's numbers overflow, or the batch
    does not fit into memory."""
    first = batch[0]
    size = first.height // models.factor, first.width // models.factor
    prompts, seeds = [job.prompt for job in batch], [job.seed for job in batch]
    negatives = [job.negative_prompt for job in batch if job.negative_prompt is not None]
    try:
        latents = sample_latents(
            models.denoise, models.objective, encode_prompts(models, prompts, negatives, first.settings.score_bins), seeds,
            (models.latent_channels, *size), first.settings, models.device, models.dtype, on_step,
        )  # fmt: skip
        finite(latents, f"the latents of image {first.name}, which the denoiser draws,", "dtype")
        return models.decode(latents).numpy()
    except torch.OutOfMemoryError:
        raise UserError(
            f"{len(batch)} images of {first.height}x{first.width} did not fit into the memory of {models.device}; "
            "lower batch_size= or the size."
        ) from None


def encode_prompts(
    models: InferenceModels, prompts: list[str], negatives: Sequence[str] = (), score_bins: Mapping[str, int] | None = None
) -> Conditioning:
    """Conditioning of each prompt (see ``encode``), against as many negative ones or none; equal prompts, such as several images of one,
    go through the LLM once."""
    if negatives:
        return against(encode_prompts(models, prompts, (), score_bins), encode_prompts(models, list(negatives)))
    rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
    conditioning = models.encode(list(rows), score_bins)
    return conditioning if len(rows) == len(prompts) else conditioning.select([rows[prompt] for prompt in prompts])


def generate(
    models: InferenceModels, jobs: Sequence[Job], batch_size: int, on_step: Callable[[int, Tensor], None] | None = None
) -> Iterator[tuple[Job, np.ndarray]]:
    """Draw all jobs and yield each with its image, uint8 [H, W, 3], in the order of ``ordered``."""
    for batch in make_batches(jobs, batch_size):
        yield from zip(batch, draw(models, batch, on_step), strict=True)
