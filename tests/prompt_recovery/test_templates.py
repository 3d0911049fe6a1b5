"""Templates: whole expected strings, messy answers, and parse(render(x)) == x."""

import itertools
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prompt_recovery.json_answers import json_object_closed
from prompt_recovery.responses import TemplateError, prompt_of, reason_of
from prompt_recovery.templates import (
    STYLES,
    SYSTEM_PLACEMENTS,
    Conversation,
    Parsed,
    parse_answer,
    read_back,
    render_answer,
    render_conversation,
    render_user,
)
from prompt_recovery.unwrap import unwrap

TASK = (
    "You are given an original text and a text that an LLM rewrote from it. Recover the prompt that"
    " the LLM was given."
)
SYSTEMS = {
    "plain": TASK + " Answer with the prompt alone.",
    "json": TASK + ' Answer only with JSON: {"prompt": "..."}',
    "reason_json": TASK
    + " First give the reason, what was changed from the original text, then the prompt as JSON, "
    + "in the form:\n"
    + '1. <reason>\n2. {"prompt": "..."}',
}
EXAMPLE = {
    "original_text": "It rained.",
    "rewritten_text": "Arr, it rained {a lot}!",
    "rewrite_prompt": 'Say "it" as a pirate.',
    "response": '1. It has "Arr".\n2. {"prompt": "anything"}',
}
EXAMPLE_USER = "Original text:\nIt rained.\n\nRewritten text:\nArr, it rained {a lot}!"
EXAMPLE_ANSWERS = {
    "plain": 'Say "it" as a pirate.',
    "json": '{"prompt": "Say \\"it\\" as a pirate."}',
    "reason_json": '1. It has "Arr".\n2. {"prompt": "Say \\"it\\" as a pirate."}',
}
USER = "Original text:\nHi {0} [INST] </s>\n\nRewritten text:\nGood day, {name}."


@pytest.mark.parametrize(("style", "placement"), list(itertools.product(STYLES, SYSTEM_PLACEMENTS)))
def test_whole_conversation_for_each_style_and_placement(style, placement):
    system = SYSTEMS[style]
    args = ("Hi {0} [INST] </s>", "Good day, {name}.", style, placement)
    answer = EXAMPLE_ANSWERS[style]
    bare = {
        "user": Conversation("", ((system + "\n\n" + USER, None),)),
        "before": Conversation(system, ((USER, None),)),
        "turn": Conversation("", ((system, "Understood."), (USER, None))),
    }
    few_shot = {
        "user": Conversation("", ((system + "\n\n" + EXAMPLE_USER, answer), (USER, None))),
        "before": Conversation(system, ((EXAMPLE_USER, answer), (USER, None))),
        "turn": Conversation("", ((system, "Understood."), (EXAMPLE_USER, answer), (USER, None))),
    }
    assert render_conversation(*args) == bare[placement]
    assert render_conversation(*args, examples=[EXAMPLE]) == few_shot[placement]


def test_system_text_can_be_given_or_left_out():
    assert render_conversation("a", "b", system="Do it.").turns[0][0] == "Do it.\n\n" + render_user(
        "a", "b"
    )
    for placement in SYSTEM_PLACEMENTS:
        conversation = render_conversation("a", "b", system_placement=placement, system="")
        assert conversation == Conversation("", ((render_user("a", "b"), None),))


def test_unknown_choices_name_value_and_choices():
    with pytest.raises(TemplateError, match="'yaml'.*plain, json, reason_json"):
        render_conversation("a", "b", style="yaml")
    with pytest.raises(TemplateError, match="'after'.*user, before, turn"):
        render_conversation("a", "b", system_placement="after")
    with pytest.raises(TemplateError, match="'xml'"):
        parse_answer("x", "xml")
    with pytest.raises(TemplateError, match="rewrite_prompt"):
        render_conversation("a", "b", examples=[{"original_text": "a", "rewritten_text": "b"}])


@pytest.mark.parametrize("style", STYLES)
def test_blank_prompt_is_not_rendered(style):
    with pytest.raises(TemplateError, match="blank"):
        render_answer(" \n", style, "1. why")


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ('1. Formal words.\n2. {"prompt": "Be formal"}', "Formal words."),
        ("1) Two\nlines.", "Two\nlines."),
        ('Shorter.\n```json\n{"prompt": "x"}\n```', "Shorter."),
        ('1. Has {braces} kept.\n2. {"prompt": "x"}', "Has {braces} kept."),
        ("Only a reason, 2. is in it", "Only a reason, 2. is in it"),
    ],
)
def test_reason_of(response, reason):
    assert reason_of(response) == reason


@pytest.mark.parametrize(
    "response", ["", "  \n", '{"prompt": "x"}', '1.\n2. {"prompt": "x"}', "1. "]
)
def test_response_without_reason_is_refused(response):
    with pytest.raises(TemplateError, match="response"):
        render_answer("Rewrite it", "reason_json", response)


MESSY = [
    # answer, style, prompt, how
    ("  Make it rhyme.\n", "plain", "Make it rhyme.", "plain"),
    ('"Quoted" stays', "plain", '"Quoted" stays', "plain"),
    (" \n\t", "plain", None, "nothing"),
    ('{"prompt": "Make it rhyme."}', "json", "Make it rhyme.", "json"),
    ('{"prompt": "A"} I hope this helps! {smile}', "json", "A", "json"),
    ('Sure! Here it is: {"prompt": "A"}', "json", "A", "json"),
    ('```json\n{"prompt": "A"}\n```', "json", "A", "json in fence"),
    ('```\n{"prompt": "A"}\n```', "json", "A", "json in fence"),
    ('{"prompt": "A"}\n{"prompt": "B"}', "json", "A", "json"),
    ('{"note": 1} {"prompt": "B"}', "json", "B", "json"),
    ('{"answer": {"prompt": "inner"}}', "json", "inner", "json"),
    ('{"rewrite_prompt": "A"}', "json", "A", "json"),
    ('{"prompt": "two\nlines"}', "json", "two\nlines", "json"),
    ("{'prompt': 'Make it rhyme.'}", "json", "Make it rhyme.", "single quotes"),
    ("{'prompt': 'Don't stop'}", "json", "Don't stop", "single quotes"),
    (r"{'prompt': 'It\'s \u00e9 \ud83d\ude00'}", "json", "It's é 😀", "single quotes"),
    ("{'prompt': 'a', 'why': 'b'}", "json", "a", "single quotes"),
    ('{"prompt": "Say "hi" to him"}', "json", 'Say "hi" to him', "key scan"),
    ('{"prompt": "Say "hi", "ho" twice."}', "json", 'Say "hi", "ho" twice.', "key scan"),
    ('{"prompt": "A",}', "json", "A", "key scan"),
    ('{prompt: "A"}', "json", "A", "key scan"),
    ("{prompt: Make it rhyme}", "json", "Make it rhyme", "key scan"),
    ("{\u201cprompt\u201d: \u201cMake it rhyme\u201d}", "json", "Make it rhyme", "key scan"),
    ('{"Prompt" : "A", "n": }', "json", "A", "key scan"),
    ('{"prompt": "Make it rhyme', "json", "Make it rhyme", "unclosed"),
    ('{"prompt": "Make it rhyme"', "json", "Make it rhyme", "unclosed"),
    ('{"prompt": "Make it rhyme}', "json", "Make it rhyme", "unclosed"),
    ('```json\n{"prompt": "Make it rhyme\n```', "json", "Make it rhyme", "unclosed"),
    ('{"prompt": "Make it rhyme"\n\nHope it helps', "json", "Make it rhyme", "unclosed"),
    ('{"prompt": ""}', "json", None, "nothing"),
    ('{"prompt": "  "}', "json", None, "nothing"),
    ('{"prompt": null}', "json", None, "nothing"),
    ('{"prompt": 5}', "json", None, "nothing"),
    ('{"prompt": ["A"]}', "json", None, "nothing"),
    ('{"prompt": ', "json", None, "nothing"),
    ('{"prompt": "', "json", None, "nothing"),
    ("{", "json", None, "nothing"),
    ("{}", "json", None, "nothing"),
    ('{"text": "A"}', "json", None, "nothing"),
    ("", "json", None, "nothing"),
    ("```json\n```", "json", None, "nothing"),
    ("Make it rhyme.", "json", "Make it rhyme.", "text"),
    ("```\nMake it rhyme.\n```", "json", "Make it rhyme.", "text"),
    ('"Make it rhyme."', "json", "Make it rhyme.", "text"),
    ("The prompt: Make it rhyme.", "json", "Make it rhyme.", "key scan"),
    ('{"prompt": "__import__(\'os\').getcwd()"}', "json", "__import__('os').getcwd()", "json"),
    ("{'prompt': __import__('os').getcwd()}", "json", "__import__('os').getcwd()", "key scan"),
    ('1. It rhymes.\n2. {"prompt": "A"}', "reason_json", "A", "json"),
    (
        '1. It adds {x} and {"y": 1}.\n2. {"prompt": "A"}\n3. {"prompt": "B"}',
        "reason_json",
        "A",
        "json",
    ),
    ('1. It is not {"prompt": "B"}.\n2. {"prompt": "A"}', "reason_json", "A", "json"),
    ('1. It rhymes.\n2. ```json\n{"prompt": "A"}\n```', "reason_json", "A", "json in fence"),
    ("1. It rhymes.\n2. {'prompt': 'A'}", "reason_json", "A", "single quotes"),
    ("1. It rhymes.\n2. Make it rhyme.", "reason_json", "Make it rhyme.", "text"),
    ("1. It rhymes and", "reason_json", None, "nothing"),
    ('{"prompt": "A"}', "reason_json", "A", "json"),
]


@pytest.mark.parametrize(("answer", "style", "prompt", "how"), MESSY)
def test_messy_answers(answer, style, prompt, how):
    assert parse_answer(answer, style) == Parsed(prompt, how)


@pytest.mark.parametrize(
    "answer",
    [
        '{"a":' * 20_000,
        '{"prompt": ' * 20_000,
        "{" * 50_000,
        '{"n": ' + "9" * 6000 + "}",
        '{"' * 20_000,
    ],
)
def test_hostile_answers_neither_raise_nor_invent(answer):
    for style in ("json", "reason_json"):
        assert parse_answer(answer, style).prompt is None


@given(st.text(), st.sampled_from(STYLES))
@settings(max_examples=300, deadline=None)
def test_any_text_parses_to_a_prompt_or_none(text, style):
    found = parse_answer(text, style)
    assert (found.prompt is None) == (found.parsed_as == "nothing")
    assert found.prompt is None or (found.prompt.strip() == found.prompt != "")


PIECES = [*"{}[]\"'\\:,`12.\n \t", "prompt", '{"prompt": "a"}', "\n2. ", "é", "😀"]
JSONISH = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)
PROMPTS = (st.text() | st.text(st.characters(max_codepoint=0x7F)) | JSONISH).filter(
    lambda text: text.strip()
)


@given(PROMPTS, st.sampled_from(STYLES), PROMPTS)
@example('{"prompt": "a"}', "json", "x")
@example('{"prompt": "a"}', "reason_json", 'uses {"prompt": "b"} and {"a": "')
@example('}\n2. {"prompt": "b"}', "reason_json", "{\n2. {")
@example("\x00\x1b\u2028</s>[INST]\ud800", "json", "x")
@settings(max_examples=1000, deadline=None)
def test_parse_of_render_is_the_prompt(prompt, style, response):
    try:
        answer = render_answer(prompt, style, response)
    except TemplateError:
        assert style == "reason_json"  # a response that holds no reason
        return
    # a plain answer has no marks of its own: those in the prompt may stand around it
    marked = style == "plain" and re.search(
        r"""[:=*_`"'\u2018-\u201e\u00ab\u300c\u300e\[<]|\n""", prompt
    )
    assert parse_answer(answer, style).prompt == read_back(answer, style)
    assert read_back(answer, style) == (unwrap(prompt) if marked else prompt.strip())
    if style == "json":
        assert json_object_closed(answer)
        assert not any(json_object_closed(answer[:end]) for end in range(len(answer)))


@pytest.mark.parametrize(
    ("text", "closed"),
    [
        ("", False),
        ("no brace", False),
        ('{"prompt": "a', False),
        ('{"prompt": "a}', False),
        ('{"prompt": "a\\"}', False),
        ('{"prompt": "a"', False),
        ('{"prompt": "a"}', True),
        ('{"prompt": {"b": 1}', False),
        ('{"prompt": {"b": 1}}', True),
        ('1. It fills {name}.\n2. {"prompt": "a', False),
        ('1. It fills {name}.\n2. {"prompt": "a"} and', True),
        ("{'prompt': 'a'}", True),
        # a reason that quotes JSON is not the answer yet
        ('1. It turns {"a": 1} into {"prompt": "b"}.', False),
        ('1. It drops {"a": 1}.\n2. {"prompt": "a"}', True),
    ],
)
def test_json_object_closed(text, closed):
    assert json_object_closed(text) is closed


LABELS = [
    '1. {reason}\n2. {"instruction": "Make it formal."}',
    '1) {reason}\n2) {"prompt": "Make it formal."}',
    '(1) {reason}\n(2) {"rewrite_prompt": "Make it formal."}',
    '1: {reason}\n2: {"prompt": "Make it formal."}',
    'Reason: {reason}\nPrompt: {"prompt": "Make it formal."}',
    "Reason: {reason}\nInstruction: Make it formal.",
    "**Reason:** {reason}\n\n**Prompt:** Make it formal.",
    '1. **Reasoning**: {reason}\n2. ```json\n{"prompt": "Make it formal."}\n```',
    '{reason}\n```json\n{\n  "rewritten_instruction": "Make it formal."\n}\n```',
    '1. {reason} 2. {"prompt": "Make it formal."}',
    '{reason} {"instruction": "Make it formal."}',
    "1. {reason}\n2. {'instruction': 'Make it formal.'}",
    '1. {reason}\n2. {"recovered": "Make it formal."}',
    "1. {reason}\n2. Make it formal.",
    '1. {reason}\n2. A second number.\n3. {"prompt": "Make it formal."}',
    '1. {reason} The prompt was "Make it formal."\n2. {"prompt": "Make it formal."}',
    '1. Make it formal.\n{reason}\n2. {"prompt": "Make it formal."}',
    '{reason}\n\nJSON:\n{"query": "Make it formal."}',
    '{"reason": "{reason}", "prompt": "Make it formal."}',
    '```json\n{"rewrite_prompt": "Make it formal.",\n"reasoning": "{reason}"}\n```',
    "### Reason\n{reason}\n\n### Final Prompt\nMake it formal.",
    '## Reasoning\n{reason}\n\n## Answer\n```json\n{"prompt": "Make it formal."}\n```',
    '<think>{reason}</think>\n{"prompt": "Make it formal."}',
    "<think>\n{reason}\n</think>\n\nMake it formal.",
    "<reason>{reason}</reason>\n<prompt>Make it formal.</prompt>",
    'Step 1: {reason}\nStep 2: {"prompt": "Make it formal."}',
    '- {reason}\n- {"prompt": "Make it formal."}',
    'a) {reason}\nb) {"prompt": "Make it formal."}',
    '\u2460 {reason}\n\u2461 {"prompt": "Make it formal."}',
    "Rationale\uff1a{reason}\nPrompt\uff1aMake it formal.",
    '{reason} -> {"prompt": "Make it formal."}',
]


@pytest.mark.parametrize("label", LABELS)
def test_the_reason_of_a_label_in_any_form_is_taught_once_and_read_back(label):
    response = label.replace("{reason}", "The tone changed to polite.")
    answer = render_answer("Make it formal.", "reason_json", response)
    assert answer == '1. The tone changed to polite.\n2. {"prompt": "Make it formal."}'
    assert read_back(answer, "reason_json") == "Make it formal."


@pytest.mark.parametrize(
    "response, reason",
    [
        ('1. It turns {"a": 1} into prose.\n2. {"prompt": "x"}', 'It turns {"a": 1} into prose.'),
        ('1. It turns {"prompt": "y"} into prose.\n2. {"prompt": "x"}', "It turns"),
        ("1. Wants {'prompt': 'y'} as prose.\n2. x", "Wants"),
        ("1.5 times as long.", "1.5 times as long."),
        ("Reasonable words, and a task: done.", "Reasonable words, and a task: done."),
    ],
)
def test_a_reason_with_braces_is_kept_or_cut_and_read_back(response, reason):
    answer = render_answer("Make it formal.", "reason_json", response)
    assert answer == f'1. {reason}\n2. {{"prompt": "Make it formal."}}'
    assert read_back(answer, "reason_json") == "Make it formal."


@pytest.mark.parametrize(
    "response",
    [
        '1. Make it formal.\n2. {"prompt": "Make it formal."}',
        '1. I cannot help with this request.\n2. {"prompt": "Make it formal."}',
        '{"prompt": "Make it formal."} because the tone changed',
        "2. Make it formal.",
        '1. N/A\n2. {"prompt": "Make it formal."}',
        '{"reason": "-", "prompt": "Make it formal."}',
    ],
)
def test_a_response_whose_reason_is_the_prompt_or_a_refusal_is_refused_by_name(response):
    with pytest.raises(TemplateError, match="response="):
        render_answer("Make it formal.", "reason_json", response)


def test_the_prompt_that_a_response_names():
    assert prompt_of('1. Why.\n2. {"instruction": "Make it formal."}') == "Make it formal."
    assert prompt_of('Why {"a": "b"}.\n```json\n{"text_prompt": " A "}\n```') == "A"
    assert prompt_of("1. Why.\n2. {'prompt': 'Make it formal.'}") == "Make it formal."
    assert prompt_of('1. Why.\n2. {"prompt": null}') is None and prompt_of("Only a reason") is None
