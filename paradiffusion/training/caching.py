"""Caches of a stage's latents and text features: their keys, which are everything that the values are functions of and are compared
before these are used; and how they are made, shard by shard.

Shards are dealt to the processes; a shard's tar gets its name when it is whole, and whoever runs the same command again goes
on after it.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from paradiffusion.checkpoints.layouts import load_adapter, open_layout
from paradiffusion.checks import choice, positive
from paradiffusion.config import DataConfig, TrainConfig, identity
from paradiffusion.data.cache import (
    DTYPES,
    KEY_FILE,
    NULL_FILE,
    PIXELS_VERSION,
    Add,
    Cache,
    Entry,
    Members,
    caption_name,
    file_names,
    find_difference,
    folders_of,
    is_whole,
    read_key,
    remove_abandoned,
    write_key,
    writing,
)  # fmt: skip
from paradiffusion.data.images import Bucket, assign_buckets, buckets_of, decode, to_array
from paradiffusion.data.index import SampleIndex
from paradiffusion.data.loader import scale_pixels
from paradiffusion.data.plan import open_index
from paradiffusion.data.remote import RemotePath
from paradiffusion.data.shards import ShardPath, Span, read_place
from paradiffusion.errors import UserError
from paradiffusion.models.codec import Codec, load_codec
from paradiffusion.sampling.run import Processes, Stopped, StopSignal, joined_processes, stop_on_signals
from paradiffusion.text.encoder import TextEncoder, load_text_encoder
from paradiffusion.training.folder import find_resume, stage_folder
from paradiffusion.training.start import NEEDS_ADAPTER, check_init, find_init, start_from

STOPPED = 130
T = TypeVar("T")
R = TypeVar("R")
Count = Callable[[int], object]
CALLED: Final = {"latents": "latents", "text": "text features"}
LORA_TEXT: Final = (
    "train_text=lora trains the language model's adapter, so the features of a caption change in every step and cannot "
    "be cached"
)
_PICKED: Final = 64
# Cases, digits, marks, runs of spaces and letters outside ASCII: where tokenizers of one vocabulary differ.
_PROBE: Final = "Two RED kites, 3.5 m above the caf\u00e9's  roof -- (sunset); \u732b!"


def latent_key(config: TrainConfig, codec: Codec | None) -> dict[str, Any]:
    """Everything that cached latents are functions of; without ``codec`` what can be told before it is loaded."""
    key = {**identity(config, "latents"), "pixels": PIXELS_VERSION}
    key["data.lower_resolutions"] = sorted(config.data.lower_resolutions)
    if codec is not None:
        key |= {
            "codec.hash": codec.source["hash"],
            "codec.weights": weights_hash(codec.vae),
            "codec.tiling": bool(getattr(codec.vae, "use_tiling", False)),
        }
    return key


def text_key(config: TrainConfig, encoder: TextEncoder | None) -> dict[str, Any]:
    """Everything that cached features are functions of; without ``encoder`` what can be told before it is loaded."""
    key = {**identity(config, "text"), "data.captions": weighted_kinds(config.data)}
    if encoder is not None:
        key |= {
            "text_encoder.hash": encoder.source["hash"],
            "text_encoder.weights": weights_hash(encoder.model),
            "text_encoder.tokenizer": tokenizer_hash(encoder),
            "lora.hash": adapter_hash(config, encoder),
        }
    return key


KEYS: Final[dict[str, Callable[..., dict[str, Any]]]] = {"latents": latent_key, "text": text_key}


def weighted_kinds(data: DataConfig) -> list[str]:
    """The caption kinds that training draws, of any source, sorted."""
    mixtures = [source.captions or data.captions for source in data.sources] or [data.captions]
    return sorted({kind for mixture in mixtures for kind, weight in mixture.items() if weight > 0})


def weights_hash(model: nn.Module) -> str:
    """A hash of ``_PICKED`` numbers of every parameter but an adapter's. Beside the hash of the files' ends it also tells a
    model of which only some layers were tuned, and takes well under a second where a whole hash would take minutes."""
    digest = hashlib.sha256()
    for name, tensor in model.named_parameters():
        if ".lora_" not in name:
            flat = tensor.detach().reshape(-1)
            picked = flat[:: max(1, len(flat) // _PICKED)]
            digest.update(f"{list(tensor.shape)} {tensor.dtype}\n".encode() + _bytes_of(picked))
    return digest.hexdigest()[:16]


def tokenizer_hash(encoder: TextEncoder) -> str:
    """A hash of what the tokenizer makes of text: its pieces, and what it puts around them."""
    pieces = sorted(encoder.tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    tokens = encoder.tokenize([_PROBE, ""])
    kept = [
        row[real].tolist() for row, real in zip(tokens.ids, tokens.mask, strict=True)
    ]  # however far they are padded
    return hashlib.sha256(repr((pieces, kept, tokens.lengths, encoder.pad_id)).encode()).hexdigest()[:16]


def adapter_hash(config: TrainConfig, encoder: TextEncoder) -> str | None:
    """A hash of the LoRA adapter that is applied to the language model, and of its scale; None without one."""
    digest = hashlib.sha256(f"{config.lora.rank} {config.lora.alpha}".encode())
    tensors = sorted((name, p) for name, p in encoder.named_parameters() if ".lora_" in name)
    for name, tensor in tensors:
        digest.update(name.encode() + _bytes_of(tensor))
    return digest.hexdigest()[:16] if tensors else None


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def command(what: str, config: TrainConfig, output: Path | str = "<folder>") -> str:
    """What makes a fitting cache in ``output``, for messages."""
    preset = f"preset={config.preset} stage={config.stage}"
    return f"`python scripts/cache.py what={what} {preset} output={output}` with the other arguments of this command"


def check_cache(config: TrainConfig) -> dict[str, Path]:
    """The folders of ``data.cache`` by what they hold, none where it is not set; a part of their keys that contradicts the
    configuration is refused by name before any model is loaded."""
    if config.data.cache is None:
        return {}
    refuse_streaming(config)
    folder = Path(config.data.cache).expanduser()
    found = folders_of(folder)
    if not found:
        raise UserError(
            f"data.cache={folder} holds no cache (latents/ or text/); make it with {command('both', config)}."
        )
    if "text" in found and config.train_text == "lora":
        advice = (
            f"set data.cache={found['latents']} for the latents alone" if "latents" in found else "leave data.cache out"
        )
        raise UserError(f"data.cache={folder} holds text features, and {LORA_TEXT}; {advice}.")
    for what, held in found.items():
        compare(config, what, held, KEYS[what](config, None))
    return found


def refuse_streaming(config: TrainConfig) -> None:
    """Raise UserError where no index says which samples there are."""
    if config.data.streaming:
        raise UserError(
            "data.streaming=true reads shards without an index, and a cache needs one; index the shards with "
            "scripts/index_shards.py and leave data.streaming out."
        )


def compare(config: TrainConfig, what: str, folder: Path, wanted: dict[str, Any]) -> None:
    """Raise UserError where the key in ``folder`` says otherwise than ``wanted``."""
    different = find_difference(read_key(folder)["key"], wanted)
    if different is not None:
        name, stored, value = different
        raise UserError(
            f"data.cache: {folder} holds {CALLED[what]} made with {name}={stored!r}, and this command says {value!r}; put that "
            f"back, or make a fitting cache with {command(what, config)}."
        )


def open_cache(config: TrainConfig, index: SampleIndex, encoder: TextEncoder, codec: Codec) -> Cache | None:
    """The cache that ``data.cache`` names, checked whole against the loaded models (the adapter of stage 3 among them) and
    the data; None where it is not set."""
    found = check_cache(config)
    files: dict[str, dict[ShardPath, Path]] = {}
    for what, folder in found.items():
        compare(config, what, folder, KEYS[what](config, encoder if what == "text" else codec))
        files[what] = files_of(config, what, folder, index)
    null = read_null(config, found["text"]) if "text" in found else None
    return Cache(files.get("latents"), files.get("text"), config.codec.factor, null) if found else None


def files_of(config: TrainConfig, what: str, folder: Path, index: SampleIndex) -> dict[ShardPath, Path]:
    """The file of each shard of ``index``. Raises UserError for what is missing or damaged."""
    files = [folder / name for name in file_names(index, what)]
    missing = [number for number, file in enumerate(files) if not file.is_file()]
    if missing:
        samples = sum(int((index.shard == number).sum()) for number in missing)
        raise UserError(
            f"data.cache: {folder} lacks {len(missing)} of {len(files)} shards ({samples} of {len(index)} samples), "
            f"{index.shards[missing[0]]} the first, since they were never cached or have changed; add them with "
            f"{command(what, config, folder.parent)}."
        )
    for file in files:
        if not is_whole(file):
            raise damaged(file, what, config)
    return dict(zip(index.shards, files, strict=True))


def read_null(config: TrainConfig, folder: Path) -> Entry:
    """The null prompt's features."""
    try:
        found = Members(folder / NULL_FILE).get(caption_name(""))
    except (OSError, ValueError):
        found = None
    if found is None:
        raise damaged(folder / NULL_FILE, "text", config)
    return found


def damaged(file: Path, what: str, config: TrainConfig) -> UserError:
    """A file that is not as it was written."""
    return UserError(
        f"data.cache: {file} is missing or cut short; run {command(what, config, file.parent.parent)}: it makes again what "
        "is not whole."
    )


def spares_models(config: TrainConfig, cache: Cache | None, what: str, held_out: SampleIndex | None) -> bool:
    """Whether the codec ("latents") or the text encoder ("text") has nothing to do on the device: what it would compute is
    cached, and no validation needs it."""
    asked = config.validation
    validates = held_out is not None and bool(asked.samples or asked.images or asked.scenes)
    return cache is not None and getattr(cache, what) is not None and not validates


def describe_cache(config: TrainConfig, cache: Cache | None) -> str:
    """A line for a person; empty without a cache."""
    held = [what for what in CALLED if cache is not None and getattr(cache, what) is not None]
    spared = " or the ".join({"latents": "autoencoder", "text": "text encoder"}[what] for what in held)
    called = " and ".join(CALLED[what] for what in held)
    return f"\n  cache: {called} from {config.data.cache}: no step runs the {spared}" if held else ""


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
    """The configuration as training would have it, and the checkpoint that the adapter of stage 3 comes from."""
    applies, source = config.train_text == "adapter", None
    try:
        source = (find_resume(config, stage_folder(config)) if applies else None) or find_init(config)
    except UserError:
        if applies or config.init_from is not None:
            raise  # else the stage before has not run yet: only where models lie would be taken from it
    start = start_from(config, source, resumes=False)
    if source is None or start.description is None:
        if applies:
            raise UserError(NEEDS_ADAPTER)
        return config, None
    check_init(start.config, source, start.description)
    return start.config, source if applies else None


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
