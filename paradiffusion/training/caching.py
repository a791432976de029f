"""Caches of a stage's latents and text features: their keys, which are everything that the values are functions of and are compared
before these are used; and how they are made, shard by shard.

Shards are dealt to the processes; a shard's tar gets its name when it is whole, and whoever runs the same command again goes
on after it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from paradiffusion.checkpoints.layouts import load_adapter, open_layout
from paradiffusion.checks import finite, on_disk, one_of, positive
from paradiffusion.config import TrainConfig, check_values, identity, option
from paradiffusion.data import cache as stored
from paradiffusion.data.cache import Add, Cache, Former, Members, caption_name, is_whole, picture_name
from paradiffusion.data.images import assign_buckets, buckets_of, decode, to_array
from paradiffusion.data.index import SampleIndex
from paradiffusion.data.loader import join_pixels, scale_pixels
from paradiffusion.data.plan import open_index
from paradiffusion.data.shards import Place, RawSample, ShardPath, Span, read_place
from paradiffusion.errors import UserError
from paradiffusion.machine import choose_device
from paradiffusion.models.codec import Codec, load_codec
from paradiffusion.runner import RayOptions, RunnerKeys, Tell, make_bar, run_tasks
from paradiffusion.sampling.run import Processes, Stopped, StopSignal, joined_processes, stop_on_signals
from paradiffusion.text.encoder import DTYPES, TextEncoder, is_adapter, load_text_encoder
from paradiffusion.text.sources import same_weights
from paradiffusion.training.folder import find_resume, stage_folder
from paradiffusion.training.inputs import read_captions
from paradiffusion.training.start import check_fits, find_init, start_from, startable

T = TypeVar("T")
R = TypeVar("R")
CALLED: Final = {"latents": "latents", "text": "text features"}
LORA_TEXT: Final = (
    "train_text=lora trains the language model's adapter, so the features of a caption change in every step and cannot be cached"
)
_PICKED: Final = 64
# Cases, digits, marks, runs of spaces and letters outside ASCII: where tokenizers of one vocabulary differ.
_PROBE: Final = "Two RED kites, 3.5 m above the caf\u00e9's  roof -- (sunset); \u732b!"

# What the values are functions of.


def key_of(config: TrainConfig, what: str, model: Any = None) -> dict[str, Any]:
    """Everything that cached values are functions of; without ``model`` (the codec, or the text encoder) what can be told
    before it is loaded."""
    key, data = identity(config, what), config.data
    if what == "latents":
        key |= {"pixels": stored.PIXELS_VERSION, "data.lower_resolutions": sorted(data.lower_resolutions)}
        if model is not None:
            key |= {"codec.hash": model.source["known_by"], "codec.weights": weights_hash(model.vae)}
            key["codec.tiling"] = bool(getattr(model.vae, "use_tiling", False))
        return key
    mixtures = [source.captions or data.captions for source in data.sources] or [data.captions]
    key["data.captions"] = sorted({kind for mixture in mixtures for kind, weight in mixture.items() if weight > 0})
    if model is not None:
        key |= {
            "text_encoder.hash": model.source["known_by"],
            "text_encoder.weights": weights_hash(model.model),
            "text_encoder.tokenizer": tokenizer_hash(model),
            "lora.hash": adapter_hash(config, model),
        }
    return key


def weights_hash(model: nn.Module) -> str:
    """A hash of ``_PICKED`` numbers of every parameter but an adapter's. Beside the hash of the files' ends it also tells a
    model of which only some layers were tuned, and takes well under a second where a whole hash would take minutes."""
    digest = hashlib.sha256()
    for name, tensor in model.named_parameters():
        if not is_adapter(name):
            flat = tensor.detach().reshape(-1)
            picked = flat[:: max(1, len(flat) // _PICKED)]
            digest.update(f"{list(tensor.shape)} {tensor.dtype}\n".encode() + _bytes_of(picked))
    return digest.hexdigest()[:16]


def tokenizer_hash(encoder: TextEncoder) -> str:
    """A hash of what the tokenizer makes of text: its pieces, and what it puts around them."""
    pieces = sorted(encoder.tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    tokens = encoder.tokenize([_PROBE, ""])
    # However far they are padded.
    kept = [row[real].tolist() for row, real in zip(tokens.ids, tokens.mask, strict=True)]
    return hashlib.sha256(repr((pieces, kept, tokens.lengths, encoder.pad_id)).encode()).hexdigest()[:16]


def adapter_hash(config: TrainConfig, encoder: TextEncoder) -> str | None:
    """A hash of the LoRA adapter that is applied to the language model, and of its scale; None without one."""
    tensors = sorted((name, p) for name, p in encoder.named_parameters() if is_adapter(name))
    kind = config.lora.kind.removeprefix("lora")
    digest = hashlib.sha256(f"{config.lora.rank} {config.lora.alpha}{kind}".encode())
    for name, tensor in tensors:
        digest.update(name.encode() + _bytes_of(tensor))
    return digest.hexdigest()[:16] if tensors else None


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# A cache that training reads.


def command(what: str, config: TrainConfig, output: Path | str = "<folder>") -> str:
    """What makes a fitting cache in ``output``, for messages."""
    called = f"python scripts/cache.py what={what} preset={config.preset} stage={config.stage} output={output}"
    return f"`{called}` with the other arguments of this command"


def check_cache(config: TrainConfig, models: dict[str, Any] | None = None) -> dict[str, Path]:
    """The folders of ``data.cache`` by what they hold, none where it is not set; a part of their keys that contradicts the
    configuration, or the loaded ``models`` ("latents": the codec, "text": the encoder), is refused by name."""
    if config.data.cache is None:
        return {}
    refuse_streaming(config)
    folder = Path(config.data.cache).expanduser()
    found = stored.folders_of(folder)
    if not found:
        make = command("both", config)
        raise UserError(f"data.cache={folder} holds no cache (latents/ or text/); make it with {make}.")
    if "text" in found and config.train_text == "lora":
        alone = f"set data.cache={found['latents']} for the latents alone" if "latents" in found else "leave it out"
        raise UserError(f"data.cache={folder} holds text features, and {LORA_TEXT}; {alone}.")
    if "latents" in found and config.objective.align_weight:
        raise UserError(
            f"data.cache={folder} holds latents, and objective.align_weight needs the pictures themselves; name its text features alone "
            f"(data.cache={folder / 'text'}), or set objective.align_weight=0."
        )
    for what, held in found.items():
        advice = f"put that back, or make a fitting cache with {command(what, config)}"
        compare(held, what, key_of(config, what, (models or {}).get(what)), f"data.cache: {held}", advice)
    return found


def refuse_streaming(config: TrainConfig) -> None:
    """Raise UserError where no index says which samples there are."""
    if config.data.streaming:
        raise UserError(
            "data.streaming=true reads shards without an index, and a cache needs one; index the shards with "
            "scripts/index_shards.py and leave data.streaming out."
        )


def compare(folder: Path, what: str, wanted: dict[str, Any], called: str, advice: str) -> dict[str, Any]:
    """The key in ``folder``. Raises UserError, with that advice, where it says otherwise than ``wanted``; it may have more
    kinds of captions."""
    key: dict[str, Any] = stored.read_key(folder)["key"]
    for name, value in json.loads(json.dumps(wanted)).items():
        found = key.get(name)
        if name in ("codec.hash", "text_encoder.hash") and isinstance(value, str) and same_weights(found, value):
            continue
        if found != value and not (name == "data.captions" and isinstance(found, list) and set(value) <= set(found)):
            raise UserError(f"{called} holds {CALLED[what]} made with {name}={found!r}, and this command says {value!r}; {advice}.")
    return key


def open_cache(config: TrainConfig, index: SampleIndex, encoder: TextEncoder, codec: Codec) -> Cache | None:
    """The cache that ``data.cache`` names, checked whole against the loaded models (the adapter of stage 3 among them) and
    the data; None where it is not set. Raises UserError for what does not fit, is missing or damaged."""
    found = check_cache(config, {"latents": codec, "text": encoder})
    if not found:
        return None
    files: dict[str, dict[ShardPath, Path]] = {}
    for what, folder in found.items():
        names = stored.file_names(index, what)
        lacking = [number for number, name in enumerate(names) if not is_whole(folder / name)]
        if lacking:
            raise UserError(
                f"data.cache: {folder} lacks {len(lacking)} of {len(names)} shards ({np.isin(index.shard, lacking).sum()} of "
                f"{len(index)} samples), {index.shards[lacking[0]]} the first, which was never cached or has changed, or whose "
                f"{names[lacking[0]]} is missing or cut short; add them with {command(what, config, folder.parent)}."
            )
        files[what] = {shard: folder / name for shard, name in zip(index.shards, names, strict=True)}
    null = None
    if "text" in found:
        with suppress(OSError, ValueError):
            null = Members(found["text"] / stored.NULL_FILE).get(caption_name(""))
        if null is None:
            raise UserError(
                f"data.cache: {found['text'] / stored.NULL_FILE} is missing or damaged; delete it, and make it again with "
                f"{command('text', config, found['text'].parent)}."
            )
    return Cache(files.get("latents"), files.get("text"), null)


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


# The making.


@dataclass
class CacheOptions(RunnerKeys):
    """What ``scripts/cache.py`` takes besides the overrides of train.py; see its help."""

    what: str = option("both", accepts=one_of("latents", "text", "both"))
    output: str | None = option(None, accepts=on_disk)
    dtype: str | None = option(None, accepts=one_of(*DTYPES))
    at_once: int = option(16, accepts=positive)
    readers: int = option(4, accepts=positive)

    def check(self) -> None:
        check_values(self)
        if not self.output:
            raise UserError("output= is missing; name the cache's folder, which data.cache= then names in training.")
        self.ray()


def make_cache(config: TrainConfig, options: CacheOptions) -> int:
    """Make what is missing of the cache; 0 when it is whole, 128 + the signal's number when it was asked to stop. Raises
    UserError for a stage whose text cannot be cached, another key in the folder, a shard that cannot be read, and a disk that
    is full. Finished shards stay."""
    options.check()
    refuse_streaming(config)
    kinds = ("latents", "text") if options.what == "both" else (options.what,)
    if "text" in kinds and config.train_text == "lora":
        raise UserError(f"{LORA_TEXT}{'; what=latents caches the images alone' if options.what == 'both' else ''}.")
    ray = options.ray()
    with stop_on_signals() as stop, joined_processes() as processes:
        config, source = starting_point(config)
        index = open_index(config.data)
        for what in kinds:
            folder, rate, status = Path(str(options.output)).expanduser() / what, 0.0, 0
            taken = Counter[Path]()
            try:
                stage = CacheStage(what, folder, config, options, source, stop, index)
                rate, taken = make_kind(stage, processes, ray)
            except Stopped:
                status = stop.status
            try:
                status = processes.agree(status)
            except RuntimeError:  # One that has left has said why.
                status = stop.status
            if taken and not status:  # by now no other process takes anything from them
                Former(folder, stage.files).drop(taken)
            if processes.rank == 0:
                stopped = "stopped; finished shards are kept: run the same command again to go on."
                print(stopped if status else report(what, folder, index, rate), flush=True)
            if status:
                with suppress(RuntimeError):
                    processes.agree(0)  # launchers end the others as soon as one has left with another status than 0
                return status
    return 0


def starting_point(config: TrainConfig) -> tuple[TrainConfig, Path | None]:
    """The configuration as training would have it, and the checkpoint that the adapter of stage 3 comes from. Without one
    the stage before need not have run: only where models lie would be taken from it."""
    applies = config.train_text == "adapter"
    config = startable(config)
    source = (find_resume(config, stage_folder(config)) if applies else None) or find_init(config)
    start = start_from(config, source, resumes=False)
    check_fits(start)
    return start.config, source if start.config.train_text == "adapter" else None


def make_kind(stage: CacheStage, processes: Processes, ray: RayOptions | None) -> tuple[float, Counter[Path]]:
    """Make this process's shards that are not there yet, of Ray's workers all; the samples per second of a process, 0 where all were
    there, and how many members were taken from which former tar.

    Shards are dealt by place among all: processes that start a moment later see more of them finished.
    """
    index = stage.opened_index
    if ray is None:
        _ = stage.maker  # before the bar: minutes of a download would count as slow samples
    mine = range(processes.rank, len(index.shards), processes.size)
    share = f" (process 1 of {processes.size})" if processes.size > 1 else ""
    total = sum(len(stage.rows(number)) for number in mine)
    title, shown = f"{CALLED[stage.what]}{share}", processes.rank == 0
    made = run_tasks(make_bar(title, "sample", total, shown=shown), stage, mine, stage.stop.check, ray or 1)
    count, seconds = sum(one.samples for one in made), sum(one.seconds for one in made)
    return count / seconds if count else 0.0, sum((one.taken for one in made), Counter[Path]())


@dataclass(frozen=True)
class Made:
    """What the making of one shard took; of one that was there, nothing."""

    samples: int = 0
    seconds: float = 0.0
    taken: Counter[Path] = field(default_factory=Counter)


@dataclass
class CacheStage:
    """The stage that makes the shards of one kind by their numbers. Index and model are opened where they are used, and do not travel."""

    what: str
    folder: Path
    config: TrainConfig
    options: CacheOptions
    source: Path | None
    stop: StopSignal
    index: SampleIndex | None = None

    def __call__(self, number: int, tell: Tell) -> Made:
        maker, file, rows = self.maker, self.files[number], self.rows(number)
        if is_whole(file):
            tell(found=len(rows))
            return Made()
        began, told = time.monotonic(), 0
        maker.former.taken = Counter()
        with stored.writing(file, maker.dtype) as add:
            for share in maker.make(rows, add):
                tell(round(share * len(rows)) - told)
                told = round(share * len(rows))
        tell(len(rows) - told)
        return Made(len(rows), time.monotonic() - began, maker.former.taken)

    def __getstate__(self) -> dict[str, Any]:
        return {one.name: getattr(self, one.name) for one in fields(self)} | {"index": None, "stop": StopSignal()}

    @cached_property
    def opened_index(self) -> SampleIndex:
        return self.index or open_index(self.config.data)

    @cached_property
    def files(self) -> list[Path]:
        return [self.folder / name for name in stored.file_names(self.opened_index, self.what)]

    @cached_property
    def maker(self) -> LatentMaker | TextMaker:
        """The loaded model, its key compared."""
        Processes().set_threads(self.config.threads)
        pool = ThreadPoolExecutor(self.options.readers)
        maker = MAKERS[self.what](self.config, self.options, self.opened_index, choose_device(), self.source, pool, self.stop)
        settle_key(self.folder, self.what, maker)
        stored.remove_abandoned(self.folder)
        if isinstance(maker, TextMaker) and not is_whole(self.folder / stored.NULL_FILE):
            with stored.writing(self.folder / stored.NULL_FILE, maker.dtype) as add:
                maker.encode([""], add)
        maker.former = Former(self.folder, self.files)
        return maker

    def rows(self, number: int) -> np.ndarray:
        """The rows of a shard, int64."""
        return np.arange(*np.searchsorted(self.opened_index.shard, [number, number + 1]))


def settle_key(folder: Path, what: str, maker: LatentMaker | TextMaker) -> None:
    """Write the key of a new cache, with what a person may want to know of it, and refuse one that was begun with another.
    Of a cache begun with more kinds of captions all tars have them, the new ones too."""
    config, index = maker.config, maker.index
    model = config.codec if what == "latents" else config.text_encoder
    key = {**maker.key, "dtype": str(maker.dtype).removeprefix("torch.")}
    about = {
        "model": {"name": model.name, "hub": model.hub, "revision": model.revision}, "stage": config.stage,
        "shards": len(index.shards), "samples": len(index), "data": index.fingerprint(), "torch": torch.__version__,
    }  # fmt: skip
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / stored.KEY_FILE).is_file():
            stored.write_key(folder, what, key, about)
    except OSError as error:
        raise UserError(f"output: {folder} cannot be written ({error.strerror}); choose another output=.") from None
    maker.key = compare(folder, what, key, str(folder), "choose another output=, or delete that folder")


def report(what: str, folder: Path, index: SampleIndex, rate: float) -> str:
    """What is there now, for a person."""
    files = {folder / name for name in stored.file_names(index, what)}
    size = sum(path.stat().st_size for path in files)
    bad = sum(int((Members(path).rows["size"] == 0).sum()) for path in files)
    per_thousand = size / 2**30 / max(len(index), 1) * 1000
    return (
        f"{CALLED[what]}: {len(index)} samples in {len(files)} files, {size:,} bytes, {per_thousand:.4g} GiB per 1000 samples"
        + (f", {rate:.1f} samples/s in a process" if rate else ", all of them there before")
        + (f", {bad} images could not be read" if bad else "")
        + f", in {folder}"
    )


def check_finite(values: Tensor, dtype: torch.dtype, whose: str, computed: str) -> None:
    """Raise UserError for what would spoil every step that reads it. ``dtype`` is what they are stored in, ``computed`` the key of what
    the model computes in."""
    finite(values, whose, computed)
    finite(values.to(dtype), whose, "dtype")


@dataclass
class Maker:
    """What both makers are given (``source`` is the checkpoint whose adapter is applied, ``pool`` reads ahead), and what they
    have once their model is loaded: the ``key`` of their values, the ``dtype`` that these are stored in, and ``former`` ones."""

    config: TrainConfig
    options: CacheOptions
    index: SampleIndex
    device: torch.device
    source: Path | None
    pool: ThreadPoolExecutor
    stop: StopSignal
    key: dict[str, Any] = field(init=False)
    dtype: torch.dtype = field(init=False)
    former: Former = field(init=False)

    def ahead(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """``function`` of each item, in order, a few of them ahead: decoding and resizing leave the interpreter to others.
        Raises Stopped when a signal has come."""
        waiting: deque[Future[R]] = deque()
        for item in items:
            waiting.append(self.pool.submit(function, item))
            if len(waiting) > 2 * self.options.readers:
                self.stop.check()
                yield waiting.popleft().result()
        yield from (future.result() for future in waiting)

    def read(self, place: Place) -> RawSample:
        """The sample there. Bytes that cannot be had now may be had later: no reason to remember it as a bad one."""
        try:
            return read_place(place)
        except OSError as error:
            raise UserError(
                f"{place.shard} cannot be read ({error.strerror or error}); mend that, then run the same command again: "
                "finished shards are kept."
            ) from None


@dataclass
class LatentMaker(Maker):
    """The latents of a shard: mean and standard deviation [2, C, h, w] of each image as it is cropped in training."""

    def __post_init__(self) -> None:
        self.codec = load_codec(self.config.codec)
        self.key = key_of(self.config, "latents", self.codec)
        self.dtype = DTYPES[self.options.dtype or self.config.codec.dtype]
        self.codec.to(self.device)
        self.buckets = buckets_of(self.config.data)
        self.assigned = assign_buckets(self.index.width, self.index.height, self.buckets)

    def make(self, rows: np.ndarray, add: Add) -> Iterator[float]:
        """The members of one shard's ``rows``, int64; gives the share that is done."""
        hashes = self.index.table["image_hash"]  # what has not changed is taken over from a shard that has
        rows = rows[[not (hashes[row] and self.former.give(self.name(row), add)) for row in rows.tolist()]]
        rows = rows[np.argsort(self.assigned[rows], kind="stable")]
        buckets = np.split(rows, np.flatnonzero(np.diff(self.assigned[rows])) + 1)
        size, done = self.options.at_once, 0
        groups = (one[i : i + size] for one in buckets for i in range(0, len(one), size))
        for group, pictures in self.ahead(self.pictures, groups):
            for row in set(group.tolist()) - set(pictures):
                add(self.name(row), None)
            if pictures:
                pixels = join_pixels(list(pictures.values())).to(self.device)
                values = torch.stack(self.codec.posterior(scale_pixels(pixels)), dim=1).cpu()  # [b, 2, C, h, w]
                place = self.index.place(next(iter(pictures)))
                check_finite(values, self.dtype, f"the latents of {place.shard.name}/{place.key}", "codec.dtype")
                for row, value in zip(pictures, values, strict=True):
                    add(self.name(row), value)
            done += len(group)
            yield done / len(rows)

    def name(self, row: int) -> int:
        return picture_name(int(self.index.ids[row]), int(self.index.table["image_hash"][row]))

    def pictures(self, rows: np.ndarray) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """``rows``, and by row the pixels, uint8 [H, W, 3], as the loader makes them, of those whose images decode."""
        found = {}
        for row in rows.tolist():
            place, bucket = self.index.place(row), self.buckets[int(self.assigned[row])]
            raw = self.read(place)
            with suppress(ValueError):
                found[row] = to_array(decode(raw.image, cover=bucket), bucket, place.id)
        return rows, found


@dataclass
class TextMaker(Maker):
    """The features of a shard's captions: of real tokens alone, or to the maximum where padding is attended to."""

    def __post_init__(self) -> None:
        config = self.config
        self.encoder = load_text_encoder(config.text_encoder, config.conditioning)
        if self.source is not None:
            load_adapter(self.encoder, open_layout(self.source).weights(), config.lora)
        self.key = key_of(config, "text", self.encoder)
        # The mean over layers is taken in fp32, whatever the model computes in.
        computed = "float32" if config.conditioning.layer_tap == "mean" else config.text_encoder.dtype
        self.dtype = DTYPES[self.options.dtype or computed]
        self.encoder.to(self.device)

    def make(self, rows: np.ndarray, add: Add) -> Iterator[float]:
        """The members of one shard's ``rows``, int64; gives the share that is done."""
        captions = {text for texts in self.ahead(self.captions, rows.tolist()) for text in texts}
        captions = {text for text in captions if not self.former.give(caption_name(text), add)}
        # By length, so that little is padded; by text too, so that the tar is a function of its captions.
        ordered = sorted(captions, key=lambda text: (len(text), text))
        size = self.options.at_once
        for start in range(0, len(ordered), size):
            self.stop.check()
            self.encode(ordered[start : start + size], add)
            yield min(1.0, (start + size) / len(ordered))

    def captions(self, row: int) -> list[str]:
        """The captions of a sample that training may draw: those of the weighted kinds; where one of them is missing, all
        that it has, since another one then stands in."""
        captions: dict[str, str] = self.read(replace(self.index.place(row), image=Span(0, 0))).meta["captions"]
        kinds = self.key["data.captions"]
        if all(captions.get(kind) for kind in kinds):
            return [captions[kind] for kind in kinds]
        return [caption for caption in captions.values() if caption]

    def encode(self, captions: list[str], add: Add) -> None:
        """The members of some captions."""
        for caption, entry in zip(captions, read_captions(self.encoder, captions, self.device), strict=True):
            check_finite(entry.values, self.dtype, f"the features of {caption[:60]!r}", "text_encoder.dtype")
            add(caption_name(caption), entry.values, entry.length)


MAKERS: Final[dict[str, type[LatentMaker | TextMaker]]] = {"latents": LatentMaker, "text": TextMaker}
