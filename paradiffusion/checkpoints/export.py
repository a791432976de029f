"""Exports of a checkpoint: our own layout without training state (on a hub, too), that of the published weights, a pipeline, adapters.

``dtype`` is that of floating-point weights on disk (the pipeline's: of U-Net and refiner); reading brings them back to fp32. ``frozen``
says what becomes of text encoder and codec: they are copied, linked to where they lie on this machine ("link"), or left out ("none").
Each raises UserError when ``output`` exists.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from paradiffusion.atomic import atomic_folder
from paradiffusion.checkpoints.hub import refusals
from paradiffusion.checkpoints.layouts import (
    DENOISER_FOLDERS,
    LLM_FOLDERS,
    LORA,
    REFINER,
    SCHEDULER,
    SIDECAR,
    UNET,
    UNET_LORA,
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
from paradiffusion.config import ADAPTERS, CodecConfig, TextEncoderConfig
from paradiffusion.diffusion.objective import Flow
from paradiffusion.errors import UserError, reason_of
from paradiffusion.models.codec import locate_codec
from paradiffusion.models.unet import DENOISERS, class_of, trained_whole
from paradiffusion.repository import ROOT
from paradiffusion.text.encoder import DTYPES, peft_config
from paradiffusion.text.families import empty_model
from paradiffusion.text.sources import locate

WHOLE = "unet_trained_whole.safetensors"  # beside a U-Net's adapter
SAMPLES = "samples"  # the model card's pictures, beside the weights on a hub
OFFICIAL_TOKENS = 256  # what the released demo reads of a prompt, whatever the checkpoint was trained with
OFFICIAL_END = "sigma_min"  # its solver's last step leads to the schedule's lowest noise, where later libraries go to none


def export_ours(checkpoint: Layout, output: Path, dtype: str = "float32", frozen: str = "link") -> None:
    """Write our layout: weights and description, without training state. A frozen model's "link" is its path in the description; "none"
    is right for what is given away, since they are known by name, hub id and hash."""
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


def push(folder: Path, repository: str, private: bool = False) -> str:
    """Make a hub's repository USER/NAME, a new one ``private`` or not, what an export's ``folder`` is, in one commit; the commit's address.

    Of what it holds, only older weights and samples that are not in ``folder`` are deleted: an adapter left behind would be applied.
    Raises UserError, which says why it cannot be pushed.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, files = HfApi(), files_of(folder)
    parts = (*DENOISER_FOLDERS, REFINER, LORA, UNET_LORA, SAMPLES)
    with refusals(f"hub={repository} cannot be pushed to"):
        api.create_repo(repository, private=private or None, exist_ok=True)
        old = [name for name in api.list_repo_files(repository) if name.startswith(tuple(f"{part}/" for part in parts))]
        deleted = [CommitOperationDelete(name) for name in old if name not in files]
        added = [CommitOperationAdd(name, path) for name, path in files.items()]
        return str(api.create_commit(repository, [*deleted, *added], commit_message="ParaDiffusion").commit_url)


def files_of(folder: Path) -> dict[str, Path]:
    """All files below ``folder`` by their name within it, in order."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def export_official(checkpoint: Layout, output: Path, dtype: str = "float32", frozen: str = "copy") -> None:
    """Write the layout of the published weights, which the released inference code reads; and beside it a small file of ours with what
    that layout has no place for (sampler defaults, resolution, tokens), so that reading it back loses nothing. Raises UserError for a
    model that the released code could not run, saying why."""
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
        "positions on the text's keys": conditioning.get("key_positions"),
        "tokens of scores": conditioning.get("scores"),
        "a flow objective": isinstance(objective, Flow),
        "the embedding of a guidance scale": objective.config.distill_steps,
        "a schedule of zero terminal SNR": objective.config.zero_terminal_snr,
        "an adapter that is no plain LoRA": (description["lora"] or {}).get("kind", "lora") != "lora",
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
        reasons.append(f"it reads {OFFICIAL_TOKENS} tokens of a prompt, and this checkpoint {tokens}: set that number there")
    if dtype != "float32" or encoder.get("dtype", "float32") != "float32":
        reasons.append("what is stored or computed in 16 bits draws slightly other pictures than float32")
    if objective_of(checkpoint.description).scheduler("dpm").config.get("final_sigmas_type") != OFFICIAL_END:
        reasons.append("it leaves the schedule's lowest noise in, as sample.py does from this folder but not from the checkpoint")
    if checkpoint.description["conditioning"].get("clean_text", True):
        reasons.append("it reads text to the letter: give it prompts on one line, with single spaces, as in training")
    return reasons


def export_pipeline(checkpoint: Layout, output: Path, dtype: str = "float32", frozen: str = "copy") -> None:
    """Write a pipeline that ``ParaDiffusionPipeline.from_pretrained`` loads, which wants ``text_encoder=`` and ``vae=`` where these are
    left out. Raises UserError when a part is missing."""
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


def export_lora(checkpoint: Layout, output: Path, dtype: str = "float32", frozen: str = "none") -> None:
    """Write a checkpoint's adapters by the libraries' own savers: the U-Net's as diffusers' ``load_lora_weights`` takes it, the
    language model's as PEFT's ``from_pretrained`` does; beside a U-Net's what was trained whole with it, and a README. Raises UserError
    when there is no adapter, or diffusers has none of its kind."""
    from diffusers.loaders import SD3LoraLoaderMixin, StableDiffusionLoraLoaderMixin
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model, get_peft_model_state_dict

    told, description = lora_told(checkpoint), checkpoint.description
    lora, unet_lora, kind = description["lora"], description["unet_lora"], DENOISERS[class_of(checkpoint.unet_config)]
    state = {name: tensor.to(DTYPES[dtype]).contiguous() for name, tensor in checkpoint.weights(merge=False).items()}
    parts = {
        part: {n.removeprefix(f"{part}."): t for n, t in state.items() if n.startswith(f"{part}.")}
        for part in (UNET, REFINER, "text_encoder")
    }
    with whole_folder(output) as folder:
        if unet_lora:
            with torch.device("meta"):
                unet: Any = kind.made.from_config(checkpoint.unet_config)
                unet.add_adapter(config := peft_config(unet_lora))
            saver: Any = {"unet": StableDiffusionLoraLoaderMixin, "transformer": SD3LoraLoaderMixin}[kind.folder]
            layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet, state_dict=parts[UNET]))
            about = {**config.to_dict(), "target_modules": sorted(unet_lora["target_modules"])}  # a set has no order
            saver.save_lora_weights(folder, **{f"{kind.folder}_lora_layers": layers, f"{kind.folder}_lora_adapter_metadata": about})
            whole = trained_whole(kind, checkpoint.unet_config)
            write_tensors(folder / WHOLE, {n: t for n, t in parts[UNET].items() if n.startswith(whole)})
            if checkpoint.refiner_config is not None:
                write_config(folder / REFINER, checkpoint.refiner_config)
                write_tensors(folder / REFINER / "model.safetensors", parts[REFINER])
        if lora:
            empty: Any = empty_model(parse(TextEncoderConfig, description["text_encoder"]))
            with torch.device("meta"):
                adapted = get_peft_model(empty, peft_config(lora, **lora.get("settings", {})))
            own = {name.removeprefix("model."): tensor for name, tensor in parts["text_encoder"].items()}
            adapted.save_pretrained(folder / LORA, state_dict=own, save_embedding_layers=False)
        (folder / "README.md").write_text("\n\n".join(told) + "\n")


def lora_told(checkpoint: Layout) -> list[str]:
    """How the adapters of ``export_lora`` are loaded, and what they lack, in a sentence each. Raises UserError as it does."""
    description, kind = checkpoint.description, DENOISERS[class_of(checkpoint.unet_config)]
    lora, unet_lora, encoder = description["lora"], description["unet_lora"], description["text_encoder"]
    if not (lora or unet_lora):
        raise UserError(f"{checkpoint.name} has no adapter (train_text=lora, unet.lora_rank); use to=pipeline for whole weights.")
    if unet_lora and ADAPTERS[unet_lora.get("kind", "lora")][0] != "LoraConfig":
        raise UserError(
            f"diffusers loads no adapter of the kind {unet_lora['kind']}, which the U-Net of {checkpoint.name} has; use to=pipeline, "
            f"which merges it, or PeftModel.from_pretrained(unet, '{checkpoint.folder / UNET_LORA}')."
        )
    lacking = {
        "positions on the text's keys": description["conditioning"].get("key_positions"),
        "the embedding of a guidance scale": description["objective"].get("distill_steps"),
    }
    if unet_lora and (named := [name for name, has in lacking.items() if has]):
        raise UserError(
            f"the U-Net that an adapter is loaded into has no place for {named[0]}, which {checkpoint.name} has; use to=pipeline."
        )
    told = []
    if unet_lora:
        whole = "text projection and refiner (`refiner/`) were" if checkpoint.refiner_config else "the text projection was"
        told = [
            f'The U-Net\'s adapter: `pipe.load_lora_weights(folder)`, or `unet.load_lora_adapter(folder, prefix="{kind.folder}")`.',
            f"Alone it draws another picture, since {whole} trained whole beside it: call "
            f"`unet.load_state_dict(load_file(folder + '/{WHOLE}'), strict=False)` before.",
        ]  # fmt: skip
    if lora:
        layers = f"the first {encoder['layers']} layers of " if encoder.get("layers") else ""
        model = f"{layers}{encoder['hub'] or encoder['name']}"
        told.append(f"The language model's: `PeftModel.from_pretrained(model, folder + '/{LORA}')`, for {model}.")
    if not unet_lora:
        told.append("The U-Net was trained whole beside it, and the adapter alone draws another picture: to=pipeline exports both.")
    return told


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
    """A folder to write, which becomes ``output`` when the block has ended; of one that failed nothing is left. Raises UserError when
    ``output`` exists, or cannot be written."""
    check_absent(output)
    try:
        with atomic_folder(output.absolute()) as folder:
            yield folder
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or reason_of(error)
        raise UserError(
            f"{output} could not be written ({reason}), and nothing is left of it; make room, or choose another output."
        ) from None
