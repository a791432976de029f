"""The last step of building: one shard from the lines that were chosen for it, and its index."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from paradiffusion.curation.building.places import Dropped, FetchLimits, Place, Reader
from paradiffusion.curation.building.select import Lines
from paradiffusion.curation.building.work import Report
from paradiffusion.data.index import TokenCounter, index_shard
from paradiffusion.data.shards import RawSample, write_shards
from paradiffusion.errors import UserError


@dataclass(frozen=True)
class ShardTask:
    """A shard to write and the lines that it is made of, in order."""

    shard: Path
    lines: list[Lines]


def make_shard(task: ShardTask, report: Report, counter: TokenCounter | None, limits: FetchLimits) -> None:
    """Write and index one shard; one that is there already is left alone, since only whole ones bear their name."""
    count = sum(len(lines.offsets) for lines in task.lines)
    if not task.shard.exists():
        part = task.shard.with_name(f".{task.shard.stem}.{os.getpid()}")
        try:
            (written,) = write_shards(_samples(task.lines, report, limits), part, count)
            os.replace(written, task.shard)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    else:
        report(count)
    index_shard(task.shard, counter=counter) if counter is not None else index_shard(task.shard)


def _samples(chosen: list[Lines], report: Report, limits: FetchLimits) -> Iterator[RawSample]:
    reader = Reader(limits)
    for lines in chosen:
        with (
            open(lines.chunk.with_suffix(".jsonl"), "rb") as texts,
            open(lines.chunk.with_suffix(".bin"), "rb") as staged,
        ):
            for offset, length in zip(lines.offsets.tolist(), lines.lengths.tolist(), strict=True):
                texts.seek(offset)
                line = json.loads(texts.read(length))
                if line["at"] is not None:
                    staged.seek(line["at"][0])
                    image = staged.read(line["at"][1])
                else:
                    image = _again(reader, Place(**line["place"]), line["name"], line["crc"])
                yield RawSample(line["key"], image, line["extension"], line["meta"])
                report(1)


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
