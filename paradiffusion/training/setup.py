"""Assemble a stage: everything that a user can get wrong is checked before a model is loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn

from paradiffusion.config import TrainConfig
from paradiffusion.data.demo import ensure_demo_data
from paradiffusion.data.images import make_buckets
from paradiffusion.data.loader import Loader, LoaderSettings, make_loader
from paradiffusion.data.plan import BatchPlan
from paradiffusion.data.shards import SampleIndex, expand_shards, load_index, read_sample
from paradiffusion.errors import UserError
from paradiffusion.models.codec import Codec, load_codec
from paradiffusion.models.inference import InferenceModels
from paradiffusion.models.joint import JointModel, build_joint
from paradiffusion.models.layouts import copy_tensors, describe, load_adapter, read_weights
from paradiffusion.models.unet import downsampling
from paradiffusion.randomness import seed_from
from paradiffusion.text.encoder import TextEncoder, attach_lora, load_text_encoder
from paradiffusion.training.checkpoint import TrainState, restore_checkpoint
from paradiffusion.training.ema import Ema
from paradiffusion.training.folder import check_init, check_unchanged, find_init, find_resume, record_config
from paradiffusion.training.optim import Optimizer, build_optimizer
from paradiffusion.training.validation import Validation

# Captions from which the refiner's input statistics are taken.
STATISTICS_CAPTIONS = 256


@dataclass
class Setup:
    """A stage ready to run. ``model`` is the prepared wrapper of ``joint``; training always calls the wrapper.

    Attributes:
        encoder: the text encoder; inside ``joint`` too where its LoRA is trained.
        frozen: adapter tensors that are applied but not trained.
        micro_batches: per process and step.
    """

    config: TrainConfig
    folder: Path
    accelerator: Accelerator
    plan: BatchPlan
    encoder: TextEncoder
    codec: Codec
    joint: JointModel
    model: nn.Module
    ema: Ema
    optimizer: Optimizer
    state: TrainState
    validation: Validation
    frozen: dict[str, Tensor]
    micro_batches: int

    def description(self) -> dict[str, Any]:
        """What the next checkpoint says of itself."""
        return describe(self.config, self.state.step, self.encoder.source, self.codec.source)

    def loader(self) -> Loader:
        """Batches from the current step on."""
        data, accelerator = self.config.data, self.accelerator
        settings = LoaderSettings(
            seed=self.config.seed,
            first_step=self.state.step,
            last_step=self.config.max_steps,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            accumulation=self.micro_batches,
            caption_dropout=data.caption_dropout,
            max_bad_fraction=data.max_bad_fraction,
            workers=data.workers,
        )
        return make_loader(self.plan.index, self.plan, settings)

    def inference(self) -> InferenceModels:
        """The models as the sampler takes them; call within ``ema.applied()``."""
        return InferenceModels(
            joint=self.joint,
            text_encoder=self.encoder,
            codec=self.codec,
            objective=self.joint.objective,
            sampler=self.config.sampler,
            resolution=self.config.data.resolution,
            device=self.accelerator.device,
            dtype=torch.float32,
            checkpoint=str(self.folder),
            step=self.state.step,
            provenance={},
        )

    def gather(self, items: list[Any]) -> list[Any]:
        """Lists of all processes, joined in the order of ranks."""
        if self.accelerator.num_processes == 1:
            return items
        parts: list[list[Any]] = [[] for _ in range(self.accelerator.num_processes)]
        torch.distributed.all_gather_object(parts, items)
        return [item for part in parts for item in part]


def set_threads(config: TrainConfig, local_processes: int) -> None:
    """Share the cores among this machine's processes. ``accelerate launch`` sets OMP_NUM_THREADS=1 for one process too,
    which would leave all cores but one idle."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(config.threads or max(1, cores // max(local_processes, 1)))


def make_accelerator(config: TrainConfig) -> Accelerator:
    """The launcher's processes and device. The launcher always exports a precision of "no", so ours is passed on."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    handlers = [InitProcessGroupKwargs(backend="gloo")] if several and not torch.cuda.is_available() else []
    accelerator = Accelerator(
        mixed_precision="no" if config.precision == "fp32" else config.precision,
        kwargs_handlers=handlers,  # type: ignore[arg-type]
    )
    set_threads(config, int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes)))
    return accelerator


def open_data(config: TrainConfig) -> tuple[SampleIndex, SampleIndex | None]:
    """Indexes of the training and held-out shards; the built-in scenes are made when they are missing."""
    data = config.data
    if data.shards is None:
        raise UserError(
            "data.shards is not set; name WebDataset shards, such as data.shards='shards/{00000..00099}.tar'."
        )
    wanted = [data.shards] if isinstance(data.shards, str) else list(data.shards)
    if data.demo and any(str(spec).startswith(data.demo_folder) for spec in wanted):
        ensure_demo_data(Path(data.demo_folder), dict(data.demo_sizes) or None)
    index = load_index(expand_shards(wanted), data.allow_truncated)
    if data.val_shards is None:
        return index, None
    held_out = [data.val_shards] if isinstance(data.val_shards, str) else list(data.val_shards)
    return index, load_index(expand_shards(held_out), data.allow_truncated)


def count_micro_batches(config: TrainConfig, processes: int) -> int:
    """Micro-batches per process and optimiser step; UserError unless all ratios are whole."""
    micro = config.micro_batch_size
    if micro is None and config.batch_size % processes == 0:
        return 1
    if micro is None or config.batch_size % (micro * processes):
        shown = "batch_size / processes" if micro is None else micro
        raise UserError(
            f"batch_size={config.batch_size} is not a whole multiple of micro_batch_size={shown} times {processes} processes; "
            "choose numbers that divide."
        )
    return config.batch_size // (micro * processes)


def build(config: TrainConfig, folder: Path, accelerator: Accelerator) -> Setup:
    """Everything that a stage needs, restored from its newest checkpoint or started as configured.

    Raises:
        UserError: for whatever is missing, damaged or contradictory.
    """
    micro_batches = count_micro_batches(config, accelerator.num_processes)
    resume = find_resume(config, folder)
    if resume is not None:
        check_unchanged(config, folder)  # before a model is loaded, which might only say that a tensor does not fit
    init = None if resume else find_init(config)
    if init is not None:
        check_init(config, init)
    if config.train_text == "adapter" and resume is None and init is None:
        raise UserError("train_text=adapter needs a stage 2 checkpoint to take the LoRA adapter from; set init_from=.")
    index, held_out = open_data(config)
    buckets = make_buckets(config.data.resolution, config.data.bucket_multiple, config.data.max_aspect)
    plan = BatchPlan(
        index, config.batch_size, config.seed, buckets, dict(config.data.captions), config.data.window_shards
    )

    encoder = load_text_encoder(config.text_encoder, config.conditioning)
    codec = load_codec(config.codec)
    source = resume or init
    stored = read_weights(source) if source else {}
    frozen: dict[str, Tensor] = {}
    if config.train_text == "adapter":
        load_adapter(encoder, stored, config.lora)
        frozen = {name: tensor for name, tensor in stored.items() if name.startswith("text_encoder.")}
    elif config.train_text == "lora":
        attach_lora(encoder, config.lora, seed_from("lora", config.seed) % (1 << 31))
        if config.gradient_checkpointing:
            checkpoint_activations(encoder)
    joint = build_joint(config, encoder.width, encoder if config.train_text == "lora" else None)
    check_sizes(config, joint)
    if stored:
        own = {**dict(joint.named_parameters()), **dict(joint.named_buffers())}
        copy_tensors(joint, {n: t for n, t in stored.items() if n in own or not n.startswith("text_encoder.")})
    elif joint.refiner is not None:
        take_statistics(joint, encoder, plan)

    encoder.to(accelerator.device)
    codec.to(accelerator.device)
    joint.to(accelerator.device)
    ema = Ema(joint.trained(), config.ema_decay)
    optimizer = build_optimizer(joint.trained(), config.optimizer)
    state = restore_checkpoint(resume, joint, ema, optimizer) if resume else TrainState()
    if accelerator.is_main_process:
        facts = {"data": index.fingerprint(), "text_encoder": encoder.source["hash"], "codec": codec.source["hash"]}
        if resume is not None:
            check_unchanged(config, folder, facts)
        record_config(config, folder, facts)
    setup = Setup(
        config, folder, accelerator, plan, encoder, codec, joint, accelerator.prepare(joint), ema, optimizer, state,
        validation=None, frozen=frozen, micro_batches=micro_batches,  # type: ignore[arg-type]
    )  # fmt: skip
    setup.validation = Validation(held_out, config, accelerator.process_index, accelerator.num_processes, setup.gather)
    if accelerator.is_main_process:
        announce(setup, resume, init)
    return setup


def checkpoint_activations(encoder: TextEncoder) -> None:
    """Recompute the language model's activations. Reentrant checkpointing would leave LoRA without a gradient, since
    nothing that enters the first layer needs one."""
    encoder.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    encoder.model.enable_input_require_grads()


def check_sizes(config: TrainConfig, joint: JointModel) -> None:
    """Refuse buckets that the U-Net cannot halve as often as it does."""
    needed = config.codec.factor * downsampling(joint.unet)
    if config.data.bucket_multiple % needed:
        raise UserError(
            f"data.bucket_multiple={config.data.bucket_multiple} must be a multiple of {needed}: codec.factor times the "
            "U-Net's own downsampling."
        )


@torch.no_grad()
def take_statistics(joint: JointModel, encoder: TextEncoder, plan: BatchPlan) -> None:
    """Standardise the refiner's input by the features of the plan's first captions."""
    assert joint.refiner is not None
    captions: list[str] = []
    step = 0
    while len(captions) < STATISTICS_CAPTIONS:
        batch = plan.batch(step)
        for row, kind in zip(batch.rows, batch.kinds, strict=True):
            captions.append(read_sample(plan.index, int(row)).meta["captions"].get(plan.index.kinds[kind], ""))
        step += 1
    tokens = encoder.tokenize(captions[:STATISTICS_CAPTIONS])
    rows = [tokens.ids[i : i + 1] for i in range(len(tokens.ids))]
    features = torch.cat(
        [encoder(row, mask[None], tokens.prefix).float() for row, mask in zip(rows, tokens.mask, strict=True)]
    )
    joint.refiner.set_statistics(features, tokens.mask[:, tokens.prefix :])


def announce(setup: Setup, resume: Path | None, init: Path | None) -> None:
    """What is about to run, for a person."""
    config, plan = setup.config, setup.plan
    trained = setup.joint.trained()
    lora = sum(p.numel() for n, p in trained.items() if n.startswith("text_encoder."))
    start = f"resuming from {resume}" if resume else f"starting from {init}" if init else "fresh weights"
    print(
        f"stage {config.stage} in {setup.folder}: {start}, step {setup.state.step} of {config.max_steps}\n"
        f"  trained: {sum(p.numel() for p in trained.values()) / 1e6:.2f} M parameters ({lora / 1e6:.2f} M of them LoRA), "
        f"{config.precision}, {setup.accelerator.device.type}, {setup.accelerator.num_processes} process(es) x "
        f"{setup.micro_batches} micro-batch(es), {torch.get_num_threads()} thread(s) each\n"
        f"  text: {config.text_encoder.name} ({config.train_text}), {config.conditioning.name} conditioning\n"
        f"  data: {plan.samples} samples in {len(plan.index.shards)} shards, {plan.steps_per_epoch:.0f} steps an epoch, "
        f"buckets {', '.join(f'{w}x{h}' for h, w in plan.bucket_sizes())}"
        + (f"; {plan.left_out} samples without a caption are left out" if plan.left_out else ""),
        flush=True,
    )
