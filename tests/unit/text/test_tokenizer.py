"""Token ids are what a folder's own files say, whatever the library would make of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_encoders import write_llama_tokenizer

from paradiffusion.text.tiny import CORPUS
from paradiffusion.text.tokenizer import load_tokenizer

TEXTS = [
    "a red circle", " a red  circle ", "", "   ", "a\u2581b", "\u2581a", "a b</s>c d", "x </s> y", "\u00e9mu \U0001f98a\n\tz",
    "a" * 9 + " " * 7,
]  # fmt: skip


def test_the_rules_of_a_tokenizer_json(tmp_path: Path) -> None:
    rules = write_llama_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for text in TEXTS:
        expected = rules.encode(text, add_special_tokens=False).ids
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected, repr(text)
    tokenizer.save_pretrained(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert [again(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("settings", [{"tokenizer_class": "LlamaTokenizer"}, None])
def test_a_sentencepiece_model_alone(tmp_path: Path, prefix: bool, settings: dict[str, str] | None) -> None:
    """With tokenizer_config.json and without one."""
    import sentencepiece as spm

    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.split("\n")), model_prefix=str(tmp_path / "tokenizer"), model_type="bpe",
        vocab_size=420, byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=prefix,
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    own = spm.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = load_tokenizer(tmp_path)
    for text in TEXTS:
        if "</s>" not in text:  # SentencePiece itself takes it for text
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == own.encode(text), repr(text)
