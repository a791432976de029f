"""Score the images of shards: CLIP features, aesthetic score, agreement of captions, technical measures.

Shard by shard, in one process or one for each GPU; what is written is not done again.
"""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from paradiffusion.curation.choosing.detector import Detector, load_detector
from paradiffusion.curation.choosing.score_files import is_scored, scored_names, stamp_of, write_scores
from paradiffusion.curation.choosing.shard_root import name_of, settle_settings
from paradiffusion.curation.choosing.technical import measure
from paradiffusion.data.images import BadImage, decode
from paradiffusion.data.index import SampleIndex, load_index, read_sample
from paradiffusion.data.remote import RemotePath
from paradiffusion.errors import UserError
from paradiffusion.metrics.clip import Clip, Head, load_clip, load_head


@dataclass(frozen=True)
class Scoring:
    """What is measured, and how.

    Attributes:
        caption: the kind whose agreement is measured; None: each sample's longest caption.
        device: auto, cpu, cuda or cuda:N; auto spreads the processes over the GPUs.
        threads: threads that decode and measure, in each process.
    """

    clip: str
    aesthetic: Path | None = None
    detector: str | None = None
    labels: tuple[str, ...] = ()
    threshold: float = 0.3
    caption: str | None = None
    precision: str = "fp32"
    device: str = "auto"
    batch_size: int = 32
    threads: int = 4
    allow_truncated: bool = False

    def settings(self) -> dict[str, Any]:
        """What the scores depend on."""
        head = None
        if self.aesthetic is not None:
            try:
                head = hashlib.blake2b(self.aesthetic.read_bytes(), digest_size=8).hexdigest()
            except OSError as error:
                raise UserError(f"aesthetic={self.aesthetic} cannot be read ({error.strerror}); name a file.") from None
        return {
            "clip": self.clip, "aesthetic": head, "text_detector": self.detector, "text_labels": list(self.labels),
            "text_threshold": self.threshold, "caption": self.caption, "precision": self.precision,
        }  # fmt: skip


@dataclass
class _Models:
    clip: Clip
    name: str
    head: Head | None
    detector: Detector | None


@dataclass
class _Row:
    """One sample, decoded and measured."""

    values: dict[str, Any]
    caption: str = ""
    pixels: torch.Tensor | None = None
    image: Image.Image | None = None


class Stopped(Exception):
    """Scoring was interrupted from outside."""


def score_shards(
    shards: Sequence[Path | RemotePath], work: Path, scoring: Scoring, processes: int | None = None
) -> int:
    """Score all ``shards`` into ``work`` and return the number of samples scored now.

    Done shards are passed over, unless they have changed. Raises UserError for other settings than those that made what
    lies there, and KeyboardInterrupt at Ctrl-C or SIGTERM; the same command goes on.
    """
    root = settle_settings(work, scoring.settings(), shards, scored_names(work))
    # Absolute: processes of their own may start elsewhere.
    shards = [shard.absolute() if isinstance(shard, Path) else shard for shard in shards]
    todo = [shard for shard in shards if not is_scored(work, name_of(shard, root), stamp_of(str(shard)))]
    if not todo:
        return 0
    index = load_index(todo, scoring.allow_truncated)
    filled = set(np.unique(index.shard).tolist())
    todo = [shard for number, shard in enumerate(todo) if number in filled]
    total = len(index)
    del index
    if processes is None:
        processes = max(1, torch.cuda.device_count()) if scoring.device == "auto" else 1
    processes = min(processes, len(todo))
    seconds = 0.5 if sys.stderr.isatty() else 30.0
    with _as_interrupt():
        # Loaded before the bar: minutes of a download would count as slow images.
        models = _load_models(scoring, _device_of(scoring.device, 0)) if processes == 1 else None
        with tqdm(total=total, desc="scoring", unit="image", mininterval=seconds) as bar:
            if models is None:
                _score_in_processes(todo, root, work, scoring, processes, bar)
            else:
                for shard in todo:
                    _score_shard(shard, name_of(shard, root), work, scoring, models, bar.update)
    return total


def _score_in_processes(
    todo: Sequence[Path | RemotePath], root: str | None, work: Path, scoring: Scoring, processes: int, bar: tqdm
) -> None:
    context = multiprocessing.get_context("spawn")
    rank, done, stop = context.Value("i", 0), context.Value("q", 0), context.Event()
    pool = ProcessPoolExecutor(processes, context, _start, (scoring, rank, done, stop))
    try:
        pending: set[Future[None]] = {pool.submit(_score_one, shard, name_of(shard, root), work) for shard in todo}
        while pending:
            finished, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            bar.update(done.value - bar.n)
            for future in finished:
                future.result()
    except BrokenProcessPool:
        raise UserError(
            "a scoring process ended without a word, perhaps for want of memory; take fewer processes or a smaller "
            "batch_size, and run the same command again: it goes on."
        ) from None
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


# What a process of its own was started with.
_OWN: dict[str, Any] = {}


def _start(scoring: Scoring, rank: Any, done: Any, stop: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first process ends the others in order.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with rank.get_lock():
        own = rank.value
        rank.value += 1
    torch.set_num_threads(max(1, scoring.threads))
    _OWN.update(scoring=scoring, own=own, done=done, stop=stop)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _score_one(shard: Path | RemotePath, name: str, work: Path) -> None:
    scoring: Scoring = _OWN["scoring"]
    if "models" not in _OWN:  # Here and not at the start, so that a UserError reaches the person.
        _OWN["models"] = _load_models(scoring, _device_of(scoring.device, _OWN["own"]))

    def advance(count: int) -> None:
        if _OWN["stop"].is_set():
            raise Stopped
        with _OWN["done"].get_lock():
            _OWN["done"].value += count

    _score_shard(shard, name, work, scoring, _OWN["models"], advance)


def _device_of(device: str, rank: int) -> str:
    if device != "auto":
        return device
    return f"cuda:{rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"


def _load_models(scoring: Scoring, device: str) -> _Models:
    clip = load_clip(scoring.clip, device, scoring.precision)
    head = None if scoring.aesthetic is None else load_head(scoring.aesthetic)
    probe = clip.image_features(clip.prepare(Image.new("RGB", (32, 32)))[None])
    if head is not None and probe.shape[1] != head.width:
        raise UserError(
            f"aesthetic={scoring.aesthetic} takes {head.width} features and {scoring.clip} gives {probe.shape[1]}; take "
            "the head that belongs to this CLIP (LAION's belong to ViT-L-14 by openai)."
        )
    detector = None
    if scoring.detector is not None:
        detector = load_detector(scoring.detector, scoring.labels, scoring.threshold, device)
    return _Models(clip, _name_of(clip), head, detector)


def _name_of(clip: Clip) -> str:
    """A short name of the weights: of the first values of each, which no two trainings share."""
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in clip.model.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.flatten()[:16].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _score_shard(
    shard: Path | RemotePath, name: str, work: Path, scoring: Scoring, models: _Models, advance: Callable[[int], object]
) -> None:
    stamp = stamp_of(str(shard))  # Taken first: a shard that changes meanwhile is scored again next time.
    index = load_index([shard], scoring.allow_truncated)
    rows: list[dict[str, Any]] = []
    features: list[np.ndarray] = []
    with ThreadPoolExecutor(scoring.threads) as threads:
        for batch in _batches(index, scoring, models, threads):
            features.append(_score_batch(batch, models))
            rows += [one.values for one in batch]
            advance(len(batch))
    write_scores(work, name, stamp, rows, np.concatenate(features), models.name)


def _batches(
    index: SampleIndex, scoring: Scoring, models: _Models, threads: ThreadPoolExecutor
) -> Iterator[list[_Row]]:
    """Batches in order; the next is decoded while one is scored."""
    waiting: deque[list[Future[_Row]]] = deque()
    for start in range(0, len(index), scoring.batch_size):
        rows = range(start, min(start + scoring.batch_size, len(index)))
        waiting.append([threads.submit(_read_row, index, row, scoring, models) for row in rows])
        if len(waiting) > 1:
            yield [future.result() for future in waiting.popleft()]
    while waiting:
        yield [future.result() for future in waiting.popleft()]


def _read_row(index: SampleIndex, row: int, scoring: Scoring, models: _Models) -> _Row:
    key = index.key(row)
    try:
        sample = read_sample(index, row)
        image = decode(sample.image)
        values: dict[str, Any] = {"key": key, "error": None, **measure(image, sample.image)}
    except (BadImage, OSError) as error:
        return _Row({"key": key, "error": str(error)[:200] or type(error).__name__})
    captions: dict[str, str] = sample.meta["captions"]
    kind = scoring.caption or max(captions, key=lambda name: len(captions[name].split()), default=None)
    caption = captions.get(kind, "") if kind else ""
    values |= {"caption_kind": kind if caption else None, "words": len(caption.split())}
    # numpy's nan is a value for Parquet; a missing one is null.
    values = {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in values.items()}
    return _Row(values, caption, models.clip.prepare(image), image if models.detector else None)


def _score_batch(batch: list[_Row], models: _Models) -> np.ndarray:
    """Add the models' scores to the rows of ``batch``; float16 [len(batch), D], zeros where there is no image."""
    good = [row for row in batch if row.pixels is not None]
    if not good:
        width = models.clip.image_features(models.clip.prepare(Image.new("RGB", (32, 32)))[None]).shape[1]
        return np.zeros((len(batch), width), np.float16)
    features = models.clip.image_features(torch.stack([row.pixels for row in good if row.pixels is not None]))
    finite = features.isfinite().all(dim=1)
    # An overflow, as half precision may give: such a picture can be neither compared nor clustered.
    if not finite.all():
        for row, fine in zip(good, finite.tolist(), strict=True):
            if not fine:
                row.values, row.pixels = {"key": row.values["key"], "error": "CLIP gives no finite features"}, None
        return _score_batch(batch, models)
    for row, agreement in zip(good, models.clip.agreements(features, [row.caption for row in good]), strict=True):
        if agreement is not None:
            row.values |= {
                "agreement_mean": agreement.mean, "agreement_min": agreement.minimum,
                "sentences": agreement.sentences, "cut_sentences": agreement.cut,
            }  # fmt: skip
    if models.head is not None:
        for row, score in zip(good, models.head(features).tolist(), strict=True):
            row.values["aesthetic"] = score
    if models.detector is not None:
        areas = models.detector.areas([row.image for row in good if row.image is not None])
        for row, area in zip(good, areas, strict=True):
            row.values["text_area"] = area
    found = np.zeros((len(batch), features.shape[1]), np.float16)
    found[[row.pixels is not None for row in batch]] = features.numpy().astype(np.float16)
    return found


@contextmanager
def _as_interrupt() -> Iterator[None]:
    """SIGTERM as Ctrl-C, where the main thread may say so."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
