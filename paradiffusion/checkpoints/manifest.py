"""The manifest of a checkpoint, sizes and hashes of its files: written last and checked first."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from paradiffusion.checkpoints.tensors import is_pointer

MANIFEST = "manifest.json"
FORMAT_VERSION = 1  # of the manifest; one without the key is version 1


def hash_file(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Force a file or a folder to the disk, so that a rename after it cannot survive a power cut that its bytes do not."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows flushes what it may write to alone
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_manifest(folder: Path) -> None:
    """Record size and hash of every file below ``folder``, and force all of it to the disk."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": hash_file(path)}
            sync(path)
    (folder / MANIFEST).write_text(json.dumps({"format_version": FORMAT_VERSION, "files": files}, indent=1))
    sync(folder / MANIFEST)


def find_fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words that name the file; None when every file is as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files, version = manifest["files"], int(manifest.get("format_version", 1))
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is not readable"
    if version > FORMAT_VERSION:
        return f"{MANIFEST} has the format_version {version}, newer than {FORMAT_VERSION}, so this repository must be updated"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if is_pointer(path):
            return f"{name} is a Git LFS pointer, to be fetched with git-lfs (`git lfs pull`)"
        size = path.stat().st_size
        if size != expected["size"]:
            return f"{name} has {size} bytes instead of {expected['size']}"
        if hash_file(path) != expected["sha256"]:
            return f"{name} has other content than was written"
    return None


def checkpoints_of(stage_folder: Path) -> list[Path]:
    """A stage's checkpoint folders, newest first; half-written ones have other names."""
    folders = [p for p in (stage_folder / "checkpoints").glob("step_*") if p.is_dir() and p.name[5:].isdigit()]
    return sorted(folders, key=lambda path: int(path.name[5:]), reverse=True)


def follow_pointer(path: Path) -> Path:
    """The checkpoint that a stage's ``best`` or ``checkpoints/latest`` names, from where that lies; any other path as it is."""
    if path.name in ("best", "latest") and path.is_file():
        return path.parent / path.read_text(encoding="utf-8").strip()
    return path


def newest_valid(stage_folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that passes its manifest, and a sentence for each newer one that was passed over."""
    faults: list[str] = []
    for folder in checkpoints_of(stage_folder):
        fault = find_fault(folder)
        if fault is None:
            return folder, faults
        faults.append(f"the checkpoint {folder} is passed over: {fault}.")
    return None, faults
