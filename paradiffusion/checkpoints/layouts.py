"""Checkpoint layouts: ours, the published weights', a ParaDiffusionPipeline's, and a diffusers U-Net alone.

The layout of a folder is found once, by ``find_checkpoint`` or ``open_layout``. It is an object with the ``description`` (what
``checkpoint.json`` says: text encoder and codec by id, revision and hash, the whole conditioning, objective, sampler defaults)
and the ``weights`` by the joint module's names. In all layouts ``unet/`` and ``text_encoder_lora/`` hold the EMA weights under
the names of diffusers and PEFT (``transformer/`` those of a denoiser that is no U-Net); ours has ``refiner/`` too and, where a
U-Net was trained through LoRA, its adapter in ``unet_lora/``.
"""

from __future__ import annotations

import inspect
import json
import re
from abc import ABC, abstractmethod
from dataclasses import asdict, fields, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from paradiffusion.checkpoints.hub import PREFIX, address_of, fetch
from paradiffusion.checkpoints.manifest import find_fault, follow_pointer, newest_valid
from paradiffusion.checkpoints.tensors import ADAPTER_STEM, UNET_STEM, joint_adapter_name, read_tensors, write_tensors
from paradiffusion.config import (
    CodecConfig,
    ConditioningConfig,
    DataConfig,
    LoraConfig,
    ObjectiveConfig,
    TextEncoderConfig,
    TrainConfig,
)  # fmt: skip
from paradiffusion.diffusion.objective import OBJECTIVES, Objective, make_objective
from paradiffusion.errors import UserError
from paradiffusion.models.codec import DIFFUSERS_SCALING_FACTOR, locate_codec
from paradiffusion.models.joint import JointModel
from paradiffusion.models.unet import DENOISERS, class_of, kind_of, read_width
from paradiffusion.models.vision import ALIGNER
from paradiffusion.repository import find_shipped
from paradiffusion.text.encoder import ADAPTED, TextEncoder, attach_lora, is_adapter, peft_config
from paradiffusion.text.sources import locate, weights_hash

FORMAT = "paradiffusion"
FORMAT_VERSION = 1
# Where each part of the joint module is stored, and the prefix of its parameters' names there.
UNET, REFINER, LORA, UNET_LORA = "unet", "refiner", "text_encoder_lora", "unet_lora"
DENOISER_FOLDERS = tuple(kind.folder for kind in DENOISERS.values())  # "unet", and "transformer" for one that is none
# PEFT's own prefix, and that of an adapter for a model with its language head; we read the bare model.
PEFT_PREFIX = "base_model.model."
HEADED = re.compile(r"^base_model\.model\.model\.(?=layers\.|embed_tokens\.)")
# Of the published weights.
SCHEDULER = "scheduler"
LLM_FOLDERS = ("Llama-2-7b-hf", "text_encoder")
VAE_FOLDERS = ("sdxl-vae-fp16-fix", "vae")
SIDECAR = "paradiffusion.json"  # of an export of ours: what that layout itself has no place for
DEFAULT_RESOLUTION = 512  # where the U-Net's config gives no sample_size
LLAMA_WIDTH = 4096  # of the features of Llama-2-7B, which the published weights read
# Keys of adapter_config.json that change what the adapter computes, beyond rank, alpha and a list of targets.
ADAPTER_KEYS = (
    "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "layers_to_transform", "layers_pattern", "fan_in_fan_out",
    "exclude_modules",
)  # fmt: skip
# Keys that PEFT 0.7.1 has a use for. What later versions have is written only where it is not as they have it by default.
PEFT_KEYS = (
    "peft_type", "base_model_name_or_path", "revision", "task_type", "inference_mode", "r", "target_modules", "lora_alpha",
    "lora_dropout", "bias", "init_lora_weights", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
)  # fmt: skip
ADAPTER_REFUSED = ("modules_to_save", "layer_replication")
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v_prediction", "flow_prediction": "flow", "sample": "sample"}
T = TypeVar("T")


class Layout(ABC):
    """A folder of weights. A subclass says how its layout is recognised and described.

    Args:
        unet: which U-Net, where a folder of the published weights holds several.
    """

    def __init__(self, folder: Path, unet: str = UNET) -> None:
        self.folder = folder
        found = (folder / name for name in (unet, *DENOISER_FOLDERS) if (folder / name / "config.json").is_file())
        self.unet = next(found, folder / unet) if unet == UNET else folder / unet

    @property
    def name(self) -> str:
        """What images are recorded as drawn by."""
        if self.unet.name not in DENOISER_FOLDERS:
            return str(self.unet)
        return address_of(self.folder) or str(self.folder)

    @staticmethod
    @abstractmethod
    def fits(folder: Path) -> bool:
        """Whether the folder has this layout."""

    def describe(self) -> dict[str, Any]:
        """``description``, read anew."""
        return {}

    @cached_property
    def description(self) -> dict[str, Any]:
        """What ``checkpoint.json`` says, or would say; empty for a U-Net alone. Raises UserError for a file that cannot be read, and for
        settings that cannot be honoured."""
        if self.unet.name not in (names := self.unets()):
            raise UserError(
                f"{self.folder} holds no U-Net called {self.unet.name}; choose one of unet={', '.join(names) or '(none found)'}."
            )
        return self.describe()

    def unets(self) -> list[str]:
        """Names of the subfolders that hold a denoiser, ``unet`` and its like."""
        names = [path.parent.name for path in sorted(self.folder.glob("*/config.json"))]
        return [name for name in names if name.startswith(DENOISER_FOLDERS)]

    @property
    def unet_config(self) -> dict[str, Any]:
        return read_json(self.unet / "config.json")

    @property
    def refiner_config(self) -> dict[str, Any] | None:
        """The arguments of ``Refiner``; None where there is none."""
        path = self.folder / REFINER / "config.json"
        return {k: v for k, v in read_json(path).items() if not k.startswith("_")} if path.is_file() else None

    @property
    def adapter(self) -> Path:
        """The folder of the text encoder's adapter: the published weights hold text_encoder_lora_1 beside unet_1."""
        paired = self.folder / f"{LORA}{self.unet.name.removeprefix(UNET)}"
        return paired if (paired / "adapter_config.json").is_file() else self.folder / LORA

    def weights(self, merge: bool = True) -> dict[str, Tensor]:
        """All weights by the joint module's names (adapters and refiner buffers included), fp32, on the CPU. ``merge`` adds a U-Net's LoRA
        to its base; else the layers that have it are named as PEFT does, ``...base_layer.weight``."""
        stored = read_tensors(self.folder / UNET_LORA, ADAPTER_STEM)
        peft = {name.removeprefix(PEFT_PREFIX): t for name, t in stored.items() if name.startswith(PEFT_PREFIX)}
        adapter = {joint_adapter_name(name, f"{UNET}."): tensor.float() for name, tensor in peft.items()}
        adapted = {ADAPTED.split(name)[0] for name in adapter}
        state = dict(adapter)
        for name, tensor in read_tensors(self.unet, UNET_STEM).items():
            name = f"{UNET}.{name}"
            state[under_lora(name) if name.rpartition(".")[0] in adapted else name] = tensor.float()
        for stem in ("model", UNET_STEM):  # ours, and a pipeline's, whose names have the prefix already
            for name, tensor in read_tensors(self.folder / REFINER, stem).items():
                state[f"{REFINER}.{name.removeprefix(f'{REFINER}.')}"] = tensor.float()
        state |= read_adapter(self.adapter)
        return merge_unet_lora(state, self.description["unet_lora"]) if adapter and merge else state

    def place(self, text_encoder_path: str | None, codec_path: str | None) -> None:
        """Note in ``description`` where the frozen models lie on this machine. Raises UserError where there is no model."""
        if text_encoder_path is not None:
            locate(TextEncoderConfig(path=text_encoder_path))
            self.description["text_encoder"]["path"] = text_encoder_path
        if codec_path is not None:
            locate_codec(CodecConfig(path=codec_path))
            self.description["codec"]["path"] = codec_path


class Ours(Layout):
    """A checkpoint as training writes it, or its export."""

    @staticmethod
    def fits(folder: Path) -> bool:
        return (folder / "checkpoint.json").is_file()

    def describe(self) -> dict[str, Any]:
        description = read_json(self.folder / "checkpoint.json")
        name, number = description.get("format"), description.get("version")
        if name != FORMAT or not isinstance(number, int):
            raise UserError(f"{self.folder}/checkpoint.json does not describe a checkpoint; use another one.")
        if number > FORMAT_VERSION:
            raise UserError(
                f"{self.folder}/checkpoint.json has the format {name} {number}, expected {FORMAT} up to {FORMAT_VERSION}; update "
                "this repository."
            )
        if self.unet_config.get("class_embed_type") == "simple_projection":
            raise UserError(
                f"{self.folder} has a summary of the text in its time embedding, which this version no longer has; train it anew "
                "(make demo), or use data/nano."
            )
        return description


class Pipeline(Layout):
    """An exported ParaDiffusionPipeline, which describes itself in ``model_index.json``."""

    @staticmethod
    def fits(folder: Path) -> bool:
        path = folder / "model_index.json"
        return path.is_file() and read_json(path).get("_class_name") == "ParaDiffusionPipeline"

    def describe(self) -> dict[str, Any]:
        description: dict[str, Any] = read_json(self.folder / "model_index.json")["description"]
        # Saved anew, the frozen models have other bytes than those that the checkpoint was trained with.
        for part, folder in (("text_encoder", self.folder / "text_encoder"), ("codec", self.folder / "vae")):
            if (folder / "config.json").is_file():
                stem = "model" if part == "text_encoder" else UNET_STEM
                description[part] |= {"path": str(folder.resolve()), "hash": weights_hash(folder, stem).partition(".")[0]}
        description["codec"]["subfolder"] = None
        return description


class UNetAlone(Layout):
    """A denoiser in the diffusers layout, in ``folder`` or its ``unet/`` (``transformer/``): a point to start from."""

    def __init__(self, folder: Path, unet: str = UNET) -> None:
        super().__init__(folder, unet)
        self.unet = folder if is_unet(folder) else self.unet

    @staticmethod
    def fits(folder: Path) -> bool:
        return any(map(is_unet, (folder, *(folder / name for name in DENOISER_FOLDERS))))

    @cached_property
    def description(self) -> dict[str, Any]:
        return {}

    def weights(self, merge: bool = True) -> dict[str, Tensor]:
        tensors = read_tensors(self.unet, UNET_STEM)
        if not tensors:
            raise UserError(
                f"init_from={self.folder} holds no weights of a {class_of(self.unet_config)}; expected {UNET_STEM}.safetensors "
                "(or its shards, an fp16 variant or a .bin) beside config.json, in that folder or in its unet/ or transformer/."
            )
        return {f"{UNET}.{name}": tensor.float() for name, tensor in tensors.items()}


class Official(Layout):
    """The published weights: ``unet`` (or several, such as ``unet_384``), ``scheduler``, and where they are at hand
    ``text_encoder_lora``, ``Llama-2-7b-hf`` and ``sdxl-vae-fp16-fix``.

    The description is put together from the configuration files and from what the released inference code does: 256 tokens
    padded to the maximum and padding attended to, text to the letter, DPM-Solver multistep with 100 steps, guidance 7.5. Frozen
    models have no hash there, so any are accepted.
    """

    @staticmethod
    def fits(folder: Path) -> bool:
        if (folder / "model_index.json").exists() or not (folder / SCHEDULER / "scheduler_config.json").is_file():
            return False
        return bool(Official(folder).unets())

    def unets(self) -> list[str]:
        """Those that take the language model's features: through a text projection of their own, or because their
        cross-attention is as wide as it. SDXL's and others' do not, and are points to start from."""
        return [name for name in super().unets() if self.takes_text(read_json(self.folder / name / "config.json"))]

    def takes_text(self, unet: dict[str, Any]) -> bool:
        if unet.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
            return False
        if unet.get("encoder_hid_dim"):
            return unet.get("encoder_hid_dim_type") in (None, "text_proj")
        if unet.get("addition_embed_type"):
            return False
        if self.language_model is not None:
            return read_width(unet) == read_json(self.language_model / "config.json").get("hidden_size")
        ours = (self.folder / SIDECAR).is_file() or adapter_config(self.adapter)
        return bool(ours) or read_width(unet) == LLAMA_WIDTH

    @property
    def language_model(self) -> Path | None:
        """Its folder, where it lies beside the U-Net: the adapter's base by name, else by the published names."""
        base = Path(str(adapter_config(self.adapter).get("base_model_name_or_path") or "")).name
        return first_model(self.folder, (base, *LLM_FOLDERS) if base else LLM_FOLDERS)

    def describe(self) -> dict[str, Any]:
        adapter = describe_adapter(self.adapter)
        codec = codec_in(first_model(self.folder, VAE_FOLDERS))
        settings = scheduler_settings(read_json(self.folder / SCHEDULER / "scheduler_config.json"))
        path = None if self.language_model is None else str(self.language_model)
        encoder = TextEncoderConfig(name="llama2_7b", hub="meta-llama/Llama-2-7b-hf", path=path)
        size = self.unet_config.get("sample_size")
        sides = size if isinstance(size, list) else [size]
        resolution = max(sides) * codec.factor if all(isinstance(side, int) and side > 0 for side in sides) else None
        as_trained = TrainConfig(
            preset="official", stage=3, text_encoder=encoder, codec=codec, objective=describe_objective(settings),
            conditioning=ConditioningConfig(clean_text=False),
            data=DataConfig(resolution=resolution or DEFAULT_RESOLUTION),
        )  # fmt: skip
        description = {
            **describe(as_trained, 0, {"hash": None}, {"hash": None, "scaling_factor": codec.scaling_factor}),
            "lora": adapter,
            "scheduler": settings,
            "provenance": {"layout": "official", "unet": self.unet.name, "init_from": None},
        }
        if not (self.folder / SIDECAR).is_file():
            return description
        ours = read_json(self.folder / SIDECAR)
        ours["lora"] = adapter and ours.get("lora", adapter)
        for part in ("text_encoder", "codec"):
            ours[part] = {**ours[part], "path": description[part]["path"], "hash": None}
        return {**description, **ours}

    def place(self, text_encoder_path: str | None, codec_path: str | None) -> None:
        super().place(text_encoder_path, codec_path)
        if codec_path is not None:  # it has a scaling factor of its own, which only its configuration tells
            found = codec_in(locate_codec(CodecConfig(path=codec_path)))
            self.description["codec"] = {**asdict(found), "path": codec_path, "hash": None}


def layout_of(folder: Path, unet: str = UNET) -> Layout | None:
    """The folder's layout; None where it is no checkpoint and holds no U-Net."""
    return next((kind(folder, unet) for kind in (Ours, Pipeline, Official, UNetAlone) if kind.fits(folder)), None)


def open_layout(folder: Path, unet: str = UNET) -> Layout:
    """As ``layout_of``. Raises UserError where it is none."""
    if (layout := layout_of(folder, unet)) is None:
        raise UserError(f"{folder} holds no checkpoint; use another one.")
    return layout


def find_checkpoint(path: str | Path, key: str = "ckpt", unet: str = UNET) -> Layout:
    """The checkpoint that ``ckpt=`` means: a run, a stage, a stage's ``best``, or a checkpoint or weights folder itself, in any
    layout, here or at hf://USER/NAME. ``key`` is what the user gave it under; init_from= takes a U-Net alone too. Raises UserError when
    there is none, or none that passes its manifest, or it cannot be fetched."""
    folder = fetch(str(path), key) if str(path).startswith(PREFIX) else follow_pointer(find_shipped(path))
    layout = layout_of(folder, unet)
    if isinstance(layout, Ours) and (fault := find_fault(folder)) is not None:
        raise UserError(f"the checkpoint {folder} is damaged: {fault}; use another checkpoint, or copy it again.")
    if layout is not None and (key == "init_from" or not isinstance(layout, UNetAlone)):
        return layout
    stages = sorted(folder.glob("stage[0-9]"), reverse=True) if not (folder / "checkpoints").is_dir() else [folder]
    faults: list[str] = []
    for stage in stages:
        found, passed_over = newest_valid(stage)
        faults += passed_over
        for sentence in passed_over:
            print(f"warning: {sentence}")
        if found is not None:
            return Ours(found, unet)
    if faults:
        raise UserError(f"no whole checkpoint is left in {folder}: {faults[0]}")
    raise UserError(
        f"{key}={path} holds no checkpoint; expected a run (runs/NAME), a stage (runs/NAME/stage1), its best one (runs/NAME/stage1/best, "
        "of runs with keep_best=), a checkpoint (.../checkpoints/step_000060), a pipeline of ours, a weights folder (ours, or in the "
        "official layout: unet, scheduler, ...) or hf://USER/NAME"
        f"{', or a diffusers folder with a ' + ' or '.join(DENOISERS) if key == 'init_from' else ''}."
    )


def is_unet(folder: Path) -> bool:
    """Whether a denoiser of a class that is known here lies in ``folder`` itself."""
    path = folder / "config.json"
    return path.is_file() and read_json(path).get("_class_name") in DENOISERS


def is_unet_folder(folder: Path) -> bool:
    """Whether all that a folder holds is a U-Net to start from."""
    return isinstance(layout_of(folder), UNetAlone)


def describe(config: TrainConfig, step: int, text_source: dict[str, Any], codec_source: dict[str, Any]) -> dict[str, Any]:
    """What ``checkpoint.json`` says."""
    libraries = {name: version(name) for name in ("torch", "diffusers", "transformers", "peft", "safetensors")}
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "preset": config.preset,
        "stage": config.stage,
        "step": step,
        "seed": config.seed,
        "resolution": config.data.resolution,
        "text_encoder": {**asdict(config.text_encoder), "hash": text_source["hash"]},
        "lora": None if config.train_text == "frozen" else as_stored(asdict(config.lora)),
        "conditioning": asdict(config.conditioning),
        "coordinates": config.unet.coordinates,
        "unet_lora": as_stored(config.unet.adapter) if config.unet.lora_rank else None,
        "codec": {**asdict(config.codec), **{key: codec_source[key] for key in ("hash", "scaling_factor")}},
        "objective": asdict(config.objective),
        "sampler": asdict(config.sampler),
        "provenance": {"libraries": libraries, "images_seen": step * config.batch_size, "init_from": config.init_from},
    }


def as_stored(lora: dict[str, Any]) -> dict[str, Any]:
    """How an adapter is described that is trained as ``lora`` says: what began with PiSSA is stored as ``save_weights`` has it."""
    if lora["kind"] != "pissa":
        return lora
    return {**lora, "kind": "lora", "rank": 2 * lora["rank"], "alpha": 2 * lora["alpha"]}


def portable(description: dict[str, Any]) -> dict[str, Any]:
    """A description without what is true of this machine alone, of merged weights, as plain JSON."""
    values: dict[str, Any] = json.loads(json.dumps({**description, "unet_lora": None}))
    for part in ("text_encoder", "codec"):
        values[part]["path"] = None
    values["provenance"]["init_from"] = None
    values["objective"].pop("align_encoder", None)
    return values


def split_parts(state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Group a joint module's tensors by part, each named as its own library names it."""
    parts: dict[str, dict[str, Tensor]] = {UNET: {}, REFINER: {}, LORA: {}, UNET_LORA: {}}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        if part == "text_encoder":
            # PEFT stores adapters without the adapter's own name ("default").
            parts[LORA][re.sub(r"\.default\b", "", rest.removeprefix("model."))] = tensor
        elif part == UNET and is_adapter(rest):
            parts[UNET_LORA][PEFT_PREFIX + re.sub(r"\.default\b", "", rest)] = tensor
        else:
            parts[part][rest.replace(".base_layer.", ".")] = tensor
    return parts


def save_weights(folder: Path, joint: JointModel, state: dict[str, Tensor], description: dict[str, Any]) -> None:
    """Write ``state`` (the EMA weights by parameter name) to ``folder`` with its description. ``joint`` gives the configuration of the
    U-Net, the refiner and the adapter; its own weights are read only where they are a U-Net's frozen base under LoRA that ``state``
    lacks."""
    base = {}
    if description.get("unet_lora"):  # all but adapter and projection is frozen, so it is no part of the average
        base = {f"{UNET}.{n}": p for n, p in joint.unet.named_parameters() if not p.requires_grad}
    for name, start in joint.start.items():  # B A - B0 A0, a plain LoRA of twice the rank beside the model's own weights
        first = ".lora_A." in name
        state = {**state, name: torch.cat([state[name].cpu(), start if first else -start], dim=0 if first else 1)}
    buffers = {name: tensor for name, tensor in joint.named_buffers() if name.startswith((f"{UNET}.", f"{REFINER}."))}
    whole = {name: tensor for name, tensor in {**base, **buffers, **state}.items() if not name.startswith(ALIGNER)}
    parts = split_parts({name: tensor.detach().cpu().contiguous() for name, tensor in whole.items()})
    if joint.refiner is not None:
        write_config(folder / REFINER, joint.refiner.config)
    unet = folder / kind_of(joint.unet).folder
    joint.unet.save_config(unet)
    write_parts(folder, parts, description, unet)


def write_parts(folder: Path, parts: dict[str, dict[str, Tensor]], description: dict[str, Any], unet: Path) -> None:
    """Write the tensors of ``split_parts``, the denoiser's to ``unet``, and the description; configurations are the caller's."""
    write_tensors(unet / f"{UNET_STEM}.safetensors", parts[UNET])
    if parts[REFINER]:
        write_tensors(folder / REFINER / "model.safetensors", parts[REFINER])
    for part, key in ((LORA, "lora"), (UNET_LORA, "unet_lora")):
        if parts[part]:
            write_adapter(folder / part, parts[part], description[key])
    (folder / "checkpoint.json").write_text(json.dumps(description, indent=1))


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write ``config.json``, the arguments of a part, to its ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """The tensors of a language model's adapter by the joint module's names, fp32, whether it was made for the model with its
    language head or without."""
    stored = read_tensors(folder, ADAPTER_STEM)
    return {joint_adapter_name(HEADED.sub(PEFT_PREFIX, name)): tensor.float() for name, tensor in stored.items()}


def write_adapter(folder: Path, tensors: dict[str, Tensor], lora: dict[str, Any]) -> None:
    """An adapter as PEFT finds it on the bare model, as in the released code, and a language model's on one with its head too, which
    looks for names of its own and passes over the rest. (diffusers takes what ``export_lora`` writes.)"""
    others: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        bare = name.removeprefix(PEFT_PREFIX)
        if bare.startswith(("layers.", "embed_tokens.")):
            others[f"{PEFT_PREFIX}model.{bare}"] = tensor.clone()
    write_tensors(folder / f"{ADAPTER_STEM}.safetensors", {**tensors, **others})
    targets = {"target_modules": sorted(lora["target_modules"]), **lora.get("settings", {})}
    config = peft_config({**lora, **targets}, **targets)
    config.save_pretrained(str(folder))
    path, defaults = folder / "adapter_config.json", type(config)().to_dict()
    # Older versions refuse a file with keys that they do not know, such as 0.7.1, the released code's, whatever their values.
    kept = {k: v for k, v in read_json(path).items() if k in PEFT_KEYS or v != defaults.get(k)}
    kept |= {"target_modules": targets["target_modules"]}  # PEFT writes a set in the order of this process's string hashes.
    path.write_text(json.dumps({k: v for k, v in kept.items() if k != "peft_version"}, indent=1))


def parse(cls: type[T], values: dict[str, Any]) -> T:
    """A dataclass from a description's dictionary; keys that this version does not know are left out."""
    known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    return cls(**{key: value for key, value in values.items() if key in known})


def objective_of(description: dict[str, Any]) -> Objective:
    """The objective that a description records; where it has a published scheduler's settings, sampled exactly by that.

    Other solvers than DPM-Solver take its noise schedule alone. Betas of any kind are accepted, since nothing is trained with
    them. As in the released pipeline, a guidance scale below 1 is none.
    """
    config = parse(ObjectiveConfig, description["objective"])
    settings = description.get("scheduler")
    if settings is None:
        return make_objective(replace(config, min_snr_gamma=None))  # a weight of the loss plays no part here
    objective = OBJECTIVES[config.prediction](config)

    def schedulers(solver: str, **overrides: Any) -> Any:
        if solver == "dpm":
            return DPMSolverMultistepScheduler(**{**settings, **overrides})
        shared = {key: settings[key] for key in objective.published if key in settings}
        return objective.usual_scheduler(solver, **{**shared, **overrides})

    objective.schedulers, objective.guided_from = schedulers, 1.0
    return objective


def under_lora(name: str) -> str:
    """The name that a layer's tensor has beside a LoRA adapter."""
    module, _, kind = name.rpartition(".")
    return f"{module}.base_layer.{kind}"


def merge_unet_lora(state: dict[str, Tensor], unet_lora: dict[str, Any]) -> dict[str, Tensor]:
    """``state`` with the U-Net's adapter, of which ``unet_lora`` says kind, rank and alpha, merged into its base as PEFT does it, under the
    plain U-Net's names. Raises UserError for a layer that lacks a part of its adapter."""
    from peft import inject_adapter_in_model

    merged: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        module, base, kind = name.partition(".base_layer.")
        if name.startswith(f"{UNET}.") and is_adapter(name):
            layer = ADAPTED.split(name)[0]
            layers.setdefault(layer, {})[name.removeprefix(f"{layer}.")] = tensor
        else:
            merged[f"{module}.{kind}" if base else name] = tensor
    for layer, adapter in layers.items():
        weight = merged[f"{layer}.weight"]
        holder: Any = torch.nn.Sequential(torch.nn.utils.skip_init(torch.nn.Linear, *weight.T.shape, bias=False))
        holder[0].weight.data = weight.clone()
        inject_adapter_in_model(peft_config({**unet_lora, "target_modules": ["0"]}), holder)
        check_complete({name for name, _ in holder[0].named_parameters() if is_adapter(f".{name}")}, adapter)
        copy_tensors(holder[0], adapter)
        holder[0].merge()
        merged[f"{layer}.weight"] = holder[0].get_base_layer().weight.detach()
    return merged


def load_adapter(encoder: TextEncoder, state: dict[str, Tensor], lora: LoraConfig, settings: dict[str, Any] | None = None) -> None:
    """Attach the adapter in ``state`` to a frozen text encoder, and freeze it too (stage 3, sampling). ``settings`` are what else PEFT must
    be told of a published adapter (``describe_adapter``)."""
    try:
        attach_lora(encoder, lora, **(settings or {}))
    except (ValueError, TypeError) as error:
        raise UserError(f"{LORA}/adapter_config.json does not fit the text encoder ({error}); copy both again.") from None
    adapter = {name.removeprefix("text_encoder."): t for name, t in state.items() if name.startswith("text_encoder.")}
    check_complete({name for name, p in encoder.named_parameters() if p.requires_grad}, adapter)
    copy_tensors(encoder, adapter)
    encoder.requires_grad_(False)


def check_complete(names: set[str], state: dict[str, Tensor]) -> None:
    """UserError unless ``state`` has every tensor of ``names``: one that it lacks would keep its random start."""
    missing = sorted(names - state.keys())
    if missing:
        raise UserError(
            f"the checkpoint lacks {len(missing)} of the model's tensors, {missing[0]} the first; use another checkpoint, or copy it again."
        )


def copy_tensors(module: torch.nn.Module, state: dict[str, Tensor]) -> None:
    """Copy named tensors into a module's parameters and buffers; every name must be there with its shape."""
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with torch.no_grad():
        for name, tensor in state.items():
            if name not in own or own[name].shape != tensor.shape:
                found = "no such tensor" if name not in own else f"the shape {tuple(own[name].shape)}"
                raise UserError(
                    f"the checkpoint's tensor {name} of shape {tuple(tensor.shape)} does not fit the model, which has {found}; "
                    "use the configuration that it was trained with."
                )
            own[name].copy_(tensor)


def adapter_config(folder: Path) -> dict[str, Any]:
    """PEFT's configuration of an adapter; empty where the folder has none."""
    path = folder / "adapter_config.json"
    return read_json(path) if path.is_file() else {}


def describe_adapter(folder: Path) -> dict[str, Any] | None:
    """Rank, alpha and targets of a PEFT adapter; ``settings`` holds what else PEFT must be told. None where there is none."""
    config = adapter_config(folder)
    if not config:
        return None
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
    }
    settings = {key: config[key] for key in ADAPTER_KEYS if config.get(key)}
    if isinstance(targets, str):  # a regular expression, which is not the same as a list of one name
        settings["target_modules"] = targets
    return {**described, "settings": settings} if settings else described


def codec_in(folder: Path | None) -> CodecConfig:
    """The configuration of the autoencoder in ``folder``, or of SDXL's where that is None."""
    config = CodecConfig(name="sdxl", hub="madebyollin/sdxl-vae-fp16-fix", scaling_factor=0.13025)
    if folder is not None:
        vae = read_json(folder / "config.json")
        config.path = str(folder)
        config.latent_channels = int(vae.get("latent_channels", 4))
        config.factor = 2 ** (len(vae.get("block_out_channels", [64])) - 1)
        config.scaling_factor = float(vae.get("scaling_factor") or DIFFUSERS_SCALING_FACTOR)
    return config


def scheduler_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of DPMSolverMultistepScheduler from a ``scheduler_config.json``, whatever scheduler's it is.

    The libraries that the weights were published with ended a trajectory at the schedule's lowest noise; later ones end at zero, and
    write down that they do. A file that does not say is an old one. The released pipeline sets steps_offset to 1 whatever the file says.
    Raises UserError for settings that the solver does not take.
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
        train_timesteps=config["num_train_timesteps"],
        zero_terminal_snr=config["rescale_betas_zero_snr"],
        **{key: config[key] for key in ("beta_schedule", "beta_start", "beta_end", "flow_shift")},
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


def first_model(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The first of the subfolders that holds a model."""
    return next((folder / name for name in names if (folder / name / "config.json").is_file()), None)
