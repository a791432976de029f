"""What the captioner was asked for, and which of it the captions in a folder depend on."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from paradiffusion.atomic import write_atomic
from paradiffusion.checks import choice, fraction, positive
from paradiffusion.curation.captioning.caption_checks import DEFAULT_REJECT, REASONS, Limits, parse_reject
from paradiffusion.curation.captioning.caption_prompts import Template
from paradiffusion.errors import UserError
from paradiffusion.metrics.vlm import DTYPES, ENGINES, Engine

SETTINGS_FILE: Final = "settings.json"
JUDGE_FILE: Final = "judge.json"
# Keys that only a server has a use for, those about requests to any server, and those about the second model.
_OF_SERVER: Final = ("endpoint", "served", "api_key_env", "endpoint_gpus")
_OF_REQUESTS: Final = ("concurrency", "timeout", "tries", "retry_wait")
_OF_JUDGE: Final = ("judge_engine", "judge_revision", "judge_endpoint", "judge_api_key_env", "judge_share")
_KIND = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}")


@dataclass
class CaptionOptions:
    """The keys of the command line; scripts/caption.py says what each is. Numbers are our choice."""

    shards: str | None = None
    output: str | None = None
    allow_truncated: bool = False
    write: str = "shards"
    kind: str = "long"
    # the model
    engine: str = "transformers"
    model: str = "qwen3_vl_8b"
    revision: str | None = None
    dtype: str = "auto"
    device: str | None = None
    batch_size: int = 8
    endpoint: str | None = None
    served: str | None = None
    api_key_env: str | None = None
    concurrency: int = 32
    timeout: float = 300.0
    tries: int = 8
    retry_wait: float = 1.0
    endpoint_gpus: int = 0
    # what it is asked, and how it answers
    prompts: str | None = None
    prompt_file: str | None = None
    image_side: int | None = None
    temperature: float = 0.7
    top_p: float = 0.9
    max_new_tokens: int = 768
    seed: int = 0
    # what passes
    language: str = "en"
    min_words: int | None = None
    max_words: int | None = None
    reject: str = ",".join(DEFAULT_REJECT)
    retries: int = 1
    # a second model
    judge: str | None = None
    judge_engine: str | None = None
    judge_revision: str | None = None
    judge_endpoint: str | None = None
    judge_api_key_env: str | None = None
    judge_share: float = 0.02

    def check(self) -> None:
        """Raise UserError for what cannot be meant."""
        for key in ("shards", "output"):
            if not getattr(self, key):
                raise UserError(f"{key}= is missing; expected shards=<tars, a folder or a range> output=<folder>.")
        choice("engine", self.engine, ENGINES)
        choice("write", self.write, ("shards", "jsonl"))
        choice("dtype", self.dtype, DTYPES)
        choice("language", self.language, ("en", "any"))
        if not _KIND.fullmatch(self.kind):
            raise UserError(f"kind={self.kind} is no name for a caption kind; use letters and digits, such as long.")
        for key in ("batch_size", "concurrency", "timeout", "tries", "max_new_tokens", "top_p"):
            positive(key, getattr(self, key))
        for key in ("retries", "temperature", "retry_wait", "endpoint_gpus"):
            positive(key, getattr(self, key), zero=True)
        for key in ("image_side", "min_words", "max_words"):
            if getattr(self, key) is not None:
                positive(key, getattr(self, key))
        fraction("top_p", self.top_p)
        fraction("judge_share", self.judge_share)
        if (self.min_words or 1) > (self.max_words or 10**9):
            raise UserError(f"min_words={self.min_words} is over max_words={self.max_words}; swap them.")
        self.rejecting()
        if self.judge_engine is not None:
            choice("judge_engine", self.judge_engine, ENGINES)
        if self.judge is None and (given := self._given(_OF_JUDGE)):
            raise UserError(f"{given}= needs judge=<model>; name the second model.")
        self._check_engines()

    def _given(self, keys: tuple[str, ...]) -> str | None:
        """The first of ``keys`` that is not at its default."""
        return next((key for key in keys if getattr(self, key) != getattr(CaptionOptions, key)), None)

    def _check_engines(self) -> None:
        """Refuse what the chosen engines would not look at."""
        if self.engine == "endpoint" and not self.endpoint:
            raise UserError("engine=endpoint needs endpoint=, such as endpoint=http://localhost:8000/v1.")
        if self.engine == "transformers" and (given := self._given(_OF_SERVER)):
            raise UserError(f"{given}= is for engine=endpoint; add that, or leave it out.")
        if self.engine == "endpoint" and (given := self._given(("model", "revision"))):
            raise UserError(
                f"{given}= is for engine=transformers; name the server's model with served=, or leave it out."
            )
        engines = {self.engine, (self.judge_engine or self.engine) if self.judge else self.engine}
        if engines == {"transformers"} and (given := self._given(_OF_REQUESTS)):
            raise UserError(f"{given}= is for engine=endpoint; add that, or leave it out.")
        if engines == {"endpoint"} and (given := self._given(("dtype", "device", "batch_size"))):
            raise UserError(f"{given}= is for engine=transformers; concurrency= says how many requests go at once.")
        if self.judge is not None:
            judged_by = self.judge_engine or self.engine
            if judged_by == "transformers" and (given := self._given(("judge_endpoint", "judge_api_key_env"))):
                raise UserError(f"{given}= is for judge_engine=endpoint; add that, or leave it out.")
            if judged_by == "endpoint" and (given := self._given(("judge_revision",))):
                raise UserError(f"{given}= is for judge_engine=transformers; add that, or leave it out.")

    def rejecting(self) -> tuple[str, ...]:
        """The checks that reject a caption."""
        try:
            return parse_reject(name.strip() for name in self.reject.split(",") if name.strip())
        except ValueError as error:
            raise UserError(
                f"reject={self.reject}: the check {error} is unknown; choose among {', '.join(REASONS)}."
            ) from None

    def limits(self, template: Template) -> Limits:
        """What a caption asked for by ``template`` must keep to."""
        low = self.min_words if self.min_words is not None else template.accept[0]
        high = self.max_words if self.max_words is not None else template.accept[1]
        return Limits(low, max(low, high), self.language, self.rejecting())


def check_output(folder: Path, options: CaptionOptions, templates: list[Template]) -> None:
    """See that captions can go to ``folder``, as far as that is known before a model is loaded; nothing is written.

    Raises:
        UserError: where it is no folder, holds somebody else's shards, or captions that were made otherwise.
    """
    if any(place.exists() and not place.is_dir() for place in (folder, *folder.parents)):
        raise UserError(f"output={folder} is a file or lies under one; name a folder.")
    # Looked for before the settings: another process may be making both just now.
    foreign = sorted(path.name for path in (*folder.glob("*.tar"), *folder.glob("*.jsonl")))
    if (folder / SETTINGS_FILE).exists():
        _compare(folder / SETTINGS_FILE, _settings(options, templates), "the captions", "choose another output=")
    elif foreign:
        raise UserError(
            f"output={folder} holds {foreign[0]} and no {SETTINGS_FILE}, so the captioner did not write it; choose a folder of "
            "its own."
        )


def bind_output(folder: Path, options: CaptionOptions, engine: Engine, templates: list[Template], side: int) -> None:
    """Note in ``folder`` what its captions depend on, or see that it is what is asked for now.

    Raises:
        UserError: as ``check_output`` does; it names the first key that differs.
    """
    check_output(folder, options, templates)
    folder.mkdir(parents=True, exist_ok=True)
    made_by = {**_model_settings(options.engine, options.dtype, engine, side), **_settings(options, templates)}
    _bind(folder / SETTINGS_FILE, made_by, "the captions", "choose another output=")


def bind_judge(folder: Path, options: CaptionOptions, engine: Engine, side: int) -> None:
    """As ``bind_output``, for the second model: claims are numbered, so that answers fit one choice of captions alone."""
    settings = _model_settings(options.judge_engine or options.engine, options.dtype, engine, side)
    made_by = {f"judge_{key}" if key != "model" else "judge": value for key, value in settings.items()}
    remedy = f"delete {JUDGE_FILE}, *.judged.jsonl and *.judging there to judge again"
    _bind(folder / JUDGE_FILE, {**made_by, "judge_share": options.judge_share}, "the claims", remedy)


def _model_settings(kind: str, dtype: str, engine: Engine, side: int) -> dict[str, Any]:
    return {
        "engine": kind,
        "model": engine.model,
        "revision": engine.revision,
        "dtype": dtype if kind == "transformers" else None,
        "image_side": side,
    }


def _settings(options: CaptionOptions, templates: list[Template]) -> dict[str, Any]:
    """What captions depend on besides the model."""
    made_by: dict[str, Any] = {}
    for key in (
        "kind", "temperature", "top_p", "max_new_tokens", "seed", "language", "min_words", "max_words", "reject", "retries",
    ):  # fmt: skip
        made_by[key] = getattr(options, key)
    return {**made_by, "prompts": [json.loads(json.dumps(asdict(template))) for template in templates]}


def _bind(path: Path, made_by: dict[str, Any], what: str, remedy: str) -> None:
    if not path.exists():  # several processes may write it at a time: the same, and each whole
        write_atomic(path, json.dumps(made_by, indent=2, ensure_ascii=False) + "\n", shared=True)
    _compare(path, made_by, what, remedy)


def _compare(path: Path, made_by: dict[str, Any], what: str, remedy: str) -> None:
    """Raise UserError for the first key of ``made_by`` that the file at ``path`` has otherwise."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        stored = None
    if not isinstance(stored, dict):
        raise UserError(f"{path} is damaged, so nobody knows how {what} beside it were made; {remedy}.")
    for key, value in made_by.items():
        if stored.get(key) != value:
            was, now = ("otherwise", "") if key == "prompts" else (f"with {key}={stored.get(key)}", f"={value}")
            raise UserError(
                f"{what} in {path.parent} were made {was}, and {key}{now} is asked for; {remedy}, or go on with what was."
            )
