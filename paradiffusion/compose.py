"""From ``configs/`` and a command line to a checked configuration, with errors that a person can act on.

Hydra's compose API does the composing. Its own ``main`` would make run folders, once per process, and print its own
errors.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from paradiffusion.config import SampleConfig, SourceConfig, TextEncoderConfig, TrainConfig
from paradiffusion.errors import UserError
from paradiffusion.machine import settled_precision

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FLAGS = ("--cfg",)
# Dictionaries that take keys of the user's own; given whole, they replace what the groups set.
OPEN = ("data.captions", "data.demo_sizes", "unet.arguments", "text_encoder.architecture")
# Texts, mostly paths: they reach the configuration as typed, whatever Hydra's grammar makes of their characters.
TEXTS = (
    "run_dir", "init_from", "data.shards", "data.val_shards", "data.demo_folder", "data.folder", "data.cache",
    "data.cache_dir", "data.index_dir", "text_encoder.path", "codec.path", "conditioning.prefix", "ckpt",
    "prompt", "prompt_file", "negative_prompt", "output_dir",
)  # fmt: skip
# Read as YAML, since the braces of a range of shards mean something else in Hydra's grammar.
SOURCES = "data.sources"
T = TypeVar("T", TrainConfig, SampleConfig)
Options = TypeVar("Options")


def compose_train(arguments: list[str], beside: Sequence[str] = ()) -> TrainConfig:
    """The configuration of one stage. Raises UserError for any override that is wrong.

    Args:
        beside: keys that the script takes besides, for the hint at an unknown one.
    """
    config = _compose("train", TrainConfig, arguments, beside)
    config.precision = settled_precision(config.precision)
    return config


def compose_sample(arguments: list[str]) -> SampleConfig:
    """What sample.py was asked for. Raises UserError for any override that is wrong."""
    return _compose("sample", SampleConfig, arguments)


def compose_options(cls: type[Options], arguments: list[str]) -> Options:
    """A small dataclass from key=value arguments, for scripts without config groups. Raises UserError for a wrong one."""
    config = OmegaConf.structured(cls)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in keys_of(cls):
            close = difflib.get_close_matches(key, keys_of(cls), n=1, cutoff=0.6)
            hint = f" (did you mean {close[0]}=?)" if close else ""
            raise UserError(
                f"the argument {argument!r} is not understood{hint}; the keys are {', '.join(keys_of(cls))} (key=value)."
            )
        try:
            OmegaConf.update(config, key, None if value == "null" else value)
        except OmegaConfBaseException as error:
            raise UserError(_explain(error)) from None
    try:
        made: Any = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:  # an interpolation, "${x}", is read only here
        raise UserError(_explain(error)) from None
    return cast(Options, made)


def text_encoder_named(name: str, key: str, overrides: Sequence[str] = ()) -> TextEncoderConfig:
    """The text encoder that ``key`` of a script names: one of configs/text_encoder, or a folder.

    Args:
        overrides: of train.py, which hold for a named one too.
    Raises:
        UserError: for what is neither.
    """
    if name in options("text_encoder"):
        rest = [o for o in overrides if not o.lstrip("+").startswith(("text_encoder=", "text_encoder."))]
        return compose_train([*rest, f"text_encoder={name}"]).text_encoder
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"{key}={name} is neither a folder nor one of {', '.join(options('text_encoder'))}; name a folder with a "
            "tokenizer in the transformers layout."
        )
    return TextEncoderConfig(name=folder.name, path=str(folder))


def options(group: str) -> list[str]:
    """The names that a config group offers."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def groups() -> list[str]:
    """Config groups that a person chooses from."""
    return sorted(
        p.name for p in CONFIGS.iterdir() if p.is_dir() and p.name not in ("preset_stage", "launch", "ablations")
    )


def keys_of(cls: Any, prefix: str = "") -> list[str]:
    """All keys of a schema, dotted; without fields that no user gives (``metadata={"internal": True}``)."""
    keys = []
    for field in fields(cls):
        if field.metadata.get("internal"):
            continue
        default = field.default_factory() if callable(field.default_factory) else field.default
        keys.append(prefix + field.name)
        if is_dataclass(default):
            keys += keys_of(default, f"{prefix}{field.name}.")
    return keys


def as_yaml(config: TrainConfig | SampleConfig) -> str:
    """The resolved configuration as YAML (`train.py --cfg stage=2`)."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def help_train() -> str:
    """What can be chosen and overridden, for ``--help``."""
    chosen = "\n".join(f"  {group}={'|'.join(options(group))}" for group in groups())
    keys = "\n".join(f"  {key}" for key in keys_of(TrainConfig))
    return f"Groups:\n{chosen}\nKeys (key=value):\n{keys}"


def _translate(argument: str, cls: Any, beside: Sequence[str] = ()) -> str:
    """One override as Hydra wants it; UserError where it can be seen to be wrong."""
    if argument in ("-m", "--multirun"):
        raise UserError(
            "multirun (-m) is not supported, since a launcher would start every run twice; loop in a shell script."
        )
    key, equals, value = argument.partition("=")
    if key.lstrip("-") in (
        "launch",
        "config_file",
    ):  # configs/launch lies beside the groups, and belongs to the launcher
        raise UserError(
            f"{argument} is for the launcher; write `accelerate launch --config_file configs/launch/ddp.yaml train.py ...`."
        )
    if not equals or not re.fullmatch(r"[+~]*[\w./@]+", key):
        raise UserError(f"the argument {argument!r} is not understood; expected key=value, such as stage=2 or seed=1.")
    name = key.lstrip("+~")
    is_train = cls is TrainConfig
    if is_train and name in groups():
        accepted = options(name)
        if value.strip("'\"") not in accepted:
            raise UserError(f"{name}={value} is unknown; choose one of {', '.join(accepted)}.")
        # An integer is not a group choice for Hydra, but "stage=2" is what people type.
        return f"{key}='{value}'" if value.isdigit() else argument
    known = keys_of(cls)
    if name not in known and not name.startswith(tuple(f"{key}." for key in OPEN)):
        close = difflib.get_close_matches(name, [*beside, *known, *(groups() if is_train else [])], n=1, cutoff=0.5)
        shown = [*beside, *(k for k in known if "." not in k)]
        hint = f"did you mean {close[0]}?" if close else f"the keys are {', '.join(shown)}."
        raise UserError(f"the key {name} is unknown; {hint}")
    members = [k for k in known if k.startswith(f"{name}.")]
    if members and key[0] != "~" and not value.startswith(("{", "$")):
        raise UserError(
            f"{name}={value} is not understood, since {name} has keys of its own; set {' or '.join(members)}."
        )
    if key[0] == "~":
        return argument
    if name in TEXTS and not value.startswith("["):
        # Quoted here: the shell has taken the user's quotes off "shards/{00000..00099}.tar".
        value = _quote(value)
    return f"++{name}={value}"


def _quote(value: str) -> str:
    if value == "null":
        return value
    text = value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value
    escaped = re.sub(r"(\\*)'", lambda m: m.group(1) * 2 + "\\'", text)
    trailing = re.search(r"\\*$", escaped)
    return f"'{escaped}{trailing.group(0) if trailing else ''}'"


def _compose(name: str, cls: type[T], arguments: list[str], beside: Sequence[str] = ()) -> T:
    arguments = [argument for argument in arguments if argument not in FLAGS]
    text = {a.partition("=")[0].lstrip("+"): a.partition("=")[2] for a in arguments} if cls is SampleConfig else {}
    # "unet" and "sampler" are config groups of training too, which Hydra would not take as plain values.
    free = ("prompt", "negative_prompt", "unet", "sampler") if cls is SampleConfig else (SOURCES,)
    overrides = [_translate(argument, cls, beside) for argument in arguments]
    # A prompt never passes through the override grammar or interpolation ("${...}"): it is data, not configuration.
    overrides = [o for o in overrides if o.partition("=")[0].lstrip("+") not in free]
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            composed = compose(name, overrides=overrides)
        if cls is TrainConfig:
            _take_world(composed, arguments)
            _take_sources(composed, arguments)
        for override in OverridesParser.create().parse_overrides(overrides):
            if override.key_or_group in OPEN and not override.is_delete():
                # Hydra would merge: captions={clean: 1} in stage 2 would go on with long ones too.
                OmegaConf.update(composed, override.key_or_group, override.value(), merge=False)
        config: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), composed))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(error)) from None
    for key in free:
        if text.get(key, "null") != "null":
            setattr(config, key, text[key])
    if isinstance(config, SampleConfig):
        _sampler_defaults(config)
    if isinstance(config, TrainConfig):
        _local_defaults(config, {argument.partition("=")[0].lstrip("+") for argument in arguments})
    config.check()
    return config


def _explain(error: Exception) -> str:
    """Hydra's and OmegaConf's message as one sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    full_key = next((line.partition(":")[2].strip() for line in lines if line.startswith("full_key:")), None)
    message = lines[0] if lines else type(error).__name__
    if "is not a ListConfig" in message:
        message = "expected a list, such as [a,b]"
    cause = f"{full_key}: {message}" if full_key else message
    return f"the configuration is wrong: {cause.rstrip('.')}; correct that override or file."


def _sampler_defaults(config: SampleConfig) -> None:
    """Values of ``sampler=NAME`` (configs/sampler) where the command line gives none of its own."""
    if config.sampler is None:
        return
    if config.sampler not in options("sampler"):
        raise UserError(f"sampler={config.sampler} is unknown; choose one of {', '.join(options('sampler'))}.")
    values = OmegaConf.to_container(OmegaConf.load(CONFIGS / "sampler" / f"{config.sampler}.yaml"))
    assert isinstance(values, dict)
    for key, value in values.items():
        if getattr(config, str(key)) is None:
            setattr(config, str(key), value)


def _take_world(composed: Any, arguments: list[str]) -> None:
    """Folder, sizes and resolution of the large built-in world, where the command line gives none of its own."""
    with open_dict(composed):
        large = composed.data.pop("large", {})
    given = {argument.partition("=")[0].lstrip("+") for argument in arguments}
    for key, value in large.items() if composed.data.get("world") == "large" else ():
        if f"data.{key}" not in given:
            OmegaConf.update(composed, f"data.{key}", value, merge=False)


def _take_sources(composed: Any, arguments: list[str]) -> None:
    """``data.sources`` of the command line into the composed configuration; where there are sources, there are no shards."""
    given = dict(argument.lstrip("+").split("=", 1) for argument in arguments if "=" in argument)
    if SOURCES in given:
        OmegaConf.update(composed, SOURCES, parse_sources(given[SOURCES]), merge=False, force_add=True)
    if folder := OmegaConf.select(composed, "data.folder"):
        if also := {SOURCES, "data.shards"} & given.keys():
            raise UserError(f"both data.folder and {also.pop()} are given; keep one of them.")
        OmegaConf.update(composed, SOURCES, [{"folder": folder}], merge=False, force_add=True)
    if not OmegaConf.select(composed, SOURCES):
        return
    if "data.shards" in given:
        raise UserError("both data.shards and data.sources are given; name the shards in one of them.")
    OmegaConf.update(composed, "data.shards", None, force_add=True)
    OmegaConf.update(composed, "data.demo", False, force_add=True)
    if "data.val_shards" not in given:
        OmegaConf.update(composed, "data.val_shards", None, force_add=True)


def parse_sources(text: str) -> list[dict[str, Any]]:
    """``[{shards: /a/{00000..00099}.tar, weight: 0.7}, {folder: ~/pictures, weight: 0.3}]`` as a list of mappings.

    Paths need no quotes, unless they hold a comma. Raises UserError for anything else.
    """
    expected = (
        "expected a list such as [{shards: web/{00000..00099}.tar, weight: 0.7}, {folder: pictures, weight: 0.3}]"
    )
    try:
        values = yaml.safe_load(_quote_paths(text))
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", None) or "it is no YAML"
        raise UserError(f"data.sources={text} is not understood ({reason}); {expected}.") from None
    if not isinstance(values, list | None) or not all(isinstance(value, dict) for value in values or ()):
        raise UserError(f"data.sources={text} is not a list of mappings; {expected}.")
    known = keys_of(SourceConfig)
    for number, key in [(number, key) for number, value in enumerate(values or ()) for key in value]:
        if key not in known:
            raise UserError(f"the key data.sources[{number}].{key} is unknown; the keys are {', '.join(known)}.")
    return values or []


def _quote_paths(text: str) -> str:
    """Quotes around the paths of sources, whose braces YAML would take for mappings."""
    quoted, at = "", 0
    for match in re.finditer(r"\b(?:shards|folder)\s*:\s*(?=[^\s'\"\[])(?!null\b)", text):
        if match.start() < at:
            continue
        end, depth = match.end(), 0
        while end < len(text) and (depth or text[end] not in ",}]"):
            depth += (text[end] in "{[") - (text[end] in "}]")
            end += 1
        quoted += text[at : match.end()] + json.dumps(text[match.end() : end].strip())
        at = end
    return quoted + text[at:]


def _local_defaults(config: TrainConfig, given: set[str]) -> None:
    """A tracker without a key stays offline; who names shards of their own is not validated on the built-in scenes."""
    if config.data.shards is None and not config.data.sources:
        raise UserError(
            "data.shards is not set; name WebDataset shards, such as data.shards='shards/{00000..00099}.tar'."
        )
    if "data.shards" in given:
        config.data.demo = False
        config.data.val_shards = config.data.val_shards if "data.val_shards" in given else None
    if config.tracker.name == "wandb" and config.tracker.mode is None:
        config.tracker.mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
