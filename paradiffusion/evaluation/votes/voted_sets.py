"""The sets of pictures that are compared: folders of evaluations, or of pictures named after the prompts."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tqdm import tqdm

from paradiffusion.data.images import BadImage, decode
from paradiffusion.errors import UserError
from paradiffusion.evaluation.records import NAME, read_evaluation
from paradiffusion.evaluation.suites.suite import Suite, SuitePrompt
from paradiffusion.evaluation.votes.vote_study import Picture, PictureSet

MAX_BYTES: Final = 200_000_000
ABSENT: Final = "there is no such picture"


@dataclass(frozen=True)
class Source:
    """A set before its files were looked at: for each prompt's id the files, or why there is none.

    Attributes:
        suite: what it was made for; None for a folder of pictures, which does not say.
    """

    name: str
    root: Path
    suite: Suite | None
    files: dict[str, list[Path | str]]


def open_sources(paths: dict[str, str], suite: Suite | None) -> list[Source]:
    """The sets under their names.

    Args:
        suite: needed where no set is an evaluation; evaluations of another one are refused.
    Raises:
        UserError: for what is no folder, sets of different suites, or no suite at all.
    """
    folders = {name: Path(path).expanduser() for name, path in paths.items()}
    for name, folder in folders.items():
        if not folder.is_dir():
            raise UserError(
                f"the set {name} is no folder: {folder}; name an evaluation's folder, or one of pictures named after the prompts."
            )
    evaluations = {name: _from_evaluation(name, f) for name, f in folders.items() if (f / NAME).is_file()}
    for name, source in evaluations.items():
        assert source.suite is not None
        suite = suite or source.suite
        if source.suite.name != suite.name:
            raise UserError(
                f"the set {name} was drawn for the suite {source.suite.name}, and not for {suite.name}; compare sets of one suite."
            )
    if suite is None:
        raise UserError(
            "suite= is missing: no set is the folder of an evaluation, which would say what its prompts are."
        )
    return [evaluations.get(name) or _from_folder(name, folder, suite) for name, folder in folders.items()]


def common_prompts(sources: Sequence[Source], suite: Suite | None) -> tuple[str, list[SuitePrompt]]:
    """The suite's name and the prompts that all evaluations were made for, in its order.

    Raises:
        UserError: where there are none, or one id stands for two texts.
    """
    suites = [source.suite for source in sources if source.suite is not None]
    first = suite or suites[0]
    known = [{prompt.id: prompt.text for prompt in one.prompts} for one in suites]
    for prompt in first.prompts:
        for source, texts in zip((s for s in sources if s.suite is not None), known, strict=True):
            if texts.get(prompt.id, prompt.text) != prompt.text:
                raise UserError(
                    f"the prompt {prompt.id} has another text in the set {source.name}; draw the sets from the same prompts."
                )
    prompts = [prompt for prompt in first.prompts if all(prompt.id in texts for texts in known)]
    if not prompts:
        raise UserError("the sets have no prompt in common; draw them from the same suite with the same count=.")
    return first.name, prompts


def look_at(source: Source, prompts: Sequence[SuitePrompt], images: int) -> PictureSet:
    """Decode each picture once, so that one that cannot be shown is known before the first vote."""
    wanted = [(prompt.id, number) for prompt in prompts for number in range(images)]

    def look(key: tuple[str, int]) -> Picture:
        files = source.files.get(key[0], [])
        if key[1] >= len(files):
            return Picture("", error=ABSENT)
        file = files[key[1]]
        return Picture("", error=file) if isinstance(file, str) else _looked_at(file, source.root)

    threads = min(4, os.cpu_count() or 1)
    pause = 0.5 if sys.stderr.isatty() else 10.0  # a log file stays readable
    pool = ThreadPoolExecutor(threads)
    try:
        name = f"pictures of {source.name}"
        found = list(tqdm(pool.map(look, wanted), total=len(wanted), desc=name, mininterval=pause))
    finally:  # after Ctrl-C too, which would else wait for all
        pool.shutdown(cancel_futures=True)
    pictures: dict[str, list[Picture]] = {prompt.id: [] for prompt in prompts}
    for (prompt_id, _), picture in zip(wanted, found, strict=True):
        pictures[prompt_id].append(picture)
    return PictureSet(source.name, source.root, pictures)


def read_picture(root: Path, picture: Picture) -> bytes:
    """The file's bytes, the very ones that the study began with.

    Raises:
        BadImage: where they changed, cannot be read, or the path leads out of ``root``.
    """
    data = _bytes(root / picture.file, root)
    if digest_of(data) != picture.digest:
        raise BadImage("it is not the picture that the study began with")
    return data


def digest_of(data: bytes) -> str:
    """A hash of a file's bytes."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _looked_at(file: Path, root: Path) -> Picture:
    relative = Path(os.path.relpath(file, root)).as_posix()
    try:
        data = _bytes(file, root)
        decode(data)
    except BadImage as error:
        return Picture(relative, error=str(error))
    return Picture(relative, digest_of(data))


def _bytes(file: Path, root: Path) -> bytes:
    try:
        # Resolved: neither ".." nor a symbolic link leads out of the set's folder.
        inside = file.resolve(strict=True)
        if not inside.is_relative_to(root.resolve()) or not inside.is_file():
            raise BadImage("it lies outside of the set's folder")
        if inside.stat().st_size > MAX_BYTES:
            raise BadImage(f"it has over {MAX_BYTES} bytes")
        return inside.read_bytes()
    except (OSError, RuntimeError) as error:  # RuntimeError: links that go round
        raise BadImage(getattr(error, "strerror", None) or "it cannot be opened") from None


def _from_evaluation(name: str, folder: Path) -> Source:
    evaluation = read_evaluation(folder)
    files: dict[str, list[Path | str]] = {prompt.id: [] for prompt in evaluation.suite.prompts}
    for drawn in evaluation.images:
        files.setdefault(drawn.prompt, []).append(drawn.error or drawn.file.absolute())
    root = folder.absolute()
    if evaluation.kind == "images":  # these lie where they were found
        places = {str(file.parent) for row in files.values() for file in row if isinstance(file, Path)}
        root = Path(os.path.commonpath(places)) if places else root
    return Source(name, root, evaluation.suite, files)


def _from_folder(name: str, folder: Path, suite: Suite) -> Source:
    """A folder of pictures, matched with the prompts as scripts/evaluate.py does it."""
    from paradiffusion.evaluation.drawing.picture_folder import match_pictures

    root = folder.absolute()
    try:
        matching = match_pictures(root, suite)
    except UserError as error:  # which speaks of a key that belongs to the other script
        raise UserError(str(error).replace(f"images={root}", f"the set {name} ({folder})")) from None
    if matching.strangers:
        print(
            f"{name}: {len(matching.strangers)} pictures belong to no prompt, such as {matching.strangers[0]}; they are left out."
        )
    files: dict[str, list[Path | str]] = {key: [file or ABSENT for file in row] for key, row in matching.files.items()}
    return Source(name, root, None, files)
