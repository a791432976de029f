"""A folder of pictures named after the prompts of a suite: which picture belongs to which prompt."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from paradiffusion.atomic import write_atomic
from paradiffusion.data.images import BadImage, decode
from paradiffusion.data.shards import IMAGE_EXTENSIONS
from paradiffusion.errors import UserError
from paradiffusion.evaluation.drawing.picture_source import Place, Source, file_stem, image_name
from paradiffusion.evaluation.records import Drawn
from paradiffusion.evaluation.suites.suite import Suite
from paradiffusion.runner import make_bar
from paradiffusion.sampling.gallery import NAME, read_manifests
from paradiffusion.sampling.run import disk_errors, first_does

KINDS: Final = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
FOUND: Final = "pictures.json"
# Where the sources of suites keep the name of a prompt's own or reference picture.
NAMES: Final = ("original_id", "image", "file", "file_name", "filename")
_NUMBERED: Final = re.compile(r"(.+)[_-](\d{1,3})")
_READERS: Final = 8


@dataclass
class Matching:
    """Which files of a folder are which prompt's pictures: by prompt id, in the order of their numbers, None where a number is left out;
    and the names of strangers, which belong to no prompt."""

    files: dict[str, list[Path | None]] = field(default_factory=dict)
    strangers: list[str] = field(default_factory=list)

    def usual(self) -> int:
        """How many pictures most prompts that have any have."""
        counts = Counter(len(files) for files in self.files.values())
        return max(counts, key=lambda count: (counts[count], count)) if counts else 1


def match_pictures(folder: Path, suite: Suite) -> Matching:
    """Find each prompt's pictures in ``folder``. UserError for a folder that is missing or holds no picture.

    A picture is named after its prompt's id, its row in the whole suite (00000), or the file name that the suite gives,
    with an optional _1 or -1 for the further ones; or it lies in a folder of such a name. In a folder that sample.py or
    scripts/evaluate.py drew, the manifest says which prompt each picture shows."""
    if not folder.is_dir():
        raise UserError(f"images={folder} is not a folder; expected one with a picture for each prompt of suite={suite.name}.")
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    files = [path for path in entries if path.suffix.lower() in KINDS and path.is_file()]
    names = _names_of(suite)
    written = {record.file: record.prompt.strip() for record in read_manifests(folder).values()} if files else {}
    of_text = {prompt.text.strip(): prompt.id for prompt in suite.prompts}
    numbered: dict[str, dict[int, Path]] = {}
    matching = Matching()
    for path in files:
        if path.name in written:  # what it was drawn from is known, so that its name, which is a row, says nothing
            row, number = _split_number(path.stem)
            here = suite.prompts[int(row)] if row.isdigit() and int(row) < len(suite.prompts) else None
            same = here is not None and here.text.strip() == written[path.name]  # two prompts may have one text
            prompt = here.id if here is not None and same else of_text.get(written[path.name])
        else:
            prompt, number = names.get(path.stem), 0  # a whole name goes before one with a number
            if prompt is None:
                base, number = _split_number(path.stem)
                prompt = names.get(base)
        taken = numbered.setdefault(prompt, {}) if prompt is not None else None
        if taken is None or number in taken:
            if path.name not in ("grid.png",) or NAME not in {entry.name for entry in entries}:
                matching.strangers.append(path.name)
        else:
            taken[number] = path
    for key, found in numbered.items():  # by number; a folder that counts from 1 is taken as it is meant
        matching.files[key] = [found.get(number) for number in range(0 if 0 in found else min(found), max(found) + 1)]
    for path in entries:
        prompt = names.get(path.name) if path.is_dir() else None
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in KINDS and p.is_file()) if prompt else []
        if prompt and inside and prompt not in matching.files:
            matching.files[prompt] = list(inside)
    if not matching.files:
        raise UserError(f"images={folder} holds {_nothing_found(files, written, suite)}.")
    return matching


def _nothing_found(files: list[Path], written: dict[str, str], suite: Suite) -> str:
    names = [name for name, prompt in _names_of(suite).items() if prompt == suite.prompts[0].id]
    expected = f"expected names such as {' or '.join(f'{name}.png' for name in names)}"
    if not files:
        return f"no picture; {expected}, after the prompts of suite={suite.name}"
    seen = f"{len(files)} pictures, such as {files[0].name},"
    if any(file.name in written for file in files):
        return f"{seen} which by its {NAME} show other prompts than suite={suite.name}; name the suite that they show"
    return f"{seen} and none named after a prompt of suite={suite.name}; {expected}"


def _names_of(suite: Suite) -> dict[str, str]:
    """Prompt ids by every name that a picture may have, ids before rows before the source's own names."""
    names = {prompt.id: prompt.id for prompt in suite.prompts}
    # Ids that look like rows mean themselves.
    rows = not any(re.fullmatch(r"\d{5}", prompt.id) for prompt in suite.prompts)
    # With count= too a row is that of the whole suite: whoever drew all of it has numbered all of it.
    for row, prompt in zip(suite.rows or range(len(suite.prompts)), suite.prompts, strict=True):
        if rows:
            names.setdefault(file_stem(row, 0), prompt.id)
    for prompt in suite.prompts:
        for key in NAMES:
            value = prompt.meta.get(key)
            if isinstance(value, str) and value.strip():
                names.setdefault(Path(value.strip()).stem, prompt.id)
    return names


def _split_number(stem: str) -> tuple[str, int]:
    match = _NUMBERED.fullmatch(stem)
    return (match[1], int(match[2])) if match else (stem, 0)


class PicturesSource(Source):
    """Pictures that somebody else's program made."""

    kind = "images"

    def __init__(self, folder: Path, label: str | None) -> None:
        self.folder = folder.expanduser()
        self.name = self.folder.resolve().name
        self.label = label or self.name
        self._matched: dict[str, Matching] = {}

    def identity(self) -> dict[str, Any]:
        return {"images": str(self.folder.resolve())}

    def images_of(self, suite: Suite) -> int:
        return self._match(suite).usual()

    def _match(self, suite: Suite) -> Matching:
        if suite.fingerprint not in self._matched:
            self._matched[suite.fingerprint] = match_pictures(self.folder, suite)
        return self._matched[suite.fingerprint]

    def draw(self, place: Place) -> tuple[list[Drawn], dict[str, Any]]:
        """Nothing is drawn: each picture is looked at, and what is missing or broken is a failure."""
        first_does(place.processes, lambda: self._look(place))
        record = json.loads((place.folder / FOUND).read_text(encoding="utf-8"))
        images = [Drawn(**{**row, "file": Path(row["file"])}) for row in record["images"]]
        return images, record["source"]

    def _look(self, place: Place) -> None:
        matching = self._match(place.suite)
        images, strangers = self._images(place, matching)
        found = [image for image in images if not image.error]
        bar = make_bar("looking at pictures", "image", len(found))
        checked: dict[str, tuple[str, str]] = {}
        with bar, ThreadPoolExecutor(_READERS) as pool:
            for image, (error, content) in zip(found, pool.map(_check, (image.file for image in found)), strict=True):
                place.signal.check()
                checked[image.name] = (error, content)
                bar.update()
        rows = [
            {"name": image.name, "prompt": image.prompt, "file": str(image.file.absolute()),
             "error": image.error or checked[image.name][0]}
            for image in images
        ]  # fmt: skip
        content = hashlib.sha256(json.dumps([[name, row[1]] for name, row in checked.items()]).encode()).hexdigest()[:16]
        source = {
            "images": str(self.folder), "content": content, "missing": sum(bool(image.error) for image in images),
            "broken": sum(bool(error) for error, _ in checked.values()), "unmatched": strangers,
        }  # fmt: skip
        with disk_errors(place.folder):
            write_atomic(place.folder / FOUND, json.dumps({"images": rows, "source": source}, ensure_ascii=False))

    def _images(self, place: Place, matching: Matching) -> tuple[list[Drawn], list[str]]:
        """All wanted images, and the names of pictures that are not among them."""
        images, extra = [], list(matching.strangers)
        for prompt in place.suite.prompts:
            files = matching.files.get(prompt.id, [])
            for number in range(place.images_per_prompt):
                name = image_name(prompt, number)
                file = files[number] if number < len(files) else None
                error = "" if file is not None else "there is no picture of this name"
                images.append(Drawn(name, prompt.id, file or self.folder / f"{name}.png", None, error))
            extra += [file.relative_to(self.folder).as_posix() for file in files[place.images_per_prompt :] if file]
        return images, extra


def _check(path: Path) -> tuple[str, str]:
    """(what is wrong with a picture, "" for nothing; a hash of its bytes)."""
    try:
        data = path.read_bytes()
    except OSError as error:
        return f"the picture cannot be read ({error.strerror})", ""
    content = hashlib.sha256(data).hexdigest()[:16]
    try:
        decode(data)
    except BadImage as error:
        return f"the picture cannot be read ({error})", content
    return "", content
