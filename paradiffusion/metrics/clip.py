"""CLIP of open_clip: features of images and of sentences, and an aesthetic head on the image features."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image
from safetensors import safe_open

from paradiffusion.checkpoints.tensors import whole_files
from paradiffusion.errors import UserError, reason_of
from paradiffusion.metrics.sentences import sentences

_SCHEMAS: Final = ("local-dir:", "hf-hub:")


@dataclass(frozen=True)
class Agreement:
    """How well a caption's sentences fit its image, as cosines of CLIP features.

    ``cut`` is the number of sentences that CLIP could read only the beginning of.
    """

    mean: float
    minimum: float
    sentences: int
    cut: int


@dataclass
class Clip:
    """A CLIP model in evaluation mode: ``prepare`` takes an RGB image to float [3, S, S], as it was trained, ``tokenize`` texts and a
    length to ids [B, length], padded; the text side reads ``context`` tokens."""

    model: Any
    prepare: Callable[[Image.Image], torch.Tensor]
    tokenize: Callable[..., torch.Tensor]
    context: int
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """What pixels must be."""
        # open_clip converts layers, not all parameters: class embeddings and norms stay float32.
        layers = (m for m in self.model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear))
        return next((layer.weight.dtype for layer in layers), torch.float32)

    @torch.inference_mode()
    def image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """float32 [B, D] of unit length, on the CPU, of ``pixels`` [B, 3, S, S] from ``prepare``."""
        features = self.model.encode_image(pixels.to(self.device, self.dtype))
        return torch.nn.functional.normalize(features.float(), dim=-1).cpu()

    @torch.inference_mode()
    def text_features(self, texts: list[str], batch_size: int = 256) -> tuple[torch.Tensor, list[bool]]:
        """float32 [B, D] of unit length, on the CPU, and which of ``texts`` were cut at ``context`` tokens."""
        if not texts:
            return torch.zeros(0, 0), []
        ids = self.tokenize(texts, context_length=self.context)
        parts = [
            self.model.encode_text(ids[start : start + batch_size].to(self.device)).float().cpu()
            for start in range(0, len(texts), batch_size)
        ]
        return torch.nn.functional.normalize(torch.cat(parts), dim=-1), self.cut(texts)

    def cut(self, texts: list[str]) -> list[bool]:
        """Which texts have more than ``context`` tokens."""
        pad = self.tokenize([""], context_length=self.context)[0, -1]
        # Tokenised with room to spare: what lies beyond the context tells whether anything is cut, for any tokeniser.
        beyond = self.tokenize(texts, context_length=2 * self.context)[:, self.context :]
        found: list[bool] = (beyond != pad).any(dim=1).tolist()
        return found

    def agreements(self, features: torch.Tensor, captions: list[str]) -> list[Agreement | None]:
        """Agreement of each caption with the image features [B, D] of its row; None for a caption without any word.

        What has neither letter nor digit ("...", a row of dashes or emoji) is no sentence that a picture could fit.
        """
        split = [[part for part in sentences(caption) if any(map(str.isalnum, part))] for caption in captions]
        texts, cut = self.text_features([sentence for part in split for sentence in part])
        results: list[Agreement | None] = []
        start = 0
        for row, part in enumerate(split):
            stop = start + len(part)
            if part:
                cosines = texts[start:stop] @ features[row]
                results.append(Agreement(float(cosines.mean()), float(cosines.min()), len(part), sum(cut[start:stop])))
            else:
                results.append(None)
            start = stop
        return results


def load_clip(spec: str, device: str, precision: str = "fp32") -> Clip:
    """The model that ``spec`` names.

    ``spec`` is a folder with open_clip_config.json and weights, ``hf-hub:<id>``, or ``<model>:<pretrained>`` with one of
    open_clip's tags or a file of weights. Weights are read as safetensors or with ``weights_only``. Raises UserError when
    the model is unknown or its weights cannot be had.
    """
    import open_clip

    name, pretrained = parse_spec(spec)
    if name.startswith("local-dir:"):
        _refuse_code(whole_files(Path(name.partition(":")[2])))
    if pretrained:
        whole_files(Path(pretrained))
    try:
        placed: Any = {"precision": precision, "device": device, "weights_only": True}
        if pretrained:
            model, _, prepare = open_clip.create_model_and_transforms(name, pretrained, require_pretrained=True, **placed)
        else:
            model, prepare = open_clip.create_model_from_pretrained(name, **placed)
        tokenize = open_clip.get_tokenizer(name)
    except Exception as error:  # open_clip, the hub client and torch raise a dozen unrelated types
        raise UserError(
            f"clip={spec} could not be loaded ({reason_of(error)[:300].rstrip('.')}); give <model>:<tag or file>, hf-hub:<id>, or "
            "a folder with open_clip_config.json and open_clip_model.safetensors."
        ) from None
    model.eval().requires_grad_(False)
    context = getattr(tokenize, "context_length", None) or getattr(model, "context_length", None) or 77
    return Clip(model, prepare, tokenize, int(context), torch.device(device))


def parse_spec(spec: str) -> tuple[str, str | None]:
    """open_clip's model name and its pretrained argument (None where the name has a schema).

    Raises UserError for what cannot be a model; nothing is loaded.
    """
    if spec.startswith(_SCHEMAS):
        return spec, None
    folder = Path(spec).expanduser()
    if folder.is_dir():
        return f"local-dir:{folder}", None
    name, colon, pretrained = spec.partition(":")
    if not colon or not pretrained:
        raise UserError(
            f"clip={spec} is neither a folder nor <model>:<weights>; write clip=ViT-L-14-quickgelu:openai, "
            "clip=hf-hub:<id> or the folder of a model."
        )
    path = Path(pretrained).expanduser()
    if path.suffix == ".npz":
        raise UserError(f"clip={spec} has weights as .npz, which are not read here; convert them to safetensors.")
    return name, str(path) if path.is_file() else pretrained


def _refuse_code(folder: Path) -> None:
    """A model's folder may ask transformers to run the code that lies in it; it does not get that here."""
    try:
        text = json.dumps(json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"clip={folder} has no readable open_clip_config.json ({error}); give a whole folder.") from None
    if "trust_remote_code" in text:
        raise UserError(f"clip={folder} asks for trust_remote_code, which would run its code; remove it from the config.")


class Head(torch.nn.Sequential):
    """A chain of linear layers, 768 -> ... -> 1, on image features of unit length: a picture's aesthetic score."""

    @property
    def width(self) -> int:
        return next(self.parameters()).shape[1]

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return super().forward(features)[:, 0]  # type: ignore[no-any-return]


def load_head(path: Path) -> Head:
    """A head from a .safetensors or .pth file: LAION's linear layer, or several named so that they sort in their order.

    LAION's improved predictor is of the second kind; it has no activations between its layers, and none are applied
    unless a safetensors file says ``activation: relu`` in its metadata. Raises UserError for any other content.
    """
    expected = "expected linear layers (weight and bias) that lead from the CLIP features to one number"
    whole_files(path)
    try:
        activation = "none"
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                activation = (file.metadata() or {}).get("activation", "none")
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("state_dict", state)
        names = sorted((name for name in state if name.endswith("weight")), key=_natural)
        pairs = [(name, state.get(f"{name[: -len('weight')]}bias")) for name in names]
        layers = [(state[name].float(), torch.zeros(len(state[name])) if bias is None else bias.float()) for name, bias in pairs]
    except Exception as error:  # safetensors raises its own type, which it does not export; pickle raises anything
        raise UserError(f"aesthetic={path} cannot be read ({reason_of(error)}); {expected}.") from None
    shapes = [tuple(weight.shape) for weight, _ in layers]
    chained = all(len(shape) == 2 for shape in shapes) and all(before[0] == after[1] for before, after in pairwise(shapes))
    if not shapes or not chained or shapes[-1][0] != 1:
        raise UserError(f"aesthetic={path} holds weights of the shapes {shapes}; {expected}.")
    if activation not in ("none", "relu"):
        raise UserError(f"aesthetic={path} asks for the activation {activation!r}; none and relu are known.")
    modules: list[torch.nn.Module] = []
    for weight, bias in layers:
        linear = torch.nn.Linear(*reversed(weight.shape))
        linear.weight, linear.bias = torch.nn.Parameter(weight, False), torch.nn.Parameter(bias, False)
        modules += [linear, torch.nn.ReLU()] if activation == "relu" else [linear]
    return Head(*(modules[:-1] if activation == "relu" else modules))


def _natural(name: str) -> list[int | str]:
    """Sort key under which layers.10 comes after layers.9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
