r"""What can be seen of a response without reading it: its length, first words, formatting, refusals, flattery, language.

    >>> sorted(formatting("## Title\n- one\n- two!"))
    ['bullets', 'ends_with_!', 'exclamations', 'headings', 'lines']

Each function takes one response and returns features by name. A model can learn them in place of what makes an answer good.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable

from preftune.diagnose.corpus import words

Features = Callable[[str], dict[str, float]]

_COUNTED = {
    "lines": r"\n",
    "blank_lines": r"\n[ \t]*\n",
    "bullets": r"(?m)^[ \t]*[-*•][ \t]+",
    "numbered": r"(?m)^[ \t]*\d{1,2}[.)][ \t]+",
    "headings": r"(?m)^#{1,6}[ \t]",
    "bold": r"\*\*[^*\n]+\*\*",
    "code_blocks": r"```",
    "inline_code": r"(?<!`)`[^`\n]+`(?!`)",
    "tables": r"(?m)^[ \t]*\|.*\|",
    "links": r"https?://|\]\(",
    "exclamations": r"!",
    "questions": r"\?",
    "ellipses": r"\.\.\.|…",
    "quotes": r"[\"“”«»]",
    "brackets": r"[(\[]",
    "dashes": r"[–—]",
    "emoji": r"[\u2600-\u27bf\U0001f300-\U0001faff]",
    "digits": r"\d",
    "capitals": r"\b[A-Z]{3,}\b",
}
_COUNTED_PATTERNS = {name: re.compile(pattern) for name, pattern in _COUNTED.items()}

_REFUSAL = re.compile(
    r"(?i)^\W*(?:(?:i['’]?m|i am|we['’]?re|we are)\s+(?:very\s+|really\s+|so\s+)?"
    r"(?:sorry|afraid|unable|not able|not comfortable)\b"
    r"(?:.{0,60}\b(?:can|could|cannot|can['’]?t|won['’]?t|unable|not)\b)|"
    r"(?:sorry|apologies|unfortunately)\b.{0,40}\b(?:can['’]?t|cannot|can not|unable|won['’]?t|not able)\b|"
    r"i\s+(?:can['’]?t|cannot|can not|won['’]?t|will not|must decline|refuse|am unable|do not feel comfortable|don['’]?t feel "
    r"comfortable)\b|as an ai\b.{0,80}\b(?:can['’]?t|cannot|not able|unable|don['’]?t)\b)"
)
_FLATTERY = re.compile(
    r"(?i)^\W*(?:(?:what\s+a|that['’]?s\s+an?|this\s+is\s+an?)\s+(?:\w+\s+)?(?:great|good|excellent|wonderful|fantastic|interesting|"
    r"brilliant|thoughtful|insightful|amazing|lovely)\b|(?:great|good|excellent|wonderful|fantastic|brilliant)\s+(?:question|point|"
    r"idea|choice|observation)\b|you['’]?re\s+(?:absolutely|totally|completely|so)\s+right\b|(?:absolutely|certainly|of course|"
    r"definitely)\s*[!,]|i['’]?(?:d|ll)\s+be\s+(?:happy|glad|delighted)\s+to\b|sure\s*(?:thing)?\s*[!,])"
)

_COMMON_WORDS = {  # words that hardly occur outside their language and in nearly every long text of it
    "English": "the and of is that with this for are you was have not",
    "German": "der die und das ist nicht mit ein eine ich sie auf für auch",
    "French": "le les des est une dans pour que vous pas sur avec qui nous",
    "Spanish": "el los las una por con para es que del como pero más está",
    "Italian": "il che di per una sono con non della gli come anche più è",
    "Portuguese": "o os uma para com não que é do da em por mais você",
    "Dutch": "de het een en van is niet dat ik op voor met zijn ook",
}
_COMMON = {language: frozenset(listed.split()) for language, listed in _COMMON_WORDS.items()}
_SCRIPTS = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "CYRILLIC", "ARABIC", "DEVANAGARI", "GREEK", "HEBREW", "THAI")
_LOOKED_AT = 400  # characters of a text by which its language is told


def length(text: str) -> dict[str, float]:
    """How long a text is: a slope over log characters, and which half-octave it falls in, for models that prefer a middle."""
    size = math.log2(len(text) + 1)
    return {"log_length": size, f"octave:{round(2 * size) / 2}": 1.0}


def opening(text: str) -> dict[str, float]:
    """The first word, and the first two."""
    said = words(text[:200])[:2]
    return {"first:" + " ".join(said[:n]): 1.0 for n in range(1, len(said) + 1)}


def formatting(text: str) -> dict[str, float]:
    """Marks on the page, as logarithms of their counts; how the text begins and ends."""
    found = {name: math.log1p(n) for name, pattern in _COUNTED_PATTERNS.items() if (n := len(pattern.findall(text)))}
    if text[:1].isspace():
        found["begins_with_space"] = 1.0
    if text[:1].islower():
        found["begins_in_lower_case"] = 1.0
    if text[-1:].isspace():
        found["ends_with_space"] = 1.0
    last = text.rstrip()[-1:]
    if last:
        found["ends_with_" + (last if not last.isalnum() else "letter")] = 1.0
    return found


def refuses(text: str) -> bool:
    """Whether the text opens as a refusal (English)."""
    return _REFUSAL.match(text[:300]) is not None


def flatters(text: str) -> bool:
    """Whether the text opens with praise or eagerness instead of an answer (English)."""
    return _FLATTERY.match(text[:120]) is not None


def language(text: str) -> str:
    """The script of a text, or of Latin ones the language whose common words it has; "" where that is not clear."""
    head = text[:_LOOKED_AT]
    letters = [c for c in head if c.isalpha()]
    if len(letters) < 20 and not any(ord(c) > 0x2E80 for c in letters):
        return ""
    foreign = [c for c in letters if ord(c) > 0x36F]
    if len(foreign) > len(letters) / 2:
        names = unicodedata.name(foreign[len(foreign) // 2], "").split(" ", 1)[0]
        return names if names in _SCRIPTS else ""
    said = words(head)
    hits = sorted(((sum(w in common for w in said), name) for name, common in _COMMON.items()), reverse=True)
    (most, name), (second, _) = hits[:2]
    return name if most >= 3 and most >= 2 * second else ""


def marks(text: str) -> dict[str, float]:
    """Refusal, flattery and language as features."""
    found = {"refuses": 1.0} if refuses(text) else {}
    if flatters(text):
        found["flatters"] = 1.0
    if tongue := language(text):
        found[f"language:{tongue}"] = 1.0
    return found


SURFACE: tuple[Features, ...] = (length, opening, formatting, marks)
"""All of what a cheat could go by."""


def bag_of_words(text: str) -> dict[str, float]:
    """Which words occur."""
    return dict.fromkeys(words(text), 1.0)


def difference(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    """Features of one side minus those of the other, without those that are equal."""
    found = {name: value - b.get(name, 0.0) for name, value in a.items() if value != b.get(name, 0.0)}
    found.update((name, -value) for name, value in b.items() if name not in a)
    return found
