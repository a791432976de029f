"""What ``sample.py`` does: prompts of a file -> images, a manifest and a page in a folder; stoppable and resumable."""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from paradiffusion.config import SampleConfig, SamplerConfig
from paradiffusion.errors import UserError
from paradiffusion.sampling.gallery import save_png, write_gallery, write_grid
from paradiffusion.sampling.manifest import NAME, ImageRecord, Manifest, finished_names, merge_manifests, record_of
from paradiffusion.sampling.pipeline import (
    Job,
    Models,
    draw,
    make_batches,
    make_jobs,
    ordered,
    sampler_settings,
)
from paradiffusion.sampling.processes import Processes, Stopped, StopSignal, joined_processes, stop_on_signals
from paradiffusion.sampling.prompts import PromptRequest, read_prompts

DONE, STOPPED, FAILED = 0, 1, 2
BATCHES_AHEAD = 8  # batches whose prompts are encoded at once where the text encoder leaves the GPU

Say = Callable[[str], None]


def sample(config: SampleConfig) -> int:
    """Draw what ``config`` asks for; the exit status.

    Raises:
        UserError: for wrong input (before any model is loaded, where it can be known), and for a disk that is full.
    """
    config.check()
    sampler_settings(config, SamplerConfig())
    if "-" in (config.prompt, config.prompt_file) and Processes.count() > 1:
        raise UserError(
            "prompts from standard input reach one process only, found several; use prompt_file=prompts.txt."
        )
    requests = read_prompts(prompt=config.prompt, prompt_file=config.prompt_file)

    from paradiffusion.checkpoints.manifest import resolve_checkpoint
    from paradiffusion.models.inference import load_models

    checkpoint = resolve_checkpoint(Path(str(config.ckpt)))
    with stop_on_signals() as signal, joined_processes() as processes:
        processes.set_threads(config.threads)
        models = load_models(
            checkpoint,
            device=config.device or processes.device(),
            dtype=config.dtype,
            text_encoder_path=config.text_encoder.path,
            codec_path=config.codec.path,
            unet=config.unet,
            text_encoder_dtype=config.text_encoder.dtype,
            codec_dtype=config.codec.dtype,
            offload_text_encoder=config.offload_text_encoder,
        )
        models.tune(config.compile, config.channels_last, config.vae_tiling)
        return draw_all(models, requests, config, output_folder(config), processes, signal)


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
    models: Models,
    requests: Sequence[PromptRequest],
    config: SampleConfig,
    folder: Path,
    processes: Processes,
    signal: StopSignal,
) -> int:
    """Draw this process's share of the images that ``folder`` does not hold yet; the first process joins all of it.

    Raises:
        UserError: as ``sample``.
    """
    jobs = make_jobs(requests, config, models)
    records = {job.name: record_of(job, models) for job in jobs}
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        finished = finished_names(folder, list(records.values()))
    # Dealt by place among all jobs, not among those left: processes that start a moment later see more of them finished.
    share = [job for job in ordered(jobs)[processes.rank :: processes.size] if job.name not in finished]
    say: Say = _print if processes.rank == 0 else lambda _: None
    _announce(say, models, requests, len(jobs), len(finished))

    status, failure, start = DONE, None, time.monotonic()
    try:
        with disk_errors(folder):
            _draw_share(models, share, records, config, folder, processes, signal)
    except Stopped:
        status = STOPPED
    except UserError as error:
        processes.tell(error)
        status, failure = FAILED, error
    status = processes.agree(status)  # all processes have written what they finished
    if processes.rank == 0:
        try:
            with disk_errors(folder):
                merged = merge_manifests(folder)
                page = write_gallery(folder, merged, f"{models.checkpoint}, step {models.step}")
                write_grid(folder, merged)
        except UserError as error:
            status, failure = FAILED, failure or error
        else:
            made = sum(record.name in records for record in merged)
            _conclude(say, status, made, len(jobs), made - len(finished), time.monotonic() - start, page)
    if failure is not None:
        raise failure
    if status == FAILED:
        raise UserError("another process could not go on; its own message says why, and the same command continues.")
    return 0


def _draw_share(
    models: Models,
    share: list[Job],
    records: dict[str, ImageRecord],
    config: SampleConfig,
    folder: Path,
    processes: Processes,
    signal: StopSignal,
) -> None:
    """Draw and store jobs; Stopped after a signal, which leaves the batch that is being drawn."""
    if not share:
        return
    name = NAME if processes.size == 1 else f"manifest.rank{processes.rank}.jsonl"
    manifest = Manifest(folder / name)
    bar = tqdm(
        total=len(share),
        desc="drawing" if processes.size == 1 else f"drawing (process 0 of {processes.size})",
        unit="image",
        disable=processes.rank > 0,
        dynamic_ncols=True,
        miniters=0,
        mininterval=0.5 if sys.stderr.isatty() else 10.0,  # a log file need not hold every step
    )
    try:
        batches = make_batches(share, config.batch_size)
        for number, batch in enumerate(batches):
            if config.offload_text_encoder and number % BATCHES_AHEAD == 0:
                jobs = [job for later in batches[number : number + BATCHES_AHEAD] for job in later]
                models.encode_ahead([prompt for job in jobs for prompt in (job.prompt, job.negative_prompt) if prompt])
            steps = batch[0].settings.steps

            def on_step(step: int, _: Tensor, steps: int = steps) -> None:
                if step < steps:  # after the last step the images are there, and are kept
                    signal.check()
                bar.set_postfix_str(f"step {step}/{steps}", refresh=False)
                bar.update(0)

            signal.check()
            images = draw(models, batch, on_step)
            for job, image in zip(batch, images, strict=True):
                record = records[job.name]
                size = save_png(folder / record.file, image, metadata_of(record, models))
                manifest.append(replace(record, bytes=size))
            bar.update(len(batch))
    finally:
        bar.close()
        manifest.close()


def metadata_of(record: ImageRecord, models: Models) -> dict[str, object]:
    """What a PNG says about itself."""
    keys = ("prompt", "negative_prompt", "seed", "height", "width", "settings", "checkpoint", "step", "dtype")
    values = asdict(record)
    described = {key: values[key] for key in keys if values[key] is not None}
    return {**described, "provenance": models.provenance, "Software": "ParaDiffusion"}


def _print(text: str) -> None:
    print(text, flush=True)


def _announce(say: Say, models: Models, requests: Sequence[PromptRequest], images: int, finished: int) -> None:
    say(f"{models.checkpoint}, step {models.step}: {images} images of {len(requests)} prompts on {models.device}.")
    if finished:
        say(f"{finished} of them are there already and are not drawn again.")
    prompts = list(dict.fromkeys(request.prompt for request in requests))
    cut = models.count_truncated(prompts)
    say(f"{cut} of {len(prompts)} prompts are longer than the text encoder's limit and are cut.")


def _conclude(say: Say, status: int, made: int, wanted: int, new: int, seconds: float, page: Path) -> None:
    rate = f"{new} new in {seconds:.0f} s, {seconds / new:.2g} s each" if new else "none new"
    if status == DONE:
        say(f"{made} images ({rate}). Look at {page}")
    else:
        why = "Stopped" if status == STOPPED else "Ended early"
        say(f"{why} with {made} of {wanted} images ({rate}); the same command goes on from here. Look at {page}")


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
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
            raise UserError(
                f"output_dir={folder} cannot be written ({error.strerror}: {error.filename}); choose a folder that can be."
            ) from None
        raise
