"""Captions to token ids and masks, and a folder's tokenizer by the rules that its own files state.

transformers 5 builds Llama's tokenizer from the vocabulary and rules of its own. Text without a leading space, SentencePiece's
own mark or a special token comes out the same, other text does not: " a" lost its space. Features are a function of the
ids, so the files' rules are put back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paradiffusion.data.captions import clean
from paradiffusion.machine import to_device
from paradiffusion.text.conditioning import padded_length

SPACE = "\u2581"  # SentencePiece's mark for a space


@dataclass(frozen=True)
class Tokens:
    """A tokenised batch.

    Attributes:
        ids: [B, L] int64, right-padded: by decoders with the end-of-sequence token (as the official code does).
        mask: [B, L] bool, True at real tokens, made from lengths: a caption may contain the padding token's text.
        prefix: tokens of the instruction at the front, whose features are not given to the denoiser.
        lengths: real tokens of each caption before any cut, its start and end included, prefix not counted.
        truncated: how many captions were cut to the maximum.
    """

    ids: Tensor
    mask: Tensor
    prefix: int
    lengths: list[int]
    truncated: int

    def to(self, device: torch.device) -> Tokens:
        return replace(self, ids=to_device(self.ids, device), mask=to_device(self.mask, device))


@dataclass(frozen=True)
class CaptionTokenizer:
    """Makes ``Tokens`` of captions. Without the model, so that the processes that read data have it.

    Attributes:
        tokenizer: a fast tokenizer of transformers.
        start, end, pad: the family's marks (``Marks``); ``prefix``: the ids of the instruction at the front, marks among them.
        limit: tokens of a caption at most; ``mask_padding`` and ``pad_multiple``: as of ``padded_length``; ``clean_text``:
            conditioning.clean_text.
    """

    tokenizer: Any
    start: list[int]
    end: list[int]
    pad: int
    prefix: list[int]
    limit: int
    mask_padding: bool
    pad_multiple: int
    clean_text: bool

    def __call__(self, captions: list[str]) -> Tokens:
        """Token ids and masks; captions over ``limit`` are cut, their end mark kept, and counted."""
        limit, end, prefix = self.limit, self.end, len(self.prefix)
        rows = ids_of(self.tokenizer, [clean(caption) for caption in captions] if self.clean_text else captions)
        # An instruction brings its own first token, and then an empty caption still needs one of its own.
        rows = [row if self.prefix and (row or end) else self.start + row for row in rows]
        lengths = [len(row) + len(end) for row in rows]
        width = padded_length(min(max(lengths), limit), limit, self.mask_padding, self.pad_multiple)
        ids = torch.full((len(rows), prefix + width), self.pad)
        mask = torch.zeros(len(rows), prefix + width, dtype=torch.bool)
        for number, row in enumerate(rows):
            row = self.prefix + row[: limit - len(end)] + end
            ids[number, : len(row)] = torch.tensor(row)
            mask[number, : len(row)] = True
        return Tokens(ids, mask, prefix, lengths, sum(length > limit for length in lengths))


def tokenize_once(tokenize: Callable[[list[str]], Tokens], captions: list[str]) -> tuple[Tokens, Tensor]:
    """The tokens of the different ones among b captions, and each caption's row in them, int64 [b]: equal captions, above all
    the dropped ones, which are empty, go through the language model once."""
    different = {caption: row for row, caption in enumerate(dict.fromkeys(captions))}
    return tokenize(list(different)), torch.tensor([different[caption] for caption in captions])


def ids_of(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Ids of what somebody wrote, without marks. A special token's name in it is text as any other: "</s>" ends nothing."""
    rows: list[list[int]] = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    # T5's vocabulary holds the names as pieces of text, too: there they are written in letters.
    names = {number: name for number, name in zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
             if number != tokenizer.unk_token_id}  # fmt: skip
    if names.keys().isdisjoint(number for row in rows for number in row):
        return rows
    letters = {number: tokenizer.convert_tokens_to_ids(list(name)) for number, name in names.items()}
    return [[piece for number in row for piece in letters.get(number, [number])] for row in rows]


def load_tokenizer(folder: Path) -> Any:
    """A folder's tokenizer. Raises what transformers raises."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    restore_rules(tokenizer, folder)
    return tokenizer


def restore_rules(tokenizer: Any, folder: Path) -> None:
    """Give ``tokenizer``, loaded from ``folder``, the vocabulary, merges and handling of spaces that its files state.

    Of ``tokenizer.json`` that is what stands there. Of a SentencePiece model alone (``tokenizer.model``, as Llama 2 came
    first) it is what SentencePiece and the libraries of 2023 do: merges are ranked by score, not by the pieces' numbers.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import LlamaTokenizer

    stored, pieces = folder / "tokenizer.json", folder / "tokenizer.model"
    if not isinstance(getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None), BPE):
        return
    backend = tokenizer.backend_tokenizer
    if stored.is_file():
        if isinstance(tokenizer, LlamaTokenizer):
            rules = Tokenizer.from_file(str(stored))
            backend.model, backend.normalizer = rules.model, rules.normalizer
            backend.pre_tokenizer = rules.pre_tokenizer
    elif pieces.is_file():
        _read_pieces(backend, pieces)


def _read_pieces(backend: Any, path: Path) -> None:
    """Make ``backend`` a SentencePiece BPE model's."""
    from sentencepiece import SentencePieceProcessor
    from tokenizers import normalizers
    from tokenizers.models import BPE

    model = SentencePieceProcessor(model_file=str(path))
    if model.encode("  a  b ") == model.encode("a b"):
        return  # a model that tidies spaces up has rules of its own, which transformers knows
    vocabulary, merges = merges_by_score(model)
    has_bytes = any(model.is_byte(number) for number in range(len(vocabulary)))
    unknown = model.id_to_piece(model.unk_id())
    backend.model = BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes)
    rules: list[Any] = [normalizers.Replace(" ", SPACE)]
    if model.id_to_piece(model.encode("a")[0]).startswith(SPACE):
        rules.insert(0, normalizers.Prepend(SPACE))
    backend.normalizer, backend.pre_tokenizer = normalizers.Sequence(rules), None


def merges_by_score(model: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The pieces of a SentencePiece BPE model, and every way to join two of them to a third, best score first."""
    vocabulary = {model.id_to_piece(number): number for number in range(model.get_piece_size())}
    ranked = sorted(vocabulary, key=lambda piece: -model.get_score(vocabulary[piece]))
    halves = ((piece[:at], piece[at:]) for piece in ranked for at in range(1, len(piece)))
    return vocabulary, [(left, right) for left, right in halves if left in vocabulary and right in vocabulary]
