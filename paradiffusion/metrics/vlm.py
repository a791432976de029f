"""Vision-language models: questions and answers, and which model answers, here or behind an endpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from omegaconf import OmegaConf
from PIL import Image

from paradiffusion.checks import not_negative, one_of, positive
from paradiffusion.config import check_values, option
from paradiffusion.errors import UserError
from paradiffusion.repository import ROOT

# What a model thinks before it speaks, cut or whole; templates that begin the thought themselves leave only its end.
_TAG: Final = r"(?:\w+:)?(?:think(?:ing)?|thought|reasoning)>"
_THOUGHT: Final = re.compile(
    rf"\A.*</{_TAG}|\A.*◁/think▷|\A.*<\|channel\|>final<\|message\|>|<{_TAG}.*|◁think▷.*|<\|channel\|>analysis.*"
    r"|\[THINK\].*?(?:\[/THINK\]|\Z)",
    re.DOTALL | re.IGNORECASE,
)
_UNUSABLE_IN_A_ROW: Final = 5


def spoken(text: str) -> str:
    """What is left of an answer without the model's thinking, stripped."""
    return _THOUGHT.sub("", text).strip()


@dataclass(frozen=True)
class Decoding:
    """How answers are drawn: the longest one, and the share of the probability that is drawn from, where a temperature is above 0."""

    max_new_tokens: int
    top_p: float = 1.0


@dataclass
class Question:
    """A request about one picture: RGB, of the size that the model is to see.

    Attributes:
        row, part: which picture, by the caller's count, and which of the questions about it.
        seed: of the draws of this answer; at ``temperature`` 0 the likeliest token is taken always.
    """

    row: int
    part: int
    image: Image.Image
    prompt: str
    seed: int
    temperature: float


@dataclass
class Answer:
    """What came back: a text, special tokens left out, of so many tokens; not ``finished`` where the token limit ended it. ``error`` is why
    this picture got no answer; whatever would befall every picture is a UserError."""

    text: str = ""
    tokens: int = 0
    finished: bool = True
    error: str = ""


class Engine(Protocol):
    """Something that answers questions: the model's name, a revision that tells its weights from others of that name, where it runs
    ("cuda", "cpu", "endpoint", ...), and how many questions are answered together."""

    model: str
    revision: str
    device: str
    batch_size: int

    def answers(self, batches: Iterator[list[Question]]) -> Iterator[list[tuple[Question, Answer]]]:
        """Answer all questions, in any order; an empty list now and then, so that the caller can look at signals. UserError where it
        cannot go on."""

    def close(self) -> None:
        """Give back memory and connections."""


def answers_of(engine: Engine, batches: Iterator[list[Question]]) -> Iterator[list[tuple[Question, Answer]]]:
    """``engine.answers``, of which those without a word (no content, or a thought that was cut) come only after one that has
    any: a model that only thinks is told before its silence is taken for answers.

    Raises:
        UserError: where a handful of answers in a row, or all of them, hold nothing.
    """
    silent: list[tuple[Question, Answer]] = []
    heard = False

    def refuse_silence() -> None:
        raise UserError(
            f"{engine.model} gave {len(silent)} answers without a word, as models do that think first: switch its reasoning off "
            "(a server's chat template takes enable_thinking=false), or choose one that does not reason, or set max_new_tokens= "
            "higher; then run the same command again: none of these is kept."
        )

    for group in engine.answers(batches):
        spoke = []
        for pair in group:
            if pair[1].error or spoken(pair[1].text):
                spoke += [*silent, pair]
                silent, heard = [], True
            else:
                silent.append(pair)
                if len(silent) >= _UNUSABLE_IN_A_ROW:
                    refuse_silence()
        yield spoke
    if silent and not heard:
        refuse_silence()
    yield silent


def fit(image: Image.Image, side: int) -> Image.Image:
    """``image`` made smaller, where its long side is over ``side`` pixels."""
    scale = side / max(image.size)
    if scale >= 1:
        return image
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


ENGINES: Final = ("transformers", "vllm", "endpoint")
DTYPES: Final = ("auto", "float32", "bfloat16", "float16")
IMAGE_SIDE: Final = 1024  # our choice, for models that the table does not know


@dataclass
class VlmOptions:
    """A vision-language model as a person asks for it. Numbers are our choice.

    Attributes:
        engine: "transformers" or "vllm", a model in this process, or "endpoint", a server of the OpenAI chat protocol.
        model, revision: a name of configs/captioners.yaml, a hub id or a folder, and the hub's commit (not endpoint).
        dtype: "auto" is bfloat16 on a GPU and float32 elsewhere (not endpoint); device: None for a GPU where there is one (transformers).
        concurrency: questions under way at once (vllm, endpoint). timeout: seconds that one answer may take; tries: how often a request is
            sent before the server counts as gone; retry_wait: seconds before the second, doubled each time (endpoint).
        endpoint, served, api_key_env: the server's address, its name for the model, the variable with its key (endpoint).
        image_side: long side in pixels of what the model is shown; None for the model's own, else 1024.
        max_new_tokens: the longest answer; None for what the task needs.
        key: how the command line calls ``model``, for messages.
    """

    engine: str = option("transformers", accepts=one_of(*ENGINES))
    model: str = "qwen3_vl_8b"
    revision: str | None = None
    dtype: str = option("auto", accepts=one_of(*DTYPES))
    device: str | None = None
    batch_size: int = option(8, accepts=positive)
    endpoint: str | None = None
    served: str | None = None
    api_key_env: str | None = None
    concurrency: int = option(32, accepts=positive)
    timeout: float = option(300.0, accepts=positive)
    tries: int = option(8, accepts=positive)
    retry_wait: float = option(1.0, accepts=not_negative)
    image_side: int | None = option(None, accepts=positive)
    max_new_tokens: int | None = option(None, accepts=positive)
    key: str = field(default="model", metadata={"internal": True})

    def check(self) -> None:
        """Raise UserError for what cannot be meant."""
        check_values(self)
        if self.engine == "endpoint" and not self.endpoint:
            raise UserError("engine=endpoint needs endpoint=, such as endpoint=http://localhost:8000/v1.")
        if self.engine != "endpoint" and (self.endpoint or self.served):
            raise UserError("endpoint= and served= are for engine=endpoint; add that, or leave them out.")
        if self.engine == "endpoint":
            from paradiffusion.metrics.endpoint import check_address

            check_address(self)

    @property
    def name(self) -> str:
        """The model's name for titles, without loading it; a server's only model has none yet."""
        if self.engine == "endpoint":
            return self.served or "the served model"
        return Path(self.model).name if Path(self.model).expanduser().is_dir() else self.model


def locate_model(options: VlmOptions) -> tuple[str, str | None, int]:
    """Hub id or folder of ``options.model``, which is not loaded yet, what tells its weights from others (of a folder their hash),
    and the image side that suits it. UserError, which names the command line's key, where the name is neither in
    configs/captioners.yaml, nor a folder or a hub id."""
    from paradiffusion.text.sources import fingerprint

    name, folder = options.model, Path(options.model).expanduser()
    known: Any = OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "captioners.yaml"))
    if name in known:
        return str(known[name]["hub"]), options.revision, options.image_side or int(known[name]["image_side"])
    if folder.is_dir():
        return str(folder), fingerprint(folder), options.image_side or IMAGE_SIDE
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(
            f"{options.key}={name} is neither a folder, nor a hub id such as Qwen/Qwen3-VL-8B-Instruct, nor one of {', '.join(known)}."
        )
    return name, options.revision, options.image_side or IMAGE_SIDE


def settings_of(options: VlmOptions) -> dict[str, Any]:
    """What answers depend on, as JSON, without loading the model; not where a server stands or how often it is asked."""
    if options.engine == "endpoint":
        return {"engine": "endpoint", "model": options.served, "image_side": options.image_side or IMAGE_SIDE}
    source, revision, side = locate_model(options)
    # A folder's place on the disk does not matter, its weights do.
    name = Path(source).resolve().name if Path(source).is_dir() else source
    own = {"engine": options.engine, "model": name, "revision": revision}
    return {**own, "dtype": options.dtype, "image_side": side}


def open_engine(options: VlmOptions, decoding: Decoding) -> tuple[Engine, int]:
    """The model, ready to answer, and the long side in pixels of what it is to be shown; ``decoding`` says how answers are drawn. UserError
    where the model cannot be had, or nobody answers at the address."""
    if options.engine == "endpoint":
        from paradiffusion.metrics.endpoint import EndpointModel

        return EndpointModel(options, decoding), options.image_side or IMAGE_SIDE
    from paradiffusion.metrics.local_vlm import LocalModel, VllmModel

    source, revision, side = locate_model(options)
    if options.engine == "vllm":
        return VllmModel(source, revision, options.dtype, options.concurrency, decoding), side
    return LocalModel(source, revision, options.dtype, options.device, options.batch_size, decoding), side
