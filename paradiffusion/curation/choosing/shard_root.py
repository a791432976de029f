"""Where a selection's shards lie: one folder, recorded in scoring.json, so that shards can be moved or mounted elsewhere.

Scores, candidates and decisions name a local shard relative to that folder, and a remote one by its URL. A folder without
a record names local shards by their whole paths.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from paradiffusion.atomic import write_atomic
from paradiffusion.data.remote import RemotePath
from paradiffusion.errors import UserError

SCORING: Final = "scoring.json"
_ROOT: Final = "shard_root"


def read_record(work: Path) -> dict[str, Any]:
    """The content of ``work``'s scoring.json, empty where there is none. Raises UserError when it is damaged."""
    path = work / SCORING
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); take another folder=, or delete {work} and score again."
        ) from None
    if not isinstance(record, dict):
        raise UserError(f"{path} holds no settings; take another folder=, or delete {work} and score again.")
    return record


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


def settle_settings(
    work: Path, settings: Mapping[str, Any], shards: Sequence[Path | RemotePath], scored: Sequence[str]
) -> str | None:
    """Record ``settings`` and the shards' root in a folder without scores; return the root.

    Args:
        scored: the names of the shards that have scores there.

    Raises:
        UserError: where these are scores of other settings, or their shards have been moved: they would be scored under
            two names.
    """
    record = read_record(work)
    if not scored and any(key not in record or record[key] != value for key, value in settings.items()):
        # Nothing, or what an attempt with other settings left. Otherwise another process may be scoring from that root now.
        write_record(work, {**settings, _ROOT: common_root(shards)})
        return read_root(work)
    if not record:
        raise UserError(f"{work} holds scores, and no {SCORING} that says what made them; take another folder=.")
    for key, value in settings.items():
        if record.get(key) != value:
            raise UserError(
                f"{work} holds scores made with {key}={record.get(key)}, and {key}={value} is asked for now; use the "
                "same value, or another folder=."
            )
    root = read_root(work)
    if root is not None and not os.path.isdir(root):
        raise UserError(_moved(work, f"the folder {root}"))
    if root is not None and scored and not _any_below(root, scored):
        raise UserError(_moved(work, f"shards in {root}"))
    if _ROOT in record and root is None and (root := common_root(shards)) is not None:
        write_record(work, {**record, _ROOT: root})  # so far all shards were remote
    return root


def _any_below(root: str, names: Sequence[str]) -> bool:
    """Whether one of the local shards of these names is there, or none of them is local."""
    local = [name for name in names if "://" not in name]
    return not local or any(os.path.exists(os.path.join(root, name)) for name in local)


def move_root(work: Path, root: str, scored: Sequence[str]) -> None:
    """Record that the shards, ``scored`` by name, lie below ``root`` now.

    Raises:
        UserError: for what is no folder, or holds none of them, and for a selection without a root.
    """
    if read_root(work) is None:
        raise UserError(
            f"shard_root= says where the shards of a selection were moved to, and {work} records no folder of shards; leave it out."
        )
    place = Path(root).expanduser().absolute()
    if not root or not place.is_dir():
        raise UserError(f"shard_root={root} is no folder; name the one that now holds what was in {read_root(work)}.")
    if not _any_below(str(place), scored):
        raise UserError(
            f"shard_root={root} holds none of the shards that were scored from {read_root(work)}; name another."
        )
    if str(place) != read_root(work):
        write_record(work, {**read_record(work), _ROOT: str(place)})


def name_of(shard: Path | RemotePath, root: str | None) -> str:
    """The name of ``shard`` in scores and candidates."""
    if not isinstance(shard, Path) or root is None:
        return str(shard.absolute() if isinstance(shard, Path) else shard)
    return os.path.relpath(shard.absolute(), root)


def located(work: Path, names: Sequence[str]) -> list[str]:
    """Where the shards of these ``names`` lie. Raises UserError when local ones are missing."""
    root = read_root(work)
    # A name that is a whole path stays what it is.
    places = [name if "://" in name else os.path.normpath(os.path.join(root or "", name)) for name in names]
    missing = [place for place in places if "://" not in place and not os.path.exists(place)]
    if missing:
        many = f"{len(missing)} of {len(places)} shards (the first one {missing[0]})"
        raise UserError(
            _moved(work, many) if root else f"{many} of {work} are missing; bring them back, or score again."
        )
    return places


def _moved(work: Path, what: str) -> str:
    return (
        f"{work} was scored from {what}, not to be found there now; bring it back or, where the shards were moved or are "
        f"mounted elsewhere, add shard_root=<the folder that now holds what was in {read_root(work)}>."
    )
