"""Language tags and writing directions for HTML."""

from __future__ import annotations

import re

# ISO 639 codes of languages, and below ISO 15924 codes of scripts, that are usually written from right to left.
RIGHT_TO_LEFT = frozenset((
    "ar", "arc", "arz", "ary", "apc", "ajp", "acm", "acq", "aeb", "ars", "azb", "ckb", "dv", "fa", "glk", "he", "iw",
    "ji", "ks", "lrc", "mzn", "nqo", "pnb", "prs", "ps", "sd", "skr", "syr", "ug", "ur", "yi", "ydd", "pes", "arb",
))  # fmt: skip
_SCRIPTS = frozenset(("arab", "aran", "hebr", "nkoo", "syrc", "thaa", "adlm", "rohg", "mand", "samr"))
_TAG = re.compile(r"[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*")


def language_tag(name: str) -> str | None:
    """A language's name as a BCP 47 tag (``eng_Latn`` is ``eng-Latn``); None if it has another form."""
    tag = name.replace("_", "-")
    return tag if _TAG.fullmatch(tag) else None


def writing_direction(name: str) -> str:
    """Whether the language is "rtl" or "ltr", by its script if it names one; "auto" if its name has another form."""
    tag = language_tag(name)
    if tag is None:
        return "auto"
    language, *others = tag.lower().split("-")
    scripts = [part for part in others if len(part) == 4 and part.isalpha()]
    if scripts:
        return "rtl" if scripts[0] in _SCRIPTS else "ltr"
    return "rtl" if language in RIGHT_TO_LEFT else "ltr"


def marks(name: str) -> dict[str, str | None]:
    """The attributes lang and dir of text in a language; for "auto" the browser decides."""
    return {"lang": language_tag(name), "dir": writing_direction(name)}
