"""The layout of the published weights, made to look like one of our checkpoints.

A folder with ``unet`` (or several of them, such as ``unet_384``), ``scheduler``, and where they are at hand
``text_encoder_lora``, ``Llama-2-7b-hf`` and ``sdxl-vae-fp16-fix``. What our ``checkpoint.json`` says is put together from
the configuration files in it and from what the released inference code does: 256 tokens padded to the maximum and padding
attended to, DPM-Solver multistep with 100 steps, guidance 7.5.
"""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from paradiffusion.checkpoints.tensors import ADAPTER_STEM, UNET_STEM, joint_adapter_name, read_tensors
from paradiffusion.config import (
    CodecConfig,
    ConditioningConfig,
    LoraConfig,
    ObjectiveConfig,
    SamplerConfig,
    TextEncoderConfig,
)
from paradiffusion.errors import UserError
from paradiffusion.text.encoder import TextEncoder

UNET, LORA, SCHEDULER = "unet", "text_encoder_lora", "scheduler"
LLM_FOLDERS = ("Llama-2-7b-hf", "text_encoder")
VAE_FOLDERS = ("sdxl-vae-fp16-fix", "vae")
SIDECAR = "paradiffusion.json"  # of an export of ours: what the layout itself has no place for
DEFAULT_RESOLUTION = 512  # where the U-Net's config gives no sample_size
# Keys of adapter_config.json that change what the adapter computes, beyond rank, alpha and a list of targets.
ADAPTER_KEYS = (
    "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "layers_to_transform", "layers_pattern", "fan_in_fan_out",
    "exclude_modules",
)  # fmt: skip
ADAPTER_REFUSED = ("modules_to_save", "layer_replication")
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v_prediction", "flow_prediction": "flow", "sample": "sample"}


def is_official(folder: Path) -> bool:
    """Whether ``folder`` is laid out like the published weights."""
    others = any((folder / name).exists() for name in ("checkpoint.json", "model_index.json"))
    return not others and (folder / SCHEDULER / "scheduler_config.json").is_file() and bool(denoisers(folder))


def denoisers(folder: Path) -> list[str]:
    """Names of the subfolders that hold a U-Net with a text projection of its own, ``unet`` and its like."""
    found = []
    for path in sorted(folder.glob(f"{UNET}*/config.json")):
        config = read_json(path)
        # SDXL's and others' have none: they are starting points (checkpoints/starting.py), not whole weights.
        if config.get("encoder_hid_dim") and config.get("encoder_hid_dim_type") in (None, "text_proj"):
            found.append(path.parent.name)
    return found


def choose_unet(folder: Path, unet: str) -> Path:
    """The subfolder ``unet`` of a checkpoint or weights folder; UserError naming those that there are."""
    if unet not in denoisers(folder):
        raise UserError(
            f"{folder} holds no U-Net called {unet}; choose one of unet={', '.join(denoisers(folder)) or '(none found)'}."
        )
    return folder / unet


def adapter_folder(folder: Path, unet: str) -> Path:
    """Where the adapter lies: the published folder holds ``text_encoder_lora_1`` beside ``unet_1``."""
    paired = folder / f"{LORA}{unet.removeprefix(UNET)}"
    return paired if (paired / "adapter_config.json").is_file() else folder / LORA


def describe_official(folder: Path, unet: str = UNET) -> dict[str, Any]:
    """What ``checkpoint.json`` would say of the folder; frozen models have no hash, so any are accepted.

    Raises:
        UserError: for a configuration file that cannot be read, and for settings that cannot be honoured.
    """
    denoiser = read_json(choose_unet(folder, unet) / "config.json")
    adapter = describe_adapter(adapter_folder(folder, unet))
    codec = describe_codec(_first(folder, VAE_FOLDERS))
    settings = scheduler_settings(read_json(folder / SCHEDULER / "scheduler_config.json"))
    base = Path(str(adapter.pop("base", None) or "")).name if adapter else ""
    encoder = TextEncoderConfig(name="llama2_7b", hub="meta-llama/Llama-2-7b-hf")
    language_model = _first(folder, (base, *LLM_FOLDERS) if base else LLM_FOLDERS)
    size = denoiser.get("sample_size")
    sides = size if isinstance(size, (list, tuple)) else [size]
    resolution = max(sides) * codec["factor"] if all(isinstance(side, int) and side > 0 for side in sides) else None
    description: dict[str, Any] = {
        "format": "paradiffusion",
        "version": 1,
        "preset": "official",
        "stage": 3,
        "step": 0,
        "seed": 0,
        "resolution": resolution or DEFAULT_RESOLUTION,
        "text_encoder": {**asdict(encoder), "path": language_model and str(language_model), "hash": None},
        "lora": adapter,
        "conditioning": asdict(ConditioningConfig()),
        "coordinates": 0,
        "codec": codec,
        "objective": asdict(describe_objective(settings)),
        "scheduler": settings,
        "sampler": asdict(SamplerConfig()),
        "provenance": {"layout": "official", "unet": unet, "init_from": None},
    }
    if not (folder / SIDECAR).is_file():
        return description
    ours = read_json(folder / SIDECAR)
    ours["lora"] = adapter and ours.get("lora", adapter)
    for part in ("text_encoder", "codec"):
        ours[part] = {**ours[part], "path": description[part]["path"], "hash": None}
    return {**description, **ours}


def read_official(folder: Path, unet: str = UNET) -> dict[str, Tensor]:
    """All trained weights of the folder by the joint module's names, fp32, on the CPU."""
    state = {f"{UNET}.{name}": t.float() for name, t in read_tensors(choose_unet(folder, unet), UNET_STEM).items()}
    for name, tensor in read_tensors(adapter_folder(folder, unet), ADAPTER_STEM).items():
        # An adapter of a model with its language head has one more "model." than one of the bare model, which we read.
        bare = re.sub(r"^base_model\.model\.model\.(?=layers\.|embed_tokens\.)", "base_model.model.", name)
        state[joint_adapter_name(bare)] = tensor.float()
    return state


def describe_adapter(folder: Path) -> dict[str, Any] | None:
    """Rank, alpha and targets of a PEFT adapter and its ``base`` model; ``settings`` holds what else PEFT must be told.

    None where the folder has no adapter.
    """
    if not (folder / "adapter_config.json").is_file():
        return None
    config = read_json(folder / "adapter_config.json")
    kind, bias = config.get("peft_type", "LORA"), config.get("bias", "none")
    refused = [key for key in ADAPTER_REFUSED if config.get(key)]
    if kind != "LORA" or bias != "none" or refused or "r" not in config:
        found = refused[0] if refused else f"peft_type={kind}, bias={bias}"
        raise UserError(f"{folder} is an adapter with {found}; expected a plain LoRA adapter (peft_type=LORA).")
    targets = config.get("target_modules") or []
    described = {
        "rank": config["r"],
        "alpha": config.get("lora_alpha", 8),
        "target_modules": sorted(targets) if isinstance(targets, list) else [targets],
        "base": config.get("base_model_name_or_path"),
    }
    settings = {key: config[key] for key in ADAPTER_KEYS if config.get(key)}
    if isinstance(targets, str):  # a regular expression, which is not the same as a list of one name
        settings["target_modules"] = targets
    return {**described, "settings": settings} if settings else described


def attach_adapter(encoder: TextEncoder, lora: LoraConfig, settings: dict[str, Any]) -> None:
    """Put a LoRA adapter on the language model as ``settings`` say, which a plain LoraConfig cannot."""
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    arguments = {"target_modules": list(lora.target_modules), **settings}
    try:
        config = PeftLoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, **arguments)
        encoder.model = get_peft_model(encoder.model, config)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{LORA}/adapter_config.json does not fit the text encoder ({error}); copy both again."
        ) from None


def describe_codec(folder: Path | None) -> dict[str, Any]:
    """CodecConfig as a dictionary for the autoencoder in ``folder``, or for SDXL's where that is None."""
    config = CodecConfig(name="sdxl", hub="madebyollin/sdxl-vae-fp16-fix")
    if folder is not None:
        vae = read_json(folder / "config.json")
        config.path = str(folder)
        config.latent_channels = int(vae.get("latent_channels", 4))
        config.factor = 2 ** (len(vae.get("block_out_channels", [64])) - 1)
        config.scaling_factor = float(vae.get("scaling_factor") or 0.18215)  # diffusers' default
    return {**asdict(config), "hash": None}


def scheduler_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of DPMSolverMultistepScheduler from a ``scheduler_config.json``, whatever scheduler's it is.

    The libraries that the weights were published with ended a trajectory at the schedule's lowest noise; later ones end
    at zero, and write down that they do. A file that does not say is an old one. The released pipeline sets steps_offset to
    1 whatever the file says.

    Raises:
        UserError: for settings that the solver does not take.
    """
    known = inspect.signature(DPMSolverMultistepScheduler.__init__).parameters
    settings = {key: value for key, value in config.items() if key in known and value is not None}
    settings.setdefault("final_sigmas_type", "sigma_min")
    settings["steps_offset"] = 1
    if settings.get("lambda_min_clipped") == float("-inf"):
        del settings["lambda_min_clipped"]  # the default, which JSON cannot say
    try:
        DPMSolverMultistepScheduler(**settings)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"scheduler/scheduler_config.json is not one for DPM-Solver multistep ({error}); expected that of the weights."
        ) from None
    return settings


def describe_objective(settings: dict[str, Any]) -> ObjectiveConfig:
    """The noise schedule and the prediction type that the solver's settings imply."""
    scheduler: Any = DPMSolverMultistepScheduler(**settings)
    config = scheduler.config
    return ObjectiveConfig(
        name="official",
        prediction=PREDICTIONS[config["prediction_type"]],
        beta_schedule=config["beta_schedule"],
        beta_start=config["beta_start"],
        beta_end=config["beta_end"],
        train_timesteps=config["num_train_timesteps"],
        zero_terminal_snr=config["rescale_betas_zero_snr"],
        flow_shift=config["flow_shift"],
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; UserError when it is missing or is none."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} could not be read ({error}); copy the folder again.") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no JSON object; copy the folder again.")
    return values


def _first(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The first of the subfolders that holds a model."""
    return next((folder / name for name in names if (folder / name / "config.json").is_file()), None)
