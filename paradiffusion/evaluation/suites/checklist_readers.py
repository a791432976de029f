"""Readers of suites with questions: ParaPrompts-400, DPG-Bench, GenEval, DetailMaster."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from paradiffusion.errors import UserError
from paradiffusion.evaluation.suites.suite import ChecklistQuestion, SuitePrompt
from paradiffusion.evaluation.suites.suite_files import Row, find_file, read_json, read_rows, read_text
from paradiffusion.evaluation.suites.suite_table import SuiteEntry, check_prompts

# What the checklists write where there is nothing to ask.
_NOTHING: Final = ("", "none", "n/a", "na", "not specified", "unspecified", "unknown")
_NAME: Final = re.compile(r"^(?P<base>.*?)(?:\s+(?P<number>\d+))?\s*(?:\((?P<hint>[^()]*)\))?$")


def read_paraprompts(entry: SuiteEntry, path: Path) -> list[SuitePrompt]:
    """The prompts in the order of the CSV; ids are the stems of its image column. Checklists are the JSON files in the folder
    ``checklists`` beside it, named after those stems. UserError for a checklist without its prompt, and for malformed files."""
    options = entry.take({"file": "ParaPrompts_400.csv", "checklists": "Parts_50"})
    columns = {"id": "Image", "text": "Prompt", "category": "Category", **entry.columns}
    file = find_file(path, [options["file"], "*.csv"], f"expected {options['file']}: see its entry in suites.yaml.")
    rows = read_rows(file, list(columns.values()))
    stems = [Path(row.text(columns["id"])).stem for row in rows]
    checklists = _checklists(file.parent, options["checklists"])
    prompts = []
    for stem, row in zip(stems, rows, strict=True):
        questions: tuple[ChecklistQuestion, ...] = ()
        if stem.casefold() in checklists:
            questions = tuple(checklist_questions(read_json(checklists[stem.casefold()]), checklists[stem.casefold()]))
        meta = {"image": row.text(columns["id"])}
        prompts.append(SuitePrompt(stem, row.text(columns["text"]), row.text(columns["category"]), questions=questions, meta=meta))
    known = {stem.casefold() for stem in stems}
    for found in [file for key, file in checklists.items() if key not in known and not entry.allow_other][:1]:
        check_prompts(entry, prompts)  # a prompt that is missing says more than what it leaves behind
        raise entry.refuse(f"the checklist {found.name} has no prompt in {file.name}", "one for each checklist")
    return prompts


def _checklists(folder: Path, name: str) -> dict[str, Path]:
    """The checklist files by their stem. The folder's name may differ in letter case, as copies of it do."""
    folders = [p for p in sorted(folder.iterdir()) if p.is_dir() and p.name.casefold() == name.casefold()]
    files = [file for found in folders for file in sorted(found.glob("*.json")) if not file.name.startswith(".")]
    return {file.stem.strip().casefold(): file for file in files}


def checklist_questions(values: Any, file: Path) -> Iterator[ChecklistQuestion]:
    """Questions in our words: is each object there, is it as its attributes say, and where its location says?

    ``values`` are {object: {"Attributes": ..., "Locations": ...}}. Attributes and location ask about an object, so a picture without
    it fails them too (``parents``). "Old Man 2" asks for at least two old men. Nested attributes, which one of the released files
    has, become one question each."""
    if not isinstance(values, dict) or not values or not all(isinstance(parts, dict) for parts in values.values()):
        raise UserError(f"{file} is no checklist; expected {{object: {{Attributes: ..., Locations: ...}}}}: get it again.")
    names = {name: _parsed(name) for name in values}
    shared = Counter(base for base, _, hint in names.values() if not hint)
    seen: Counter[str] = Counter()
    for number, (name, parts) in enumerate(values.items(), 1):
        base, numbered, hint = names[name]
        several = bool(numbered and not hint and shared[base] > 1)
        seen[base] += not hint
        thing = f"{base} ({hint})" if hint else base
        if several and seen[base] > 1:
            text = f"Does the picture show at least {seen[base]} of these: {base}?"
        else:
            text = f"Does the picture show this: {thing}?"
        yield ChecklistQuestion(str(number), text, "entity", about=name)
        for kind in ("attribute", "location"):
            wanted = [value for part, value in parts.items() if str(part).strip().casefold().rstrip("s") == kind]
            sayings = [text for value in wanted for text in _sayings(value)]
            for order, saying in enumerate(sayings, 1):
                asked = f"is it {'here' if kind == 'location' else 'like this'}: {saying}?"
                whole = f"Look at the {thing} in the picture: {asked}"
                if several:
                    whole = f"Look at each {base} in the picture: is one of them {asked.removeprefix('is it ')}"
                suffix = "" if len(sayings) == 1 else f".{order}"
                yield ChecklistQuestion(f"{number}.{kind}{suffix}", whole, kind, parents=(str(number),), about=f"{name}: {saying}")


def _parsed(name: str) -> tuple[str, bool, str]:
    """ "Person 2 (Front Row, Middle)" as "person", numbered, "front row, middle"."""
    match = _NAME.match(name.strip())
    assert match is not None  # every part of the pattern may be empty
    return _lower(match["base"] or name), match["number"] is not None, _lower(match["hint"] or "")


def _lower(text: str) -> str:
    """Words in small letters, but for abbreviations such as TV."""
    return " ".join(word if word.isupper() and len(word) > 1 else word.lower() for word in text.split())


def _sayings(value: Any, path: tuple[str, ...] = ()) -> list[str]:
    """What a value says: a text as it stands, lists joined, and one saying for each leaf of nested mappings."""
    if isinstance(value, dict):
        return [saying for key, inner in value.items() for saying in _sayings(inner, (*path, _lower(str(key))))]
    text = " and ".join(str(part).strip() for part in value) if isinstance(value, list) else str(value).strip()
    text = text.rstrip(".").strip()
    if value is None or text.casefold() in _NOTHING:
        return []
    return [f"{', '.join(path)}: {text}" if path else text[:1].lower() + text[1:]]


DPG_COLUMNS = ("item_id", "text", "proposition_id", "dependency", "category_broad", "category_detailed", "tuple")
DPG_QUESTION = "question_natural_language"


def read_dpg(entry: SuiteEntry, path: Path) -> list[SuitePrompt]:
    """The prompts in the order of the table, with its rows as questions: ids are propositions, parents the dependencies but for "0".

    ``prompts/<item>.txt`` beside the table is what is drawn, where that folder is there, else the table's text. ``meta["dpg"]`` has
    what the published procedure depends on beyond that: "rows", the table's first row for this prompt (0 is the first under the
    header), and "row", the row of each question. UserError for questions without prompt, or the reverse, and for malformed files."""
    columns = {column: column for column in (*DPG_COLUMNS, DPG_QUESTION)} | entry.columns
    table = find_file(path, [entry.take({"file": "dpg_bench.csv"})["file"]], "see its entry in suites.yaml.")
    groups: dict[str, list[tuple[int, Row]]] = {}
    for number, row in enumerate(read_rows(table, list(columns.values()))):
        groups.setdefault(row.text(columns["item_id"]), []).append((number, row))
    texts = _texts(table.parent / "prompts")
    if texts and not entry.allow_other:
        for item in [item for item in groups if item not in texts][:1]:
            raise entry.refuse(f"prompts/{item}.txt, which {table.name} asks about, is missing", "one file for each item")
        for item in [item for item in texts if item not in groups][:1]:
            raise entry.refuse(f"prompts/{item}.txt has no questions in {table.name}", "a row or more for each prompt")
    prompts = []
    for item, rows in groups.items():
        questions: dict[str, ChecklistQuestion] = {}
        places: dict[str, int] = {}
        for number, row in rows:
            question = _dpg_question(row, columns)
            # A proposition that is there twice counts as its later row, at its first place, as in the published procedure.
            questions[question.id], places[question.id] = question, number
        text = texts.get(item) or rows[0][1].text(columns["text"])
        known: dict[str, Any] = {"rows": rows[0][0], "row": places}
        if breaks := [after for (before, _), (after, _) in pairwise(rows) if after != before + 1]:
            known["last_block"] = breaks[-1]
        meta = {"dpg": known}
        # The set that a prompt was taken from is told by the letters that its name begins with; our grouping.
        origin = item.rstrip("0123456789_-")
        prompts.append(SuitePrompt(item, text, origin, questions=tuple(questions.values()), meta=meta))
    return prompts


def _texts(folder: Path) -> dict[str, str]:
    found = {}
    for file in sorted(folder.glob("*.txt")):
        if file.name.startswith("."):
            continue
        found[file.stem] = read_text(file).strip()
        if not found[file.stem]:
            raise UserError(f"{file} is empty; expected a prompt: get it again.")
    return found


def _dpg_question(row: Row, columns: dict[str, str]) -> ChecklistQuestion:
    number, dependency = _whole(row, columns["proposition_id"]), row.text(columns["dependency"])
    parents = []
    for part in dependency.split(","):
        parent = part.strip()
        if not parent.isdecimal():
            raise UserError(f"{row.where}: {columns['dependency']} is {dependency!r}; expected numbers such as 0 or 1,3: get it again.")
        if int(parent):
            parents.append(str(int(parent)))
    broad, detailed = row.text(columns["category_broad"], needed=False), row.text(columns["category_detailed"], needed=False)
    about = row.text(columns["tuple"], needed=False)
    return ChecklistQuestion(number, row.text(columns[DPG_QUESTION]), broad, detailed, tuple(parents), about)


def _whole(row: Row, column: str) -> str:
    text = row.text(column)
    if not text.isdecimal():
        raise UserError(f"{row.where}: {column} is {text!r}; expected a whole number: get it again.")
    return str(int(text))


def read_geneval(entry: SuiteEntry, path: Path) -> list[SuitePrompt]:
    """The prompts of evaluation_metadata.jsonl; ids are line numbers as in GenEval's folders, 00000 first, the category is the tag.

    GenEval's own score counts with an object detector; the questions are ours, in its structure, for a model that answers them."""
    columns = {"text": "prompt", "category": "tag", "include": "include", **entry.columns}
    names = [entry.take({"file": "evaluation_metadata.jsonl"})["file"]]
    file = find_file(path, [*names, f"prompts/{names[0]}"], "see its entry in suites.yaml.")
    prompts = []
    for number, row in enumerate(read_rows(file, list(columns.values()))):
        include, exclude = row.values[columns["include"]], row.values.get("exclude") or []
        try:
            questions = tuple(_geneval_questions(include, exclude))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            raise UserError(
                f'{row.where}: include is {str(include)[:60]!r}; expected a list such as [{{"class": "dog", "count": 1}}]: get it again.'
            ) from None
        meta = {"include": include, "exclude": exclude}
        text, tag = row.text(columns["text"]), row.text(columns["category"])
        prompts.append(SuitePrompt(f"{number:05d}", text, tag, questions=questions, meta=meta))
    return prompts


def _geneval_questions(include: list[dict[str, Any]], exclude: list[dict[str, Any]]) -> Iterator[ChecklistQuestion]:
    """One question for each object that is to be there, and for its count, colour and position."""
    limits = {item["class"]: int(item["count"]) for item in exclude}
    for number, item in enumerate(include, 1):
        name, count = str(item["class"]), int(item["count"])
        one = str(number)
        article = "an" if name[:1].lower() in "aeiou" else "a"
        yield ChecklistQuestion(one, f"Is there {article} {name} in the picture?", "entity", about=name)
        if count > 1:
            # "count + 1" among what is excluded means that more of them are wrong too.
            exactly = limits.get(name) == count + 1
            text = f"Are there {'exactly' if exactly else 'at least'} {count} of these in the picture: {name}?"
            yield ChecklistQuestion(f"{one}.count", text, "count", parents=(one,), about=f"{count} {name}")
        if item.get("color"):
            text = f"Look at the {name} in the picture: is its colour {item['color']}?"
            yield ChecklistQuestion(f"{one}.colour", text, "colour", parents=(one,), about=f"{name}: {item['color']}")
        if item.get("position"):
            relation, other = str(item["position"][0]), int(item["position"][1])
            place = {"left of": "to the left of", "right of": "to the right of"}.get(relation, relation)
            target = str(include[other]["class"])
            yield ChecklistQuestion(
                f"{one}.position", f"Is the {name} {place} the {target} in the picture?", "position",
                parents=(one, str(other + 1)), about=f"{name} {relation} {target}",
            )  # fmt: skip
    asked = {str(item["class"]) for item in include}
    for number, item in enumerate(exclude, 1):
        if item["class"] not in asked:
            text = f"Is the picture free of this: {item['class']}?"
            yield ChecklistQuestion(f"without.{number}", text, "absence", about=f"no {item['class']}")


def read_detailmaster(entry: SuiteEntry, path: Path) -> list[SuitePrompt]:
    """Its polished prompts, with questions of ours from what it lists of each; ids are the source set and the image's stem."""
    file = find_file(path, [entry.take({"file": "DetailMaster_Dataset.json"})["file"]], "see its entry in suites.yaml.")
    columns = {"text": "polished_prompt", "image": "image_id", "category": "dataset_target", **entry.columns}
    prompts = []
    for row in read_rows(file, list(columns.values())):
        origin, image = row.text(columns["category"]), row.text(columns["image"])
        meta = {"image_id": image, "target": row.text("mini_bench_target", needed=False)}
        questions = tuple(_detailmaster_questions(row))
        name = f"{origin}_{Path(image).stem}"
        prompts.append(SuitePrompt(name, row.text(columns["text"]), origin, questions=questions, meta=meta))
    return prompts


def _detailmaster_questions(row: Row) -> Iterator[ChecklistQuestion]:
    """Is each character there, is it like that, is it there, and do the scene's sentences hold?"""
    attributes = _objects_in(row, "character_attributes", "main_character", "characteristics_list")
    locations = _objects_in(row, "character_locations", "main_character", "position")
    names = list(dict.fromkeys(str(part["main_character"]) for part in (*attributes, *locations)))
    ids = {name: str(number) for number, name in enumerate(names, 1)}
    for name in names:
        yield ChecklistQuestion(ids[name], f"Does the picture show this: {name}?", "entity", about=name)
        wanted = (part["characteristics_list"] for part in attributes if str(part["main_character"]) == name)
        said = [_said(str(one)) for values in wanted for one in (values if isinstance(values, list) else [values])]
        for number, one in enumerate(dict.fromkeys(said), 1):
            text = f"Look at this in the picture: {name}. Does this describe it: {one}?"
            yield ChecklistQuestion(f"{ids[name]}.attribute.{number}", text, "attribute", parents=(ids[name],), about=one)
        places = dict.fromkeys(str(p["position"]) for p in locations if str(p["main_character"]) == name)
        for number, place in enumerate(places, 1):
            text = f"Look at this in the picture: {name}. Is it in this part of the picture: {place}?"
            yield ChecklistQuestion(f"{ids[name]}.location.{number}", text, "location", parents=(ids[name],), about=place)
    for scene in _objects_in(row, "scene_attributes", "scene_attribute", "content"):
        kind = str(scene["scene_attribute"])
        contents = scene["content"] if isinstance(scene["content"], list) else [scene["content"]]
        sentences = [sentence for content in contents for sentence in _sentences(str(content))]
        for number, sentence in enumerate(sentences, 1):
            category = "relation" if kind == "spatial" else "scene"
            text = f"Does this hold for the picture: {sentence}"
            yield ChecklistQuestion(f"{kind}.{number}", text, category, detail=kind, about=sentence)


def _said(text: str) -> str:
    return re.sub(r"\s*:\s*", ": ", text.strip())


def _sentences(text: str) -> list[str]:
    """The sentences of one entry; some entries are lists of lists, written out as text."""
    if not text.lstrip().startswith("["):
        return [text.strip()] if text.strip() else []
    parts = re.split(r"[\"']?\s*\][\"']?\s*,\s*[\"']?\[\s*[\"']?", text)
    return [part for part in (part.strip("[]\"' \\") for part in parts) if part]


def _objects_in(row: Row, key: str, *parts: str) -> list[dict[str, Any]]:
    """A list of objects with ``parts`` that a row may hold; UserError where it holds something else."""
    value = row.values.get(key) or []
    if not isinstance(value, list) or not all(isinstance(one, dict) and all(p in one for p in parts) for one in value):
        raise UserError(f"{row.where}: {key} is not a list of objects with {' and '.join(parts)}; get the file again.")
    return value
