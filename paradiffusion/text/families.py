"""Families of text encoders: the class that reads each, its architecture without weights, and its weights in 16, 8 or 4 bits.

Nothing here names a model: a folder's config.json, or ``text_encoder.architecture``, says its ``model_type``, and the
rest follows from what transformers knows of that type and from the model itself.
"""

from __future__ import annotations

import importlib.util
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paradiffusion.config import TextEncoderConfig
from paradiffusion.errors import UserError, reason_of
from paradiffusion.text.sources import find_gguf, locate
from paradiffusion.text.tokenizer import ids_of, load_tokenizer

PACKAGES = {"4bit": "bitsandbytes", "fp8": "torchao"}  # by quantization
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# A multimodal checkpoint's names of its language model's tensors, by either of transformers' conventions.
LANGUAGE_MODEL = {r"^(model\.)?language_model\.(model\.)?": ""}
# What a tokenizer is made of, and the configuration that says which family of marks it has.
_FILES = ["tokenizer*", "*.model", "vocab*", "merges*", "special_tokens_map.json", "added_tokens.json", "config.json"]


def read_architecture(folder: Path) -> Any:
    """The transformers configuration of a folder's text model, without dropout.

    Of a multimodal checkpoint (Gemma 3, CLIP) it is the language model's own. Raises what transformers raises.
    """
    from transformers import AutoConfig

    return _text_only(AutoConfig.from_pretrained(folder))


def architecture_of(config: TextEncoderConfig) -> Any:
    """The transformers configuration of a text encoder, from ``path`` where that is set, else from ``architecture``.

    Raises:
        UserError: when neither says what the model looks like.
    """
    from transformers import AutoConfig

    try:
        if config.path is not None and (Path(config.path).expanduser() / "config.json").is_file():
            return read_architecture(Path(config.path).expanduser())
        arguments = dict(config.architecture)
        return _text_only(AutoConfig.for_model(arguments.pop("model_type", ""), **arguments))
    except Exception as error:  # transformers checks a configuration by half a dozen types of its own
        raise UserError(
            f"text_encoder.architecture of {config.name} does not describe a model ({reason_of(error)}); expected model_type and the "
            "arguments of its transformers configuration, as in configs/text_encoder/llama2_7b.yaml."
        ) from None


def text_width(config: TextEncoderConfig) -> int:
    """Width D of the features [B, L, D], without weights."""
    return int(architecture_of(config).hidden_size)


def is_encoder(architecture: Any) -> bool:
    """Whether transformers counts a model among the encoders of text (T5, CLIP), rather than among the decoders."""
    from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING

    return type(architecture) in MODEL_FOR_TEXT_ENCODING_MAPPING


def model_class(architecture: Any) -> Any:
    """The transformers auto class that makes the text encoder: of an encoder-decoder its encoder alone, else the model
    without a head."""
    from transformers import AutoModel, AutoModelForTextEncoding

    return AutoModelForTextEncoding if is_encoder(architecture) else AutoModel


def empty_model(config: TextEncoderConfig) -> nn.Module:
    """The text encoder on the meta device, cut to its first ``config.layers`` layers: shapes and parameter counts."""
    architecture = architecture_of(config)
    with torch.device("meta"):
        model = model_class(architecture).from_config(architecture)
    cut_layers(model, config)
    return model


def layers_of(model: Any) -> str:
    """The dotted name of the list of a model's layers ("layers", "encoder.block", ...)."""
    total = model.config.num_hidden_layers
    found = (name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == total)
    return next(found)


def cut_layers(model: Any, config: TextEncoderConfig) -> None:
    """Keep the first ``config.layers`` layers (None for all) and what follows the last one: the final norm.

    Raises:
        UserError: when there are fewer.
    """
    if config.layers is None:
        return
    total = model.config.num_hidden_layers
    if config.layers > total:
        raise UserError(f"text_encoder.layers={config.layers} is more than the {total} layers of {config.name}.")
    parent, _, attribute = layers_of(model).rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, attribute, getattr(owner, attribute)[: config.layers])
    model.config.num_hidden_layers = config.layers


def position_limit(model: Any) -> int | None:
    """The length of a model's table of learned positions (77 in CLIP); None where positions are relative."""
    positions = getattr(model.config, "max_position_embeddings", None)
    words = model.get_input_embeddings()
    tables = (m for m in model.modules() if isinstance(m, nn.Embedding) and m is not words)
    return positions if any(table.num_embeddings == positions for table in tables) else None


@dataclass(frozen=True)
class Marks:
    """Tokens around and after a text: ``start`` and ``end`` (either may be empty), and the padding token."""

    start: list[int]
    end: list[int]
    pad: int


def marks_of(tokenizer: Any, architecture: Any) -> Marks:
    """How a family marks a sequence.

    Decoders start it with BOS, or with EOS where they have no BOS, and pad with EOS, as the official code does. Without a
    first token an empty prompt has no token at all, and the first word becomes the attention sink whose state says
    nothing. Of an encoder (CLIP starts and ends a sequence, T5 ends it) marks are what its tokenizer puts around a text,
    and padding is its own.

    Raises:
        UserError: for a tokenizer without an end-of-sequence token.
    """
    first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
    if last is None:
        raise UserError("the text encoder's tokenizer has no end-of-sequence token; expected eos_token in its settings.")
    if not is_encoder(architecture):
        return Marks([last if first is None else first], [], last)
    bare, whole = (tokenizer("a", add_special_tokens=marked)["input_ids"] for marked in (False, True))
    at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    start, end = whole[:at], whole[at + len(bare) :]
    return Marks(start, end or [last], last if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


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
        raise UserError(
            f"the tokenizer in {folder} could not be read ({reason_of(error)}); expected a folder in the transformers layout: config.json "
            "and tokenizer.json, or what its family has instead."
        ) from None
    around = len(marks.start) + len(marks.end)
    return partial(_count, tokenizer, around)  # no closure: it goes to other processes


def _count(tokenizer: Any, around: int, texts: list[str]) -> list[int]:
    rows = ids_of(tokenizer, texts) if texts else []
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


def read_model(folder: Path, config: TextEncoderConfig, device: torch.device | None = None) -> tuple[Any, Any]:
    """The frozen text model, cut to its first ``config.layers`` layers, and its tokenizer; see ``load_text_encoder``.

    Raises:
        UserError: when the folder is not readable, lacks tensors, or cannot be quantised here.
    """
    from safetensors import SafetensorError

    check_quantization(config)
    placed = ({} if device is None else {"device_map": {"": device}}) | quantized(config)
    try:
        architecture = read_architecture(folder)
        # The checkpoint's own dtype is not ours to trust (transformers 5 would keep it), and remote code is never run.
        model, report = model_class(architecture).from_pretrained(
            folder, config=architecture, dtype=DTYPES[config.dtype], key_mapping=LANGUAGE_MODEL, weights_only=True,
            output_loading_info=True, **placed,
        )  # fmt: skip
        tokenizer = load_tokenizer(folder)
    except (OSError, ValueError, KeyError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise UserError(
            f"the text encoder in {folder} could not be read ({reason_of(error)}); expected the transformers layout with safetensors "
            "weights, so fetch it again or set text_encoder.path=<folder>."
        ) from None
    missing = sorted(report["missing_keys"])
    if missing:  # transformers fills them with random numbers, and only prints so
        raise UserError(
            f"the text encoder in {folder} lacks {len(missing)} of the tensors of {type(model).__name__}, {missing[0]} the "
            "first; fetch it again or set text_encoder.path=<folder>."
        )
    cut_layers(model, config)
    model.requires_grad_(False)
    if config.quantization == "fp8":
        multiply_in_fp8(model)
    return model.eval(), tokenizer


def lacks_bitsandbytes() -> str | None:
    """What bitsandbytes (weights of 4 bits, optimisers of 8) would need and is not here; None where it can run."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    from transformers.utils import is_bitsandbytes_available  # of a version that transformers takes

    return None if is_bitsandbytes_available() else "this one is too old (`pip install -U bitsandbytes`)"


def lacks(quantization: str | None) -> str | None:
    """What a language model with this ``quantization`` would need and is not here; None where it can run."""
    if quantization == "4bit":
        return lacks_bitsandbytes()
    if quantization is None or not torch.cuda.is_available():
        return None if quantization is None else "there is no CUDA device"
    if torch.cuda.get_device_capability() < (8, 9):
        return "this one has no products of 8 bits (Ada, Hopper or later have)"
    return None if importlib.util.find_spec("torchao") else "torchao is not installed"


def check_quantization(config: TextEncoderConfig) -> None:
    """Raise UserError where the language model cannot be quantised as configured."""
    if lacking := lacks(config.quantization):
        package = PACKAGES[str(config.quantization)]
        raise UserError(
            f"text_encoder.quantization={config.quantization} needs a CUDA device and the package {package}, and {lacking}; set "
            "text_encoder.quantization=null, or run it where both are."
        )


def multiply_in_fp8(model: nn.Module, emulate: bool = False) -> None:
    """Let the linear layers round weights and inputs to 8 bits with a scale for each row (arXiv 2209.05433), and gradients on the way
    back. ``emulate``: multiply what was rounded in fp32, on hardware that cannot multiply 8 bits."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = replace(Float8LinearConfig.from_recipe_name("rowwise"), emulate=emulate)
    convert_to_float8_training(
        model, config=config, module_filter_fn=lambda layer, _: not (layer.in_features % 16 or layer.out_features % 16)
    )


def quantized(config: TextEncoderConfig) -> dict[str, Any]:
    """What from_pretrained needs to keep the linear layers in NF4 with double quantisation (QLoRA, arXiv 2305.14314)."""
    if config.quantization != "4bit":
        return {}
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    return {"quantization_config": settings, "device_map": {"": torch.cuda.current_device()}}


def _text_only(architecture: Any) -> Any:
    text = architecture.get_text_config()
    for key, value in list(vars(text).items()):
        # All dropout is 0 in this project, or training could not be resumed bit for bit (T5 is published with 0.1).
        if "dropout" in key and isinstance(value, float):
            setattr(text, key, 0.0)
    return text
