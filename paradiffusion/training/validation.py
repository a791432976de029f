"""What is measured with the EMA weights: loss at fixed times and noise, a grid of pictures, alignment on scenes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paradiffusion.config import TrainConfig
from paradiffusion.data.images import Bucket, assign_buckets, buckets_of, decode, to_array
from paradiffusion.data.shards import SampleIndex, read_sample
from paradiffusion.errors import UserError
from paradiffusion.evaluation.estimates import mean
from paradiffusion.evaluation.scores.positions import third
from paradiffusion.evaluation.scores.scene_truth import follow
from paradiffusion.judges.sentences import sentences
from paradiffusion.models.codec import Codec
from paradiffusion.models.inference import InferenceModels
from paradiffusion.models.joint import JointModel, LossBatch
from paradiffusion.randomness import seed_from
from paradiffusion.sampling.gallery import contact_sheet
from paradiffusion.sampling.pipeline import Job, generate
from paradiffusion.scenes.judge import SceneScore, Share, by_objects, score, summarise
from paradiffusion.scenes.world import Scene, scene_from_meta
from paradiffusion.text.encoder import TextEncoder

# Validation draws and scores the same things whatever the run's seed is, so that runs can be compared.
SEED = 1234


@dataclass
class HeldOut:
    """One held-out sample: its picture in a bucket, shortest and longest caption, the paragraph that it is drawn from
    (validation.paragraph), the one in words that training lacks ("" where there is none), and its scene where it is one."""

    key: str
    image: np.ndarray  # uint8 [H, W, 3]
    short: str
    long: str
    paragraph: str
    unseen: str
    scene: Scene | None


def read_held_out(index: SampleIndex, config: TrainConfig, count: int) -> list[HeldOut]:
    """The first ``count`` held-out samples with a caption, in their buckets."""
    buckets = buckets_of(config.data)
    rows = np.flatnonzero(index.words.any(axis=1))[:count]
    assigned = assign_buckets(index.width[rows], index.height[rows], buckets)
    kind = config.validation.paragraph
    return [_read(index, int(row), buckets[int(bucket)], kind) for row, bucket in zip(rows, assigned, strict=True)]


def _read(index: SampleIndex, row: int, bucket: Bucket, kind: str) -> HeldOut:
    sample = read_sample(index, row)
    captions = sorted((c for c in sample.meta["captions"].values() if c.strip()), key=lambda text: len(text.split()))
    try:
        image = to_array(decode(sample.image), bucket, seed_from("validation", sample.key))
    except ValueError as error:
        raise UserError(
            f"the held-out sample {sample.key} in data.val_shards cannot be read ({error}); mend it."
        ) from None
    scene = scene_from_meta(sample.meta) if "objects" in sample.meta and "background" in sample.meta else None
    paragraph, unseen = (sample.meta["captions"].get(name, "").strip() for name in (kind, "unseen"))
    return HeldOut(sample.key, image, captions[0], captions[-1], paragraph or captions[-1], unseen, scene)


class Validation:
    """Held-out data, read once, and the three measurements over it.

    Args:
        rank, world_size: each process takes every ``world_size``-th item; ``gather`` merges lists over processes.
        writes: whether this process writes the pictures, which all of them may have drawn.
    """

    def __init__(
        self, index: SampleIndex | None, config: TrainConfig, rank: int, world_size: int, gather: Any, writes: bool = True
    ) -> None:  # fmt: skip
        wanted = config.validation
        count = max(wanted.samples, wanted.images, wanted.scenes, wanted.unseen)
        self.config = config
        self.items = read_held_out(index, config, count) if index is not None else []
        self.rank, self.world_size, self.gather, self.writes = rank, world_size, gather, writes

    @torch.no_grad()
    def losses(self, joint: JointModel, encoder: TextEncoder, codec: Codec, device: torch.device) -> dict[str, float]:
        """Mean loss on short and on long captions, over fixed times spread evenly and fixed noise."""
        items = list(enumerate(self.items[: self.config.validation.samples]))[self.rank :: self.world_size]
        total = min(self.config.validation.samples, len(self.items))
        if not total:
            return {}
        record = {}
        for kind in ("short", "long"):
            found: list[float] = []
            for batch in _by_size(items, self.config.validation.batch_size):
                found += self._errors(batch, kind, total, joint, encoder, codec, device).tolist()
            merged = self.gather(found)
            record[f"loss_{kind}"] = float(sum(merged) / len(merged))
        return record

    def _errors(
        self, batch: list[tuple[int, HeldOut]], kind: str, total: int, joint: JointModel, encoder: TextEncoder,
        codec: Codec, device: torch.device,
    ) -> Tensor:  # fmt: skip
        """Per-sample losses [B] of one batch of equal size."""
        pixels = torch.from_numpy(np.stack([item.image for _, item in batch])).permute(0, 3, 1, 2)  # [B, 3, H, W]
        latents = codec.encode((pixels.float() / 127.5 - 1).to(device))
        generators = [torch.Generator().manual_seed(seed_from("validation noise", SEED, number)) for number, _ in batch]
        noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in generators]).to(device)
        u = torch.tensor([(number + 0.5) / total for number, _ in batch])
        times = joint.objective.times(u).to(device)
        tokens = encoder.tokenize([getattr(item, kind) for _, item in batch]).to(device)
        features = encoder(tokens.ids, tokens.mask, tokens.prefix)
        weights = torch.ones(len(batch), device=device)
        return joint(LossBatch(latents, noise, times, weights, encoder.feature_mask(tokens), features=features)).errors

    def grid(self, models: InferenceModels, path: Path) -> dict[str, float]:
        """Draw the first held-out prompts with fixed seeds into one picture, beside the true ones.

        Returns the shares of ``sentence_recall`` as "sentences_first" and so on, of those that are built-in scenes: few
        sentences, but the same ones at every validation.
        """
        items = self.items[: self.config.validation.images]
        drawn = self._draw(models, items)
        if self.writes and drawn:
            pictures = [image for number, item in enumerate(items) for image in (item.image, drawn[number])]
            labels = [text for item in items for text in (f"true: {item.paragraph[:160]}", "drawn")]
            path.parent.mkdir(parents=True, exist_ok=True)
            contact_sheet(pictures, columns=8, labels=labels, scale=2, font_size=9).save(path)
        known = [(item.paragraph, item.scene, drawn[n]) for n, item in enumerate(items) if item.scene and n in drawn]
        if not self.writes or not known:
            return {}
        return {
            f"sentences_{part}": found["share"] for part, found in sentence_recall(*zip(*known, strict=True)).items()
        }

    def alignment(self, models: InferenceModels) -> dict[str, Any]:
        """Scores of pictures drawn for held-out scenes from their paragraphs ("drawn", and "by_objects" for each number of
        objects), of the true pictures ("true") and of the codec's reconstructions of them ("codec"); each a share with its
        95 % interval. "sentences" holds the share of sentences that were followed, by third of the paragraph, and "unseen"
        the scores of pictures drawn from captions in words that training lacks, where validation.unseen asks for them."""
        items = [item for item in self.items[: self.config.validation.scenes] if item.scene is not None]
        drawn = self._draw(models, items)
        others = [
            item for item in self.items[: self.config.validation.unseen] if item.scene is not None and item.unseen
        ]
        unseen = self._draw(models, [replace(item, paragraph=item.unseen) for item in others])
        if not self.writes or not items:
            return {}
        scenes = [item.scene for item in items if item.scene is not None]
        pictures = [drawn[number] for number in range(len(items))]
        truth = [item.image for item in items]
        rebuilt = [reconstruct(models.codec, image, models.device) for image in truth]
        scores = _scores(items, pictures)
        result: dict[str, Any] = {
            "drawn": _plain(summarise(scores)),
            "by_objects": {str(count): _plain(shares) for count, shares in by_objects(scores).items()},
            "true": _plain(summarise(_scores(items, truth))),
            "codec": _plain(summarise(_scores(items, rebuilt))),
            "sentences": sentence_recall([item.paragraph for item in items], scenes, pictures),
            "scenes": len(scenes),
        }
        if others:
            result["unseen"] = _plain(summarise(_scores(others, [unseen[number] for number in range(len(others))])))
        return result

    def _draw(self, models: InferenceModels, items: list[HeldOut]) -> dict[int, np.ndarray]:
        """Pictures by item number, from all processes."""
        jobs = [
            Job(
                str(number),
                item.paragraph,
                SEED + number,
                item.image.shape[0],
                item.image.shape[1],
                self.config.sampler,
            )
            for number, item in enumerate(items)
        ][self.rank :: self.world_size]
        drawn = [(int(job.name), image) for job, image in generate(models, jobs, self.config.validation.batch_size)]
        return dict(self.gather(drawn))


def _scores(items: Sequence[HeldOut], pictures: Sequence[np.ndarray]) -> list[SceneScore]:
    return [score(item.scene, image) for item, image in zip(items, pictures, strict=True) if item.scene is not None]


def _plain(shares: dict[str, Share]) -> dict[str, dict[str, float]]:
    return {measure: asdict(share) for measure, share in shares.items()}


def sentence_recall(
    paragraphs: Sequence[str], scenes: Sequence[Scene], pictures: Sequence[np.ndarray]
) -> dict[str, dict[str, float]]:
    """The share of a paragraph's sentences that its picture, uint8 [H, W, 3], follows, with its interval over scenes: in its
    first, middle and last third, and in all ("first", "middle", "last", "all"; a part without any is left out).

    It is the recall of the evaluation's sentence report: a model that forgets the end of long texts shows it here.
    """
    told: list[tuple[str, float, str]] = []
    for number, (paragraph, scene, picture) in enumerate(zip(paragraphs, scenes, pictures, strict=True)):
        parts = sentences(paragraph)
        for place, found in enumerate(follow(scene, parts, picture)):
            if found is not None:
                told.append((third(place, len(parts)).split()[0], float(found.followed), str(number)))
    result = {}
    for part in ("first", "middle", "last", "all"):
        rows = [row for row in told if part in (row[0], "all")]
        if rows:
            share = mean([value for _, value, _ in rows], [name for _, _, name in rows])
            result[part] = {"share": share.mean, "low": share.low, "high": share.high, "n": share.n}
    return result


def reconstruct(codec: Codec, image: np.ndarray, device: torch.device) -> np.ndarray:
    """An image, uint8 [H, W, 3], through the codec and back."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(device)
    decoded = codec.decode(codec.encode(pixels.float() / 127.5 - 1))
    return ((decoded[0] + 1) * 127.5).round().clamp(0, 255).permute(1, 2, 0).to("cpu", torch.uint8).numpy()


def _by_size(items: list[tuple[int, HeldOut]], batch_size: int) -> list[list[tuple[int, HeldOut]]]:
    """Batches of equal image size."""
    groups: dict[tuple[int, ...], list[tuple[int, HeldOut]]] = {}
    for number, item in items:
        groups.setdefault(item.image.shape, []).append((number, item))
    return [group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]
