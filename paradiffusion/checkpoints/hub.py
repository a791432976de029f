"""Checkpoints on a hub: hf://USER/NAME@REVISION as a folder of the client's cache, and what a hub's refusal means."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from paradiffusion.errors import UserError, reason_of

PREFIX = "hf://"
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
FILES = ("*.safetensors", "*.json")  # nothing that is unpickled or run
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def fetch(address: str, key: str) -> Path:
    """The folder of the files of ``address``, fetched unless they are in the cache; FILES alone, of the newest revision where none is
    named. Raises UserError for what is no address, and where it cannot be had, saying why."""
    from huggingface_hub import snapshot_download

    name, _, revision = address.removeprefix(PREFIX).partition("@")
    if not REPOSITORY.fullmatch(name):
        raise UserError(f"{key}={address} is no address; expected hf://USER/NAME or hf://USER/NAME@REVISION.")
    with refusals(f"{key}={address} cannot be fetched"):
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(FILES)))


def address_of(folder: Path) -> str | None:
    """hf://USER/NAME@COMMIT of a folder of the hub's cache, models--USER--NAME/snapshots/COMMIT; None for any other."""
    kind, _, name = folder.parent.parent.name.partition("--")
    fits = kind == "models" and folder.parent.name == "snapshots"
    return f"{PREFIX}{name.replace('--', '/', 1)}@{folder.name}" if fits else None


@contextmanager
def refusals(what: str) -> Iterator[None]:
    """Raise what the hub's client, and those below it, say of the hub as a UserError that begins with ``what``. What they say of this
    machine's files and disk, which has a number of the system's, is not theirs."""
    from huggingface_hub.errors import HfHubHTTPError

    of_its_library: Any = HfHubHTTPError.__bases__[0]  # HTTPError of httpx, or of the fork that the client brings
    try:
        yield
    except (OSError, ValueError, RuntimeError, of_its_library) as error:
        if getattr(error, "errno", None) is not None and not isinstance(error, ConnectionError):
            raise
        raise UserError(f"{what}: {explain(error)}.") from None


def explain(error: Exception) -> str:
    """What was found and what to do about it, as the end of a sentence."""
    from huggingface_hub import errors

    # What is not in the cache either is told as a missing file, whose cause is the real one.
    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ else error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    for is_so, words in (
        (isinstance(cause, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError),
         "HF_HUB_OFFLINE is set, and it is not whole in the cache; unset that where there is a network"),
        (isinstance(cause, errors.GatedRepoError), f"it has a gate; accept its licence on its page and {LOG_IN}"),
        (isinstance(cause, errors.RevisionNotFoundError), "it has no such revision; check what stands after the @"),
        (status == 404 or isinstance(cause, errors.RepositoryNotFoundError),
         f"there is no such repository, or you may not see it; check the name, and where it is private {LOG_IN}"),
        (status == 401, f"the hub does not accept the token; {LOG_IN}"),
        (status == 403, "the token does not allow that; use one with the right to write there"),
        (status is not None and status >= 500, f"the hub answers {status}; try again later"),
        (status is not None, f"the hub answers {status} ({reason_of(cause).rstrip('.')})"),
    ):  # fmt: skip
        if is_so:
            return words
    why = f"{type(cause).__name__}: {reason_of(cause)}".rstrip(".")
    return f"the hub cannot be reached ({why}); run the same command again where there is a network"
