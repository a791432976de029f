"""Scores of shards' images: CLIP features, aesthetic score, agreement of captions, technical measures.

Shard by shard, in one process or one for each GPU; what is written is not done again.
"""

from __future__ import annotations

import hashlib
import io
import math
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import convolve

from paradiffusion.checks import split_list
from paradiffusion.curation.choosing.score_files import is_scored, name_of, settle_settings, stamp_of, write_scores
from paradiffusion.curation.choosing.select_steps import Scoring
from paradiffusion.data.captions import count_words
from paradiffusion.data.images import BadImage, decode
from paradiffusion.data.index import SampleIndex, load_index, read_sample
from paradiffusion.data.remote import RemotePath
from paradiffusion.errors import UserError, reason_of
from paradiffusion.machine import choose_device
from paradiffusion.metrics.clip import Clip, Head, load_clip, load_head
from paradiffusion.runner import RayOptions, Tell, make_bar, process_number, run_tasks
from paradiffusion.stopping import stop_on_signals


@dataclass
class _Models:
    clip: Clip
    name: str
    width: int
    head: Head | None
    detector: Detector | None


@dataclass
class _Row:
    """One sample, measured; with what the models read of it where its image decodes."""

    values: dict[str, Any]
    caption: str = ""
    pixels: torch.Tensor | None = None
    image: Image.Image | None = None


def score_shards(
    shards: Sequence[Path | RemotePath], work: Path, scoring: Scoring, processes: int | None = None, ray: RayOptions | None = None
) -> int:
    """Score all ``shards`` into ``work`` and return the number of samples scored now.

    Done shards are passed over, unless they have changed. Raises UserError for other settings than those that made what
    lies there, and KeyboardInterrupt at Ctrl-C or SIGTERM; the same command goes on.
    """
    root = settle_settings(work, scoring.settings(), shards)
    # Absolute: processes of their own may start elsewhere.
    shards = [shard.absolute() if isinstance(shard, Path) else shard for shard in shards]
    todo = [shard for shard in shards if not is_scored(work, name_of(shard, root), stamp_of(str(shard)))]
    if not todo:
        return 0
    index = load_index(todo, scoring.allow_truncated)
    filled = set(np.unique(index.shard).tolist())
    tasks = [(shard, name_of(shard, root)) for number, shard in enumerate(todo) if number in filled]
    total = len(index)
    del index
    if processes is None:
        processes = max(1, torch.cuda.device_count()) if scoring.device == "auto" else 1
    if ray is None and min(processes, len(tasks)) == 1:  # before the bar: minutes of a download would count as slow images
        _load_models(scoring, _device_of(scoring.device, 0))
    function = partial(_score_shard, work=work, scoring=scoring)
    try:
        with stop_on_signals() as stop:
            run_tasks(make_bar("scoring", "image", total), function, tasks, stop.check, ray or processes, "spawn")
    finally:
        _load_models.cache_clear()
    return total


def _device_of(device: str, rank: int) -> str:
    if device == "auto" and torch.cuda.is_available():
        return f"cuda:{rank % torch.cuda.device_count()}"
    return str(choose_device(None if device == "auto" else device))


@lru_cache(maxsize=1)
def _load_models(scoring: Scoring, device: str) -> _Models:
    """The models of this process: loaded at its first shard, so that a UserError reaches the person."""
    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(max(1, scoring.threads))
    clip = load_clip(scoring.clip, device, scoring.precision)
    head = None if scoring.aesthetic is None else load_head(Path(scoring.aesthetic).expanduser())
    width = clip.image_features(clip.prepare(Image.new("RGB", (32, 32)))[None]).shape[1]
    if head is not None and width != head.width:
        raise UserError(
            f"aesthetic={scoring.aesthetic} takes {head.width} features and {scoring.clip} gives {width}; take "
            "the head that belongs to this CLIP (LAION's belong to ViT-L-14 by openai)."
        )
    detector = None
    if scoring.text_detector is not None:
        detector = load_detector(scoring.text_detector, split_list(scoring.text_labels), scoring.text_threshold, device)
    return _Models(clip, _name_of(clip), width, head, detector)


def _name_of(clip: Clip) -> str:
    """A short name of the weights: of the first values of each, which no two trainings share."""
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in clip.model.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.flatten()[:16].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _score_shard(task: tuple[Path | RemotePath, str], tell: Tell, work: Path, scoring: Scoring) -> None:
    shard, name = task
    models = _load_models(scoring, _device_of(scoring.device, process_number()))
    stamp = stamp_of(str(shard))  # Taken first: a shard that changes meanwhile is scored again next time.
    index = load_index([shard], scoring.allow_truncated)
    rows: list[dict[str, Any]] = []
    features: list[np.ndarray] = []
    with ThreadPoolExecutor(scoring.threads) as threads:
        for batch in _batches(index, scoring, models, threads):
            features.append(_score_batch(batch, models))
            rows += [one.values for one in batch]
            tell(len(batch))
    write_scores(work, name, stamp, rows, np.concatenate(features), models.name)


def _batches(index: SampleIndex, scoring: Scoring, models: _Models, threads: ThreadPoolExecutor) -> Iterator[list[_Row]]:
    """Batches in order; the next is decoded while one is scored."""
    before: Iterator[_Row] | None = None
    for start in range(0, len(index), scoring.batch_size):
        rows = range(start, min(start + scoring.batch_size, len(index)))
        batch = threads.map(partial(_read_row, index, scoring=scoring, models=models), rows)
        if before is not None:
            yield list(before)
        before = batch
    if before is not None:
        yield list(before)


def _read_row(index: SampleIndex, row: int, scoring: Scoring, models: _Models) -> _Row:
    key = index.key(row)
    try:
        sample = read_sample(index, row)
        image = decode(sample.image)
        values: dict[str, Any] = {"key": key, "error": None, **measure(image, sample.image)}
    except (BadImage, OSError) as error:
        return _Row({"key": key, "error": str(error)[:200] or type(error).__name__})
    captions: dict[str, str] = sample.meta["captions"]
    kind = scoring.caption or max(captions, key=lambda name: count_words(captions[name]), default=None)
    caption = captions.get(kind, "") if kind else ""
    values |= {"caption_kind": kind if caption else None, "words": count_words(caption)}
    return _Row(values, caption, models.clip.prepare(image), image if models.detector else None)


def _score_batch(batch: list[_Row], models: _Models) -> np.ndarray:
    """Add the models' scores to the rows of ``batch``; float16 [len(batch), D], zeros where there is no image."""
    found = np.zeros((len(batch), models.width), np.float16)
    pixels = [row.pixels for row in batch if row.pixels is not None]
    if not pixels:
        return found
    features = models.clip.image_features(torch.stack(pixels))
    finite = features.isfinite().all(dim=1)
    for row, fine in zip([row for row in batch if row.pixels is not None], finite.tolist(), strict=True):
        if not fine:  # an overflow, as half precision may give: such a picture can be neither compared nor clustered
            row.values, row.pixels = {"key": row.values["key"], "error": "CLIP gives no finite features"}, None
    good, features = [row for row in batch if row.pixels is not None], features[finite]
    for row, agreement in zip(good, models.clip.agreements(features, [row.caption for row in good]), strict=True):
        if agreement is not None:
            row.values |= {
                "agreement_mean": agreement.mean, "agreement_min": agreement.minimum,
                "sentences": agreement.sentences, "cut_sentences": agreement.cut,
            }  # fmt: skip
    if models.head is not None:
        for row, score in zip(good, models.head(features).tolist(), strict=True):
            row.values["aesthetic"] = score
    if models.detector is not None and good:
        areas = models.detector([row.image for row in good if row.image is not None])
        for row, area in zip(good, areas, strict=True):
            row.values["text_area"] = area
    found[[row.pixels is not None for row in batch]] = features.numpy().astype(np.float16)
    return found


Detector: TypeAlias = Callable[[Sequence[Image.Image]], list[float]]  # share of each image's area, 0 to 1, that is marked


@torch.inference_mode()
def marked_areas(model: Any, processor: Any, labels: set[int], threshold: float | None, images: Sequence[Image.Image]) -> list[float]:
    """What a ``Detector`` gives, of the class numbers ``labels``; the model segments where ``threshold`` is None, else it finds boxes."""
    outputs = model(**processor(images=list(images), return_tensors="pt").to(model.device))
    sizes = [(image.height, image.width) for image in images]
    if threshold is None:
        maps = processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
        return [float(np.isin(one.cpu().numpy(), list(labels)).mean()) for one in maps]
    shares = []
    found = processor.post_process_object_detection(outputs, threshold=threshold, target_sizes=sizes)
    for one, (height, width) in zip(found, sizes, strict=True):
        chosen = [int(label) in labels for label in one["labels"]]
        shares.append(union_share(one["boxes"].cpu().numpy()[chosen], width, height))
    return shares


def union_share(boxes: np.ndarray, width: int, height: int) -> float:
    """Share of a ``width`` x ``height`` picture under ``boxes`` [N, 4] (left, top, right, bottom), overlaps once."""
    # A raster of at most 512 cells a side: exact to its cells, and independent of the number of overlaps.
    scale = min(1.0, 512 / max(width, height))
    covered = np.zeros((max(1, round(height * scale)), max(1, round(width * scale))), bool)
    rows, columns = covered.shape
    for left, top, right, bottom in np.asarray(boxes, np.float64).reshape(-1, 4):
        x = np.clip(np.round(np.array([left, right]) / width * columns), 0, columns).astype(int)
        y = np.clip(np.round(np.array([top, bottom]) / height * rows), 0, rows).astype(int)
        covered[y[0] : y[1], x[0] : x[1]] = True
    return float(covered.mean())


def load_detector(folder: str, labels: Sequence[str], threshold: float, device: str) -> Detector:
    """An object-detection or semantic-segmentation model (a folder or hub id) through transformers' Auto classes.

    ``labels`` are names of its classes, all by default (of a segmentation model all but number 0, the background).
    Raises UserError when it cannot be loaded, is of another kind, or lacks a label.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection, AutoModelForSemanticSegmentation

    place = str(Path(folder).expanduser()) if Path(folder).expanduser().is_dir() else folder
    safe = {"trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(place, **safe)
        segments = any("Segmentation" in name for name in config.architectures or ())
        if not segments and not any("ObjectDetection" in name for name in config.architectures or ()):
            raise UserError(
                f"text_detector={folder} is a {', '.join(config.architectures or ['model without a named class'])}; "
                "expected one for object detection or semantic segmentation."
            )
        factory = AutoModelForSemanticSegmentation if segments else AutoModelForObjectDetection
        model = factory.from_pretrained(place, use_safetensors=True, dtype=torch.float32, **safe)
        processor = AutoImageProcessor.from_pretrained(place, **safe)
    except UserError:
        raise
    except Exception as error:  # transformers and the hub client raise a dozen unrelated types
        raise UserError(
            f"text_detector={folder} could not be loaded ({reason_of(error)[:300].rstrip('.')}); give a transformers folder."
        ) from None
    names = {str(name): int(number) for number, name in config.id2label.items()}
    unknown = [label for label in labels if label not in names]
    if unknown:
        raise UserError(
            f"text_labels has {unknown[0]!r}, but the classes of {folder} are {', '.join(list(names)[:20])}; choose among them."
        )
    chosen = {names[label] for label in labels} or {number for number in names.values() if number or not segments}
    model.to(device).eval().requires_grad_(False)
    return partial(marked_areas, model, processor, chosen, None if segments else threshold)


SHARPNESS_SIDE: Final = 512
"""Pixels of the shorter side at which sharpness is measured. Our choice: near the size of the first training stages."""
_NOISE_CROP: Final = 1024
_TONES_SIDE: Final = 1024
_BORDER_SPREAD: Final = 3.0
"""Grey levels within which a row counts as uniform: JPEG leaves ripples of one or two in a black bar."""


def measure(image: Image.Image, data: bytes) -> dict[str, float]:
    """Measures of one decoded RGB ``image`` and of the file ``data`` that it was decoded from; ``jpeg_quality`` is nan where that is no
    JPEG."""
    grey = image.convert("L")
    # Shares of the area need no more; a whole photograph of 40 megapixels would take a second.
    small = grey.copy()
    small.thumbnail((_TONES_SIDE, _TONES_SIDE), Image.Resampling.BOX)
    luma = np.asarray(small)
    low, high = np.percentile(luma, (5, 95))
    return {
        "width": image.width, "height": image.height, "short_side": min(image.size), "aspect": image.width / image.height,
        "sharpness": sharpness(grey), "noise": noise(grey), "brightness": float(luma.mean()) / 255, "contrast": float(high - low) / 255,
        "clipped_dark": float((luma <= 2).mean()), "clipped_bright": float((luma >= 253).mean()), "border": border(luma),
        "jpeg_quality": jpeg_quality(data),
    }  # fmt: skip


def sharpness(grey: Image.Image) -> float:
    """Variance of the Laplacian, in squared grey levels, at a shorter side of ``SHARPNESS_SIDE``: higher is sharper.

    A small picture is enlarged to that size too, and so counts as the blur that it would be in training.
    """
    scale = SHARPNESS_SIDE / min(grey.size)
    size = (max(3, round(grey.width * scale)), max(3, round(grey.height * scale)))
    # An extreme panorama would become huge: its middle tells as much.
    size = (min(size[0], 8 * SHARPNESS_SIDE), min(size[1], 8 * SHARPNESS_SIDE))
    pixels = np.asarray(grey.resize(size, Image.Resampling.BICUBIC), np.float32)
    laplacian = pixels[:-2, 1:-1] + pixels[2:, 1:-1] + pixels[1:-1, :-2] + pixels[1:-1, 2:] - 4 * pixels[1:-1, 1:-1]  # [H-2, W-2]
    return float(laplacian.var())


def noise(grey: Image.Image) -> float:
    """Standard deviation of the noise in grey levels, by Immerkaer's fast estimate (CVIU 1996), on the middle.

    The mask is blind to flat areas, slopes and straight edges; fine texture counts as noise all the same.
    """
    left, top = max(0, (grey.width - _NOISE_CROP) // 2), max(0, (grey.height - _NOISE_CROP) // 2)
    box = (left, top, min(grey.width, left + _NOISE_CROP), min(grey.height, top + _NOISE_CROP))
    pixels = np.asarray(grey.crop(box), np.float32)
    if min(pixels.shape) < 3:
        return math.nan
    mask = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
    response = convolve(pixels, mask)[1:-1, 1:-1]
    return float(math.sqrt(math.pi / 2) * np.abs(response).mean() / 6)


def border(luma: np.ndarray) -> float:
    """Share of the area in uniform bars along the edges: letterboxes, frames, a cut-out's empty ground.

    ``luma`` is uint8 [H, W]. A row belongs to the bar while it is uniform and like the outermost row of its side.
    """
    height, width = luma.shape
    top, bottom = _bar(luma), _bar(luma[::-1])
    if top == height:
        return 1.0
    inner = luma[top : height - bottom]
    left, right = _bar(inner.T), _bar(inner.T[::-1])
    return 1.0 - (height - top - bottom) * (width - left - right) / (height * width)


def _bar(luma: np.ndarray) -> int:
    """How many rows from the top are uniform and of one tone."""
    rows = luma.astype(np.float32)
    means, spreads = rows.mean(axis=1), rows.std(axis=1)
    uniform = (spreads <= _BORDER_SPREAD) & (np.abs(means - means[0]) <= _BORDER_SPREAD)
    return len(uniform) if uniform.all() else int(np.argmin(uniform))


def jpeg_quality(data: bytes) -> float:
    """The quality (1 to 100) on libjpeg's scale that its luminance table fits best; nan where ``data`` is no JPEG.

    It is that of the last saving: what an earlier, worse one destroyed does not come back.
    """
    try:
        found = _luminance(data)
    except Exception:  # As in data.images: Pillow raises nearly anything on bytes that are not what they claim to be.
        return math.nan
    if found.size != 64:
        return math.nan
    return 1.0 + int(np.abs(_of_qualities() - found).sum(axis=1).argmin())


def _luminance(data: bytes) -> np.ndarray:
    """int64 [64]: the luminance table of a JPEG; empty where there is none."""
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        return np.array(getattr(image, "quantization", {}).get(0, ()), np.int64)


@cache
def _of_qualities() -> np.ndarray:
    """int64 [100, 64]: the luminance tables that libjpeg writes at the qualities from 1 to 100."""
    tables = []
    for quality in range(1, 101):
        Image.new("L", (8, 8)).save(file := io.BytesIO(), "JPEG", quality=quality)
        tables.append(_luminance(file.getvalue()))
    return np.array(tables)
