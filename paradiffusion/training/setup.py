"""Assemble a stage: everything that a user can get wrong is checked before a model is loaded."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from accelerate import Accelerator
from torch import Tensor

from paradiffusion.checkpoints.layouts import describe, is_unet_folder, open_layout
from paradiffusion.config import TrainConfig
from paradiffusion.data.cache import Cache
from paradiffusion.data.index import SampleIndex
from paradiffusion.data.loader import Batch, Loader, LoaderSettings, make_loader, slots_of
from paradiffusion.data.plan import BatchPlan, describe_plan, make_plan, open_index, open_shards
from paradiffusion.data.stream import NOT_RESUMABLE, open_stream
from paradiffusion.errors import UserError
from paradiffusion.models.codec import Codec, load_codec
from paradiffusion.models.joint import JointModel
from paradiffusion.sampling.pipeline import InferenceModels
from paradiffusion.text.encoder import TextEncoder, load_text_encoder
from paradiffusion.training.assembly import build_models
from paradiffusion.training.cache_keys import check_cache, describe_cache, open_cache, spares_models
from paradiffusion.training.cached_inputs import Memory
from paradiffusion.training.checkpoint import TrainState, restore_checkpoint
from paradiffusion.training.ema import Ema
from paradiffusion.training.engine import (
    Engine,
    make_engine,
)
from paradiffusion.training.folder import adopt, check_init, check_unchanged, find_init, find_resume, record_config
from paradiffusion.training.processes import count_micro_batches
from paradiffusion.training.validation import Scorer, Validation
from paradiffusion.training.watch import Watch


@dataclass
class Parts:
    """The frozen models, where they are not to be loaded as configured (a benchmark's random ones)."""

    encoder: TextEncoder
    codec: Codec


@dataclass
class Setup:
    """A stage ready to run. Training calls ``engine.model``, the prepared wrapper of ``joint``.

    Attributes:
        encoder: the text encoder; inside ``joint`` too where its LoRA is trained.
        frozen: tensors that are applied but not trained, and belong to a checkpoint: the adapter in stage 3, the U-Net's
            own weights under its LoRA. Only the main process, which writes, has them.
        micro_batches: per process and step.
        cache: latents and text features made beforehand, if there are any.
        memory: what the frozen models made in this run, where it is kept.
        key_log: where what each step saw is written, if asked for.
        measured: of the last step's micro-batches in this process, each sample's loss, its time, and the batch.
    """

    config: TrainConfig
    folder: Path
    accelerator: Accelerator
    plan: BatchPlan
    encoder: TextEncoder
    codec: Codec
    joint: JointModel
    engine: Engine
    ema: Ema
    state: TrainState
    validation: Validation
    frozen: dict[str, Tensor]
    micro_batches: int
    watch: Watch
    cache: Cache | None = None
    memory: Memory | None = None
    key_log: IO[str] | None = None
    measured: list[tuple[Tensor, Tensor, Batch]] = field(default_factory=list)

    def close(self) -> None:
        """End the watch and close the files."""
        self.watch.close()
        if self.key_log is not None:
            self.key_log.close()

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
            cache=self.cache,
            tokenize=None if self.has_text() else self.encoder.tokenize,
        )
        if data.streaming:
            return open_stream(data, self.config.batch_size, settings)
        return make_loader(self.plan.index, self.plan, settings)

    def has_text(self) -> bool:
        """Whether text features are stored, or kept in memory."""
        kept = self.memory is not None and self.joint.text_encoder is None
        return kept or (self.cache is not None and self.cache.null is not None)

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

    def agree(self, loss: Tensor, stop: bool) -> tuple[float, bool]:
        """The mean of all processes' losses, and whether any of them was asked to stop; one exchange for both."""
        both = torch.stack([loss.double(), torch.tensor(float(stop), device=loss.device, dtype=torch.float64)])
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(both)
        total, stops = both.tolist()
        return total / self.accelerator.num_processes, stops > 0

    def expected_keys(self, step: int, micro: int) -> list[str]:
        """The samples that this process is about to read, for whoever looks at it while it waits for them."""
        if self.config.data.streaming:
            return []  # Nobody knows.
        world, rows = self.accelerator.num_processes, self.plan.batch(step).rows
        slots = slots_of(self.accelerator.process_index, world, len(rows) // (world * self.micro_batches), micro)
        index = self.plan.index
        return [
            f"{index.shards[index.shard[row]].name}/{index.key(int(row))}"
            for row in rows[slots.start : slots.stop : slots.step]
        ]

    def autocast(self) -> AbstractContextManager[Any]:
        """For what runs outside of the engine, which switches it on for itself: the arithmetic of training."""
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.config.precision != "fp32")


def open_data(config: TrainConfig) -> tuple[SampleIndex, SampleIndex | None]:
    """Indexes of the training and held-out shards."""
    data = config.data
    index = open_index(data)
    return index, None if data.val_shards is None else open_shards(data, data.val_shards, "data.val_shards")


def check_same_data(index: SampleIndex, accelerator: Accelerator) -> None:
    """Raise UserError unless all processes found the same samples: each plans by itself, and with another index some
    samples would come twice and others never, without a sign."""
    if accelerator.num_processes == 1:
        return
    found: list[str] = [""] * accelerator.num_processes
    torch.distributed.all_gather_object(found, index.fingerprint())
    other = next((rank for rank, one in enumerate(found) if one != found[0]), None)
    if other is not None:
        raise UserError(
            f"process {other} found other samples than process 0: make the data the same on all machines, indexes with "
            "tokens (scripts/index_shards.py tokenizer=) among it, leave it alone while a run starts, and start again."
        )


def build(
    config: TrainConfig,
    folder: Path,
    accelerator: Accelerator,
    parts: Parts | None = None,
    watch: Watch | None = None,
    scorer: Scorer | None = None,
) -> Setup:
    """Everything of a stage, resumed from its newest checkpoint or started as configured.

    Args:
        parts: the frozen models, where they are not to be loaded as configured.
        watch: which is running already; None for one of its own, which ``Setup.close`` ends.
        scorer: of the pictures that validation draws.
    Raises:
        UserError: for whatever is missing, damaged or contradictory.
    """
    micro_batches = count_micro_batches(config, accelerator.num_processes)
    resume = find_resume(config, folder)
    init = None if resume else find_init(config)
    description = None
    if (source := resume or init) is not None and not is_unet_folder(source):
        description = open_layout(source).description
        before, config = config.unet, adopt(config, description, source)
        if config.unet != before and accelerator.is_main_process:
            print(f"the U-Net takes its shape from {source}, not from unet={before.name}", flush=True)
    if resume is not None:
        check_unchanged(config, folder)  # before a model is loaded, which might only say that a tensor does not fit
    if init is not None and description is not None:
        check_init(config, init, description)
    if config.train_text == "adapter" and resume is None and (init is None or is_unet_folder(init)):
        raise UserError("train_text=adapter needs a stage 2 checkpoint to take the LoRA adapter from; set init_from=.")
    check_cache(config)
    index, held_out = open_data(config)
    check_same_data(index, accelerator)
    plan = make_plan(index, config.data, config.batch_size, config.seed)

    encoder = parts.encoder if parts else load_text_encoder(config.text_encoder, config.conditioning)
    codec = parts.codec if parts else load_codec(config.codec)
    joint, frozen = build_models(config, encoder, plan, source, description, accelerator.is_main_process)
    cache = open_cache(config, index, encoder, codec)
    for what, model in (("text", encoder), ("latents", codec)):
        if not spares_models(config, cache, what, held_out):
            model.to(accelerator.device)
    joint.to(accelerator.device)
    if config.channels_last:
        joint.unet.to(memory_format=torch.channels_last)
    if config.compile:
        joint.unet.compile()  # in place: names and checkpoints stay as they are
    engine = make_engine(accelerator, joint, config, micro_batches)
    ema = Ema(engine.masters, config.ema_decay, config.ema_device)
    state = restore_checkpoint(resume, joint, engine, ema) if resume else TrainState()
    if accelerator.is_main_process:
        facts = {"data": index.fingerprint(), "text_encoder": encoder.source["hash"], "codec": codec.source["hash"]}
        if resume is not None:
            check_unchanged(config, folder, facts)
        record_config(config, folder, facts)
    watch = watch or Watch(accelerator.process_index, accelerator.num_processes, config.stall_seconds)
    setup = Setup(
        config, folder, accelerator, plan, encoder, codec, joint, engine, ema, state, validation=None, frozen=frozen,  # type: ignore[arg-type]
        micro_batches=micro_batches, watch=watch, cache=cache,
    )  # fmt: skip
    if config.keep_gb:
        setup.memory = Memory(encoder, codec, config.keep_gb, accelerator.device, setup.autocast)
    # Under ZeRO-3 each layer is gathered when it is used, by all processes together: all of them then do all of the work.
    rank, processes = (accelerator.process_index, accelerator.num_processes) if engine.whole else (0, 1)
    gather = setup.gather if engine.whole else list
    writes = accelerator.is_main_process
    setup.validation = Validation(held_out, config, rank, processes, gather, writes, scorer)
    if config.log_samples:
        folder.joinpath("samples_seen").mkdir(exist_ok=True)
        name = f"rank{accelerator.process_index}_from{state.step:06d}.jsonl"
        setup.key_log = (folder / "samples_seen" / name).open("w", encoding="utf-8")
    if accelerator.is_main_process:
        announce(setup, resume, init)
    return setup


def announce(setup: Setup, resume: Path | None, init: Path | None) -> None:
    """What is about to run, for a person."""
    config, plan = setup.config, setup.plan
    trained = setup.joint.trained()
    sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in trained.items()}  # ZeRO-3 leaves none in p itself
    lora = sum(size for name, size in sizes.items() if ".lora_" in name)
    start = f"resuming from {resume}" if resume else f"starting from {init}" if init else "fresh weights"
    print(
        f"stage {config.stage} in {setup.folder}: {start}, step {setup.state.step} of {config.max_steps}\n"
        f"  trained: {sum(sizes.values()) / 1e6:.2f} M parameters ({lora / 1e6:.2f} M of them LoRA), "
        f"{config.precision}, {setup.accelerator.device.type}, {setup.engine.kind}, "
        f"{setup.accelerator.num_processes} process(es) x "
        f"{setup.micro_batches} micro-batch(es), {torch.get_num_threads()} thread(s) each\n"
        f"  text: {config.text_encoder.name} ({config.train_text}), {config.conditioning.name} conditioning\n"
        f"  data: {plan.samples} samples in {len(plan.index.shards)} shards, {plan.steps_per_epoch:.{0 if plan.steps_per_epoch >= 10 else 2}f} steps an epoch, "
        f"buckets {', '.join(f'{w}x{h}' for h, w in plan.bucket_sizes())}"
        + (f"; {plan.left_out} samples without a caption are left out" if plan.left_out else "")
        + (f"\n  {NOT_RESUMABLE}" if config.data.streaming else "")
        + describe_plan(plan)
        + describe_cache(config, setup.cache)
        + ("" if torch.cuda.is_available() or config.preset == "nano" else "\n  note: torch finds no GPU here"),
        flush=True,
    )
