"""The first minute of a run, before the run: the largest batch through a step, validation and a save, then what it took.

Out of memory shows here and not at step 3,000, when the largest bucket meets the longest captions for the first time.
"""

from __future__ import annotations

import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from paradiffusion.config import TrackerConfig, TrainConfig
from paradiffusion.data.loader import Batch, Order, Reader, slots_of
from paradiffusion.data.plan import BatchPlan
from paradiffusion.errors import UserError
from paradiffusion.training.folder import find_resume, stage_folder
from paradiffusion.training.log import human_time, memory_gb
from paradiffusion.training.start import startable
from paradiffusion.training.trainer import Trainer
from paradiffusion.training.watch import Watch, together

TIMED_STEPS = 3


@dataclass
class Findings:
    """What a preflight measured, over all processes: the peak ``memory`` (GiB of ``device``) of the one that needed most; seconds of the
    first step, with everything that happens once, of later ones (median) and of a ``validation``; bytes of one ``checkpoint``, and bytes
    ``free`` where they are written."""

    height: int
    width: int
    words: int
    device: str
    memory: float
    first_step: float
    step: float
    validation: float
    checkpoint: int
    free: int


def preflight(config: TrainConfig, accelerator: Accelerator) -> Findings:
    """Run it and print what it found; nothing of it stays behind, and a run in the same folder is not touched. Raises UserError
    when it does not fit, with the keys that make it smaller."""
    folder = stage_folder(config)
    # Beside the real folder, so that the disk is the same; its parents may be ours to remove as well.
    trial = folder.parent / f".preflight_{folder.name}"
    made = [parent for parent in (trial.parent, *trial.parent.parents) if not parent.exists()]
    accelerator.wait_for_everyone()
    small = replace(startable(config), keep_last=1, log_samples=False, tracker=TrackerConfig(), on_spike="stop",
                    keep_best=None, patience=None)  # fmt: skip
    # A launcher that ends this process because another has failed must not leave the folder behind.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    watch = Watch(accelerator.process_index, accelerator.num_processes, config.stall_seconds)
    clean = partial(clean_up, trial, made) if accelerator.is_main_process else lambda: None
    watch.on_leave = clean
    try:
        with together(watch):
            if find_resume(config, folder) is not None:
                raise UserError(f"{folder} has checkpoints already; a preflight is for a run that has not begun: choose another run_dir=.")
            if accelerator.is_main_process:
                shutil.rmtree(trial, ignore_errors=True)
                trial.mkdir(parents=True)
            accelerator.wait_for_everyone()
            findings = measure(Trainer(small, accelerator, watch, trial))
    finally:
        signal.signal(signal.SIGTERM, before)
        clean()
    if accelerator.is_main_process:
        print(report(config, findings), flush=True)
    accelerator.end_training()
    return findings


def clean_up(trial: Path, made: list[Path]) -> None:
    """Remove ``trial``, and those folders above it that were ``made`` for it (the innermost first) and are empty."""
    shutil.rmtree(trial, ignore_errors=True)
    for parent in made:
        if parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()


def measure(trainer: Trainer) -> Findings:
    """Steps, validation and a save."""
    bucket, rows, kinds = hardest(trainer.plan, trainer.config.batch_size)
    seconds = []
    for _ in range(1 + TIMED_STEPS):
        began = time.monotonic()
        trainer.train_step(batches(trainer, bucket, rows, kinds))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - began)
    began = time.monotonic()
    trainer.validate()
    validation = time.monotonic() - began
    trainer.save()
    trainer.accelerator.wait_for_everyone()
    trainer.close()
    written = [path.stat().st_size for path in (trainer.folder / "checkpoints").rglob("*") if path.is_file()]
    return Findings(
        *bucket, words=int(trainer.plan.index.words[rows, kinds].max()), memory=max(trainer.gather([memory_gb()])),
        device="GPU" if torch.cuda.is_available() else "process", first_step=seconds[0],
        step=float(np.median(seconds[1:])), validation=validation, checkpoint=sum(written),
        free=shutil.disk_usage(trainer.folder).free,
    )  # fmt: skip


def hardest(plan: BatchPlan, size: int) -> tuple[tuple[int, int], np.ndarray, np.ndarray]:
    """The bucket with the most pixels of those that have samples, and ``size`` rows of it with the longest captions (of
    any kind that is trained on), repeated where there are fewer: bucket (height, width), rows and kinds, int64 [size]."""
    counts = plan.bucket_sizes()
    bucket = max((bucket for bucket, count in counts.items() if count), key=lambda bucket: bucket[0] * bucket[1])
    weights = np.array([any(own.get(kind, 0.0) > 0 for own in plan.captions) for kind in plan.index.kinds])
    words = np.where(weights, plan.index.words, 0)
    rows = plan.rows_of(bucket)
    longest = rows[np.argsort(-words[rows].max(axis=1), kind="stable")][:size]
    longest = np.resize(longest, size)
    return bucket, longest, words[longest].argmax(axis=1)


def batches(trainer: Trainer, bucket: tuple[int, int], rows: np.ndarray, kinds: np.ndarray) -> Iterator[Batch]:
    """This process's micro-batches of one global batch made of ``rows``, as the run's cache has them where there is one."""
    size, index = len(rows) // (trainer.processes * trainer.micro_batches), trainer.plan.index
    reader = Reader(trainer.cache)
    for micro in range(trainer.micro_batches):
        slots = slots_of(trainer.rank, trainer.processes, size, micro)
        wanted = [(index.place(int(rows[slot])), index.kinds[kinds[slot]]) for slot in slots]
        batch = reader[Order(trainer.state.step, micro, bucket, wanted, slots, dropped=[False] * size, spares=[])]
        if batch.failures:
            raise UserError(f"a sample of the largest bucket cannot be read ({batch.failures[0]}); mend or leave out its shard.")
        yield batch


def report(config: TrainConfig, found: Findings) -> str:
    """The findings, for a person."""
    total = found.step * config.max_steps
    count = config.keep_last + (config.keep_best is not None)
    kept = (count + 1) * found.checkpoint
    validation = f"{found.validation:.1f} s, every {config.validate_every} steps"
    if config.data.val_shards is None and config.validation.prompts is None:
        validation = "none, since data.val_shards is not set"
    lines = [
        f"preflight of stage {config.stage}: bucket {found.width}x{found.height}, captions of up to {found.words} words",
        f"  peak memory     {found.memory:.2f} GiB per {found.device}",
        f"  time per step   {found.step:.2f} s (the first one {found.first_step:.2f} s), so {human_time(total)} for {config.max_steps} "
        "steps if all were as large",
        f"  validation      {validation}",
        f"  checkpoint      {found.checkpoint / 2**30:.3f} GiB; {kept / 2**30:.2f} GiB for {count} and the one being written, "
        f"{found.free / 2**30:.1f} GiB are free",
    ]
    if kept > found.free:
        lines.append("  warning: that is more than is free; lower keep_last= or choose another run_dir=")
    return "\n".join(lines)
