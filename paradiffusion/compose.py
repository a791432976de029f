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
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from paradiffusion.config import SampleConfig, SourceConfig, TextEncoderConfig, TrainConfig, check_values, keys_of
from paradiffusion.errors import UserError
from paradiffusion.machine import settled_precision
from paradiffusion.repository import ROOT

CONFIGS = ROOT / "configs"
FLAGS = ("--cfg",)
T = TypeVar("T", TrainConfig, SampleConfig)
Options = TypeVar("Options")
# Braces, and one level of them inside, as in "web/{00000..00099}.tar"; a path may hold them, and sets such as [0-9].
_BRACES = r"\{(?:[^{}]|\{[^{}]*\})*\}"
_PATHS = rf"(\b(?:shards|folder)\s*:\s*)(?!null\b)((?:[^\s,{{}}\[\]'\"]|{_BRACES})(?:[^,{{}}\[\]]|{_BRACES}|\[[^\[\]]*\])*)"


def compose_train(arguments: list[str], beside: Sequence[str] = ()) -> TrainConfig:
    """The configuration of one stage. Raises UserError for any override that is wrong.

    Args:
        beside: keys that the script takes besides, for the hint at an unknown one.
    """
    config = _compose("train", TrainConfig, arguments, beside)
    if config.data.shards is None and not config.data.sources:
        raise UserError("data.shards is not set; name WebDataset shards, such as data.shards='shards/{00000..00099}.tar'.")
    if config.tracker.name == "wandb" and config.tracker.mode is None:
        config.tracker.mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
    config.check()
    config.precision = settled_precision(config.precision)
    return config


def compose_sample(arguments: list[str]) -> SampleConfig:
    """What sample.py was asked for. Raises UserError for any override that is wrong."""
    config = _compose("sample", SampleConfig, arguments)
    if config.sampler is not None:
        if config.sampler not in options("sampler"):
            raise UserError(f"sampler={config.sampler} is unknown; choose one of {', '.join(options('sampler'))}.")
        for key, value in OmegaConf.load(CONFIGS / "sampler" / f"{config.sampler}.yaml").items():
            if getattr(config, str(key)) is None:  # single keys win
                setattr(config, str(key), value)
    config.check()
    return config


def compose_options(cls: type[Options], arguments: Sequence[str]) -> Options:
    """A small dataclass from key=value arguments, for scripts without config groups. Raises UserError for a wrong one, and for a
    value that its field does not accept."""
    config, keys = OmegaConf.structured(cls), list(keys_of(cls))
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in keys:
            close = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
            hint = f" (did you mean {close[0]}=?)" if close else ""
            raise UserError(f"the argument {argument!r} is not understood{hint}; the keys are {', '.join(keys)} (key=value).")
        try:
            OmegaConf.update(config, key, None if value == "null" else to_the_letter(value))
        except OmegaConfBaseException as error:
            raise UserError(_explain(error, argument)) from None
    options = cast(Options, OmegaConf.to_object(config))
    check_values(options)
    return options


def to_the_letter(text: str) -> str:
    """``text`` as OmegaConf has to be given it, to which "${...}" is an interpolation. UserError for "???", its mark of no value."""
    if text == "???":
        raise UserError("a value of ??? alone would count as none; write another text, or leave that key out.")
    return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", text)


def split_options(cls: type[Options], arguments: Sequence[str]) -> tuple[Options, list[str]]:
    """A script's own keys as ``cls``, and what is left: overrides of train.py. Raises UserError as ``compose_options``."""
    keys = keys_of(cls)
    own = [argument for argument in arguments if "=" in argument and argument.partition("=")[0] in keys]
    return compose_options(cls, own), [argument for argument in arguments if argument not in own]


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
    return sorted(p.name for p in CONFIGS.iterdir() if p.is_dir() and p.name not in ("preset_stage", "launch", "ablations"))


def as_yaml(config: TrainConfig | SampleConfig) -> str:
    """The resolved configuration as YAML (`train.py --cfg stage=2`)."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def help_train() -> str:
    """What can be chosen and overridden, for ``--help``."""
    chosen = "\n".join(f"  {group}={'|'.join(options(group))}" for group in groups())
    keys = "\n".join(f"  {key}" for key in keys_of(TrainConfig))
    return f"Groups:\n{chosen}\nKeys (key=value):\n{keys}"


def _compose(name: str, cls: type[T], arguments: list[str], beside: Sequence[str] = ()) -> T:
    keys, chosen = keys_of(cls), groups() if cls is TrainConfig else []
    read = [_read(argument, keys, chosen, beside) for argument in arguments if argument not in FLAGS]
    given = dict(read)
    # Quoted, since an integer is no choice for Hydra, but "stage=2" is what people type.
    choices = [f"{key}='{value}'" for key, value in given.items() if key in chosen]
    values = [(key, value) for key, value in read if key not in chosen]
    try:
        composed = deepcopy(_chosen(name, tuple(choices)))
        _override(composed, values, keys)
        if cls is TrainConfig:
            _settle_data(composed, given)
            _settle_lora(composed, given)
        # Entries of dictionaries, which that may have put others in the place of.
        _override(composed, [one for one in values if one[0] not in keys], keys)
        if cls is TrainConfig:
            _settle_refiner(composed)
        config: Any = OmegaConf.to_object(OmegaConf.merge(_schema(name), composed))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(error)) from None
    return cast(T, config)


@cache
def _schema(name: str) -> Any:
    """To be merged into, which copies it; making it is half of a composition's time."""
    return OmegaConf.structured({"train": TrainConfig, "sample": SampleConfig}[name])


@cache
def _chosen(name: str, choices: tuple[str, ...]) -> DictConfig:
    """The groups put together. A study of ablations asks for the same ones hundreds of times, a tenth of a second each."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(name, overrides=list(choices))


def _override(composed: DictConfig, values: list[tuple[str, str]], keys: dict[str, dict[str, Any]]) -> None:
    """Set every key to its value, in order: by Hydra's grammar, but for what ``config.option`` says is taken as typed."""
    parser = OverridesParser.create()
    for key, value in values:
        kind = keys.get(key, {}).get("typed")
        if kind == "text":
            found: Any = None if value == "null" else to_the_letter(value)
        elif kind == "yaml":
            found = parse_sources(to_the_letter(value))
        elif kind == "path" or (kind == "paths" and not value.startswith("[")):
            text = re.sub(r"^(['\"])((?:(?!\1).)*)\1$", r"\2", value, flags=re.DOTALL)
            found = None if value == "null" else to_the_letter(text)
        else:
            override = parser.parse_override(f"++{key}={value}")
            if override.is_sweep_override():
                raise UserError(f"{key}={value} names several values; give one, in quotes where it holds a comma.")
            found = override.value()
        # A dictionary given whole takes the place of the old one: with captions={clean: 1} no long ones stay.
        is_group = any(one.startswith(f"{key}.") for one in keys)
        OmegaConf.update(composed, key, found, merge=is_group, force_add=True)


def _read(argument: str, keys: dict[str, dict[str, Any]], chosen: list[str], beside: Sequence[str]) -> tuple[str, str]:
    """Key and value of one override; UserError where it can be seen to be wrong."""
    name, equals, value = argument.partition("=")
    if name in ("-m", "--multirun"):
        raise UserError("multirun (-m) is not supported, since a launcher would start every run twice; loop in a shell script.")
    if name.lstrip("-") in ("launch", "config_file"):  # configs/launch lies beside the groups
        raise UserError(f"{argument} is for the launcher; write `accelerate launch --config_file configs/launch/ddp.yaml train.py ...`.")
    if not equals or not re.fullmatch(r"\+*[\w./@]+", name):
        raise UserError(f"the argument {argument!r} is not understood; expected key=value, such as stage=2 or seed=1.")
    key = name.lstrip("+")
    if key in chosen:
        if (choice := value.strip("'\"")) not in options(key):
            raise UserError(f"{key}={value} is unknown; choose one of {', '.join(options(key))}.")
        return key, choice
    if key not in keys and not any(known["open"] and key.startswith(f"{one}.") for one, known in keys.items()):
        close = difflib.get_close_matches(key, [*beside, *keys, *chosen], n=1, cutoff=0.5)
        shown = [*beside, *(one for one in keys if "." not in one)]
        hint = f"did you mean {close[0]}?" if close else f"the keys are {', '.join(shown)}."
        raise UserError(f"the key {key} is unknown; {hint}")
    members = [one for one in keys if one.startswith(f"{key}.")]
    if members and not value.startswith(("{", "$")):
        raise UserError(f"{key}={value} is not understood, since {key} has keys of its own; set {' or '.join(members)}.")
    return key, value


def _explain(error: Exception, argument: str | None = None) -> str:
    """Hydra's and OmegaConf's message as one sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    full_key = next((line.partition(":")[2].strip() for line in lines if line.startswith("full_key:")), None)
    message = lines[0] if lines else type(error).__name__
    if "is not a ListConfig" in message:
        message = "expected a list, such as [a,b]"
    where = argument or full_key
    cause = f"{where}: {message}" if where else message
    return f"the configuration is wrong: {cause.rstrip('.')}; correct that override or file."


def _settle_data(composed: Any, given: dict[str, str]) -> None:
    """What follows from the choice of data, where the command line says nothing else: folder, sizes and resolution of the
    large world; sources in the place of shards; no validation on the built-in scenes beside data of one's own."""
    data = composed.data
    with open_dict(data):
        large = data.pop("large", {})
        for key, value in large.items() if data.get("world") == "large" else ():
            if f"data.{key}" not in given:
                data[key] = value
        if folder := data.get("folder"):
            if also := {"data.sources", "data.shards"} & given.keys():
                raise UserError(f"both data.folder and {also.pop()} are given; keep one of them.")
            data.sources = [{"folder": to_the_letter(folder)}]
        if data.get("sources"):
            if "data.shards" in given:
                raise UserError("both data.shards and data.sources are given; name the shards in one of them.")
            data.shards = None
        if data.get("sources") or "data.shards" in given:
            data.demo = False
            if "data.val_shards" not in given:
                data.val_shards = None


def _settle_lora(composed: Any, given: dict[str, str]) -> None:
    """The layers that a preset adapts, by the chosen text encoder's own names for them (``lora_names`` in its file), unless the
    command line names them."""
    with open_dict(composed.text_encoder):
        names = composed.text_encoder.pop("lora_names", {})
    if (targets := composed.get("lora", {}).get("target_modules")) and "lora.target_modules" not in given:
        composed.lora.target_modules = [names.get(name, name) for name in targets]


def _settle_refiner(composed: Any) -> None:
    """Where width or heads of the refiner are null: as wide as the text that the denoiser reads, or it would be a bottleneck between two
    models, and heads of 64 channels, four at least. Raises UserError where the denoiser does not say one width."""
    refiner = composed.conditioning
    if "refiner_width" in refiner and refiner.refiner_width is None:
        width = composed.unet.arguments.get("cross_attention_dim")
        if not isinstance(width, int):
            raise UserError(
                f"conditioning.refiner_width=null follows unet.arguments.cross_attention_dim, which is {width}; give either as a number."
            )
        refiner.refiner_width = width
    if "refiner_heads" in refiner and refiner.refiner_heads is None:
        refiner.refiner_heads = max(4, refiner.refiner_width // 64)


def parse_sources(text: str) -> list[dict[str, Any]]:
    """``[{shards: /a/{00000..00099}.tar, weight: 0.7}, {folder: ~/pictures, weight: 0.3}]`` as a list of mappings.

    Paths need no quotes, unless they hold a comma. Raises UserError for anything else.
    """
    expected = "expected a list such as [{shards: web/{00000..00099}.tar, weight: 0.7}, {folder: pictures, weight: 0.3}]"
    try:
        # YAML would take the braces of a path for mappings.
        values = yaml.safe_load(re.sub(_PATHS, lambda match: match[1] + json.dumps(match[2].strip()), text))
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", None) or "it is no YAML"
        raise UserError(f"data.sources={text} is not understood ({reason}); {expected}.") from None
    if not isinstance(values, list | None) or not all(isinstance(value, dict) for value in values or ()):
        raise UserError(f"data.sources={text} is not a list of mappings; {expected}.")
    for number, value in enumerate(values or ()):
        if unknown := [key for key in value if key not in keys_of(SourceConfig)]:
            known = ", ".join(keys_of(SourceConfig))
            raise UserError(f"the key data.sources[{number}].{unknown[0]} is unknown; the keys are {known}.")
    return values or []
