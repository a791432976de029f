"""Sampling of a prompt file into a folder of images, with manifest and page: resumable, on one process or several."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from paradiffusion.atomic import locked
from paradiffusion.checkpoints.layouts import find_checkpoint
from paradiffusion.config import SampleConfig, SamplerConfig
from paradiffusion.errors import UserError
from paradiffusion.machine import own_cores
from paradiffusion.sampling.gallery import NAME, ImageRecord, Manifest, finished_names, merge_manifests, save_png, write_gallery, write_grid
from paradiffusion.sampling.pipeline import (
    InferenceModels,
    Job,
    draw,
    load_models,
    make_batches,
    make_jobs,
    negative_of,
    ordered,
    sampler_settings,
)
from paradiffusion.sampling.prompts import PromptRequest, read_prompts
from paradiffusion.stopping import Stopped, StopSignal, stop_on_signals

ANOTHER = "another process could not go on; its own message says why, and the same command continues."
BATCHES_AHEAD = 8  # batches whose prompts are encoded at once where the text encoder leaves the GPU


def sample(config: SampleConfig) -> int:
    """Draw what ``config`` asks for; the exit status. Raises UserError for wrong input (before any model is loaded, where it
    can be known), and for a disk that is full."""
    config.check()
    sampler_settings(config, SamplerConfig())
    if "-" in (config.prompt, config.prompt_file) and Processes.count() > 1:
        raise UserError("prompts from standard input reach one process only, found several; use prompt_file=prompts.txt.")
    requests = read_prompts(prompt=config.prompt, prompt_file=config.prompt_file)
    checkpoint = find_checkpoint(str(config.ckpt), unet=config.unet)
    with stop_on_signals() as stop, joined_processes() as processes:
        processes.set_threads(config.threads)
        folder = output_folder(config)
        refusal = f"another command is drawing into {folder}; wait for its end, or choose another output_dir=."
        with written_alone(folder, processes, refusal):
            models = load_models(checkpoint, config)
            return draw_all(models, requests, config, folder, processes, stop)


def first_does(processes: Processes, work: Callable[[], object]) -> None:
    """Let the first process do ``work`` while the others wait; where it raises UserError or Stopped all do."""
    all_do(processes, work if processes.rank == 0 else lambda: None)


def all_do(processes: Processes, work: Callable[[], object], tell: bool = False, after: Callable[[], None] | None = None) -> None:
    """Let each process do ``work``; where one raises UserError (which it says where ``tell``) or Stopped, all do. What comes
    ``after`` the first process does once all have ended, however they did, while the others wait."""
    failure: UserError | Stopped | None = None
    try:
        work()
    except (UserError, Stopped) as error:
        failure = error
        if tell and isinstance(error, UserError):
            processes.tell(error)
    status = processes.agree(0 if failure is None else 1 if isinstance(failure, Stopped) else 2)
    if after is not None:
        if processes.rank == 0:
            after()
        processes.agree(0)
    if status == 2:
        raise failure if isinstance(failure, UserError) else UserError(ANOTHER)
    if status == 1:
        raise failure or Stopped


@contextmanager
def written_alone(folder: Path, processes: Processes, refusal: str) -> Iterator[None]:
    """Keep other commands from writing into ``folder``. Raises UserError, in all processes, where one does already."""
    with ExitStack() as stack:
        first_does(processes, lambda: stack.enter_context(locked(folder.resolve(), refusal)))
        yield


def output_folder(config: SampleConfig) -> Path:
    """``output_dir=``, else ``samples`` beside the training run that ``ckpt=`` names, else ``samples`` here."""
    if config.output_dir:
        return Path(config.output_dir)
    checkpoint = Path(str(config.ckpt))
    if not checkpoint.resolve().is_relative_to(Path("runs").resolve()):
        return Path("samples")
    if checkpoint.parent.name == "checkpoints":  # not inside one checkpoint: those are pruned, and checked as a whole
        return checkpoint.parent.parent / "samples" / checkpoint.name
    return checkpoint / "samples"


def draw_all(
    models: InferenceModels, requests: Sequence[PromptRequest], config: SampleConfig, folder: Path, processes: Processes,
    stop: StopSignal,
) -> int:  # fmt: skip
    """Draw this process's share of the images that ``folder`` does not hold yet; the first process joins all of it."""
    jobs = make_jobs(requests, config, models)
    dtype, checkpoint, step = str(models.dtype).removeprefix("torch."), models.checkpoint, models.step
    records = {job.name: ImageRecord(**asdict(job), checkpoint=checkpoint, step=step, dtype=dtype) for job in jobs}
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        finished = finished_names(folder, list(records.values()))
    # Dealt by place among all jobs, not among those left: processes that start a moment later see more of them finished.
    share = [job for job in ordered(jobs)[processes.rank :: processes.size] if job.name not in finished]
    made_by = f"{models.checkpoint}, step {models.step}"
    if processes.rank == 0:
        print(f"{made_by}: {len(jobs)} images of {len(requests)} prompts on {models.device}.", flush=True)
        if finished:
            print(f"{len(finished)} of them are there already and are not drawn again.", flush=True)
        prompts = list({request.prompt: None for request in requests})
        cut = models.count_truncated(prompts)
        print(f"{cut} of {len(prompts)} prompts are longer than the text encoder's limit and are cut.", flush=True)
        used = {job.name.partition("_")[0] for job in jobs if job.negative_prompt is not None}
        if lost := sum(bool(negative_of(one, config)) and f"{one.index:05d}" not in used for one in requests):
            print(f"negative_prompt has no effect on {lost} of {len(requests)} prompts, whose guidance is off.", flush=True)

    def draw_share() -> None:
        with disk_errors(folder):
            _draw_share(models, share, records, config, folder, processes, stop)

    failure: UserError | Stopped | None = None
    start = time.monotonic()
    try:
        all_do(processes, draw_share, tell=True)
    except (UserError, Stopped) as error:
        failure = error
    if processes.rank == 0:  # all have written what they finished
        try:
            with disk_errors(folder):
                merged = merge_manifests(folder)
                page = write_gallery(folder, merged, made_by)
                write_grid(folder, merged)
        except UserError as error:
            failure = failure if isinstance(failure, UserError) else error
        else:
            made, seconds = sum(record.name in records for record in merged), time.monotonic() - start
            new = made - len(finished)
            rate = f"{new} new in {seconds:.0f} s, {seconds / new:.2g} s each" if new else "none new"
            told = f"{made} images ({rate})."
            if failure is not None:
                ended = "Stopped" if isinstance(failure, Stopped) else "Ended early"
                told = f"{ended} with {made} of {len(jobs)} images ({rate}); the same command goes on from here."
            print(f"{told} Look at {page}", flush=True)
    processes.agree(0)  # launchers end the others as soon as one has left with another status than 0
    if isinstance(failure, UserError):
        raise failure
    return stop.status if failure else 0


def _draw_share(
    models: InferenceModels, share: list[Job], records: dict[str, ImageRecord], config: SampleConfig, folder: Path,
    processes: Processes, stop: StopSignal,
) -> None:  # fmt: skip
    """Draw and store jobs; Stopped after a signal, which leaves the batch that is being drawn."""
    if not share:
        return
    path = folder / (NAME if processes.size == 1 else f"manifest.rank{processes.rank}.jsonl")
    bar = tqdm(
        total=len(share), desc="drawing" if processes.size == 1 else f"drawing (process 0 of {processes.size})", unit="image",
        disable=processes.rank > 0, dynamic_ncols=True, miniters=0,
        mininterval=0.5 if sys.stderr.isatty() else 10.0,  # a log file need not hold every step
    )  # fmt: skip
    with closing(Manifest(path)) as manifest, bar:
        batches = make_batches(share, config.batch_size)
        for number, batch in enumerate(batches):
            if config.offload_text_encoder and number % BATCHES_AHEAD == 0:
                jobs = [job for later in batches[number : number + BATCHES_AHEAD] for job in later]
                models.encode_ahead([prompt for job in jobs for prompt in (job.prompt, job.negative_prompt) if prompt])
            steps = batch[0].settings.steps

            def on_step(step: int, _: Tensor, steps: int = steps) -> None:
                if step < steps:  # after the last step the images are there, and are kept
                    stop.check()
                bar.set_postfix_str(f"step {step}/{steps}", refresh=False)
                bar.update(0)

            stop.check()
            for job, image in zip(batch, draw(models, batch, on_step), strict=True):
                record = records[job.name]
                told = {key: v for key, v in asdict(record).items() if v is not None and key not in ("name", "bytes")}
                told |= {"provenance": models.provenance, "Software": "ParaDiffusion"}
                manifest.append(replace(record, bytes=save_png(folder / record.file, image, told)))
            bar.update(len(batch))


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a disk that is full, read-only or in the way into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"no space left for {folder}; the images listed in its {NAME} are whole: free some space and run the same "
                "command again to continue, or choose another output_dir=."
            ) from None
        refusals = (errno.EACCES, errno.EROFS, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
        # A kernel's own file systems, such as /proc, say that a new folder is not there.
        if error.errno in refusals or (error.errno == errno.ENOENT and not folder.is_dir()):
            raise UserError(
                f"output_dir={folder} cannot be written ({error.strerror}: {error.filename}); choose a folder that can be."
            ) from None
        raise


@dataclass(frozen=True)
class Processes:
    """This process among those that torchrun or accelerate started; alone by default."""

    rank: int = 0
    size: int = 1

    @staticmethod
    def count() -> int:
        """How many processes the launcher started."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    def agree(self, status: int) -> int:
        """Wait for all processes and return the largest of their statuses."""
        if self.size == 1:
            return status
        largest = torch.tensor([status])
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest.item())

    def tell(self, error: UserError | OSError) -> None:
        """Print what stopped this process, where there are others: they may work for hours, and once the first has left
        the launcher ends the rest before they have spoken."""
        if self.size > 1:
            print(f"error: process {self.rank}: {error}", file=sys.stderr, flush=True)
            if isinstance(error, UserError):
                error.told = True

    def set_threads(self, threads: int | None) -> None:
        """CPU threads: as asked, else all cores shared by the machine's processes, where a launcher set only one."""
        launched = "LOCAL_WORLD_SIZE" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
        if threads is None and launched:
            threads = own_cores()
        if threads is not None:
            torch.set_num_threads(threads)


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """Meet the other processes of the launcher, if any. Raises UserError where not all is set that torch needs to find them."""
    size = Processes.count()
    if size == 1:
        yield Processes()
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE={size} asks for several processes, but {', '.join(missing)} is not set; start them with torchrun "
            "or accelerate launch, or unset WORLD_SIZE."
        )
    # The only meeting is at the end, and the slowest process may be hours behind.
    dist.init_process_group("gloo", timeout=timedelta(days=30))
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
