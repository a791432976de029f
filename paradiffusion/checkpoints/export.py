"""From a checkpoint to other layouts: our own without training state, and that of the published weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel
from safetensors import SafetensorError
from torch import Tensor

from paradiffusion.checkpoints.layouts import (
    LORA,
    REFINER,
    UNET,
    merge_unet_lora,
    objective_of,
    parse,
    place_frozen_models,
    read_description,
    read_weights,
    split_parts,
    write_adapter_config,
    write_parts,
)
from paradiffusion.checkpoints.manifest import write_manifest
from paradiffusion.checkpoints.official import LLM_FOLDERS, SCHEDULER, SIDECAR, VAE_FOLDERS, read_json
from paradiffusion.checkpoints.tensors import ADAPTER_STEM, UNET_STEM, write_tensors
from paradiffusion.config import CodecConfig, TextEncoderConfig
from paradiffusion.errors import UserError
from paradiffusion.models.codec import REPOSITORY, locate_codec
from paradiffusion.sampling.diffusers_pipeline import ParaDiffusionPipeline
from paradiffusion.sampling.pipeline import load_models
from paradiffusion.text.encoder import DTYPES
from paradiffusion.text.sources import fingerprint, hash_ends, locate

FROZEN = ("copy", "link", "none")


@dataclass
class Weights:
    """Everything that a checkpoint holds but the frozen models.

    Attributes:
        description: as ``read_description`` gives it.
        state: by the joint module's names, a U-Net's LoRA merged.
        unet, refiner: their configurations; None for no refiner.
    """

    description: dict[str, Any]
    state: dict[str, Tensor]
    unet: dict[str, Any]
    refiner: dict[str, Any] | None


def gather(checkpoint: Path, unet: str = UNET) -> Weights:
    """Read a checkpoint, ours or in the official layout, for export."""
    description = read_description(checkpoint, unet)
    state = merge_unet_lora(read_weights(checkpoint, unet), description.get("unet_lora"))
    config = dict(UNet2DConditionModel.load_config(checkpoint / unet))
    refiner = checkpoint / REFINER / "config.json"
    return Weights({**description, "unet_lora": None}, state, config, read_json(refiner) if refiner.is_file() else None)


def export_ours(weights: Weights, output: Path, dtype: str = "float32", frozen: str = "link") -> None:
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
    description = json.loads(json.dumps(weights.description))
    for part in ("text_encoder", "codec"):
        path = description[part].get("path")
        # What is shipped with the repository has a path below its root, which holds on every machine.
        if path is not None and (Path(path).is_absolute() or not (REPOSITORY / path).exists() or frozen == "link"):
            shipped = not Path(path).is_absolute() and (REPOSITORY / path).exists()
            kept = path if shipped else str(Path(path).resolve())
            description[part]["path"] = kept if shipped or frozen == "link" else None
    description["provenance"]["init_from"] = None
    with whole_folder(output) as folder:
        write_parts(folder, _parts(weights, dtype), description)
        _write_config(folder / UNET, weights.unet)
        if weights.refiner is not None:
            _write_config(folder / REFINER, weights.refiner)
        write_manifest(folder)


def publish(checkpoint: Path, output: Path, dtype: str, resolution: int | None = None) -> int:
    """Copy a checkpoint's weights and description, without training state and paths of this machine, to a new folder.

    Args:
        resolution: height and width, in pixels, at which it draws where it is not told others; None for that of its training.
    Returns:
        its size in bytes.
    """
    weights = gather(checkpoint)
    if resolution is not None:
        weights = replace(weights, description={**weights.description, "resolution": resolution})
    export_ours(weights, output, dtype, frozen="none")
    return sum(path.stat().st_size for path in output.rglob("*") if path.is_file())


def export_official(weights: Weights, output: Path, dtype: str = "float32", frozen: str = "copy") -> None:
    """Write the layout of the published weights, which the released inference code reads.

    Beside it a small file of ours keeps what that layout has no place for (sampler defaults, resolution, tokens), so that
    reading it back loses nothing.

    Args:
        frozen: whether the language model and the autoencoder are copied, linked, or left out.
    Raises:
        UserError: when ``output`` exists, and for a model that the released code could not run, saying why.
    """
    check_official(weights)
    description = weights.description
    encoder, codec = parse(TextEncoderConfig, description["text_encoder"]), parse(CodecConfig, description["codec"])
    sources = (locate(encoder), locate_codec(codec)) if frozen != "none" else (None, None)
    if sources[0] is not None:
        kind = read_json(sources[0] / "config.json").get("model_type")
        if kind != "llama":
            raise UserError(
                f"the official layout holds a Llama, and the text encoder {encoder.name} is a {kind} model."
            )
    parts = _parts(weights, dtype)
    with whole_folder(output) as folder:
        write_tensors(folder / UNET / f"{UNET_STEM}.safetensors", parts[UNET])
        _write_config(folder / UNET, {**weights.unet, "sample_size": description["resolution"] // codec.factor})
        if parts[LORA]:
            write_tensors(folder / LORA / f"{ADAPTER_STEM}.safetensors", parts[LORA])
            write_adapter_config(folder / LORA, description["lora"])
        solver_of(description).save_config(folder / SCHEDULER)
        for source, name in zip(sources, (LLM_FOLDERS[0], VAE_FOLDERS[0]), strict=True):
            if source is not None:
                place_frozen(source, folder / name, frozen)
        (folder / SIDECAR).write_text(json.dumps(beside_official(description), indent=1))


def check_official(weights: Weights) -> None:
    """UserError for a model that the released inference code has no way to run."""
    description = weights.description
    conditioning, objective = description["conditioning"], description["objective"]
    reasons = {
        "a refiner before the linear projection": weights.refiner is not None,
        "averaged layers of the language model": conditioning["layer_tap"] != "last",
        "an instruction before each prompt": bool(conditioning["prefix"]),
        "masked padding": conditioning["mask_padding"],
        f"only {description['text_encoder'].get('layers')} layers of the language model": bool(
            description["text_encoder"].get("layers")
        ),
        "coordinates as input channels": bool(description["coordinates"]),
        "a flow objective": objective["prediction"] == "flow",
        "a schedule of zero terminal SNR": objective["zero_terminal_snr"],
    }
    found = [reason for reason, present in reasons.items() if present]
    if found:
        raise UserError(
            f"the official layout has no place for {', '.join(found)}, which this checkpoint was trained with "
            "(conditioning=paper trains one that fits); use to=pipeline instead."
        )


def solver_of(description: dict[str, Any]) -> Any:
    """The DPM-Solver scheduler by which the description's images are drawn."""
    return objective_of(description).scheduler("dpm")


def beside_official(description: dict[str, Any]) -> dict[str, Any]:
    """What the official layout has no place for; nothing of this machine."""
    encoder, codec = ({**description[part], "path": None} for part in ("text_encoder", "codec"))
    keys = ("preset", "stage", "step", "seed", "resolution", "sampler", "conditioning", "lora")
    kept = {key: description[key] for key in keys}
    provenance = {**description["provenance"], "init_from": None}
    return {**kept, "text_encoder": encoder, "codec": codec, "provenance": provenance}


def place_frozen(source: Path, target: Path, frozen: str) -> None:
    """Copy or link a frozen model's folder."""
    if frozen == "link":
        target.symlink_to(source.resolve(), target_is_directory=True)
    else:
        shutil.copytree(source, target)


def check_absent(output: Path) -> None:
    """UserError when there is something already."""
    if output.exists() or output.is_symlink():
        raise UserError(f"{output} exists already; choose another output, or delete it first.")


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A folder to write, which becomes ``output`` when the block has ended; of one that failed nothing is left.

    Raises:
        UserError: when ``output`` exists, or cannot be written.
    """
    check_absent(output)
    building = output.absolute().with_name(f".{output.name}.partial")
    try:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        yield building
        building.rename(output)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise UserError(
            f"{output} could not be written ({reason}), and nothing is left of it; make room, or choose another output."
        ) from None
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _parts(weights: Weights, dtype: str) -> dict[str, dict[str, Tensor]]:
    kind = DTYPES[dtype]
    cast = {n: (t.to(kind) if t.is_floating_point() else t).contiguous() for n, t in weights.state.items()}
    return split_parts(cast)


def _write_config(folder: Path, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


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
