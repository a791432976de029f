"""Checks of captions that a model wrote, and what of them can be mended.

Language models that describe pictures fail in a few ways again and again: they refuse, loop, run into the token limit, talk
about "the image" instead of what it shows, or write lists. A training set made of such texts teaches them.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from paradiffusion.data.captions import clean, count_words
from paradiffusion.metrics.sentences import sentences
from paradiffusion.metrics.vlm import spoken

EMPTY, TOO_SHORT, TOO_LONG, CUT = "empty", "too_short", "too_long", "cut"
REPEATED, LOOP, REFUSAL, FILLER = "repeated_sentence", "loop", "refusal", "filler"
MARKDOWN, MARKERS, CHATTER = "markdown", "chat_markers", "chatter"
LANGUAGE, UNREADABLE = "language", "unreadable"
REASONS: Final = {
    EMPTY: "no text at all",
    TOO_SHORT: "fewer words than asked for",
    TOO_LONG: "more words than asked for",
    CUT: "ends in the middle of a sentence, and too little is left without it",
    REPEATED: "says a sentence twice, or nearly so",
    LOOP: "repeats the same few words",
    REFUSAL: "declines instead of describing",
    FILLER: "speaks of the picture as a picture where that could not be removed",
    MARKDOWN: "has lists, headings, emphasis marks or JSON",
    MARKERS: "holds the chat format's own marks",
    CHATTER: "talks to whoever asked, or of the task",
    LANGUAGE: "is not in the language asked for",
    UNREADABLE: "the picture does not decode, or the server refuses it",
}
# A filler is counted, but costs a sample nothing unless asked for: the rest of such a caption is as good as any.
DEFAULT_REJECT: Final = tuple(name for name in REASONS if name != FILLER)
TRIMMED, OPENING, CLOSING = "trimmed", "opening_removed", "closing_removed"
NOTES: Final = {
    TRIMMED: "a cut sentence at the end was left out",
    OPENING: 'an opening such as "the image shows" was removed',
    CLOSING: "an offer to help or a count of words at the end was removed",
}

_LABEL = re.compile(r"^[^\w{\[]{0,4}(?:detailed )?(?:caption|description)\W{0,4}:\s*", re.IGNORECASE)
_PREAMBLE = re.compile(r"^(?:sure|certainly|of course|here(?: is|'s|’s))\b[^.:\n]{0,120}[:!]\s+", re.IGNORECASE)
_PICTURE = r"(?:image|picture|photo|photograph|scene|artwork|illustration)"
_VERB = r"(?:shows|depicts|displays|features|captures|presents|portrays|illustrates|contains)"
# "The image shows a dog" can go; "The image is divided" or "The image shows how" would not stand without it.
_OPENING = re.compile(
    rf"^(?:(?:the|this) (?:\w+ ){{0,2}}{_PICTURE} {_VERB}|this is an? {_PICTURE} (?:of|showing|depicting)"
    rf"|in (?:the|this) {_PICTURE}(?:,? (?:there (?:is|are)|we (?:can )?see|you can see))?)"
    r"[,:]? (?=(?:an?|the|two|three|four|five|six|several|many|some|various|multiple|one)\b)",
    re.IGNORECASE,
)
_FILLER = re.compile(
    rf"\b(?:the|this) (?:[\w-]+ ){{0,2}}{_PICTURE} (?:also )?(?:{_VERB}|is|appears|seems|conveys|evokes|has)\b"
    rf"|\bin (?:the|this) {_PICTURE}\b|\bwe can see\b|^we see\b|\bas seen in\b|\bviewer(?:['’]s eyes?|s? can see)\b"
    rf"|^this is an? (?:[\w-]+ ){{0,2}}{_PICTURE}\b|\b(?:mood|tone|feel|composition) of the {_PICTURE}\b",
    re.IGNORECASE,
)
_REFUSAL = re.compile(
    r"\b(?:i(?:['’]m| am) (?:very )?(?:sorry|unable|not able)|i (?:cannot|can['’]t|could not|am unable to) "
    r"(?:see|view|assist|help|provide|describe|identify|comply|process|fulfil)|as an? (?:ai|artificial intelligence|"
    r"large language model)(?: (?:language )?(?:model|assistant|system|chatbot))?, |"
    r"as an? (?:ai|large)(?: language)? (?:model|assistant)|"
    r"i(?:['’]m| am) (?:just |only )?an? (?:ai|language model|assistant)|unable to (?:view|see|process|"
    r"analy[sz]e) (?:the |this )?(?:image|picture)|"
    r"no (?:image|picture)(?: (?:was|has been|is))? (?:provided|attached|uploaded)|i (?:don['’]t|"
    r"do not) see an? (?:image|picture)|i apologi[sz]e,? but|please (?:upload|provide|attach) (?:the |"
    r"an? )?(?:image|picture))",
    re.IGNORECASE,
)
# Whole sentences at the end, or alone, that are said to the one who asked.
_CLOSING = re.compile(
    r"^\W*(?:(?:i )?hope (?:this|that|it)\b.*\b(?:help|useful|description|caption|what you)"
    r"|(?:please )?(?:let me know|feel free)\b|(?:if|should) you (?:have|need|want|would like|['’]d like)\b"
    r"|would you like (?:me|to)\b|is there anything\b|(?:approximate )?word count\W|\(?\d+ words\W*$"
    r"|(?:please )?note(?: that)?:? (?:that )?(?:i|this (?:description|caption)|the (?:description|caption))\b"
    r"|this (?:description|caption|paragraph) (?:(?:captures|provides|aims|adheres|meets|avoids)\b"
    r"|(?:is|has|contains) (?:based|meant|intended|about|approximately|roughly|exactly|\d+|within|no)\b))",
    re.IGNORECASE,
)
# A model that thinks aloud about its task.
_CHATTER = re.compile(
    r"^(?:(?:okay|ok|alright|well|so|hmm)[,.] (?:let['’]?s|let me|the user|i)\b|let['’]s (?:see|start|begin|"
    r"describe)|let me (?:describe|start|see|look|think|write)"
    r"|first,? i (?:will|need|should|look)|(?:got it|understood)\b)|\bthe user (?:wants|asks|asked|is asking|"
    r"has asked|requested|needs)\b"
    r"|\bthe (?:prompt|instructions?|task) (?:asks?|says?|requires?|wants?)\b|\bas (?:you )?requested\b|"
    r"\bthis (?:description|caption) (?:adheres|meets|avoids|(?:is|has|contains) (?:based|meant|intended|about|"
    r"approximately|roughly|exactly|\d+|within|no))\b",
    re.IGNORECASE,
)
_JSON = re.compile(r"^\s*[\[{]\s*[\"'{\[]")
# What a sign or a page in the picture says.
_QUOTED = re.compile(r"\"[^\"]*\"|“[^”]*”|‘[^’]*’|(?<!\w)'[^']*'(?!\w)")
_MARKDOWN = re.compile(
    r"^\s{0,3}(?:#{1,6} |[-*+•–] |\d{1,2}[.)] |[a-z]\) )|\*\*|__\w|```|^\s*\|.*\|\s*$|(?<!\w)\*\w[^*\n]{0,60}\*(?!\w)"
    r"|^[ \t]*[A-Z][\w ]{0,40}:[ \t]*(?=\n)|^[ \t]*Title:",
    re.MULTILINE,
)
_MARKERS = re.compile(
    r"<\|[^|<>]{1,40}\|>|</?(?:s|image|img|think|bos|eos|pad|unk|start_of_turn|end_of_turn|end_of_utterance|"
    r"fake_token_around_image)>"
    r"|\[/?INST\]|<<SYS>>|^\W*(?i:user|assistant|human|system)\s*:",
    re.MULTILINE,
)  # fmt: skip
_END = re.compile(r"[.!?…。！？।؟][\"'”’」』）)\]]*$")
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
# English words that other European languages have not, or hardly ever.
_ENGLISH = frozenset([
    "the", "of", "and", "with", "to", "is", "are", "its", "his", "her", "their", "by", "from", "at", "that",
    "which", "this", "into", "while", "where", "there", "has", "have", "it", "behind", "against", "near", "above",
    "below", "beside", "under", "over", "between", "around", "across", "along", "through", "each", "both", "other",
    "another", "small", "large",
])  # fmt: skip
_MIN_WORDS_TO_JUDGE = 12
_SLIGHT = frozenset(("a", "an", "the", "also", "very"))
_STUCK_SIGN = re.compile(r"(\S)\1{11}")


@dataclass
class Limits:
    """What a caption must keep to: words, a language ("en", or "any" for no check), and the REASONS that reject one; others are counted."""

    low: int = 1
    high: int = 1000
    language: str = "en"
    reject: tuple[str, ...] = DEFAULT_REJECT


@dataclass
class Verdict:
    """A caption as it may be used, on one line and mended where that is simple, and which of REASONS (those too that do not reject) and
    NOTES were found in it."""

    text: str
    words: int
    found: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rejected: bool = False


def judge_text(raw: str, finished: bool, limits: Limits) -> Verdict:
    """What to make of a model's answer as it came; ``finished`` is False where the token limit ended it."""
    raw = spoken(raw)
    text, opened = remove_opening(clean(raw))
    text, closed = remove_closing(text)
    notes = [name for name, removed in ((OPENING, opened), (CLOSING, closed)) if removed]
    unquoted = _QUOTED.sub(" ", text)
    cut = bool(text) and (not finished or not _END.search(text))
    if cut:
        kept = last_whole_sentence(text)
        if kept and count_words(kept) >= limits.low:
            notes += [TRIMMED] if kept != text else []
            text, cut = kept, False
    words = count_words(text)
    tests = {
        EMPTY: not words,
        TOO_SHORT: 0 < words < limits.low,
        TOO_LONG: words > limits.high,
        CUT: cut,
        REPEATED: repeats_sentence(text),
        LOOP: loops(text),
        REFUSAL: bool(_REFUSAL.search(_QUOTED.sub(" ", text[:400]))),
        CHATTER: bool(_CHATTER.search(unquoted)),
        FILLER: bool(_FILLER.search(text)),
        MARKDOWN: bool(_MARKDOWN.search(_without_label(raw)) or _JSON.match(raw)),
        MARKERS: bool(_MARKERS.search(raw)),
        LANGUAGE: limits.language == "en" and bool(words) and not is_english(text),
    }
    found = [name for name, hit in tests.items() if hit]
    return Verdict(text, words, found, notes, rejected=any(name in limits.reject for name in found))


def remove_opening(text: str) -> tuple[str, bool]:
    """``text`` without a label, a preamble or an opening such as "The image shows", and whether one was there."""
    rest = _OPENING.sub("", _without_label(text), count=1)
    if len(rest) > 1 and rest[0] == rest[-1] == '"' and rest.count('"') == 2:
        rest = rest[1:-1].strip()
    return rest[:1].upper() + rest[1:] if rest != text else text, rest != text


def _without_label(text: str) -> str:
    """``text`` without "Certainly! Here is a caption:" or "Description:", before it; on one line or on several."""
    for pattern in (_PREAMBLE, _PREAMBLE, _LABEL):
        text = pattern.sub("", text, count=1)
    return text


def remove_closing(text: str) -> tuple[str, bool]:
    """``text`` without such sentences at its end as "Let me know if you need more", and whether one was there."""
    parts = sentences(text)
    kept = len(parts)
    while kept and _CLOSING.match(parts[kept - 1]):
        kept -= 1
    return (" ".join(parts[:kept]), True) if kept < len(parts) else (text, False)


def last_whole_sentence(text: str) -> str:
    """``text`` up to the end of its last whole sentence; "" where there is none."""
    parts = sentences(text)
    while parts and not _END.search(parts[-1]):
        parts.pop()
    return " ".join(parts)


def repeats_sentence(text: str) -> bool:
    """Whether a sentence of four or more words comes twice, articles and the like left out."""
    said = [tuple(word for word in _WORD.findall(part.lower()) if word not in _SLIGHT) for part in sentences(text)]
    return any(count > 1 for words, count in Counter(said).items() if len(words) >= 4)


def loops(text: str) -> bool:
    """Whether decoding is stuck: a few words come four times in a row, six or more three times, one sign over and over,
    or 4-grams are mostly repeats."""
    if _STUCK_SIGN.search(text):
        return True
    words = _WORD.findall(text.lower())
    for size in range(1, 25):
        run = 0
        for at in range(size, len(words)):
            run = run + 1 if words[at] == words[at - size] else 0
            if run >= (3 if size < 6 else 2) * size:
                return True
    grams = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
    total = sum(grams.values())
    return total >= 30 and len(grams) / total < 0.6  # our choice; ordinary paragraphs have over 0.9


def is_english(text: str) -> bool:
    """Whether ``text`` is in Latin letters and, when long enough to tell, has English's small words."""
    letters = [letter for letter in text if letter.isalpha()]
    if not letters or sum("a" <= letter.lower() <= "z" for letter in letters) < 0.9 * len(letters):
        return False
    words = _WORD.findall(text.lower())
    return len(words) < _MIN_WORDS_TO_JUDGE or sum(word in _ENGLISH for word in words) >= 0.08 * len(words)
