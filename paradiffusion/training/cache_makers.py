"""One shard's latents or text features, from reading its samples to its cache file."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from paradiffusion.config import TrainConfig
from paradiffusion.data.cache_files import EntryFile, EntryWriter, caption_name, is_whole, sample_name
from paradiffusion.data.images import Bucket, assign_buckets, buckets_of, decode, to_array
from paradiffusion.data.index import SampleIndex
from paradiffusion.data.loader import scale_pixels
from paradiffusion.data.remote import RemotePath
from paradiffusion.data.shards import Span, read_place
from paradiffusion.errors import UserError
from paradiffusion.models.codec import Codec
from paradiffusion.sampling.processes import StopSignal
from paradiffusion.text.encoder import TextEncoder

T = TypeVar("T")
R = TypeVar("R")


class Reading:
    """Reads samples ahead in threads: decoding and resizing leave the interpreter to the others."""

    def __init__(self, index: SampleIndex, pool: ThreadPoolExecutor, stop: StopSignal, ahead: int) -> None:
        self.index, self.pool, self.stop, self.ahead = index, pool, stop, ahead
        self.starts = np.searchsorted(index.shard, np.arange(len(index.shards) + 1))

    def rows(self, number: int) -> np.ndarray:
        """All rows of a shard, int64."""
        return np.arange(self.starts[number], self.starts[number + 1])

    def name(self, row: int) -> str:
        """A sample's shard and key, for messages."""
        place = self.index.place(row)
        return f"{place.shard.name}/{place.key}"

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
        place = self.index.place(row)
        return UserError(
            f"{place.shard} cannot be read ({error.strerror or error}); mend that, then run the same command again: finished "
            "shards are kept."
        )


def check_finite(values: Tensor, dtype: torch.dtype, whose: str, computed: str) -> None:
    """Raise UserError for what would spoil every step that reads it: float16 ends at 65504, and some models go beyond.

    Args:
        dtype: as they are stored; ``whose`` they are, with what else was computed together; ``computed`` is the key of the
            dtype that the model computes in.
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
        data, index = self.config.data, self.reading.index
        self.buckets = buckets_of(data)
        self.assigned = assign_buckets(index.width, index.height, self.buckets)

    def is_done(self, path: Path, number: int) -> bool:
        """Whether the file of that shard is there; another image would have another size, and the file another name."""
        return is_whole(path)

    def make(self, path: Path, number: int, count: Callable[[int], object]) -> None:
        """Write the file of one shard."""
        index = self.reading.index
        rows = self.reading.rows(number)
        rows = rows[np.argsort(self.assigned[rows], kind="stable")]
        bad: list[int] = []
        batch: list[tuple[int, np.ndarray]] = []
        with EntryWriter(path, self.dtype) as writer:
            for row, pixels in self.reading.map(self.read, rows.tolist()):
                if batch and (len(batch) == self.at_once or pixels is None or pixels.shape != batch[0][1].shape):
                    batch = self.encode(batch, writer, count)
                if pixels is None:
                    bad.append(sample_name(int(index.ids[row])))
                    count(1)
                else:
                    batch.append((row, pixels))
            self.encode(batch, writer, count)
            writer.close(bad)

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

    def encode(
        self, batch: list[tuple[int, np.ndarray]], writer: EntryWriter, count: Callable[[int], object]
    ) -> list[tuple[int, np.ndarray]]:
        """Append a batch of one bucket; the empty batch that follows it."""
        if batch:
            pixels = torch.from_numpy(np.stack([picture for _, picture in batch])).permute(0, 3, 1, 2)
            mean, std = self.codec.posterior(scale_pixels(pixels.contiguous().to(self.device)))
            values = torch.stack([mean, std], dim=1).cpu()  # [b, 2, C, h, w]
            check_finite(values, self.dtype, f"the latents of {self.reading.name(batch[0][0])}", "codec.dtype")
            for (row, _), value in zip(batch, values, strict=True):
                writer.add(sample_name(int(self.reading.index.ids[row])), value)
            count(len(batch))
        return []


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
        """Whether the file of that shard is there with all captions that the shard has now. Of a remote shard only whether
        it is there: a request for each sample would take longer than the work that it may save."""
        if not is_whole(path):
            return False
        if isinstance(self.reading.index.shards[number], RemotePath):
            return True
        try:
            names = EntryFile(path).names()
        except (OSError, ValueError):
            return False
        texts = self.reading.map(self.read, self.reading.rows(number).tolist())
        return all(caption_name(text) in names for captions in texts for text in captions)

    def make(self, path: Path, number: int, count: Callable[[int], object]) -> None:
        """Write the file of one shard."""
        rows = self.reading.rows(number)
        captions = {text for texts in self.reading.map(self.read, rows.tolist()) for text in texts}
        # By length, so that little is padded; by text too, so that the file is a function of its captions.
        ordered = sorted(captions, key=lambda text: (len(text), text))
        share = len(rows) / max(len(ordered), 1)
        counted = 0
        with EntryWriter(path, self.dtype) as writer:
            for start in range(0, len(ordered), self.at_once):
                self.reading.stop.check()
                self.encode(ordered[start : start + self.at_once], writer)
                reached = round(min(start + self.at_once, len(ordered)) * share)
                count(reached - counted)
                counted = reached
            writer.close()
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
    def encode(self, captions: list[str], writer: EntryWriter) -> None:
        """Append the features of some captions."""
        tokens = self.encoder.tokenize(captions).to(self.device)
        features: Tensor = self.encoder(tokens.ids, tokens.mask, tokens.prefix).cpu()
        masked = self.encoder.settings.mask_padding
        for caption, values, length in zip(captions, features, tokens.lengths, strict=True):
            kept = values[: min(length, self.encoder.limit)] if masked else values
            check_finite(kept, self.dtype, f"the features of {caption[:60]!r}", "text_encoder.dtype")
            writer.add(caption_name(caption), kept, length)
