"""What scripts/benchmark.py is asked to measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from paradiffusion.errors import UserError

WHAT = ("step", "sampler", "text")
SWITCHES = ("channels_last", "compile", "fused")


@dataclass(frozen=True)
class BenchmarkSettings:
    """Attributes:
    stages, what, switches: what to measure.
    warmup, repeats: rounds that are not counted, and rounds that are.
    device: "cpu" or "cuda".
    resolution: pixels a side; None for the stage's own.
    steps: of the sampler's official settings; its other presets are shortened by the same share. None for all.
    output: folder of the results; name: their file's stem.
    """

    stages: tuple[int, ...]
    what: tuple[str, ...]
    switches: tuple[str, ...]
    warmup: int
    repeats: int
    device: str
    resolution: int | None
    steps: int | None
    output: str
    name: str | None


KEYS = tuple(BenchmarkSettings.__dataclass_fields__)


def parse_settings(arguments: Sequence[str]) -> tuple[BenchmarkSettings, list[str]]:
    """Split the benchmark's own keys from the overrides of train.py; UserError for a value that makes no sense."""
    given, rest = {}, []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key in KEYS:
            given[key] = value
        else:
            rest.append(argument)
    device = given.get("device", "cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"device={device} is not to be had here; use device=cpu, or device=cuda where there is a GPU.")
    on_cpu = device == "cpu"
    settings = BenchmarkSettings(
        stages=tuple(int(stage) for stage in _several("stages", given.get("stages", "1,2"), ("1", "2", "3"))),
        what=_several("what", given.get("what", ",".join(WHAT)), WHAT),
        # Compiling for a processor takes minutes.
        switches=_several("switches", given.get("switches", "channels_last,fused" if on_cpu else ",".join(SWITCHES)), SWITCHES),
        warmup=_whole("warmup", given.get("warmup", "1" if on_cpu else "5"), 0),
        repeats=_whole("repeats", given.get("repeats", "3" if on_cpu else "20"), 1),
        device=device,
        resolution=_whole("resolution", given["resolution"], 1) if "resolution" in given else None,
        steps=_whole("steps", given["steps"], 1) if "steps" in given else (20 if on_cpu else None),
        output=given.get("output", "benchmarks"),
        name=given.get("name"),
    )  # fmt: skip
    return settings, rest


def _several(key: str, text: str, accepted: Sequence[str]) -> tuple[str, ...]:
    values = tuple(part for part in text.strip("[]").replace(" ", "").split(",") if part and part != "none")
    for value in values:
        if value not in accepted:
            raise UserError(f"{key}={text}: {value} is unknown; choose from {', '.join(accepted)}, joined by commas.")
    return values


def _whole(key: str, text: str, smallest: int) -> int:
    if not text.isdigit() or int(text) < smallest:
        raise UserError(
            f"{key}={text} is no whole number of {smallest} or more; give one, such as {key}={max(smallest, 3)}."
        )
    return int(text)
