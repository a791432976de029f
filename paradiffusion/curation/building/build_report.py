"""Report of a build: kept, dropped by reason with examples, mended, sizes and words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from paradiffusion.atomic import write_atomic
from paradiffusion.curation.building.build_options import BuildOptions
from paradiffusion.curation.building.chunk import PROFILE_NOTES, Tally
from paradiffusion.data.index import load_index
from paradiffusion.data.shards import expand_shards
from paradiffusion.errors import UserError
from paradiffusion.pages import markdown_table

if TYPE_CHECKING:
    from paradiffusion.curation.building.duplicates import Selection


_NAME: Final = "report.json"
_MAX_PROFILES: Final = 20  # screens have profiles of their own by the thousand
_PERCENTILES: Final = (0, 5, 25, 50, 75, 95, 100)


@dataclass
class Report:
    """The content of report.json.

    ``items`` is ``kept`` and all of ``dropped`` together. ``mended`` and ``captions_dropped`` (captions that went while
    their image stayed with another one) count what came through the first pass, duplicates included. ``sizes`` are
    percentiles in pixels, ``captions`` words (and tokens) by kind of the samples kept, val included.
    """

    input: str
    format: str
    items: int
    kept: int
    train: int
    val: int
    shards: int
    bytes: int
    dropped: dict[str, int]
    examples: dict[str, list[str]]
    mended: dict[str, int]
    captions_dropped: dict[str, int]
    sizes: dict[str, dict[str, int]]
    captions: dict[str, dict[str, float]]


def make_report(output: Path, kind: str, options: BuildOptions, tally: Tally, selection: Selection) -> Report:
    """Count what lies in ``output``."""
    rows = np.concatenate([selection.train, selection.val])
    table = selection.table[rows]
    width, height = table["width"].astype(np.int64), table["height"].astype(np.int64)
    sizes = {"width": width, "height": height, "short side": np.minimum(width, height), "pixels": width * height}
    folders = [folder for folder in (output, output / "val") if folder.is_dir() and any(folder.glob("*.tar"))]
    shards = sum(len(list(folder.glob("*.tar"))) for folder in folders)
    notes = dict(tally.notes)
    profiles = [note for note in _by_count(notes) if note.startswith(PROFILE_NOTES)]
    for note in profiles[_MAX_PROFILES:]:  # the rarer colour profiles as one
        notes["other colour profiles"] = notes.get("other colour profiles", 0) + notes.pop(note)
    return Report(
        input=str(options.input), format=kind, items=tally.items, kept=len(rows), train=len(selection.train),
        val=len(selection.val), shards=shards, bytes=int(table["bytes"].sum(dtype=np.int64)),
        dropped=_by_count(tally.dropped), examples=tally.examples, mended=_by_count(notes),
        captions_dropped=tally.captions_dropped,
        sizes={name: _percentiles(values) for name, values in sizes.items()} if len(rows) else {},
        captions=_words(folders),
    )  # fmt: skip


def _by_count(counts: dict[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def _percentiles(values: np.ndarray) -> dict[str, int]:
    found = np.percentile(values, _PERCENTILES, method="nearest").tolist()
    return {f"p{percent}": int(value) for percent, value in zip(_PERCENTILES, found, strict=True)}


def _words(folders: Sequence[Path]) -> dict[str, dict[str, float]]:
    """By kind: how many captions, and their words."""
    if not folders:
        return {}
    index = load_index(expand_shards([str(folder) for folder in folders], "output"))
    found: dict[str, dict[str, float]] = {}
    for column, kind in enumerate(index.kinds):
        words = index.words[:, column]
        words = words[words > 0]
        if not len(words):
            continue
        found[kind] = {"count": len(words), "mean words": round(float(words.mean()), 1), **_percentiles(words)}
        if index.tokens is not None:
            tokens = index.tokens[:, column][index.tokens[:, column] > 0]
            found[kind]["mean tokens"] = round(float(tokens.mean()), 1) if len(tokens) else 0.0
    return found


def write_report(report: Report, output: Path) -> None:
    """Write report.json and report.md."""
    write_atomic(output / _NAME, json.dumps(asdict(report), indent=1, ensure_ascii=False) + "\n")
    write_atomic(output / "report.md", as_markdown(report) + "\n")


def read_report(output: Path) -> Report:
    """The report of a finished build."""
    try:
        return Report(**json.loads((output / _NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise UserError(
            f"{output} was built, but its {_NAME} is gone or damaged; delete the folder and build it again."
        ) from None


def as_markdown(report: Report) -> str:
    """The report to read."""
    lines = [
        f"# Shards from {report.input}",
        "",
        f"{report.items} items ({report.format}): {report.kept} kept ({report.train} train, {report.val} val) in "
        f"{report.shards} shards, {report.bytes / 2**20:.1f} MiB of images; {sum(report.dropped.values())} dropped.",
        "",
    ]
    if report.dropped:
        lines += ["| dropped because | items | for example |", "|---|---:|---|"]
        for reason, count in report.dropped.items():
            shown = "<br>".join(_cell(example) for example in report.examples.get(reason, []))
            lines.append(f"| {reason} | {count} | {shown} |")
        lines.append("")
    for title, counts in (("mended, duplicates included", report.mended),
                          ("captions left out of samples that have another", report.captions_dropped)):  # fmt: skip
        if counts:
            lines += [f"| {title} | items |", "|---|---:|"]
            lines += [f"| {_cell(name)} | {count} |" for name, count in counts.items()] + [""]
    if report.captions:
        lines += _table("words of captions", report.captions)
    if report.sizes:
        lines += _table("pixels, upright", report.sizes)
    return "\n".join(lines).rstrip()


def _table(title: str, rows: dict[str, Any]) -> list[str]:
    columns = list(next(iter(rows.values())))
    cells = [[name, *(str(row.get(column, "")) for column in columns)] for name, row in rows.items()]
    return [markdown_table([title, *columns], cells, 1), ""]


def _cell(text: str) -> str:
    """Somebody else's text as the cell of a table."""
    plain = "".join(character if character.isprintable() else "?" for character in text)
    return "`" + plain.replace("`", "'").replace("|", "¦") + "`"
