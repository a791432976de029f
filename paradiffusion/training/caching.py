"""Making a cache: the latents of a stage's images and the text features of its captions, shard by shard.

Shards are dealt to the processes; a shard's tar gets its name when it is whole, and whoever runs the same command again goes
on after it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from paradiffusion.checkpoints.layouts import is_unet_folder, load_adapter, open_layout
from paradiffusion.checks import choice, positive
from paradiffusion.config import TrainConfig
from paradiffusion.data.cache import (
    DTYPES,
    KEY_FILE,
    NULL_FILE,
    Add,
    Members,
    caption_name,
    file_names,
    find_difference,
    is_whole,
    read_key,
    remove_abandoned,
    write_key,
    writing,
)
from paradiffusion.data.images import Bucket, assign_buckets, buckets_of, decode, to_array
from paradiffusion.data.index import SampleIndex
from paradiffusion.data.loader import scale_pixels
from paradiffusion.data.plan import open_index
from paradiffusion.data.remote import RemotePath
from paradiffusion.data.shards import Span, read_place
from paradiffusion.errors import UserError
from paradiffusion.models.codec import Codec, load_codec
from paradiffusion.sampling.run import Processes, Stopped, StopSignal, joined_processes, stop_on_signals
from paradiffusion.text.encoder import TextEncoder, load_text_encoder
from paradiffusion.training.cache_keys import CALLED, LORA_TEXT, latent_key, refuse_streaming, text_key
from paradiffusion.training.folder import adopt, check_init, find_init, find_resume, stage_folder

STOPPED = 130
T = TypeVar("T")
R = TypeVar("R")
Count = Callable[[int], object]


@dataclass
class CacheOptions:
    """What ``scripts/cache.py`` takes besides the overrides of train.py; see its help."""

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
        index = open_index(config.data)
        status = 0
        for what in kinds:
            folder = Path(str(options.output)).expanduser() / what
            rate = 0.0
            try:
                rate = make_kind(what, folder, config, options, index, source, device, processes, stop)
            except Stopped:
                status = STOPPED
            try:
                status = processes.agree(status)
            except RuntimeError:  # One that has left has said why.
                status = STOPPED
            if status:
                break
            if processes.rank == 0:
                print(report(what, folder, index, rate), flush=True)
    if status and processes.rank == 0:
        print("stopped; finished shards are kept: run the same command again to go on.", flush=True)
    return status


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
    description = open_layout(source).description
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
                load_adapter(encoder, open_layout(source).weights(), config.lora)
            key = text_key(config, encoder)
            encoder.to(device)
            # The mean over layers is taken in fp32, whatever the model computes in.
            computed = "float32" if config.conditioning.layer_tap == "mean" else config.text_encoder.dtype
            dtype = options.dtype or computed
            maker = TextMaker(reading, encoder, device, DTYPES[dtype], options.at_once, key["data.captions"])
        settled = settle_key(folder, what, {**key, "dtype": dtype}, about(config, what, index))
        remove_abandoned(folder)
        if isinstance(maker, TextMaker):
            # Of a cache begun with more kinds all tars have them, the new ones too.
            maker.kinds = settled["data.captions"]
            if processes.rank == 0 and not is_whole(folder / NULL_FILE):
                with writing(folder / NULL_FILE, maker.dtype) as add:
                    maker.encode([""], add)
        return make_shards(what, [folder / name for name in file_names(index, what)], maker, processes)


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


def make_shards(what: str, files: list[Path], maker: LatentMaker | TextMaker, processes: Processes) -> float:
    """Make this process's shards that are not there yet, and return its samples per second.

    Dealt by place among all shards: processes that start a moment later see more of them finished.
    """
    first = {file: number for number, file in reversed(list(enumerate(files)))}  # a shard may be named twice
    mine = [n for n in range(processes.rank, len(files), processes.size) if first[files[n]] == n]
    made, seconds = 0, 0.0
    share = f" (process 1 of {processes.size})" if processes.size > 1 else ""
    with tqdm(total=sum(len(maker.reading.rows(n)) for n in mine), desc=f"{CALLED[what]}{share}", unit="sample",
              dynamic_ncols=True, disable=None if processes.rank == 0 else True, mininterval=1.0) as bar:  # fmt: skip
        for number in mine:
            maker.reading.stop.check()
            rows = maker.reading.rows(number)
            if maker.is_done(files[number], number):
                bar.initial = getattr(bar, "initial", 0) + len(rows)  # The rate is that of what is made.
                bar.update(len(rows))
                continue
            began = time.monotonic()
            with writing(files[number], maker.dtype) as add:
                maker.make(rows, add, bar.update)
            made, seconds = made + len(rows), seconds + time.monotonic() - began
    return made / max(seconds, 1e-9)


def report(what: str, folder: Path, index: SampleIndex, rate: float) -> str:
    """What is there now, for a person."""
    files = {folder / name for name in file_names(index, what)}
    size = sum(path.stat().st_size for path in files)
    bad = sum(Members(path).bad for path in files)
    per_thousand = size / 2**30 / max(len(index), 1) * 1000
    return (
        f"{CALLED[what]}: {len(index)} samples in {len(files)} files, {size:,} bytes, {per_thousand:.4g} GiB per 1000 samples"
        + (f", {rate:.1f} samples/s in this process" if rate else ", all of them there before")
        + (f", {bad} images could not be read" if bad else "")
        + f", in {folder}"
    )


class Reading:
    """Reads samples ahead in threads: decoding and resizing leave the interpreter to the others."""

    def __init__(self, index: SampleIndex, pool: ThreadPoolExecutor, stop: StopSignal, ahead: int) -> None:
        self.index, self.pool, self.stop, self.ahead = index, pool, stop, ahead
        self._starts = np.searchsorted(index.shard, np.arange(len(index.shards) + 1))

    def rows(self, number: int) -> np.ndarray:
        """All rows of a shard, int64."""
        return np.arange(self._starts[number], self._starts[number + 1])

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """``function`` of each item, in order, a few of them ahead. Raises Stopped when a signal has come."""
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(self.pool.submit(function, item))
                if len(waiting) > self.ahead:
                    self.stop.check()
                    yield waiting.popleft().result()
            while waiting:
                self.stop.check()
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def unreadable(self, row: int, error: OSError) -> UserError:
        """Bytes that cannot be had now may be had later: no reason to remember the sample as a bad one."""
        return UserError(
            f"{self.index.place(row).shard} cannot be read ({error.strerror or error}); mend that, then run the same command "
            "again: finished shards are kept."
        )


def check_finite(values: Tensor, dtype: torch.dtype, whose: str, computed: str) -> None:
    """Raise UserError for what would spoil every step that reads it: float16 ends at 65504, and some models go beyond.

    Args:
        dtype: as they are stored; ``whose`` they are; ``computed`` is the key of the dtype that the model computes in.
    """
    if not torch.isfinite(values).all():
        advice = f"set {computed}=float32, and another output="
    elif not torch.isfinite(values.to(dtype)).all():
        advice = "store with dtype=bfloat16 or dtype=float32, and another output="
    else:
        return
    raise UserError(f"{whose} (or of those computed with it) are not all finite numbers; {advice}.")


@dataclass
class LatentMaker:
    """The latents of a shard: mean and standard deviation [2, C, h, w] of each image as it is cropped in training."""

    reading: Reading
    codec: Codec
    device: torch.device
    dtype: torch.dtype
    at_once: int
    config: TrainConfig

    def __post_init__(self) -> None:
        index = self.reading.index
        self.buckets = buckets_of(self.config.data)
        self.assigned = assign_buckets(index.width, index.height, self.buckets)

    def is_done(self, path: Path, number: int) -> bool:
        """Whether that shard's tar is there; another image would have another size, and the tar another name."""
        return is_whole(path)

    def make(self, rows: np.ndarray, add: Add, count: Count) -> None:
        """The members of one shard."""
        rows = rows[np.argsort(self.assigned[rows], kind="stable")]
        batch: list[tuple[int, np.ndarray]] = []
        for row, pixels in self.reading.map(self.read, rows.tolist()):
            if batch and (len(batch) == self.at_once or pixels is None or pixels.shape != batch[0][1].shape):
                self.encode(batch, add, count)
                batch = []
            if pixels is None:
                add(int(self.reading.index.ids[row]), None)
                count(1)
            else:
                batch.append((row, pixels))
        if batch:
            self.encode(batch, add, count)

    def read(self, row: int) -> tuple[int, np.ndarray | None]:
        """The pixels, uint8 [H, W, 3], as the loader makes them; None for an image that does not decode."""
        place = self.reading.index.place(row)
        bucket: Bucket = self.buckets[int(self.assigned[row])]
        try:
            return row, to_array(decode(read_place(place).image, cover=bucket), bucket, place.id)
        except OSError as error:
            raise self.reading.unreadable(row, error) from None
        except ValueError:
            return row, None

    def encode(self, batch: list[tuple[int, np.ndarray]], add: Add, count: Count) -> None:
        """The members of a batch of one bucket."""
        index = self.reading.index
        pixels = torch.from_numpy(np.stack([picture for _, picture in batch])).permute(0, 3, 1, 2)
        mean, std = self.codec.posterior(scale_pixels(pixels.contiguous().to(self.device)))
        values = torch.stack([mean, std], dim=1).cpu()  # [b, 2, C, h, w]
        place = index.place(batch[0][0])
        check_finite(values, self.dtype, f"the latents of {place.shard.name}/{place.key}", "codec.dtype")
        for (row, _), value in zip(batch, values, strict=True):
            add(int(index.ids[row]), value)
        count(len(batch))


@dataclass
class TextMaker:
    """The features of a shard's captions: of real tokens alone, or to the maximum where padding is attended to."""

    reading: Reading
    encoder: TextEncoder
    device: torch.device
    dtype: torch.dtype
    at_once: int
    kinds: list[str]

    def is_done(self, path: Path, number: int) -> bool:
        """Whether that shard's tar is there with all captions that the shard has now. Of a remote shard only whether it is
        there: a request for each sample would take longer than the work that it may save."""
        if not is_whole(path):
            return False
        if isinstance(self.reading.index.shards[number], RemotePath):
            return True
        members = Members(path)
        texts = self.reading.map(self.read, self.reading.rows(number).tolist())
        return all(caption_name(text) in members for captions in texts for text in captions)

    def make(self, rows: np.ndarray, add: Add, count: Count) -> None:
        """The members of one shard."""
        captions = {text for texts in self.reading.map(self.read, rows.tolist()) for text in texts}
        # By length, so that little is padded; by text too, so that the tar is a function of its captions.
        ordered = sorted(captions, key=lambda text: (len(text), text))
        counted = 0
        for start in range(0, len(ordered), self.at_once):
            self.reading.stop.check()
            some = ordered[start : start + self.at_once]
            self.encode(some, add)
            reached = round((start + len(some)) * len(rows) / len(ordered))
            count(reached - counted)
            counted = reached
        count(len(rows) - counted)

    def read(self, row: int) -> list[str]:
        """The captions of a sample that training may draw: those of the weighted kinds; where one of them is missing, all
        that it has, since another one then stands in."""
        place = replace(self.reading.index.place(row), image=Span(0, 0))
        try:
            captions: dict[str, str] = read_place(place).meta["captions"]
        except OSError as error:
            raise self.reading.unreadable(row, error) from None
        if all(captions.get(kind) for kind in self.kinds):
            return [captions[kind] for kind in self.kinds]
        return [caption for caption in captions.values() if caption]

    @torch.no_grad()
    def encode(self, captions: list[str], add: Add) -> None:
        """The members of some captions."""
        tokens = self.encoder.tokenize(captions).to(self.device)
        features: Tensor = self.encoder(tokens.ids, tokens.mask, tokens.prefix).cpu()
        masked = self.encoder.settings.mask_padding
        for caption, values, length in zip(captions, features, tokens.lengths, strict=True):
            kept = values[: min(length, self.encoder.limit)] if masked else values
            check_finite(kept, self.dtype, f"the features of {caption[:60]!r}", "text_encoder.dtype")
            add(caption_name(caption), kept, length)
