"""The stores' libraries, each with what is particular to it: how it is reached, and how a piece of a file is asked for."""

from __future__ import annotations

import os
import threading
from typing import Any, Final

import fsspec
from fsspec.asyn import sync

from paradiffusion.data.store_errors import Replaced
from paradiffusion.errors import UserError

_PACKAGES: Final = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "hf": "huggingface_hub",
}  # fmt: skip
# What tells one state of a file from another, by store: Google's number changes with the content and nothing else.
_VERSION_KEYS: Final = ("generation", "ETag", "etag", "e_tag", "content_md5", "blob_id")
# botocore keeps 10, of which the threads of one reader would wait for each other.
_CONNECTIONS: Final = 32

_systems: dict[tuple[int, str], Any] = {}
_systems_lock = threading.Lock()


def system_of(url: str) -> Any:
    """The file system of a URL, one per process: its connections do not survive a fork, and its threads share them."""
    protocol = url.partition("://")[0]
    key = (os.getpid(), protocol)
    with _systems_lock:
        if key not in _systems:
            _systems[key] = _connect(protocol, url)
        return _systems[key]


def _reset_after_fork() -> None:
    global _systems_lock
    _systems_lock = threading.Lock()
    _systems.clear()


os.register_at_fork(after_in_child=_reset_after_fork)


def _connect(protocol: str, url: str) -> Any:
    try:
        system = fsspec.filesystem(protocol, use_listings_cache=False, **_options(protocol))
    except ImportError as error:
        package = _PACKAGES.get(protocol)
        advice = f"`pip install {package}`" if package else f"install what fsspec asks for ({error})"
        raise UserError(
            f"{url} cannot be read without another library: {advice} and run the same command again."
        ) from None
    except ValueError:
        raise UserError(
            f"{url} begins with {protocol}://, which fsspec does not know: expected s3://, gs://, https:// or a path."
        ) from None
    if protocol in ("s3", "s3a"):
        system.retries = 1  # As in _options: one place tries again, and waits.
    return system


def _options(protocol: str) -> dict[str, Any]:
    """What a store's library is told beside what the user's fsspec settings (``FSSPEC_S3``, say) tell it."""
    own: dict[str, Any] = {}
    name = ""
    if protocol in ("http", "https"):
        from aiohttp import ClientTimeout

        # By default a request may take five minutes in all, which a dead connection then does.
        name, own = "client_kwargs", {"timeout": ClientTimeout(total=None, sock_connect=30, sock_read=60)}
    elif protocol in ("s3", "s3a"):
        # botocore would make 5 tries, in each of s3fs' 5, in each of ours: 150 requests and minutes to a server in need.
        name, own = "config_kwargs", {"retries": {"total_max_attempts": 1}, "max_pool_connections": _CONNECTIONS}
    theirs = fsspec.config.conf.get(protocol, {}).get(name, {})
    return {name: {**own, **theirs}} if name else {}


def version_in(info: dict[str, Any]) -> str:
    """What a store's ``info`` says to tell this state of a file from others; "" where it says nothing."""
    return next((str(info[key]) for key in _VERSION_KEYS if info.get(key)), "").strip('"')


def fetch_piece(url: str, start: int, end: int, version: str = "") -> bytes:
    """Bytes ``start`` to ``end`` (exclusive) of a file, or fewer, in one request; raises what the library does.

    Where ``version`` is given and the store can hold a request to it, the piece is of that state or none: pieces of two
    states would be joined otherwise.
    """
    system, protocol = system_of(url), url.partition("://")[0]
    if protocol in ("s3", "s3a"):
        bucket, key, _ = system.split_path(url)
        same = {"IfMatch": f'"{version}"'} if version else {}
        answer = system.call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}", **same)
        try:
            return bytes(sync(system.loop, answer["Body"].read))
        finally:
            answer["Body"].close()
    options: dict[str, Any] = {}
    if protocol in ("http", "https") and version and not version.startswith("W/"):  # A weak one matches nothing.
        options = {"headers": {**system.kwargs.get("headers", {}), "If-Match": f'"{version}"'}}
    elif protocol in ("gs", "gcs") and version.isdigit():
        options = {"generation": version}
    elif protocol == "hf":
        options = {"cache_type": "none"}  # It would read five megabytes ahead of each piece.
    try:
        return bytes(system.cat_file(url, start=start, end=end, **options))
    except FileNotFoundError as error:
        if "generation" in options:
            raise Replaced("it is gone or was replaced since it was indexed: index it again") from error
        raise
