"""Replay: the exact batch of a step again, outside the run; it reads the stage's folder and takes no lock.

What a step saw is a function of the configuration, the data and the step, so nothing needs to have been kept. Where
``log_samples`` was on, the digests that the step wrote show that the replay's bytes are the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors.torch import load_file
from tqdm import tqdm

from paradiffusion.checkpoints.layouts import check_complete, copy_tensors, find_checkpoint, open_layout
from paradiffusion.checkpoints.manifest import checkpoints_of, find_fault
from paradiffusion.checks import not_negative, positive
from paradiffusion.config import TrainConfig, check_values, identity, option
from paradiffusion.data.index import same_data
from paradiffusion.data.plan import BatchPlan, make_plan, open_index
from paradiffusion.diffusion.objective import make_objective
from paradiffusion.errors import UserError, reason_of
from paradiffusion.machine import choose_device, own_cores
from paradiffusion.models.codec import load_codec
from paradiffusion.sampling.pipeline import load_models
from paradiffusion.text.encoder import load_text_encoder
from paradiffusion.training import step_record
from paradiffusion.training.engine import count_micro_batches
from paradiffusion.training.folder import CONFIG_FILE, STATE
from paradiffusion.training.inputs import Inputs
from paradiffusion.training.log import Meters
from paradiffusion.training.start import build_models, find_init, open_teacher, start_from, take_statistics
from paradiffusion.training.step_record import COLUMNS, SEEN_FOLDER, Replay, ReplayedSample, Seen

PARTS: Final = {"pixels": "other pixels", "caption": "another caption", "weight": "another loss weight"}


@dataclass
class ReplayOptions:
    """What scripts/replay.py is asked for; see its help."""

    run: str | None = None
    step: int | None = option(None, accepts=not_negative)
    ckpt: str | None = None
    output: str | None = None
    shards: str | None = None
    world: int | None = option(None, accepts=positive)
    device: str | None = None
    force: bool = False

    def check(self) -> None:
        if not self.run or self.step is None:
            missing = "run" if not self.run else "step"
            raise UserError(f"{missing}= is missing; expected run=runs/NAME/stage1 step=<a step, counted from 0>.")
        check_values(self)


@dataclass(frozen=True)
class SeenStep:
    """A step over all processes, samples by slot; ``world_size`` and ``micro_batches`` as they were then."""

    world_size: int
    micro_batches: int
    samples: dict[int, Seen]


def read_seen(folder: Path, step: int) -> SeenStep | None:
    """What ``step`` saw in the stage ``folder``; None where that was not written, or not by all of its processes.

    A step that was done again after a stop counts as it was done last.
    """
    starts = (folder / SEEN_FOLDER).glob("rank0_from*.jsonl")
    for path in sorted(starts, key=lambda path: int(path.stem.partition("_from")[2]), reverse=True):
        if (main := _find(path, step)) is None:
            continue
        samples: dict[int, Seen] = {}
        for rank in range(main["world_size"]):  # files of ranks beyond are of an earlier start with more processes
            row = _find(path.with_name(path.name.replace("rank0", f"rank{rank}", 1)), step)
            if row is None:
                return None
            samples |= {one[0]: Seen(*one) for one in zip(*(row[column] for column in COLUMNS), strict=True)}
        return SeenStep(main["world_size"], main["micro_batches"], samples)
    return None


def _find(path: Path, step: int) -> dict[str, Any] | None:
    """The row of ``step``; None where there is none."""
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            for line in file:
                # The last line of a run that is killed may be a part.
                if line.startswith(f'{{"step": {step}, ') and line.endswith("\n"):
                    row: dict[str, Any] = json.loads(line)
                    return row if "pixels" in row else None  # written before digests were
    return None


def differences(recorded: SeenStep, replayed: dict[int, Seen]) -> list[str]:
    """A few words for each slot in which a replay differs from what was recorded; empty where it is identical."""
    found = []
    for slot, was in sorted(recorded.samples.items()):  # a replay of the same plan has the same slots
        now = replayed[slot]
        if was.key != now.key:
            found.append(f"slot {slot} was {was.key} and is now {now.key}")
            continue
        # Where pixels came from a cache there is nothing to compare them with.
        compared = [part for part in PARTS if part != "pixels" or (was.pixels and now.pixels)]
        if parts := [PARTS[part] for part in compared if getattr(was, part) != getattr(now, part)]:
            found.append(f"slot {slot} ({now.key}) has {' and '.join(parts)}")
    return found


def read_recorded(run: str) -> tuple[Path, TrainConfig, dict[str, Any]]:
    """The stage that ``run=`` means, a stage's folder or a run with one stage in it: its folder, the configuration that it runs with,
    and what was found at its start."""
    folder = Path(run).expanduser()
    if not (folder / CONFIG_FILE).is_file():
        stages = sorted(path.parent for path in folder.glob(f"stage[0-9]/{CONFIG_FILE}"))
        if len(stages) != 1:
            found = f"has {', '.join(stage.name for stage in stages)}" if stages else f"holds no {CONFIG_FILE}"
            raise UserError(f"run={run} {found}; expected one stage's folder, such as run=runs/NAME/stage1.")
        folder = stages[0]
    path = folder / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        facts = dict(values.pop("facts", {}))
        config: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrainConfig), values))
    except (OSError, ValueError, AttributeError, OmegaConfBaseException) as error:
        raise UserError(
            f"{path} cannot be used ({reason_of(error)}); expected what train.py writes, by this version of the program."
        ) from None
    return folder, config, facts


def replay(options: ReplayOptions) -> tuple[Replay, Path]:
    """Read the step again, take its losses, and write page, pictures and JSON lines; returns it and the page's path. Raises
    UserError for a run, step or checkpoint that is not there, and for data that has changed."""
    options.check()
    assert options.run is not None and options.step is not None
    step = options.step
    folder, config, began_with = read_recorded(options.run)
    if step >= config.max_steps:
        raise UserError(
            f"step={step} is beyond the run {folder}, which has {config.max_steps} steps: the last one is "
            f"{config.max_steps - 1}, since they are counted from 0."
        )
    seen = read_seen(folder, step)
    plan, changed = open_plan(folder, config, began_with.get("data"), options.shards, options.force)
    world = options.world or (seen.world_size if seen else 1)
    micro_batches = seen.micro_batches if seen and seen.world_size == world else count_micro_batches(config, world)
    weights = choose_weights(folder, step, options.ckpt)
    inputs = open_models(config, folder, plan, weights, options.device)
    output = Path(options.output).expanduser() if options.output else folder / "replay" / f"step_{step:06d}"
    if file := next((path for path in (output, *output.parents) if path.exists() and not path.is_dir()), None):
        raise UserError(f"output={output}: {file} is a file; name a folder.")

    samples, digests, weighted = replay_batches(inputs, plan, step, world, micro_batches, output)
    certain, verdict = judge(seen, digests, changed, config.log_samples)
    batch = plan.batch(step)
    facts: dict[str, Any] = {
        "epoch": batch.epoch,
        "bucket": f"{batch.bucket[1]}x{batch.bucket[0]} pixels",
        "losses": weights.note,
        **step_record.facts_of(samples, world, micro_batches),
        "mean loss, weighted as trained": weighted,
    }
    title = f"step {step} of {folder.parent.name}/{folder.name}"
    found = Replay(title, step, facts, verdict, certain, samples)
    return found, step_record.write_replay(output, found)


def open_plan(folder: Path, config: TrainConfig, was: Any, shards: str | None, force: bool) -> tuple[BatchPlan, bool]:
    """The run's plan of batches, and whether its data is other than it ``was`` at the start, by its fingerprint; ``shards`` says where
    they lie now, None for where they lay."""
    data = config.data
    if data.streaming:
        raise UserError(
            f"{folder} streams its data (data.streaming=true), so which samples a step had cannot be found again; "
            "index the shards with scripts/index_shards.py for runs that can be replayed."
        )
    if shards is not None:
        if data.sources or data.folder:
            raise UserError(
                f"shards= names new places of data.shards, and {folder} reads "
                f"{'data.sources' if data.sources else 'data.folder'}: put a link where that data lay."
            )
        data = replace(data, shards=shards)
    try:
        index = open_index(data)
    except UserError as error:
        if shards or data.sources or data.folder:
            raise
        moved = "where shards have moved, name their place with shards="
        raise UserError(f"{str(error).rstrip('.')}; {moved}.") from None
    now = index.fingerprint()
    changed = not same_data(was, now)
    if changed and not force:
        raise UserError(
            f"the data has changed since {folder} was begun (its fingerprint was {was} and is {now}), so the step "
            "would not be the same: put the old shards back, or look at what the step would be now with force=true."
        )
    return make_plan(index, data, config.batch_size, config.seed), changed


class Weights(NamedTuple):
    """What the losses are taken with: ``checkpoint``, None for what the stage starts from; ``trained`` weights as training has
    them, else their EMA; a ``note`` on it for the page."""

    checkpoint: Path | None
    trained: bool
    note: str


def choose_weights(folder: Path, step: int, wanted: str | None) -> Weights:
    """The weights of ``step`` itself where its checkpoint is there to resume from; else the average of the newest checkpoint
    that is whole and not after ``step``, or of the oldest after it; where there is none yet, the stage's first weights."""
    if wanted is not None:
        path = find_checkpoint(wanted).folder
        return Weights(path, False, f"with the EMA weights of {path.name}, as asked for")
    found = {int(path.name[5:]): path for path in checkpoints_of(folder)}  # the newest first
    for number in (*(n for n in found if n <= step), *sorted(n for n in found if n > step)):
        path = found[number]
        if find_fault(path) is not None:
            continue
        if number == step and (path / STATE).is_dir():
            return Weights(path, True, f"with the weights that the step had, those of {path.name}")
        which = "the newest before the step" if number <= step else "the oldest there is, after the step"
        return Weights(path, False, f"with the EMA weights of {path.name}, {which}")
    return Weights(None, True, "with the weights that the stage would start from now, since there is no checkpoint")


def open_models(config: TrainConfig, folder: Path, plan: BatchPlan, weights: Weights, device: str | None) -> Inputs:
    """The models with ``weights``: as a step of training has them where those are trained ones, else as the sampler does."""
    target = choose_device(device)
    torch.set_num_threads(config.threads or own_cores())
    if weights.trained:
        config = replace(config, run_dir=str(folder.parent))  # wherever the run lies now
        encoder, codec = load_text_encoder(config.text_encoder, config.conditioning), load_codec(config.codec)
        start = start_from(config, weights.checkpoint or find_init(config), resumes=weights.checkpoint is not None)
        joint, _ = build_models(start, encoder)
        if joint.refiner is not None and start.description is None:
            take_statistics(joint.refiner, encoder, plan, target)
        if weights.checkpoint is not None:
            stored = load_file(weights.checkpoint / STATE / "model.safetensors")
            check_complete(set(joint.trained()), stored)
            copy_tensors(joint, stored)
    else:
        assert weights.checkpoint is not None
        checkpoint = open_layout(weights.checkpoint)
        checkpoint.place(config.text_encoder.path, config.codec.path)
        models = load_models(checkpoint, device=device)
        if identity(models.objective.config, "noise") != identity(config.objective, "noise"):
            raise UserError(
                f"ckpt={weights.checkpoint} was trained with another objective than {folder}, so its losses would say "
                "nothing of this step; choose a checkpoint of the run."
            )
        encoder, codec, joint = models.text_encoder, models.codec, models.joint
        joint.objective = make_objective(config.objective)  # which draws the times and weighs the losses as in the run
    for model in (encoder, codec, joint):
        model.to(target)
    return Inputs(config, encoder, codec, joint, target, teacher=open_teacher(config, encoder, target))


def replay_batches(
    inputs: Inputs, plan: BatchPlan, step: int, world: int, micro_batches: int, output: Path
) -> tuple[list[ReplayedSample], dict[int, Seen], float]:
    """Samples with their losses, digests by slot, and the step's loss as it was trained on: weighted by the objective, and
    the mean over the samples that could be read. Writes the pictures as it goes."""
    config, kind = inputs.config, inputs.device.type
    samples: list[ReplayedSample] = []
    digests: dict[int, Seen] = {}
    total = 0.0
    # As in training: a micro-batch by itself, since a language model in bfloat16 rounds differently in another batch.
    with tqdm(total=config.batch_size, desc=f"step {step}", unit="sample", dynamic_ncols=True) as bar:
        for rank in range(world):
            for batch in step_record.read_again(config, plan, step, rank, world, micro_batches):
                digests |= {seen.slot: seen for seen in step_record.seen_in(batch)}
                with torch.no_grad(), torch.autocast(kind, torch.bfloat16, enabled=config.precision == "bf16"):
                    given = inputs(batch, Meters())
                    losses = inputs.joint(given)
                total += float(losses.diffusion) * len(batch.keys)
                samples += step_record.samples_of(batch, rank, given.times.cpu(), losses.errors.cpu(), inputs, plan)
                step_record.write_images(output, batch)
                bar.update(len(batch.keys))
    return samples, digests, total / max(sum(sample.weight for sample in samples), 1)


def judge(seen: SeenStep | None, digests: dict[int, Seen], changed: bool, logged: bool) -> tuple[str, str]:
    """How sure it is that this is what the step saw: "identical", "different" or "unknown", and a sentence."""
    if seen is None:
        if changed:
            return "different", "The data has changed since the run was begun: this is what the step would see now."
        reason = "the run has not come to it, or its records are gone" if logged else "log_samples=true records them"
        return "unknown", (
            f"The data's fingerprint is that of the run, but there are no digests of this step ({reason}), so that the pixels "
            "are the same could not be checked."
        )
    if found := differences(seen, digests):
        more = f", and {len(found) - 8} more" if len(found) > 8 else ""
        return "different", f"Not what the step saw: {'; '.join(found[:8])}{more}."
    pictured = all(sample.pixels for sample in seen.samples.values())
    end = "." if pictured else "; its latents came from a cache, so that there are no pixels to compare."
    return "identical", (
        f"Identical to what the step saw: samples, {'pixels, ' if pictured else ''}captions and weights of all {len(digests)} "
        f"slots have the recorded digests{end}"
    )
