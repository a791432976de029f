"""Losses that explode: noticed before the update, and answered by stopping, skipping or going back."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from paradiffusion.checkpoints.manifest import newest_valid
from paradiffusion.checks import overflow
from paradiffusion.errors import UserError
from paradiffusion.training.folder import restore_checkpoint
from paradiffusion.training.log import Meters
from paradiffusion.training.step_record import PAGE, Replay, facts_of, has_pixels, read_again, samples_of, write_images, write_replay

if TYPE_CHECKING:
    from paradiffusion.training.trainer import MicroBatch, Trainer

# A loss is compared with its running average only after so many steps, and the average moves by this share a step.
SPIKE_WARMUP, SPIKE_SHARE = 50, 0.02
# Spikes in a row after which skipping is no cure.
MAX_SPIKES = 10
# Pages that are written by themselves in a stage's folder: what diverges would else fill the disk with them.
MAX_PAGES = 5


class Spikes:
    """Looks at each step's loss and gradient, and answers for those that are none."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.in_a_row = 0

    def limit(self) -> float:
        """The largest loss that is none."""
        state, begun = self.trainer.state, self.trainer.layout_steps  # with the denoiser another loss begins
        known = state.typical_loss is not None and state.step >= begun + SPIKE_WARMUP
        return self.trainer.config.spike_factor * state.typical_loss if known else math.inf  # type: ignore[operator]

    def sees(self, loss: Tensor, norm: Tensor | None) -> Tensor:
        """Whether ``find`` will find something, a bool scalar on the device, which nobody has to wait for."""
        unfit = ~loss.isfinite() | (loss > self.limit())
        return unfit if norm is None else unfit | ~norm.isfinite()

    def find(self, loss: float, norm: float | None) -> str | None:
        """What is wrong with this step's loss or gradient (norm None: nobody knows), or None."""
        if not math.isfinite(loss) or (norm is not None and not math.isfinite(norm)):
            return f"the loss is {loss} and the gradient norm {'unknown' if norm is None else norm}"
        if loss > self.limit():
            factor, typical = self.trainer.config.spike_factor, self.trainer.state.typical_loss
            return f"the loss is {loss:.4g}, over {factor:g} times its average of {typical:.4g}"
        return None

    def answer(self, fault: str | None, loss: float, taken: list[MicroBatch]) -> None:
        """Take a good step's loss into the average; of another stop, skip the update, or go back to the last checkpoint's
        weights and on with the next data. Raises UserError where the run ends here."""
        trainer, state, config = self.trainer, self.trainer.state, self.trainer.config
        if fault is None:
            self.in_a_row, typical = 0, state.typical_loss
            if typical is None or state.step <= trainer.layout_steps:
                typical = loss
            state.typical_loss = typical + SPIKE_SHARE * (loss - typical)
            return
        if not math.isfinite(loss):
            check_inputs(trainer, taken)
        self.in_a_row += 1
        keys = trainer.gather([key for batch, _, _ in taken for key in batch.keys])
        named = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
        page = write_spike_page(trainer, fault, taken)
        shown = f"; {page} shows them" if page else ""
        where = f"step {state.step}: {fault} (samples {named}{shown})"
        trainer.settle()  # a checkpoint that is being written is the newest
        checkpoint, _ = newest_valid(trainer.folder)
        if config.on_spike == "skip" and self.in_a_row <= MAX_SPIKES:
            state.skipped.append(state.step)
            trainer.say(f"{where}; its update is skipped.")
        elif config.on_spike == "rollback" and self.in_a_row <= MAX_SPIKES and checkpoint is not None:
            restored = restore_checkpoint(checkpoint, trainer.joint, trainer.engine, trainer.ema)
            # The data between is left out as well: seen again from the same weights it would end in the same spike.
            state.skipped = [*restored.skipped, *range(restored.step, state.step + 1)]
            state.typical_loss = restored.typical_loss
            trainer.say(f"{where}; going on from the weights of {checkpoint} with the data after it.")
        else:
            kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
            raise UserError(f"{where}; {kept}; look at these samples, lower optimizer.lr, or set on_spike=skip or on_spike=rollback.")


def check_inputs(trainer: Trainer, taken: list[MicroBatch]) -> None:
    """Raise UserError in all processes where it is a frozen model's numbers that have overflowed in one of them: no rate and no
    skipping helps against that."""
    parts = {"latents": ("the latents that the autoencoder encodes", "codec.dtype"),
             "features": ("the features of the language model", "text_encoder.dtype")}  # fmt: skip
    inputs = [trainer.inputs(batch, Meters()) for batch, _, _ in taken]
    made = [(name, getattr(one, name)) for one in inputs for name in parts]
    if lost := trainer.gather([name for name, values in made if values is not None and not values.isfinite().all()]):
        whose, key = parts[lost[0]]
        raise overflow(f"step {trainer.state.step}: {whose}", key)


def write_spike_page(trainer: Trainer, fault: str, taken: list[MicroBatch]) -> Path | None:
    """Show the step that has just been computed, as a replay, from what is in memory; its page, where there is one.

    Every process calls this: each writes the pictures of its own samples, the main one the page. Whatever goes wrong is a
    warning, since the answer to the spike matters more.
    """
    step, error = trainer.state.step, ""
    folder = trainer.folder / "replay" / f"step_{step:06d}" / "spike"
    written = sum(1 for _ in trainer.folder.glob(f"replay/step_*/spike/{PAGE}")) if trainer.main else 0
    if trainer.gather([written])[0] >= MAX_PAGES:  # as the main process sees it: all of them must go the same way
        return None
    parts: list[Any] = []
    try:
        again = read_again(trainer.config, trainer.plan, step, trainer.rank, trainer.processes, trainer.micro_batches)
        for batch, times, losses in taken:
            if not has_pixels(batch):  # of cached latents; shards that are gone leave the page without them
                with suppress(UserError, OSError, StopIteration):
                    pictured = next(again)  # where a sample cannot be read, another may stand in its slot
                    batch = replace(batch, pixels=pictured.pixels) if pictured.keys == batch.keys else batch
            errors = losses.errors.cpu()
            parts += samples_of(batch, trainer.rank, times.cpu(), errors, trainer.inputs, trainer.plan)
            write_images(folder, batch)
    except Exception as caught:  # Of a page that nobody asked for nothing may end a run.
        error = f"{type(caught).__name__}: {caught}"
    samples = trainer.gather(parts)  # pictures only as thumbnails, some kilobytes each
    if trainer.main:
        try:
            facts = {"loss": fault, "losses": "of the weights as they were in this step"}
            facts |= facts_of(samples, trainer.processes, trainer.micro_batches)
            title = f"loss spike at step {step} of {trainer.folder.parent.name}/{trainer.folder.name}"
            verdict = "Written by the run itself, from the samples that it had in memory"
            verdict += "; the pictures of cached latents were read again." if trainer.cache is not None else "."
            return write_replay(folder, Replay(title, step, facts, verdict, "identical", samples))
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}"
    if error:
        trainer.say(f"warning: the page of step {step} could not be written ({error.splitlines()[0]}).")
    return None
