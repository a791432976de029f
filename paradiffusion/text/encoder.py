"""The text encoder: a language model's hidden states as features.

One place decides tokenisation, padding side, maximum length, layer tap and masking, all from ConditioningConfig, which a
checkpoint records whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paradiffusion.config import ConditioningConfig, LoraConfig, TextEncoderConfig
from paradiffusion.errors import UserError
from paradiffusion.text.conditioning import padded_length
from paradiffusion.text.sources import fingerprint, locate

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Tokens:
    """A tokenised batch.

    Attributes:
        ids: [B, L] int64, right-padded with the end-of-sequence token (as the official code does).
        mask: [B, L] bool, True at real tokens, made from lengths: a caption may contain the padding token's text.
        prefix: tokens of the instruction at the front, whose features are not given to the denoiser.
        lengths: real tokens of each caption before any cut, prefix not counted.
        truncated: how many captions were cut to the maximum.
    """

    ids: Tensor
    mask: Tensor
    prefix: int
    lengths: list[int]
    truncated: int

    def to(self, device: torch.device | str) -> Tokens:
        return Tokens(self.ids.to(device), self.mask.to(device), self.prefix, self.lengths, self.truncated)


class TextEncoder(nn.Module):
    """A language model (Llama architecture and its relatives) read at a layer tap.

    Args:
        model: a transformers decoder without its head; ``tokenizer``: its fast tokenizer.
        settings: layer tap, prefix, maximum length and masking.
        source: id, revision and hash of the model, for the checkpoint.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: ConditioningConfig, source: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings
        self.source = source
        self.width: int = model.config.hidden_size
        first = tokenizer.bos_token_id
        # Without a first token an empty prompt has no token at all, and the first word becomes the attention sink whose
        # state says nothing; a few tokenizers (GPT-2's family) add none by themselves.
        self.start: list[int] = [first if first is not None else tokenizer.eos_token_id]
        self.prefix_ids: list[int] = (
            self.start + tokenizer(settings.prefix, add_special_tokens=False)["input_ids"] if settings.prefix else []
        )
        self.pad_id: int = tokenizer.eos_token_id

    def tokenize(self, captions: list[str]) -> Tokens:
        """Token ids and masks; captions over ``max_tokens`` are cut and counted."""
        limit = self.settings.max_tokens
        rows = self.tokenizer(captions, add_special_tokens=False)["input_ids"]
        # An instruction brings its own first token, and then an empty caption still needs one of its own.
        rows = [self.start + row if not self.prefix_ids or not row else row for row in rows]
        lengths = [len(row) for row in rows]
        width = padded_length(min(max(lengths), limit), limit, self.settings.mask_padding, self.settings.pad_multiple)
        prefix = len(self.prefix_ids)
        ids = torch.full((len(rows), prefix + width), self.pad_id)
        mask = torch.zeros(len(rows), prefix + width, dtype=torch.bool)
        for number, row in enumerate(rows):
            row = self.prefix_ids + row[:limit]
            ids[number, : len(row)] = torch.tensor(row)
            mask[number, : len(row)] = True
        return Tokens(ids, mask, prefix, lengths, sum(length > limit for length in lengths))

    def forward(self, ids: Tensor, mask: Tensor, prefix: int = 0) -> Tensor:
        """Features [B, L - prefix, D] of ids and mask [B, L]."""
        mean = self.settings.layer_tap == "mean"
        out = self.model(input_ids=ids, attention_mask=mask.long(), output_hidden_states=mean, use_cache=False)
        if not mean:
            return out.last_hidden_state[:, prefix:]
        # Averaging the layer-normalised states of all layers beats the last layer (arXiv 2506.08210).
        width = (self.width,)
        total = F.layer_norm(out.hidden_states[0].float(), width)
        for state in out.hidden_states[1:]:
            total = total + F.layer_norm(state.float(), width)
        return (total / len(out.hidden_states))[:, prefix:]

    def feature_mask(self, tokens: Tokens) -> Tensor | None:
        """The mask that the denoiser gets: [B, L - prefix], or None where padding is attended to (the paper's arm)."""
        return tokens.mask[:, tokens.prefix :] if self.settings.mask_padding else None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def load_text_encoder(
    config: TextEncoderConfig, settings: ConditioningConfig, expected_hash: str | None = None
) -> TextEncoder:
    """Load a text encoder, frozen, in evaluation mode, on the CPU.

    Args:
        expected_hash: the hash that a checkpoint recorded; another one is refused.
    Raises:
        UserError: when it is not to be had, is not readable, or is another model than the checkpoint's.
    """
    folder = locate(config)
    found = fingerprint(folder)
    if expected_hash is not None and expected_hash != found:
        raise UserError(
            f"the text encoder in {folder} has the hash {found}, but the checkpoint was trained with {expected_hash} "
            f"({config.name}); set text_encoder_path=<folder> to that model."
        )
    model, tokenizer = read_model(folder, config)
    source = {
        "name": config.name,
        "hub": config.hub,
        "revision": config.revision,
        "hash": found,
        "layers": config.layers,
    }
    return TextEncoder(model, tokenizer, settings, source)


def read_model(folder: Path, config: TextEncoderConfig) -> tuple[Any, Any]:
    """The frozen decoder, cut to its first ``config.layers`` layers, and its tokenizer."""
    from safetensors import SafetensorError
    from transformers import AutoModel, AutoTokenizer

    try:
        # The checkpoint's own dtype is not ours to trust (transformers 5 would keep it), and remote code is never run.
        model = AutoModel.from_pretrained(folder, dtype=DTYPES[config.dtype], use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"the text encoder in {folder} could not be read ({first}); expected the transformers layout with safetensors "
            "weights, so fetch it again or set text_encoder.path=<folder>."
        ) from None
    total = model.config.num_hidden_layers
    if config.layers is not None:
        if config.layers > total:
            raise UserError(f"text_encoder.layers={config.layers} is more than the {total} layers of {config.name}.")
        model.layers = model.layers[: config.layers]
        model.config.num_hidden_layers = config.layers
    model.requires_grad_(False)
    return model.eval(), tokenizer


def attach_lora(encoder: TextEncoder, config: LoraConfig, seed: int = 0) -> None:
    """Put a LoRA adapter (fp32, dropout 0, weights a function of ``seed``) on the language model.

    Only the adapter is trained after this.

    Raises:
        UserError: when no linear layer has a configured name.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    layers = [name for name, module in encoder.model.named_modules() if isinstance(module, nn.Linear)]
    for target in config.target_modules:
        # PEFT is content when one of several names is found, and would silently train less than was asked for.
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            raise UserError(
                f"lora.target_modules={list(config.target_modules)}: {target} names no layer of this text encoder; its linear "
                f"layers are {', '.join(sorted({name.rpartition('.')[2] for name in layers}))}."
            )
    settings = PeftLoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=0.0, target_modules=list(config.target_modules)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder.model = get_peft_model(encoder.model, settings)
