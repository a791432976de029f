"""Cache keys: everything that cached latents and text features are functions of, compared before they are used."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from paradiffusion.config import DataConfig, TrainConfig, identity
from paradiffusion.data.cache import (
    NULL_FILE,
    PIXELS_VERSION,
    Cache,
    Entry,
    Members,
    caption_name,
    file_names,
    find_difference,
    folders_of,
    is_whole,
    read_key,
)
from paradiffusion.data.index import SampleIndex
from paradiffusion.data.shards import ShardPath
from paradiffusion.errors import UserError
from paradiffusion.models.codec import Codec
from paradiffusion.text.encoder import TextEncoder

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
