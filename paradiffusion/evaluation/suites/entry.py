"""What configs/suites.yaml says of a suite: where its files lie, how they are laid out, what they must hold."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final

import yaml

from paradiffusion.errors import UserError
from paradiffusion.evaluation.plain_yaml import read_yaml
from paradiffusion.evaluation.suites.files import read_text
from paradiffusion.evaluation.suites.ids import safe_ids
from paradiffusion.repository import ROOT

TABLE: Final = ROOT / "configs" / "suites.yaml"


@dataclass(frozen=True)
class Expected:
    """What the released files hold; None where it is not checked.

    Attributes:
        categories: prompts of each category.
        checklists: prompts with questions, where the suite has a folder of them.
        sha256: of the prompts and their ids, as ``paradiffusion.evaluation.suites.expected.digest`` makes it.
        rows: four hex digits for each prompt, in order, by which the first one that differs is found.
    """

    prompts: int | None = None
    categories: dict[str, int] | None = None
    checklists: int | None = None
    sha256: str | None = None
    rows: str | None = None


@dataclass(frozen=True)
class SuiteEntry:
    """One suite of the table.

    Attributes:
        name: as ``suite=`` takes it.
        format: one of the layouts in paradiffusion.evaluation.suites.load.
        path: a folder or file; "" where none is needed.
        source: paper, page and repository; licence: as its page gives it; note: what a reader of its numbers must know.
        get: how to get its files, for people; size: what they weigh.
        columns: the file's column for each part ("text", "id", "category", ...), where files may differ.
        options: of its layout.
        choose: so many prompts are drawn from it, always the same ones; None for all.
        measures: scores that belong to it by its authors' own procedure.
        allow_other: what differs from ``expected`` is accepted.
    """

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
            f"suite={self.name}: {found}; expected {expected}: get the released files ({where}), or accept these with "
            "allow_other=true."
        )

    def take(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """The options of its layout over their defaults. UserError for one that the layout does not have."""
        _known(f"suite={self.name}: option", self.options, tuple(defaults))
        found = {**defaults, **self.options}
        for key, default in defaults.items():
            if default is not None and not isinstance(found[key], type(default)):
                raise UserError(
                    f"suite={self.name}: the option {key} is {found[key]!r}; expected a value like {default!r}."
                )
        return found


# What a table may say; name comes from its key, allow_other from the command line.
_KEYS: Final = tuple(f.name for f in fields(SuiteEntry) if f.name not in ("name", "allow_other"))
_KINDS: Final = {"expected": dict, "columns": dict, "options": dict, "measures": list, "choose": int}


def read_table(path: Path = TABLE) -> dict[str, SuiteEntry]:
    """The suites of a YAML file by name. UserError for a file or an entry that is wrong."""
    values = _yaml(path)
    return {str(name): _entry(str(name), value, path) for name, value in values.items() if str(name)[:1] != "_"}


def find_entry(name: str, table: Path = TABLE) -> SuiteEntry:
    """The suite that ``suite=`` names: one of the table, a YAML file of one's own, or prompts themselves.

    A YAML file holds one suite's keys, or a table of them of which "mine.yaml:NAME" chooses one; paths in it are from its
    own folder. A .txt, .csv or .jsonl file and a folder of .txt files need no table.
    """
    entries = read_table(table)
    if name in entries:
        return entries[name]
    file, _, part = name.partition(".yaml:") if ".yaml:" in name else name.partition(".yml:")
    file = name[: -len(part) - 1] if part else name
    if Path(file).suffix.lower() in (".yaml", ".yml"):
        return _own(Path(file).expanduser(), part)
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


def _own(path: Path, part: str) -> SuiteEntry:
    values = _yaml(path)
    if "format" in values:
        (name,) = safe_ids([path.stem])
        found = _entry(name, values, path)
    else:
        entries = read_table(path)
        if not part and len(entries) != 1:
            raise UserError(f"suite={path} holds {', '.join(entries) or 'no suite'}; choose one as suite={path}:NAME.")
        if part and part not in entries:
            raise UserError(
                f"suite={path}:{part}: the file holds {', '.join(entries) or 'no suite'}; choose one of them."
            )
        found = entries[part or next(iter(entries))]
    if found.path and not Path(found.path).expanduser().is_absolute():
        found = replace(found, path=str(path.parent / found.path))
    return found


def _yaml(path: Path) -> dict[Any, Any]:
    try:
        values = read_yaml(read_text(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise UserError(
            f"{path} is no YAML ({getattr(error, 'problem', None) or 'not understood'}{where}); mend it."
        ) from None
    if not isinstance(values, dict):
        raise UserError(
            f"{path} holds no table of suites; expected NAME: {{format: ..., path: ...}} as in {TABLE.name}."
        )
    return values


def _entry(name: str, values: Any, path: Path) -> SuiteEntry:
    where = f"{path}: suite {name}"
    if not isinstance(values, dict) or not values.get("format"):
        raise UserError(f"{where} names no format; expected a mapping such as {{format: folder, path: prompts}}.")
    if safe_ids([name]) != [name]:
        raise UserError(f"{where}: the name becomes a folder's; expected letters, digits, '.', '_' and '-'.")
    _known(f"{where}: key", values, _KEYS)
    given = {key: value for key, value in values.items() if value is not None}
    for key, value in given.items():
        kind = _KINDS.get(key, str)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"{where}: {key} is {value!r}; expected {_PLAIN[kind]}.")
    expected = given.get("expected", {})
    _known(f"{where}: expected", expected, tuple(f.name for f in fields(Expected)))
    for key, value in list(expected.items()):
        kind = {"prompts": int, "checklists": int, "categories": dict}.get(key, str)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise UserError(f"{where}: expected: {key} is {value!r}; expected {_PLAIN[kind]}.")
    if expected.get("rows"):
        expected = {**expected, "rows": "".join(expected["rows"].split())}
    texts = {key: " ".join(given[key].split()) for key in ("source", "licence", "note", "title") if key in given}
    columns = {str(part): str(column) for part, column in given.get("columns", {}).items()}
    measures = tuple(str(measure) for measure in given.get("measures", ()))
    return SuiteEntry(
        name,
        **{**given, **texts, "expected": Expected(**expected), "columns": columns, "measures": measures},
    )


_PLAIN: Final = {dict: "a mapping", list: "a list", int: "a whole number", str: "a text (in quotes)"}


def _known(what: str, values: Mapping[Any, Any], known: tuple[str, ...]) -> None:
    for key in values:
        if key not in known:
            hint = next(iter(difflib.get_close_matches(str(key), known, 1)), None)
            accepted = (
                f"did you mean {hint} (known are {', '.join(known)})"
                if hint
                else f"known are {', '.join(known) or 'none'}"
            )
            raise UserError(f"{what} {key!r} is unknown; {accepted}.")
