"""Table of suites (configs/suites.yaml): where their files lie, how they are laid out, what they must hold, where to get them."""

from __future__ import annotations

import difflib
import hashlib
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from statistics import median
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from paradiffusion.errors import UserError
from paradiffusion.evaluation.suites.suite import BAND_NAMES, Suite, SuitePrompt, safe_ids
from paradiffusion.evaluation.suites.suite_files import read_text, read_yaml
from paradiffusion.repository import ROOT

TABLE: Final = ROOT / "configs" / "suites.yaml"


@dataclass(frozen=True)
class Expected:
    """What the released files hold, None where it is not checked: prompts, also by category; how many have a checklist; the SHA-256 of
    ids and texts, and four hex digits for each row, by which the first one that differs is found (both as ``digest`` makes them)."""

    prompts: int | None = None
    categories: dict[str, int] | None = None
    checklists: int | None = None
    sha256: str | None = None
    rows: str | None = None


@dataclass(frozen=True)
class SuiteEntry:
    """One suite of the table; configs/suites.yaml explains the keys. ``allow_other``: what differs from ``expected`` is accepted."""

    name: str
    format: str
    title: str = ""
    path: str = ""
    source: str = ""
    licence: str = ""
    note: str = ""
    get: str = ""
    size: str = ""
    expected: Expected = Expected()
    columns: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    choose: int | None = None
    measures: tuple[str, ...] = ()
    allow_other: bool = False

    def refuse(self, found: str, expected: str) -> UserError:
        """The error for files that are not the released ones."""
        where = f"`python scripts/download.py what={self.name}` says where" if self.get else "its page has them"
        return UserError(
            f"suite={self.name}: {found}; expected {expected}: get the released files ({where}), or accept these with allow_other=true."
        )

    def take(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """The options of its layout over their defaults. UserError for one that the layout does not have."""
        _known(f"suite={self.name}: option", self.options, tuple(defaults))
        found = {**defaults, **self.options}
        for key, default in defaults.items():
            if default is not None and not isinstance(found[key], type(default)):
                raise UserError(f"suite={self.name}: the option {key} is {found[key]!r}; expected a value like {default!r}.")
        return found


# What a table may say; name comes from its key, allow_other from the command line.
_KEYS: Final = tuple(f.name for f in fields(SuiteEntry) if f.name not in ("name", "allow_other"))


def read_table(path: Path = TABLE) -> dict[str, SuiteEntry]:
    """The suites of a YAML file by name. UserError for a file or an entry that is wrong."""
    values = _yaml(path)
    return {str(name): _entry(str(name), value, path) for name, value in values.items() if str(name)[:1] != "_"}


def find_entry(name: str) -> SuiteEntry:
    """The suite that ``suite=`` names: one of the table, a YAML file of one's own, or prompts themselves.

    A YAML file holds one suite's keys, or a table of one; paths in it are from its own folder. A .txt, .csv or .jsonl file and a
    folder of .txt files need no table."""
    entries = read_table()
    if name in entries:
        return entries[name]
    if Path(name).suffix.lower() in (".yaml", ".yml"):
        return _own(Path(name).expanduser())
    path = Path(name).expanduser()
    if path.is_dir() or path.suffix.lower() in (".txt", ".csv", ".jsonl"):
        layout = "folder" if path.is_dir() else "prompt_file"
        (safe,) = safe_ids([path.resolve().name if path.is_dir() else path.stem])
        return SuiteEntry(safe, layout, title=path.name or safe, path=str(path), source=f"prompts of {path.name}")
    hint = next(iter(difflib.get_close_matches(name, entries, 1)), None)
    raise UserError(
        f"suite={name} is unknown{f' (did you mean {hint}?)' if hint else ''}; choose one of {', '.join(entries)}, a folder "
        "of .txt files, a .txt, .csv or .jsonl file of prompts, or a .yaml file that describes your own."
    )


def _own(path: Path) -> SuiteEntry:
    values = _yaml(path)
    if "format" not in values:
        entries = read_table(path)
        if len(entries) != 1:
            raise UserError(f"suite={path} holds {', '.join(entries) or 'no suite'}; expected one.")
        (found,) = entries.values()
    else:
        (name,) = safe_ids([path.stem])
        found = _entry(name, values, path)
    if found.path and not Path(found.path).expanduser().is_absolute():
        found = replace(found, path=str(path.parent / found.path))
    return found


def _yaml(path: Path) -> dict[Any, Any]:
    try:
        values = read_yaml(read_text(path))
    except ValueError as error:
        raise UserError(f"{path} is no YAML ({error}); mend it.") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no table of suites; expected NAME: {{format: ..., path: ...}} as in {TABLE.name}.")
    return values


def _entry(name: str, values: Any, path: Path) -> SuiteEntry:
    where = f"{path}: suite {name}"
    if not isinstance(values, dict) or not values.get("format"):
        raise UserError(f"{where} names no format; expected a mapping such as {{format: folder, path: prompts}}.")
    if safe_ids([name]) != [name]:
        raise UserError(f"{where}: the name becomes a folder's; expected letters, digits, '.', '_' and '-'.")
    _known(f"{where}: key", values, _KEYS)
    given = {key: value for key, value in values.items() if value is not None}
    if isinstance(given.get("expected"), dict):
        _known(f"{where}: expected", given["expected"], tuple(f.name for f in fields(Expected)))
    try:
        found = TypeAdapter(SuiteEntry).validate_python({"name": name, **given})
    except ValidationError as error:
        first = error.errors()[0]
        key = ": ".join(map(str, first["loc"]))
        raise UserError(f"{where}: {key} is {first['input']!r}; {first['msg'][:1].lower()}{first['msg'][1:]}.") from None
    texts: dict[str, Any] = {key: " ".join(getattr(found, key).split()) for key in ("source", "licence", "note", "title")}
    rows = "".join((found.expected.rows or "").split()) or None
    return replace(found, **texts, expected=replace(found.expected, rows=rows))


def _known(what: str, values: Mapping[Any, Any], known: tuple[str, ...]) -> None:
    for key in values:
        if key not in known:
            hint = next(iter(difflib.get_close_matches(str(key), known, 1)), None)
            accepted = f"did you mean {hint} (known are {', '.join(known)})" if hint else f"known are {', '.join(known) or 'none'}"
            raise UserError(f"{what} {key!r} is unknown; {accepted}.")


ROW_DIGITS: Final = 4


def digest(prompts: Sequence[SuitePrompt]) -> tuple[str, str]:
    """The SHA-256 of ids and texts, and four hex digits of each row's own, in order. Texts count by their words, in Unicode's composed
    form, so that a file which was saved with other line ends is the same."""
    rows = [f"{prompt.id}\x1f{' '.join(unicodedata.normalize('NFC', prompt.text).split())}" for prompt in prompts]
    short = (hashlib.sha256(row.encode()).hexdigest()[:ROW_DIGITS] for row in rows)
    return hashlib.sha256("\x1e".join(rows).encode()).hexdigest(), "".join(short)


def check_prompts(entry: SuiteEntry, prompts: Sequence[SuitePrompt]) -> None:
    """UserError, with the difference named, unless the prompts, with the ids of the file, are those of ``entry.expected``."""
    if entry.allow_other:
        return
    expected = entry.expected
    sha256, rows = digest(prompts)
    first = _first_difference(prompts, rows, expected.rows) if sha256 != expected.sha256 else ""
    if expected.prompts is not None and len(prompts) != expected.prompts:
        raise entry.refuse(f"{len(prompts)} prompts were found{first and f' ({first})'}", str(expected.prompts))
    found = Counter(prompt.category for prompt in prompts)
    for category, count in (expected.categories or {}).items():
        if found[category] != count:
            detail = first and f" ({first})"
            raise entry.refuse(f"{found[category]} prompts of the category {category!r} were found{detail}", str(count))
    unknown = sorted(set(found) - set(expected.categories or found))
    if unknown:
        raise entry.refuse(f"the category {unknown[0]!r} was found", f"one of {', '.join(map(repr, expected.categories or {}))}")
    if expected.sha256 is not None and sha256 != expected.sha256:
        raise entry.refuse(first or "the prompts were changed", f"the SHA-256 {expected.sha256[:12]}...")


def check_checklists(entry: SuiteEntry, prompts: Sequence[SuitePrompt]) -> None:
    """UserError unless as many prompts have questions as ``entry.expected`` says, or none has."""
    listed = sum(bool(prompt.questions) for prompt in prompts)
    if not entry.allow_other and entry.expected.checklists is not None and listed not in (0, entry.expected.checklists):
        raise entry.refuse(f"{listed} checklists were found", str(entry.expected.checklists))


def _first_difference(prompts: Sequence[SuitePrompt], found: str, released: str | None) -> str:
    """The first row whose digits differ, in words; "" where that is not known."""
    if released is None:
        return ""
    for number, prompt in enumerate(prompts):
        place = slice(number * ROW_DIGITS, (number + 1) * ROW_DIGITS)
        if found[place] != released[place]:
            return f"row {number + 1}, {prompt.id!r}, is the first that is not the released one"
    return f"row {len(prompts) + 1} is the first that is missing"


def where_from(entry: SuiteEntry) -> str:
    """Source, licence, size, how to get it, and what to type then."""
    lines = [f"{entry.name}: {entry.title or entry.name}"]
    lines += [f"  {key}: {text}" for key in ("source", "note", "licence", "size") if (text := getattr(entry, key))]
    if entry.get:
        lines += ["  get it:", *(f"    {line}" for line in entry.get.strip().splitlines())]
    if entry.path:
        lines.append(f"  it is looked for in {entry.path}, or where suite_path= says")
    lines.append(f"  use it: python scripts/evaluate.py ckpt=... suite={entry.name}")
    return "\n".join(lines)


def what_it_holds(suite: Suite) -> str:
    """Counts of prompts, questions, words, length bands and categories."""
    words = [prompt.words for prompt in suite.prompts]
    listed = [len(prompt.questions) for prompt in suite.prompts if prompt.questions]
    bands = Counter(prompt.band for prompt in suite.prompts)
    lines = [
        f"{suite.name}: {len(suite.prompts)} prompts of {min(words)} to {max(words)} words, median {median(words):g}",
        "  words: " + ", ".join(f"{name} {bands[name]}" for name in BAND_NAMES if bands[name]),
    ]
    if listed:
        lines.append(f"  questions: {sum(listed)}, for {len(listed)} of the prompts")
    categories = Counter(prompt.category for prompt in suite.prompts if prompt.category)
    if categories:
        lines.append("  categories: " + ", ".join(f"{name} {count}" for name, count in categories.most_common()))
    return "\n".join(lines)


def suite_list() -> str:
    """Title, source, licence and size of each suite of the table, for people."""
    entries = read_table().values()
    width = max((len(entry.name) for entry in entries), default=0)
    lines = []
    for entry in entries:
        lines.append(f"  {entry.name:{width}}  {entry.title}")
        about = (("from", entry.source), ("licence", entry.licence), ("size", entry.size))
        lines += [f"  {'':{width}}    {label}: {text}" for label, text in about if text]
    return "\n".join([*lines, "How to get one: python scripts/download.py what=<its name>"])
