"""Random models and made-up data of the configured sizes, for measuring speed where there are no weights."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from paradiffusion.budget.empty import new_codec
from paradiffusion.config import TextEncoderConfig, TrainConfig
from paradiffusion.data.shards import RawSample, write_shards
from paradiffusion.errors import UserError
from paradiffusion.models.codec import Codec, load_codec
from paradiffusion.text.encoder import DTYPES, TextEncoder, attach_lora, load_text_encoder
from paradiffusion.text.families import architecture_of, check_quantization, cut_layers, model_class, multiply_in_fp8
from paradiffusion.text.tiny import CORPUS, build_tiny
from paradiffusion.text.tokenizer import load_tokenizer

# Words of a caption: the mean in the paper's data (its own table), and a spread that gives about its shares by length.
CAPTION_WORDS = {"short": (11.8, 4), "long": (132.9, 38), "clean": (70.6, 12)}
SOURCE = {"hash": "random", "known_by": "random"}
PICTURES = 256  # different ones; samples beyond that share them, under keys of their own
WORDS = sorted({word for word in CORPUS.split() if word.isalpha()})


def random_models(config: TrainConfig, device: torch.device) -> tuple[TextEncoder, Codec]:
    """The frozen models on ``device``: from their folders where ``path`` names one, else with random weights, made there; UserError where
    these cannot be made as configured.

    An adapter that the stage applies is attached, random, and frozen. Random ones read captions by the tokenizer of
    text/tiny.py, of which a word of ``captions`` takes 1.4 pieces or so; Llama's takes 1.3 for an ordinary text's."""
    encoder = random_text_encoder(config, device)
    if config.train_text == "adapter":
        attach_lora(encoder, config.lora)
        encoder.requires_grad_(False)
    if config.codec.path is not None:
        return encoder, load_codec(config.codec)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return encoder, new_codec(config.codec, device, {"name": config.codec.name, **SOURCE})


def random_text_encoder(config: TrainConfig, device: torch.device) -> TextEncoder:
    """A language model of ``text_encoder.architecture``, made directly on ``device`` in its dtype."""
    settings: TextEncoderConfig = config.text_encoder
    if settings.path is not None:
        return load_text_encoder(settings, config.conditioning)
    if settings.quantization == "4bit":
        raise UserError(
            f"random weights are not quantised; set text_encoder.quantization=null (found {settings.quantization}), or "
            "text_encoder.path=<folder> to measure real ones."
        )
    check_quantization(settings)
    architecture = architecture_of(settings)
    with torch.random.fork_rng(), device:
        torch.manual_seed(0)
        model: Any = model_class(architecture).from_config(architecture, dtype=DTYPES[settings.dtype])
    cut_layers(model, settings)
    with tempfile.TemporaryDirectory() as folder:
        build_tiny(Path(folder))
        tokenizer = load_tokenizer(Path(folder))
    model.requires_grad_(False)
    if settings.quantization == "fp8":
        multiply_in_fp8(model)
    return TextEncoder(model.eval(), tokenizer, config.conditioning, {"name": settings.name, **SOURCE})


def captions(kind: str, count: int, seed: int = 0) -> list[str]:
    """Captions of a kind whose lengths vary as ``CAPTION_WORDS`` says."""
    rng = np.random.default_rng([seed, len(kind)])
    mean, spread = CAPTION_WORDS[kind]
    lengths = rng.normal(mean, spread, count).round().clip(3, 2 * mean).astype(int)
    return [" ".join(rng.choice(WORDS, length)) for length in lengths]


def picture(number: int, width: int, height: int) -> bytes:
    """A JPEG with shapes of all sizes, which costs about as much to decode as a photograph of its size."""
    rng = np.random.default_rng(number)
    total = np.zeros((height, width, 3))
    for side in (4, 16, 64):
        coarse = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        total += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), float)
    file = io.BytesIO()
    Image.fromarray((total / 3).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_samples(folder: Path, count: int, width: int, height: int, kinds: Iterable[str] = tuple(CAPTION_WORDS)) -> dict[str, list[str]]:
    """Shards of ``count`` pictures, each with a caption of every kind; returns the captions by kind."""
    texts = {kind: captions(kind, count) for kind in kinds}
    pictures = [picture(number, width, height) for number in range(min(PICTURES, count))]
    samples = (
        RawSample(f"{n:06d}", pictures[n % PICTURES], "jpg", {"captions": {kind: rows[n] for kind, rows in texts.items()}})
        for n in range(count)
    )
    write_shards(samples, folder, samples_per_shard=512)
    return texts
