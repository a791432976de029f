"""The one training loop. Stages differ in their configuration only."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from paradiffusion.config import TrainConfig
from paradiffusion.data.loader import Batch, Loader
from paradiffusion.errors import UserError
from paradiffusion.models.joint import LossBatch
from paradiffusion.models.manifest import newest_valid
from paradiffusion.randomness import permutation, seed_from, uniform
from paradiffusion.sampling.processes import REPEAT_SECONDS
from paradiffusion.training.checkpoint import prune, restore_checkpoint, save_checkpoint
from paradiffusion.training.folder import locked, stage_folder
from paradiffusion.training.meters import Log, Meters, human_time, log_line
from paradiffusion.training.optim import schedule, set_learning_rate
from paradiffusion.training.setup import Setup, build, make_accelerator

SUMMARY = "summary.json"
# A loss is compared with its running average only after so many steps, and the average moves by this share a step.
SPIKE_WARMUP, SPIKE_SHARE = 50, 0.02
# Spikes in a row after which skipping is no cure.
MAX_SPIKES = 10


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

    def __call__(self, setup: Setup) -> bool:
        """Whether any process was asked to stop. A launcher that is killed leaves its processes to another parent."""
        self.requested = self.requested or self._parent not in (None, os.getppid())
        return any(setup.gather([self.requested]))


def draw_noise(seed: int, step: int, slots: Tensor, shape: tuple[int, ...], what: str) -> Tensor:
    """Noise [b, *shape], each sample's a function of (seed, step, slot)."""
    generators = [torch.Generator().manual_seed(seed_from(what, seed, step, int(slot))) for slot in slots]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def draw_uniform(seed: int, step: int, slots: Tensor, batch_size: int) -> Tensor:
    """Numbers in [0, 1), [b], spread evenly over the global batch (arXiv 2107.00630, appendix I.1): the loss of a step
    then varies less. Slots are sorted by caption length, so which slot gets which part is shuffled."""
    places = permutation(batch_size, "times", seed, step)[slots.numpy()]
    return torch.from_numpy((uniform("times", seed, step) + places) / batch_size % 1)


def prepare(setup: Setup, batch: Batch, meters: Meters) -> LossBatch:
    """Images and captions to latents, noise, times and conditioning."""
    config, device = setup.config, setup.accelerator.device
    shape = setup.codec.latent_shape(*batch.images.shape[-2:])
    noise = draw_noise(config.seed, batch.step, batch.slots, shape, "noise")
    u = draw_uniform(config.seed, batch.step, batch.slots, config.batch_size)
    posterior = draw_noise(config.seed, batch.step, batch.slots, shape, "posterior") if config.codec.sample else None
    latents = setup.codec.encode(batch.images.to(device), None if posterior is None else posterior.to(device))
    tokens = setup.encoder.tokenize(batch.captions)
    meters.tokens += int(tokens.mask.sum())
    meters.truncated += tokens.truncated
    meters.samples += len(batch.captions)
    meters.bad += len(batch.bad)
    tokens = tokens.to(device)
    common: dict[str, Any] = {
        "latents": latents,
        "noise": noise.to(device),
        "times": setup.joint.objective.times(u).to(device),
        "weights": batch.weights.to(device),
        "mask": setup.encoder.feature_mask(tokens),
    }
    if setup.joint.text_encoder is not None:
        return LossBatch(**common, ids=tokens.ids, id_mask=tokens.mask, prefix=tokens.prefix)
    with torch.no_grad():
        return LossBatch(**common, features=setup.encoder(tokens.ids, tokens.mask, tokens.prefix))


def train(config: TrainConfig) -> int:
    """Run a stage from where it stands to ``max_steps``; 0 when it is done or was asked to stop and saved.

    Raises:
        UserError: for what a user can mend; whatever was saved before stays.
    """
    parent = os.getppid()
    accelerator = make_accelerator(config)
    folder = stage_folder(config)
    with locked(folder) if accelerator.is_main_process else nullcontext():
        setup = build(config, folder, accelerator)
        stop = Stop(parent)
        log = Log(folder, config, setup.description(), setup.state.step) if accelerator.is_main_process else None
        loader = setup.loader()
        try:
            finished = run_steps(setup, loader, stop, log)
            if finished:
                finish(setup, log)
        finally:
            loader.close()
            if log is not None:
                log.close()
            if accelerator.num_processes > 1:
                torch.distributed.destroy_process_group()
    return 0


def run_steps(setup: Setup, loader: Loader, stop: Stop, log: Log | None) -> bool:
    """The loop itself; False when it was asked to stop before the end."""
    config, state, meters = setup.config, setup.state, Meters()
    saved_at, spikes = state.step, 0
    if state.step < config.max_steps:
        (setup.folder / SUMMARY).unlink(missing_ok=True)
    bar = tqdm(total=config.max_steps, initial=state.step, unit="step", desc=f"stage {config.stage}",
               disable=None if log else True, dynamic_ncols=True)  # fmt: skip
    while state.step < config.max_steps:
        began = time.monotonic()
        set_learning_rate(setup.optimizer, schedule(config.optimizer, state.step, config.max_steps))
        loss, norm, keys = step_gradients(setup, loader, meters)
        fault = find_spike(setup, loss, norm)
        if fault is None:
            spikes = 0
            setup.optimizer.step()
            setup.ema.update(state.step)
            typical = loss if state.typical_loss is None else state.typical_loss
            state.typical_loss = typical + SPIKE_SHARE * (loss - typical)
        else:
            spikes += 1
            handle_spike(setup, fault, keys, spikes, bar.write)
        setup.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.seconds += time.monotonic() - began
        meters.steps += 1
        meters.gradient += norm if math.isfinite(norm) else 0.0
        bar.update()
        if state.step % config.log_every == 0 or state.step == config.max_steps:
            report(setup, meters, log, bar.write)
        stopping = stop(setup)
        if state.step % config.checkpoint_every == 0 or state.step == config.max_steps or stopping:
            save(setup)
            saved_at = state.step
        if stopping and state.step < config.max_steps:
            bar.close()
            if log is not None:
                print(f"stopped at step {saved_at}, which is saved; run the same command again to go on.", flush=True)
            return False
        if state.step % config.validate_every == 0 and state.step < config.max_steps:
            validate(setup, log, bar.write)
            meters.started = time.monotonic() if not meters.steps else meters.started
    bar.close()
    return True


def step_gradients(setup: Setup, loader: Loader, meters: Meters) -> tuple[float, float, list[str]]:
    """Accumulate one global batch's gradients: its loss, the gradient norm before clipping, and this process's keys."""
    config, keys, total = setup.config, [], 0.0
    for micro in range(setup.micro_batches):
        waiting = time.monotonic()
        batch = next(loader)
        meters.waited += time.monotonic() - waiting
        keys += batch.keys
        inputs = prepare(setup, batch, meters)
        last = micro == setup.micro_batches - 1
        with nullcontext() if last else setup.accelerator.no_sync(setup.model):
            loss, errors = setup.model(inputs)
            setup.accelerator.backward(loss / setup.micro_batches)
        total += loss.item() / setup.micro_batches
        share = inputs.times / setup.joint.objective.config.train_timesteps
        good = batch.weights > 0
        words = [count for count, ok in zip(batch.words, good.tolist(), strict=True) if ok]
        meters.add_errors(errors.cpu()[good], share.cpu()[good], words)
    norm = torch.nn.utils.clip_grad_norm_(setup.ema.parameters.values(), config.optimizer.max_grad_norm)
    losses = setup.gather([total])
    return sum(losses) / len(losses), float(norm), keys


def find_spike(setup: Setup, loss: float, norm: float) -> str | None:
    """What is wrong with this step's loss or gradient, or None."""
    typical = setup.state.typical_loss
    if not math.isfinite(loss) or not math.isfinite(norm):
        return f"the loss is {loss} and the gradient norm {norm}"
    if typical is not None and setup.state.step >= SPIKE_WARMUP and loss > setup.config.spike_factor * typical:
        return f"the loss is {loss:.4g}, over {setup.config.spike_factor:g} times its average of {typical:.4g}"
    return None


def handle_spike(setup: Setup, fault: str, keys: list[str], spikes: int, say: Callable[[str], None]) -> None:
    """Stop, skip the update, or go back to the last checkpoint's weights and on with the next data."""
    state, config = setup.state, setup.config
    every = setup.gather(keys)
    named = ", ".join(every[:8]) + (f" and {len(every) - 8} more" if len(every) > 8 else "")
    where = f"step {state.step}: {fault} (samples {named})"
    checkpoint, _ = newest_valid(setup.folder)
    kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
    if config.on_spike == "stop" or spikes > MAX_SPIKES or (config.on_spike == "rollback" and checkpoint is None):
        raise UserError(
            f"{where}; {kept}; look at these samples, lower optimizer.lr, or set on_spike=skip or on_spike=rollback."
        )
    if config.on_spike == "skip":
        state.skipped.append(state.step)
        say(f"{where}; its update is skipped.")
        return
    assert checkpoint is not None
    restored = restore_checkpoint(checkpoint, setup.joint, setup.ema, setup.optimizer)
    # The data between is left out as well: seen again from the same weights it would end in the same spike.
    state.skipped = [*restored.skipped, *range(restored.step, state.step + 1)]
    state.typical_loss = restored.typical_loss
    say(f"{where}; going on from the weights of {checkpoint} with the data after it.")


def report(setup: Setup, meters: Meters, log: Log | None, say: Callable[[str], None]) -> None:
    """Reduce the meters over all processes, write the line and the record, and start anew."""
    gathered = setup.gather([meters.export()])
    if log is not None:
        record = meters.summary(gathered)
        record["learning_rate"] = setup.optimizer.param_groups[0]["lr"]
        record["images_seen"] = setup.state.step * setup.config.batch_size
        say(log_line(setup.config, setup.state.step, record))
        log.write(setup.state.step, "train", record)
    meters.reset()


def save(setup: Setup) -> None:
    """Write a checkpoint from the main process; the others wait."""
    if setup.accelerator.is_main_process:
        save_checkpoint(
            setup.folder, setup.joint, setup.ema, setup.frozen, setup.optimizer, setup.state, setup.description()
        )
        prune(setup.folder, setup.config.keep_last, setup.config.keep_every)
    setup.accelerator.wait_for_everyone()


def validate(setup: Setup, log: Log | None, say: Callable[[str], None]) -> dict[str, float]:
    """Held-out losses and the grid of pictures, from the EMA weights."""
    device, step = setup.accelerator.device, setup.state.step
    with setup.ema.applied():
        record = setup.validation.losses(setup.joint, setup.encoder, setup.codec, device)
        if setup.config.validation.images:
            setup.validation.grid(setup.inference(), setup.folder / "samples" / f"step_{step:06d}.png")
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
    if path.exists():
        if log is not None:
            print(f"stage {setup.config.stage} is complete at step {setup.state.step}: {setup.folder}", flush=True)
        return
    record = validate(setup, log, lambda line: print(line, flush=True))
    alignment: dict[str, Any] = {}
    if setup.config.validation.scenes:
        with setup.ema.applied():
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
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(summary, indent=1))
    temporary.replace(path)
    if alignment:
        drawn = alignment["drawn"]["colour_at_place"]
        log.write(setup.state.step, "alignment", {key: value["share"] for key, value in alignment["drawn"].items()})
        print(
            f"right colour at the right place: {drawn['share']:.1%} of {drawn['n']} objects (chance "
            f"{alignment['chance']['colour_at_place']:.1%}, true pictures {alignment['true']['colour_at_place']['share']:.1%})"
        )
    print(
        f"stage {setup.config.stage} done: {setup.state.step} steps in {human_time(setup.state.seconds)}, {setup.folder}"
    )
