"""Text-embedding models, as sentence-transformers loads them: a text to one vector, by which texts are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling

from paradiffusion.checkpoints.tensors import whole_files
from paradiffusion.checks import one_of, positive
from paradiffusion.config import check_values, option
from paradiffusion.errors import UserError, reason_of
from paradiffusion.machine import choose_device, settled_dtype
from paradiffusion.text.sources import fingerprint

POOLINGS: Final = {"mean": "mean", "last": "lasttoken", "cls": "cls", "max": "max"}  # ours to the library's
_FILES: Final = ("*.json", "*.txt", "*.model", "*.safetensors")


@dataclass(frozen=True)
class EmbeddingOptions:
    """A text-embedding model as a person asks for it.

    Attributes:
        model, revision: a hub id or a folder of transformers' or sentence-transformers' layout; the hub's commit.
        dtype: "auto" is bfloat16 on a GPU and float32 elsewhere.
        max_length: tokens read at most, where the model takes as many (8192 is TIT-Score's).
        pooling, prefix: how token features become one vector, and what is put before each text; None for what the model's files say.
        key: how the command line calls ``model``, for messages.
    """

    model: str
    revision: str | None = None
    dtype: str = option("auto", accepts=one_of("auto", "float32", "bfloat16", "float16"))
    device: str | None = None
    batch_size: int = option(16, accepts=positive)
    max_length: int = option(8192, accepts=positive)
    pooling: str | None = option(None, accepts=one_of(*POOLINGS))
    prefix: str | None = None
    key: str = "text_embedding"

    def check(self) -> None:
        """Raise UserError for what cannot be meant."""
        check_values(self)
        folder = Path(self.model).expanduser()
        if not folder.is_dir() and (self.model.count("/") != 1 or self.model.startswith((".", "/", "~"))):
            raise UserError(f"{self.key}={self.model} is neither a folder nor a hub id; give one such as Qwen/Qwen3-Embedding-0.6B.")

    def settings(self) -> dict[str, Any]:
        """What vectors depend on, as JSON, without loading the model."""
        folder = Path(self.model).expanduser()
        name, revision = (folder.resolve().name, fingerprint(folder)) if folder.is_dir() else (self.model, self.revision)
        return {
            "model": name, "revision": revision, "dtype": self.dtype, "max_length": self.max_length, "pooling": self.pooling,
            "prefix": self.prefix,
        }  # fmt: skip


class TextEmbedder:
    """A model, ready to embed: its name, the tokens that it reads of a text, and what is put before each text. UserError where the model
    cannot be had, or is no encoder of single texts."""

    def __init__(self, options: EmbeddingOptions) -> None:
        options.check()
        self.model = Path(options.model).resolve().name if Path(options.model).expanduser().is_dir() else options.model
        self._options, self._network = options, _load(_folder(options), options)
        self._network.max_seq_length = self.max_length = min(options.max_length, self._network.max_seq_length)
        said = self._network.prompts.get(self._network.default_prompt_name or "") or ""
        self.prefix: str = said if options.prefix is None else options.prefix

    def embed(self, texts: Sequence[str], between: Callable[[int], None] = lambda done: None) -> tuple[torch.Tensor, list[bool]]:
        """float32 [B, D] of unit length, on the CPU, and which of ``texts`` were cut at ``max_length`` tokens. ``between`` is called
        after each batch with the number of texts in it."""
        tokens = self._network.tokenizer
        lengths = [len(tokens(self.prefix + text, truncation=False, verbose=False)["input_ids"]) for text in texts]
        # The shorter half with the shorter half: padding is most of the work otherwise.
        order = sorted(range(len(texts)), key=lengths.__getitem__)
        vectors: list[torch.Tensor] = [torch.zeros(0)] * len(texts)
        for start in range(0, len(order), self._options.batch_size):
            rows = order[start : start + self._options.batch_size]
            made = self._network.encode(
                [texts[row] for row in rows], prompt=self.prefix, batch_size=len(rows), convert_to_tensor=True, show_progress_bar=False
            )  # [b, D]
            for row, vector in zip(rows, torch.nn.functional.normalize(made.float(), dim=-1).cpu(), strict=True):
                vectors[row] = vector
            between(len(rows))
        cut = [length > self.max_length for length in lengths]
        return (torch.stack(vectors) if vectors else torch.zeros(0, 0)), cut


def _folder(options: EmbeddingOptions) -> Path:
    """The model's files on this machine, fetched if need be."""
    folder = Path(options.model).expanduser()
    if folder.is_dir():
        return whole_files(folder)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(options.model, revision=options.revision, allow_patterns=list(_FILES)))
    except Exception as error:  # the hub's client raises a dozen unrelated types
        raise UserError(
            f"{options.key}={options.model} cannot be had ({reason_of(error)[:300].rstrip('.')}); fetch it where there is a network "
            f"(`hf download {options.model}`), or give a folder."
        ) from None


def _load(folder: Path, options: EmbeddingOptions) -> Any:
    """The modules that ``folder`` names; without modules.json the transformer, and decoders' last token or others' mean."""
    device = choose_device(options.device)
    dtype = settled_dtype(options.dtype, device)
    try:
        network: Any = SentenceTransformer(
            str(folder),
            device=str(device),
            trust_remote_code=False,
            local_files_only=True,
            model_kwargs={"dtype": getattr(torch, dtype), "use_safetensors": True},
        )
        if network.transformers_model is None or network.config.is_encoder_decoder:
            raise ValueError("it is no transformer that makes one vector of a text, as one with a decoder too")
    except (KeyboardInterrupt, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers raises a dozen unrelated types
        raise UserError(
            f"{options.key}={options.model} cannot be loaded ({reason_of(error)[:300].rstrip('.')}); expected config.json, "
            "*.safetensors and a tokenizer of a model that sentence-transformers knows by itself, such as Qwen/Qwen3-Embedding-0.6B."
        ) from None
    if options.pooling is not None:
        for place, module in enumerate(network):
            if isinstance(module, Pooling):
                network[place] = Pooling(module.embedding_dimension, POOLINGS[options.pooling])  # type: ignore[arg-type]
    tokens = network.tokenizer
    tokens.padding_side = tokens.truncation_side = "right"
    if tokens.pad_token is None:
        tokens.pad_token = tokens.eos_token
    return network.requires_grad_(False)
