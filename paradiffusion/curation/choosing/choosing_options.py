"""The keys of scripts/select.py, and which step each belongs to."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import yaml

from paradiffusion.checks import choice, positive
from paradiffusion.errors import UserError

# What belongs to which step: a key of another one would do nothing, and is refused.
STEPS = {
    "score": (
        "shards", "clip", "aesthetic", "text_detector", "text_labels", "text_threshold", "caption", "processes", "device",
        "precision", "batch_size", "threads", "allow_truncated",
    ),
    "choose": ("min", "max", "weights", "count", "clusters", "per_cluster", "max_similarity", "seed"),
    "review": ("host", "port", "reviewer"),
    "export": ("output", "samples_per_shard", "votes"),
}  # fmt: skip


@dataclass
class SelectOptions:
    """The keys of the command line."""

    action: str | None = None
    folder: str | None = None
    shard_root: str | None = None
    shards: str | None = None
    clip: str = "ViT-L-14-quickgelu:openai"
    aesthetic: str | None = None
    text_detector: str | None = None
    text_labels: str | None = None
    text_threshold: float = 0.3
    caption: str | None = None
    processes: int | None = None
    device: str = "auto"
    precision: str = "fp32"
    batch_size: int = 32
    threads: int = 4
    allow_truncated: bool = False
    min: str | None = None
    max: str | None = None
    weights: str | None = None
    count: int | None = None
    clusters: int = 1
    per_cluster: int | None = None
    max_similarity: float | None = None
    seed: int = 0
    host: str = "127.0.0.1"
    port: int = 8765
    reviewer: str | None = None
    output: str | None = None
    samples_per_shard: int = 1000
    votes: str = "majority"
    given: list[str] = field(default_factory=list, metadata={"internal": True})

    def check(self) -> None:
        if self.action is None:
            raise UserError(
                f"action= is missing; expected action={'|'.join(STEPS)} folder=<working folder>; see --help."
            )
        choice("action", self.action, tuple(STEPS))
        for key in self.given:
            owner = next((step for step, keys in STEPS.items() if key in keys), self.action)
            if owner != self.action:
                raise UserError(
                    f"{key}= belongs to action={owner}, and does nothing in action={self.action}; leave it out."
                )
        for key in ("folder", *{"score": ("shards",), "export": ("output",)}.get(self.action, ())):
            if not getattr(self, key):
                raise UserError(f"{key}= is missing; action={self.action} needs it, see --help.")
        choice("precision", self.precision, ("fp32", "bf16", "fp16"))
        choice("votes", self.votes, ("majority", "any", "all"))
        for key in ("batch_size", "threads", "samples_per_shard", "clusters"):
            positive(key, getattr(self, key))
        for key in ("processes", "count", "per_cluster"):
            if getattr(self, key) is not None:
                positive(key, getattr(self, key))
        if not 0 <= self.port < 1 << 16:
            raise UserError(f"port={self.port} is out of range; expected 0 to 65535.")


def parts(text: str) -> list[str]:
    """A list in brackets, or one part."""
    return names("shards", text) if text.startswith("[") else [text]


def _yaml(key: str, text: str, example: str) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"{key}={text} is not understood; expected {key}='{example}'.") from None


def names(key: str, text: str | None) -> list[str]:
    """What ``key`` lists; one name needs no brackets. Raises UserError for anything else."""
    if text is None:
        return []
    value = _yaml(key, text, "[first, second]")
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise UserError(f"{key}={text} is not understood; expected {key}='[first, second]'.")
    return value


def numbers(key: str, text: str | None) -> dict[str, float]:
    """The mapping of names to numbers that ``key`` has. Raises UserError for anything else."""
    if text is None:
        return {}
    example = "{aesthetic: 5.5, short_side: 768}"
    value = _yaml(key, text, example)
    if not isinstance(value, dict) or not all(
        isinstance(name, str)
        and isinstance(number, int | float)
        and not isinstance(number, bool)
        and math.isfinite(number)
        for name, number in value.items()
    ):
        raise UserError(f"{key}={text} is not understood; expected {key}='{example}'.")
    return {name: float(number) for name, number in value.items()}
