"""What the model is asked and how it answers: the styles, each with its renderer and its parser
side by side.

Texts are raw strings without [INST] markers: tokenizer.py adds those as ids, so no user text can
forge them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from prompt_recovery.json_answers import JSON_QUOTES, json_object_closed, prompt_objects, scan_key
from prompt_recovery.responses import TemplateError, reason_of
from prompt_recovery.unwrap import cut_repeated, is_prompt, reads_as_text, unwrap

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


@dataclass(frozen=True)
class Conversation:
    """before: stands before the first instruction, or "". turns: (user, assistant), of which the
    last assistant is None."""

    before: str
    turns: tuple[tuple[str, str | None], ...]


class Parsed(NamedTuple):
    """A recovered prompt, stripped and never blank, or None; and how it was found."""

    prompt: str | None
    parsed_as: str


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

    Args:
        original_text, rewritten_text: of the row, as they are.
        style: how the answer is to be written, one of STYLES.
        system_placement: where the system text stands: in the first user message ("user"), before
            the first instruction ("before"), or as a first exchange ("turn").
        examples: rows with the columns of data.ROW_COLUMNS, and response for reason_json; each
            becomes an earlier complete turn.
        system: the system text; None: that of the style; "": none.

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
    # a brace in the reason may spoil the answer where it is read: then it ends before the brace
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


# --- parsing --------------------------------------------------------------------------------------

# What Markdown escapes and JSON does not: "\_" is a mistake in a JSON string.
_MARKDOWN = re.compile(r"\\(\\|[_*#\[\]()~>+.!-])")
_LINE_KEY = re.compile(
    r"^[ \t]*(?:\d[.)][ \t]*)?(?:the[ \t]+)?(?:rewrite[_ ])?prompt[ \t]*(?::|=|\bis:)[ \t]*",
    re.IGNORECASE | re.MULTILINE,
)


def find_prompt(text: str, style: str, at_limit: bool = False) -> Parsed:
    """`parse_answer`, and what it finds is a prompt: words for nothing ("N/A", "-") are "nothing".

    at_limit: the answer was cut at its greatest length. A phrase that it repeats until there is
    kept once, and `parsed_as` says "repeated" too.
    """
    prompt, parsed_as = parse_answer(text, style)
    if prompt is not None and at_limit and (once := cut_repeated(prompt)) != prompt:
        prompt, parsed_as = once, f"{parsed_as}, repeated"
    return Parsed(prompt, parsed_as) if prompt and is_prompt(prompt) else Parsed(None, "nothing")


def parse_answer(text: str, style: str) -> Parsed:
    """The prompt in what a model wrote, and how it was found; never raises for any text, never
    executes it.

    `parsed_as` is "plain", "json", "json in fence", "single quotes", "unclosed", "key scan", "text"
    or "nothing" (prompt None). parse_answer(render_answer(x, style), style).prompt == x.strip() for
    every x that is not blank; in a plain answer, which has no marks of its own, what stands around
    a prompt is taken off x too, see `unwrap`. Raises TemplateError for an unknown style only.
    """
    _check_style(style)
    if style == "plain":
        prompt = unwrap(text)
        # the whole answer is an object, as models write that were not trained to write plainly
        inner = next(prompt_objects(prompt), None) if prompt.startswith("{") else None
        if inner and inner[0] == 0 and reads_as_text(inner[1]):
            prompt = inner[1]
        return Parsed(prompt, "plain") if prompt else Parsed(None, "nothing")
    if not any(prompt_objects(text)):
        text = _MARKDOWN.sub(lambda found: found[0] if found[1] == "\\" else found[1], text)
    objects = list(prompt_objects(text))
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
        return Parsed(*scan_key(text))
    return _from_text(text, style)


def _from_text(text: str, style: str) -> Parsed:
    """The prompt in an answer without a brace."""
    text = re.sub(r"^\s*```[ \t]*(?:json|text)?[ \t]*(?:\n|$)|\n?\s*```\s*$", "", text)
    key = _LINE_KEY.search(text)
    if key:
        text, parsed_as = text[key.end() :].strip().split("\n", 1)[0], "key scan"
    else:
        parsed_as = "text"
        if style == "reason_json":
            second = re.search(r"(?:^|\n)\s*2[.)]\s*", text)
            if second:
                text = text[second.end() :]
            elif re.match(r"\s*1[.)]", text):
                # only the reason was written, and a reason is no prompt
                return Parsed(None, "nothing")
    text = text.strip()
    if len(text) >= 2 and JSON_QUOTES.get(text[0]) == text[-1] and text[-1] not in text[1:-1]:
        text = text[1:-1].strip()
    text = unwrap(text)
    return Parsed(text, parsed_as) if text else Parsed(None, "nothing")
