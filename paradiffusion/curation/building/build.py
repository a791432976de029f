"""Building of shards from an input, in three steps that each go on where they stopped.

1. Every part of the input (a folder, table or tar) is listed, and its items are cut into chunks.
2. Every chunk is read once: captions cleaned, images checked, hashed and, where need be, fetched or encoded (chunk.py).
3. Duplicates are found among the hashes of all, and what is left is written in input order as full shards with an index.

Chunks and shards are functions of the input and the options, whatever the number of processes.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np

from paradiffusion.atomic import write_atomic
from paradiffusion.curation.building.build_options import FREE, BuildOptions
from paradiffusion.curation.building.chunk import PROFILE_NOTES, Tally, make_chunk
from paradiffusion.curation.building.duplicates import Lines, Selection, select
from paradiffusion.curation.building.inputs import Part, find_parts, items_of
from paradiffusion.curation.building.items import Columns
from paradiffusion.curation.building.places import Archive, Dropped, FetchLimits, Place, Reader, is_archive, open_archive
from paradiffusion.curation.journal import lock
from paradiffusion.data.index import TokenCounter, index_shard, load_index
from paradiffusion.data.shards import RawSample, expand_shards, write_shards
from paradiffusion.errors import UserError
from paradiffusion.machine import cores
from paradiffusion.pages import markdown_table, plain
from paradiffusion.runner import EndedFromOutside, Tell, make_bar, run_tasks
from paradiffusion.stopping import stop_on_signals

JOURNAL: Final = "build.json"
_NAME: Final = "report.json"
VAL: Final = "val"
_CHUNK: Final = 500  # items; some seconds of work, which is what an interrupt loses per process
_VERSION: Final = 2
_MAX_PROFILES: Final = 20  # screens have profiles of their own by the thousand
_PERCENTILES: Final = (0, 5, 25, 50, 75, 95, 100)
_Run = Callable[..., list[Any]]  # ``run_tasks`` with the processes of this build
# What a killed build leaves of a file or shard under its temporary name.
_HALF: Final = re.compile(
    r"\.(?:\d{6,}\.[0-9a-f]+|\d{6,}\.index\.npz\.[0-9a-f]+\.part|(?:build\.json|report\.json|report\.md)\.(?:\d+|part))"
)


def build(options: BuildOptions, counter: TokenCounter | None = None) -> Report:
    """Build shards as ``options`` say, or go on with it; a build that is finished only has its report read.

    ``output`` gets ``000000.tar``, ... each with its index, ``val/`` likewise, ``report.json`` and ``report.md``. Until it
    ends, its folder ``.build`` needs room for the images that are fetched, unzipped or encoded anew. Raises UserError, among
    others when ``output`` holds something else or was begun with other options or another input.
    """
    options.check()
    output = Path(str(options.output)).expanduser()
    columns = options.columns()
    kind, parts = find_parts(str(options.input), options.format, columns, options.root)
    matter = {name: value for name, value in asdict(options).items() if name not in FREE}
    journal = {"version": _VERSION, "options": matter, "input": _stamps(parts, options.root), "done": False}
    with _locked(output), _naming(output), stop_on_signals() as stop:
        before = _check_output(output, journal)
        if before is not None and before["done"]:
            return read_report(output)
        write_atomic(output / JOURNAL, json.dumps(journal, indent=1))
        work = output / ".build"
        run = partial(run_tasks, check=stop.check, on=options.ray(model=False) or options.processes or cores())
        try:
            root = Path(options.root).expanduser() if options.root else None
            limit, archive = options.max_unzipped_gigabytes, None
            if root is not None and is_archive(root):
                archive = open_archive(root, work, limit, stop.check)
            chunks = _list(parts, columns, archive, work, run)
            if not chunks:
                raise UserError(
                    f"input={options.input} holds no item that could be a sample, read as format={kind}; check the path, "
                    "or say what it is with format=."
                )
        except UserError as error:
            # A build that came to nothing is taken back: nothing is lost, and a mended table is another input.
            if not isinstance(error, EndedFromOutside) and not (work / "chunks").exists():
                shutil.rmtree(work, ignore_errors=True)
                (output / JOURNAL).unlink(missing_ok=True)
                with suppress(OSError):  # not empty, a link, or where a disk is mounted
                    output.rmdir()
            raise
        tally = _first_pass(chunks, work, options, run)
        selection = select([work / "chunks" / name for name in chunks], options.duplicates == "drop", options.distance())
        tally.add(selection.tally)
        stop.check()
        _write_shards(selection, output, options, run, counter)
        report = make_report(output, kind, options, tally, selection)
        write_report(report, output)
        write_atomic(output / JOURNAL, json.dumps({**journal, "done": True}, indent=1))
        return report


@contextmanager
def _naming(output: Path) -> Iterator[None]:
    """A disk that is full in the middle of a file does not say which: the one that is written to."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
            error.filename = str(output)
        raise


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Hold ``output`` against a second build, and clear up behind one that is done."""
    if output.exists() and not output.is_dir():
        raise UserError(f"output={output} is a file; expected a new or empty folder.")
    if output.exists() and not (output / JOURNAL).exists():
        foreign = [one.name for one in output.iterdir() if one.name != ".build" and not _HALF.fullmatch(one.name)]
        if foreign:
            raise UserError(f"output={output} holds {min(foreign)!r}, expected a new or empty folder; choose another.")
    (output / ".build").mkdir(parents=True, exist_ok=True)
    try:
        with open(output / ".build" / "lock", "w") as file:
            lock(file, f"output={output} is being built by another process; wait for it or choose another.")
            _clear(output)
            yield
    finally:
        if _read_json(output / JOURNAL, {}).get("done"):
            _clear(output)  # what Ray's lost workers left
            shutil.rmtree(output / ".build", ignore_errors=True)


def _clear(output: Path) -> None:
    for entry in [*output.glob(".*"), *(output / VAL).glob(".*")]:
        if _HALF.fullmatch(entry.name):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _check_output(output: Path, journal: dict[str, Any]) -> dict[str, Any] | None:
    """The journal of an earlier start; UserError when it was of something else."""
    before = _read_json(output / JOURNAL, None)
    if before is None:
        return None
    old = before.get("options", {})
    different = [f"{k}={v} (was {old.get(k)})" for k, v in journal["options"].items() if old.get(k) != v]
    if different or (before.get("version") != _VERSION and not before.get("done")):
        raise UserError(
            f"output={output} was begun with other options: {', '.join(different) or 'of another version'}; "
            "repeat those to go on, or choose another folder."
        )
    changed = [name for name, stamp in journal["input"].items() if before["input"].get(name) != stamp]
    changed += [name for name in before["input"] if name not in journal["input"]]
    if changed:
        raise UserError(f"output={output} was begun with another state of {changed[0]}, which has changed since; choose another folder.")
    return dict(before)


def _stamps(parts: list[Part], root: str | None) -> dict[str, Any]:
    """Size and time of each table, tar and archive; of a folder only its path, since looking at all files takes as long as listing."""
    stats = {str(part.path): part.path.stat() for part in parts}
    found = {name: None if part.kind == "folder" else [stat.st_size, stat.st_mtime_ns]
             for (name, stat), part in zip(stats.items(), parts, strict=True)}  # fmt: skip
    archive = Path(root).expanduser() if root else None
    if archive is not None and is_archive(archive):
        found[str(archive)] = [archive.stat().st_size, archive.stat().st_mtime_ns]
    return found


def _list_part(task: tuple[int, Part], tell: Tell, columns: Columns, archive: Archive | None, folder: Path) -> list[int]:
    """Write the items of one part (with its number) as chunks; their sizes, which the listing's note keeps."""
    number, part = task
    note = folder / f"{number:05d}.json"
    if (sizes := _read_json(note, {}).get("sizes")) is not None:
        tell(found=sum(sizes))
        return list(sizes)
    sizes = []
    partial = folder / f"{number:05d}.{uuid.uuid4().hex}"
    items = iter(items_of(part, columns, archive))
    while chunk := [item.to_json() + "\n" for item in islice(items, _CHUNK)]:
        partial.write_text("".join(chunk), encoding="utf-8")
        os.replace(partial, folder / f"{number:05d}-{len(sizes):05d}.jsonl")
        sizes.append(len(chunk))
        tell(len(chunk))
    write_atomic(note, json.dumps({"sizes": sizes}))
    return sizes


def _list(parts: list[Part], columns: Columns, archive: Archive | None, work: Path, run: _Run) -> dict[str, int]:
    """Chunks in input order, with how many items each has."""
    folder = work / "items"
    folder.mkdir(exist_ok=True)
    function = partial(_list_part, columns=columns, archive=archive, folder=folder)
    listed = run(make_bar("listing", "item", None), function, list(enumerate(parts)))
    return {f"{part:05d}-{chunk:05d}": size for part, sizes in enumerate(listed) for chunk, size in enumerate(sizes)}


def _first_pass(chunks: dict[str, int], work: Path, options: BuildOptions, run: _Run) -> Tally:
    folder = work / "chunks"
    folder.mkdir(exist_ok=True)
    function = partial(make_chunk, work=work, options=options)
    total = Tally()
    for tally in run(make_bar("reading images", "image", sum(chunks.values())), function, list(chunks)):
        total.add(tally)
    return total


def _write_shards(selection: Selection, output: Path, options: BuildOptions, run: _Run, counter: TokenCounter | None) -> None:
    size = options.samples_per_shard
    tasks = [
        (folder / f"{start // size:06d}.tar", selection.lines(rows[start : start + size]))
        for folder, rows in ((output, selection.train), (output / VAL, selection.val))
        for start in range(0, len(rows), size)
    ]
    function = partial(make_shard, counter=counter, limits=options.fetch_limits())
    run(make_bar("writing shards", "image", len(selection.train) + len(selection.val)), function, tasks)


def _read_json(path: Path, default: Any) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return default


def make_shard(task: tuple[Path, list[Lines]], tell: Tell, counter: TokenCounter | None, limits: FetchLimits) -> None:
    """Write and index one shard of these lines, in order; one that is there already is left alone, since only whole ones bear
    their name."""
    shard, chosen = task
    count = sum(len(lines.offsets) for lines in chosen)
    if not shard.exists():
        part = shard.with_name(f".{shard.stem}.{uuid.uuid4().hex}")
        try:
            (written,) = write_shards(_samples(chosen, tell, limits), part, count)
            os.replace(written, shard)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    else:
        tell(found=count)
    index_shard(shard, counter=counter)


def _samples(chosen: list[Lines], tell: Tell, limits: FetchLimits) -> Iterator[RawSample]:
    reader = Reader(limits)
    for lines in chosen:
        with open(lines.chunk.with_suffix(".jsonl"), "rb") as texts, open(lines.chunk.with_suffix(".bin"), "rb") as staged:
            for offset, length in zip(lines.offsets.tolist(), lines.lengths.tolist(), strict=True):
                texts.seek(offset)
                line = json.loads(texts.read(length))
                if line["at"] is not None:
                    staged.seek(line["at"][0])
                    image = staged.read(line["at"][1])
                else:
                    image = _again(reader, Place(**line["place"]), line["name"], line["crc"])
                yield RawSample(line["key"], image, line["extension"], line["meta"])
                tell(1)


def _again(reader: Reader, place: Place, name: str, crc: int) -> bytes:
    try:
        data = reader.read(place)
        if zlib.crc32(data) != crc:  # its size, captions and duplicates were those of another picture
            raise Dropped("other content")
        return data
    except Dropped as drop:
        raise UserError(
            f"{name} is not what it was when it was first read ({drop.reason}); leave the input alone until the build "
            "ends, then start it anew in another folder."
        ) from None


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
        raise UserError(f"{output} was built, but its {_NAME} is gone or damaged; delete the folder and build it again.") from None


def as_markdown(report: Report) -> str:
    """The report to read."""
    parts = [
        f"# Shards from {report.input}",
        f"{report.items} items ({report.format}): {report.kept} kept ({report.train} train, {report.val} val) in "
        f"{report.shards} shards, {report.bytes / 2**20:.1f} MiB of images; {sum(report.dropped.values())} dropped.",
    ]
    dropped = [[reason, str(count), "<br>".join(map(_quoted, report.examples.get(reason, [])))] for reason, count in report.dropped.items()]
    parts += [markdown_table(["dropped because", "items", "for example"], dropped)] if dropped else []
    for title, counts in (("mended, duplicates included", report.mended),
                          ("captions left out of samples that have another", report.captions_dropped)):  # fmt: skip
        if counts:
            parts.append(markdown_table([title, "items"], [[_quoted(name), str(n)] for name, n in counts.items()], 1))
    measured: list[tuple[str, dict[str, Any]]] = [("words of captions", report.captions), ("pixels, upright", report.sizes)]
    for title, rows in measured:
        if rows:
            columns = list(next(iter(rows.values())))
            cells = [[name, *(str(row.get(column, "")) for column in columns)] for name, row in rows.items()]
            parts.append(markdown_table([title, *columns], cells, 1))
    return "\n\n".join(parts)


def _quoted(text: str) -> str:
    """Somebody else's text in a cell of a table."""
    return "`" + plain(text).replace("`", "'").replace("|", "¦") + "`"
