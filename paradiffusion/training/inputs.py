"""From a batch to the joint module's input: latents, noise, times and conditioning, computed by the frozen models, kept in memory
from an epoch before, or read from the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from paradiffusion.config import TrainConfig
from paradiffusion.data.cache import Entry
from paradiffusion.data.loader import Batch, scale_pixels
from paradiffusion.machine import to_device
from paradiffusion.models.codec import Codec
from paradiffusion.models.joint import JointModel, LossBatch
from paradiffusion.models.vision import VisionEncoder
from paradiffusion.randomness import permutation, seed_from, uniform
from paradiffusion.sampling.sampler import starting_noise
from paradiffusion.text.conditioning import pad_length, padded_length
from paradiffusion.text.encoder import TextEncoder
from paradiffusion.text.tokenizer import Tokens, tokenize_once
from paradiffusion.training.distillation import Teacher
from paradiffusion.training.log import Meters

Model = TypeVar("Model", bound=nn.Module)
ImageKey = tuple[torch.Size, bytes]
K = TypeVar("K")
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Inputs:
    """Makes the joint module's input of a batch.

    ``null`` are features of the empty caption, where a cache holds those of the others; ``null_features`` the same, [1, L0, D] on the
    device, once they have been read; ``memory`` is what the frozen models made in this run, where it is kept. The ``teacher`` makes of
    data what a stage that distils is trained on, ``vision`` sees the pictures for a stage that is aligned with it.
    """

    config: TrainConfig
    encoder: TextEncoder
    codec: Codec
    joint: JointModel
    device: torch.device
    null: Entry | None = None
    memory: Memory | None = None
    null_features: list[Tensor] = field(default_factory=list)
    teacher: Teacher | None = None
    vision: VisionEncoder | None = None

    def __call__(self, batch: Batch, meters: Meters) -> LossBatch:
        """The input of one micro-batch, on the device; ``meters`` count its samples and tokens."""
        given = self._of_data(batch, meters)
        if self.teacher is None:
            return given
        low, high = self.config.objective.distill_guidance
        u = draw_uniform(self.config.seed, batch.step, batch.slots, self.config.batch_size, what="guidance")
        return self.teacher(given, to_device((low + (high - low) * u).float(), self.device))

    def _of_data(self, batch: Batch, meters: Meters) -> LossBatch:
        """The same of a stage that learns from the data."""
        config, encoder, device = self.config, self.encoder, self.device
        shape = latent_shape(self.codec, batch)
        noise = draw_noise(config.seed, batch.step, batch.slots, shape, "noise", config.repeats)
        u = draw_uniform(config.seed, batch.step, batch.slots, config.batch_size, config.repeats)
        posterior = draw_noise(config.seed, batch.step, batch.slots, shape, "posterior") if config.codec.sample else None
        common: dict[str, Any] = {
            "latents": latents_of(self.codec, batch, posterior, device, self.memory),
            "noise": to_device(noise, device),
            "times": to_device(self.joint.objective.times(u, shape[1:]), device),
            "weights": to_device(batch.weights, device),
            "told": to_device(torch.tensor([bool(caption) for caption in batch.captions]), device),
        }
        until = config.objective.align_until
        if self.vision is not None and (until is None or batch.step < until):
            common["vision"] = self.vision(to_device(batch.pixels, device))
        if (scores := self.joint.score_tokens) is not None:  # which go with a caption that is dropped
            told = [found if caption else {} for caption, found in zip(batch.captions, batch.scores, strict=True)]
            common["scores"] = scores.place(to_device(scores.values(told), device))
        meters.samples += len(batch.captions)
        meters.bad += len(batch.failures)
        made = self._made_text(batch)
        if made is not None:
            text = stored_text(encoder, made, batch.captions, device)
            meters.tokens += text.tokens
            meters.truncated += text.truncated
            return LossBatch(**common, mask=text.mask, features=text.features)
        tokens, rows = batch.tokens or tokenize_once(encoder.tokenize, batch.captions)
        meters.tokens += int(tokens.mask[rows].sum())
        meters.truncated += sum(tokens.lengths[row] > encoder.limit for row in rows.tolist())
        if self.joint.text_encoder is None and device.type == "cuda" and "" in batch.captions:
            return LossBatch(**common, **self._read_without_null(tokens, rows, batch.captions.index("")))
        tokens, rows = tokens.to(device), to_device(rows, device)
        mask = encoder.feature_mask(tokens)
        common["mask"] = None if mask is None else mask[rows]
        if self.joint.text_encoder is not None:
            return LossBatch(**common, ids=tokens.ids, id_mask=tokens.mask, prefix=tokens.prefix, rows=rows)
        with torch.no_grad():
            features = on_device(encoder, device)(tokens.ids, tokens.mask, tokens.prefix)
            return LossBatch(**common, features=features[rows])

    @torch.no_grad()
    def _read_without_null(self, tokens: Tokens, rows: Tensor, empty: int) -> dict[str, Any]:
        """Features and mask of a batch whose caption ``empty`` was dropped: the frozen language model reads the null prompt once in a
        run. (On GPUs alone: beside other captions it is rounded otherwise, and runs on processors are the same to the bit.)"""
        encoder, device, null = on_device(self.encoder, self.device), self.device, int(rows[empty])
        if not self.null_features:
            alone = encoder.tokenize([""]).to(device)
            self.null_features.append(encoder(alone.ids, alone.mask, alone.prefix))
        mask, width = encoder.feature_mask(tokens), tokens.ids.shape[1] - tokens.prefix
        read = [pad_length(self.null_features[0][:, :width], width)]
        if others := [row for row in range(len(tokens.ids)) if row != null]:
            ids, id_mask = (to_device(values[others], device) for values in (tokens.ids, tokens.mask))
            read.append(encoder(ids, id_mask, tokens.prefix))
        places = torch.where(rows == null, 0, rows + (rows < null))
        return {"features": torch.cat(read)[to_device(places, device)], "mask": None if mask is None else to_device(mask[rows], device)}

    def has_text(self) -> bool:
        """Whether text features are stored, or kept in memory, so that captions need no tokens."""
        return self.null is not None or (self.memory is not None and self.joint.text_encoder is None)

    def _made_text(self, batch: Batch) -> dict[str, Entry] | None:
        """The features of a batch's captions, where they are to be had without running the language model on all of them."""
        if batch.stored is not None and self.null is not None:
            return {caption: batch.stored.text(slot) for slot, caption in enumerate(batch.captions)} | {"": self.null}
        if self.memory is not None and self.joint.text_encoder is None:
            return self.memory.texts(batch.captions)
        return None


def draw_noise(seed: int, step: int, slots: Tensor, shape: tuple[int, ...], what: str, repeats: int = 1) -> Tensor:
    """Noise [repeats * b, *shape], the first repeat of all samples first: a function of (seed, step, slot, repeat)."""
    parts = [(int(slot), repeat) if repeat else (int(slot),) for repeat in range(repeats) for slot in slots]
    return starting_noise([seed_from(what, seed, step, *part) for part in parts], shape)


def draw_uniform(seed: int, step: int, slots: Tensor, batch_size: int, repeats: int = 1, what: str = "times") -> Tensor:
    """Numbers in [0, 1), [repeats * b], spread evenly over the global batch (arXiv 2107.00630, appendix I.1): the loss of a
    step then varies less. Slots are sorted by caption length, so which slot gets which part is shuffled."""
    count = batch_size * repeats
    order = permutation(count, what, seed, step)
    places = np.concatenate([order[slots.numpy() + batch_size * repeat] for repeat in range(repeats)])
    return torch.from_numpy((uniform(what, seed, step) + places) / count % 1)


class TextInputs(NamedTuple):
    """Features [b, L, D] and mask [b, L] of a batch's captions on the device; ``tokens`` real ones, prefixes included, and
    ``truncated`` captions among them."""

    features: Tensor
    mask: Tensor | None
    tokens: int
    truncated: int


def on_device(model: Model, device: torch.device) -> Model:
    """``model``, brought to the device where a cache has spared it the way and something needs it after all."""
    if next(model.parameters()).device.type != device.type:
        model.to(device)
    return model


def latent_shape(codec: Codec, batch: Batch) -> tuple[int, int, int]:
    """(C, h, w) of the batch's latents."""
    if batch.stored is not None and batch.stored.latents is not None:
        return batch.stored.latents.shape[2:]  # type: ignore[return-value]
    return codec.latent_shape(*batch.pixels.shape[-2:])


def latents_of(codec: Codec, batch: Batch, noise: Tensor | None, device: torch.device, memory: Memory | None) -> Tensor:
    """Latents [b, C, h, w], fp32; ``noise`` draws from the posterior, from a cached one too."""
    noise = None if noise is None else to_device(noise, device)
    if batch.stored is not None and batch.stored.latents is not None:
        mean, std = to_device(batch.stored.latents, device)
        return codec.draw(mean, std, noise)
    if memory is not None:
        return codec.draw(*memory.latents(batch), noise)
    return on_device(codec, device).encode(scale_pixels(to_device(batch.pixels, device)), noise)


# Captions, or images, that go through a frozen model at once.
ROWS = 8


def in_calls_of_one_size(items: Sequence[T], run: Callable[[list[T]], Iterable[R]]) -> Iterator[tuple[T, R]]:
    """Each item with what ``run`` makes of it, ROWS at once, filled up with one that is dropped again: whatever stands beside
    an item, it is computed in calls of the same shape, and is the same to the bit."""
    for start in range(0, len(items), ROWS):
        group = list(items[start : start + ROWS])
        yield from zip(group, run(group + group[:1] * (ROWS - len(group))), strict=False)


class Memory:
    """What frozen models made of captions and images, kept in memory up to so many ``gigabytes``: made once, not in every epoch; what does
    not fit is made each time. Each entry is the same to the bit whatever stands beside it, and after a resume. ``autocast`` is the
    arithmetic of training, for the language model."""

    def __init__(
        self, encoder: TextEncoder, codec: Codec, gigabytes: float, device: torch.device,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:  # fmt: skip
        self.encoder, self.codec, self.device, self.autocast = encoder, codec, device, autocast
        self._room = gigabytes * 1e9
        self._texts: dict[str, Entry] = {}
        self._latents: dict[ImageKey, Tensor] = {}

    def _once(self, kept: dict[K, T], keys: Iterable[K], run: Callable[[list[K]], Iterable[T]], size: Callable[[T], int]) -> dict[K, T]:
        """What is ``kept`` of ``keys``, and of the others what ``run`` makes now, which is kept while it fits; ``size`` in bytes."""
        found = {key: kept[key] for key in keys if key in kept}
        for key, made in in_calls_of_one_size([key for key in keys if key not in found], run):
            found[key] = made
            if size(made) <= self._room:
                kept[key] = made
                self._room -= size(made)
        return found

    def texts(self, captions: Iterable[str]) -> dict[str, Entry]:
        """Features [L, D] of captions, in bfloat16 on the CPU."""
        alike: dict[int, list[str]] = {}  # of one number of tokens; 0 for what is kept
        for caption in dict.fromkeys(captions):
            length = 0 if caption in self._texts else self.encoder.tokenize([caption]).ids.shape[1]
            alike.setdefault(length, []).append(caption)

        def run(captions: list[str]) -> Iterable[Entry]:
            with self.autocast():
                return read_captions(on_device(self.encoder, self.device), captions, self.device, torch.bfloat16)

        found: dict[str, Entry] = {}
        for group in alike.values():
            found |= self._once(self._texts, group, run, lambda entry: entry.values.nbytes)
        return found

    def latents(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The posterior's mean and standard deviation before scaling, [b, C, h, w] each.

        Found again by the pixels themselves: two sources may give their samples the same keys.
        """
        keys = [(image.shape, hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest()) for image in batch.pixels]
        images = dict(zip(keys, batch.pixels, strict=True))

        def run(keys: list[ImageKey]) -> Iterable[Tensor]:
            pixels = scale_pixels(to_device(torch.stack([images[key] for key in keys]), self.device))
            mean_and_std = torch.stack(on_device(self.codec, self.device).posterior(pixels), dim=1).cpu()
            return (row.clone() for row in mean_and_std)  # each [2, C, h, w]

        found = self._once(self._latents, images, run, lambda made: made.nbytes)
        mean, std = to_device(torch.stack([found[key] for key in keys], dim=1), self.device)
        return mean, std


@torch.no_grad()
def read_captions(encoder: TextEncoder, captions: list[str], device: torch.device, dtype: torch.dtype | None = None) -> list[Entry]:
    """Features [L, D] of each caption, on the CPU: of real tokens alone, or to the maximum where padding is attended to."""
    tokens = encoder.tokenize(captions).to(device)
    features = encoder(tokens.ids, tokens.mask, tokens.prefix).to("cpu", dtype)
    ends = (tokens.mask.sum(1) - tokens.prefix).tolist() if encoder.settings.mask_padding else [None] * len(captions)
    return [Entry(row[:end].clone(), length) for row, end, length in zip(features, ends, tokens.lengths, strict=True)]


def stored_text(encoder: TextEncoder, made: Mapping[str, Entry], captions: list[str], device: torch.device) -> TextInputs:
    """Features that are there already, ``made`` by caption, padded as ``TextEncoder.tokenize`` pads ids.

    Where padding is masked, its features are zeros: nothing reads them. A dropped caption is empty.
    """
    settings, limit = encoder.settings, encoder.limit
    numbers = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    entries = [made[caption] for caption in numbers]
    rows = torch.tensor([numbers[caption] for caption in captions])
    real = torch.tensor([min(entry.length, limit) for entry in entries])  # [U]
    width = padded_length(int(real.max()), limit, settings.mask_padding, settings.pad_multiple)
    features = entries[0].values.new_zeros(len(entries), width, entries[0].values.shape[-1])  # [U, L, D]
    for row, entry in zip(features, entries, strict=True):
        row[: len(entry.values)] = entry.values
    places = to_device(rows, device)
    return TextInputs(
        features=to_device(features, device)[places].float(),
        mask=to_device(torch.arange(width) < real[:, None], device)[places] if settings.mask_padding else None,
        tokens=int(real[rows].sum()) + len(captions) * len(encoder.prefix_ids),
        truncated=sum(entries[row].length > limit for row in rows.tolist()),
    )
