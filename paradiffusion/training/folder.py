"""A stage's folder: one writer at a time, one configuration over its life, and where its weights start."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from paradiffusion.atomic import write_atomic
from paradiffusion.checkpoints.layouts import find_checkpoint, open_layout, parse
from paradiffusion.checkpoints.manifest import newest_valid
from paradiffusion.compose import CONFIGS
from paradiffusion.config import LoraConfig, SourceConfig, TrainConfig, identity, keys_of
from paradiffusion.errors import UserError
from paradiffusion.models.codec import settled_scaling_factor
from paradiffusion.models.unet import DENOISERS, class_of, own_arguments

CONFIG_FILE = "config.json"
# With those of a list's entries, whose places are left out of their names.
KEYS = {**keys_of(TrainConfig), **keys_of(SourceConfig, "data.sources.")}
# Keys of earlier versions, with the value by which a run did without what this version no longer has.
GONE = {"conditioning.layout": False, "unet.pooled_text": False, "unet.attention_gain": 1.0}


def stage_folder(config: TrainConfig) -> Path:
    """``run_dir/stageN``."""
    return Path(config.run_dir) / f"stage{config.stage}"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the stage folder; the lock goes with the process, however it ends.

    Raises:
        UserError: when another process writes there, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 - held until the block ends
    except OSError as error:
        raise UserError(f"run_dir: {folder} cannot be written ({error.strerror}); choose another run_dir=.") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{folder} is being written by another run (process {file.read().strip() or 'unknown'}); wait for it, stop it, "
                "or choose another run_dir=."
            ) from None
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        yield


def find_resume(config: TrainConfig, folder: Path) -> Path | None:
    """The checkpoint to go on from, or None for a fresh stage.

    Raises:
        UserError: when resume=false meets a folder with checkpoints, or only damaged ones are left.
    """
    found, faults = newest_valid(folder)
    for sentence in faults:
        print(f"warning: {sentence}", flush=True)
    has_any = found is not None or bool(faults)
    if not config.resume and has_any:
        raise UserError(
            f"resume=false, but {folder} already holds checkpoints; choose another run_dir=, or delete that folder yourself."
        )
    if found is None and faults:
        raise UserError(
            f"every checkpoint in {folder} is damaged; delete the folder's checkpoints/ to start the stage again."
        )
    return found


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries, and lists of them, with dotted keys such as "data.sources[0].weight"."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            flat |= flatten({f"{key}[{number}]": one for number, one in enumerate(value)}, prefix)
        else:
            flat[prefix + key] = value
    return flat


def may_differ(key: str, streaming: bool) -> bool:
    """Whether a resumed run may have another value of this key (see ``config.option``). Of streamed data there is no
    fingerprint that could say whether other paths hold the same."""
    name = re.sub(r"\[\d+\]", "", key)
    while name and name not in KEYS:  # a key of the user's own, in a dictionary
        name = name.rpartition(".")[0]
    free = KEYS[name]["free"] if name else ""
    return bool(free) and not (free == "data" and streaming)


def check_unchanged(config: TrainConfig, folder: Path, facts: dict[str, Any] | None = None) -> None:
    """Compare with the configuration that the stage began with.

    Args:
        facts: what was found rather than configured, such as the data's fingerprint; None before anything was loaded.
    Raises:
        UserError: naming the first key that differs, with both values.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        return
    before, after = flatten(json.loads(path.read_text())), {**flatten(recorded(config, facts or {})), **GONE}
    defaults = {**flatten(recorded(TrainConfig(), {})), **GONE}  # of a key that was not there yet when the stage began
    for key in sorted({*before, *after}):
        if may_differ(key, config.data.streaming) or (facts is None and key.startswith("facts.")):
            continue
        if (old := before.get(key, defaults.get(key))) != after.get(key):
            if key == "facts.data":
                raise UserError(
                    f"the data has changed since {folder} was begun (samples, captions, sizes, or the tokens in the indexes), and "
                    "a resumed run reads the same data in the same order; put the old data back, or begin a new run on it from "
                    f"these weights with run_dir=<new folder> init_from={folder}."
                )
            raise UserError(
                f"{folder} was begun with {key}={old}, and this command says {after.get(key)}: a resumed run "
                "must go on as it began; put the old value back, or choose another run_dir=."
            )


def recorded(config: TrainConfig, facts: dict[str, Any]) -> dict[str, Any]:
    """What config.json holds, as it reads back from JSON."""
    values: dict[str, Any] = json.loads(json.dumps({**asdict(config), "facts": facts}))
    return values


def record_config(config: TrainConfig, folder: Path, facts: dict[str, Any]) -> None:
    """Write what the stage runs with to config.json."""
    write_atomic(folder / CONFIG_FILE, json.dumps(recorded(config, facts), indent=1))


def find_init(config: TrainConfig) -> Path | None:
    """The checkpoint whose weights the stage starts from; None for fresh weights.

    Raises:
        UserError: saying what to run first when there is none.
    """
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
    """``config`` with what only the checkpoint ``source`` that it goes on from can know: where its frozen models lie, the
    shape of its U-Net where ``unet.arguments`` are left as their file has them, and that of an adapter that is applied but
    not trained.

    Raises:
        UserError: for an adapter of a kind that our configuration cannot describe.
    """
    for part in ("text_encoder", "codec"):
        mine, path = getattr(config, part), description[part].get("path")
        if mine.path is None and path is not None and Path(path).is_dir():
            config = replace(config, **{part: replace(mine, path=path)})
    unet, name, arguments = open_layout(source).unet_config, config.unet.class_name, config.unet.arguments
    theirs = class_of(unet)
    stored = own_arguments(unet, theirs)
    if (name, own_arguments(arguments, name)) != (theirs, stored) and arguments == configured_arguments(
        config.unet.name
    ):
        size = {key: value for key, value in arguments.items() if key == "sample_size"}
        config = replace(config, unet=replace(config.unet, class_name=theirs, arguments={**size, **stored}))
    if not unet.get(key := DENOISERS[theirs].text_width):  # its cross-attention is as wide as the language model
        config = replace(config, unet=replace(config.unet, arguments={**config.unet.arguments, key: None}))
    lora = description["lora"]
    if config.train_text == "adapter" and lora is not None:
        if lora.get("settings"):
            raise UserError(
                f"the LoRA adapter that this stage would apply has settings which cannot be trained with ({lora['settings']}); "
                "merge it into the language model with PEFT, and set text_encoder.path= to the result."
            )
        config = replace(config, lora=LoraConfig(lora["rank"], lora["alpha"], list(lora["target_modules"])))
    return config


def configured_arguments(name: str) -> dict[str, Any] | None:
    """``unet.arguments`` as configs/unet/<name>.yaml has them; None where there is no such file."""
    path = CONFIGS / "unet" / f"{name}.yaml"
    if not path.is_file():
        return None
    values: Any = OmegaConf.to_container(OmegaConf.load(path))
    return dict(values.get("arguments") or {})


def described(config: TrainConfig, description: dict[str, Any]) -> TrainConfig:
    """``config`` as a checkpoint describes it; a key that was not there yet has its default."""
    parts = ("text_encoder", "conditioning", "codec", "objective")
    return replace(config, **{part: parse(type(getattr(config, part)), description[part]) for part in parts})


def check_init(config: TrainConfig, init: Path, description: dict[str, Any]) -> None:
    """Refuse a start from a checkpoint whose conditioning, text encoder, codec, noise, U-Net or adapter is another.

    Raises:
        UserError: naming the key that differs, with both values.
    """
    own = replace(config, codec=replace(config.codec, scaling_factor=settled_scaling_factor(config.codec)))
    theirs, ours = identity(described(config, description), "weights"), identity(own, "weights")
    for key, value in ours.items():
        if theirs[key] != value:
            raise UserError(
                f"{init} was trained with {key}={theirs[key]}, and this command says {value}; use the same "
                f"{key.partition('.')[0]} (for a run with other settings, start from stage 1 in another run_dir=)."
            )
    check_denoiser(config, init, description)
    lora = description["lora"]
    if config.train_text == "adapter" and lora is None:
        raise UserError(
            f"train_text=adapter applies the LoRA adapter of stage 2, and {init} has none; set init_from= to a stage 2 "
            "checkpoint, or train_text=frozen."
        )
    if config.train_text == "frozen" and lora is not None:
        raise UserError(
            f"train_text=frozen would drop the LoRA adapter that {init} was trained with; set train_text=adapter."
        )
    if lora is not None:
        theirs, ours = (
            {**values, "target_modules": sorted(values["target_modules"])} for values in (lora, asdict(config.lora))
        )
        if theirs != ours:
            raise UserError(f"{init} has a LoRA adapter with {theirs}, and lora says {ours}; make them equal.")


def check_denoiser(config: TrainConfig, init: Path, description: dict[str, Any]) -> None:
    """Refuse a start from a checkpoint whose U-Net has another shape, or learned another target or noise schedule.

    Raises:
        UserError: naming the key that differs, with both values.
    """
    theirs, ours = identity(described(config, description), "noise"), identity(config, "noise")
    for key, value in ours.items():
        if theirs[key] != value:
            raise UserError(
                f"{init} learned with {key}={theirs[key]}, and this command says {value}; set {key} to the checkpoint's, or "
                "start from its U-Net alone with init_from=<checkpoint>/unet."
            )
    unet, name = open_layout(init).unet_config, config.unet.class_name
    stored, mine = own_arguments(unet, class_of(unet)), own_arguments(config.unet.arguments, name)
    differing: list[tuple[str, Any, Any]] = [("unet.class_name", class_of(unet), name)]
    differing += [
        (f"unet.arguments.{key}", stored.get(key, "diffusers' default"), mine.get(key, "diffusers' default"))
        for key in sorted({*stored, *mine})
    ]
    differing.append(("unet.coordinates", description["coordinates"], config.unet.coordinates))
    for key, before, value in differing:
        if before != value:
            raise UserError(
                f"{init} holds a U-Net with {key}={before}, and this command says {value}; set it to the checkpoint's, or leave "
                "unet.arguments as they are in configs/unet and the checkpoint's are taken."
            )
