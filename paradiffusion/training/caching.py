"""Make a cache: the latents of a stage's images, the text features of its captions, shard by shard.

Shards are dealt to the processes; a shard's file gets its name when it is whole, and whoever runs the same command again
goes on after it.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from paradiffusion.checks import choice, positive
from paradiffusion.config import TrainConfig
from paradiffusion.data.cache import KEY_FILE, NULL_FILE, file_names, find_difference, read_key, write_key
from paradiffusion.data.cache_files import DTYPES, EntryFile, EntryWriter, is_whole, remove_abandoned
from paradiffusion.data.index import SampleIndex
from paradiffusion.errors import UserError
from paradiffusion.models.codec import load_codec
from paradiffusion.models.layouts import load_adapter, read_description, read_weights
from paradiffusion.models.starting import is_unet_folder
from paradiffusion.sampling.processes import Processes, Stopped, StopSignal, joined_processes, stop_on_signals
from paradiffusion.text.encoder import load_text_encoder
from paradiffusion.training.cache_keys import CALLED, LORA_TEXT, latent_key, refuse_streaming, text_key
from paradiffusion.training.cache_makers import LatentMaker, Reading, TextMaker
from paradiffusion.training.folder import adopt, check_init, find_init, find_resume, stage_folder
from paradiffusion.training.setup import open_data

STOPPED = 130


@dataclass
class CacheOptions:
    """What ``scripts/cache.py`` takes besides the overrides of train.py.

    Attributes:
        what: "latents", "text" or "both"; ``output``: the cache's folder.
        dtype: stored; None for what the model computes in, which loses nothing.
        at_once: images or captions that go through a model together; ``readers``: threads that read and decode.
    """

    what: str = "both"
    output: str | None = None
    dtype: str | None = None
    at_once: int = 16
    readers: int = 4

    def check(self) -> None:
        choice("what", self.what, ("latents", "text", "both"))
        if not self.output:
            raise UserError("output= is missing; name the cache's folder, which data.cache= then names in training.")
        if self.dtype is not None:
            choice("dtype", self.dtype, tuple(DTYPES))
        positive("at_once", self.at_once)
        positive("readers", self.readers)


@dataclass
class Work:
    """The files of one kind of cache, by shard, and how one is made.

    Attributes:
        sizes: int64 [shards], samples of each.
        maker: of the files.
    """

    what: str
    files: list[Path]
    sizes: np.ndarray
    maker: LatentMaker | TextMaker


def make_cache(config: TrainConfig, options: CacheOptions) -> int:
    """Make what is missing of the cache; 0 when it is whole, 130 when it was asked to stop.

    Raises:
        UserError: for a stage whose text cannot be cached, another key in the folder, a shard that cannot be read, and a
            disk that is full. Finished shards stay.
    """
    options.check()
    refuse_streaming(config)
    kinds = ("latents", "text") if options.what == "both" else (options.what,)
    if "text" in kinds and config.train_text == "lora":
        advice = "; what=latents caches the images alone" if options.what == "both" else ""
        raise UserError(f"{LORA_TEXT}{advice}.")
    with stop_on_signals() as stop, joined_processes() as processes:
        processes.set_threads(config.threads)
        device = torch.device(processes.device() or ("cuda" if torch.cuda.is_available() else "cpu"))
        config, source = starting_point(config)
        index, *_ = open_data(config)
        status = 0
        for what in kinds:
            folder = Path(str(options.output)).expanduser() / what
            rate = 0.0
            try:
                rate = make_kind(what, folder, config, options, index, source, device, processes, stop)
            except Stopped:
                status = STOPPED
            status = agree(processes, status)
            if status:
                break
            if processes.rank == 0:
                print(report(what, folder, index, rate), flush=True)
    if status and processes.rank == 0:
        print("stopped; finished shards are kept: run the same command again to go on.", flush=True)
    return status


def agree(processes: Processes, status: int) -> int:
    """The largest of all processes' statuses. One that has left has said why: the others then just stop."""
    try:
        return processes.agree(status)
    except RuntimeError:
        return STOPPED


def starting_point(config: TrainConfig) -> tuple[TrainConfig, Path | None]:
    """The configuration as ``setup.build`` would have it, and the checkpoint that the adapter of stage 3 comes from."""
    if config.train_text == "adapter":
        source = find_resume(config, stage_folder(config)) or find_init(config)
        if source is None or is_unet_folder(source):
            raise UserError(
                "train_text=adapter needs a stage 2 checkpoint to take the LoRA adapter from; set init_from=."
            )
    else:
        try:
            source = find_init(config)
        except UserError:
            if config.init_from is not None:
                raise
            return config, None  # the stage before has not run yet: only where models lie would be taken from it
        if source is None or is_unet_folder(source):
            return config, None
    description = read_description(source)
    config = adopt(config, description, source)
    check_init(config, source, description)
    return config, source if config.train_text == "adapter" else None


def make_kind(
    what: str, folder: Path, config: TrainConfig, options: CacheOptions, index: SampleIndex, source: Path | None,
    device: torch.device, processes: Processes, stop: StopSignal,
) -> float:  # fmt: skip
    """This process's share of the latents or of the text features; its samples per second."""
    key: dict[str, Any]
    maker: LatentMaker | TextMaker
    with ThreadPoolExecutor(options.readers) as pool:
        reading = Reading(index, pool, stop, ahead=4 * options.at_once)
        if what == "latents":
            codec = load_codec(config.codec)
            key, dtype = latent_key(config, codec), options.dtype or config.codec.dtype
            codec.to(device)
            maker = LatentMaker(reading, codec, device, DTYPES[dtype], options.at_once, config)
        else:
            encoder = load_text_encoder(config.text_encoder, config.conditioning)
            if source is not None:
                load_adapter(encoder, read_weights(source), config.lora)
            key = text_key(config, encoder)
            encoder.to(device)
            # The mean over layers is taken in fp32, whatever the model computes in.
            computed = "float32" if config.conditioning.layer_tap == "mean" else config.text_encoder.dtype
            dtype = options.dtype or computed
            maker = TextMaker(reading, encoder, device, DTYPES[dtype], options.at_once, key["data.captions"])
        settled = settle_key(folder, what, {**key, "dtype": dtype}, about(config, what, index))
        remove_abandoned(folder)
        if isinstance(maker, TextMaker):
            # Of a cache begun with more kinds all files have them, the new ones too.
            maker.kinds = settled["data.captions"]
            if processes.rank == 0 and not is_whole(folder / NULL_FILE):
                with EntryWriter(folder / NULL_FILE, DTYPES[dtype]) as writer:
                    maker.encode([""], writer)
                    writer.close()
        files = [folder / name for name in file_names(index, what)]
        return run(Work(what, files, np.diff(reading.starts), maker), processes, stop)


def about(config: TrainConfig, what: str, index: SampleIndex) -> dict[str, Any]:
    """What a person may want to know of a cache; nothing of it is compared."""
    model = config.codec if what == "latents" else config.text_encoder
    return {
        "model": {"name": model.name, "hub": model.hub, "revision": model.revision},
        "stage": config.stage,
        "shards": len(index.shards),
        "samples": len(index),
        "data": index.fingerprint(),
        "torch": torch.__version__,
    }


def settle_key(folder: Path, what: str, key: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """Write the key of a new cache, and return the cache's; a cache that was begun with another one is refused."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / KEY_FILE).is_file():
            write_key(folder, what, key, facts)
    except OSError as error:
        raise UserError(f"output: {folder} cannot be written ({error.strerror}); choose another output=.") from None
    settled: dict[str, Any] = read_key(folder)["key"]
    different = find_difference(settled, key)
    if different is not None:
        name, stored, value = different
        raise UserError(
            f"{folder} holds {CALLED[what]} made with {name}={stored!r}, and this command says {value!r}; choose another "
            "output=, or delete that folder."
        )
    return settled


def run(work: Work, processes: Processes, stop: StopSignal) -> float:
    """Make this process's shards that are not there yet, and return its samples per second.

    Dealt by place among all shards: processes that start a moment later see more of them finished.
    """
    first = {file: number for number, file in reversed(list(enumerate(work.files)))}  # a shard may be named twice
    mine = [n for n in range(processes.rank, len(work.files), processes.size) if first[work.files[n]] == n]
    made, seconds = 0, 0.0
    share = f" (process 1 of {processes.size})" if processes.size > 1 else ""
    with tqdm(total=int(work.sizes[np.array(mine, np.int64)].sum()), desc=f"{CALLED[work.what]}{share}", unit="sample", dynamic_ncols=True,
              disable=None if processes.rank == 0 else True, mininterval=1.0) as bar:  # fmt: skip
        for number in mine:
            stop.check()
            size = int(work.sizes[number])
            if work.maker.is_done(work.files[number], number):
                bar.initial = getattr(bar, "initial", 0) + size  # The rate is that of what is made.
                bar.update(size)
                continue
            began = time.monotonic()
            work.maker.make(work.files[number], number, bar.update)
            made, seconds = made + size, seconds + time.monotonic() - began
    return made / max(seconds, 1e-9)


def report(what: str, folder: Path, index: SampleIndex, rate: float) -> str:
    """What is there now, for a person."""
    files = {folder / name for name in file_names(index, what)}
    size = sum(path.stat().st_size for path in files)
    bad = sum(len(EntryFile(path).bad) for path in files)
    per_thousand = size / 2**30 / max(len(index), 1) * 1000
    return (
        f"{CALLED[what]}: {len(index)} samples in {len(files)} files, {size:,} bytes, {per_thousand:.4g} GiB per 1000 samples"
        + (f", {rate:.1f} samples/s in this process" if rate else ", all of them there before")
        + (f", {bad} images could not be read" if bad else "")
        + f", in {folder}"
    )
