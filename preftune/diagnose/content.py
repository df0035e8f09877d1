"""Checks of single rows: those that could not be read, empty ones, damaged text, markers of turns, secrets, very long ones."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from statistics import NormalDist

import numpy as np

from preftune.diagnose.corpus import Corpus, says_something
from preftune.diagnose.features import refuses
from preftune.diagnose.finding import N_EXAMPLES, Evidence, Finding, Severity, skipped
from preftune.diagnose.share import Z95, graded, share

POWER = NormalDist().inv_cdf(0.8)


def bad_rows(corpus: Corpus) -> Finding:
    """Rows that training would refuse."""
    n, n_bad = len(corpus.examples) + len(corpus.bad), len(corpus.bad)
    said = f"{n_bad} of {n} rows cannot be used"
    if not n_bad:
        return Finding("bad_rows", "ok", said, numbers={"n": n, "n_bad": 0})
    reasons = Counter(reason for _, reason in corpus.bad)
    return Finding(
        "bad_rows",
        "error",
        said,
        "training stops at them: mend them, or set quarantine=FILE to move them there (--fix leaves them out)",
        {"n": n, "n_bad": n_bad, "reasons": dict(reasons.most_common(5))},
        tuple(Evidence(place, reason) for place, reason in corpus.bad[:N_EXAMPLES]),
    )


def size(corpus: Corpus) -> Finding:
    """What this many preferences can show, with a tenth of them held out."""
    n_prompts = len(set(corpus.keys))
    n_pairs = len(corpus.contrast.units)
    n = n_pairs or len(corpus.units)
    held_out = max(n / 10, 1)
    # smallest accuracy that a two-sided 5 % test tells from one half in 8 of 10 cases
    detectable = min(1.0, 0.5 + (Z95 + POWER) * 0.5 / math.sqrt(held_out))
    severity: Severity = "ok" if n >= 10_000 else "note" if n >= 2_000 else "warning" if n >= 100 else "error"
    what = "preferences" if n_pairs else "rows"
    means = {
        "ok": "",
        "note": "enough to change manners and style; for new abilities 10,000 and more are usual",
        "warning": "enough to try the path, or to sharpen one trait with LoRA and a large beta; collect more before "
        "trusting an evaluation on the part held out",
        "error": "too few to see whether training helped: use them to test the path only",
    }
    return Finding(
        "size",
        severity,
        f"{n} {what} of {n_prompts} prompts; a tenth held out "
        + ("shows nothing" if detectable == 1 else f"can tell an accuracy of {detectable:.0%} or more from chance"),
        means[severity],
        {"n": n, "n_prompts": n_prompts, "detectable_accuracy": round(detectable, 4)},
    )


def empty_responses(corpus: Corpus) -> Finding:
    """Responses that say nothing (dots, dashes), which readers that look for blanks let through."""
    return _found_in(
        corpus,
        "empty_responses",
        lambda text: "" if says_something(text) else f"only {text[:20]!r}",
        "responses are punctuation and white space alone",
        "leave them out (--fix does)",
        warning=0.0,
        error=0.02,
        fix=True,
    )


def both_refuse(corpus: Corpus) -> Finding:
    """Preferences between two refusals, which teach how to refuse and nothing else."""
    pairs = corpus.contrast
    if not pairs.winners:
        return skipped("both_refuse", "there are no preferences")
    both = [refuses(w) and refuses(x) for w, x in zip(pairs.winners, pairs.losers, strict=True)]
    found = share(both, pairs.groups)
    severity = graded(found, note=0.01, warning=0.1, error=0.5)
    return Finding(
        "both_refuse",
        severity,
        f"both responses refuse in {found} of the preferences",
        "" if severity == "ok" else "the model will learn to refuse: add preferences in which a helpful answer wins",
        {"n": found.n, "share": round(found.value, 4), "share_interval": found.interval},
        tuple(corpus.evidence(int(pairs.units[i])) for i in np.flatnonzero(both)[:N_EXAMPLES]) if severity != "ok" else (),
    )


def very_long(corpus: Corpus) -> Finding:
    """Responses so long that the others' lengths do not explain them."""
    where = [(at, k) for at, texts in enumerate(corpus.texts) for k in range(len(texts))]
    logs = np.log([len(corpus.texts[at][k]) + 1 for at, k in where])
    centre = float(np.median(logs))
    spread = max(1.4826 * float(np.median(np.abs(logs - centre))), 0.1)
    # of log-normal lengths, one data set in a thousand has a response above this
    limit = centre + NormalDist().inv_cdf(1 - 1e-3 / max(len(logs), 1)) * spread
    above = np.flatnonzero(logs > limit)
    n_limit = round(math.exp(limit) - 1)
    median = math.exp(centre) - 1
    said = f"{len(above)} of {len(logs)} responses are longer than {n_limit:,} characters, where the median is {median:,.0f}"
    return Finding(
        "very_long",
        "warning" if len(above) else "ok",
        said,
        "look at them: are they answers? They cost memory and time, and batch.max_length may cut them" if len(above) else "",
        {"n": len(logs), "n_above": len(above), "limit": n_limit, "longest": max(len(corpus.texts[at][k]) for at, k in where)},
        tuple(corpus.of_response(where[i][0], corpus.texts[where[i][0]][where[i][1]]) for i in above[:N_EXAMPLES]),
    )


_MOJIBAKE = re.compile(r"Ã[\u0080-\u00bf]|â€[\u0090-\u009d™œ˜“”¦]|Â[\u00a0-\u00bf]|ï»¿|\ufffd")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_HTML = re.compile(r"&(?:amp|lt|gt|quot|nbsp|#\d{2,5});|</?(?:br|p|div|span|font)\b[^<>\n]{0,80}>", re.IGNORECASE)


def damaged_text(corpus: Corpus) -> Finding:
    """Characters of a wrong encoding, and control characters."""

    def why(text: str) -> str:
        found = _MOJIBAKE.search(text) or _CONTROL.search(text)
        return f"damaged at {_around(text, found)}" if found else ""

    remedy = "decode the text again from its source (UTF-8)"
    return _found_in(corpus, "damaged_text", why, "responses hold damaged text", remedy, warning=0.0, error=0.1)


def html(corpus: Corpus) -> Finding:
    """Leftovers of HTML outside of code blocks."""

    def why(text: str) -> str:
        found = None if "```" in text else _HTML.search(text)
        return f"HTML at {_around(text, found)}" if found else ""

    return _found_in(corpus, "html", why, "responses hold HTML", "unescape it, unless it is code", warning=0.01, error=math.inf)


_SPECIAL = re.compile(r"<\|[a-z_]{2,20}\|>|\[/?INST\]|<</?SYS>>|</s>|<(?:start|end)_of_turn>|### (?:Instruction|Response):")
_TURN = re.compile(r"(?m)^(?:Human|User|Assistant|AI|Bot|System):")


def turn_markers(corpus: Corpus) -> Finding:
    """Responses that go on with somebody else's turn, or hold a template's markers: a dialogue that was not taken apart."""

    def why(text: str) -> str:
        found = _SPECIAL.search(text) or _TURN.search(text)
        return f"marker at {_around(text, found)}" if found else ""

    remedy = "cut the response before the marker; the model would learn to write the user's turns"
    return _found_in(corpus, "turn_markers", why, "responses hold markers of turns", remedy, warning=0.0, error=0.05)


_CREDENTIALS = {
    "API key": r"\bsk-[A-Za-z0-9_-]{20,}|\bAIza[0-9A-Za-z_-]{35}\b|\bhf_[A-Za-z0-9]{30,}\b|\bxox[abprs]-[A-Za-z0-9-]{10,}",
    "AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "GitHub token": r"\bgh[opusr]_[A-Za-z0-9]{36,}\b|\bgithub_pat_[A-Za-z0-9_]{50,}\b",
    "private key": r"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----",
    "JSON web token": r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
    "password in a URL": r"\b[a-z][a-z0-9+.-]{1,10}://[^\s/:@]{1,60}:[^\s/:@]{3,60}@",
}
_PERSONAL = {
    "e-mail address": r"\b[A-Za-z0-9][\w.+-]{0,40}@(?!example\.)(?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,10}\b",
    "phone number": r"(?<![\w.])(?:\+\d{1,3}[ .-]?)?(?:\(\d{3}\)[ .-]?|\d{3}[.-])(?!555[.-]?01)\d{3}[.-]\d{4}(?![\w-])",
    "international phone number": r"(?<![\w.])\+(?:[1-9]\d{0,2}(?:[ .-]\d{2,4}){2,4}|[1-9]\d{9,12})(?![\w-])",
    "social security number": r"(?<![\w-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])",
    "card number": r"(?<![\w.-])(?:\d[ -]?){12,18}\d(?![\w-])",
    "IBAN": r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}(?: ?[A-Z0-9]{1,3})?\b",
}


def secrets(corpus: Corpus) -> Finding:
    """Credentials: keys, tokens, passwords."""
    return _patterns(
        corpus, "secrets", _CREDENTIALS, "error",
        "revoke them where they may be real, and leave these rows out (--fix does): a model can repeat what it was trained on",
    )  # fmt: skip


def personal_data(corpus: Corpus) -> Finding:
    """E-mail addresses, phone, card, bank and social security numbers."""
    return _patterns(
        corpus, "personal_data", _PERSONAL, "warning", "replace them by placeholders unless they are public or made up"
    )  # fmt: skip


def _patterns(corpus: Corpus, name: str, patterns: dict[str, str], severity: Severity, remedy: str) -> Finding:
    compiled = {kind: re.compile(pattern) for kind, pattern in patterns.items()}
    kinds: Counter[str] = Counter()
    hit: dict[int, Evidence] = {}
    for at, example in enumerate(corpus.examples):
        for text in (corpus.prompts[at], *corpus.texts[at]):
            for kind, found in _matches(text, compiled):
                kinds[kind] += 1
                hit.setdefault(at, Evidence(example.source or example.id, f"{kind}: {masked(found)}"))
    counted = ", ".join(f"{kind} {n}" for kind, n in kinds.most_common())
    said = f"{len(hit)} of {len(corpus.examples)} rows hold {counted or 'one of the patterns: ' + ', '.join(patterns)}"
    if not hit:
        return Finding(name, "ok", said, numbers={"n": len(corpus.examples), "n_rows": 0})
    drop = tuple(i for i, unit in enumerate(corpus.units) if unit.example in hit) if severity == "error" else ()
    numbers = {"n": len(corpus.examples), "n_rows": len(hit), "kinds": dict(kinds)}
    return Finding(name, severity, said, remedy, numbers, tuple(list(hit.values())[:N_EXAMPLES]), drop)


def _matches(text: str, patterns: dict[str, re.Pattern[str]]) -> Iterator[tuple[str, str]]:
    for kind, pattern in patterns.items():
        for found in pattern.finditer(text):
            if _VALID.get(kind, bool)(found[0]):
                yield kind, found[0]


def masked(secret: str) -> str:
    """Enough to find it in the file, and not to use it: two characters and the length."""
    return f"{secret[:2]}… ({len(secret)} characters)"


_ISSUERS = re.compile(  # who issues which numbers, and how long they are
    r"4\d{15}(?:\d{3})?|(?:5[1-5]|2[2-7])\d{14}|3[47]\d{13}|(?:6011|65\d\d|64[4-9]\d|35[2-8]\d)\d{12}|3(?:0[0-5]|[68]\d)\d{11}"
)


def card(number: str) -> bool:
    """Whether an issuer's number of the right length, in the usual groups or none, with the check sum of ISO/IEC 7812."""
    digits = "".join(c for c in number if c.isdigit())
    doubled = [int(c) if k % 2 == 0 else int(c) * 2 - 9 * (c > "4") for k, c in enumerate(reversed(digits))]
    groups = [len(group) for group in re.split(r"[ -]", number)]
    usual = len(groups) == 1 or groups in ([4, 4, 4, 4], [4, 6, 5], [4, 6, 4])
    return usual and bool(_ISSUERS.fullmatch(digits)) and len(set(digits)) > 1 and sum(doubled) % 10 == 0


def iban(text: str) -> bool:
    """The check sum of IBANs (ISO 13616): the digits, moved and lettered, leave 1 when divided by 97."""
    compact = text.replace(" ", "")
    return 15 <= len(compact) <= 34 and int("".join(str(int(c, 36)) for c in compact[4:] + compact[:4])) % 97 == 1


_VALID: dict[str, Callable[[str], bool]] = {"card number": card, "IBAN": iban}


def _found_in(
    corpus: Corpus,
    name: str,
    why: Callable[[str], str],
    what: str,
    remedy: str,
    *,
    warning: float,
    error: float,
    fix: bool = False,
) -> Finding:
    """Responses with a fault that `why` names."""
    hit: list[tuple[int, str]] = []
    n = 0
    for at, texts in enumerate(corpus.texts):
        n += len(texts)
        hit += [(at, reason) for text in texts if (reason := why(text))]
    said = f"{len(hit)} of {n} {what}"
    if not hit:
        return Finding(name, "ok", said, numbers={"n": n, "n_found": 0})
    found = share([True] * len(hit) + [False] * (n - len(hit)), range(n))
    severity = graded(found, note=0.0, warning=warning, error=error)
    examples = {at for at, _ in hit}
    drop: Sequence[int] = [i for i, unit in enumerate(corpus.units) if unit.example in examples] if fix else ()
    return Finding(
        name,
        severity,
        said,
        remedy,
        {"n": n, "n_found": len(hit), "share": round(found.value, 4)},
        tuple(corpus.of_response(at, reason) for at, reason in hit[:N_EXAMPLES]),
        tuple(drop),
    )


def _around(text: str, found: re.Match[str]) -> str:
    return repr(text[max(found.start() - 12, 0) : found.end() + 12])
