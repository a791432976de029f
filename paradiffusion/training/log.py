"""The training log: a line for people, JSON lines, and trackers (W&B, TensorBoard)."""

from __future__ import annotations

import json
import os
import re
import secrets
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.tracking import TensorBoardTracker, WandBTracker
from PIL import Image

from paradiffusion.atomic import write_atomic
from paradiffusion.config import TrainConfig
from paradiffusion.data.loader import Batch
from paradiffusion.models.joint import Losses
from paradiffusion.training.validation import Drawn

Table = tuple[Sequence[str], list[list[Any]]]  # columns, and rows whose cells may be pictures, uint8 [H, W, 3]

# Upper ends, in words, of the caption lengths that the loss is reported for.
LENGTH_BANDS = (25, 77, 128, 256)
TIME_BINS = 4
PICTURES = ("drawn", "true")
TABLE = ("prompt", *PICTURES, "followed", "judged", "not followed")  # of what a validation draws


def length_band(words: int) -> str:
    """The band that a caption of ``words`` words falls into, such as "26-77"."""
    low = 0
    for high in LENGTH_BANDS:
        if words <= high:
            return f"{low}-{high}"
        low = high + 1
    return f"{low}+"


def by_time_and_words(errors: Iterable[tuple[float, float, int]]) -> dict[str, list[float]]:
    """Losses by the time at which they were taken, in 0..1, and by the words of the caption, such as "loss_time/0.00-0.25" and
    "loss_words/26-77"."""
    bins: defaultdict[str, list[float]] = defaultdict(list)
    for loss, at, words in errors:
        index = min(int(at * TIME_BINS), TIME_BINS - 1)
        bins[f"loss_time/{index / TIME_BINS:.2f}-{(index + 1) / TIME_BINS:.2f}"].append(loss)
        bins[f"loss_words/{length_band(words)}"].append(loss)
    return dict(sorted(bins.items(), key=lambda item: float(re.findall(r"[\d.]+", item[0])[0])))


class Meters:
    """Sums between two log lines. Everything is added on every process and reduced when a line is due."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.errors: list[tuple[float, float, int]] = []  # loss, time in 0..1, words
        self.choices: Counter[tuple[str, str, str]] = Counter()  # source, caption kind drawn, caption kind read
        self.layouts: list[float] = []  # the layout head's loss of each micro-batch, and
        self.aligned: list[float] = []  # that of the alignment with a vision encoder
        self.tokens = self.samples = self.truncated = self.bad = self.steps = 0
        self.waited = self.gradient = 0.0
        self.started = time.monotonic()

    def add(self, batch: Batch, times: torch.Tensor, losses: Losses) -> None:
        """What a micro-batch cost its samples that could be read, at ``times`` [R * b] as a share of the schedule."""
        good = (batch.weights > 0).tolist()
        repeats = len(times) // len(good)
        rows = zip(losses.errors.tolist(), times.tolist(), batch.words * repeats, good * repeats, strict=True)
        self.errors += [(loss, time, words) for loss, time, words, readable in rows if readable]
        self.layouts += [] if losses.layout is None else [float(losses.layout)]
        self.aligned += [] if losses.align is None else [float(losses.align)]

    def summary(self, gathered: list[dict[str, Any]]) -> dict[str, Any]:
        """One record of all processes' meters (see ``export``)."""
        errors = [row for part in gathered for row in part["errors"]]
        seconds = max(max(part["seconds"] for part in gathered), 1e-9)
        samples = sum(part["samples"] for part in gathered)
        record: dict[str, Any] = {
            "loss": sum(row[0] for row in errors) / max(len(errors), 1),
            "samples_per_second": samples / seconds,
            "tokens_per_second": sum(part["tokens"] for part in gathered) / seconds,
            "data_wait": sum(part["waited"] for part in gathered) / len(gathered) / seconds,
            "truncated": sum(part["truncated"] for part in gathered) / max(samples, 1),
            "truncated_count": sum(part["truncated"] for part in gathered),
            "bad_samples": sum(part["bad"] for part in gathered),
            "gradient_norm": gathered[0]["gradient"] / max(gathered[0]["steps"], 1),
            "seconds_per_step": seconds / max(gathered[0]["steps"], 1),
            "memory_gb": max(part["memory"] for part in gathered),
        }
        for key, kept in (("loss_layout", "layouts"), ("loss_align", "aligned")):
            if losses := [loss for part in gathered for loss in part[kept]]:
                record[key] = sum(losses) / len(losses)
        record.update({key: sum(values) / len(values) for key, values in by_time_and_words(errors).items()})
        record.update(mixture(sum((part["choices"] for part in gathered), Counter())))
        return record

    def export(self) -> dict[str, Any]:
        """This process's sums, ready to be gathered."""
        seconds = time.monotonic() - self.started
        keys = ("errors", "layouts", "aligned", "choices", "tokens", "samples", "truncated", "bad", "steps", "waited", "gradient")
        return {**{key: getattr(self, key) for key in keys}, "seconds": seconds, "memory": memory_gb()}


def mixture(choices: Counter[tuple[str, str, str]]) -> dict[str, float]:
    """Realised shares: ``source/NAME`` (where there are several) and ``caption/KIND`` of all samples, and ``fell_back/KIND``
    of those for which KIND was drawn, the ones that lack it and were read with another. ``choices`` counts samples by source,
    caption kind drawn, and caption kind read."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for (source, drawn, read), count in choices.items():
        counts["source"][source] += count
        counts["caption"][read] += count
        counts["drawn"][drawn] += count
        counts["fell_back"][drawn] += count if drawn != read else 0
    total, found = max(choices.total(), 1), {}
    if len(counts["source"]) > 1:
        found = {f"source/{name}": count / total for name, count in sorted(counts["source"].items())}
    found |= {f"caption/{name}": count / total for name, count in sorted(counts["caption"].items())}
    return found | {f"fell_back/{name}": counts["fell_back"][name] / n for name, n in sorted(counts["drawn"].items())}


def mixture_line(record: dict[str, Any]) -> str:
    """The realised shares as a line for people; empty where there is one source and every caption is of the kind drawn."""

    def shares(part: str) -> str:
        found = {key.partition("/")[2]: value for key, value in record.items() if key.startswith(f"{part}/")}
        return ", ".join(f"{name} {value:.0%}" for name, value in found.items() if value)

    named = {"sources": shares("source"), "captions read": shares("caption"), "drawn but missing": shares("fell_back")}
    if not named["sources"] and not named["drawn but missing"]:
        return ""
    return "  " + "; ".join(f"{name} {found}" for name, found in named.items() if found)


def memory_gb() -> float:
    """Peak memory of this process so far: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    if sys.platform == "win32":
        import psutil  # which accelerate brings

        return float(psutil.Process().memory_info().peak_wset) / 2**30
    import resource

    scale = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def human_time(seconds: float) -> str:
    """Such as "42s", "3m05s" or "2h10m"."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def log_line(config: TrainConfig, step: int, record: dict[str, Any]) -> str:
    """The record as one line that a person can read."""
    left = (config.max_steps - step) * record["seconds_per_step"]
    line = (
        f"stage {config.stage}  step {step:>6}/{config.max_steps}  loss {record['loss']:.4f}  "
        + (f"layout {record['loss_layout']:.4f}  " if "loss_layout" in record else "")
        + (f"align {record['loss_align']:.4f}  " if "loss_align" in record else "")
        + f"{record['samples_per_second']:6.1f} samples/s  {record['tokens_per_second']:6.0f} tokens/s  "
        f"data wait {record['data_wait']:4.0%}  truncated {record['truncated']:5.1%}  grad {record['gradient_norm']:.2f}  "
        f"lr {record['learning_rate']:.1e}  mem {record['memory_gb']:.1f} GB  left {human_time(left)}"
    )
    return line + (f"  unreadable {record['bad_samples']}" if record["bad_samples"] else "")


class Log:
    """``log.jsonl`` always, and one tracker when chosen; the main process alone has one. A tracker that fails, such as a server out
    of reach, is left out from then on, and a sentence says so: it never takes the training down. ``validations`` are the records of this
    kind by step, those from before a resume included."""

    def __init__(self, folder: Path, config: TrainConfig, settings: dict[str, Any], first_step: int) -> None:
        self.path, self.validations = folder / "log.jsonl", dict[int, dict[str, float]]()
        self._forget_after(first_step)
        self._file = self.path.open("a", encoding="utf-8")
        self._chosen, self._tracker, self._begun = config.tracker.name, None, 0
        with self._guarded():
            self._tracker, self._begun = open_tracker(config, folder, settings, first_step)

    def _forget_after(self, step: int) -> None:
        """Drop records of steps that were done after the checkpoint that the run resumes from: they are done again."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError, KeyError, TypeError):  # the last line of a run that was killed
                record = json.loads(line)
                if record["step"] <= step:
                    kept.append(line + "\n")
                    if record["kind"] == "validation":
                        values = {key: value for key, value in record.items() if key not in ("step", "kind", "time")}
                        self.validations[record["step"]] = values
        write_atomic(self.path, "".join(kept))

    def write(self, step: int, kind: str, record: dict[str, Any]) -> None:
        """Add one record ("train", "validation", ...)."""
        self._file.write(json.dumps({"step": step, "kind": kind, "time": round(time.time(), 3), **record}) + "\n")
        self._file.flush()
        if kind == "validation":
            self.validations[step] = record
        if self._tracker is not None and step >= self._begun:
            with self._guarded():
                self._tracker.log({f"{kind}/{k}": v for k, v in record.items() if isinstance(v, int | float)}, step)

    def show(self, step: int, errors: list[tuple[float, float, int]], grid: Path, drawn: list[Drawn]) -> None:
        """Give the tracker what a validation found besides its record: losses by time and by length, and what was drawn, one by one
        and as the picture ``grid``."""
        if self._tracker is None or step < self._begun:
            return
        with self._guarded():
            bins = by_time_and_words(errors).items()
            rows: list[list[Any]] = [
                [*key.removeprefix("loss_").split("/"), sum(losses) / len(losses), len(losses)] for key, losses in bins
            ]
            self._tracker.log({f"validation/loss_{kind}/{band}": loss for kind, band, loss, _ in rows}, step)
            tables: dict[str, Table] = {
                f"validation/loss_by_{kind}": ((kind, "loss", "samples"), [row[1:] for row in rows if row[0] == kind])
                for kind in ("time", "words")
            }
            tables["validation/prompts"] = TABLE, [table_row(one) for one in drawn]
            show = show_in_wandb if self._chosen == "wandb" else show_in_tensorboard
            show(self._tracker, step, {name: t for name, t in tables.items() if t[1]}, grid if drawn else None)

    def close(self) -> None:
        self._file.close()
        if self._tracker is not None:
            with self._guarded():
                self._tracker.finish()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except ImportError:
            raise
        except Exception as error:  # whatever a tracker or its server raises
            self._tracker = None
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            print(f"warning: tracker={self._chosen} failed ({reason}); the run goes on without it.", flush=True)


def open_tracker(config: TrainConfig, folder: Path, settings: dict[str, Any], first_step: int) -> tuple[Any, int]:
    """The chosen tracker, None for "jsonl", and the first step that it has not got: where a run goes on from a checkpoint steps are
    done again, which TensorBoard (in the stage's ``tensorboard/``) forgets, and Weights & Biases has already."""
    name, chosen = config.tracker.run_name or f"{Path(config.run_dir).name}-stage{config.stage}", config.tracker
    if chosen.name == "jsonl":
        return None, 0
    if chosen.name == "tensorboard":
        board = TensorBoardTracker("tensorboard", str(folder), purge_step=first_step + 1)
        board.start()
        return board, 0
    kept = folder / "wandb_id"  # the stage's own: a folder's name may be that of another run, too
    if not kept.is_file():
        write_atomic(kept, secrets.token_hex(8))
    # Where pictures of tables wait until they are uploaded, which offline is `wandb sync`: with the run, not in the home folder.
    os.environ.setdefault("WANDB_DATA_DIR", str((folder / "wandb").absolute()))
    wandb = WandBTracker(
        chosen.project, name=name, dir=str(folder), config=settings, mode=chosen.mode, id=kept.read_text().strip(), resume="allow",
    )  # fmt: skip
    wandb.start()
    return wandb, wandb.run.step


def table_row(one: Drawn) -> list[Any]:
    """A row of TABLE: how many of the sentences are followed, of how many that can be judged, and those that are not."""
    missed = " ".join(sentence for sentence, followed in one.sentences if followed is False)
    return [one.prompt, one.picture, one.true, sum(one.judged), len(one.judged), missed]


def show_in_wandb(tracker: Any, step: int, tables: dict[str, Table], grid: Path | None) -> None:
    """As tables with pictures in them."""
    import wandb

    values: dict[str, Any] = {} if grid is None else {"validation/samples": wandb.Image(str(grid))}
    for name, (columns, rows) in tables.items():
        cells = [[wandb.Image(cell) if isinstance(cell, np.ndarray) else cell for cell in row] for row in rows]
        values[name] = wandb.Table(columns=list(columns), data=cells)
    tracker.log(values, step)


def show_in_tensorboard(tracker: Any, step: int, tables: dict[str, Table], grid: Path | None) -> None:
    """As Markdown, and those pictures that were drawn beside it, by row, since its tables can hold none."""
    writer = tracker.writer
    if grid is not None:
        writer.add_image("validation/samples", np.asarray(Image.open(grid).convert("RGB")), step, dataformats="HWC")
    for name, (columns, rows) in tables.items():
        shown = [at for at, column in enumerate(columns) if column not in PICTURES]
        lines = [[columns[at] for at in shown], ["---"] * len(shown), *([row[at] for at in shown] for row in rows)]
        text = "\n".join(f"| {' | '.join(map(as_cell, line))} |" for line in lines)
        writer.add_text(name, text, step)
        for number, row in enumerate(rows if "drawn" in columns else ()):
            writer.add_image(f"{name}/{number:03d}", row[list(columns).index("drawn")], step, dataformats="HWC")
    writer.flush()


def as_cell(value: Any) -> str:
    """A value in a Markdown table."""
    return f"{value:.4f}" if isinstance(value, float) else " ".join(str(value).replace("|", "\\|").split())
