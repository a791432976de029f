"""From an input to shards, in three steps that each go on where they stopped.

1. Every part of the input (a folder, table or tar) is listed, and its items are cut into chunks.
2. Every chunk is read once: captions cleaned, images checked, hashed and, where need be, fetched or encoded (chunk.py).
3. Duplicates are found among the hashes of all, and what is left is written in input order as full shards with an index.

Chunks and shards are functions of the input and the options, whatever the number of processes.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Final

from paradiffusion.atomic import write_atomic
from paradiffusion.curation.building.archives import Archive, is_archive, open_archive
from paradiffusion.curation.building.build_options import BuildOptions
from paradiffusion.curation.building.build_report import Report, make_report, read_report, write_report
from paradiffusion.curation.building.chunk import ChunkTask, ItemRules, Tally, make_chunk
from paradiffusion.curation.building.ingest import Part, find_parts, items_of
from paradiffusion.curation.building.items import Columns
from paradiffusion.curation.building.select import Selection, select
from paradiffusion.curation.building.shard import ShardTask, make_shard
from paradiffusion.curation.building.work import EndedFromOutside, ended_like_interrupted, progress, run_tasks
from paradiffusion.curation.building.work import Report as Tell
from paradiffusion.data.index import TokenCounter
from paradiffusion.errors import UserError
from paradiffusion.machine import cores

JOURNAL: Final = "build.json"
VAL: Final = "val"
_CHUNK: Final = 500  # items; some seconds of work, which is what an interrupt loses per process
_VERSION: Final = 2
# What a killed build leaves of a file or shard under its temporary name.
_HALF: Final = re.compile(
    r"\.(?:\d{6,}\.\d+|\d{6,}\.index\.npz\.[0-9a-f]+\.part|(?:build\.json|report\.json|report\.md)\.(?:\d+|part))"
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
    journal = {
        "version": _VERSION,
        "options": options.that_matter(),
        "input": _stamps(parts, options.root),
        "done": False,
    }
    with _locked(output), _naming(output):
        before = _check_output(output, journal)
        if before is not None and before["done"]:
            return read_report(output)
        write_atomic(output / JOURNAL, json.dumps(journal, indent=1))
        work = output / ".build"
        processes = options.processes or cores()
        with ended_like_interrupted():
            try:
                chunks = _list(parts, columns, _archive(options, work), work, processes)
                if not chunks:
                    raise UserError(
                        f"input={options.input} holds no item that could be a sample, read as format={kind}; check the path, "
                        "or say what it is with format=."
                    )
            except UserError as error:
                # Nothing is lost, and a mended table is another input.
                if not isinstance(error, EndedFromOutside) and not (work / "chunks").exists():
                    _forget(output)
                raise
            tally = _first_pass(chunks, work, options, processes)
            selection = select(
                [work / "chunks" / name for name in chunks], options.duplicates == "drop", options.distance()
            )
            tally.add(selection.tally)
            _write_shards(selection, output, options, processes, counter)
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
    """Hold ``output`` against a second build, and clear up behind one that is done.

    The lock is of the process: forked children do not inherit it.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"output={output} is a file; expected a new or empty folder.")
    has_journal = (output / JOURNAL).exists()
    foreign = (
        []
        if has_journal or not output.exists()
        else [entry.name for entry in output.iterdir() if entry.name != ".build" and not _HALF.fullmatch(entry.name)]
    )
    if foreign:
        raise UserError(
            f"output={output} holds {sorted(foreign)[0]!r}, expected a new or empty folder; choose another."
        )
    (output / ".build").mkdir(parents=True, exist_ok=True)
    file: IO[str] = open(output / ".build" / "lock", "w")  # noqa: SIM115 - held until the end
    try:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"output={output} is being built by another process; wait for it or choose another."
            ) from None
        _sweep(output)
        yield
    finally:
        file.close()
        if _read_json(output / JOURNAL, {}).get("done"):
            shutil.rmtree(output / ".build", ignore_errors=True)


def _sweep(output: Path) -> None:
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
        raise UserError(
            f"output={output} was begun with another state of {changed[0]}, which has changed since; choose another folder."
        )
    return dict(before)


def _forget(output: Path) -> None:
    """Take back a build that came to nothing, so that the next one may have other options."""
    shutil.rmtree(output / ".build", ignore_errors=True)
    (output / JOURNAL).unlink(missing_ok=True)
    with suppress(OSError):  # not empty, a link, or where a disk is mounted
        output.rmdir()


def _stamps(parts: list[Part], root: str | None) -> dict[str, Any]:
    """Size and time of each table, tar and archive; of a folder only its path, since looking at all files takes as long as listing."""
    stats = {str(part.path): part.path.stat() for part in parts}
    found = {name: None if part.kind == "folder" else [stat.st_size, stat.st_mtime_ns]
             for (name, stat), part in zip(stats.items(), parts, strict=True)}  # fmt: skip
    archive = Path(root).expanduser() if root else None
    if archive is not None and is_archive(archive):
        found[str(archive)] = [archive.stat().st_size, archive.stat().st_mtime_ns]
    return found


def _archive(options: BuildOptions, work: Path) -> Archive | None:
    root = Path(options.root).expanduser() if options.root else None
    return open_archive(root, work, options.max_unzipped_gigabytes) if root is not None and is_archive(root) else None


@dataclass(frozen=True)
class _ListTask:
    number: int
    part: Part


def _list_part(
    task: _ListTask, report: Tell, columns: Columns, archive: Archive | None, folder: Path
) -> dict[str, Any]:
    """Write the items of one part as chunks; what the listing's note says of it."""
    note = folder / f"{task.number:05d}.json"
    if note.exists():
        return dict(_read_json(note, {}))
    sizes: list[int] = []
    partial, file = folder / f"{task.number:05d}.{os.getpid()}", None
    try:
        for item in items_of(task.part, columns, archive):
            if file is None or sizes[-1] == _CHUNK:
                if file is not None:
                    file.close()
                    os.replace(partial, folder / f"{task.number:05d}-{len(sizes) - 1:05d}.jsonl")
                sizes.append(0)
                file = open(partial, "w", encoding="utf-8")  # noqa: SIM115 - one file after the other
            file.write(item.to_json() + "\n")
            sizes[-1] += 1
            report(1)
    finally:
        if file is not None:
            file.close()
    if sizes:
        os.replace(partial, folder / f"{task.number:05d}-{len(sizes) - 1:05d}.jsonl")
    write_atomic(note, json.dumps({"sizes": sizes}))
    return {"sizes": sizes}


def _list(parts: list[Part], columns: Columns, archive: Archive | None, work: Path, processes: int) -> dict[str, int]:
    """Chunks in input order, with their items."""
    folder = work / "items"
    folder.mkdir(exist_ok=True)
    tasks = [_ListTask(number, part) for number, part in enumerate(parts)]
    function = partial(_list_part, columns=columns, archive=archive, folder=folder)
    with progress("listing", "item", None) as report:
        notes = dict(run_tasks(function, tasks, processes, report))
    return {
        f"{part:05d}-{chunk:05d}": size for part in range(len(parts)) for chunk, size in enumerate(notes[part]["sizes"])
    }


def _first_pass(chunks: dict[str, int], work: Path, options: BuildOptions, processes: int) -> Tally:
    folder = work / "chunks"
    folder.mkdir(exist_ok=True)
    rules = ItemRules(
        options.picture_rules(), options.fetch_limits(), options.threads, options.min_words, options.max_words,
        options.uncaptioned == "keep", options.val,
    )  # fmt: skip
    names = [name for name in chunks if not (folder / f"{name}.json").exists()]
    done = sum(chunks.values()) - sum(chunks[name] for name in names)
    tasks = [ChunkTask(work / "items" / f"{name}.jsonl", folder / name, rules) for name in names]
    with progress("reading images", "image", sum(chunks.values()), done) as report:
        for _ in run_tasks(make_chunk, tasks, processes, report):
            pass
    total = Tally()
    for name in chunks:
        total.add(Tally(**_read_json(folder / f"{name}.json", {})))
    return total


def _write_shards(
    selection: Selection, output: Path, options: BuildOptions, processes: int, counter: TokenCounter | None
) -> None:
    size = options.samples_per_shard
    tasks = []
    for folder, rows in ((output, selection.train), (output / VAL, selection.val)):
        for number in range(-(-len(rows) // size)):
            chosen = selection.lines(rows[number * size : (number + 1) * size])
            tasks.append(ShardTask(folder / f"{number:06d}.tar", chosen))
    function = partial(make_shard, counter=counter, limits=options.fetch_limits())
    with progress("writing shards", "image", len(selection.train) + len(selection.val)) as report:
        for _ in run_tasks(function, tasks, processes, report):
            pass


def _read_json(path: Path, default: Any) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return default
