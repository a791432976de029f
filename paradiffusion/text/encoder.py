"""The text encoder: a language model's hidden states as features.

One place decides tokenisation, padding side, maximum length, layer tap and masking, all from ConditioningConfig, which a
checkpoint records whole.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paradiffusion.config import ADAPTERS, ConditioningConfig, LoraConfig, TextEncoderConfig
from paradiffusion.errors import UserError
from paradiffusion.text.families import DTYPES, layers_of, marks_of, position_limit, read_model
from paradiffusion.text.sources import locate, same_weights, weights_hash
from paradiffusion.text.tokenizer import CaptionTokenizer, Tokens

# Begins what PEFT adds to a layer's name for the tensors of its adapter.
ADAPTED = re.compile(r"\.(?:lora|lokr|hada)_")

__all__ = ["DTYPES", "TextEncoder", "Tokens", "attach_lora", "check_targets", "load_text_encoder"]


class TextEncoder(nn.Module):
    """A language model (a decoder, or T5's or CLIP's encoder) read at a layer tap.

    Args:
        model: a transformers model without its head; ``tokenizer``: its fast tokenizer.
        settings: layer tap, prefix, maximum length and masking.
        source: id, revision and hash of the model, for the checkpoint.

    Attributes:
        limit: tokens of a caption at most: ``settings.max_tokens``, or the model's own number of positions.
        tokenize: captions to their ids and masks.
    Raises:
        UserError: when the prefix leaves no position for a caption.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: ConditioningConfig, source: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings
        self.source = source
        self.width: int = model.config.hidden_size
        marks = marks_of(tokenizer, model.config)
        self.pad_id = marks.pad
        self.prefix_ids: list[int] = (
            marks.start + tokenizer(settings.prefix, add_special_tokens=False)["input_ids"] if settings.prefix else []
        )
        positions = position_limit(model)
        self.limit = settings.max_tokens
        if positions is not None:
            self.limit = min(self.limit, positions - len(self.prefix_ids))
        if self.limit <= len(marks.start) + len(marks.end):
            raise UserError(
                f"conditioning.max_tokens={settings.max_tokens} and conditioning.prefix leave {max(self.limit, 0)} tokens for "
                f"a caption with its marks ({positions or 'any number of'} positions); use more tokens or a shorter prefix."
            )
        self.tokenize = CaptionTokenizer(
            tokenizer,
            marks.start,
            marks.end,
            marks.pad,
            self.prefix_ids,
            self.limit,
            settings.mask_padding,
            settings.pad_multiple,
            settings.clean_text,
        )

    def forward(self, ids: Tensor, mask: Tensor, prefix: int = 0) -> Tensor:
        """Features [B, L - prefix, D] of ids and mask [B, L]."""
        mean = self.settings.layer_tap == "mean"
        out = self.model(input_ids=ids, attention_mask=mask.long(), output_hidden_states=mean, use_cache=False)
        if not mean:
            return out.last_hidden_state[:, prefix:]
        # Averaging the layer-normalised states of all layers beats the last layer (arXiv 2506.08210).
        width = (self.width,)
        # The last state with the final norm applied: decoders give it so by themselves, CLIP does not.
        states = (*out.hidden_states[:-1], out.last_hidden_state)
        total = F.layer_norm(states[0].float(), width)
        for state in states[1:]:
            total = total + F.layer_norm(state.float(), width)
        return (total / len(states))[:, prefix:]

    def feature_mask(self, tokens: Tokens) -> Tensor | None:
        """The mask that the denoiser gets: [B, L - prefix], or None where padding is attended to (the paper's arm)."""
        return tokens.mask[:, tokens.prefix :] if self.settings.mask_padding else None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def load_text_encoder(
    config: TextEncoderConfig, settings: ConditioningConfig, expected_hash: str | None = None, device: torch.device | None = None
) -> TextEncoder:
    """Load a text encoder, frozen, in evaluation mode.

    Args:
        expected_hash: the hash that a checkpoint recorded; another one is refused.
        device: where its weights are read to, one by one, so that this machine's memory never holds all of them; "meta" reads
            none. None for the CPU, where those that are stored in ``config.dtype`` stay mapped from their files.
    Raises:
        UserError: when it is not to be had, is not readable, or is another model than the checkpoint's.
    """
    folder = locate(config)
    found = weights_hash(folder, "model")
    if not same_weights(expected_hash, found):
        raise UserError(
            f"the text encoder in {folder} has the hash {found.partition('.')[0]}, but the checkpoint was trained with {expected_hash} "
            f"({config.name}); set text_encoder.path=<folder> to that model."
        )
    model, tokenizer = read_model(folder, config, device)
    source = {
        "name": config.name,
        "hub": config.hub,
        "revision": config.revision,
        "hash": found.partition(".")[0],
        "known_by": found,
        "layers": config.layers,
    }
    return TextEncoder(model, tokenizer, settings, source)


def is_adapter(name: str) -> bool:
    """Whether a parameter is an adapter's, by its name."""
    return ADAPTED.search(name) is not None


def peft_config(lora: dict[str, Any], **settings: Any) -> Any:
    """PEFT's configuration of an adapter, of which ``lora`` is what a checkpoint describes, and ``settings`` what else PEFT is told."""
    import peft

    name, kind = ADAPTERS[lora.get("kind", "lora")]
    scale = {"lora_alpha": lora["alpha"], "lora_dropout": 0.0} if name == "LoraConfig" else {"alpha": lora["alpha"]}
    return getattr(peft, name)(**{"r": lora["rank"], "target_modules": list(lora["target_modules"]), **scale, **kind, **settings})


def start_from_principal(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Let a LoRA start as the principal part of the weights, which the frozen ones lose (PiSSA, arXiv 2404.02948).

    Returns that start, by parameter name. What a model with its own weights needs is the adapter less its start.
    """
    from peft.tuners.lora import LoraLayer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.pissa_init("default", "pissa_niter_16")
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters() if is_adapter(name)}


def attach_lora(encoder: TextEncoder, config: LoraConfig, seed: int = 0, **settings: Any) -> None:
    """Put a LoRA adapter (fp32, dropout 0, weights a function of ``seed``) on the language model.

    Only the adapter is trained after this. ``settings`` is what else PEFT must be told of somebody else's adapter, whose
    targets are not checked.

    Raises:
        UserError: when no linear layer has a configured name. What PEFT raises for ``settings`` that do not fit.
    """
    from peft import get_peft_model

    if not settings:
        check_targets(encoder.model, config.target_modules, "lora.target_modules", "text encoder")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder.model = get_peft_model(encoder.model, peft_config(asdict(config), **settings))


def checkpoint_layers(model: Any, which: bool | str) -> None:
    """Recompute the activations of a language model's layers on the way back, of every second one where ``which`` is "half".
    Reentrant checkpointing would leave LoRA without a gradient, since nothing that enters the first layer needs one."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    for layer in model.get_submodule(layers_of(model))[1::2] if which == "half" else ():
        layer.gradient_checkpointing = False


def compile_layers(model: Any) -> None:
    """Compile a language model's layers at their first calls: they are alike, so one compilation serves them all."""
    for layer in model.get_submodule(layers_of(model)):
        layer.compile()


def leave_casts_to_autocast(module: nn.Module) -> None:
    """Let adapters within ``module`` take their inputs as they come. PEFT casts them to the adapter's fp32 first, from which autocast
    casts them back: twice the traffic, and a copy kept for each. Without autocast the dtypes would not fit."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in module.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.cast_input_dtype_enabled = False  # type: ignore[assignment]


def check_targets(model: nn.Module, targets: list[str], key: str, kind: str) -> None:
    """Raise UserError, which names the configuration's ``key``, unless every target names a linear layer."""
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        # PEFT is content when one of several names is found, and would silently train less than was asked for.
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            last = sorted({_last_name(name) for name in layers})
            raise UserError(
                f"{key}={list(targets)}: {target} names no layer of this {kind}; its linear layers are {', '.join(last)}: "
                f"set {key}=[...] to some of them."
            )


def _last_name(name: str) -> str:
    """The last part of a dotted name, with the one before it where the last is a number ("to_out.0")."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]
