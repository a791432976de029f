"""The one training loop. Stages differ in their configuration only."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from paradiffusion.atomic import write_atomic
from paradiffusion.config import TrainConfig
from paradiffusion.data.cache import Entry
from paradiffusion.data.loader import Batch, Loader
from paradiffusion.errors import UserError
from paradiffusion.models.joint import LossBatch
from paradiffusion.randomness import permutation, seed_from, uniform
from paradiffusion.sampling.run import REPEAT_SECONDS
from paradiffusion.training.cached_inputs import latent_shape, latents_of, on_device, stored_text
from paradiffusion.training.checkpoint import prune, save_checkpoint
from paradiffusion.training.folder import locked, stage_folder
from paradiffusion.training.meters import Log, Meters, human_time, log_line, mixture_line
from paradiffusion.training.optim import schedule, set_learning_rate
from paradiffusion.training.processes import make_accelerator
from paradiffusion.training.setup import Setup, build
from paradiffusion.training.spikes import find_spike, follow_loss, handle_spike
from paradiffusion.training.step_record import line_of
from paradiffusion.training.validation import Scorer
from paradiffusion.training.watch import Watch, together

SUMMARY = "summary.json"


class Stop:
    """Notices SIGTERM, Ctrl-C and a launcher that died; a second Ctrl-C after two seconds interrupts at once.

    Args:
        parent: the process that started this one, asked for before the models were loaded, which may take minutes.
    """

    def __init__(self, parent: int) -> None:
        self.requested = False
        self._came_at: float | None = None
        # Without a launcher another parent means only that its shell has gone: "nohup python train.py &" goes on.
        self._parent = parent if {"LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys() else None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._notice)

    def _notice(self, number: int, _frame: Any) -> None:
        now = time.monotonic()
        # Launchers pass Ctrl-C on to processes that the terminal has told already: that is not a second one.
        if self._came_at is not None and number == signal.SIGINT and now - self._came_at > REPEAT_SECONDS:
            raise KeyboardInterrupt
        self._came_at = self._came_at or now
        self.requested = True

    def __call__(self) -> bool:
        """Whether this process was asked to stop. A launcher that is killed leaves its processes to another parent."""
        self.requested = self.requested or self._parent not in (None, os.getppid())
        return self.requested


def draw_noise(seed: int, step: int, slots: Tensor, shape: tuple[int, ...], what: str, repeats: int = 1) -> Tensor:
    """Noise [repeats * b, *shape], the first repeat of all samples first: a function of (seed, step, slot, repeat)."""
    parts = [(int(slot), repeat) if repeat else (int(slot),) for repeat in range(repeats) for slot in slots]
    generators = [torch.Generator().manual_seed(seed_from(what, seed, step, *part)) for part in parts]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def draw_uniform(seed: int, step: int, slots: Tensor, batch_size: int, repeats: int = 1) -> Tensor:
    """Numbers in [0, 1), [repeats * b], spread evenly over the global batch (arXiv 2107.00630, appendix I.1): the loss of a
    step then varies less. Slots are sorted by caption length, so which slot gets which part is shuffled."""
    count = batch_size * repeats
    order = permutation(count, "times", seed, step)
    places = np.concatenate([order[slots.numpy() + batch_size * repeat] for repeat in range(repeats)])
    return torch.from_numpy((uniform("times", seed, step) + places) / count % 1)


def weight_of_readable(batches: list[Batch], setup: Setup) -> Tensor:
    """By what a step's weights are multiplied so that their mean over the global batch is 1: the mean of the weighted losses is
    then that over the readable samples, in whichever process and micro-batch the others are."""
    readable = torch.stack([batch.weights.sum() for batch in batches]).sum().to(setup.accelerator.device)
    if setup.accelerator.num_processes > 1:
        torch.distributed.all_reduce(readable)
    return setup.config.batch_size / readable.clamp_min(1)


def prepare(setup: Setup, batch: Batch, meters: Meters) -> LossBatch:
    """Images and captions, or what is cached of them, to latents, noise, times and conditioning."""
    config, device = setup.config, setup.accelerator.device
    shape = latent_shape(setup.codec, batch)
    noise = draw_noise(config.seed, batch.step, batch.slots, shape, "noise", config.repeats)
    u = draw_uniform(config.seed, batch.step, batch.slots, config.batch_size, config.repeats)
    posterior = draw_noise(config.seed, batch.step, batch.slots, shape, "posterior") if config.codec.sample else None
    common: dict[str, Any] = {
        "latents": latents_of(setup.codec, batch, posterior, device, setup.memory),
        "noise": noise.to(device),
        "times": setup.joint.objective.times(u, shape[1:]).to(device),
        "weights": batch.weights.to(device),
        "told": torch.tensor([bool(caption) for caption in batch.captions], device=device),
    }
    meters.samples += len(batch.captions)
    meters.bad += len(batch.bad)
    made = made_text(setup, batch)
    if made is not None:
        text = stored_text(setup.encoder, made, batch.captions, device)
        meters.tokens += text.tokens
        meters.truncated += text.truncated
        return LossBatch(**common, mask=text.mask, features=text.features)
    # Equal captions, above all the dropped ones, which are empty, go through the language model once.
    different = {caption: row for row, caption in enumerate(dict.fromkeys(batch.captions))}
    rows = torch.tensor([different[caption] for caption in batch.captions])
    tokens = setup.encoder.tokenize(list(different))
    limit = setup.encoder.limit
    meters.tokens += int(tokens.mask[rows].sum())
    meters.truncated += sum(tokens.lengths[row] > limit for row in rows.tolist())
    tokens, rows = tokens.to(device), rows.to(device)
    mask = setup.encoder.feature_mask(tokens)
    common["mask"] = None if mask is None else mask[rows]
    if setup.joint.text_encoder is not None:
        return LossBatch(**common, ids=tokens.ids, id_mask=tokens.mask, prefix=tokens.prefix, rows=rows)
    with torch.no_grad():
        encoder = on_device(setup.encoder, device)
        return LossBatch(**common, features=encoder(tokens.ids, tokens.mask, tokens.prefix)[rows])


def made_text(setup: Setup, batch: Batch) -> Callable[[str, int], Entry] | None:
    """Where the features of the batch's captions are to be had without running the language model on all of them, if anywhere."""
    stored, null, memory = batch.stored, setup.cache.null if setup.cache else None, setup.memory
    if stored is not None and null is not None:
        return lambda caption, slot: stored.text(slot) if caption else null
    if memory is not None and setup.joint.text_encoder is None:
        found = memory.texts(batch.captions)
        return lambda caption, _: found[caption]
    return None


def train(config: TrainConfig, scorer: Scorer | None = None) -> int:
    """Run a stage from where it stands to ``max_steps``; 0 when it is done or was asked to stop and saved.

    Args:
        scorer: judges the pictures that validation draws, where somebody can.
    Raises:
        UserError: for what a user can mend; whatever was saved before stays.
    """
    parent = os.getppid()
    accelerator = make_accelerator(config)
    folder = stage_folder(config)
    watch = Watch(accelerator.process_index, accelerator.num_processes, config.stall_seconds)
    with together(watch), locked(folder) if accelerator.is_main_process else nullcontext():
        setup = build(config, folder, accelerator, watch=watch, scorer=scorer)
        stop = Stop(parent)
        log = Log(folder, config, setup.description(), setup.state.step) if accelerator.is_main_process else None
        loader = setup.loader()
        try:
            finished = run_steps(setup, loader, stop, log)
            if finished:
                finish(setup, log)
        finally:
            loader.close()
            if loader.report.bad:
                print(f"process {accelerator.process_index}: {loader.report.summary()}", flush=True)
            if log is not None:
                log.close()
        setup.close()
    if (
        accelerator.num_processes > 1
    ):  # not after an error: who waits inside a collective operation is not there for this
        torch.distributed.destroy_process_group()
    return 0


def run_steps(setup: Setup, loader: Loader, stop: Stop, log: Log | None) -> bool:
    """The loop itself; False when it was asked to stop before the end."""
    config, state, engine, meters = setup.config, setup.state, setup.engine, Meters()
    saved_at, spikes = state.step, 0
    if state.step < config.max_steps and log is not None:
        (setup.folder / SUMMARY).unlink(missing_ok=True)
    bar = tqdm(total=config.max_steps, initial=state.step, unit="step", desc=f"stage {config.stage}",
               disable=None if log else True, dynamic_ncols=True)  # fmt: skip
    say = bar.write if log is not None else lambda _: None
    while state.step < config.max_steps:
        began = time.monotonic()
        set_learning_rate(engine.optimizer, schedule(config.optimizer, state.step, config.max_steps))
        loss, norm, keys, stopping = step_gradients(setup, loader, meters, stop)
        fault = find_spike(setup, loss, norm)
        if fault is None:
            setup.watch.beat("update", state.step)
            told = engine.update()
            norm = told if norm is None else norm
            fault = find_spike(setup, loss, norm) if told is not None else None
        if fault is None:
            spikes = 0
            setup.ema.update(state.step)
            follow_loss(setup, loss)
        else:
            spikes += 1
            handle_spike(setup, fault, keys, spikes, say)
        engine.discard()
        state.step += 1
        state.seconds += time.monotonic() - began
        meters.steps += 1
        meters.gradient += norm if norm is not None and math.isfinite(norm) else 0.0
        bar.update()
        if state.step % config.log_every == 0 or state.step == config.max_steps:
            report(setup, meters, log, say)
        if state.step % config.checkpoint_every == 0 or state.step == config.max_steps or stopping:
            save(setup)
            saved_at = state.step
        if stopping and state.step < config.max_steps:
            bar.close()
            if log is not None:
                print(f"stopped at step {saved_at}, which is saved; run the same command again to go on.", flush=True)
            return False
        if state.step % config.validate_every == 0 and state.step < config.max_steps:
            validate(setup, log, say)
            meters.started = time.monotonic() if not meters.steps else meters.started
    bar.close()
    return True


def step_gradients(
    setup: Setup, loader: Iterator[Batch], meters: Meters, stop: Callable[[], bool] = lambda: False
) -> tuple[float, float | None, list[str], bool]:
    """Accumulate one global batch's gradients.

    Returns:
        The loss over all processes, the gradient norm before clipping (None where only the update tells), this
        process's keys, and whether any process was asked to stop.
    """
    config, engine, watch, step = setup.config, setup.engine, setup.watch, setup.state.step
    keys: list[str] = []
    total = torch.zeros((), device=setup.accelerator.device)
    measured, layouts, batches = [], [], []
    for micro in range(setup.micro_batches):
        watch.beat("data", step, setup.expected_keys(step, micro))
        waiting = time.monotonic()
        batches.append(next(loader))
        meters.waited += time.monotonic() - waiting
    scale = weight_of_readable(batches, setup)
    for micro, batch in enumerate(batches):
        keys += batch.keys
        watch.beat("encode", step, batch.keys)
        inputs = prepare(setup, batch, meters)
        inputs = replace(inputs, weights=inputs.weights * scale)
        watch.beat("forward", step)
        with engine.accumulating(micro == setup.micro_batches - 1):
            losses = setup.engine.model(inputs)
            watch.beat("backward", step)
            engine.backward(losses.total)
        total += losses.diffusion / setup.micro_batches
        measured.append((losses.errors, inputs.times, batch))
        layouts.append(losses.layout)
    norm = engine.clip()
    watch.beat("wait", step)
    mean, stopping = setup.agree(total, stop())
    # Read only now: each look at a GPU's numbers waits for all that was asked of it.
    for errors, times, batch in measured:
        good = batch.weights > 0
        words = [count for count, ok in zip(batch.words, good.tolist(), strict=True) if ok]
        share = times.cpu() / setup.joint.objective.config.train_timesteps
        every = good.repeat(config.repeats)
        meters.add_errors(errors.cpu()[every], share[every], words * config.repeats)
        if not setup.config.data.streaming:  # Where another order than the plan's comes.
            meters.choices += setup.plan.choices(step, batch.slots[good].numpy())
    if setup.key_log is not None:
        rank, world = setup.accelerator.process_index, setup.accelerator.num_processes
        setup.key_log.write(line_of(step, rank, world, [batch for _, _, batch in measured]))
        setup.key_log.flush()
    meters.layouts += [float(layout) for layout in layouts if layout is not None]
    setup.measured = measured
    return mean, norm, keys, stopping


def report(setup: Setup, meters: Meters, log: Log | None, say: Callable[[str], None]) -> None:
    """Reduce the meters over all processes, write the line and the record, and start anew."""
    gathered = setup.gather([meters.export()])
    if log is not None:
        record = meters.summary(gathered)
        record["learning_rate"] = setup.engine.optimizer.param_groups[0]["lr"]
        record["images_seen"] = setup.state.step * setup.config.batch_size
        say(log_line(setup.config, setup.state.step, record))
        if mixed := mixture_line(record):
            say(mixed)
        log.write(setup.state.step, "train", record)
    meters.reset()


def save(setup: Setup) -> None:
    """Write a checkpoint; the main process writes, and every process learns whether it could.

    Raises:
        UserError: in the main process, where it could not. The others leave without a word of their own.
    """
    main = setup.accelerator.is_main_process
    setup.watch.beat("save", setup.state.step, [])
    failure = None
    try:
        save_checkpoint(
            setup.folder, setup.joint, setup.engine, setup.ema, setup.frozen, setup.state, setup.description(), main
        )
        if main:
            prune(setup.folder, setup.config.keep_last, setup.config.keep_every)
    except UserError as error:
        failure = error
    if any(setup.gather([failure is not None])):
        raise failure or SystemExit(2)


def validate(setup: Setup, log: Log | None, say: Callable[[str], None]) -> dict[str, float]:
    """Held-out losses, the grid of pictures and which of their sentences were followed, from the EMA weights."""
    device, step = setup.accelerator.device, setup.state.step
    setup.watch.beat("validate", step, [])
    with setup.ema.applied(), setup.autocast():
        record = setup.validation.losses(setup.joint, setup.encoder, setup.codec, device)
        if setup.config.validation.images:
            record |= setup.validation.grid(setup.inference(), setup.folder / "samples" / f"step_{step:06d}.png")
    if log is not None and record:
        say(
            f"stage {setup.config.stage}  step {step:>6}  held-out "
            + "  ".join(f"{k} {v:.4f}" for k, v in record.items())
        )
        log.write(step, "validation", record)
    return record


def finish(setup: Setup, log: Log | None) -> None:
    """Validation and alignment of the finished stage, written to ``summary.json``; done once."""
    path: Path = setup.folder / SUMMARY
    if setup.gather([path.exists()])[0]:  # as the main process sees it, which writes it
        if log is not None:
            print(f"stage {setup.config.stage} is complete at step {setup.state.step}: {setup.folder}", flush=True)
        return
    record = validate(setup, log, lambda line: print(line, flush=True))
    alignment: dict[str, Any] = {}
    if setup.config.validation.scenes:
        setup.watch.beat("validate", setup.state.step, [])
        with setup.ema.applied(), setup.autocast():
            alignment = setup.validation.alignment(setup.inference())
    if log is None:
        return
    summary = {
        "stage": setup.config.stage,
        "steps": setup.state.step,
        "seconds": round(setup.state.seconds, 1),
        "skipped_steps": setup.state.skipped,
        "validation": record,
        "alignment": alignment,
    }
    write_atomic(path, json.dumps(summary, indent=1))
    if alignment and setup.validation.scorer is not None:
        shares, text = setup.validation.scorer.told(alignment)
        log.write(setup.state.step, "alignment", shares)
        print(text)
    print(
        f"stage {setup.config.stage} done: {setup.state.step} steps in {human_time(setup.state.seconds)}, {setup.folder}"
    )
