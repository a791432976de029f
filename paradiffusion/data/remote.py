"""Remote shards of any store that fsspec knows: read by ranges with retries, and kept whole in a local cache where asked for.

A remote shard is a URL (``s3://``, ``gs://``, ``https://``, ``hf://``, ...). Credentials come from the environment, as the
store's own tools have it. Only bytes are fetched: nothing here runs commands.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO, Final, TypeVar

import fsspec
from fsspec.asyn import sync
from fsspec.spec import AbstractBufferedFile

from paradiffusion.atomic import hold
from paradiffusion.config import DataConfig
from paradiffusion.errors import UserError

_FIRST_WAIT, _LONGEST_WAIT = 0.25, 30.0  # seconds
_LEAST, _MOST = 1 << 18, 1 << 23  # bytes that one request brings of a file that is read through
_PIECE: Final = 1 << 24  # bytes of one request for a shard that goes into the cache
_ABANDONED_SECONDS: Final = 86400.0
# What tells one state of a file from another, by store: Google's number changes with the content and nothing else.
_VERSION_KEYS: Final = ("generation", "ETag", "etag", "e_tag", "content_md5", "blob_id")
# botocore keeps 10, of which the threads of one reader would wait for each other.
_CONNECTIONS: Final = 32
# Answers of a server that say "not now": too slow, too early, too many requests. Other 4xx stay as they are.
_PASSING: Final = (408, 425, 429)
# S3 says the same in words, some of them under status 400.
_PASSING_CODES: Final = ("RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded")
_NO_CREDENTIALS: Final = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"}
# All other errors that botocore itself raises are slips in the settings: a profile or a region that is not there, say.
_BOTO_PASSING: Final = {
    "HTTPClientError", "ConnectionError", "IncompleteReadError", "ResponseParserError", "CredentialRetrievalError",
    "MetadataRetrievalError",
}  # fmt: skip
T = TypeVar("T")


class RemoteError(OSError):
    """A remote file could not be read, for good or after all retries; the message says why in a few words."""


@dataclass(frozen=True)
class Storage:
    """How remote shards are reached.

    Attributes:
        retries: further tries after an error that may pass, with exponential back-off and jitter.
        cache_dir: keep whole remote shards in this local folder; None: read the needed ranges only.
        cache_bytes: the most that ``cache_dir`` may hold; the least recently used shards leave.
        index_dir: where the indexes of shards lie that cannot have them beside themselves.
    """

    retries: int = 5
    cache_dir: str | None = None
    cache_bytes: int = 0
    index_dir: str | None = None


def storage_of(data: DataConfig) -> Storage:
    """What ``data`` says of remote shards."""
    cache_dir, index_dir = (folder and os.path.expanduser(folder) for folder in (data.cache_dir, data.index_dir))
    return Storage(data.retries, cache_dir, int(data.cache_gb * 1e9), index_dir)


@dataclass(frozen=True, order=True)
class RemotePath:
    """A remote shard. ``str()`` is its URL; ``size`` (bytes, 0: unknown) and ``version`` tell one state from another."""

    url: str
    storage: Storage = field(default=Storage(), compare=False)
    size: int = field(default=0, compare=False)
    version: str = field(default="", compare=False)

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of the path, without a query."""
        return self._split()[0].rpartition("/")[2]

    @property
    def stem(self) -> str:
        """``name`` without its last suffix."""
        return PurePosixPath(self.name).stem

    def sibling(self, name: str) -> RemotePath:
        """The file ``name`` in the same folder; a query (a signature, say) is kept."""
        path, query = self._split()
        return RemotePath(f"{path.rpartition('/')[0]}/{name}{query}", self.storage)

    def _split(self) -> tuple[str, str]:
        """The URL without and from its query on; in other stores than the web, a question mark is part of a name."""
        path, mark, query = self.url.partition("?") if self.url.startswith("http") else (self.url, "", "")
        return path, mark + query


def is_remote(spec: str) -> bool:
    """Whether ``spec`` is a URL of something else than a local file."""
    return "://" in spec and not spec.startswith("file://")


def list_remote(url: str, storage: Storage) -> list[RemotePath]:
    """The ``.tar`` files that a URL with ``*`` or ``[`` matches, or that lie in the folder it names."""
    pattern = url if any(mark in url for mark in "*[") else url.rstrip("/") + "/*.tar"
    system = system_of(url)
    try:
        names = with_retries(lambda: list(system.glob(pattern)), storage.retries)
    except RemoteError as error:
        raise UserError(f"{url} cannot be listed ({error}): name the shards by a range {{00000..00099}}.tar.") from error
    return [RemotePath(system.unstrip_protocol(name), storage) for name in names if name.endswith(".tar")]


def with_state(path: RemotePath) -> RemotePath:
    """``path`` with its size and version, as the store tells them. Raises RemoteError."""
    info: dict[str, Any] = with_retries(lambda: system_of(path.url).info(path.url), path.storage.retries)
    version = next((str(info[key]) for key in _VERSION_KEYS if info.get(key)), "").strip('"')
    return RemotePath(path.url, path.storage, int(info.get("size") or 0), version)


def read_whole(path: RemotePath) -> bytes:
    """All bytes of a small file. Raises RemoteError."""
    # From its first byte on: for a whole file s3fs asks for its size before, and lists the folder when there is none.
    return with_retries(lambda: bytes(system_of(path.url).cat_file(path.url, start=0)), path.storage.retries)


def read_range(path: RemotePath, offset: int, size: int) -> bytes:
    """Bytes ``offset`` to ``offset + size``. Raises RemoteError."""
    if size <= 0:
        return b""

    def fetch() -> bytes:
        data = _fetch_piece(path.url, offset, offset + size, path.version)
        if len(data) > size:
            raise RemoteError("the server does not send pieces of files (no HTTP ranges)")
        if len(data) < size:
            raise _ShortRead("fewer bytes came than were asked for")
        return data

    return with_retries(fetch, path.storage.retries)


def _fetch_piece(url: str, start: int, end: int, version: str) -> bytes:
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
            raise RemoteError("it is gone or was replaced since it was indexed: index it again") from error
        raise


class RangedFile(AbstractBufferedFile):  # type: ignore[misc]
    """A remote file to read and seek in, by requests of at least ``least`` bytes ahead, and of more while it is read through: the index
    of a shard of small images reads nearly all of it, that of one of large images a little of each.

    Raises RemoteError when it cannot be read, also when it was replaced since ``path`` was asked for its state.
    """

    def __init__(self, path: RemotePath, least: int) -> None:
        super().__init__(system_of(path.url), path.url, block_size=least, cache_type="readahead", size=path.size)
        self.remote, self.end = path, 0

    def _fetch_range(self, start: int, end: int) -> bytes:
        ahead = self.cache.blocksize  # bytes that come besides those asked for
        reads_on = 0 <= start - self.end <= ahead // 4
        self.cache.blocksize = max(min(2 * ahead, _MOST), self.blocksize) if reads_on else self.blocksize
        self.end = end
        return read_range(self.remote, start, end - start)


def open_shard(path: Path | RemotePath, least: int = _LEAST) -> BinaryIO:
    """A shard to read and seek in; of a remote one each request brings at least ``least`` bytes."""
    if isinstance(path, RemotePath):
        file: Any = RangedFile(path if path.size else with_state(path), least)
        return io.BufferedReader(file)
    return open(path, "rb")


def system_of(url: str) -> Any:
    """The file system of a URL's store."""
    protocol = url.partition("://")[0]
    try:
        return _connect(protocol, os.getpid())
    except ImportError as error:  # fsspec says what to install
        raise UserError(f"{url} cannot be read without another library: {error}.") from None
    except ValueError:
        raise UserError(
            f"{url} begins with {protocol}://, which fsspec does not know: expected s3://, gs://, https:// or a path."
        ) from None


@cache
def _connect(protocol: str, process: int) -> Any:
    """One for all threads of a process; its connections do not survive a fork. It is told what the user's fsspec settings
    (``FSSPEC_S3``, say) tell it, and beside it ours."""
    own: dict[str, Any] = {}
    name = ""
    if protocol in ("http", "https"):
        from aiohttp import ClientTimeout

        # By default a request may take five minutes in all, which a dead connection then does.
        name, own = "client_kwargs", {"timeout": ClientTimeout(total=None, sock_connect=30, sock_read=60)}
    elif protocol in ("s3", "s3a"):
        # botocore would make 5 tries, in each of s3fs' 5, in each of ours: 150 requests and minutes to a server in need.
        name, own = "config_kwargs", {"retries": {"total_max_attempts": 1}, "max_pool_connections": _CONNECTIONS}
    options = {name: {**own, **fsspec.config.conf.get(protocol, {}).get(name, {})}} if name else {}
    system = fsspec.filesystem(protocol, use_listings_cache=False, **options)
    if protocol in ("s3", "s3a"):
        system.retries = 1  # As above: one place tries again, and waits.
    return system


# What the errors of the stores' libraries mean, and whether to try again can help. Each library has errors of its own, and
# wraps the ones below it: they are told by what they carry (a status, a code, a cause) and by name, so that none has to be there.


class _ShortRead(OSError):
    """Fewer bytes came than were asked for."""


def with_retries(action: Callable[[], T], retries: int) -> T:
    """``action()``, tried again after errors that may pass. Raises RemoteError, UserError as it comes."""
    wait = _FIRST_WAIT
    for left in range(retries, -1, -1):
        try:
            return action()
        except (UserError, RemoteError):
            raise
        except Exception as error:  # Each store's library has errors of its own, few of them OSErrors.
            passing, words = explain(error)
            if not passing or not left:
                tries = f", after {retries + 1} tries" if passing and retries else ""
                raise RemoteError(words + tries) from error
        # Full jitter: many processes that met the same overload do not come back together.
        time.sleep(random.uniform(0.0, wait))
        wait = min(wait * 2, _LONGEST_WAIT)
    raise AssertionError("unreachable")


def explain(error: BaseException) -> tuple[bool, str]:
    """Whether an error may pass, and what it says in a few words, the same words for the same cause."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and cause and not isinstance(cause, FileNotFoundError | KeyError):
        return explain(cause)  # fsspec's info() calls a broken connection, or a 503, a file that was not found.
    if isinstance(error, _ShortRead):
        return True, str(error)
    chain = [error]  # and what caused it, outermost first
    while (deeper := chain[-1].__cause__) is not None and deeper not in chain:
        chain.append(deeper)
    names = {kind.__name__ for one in chain for kind in type(one).__mro__}
    status = next((found for one in chain if (found := _status(one)) is not None), None)
    code = next((word for one in chain if (word := _code(one))), "")
    said = f" ({code})" if code else ""
    is_boto = [type(one).__module__.split(".")[0] in ("botocore", "aiobotocore") for one in chain]
    # gcsfs tells a 403 by this word alone.
    denied = status in (401, 403) or isinstance(error, PermissionError) or str(error).startswith("Forbidden")
    slip = isinstance(error, TypeError | ValueError | AttributeError | ImportError | NotImplementedError)
    for is_so, words in (
        ("SSLCertVerificationError" in names, "the server's certificate is not trusted"),
        (names & _NO_CREDENTIALS, "no credentials are found in the environment (a public bucket of S3 needs FSSPEC_S3_ANON=true)"),
        ("OfflineModeIsEnabled" in names, "HF_HUB_OFFLINE is set, which forbids it"),
        (code == "NoSuchBucket", "there is no such bucket"),
        (status == 404 or (status is None and isinstance(error, FileNotFoundError)), "it is not there"),
        (denied, f"access is denied{said}: check the credentials in the environment"),
        (status == 412, "it was replaced since it was indexed: index it again (or its mirrors disagree on ETags)"),
        (status == 416, "it is empty, or shorter than when it was indexed: index it again"),
        (status is None and (slip or (is_boto[0] and not names & _BOTO_PASSING)), f"{type(error).__name__} {error}"),
    ):  # fmt: skip
        if is_so:
            return False, words
    if status is None:
        return True, f"the connection fails ({type(error).__name__})"
    if status in _PASSING or code in _PASSING_CODES or status >= 500:
        return True, f"the server answers {status}{said}"
    # S3 answers 400 to a HEAD with expired credentials, and 301 in the name of another region.
    advice = ": check address, region and credentials" if code or status < 400 or is_boto[-1] else ""
    return False, f"the server answers {status}{said}{advice}"


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error carries: its own, or its response's."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore's
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return found if isinstance(found, int) else None
    if any(kind.__name__ == "HttpProcessingError" for kind in type(error).__mro__):
        return None  # aiohttp's, when an answer is cut: it carries a 400 that no server sent.
    for holder in (error, response):
        for name in ("status", "status_code", "code"):
            found = str(getattr(holder, name, ""))
            if found.isdigit() and int(found) >= 100:  # aiohttp's is 0 where no answer came
                return int(found)
    return None


def _code(error: BaseException) -> str:
    """S3's word for what is wrong, "" where there is none: to a HEAD it can only answer a number."""
    response = getattr(error, "response", None)
    found = str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""
    return "" if found.isdigit() else found


# The cache: each shard is one file, named by its URL and state, written to a temporary name and renamed when it is whole. A
# lock per shard lets one process fetch while the others wait; a lock for the folder guards the count of bytes. The empty lock
# files stay: with one of them removed, two processes could hold "the" lock.


def cached_copy(shard: RemotePath) -> BinaryIO | None:
    """The local copy of a shard, open, fetched first if need be; None when there is no cache or it is too small.

    Raises RemoteError when it cannot be fetched or kept. A copy that another process evicts meanwhile stays readable.
    """
    storage = shard.storage
    if not storage.cache_dir or not storage.cache_bytes:
        return None
    shard = shard if shard.size else with_state(shard)
    if not 0 < shard.size <= storage.cache_bytes:
        return None
    folder = Path(storage.cache_dir)
    state = f"{shard.url}\n{shard.size}\n{shard.version}"
    target = folder / f"{hashlib.blake2b(state.encode(), digest_size=16).hexdigest()}.shard"
    try:
        while (copy := _open(target)) is None:
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(target.with_suffix(".lock")):
                if not target.exists():
                    _fetch(shard, target, storage.cache_bytes)
    except RemoteError:
        raise
    except OSError as error:
        raise RemoteError(f"data.cache_dir={folder} cannot be used ({error.strerror}): make it usable, or leave it out") from error
    return copy


def _open(target: Path) -> BinaryIO | None:
    try:
        copy = open(target, "rb")  # noqa: SIM115, the caller closes it
        os.utime(target)  # Marks it as used; a mount without access times would tell nothing.
    except FileNotFoundError:
        return None
    return copy


def _fetch(shard: RemotePath, target: Path, limit: int) -> None:
    partial = target.with_suffix(".partial")
    try:
        with _locked(target.parent / "cache.lock"):
            _make_room(target.parent, limit - shard.size)
            with open(partial, "wb") as file:
                os.truncate(file.fileno(), shard.size)  # Counted from now on, so that two fetches do not share one gap.
        with open(partial, "r+b") as file:
            for start in range(0, shard.size, _PIECE):
                file.write(read_range(shard, start, min(_PIECE, shard.size - start)))
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _make_room(folder: Path, limit: int) -> None:
    """Evict what was used longest ago until at most ``limit`` bytes are left; what is being fetched counts, and stays for a day at
    least."""
    found: list[tuple[float, int, Path]] = []
    for path in (*folder.glob("*.partial"), *folder.glob("*.shard")):
        with suppress(FileNotFoundError):
            stat = path.stat()
            found.append((stat.st_mtime, stat.st_size, path))
    total = sum(size for _, size, _ in found)
    for used, size, path in sorted(found):
        if total > limit and (path.suffix == ".shard" or time.time() - used > _ABANDONED_SECONDS):
            path.unlink(missing_ok=True)
            total -= size


@contextmanager
def _locked(path: Path) -> Iterator[IO[str]]:
    with open(path, "a") as lock:
        hold(lock, wait=True)
        yield lock
