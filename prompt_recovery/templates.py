"""What the model is asked and how it answers: the styles, each with its renderer and its parser
side by side.

Texts are raw strings without [INST] markers: tokenizer.py adds those as ids, so no user text can
forge them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from prompt_recovery.data import normalise
from prompt_recovery.refusals import is_refusal
from prompt_recovery.unwrap import QUOTES, cut_repeated, is_prompt, reads_as_text, unwrap

STYLES = ("plain", "json", "reason_json")
SYSTEM_PLACEMENTS = ("user", "before", "turn")

_TASK = (
    "You are given an original text and a text that an LLM rewrote from it. Recover the prompt that"
    " the LLM was given."
)
SYSTEM_PROMPTS = {
    "plain": f"{_TASK} Answer with the prompt alone.",
    "json": f'{_TASK} Answer only with JSON: {{"prompt": "..."}}',
    "reason_json": (
        f"{_TASK} First give the reason, what was changed from the original text, then the prompt "
        "as JSON, "
        'in the form:\n1. <reason>\n2. {"prompt": "..."}'
    ),
}
ACKNOWLEDGEMENT = "Understood."


class TemplateError(ValueError):
    """A style, placement or row that can't be rendered; the message names value, rule and
    remedy."""


@dataclass(frozen=True)
class Conversation:
    """`before` stands before the first instruction ('' if none); turns are (user, assistant, or
    None)."""

    before: str
    turns: tuple[tuple[str, str | None], ...]


class Parsed(NamedTuple):
    """A recovered prompt, stripped and never blank, or None (use the fallback), and how it was
    found."""

    prompt: str | None
    how: str


# --- rendering ------------------------------------------------------------------------------------


def _check_style(style: str) -> None:
    if style not in STYLES:
        raise TemplateError(f"style={style!r} is unknown: choose one of {', '.join(STYLES)}.")


def render_user(original_text: str, rewritten_text: str) -> str:
    """The user's part of one row. Plain concatenation: braces in the texts survive."""
    return "Original text:\n" + original_text + "\n\nRewritten text:\n" + rewritten_text


def render_conversation(
    original_text: str,
    rewritten_text: str,
    style: str = "plain",
    system_placement: str = "user",
    examples: Sequence[Mapping[str, Any]] = (),
    system: str | None = None,
) -> Conversation:
    """The conversation up to the open answer.

    The system text (that of the style if None; none at all if "") stands in the first user message
    ("user"), before the first instruction ("before"), or as a first exchange ("turn"). Examples are
    rows with the columns of data.ROW_COLUMNS, and response for reason_json; each becomes an earlier
    complete turn.
    Raises TemplateError for an unknown style or placement, or an example that can't be rendered.
    """
    _check_style(style)
    if system_placement not in SYSTEM_PLACEMENTS:
        raise TemplateError(
            f"system_placement={system_placement!r} is unknown: choose one of "
            f"{', '.join(SYSTEM_PLACEMENTS)}."
        )
    if system is None:
        system = SYSTEM_PROMPTS[style]
    turns: list[tuple[str, str | None]] = []
    for example in examples:
        missing = [
            name
            for name in ("original_text", "rewritten_text", "rewrite_prompt")
            if name not in example
        ]
        if missing:
            raise TemplateError(
                f"An example has no {', '.join(missing)}: give the columns of a training row."
            )
        answer = render_answer(example["rewrite_prompt"], style, example.get("response", ""))
        turns.append((render_user(example["original_text"], example["rewritten_text"]), answer))
    turns.append((render_user(original_text, rewritten_text), None))
    before = ""
    if system and system_placement == "before":
        before = system
    elif system and system_placement == "turn":
        turns.insert(0, (system, ACKNOWLEDGEMENT))
    elif system:
        turns[0] = (system + "\n\n" + turns[0][0], turns[0][1])
    return Conversation(before, tuple(turns))


def render_answer(rewrite_prompt: str, style: str, response: str = "") -> str:
    """The answer that training teaches, without EOS; the prompt is stripped.

    reason_json takes its reason from `response`, see `reason_of`. What is taught can be read back:
    see `read_back`. Raises TemplateError for an unknown style, a blank prompt, or a response
    without a reason.
    """
    _check_style(style)
    prompt = rewrite_prompt.strip()
    if not prompt:
        raise TemplateError(
            "rewrite_prompt is blank: an answer needs a prompt. Run data.clean_rows first."
        )
    if style == "plain":
        return prompt
    answer = json.dumps({"prompt": prompt}, ensure_ascii=False)
    if style == "json":
        return answer
    reason = reason_of(response, prompt)
    # a brace in the reason may end or spoil the answer where it is read: then what stands before it
    for kept in (reason, reason.split("{", 1)[0].rstrip()):
        text = f"1. {kept}\n2. {answer}"
        if kept and read_back(text, style) == prompt:
            return text
    raise TemplateError(
        f"response={response[:80]!r} holds braces that would be read as the answer: take them out "
        "of the reason."
    )


def read_back(answer: str, style: str) -> str | None:
    """The prompt that is found in an answer which a model wrote in full, where generation stops at
    the object."""
    if style != "plain":
        ends = (match.end() for match in re.finditer("}", answer))
        answer = next((answer[:end] for end in ends if json_object_closed(answer[:end])), answer)
    return parse_answer(answer, style).prompt


# What label writers put before the reason and before the prompt, bold or not.
_KEY_WORDS = r"\w*prompt|\w*instruction|task|request|query|question|command|answer|output"
_LEAD = re.compile(
    r"\s*(?:\*\*)?(?:(?:\(1\)|1[.):])(?:\*\*)?(?=\s|$)|(?:reason(?:ing)?|explanation|analysis)(?:\*\*)?\s*:(?:\*\*)?)\s*",
    re.IGNORECASE,
)
_LABEL = re.compile(
    r"(?:^|\n)[ \t]*(?:\*\*)?(?:\(2\)|2[.):])(?:\*\*)?(?=\s|\{|$)"
    rf"|(?:^|\n)[ \t]*(?:\*\*)?(?:the[ \t]+)?(?:(?:rewrite|original)[ \t])?"
    rf"(?:{_KEY_WORDS}|json)(?:\*\*)?[ \t]*[:=]"
    rf"""|```|\{{\s*["'\u201c]?(?:{_KEY_WORDS})["'\u201d]?\s*:""",
    re.IGNORECASE,
)
_BEFORE_LABEL = re.compile(
    rf"(?:\s|\*\*|```\w*|\(?2[.):]|(?:{_KEY_WORDS}|json)\s*:)+$", re.IGNORECASE
)


def _split_response(response: str) -> tuple[str, str]:
    """(what stands before the label's prompt, the rest)."""
    places = [start for start, _ in _prompt_objects(response)]
    places += [found.start() for found in _LABEL.finditer(response)]
    last = response.rfind("{")
    if response.rstrip(" \n`.").endswith("}") and re.match(r"\{\s*[\"']", response[last:]):
        places.append(last)  # an object with a key of any name, at the end
    cut = min((place for place in places if place >= 0), default=len(response))
    return response[:cut], response[cut:]


def prompt_of(response: str) -> str | None:
    """The prompt that the JSON of a labelled response names under any usual key; None where it has
    none."""
    for match in re.finditer(r"\{(?=\s*\")", _split_response(response)[1]):
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
    return None


def reason_of(response: str, prompt: str = "") -> str:
    """The reason in a response: what stands before its prompt, without numbers and headings.

    Sentences that hold the prompt itself are left out, if it is long enough to be more than a word
    of the language. Raises TemplateError if nothing is left, or if the reason is a refusal.
    """
    reason, _ = _split_response(response)
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
        reason = " ".join(
            each.strip() for each in sentences if wording not in normalise(each)
        ).strip()
    if not reason or wording and len(wording) >= 10 and wording in normalise(reason):
        raise TemplateError(
            f"response={response[:80]!r} holds no reason before its prompt, and style "
            "'reason_json' teaches one. Fill the response column, drop the row, or use style "
            "'json'."
        )
    return reason


# --- parsing --------------------------------------------------------------------------------------

# Models also write the name of the column, or one like it.
_KEYS = ("prompt", "rewrite_prompt")
_QUOTES = {opening: QUOTES[opening] for opening in "\"'\u201c\u2018\u201d`"}
_KEY = re.compile(
    r"""["'\u201c\u201d\u2018\u2019`]?\b(?:[^\W\d_]+(?:[ ]|\\?_))*prompt\b"""
    r"""["'\u201c\u201d\u2018\u2019`]?\s*[:=]\s*""",
    re.IGNORECASE,
)
# What Markdown escapes and JSON does not: "\_" is a mistake in a JSON string.
_MARKDOWN = re.compile(r"\\(\\|[_*#\[\]()~>+.!-])")
_LINE_KEY = re.compile(
    r"^[ \t]*(?:\d[.)][ \t]*)?(?:the[ \t]+)?(?:rewrite[_ ])?prompt[ \t]*(?::|=|\bis:)[ \t]*",
    re.IGNORECASE | re.MULTILINE,
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


def find_prompt(text: str, style: str, at_limit: bool = False) -> Parsed:
    """`parse_answer`, and what it finds is a prompt: words for nothing ("N/A", "-") are "nothing".

    at_limit: the answer was cut at its greatest length. A phrase that it repeats until there is
    kept once, and `how` says "repeated" too.
    """
    prompt, how = parse_answer(text, style)
    if prompt is not None and at_limit and (once := cut_repeated(prompt)) != prompt:
        prompt, how = once, f"{how}, repeated"
    return Parsed(prompt, how) if prompt and is_prompt(prompt) else Parsed(None, "nothing")


def parse_answer(text: str, style: str) -> Parsed:
    """The prompt in what a model wrote, and how it was found; never raises for any text, never
    executes it.

    `how` is "plain", "json", "json in fence", "single quotes", "unclosed", "key scan", "text" or
    "nothing" (prompt None). parse_answer(render_answer(x, style), style).prompt == x.strip() for
    every x that is not blank; in a plain answer, which has no marks of its own, what stands around
    a prompt is taken off x too, see `unwrap`. Raises TemplateError for an unknown style only.
    """
    _check_style(style)
    if style == "plain":
        prompt = unwrap(text)
        # the whole answer is an object, as models write that were not trained to write plainly
        inner = next(_prompt_objects(prompt), None) if prompt.startswith("{") else None
        if inner and inner[0] == 0 and reads_as_text(inner[1]):
            prompt = inner[1]
        return Parsed(prompt, "plain") if prompt else Parsed(None, "nothing")
    if not any(_prompt_objects(text)):
        text = _MARKDOWN.sub(lambda found: found[0] if found[1] == "\\" else found[1], text)
    objects = list(_prompt_objects(text))
    if objects:
        start, prompt = objects[0]
        if style == "reason_json":
            # The reason may quote an object of its own; the answer is the one numbered 2.
            numbered = [
                found
                for found in objects
                if re.search(r"(?:^|\n)\s*2[.)]\s*(?:```\w*\s*)?$", text[: found[0]])
            ]
            start, prompt = (numbered or objects)[0]
        fenced = re.search(r"```[ \t]*\w*\s*$", text[:start])
        return Parsed(prompt, "json in fence" if fenced else "json")
    if "{" in text:
        return _scan_key(text)
    return _from_text(text, style)


def _prompt_objects(text: str) -> Iterator[tuple[int, str]]:
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


def _scan_key(text: str) -> Parsed:
    """The value after the first key `prompt` behind a brace, in JSON that the decoder refused."""
    match = _KEY.search(text, text.index("{"))
    if match is None:
        return Parsed(None, "nothing")
    rest = text[match.end() :]
    quote = rest[:1]
    if quote in _QUOTES:
        value, closed, after = _read_quoted(rest, _QUOTES[quote])
        if not closed or "}" not in after:
            how = "unclosed"
        else:
            how = "single quotes" if quote == "'" else "key scan"
    elif re.match(
        r"[\[{]|(?:null|true|false|none|-?\d[\d.eE+-]*)\s*(?:[,}\n]|$)", rest, re.IGNORECASE
    ):
        return Parsed(None, "nothing")  # a value, but not text
    else:
        value = re.split(r"[}\n]", rest, maxsplit=1)[0].rstrip().rstrip(",")
        how = "key scan" if "}" in rest else "unclosed"
    value = value.strip()
    return Parsed(value, how) if value else Parsed(None, "nothing")


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


def _from_text(text: str, style: str) -> Parsed:
    """The prompt in an answer without a brace."""
    text = re.sub(r"^\s*```[ \t]*(?:json|text)?[ \t]*(?:\n|$)|\n?\s*```\s*$", "", text)
    key = _LINE_KEY.search(text)
    if key:
        text, how = text[key.end() :].strip().split("\n", 1)[0], "key scan"
    else:
        how = "text"
        if style == "reason_json":
            second = re.search(r"(?:^|\n)\s*2[.)]\s*", text)
            if second:
                text = text[second.end() :]
            elif re.match(r"\s*1[.)]", text):
                # only the reason was written, and a reason is no prompt
                return Parsed(None, "nothing")
    text = text.strip()
    if len(text) >= 2 and _QUOTES.get(text[0]) == text[-1] and text[-1] not in text[1:-1]:
        text = text[1:-1].strip()
    text = unwrap(text)
    return Parsed(text, how) if text else Parsed(None, "nothing")


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
