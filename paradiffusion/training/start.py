"""The start of a stage: finding its checkpoint, checking that it fits, and building the models with its weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from paradiffusion.checkpoints.layouts import (
    UNET,
    check_complete,
    copy_tensors,
    find_checkpoint,
    is_unet_folder,
    load_adapter,
    open_layout,
    parse,
)  # fmt: skip
from paradiffusion.checkpoints.manifest import newest_valid
from paradiffusion.checkpoints.starting import fit
from paradiffusion.compose import CONFIGS
from paradiffusion.config import LoraConfig, TrainConfig, identity
from paradiffusion.data.plan import BatchPlan
from paradiffusion.data.shards import Span, read_place
from paradiffusion.errors import UserError
from paradiffusion.models.codec import settled_scaling_factor
from paradiffusion.models.joint import JointModel, build_joint
from paradiffusion.models.unet import DENOISERS, SCALE_LAYER, class_of, downsampling, halve_frozen, lora_names, own_arguments  # fmt: skip
from paradiffusion.models.vision import ALIGNER
from paradiffusion.randomness import seed_from
from paradiffusion.text.encoder import TextEncoder, attach_lora, checkpoint_layers, is_adapter, start_from_principal
from paradiffusion.text.refiner import Refiner
from paradiffusion.text.scores import scores_of
from paradiffusion.training.distillation import Teacher
from paradiffusion.training.folder import CONFIG_FILE, SUMMARY, check_unchanged, find_resume
from paradiffusion.training.inputs import on_device

# Captions from which the refiner's input statistics are taken, and how many of them the language model reads at once. Samples by which
# scores are cut into bins: of four bins each holds a quarter to within 1.4 % (one standard deviation).
STATISTICS_CAPTIONS, AT_ONCE, SCORED_SAMPLES = 256, 16, 1024


@dataclass(frozen=True)
class Start:
    """Attributes:
    config: with what only the checkpoint can know (see ``adopt``).
    found: the checkpoint, or a folder with just a U-Net; None for fresh weights.
    resumes: whether the stage goes on from it, rather than takes its average to begin with.
    description: what the checkpoint says of itself; None without one.
    """

    config: TrainConfig
    found: Path | None
    resumes: bool
    description: dict[str, Any] | None

    def told(self) -> str:
        """For a person."""
        if self.found is None:
            return "fresh weights"
        told = f"{'resuming' if self.resumes else 'starting'} from {self.found}"
        stage = self.found.parent.parent  # that the checkpoint is of
        record, summary = stage / CONFIG_FILE, stage / SUMMARY
        named = self.found.parent.name == "checkpoints"
        if named and not self.resumes and self.description is not None and record.is_file():
            step, steps = self.description["step"], json.loads(record.read_text())["max_steps"]
            ended = summary.is_file() and json.loads(summary.read_text())["steps"] == step  # by its patience
            told += f" (step {step} of {steps}: not the end of that stage)" if step < steps and not ended else ""
        return told


def find_start(config: TrainConfig, folder: Path) -> Start:
    """Where the stage in ``folder`` goes on or starts, checked against the configuration; a person is told of it.

    Raises UserError for a checkpoint that is missing, damaged, or contradicts the configuration.
    """
    resume = find_resume(config, folder)
    start = start_from(config, resume or find_init(config), resumes=resume is not None)
    if start.config.unet != config.unet:
        print(f"the U-Net takes its shape from {start.found}, not from unet={config.unet.name}", flush=True)
    if resume is not None:  # before a model is loaded, which might only say that a tensor does not fit
        check_unchanged(start.config, folder)
    else:
        check_fits(start)
    return start


def check_fits(start: Start) -> None:
    """Raise UserError where a stage cannot start from these weights (see ``check_init``)."""
    if start.config.objective.distill_steps and start.description is None:
        raise UserError(
            f"objective.distill_steps={start.config.objective.distill_steps} distils a trained model, and the stage starts from "
            f"{'fresh weights' if start.found is None else 'a U-Net alone'}; set init_from=<checkpoint>, such as that of stage 3."
        )
    if start.found is not None and start.description is not None:
        check_init(start.config, start.found, start.description)
    elif start.config.train_text == "adapter":
        raise UserError("train_text=adapter needs a stage 2 checkpoint to take the LoRA adapter from; set init_from=.")


def startable(config: TrainConfig) -> TrainConfig:
    """The same stage from fresh weights where the stage before it has not run yet: for what does not need its result."""
    if config.stage == 1 or config.init_from is not None or config.train_text == "adapter":
        return config
    previous, _ = newest_valid(Path(config.run_dir) / f"stage{config.stage - 1}")
    return config if previous is not None else replace(config, init_from="scratch")


def start_from(config: TrainConfig, found: Path | None, resumes: bool) -> Start:
    """A start from ``found``, unchecked."""
    if found is None or is_unet_folder(found):
        return Start(config, found, resumes, None)
    description = open_layout(found).description
    return Start(adopt(config, description, found), found, resumes, description)


def find_init(config: TrainConfig) -> Path | None:
    """The checkpoint whose weights the stage starts from; None for fresh weights. Raises UserError, which
    says what to run first, when there is none."""
    if config.init_from == "scratch" or (config.init_from is None and config.stage == 1):
        return None
    if config.init_from is not None:
        return find_checkpoint(config.init_from, "init_from").folder
    previous = Path(config.run_dir) / f"stage{config.stage - 1}"
    found, faults = newest_valid(previous)
    for sentence in faults:
        print(f"warning: {sentence}", flush=True)
    if found is None:
        preset = "" if config.preset == "nano" else f"preset={config.preset} "  # without it the default would train
        raise UserError(
            f"stage {config.stage} starts from stage {config.stage - 1} of the same run, and {previous} holds no whole "
            f"checkpoint; run `python train.py {preset}stage={config.stage - 1} run_dir={config.run_dir}` first, or set "
            "init_from=<checkpoint>."
        )
    return found


def adopt(config: TrainConfig, description: dict[str, Any], source: Path) -> TrainConfig:
    """``config`` with what only the checkpoint ``source`` that it goes on from can know: where its frozen models lie, the shape
    of its U-Net where ``unet.arguments`` are left as their file has them, and that of an adapter that is applied but not
    trained. Raises UserError for an adapter of a kind that our configuration cannot describe."""
    for part in ("text_encoder", "codec"):
        mine, path = getattr(config, part), description[part].get("path")
        if mine.path is None and path is not None and Path(path).is_dir():
            config = replace(config, **{part: replace(mine, path=path)})
    unet, name, arguments = open_layout(source).unet_config, config.unet.class_name, config.unet.arguments
    theirs, own = class_of(unet), CONFIGS / "unet" / f"{config.unet.name}.yaml"
    stored = own_arguments(unet, theirs)
    shipped: Any = OmegaConf.to_container(OmegaConf.load(own)) if own.is_file() else None
    left_alone = shipped is not None and arguments == (shipped.get("arguments") or {})
    if (name, own_arguments(arguments, name)) != (theirs, stored) and left_alone:
        size = {key: value for key, value in arguments.items() if key == "sample_size"}
        config = replace(config, unet=replace(config.unet, class_name=theirs, arguments={**size, **stored}))
    if not unet.get(key := DENOISERS[theirs].text_width):  # its cross-attention is as wide as the language model
        config = replace(config, unet=replace(config.unet, arguments={**config.unet.arguments, key: None}))
    lora = description["lora"]
    if config.objective.distill_steps:  # the text as the teacher reads it
        config = replace(config, train_text="frozen" if lora is None else "adapter")
    if config.train_text == "adapter" and lora is not None:
        if lora.get("settings"):
            raise UserError(
                f"the LoRA adapter that this stage would apply has settings which cannot be trained with ({lora['settings']}); "
                "merge it into the language model with PEFT, and set text_encoder.path= to the result."
            )
        config = replace(config, lora=parse(LoraConfig, lora))
    return config


def check_init(config: TrainConfig, init: Path, description: dict[str, Any]) -> None:
    """Refuse a start from a checkpoint whose conditioning, text encoder, codec, noise, U-Net or adapter is another: UserError
    names the key that differs, with both values."""
    parts = ("text_encoder", "conditioning", "codec", "objective")
    # A key that was not there yet when the checkpoint was written has its default.
    theirs = replace(config, **{part: parse(type(getattr(config, part)), description[part]) for part in parts})
    ours = replace(config, codec=replace(config.codec, scaling_factor=settled_scaling_factor(config.codec)))
    unet, name = open_layout(init).unet_config, config.unet.class_name
    has, wants = own_arguments(unet, class_of(unet)), own_arguments(config.unet.arguments, name)
    its, mine = (
        {"unet.class_name": which, **{f"unet.arguments.{key}": some.get(key, "diffusers' default") for key in sorted({*has, *wants})},
         "unet.coordinates": coordinates}
        for which, some, coordinates in ((class_of(unet), has, description["coordinates"]), (name, wants, config.unet.coordinates))
    )  # fmt: skip
    if theirs.objective.distill_steps:
        raise UserError(
            f"{init} is distilled, with its guidance within, and no stage starts from such weights; set init_from= to the checkpoint that "
            "it was distilled from."
        )
    for before, now, advice in (
        (identity(theirs, "weights"), identity(ours, "weights"),
         "use the same {part} (for a run with other settings, start from stage 1 in another run_dir=)"),
        (identity(theirs, "noise"), identity(ours, "noise"),
         "set {key} to the checkpoint's, or start from its U-Net alone with init_from=<checkpoint>/unet"),
        (its, mine, "set it to the checkpoint's, or leave unet.arguments as they are in configs/unet and the checkpoint's are taken"),
    ):  # fmt: skip
        for key, value in now.items():
            if before[key] != value:
                raise UserError(
                    f"{init} was trained with {key}={before[key]}, and this command says {value}; "
                    f"{advice.format(key=key, part=key.partition('.')[0])}."
                )
    lora = description["lora"]
    if config.train_text == "adapter" and lora is None:
        raise UserError(
            f"train_text=adapter applies the LoRA adapter of stage 2, and {init} has none; set init_from= to a stage 2 "
            "checkpoint, or train_text=frozen."
        )
    if config.train_text == "frozen" and lora is not None:
        raise UserError(f"train_text=frozen would drop the LoRA adapter that {init} was trained with; set train_text=adapter.")
    if lora is not None:
        stored, own = (
            {"kind": "lora", **values, "target_modules": sorted(values["target_modules"])} for values in (lora, asdict(config.lora))
        )
        if stored != own:
            raise UserError(f"{init} has a LoRA adapter with {stored}, and lora says {own}; make them equal.")


def build_models(
    start: Start, encoder: TextEncoder, main: bool = False, device: torch.device | None = None
) -> tuple[JointModel, dict[str, Tensor]]:
    """The joint module with the weights that it starts from, on the CPU, and the frozen tensors that checkpoints keep. On ``device``
    "meta" the module has no weights, but what is wrong with those that it would start from is found all the same."""
    config = start.config
    is_unet = start.found is not None and start.description is None
    stored: dict[str, Tensor] = {}
    principal = {"text_encoder": config.train_text == "lora" and config.lora.kind == "pissa",
                 "unet": config.unet.lora_rank > 0 and config.unet.lora_kind == "pissa"}  # fmt: skip
    if start.found is not None:
        stored = open_layout(start.found).weights(merge=not config.unet.lora_rank or (principal["unet"] and not start.resumes))
        # What a resumed PiSSA adapter is by now comes with the rest of its state.
        stored = {n: t for n, t in stored.items() if not (is_adapter(n) and principal[n.partition(".")[0]])}
    if config.train_text == "adapter":
        load_adapter(encoder, stored, config.lora)
    elif config.train_text == "lora":
        attach_lora(encoder, config.lora, seed_from("lora", config.seed) % (1 << 31))
        if config.gradient_checkpointing:
            checkpoint_activations(encoder, config.gradient_checkpointing)
    joint = build_joint(config, encoder.width, encoder if config.train_text == "lora" else None, device)
    needed = config.codec.factor * downsampling(joint.unet)
    if config.data.bucket_multiple % needed:
        raise UserError(
            f"data.bucket_multiple={config.data.bucket_multiple} must be a multiple of {needed}: codec.factor times the "
            "U-Net's own downsampling (a transformer's patch)."
        )
    own = {**dict(joint.named_parameters()), **dict(joint.named_buffers())}
    if is_unet:
        fitting, report = fit({name: tensor for name, tensor in own.items() if name.startswith("unet.")}, stored)
        if main:
            print(report, flush=True)
        copy_tensors(joint, fitting)
    elif stored:
        stored = lora_names(stored, joint.unet)
        # Adapters, and a guidance scale's layer, that begin with this stage are all that a checkpoint may lack, but for an aligner.
        new = ("text_encoder.", ALIGNER) if start.resumes else ("text_encoder.", ALIGNER, f"{UNET}.{SCALE_LAYER}.")
        check_complete({name for name in own if not name.startswith(new) and not is_adapter(name)}, stored)
        copy_tensors(joint, {n: t for n, t in stored.items() if n in own or not n.startswith("text_encoder.")})
    frozen = {n: t for n, t in stored.items() if n.startswith("text_encoder.") and config.train_text == "adapter"}
    # What is frozen of the joint module belongs to the checkpoint too; kept here, since ZeRO-3 cuts frozen weights as well.
    frozen |= {n: p.detach() for n, p in joint.named_parameters() if not (p.requires_grad or n.startswith("text_encoder."))}
    for part in (part for part, is_so in principal.items() if is_so):
        found_start = start_from_principal(joint.get_submodule(part), seed_from("pissa", config.seed) % (1 << 31))
        joint.start |= {f"{part}.{name}": tensor for name, tensor in found_start.items()}
    if config.precision != "fp32":
        halve_frozen(joint.unet)
    return joint, frozen


def open_teacher(config: TrainConfig, encoder: TextEncoder, device: torch.device) -> Teacher | None:
    """The teacher of a stage that distils; None for another stage. Raises UserError where it is not there (any more)."""
    found = find_init(config) if config.objective.distill_steps else None
    return None if found is None else Teacher(open_layout(found), config, encoder, device)


def checkpoint_activations(encoder: TextEncoder, which: bool | str) -> None:
    """Recompute the language model's activations, of the layers that ``which`` says (see ``checkpoint_layers``)."""
    checkpoint_layers(encoder.model, which)
    # transformers recomputes only layers in training mode, which a loaded model is not in; its dropout must stay off.
    encoder.model.train()
    for module in encoder.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def first_samples(plan: BatchPlan) -> Iterator[tuple[dict[str, Any], str]]:
    """The plan's samples from its first step on: the JSON of each, and the kind of caption that it is read with. No picture is read."""
    for batch in map(plan.batch, count()):
        for row, kind in zip(batch.rows, batch.kinds, strict=True):
            place = replace(plan.index.place(int(row)), image=Span(0, 0))
            yield read_place(place).meta, plan.index.kinds[kind]


@torch.no_grad()
def take_statistics(refiner: Refiner, encoder: TextEncoder, plan: BatchPlan, device: torch.device) -> None:
    """Standardise the refiner's input by the features of the plan's first captions, which the language model reads on ``device``; and cut
    scores into bins, by the first samples that have them in their JSON. Raises UserError where too few have."""
    if refiner.scores is not None:
        refiner.scores.set_edges([scores_of(meta) for meta, _ in islice(first_samples(plan), SCORED_SAMPLES)])
    captions = [meta["captions"].get(kind, "") for meta, kind in islice(first_samples(plan), STATISTICS_CAPTIONS)]
    tokens, home = encoder.tokenize(captions), encoder.device
    on_device(encoder, device)
    features = [
        encoder(ids.to(device), mask.to(device), tokens.prefix).float().cpu()
        for ids, mask in zip(tokens.ids.split(AT_ONCE), tokens.mask.split(AT_ONCE), strict=True)
    ]
    on_device(encoder, home)
    refiner.set_statistics(torch.cat(features), tokens.mask[:, tokens.prefix :])
