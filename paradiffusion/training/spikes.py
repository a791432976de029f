"""Losses that explode: noticed before the update, and answered by stopping, skipping or going back."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paradiffusion.checkpoints.manifest import newest_valid
from paradiffusion.errors import UserError
from paradiffusion.training.checkpoint import restore_checkpoint
from paradiffusion.training.setup import Setup
from paradiffusion.training.step_record import (
    PAGE,
    Replay,
    mean_loss,
    samples_of,
    with_pictures,
    write_images,
    write_replay,
)

# A loss is compared with its running average only after so many steps, and the average moves by this share a step.
SPIKE_WARMUP, SPIKE_SHARE = 50, 0.02
# Spikes in a row after which skipping is no cure.
MAX_SPIKES = 10
# Pages that are written by themselves in a stage's folder: what diverges would else fill the disk with them.
MAX_PAGES = 5


def find_spike(setup: Setup, loss: float, norm: float | None) -> str | None:
    """What is wrong with this step's loss or gradient (norm None: not known yet), or None."""
    typical = setup.state.typical_loss
    if not math.isfinite(loss) or (norm is not None and not math.isfinite(norm)):
        return f"the loss is {loss} and the gradient norm {'unknown' if norm is None else norm}"
    if typical is not None and setup.state.step >= SPIKE_WARMUP and loss > setup.config.spike_factor * typical:
        return f"the loss is {loss:.4g}, over {setup.config.spike_factor:g} times its average of {typical:.4g}"
    return None


def follow_loss(setup: Setup, loss: float) -> None:
    """Take the loss of a good step into the average that spikes are measured against."""
    typical = loss if setup.state.typical_loss is None else setup.state.typical_loss
    setup.state.typical_loss = typical + SPIKE_SHARE * (loss - typical)


def handle_spike(setup: Setup, fault: str, keys: list[str], spikes: int, say: Callable[[str], None]) -> None:
    """Stop, skip the update, or go back to the last checkpoint's weights and on with the next data."""
    state, config = setup.state, setup.config
    every = setup.gather(keys)
    named = ", ".join(every[:8]) + (f" and {len(every) - 8} more" if len(every) > 8 else "")
    page = write_spike_page(setup, fault, say)
    shown = f"; {page} shows them" if page else ""
    where = f"step {state.step}: {fault} (samples {named}{shown})"
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
    restored = restore_checkpoint(checkpoint, setup.joint, setup.engine, setup.ema)
    # The data between is left out as well: seen again from the same weights it would end in the same spike.
    state.skipped = [*restored.skipped, *range(restored.step, state.step + 1)]
    state.typical_loss = restored.typical_loss
    say(f"{where}; going on from the weights of {checkpoint} with the data after it.")


def write_spike_page(setup: Setup, fault: str, say: Callable[[str], None]) -> Path | None:
    """Show the step that has just been computed, as a replay, from what is in memory; its page, where there is one.

    Every process calls this: each writes the pictures of its own samples, the main one the page. Whatever goes wrong is a
    warning, since the answer to the spike matters more.
    """
    folder = setup.folder / "replay" / f"step_{setup.state.step:06d}" / "spike"
    main = setup.accelerator.is_main_process
    written = sum(1 for _ in setup.folder.glob(f"replay/step_*/spike/{PAGE}")) if main else 0
    if setup.gather([written])[0] >= MAX_PAGES:  # as the main process sees it: all of them must go the same way
        return None
    config, error = setup.config, ""
    parts: list[Any] = []
    try:
        for errors, times, taken in setup.measured:
            batch = with_pictures(taken, setup.plan)
            parts += samples_of(
                batch, setup.accelerator.process_index, times.cpu(), errors.cpu(), setup.encoder, setup.plan,
                config.objective.train_timesteps, config.data.caption_dropout,
            )  # fmt: skip
            write_images(folder, batch)
    except Exception as caught:  # Of a page that nobody asked for nothing may end a run.
        error = f"{type(caught).__name__}: {caught}"
    samples = setup.gather(parts)  # pictures only as thumbnails, some kilobytes each
    if main:
        try:
            step, processes = setup.state.step, setup.accelerator.num_processes
            facts = {
                "loss": fault,
                "mean loss": mean_loss(samples),
                "losses": "of the weights as they were in this step",
                "samples": f"{len(samples)}, over {processes} process(es) x {setup.micro_batches} micro-batch(es)",
                "captions dropped": sum(sample.dropped for sample in samples),
                "unreadable": sum(not sample.weight for sample in samples),
            }
            title = f"loss spike at step {step} of {setup.folder.parent.name}/{setup.folder.name}"
            verdict = "Written by the run itself, from the samples that it had in memory"
            verdict += "; the pictures of cached latents were read again." if setup.cache is not None else "."
            return write_replay(folder, Replay(title, step, facts, verdict, "identical", samples))
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}"
    if error:
        say(f"warning: the page of step {setup.state.step} could not be written ({error.splitlines()[0]}).")
    return None
