"""Reader of images' bytes, wherever they lie: a file, a piece of a tar, a zip's member, a cell of a Parquet table, a URL.

Nothing is unpacked to disk by its name and nothing is executed; every read stops at a size limit.
"""

from __future__ import annotations

import asyncio
import gzip
import lzma
import os
import re
import stat
import tarfile
import urllib.parse
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

import aiohttp
import tenacity
from yarl import URL

from paradiffusion.atomic import atomic_file
from paradiffusion.data.shards import IMAGE_EXTENSIONS
from paradiffusion.errors import UserError
from paradiffusion.runner import make_bar

# Of image files.
EXTENSIONS: Final = (*IMAGE_EXTENSIONS, "gif", "bmp", "tif", "tiff", "avif")
_AGENT: Final = "paradiffusion-build-shards"
_REDIRECTS: Final = 5
_PIECE: Final = 1 << 16
_CELLS, _BUFFER = 16, 1 << 20  # rows and bytes of a Parquet column at once
_LONGEST_PAUSE: Final = 60.0  # seconds that a busy site may ask us to wait: our choice
_MENDABLE: Final = (408, 425, 429, 500, 502, 503, 504)
_UNREADABLE: Final = (
    OSError, KeyError, RuntimeError, ValueError, NotImplementedError, EOFError, zipfile.BadZipFile, zlib.error,
    lzma.LZMAError,
)  # fmt: skip


class Dropped(Exception):
    """An item that becomes no sample: ``reason`` is a row of the report, ``detail`` what an example says besides."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Place:
    """Where the bytes of one image lie.

    ``kind`` is "file", "span" (``size`` bytes from byte ``offset`` of a plain tar), "zip" (``member`` of it), "cell"
    (row ``size`` of row group ``offset`` in the Parquet column ``member``; where that holds no bytes, the file ``otherwise``),
    "url", or "none": there is no image, for the reason in ``path`` and with the detail in ``member``.
    """

    kind: str
    path: str
    offset: int = 0
    size: int = 0
    member: str = ""
    otherwise: str = ""


@dataclass(frozen=True)
class FetchLimits:
    """How images are fetched: bytes at most, seconds without an answer, further attempts."""

    max_bytes: int
    timeout: float = 10.0
    retries: int = 2


class Reader:
    """Reads places one after the other; keeps the last zip and the last row group open, since neighbours share them.

    Row groups are read on from the last place: some programs write a table of pictures as one, which memory may not hold.
    """

    def __init__(self, limits: FetchLimits) -> None:
        self.limits = limits
        self._zip: tuple[str, zipfile.ZipFile] | None = None
        self._cells: tuple[tuple[str, int, str], Iterator[tuple[int, Any]]] | None = None
        self._last: tuple[int, Any] = (-1, None)

    def read(self, place: Place) -> bytes:
        """The bytes at ``place``. Raises Dropped with one of the reasons "no image", "cannot be read", "not downloaded",
        "empty file" and "file too large"."""
        if place.kind == "none":
            raise Dropped(place.path, place.member)
        try:
            data = self._read(place)
        except Dropped:
            raise
        except FileNotFoundError:
            raise Dropped("no image", "there is no such file") from None
        except _UNREADABLE as error:
            raise Dropped("cannot be read", getattr(error, "strerror", None) or type(error).__name__) from None
        if not data:
            raise Dropped("empty file")
        if len(data) > self.limits.max_bytes:
            raise Dropped("file too large", f"over {self.limits.max_bytes >> 20} MiB")
        return data

    def _read(self, place: Place) -> bytes:
        most = self.limits.max_bytes + 1
        if place.kind == "url":
            return fetch(place.path, self.limits)
        if place.kind == "zip":
            with self._opened(place.path).open(place.member) as member:
                return member.read(most)
        if place.kind == "cell":
            return self._cell(place)
        if not stat.S_ISREG(os.stat(place.path).st_mode):  # opening a pipe would wait for ever
            raise Dropped("cannot be read", "not a regular file")
        with open(place.path, "rb") as file:
            file.seek(place.offset)
            return file.read(most if place.kind == "file" else min(place.size, most))

    def _opened(self, path: str) -> zipfile.ZipFile:
        if self._zip is None or self._zip[0] != path:
            self._zip = (path, zipfile.ZipFile(path))
        return self._zip[1]

    def _cell(self, place: Place) -> bytes:
        asked = (place.path, place.offset, place.member)
        if self._cells is None or self._cells[0] != asked or self._last[0] > place.size:
            self._cells, self._last = (asked, _cells_of(*asked)), (-1, None)
        while self._last[0] < place.size:
            found = next(self._cells[1], None)
            if found is None:  # damage in a row before ends the reading
                raise Dropped("cannot be read", "the row group ends before it")
            self._last = found
        value = self._last[1].as_py()
        value = value.get("bytes") if isinstance(value, dict) else value
        if value is None and place.otherwise:  # as datasets writes pictures that it was given by path
            return self._read(Place("file", place.otherwise))
        if value is None:
            raise Dropped("no image", "the cell is empty")
        return bytes(value)


def _cells_of(path: str, group: int, column: str) -> Iterator[tuple[int, Any]]:
    """(row, cell) of one column of a row group, a few at a time."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, buffer_size=_BUFFER) as file:
        batches = file.iter_batches(_CELLS, row_groups=[group], columns=[column], use_threads=False)
        yield from enumerate(cell for batch in batches for cell in batch.column(0))


class _Later(Exception):
    """A failure that may pass: how, and how many seconds a site asks to wait."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


async def _download(url: str, limits: FetchLimits) -> bytes:
    # "total": the other limits start anew with every byte, and a server that drips would hold a thread for days.
    timeout = aiohttp.ClientTimeout(total=8 * limits.timeout, sock_connect=limits.timeout, sock_read=limits.timeout)
    headers = {"User-Agent": _AGENT, "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"}
    async with (
        aiohttp.ClientSession(timeout=timeout, headers=headers, trust_env=True) as session,
        session.get(URL(_in_ascii(url), encoded=True), max_redirects=_REDIRECTS) as answer,
    ):
        if answer.status in _MENDABLE:
            asked = answer.headers.get("Retry-After", "")
            pause = min(float(asked), _LONGEST_PAUSE) if asked.isascii() and asked.isdigit() else 0.0
            raise _Later(f"status {answer.status}", pause)
        if not 200 <= answer.status < 300:
            raise Dropped("not downloaded", f"status {answer.status}")
        tags = ",".join(answer.headers.getall("X-Robots-Tag", [])).lower()
        if "noai" in tags or "noimageai" in tags:
            raise Dropped("not downloaded", "the site asks not to be used for training")
        data = bytearray()
        async for piece in answer.content.iter_chunked(_PIECE):
            data += piece
            if len(data) > limits.max_bytes:
                break
        return bytes(data[: limits.max_bytes + 1])


def fetch(url: str, limits: FetchLimits) -> bytes:
    """Download ``url``, at most ``limits.max_bytes`` + 1 bytes, trying again with growing pauses where that may help.

    Raises Dropped: for another scheme than http and https, an answer that is an error, silence, a body that is cut
    short, or a site that asks not to be used for training (the header X-Robots-Tag with noai or noimageai).
    """
    if not url.lower().startswith(("http://", "https://")):
        raise Dropped("not downloaded", "expected an http or https address")
    growing = tenacity.wait_exponential(1.0, max=8.0)
    again = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(_Later),
        stop=tenacity.stop_after_attempt(limits.retries + 1),
        wait=lambda state: max(growing(state), state.outcome.exception().wait),  # type: ignore[union-attr]
        reraise=True,
    )
    try:
        return again(_downloaded, url, limits)
    except _Later as later:
        raise Dropped("not downloaded", str(later)) from None


def _downloaded(url: str, limits: FetchLimits) -> bytes:
    """One try. Raises Dropped for what another would not change, and _Later for the rest."""
    try:
        return asyncio.run(_download(url, limits))
    except aiohttp.NonHttpUrlRedirectClientError:
        raise Dropped("not downloaded", "redirected away from http") from None
    except aiohttp.TooManyRedirects as error:
        raise Dropped("not downloaded", f"status {error.history[-1].status}") from None
    except ValueError as error:  # no address, or a certificate that is not trusted
        raise Dropped("not downloaded", type(getattr(error, "certificate_error", error)).__name__) from None
    except (OSError, aiohttp.ClientError) as error:
        cause = getattr(error, "os_error", error)
        known = {aiohttp.ClientPayloadError: "IncompleteRead", TimeoutError: "TimeoutError"}
        name = next((name for kind, name in known.items() if isinstance(cause, kind)), type(cause).__name__)
        raise _Later(name) from None


def _in_ascii(url: str) -> str:
    """``url`` as it is sent: other letters and spaces, which lists of addresses have, in their escaped forms."""
    if re.fullmatch(r"[!-~]+", url):
        return url
    parts = urllib.parse.urlsplit(url)
    host = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode()
    path, query = (urllib.parse.quote(part, safe="!#$%&'()*+,/:;=?@[]~") for part in (parts.path, parts.query))
    return urllib.parse.urlunsplit((parts.scheme, host, path, query, ""))


@dataclass(frozen=True)
class Archive:
    """Where members lie by their plain name: (offset, size) in the plain tar at ``path``, or the name that a zip has for it.

    ``links`` are members that lead elsewhere, which are not followed.
    """

    path: str
    members: dict[str, tuple[int, int] | str]
    links: frozenset[str] = frozenset()

    def place(self, name: str) -> Place:
        """Where the member ``name`` lies."""
        plain = _plain(name)
        found = self.members.get(plain)
        if found is None:
            why = "a link in the archive, not followed" if plain in self.links else "no such member in the archive"
            return Place("none", "no image", member=why)
        return Place("zip", self.path, member=found) if isinstance(found, str) else Place("span", self.path, *found)


def is_archive(path: Path) -> bool:
    """Whether a root is one: a file called .zip, .tar, .tgz or .tar.gz."""
    return path.is_file() and path.name.lower().endswith((".zip", ".tar", ".tgz", ".tar.gz"))


def open_archive(path: Path, work: Path, max_gigabytes: float, check: Callable[[], None]) -> Archive:
    """List an archive. A gzipped tar has no beginning but its own, so it is first unzipped (not unpacked) into ``work``.

    Raises UserError when it is damaged, or comes to more than ``max_gigabytes`` unzipped.
    """
    try:
        if path.name.lower().endswith(".zip"):
            with zipfile.ZipFile(path) as packed:
                return Archive(str(path), {_plain(name): name for name in packed.namelist()})
        plain = path
        if path.name.lower().endswith("gz"):
            plain = work / "archive.tar"
            if not plain.exists():
                _unzip(path, plain, max_gigabytes, check)
        return _list_tar(plain)
    except (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"root={path} is a damaged archive ({error}); fetch it again.") from None


def _plain(name: str) -> str:
    """A member's name as tables and tools write it in several ways: "./a/b.png", "a\\b.png"."""
    return PurePosixPath(name.replace("\\", "/")).as_posix()


def _unzip(path: Path, plain: Path, max_gigabytes: float, check: Callable[[], None]) -> None:
    """Counted as it comes out, since a small file may hold terabytes of zeros."""
    written = 0
    with (
        gzip.open(path) as source,
        atomic_file(plain) as partial,
        open(partial, "wb") as target,
        make_bar(f"unzipping {path.name}", "MiB", None) as bar,
    ):
        while piece := source.read(1 << 20):
            written += len(piece)
            if written > max_gigabytes * 1e9:
                raise UserError(
                    f"root={path} comes to more than {max_gigabytes:g} GB unzipped; give max_unzipped_gigabytes= if that "
                    "is right, or unpack it and give the folder as root=."
                )
            target.write(piece)
            bar.update(1)
            check()


def _list_tar(path: Path) -> Archive:
    members: dict[str, tuple[int, int] | str] = {}
    links: set[str] = set()
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if member.size < 0:  # leads back to where it has been
                raise tarfile.ReadError("a member of negative size")
            name, target = _plain(member.name), _plain(member.linkname)
            if member.isreg() and not member.issparse():
                members[name] = member.offset_data, member.size
            elif member.islnk() and target in members:  # the same file under another name, as tar writes hard links
                members[name] = members[target]
            elif member.islnk() or member.issym():
                links.add(name)
    return Archive(str(path), members, frozenset(links))
