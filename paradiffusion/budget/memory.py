"""Memory of one GPU for each way to launch a stage: what is exact (weights, gradients, optimiser, average) and what is
estimated (activations, communication buffers, the device's own context)."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from paradiffusion.budget.activations import peak_bytes
from paradiffusion.budget.empty import EmptyModels, empty_models
from paradiffusion.config import TrainConfig
from paradiffusion.data.images import make_buckets
from paradiffusion.models.unet import PROJECTIONS
from paradiffusion.text.encoder import DTYPES

GIB = 2**30
# CUDA context, cuBLAS and cuDNN workspaces, and what the allocator cannot use: our estimate.
CONTEXT = int(1.0 * GIB)
# NF4 with double quantisation: half a byte, an 8-bit scale for 64 weights, and an fp32 scale for 256 of those.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# DeepSpeed's defaults, in elements: reduce_bucket_size, and stage3_max_live_parameters.
REDUCE_BUCKET, MAX_LIVE = 5 * 10**8, 10**9


@dataclass(frozen=True)
class LaunchBytes:
    """How one launch configuration holds things: each value is where the bytes lie, "gpu" (whole on every GPU), "shard"
    (1/N of them on each GPU), "host" (1/N of them in each process's main memory) or "none".

    Attributes:
        weights: fp32, 4 bytes per trained parameter; autocast's bfloat16 copies of them are counted apart.
        masters: a second fp32 copy, 4 bytes, that DeepSpeed's optimiser keeps.
        gradients: 4 bytes. optimizer: AdamW's moments, 8 bytes (2 in 8 bits). ema: 4 bytes.
        frozen: the language model where it is part of the joint module (stage 2).
        reduce: buffers for exchanging gradients: "ddp" (one more copy of all), "zero" (one bucket), "none".
        live: weights gathered for the layers at work, under ZeRO-3.
    """

    name: str
    title: str
    weights: str = "gpu"
    masters: str = "none"
    gradients: str = "gpu"
    optimizer: str = "gpu"
    ema: str = "gpu"
    frozen: str = "gpu"
    reduce: str = "none"
    live: bool = False

    @property
    def several(self) -> bool:
        """Whether it is for several GPUs."""
        return self.name != "one_gpu"


LAUNCHES = (
    LaunchBytes("one_gpu", "one GPU"),
    LaunchBytes("ddp", "DDP"),  # gradients are views into its buckets
    LaunchBytes("zero2", "ZeRO-2", masters="shard", gradients="shard", optimizer="shard", ema="shard", reduce="zero"),
    LaunchBytes(
        "zero2_offload", "ZeRO-2 + offload", masters="host", gradients="shard", optimizer="host", ema="host", reduce="zero"
    ),
    LaunchBytes(
        "zero3", "ZeRO-3", weights="shard", masters="shard", gradients="shard", optimizer="shard", ema="shard", frozen="shard",
        reduce="zero", live=True,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters.

    Attributes:
        unet: without projection and adapter; projection: its ``encoder_hid_proj``; unet_lora: its adapter.
        refiner: without its layout head ``layout``.
        text: the language model without its adapter ``lora``; quantised: those of its weights that NF4 is for.
        trained: of all parts together; matrices: those of them that autocast copies.
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
    unet_trained: int
    matrices: int
    quantised: int

    @property
    def total(self) -> int:
        return (
            self.unet + self.projection + self.unet_lora + self.refiner + self.layout + self.text + self.lora + self.vae
        )


@dataclass(frozen=True)
class Activations:
    """Peak bytes of a micro-batch beyond weights and gradients, in the three things that a step does in turn."""

    encode_images: int
    read_text: int
    train: int

    def beside(self, copies: float) -> float:
        """The peak next to autocast's ``copies``, which are there in training only."""
        return max(float(self.train), max(self.encode_images, self.read_text) - copies)


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


def count_parameters(models: EmptyModels) -> Counts:
    """Parameters of every part of a stage."""
    joint, inner = models.joint, models.text.inner
    unet = dict(joint.unet.named_parameters())
    text = dict(inner.named_parameters())
    trained = joint.trained()
    # Autocast copies what enters a matrix product or convolution; norms stay in fp32.
    matrices = sum(p.numel() for p in trained.values() if p.dtype == torch.float32 and p.ndim > 1)
    head = 0 if joint.refiner is None else _numel(joint.refiner.layout)
    return Counts(
        unet=sum(p.numel() for n, p in unet.items() if "lora_" not in n and not f"unet.{n}".startswith(PROJECTIONS)),
        projection=sum(p.numel() for n, p in unet.items() if f"unet.{n}".startswith(PROJECTIONS)),
        unet_lora=sum(p.numel() for n, p in unet.items() if "lora_" in n),
        refiner=_numel(joint.refiner) - head,
        layout=head,
        text=sum(p.numel() for n, p in text.items() if "lora_" not in n),
        lora=sum(p.numel() for n, p in text.items() if "lora_" in n),
        vae=_numel(models.codec),
        trained=sum(p.numel() for p in trained.values()),
        unet_trained=sum(p.numel() for n, p in trained.items() if n.startswith("unet.")),
        matrices=matrices,
        quantised=_quantised(inner),
    )


def _numel(module: nn.Module | None) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters())


def _quantised(text: nn.Module) -> int:
    """Weights of the frozen linear layers, which bitsandbytes stores in 4 bits; embeddings and norms stay."""
    return sum(
        module.weight.numel()
        for name, module in text.named_modules()
        if isinstance(module, nn.Linear) and "lora_" not in name
    )


def largest_bucket(config: TrainConfig) -> tuple[int, int]:
    """Height and width in pixels of the bucket with most pixels: what must fit."""
    data = config.data
    buckets = make_buckets(data.resolution, data.bucket_multiple, data.max_aspect)
    return max(buckets, key=lambda bucket: bucket[0] * bucket[1])


def measure_encoding(config: TrainConfig, micro_batch: int) -> int:
    """Peak bytes of making latents of one micro-batch in the largest bucket."""
    models = empty_models(config, *largest_bucket(config))
    with torch.no_grad():
        return peak_bytes(lambda: models.encode_images(micro_batch), [models.codec])


def measure_reading(config: TrainConfig, micro_batch: int) -> int:
    """Peak bytes of the language model alone, at the longest captions; 0 where it is trained with the rest."""
    models = empty_models(config)
    if models.joint.text_encoder is not None:
        return 0
    with torch.no_grad():
        return peak_bytes(lambda: models.read_text(micro_batch), [models.text])


def measure_training(config: TrainConfig, micro_batch: int) -> int:
    """Peak bytes of forward and backward of one micro-batch in the largest bucket, at the longest captions."""
    models = empty_models(config, *largest_bucket(config))

    def train() -> Tensor:
        return models.joint(models.batch(micro_batch))[0]

    return peak_bytes(train, [models.joint], autocast=config.precision != "fp32")


def gpu_memory(
    launch: LaunchBytes, gpus: int, config: TrainConfig, counts: Counts, activations: Activations
) -> GpuMemory:
    """Bytes on each of ``gpus`` GPUs under ``launch``."""
    places = {"gpu": 1.0, "shard": 1.0 / gpus, "host": 0.0, "none": 0.0}
    trained, host = counts.trained, 0.0
    moments = 2 if config.optimizer.name == "adamw8bit" else 8  # Muon's matrices have one moment: 8 is its upper bound
    off_gpu = config.ema_device == "cpu"
    for held, each in ((launch.masters, 4), (launch.optimizer, moments), (launch.ema, 0 if off_gpu else 4)):
        host += each * trained / gpus if held == "host" else 0.0
    host += 4 * trained * (1.0 if launch.ema == "gpu" else 1.0 / gpus) if off_gpu else 0.0

    text = text_bytes(config, counts)
    inside = config.train_text == "lora"
    unet_frozen = 4 * (counts.unet + counts.projection + counts.unet_lora - counts.unet_trained)
    frozen = (text + unet_frozen if inside else unet_frozen) * places[launch.frozen]
    frozen += counts.vae * DTYPES[config.codec.dtype].itemsize + (0 if inside else text)

    engine = trained + (counts.text if inside else 0)
    buffers = {"none": 0, "ddp": 4 * trained, "zero": 4 * min(trained, REDUCE_BUCKET)}[launch.reduce] if gpus > 1 else 0
    if launch.live and gpus > 1:
        buffers += 4 * min(engine, MAX_LIVE)
    copies = 2.0 * counts.matrices if config.precision != "fp32" else 0.0
    return GpuMemory(
        launch=launch.name,
        gpus=gpus,
        weights=4 * trained * places[launch.weights] + 4 * trained * places[launch.masters],
        copies=copies,
        frozen=frozen,
        gradients=4 * trained * places[launch.gradients],
        optimizer=moments * trained * places[launch.optimizer],
        ema=0.0 if off_gpu else 4 * trained * places[launch.ema],
        activations=activations.beside(copies),
        buffers=buffers,
        context=CONTEXT,
        host=host,
    )


def text_bytes(config: TrainConfig, counts: Counts) -> float:
    """Of the frozen language model, and of an adapter that is applied but not trained."""
    itemsize = DTYPES[config.text_encoder.dtype].itemsize
    adapter = 4 * counts.lora if config.train_text == "adapter" else 0
    if config.text_encoder.quantization is None:
        return counts.text * itemsize + adapter
    return counts.quantised * NF4_BYTES + (counts.text - counts.quantised) * itemsize + adapter


def checkpoint_bytes(config: TrainConfig, counts: Counts) -> tuple[int, int]:
    """Bytes of a checkpoint on disk: what sampling needs (the average, in fp32), and with the state to resume from."""
    weights = 4 * counts.trained + (4 * counts.lora if config.train_text == "adapter" else 0)
    weights += 4 * (counts.unet + counts.projection + counts.unet_lora - counts.unet_trained)
    moments = 2 if config.optimizer.name == "adamw8bit" else 8
    return weights, weights + (4 + moments) * counts.trained
