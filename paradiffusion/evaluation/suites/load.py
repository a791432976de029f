"""From the name of a suite to its prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from paradiffusion.checks import choice
from paradiffusion.errors import UserError
from paradiffusion.evaluation.suites.checklist_readers import read_detailmaster, read_dpg, read_geneval, read_paraprompts
from paradiffusion.evaluation.suites.prompt_readers import read_coco, read_folder, read_prompt_file, read_rows_as_prompts, read_scenes
from paradiffusion.evaluation.suites.suite import Suite, SuitePrompt, safe_ids
from paradiffusion.evaluation.suites.suite_table import SuiteEntry, check_checklists, check_prompts, find_entry, read_table
from paradiffusion.randomness import seed_from
from paradiffusion.repository import find_shipped

FORMATS: Final[dict[str, Callable[[SuiteEntry, Path], list[SuitePrompt]]]] = {
    "paraprompts": read_paraprompts,
    "dpg": read_dpg,
    "geneval": read_geneval,
    "coco": read_coco,
    "table": read_rows_as_prompts,
    "detailmaster": read_detailmaster,
    "folder": read_folder,
    "prompt_file": read_prompt_file,
    "scenes": read_scenes,
}


def suites() -> list[str]:
    return list(read_table())


def load_suite(
    name: str, path: str | None = None, count: int | None = None, allow_other: bool = False, options: Mapping[str, Any] | None = None
) -> Suite:
    """The suite that ``suite=`` names.

    Args:
        name: of the table; or a folder of .txt files, a .txt, .csv or .jsonl file of prompts, or a .yaml file of one's own.
        path: where its files lie, instead of where the table says.
        count: at most so many prompts, spread over the list; pairs stay together. Of the scenes it is the first so many.
        allow_other: accept files that differ from the released ones.
        options: of the suite's layout, over the table's, such as {"scale": 2} for the scenes; {"language": "zh"} is the suite NAME_zh.
    Raises:
        UserError: for an unknown name, files that are missing, malformed or not the released ones, and an empty suite.
    """
    options = dict(options or {})
    language = options.pop("language", "en")
    entry = replace(find_entry(name if language == "en" else f"{name}_{language}"), allow_other=allow_other)
    choice(f"suite={entry.name}: format", entry.format, tuple(FORMATS))
    place = path or entry.path
    entry = replace(entry, path=place and str(find_shipped(place)), options={**entry.options, **options})
    if entry.format == "scenes" and count is not None:
        # There are as many as one asks for, and the first ones are those that training validates on.
        entry = replace(entry, options={**entry.options, "number": count})
    prompts = FORMATS[entry.format](entry, _place(entry))
    if not prompts:
        raise UserError(f"suite={entry.name}: {entry.path} holds no prompts; expected at least one.")
    _check_characters(entry, prompts)
    check_prompts(entry, prompts)
    check_checklists(entry, prompts)
    prompts = _named(prompts)
    if entry.choose is not None:
        prompts = _chosen(prompts, entry.name, count or entry.choose)
    source = ". ".join(text.strip().rstrip(".") for text in (entry.source, entry.note) if text)
    found = Suite(entry.name, entry.title or entry.name, tuple(prompts), source, entry.licence, entry.measures)
    return _first(found, count)


def _place(entry: SuiteEntry) -> Path:
    place = Path(entry.path or ".").expanduser()
    if entry.format != "scenes" and not place.exists():
        advice = f"python scripts/download.py what={entry.name}" if entry.get else "check the path"
        raise UserError(
            f"suite={entry.name}: {place} does not exist (looked in {Path.cwd()}); get its files ({advice}), or name their "
            "place with suite_path=."
        )
    return place


def _check_characters(entry: SuiteEntry, prompts: list[SuitePrompt]) -> None:
    """JSON can spell half of a character pair, which no tokenizer and no file takes."""
    for number, prompt in enumerate(prompts, 1):
        for text in (prompt.id, prompt.text, prompt.category, *(question.text for question in prompt.questions)):
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise UserError(
                    f"suite={entry.name}: prompt {number} holds {text[error.start]!r}, half of a character pair; expected whole "
                    "characters: get its file again."
                ) from None


def _named(prompts: list[SuitePrompt]) -> list[SuitePrompt]:
    """The prompts under names that are safe; a name that had to change is kept in ``meta["original_id"]``."""
    ids = safe_ids([prompt.id for prompt in prompts])
    return [
        prompt if prompt.id == new else replace(prompt, id=new, meta={**prompt.meta, "original_id": prompt.id})
        for prompt, new in zip(prompts, ids, strict=True)
    ]


def _chosen(prompts: list[SuitePrompt], name: str, number: int) -> list[SuitePrompt]:
    """``number`` of the prompts, at random but always the same ones: a smaller choice is the beginning of a larger one."""
    return sorted(prompts, key=lambda prompt: seed_from("suite", name, prompt.id))[:number]


def _first(suite: Suite, count: int | None) -> Suite:
    """``suite.first(count)``, but both or none of a pair."""
    pairs: dict[Any, list[SuitePrompt]] = {}
    for prompt in suite.prompts:
        pairs.setdefault(prompt.meta.get("pair", prompt.id), []).append(prompt)
    if len(pairs) == len(suite.prompts) or count is None:
        return suite.first(count)
    leaders = replace(suite, prompts=tuple(group[0] for group in pairs.values()))
    kept = {prompt.meta.get("pair", prompt.id) for prompt in leaders.first(max(1, count // 2)).prompts}
    return suite.only([place for place, p in enumerate(suite.prompts) if p.meta.get("pair", p.id) in kept])
