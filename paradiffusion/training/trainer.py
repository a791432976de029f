"""Training: a stage from where it stands to its last step. Stages differ in their configuration only."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from tqdm import tqdm

from paradiffusion.atomic import write_atomic
from paradiffusion.checkpoints.layouts import describe
from paradiffusion.config import SampleConfig, TrainConfig
from paradiffusion.data.index import COUNTS, SampleIndex
from paradiffusion.data.loader import Batch, Loader, LoaderSettings, make_loader, slots_of
from paradiffusion.data.plan import describe_plan, make_plan, open_index, open_shards
from paradiffusion.data.stream import NOT_RESUMABLE, open_stream
from paradiffusion.errors import UserError
from paradiffusion.machine import to_device
from paradiffusion.models.codec import Codec, load_codec
from paradiffusion.models.joint import LossBatch, Losses
from paradiffusion.models.unet import downsampling
from paradiffusion.models.vision import VisionEncoder
from paradiffusion.sampling.pipeline import InferenceModels, make_jobs
from paradiffusion.sampling.prompts import read_prompts
from paradiffusion.stopping import stop_on_signals
from paradiffusion.text.encoder import TextEncoder, compile_layers, is_adapter, leave_casts_to_autocast, load_text_encoder  # fmt: skip
from paradiffusion.training.best import Best
from paradiffusion.training.caching import check_cache, describe_cache, open_cache, spares_models
from paradiffusion.training.ema import Ema, OwnAverage
from paradiffusion.training.engine import (
    Engine,
    ZeroEngine,
    at_once,
    bring,
    count_micro_batches,
    cuts_weights,
    is_deepspeed,
    layout_steps,
    make_accelerator,
    share,
)  # fmt: skip
from paradiffusion.training.folder import (
    SUMMARY,
    TrainState,
    check_unchanged,
    locked,
    prune,
    record_config,
    restore_checkpoint,
    save_checkpoint,
    stage_folder,
)  # fmt: skip
from paradiffusion.training.inputs import Inputs, Memory
from paradiffusion.training.log import Log, Meters, human_time, log_line, mixture_line
from paradiffusion.training.optim import keeps_average, schedule, set_learning_rate
from paradiffusion.training.spikes import Spikes
from paradiffusion.training.start import Start, build_models, find_start, open_teacher, take_statistics
from paradiffusion.training.step_record import line_of, open_seen
from paradiffusion.training.validation import SEED, Scorer, Validation
from paradiffusion.training.watch import Watch, together


def train(config: TrainConfig, scorer: Scorer | None = None) -> int:
    """Run a stage from where it stands to ``max_steps``; 0 when it is done, 128 + the signal's number when it was asked to stop and has
    saved. The ``scorer`` judges the pictures that validation draws. Raises UserError for what a user can mend; what was saved stays."""
    # A launcher that is killed leaves its processes to another parent. Without one another parent means only that the
    # shell has gone: "nohup python train.py &" goes on. Asked before models are loaded, which may take minutes.
    launched, parent = bool({"LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys()), os.getppid()
    accelerator = make_accelerator(config)
    watch = Watch(accelerator.process_index, accelerator.num_processes, config.stall_seconds)
    with together(watch), locked(stage_folder(config)) if accelerator.is_main_process else nullcontext():
        trainer = Trainer(config, accelerator, watch, scorer=scorer)
        with stop_on_signals() as stop:
            done = trainer.train(lambda: stop.came_at is not None or (launched and os.getppid() != parent))
        accelerator.wait_for_everyone()  # launchers end the others as soon as one has left with another status than 0
    accelerator.end_training()  # not after an error: who waits inside a collective operation is not there for this
    return 0 if done else stop.status


class MicroBatch(NamedTuple):
    """What was trained on at once in this process, at which times [R * b], and the losses of it."""

    batch: Batch
    times: Tensor
    losses: Losses


class Trainer:
    """A stage ready to run, whole once it is made. Everything that a user can get wrong is checked before a model is loaded.

    Args:
        watch: over the processes, where one runs already: who is late with loading models is named too.
        folder: what it reads and writes; None for the run's own.
        frozen_models: text encoder and codec, where they are not to be loaded as configured (a benchmark's random ones).
        scorer: of the pictures that validation draws.
    Attributes:
        writing: the checkpoint that is being written, in the main process. saved: the step of the latest one.
        encoder: the text encoder; inside ``joint`` too where its LoRA is trained.
        joint: everything that is trained. Steps call ``engine.model``, its prepared wrapper.
        frozen: tensors that are applied but not trained, and belong to a checkpoint: the adapter in stage 3, the U-Net's
            own weights under its LoRA. Only the main process, which writes, has them, and the ``log``.
        micro_batches: per process and step. layout_steps: the first ones, without the denoiser.
    Raises:
        UserError: for whatever is missing, damaged or contradictory.
    """

    def __init__(
        self, config: TrainConfig, accelerator: Accelerator, watch: Watch | None = None, folder: Path | None = None,
        frozen_models: tuple[TextEncoder, Codec] | None = None, scorer: Scorer | None = None,
    ) -> None:  # fmt: skip
        self.accelerator, self.device = accelerator, accelerator.device
        self.rank, self.processes, self.main = (
            accelerator.process_index, accelerator.num_processes, accelerator.is_main_process,
        )  # fmt: skip
        self.folder = folder or stage_folder(config)
        self.watch, self._own_watch = watch or Watch(self.rank, self.processes, config.stall_seconds), watch is None
        self.micro_batches = count_micro_batches(config, self.processes)
        self.layout_steps = layout_steps(config)
        start = shared_start(config, self.folder, accelerator)
        self.config = config = start.config
        check_cache(config)

        wanted = config.validation.prompts
        prompts = [] if wanted is None else read_prompts(prompt_file=wanted, key="validation.prompts")
        index, held_out = open_data(config)
        check_same_data(index, accelerator)
        self.plan = make_plan(index, config.data, config.batch_size, config.seed)

        # Weights come from the main process, which alone makes them in main memory: the others do without them from the start.
        is_cut, trained = cuts_weights(accelerator), config.train_text == "lora"
        empty = None if self.main else torch.device("meta")
        spared = config.data.cache is not None or self.device.type == "cpu"  # to be moved, or never
        self.encoder, self.codec = frozen_models or (
            load_text_encoder(
                config.text_encoder, config.conditioning,
                device=empty if is_cut and trained else None if spared else self.device,
            ),
            load_codec(config.codec),
        )  # fmt: skip
        self.joint, frozen = build_models(start, self.encoder, self.main, empty)
        self.frozen = frozen if self.main else {}
        self.cache = open_cache(config, index, self.encoder, self.codec)
        for what, model in (("text", self.encoder), ("latents", self.codec)):
            if model is not self.joint.text_encoder and not spares_models(config, self.cache, what, held_out):
                model.to(self.device)
        if not is_cut:
            bring(self.joint, self.device)
        if config.channels_last or (config.compile and self.device.type == "cuda" and not is_deepspeed()):
            self.joint.unet.to(memory_format=torch.channels_last)
        if config.compile:
            self.joint.unet.compile()  # in place: names and checkpoints stay as they are
        memory = Memory(self.encoder, self.codec, config.keep_gb, self.device, self.autocast) if config.keep_gb else None
        null = self.cache.null if self.cache else None
        self.teacher = open_teacher(config, self.encoder, self.device)
        vision = None
        if config.objective.align_weight:
            vision = VisionEncoder(config.objective, config.codec.factor * downsampling(self.joint.unet), self.device)
        self.inputs = Inputs(config, self.encoder, self.codec, self.joint, self.device, null, memory, teacher=self.teacher, vision=vision)

        self.engine = (ZeroEngine if is_deepspeed() else Engine)(accelerator, self.joint, config, self.micro_batches)
        if (refiner := self.joint.refiner) is not None and start.description is None:
            if self.main or (is_cut and trained):  # whose layers are gathered by all processes together
                take_statistics(refiner, self.encoder, self.plan, self.device)
            share(refiner.buffers())
        if config.precision != "fp32":
            leave_casts_to_autocast(self.joint)  # within which it is called from here on
        if config.compile:
            compile_layers(self.encoder.model)
        masters, optimizer = self.engine.masters, self.engine.optimizer
        self.ema = (
            OwnAverage(masters, optimizer, config.ema_device) if keeps_average(optimizer)
            else Ema(masters, config.ema_decay, config.ema_device)
        )  # fmt: skip
        self.state = TrainState()
        if start.found is not None and start.resumes:
            self.state = restore_checkpoint(start.found, self.joint, self.engine, self.ema)
        if self.main:
            self.settle_config(start, index)

        # Under ZeRO-3 each layer is gathered when it is used, by all processes together: all of them then do all of the work.
        whole = self.engine.whole
        rank, processes, gather = (self.rank, self.processes, self.gather) if whole else (0, 1, list)
        jobs = make_jobs(prompts, SampleConfig(seed=SEED), self.inference())
        self.validation = Validation(held_out, config, rank, processes, gather, self.main, scorer, jobs)
        self.spikes, self.best = Spikes(self), Best(self)
        # On a processor the copy of a checkpoint would take memory that has better uses, and writing its time from the steps.
        self.saves_apart = self.device.type == "cuda" if config.async_save is None else config.async_save
        self.writer = ThreadPoolExecutor(1, "checkpoint")
        self.writing: Future[None] | None = None
        self.saved = self.state.step
        self.compiled: set[tuple[int, ...]] = set()
        self.seen = open_seen(self.folder, self.rank, self.state.step) if config.log_samples else None
        self.meters = Meters()
        self.log = Log(self.folder, config, self.description(), self.state.step) if self.main else None
        self.say(announcement(self, start))

    def settle_config(self, start: Start, index: SampleIndex) -> None:
        """Write the stage's config.json, with what was found beside what was configured; of a resumed one it must be as it was. Raises
        UserError where it is not."""
        facts = {
            "data": index.fingerprint(),
            "text_encoder": self.encoder.source["known_by"],
            "codec": self.codec.source["known_by"],
            **({} if self.teacher is None else {"teacher": self.teacher.known_by}),
        }
        if start.resumes:
            check_unchanged(self.config, self.folder, facts)
        record_config(self.config, self.folder, facts)

    def train_step(self, batches: Iterator[Batch], stop: Callable[[], bool] = lambda: False) -> tuple[float, bool]:
        """One optimiser step: the loss over all processes, and whether ``stop`` said so in any of them."""
        config, engine, state, meters, began = self.config, self.engine, self.state, self.meters, time.monotonic()
        set_learning_rate(engine.optimizer, schedule(config.optimizer, state.step, config.max_steps))
        share, taken = self.gradients(batches)
        # Everything is asked for before a number is read: a look at a GPU's numbers waits until all before it is done.
        clipped = engine.clip()
        self.enter("wait")
        both = self.agree(share, stop())
        self.enter("update")
        norm = engine.update(self.spikes.sees(both[0], clipped))
        loss, stops = both.tolist()
        norm = norm if clipped is None else float(clipped)
        fault = self.spikes.find(loss, norm)
        engine.discard()
        if fault is None:
            self.ema.update(state.step)
        self.record(taken)
        self.spikes.answer(fault, loss, taken)
        state.step += 1
        state.seconds += time.monotonic() - began
        meters.steps += 1
        meters.gradient += norm if norm is not None and math.isfinite(norm) else 0.0
        return loss, stops > 0

    def gradients(self, batches: Iterator[Batch]) -> tuple[Tensor, list[MicroBatch]]:
        """Accumulate one global batch's: this process's mean loss, and what it was taken of."""
        read: list[Batch] = []
        for micro in range(self.micro_batches):
            self.enter("data", self.expected_keys(micro))
            waiting = time.monotonic()
            read.append(next(batches))
            self.meters.waited += time.monotonic() - waiting
        # The mean of the weights over the global batch is 1: that of the weighted losses is then that over the readable
        # samples, in whichever process and micro-batch the others are.
        readable = to_device(torch.stack([batch.weights.sum() for batch in read]).sum(), self.device)
        if self.processes > 1:
            torch.distributed.all_reduce(readable)
        scale = self.config.batch_size / readable.clamp_min(1)
        total, taken = torch.zeros((), device=self.device), []
        for micro, batch in enumerate(read):
            self.enter("encode" if self.compiled or not self.config.compile else "compile", batch.keys)
            inputs = self.encode(batch)
            inputs = replace(inputs, weights=inputs.weights * scale, denoise=self.state.step >= self.layout_steps)
            known = self.knows_shape(inputs)
            self.enter("forward" if known else "compile")
            with self.engine.accumulating(last=micro == self.micro_batches - 1):
                losses = self.engine.model(inputs)
                if known:
                    self.enter("backward")
                self.engine.backward(losses.total)
            total += losses.diffusion / self.micro_batches
            taken.append(MicroBatch(batch, inputs.times, losses._replace(total=losses.total.detach())))
        return total, taken

    def train(self, stop: Callable[[], bool] = lambda: False) -> bool:
        """All steps that are left, with what is due between them, up to where ``patience`` ends them; False where ``stop`` ended it,
        which is saved then."""
        config, state = self.config, self.state
        self.best.make_up()
        over = self.best.gets_no_better()
        if state.step < config.max_steps and self.main and not over:
            (self.folder / SUMMARY).unlink(missing_ok=True)
        batches = self.loader()
        bar = tqdm(total=config.max_steps, initial=state.step, unit="step", desc=f"stage {config.stage}",
                   disable=None if self.main else True, dynamic_ncols=True)  # fmt: skip
        try:
            while state.step < config.max_steps and not over:
                _, stopping = self.train_step(batches, lambda: stop() or self.failed_to_save())
                bar.update()
                done = state.step == config.max_steps
                if done or state.step % config.log_every == 0:
                    self.report()
                if done or stopping or state.step % config.checkpoint_every == 0:
                    self.save(last=done or stopping)
                if stopping and not done:
                    bar.close()
                    self.say(f"stopped at step {state.step}, which is saved; run the same command again to go on.")
                    return False
                if not done and state.step % config.validate_every == 0:
                    self.validate()
                    over = self.best.gets_no_better()
                    self.meters.started = time.monotonic() if not self.meters.steps else self.meters.started
            bar.close()
            if over and self.meters.steps:
                self.report()
            if over and self.saved < state.step:
                self.save()
            if len(state.skipped) >= config.max_steps:
                raise UserError(
                    f"the update of each of the {config.max_steps} steps was skipped, so nothing was learned; look at their "
                    "samples (replay/ in the stage's folder), or lower optimizer.lr, in another run_dir=."
                )
            self.finish()
            return True
        finally:
            batches.close()
            if batches.report.bad:
                print(f"process {self.rank}: {batches.report.summary()}", flush=True)
            self.close()

    def encode(self, batch: Batch) -> LossBatch:
        """A micro-batch as the joint module takes it."""
        return self.inputs(batch, self.meters)

    def knows_shape(self, inputs: LossBatch) -> bool:
        """Whether nothing is compiled for a micro-batch of this shape, in either direction; from now on it is known."""
        text = inputs.ids if inputs.features is None else inputs.features
        assert text is not None
        shape = (*inputs.latents.shape, text.shape[1], inputs.denoise)
        known = not self.config.compile or shape in self.compiled
        self.compiled.add(shape)
        return known

    def enter(self, phase: str, keys: list[str] | None = None) -> None:
        """Tell the watch what comes now, and of which samples (None: the same as before)."""
        self.watch.beat(phase, self.state.step, keys)

    def record(self, taken: list[MicroBatch]) -> None:
        """What a step saw: into the meters, and to the disk where that was asked for."""
        for batch, times, losses in taken:
            self.meters.add(batch, times.cpu() / self.joint.objective.config.train_timesteps, losses)
            if not self.config.data.streaming:  # where another order than the plan's comes
                self.meters.choices += self.plan.choices(batch.step, batch.slots[batch.weights > 0].numpy())
        if self.seen is not None:
            self.seen.write(line_of(self.state.step, self.rank, self.processes, [batch for batch, _, _ in taken]))

    def report(self) -> None:
        """Reduce the meters over all processes, write the line and the record, and start anew."""
        gathered = self.gather([self.meters.export()])
        if self.log is not None:
            record = self.meters.summary(gathered)
            record["learning_rate"] = float(self.engine.optimizer.param_groups[0]["lr"])
            record["images_seen"] = self.state.step * self.config.batch_size
            self.say(log_line(self.config, self.state.step, record))
            if mixed := mixture_line(record):
                self.say(mixed)
            self.log.write(self.state.step, "train", record)
        self.meters.reset()

    def save(self, last: bool = True) -> None:
        """Take a checkpoint, which the main process writes: while the next steps run where it ``saves_apart``, but for the ``last`` one.
        Raises what ``settle`` raises."""
        self.enter("save", [])
        self.settle()
        apart = self.saves_apart and not last
        write = save_checkpoint(
            self.folder, self.joint, self.engine, self.ema, self.frozen, self.state, self.description(), self.main, apart,
        )  # fmt: skip

        def written() -> None:
            write()
            prune(self.folder, self.config.keep_last, self.config.keep_every)

        self.saved = self.state.step
        if self.main:
            self.writing = self.writer.submit(written)
        if not apart:
            self.settle()

    def settle(self) -> None:
        """Wait until the checkpoint that is being written is whole; every process learns whether it could be. Raises UserError in the
        main process, where it could not. The others leave without a word of their own."""
        failure, writing, self.writing = None, self.writing, None
        try:
            if writing is not None:
                writing.result()
        except UserError as error:
            failure = error
        if any(self.gather([failure is not None])):
            raise failure or SystemExit(2)

    def failed_to_save(self) -> bool:
        """Whether the checkpoint that was being written could not be, so that the next ``settle`` ends the run."""
        return self.writing is not None and self.writing.done() and self.writing.exception() is not None

    def validate(self) -> dict[str, float]:
        """Held-out losses, the grid of pictures and which of their sentences were followed, from the EMA weights; the checkpoint of the
        best by ``keep_best`` is kept."""
        step, validation = self.state.step, self.validation
        self.enter("validate", [])
        with self.ema.applied(), self.autocast():
            models, grid = self.inference(), self.folder / "samples" / f"step_{step:06d}.png"
            record, errors = validation.losses(models, self.teacher)
            scores, drawn = validation.grid(models, grid)
            record |= scores
            if self.config.keep_best == "binding":
                record |= validation.binding(models)
        if self.log is not None and record:
            numbers = "  ".join(f"{key} {value:.4f}" for key, value in record.items())
            self.say(f"stage {self.config.stage}  step {step:>6}  held-out {numbers}")
            self.log.write(step, "validation", record)
        if self.log is not None:
            self.log.show(step, errors, grid, drawn)
        self.best.keep()
        return record

    def finish(self) -> None:
        """Validation and alignment of the finished stage, written to ``summary.json``; done once."""
        path, stage, state = self.folder / SUMMARY, self.config.stage, self.state
        if self.gather([path.exists()])[0]:  # as the main process sees it, which writes it
            self.say(f"stage {stage} is complete at step {state.step}: {self.folder}")
            return
        # Where patience has ended the stage this step's is there.
        record = self.gather([None if self.log is None else self.log.validations.get(state.step)])[0]
        record, alignment = self.validate() if record is None else record, {}
        if self.config.validation.scenes:
            self.enter("validate", [])
            with self.ema.applied(), self.autocast():
                alignment = self.validation.alignment(self.inference())
        if self.log is None:
            return
        summary = {
            "stage": stage, "steps": state.step, "seconds": round(state.seconds, 1), "skipped_steps": state.skipped,
            "validation": record, "alignment": alignment,
        }  # fmt: skip
        if best := self.best.found():
            summary["best"] = {"step": best[0], str(self.config.keep_best): best[1]}
        if best and state.step < self.config.max_steps:
            summary["patience"] = self.config.patience
            self.say(
                f"stage {stage} ends at step {state.step} of {self.config.max_steps}: after step {best[0]} (its {self.config.keep_best} "
                f"is {best[1]:.4f}) {self.config.patience} validations were no better (patience)."
            )
        write_atomic(path, json.dumps(summary, indent=1))
        if alignment and self.validation.scorer is not None:
            shares, text = self.validation.scorer.told(alignment)
            self.log.write(state.step, "alignment", shares)
            self.say(text)
        self.say(f"stage {stage} done: {state.step} steps in {human_time(state.seconds)}, {self.folder}")

    def close(self) -> None:
        """Close the files, and end the watch, unless it was running before and has more to look at."""
        self.writer.shutdown()  # when the checkpoint is whole
        if self._own_watch:
            self.watch.close()
        for file in (self.seen, self.log):
            if file is not None:
                file.close()

    def say(self, text: str) -> None:
        """Tell a person, once and beside the progress bar."""
        if self.main:
            tqdm.write(text)
            sys.stdout.flush()

    def description(self) -> dict[str, Any]:
        """What the next checkpoint says of itself."""
        return describe(self.config, self.state.step, self.encoder.source, self.codec.source)

    def loader(self) -> Loader:
        """Batches from the current step on."""
        data = self.config.data
        settings = LoaderSettings(
            self.config.seed, self.state.step, self.config.max_steps, self.rank, self.processes, self.micro_batches,
            data.caption_dropout, data.max_bad_fraction, data.workers, self.cache,
            tokenize=None if self.inputs.has_text() else self.encoder.tokenize,
        )  # fmt: skip
        if data.streaming:
            return open_stream(data, self.config.batch_size, settings)
        return make_loader(self.plan.index, self.plan, settings)

    def expected_keys(self, micro: int) -> list[str]:
        """The samples that this process is about to read, for whoever looks at it while it waits for them."""
        if self.config.data.streaming:
            return []  # Nobody knows.
        rows, index = self.plan.batch(self.state.step).rows, self.plan.index
        slots = slots_of(self.rank, self.processes, len(rows) // (self.processes * self.micro_batches), micro)
        mine = rows[slots.start : slots.stop : slots.step]
        return [f"{index.shards[index.shard[row]].name}/{index.key(int(row))}" for row in mine]

    def inference(self) -> InferenceModels:
        """The models as the sampler takes them; call within ``ema.applied()``."""
        return InferenceModels(
            joint=self.joint, text_encoder=self.encoder, codec=self.codec, objective=self.joint.objective,
            sampler=self.config.sampler, resolution=self.config.data.resolution, device=self.device, dtype=torch.float32,
            checkpoint=str(self.folder), step=self.state.step, provenance={},
        )  # fmt: skip

    def autocast(self) -> AbstractContextManager[Any]:
        """For what runs outside of the engine, which switches it on for itself: the arithmetic of training."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision != "fp32")

    def gather(self, items: list[Any]) -> list[Any]:
        """Lists of all processes, joined in the order of ranks."""
        found: list[Any] = gather_object(items)
        return found

    def agree(self, loss: Tensor, stop: bool) -> Tensor:
        """The mean of all processes' losses, and the share of them that were asked to stop, [2]; one exchange for both."""
        both = torch.stack([loss, torch.full_like(loss, float(stop))])
        if self.processes > 1:
            torch.distributed.all_reduce(both)
        return both / self.processes


def open_data(config: TrainConfig) -> tuple[SampleIndex, SampleIndex | None]:
    """Indexes of the training and held-out shards."""
    data = config.data
    return open_index(data), None if data.val_shards is None else open_shards(data, data.val_shards, "data.val_shards")


def shared_start(config: TrainConfig, folder: Path, accelerator: Accelerator) -> Start:
    """``find_start``, in the main process alone, since it reads the whole checkpoint for its hash. All processes get, or raise, the
    same."""
    found: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            found = [find_start(config, folder)]
        except UserError as error:
            found = [error]
    broadcast_object_list(found)
    if isinstance(found[0], UserError):
        raise found[0]
    start: Start = found[0]
    return start


def check_same_data(index: SampleIndex, accelerator: Accelerator) -> None:
    """Raise UserError unless all processes found the same samples: each plans by itself, and with another index some
    samples would come twice and others never, without a sign."""
    found = gather_object([index.fingerprint() if accelerator.num_processes > 1 else ""])
    other = next((rank for rank, one in enumerate(found) if one != found[0]), None)
    if other is not None:
        raise UserError(
            f"process {other} found other samples than process 0: make the data the same on all machines, indexes with "
            "tokens (scripts/index_shards.py tokenizer=) among it, leave it alone while a run starts, and start again."
        )


def announcement(trainer: Trainer, start: Start) -> str:
    """What is about to run, for a person."""
    config, plan = trainer.config, trainer.plan
    # ZeRO-3 leaves nothing in a parameter itself.
    sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in trainer.joint.trained().items()}
    lora = sum(size for name, size in sizes.items() if is_adapter(name))
    places = 0 if plan.steps_per_epoch >= 10 else 2
    at_most, size = config.micro_batch_size, at_once(config, trainer.processes)
    return (
        f"stage {config.stage} in {trainer.folder}: {start.told()}, step {trainer.state.step} of {config.max_steps}\n"
        f"  trained: {sum(sizes.values()) / 1e6:.2f} M parameters ({lora / 1e6:.2f} M of them LoRA), "
        f"{config.precision}, {trainer.device.type}, {trainer.engine.kind}, {trainer.processes} process(es) x "
        f"{trainer.micro_batches} micro-batch(es), {torch.get_num_threads()} thread(s) each\n"
        + (
            f"  micro-batches of {size}: micro_batch_size={at_most} does not divide a process's share of batch_size={config.batch_size}\n"
            if at_most and size < min(at_most, size * trainer.micro_batches)
            else ""
        )
        + f"  text: {config.text_encoder.name} ({config.train_text}), {config.conditioning.name} conditioning"
        + (f", alone in the first {trainer.layout_steps} steps" if trainer.layout_steps else "")
        + "\n"
        f"  data: {plan.samples} samples in {len(plan.index.shards)} shards, {plan.steps_per_epoch:.{places}f} steps an epoch, "
        f"buckets {', '.join(f'{w}x{h}' for h, w in plan.bucket_sizes())}"
        + (f"; {plan.left_out} samples without a caption are left out" if plan.left_out else "")
        + "".join(f"; {getattr(plan.index, name)} {said}" for name, said in COUNTS.items() if getattr(plan.index, name))
        + (f"\n  {NOT_RESUMABLE}" if config.data.streaming else "")
        + describe_plan(plan)
        + describe_cache(config, trainer.cache)
        + ("" if torch.cuda.is_available() or config.preset == "nano" else "\n  note: torch finds no GPU here")
    )
