"""Random models and made-up data of the configured sizes, for measuring speed where there are no weights."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from paradiffusion.budget.empty import codec_arguments
from paradiffusion.config import CodecConfig, TextEncoderConfig, TrainConfig
from paradiffusion.data.shards import RawSample, write_shards
from paradiffusion.errors import UserError
from paradiffusion.models.codec import Codec, load_codec
from paradiffusion.text.encoder import DTYPES, TextEncoder, attach_lora, load_text_encoder
from paradiffusion.text.families import architecture_of, cut_layers, model_class
from paradiffusion.text.tiny import CORPUS, build_tiny
from paradiffusion.text.tokenizer import load_tokenizer

# Words of a caption: the mean in the paper's data (its own table), and a spread that gives about its shares by length.
CAPTION_WORDS = {"short": (11.8, 4), "long": (132.9, 38), "clean": (70.6, 12)}
WORDS = sorted({word for word in CORPUS.split() if word.isalpha()})


def random_models(config: TrainConfig, device: torch.device) -> tuple[TextEncoder, Codec]:
    """The frozen models on ``device``: from their folders where ``path`` names one, else with random weights, made there.

    An adapter that the stage applies is attached, random, and frozen. Random ones read captions by the tokenizer of
    text/tiny.py, of which a word of ``captions`` takes 1.4 pieces or so; Llama's takes 1.3 for an ordinary text's.

    Raises:
        UserError: where random weights cannot be made as configured.
    """
    encoder = random_text_encoder(config, device)
    if config.train_text == "adapter":
        attach_lora(encoder, config.lora)
        encoder.requires_grad_(False)
    has_folder = config.codec.path is not None
    return encoder, load_codec(config.codec) if has_folder else random_codec(config.codec, device)


def random_text_encoder(config: TrainConfig, device: torch.device) -> TextEncoder:
    """A language model of ``text_encoder.architecture``, made directly on ``device`` in its dtype."""
    settings: TextEncoderConfig = config.text_encoder
    if settings.path is not None:
        return load_text_encoder(settings, config.conditioning)
    if settings.quantization is not None:
        raise UserError(
            f"random weights are not quantised; set text_encoder.quantization=null (found {settings.quantization}), or "
            "text_encoder.path=<folder> to measure real ones."
        )
    architecture = architecture_of(settings)
    with torch.random.fork_rng(), device:
        torch.manual_seed(0)
        model: Any = model_class(architecture).from_config(architecture, dtype=DTYPES[settings.dtype])
    cut_layers(model, settings)
    with tempfile.TemporaryDirectory() as folder:
        build_tiny(Path(folder))
        tokenizer = load_tokenizer(Path(folder))
    model.requires_grad_(False)
    return TextEncoder(model.eval(), tokenizer, config.conditioning, {"name": settings.name, "hash": "random"})


def random_codec(config: CodecConfig, device: torch.device) -> Codec:
    """An autoencoder of the configured shape, made directly on ``device`` in its dtype."""
    with torch.random.fork_rng(), device:
        torch.manual_seed(0)
        vae: Any = AutoencoderKL(**codec_arguments(config))
    torch.nn.Module.to(vae, DTYPES[config.dtype])
    return Codec(vae.requires_grad_(False).eval(), config, {"name": config.name, "hash": "random"})


def captions(kind: str, count: int, seed: int = 0) -> list[str]:
    """Captions of a kind whose lengths vary as ``CAPTION_WORDS`` says."""
    rng = np.random.default_rng([seed, len(kind)])
    mean, spread = CAPTION_WORDS[kind]
    lengths = rng.normal(mean, spread, count).round().clip(3, 2 * mean).astype(int)
    return [" ".join(rng.choice(WORDS, length)) for length in lengths]


def write_samples(folder: Path, count: int, side: int) -> None:
    """Shards of ``count`` square pictures of ``side`` pixels, each with a caption of every kind."""

    def samples() -> Iterator[RawSample]:
        rng = np.random.default_rng(0)
        texts = {kind: captions(kind, count) for kind in CAPTION_WORDS}
        for number in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            file = io.BytesIO()
            coarse.resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
            meta = {"captions": {kind: rows[number] for kind, rows in texts.items()}}
            yield RawSample(f"{number:06d}", file.getvalue(), "jpg", meta)

    write_shards(samples(), folder, samples_per_shard=256)
