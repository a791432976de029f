"""An archive as the root of a table's paths: its members by name, read where they lie."""

from __future__ import annotations

import gzip
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from paradiffusion.atomic import atomic_file
from paradiffusion.curation.building.places import Place
from paradiffusion.curation.building.work import progress
from paradiffusion.errors import UserError

_PIECE: Final = 1 << 20


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


def open_archive(path: Path, work: Path, max_gigabytes: float) -> Archive:
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
                _unzip(path, plain, max_gigabytes)
        return _list_tar(plain)
    except (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"root={path} is a damaged archive ({error}); fetch it again.") from None


def _plain(name: str) -> str:
    """A member's name as tables and tools write it in several ways: "./a/b.png", "a\\b.png"."""
    return PurePosixPath(name.replace("\\", "/")).as_posix()


def _unzip(path: Path, plain: Path, max_gigabytes: float) -> None:
    """Counted as it comes out, since a small file may hold terabytes of zeros."""
    written = 0
    with (
        gzip.open(path) as source,
        atomic_file(plain) as partial,
        open(partial, "wb") as target,
        progress(f"unzipping {path.name}", "MiB", None) as report,
    ):
        while piece := source.read(_PIECE):
            written += len(piece)
            if written > max_gigabytes * 1e9:
                raise UserError(
                    f"root={path} comes to more than {max_gigabytes:g} GB unzipped; give max_unzipped_gigabytes= if that "
                    "is right, or unpack it and give the folder as root=."
                )
            target.write(piece)
            report(1)


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
