"""Suites: lists of prompts that a model is judged on, each with what its source says about it, and safe names for them."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from paradiffusion.data.captions import count_words
from paradiffusion.randomness import seed_from

# Words, upper ends included; CLIP's 77 tokens are about the first two bands, Llama's 512 all of them. The bands are our choice.
BANDS: Final = ((25, "up to 25"), (77, "26-77"), (128, "78-128"), (256, "129-256"), (None, "over 256"))
BAND_NAMES: Final = tuple(name for _, name in BANDS)


@dataclass(frozen=True)
class ChecklistQuestion:
    """A yes/no question about a picture; "yes" means that the picture follows the prompt.

    Attributes:
        category: broad kind, such as "entity", "attribute", "location"; ``detail`` a finer one or "".
        parents: ids of questions without whose "yes" this one cannot be "yes" (no object, no attribute).
        about: what it asks for, in short ("the temple: golden"); "" where ``text`` says it.
    """

    id: str
    text: str
    category: str = ""
    detail: str = ""
    parents: tuple[str, ...] = ()
    about: str = ""


@dataclass(frozen=True)
class SuitePrompt:
    """One prompt: an id that is unique in its suite, stable and safe as a file name; a category, or ""; height and width in pixels, None
    for the model's own; its checklist; and in ``meta``, as JSON, whatever else its source says."""

    id: str
    text: str
    category: str = ""
    height: int | None = None
    width: int | None = None
    questions: tuple[ChecklistQuestion, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def words(self) -> int:
        return count_words(self.text)

    @property
    def band(self) -> str:
        return next(name for end, name in BANDS if end is None or self.words <= end)

    def seed(self, suite: str) -> int:
        """The seed of this prompt's first image, the same in every run and for every model, below 2^31."""
        return seed_from("evaluation", suite, self.id) % (1 << 31)


@dataclass(frozen=True)
class Suite:
    """Prompts under a short name, as ``suite=`` takes it.

    Attributes:
        source: where it comes from, in a sentence; licence: as its page gives it.
        measures: names of scores that belong to it by its authors' own procedure, such as "dpg".
        rows: where each prompt stands in the whole suite, of which these are some; () where they are all of it.
    """

    name: str
    title: str
    prompts: tuple[SuitePrompt, ...]
    source: str = ""
    licence: str = ""
    measures: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()

    @property
    def fingerprint(self) -> str:
        """A hash of the ids, texts and sizes, in order: images of another list of prompts are not compared with these."""
        rows = [[p.id, p.text, p.height, p.width] for p in self.prompts]
        return hashlib.sha256(json.dumps([self.name, rows], ensure_ascii=True).encode()).hexdigest()[:16]

    def first(self, count: int | None) -> Suite:
        """The suite with at most ``count`` prompts, spread evenly over the list, so that categories keep their shares."""
        total = len(self.prompts)
        if count is None or count >= total:
            return self
        return self.only([(number * total) // count for number in range(count)])

    def only(self, places: Sequence[int]) -> Suite:
        """The suite with the prompts at ``places`` of this one."""
        rows = self.rows or range(len(self.prompts))
        chosen = tuple(self.prompts[place] for place in places)
        return replace(self, prompts=chosen, rows=tuple(rows[place] for place in places))


def by_id(prompts: Sequence[SuitePrompt]) -> dict[str, SuitePrompt]:
    return {prompt.id: prompt for prompt in prompts}


MAX_BYTES: Final = 100
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9._-]+")
_FURTHER: Final = re.compile(r"^(.+)_[0-9]+$")


def safe_ids(names: Sequence[str]) -> list[str]:
    """A distinct name for each of ``names``: letters, digits, ".", "_" and "-", at most 100 bytes.

    A name that is safe stays. Another keeps what of it is safe and gets a hash of the whole, so that it is the same whatever stands
    beside it; only of equal names (letter case aside, as for some file systems) do the later ones get their number. "cat_1" beside
    "cat" counts as unsafe: it is what the second image of "cat" is called."""
    whole = {name.casefold() for name in names}
    made = []
    for name in names:
        further = _FURTHER.match(name)
        clash = further is not None and further.group(1).casefold() in whole
        safe = name and not _UNSAFE.search(name) and name[0] not in ".-" and len(name) <= MAX_BYTES
        if clash or not safe:
            digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
            name = f"{_UNSAFE.sub('-', name).strip('.-_')[: MAX_BYTES - 20] or 'prompt'}-{digest}"
        made.append(name)
    first: set[str] = set()
    seen: Counter[str] = Counter()
    taken = {name.casefold() for name in made}
    for place, name in enumerate(made):
        key = name.casefold()
        if key in first:
            while True:
                seen[key] += 1
                other = f"{name[: MAX_BYTES - 10]}-{seen[key] + 1}"
                if other.casefold() not in taken:
                    break
            made[place] = other
            taken.add(other.casefold())
        first.add(made[place].casefold())
    return made
