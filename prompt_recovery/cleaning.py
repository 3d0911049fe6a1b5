"""Lead-ins: what an LLM says before a rewrite, such as "Sure, here is the rewritten text:"."""

from __future__ import annotations

import re

_OPENER = r"(?:sure(?:\s+thing)?|certainly|of\s+course|absolutely|okay|ok|gladly|no\s+problem)"
_HERE = r"(?:here(?:'s|\s+is|\s+are)|this\s+is|below\s+is)"
_REWORK = (
    r"(?:re-?writ\w+|re-?wrote|revis\w+|rephras\w+|reword\w+|paraphras\w+|transformed|modified"
    r"|updated)"
)
_LEAD_INS = (
    # "Sure! Here is the rewritten text:" and "Here's a revised version of your letter: Dear ..."
    re.compile(
        rf"^\s*\**(?:{_OPENER}[,.!:]*\s+)?{_HERE}\s[^:\n]{{0,80}}"
        rf"\b{_REWORK}\b[^:\n]{{0,80}}:\**[ \t]*\n*",
        re.IGNORECASE,
    ),
    # "Sure, here is the poem:" only when the line ends there: in a dialogue the speech goes on.
    re.compile(rf"^\s*\**{_OPENER}[,.!:]*\s+{_HERE}\s[^:\n]{{0,120}}:\**[ \t]*\n+", re.IGNORECASE),
    # "Rewritten text:"
    re.compile(
        r"^\s*\**(?:the\s+)?(?:rewritten|revised|rephrased|reworded|paraphrased)\s+(?:text|version|"
        r"passage|paragraph)\**:\**[ \t]*\n*",
        re.IGNORECASE,
    ),
)


def strip_lead_in(text: str) -> str:
    """The text without a first line such as "Sure, here is the rewritten text:"; unchanged
    without."""
    plain = text.replace("\u2019", "'")  # one character for one: positions stay
    for pattern in _LEAD_INS:
        found = pattern.match(plain)
        if found:
            return text[found.end() :].lstrip("\n")
    return text
