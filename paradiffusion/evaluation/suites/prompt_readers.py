"""Readers of suites that are prompts alone: folders, prompt files, tables, COCO's captions, the built-in scenes."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from paradiffusion.errors import UserError
from paradiffusion.evaluation.suites.suite import SuitePrompt
from paradiffusion.evaluation.suites.suite_files import find_file, read_json, read_rows, read_text
from paradiffusion.evaluation.suites.suite_table import SuiteEntry
from paradiffusion.randomness import seed_from
from paradiffusion.sampling.prompts import read_prompts
from paradiffusion.scenes.captions import KINDS, captions
from paradiffusion.scenes.grammar import lengthened
from paradiffusion.scenes.world import Scene, make_scene, scene_from_meta, scene_to_meta


def read_folder(entry: SuiteEntry, path: Path) -> list[SuitePrompt]:
    """One prompt for each .txt below ``path``; its name is the id, the folder in which it lies, if any, the category."""
    entry.take({})
    if not path.is_dir():
        raise UserError(f"suite={entry.name}: {path} is no folder (looked in {Path.cwd()}); expected one with .txt files.")
    prompts = []
    for file in sorted(path.rglob("*.txt")):
        inside = file.relative_to(path)
        if any(part.startswith(".") for part in inside.parts):
            continue
        text = read_text(file).strip()
        if not text:
            raise UserError(f"{file} is empty; expected a prompt, or no such file.")
        category = "" if len(inside.parts) == 1 else inside.parent.as_posix()
        prompts.append(SuitePrompt(inside.with_suffix("").as_posix(), text, category))
    return prompts


def read_prompt_file(entry: SuiteEntry, path: Path) -> list[SuitePrompt]:
    """The prompts of a .txt, .csv or .jsonl file; ids are their numbers, 00000 first, as sample.py names its images. Heights and widths
    hold; seeds and sampler settings of single lines do not (all models get the same ones), and are kept in ``meta["line"]``."""
    entry.take({})
    prompts = []
    for request in read_prompts(prompt_file=path):
        line = {k: v for k, v in asdict(request).items() if v is not None}
        kept = {key: line[key] for key in ("seed", "steps", "guidance", "negative_prompt") if key in line}
        prompts.append(
            SuitePrompt(
                f"{request.index:05d}",
                request.prompt.strip(),
                height=request.height,
                width=request.width,
                meta={"line": kept} if kept else {},
            )
        )
    return prompts


PAIR: Final = ("short", "long")
_PARTS: Final = ("text", "id", "category", *PAIR)


def read_rows_as_prompts(entry: SuiteEntry, path: Path) -> list[SuitePrompt]:
    """A prompt for each row.

    ``columns`` names those of ``text``, and where the table has them of ``id`` (else the row's number) and ``category``;
    any further one goes into ``meta`` under its name there. With ``short`` and ``long`` instead of ``text`` each row is two
    prompts, ``<n>_short`` and ``<n>_long``, with ``meta["pair"]`` = n and ``meta["version"]``; all short ones come first.

    Options: ``file``, a pattern, all of whose matches are read in the order of their names, in ``path`` or a folder of it;
    ``join_lines``, where line breaks inside of a prompt are accidents of its layout; ``categories``, other names for them.
    """
    options = entry.take({"file": "*", "join_lines": False, "categories": {}})
    columns = entry.columns or {"text": "prompt"}
    paired = all(part in columns for part in PAIR)
    if not paired and "text" not in columns:
        raise UserError(f"suite={entry.name}: columns name no text; expected the column of the prompts, or short and long.")
    rows = [row for file in _matching(entry, path, options["file"]) for row in read_rows(file, list(columns.values()))]
    prompts: list[SuitePrompt] = []
    for version in PAIR if paired else ("text",):
        for number, row in enumerate(rows):
            text = row.text(columns[version])
            text = " ".join(text.split()) if options["join_lines"] else text
            name = row.text(columns["id"]) if "id" in columns else f"{number:05d}"
            category = row.text(columns["category"], needed=False) if "category" in columns else ""
            meta = {part: row.values[column] for part, column in columns.items() if part not in _PARTS}
            if paired:
                meta |= {"pair": name, "version": version}
                name = f"{name}_{version}"
            category = str(options["categories"].get(category, category))
            prompts.append(SuitePrompt(name, text, category, meta=meta))
    return prompts


def _matching(entry: SuiteEntry, path: Path, pattern: str) -> list[Path]:
    """All files that match, in the folder where the first one was found."""
    patterns = [pattern] if pattern != "*" else ["*.csv", "*.tsv", "*.jsonl", "*.json"]
    first = find_file(path, patterns, f"see the entry of suite={entry.name}.")
    if path.is_file():
        return [first]
    name = Path(pattern).name if pattern != "*" else f"*{first.suffix}"
    return [file for file in sorted(first.parent.glob(name)) if file.is_file() and not file.name.startswith(".")]


def read_coco(entry: SuiteEntry, path: Path) -> list[SuitePrompt]:
    """A prompt for each image, by image id: of its captions the one with the lowest id that is not empty. Ids are the stems of the image
    files; which are drawn of them is ``choose`` of the table."""
    name = entry.take({"file": "captions_val2014.json"})["file"]
    file = find_file(path, [name, f"annotations/{name}"], f"expected COCO's {name}: see its entry in suites.yaml.")
    values = read_json(file)
    try:
        names = {int(image["id"]): str(image["file_name"]) for image in values["images"]}
        best: dict[int, dict[str, Any]] = {}
        for found in values["annotations"]:
            image = int(found["image_id"])
            if str(found["caption"]).strip() and (image not in best or int(found["id"]) < int(best[image]["id"])):
                best[image] = found
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file} is no file of COCO's captions ({type(error).__name__}: {error}); expected images and annotations with "
            "captions, such as captions_val2014.json."
        ) from None
    lost = sorted(best.keys() - names.keys())
    if lost:
        raise UserError(f"{file}: caption {best[lost[0]]['id']} is of image {lost[0]}, which is not in it; get it again.")
    prompts = []
    for image in sorted(best):
        meta = {"image_id": image, "caption_id": int(best[image]["id"]), "file_name": names[image]}
        text = " ".join(str(best[image]["caption"]).split())  # some end in a line break
        prompts.append(SuitePrompt(Path(names[image]).stem, text, meta=meta))
    return prompts


Told = tuple[str, str, Scene]  # name, paragraph, truth
LOOKED_AT: Final = 50  # scenes, for each that is to have a certain length


def read_scenes(entry: SuiteEntry, path: Path) -> list[SuitePrompt]:
    """The scenes that training validates on, with the same paragraphs and names as in data/demo/val; or with ``suite_path=``
    those of a file of JSON lines, each with its ``text`` and the keys of a scene, as data/paragraphs.jsonl has them.

    Options: ``number`` of scenes, ``caption`` (one of ``KINDS``), ``world``, ``set`` and ``seed`` as in
    ``paradiffusion.scenes.dataset``, and ``scale``, by which height and width of a scene's canvas are multiplied: at 1 they are
    the sizes at which nano draws. ``meta["scene"]`` is the truth, in pixels of the canvas; the category is the number of
    objects. With ``lengths`` in words, such as [50, 100, 200], the length is the category: ``by`` "idle" each scene is there once for
    each of them, its paragraph among true but idle sentences; ``by`` "objects" each has ``number`` scenes of its own, whose paragraphs
    are so long by themselves, since more is in them. Of a file, ``number``, ``scale`` and ``lengths`` alone count.
    """
    own = {"number": 200, "world": "small", "set": "val", "seed": 0, "caption": "clean", "scale": 1}
    options = entry.take({**own, "lengths": [], "by": "idle"})
    by_objects = options["by"] == "objects"
    if options["by"] not in ("idle", "objects") or (by_objects and (entry.path or not options["lengths"])):
        raise UserError(
            f"suite={entry.name}: by={options['by']} is not understood; expected idle, or objects with lengths and no suite_path."
        )
    if not all(isinstance(words, int) and words > 0 for words in options["lengths"]):
        raise UserError(f"suite={entry.name}: lengths={options['lengths']} are no lengths in words; expected such as [50,100].")
    if options["caption"] not in KINDS:
        raise UserError(f"suite={entry.name}: caption={options['caption']} is unknown; choose one of {', '.join(KINDS)}.")
    if options["scale"] < 1 or options["number"] < 1:
        raise UserError(f"suite={entry.name}: scale and number are {options['scale']} and {options['number']}; expected 1 up.")
    if options["caption"] == "unseen" and options["set"] != "val":
        raise UserError(f"suite={entry.name}: only set=val has captions of unseen forms; leave set={options['set']} out.")
    if entry.path:
        written = enumerate(_written(path, entry.name), 1)
        told: Iterator[Told] = ((f"{path.stem}-{line:03d}", text, scene) for line, (text, scene) in written)
    else:
        told = ((f"{options['set']}-{n:06d}", *_scene(options, n)) for n in itertools.count())
    number, lengths, scale = options["number"], options["lengths"], options["scale"]
    if by_objects:
        return list(_so_long(entry.name, itertools.islice(told, LOOKED_AT * number), number, lengths, scale))
    scenes = list(itertools.islice(told, number))
    if not lengths:
        return [_prompt(*one, scale) for one in scenes]
    return [
        _prompt(name, lengthened(text, scene, random.Random(seed_from("lengths", name, words)), words), scene, scale, words)
        for words in lengths
        for name, text, scene in scenes
        if len(text.split()) <= words
    ]


def _scene(options: dict[str, Any], n: int) -> tuple[str, Scene]:
    """Paragraph and truth of the ``n``th scene."""
    scene = make_scene(options["set"], options["seed"], n, options["world"])
    return captions(scene, options["seed"], n)[options["caption"]], scene


def _so_long(suite: str, told: Iterable[Told], number: int, lengths: list[int], scale: int) -> Iterator[SuitePrompt]:
    """For each length the first ``number`` scenes whose own paragraph is within an eighth of it. UserError where there are fewer."""
    found: dict[int, list[Told]] = {words: [] for words in lengths}
    longest = 0
    for one in told:
        own = len(one[1].split())
        longest = max(longest, own)
        for words, scenes in found.items():
            if len(scenes) < number and abs(own - words) <= words / 8:
                scenes.append(one)
        if all(len(scenes) == number for scenes in found.values()):
            break
    for words, scenes in found.items():
        if len(scenes) < number:
            raise UserError(
                f"suite={suite}: of {LOOKED_AT * number} scenes only {len(scenes)} have paragraphs of about {words} words, the longest "
                f"{longest}; ask for another length, another world or caption, or by=idle."
            )
        yield from (_prompt(*one, scale, words) for one in scenes)


def _prompt(name: str, text: str, scene: Scene, scale: int, words: int = 0) -> SuitePrompt:
    """The scene's prompt; ``words`` is the length that it was asked for, 0 for none."""
    objects = len(scene.objects)
    category = f"{words} words" if words else f"{objects} object{'s' if objects > 1 else ''}"
    name, meta = f"{name}-{words}" if words else name, {"scene": scene_to_meta(scene)}
    return SuitePrompt(name, text, category, height=scene.height * scale, width=scene.width * scale, meta=meta)


def _written(path: Path, suite: str) -> list[tuple[str, Scene]]:
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        return [(row["text"], scene_from_meta(row)) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, UserError) as error:
        raise UserError(f"suite={suite}: {path} holds no paragraphs with scenes ({error}); see data/paragraphs.jsonl.") from None
