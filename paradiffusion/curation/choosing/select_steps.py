"""The four steps of scripts/select.py (score, choose, review, export) and their keys."""

from __future__ import annotations

import getpass
import hashlib
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from paradiffusion.checks import not_understood, on_disk, one_of, parsed, positive, split_list, step_of
from paradiffusion.config import check_values, option
from paradiffusion.curation.choosing.score_files import move_root
from paradiffusion.errors import UserError
from paradiffusion.runner import RunnerKeys


@dataclass(unsafe_hash=True)
class Scoring:
    """What is measured, and how. ``caption`` is the kind whose agreement is measured (None: each sample's longest); ``device`` auto spreads
    the processes over the GPUs; ``threads``, of each process, decode and measure."""

    clip: str = "ViT-L-14-quickgelu:openai"
    aesthetic: str | None = None
    text_detector: str | None = None
    text_labels: str | None = None
    text_threshold: float = 0.3
    caption: str | None = None
    precision: str = option("fp32", accepts=one_of("fp32", "bf16", "fp16"))
    device: str = "auto"
    batch_size: int = option(32, accepts=positive)
    threads: int = option(4, accepts=positive)
    allow_truncated: bool = False

    def settings(self) -> dict[str, Any]:
        """What the scores depend on."""
        head = None
        if self.aesthetic is not None:
            try:
                head = hashlib.blake2b(Path(self.aesthetic).expanduser().read_bytes(), digest_size=8).hexdigest()
            except OSError as error:
                raise UserError(f"aesthetic={self.aesthetic} cannot be read ({error.strerror}); name a file.") from None
        return {
            "clip": self.clip, "aesthetic": head, "text_detector": self.text_detector,
            "text_labels": split_list(self.text_labels), "text_threshold": self.text_threshold, "caption": self.caption,
            "precision": self.precision,
        }  # fmt: skip


# What belongs to which step: a key of another one would do nothing, and is refused.
STEPS = {
    "score": ("shards", *Scoring.__dataclass_fields__, "processes", "runner", "runner_options"),
    "choose": ("min", "max", "weights", "count", "clusters", "per_cluster", "max_similarity", "seed"),
    "review": ("host", "port", "reviewer"),
    "export": ("output", "samples_per_shard", "votes"),
}


@dataclass
class SelectOptions(Scoring, RunnerKeys):
    """The keys of the command line."""

    action: str | None = None
    folder: str | None = option(None, accepts=on_disk)
    shard_root: str | None = None
    shards: str | None = None
    processes: int | None = option(None, accepts=positive)
    min: str | None = None
    max: str | None = None
    weights: str | None = None
    count: int | None = option(None, accepts=positive)
    clusters: int = option(1, accepts=positive)
    per_cluster: int | None = option(None, accepts=positive)
    max_similarity: float | None = None
    seed: int = 0
    host: str = "127.0.0.1"
    port: int = 8765
    reviewer: str | None = None
    output: str | None = option(None, accepts=on_disk)
    samples_per_shard: int = option(1000, accepts=positive)
    votes: str = option("majority", accepts=one_of("majority", "any", "all"))
    given: list[str] = field(default_factory=list, metadata={"internal": True})

    def check(self) -> None:
        action = step_of(self.action, self.given, STEPS)
        for key in ("folder", *{"score": ("shards",), "export": ("output",)}.get(action, ())):
            if not getattr(self, key):
                raise UserError(f"{key}= is missing; action={action} needs it, see --help.")
        check_values(self)
        self.ray()


def numbers(key: str, text: str | None) -> dict[str, float]:
    """The mapping of names to numbers that ``key`` has. Raises UserError for anything else."""
    example = "{aesthetic: 5.5, short_side: 768}"
    value = parsed(key, text, example) if text is not None else {}
    if not isinstance(value, dict) or not all(
        isinstance(name, str) and type(number) in (int, float) and math.isfinite(number) for name, number in value.items()
    ):
        raise not_understood(key, text, example)
    return {name: float(number) for name, number in value.items()}


def run_step(options: SelectOptions) -> int:
    """Do the step that ``options`` name, checked; the exit status. Models are imported only by who needs them."""
    work = Path(str(options.folder)).expanduser()
    if options.shard_root is not None:
        move_root(work, options.shard_root)
    {"score": _score, "choose": _choose, "review": _review, "export": _export}[str(options.action)](options, work)
    return 0


def _score(options: SelectOptions, work: Path) -> None:
    from paradiffusion.curation.choosing.scoring import score_shards
    from paradiffusion.data.shards import expand_shards
    from paradiffusion.machine import choose_device

    if options.device != "auto" and options.runner == "local":
        choose_device(options.device)  # UserError for what is not here
    scoring = Scoring(**{one.name: getattr(options, one.name) for one in fields(Scoring)})
    given = str(options.shards)
    shards = expand_shards(parsed("shards", given, "[first, second]") if given.startswith("[") else [given], "shards")
    count = score_shards(shards, work, scoring, options.processes, options.ray())
    print(f"{count} samples scored now, {len(shards)} shards in all; next: action=choose folder={work}")


def _choose(options: SelectOptions, work: Path) -> None:
    from paradiffusion.curation.choosing.selection import Choosing, choose

    choosing = Choosing(
        numbers("min", options.min), numbers("max", options.max), numbers("weights", options.weights), options.count,
        options.clusters, options.per_cluster, options.max_similarity, options.seed,
    )  # fmt: skip
    print(*choose(work, choosing).lines(), f"next: action=review folder={work}", sep="\n")


def _review(options: SelectOptions, work: Path) -> None:
    """Serve the review page until Ctrl-C or SIGTERM."""
    from paradiffusion.apps.review import serve_review

    try:
        account = getpass.getuser()
    except (OSError, KeyError):  # no such account within a container
        account = "reviewer"
    serve_review(work, options.reviewer or account, options.host, options.port)


def _export(options: SelectOptions, work: Path) -> None:
    from paradiffusion.curation.choosing.kept import export

    report = export(work, Path(str(options.output)).expanduser(), options.samples_per_shard, options.votes)
    print(*report.lines(), f"train on it with data.shards={options.output} and stage=3", sep="\n")
