"""Validation with the EMA weights: held-out losses at fixed times and noise, sample grids, scores of what they follow."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from paradiffusion.config import TrainConfig
from paradiffusion.data.captions import count_words
from paradiffusion.data.images import Bucket, assign_buckets, buckets_of, decode, to_array
from paradiffusion.data.index import SampleIndex, read_sample
from paradiffusion.data.loader import join_pixels, scale_pixels
from paradiffusion.errors import UserError
from paradiffusion.models.codec import Codec
from paradiffusion.models.joint import LossBatch
from paradiffusion.randomness import seed_from
from paradiffusion.sampling.gallery import contact_sheet
from paradiffusion.sampling.pipeline import InferenceModels, Job, generate
from paradiffusion.sampling.sampler import starting_noise
from paradiffusion.text.scores import scores_of
from paradiffusion.training.distillation import Teacher

# Validation draws and scores the same things whatever the run's seed is, so that runs can be compared.
SEED = 1234


@dataclass
class HeldOut:
    """One held-out sample: its picture in a bucket, shortest and longest caption, the paragraph that it is drawn from
    (validation.paragraph), the one in words that training lacks ("" where there is none), and the rest of its JSON."""

    key: str
    image: np.ndarray  # uint8 [H, W, 3]
    short: str
    long: str
    paragraph: str
    unseen: str
    meta: dict[str, Any]


@dataclass
class Drawn:
    """A prompt's picture, uint8 [H, W, 3], beside the true one of a held-out sample; and the prompt's sentences, each with whether the
    picture follows it (None: not judged)."""

    prompt: str
    picture: np.ndarray
    true: np.ndarray | None
    sentences: list[tuple[str, bool | None]]

    @property
    def judged(self) -> list[bool]:
        return [followed for _, followed in self.sentences if followed is not None]


class Scorer(Protocol):
    """Judges pictures of held-out samples whose truth it knows (scenes/alignment.py); what they show is its own matter."""

    def knows(self, item: HeldOut) -> bool:
        """Whether the sample's JSON holds what is needed."""

    def followed(self, items: Sequence[HeldOut], pictures: Sequence[np.ndarray]) -> dict[str, float]:
        """A few numbers for each validation, by name."""

    def binding(self, items: Sequence[HeldOut], pictures: Sequence[np.ndarray]) -> float | None:
        """How much of the items' colours is at its place, 1 at most; None where they have nothing to bind."""

    def judge_sentences(self, text: str, meta: dict[str, Any], picture: np.ndarray) -> list[tuple[str, bool | None]]:
        """The sentences of any text, and whether its picture follows each; None where that cannot be known. ``meta`` is the JSON
        of the sample that the text is of, {} where it is of none."""

    def alignment(
        self, items: Sequence[HeldOut], pictures: Sequence[np.ndarray], rebuilt: Sequence[np.ndarray],
        others: Sequence[HeldOut], unseen: Sequence[np.ndarray],
    ) -> dict[str, Any]:  # fmt: skip
        """All of a finished stage's scores, as JSON: of pictures of ``items``, of the codec's reconstructions of theirs, and of
        pictures of ``others`` from captions in unseen words."""

    def told(self, alignment: dict[str, Any]) -> tuple[dict[str, float], str]:
        """The record for the log, and the lines for a person."""


def read_held_out(index: SampleIndex, config: TrainConfig, count: int) -> list[HeldOut]:
    """The first ``count`` held-out samples with a caption, in their buckets. Those that cannot be read are left out, and named.
    Raises UserError where none can be read."""
    buckets = buckets_of(config.data)
    items: list[HeldOut] = []
    bad: list[str] = []
    rows = np.flatnonzero(index.words.any(axis=1))
    width, height = (np.maximum(side[rows], 1) for side in (index.width, index.height))  # 0: of no picture
    for row, bucket in zip(rows, assign_buckets(width, height, buckets), strict=True):
        if len(items) == count:
            break
        try:
            items.append(_read(index, int(row), buckets[int(bucket)], config.validation.paragraph))
        except ValueError as error:
            place = index.place(int(row))
            bad.append(f"{place.shard.name}/{place.key} ({error})")
    if bad and not items:
        raise UserError(f"no sample of data.val_shards can be read, {bad[0]} the first; mend them, or set data.val_shards=null.")
    if bad and os.environ.get("RANK", "0") == "0":
        print(f"warning: {len(bad)} samples of data.val_shards cannot be read, {bad[0]} the first; they are left out.")
    return items


def _read(index: SampleIndex, row: int, bucket: Bucket, kind: str) -> HeldOut:
    sample = read_sample(index, row)
    captions = sorted((c for c in sample.meta["captions"].values() if c.strip()), key=count_words)
    image = to_array(decode(sample.image), bucket, seed_from("validation", sample.key))
    paragraph, unseen = (sample.meta["captions"].get(name, "").strip() for name in (kind, "unseen"))
    return HeldOut(sample.key, image, captions[0], captions[-1], paragraph or captions[-1], unseen, sample.meta)


class Validation:
    """Held-out data, read once, and the measurements over it; ``prompts`` are drawn besides (validation.prompts).

    Each process takes every ``world_size``-th item, ``gather`` merges lists over processes, and the one that ``writes`` writes the
    pictures, which all of them may have drawn. Raises UserError where no sample can be read, or keep_best=binding has nothing to bind.
    """

    def __init__(
        self, index: SampleIndex | None, config: TrainConfig, rank: int, world_size: int, gather: Any, writes: bool = True,
        scorer: Scorer | None = None, prompts: Sequence[Job] = (),
    ) -> None:  # fmt: skip
        wanted = config.validation
        count = max(wanted.samples, wanted.images, wanted.scenes, wanted.unseen)
        self.config = config
        self.items = read_held_out(index, config, count) if index is not None else []
        self.rank, self.world_size, self.gather, self.writes = rank, world_size, gather, writes
        self.scorer, self.prompts = scorer, prompts
        self.scenes = [] if scorer is None else [item for item in self.items[: wanted.scenes] if scorer.knows(item)]
        if config.keep_best == "binding" and (scorer is None or scorer.binding(self.scenes, [item.image for item in self.scenes]) is None):
            raise UserError(
                f"keep_best=binding needs held-out scenes of two colours or more, and among the first {wanted.scenes} samples "
                "(validation.scenes) of data.val_shards there is none; name built-in scenes, or set keep_best=loss_long."
            )

    @torch.no_grad()
    def losses(self, models: InferenceModels, teacher: Teacher | None) -> tuple[dict[str, float], list[tuple[float, float, int]]]:
        """Mean loss on short and on long captions, over fixed times spread evenly and fixed noise; and all of them, each with its time
        in 0..1 and its caption's words. Where a ``teacher`` is distilled, it says how far the student is from it."""
        items = list(enumerate(self.items[: self.config.validation.samples]))[self.rank :: self.world_size]
        total = min(self.config.validation.samples, len(self.items))
        record: dict[str, float] = {}
        errors: list[tuple[float, float, int]] = []
        for kind in ("short", "long") if total else ():
            found: list[tuple[float, float, int]] = []
            for batch in _by_size(items, self.config.validation.batch_size):
                found += self._errors(batch, kind, total, models, teacher)
            merged = self.gather(found)
            record[f"loss_{kind}"] = float(sum(loss for loss, _, _ in merged) / len(merged))
            errors += merged
        return record, errors

    def _errors(
        self, batch: list[tuple[int, HeldOut]], kind: str, total: int, models: InferenceModels, teacher: Teacher | None
    ) -> list[tuple[float, float, int]]:
        """Each sample's loss, time in 0..1 and words, of one batch of equal size."""
        joint, encoder, device = models.joint, models.text_encoder, models.device
        latents = models.codec.encode(scale_pixels(join_pixels([item.image for _, item in batch])).to(device))
        seeds = [seed_from("validation noise", SEED, number) for number, _ in batch]
        noise = starting_noise(seeds, latents.shape[1:]).to(device)
        u = torch.tensor([(number + 0.5) / total for number, _ in batch])
        times = joint.objective.times(u, latents.shape[2:]).to(device)
        captions = [getattr(item, kind) for _, item in batch]
        tokens = encoder.tokenize(captions).to(device)
        features = encoder(tokens.ids, tokens.mask, tokens.prefix)
        weights = torch.ones(len(batch), device=device)
        known = joint.score_tokens
        scores = None if known is None else known.place(known.values([scores_of(item.meta) for _, item in batch]).to(device))
        inputs = LossBatch(latents, noise, times, weights, encoder.feature_mask(tokens), features=features, scores=scores)
        if teacher is not None:
            inputs = teacher(inputs, torch.full_like(weights, self.config.sampler.guidance))
        shares = (times / joint.objective.config.train_timesteps).tolist()
        return list(zip(joint(inputs).errors.tolist(), shares, map(count_words, captions), strict=True))

    def grid(self, models: InferenceModels, path: Path) -> tuple[dict[str, float], list[Drawn]]:
        """Draw the first held-out prompts, beside the true pictures, and those of validation.prompts, with fixed seeds, into one
        picture. Returns what the scorer says of those held-out ones that it knows, few, but the same ones at every validation; and all of
        them one by one, in the process that writes."""
        items = self.items[: self.config.validation.images]
        jobs = [*self._jobs(items), *self.prompts]
        pictures = self._draw(models, jobs)
        if not self.writes or not jobs:
            return {}, []
        drawn, scorer = [], self.scorer
        for number, (job, picture) in enumerate(zip(jobs, pictures, strict=True)):
            item = items[number] if number < len(items) else None
            told = scorer.judge_sentences(job.prompt, item.meta if item else {}, picture) if scorer else []
            drawn.append(Drawn(job.prompt, picture, item.image if item else None, told))
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet(drawn).save(path)
        known = [number for number, item in enumerate(items) if scorer and scorer.knows(item)]
        if scorer is None or not known:
            return {}, drawn
        return scorer.followed([items[n] for n in known], [pictures[n] for n in known]), drawn

    def binding(self, models: InferenceModels) -> dict[str, float]:
        """The scorer's ``binding`` of pictures drawn from the paragraphs of validation.scenes, in the process that writes."""
        pictures = self._draw(models, self._jobs(self.scenes))
        found = self.scorer.binding(self.scenes, pictures) if self.scorer is not None and self.writes else None
        return {} if found is None else {"binding": found}

    def alignment(self, models: InferenceModels) -> dict[str, Any]:
        """The scorer's ``alignment``: of pictures drawn from paragraphs (validation.scenes of them) and from captions in words
        that training lacks (validation.unseen); empty where there is nothing to score."""
        if self.scorer is None:
            return {}
        unseen = self.items[: self.config.validation.unseen]
        items, others = self.scenes, [item for item in unseen if self.scorer.knows(item) and item.unseen]
        drawn = self._draw(models, self._jobs(items))
        of_others = self._draw(models, self._jobs([replace(item, paragraph=item.unseen) for item in others]))
        if not self.writes or not items:
            return {}
        rebuilt = [reconstruct(models.codec, item.image, models.device) for item in items]
        return self.scorer.alignment(items, drawn, rebuilt, others, of_others)

    def _jobs(self, items: list[HeldOut]) -> list[Job]:
        return [
            Job("", item.paragraph, SEED + number, len(item.image), item.image.shape[1], self.config.sampler)
            for number, item in enumerate(items)
        ]

    def _draw(self, models: InferenceModels, jobs: list[Job]) -> list[np.ndarray]:
        """The pictures of all jobs, from all processes."""
        mine = [replace(job, name=str(number)) for number, job in enumerate(jobs)][self.rank :: self.world_size]
        drawn = [(int(job.name), image) for job, image in generate(models, mine, self.config.validation.batch_size)]
        return [image for _, image in sorted(self.gather(drawn), key=itemgetter(0))]


def sheet(drawn: Sequence[Drawn]) -> Image.Image:
    """The pictures in one, each after the true one, with prompts and how many of the sentences it follows."""
    pictures: list[np.ndarray] = []
    labels: list[str] = []
    for one in drawn:
        score = f" ({sum(one.judged)} of {len(one.judged)} sentences followed)" if one.judged else ""
        if one.true is not None:
            pictures.append(one.true)
            labels.append(f"true: {one.prompt[:160]}")
        pictures.append(one.picture)
        labels.append(f"{one.prompt[:160] if one.true is None else 'drawn'}{score}")
    return contact_sheet(pictures, columns=8, labels=labels, scale=2, font_size=9)


def reconstruct(codec: Codec, image: np.ndarray, device: torch.device) -> np.ndarray:
    """An image, uint8 [H, W, 3], through the codec and back."""
    decoded = codec.decode(codec.encode(scale_pixels(join_pixels([image]).to(device))))
    return ((decoded[0] + 1) * 127.5).round().clamp(0, 255).permute(1, 2, 0).to("cpu", torch.uint8).numpy()


def _by_size(items: list[tuple[int, HeldOut]], batch_size: int) -> list[list[tuple[int, HeldOut]]]:
    """Batches of equal image size."""
    groups: dict[tuple[int, ...], list[tuple[int, HeldOut]]] = {}
    for number, item in items:
        groups.setdefault(item.image.shape, []).append((number, item))
    return [group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]
