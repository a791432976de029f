"""Keys of the command line of scripts/evaluate.py, with their checks."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any

from paradiffusion.checks import not_negative, not_understood, on_disk, one_of, parsed, positive, split_list
from paradiffusion.config import DrawingKeys, SampleConfig, SamplerConfig, check_values, option
from paradiffusion.errors import UserError
from paradiffusion.machine import choose_device, settled_dtype
from paradiffusion.metrics.vlm import ENGINES
from paradiffusion.runner import RunnerKeys

SOURCES = ("ckpt", "pipeline", "images", "compare")
# What decides a picture beside the weights, the prompt, its seed and its size.
DRAWING = (*(one.name for one in fields(SamplerConfig)), "negative_prompt")


@dataclass
class EvaluateOptions(DrawingKeys, RunnerKeys):
    """The keys of the command line; scripts/evaluate.py says what each is. Numbers are our choice."""

    # what is judged
    ckpt: str | None = None
    pipeline: str | None = None
    images: str | None = None
    compare: str | None = None
    label: str | None = None
    output_dir: str | None = option(None, accepts=on_disk)
    # on what
    suite: str | None = None
    suite_path: str | None = None
    suite_options: str | None = None
    allow_other: bool = False
    count: int | None = option(None, accepts=positive)
    images_per_prompt: int | None = option(None, accepts=positive)
    # drawing, beside DrawingKeys
    score_bins: str | None = None
    batch_size: int = option(16, accepts=positive)
    # scores
    scores: str = "auto"
    clip: str | None = None
    clip_precision: str = option("fp32", accepts=one_of("fp32", "bf16", "fp16"))
    inception: str | None = None
    reference: str | None = None
    engine: str | None = option(None, accepts=one_of(*ENGINES))
    vlm: str | None = None
    vlm_revision: str | None = None
    vlm_dtype: str = "auto"
    vlm_batch_size: int = option(8, accepts=positive)
    endpoint: str | None = None
    served: str | None = None
    api_key_env: str | None = None
    concurrency: int = option(32, accepts=positive)
    text_embedding: str | None = None
    counterfactual: int | None = option(None, accepts=not_negative)
    agreement: str | None = None
    votes: str | None = None
    baseline: str | None = None

    def check(self) -> None:
        given = [key for key in SOURCES if getattr(self, key)]
        if len(given) != 1:
            found = " and ".join(f"{key}=" for key in given) or "none of them"
            raise UserError(f"expected one of {', '.join(f'{key}=' for key in SOURCES)}, found {found}.")
        self.suite_paths()
        self.of_suite()
        check_values(self)
        undrawn = [key for key in (*DRAWING, "height", "width", "sampler") if getattr(self, key) is not None]
        undrawn += ["counterfactual"] if self.counterfactual else []
        for wrong, sentence in (
            (self.compare and len(self.compared()) < 2,
             f"compare={self.compare} names one; expected at least two, such as [a,b]"),
            (self.compare and self.label,
             "label= is for one model; with compare= write the names inside, as in [ours=runs/a,...]"),
            (not self.compare and not self.suites(),
             "suite= is missing; name one, such as suite=scenes or [scenes,paraprompts]"),
            (self.suite_options and len(self.suites()) != 1,
             "suite_options= are of one suite; give them with a single suite="),
            ((self.agreement or self.votes or self.baseline) and not self.compare,
             "agreement=, votes= and baseline= are for a comparison; name the models as compare=[a,b], or leave them out"),
            (self.vlm and self.endpoint,
             "both vlm= and endpoint= are given; keep the model in this process or the server"),
            ((self.served or self.api_key_env) and not self.endpoint,
             "served= and api_key_env= are for a server; add endpoint=, such as http://localhost:8000/v1"),
            (self.engine == "endpoint" and not self.endpoint, "engine=endpoint needs endpoint=, such as http://localhost:8000/v1"),
            (self.engine not in (None, "endpoint") and not self.vlm, f"engine={self.engine} needs vlm=, such as vlm=qwen3_vl_8b"),
            (self.images and undrawn,
             f"{''.join(undrawn[:1])}= is for drawing, and images= draws nothing; leave it out"),
        ):  # fmt: skip
            if wrong:
                raise UserError(f"{sentence}.")
        self.ray()
        self.sampling().check()
        SamplerConfig(**{key: value for key in DRAWING[:-1] if (value := getattr(self, key)) is not None}).check()

    def suites(self) -> list[str]:
        return split_list(self.suite)

    def suite_paths(self) -> dict[str, str]:
        """Where suites lie, by name; ``suite_path=`` is a path for a single suite, or {name: path, ...}.

        Raises:
            UserError: for a path without a name where there are several suites, and for a name that is none of them.
        """
        text, names = (self.suite_path or "").strip(), self.suites()
        if not text:
            return {}
        if not text.startswith("{"):
            if len(names) != 1:
                raise UserError(f"suite_path={text} does not say of which suite; write suite_path='{{{(names or ['name'])[-1]}: {text}}}'.")
            return {names[0]: text}
        values = _mapping("suite_path", text, "{paraprompts: path}")
        for name in values:
            if name not in names:
                raise UserError(f"suite_path={text} has a path of {name}, and suite= names {', '.join(names) or 'none'}.")
        return {str(name): str(path) for name, path in values.items()}

    def of_suite(self) -> dict[str, Any]:
        return _mapping("suite_options", self.suite_options or "{}", "{language: zh}")

    def compared(self) -> list[tuple[str | None, str]]:
        """(label or None, path) of each in ``compare=``."""
        found: list[tuple[str | None, str]] = []
        for item in split_list(self.compare):
            match = re.fullmatch(r"([^/\\=]+)=(.+)", item)
            found.append((match[1].strip(), match[2].strip()) if match else (None, item))
        return found

    def wanted_scores(self) -> list[str] | None:
        """The names in ``scores=``, None for all that can be computed."""
        return None if self.scores == "auto" else split_list(self.scores)

    def sampling(self, ckpt: str = "suite") -> SampleConfig:
        """The options of drawing as the sampler takes them; the prompts come from the suite."""
        values = {one.name: getattr(self, one.name) for one in fields(DrawingKeys) if one.name != "sampler"}  # which is in the others
        values["score_bins"] = _mapping("score_bins", self.score_bins, "{aesthetic: 4}") if self.score_bins else None
        values["dtype"] = settled_dtype(self.dtype, choose_device(self.device))  # by which pictures are known
        return SampleConfig(ckpt=ckpt, prompt="suite", batch_size=self.batch_size, **values)


def _mapping(key: str, text: str, example: str) -> dict[str, Any]:
    values = parsed(key, text, example)
    if not isinstance(values, dict):
        raise not_understood(key, text, example)
    return values
