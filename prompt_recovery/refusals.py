"""What an LLM wrote where a rewrite should stand: refusals and other non-answers.

No single word tells a refusal. "I cannot believe how warm it was" is a diary, "I'm sorry, but I
can't come on Saturday" a letter, "The text of the treaty was signed in Paris" a report. A refusal
speaks as the assistant about the task, in its first sentences; a rewrite speaks about its own
matter, with people, dates and a past. So signs have points, in refusals.toml: acts of refusing,
things of the task, and, with negative points, a life of its own. A refusal has an act and
THRESHOLD points or more. The points are set by hand; a logistic regression over the lists that
LOG.md names comes to nearly the same.
"""

from __future__ import annotations

import re
import tomllib
from functools import cache
from pathlib import Path

from prompt_recovery.cleaning import strip_lead_in

THRESHOLD = 4.0
FIRST, SENTENCES = 600, 3  # characters and sentences looked at: a refusal says so at once
LATER = 0.75  # what a sign counts after the first sentence that decides something
SHORT = 300  # characters; "I can't do that." and no more refuses, a diary goes on

# Contractions are written out, so that the signs need one spelling of each
_SPELLINGS = {
    r"[\u2018\u2019]": "'",
    r"[\u201c\u201d]": '"',
    r"\bcan(?:'t|not)\b": "can not",
    r"\bwon't\b": "will not",
    r"n't\b": " not",
    r"'m\b": " am",
    r"'ll\b": " will",
    r"'d\b": " would",
    r"'ve\b": " have",
    r"'re\b": " are",
    r"\b(it|that|what|there|here|who|how|where)'s\b": r"\1 is",
    r"'": "",
}
_LABEL = re.compile(
    r"[\s\"'\u201c*_#>\[(`-]*"
    r"(?:(?:note|response|answer|output|assistant|model|ai|disclaimer|error|rewritten)\b"
    r"\s*[:\n][\s*\"']*)?",
    re.IGNORECASE,
)
_SPEAKER = re.compile(r"[A-Z][\w.'-]*(?: [A-Z][\w.'-]*){0,2}:\s")  # "ALICE: I can't help you."


@cache
def _signs() -> tuple[list[tuple[str, str, float, re.Pattern[str]]], re.Pattern[str]]:
    """(group, name, points, pattern) of each sign, and the pattern of a sentence that decides
    nothing."""
    data = tomllib.loads(Path(__file__).with_name("refusals.toml").read_text(encoding="utf-8"))

    def compiled(expressions: list[str]) -> re.Pattern[str]:
        whole = "|".join(expressions)
        while named := re.search("<([A-Z]+)>", whole):  # a name's meaning may hold another name
            meaning = "|".join(data["names"][named[1]])
            whole = whole.replace(named[0], rf"\b(?:{meaning})\b")
        return re.compile(rf"\b(?:{whole})(?!\w)".replace("\n", ""))  # long ones are broken

    signs = [
        (group, name, points, compiled(expressions))
        for group in ("acts", "things", "life")
        for name, (points, *expressions) in data[group].items()
    ]
    return signs, compiled(data["preface"])


def _sentences(text: str) -> list[str]:
    """The first sentences in the spelling of the signs."""
    for pattern, spelling in _SPELLINGS.items():
        text = re.sub(pattern, spelling, text)
    sentences = (" ".join(each.split()) for each in re.split(r"(?<=[.!?])\s+|\n+", text))
    return [each for each in sentences if each][:SENTENCES]


def is_refusal(text: str) -> bool:
    """Whether a rewritten text is an LLM's refusal of the request, or another non-answer to it."""
    plain = strip_lead_in(text)
    label = _LABEL.match(plain)
    start = label.end() if label else 0
    if _SPEAKER.match(plain, start):
        return False
    sentences = _sentences(plain[start : start + FIRST].rstrip("])*_\"' \n\u201d").lower())
    signs, preface = _signs()
    first = 0
    while first < len(sentences) - 1 and preface.fullmatch(sentences[first]):
        first += 1
    found: dict[tuple[str, str], float] = {}
    for place, sentence in enumerate(sentences):
        for group, name, points, pattern in signs:
            if name == "whole sentence" and len(plain) >= SHORT:
                continue
            if pattern.search(sentence):
                points *= 1.0 if place <= first or group == "life" else LATER
                found[group, name] = max(found.get((group, name), 0.0), points, key=abs)
    return any(group == "acts" for group, _ in found) and sum(found.values()) >= THRESHOLD
