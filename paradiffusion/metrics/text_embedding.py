"""Text-embedding models: a text to one vector, by which texts are compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from paradiffusion.checks import choice, positive
from paradiffusion.errors import UserError

POOLINGS: Final = ("mean", "last", "cls", "max")
_OF_SENTENCE_TRANSFORMERS: Final = {
    "pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last", "pooling_mode_mean_sqrt_len_tokens": "mean",  # the same direction as the mean
    "pooling_mode_weightedmean_tokens": None,
}  # fmt: skip
_FILES: Final = ("*.json", "*.txt", "*.model", "*.safetensors")


@dataclass(frozen=True)
class EmbeddingOptions:
    """A text-embedding model as a person asks for it.

    Attributes:
        model, revision: a hub id or a folder of transformers' or sentence-transformers' layout; the hub's commit.
        dtype: "auto" is bfloat16 on a GPU and float32 elsewhere.
        max_length: tokens read at most, where the model takes as many (8192 is TIT-Score's).
        pooling: how token features become one vector; None for what the model's files say.
        prefix: put before each text; None for what the model's files say, mostly nothing.
        key: how the command line calls ``model``, for messages.
    """

    model: str
    revision: str | None = None
    dtype: str = "auto"
    device: str | None = None
    batch_size: int = 16
    max_length: int = 8192
    pooling: str | None = None
    prefix: str | None = None
    key: str = "text_embedding"

    def check(self) -> None:
        """Raise UserError for what cannot be meant."""
        choice("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        positive("batch_size", self.batch_size)
        positive("max_length", self.max_length)
        if self.pooling is not None:
            choice("pooling", self.pooling, POOLINGS)
        folder = Path(self.model).expanduser()
        if not folder.is_dir() and (self.model.count("/") != 1 or self.model.startswith((".", "/", "~"))):
            raise UserError(
                f"{self.key}={self.model} is neither a folder nor a hub id; give one such as Qwen/Qwen3-Embedding-0.6B."
            )

    def settings(self, fingerprint: Callable[[Path], str]) -> dict[str, Any]:
        """What vectors depend on, as JSON, without loading the model; ``fingerprint`` is a hash of a folder's weights."""
        folder = Path(self.model).expanduser()
        name, revision = (
            (folder.resolve().name, fingerprint(folder)) if folder.is_dir() else (self.model, self.revision)
        )
        return {
            "model": name, "revision": revision, "dtype": self.dtype, "max_length": self.max_length, "pooling": self.pooling,
            "prefix": self.prefix,
        }  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """What a model's files say about making one vector of a text.

    Attributes:
        folder: of the transformer itself.
        poolings: their vectors are put one after the other.
        max_length: tokens, None where the files do not say.
    """

    folder: Path
    poolings: tuple[str, ...]
    max_length: int | None = None
    prefix: str = ""
    lower: bool = False


class TextEmbedder:
    """A model, ready to embed.

    Attributes:
        model, revision: its name and what tells its weights from others of that name.
        max_length: tokens that it reads of a text.

    Raises:
        UserError: where the model cannot be had, has a part that is not known here, or is no encoder of single texts.
    """

    def __init__(self, options: EmbeddingOptions) -> None:
        options.check()
        self.model = Path(options.model).resolve().name if Path(options.model).expanduser().is_dir() else options.model
        self._options, self._device = options, torch.device(
            options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        )  # fmt: skip
        number_type = (
            ("bfloat16" if self._device.type == "cuda" else "float32") if options.dtype == "auto" else options.dtype
        )
        folder = _folder(options)
        self._recipe = read_recipe(folder, options)
        self._network, self._tokenizer = _load(self._recipe.folder, options, getattr(torch, number_type))
        self._network.to(self._device).eval().requires_grad_(False)
        self.max_length = _max_length(self._recipe, options, self._tokenizer, self._network.config)
        self.prefix = self._recipe.prefix if options.prefix is None else options.prefix

    def embed(
        self, texts: Sequence[str], between: Callable[[int], None] = lambda done: None
    ) -> tuple[torch.Tensor, list[bool]]:
        """float32 [B, D] of unit length, on the CPU, and which of ``texts`` were cut at ``max_length`` tokens.

        Args:
            between: called after each batch with the number of texts in it.
        """
        ids = [self._ids(text) for text in texts]
        cut = [len(row) > self.max_length for row in ids]
        # The shorter half with the shorter half: padding is most of the work otherwise.
        order = sorted(range(len(texts)), key=lambda number: len(ids[number]))
        vectors: list[torch.Tensor] = [torch.zeros(0)] * len(texts)
        for start in range(0, len(order), self._options.batch_size):
            rows = order[start : start + self._options.batch_size]
            for row, vector in zip(rows, self._batch([texts[row] for row in rows]), strict=True):
                vectors[row] = vector
            between(len(rows))
        return (torch.stack(vectors) if vectors else torch.zeros(0, 0)), cut

    def _text(self, text: str) -> str:
        whole = self.prefix + text
        return whole.lower() if self._recipe.lower else whole

    def _ids(self, text: str) -> list[int]:
        found: list[int] = self._tokenizer(self._text(text), truncation=False, verbose=False)["input_ids"]
        return found

    @torch.inference_mode()
    def _batch(self, texts: list[str]) -> torch.Tensor:
        inputs = self._tokenizer(
            [self._text(text) for text in texts], padding=True, truncation=True, max_length=self.max_length,
            return_tensors="pt",
        ).to(self._device)  # fmt: skip
        states = self._network(**inputs).last_hidden_state.float()  # [b, L, D]
        mask = inputs["attention_mask"]  # [b, L], ones first: the padding is on the right
        pooled = torch.cat([_pool(states, mask, pooling) for pooling in self._recipe.poolings], dim=-1)
        return torch.nn.functional.normalize(pooled, dim=-1).cpu()


def _pool(states: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """[b, D] of token features [b, L, D] and a mask [b, L] whose ones come first."""
    if pooling == "cls":
        return states[:, 0]
    if pooling == "last":
        return states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]
    if pooling == "max":
        return states.masked_fill(mask[..., None] == 0, -torch.inf).max(1).values
    weights = mask[..., None].float()
    return (states * weights).sum(1) / weights.sum(1)


def read_recipe(folder: Path, options: EmbeddingOptions) -> Recipe:
    """How ``folder`` makes vectors: by modules.json of sentence-transformers, else the transformer itself.

    Without modules.json, decoders (``...ForCausalLM``) give their last token's features, others the mean over tokens.
    Raises UserError for modules other than a transformer, poolings and a normalisation.
    """
    if not (folder / "modules.json").is_file():
        heads = _json(folder / "config.json", options).get("architectures") or [""]
        pooling = options.pooling or ("last" if str(heads[0]).endswith("ForCausalLM") else "mean")
        return Recipe(folder, (pooling,))
    transformer = folder
    poolings: tuple[str, ...] = ()
    for module in _json(folder / "modules.json", options):
        kind = str(module["type"]).rpartition(".")[2]
        if kind == "Transformer":
            transformer = folder / str(module["path"])
        elif kind == "Pooling" and options.pooling is None:
            poolings = _poolings(folder / str(module["path"]) / "config.json", options)
        elif kind not in ("Pooling", "Normalize"):
            raise UserError(
                f"{options.key}={options.model} has a module {kind}, which is not known here; choose a model of a transformer, a "
                "pooling and a normalisation, such as Qwen/Qwen3-Embedding-0.6B."
            )
    said = folder / "config_sentence_transformers.json"
    default = _json(said, options) if said.is_file() else {}
    prefix = (default.get("prompts") or {}).get(default.get("default_prompt_name") or "", "")
    own = transformer / "sentence_bert_config.json"
    limits = _json(own, options) if own.is_file() else {}
    length, lower = limits.get("max_seq_length"), bool(limits.get("do_lower_case"))
    return Recipe(transformer, (options.pooling,) if options.pooling else poolings or ("mean",), length, prefix, lower)


def _poolings(path: Path, options: EmbeddingOptions) -> tuple[str, ...]:
    config = _json(path, options)
    found: list[str | None]
    if isinstance(config.get("pooling_mode"), str):  # the newer files
        found = [{"lasttoken": "last", "cls": "cls", "mean": "mean", "max": "max"}.get(config["pooling_mode"])]
    else:
        found = [
            _OF_SENTENCE_TRANSFORMERS.get(name) for name, value in config.items() if "pooling_mode" in name and value
        ]
    if not found or None in found:
        raise UserError(
            f"{options.key}={options.model} pools in a way that is not known here ({path.parent.name}/{path.name}); set pooling= to "
            f"one of {', '.join(POOLINGS)}, or choose another model."
        )
    return tuple(str(name) for name in found)


def _folder(options: EmbeddingOptions) -> Path:
    """The model's files on this machine, fetched if need be."""
    folder = Path(options.model).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(options.model, revision=options.revision, allow_patterns=list(_FILES)))
    except Exception as error:  # the hub's client raises a dozen unrelated types
        raise UserError(
            f"{options.key}={options.model} cannot be had ({_reason(error)}); fetch it where there is a network "
            f"(`hf download {options.model}`), or give a folder."
        ) from None


def _load(folder: Path, options: EmbeddingOptions, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if config.is_encoder_decoder:
            raise UserError(
                f"{options.key}={options.model} is an encoder with a decoder; choose a model that makes one vector of a text."
            )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        network = AutoModel.from_pretrained(folder, dtype=dtype, use_safetensors=True, trust_remote_code=False)
    except (UserError, KeyboardInterrupt, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers raises a dozen unrelated types
        raise UserError(
            f"{options.key}={options.model} cannot be loaded ({_reason(error)}); expected config.json, *.safetensors and a tokenizer "
            "of a model that transformers knows by itself."
        ) from None
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return network, tokenizer


def _max_length(recipe: Recipe, options: EmbeddingOptions, tokenizer: Any, config: Any) -> int:
    """Tokens that the model can read, and is asked to."""
    limits = [options.max_length, tokenizer.model_max_length, recipe.max_length]
    if positions := getattr(config, "max_position_embeddings", None):
        # RoBERTa's positions begin after its padding's.
        limits.append(positions - (config.pad_token_id + 1 if "roberta" in config.model_type else 0))
    return min(int(limit) for limit in limits if limit)


def _json(path: Path, options: EmbeddingOptions) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f"{options.key}={options.model} has no readable {path.name}; give a whole folder of a text-embedding model."
        ) from None


def _reason(error: Exception) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line[:300].rstrip(".")
