"""Losses that explode: noticed before the update, and answered by stopping, skipping or going back."""

from __future__ import annotations

import math
from collections.abc import Callable

from paradiffusion.errors import UserError
from paradiffusion.models.manifest import newest_valid
from paradiffusion.training.checkpoint import restore_checkpoint
from paradiffusion.training.setup import Setup

# A loss is compared with its running average only after so many steps, and the average moves by this share a step.
SPIKE_WARMUP, SPIKE_SHARE = 50, 0.02
# Spikes in a row after which skipping is no cure.
MAX_SPIKES = 10


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
    setup.engine.discard()  # before the weights come back, which under ZeRO this may change
    restored = restore_checkpoint(checkpoint, setup.joint, setup.engine, setup.ema)
    # The data between is left out as well: seen again from the same weights it would end in the same spike.
    state.skipped = [*restored.skipped, *range(restored.step, state.step + 1)]
    state.typical_loss = restored.typical_loss
    say(f"{where}; going on from the weights of {checkpoint} with the data after it.")
