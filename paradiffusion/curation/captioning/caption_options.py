"""Options of the captioner, its prompt templates, and what the captions in a folder depend on."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import yaml

from paradiffusion.atomic import write_atomic
from paradiffusion.checks import choice, fraction, not_negative, on_disk, one_of, positive, split_list
from paradiffusion.config import check_values, option
from paradiffusion.curation.captioning.caption_checks import DEFAULT_REJECT, REASONS, Limits
from paradiffusion.curation.journal import read_object
from paradiffusion.errors import UserError
from paradiffusion.metrics.vlm import ENGINES, Engine, VlmOptions
from paradiffusion.randomness import uniform
from paradiffusion.runner import RunnerKeys

_KEYS = {"kind", "weight", "ask", "accept", "text"}


@dataclass(frozen=True)
class Template:
    """One way to ask for a caption of ``kind``: the request, with {low} and {high} for the words of ``ask``; ``accept`` are the fewest and
    most that pass, ``weight`` how often it is drawn, relative to the others."""

    name: str
    kind: str = "long"
    weight: float = 1.0
    ask: tuple[int, int] = (100, 500)
    accept: tuple[int, int] = (50, 500)
    text: str = ""

    def __post_init__(self) -> None:
        for key in ("ask", "accept"):
            low, high = getattr(self, key)
            if not 0 < low <= high:
                raise ValueError(f"{key} is {[low, high]}; give the fewest and most words, such as [100, 500]")
        if not 0 < self.weight < math.inf:
            raise ValueError(f"it has the weight {self.weight:g}; give a number above 0")
        if not self.text:
            raise ValueError("it has no text; write text: under it")

    def prompt(self) -> str:
        """The request as the model reads it."""
        return self.text.replace("{low}", str(self.ask[0])).replace("{high}", str(self.ask[1]))


def load_templates(path: Path, kind: str, names: str | None = None) -> list[Template]:
    """The templates of ``path`` that are to be drawn: ``names`` ("paper,spatial", or with weights "paper:3,spatial:1"), else all of a
    ``kind``. UserError where the file or a name is wrong."""
    known: dict[str, Template] = {}
    name = ""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        for name, value in content.items() if isinstance(content, dict) else ():
            if unknown := sorted(set(value) - _KEYS):
                raise ValueError(f"the unknown key {unknown[0]}; the keys are {', '.join(sorted(_KEYS))}")
            ranges = {key: tuple(value[key]) for key in ("ask", "accept") if key in value}
            known[str(name)] = Template(str(name), **{**value, **ranges, "text": value.get("text", "").strip()})
    except OSError as error:
        raise UserError(f"prompt_file={path} cannot be read ({error.strerror}); give a YAML file of templates.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"prompt_file={path} is not YAML ({reason}); see configs/caption_prompts.yaml.") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"the template {name} of {path} is not understood: {error}; see configs/caption_prompts.yaml.") from None
    if not known:
        raise UserError(f"prompt_file={path} holds no templates; see configs/caption_prompts.yaml for the form.")
    if names is None:
        chosen = [template for template in known.values() if template.kind == kind]
        if not chosen:
            raise UserError(f"no template of {path} is for kind={kind}; name some with prompts={','.join(known)}, or set prompt_file=.")
        return chosen
    chosen = []
    for part in names.split(","):
        name, _, weight = part.strip().partition(":")
        if name not in known:
            raise UserError(f"prompts={names}: the template {name!r} is not in {path}; choose among {', '.join(known)}.")
        try:
            chosen.append(replace(known[name], weight=float(weight)) if weight else known[name])
        except ValueError as error:
            raise UserError(f"prompts={names}: {error}.") from None
    return chosen


def draw(templates: list[Template], attempt: int, *identity: int | str, used: frozenset[str] = frozenset()) -> Template:
    """The template of a sample's attempt, a function of ``identity``; those in ``used`` only when no other is left."""
    left = [template for template in templates if template.name not in used] or templates
    point = uniform("caption template", attempt, *identity) * sum(template.weight for template in left)
    for template in left:
        point -= template.weight
        if point < 0:
            return template
    return left[-1]


SETTINGS_FILE: Final = "settings.json"
JUDGE_FILE: Final = "judge.json"
# Keys that only a server has a use for, those about requests to any server, and those about the second model.
_OF_SERVER: Final = ("endpoint", "served", "api_key_env", "endpoint_gpus")
_OF_REQUESTS: Final = ("timeout", "tries", "retry_wait")
_OF_JUDGE: Final = ("judge_engine", "judge_revision", "judge_endpoint", "judge_api_key_env", "judge_share")
_OF_CAPTIONS: Final = (
    "kind", "temperature", "top_p", "max_new_tokens", "seed", "language", "min_words", "max_words", "reject", "retries",
)  # fmt: skip
_KIND = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}")


@dataclass
class CaptionOptions(VlmOptions, RunnerKeys):
    """The keys of the command line, the model's among them; scripts/caption.py says what each is. Numbers are our choice."""

    shards: str | None = None
    output: str | None = option(None, accepts=on_disk)
    allow_truncated: bool = False
    write: str = option("shards", accepts=one_of("shards", "jsonl"))
    kind: str = "long"
    endpoint_gpus: int = option(0, accepts=not_negative)
    # what it is asked, and how it answers
    prompts: str | None = None
    prompt_file: str | None = None
    temperature: float = option(0.7, accepts=not_negative)
    top_p: float = option(0.9, accepts=positive)
    max_new_tokens: int = option(768, accepts=positive)
    seed: int = 0
    # what passes
    language: str = option("en", accepts=one_of("en", "any"))
    min_words: int | None = option(None, accepts=positive)
    max_words: int | None = option(None, accepts=positive)
    reject: str = ",".join(DEFAULT_REJECT)
    retries: int = option(1, accepts=not_negative)
    # a second model
    judge: str | None = None
    judge_engine: str | None = option(None, accepts=one_of(*ENGINES))
    judge_revision: str | None = None
    judge_endpoint: str | None = None
    judge_api_key_env: str | None = None
    judge_share: float = option(0.02, accepts=fraction)

    def check(self) -> None:
        """Raise UserError for what cannot be meant."""
        for key in ("shards", "output"):
            if not getattr(self, key):
                raise UserError(f"{key}= is missing; expected shards=<tars, a folder or a range> output=<folder>.")
        check_values(self)
        if not _KIND.fullmatch(self.kind):
            raise UserError(f"kind={self.kind} is no name for a caption kind; use letters and digits, such as long.")
        fraction("top_p", self.top_p)
        if (self.min_words or 1) > (self.max_words or 10**9):
            raise UserError(f"min_words={self.min_words} is over max_words={self.max_words}; swap them.")
        self.rejecting()
        if self.judge is None and (given := self._given(_OF_JUDGE)):
            raise UserError(f"{given}= needs judge=<model>; name the second model.")
        self._check_engines()
        self.ray()

    def _given(self, keys: tuple[str, ...]) -> str | None:
        """The first of ``keys`` that is not at its default."""
        return next((key for key in keys if getattr(self, key) != CaptionOptions.__dataclass_fields__[key].default), None)

    def _check_engines(self) -> None:
        """Refuse what the chosen engines would not look at."""
        judged_by = self.engine_of(True) if self.judge else None
        engines = {self.engine, judged_by or self.engine}
        if self.engine == "endpoint" and not self.endpoint:
            raise UserError("engine=endpoint needs endpoint=, such as endpoint=http://localhost:8000/v1.")
        for unread, keys, remedy in (
            (self.engine != "endpoint", _OF_SERVER, "is for engine=endpoint; add that"),
            (self.engine == "endpoint", ("model", "revision"), "is for engine=transformers; name the server's model with served="),
            ("endpoint" not in engines, _OF_REQUESTS, "is for engine=endpoint; add that"),
            (engines == {"transformers"}, ("concurrency",), "is for engine=endpoint or vllm; add that"),
            (engines == {"endpoint"}, ("dtype",), "is for engine=transformers or vllm; a server has its own"),
            ("transformers" not in engines, ("device", "batch_size"),
             "is for engine=transformers; concurrency= says how many requests go at once"),
            (judged_by in ("transformers", "vllm"), ("judge_endpoint", "judge_api_key_env"), "is for judge_engine=endpoint; add that"),
            (judged_by == "endpoint", ("judge_revision",), "is for judge_engine=transformers; add that"),
        ):  # fmt: skip
            if unread and (given := self._given(keys)):
                raise UserError(f"{given}= {remedy}, or leave it out.")

    def engine_of(self, judge: bool) -> str:
        """Who answers: the captioner's engine, or the second model's."""
        return self.judge_engine or self.engine if judge else self.engine

    def rejecting(self) -> tuple[str, ...]:
        """The checks that reject a caption."""
        names = tuple(dict.fromkeys(split_list(self.reject)))
        for name in names:
            choice("reject", name, tuple(REASONS))
        return names

    def limits(self, template: Template) -> Limits:
        """What a caption asked for by ``template`` must keep to."""
        low = self.min_words if self.min_words is not None else template.accept[0]
        high = self.max_words if self.max_words is not None else template.accept[1]
        return Limits(low, max(low, high), self.language, self.rejecting())


def check_output(folder: Path, options: CaptionOptions, templates: list[Template]) -> None:
    """See that captions can go to ``folder``, as far as that is known before a model is loaded; nothing is written. UserError where it is
    no folder, holds somebody else's shards, or captions that were made otherwise."""
    if any(place.exists() and not place.is_dir() for place in (folder, *folder.parents)):
        raise UserError(f"output={folder} is a file or lies under one; name a folder.")
    # Looked for before the settings: another process may be making both just now.
    foreign = sorted(path.name for path in (*folder.glob("*.tar"), *folder.glob("*.jsonl")))
    if (folder / SETTINGS_FILE).exists():
        _compare(folder / SETTINGS_FILE, _settings(options, templates), "the captions", "choose another output=")
    elif foreign:
        raise UserError(
            f"output={folder} holds {foreign[0]} and no {SETTINGS_FILE}, so the captioner did not write it; choose a folder of its own."
        )


def bind_output(folder: Path, options: CaptionOptions, engine: Engine, templates: list[Template], side: int) -> None:
    """Note in ``folder`` what its captions depend on, or see that it is what is asked for now. UserError, which names the first key that
    differs."""
    check_output(folder, options, templates)
    folder.mkdir(parents=True, exist_ok=True)
    made_by = {**_model_settings(options.engine, options.dtype, engine, side), **_settings(options, templates)}
    _bind(folder / SETTINGS_FILE, made_by, "the captions", "choose another output=")


def bind_judge(folder: Path, options: CaptionOptions, engine: Engine, side: int) -> None:
    """As ``bind_output``, for the second model: claims are numbered, so that answers fit one choice of captions alone."""
    settings = _model_settings(options.engine_of(True), options.dtype, engine, side)
    made_by = {f"judge_{key}" if key != "model" else "judge": value for key, value in settings.items()}
    remedy = f"delete {JUDGE_FILE}, *.judged.jsonl and *.judging there to judge again"
    _bind(folder / JUDGE_FILE, {**made_by, "judge_share": options.judge_share}, "the claims", remedy)


def _model_settings(kind: str, dtype: str, engine: Engine, side: int) -> dict[str, Any]:
    own = {"engine": kind, "model": engine.model, "revision": engine.revision}
    return {**own, "dtype": dtype if kind != "endpoint" else None, "image_side": side}


def _settings(options: CaptionOptions, templates: list[Template]) -> dict[str, Any]:
    """What captions depend on besides the model."""
    made_by: dict[str, Any] = {key: getattr(options, key) for key in _OF_CAPTIONS}
    return {**made_by, "prompts": json.loads(json.dumps(list(map(asdict, templates))))}


def _bind(path: Path, made_by: dict[str, Any], what: str, remedy: str) -> None:
    if not path.exists():  # several processes may write it at a time: the same, and each whole
        write_atomic(path, json.dumps(made_by, indent=2, ensure_ascii=False) + "\n", shared=True)
    _compare(path, made_by, what, remedy)


def _compare(path: Path, made_by: dict[str, Any], what: str, remedy: str) -> None:
    """Raise UserError for the first key of ``made_by`` that the file at ``path`` has otherwise."""
    stored = read_object(path, f"nobody knows how {what} beside it were made: {remedy}")
    for key, value in made_by.items():
        if stored.get(key) != value:
            was, now = ("otherwise", "") if key == "prompts" else (f"with {key}={stored.get(key)}", f"={value}")
            raise UserError(f"{what} in {path.parent} were made {was}, and {key}{now} is asked for; {remedy}, or go on with what was.")
