"""Memory of one GPU for each way to launch a stage, and which key to change where it does not fit.

Exact: weights, gradients, optimiser, EMA. Estimated: activations, communication buffers, the device's own context.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from paradiffusion.budget.activations import peak_bytes
from paradiffusion.budget.empty import EmptyModels, empty_models
from paradiffusion.compose import compose_train
from paradiffusion.config import OPTIMIZERS, TrainConfig
from paradiffusion.data.images import make_buckets
from paradiffusion.models.unet import PROJECTIONS, halve_frozen
from paradiffusion.text.encoder import DTYPES, is_adapter, leave_casts_to_autocast
from paradiffusion.training.engine import at_once, deepspeed_needs

GIB = 2**30
# CUDA context, cuBLAS and cuDNN workspaces, and what the allocator cannot use: our estimate.
CONTEXT = int(1.0 * GIB)
# NF4 with double quantisation: half a byte, an 8-bit scale for 64 weights, and an fp32 scale for 256 of those.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# DeepSpeed's defaults, in elements: reduce_bucket_size, and stage3_max_live_parameters.
REDUCE_BUCKET, MAX_LIVE = 5 * 10**8, 10**9
# Below this a change is not worth a line: the estimate is not that good.
SMALLEST_SAVING = 64 * 2**20


@dataclass(frozen=True)
class Launch:
    """A launch configuration: DeepSpeed's ``zero`` cuts the optimiser's state, a second copy of the weights, gradients and
    EMA over the GPUs (from 2 on), and weights, the frozen ones too, as well (3). ``offload``: to main memory, but gradients."""

    name: str
    title: str
    zero: int = 0
    offload: bool = False


LAUNCHES = (
    Launch("one_gpu", "one GPU"),
    Launch("ddp", "DDP"),  # gradients are views into its buckets
    Launch("zero2", "ZeRO-2", 2),
    Launch("zero2_offload", "ZeRO-2 + offload", 2, offload=True),
    Launch("zero3", "ZeRO-3", 3),
)


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters.

    Attributes:
        unet: without projection and adapter; projection: its ``encoder_hid_proj``; unet_lora: its adapter.
        refiner: without its layout head ``layout``.
        text: the language model without its adapter ``lora``; quantised: those of its weights that NF4 is for.
        trained: of all parts together; matrices: those of them that autocast copies.
        frozen: bytes of the U-Net's and the refiner's frozen weights in training.
    """

    unet: int
    projection: int
    unet_lora: int
    refiner: int
    layout: int
    text: int
    lora: int
    vae: int
    trained: int
    frozen: int
    matrices: int
    quantised: int

    @property
    def denoising(self) -> int:
        """Of the joint module without the text encoder."""
        return self.unet + self.projection + self.unet_lora + self.refiner + self.layout

    @property
    def total(self) -> int:
        return self.denoising + self.text + self.lora + self.vae


@dataclass(frozen=True)
class GpuMemory:
    """Bytes on one GPU, and in main memory per process."""

    launch: str
    gpus: int
    weights: float
    copies: float
    frozen: float
    gradients: float
    optimizer: float
    ema: float
    activations: float
    buffers: float
    context: float
    host: float

    @property
    def total(self) -> float:
        """On the GPU."""
        return sum(getattr(self, f.name) for f in fields(self) if f.name not in ("launch", "gpus", "host"))


def as_trained(models: EmptyModels) -> EmptyModels:
    """``models`` in the dtypes that they are trained with, which fit under autocast alone."""
    if models.config.precision != "fp32":
        halve_frozen(models.joint.unet)
        leave_casts_to_autocast(models.joint)
    return models


def count_parameters(models: EmptyModels) -> Counts:
    """Parameters of every part of a stage."""
    joint, inner = models.joint, models.text.inner
    trained = joint.trained()
    unet = {name: p.numel() for name, p in joint.unet.named_parameters()}
    text = {name: p.numel() for name, p in inner.named_parameters()}
    unet_lora = sum(size for name, size in unet.items() if is_adapter(name))
    projection = sum(size for name, size in unet.items() if f"unet.{name}".startswith(PROJECTIONS))
    lora = sum(size for name, size in text.items() if is_adapter(name))
    head = 0 if joint.refiner is None else _numel(joint.refiner.layout)
    # bitsandbytes stores the weights of frozen linear layers in 4 bits; embeddings and norms stay.
    linear = (m for name, m in inner.named_modules() if isinstance(m, nn.Linear) and not is_adapter(name))
    return Counts(
        unet=sum(unet.values()) - unet_lora - projection,
        projection=projection,
        unet_lora=unet_lora,
        refiner=_numel(joint.refiner) - head,
        layout=head,
        text=sum(text.values()) - lora,
        lora=lora,
        vae=_numel(models.codec),
        trained=sum(p.numel() for p in trained.values()),
        frozen=sum(p.nbytes for n, p in joint.named_parameters() if not (p.requires_grad or n.startswith("text_encoder."))),
        # Autocast copies what enters a matrix product or convolution; norms stay in fp32.
        matrices=sum(p.numel() for p in trained.values() if p.dtype == torch.float32 and p.ndim > 1),
        quantised=sum(module.weight.numel() for module in linear),
    )


def _numel(module: nn.Module | None) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters())


# Peak bytes of a micro-batch beyond weights and gradients, in the three things that a step does in turn; what must fit is
# the bucket with most pixels and the longest captions.


def largest_models(config: TrainConfig) -> EmptyModels:
    """The stage's models, of images of the bucket with most pixels."""
    data = config.data
    buckets = make_buckets(data.resolution, data.bucket_multiple, data.max_aspect)
    return empty_models(config, *max(buckets, key=lambda bucket: bucket[0] * bucket[1]))


def measure_encoding(config: TrainConfig, micro_batch: int) -> int:
    """Peak bytes of making latents of one micro-batch."""
    models = largest_models(config)
    with torch.no_grad():
        return peak_bytes(lambda: models.encode_images(micro_batch), [models.codec])


def measure_reading(config: TrainConfig, micro_batch: int) -> int:
    """Peak bytes of the language model alone; 0 where it is trained with the rest."""
    models = empty_models(config)
    if models.joint.text_encoder is not None:
        return 0
    with torch.no_grad():
        return peak_bytes(lambda: models.read_text(micro_batch), [models.text])


def measure_training(config: TrainConfig, micro_batch: int) -> int:
    """Peak bytes of forward and backward of one micro-batch."""
    models = as_trained(largest_models(config))

    def train() -> Tensor:
        return models.joint(models.batch(micro_batch))[0]

    return peak_bytes(train, [models.joint], autocast=config.precision != "fp32")


def text_bytes(config: TrainConfig, counts: Counts) -> float:
    """Of the frozen language model, and of an adapter that is applied but not trained."""
    itemsize = DTYPES[config.text_encoder.dtype].itemsize
    adapter = 4 * counts.lora if config.train_text == "adapter" else 0
    if config.text_encoder.quantization != "4bit":
        return counts.text * itemsize + adapter
    return counts.quantised * NF4_BYTES + (counts.text - counts.quantised) * itemsize + adapter


def checkpoint_bytes(config: TrainConfig, counts: Counts) -> tuple[int, int]:
    """Bytes of a checkpoint on disk: what sampling needs (the EMA, in fp32), and with the state to resume from."""
    weights = 4 * (counts.denoising + counts.lora)
    return weights, weights + (4 + OPTIMIZERS[config.optimizer.name].state) * counts.trained


@dataclass(frozen=True)
class Change:
    """One override, what it saves by itself, and what is then needed; bytes."""

    override: str
    saves: float
    total: float
    fits: bool


@dataclass(frozen=True)
class Advice:
    """For a launch that does not fit: single changes, the most saving first, and the fewest of them that fit ``together`` (none where one
    suffices, or where not even all of them do), with the ``total`` of those, or of all."""

    launch: str
    needed: float
    available: float
    changes: list[Change]
    together: list[str]
    total: float
    fits: bool


class Fitter:
    """Memory of a stage and of its variants, by overrides of train.py; each is measured once."""

    def __init__(self, arguments: list[str], gpus: int) -> None:
        self.arguments, self.gpus = arguments, gpus
        self._known: dict[object, Any] = {}

    def _once(self, key: object, make: Callable[..., Any], *arguments: object) -> Any:
        if key not in self._known:
            self._known[key] = make(*arguments)
        return self._known[key]

    def config(self, *overrides: str) -> TrainConfig:
        """The stage with overrides in the place of those of the same keys."""
        keys = {override.partition("=")[0] for override in overrides}
        kept = [a for a in self.arguments if a.partition("=")[0] not in keys]
        found: TrainConfig = self._once(overrides, compose_train, kept + list(overrides))
        return found

    def counts(self, config: TrainConfig) -> Counts:
        """Numbers of parameters."""
        parts = (config.text_encoder, config.conditioning, config.lora, config.unet, config.codec, config.train_text)
        found: Counts = self._once(repr((parts, config.precision)), lambda: count_parameters(as_trained(empty_models(config))))
        return found

    def gpus_of(self, launch: Launch) -> int:
        return 1 if launch.name == "one_gpu" else self.gpus

    def micro_batch(self, config: TrainConfig, launch: Launch) -> int:
        """Samples that one process takes at once."""
        return at_once(config, self.gpus_of(launch))

    def activations(self, config: TrainConfig, micro_batch: int, copies: float) -> float:
        """The highest of the three peaks, the last beside autocast's ``copies``, which are there in training only. Each is
        measured once for all configurations in which it is the same."""

        def peak(measure: Callable[[TrainConfig, int], int], *depends_on: object) -> float:
            return float(self._once((measure, micro_batch, repr(depends_on)), measure, config, micro_batch))

        # A 4-bit language model computes in its dtype: what it keeps for the way back is the same.
        text = (replace(config.text_encoder, quantization=None), config.conditioning, config.lora, config.train_text)
        sizes = (config.codec, config.data.resolution, config.data.bucket_multiple, config.data.max_aspect)
        rest = (config.unet, config.objective, config.precision, config.gradient_checkpointing)
        before = max(peak(measure_encoding, sizes), peak(measure_reading, text))
        return max(peak(measure_training, text, sizes, rest), before - copies)

    def memory(self, launch: Launch, *overrides: str) -> GpuMemory:
        """Bytes on each GPU of the stage with ``overrides``."""
        return self.memory_of(self.config(*overrides), launch)

    def memory_of(self, config: TrainConfig, launch: Launch) -> GpuMemory:
        """Bytes on each GPU of a stage."""
        counts, gpus = self.counts(config), self.gpus_of(launch)
        trained, moments = counts.trained, OPTIMIZERS[config.optimizer.name].state
        on_cpu = config.ema_device == "cpu"
        share = 1 / gpus if launch.zero else 1.0  # of state and gradients
        here = 0.0 if launch.offload else share
        whole = 1 / gpus if launch.zero == 3 else 1.0  # of weights
        masters = 4 * trained if launch.zero else 0
        ema = 4 * trained
        host = (masters + moments * trained + (0 if on_cpu else ema)) / gpus if launch.offload else 0.0

        text, inside = text_bytes(config, counts), config.train_text == "lora"
        frozen = counts.frozen * whole + text * (whole if inside else 1)
        if config.objective.distill_steps:  # the teacher
            frozen += 4 * (counts.denoising - counts.unet_lora)

        buffers = 0
        if launch.zero and gpus > 1:
            buffers = 4 * min(trained, REDUCE_BUCKET)
            buffers += 4 * min(trained + (counts.text if inside else 0), MAX_LIVE) if launch.zero == 3 else 0
        copies = 2.0 * counts.matrices if config.precision != "fp32" else 0.0
        return GpuMemory(
            launch=launch.name,
            gpus=gpus,
            weights=4 * trained * whole + masters * here,
            copies=copies,
            frozen=frozen + counts.vae * DTYPES[config.codec.dtype].itemsize,
            gradients=4 * trained * share,
            optimizer=moments * trained * here,
            ema=0.0 if on_cpu else ema * here,
            activations=self.activations(config, self.micro_batch(config, launch), copies),
            buffers=buffers,
            context=CONTEXT,
            host=host + (ema * share * (1 if launch.offload else 2) if on_cpu else 0.0),  # and pinned, on its way there
        )

    def launches(self) -> list[Launch]:
        """Those that train.py does not refuse."""
        refused = deepspeed_needs(self.config()) is not None
        return [launch for launch in LAUNCHES if not (launch.zero and refused)]

    def advise(self, available: float) -> list[Advice]:
        """One entry for each launch that needs more than ``available`` bytes."""
        needed = {launch: self.memory(launch).total for launch in self.launches()}
        return [self._advise(launch, total, available) for launch, total in needed.items() if total > available]

    def _advise(self, launch: Launch, needed: float, available: float) -> Advice:
        totals = {override: self.memory(launch, override).total for override in self.candidates(launch)}
        for other in self.launches():
            if other.offload and other != launch:
                totals[f"--config_file configs/launch/{other.name}.yaml"] = self.memory(other).total
        changes = [
            Change(override, needed - total, total, total <= available)
            for override, total in totals.items()
            if needed - total > SMALLEST_SAVING
        ]
        changes.sort(key=lambda change: -change.saves)
        together: list[str] = []
        total = needed
        # Another launch is a different table row, a recipe a set of these, and a lower resolution another training.
        apart = ("--config_file", "recipe=", "data.resolution=")
        for change in changes:
            if total > available and not change.override.startswith(apart):
                together.append(change.override)
                total = self.memory(launch, *together).total
        return Advice(launch.name, needed, available, changes, together, total, total <= available)

    def candidates(self, launch: Launch) -> list[str]:
        """Overrides that may save memory in this stage."""
        config = self.config()
        deepspeed = launch.zero > 0
        multiple = config.data.bucket_multiple
        lower = config.data.resolution // 2 // multiple * multiple
        possible = {
            "micro_batch_size=1": self.micro_batch(config, launch) > 1,
            "gradient_checkpointing=true": not config.gradient_checkpointing,
            "ema_device=cpu": config.ema_device is None,
            "text_encoder.quantization=4bit": config.text_encoder.quantization is None and not deepspeed,
            # DeepSpeed's optimisers are its own.
            "optimizer.name=adamw8bit": config.optimizer.name == "adamw" and not deepspeed,
            "unet.lora_rank=32": config.unet.lora_rank == 0,
            "recipe=24gb": config.recipe == "none" and config.preset == "paper" and config.stage > 1 and not deepspeed,
            f"data.resolution={lower}": lower >= multiple,
        }
        return [override for override, is_possible in possible.items() if is_possible]
