"""The best checkpoint by a held-out measure: kept, named in the stage's ``best``, and the end of a stage that gets no better."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from paradiffusion.atomic import write_atomic
from paradiffusion.checkpoints.manifest import follow_pointer
from paradiffusion.training.folder import BEST, prune

if TYPE_CHECKING:
    from paradiffusion.training.trainer import Trainer


class Best:
    """Decides after each validation, in the main process, which has the log, and for all of them (``keep_best``, ``patience``). What it
    knows is the pointer and the log, so that stops and resumes change nothing."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.measure, self.patience = trainer.config.keep_best, trainer.config.patience

    def found(self) -> tuple[int, float] | None:
        """Step and value of the best checkpoint so far, in the main process; None where there is none, or it was kept by another
        measure, of which the log has no value."""
        if self.trainer.log is None or self.measure is None:
            return None
        kept = follow_pointer(self.trainer.folder / BEST)
        step = int(kept.name[5:]) if kept.is_dir() else -1
        value = self.trainer.log.validations.get(step, {}).get(self.measure)
        return None if value is None else (step, value)

    def keep(self) -> None:
        """Keep this step's checkpoint where no validation before was as good; it is saved now where it was not."""
        trainer, better = self.trainer, False
        step, config = trainer.state.step, trainer.config
        if self.measure is None:
            return
        if trainer.log is not None:
            value, best = trainer.log.validations.get(step, {}).get(self.measure, math.nan), self.found()
            sign = 1 if self.measure == "binding" else -1
            better = math.isfinite(value) and (best is None or sign * value > sign * best[1])
        if trainer.gather([better])[0]:
            if trainer.saved < step:
                trainer.save()
            trainer.settle()
            if trainer.main:
                write_atomic(trainer.folder / BEST, f"checkpoints/step_{step:06d}\n")
                prune(trainer.folder, config.keep_last, config.keep_every)

    def make_up(self) -> None:
        """The validation that a stop came before, so that a resumed run keeps the same checkpoint as one that was not stopped."""
        trainer = self.trainer
        config, step, log = trainer.config, trainer.state.step, trainer.log
        due = self.measure is not None and 0 < step < config.max_steps and step % config.validate_every == 0
        if due and not trainer.gather([log is not None and step in log.validations])[0]:
            trainer.validate()

    def gets_no_better(self) -> bool:
        """Whether ``patience`` validations have come after the best."""
        log, best = self.trainer.log, self.found()
        after = 0 if log is None or best is None else sum(step > best[0] for step in log.validations)
        return self.patience is not None and bool(self.trainer.gather([after >= self.patience])[0])
