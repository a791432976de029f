"""Text-embedding models, as sentence-transformers loads them: a text to one vector, by which texts are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from sentence_transformers import SentenceTransformer

from paradiffusion.checkpoints.tensors import whole_files
from paradiffusion.errors import UserError, reason_of
from paradiffusion.machine import choose_device, settled_dtype
from paradiffusion.text.sources import fingerprint

MAX_LENGTH: Final = 8192  # tokens read of a text, where the model takes as many: TIT-Score's
_BATCH: Final = 16


def embedding_settings(model: str) -> dict[str, Any]:
    """What the vectors of ``model`` (a hub id, or a folder of transformers' or sentence-transformers' layout) depend on, as JSON; nothing
    is loaded. UserError for what is neither."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return {"model": folder.resolve().name, "revision": fingerprint(folder), "max_length": MAX_LENGTH}
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise UserError(f"text_embedding={model} is neither a folder nor a hub id; give one such as Qwen/Qwen3-Embedding-0.6B.")
    return {"model": model, "max_length": MAX_LENGTH}


class TextEmbedder:
    """A model, ready to embed, in bfloat16 on a GPU and float32 elsewhere; it reads ``max_length`` tokens of a text, with ``prefix``, which
    its files say, before it. UserError where the model cannot be had, or is no encoder of single texts."""

    def __init__(self, model: str, device: str | None = None) -> None:
        embedding_settings(model)
        self._network = _load(model, device)
        self._network.max_seq_length = self.max_length = min(MAX_LENGTH, self._network.max_seq_length)
        self.prefix: str = self._network.prompts.get(self._network.default_prompt_name or "") or ""

    def embed(self, texts: Sequence[str], between: Callable[[int], None] = lambda done: None) -> tuple[torch.Tensor, list[bool]]:
        """float32 [B, D] of unit length, on the CPU, and which of ``texts`` were cut at ``max_length`` tokens. ``between`` is called
        after each batch with the number of texts in it."""
        tokens = self._network.tokenizer
        lengths = [len(tokens(self.prefix + text, truncation=False, verbose=False)["input_ids"]) for text in texts]
        # The shorter half with the shorter half: padding is most of the work otherwise.
        order = sorted(range(len(texts)), key=lengths.__getitem__)
        vectors: list[torch.Tensor] = [torch.zeros(0)] * len(texts)
        for start in range(0, len(order), _BATCH):
            rows = order[start : start + _BATCH]
            made = self._network.encode(
                [texts[row] for row in rows], prompt=self.prefix, batch_size=len(rows), convert_to_tensor=True, show_progress_bar=False
            )  # [b, D]
            for row, vector in zip(rows, torch.nn.functional.normalize(made.float(), dim=-1).cpu(), strict=True):
                vectors[row] = vector
            between(len(rows))
        cut = [length > self.max_length for length in lengths]
        return (torch.stack(vectors) if vectors else torch.zeros(0, 0)), cut


def _load(model: str, device: str | None) -> Any:
    """The modules that the model's files name; without modules.json the transformer, and decoders' last token or others' mean."""
    folder, place = Path(model).expanduser(), choose_device(device)
    local = folder.is_dir()
    try:
        network: Any = SentenceTransformer(
            str(whole_files(folder)) if local else model,
            device=str(place),
            trust_remote_code=False,
            local_files_only=local,
            model_kwargs={"dtype": getattr(torch, settled_dtype("auto", place)), "use_safetensors": True},
        )
        if network.transformers_model is None or network.config.is_encoder_decoder:
            raise ValueError("it is no transformer that makes one vector of a text, as one with a decoder too")
    except (KeyboardInterrupt, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers raises a dozen unrelated types
        advice = "" if local else f"; fetch it where there is a network (`hf download {model}`), or give a folder"
        raise UserError(
            f"text_embedding={model} cannot be loaded ({reason_of(error)[:300].rstrip('.')}); expected config.json, *.safetensors "
            f"and a tokenizer of a model that sentence-transformers knows by itself, such as Qwen/Qwen3-Embedding-0.6B{advice}."
        ) from None
    tokens = network.tokenizer
    tokens.padding_side = tokens.truncation_side = "right"
    if tokens.pad_token is None:
        tokens.pad_token = tokens.eos_token
    return network.requires_grad_(False)
