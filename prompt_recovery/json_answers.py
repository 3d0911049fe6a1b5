"""A prompt in JSON as models write it: well-formed, or in ways that no decoder takes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from prompt_recovery.unwrap import QUOTES

# Models also write the name of the column, or one like it.
_KEYS = ("prompt", "rewrite_prompt")
JSON_QUOTES = {opening: QUOTES[opening] for opening in "\"'\u201c\u2018\u201d`"}
_KEY = re.compile(
    r"""["'\u201c\u201d\u2018\u2019`]?\b(?:[^\W\d_]+(?:[ ]|\\?_))*prompt\b"""
    r"""["'\u201c\u201d\u2018\u2019`]?\s*[:=]\s*""",
    re.IGNORECASE,
)
# A quote ends the value only where JSON could go on: so quotes nested without a backslash stay
# inside.
_AFTER_VALUE = re.compile(
    r"""\s*,?\s*[}\]]|[ \t]*,?[ \t]*(?:\n|$)"""
    r"""|\s*,\s*["'\u201c\u2018]\w+["'\u201d\u2019]\s*:|\s*```""",
)
_ESCAPES = {
    "n": "\n",
    "t": "\t",
    "r": "\r",
    "b": "\b",
    "f": "\f",
    "/": "/",
    "\\": "\\",
    '"': '"',
    "'": "'",
}


def prompt_objects(text: str) -> Iterator[tuple[int, str]]:
    """(position, prompt) of every JSON object in text that has a prompt of text; strict JSON first.

    Only if there is none, raw line ends inside strings are let pass. Strict comes first for the
    sake of reasons: a brace in a reason can't reach over the line end into the answer's own
    object.
    """
    found = False
    for strict in (True, False):
        decoder = json.JSONDecoder(strict=strict)
        end = 0
        for match in re.finditer(r"\{(?=\s*\")", text):
            if match.start() < end:
                continue
            try:
                value, stop = decoder.raw_decode(text, match.start())
            except ValueError:  # JSONDecodeError, or a number of thousands of digits
                continue
            except RecursionError:  # thousands of nested braces: no prompt is in there
                break
            prompt = _prompt_of(value)
            if prompt:
                found = True
                end = stop
                yield match.start(), prompt
        if found:
            return


def _prompt_of(value: Any) -> str:
    """The prompt of a decoded object, "" if it has none: the text under the key `prompt`, or under
    the first key that ends so; a list of sentences is joined, an object with one text of words is
    that text."""
    alike = [
        key for key in value if re.fullmatch(r"(?:[^\W_]+[ _-])*prompt", key.strip(), re.IGNORECASE)
    ]
    key = next((key for key in (*_KEYS, *alike) if key in value), None)
    text = value[key] if key else ""
    if isinstance(text, str):
        return text.strip()
    parts = [text] if isinstance(text, dict) else text if isinstance(text, list) else []
    texts = [
        _prompt_of(part) or _only_text(part) if isinstance(part, dict) else part for part in parts
    ]
    whole = " ".join(part.strip() for part in texts if isinstance(part, str))
    return (
        whole
        if texts and all(isinstance(part, str) for part in texts) and len(whole.split()) > 1
        else ""
    )


def _only_text(value: dict[str, Any]) -> str:
    texts = [each for each in value.values() if isinstance(each, str) and each.strip()]
    return texts[0] if len(texts) == 1 else ""


def scan_key(text: str) -> tuple[str | None, str]:
    """The value after the first key `prompt` behind a brace, in JSON that the decoder refused, and
    how it was found; None where there is none."""
    match = _KEY.search(text, text.index("{"))
    if match is None:
        return None, "nothing"
    rest = text[match.end() :]
    quote = rest[:1]
    if quote in JSON_QUOTES:
        value, closed, after = _read_quoted(rest, JSON_QUOTES[quote])
        if not closed or "}" not in after:
            parsed_as = "unclosed"
        else:
            parsed_as = "single quotes" if quote == "'" else "key scan"
    elif re.match(
        r"[\[{]|(?:null|true|false|none|-?\d[\d.eE+-]*)\s*(?:[,}\n]|$)", rest, re.IGNORECASE
    ):
        return None, "nothing"  # a value, but not text
    else:
        value = re.split(r"[}\n]", rest, maxsplit=1)[0].rstrip().rstrip(",")
        parsed_as = "key scan" if "}" in rest else "unclosed"
    value = value.strip()
    return (value, parsed_as) if value else (None, "nothing")


def _read_quoted(rest: str, closing: str) -> tuple[str, bool, str]:
    """(value, whether its closing quote was found, what follows) of text that begins with a
    quote."""
    out: list[str] = []
    i = 1
    while i < len(rest):
        char = rest[i]
        if char == "\\" and i + 1 < len(rest):
            code = re.match(r"u([0-9a-fA-F]{4})", rest[i + 1 : i + 6])
            if code:
                out.append(chr(int(code[1], 16)))
                i += 6
            else:
                out.append(_ESCAPES.get(rest[i + 1], rest[i : i + 2]))
                i += 2
            continue
        if char == closing and _AFTER_VALUE.match(rest, i + 1):
            return _join_surrogates("".join(out)), True, rest[i + 1 :]
        out.append(char)
        i += 1
    value = re.sub(r"\s*```\s*$", "", "".join(out))
    value = re.sub(r"\s*\}\s*$", "", value)
    return _join_surrogates(value), False, ""


def _join_surrogates(text: str) -> str:
    """Escapes give an emoji as two halves; put them together, and replace a half that stands
    alone."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def json_object_closed(text: str) -> bool:
    """Whether a top-level JSON object in text has closed, so that generation may stop.

    Braces inside double-quoted strings don't count, nor a brace that no key follows. In an answer
    that begins with a reason ("1."), only what follows "2." counts: the reason may quote an object.
    """
    if re.match(r"\s*1[.)]", text):
        text = (re.split(r"\n\s*2[.)]", text, maxsplit=1) + [""])[1]
    for match in re.finditer(r"\{(?=\s*[\"'\u201c}])", text):
        depth, in_string, escaped = 0, False, False
        for char in text[match.start() :]:
            if escaped:
                escaped = False
            elif in_string:
                if char == "\\":
                    escaped = True
                elif char == '"':
                    in_string = False
            elif char == '"':
                in_string = True
            elif char == "{":
                depth += 1
            elif char == "}":
                depth -= 1
                if depth == 0:
                    return True
        return False
    return False
