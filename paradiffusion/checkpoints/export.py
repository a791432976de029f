"""Exports of a checkpoint: our own layout without training state, that of the published weights, a diffusers pipeline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from paradiffusion.atomic import atomic_folder
from paradiffusion.checkpoints.layouts import (
    LLM_FOLDERS,
    LORA,
    REFINER,
    SCHEDULER,
    SIDECAR,
    UNET,
    VAE_FOLDERS,
    Layout,
    objective_of,
    parse,
    portable,
    read_json,
    split_parts,
    write_adapter,
    write_config,
    write_parts,
)
from paradiffusion.checkpoints.manifest import write_manifest
from paradiffusion.checkpoints.tensors import UNET_STEM, write_tensors
from paradiffusion.config import CodecConfig, TextEncoderConfig
from paradiffusion.diffusion.objective import Flow
from paradiffusion.errors import UserError, reason_of
from paradiffusion.models.codec import locate_codec
from paradiffusion.models.unet import DENOISERS, class_of
from paradiffusion.repository import ROOT
from paradiffusion.text.encoder import DTYPES
from paradiffusion.text.sources import locate

OFFICIAL_TOKENS = 256  # what the released demo reads of a prompt, whatever the checkpoint was trained with
OFFICIAL_END = (
    "sigma_min"  # its solver's last step leads to the schedule's lowest noise, where later libraries go to none
)


def export_ours(checkpoint: Layout, output: Path, dtype: str = "float32", frozen: str = "link") -> None:
    """Write our layout: weights and description, without training state.

    Args:
        dtype: of the floating-point weights on disk; reading brings them back to fp32.
        frozen: "link" records where text encoder and codec lie on this machine, "none" leaves that out, as is right for
            what is given away: they are known by name, hub id and hash.
    Raises:
        UserError: when ``output`` exists.
    """
    if frozen not in ("link", "none"):
        raise UserError(f"frozen={frozen} does not exist for to=ours, which names frozen models; use link or none.")
    description = portable(checkpoint.description)
    for part in ("text_encoder", "codec"):
        if (path := checkpoint.description[part].get("path")) is not None:
            # What is shipped with the repository has a path below its root, which holds on every machine.
            shipped = not Path(path).is_absolute() and (ROOT / path).exists()
            description[part]["path"] = path if shipped else str(Path(path).resolve()) if frozen == "link" else None
    with whole_folder(output) as folder:
        unet = folder / DENOISERS[class_of(checkpoint.unet_config)].folder
        write_parts(folder, parts_of(checkpoint, dtype), description, unet)
        write_config(unet, checkpoint.unet_config)
        if checkpoint.refiner_config is not None:
            write_config(folder / REFINER, checkpoint.refiner_config)
        write_manifest(folder)


def export_official(checkpoint: Layout, output: Path, dtype: str = "float32", frozen: str = "copy") -> None:
    """Write the layout of the published weights, which the released inference code reads.

    Beside it a small file of ours keeps what that layout has no place for (sampler defaults, resolution, tokens), so that
    reading it back loses nothing.

    Args:
        frozen: whether the language model and the autoencoder are copied, linked, or left out ("none").
    Raises:
        UserError: when ``output`` exists, and for a model that the released code could not run, saying why.
    """
    check_official(checkpoint)
    description = checkpoint.description
    codec = parse(CodecConfig, description["codec"])
    sources: list[Path] = []
    if frozen != "none":
        sources = [locate(parse(TextEncoderConfig, description["text_encoder"])), locate_codec(codec)]
        kind = read_json(sources[0] / "config.json").get("model_type")
        if kind != "llama":
            name = description["text_encoder"]["name"]
            raise UserError(f"the official layout holds a Llama, and the text encoder {name} is a {kind} model.")
    parts = parts_of(checkpoint, dtype)
    kept = ("preset", "stage", "step", "seed", "resolution", "sampler", "conditioning", "lora")
    beside = {key: portable(description)[key] for key in (*kept, "text_encoder", "codec", "provenance")}
    with whole_folder(output) as folder:
        write_tensors(folder / UNET / f"{UNET_STEM}.safetensors", parts[UNET])
        size = description["resolution"] // codec.factor
        write_config(folder / UNET, {**checkpoint.unet_config, "sample_size": size})
        if parts[LORA]:
            write_adapter(folder / LORA, parts[LORA], description["lora"])
        # Which is where the released code ends whatever this file says; sample.py draws from the folder as it does.
        objective_of(description).scheduler("dpm", final_sigmas_type=OFFICIAL_END).save_config(folder / SCHEDULER)
        for source, name in zip(sources, (LLM_FOLDERS[0], VAE_FOLDERS[0]), strict=False):
            place_frozen(source, folder / name, frozen)
        (folder / SIDECAR).write_text(json.dumps(beside, indent=1))


def check_official(checkpoint: Layout) -> None:
    """UserError for a model that the released inference code has no way to run."""
    description = checkpoint.description
    conditioning, objective = description["conditioning"], objective_of(description)
    layers = description["text_encoder"].get("layers")
    reasons = {
        "a denoiser that is no U-Net": class_of(checkpoint.unet_config) != "UNet2DConditionModel",
        "a refiner before the linear projection": conditioning["projection"] == "refiner",
        "averaged layers of the language model": conditioning["layer_tap"] != "last",
        "an instruction before each prompt": conditioning["prefix"],
        "masked padding": conditioning["mask_padding"],
        f"only {layers} layers of the language model": layers,
        "coordinates as input channels": description["coordinates"],
        "a flow objective": isinstance(objective, Flow),
        "a schedule of zero terminal SNR": objective.config.zero_terminal_snr,
    }
    if found := [reason for reason, present in reasons.items() if present]:
        raise UserError(
            f"the official layout has no place for {', '.join(found)}, which this checkpoint was trained with "
            "(conditioning=paper trains one that fits); use to=pipeline instead."
        )


def official_differs(checkpoint: Layout, dtype: str) -> list[str]:
    """Why the released code draws other pictures than we do from the same weights, in a sentence each."""
    tokens, encoder = checkpoint.description["conditioning"]["max_tokens"], checkpoint.description["text_encoder"]
    reasons = []
    if tokens != OFFICIAL_TOKENS:
        reasons.append(
            f"it reads {OFFICIAL_TOKENS} tokens of a prompt, and this checkpoint {tokens}: set that number there"
        )
    if dtype != "float32" or encoder.get("dtype", "float32") != "float32":
        reasons.append("what is stored or computed in 16 bits draws slightly other pictures than float32")
    if objective_of(checkpoint.description).scheduler("dpm").config.get("final_sigmas_type") != OFFICIAL_END:
        reasons.append(
            "it leaves the schedule's lowest noise in, as sample.py does from this folder but not from the checkpoint"
        )
    if checkpoint.description["conditioning"].get("clean_text", True):
        reasons.append("it reads text to the letter: give it prompts on one line, with single spaces, as in training")
    return reasons


def export_pipeline(checkpoint: Layout, output: Path, dtype: str = "float32", frozen: str = "copy") -> None:
    """Write a pipeline that ``ParaDiffusionPipeline.from_pretrained`` loads.

    Args:
        dtype: of U-Net and refiner on disk.
        frozen: whether text encoder and autoencoder are copied, linked to where they lie on this machine, or left out (then
            from_pretrained wants ``text_encoder=`` and ``vae=``).
    Raises:
        UserError: when ``output`` exists, or a part is missing.
    """
    from paradiffusion.sampling.diffusers_pipeline import ParaDiffusionPipeline
    from paradiffusion.sampling.pipeline import load_models

    check_absent(output)
    description = checkpoint.description
    pipe = ParaDiffusionPipeline.from_models(load_models(checkpoint, device="cpu"), description)
    pipe.unet.to(DTYPES[dtype])
    if pipe.refiner is not None:
        pipe.refiner.to(DTYPES[dtype])
    with whole_folder(output) as folder:
        if frozen == "copy":
            pipe.save_pretrained(folder)
            return
        for name in ("unet", "refiner", "scheduler", "tokenizer"):
            if (part := getattr(pipe, name)) is not None:
                part.save_pretrained(folder / name)
        pipe.save_adapter(folder)
        pipe.save_config(folder)
        if frozen == "link":
            encoder = parse(TextEncoderConfig, description["text_encoder"])
            place_frozen(locate(encoder), folder / "text_encoder", frozen)
            place_frozen(locate_codec(parse(CodecConfig, description["codec"])), folder / "vae", frozen)


def parts_of(checkpoint: Layout, dtype: str) -> dict[str, dict[str, Tensor]]:
    """``split_parts`` of the weights, a U-Net's LoRA merged, in ``dtype``."""
    kind, state = DTYPES[dtype], checkpoint.weights()
    return split_parts({n: (t.to(kind) if t.is_floating_point() else t).contiguous() for n, t in state.items()})


def place_frozen(source: Path, target: Path, frozen: str) -> None:
    """Copy or link a frozen model's folder."""
    if frozen == "link":
        target.symlink_to(source.resolve(), target_is_directory=True)
    else:
        shutil.copytree(source, target)


def check_absent(output: Path) -> None:
    if output.exists() or output.is_symlink():
        raise UserError(f"{output} exists already; choose another output, or delete it first.")


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A folder to write, which becomes ``output`` when the block has ended; of one that failed nothing is left.

    Raises:
        UserError: when ``output`` exists, or cannot be written.
    """
    check_absent(output)
    try:
        with atomic_folder(output.absolute()) as folder:
            yield folder
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or reason_of(error)
        raise UserError(
            f"{output} could not be written ({reason}), and nothing is left of it; make room, or choose another output."
        ) from None
