"""Read a folder's tokenizer by the rules that its own files state.

transformers 5 builds Llama's tokenizer from the vocabulary and rules of its own. Text without a leading space, SentencePiece's
own mark or a special token comes out the same, other text does not: " a" lost its space. Features are a function of the
ids, so the files' rules are put back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

SPACE = "\u2581"  # SentencePiece's mark for a space


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
