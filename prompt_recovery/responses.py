"""A labelled response, as people and LLMs write it: the reason in it, and the prompt that it
names."""

from __future__ import annotations

import json
import re

from prompt_recovery.data import normalise
from prompt_recovery.json_answers import prompt_objects, scan_key
from prompt_recovery.refusals import is_refusal
from prompt_recovery.unwrap import is_prompt


class TemplateError(ValueError):
    """A style, placement or row that can't be rendered; the message names value, rule and
    remedy."""


# What label writers put before the reason and before the prompt, bold, as a heading or in tags.
_KEY_WORDS = r"\w*prompt|\w*instruction|task|request|query|question|command|answer|output"
_REASON_WORDS = r"\w*reason(?:s|ing)?|\w*explanation|\w*analysis|rationale|thoughts?|think(?:ing)?"
_LEAD = re.compile(
    r"\s*(?:(?:\#{1,6}[ \t]*)?(?:\*\*)?"
    r"(?:(?:(?:step[ \t]*)?(?:\(1\)|1[.):])|a[.)]|[-*\u2022]|\u2460)(?:\*\*)?(?=\s|$)"
    rf"|(?:{_REASON_WORDS})(?:\*\*)?\s*[:\uff1a](?:\*\*)?)"
    rf"|\#{{1,6}}[ \t]*(?:{_REASON_WORDS})[ \t]*(?=\n)|<(?:{_REASON_WORDS})>)\s*",
    re.IGNORECASE,
)
_LABEL = re.compile(
    r"(?:^|\n)[ \t]*(?:\*\*)?(?:step[ \t]*)?(?:\(2\)|2[.):]|\u2461)(?:\*\*)?(?=\s|\{|$)"
    rf"|(?:^|\n)[ \t]*(?:\#+[ \t]*)?(?:\*\*)?(?:the[ \t]+)?(?:(?:rewrite|original)[ \t])?"
    rf"(?:{_KEY_WORDS}|json)(?:\*\*)?[ \t]*[:=\uff1a]"
    rf"|(?:^|\n)[ \t]*\#+[ \t]*(?:\w+[ \t]+){{0,2}}(?:{_KEY_WORDS}|json)[ \t]*(?=\n)"
    rf"""|<(?:{_KEY_WORDS})>|```|\{{\s*["'\u201c]?(?:{_KEY_WORDS})["'\u201d]?\s*:""",
    re.IGNORECASE,
)
_BEFORE_LABEL = re.compile(
    r"(?:\s|\*\*|```\w*|->|</?\w+>|\n\s*(?:[-*\u2022]|b[.)]|step)"
    rf"|\(?2[.):]|(?:{_KEY_WORDS}|json)\s*:)+$",
    re.IGNORECASE,
)


def _split_response(response: str) -> tuple[str, str]:
    """(what stands before the label's prompt, the rest)."""
    places = [start for start, _ in prompt_objects(response)]
    places += [found.start() for found in _LABEL.finditer(response)]
    last = response.rfind("{")
    if response.rstrip(" \n`.").endswith("}") and re.match(r"\{\s*[\"']", response[last:]):
        places.append(last)  # an object with a key of any name, at the end
    cut = min((place for place in places if place >= 0), default=len(response))
    return response[:cut], response[cut:]


def _reason_in_object(response: str) -> str:
    """The reason of a label that is one JSON object, with a key for the reason and one for the
    prompt; "" for another label."""
    start = re.match(r"\s*(?:```\w*\s*)?(?=\{)", response)
    try:
        value = json.JSONDecoder(strict=False).raw_decode(response, start.end())[0] if start else {}
    except (ValueError, RecursionError):
        return ""
    texts = [text for key, text in value.items() if re.fullmatch(_REASON_WORDS, key, re.IGNORECASE)]
    return " ".join(text for text in texts if isinstance(text, str))


def prompt_of(response: str) -> str | None:
    """The prompt that the JSON of a labelled response names under any usual key; None where it has
    none."""
    rest = _split_response(response)[1]
    for match in re.finditer(r"\{(?=\s*\")", rest):
        try:
            value, _ = json.JSONDecoder(strict=False).raw_decode(match.string, match.start())
        except (ValueError, RecursionError):
            continue
        for key, text in value.items():
            if (
                isinstance(text, str)
                and text.strip()
                and re.fullmatch(_KEY_WORDS, key, re.IGNORECASE)
            ):
                return text.strip()
    return scan_key(rest)[0] if "{" in rest else None


def reason_of(response: str, prompt: str = "") -> str:
    """The reason in a response: what stands before its prompt, without numbers and headings.

    Sentences that hold the prompt itself are left out, if it is long enough to be more than a word
    of the language. Raises TemplateError if nothing is left, or if the reason is a refusal.
    """
    reason = _reason_in_object(response) or _split_response(response)[0]
    while lead := _LEAD.match(reason):
        reason = reason[lead.end() :]
    reason = _BEFORE_LABEL.sub("", reason).strip()
    if is_refusal(reason):
        raise TemplateError(f"response={response[:80]!r} is a refusal, no reason: drop the row.")
    wording = normalise(prompt)
    if (
        wording
        and wording in normalise(reason)
        and (len(wording) >= 10 or not wording.isascii() and len(wording) >= 4)
    ):
        sentences = re.split(r"(?<=[.!?\u3002])\s*(?=\s|[^\x00-\x7f])|\n", reason)
        reason = " ".join(each.strip() for each in sentences if wording not in normalise(each))
        reason = _BEFORE_LABEL.sub("", reason).strip()
    if not is_prompt(reason) or wording and len(wording) >= 10 and wording in normalise(reason):
        raise TemplateError(
            f"response={response[:80]!r} holds no reason before its prompt, and style "
            "'reason_json' teaches one. Fill the response column, drop the row, or use style "
            "'json'."
        )
    return reason
