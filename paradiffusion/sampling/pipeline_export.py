"""Checkpoints to ``ParaDiffusionPipeline`` folders, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paradiffusion.checkpoints.export import Weights, check_absent, place_frozen, whole_folder
from paradiffusion.checkpoints.layouts import parse, place_frozen_models, read_description
from paradiffusion.config import CodecConfig, TextEncoderConfig
from paradiffusion.models.codec import locate_codec
from paradiffusion.models.inference import load_models
from paradiffusion.sampling.diffusers_pipeline import ParaDiffusionPipeline
from paradiffusion.text.encoder import DTYPES
from paradiffusion.text.sources import fingerprint, hash_ends, locate


def export_pipeline(
    checkpoint: Path,
    output: Path,
    dtype: str = "float32",
    frozen: str = "copy",
    text_encoder_path: str | None = None,
    codec_path: str | None = None,
    unet: str = "unet",
) -> None:
    """Write a checkpoint, ours or in the official layout, as a pipeline that ``from_pretrained`` loads.

    Args:
        dtype: of U-Net and refiner on disk.
        frozen: whether text encoder and autoencoder are copied, linked to where they lie on this machine, or left out (then
            from_pretrained wants ``text_encoder=`` and ``vae=``).
    Raises:
        UserError: when ``output`` exists, or a part is missing.
    """
    check_absent(output)
    models = load_models(checkpoint, "cpu", "float32", text_encoder_path, codec_path, unet)
    description = read_description(checkpoint, unet)
    place_frozen_models(description, checkpoint, text_encoder_path, codec_path)
    pipe = ParaDiffusionPipeline.from_models(models, description)
    pipe.unet.to(DTYPES[dtype])
    if pipe.refiner is not None:
        pipe.refiner.to(DTYPES[dtype])
    encoder, codec = parse(TextEncoderConfig, description["text_encoder"]), parse(CodecConfig, description["codec"])
    with whole_folder(output) as folder:
        if frozen == "copy":
            pipe.save_pretrained(folder)
            return
        for name in ("unet", "refiner", "scheduler", "tokenizer"):
            part = getattr(pipe, name)
            if part is not None:
                part.save_pretrained(folder / name)
        pipe.save_adapter(folder)
        pipe.save_config(folder)
        if frozen == "link":
            place_frozen(locate(encoder), folder / "text_encoder", frozen)
            place_frozen(locate_codec(codec), folder / "vae", frozen)


def gather_pipeline(folder: Path) -> Weights:
    """Everything that a pipeline's folder holds but the frozen models, which the description finds in that folder."""
    pipe = ParaDiffusionPipeline.from_pretrained(str(folder))
    description: dict[str, Any] = dict(pipe.config["description"])
    encoder, codec = folder / "text_encoder", folder / "vae"
    # Saved anew, the frozen models have other bytes than those that the checkpoint was trained with.
    found = {"path": str(encoder.resolve()), "hash": fingerprint(encoder)}
    description["text_encoder"] = {**description["text_encoder"], **found}
    found = {"path": str(codec.resolve()), "hash": hash_ends(sorted(codec.glob("*.safetensors")))}
    description["codec"] = {**description["codec"], **found, "subfolder": None}
    state = {f"unet.{name}": tensor.float() for name, tensor in pipe.unet.state_dict().items()}
    if pipe.refiner is not None:
        state |= {f"refiner.{name}": tensor.float() for name, tensor in pipe.refiner.refiner.state_dict().items()}
    state |= {f"text_encoder.{name}": tensor for name, tensor in pipe.adapter().items()}
    refiner = None if pipe.refiner is None else pipe.refiner.refiner.config
    return Weights(description, state, dict(pipe.unet.config), refiner)
