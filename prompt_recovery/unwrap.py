"""What models wrap around a prompt, taken off where it is unambiguous; and what is no prompt at
all."""

from __future__ import annotations

import re
import unicodedata

from pandas._libs.parsers import STR_NA_VALUES

QUOTES = {
    '"': '"',
    "'": "'",
    "\u201c": "\u201d",
    "\u2018": "\u2019",
    "\u201d": "\u201d",
    "`": "`",
    "\u00ab": "\u00bb",
    "\u201e": "\u201c",
    "\u300c": "\u300d",
    "\u300e": "\u300f",
    "**": "**",
    "__": "__",
    "*": "*",
    "***": "***",
    "``": "``",
    "```": "```",
    "''": "''",
    '"""': '"""',
}
CONTROL_TOKENS = re.compile(r"</?s>|<unk>|<pad>|\[/?INST\]")
# a scorer reads the file with pandas, for which these are missing; a model that means them found no
# prompt either
_EDGES = " \t\n.,:;!?\"'`*_-()[]{}<>#/"
MISSING = {value.casefold().strip(_EDGES) for value in STR_NA_VALUES} | {
    "none found", "no prompt", "not available", "not applicable", "unknown", "undefined", "empty",
}  # fmt: skip

# What remains must read as a text: else brackets and quotes may be the prompt itself.
_TEXT = re.compile(r"[^\W\d_]{2,}[^\w\s]*\s+[^\W\d_]{2,}|[A-Z][a-z]{3,}|[^\W\d_\x00-\x7f]{4,}")
# The turns of the conversation and of its texts, which a model goes on to write.
_NEXT = re.compile(
    r"</?s>|\[/?INST\]|<\|[a-z_]+\|>"
    r"|\n[\s#>*_]*(?:the\s+)?(?:original|rewritten)[\s_]+(?:text|version|passage)[*_]*\s*:",
    re.IGNORECASE,
)
_FIRST = re.compile(r"^(?:\s|</?s>|\[/?INST\]|<\|[a-z_]+\|>)+", re.IGNORECASE)
_TURN = re.compile(r"^\[INST\].*\[/INST\]$", re.DOTALL)  # may be the prompt itself
_FENCED = re.compile(r"^```[ \t]*(?:\w+[ \t]*)?\n(.*?)\n?\s*```$", re.DOTALL)
_WORDS = (
    r"(?:rewrit(?:e|ing|ten)|recovered|original|most|likely|possible|probable|final|given|text|user"
    r"|llm|model|input)"
)
_LABEL = re.compile(
    rf"""^[\s\#>*_"'\u201c`]*
    (?:(?:sure(?:\s+thing)?|certainly|of\s+course|okay|ok|absolutely)[,.!:]*\s+)?
    (?:(?:here(?:['\u2019]s|\s+is)|this\s+is|i\s+(?:think|believe|guess)(?:\s+that)?
       |it\s+seems\s+that)\s+)?
    (?:the\s+|my\s+|a\s+|one\s+)?
    (?:{_WORDS}[\s_\\-]+){{0,3}}
    (?:prompt|instruction|answer)s?
    (?:\s+(?:that\s+)?(?:the\s+|an?\s+)?
       (?:given|used|llm|model|was|were|is|has|had|been|to|for|by)\b){{0,6}}
    (?:\s+(?:was|is|(?:would|might|could|may)\s+be|(?:might|could|may)\s+have\s+been|
       likely|probably))*
    [*_"'\u201d`]*\s*(?:[:=]+(?=[\s*_"'\u201c`])|\n)[\s>]*""",
    re.IGNORECASE | re.VERBOSE,
)


def is_prompt(text: str) -> bool:
    """Whether a text says anything: a letter or number of any script, and no word for nothing."""
    text = CONTROL_TOKENS.sub("", text)
    letters = any(unicodedata.category(char)[0] in "LN" for char in text)
    return letters and " ".join(text.casefold().split()).strip(_EDGES) not in MISSING


def reads_as_text(text: str) -> bool:
    """Whether there are words in it, by which what stands around it can be told from the prompt."""
    return _TEXT.search(text) is not None


def unwrap(text: str) -> str:
    """A plain answer without what stands around its prompt: a label ("**Prompt:** ...", "The prompt
    was: ..."), quotes, bold type or a fence around the whole, markers of turns, and what a model
    goes on to write behind it ("Original text:"). Each is taken off only where a text remains."""
    text = text.strip()
    if _TURN.match(text):
        return text
    while True:
        inner = next(
            (each for each in _without_one(text) if each != text and reads_as_text(each)), text
        )
        if inner == text:
            return text
        text = inner


def _without_one(text: str) -> list[str]:
    """The text without each thing that may stand around it, one at a time."""
    found = []
    first = _FIRST.match(text)
    if first and first[0].strip():
        found.append(text[first.end() :])
    else:
        found.append(_NEXT.split(text, maxsplit=1)[0])
    fenced = _FENCED.match(text)
    if fenced:
        found.append(fenced[1])
    label = _LABEL.match(text)
    if label:
        rest = text[label.end() :]
        opened = re.match(r"[\s#>]*([*_\"'\u201c`]*)", label[0])
        for mark in (
            re.findall(r"\*+|_+|.", opened[1]) if opened else []
        ):  # closed before the colon, behind it, at the end
            closing = QUOTES.get(mark, mark)
            if label[0].count(closing) < 1 + (closing == mark):
                rest = (
                    rest.removeprefix(closing)
                    if rest.startswith(closing)
                    else rest.removesuffix(closing)
                )
        found.append(rest)
    for opening in sorted(QUOTES, key=len, reverse=True):
        closing = QUOTES[opening]
        body = text.rstrip(".!") if text.rstrip(".!").endswith(closing) else text
        inner = body[len(opening) : -len(closing)]
        if (
            body.startswith(opening)
            and body.endswith(closing)
            and len(body) > len(opening) + len(closing)
        ):
            if _closes_once(inner, opening, closing):
                found.append(inner)
            break
    return [each.strip() for each in found]


def _closes_once(inner: str, opening: str, closing: str) -> bool:
    """Whether quotes around a text are a pair: `"a" and "b"` are two. An apostrophe is no quote."""
    if closing in ("'", "\u2019"):
        inner = re.sub(r"(?<=\w)['\u2019](?=\w)", "", inner)
    return opening not in inner and closing not in inner


def cut_repeated(text: str) -> str:
    """The text without the repetitions of the phrase in which it ends, three or more of them, the
    last one perhaps not whole; once it stays. The text itself where it ends in none."""
    for period in range(1, (len(text) + 2) // 3 + 1):
        same = 0
        while same < len(text) - period and text[-1 - same] == text[-1 - same - period]:
            same += 1
        # a strip took the space, or the comma, behind the last
        if same >= max(2 * period - 2 * (period > 8), 8):
            return text[: len(text) - same].rstrip(" \t\n,;:-\u2013\u2014")
    return text
