"""Scores on disk: a Parquet table and a safetensors file of features for each shard, in one working folder.

scores/<shard>-<hash>.parquet       one row a sample: key, measures, error
features/<shard>-<hash>.safetensors "features", float16 [n, D], of unit length (zeros where an image did not decode)
scoring.json                        what made them, and the folder that shards are named from, so that they can be moved

Scores, candidates and decisions name a local shard relative to that folder, and a remote one by its URL. A folder without
a record names local shards by their whole paths.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from paradiffusion.atomic import atomic_file, write_atomic
from paradiffusion.curation.journal import read_object
from paradiffusion.data.remote import RemotePath
from paradiffusion.errors import UserError

TEXT_COLUMNS: Final = ("key", "caption_kind", "error")


@dataclass
class ScoreTable:
    """Scores of N samples, shard after shard as in their files: names of the shards, int32 [N] numbers of those, keys, float64 [N] columns
    by name (nan where a sample has no such value), bool [N] which images did not decode, and each shard's Parquet file."""

    shards: list[str]
    shard: np.ndarray
    keys: pa.ChunkedArray
    columns: dict[str, np.ndarray]
    unreadable: np.ndarray
    files: list[Path]

    def __len__(self) -> int:
        return len(self.shard)

    def features(self, rows: np.ndarray) -> np.ndarray:
        """float16 [len(rows), D] of unit length of the samples ``rows``, which ascend; only these are kept in memory."""
        found = np.zeros((len(rows), 1), np.float16)
        numbers, starts = np.unique(self.shard[rows], return_index=True)  # the shards' numbers ascend with the rows
        for number, start, stop in zip(numbers, starts, [*starts[1:], len(rows)], strict=True):
            path = _features_beside(self.files[number])
            try:
                stored = load_file(path)["features"]
            except (OSError, SafetensorError, KeyError) as error:
                raise UserError(f"{path} cannot be read ({error}); delete it and score again.") from None
            if start == 0:
                found = np.zeros((len(rows), stored.shape[1]), np.float16)
            places = rows[start:stop] - np.searchsorted(self.shard, number)
            if stored.shape[1] != found.shape[1] or len(stored) <= places.max():
                raise UserError(f"{path} does not fit its table or the other shards' features; delete it and score again.")
            found[start:stop] = stored[places]
        return found


def score_file(work: Path, shard: str) -> Path:
    """Where the scores of the shard of this name lie: a hash tells the 000000.tar of several folders apart."""
    name = shard.rstrip("/").rpartition("/")[2].removesuffix(".tar")
    return work / "scores" / f"{name}-{blake2b(shard.encode(), digest_size=4).hexdigest()}.parquet"


def stamp_of(shard: str) -> str:
    """Size and time of a local shard, to notice that it was written anew; of a remote one nothing is known."""
    try:
        status = os.stat(shard)
    except OSError:
        return ""
    return f"{status.st_size}:{status.st_mtime_ns}"


def is_scored(work: Path, shard: str, stamp: str) -> bool:
    """Whether the scores of ``shard`` (its name) as it is now, with this ``stamp``, are there."""
    path = score_file(work, shard)
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowInvalid):
        return False
    return metadata.get(b"stamp") == stamp.encode() and _features_beside(path).exists()


def write_scores(work: Path, shard: str, stamp: str, rows: Sequence[Mapping[str, Any]], features: np.ndarray, model: str) -> None:
    """Write one shard's files, the table last: where it is, all is. ``model`` names the weights of CLIP."""
    path = score_file(work, shard)
    names = list(dict.fromkeys(name for row in rows for name in row))
    types = {name: pa.string() if name in TEXT_COLUMNS else pa.float64() for name in names}
    columns = {name: pa.array([row.get(name) for row in rows], kind, from_pandas=True) for name, kind in types.items()}  # nan is null
    table = pa.table(columns, metadata={"shard": shard, "stamp": stamp, "model": model})
    target = _features_beside(path)
    for folder in (path.parent, target.parent):
        folder.mkdir(parents=True, exist_ok=True)
    # The table is renamed last: it says that the features are there.
    with atomic_file(path, shared=True) as partial_table, atomic_file(target, shared=True) as partial:
        save_file({"features": features.astype(np.float16)}, partial)
        pq.write_table(table, partial_table)


def scored_names(work: Path) -> list[str]:
    """The names of the shards that were scored into ``work``."""
    found = []
    for path in sorted((work / "scores").glob("*.parquet")):
        try:
            found.append((pq.read_schema(path).metadata or {})[b"shard"].decode())
        except (OSError, pa.ArrowInvalid, KeyError):  # is scored again
            continue
    return found


def load_scores(work: Path) -> ScoreTable:
    """All scores in ``work``. Raises UserError when there are none, or of several models."""
    files = sorted((work / "scores").glob("*.parquet"))
    if not files:
        raise UserError(f"{work} holds no scores; make them with action=score folder={work} shards=... first.")
    tables = []
    for path in files:
        try:
            tables.append(pq.read_table(path))
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"{path} cannot be read ({error}); delete it and score again.") from None
    models = {(table.schema.metadata or {}).get(b"model", b"").decode() for table in tables}
    if len(models) > 1:
        raise UserError(
            f"{work} holds scores by {len(models)} different CLIP weights; delete its folders scores and features, and score again."
        )
    joined = pa.concat_tables(tables, promote_options="permissive")
    counts = [table.num_rows for table in tables]
    measured = [name for name in joined.column_names if name not in TEXT_COLUMNS]
    return ScoreTable(
        shards=[(table.schema.metadata or {})[b"shard"].decode() for table in tables],
        shard=np.repeat(np.arange(len(tables), dtype=np.int32), counts),
        keys=joined.column("key"),
        columns={name: joined.column(name).to_numpy().astype(np.float64) for name in measured},
        unreadable=joined.column("error").is_valid().to_numpy(),
        files=files,
    )


def _features_beside(path: Path) -> Path:
    return path.parents[1] / "features" / f"{path.stem}.safetensors"


SCORING: Final = "scoring.json"
_ROOT: Final = "shard_root"


def read_record(work: Path) -> dict[str, Any]:
    """The content of ``work``'s scoring.json, empty where there is none. Raises UserError when it is damaged."""
    return read_object(work / SCORING, f"take another folder=, or delete {work} and score again")


def write_record(work: Path, record: Mapping[str, Any]) -> None:
    """Write scoring.json whole or not at all."""
    work.mkdir(parents=True, exist_ok=True)
    write_atomic(work / SCORING, json.dumps(dict(record), indent=2) + "\n", shared=True)


def common_root(shards: Iterable[Path | RemotePath]) -> str | None:
    """The deepest folder above all local ``shards``; None where all are remote."""
    folders = {str(shard.absolute().parent) for shard in shards if isinstance(shard, Path)}
    return os.path.commonpath(sorted(folders)) if folders else None


def read_root(work: Path) -> str | None:
    """The folder that ``work``'s shards are named from; None where they are named by whole paths."""
    root = read_record(work).get(_ROOT)
    return root if isinstance(root, str) else None


def settle_settings(work: Path, settings: Mapping[str, Any], shards: Sequence[Path | RemotePath]) -> str | None:
    """Record ``settings`` and the shards' root in a folder without scores; return the root. UserError where its scores have other
    settings, or their shards have been moved: they would be scored under two names."""
    record, scored = read_record(work), scored_names(work)
    if not scored and any(key not in record or record[key] != value for key, value in settings.items()):
        # Nothing, or what an attempt with other settings left. Otherwise another process may be scoring from that root now.
        root = common_root(shards)
        write_record(work, {**settings, _ROOT: root})
        return root
    if not record:
        raise UserError(f"{work} holds scores, and no {SCORING} that says what made them; take another folder=.")
    for key, value in settings.items():
        if record.get(key) != value:
            raise UserError(
                f"{work} holds scores made with {key}={record.get(key)}, and {key}={value} is asked for now; use the "
                "same value, or another folder=."
            )
    root = read_root(work)
    if root is not None and not (os.path.isdir(root) and _any_below(root, scored)):
        raise UserError(_moved(work, f"{'shards in' if os.path.isdir(root) else 'the folder'} {root}"))
    if _ROOT in record and root is None and (root := common_root(shards)) is not None:
        write_record(work, {**record, _ROOT: root})  # so far all shards were remote
    return root


def _any_below(root: str, names: Sequence[str]) -> bool:
    """Whether one of the local shards of these names is there, or none of them is local."""
    local = [name for name in names if "://" not in name]
    return not local or any(os.path.exists(os.path.join(root, name)) for name in local)


def move_root(work: Path, root: str) -> None:
    """Record that the shards lie below ``root`` now. UserError for what is no folder, or holds none of those that were scored, and for
    a selection without a root."""
    before = read_root(work)
    if before is None:
        raise UserError(
            f"shard_root= says where the shards of a selection were moved to, and {work} records no folder of shards; leave it out."
        )
    place = Path(root).expanduser().absolute()
    if not root or not place.is_dir():
        raise UserError(f"shard_root={root} is no folder; name the one that now holds what was in {before}.")
    if not _any_below(str(place), scored_names(work)):
        raise UserError(f"shard_root={root} holds none of the shards that were scored from {before}; name another.")
    if str(place) != before:
        write_record(work, {**read_record(work), _ROOT: str(place)})


def name_of(shard: Path | RemotePath, root: str | None) -> str:
    """The name of ``shard`` in scores and candidates."""
    if not isinstance(shard, Path) or root is None:
        return str(shard.absolute() if isinstance(shard, Path) else shard)
    return Path(os.path.relpath(shard.absolute(), root)).as_posix()


def located(work: Path, names: Sequence[str]) -> list[str]:
    """Where the shards of these ``names`` lie. Raises UserError when local ones are missing."""
    root = read_root(work)
    # A name that is a whole path stays what it is.
    places = [name if "://" in name else os.path.normpath(os.path.join(root or "", name)) for name in names]
    missing = [place for place in places if "://" not in place and not os.path.exists(place)]
    if missing:
        many = f"{len(missing)} of {len(places)} shards (the first one {missing[0]})"
        raise UserError(_moved(work, many) if root else f"{many} of {work} are missing; bring them back, or score again.")
    return places


def _moved(work: Path, what: str) -> str:
    return (
        f"{work} was scored from {what}, not to be found there now; bring it back or, where the shards were moved or are "
        f"mounted elsewhere, add shard_root=<the folder that now holds what was in {read_root(work)}>."
    )
