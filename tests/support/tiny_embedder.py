"""Tiny random text-embedding models on disk, of transformers' own classes: one token a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

WIDTH = 32


def write_embedder(
    folder: Path, words: list[str], decoder: bool = False, positions: int = 64, modules: list[dict[str, Any]] | None = None,
    pooling: dict[str, Any] | None = None, **files: Any,
) -> Path:  # fmt: skip
    """A BERT that knows ``words``, or a Llama with its language head's name; with modules.json where there are modules.

    ``files`` are further JSON files by their stem.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    pieces = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *sorted({word.lower() for word in words})]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [SEP]" if decoder else "[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]",
        eos_token="[SEP]", padding_side="left",
    )  # fmt: skip
    shape: dict[str, Any] = {
        "vocab_size": len(pieces), "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": positions, "pad_token_id": 0,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network: Any = LlamaForCausalLM(LlamaConfig(**shape)) if decoder else BertModel(BertConfig(**shape))
        for name, parameter in network.named_parameters():
            if "embed" in name and parameter.ndim > 1:  # words must differ
                parameter.data = torch.randn_like(parameter) * (1.0 if "word" in name or "tokens" in name else 0.02)
    inner = folder / next((str(m["path"]) for m in modules or [] if str(m["type"]).endswith("Transformer")), "")
    inner.mkdir(parents=True, exist_ok=True)
    network.save_pretrained(inner)
    wrapped.save_pretrained(inner)
    if modules is not None:
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling").mkdir(exist_ok=True)
        (folder / "1_Pooling" / "config.json").write_text(
            json.dumps({"word_embedding_dimension": WIDTH, **(pooling or {})})
        )
    for name, content in files.items():
        (inner / f"{name}.json").write_text(json.dumps(content))
    return folder


def modules(inner: str = "", *more: str) -> list[dict[str, Any]]:
    """The modules.json of sentence-transformers: a transformer in ``inner``, a pooling, and ``more``."""
    names = [("Transformer", inner), ("Pooling", "1_Pooling"), *((kind, f"2_{kind}") for kind in more)]
    return [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, path) in enumerate(names)
    ]
