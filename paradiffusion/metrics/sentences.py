"""A text cut into sentences, the parts by which paragraphs are judged."""

from __future__ import annotations

import re
from typing import Final

# An end mark, closing quotes, then what begins a sentence; marks of scripts without spaces or capitals end one alone.
_END: Final = re.compile(r"[.!?…][\"'”’)\]]*(?=\s+[\"'“‘(\[]?[A-Z0-9À-ÖØ-Þ])|[。！？।؟][”’」』）]*(?=.)")
# "Dr. Smith", "e.g. A", "St. Ives": no sentence ends there.
_ABBREVIATION: Final = re.compile(r"\b(?:mr|mrs|ms|dr|st|mt|prof|vs|no|approx|e\.g|i\.e|etc|[a-z])\.$", re.IGNORECASE)


def sentences(text: str) -> list[str]:
    """The sentences of ``text``, each with its end mark; a text without one is one sentence, an empty one none."""
    parts, start = [], 0
    for match in _END.finditer(text):
        # Only its last word is looked at: texts may be long, and without an end that counts.
        if not _ABBREVIATION.search(text[max(start, match.end() - 12) : match.end()]):
            parts.append(text[start : match.end()].strip())
            start = match.end()
    rest = text[start:].strip()
    return [*parts, rest] if rest else parts
