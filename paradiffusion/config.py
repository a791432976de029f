"""The schema: what can be configured, and what goes together.

Every other room takes its part of these dataclasses as an argument; ``compose.py`` fills them from ``configs/`` and the
command line. A check here runs before any model is loaded. What a checkpoint records lies in ``model_config.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from paradiffusion.checks import choice, fraction, positive
from paradiffusion.data_config import WORLDS, SourceConfig, check_captions
from paradiffusion.errors import UserError
from paradiffusion.model_config import (
    PREDICTIONS,
    SOLVERS,
    CodecConfig,
    ConditioningConfig,
    LoraConfig,
    ObjectiveConfig,
    SamplerConfig,
    TextEncoderConfig,
    UNetConfig,
)

__all__ = [
    "PREDICTIONS",
    "SOLVERS",
    "CodecConfig",
    "ConditioningConfig",
    "DataConfig",
    "FrozenConfig",
    "LoraConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "SampleConfig",
    "SamplerConfig",
    "SourceConfig",
    "TextEncoderConfig",
    "TrackerConfig",
    "TrainConfig",
    "UNetConfig",
    "ValidationConfig",
]

DTYPES = ("float32", "bfloat16", "float16")
TRAIN_TEXT = ("frozen", "lora", "adapter")
PRECISIONS = ("fp32", "bf16", "auto")  # fp16 would need its loss scale in every checkpoint


@dataclass
class DataConfig:
    """Shards, buckets and captions.

    Attributes:
        shards, val_shards: a folder, a glob, a brace range, or a list of them.
        folder: in place of ``shards``, a folder of images with .txt or .json beside them.
        sources: several sets with weights, in place of ``shards``.
        demo: make the built-in scenes at ``demo_folder`` when they are missing.
        world: "small": up to four objects at 64 pixels; "large": up to nine at 96, in a folder and sizes of its own.
        demo_set: which of its sets a stage trains on: "web", "big" or "small".
        demo_sizes: how many scenes of each set.
        resolution: images have about resolution squared pixels, in buckets of several aspect ratios.
        lower_resolutions: further ones, for images that ``resolution`` would enlarge: each goes to the largest that has no more
            pixels than it (multi-scale training).
        bucket_multiple: sides are multiples of this many pixels (codec factor times the U-Net's own downsampling).
        captions: weight of each kind of caption; a sample without the drawn kind falls back to another of its kinds.
            Empty here, since a default would be merged with what a stage sets.
        caption_dropout: share of captions replaced by the null prompt, for classifier-free guidance.
        window_shards: shards that are shuffled together.
        workers: processes that read for each training process; None: its share of the cores, at most 8.
        retries: further tries, with growing pauses, after an error of a remote store that may pass.
        cache_dir, cache_gb: keep whole remote shards in this local folder, up to so many GB; None: read single samples.
        index_dir: where scripts/index_shards.py has put indexes that do not lie beside their shards (its ``output=``).
        streaming: read remote shards without an index, in an order that cannot be resumed exactly.
        max_bad_fraction: stop when more than this share of the samples could not be read, beyond what chance explains.
        allow_truncated: use the whole samples of a shard that is cut in the middle.
        cache: a folder of latents and text features made beforehand by scripts/cache.py, which must fit; None for none.
    """

    shards: Any = None
    folder: str | None = None
    sources: list[SourceConfig] = field(default_factory=list)
    val_shards: Any = None
    demo: bool = False
    world: str = "small"
    demo_folder: str = "data/demo"
    demo_set: str = "web"
    demo_sizes: dict[str, int] = field(default_factory=dict)
    resolution: int = 64
    lower_resolutions: list[int] = field(default_factory=list)
    bucket_multiple: int = 16
    max_aspect: float = 2.0
    captions: dict[str, float] = field(default_factory=dict)
    caption_dropout: float = 0.1
    window_shards: int = 16
    workers: int | None = None
    retries: int = 5
    cache_dir: str | None = None
    cache_gb: float = 100.0
    index_dir: str | None = None
    streaming: bool = False
    max_bad_fraction: float = 0.01
    allow_truncated: bool = False
    cache: str | None = None

    def check(self) -> None:
        choice("data.world", self.world, WORLDS)
        positive("data.resolution", self.resolution)
        levels = sorted([*self.lower_resolutions, self.resolution])
        if levels[-1] != self.resolution or any(low < 1 or high < 1.25 * low for low, high in pairwise(levels)):
            raise UserError(
                f"data.lower_resolutions={list(self.lower_resolutions)} does not go with data.resolution={self.resolution}; "
                "expected lower ones, each at most 0.8 of the next higher, such as [256] below 512."
            )
        if self.workers is not None:
            positive("data.workers", self.workers, zero=True)
        positive("data.retries", self.retries, zero=True)
        positive("data.cache_gb", self.cache_gb)
        if self.streaming and (self.sources or self.folder):
            raise UserError("data.streaming=true reads data.shards alone; leave out data.sources and data.folder.")
        positive("data.window_shards", self.window_shards)
        fraction("data.caption_dropout", self.caption_dropout)
        fraction("data.max_bad_fraction", self.max_bad_fraction)
        if self.max_aspect < 1:
            raise UserError(f"data.max_aspect={self.max_aspect} is out of range; expected 1 or more.")
        check_captions("data.captions", self.captions)
        for number, source in enumerate(self.sources):
            source.check(f"data.sources[{number}]")
        titles = [source.title for source in self.sources]
        if twice := next((title for title in titles if titles.count(title) > 1), None):
            raise UserError(f"data.sources has two sources called {twice}; give each a name of its own (name: ...).")


@dataclass
class OptimizerConfig:
    """One learning rate per part, linear warm-up, and a schedule that is a function of the step.

    Attributes:
        name: "adamw", "adamw8bit" (bitsandbytes' block-wise 8-bit state, GPU only), or "muon": Muon for matrices, AdamW for
            everything else (see training/optim.py).
        fused: one kernel for all parameters; four times as fast on a processor, too.
        lr, lr_conditioning, lr_lora: of the U-Net, of refiner and linear projection, of the adapter.
        schedule: after the warm-up "constant", "cosine", "linear", or "trapezoid": constant, then linear over the last
            ``decay`` of all steps; down to ``final_lr`` times the rate.
        momentum: Muon's.
    """

    name: str = "adamw"
    fused: bool = True
    lr: float = 1e-4
    lr_conditioning: float = 1e-4
    lr_lora: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup_steps: int = 0
    schedule: str = "constant"
    final_lr: float = 0.0
    decay: float = 0.4
    momentum: float = 0.95
    max_grad_norm: float = 1.0

    def check(self) -> None:
        choice("optimizer.name", self.name, ("adamw", "adamw8bit", "muon"))
        choice("optimizer.schedule", self.schedule, ("constant", "cosine", "linear", "trapezoid"))
        for key in ("lr", "lr_conditioning", "lr_lora", "max_grad_norm"):
            positive(f"optimizer.{key}", getattr(self, key))
        for key in ("warmup_steps", "weight_decay", "eps"):
            positive(f"optimizer.{key}", getattr(self, key), zero=True)
        for key in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, key) < 1:
                raise UserError(
                    f"optimizer.{key}={getattr(self, key)} is out of range; expected at least 0 and below 1."
                )
        fraction("optimizer.final_lr", self.final_lr)
        fraction("optimizer.decay", self.decay)


@dataclass
class ValidationConfig:
    """What is measured while training.

    Attributes:
        samples: held-out samples whose loss is taken at fixed noise, once with short and once with long captions.
        images: pictures drawn for the grid at fixed prompts and seeds; 0 for none.
        scenes: held-out scenes drawn and scored for alignment at the stage's end, where the shards carry ground truth.
        paragraph: the kind of caption that pictures are drawn from; the longest one where a sample has none of it.
        unseen: of these samples, how many are drawn and scored once more, from their captions of the kind "unseen", whose
            wording no training caption has.
        batch_size: images per process at once.
    """

    samples: int = 64
    images: int = 8
    scenes: int = 0
    paragraph: str = "clean"
    unseen: int = 0
    batch_size: int = 32

    def check(self) -> None:
        for key in ("samples", "images", "scenes", "unseen"):
            positive(f"validation.{key}", getattr(self, key), zero=True)
        positive("validation.batch_size", self.batch_size)


@dataclass
class TrackerConfig:
    """Where metrics go besides log.jsonl: "jsonl" (nowhere else), "wandb" or "tensorboard"."""

    name: str = "jsonl"
    project: str = "paradiffusion"
    run_name: str | None = None
    mode: str | None = None

    def check(self) -> None:
        choice("tracker.name", self.name, ("jsonl", "wandb", "tensorboard"))


@dataclass
class TrainConfig:
    """One stage of training. Stages differ in values only: there is one training loop.

    Attributes:
        recipe: a set of values for one kind of machine (configs/recipe), merged after preset and stage.
        batch_size, micro_batch_size: samples of one optimiser step over all processes, and of one process at once;
            accumulation is their whole-number ratio over the processes.
        repeats: noise levels at which each sample of a batch is seen; its text is read, and its image encoded, once for all.
        precision: "fp32", "bf16", or "auto": bf16 on GPUs and on processors with instructions for it, else fp32.
        keep_gb: keep text features and latents of the frozen models in memory, made once, while each process has so many GB of
            them; 0 to make them in every epoch.
        ema_device: "cpu" keeps the average off the GPU; None keeps it beside the weights.
        compile, channels_last: torch.compile of the U-Net, and its memory layout; neither changes what is computed.
        preflight: one step of the largest bucket with the longest captions, validation and a save, reported and undone.
        log_samples: write each step's sample keys and digests to ``samples_seen/`` in the stage folder, by which
            scripts/replay.py shows that it has the same bytes.
        stall_seconds: after so long without a step a process is named with its rank, phase and samples.
    """

    preset: str = "nano"
    stage: int = 1
    recipe: str = "none"
    run_dir: str = "runs/nano"
    init_from: str | None = None
    resume: bool = True
    seed: int = 0

    train_text: str = "frozen"
    max_steps: int = 1000
    batch_size: int = 32
    micro_batch_size: int | None = None
    repeats: int = 1
    keep_gb: float = 0.0
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    threads: int | None = None
    log_every: int = 10
    validate_every: int = 500
    checkpoint_every: int = 500
    keep_last: int = 2
    keep_every: int | None = None
    ema_decay: float = 0.9999
    ema_device: str | None = None
    compile: bool = False
    channels_last: bool = False
    preflight: bool = False
    log_samples: bool = False
    stall_seconds: float = 600.0
    on_spike: str = "stop"
    spike_factor: float = 10.0

    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    conditioning: ConditioningConfig = field(default_factory=ConditioningConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)

    def check(self) -> None:
        """Raise UserError for values out of range and for combinations that cannot work."""
        choice("train_text", self.train_text, TRAIN_TEXT)
        choice("precision", self.precision, PRECISIONS)
        choice("on_spike", self.on_spike, ("stop", "skip", "rollback"))
        for key in ("max_steps", "batch_size", "log_every", "validate_every", "checkpoint_every", "keep_last"):
            positive(key, getattr(self, key))
        if not self.spike_factor > 1:
            raise UserError(f"spike_factor={self.spike_factor} is out of range; expected a number above 1.")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay={self.ema_decay} is out of range; expected at least 0 and below 1.")
        for key in ("micro_batch_size", "threads", "keep_every"):
            if getattr(self, key) is not None:
                positive(key, getattr(self, key))
        if self.ema_device is not None:
            choice("ema_device", self.ema_device, ("cpu",))
        positive("stall_seconds", self.stall_seconds)
        positive("repeats", self.repeats)
        positive("keep_gb", self.keep_gb, zero=True)
        for part in (
            self.text_encoder, self.conditioning, self.lora, self.unet, self.codec, self.objective, self.data, self.optimizer,
            self.sampler, self.validation, self.tracker,
        ):  # fmt: skip
            part.check()
        if self.data.bucket_multiple % self.codec.factor:
            raise UserError(
                f"data.bucket_multiple={self.data.bucket_multiple} must be a multiple of codec.factor={self.codec.factor}."
            )


@dataclass
class FrozenConfig:
    """Where a frozen model lies on this machine, and in which dtype it runs; None: as the checkpoint says."""

    path: str | None = None
    dtype: str | None = None

    def check(self, key: str) -> None:
        if self.dtype is not None:
            choice(f"{key}.dtype", self.dtype, DTYPES)


@dataclass
class SampleConfig:
    """What ``sample.py`` takes; None means the checkpoint's own default, or the prompt line's own value.

    Attributes:
        unet: which U-Net of a folder in the official layout, such as "unet_384".
        sampler: a set of the sampler's values from configs/sampler, such as "fast"; single keys win over it.
        dtype: of the denoiser; the language model and the autoencoder keep their own.
        compile, channels_last: torch.compile of the denoiser, and its memory layout; images change by rounding only.
        offload_text_encoder: encode prompts in chunks, and keep the language model off the GPU while images are drawn.
        vae_tiling: decode large images in overlapping tiles, in less memory.
    """

    ckpt: str | None = None
    unet: str = "unet"
    prompt: str | None = None
    prompt_file: str | None = None
    output_dir: str | None = None
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    images_per_prompt: int = 1
    batch_size: int = 8
    negative_prompt: str | None = None
    sampler: str | None = None
    solver: str | None = None
    guidance_rescale: float | None = None
    guidance_start: float | None = None
    guidance_stop: float | None = None
    device: str | None = None
    dtype: str = "float32"
    threads: int | None = None
    compile: bool = False
    channels_last: bool = False
    offload_text_encoder: bool = False
    vae_tiling: bool = False
    text_encoder: FrozenConfig = field(default_factory=FrozenConfig)
    codec: FrozenConfig = field(default_factory=FrozenConfig)

    def check(self) -> None:
        """Raise UserError for missing, contradictory or impossible values."""
        if not self.ckpt:
            raise UserError(
                "ckpt= is missing; name a run, a stage or a checkpoint, such as ckpt=data/nano or ckpt=runs/nano/stage3."
            )
        if (self.prompt is None) == (self.prompt_file is None):
            found = "neither" if self.prompt is None else "both"
            raise UserError(
                f"expected one of prompt= and prompt_file=, found {found}; prompt_file=prompts.txt is the main way."
            )
        choice("dtype", self.dtype, DTYPES)
        self.text_encoder.check("text_encoder")
        self.codec.check("codec")
        for key in ("images_per_prompt", "batch_size"):
            positive(key, getattr(self, key))
        for key in ("steps", "height", "width", "threads"):
            if getattr(self, key) is not None:
                positive(key, getattr(self, key))
