"""How many tokens a text has, for those who only count: the tokenizer and its marks, without the model's weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from paradiffusion.config import TextEncoderConfig
from paradiffusion.errors import UserError
from paradiffusion.text.families import marks_of, read_architecture
from paradiffusion.text.sources import find_gguf, locate
from paradiffusion.text.tokenizer import load_tokenizer

# What a tokenizer is made of, and the configuration that says which family of marks it has.
_FILES = ["tokenizer*", "*.model", "vocab*", "merges*", "special_tokens_map.json", "added_tokens.json", "config.json"]


def count_tokens_with(config: TextEncoderConfig) -> Callable[[list[str]], list[int]]:
    """A function that counts each text's tokens as the text encoder does before any cut, start and end marks included.

    Raises:
        UserError: when the tokenizer is nowhere to be had, or cannot be read.
    """
    folder = tokenizer_folder(config)
    try:
        tokenizer = load_tokenizer(folder)
        marks = marks_of(tokenizer, read_architecture(folder))
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the tokenizer in {folder} could not be read ({first}); expected a folder in the transformers layout: config.json "
            "and tokenizer.json, or what its family has instead."
        ) from None
    around = len(marks.start) + len(marks.end)
    return partial(_count, tokenizer, around)  # no closure: it goes to other processes


def _count(tokenizer: Any, around: int, texts: list[str]) -> list[int]:
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    return [len(row) + around for row in rows]


def tokenizer_folder(config: TextEncoderConfig) -> Path:
    """The local folder with a text encoder's tokenizer; from the hub only its own small files are fetched.

    Raises:
        UserError: when it is nowhere to be had.
    """
    carried = config.package is not None and find_gguf(config.package) is not None
    if config.path is None and config.hub is not None and not carried:
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(config.hub, revision=config.revision, allow_patterns=_FILES))
        except Exception:  # of a dozen unrelated types; ``locate`` knows the sentence
            return locate(config)
    return locate(config)
