"""Tiny random text encoders on disk, one for each file of configs/text_encoder: its own architecture made small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers

from paradiffusion.text.families import model_class
from paradiffusion.text.tiny import CORPUS

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "projection_dim": 16,
    "sliding_window": 16,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 3,
    "num_decoder_layers": 3,
    "num_heads": 4,
}
WORDS = sorted(set(CORPUS.split()))


def shrink(architecture: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    """The same kind of model at a few thousand parameters."""
    return {**architecture, **{k: v for k, v in SMALL.items() if k in architecture}, "vocab_size": vocabulary}


def make_tokenizer(model_type: str) -> Any:
    """A small tokenizer that marks sequences as the family's own does; every letter is known to it."""
    from transformers import CLIPTokenizer, PreTrainedTokenizerFast, T5Tokenizer

    letters = [chr(c) for c in range(33, 127)]
    if model_type == "t5":
        pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
        pieces += [(f"▁{word}", -3.0) for word in WORDS] + [(letter, -9.0) for letter in letters]
        return T5Tokenizer(vocab=pieces, extra_ids=0, additional_special_tokens=[])
    if model_type == "clip_text_model":
        vocabulary = letters + [f"{letter}</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
        return CLIPTokenizer(vocab={piece: number for number, piece in enumerate(vocabulary)}, merges=[])
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    marks = {"eos_token": "</s>"} if model_type == "qwen3" else {"bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks)


def write_encoder(folder: Path, architecture: dict[str, Any]) -> Path:
    """Model and tokenizer in the transformers layout."""
    from transformers import AutoConfig

    tokenizer = make_tokenizer(architecture["model_type"])
    arguments = shrink(architecture, len(tokenizer))
    if arguments["model_type"] == "clip_text_model":
        arguments |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model(arguments.pop("model_type"), **arguments)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config).from_config(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms start as the identity, and leaving one out would not be seen
                parameter.data += 0.3 * torch.randn_like(parameter)
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_llama_tokenizer(folder: Path) -> Tokenizer:
    """A tokenizer.json as Llama 2's folder holds one: every text, and every part after a special token, gets a space."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = ["\u2581", *"abcdefghijklmnopqrstuvwxyz"]
    merges = [("\u2581", letter) for letter in letters]
    pieces = ["<unk>", "<s>", "</s>", *letters, *("".join(pair) for pair in merges)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    rules = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True))
    rules.add_special_tokens(["<unk>", "<s>", "</s>"])
    rules.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    rules.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "unk_token": "<unk>"}))
    return rules
