"""What a submission's rows hold in the end: prompts without what models wrap around them, never
what a scorer reads as missing; and a hidden test.csv that breaks the rules gets an answer for every
row."""

import io
import json

import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pandas._libs.parsers import STR_NA_VALUES

from prompt_recovery import data, inputs
from prompt_recovery.data import DataError
from prompt_recovery.json_answers import json_object_closed
from prompt_recovery.submission_file import (
    SubmissionError,
    check_submission,
    clean_answer,
    write_submission,
)
from prompt_recovery.templates import STYLES, find_prompt, parse_answer
from prompt_recovery.unwrap import cut_repeated, is_prompt

# --- no prompts ---------------------------------------------------------------------------------

NOTHING = [
    *sorted(STR_NA_VALUES),
    "none",
    "None.",
    '"N/A"',
    "**None**",
    " null ",
    "NAN",
    "(none)",
    "- N/A",
    "Unknown.",
    "-",
    "--",
    "\u2014",
    "...",
    "\u2026",
    "{}",
    "[]",
    '""',
    "''",
    "\u201c\u201d",
    "```\n```",
    "\ufffd",
    "\ufffd\ufffd.",
    "?",
    "!!!",
    "\U0001f600",
    "\u200b",
    "*",
    "_",
    "|",
    "<>",
    "\u00b7",
    "</s>",
    "[/INST]",
    "\u0301",
]
PROMPTS = [
    "Rhyme",
    "x",
    "7",
    "Make it rhyme.",
    "\u6539\u5199",
    "\u0639\u0631\u0628\u064a",
    "None of the names may stay.",
    "nana",
    "N/A values become zero",
    "Add \U0001f600",
    "- Use bullets",
    "C++",
    "Nullify it",
]


def written(answers, tmp_path):
    """What a scorer reads, by pandas' defaults."""
    test = pd.DataFrame({"id": [str(n) for n in range(len(answers))]})
    write_submission(test, answers, tmp_path / "s.csv")
    check_submission(test, tmp_path / "s.csv")
    return pd.read_csv(tmp_path / "s.csv")


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("text", NOTHING)
def test_words_for_nothing_are_no_prompt(text, style):
    assert not is_prompt(text) and clean_answer(text) == ""
    answers = [text] if style == "plain" else [json.dumps({"prompt": text}), text]
    for answer in answers:
        assert find_prompt(answer, style) == (None, "nothing"), answer


@pytest.mark.parametrize("text", PROMPTS)
def test_short_and_odd_prompts_stay(text, tmp_path):
    assert find_prompt(text, "plain").prompt == text
    assert find_prompt(json.dumps({"prompt": text}), "json").prompt == text
    assert not written([clean_answer(text)], tmp_path).isna().any().any()


@pytest.mark.parametrize("text", sorted(STR_NA_VALUES))
def test_the_check_reads_the_file_as_a_scorer_does(text, tmp_path):
    with pytest.raises(
        SubmissionError,
        match="are (blank|read as missing by pandas), which fails the whole submission",
    ):
        written(["Make it rhyme.", text], tmp_path)


@given(st.text())
@example("nan")
@settings(max_examples=300, deadline=None)
def test_no_answer_to_a_row_is_read_as_missing(text):
    cleaned = clean_answer(text)
    file = io.StringIO()
    pd.DataFrame({"a": [cleaned or "Improve it."]}, dtype=str).to_csv(file, index=False)
    assert not pd.read_csv(io.StringIO(file.getvalue()))["a"].isna().any()


# --- repetition ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "once"),
    [
        ("Make it rhyme. " * 9 + "Make it", "Make it rhyme."),
        ("Rewrite this as a poem, " * 3, "Rewrite this as a poem"),
        (
            "Say it as a pirate. Use slang. Use slang. Use slang. Use sl",
            "Say it as a pirate. Use slang",
        ),
        ("very very very very very", "very"),
        ("Make it scarier and scarier and scarier and scarier and", "Make it scarier and"),
        ("No" + "!" * 50, "No!"),
        (
            "\u6539\u5199\u8fd9\u6bb5\u6587\u5b57\u3002" * 5,
            "\u6539\u5199\u8fd9\u6bb5\u6587\u5b57\u3002",
        ),
        ("Line one\n" * 20, "Line one"),
    ],
)
def test_a_phrase_repeated_to_the_limit_stays_once_and_is_counted(text, once):
    found = find_prompt(text, "plain", at_limit=True)
    assert found.prompt.rstrip(".") == once.rstrip(".") and found.parsed_as == "plain, repeated"
    assert find_prompt(text, "plain").parsed_as == "plain"  # one that ended by itself may mean it
    cut = find_prompt('{"prompt": "' + text.replace("\n", " "), "json", at_limit=True)
    assert cut.parsed_as == "unclosed, repeated" and len(cut.prompt) <= len(once) + 1


@pytest.mark.parametrize(
    "text",
    [
        "Make it rhyme.",
        "Say hip hip hooray",
        "Use a, b, c and d as the names",
        "Shorten it to 1000000",
        "",
        "a",
    ],
)
def test_what_is_not_repeated_three_times_stays(text):
    assert cut_repeated(text) == text


# --- what stands around a prompt ----------------------------------------------------------------

P = "Rewrite this text as a pirate's song."
AROUND = [
    "**Prompt:** {}",
    "**Prompt**: {}",
    "Prompt: {}",
    "prompt = {}",
    "# Prompt\n{}",
    "### Prompt:\n\n{}",
    "> Prompt: {}",
    "The prompt was: {}",
    "The prompt is: {}",
    "The prompt: {}",
    "The original prompt was: {}",
    "Instruction: {}",
    "The prompt given to the LLM was: {}",
    "The prompt that the LLM was given is: {}",
    "Rewrite prompt: {}",
    "rewrite_prompt: {}",
    "rewrite\\_prompt: {}",
    "text_prompt: {}",
    "The most likely prompt is: {}",
    "Answer: {}",
    "Here is the prompt: {}",
    "Sure! Here's the recovered prompt:\n\n{}",
    "The prompt might have been: {}",
    "The rewriting prompt used was:\n{}",
    "*Prompt*: {}",
    "__Prompt:__ {}",
    "The final answer is: {}",
    '"{}"',
    "'{}'",
    "\u201c{}\u201d",
    "\u2018{}\u2019",
    "\u00ab{}\u00bb",
    "\u201e{}\u201c",
    "`{}`",
    "**{}**",
    "*{}*",
    '"""{}"""',
    "```\n{}\n```",
    "```text\n{}\n```",
    '**Prompt:** "{}"',
    "The prompt was: \u201c{}\u201d",
    '"Prompt: {}"',
    '**"{}"**',
    '"{}".',
    "Prompt: **{}**",
    "**Prompt: {}**",
    "{}\n\nOriginal text:\nIt rained.",
    "{}\nOriginal text: It rained.\nRewritten text: Arr.",
    "{}\n\n**Rewritten text:** Arr",
    "{}\n\nOriginal Text:\nx\n\nRewritten Text:\ny",
    "{} [/INST]",
    "{}[/INST] Sure, here is",
    "[/INST] {}",
    "{}</s>",
    "{} </s><s>[INST] x",
    "{}\n\n[INST] Original text:",
    "</s>{}",
    "{}<|im_end|>",
    "  {}\n\n",
    '{{"prompt": "{}"}}',
    '```json\n{{"prompt": "{}"}}\n```',
]


@pytest.mark.parametrize("around", AROUND)
def test_what_models_wrap_around_a_plain_prompt_is_taken_off(around):
    assert parse_answer(around.format(P), "plain") == (P, "plain")
    assert find_prompt(around.format("Summarise"), "plain").prompt == "Summarise"


@pytest.mark.parametrize(
    "text",
    [
        '"Quoted" stays',
        '"One" and "two"',
        "Say 'hello' to him",
        "**Bold** first, **bold** last",
        "'Tis the season, sing it",
        "Write a prompt for a painter",
        "Prompt the reader to act",
        "The prompt was to rewrite it as a poem.",
        "Answer the question as a pirate: be brief",
        "Use this format: title, text",
        "Rewrite the original text as a poem",
        "Add a line at the end: Original text by me",
        "Make it (very) short",
        "[Name] writes to [Name]",
        "{x} stays {y}",
        "Use `code`",
        "First line.\nSecond line.",
        "Instructions for a cook",
        'Begin with "Dear all" and end with "Yours"',
    ],
)
def test_what_belongs_to_the_prompt_stays(text):
    assert parse_answer(text, "plain") == (text, "plain")


OBJECTS = [
    (r'{"rewrite\_prompt": "Make it rhyme."}', "Make it rhyme."),
    (r'{"rewrite\_prompt": "Use snake\_case and \*stars\*."}', "Use snake_case and *stars*."),
    (r"{'rewrite\_prompt': 'Make it rhyme.'}", "Make it rhyme."),
    (r'{"rewrite\_prompt": "Make it rhyme.', "Make it rhyme."),
    (r'{"prompt": "Keep C:\\_temp as it is."}', r"Keep C:\_temp as it is."),
    ('{"text_prompt": "Make it rhyme."}', "Make it rhyme."),
    ('{"Prompt": "Make it rhyme."}', "Make it rhyme."),
    ('{"original_prompt": "Make it rhyme.", "confidence": 0.9}', "Make it rhyme."),
    ('{"rewriting prompt": "Make it rhyme."}', "Make it rhyme."),
    ("{'text_prompt': 'Make it rhyme.'}", "Make it rhyme."),
    ('{"prompt": {"text": "Make it rhyme."}}', "Make it rhyme."),
    ('{"prompt": {"prompt": "Make it rhyme.", "n": 3}}', "Make it rhyme."),
    ('{"prompt": {"instruction": "Make it rhyme.", "n": 3}}', "Make it rhyme."),
    ('{"prompt": ["Make it rhyme."]}', "Make it rhyme."),
    ('{"prompt": ["Make it rhyme.", "Keep it short."]}', "Make it rhyme. Keep it short."),
    ('{"prompt": [{"text": "Make it rhyme."}]}', "Make it rhyme."),
    ('{"rewrite_prompt": ["Make it rhyme."], "n": 1}', "Make it rhyme."),
    ('```json\n{"text_prompt": "Make it rhyme."}\n```', "Make it rhyme."),
]


@pytest.mark.parametrize(("text", "prompt"), OBJECTS)
def test_objects_of_other_forms_hold_a_prompt(text, prompt):
    assert find_prompt(text, "json").prompt == prompt
    assert find_prompt(f"1. It rhymes.\n2. {text}", "reason_json").prompt == prompt
    if text.endswith('"}') and "\\" not in text:
        assert json_object_closed(text)


@pytest.mark.parametrize(
    "text",
    [
        '{"prompt": {"a": "x y", "b": "z w"}}',
        '{"prompt": [1, 2]}',
        '{"prompt": []}',
        '{"prompt": {}}',
        '{"prompt": [null]}',
        '{"prompt": true}',
        '{"prompts": 3}',
        '{"prompt": ["Make it rhyme.", 3]}',
        '{"prompt": [[["Make it rhyme."]]]}',
    ],
)
def test_what_is_ambiguous_is_nothing(text):
    assert find_prompt(text, "json") == (None, "nothing")


# --- a hidden test.csv that breaks the rules ----------------------------------------------------

HEAD = b"id,original_text,rewritten_text\n"
RULES = {
    "bare CR": (HEAD + b"1,a\rb,c\n2,d,e\n", ["1", "2"], ["a\rb", "d"]),
    "bare CRs as line ends": (
        HEAD.replace(b"\n", b"\r") + b"1,a,c\r2,d,e\r3,f\r",
        ["1", "2", "3"],
        ["a", "d", "f"],
    ),
    "blank ids": (HEAD + b"1,a,b\n,c,d\n  ,e,f\n", ["1", "", "  "], ["a", "c", "e"]),
    "doubled ids": (HEAD + b"1,a,b\n1,c,d\n", ["1", "1"], ["a", "c"]),
    "latin-1": (
        HEAD + "1,caf\u00e9,b\n2,na\u00efve,d\n".encode("latin-1"),
        ["1", "2"],
        ["caf\u00e9", "na\u00efve"],
    ),
    "Windows-1252": (
        HEAD + "1,\u201ca\u201d \u2014 b,c\n".encode("cp1252"),
        ["1"],
        ["\u201ca\u201d \u2014 b"],
    ),
    "UTF-16": ("id,original_text,rewritten_text\n1,\u00e9,b\n".encode("utf-16"), ["1"], ["\u00e9"]),
    "bytes of no encoding": (HEAD + b"1,a\x81\xff,b\n", ["1"], ["a\x81\xff"]),
    "a comma without quotes": (HEAD + b"1,a,b, and c\n2,d,e\n", ["1", "2"], ["a", "d"]),
    "a row cut short": (HEAD + b"1,a,b\n2,c\n3\n", ["1", "2", "3"], ["a", "c", ""]),
    "a stray quote": (HEAD + b'1,a "b" c,d\n2,"e" f,g\n', ["1", "2"], ['a "b" c', "e f"]),
    "an open quote": (HEAD + b'1,a,b\n2,"c,d\n', ["1", "2"], ["a", "c,d\n"]),
    "NUL": (HEAD + b"1,a\x00b,c\n\x002,d,e,f\n", ["1", "2"], ["ab", "d"]),
    "a column is missing": (b"id,original_text\n1,a\n2,b\n", ["1", "2"], ["a", "b"]),
    "a column twice": (b"id,original_text,rewritten_text,id\n1,a,b,9\n", ["1"], ["a"]),
}


@pytest.mark.parametrize("kind", RULES)
def test_the_hidden_file_gets_a_row_for_each_of_its_rows_and_the_trouble_is_said(
    kind, tmp_path, monkeypatch, capsys
):
    content, ids, texts = RULES[kind]
    path = tmp_path / "test.csv"
    path.write_bytes(content)
    try:
        data.read_test(path)
        strict = True
    except DataError:
        strict = False
    assert not strict or kind in ("bare CRs as line ends", "a stray quote", "NUL", "a column twice")
    monkeypatch.delenv(inputs.RERUN, raising=False)
    if not strict:
        with pytest.raises(DataError, match="test.csv"):
            inputs.read_test(path)
    monkeypatch.setenv(inputs.RERUN, "1")
    capsys.readouterr()
    test = inputs.read_test(path)
    assert test["id"].to_list() == ids and test["original_text"].to_list() == texts
    assert list(test.columns) == list(data.TEST_COLUMNS) and not test.isna().any().any()
    assert strict or f"{len(ids)} rows are read all the same: {path}" in capsys.readouterr().out
    write_submission(test, ["Improve it."] * len(test), tmp_path / "s.csv")
    check_submission(test, tmp_path / "s.csv")


def test_a_sound_file_is_read_the_same_in_both_runs(tmp_path, monkeypatch, capsys):
    path = tmp_path / "test.csv"
    path.write_bytes(HEAD + '007,"a, b\r\nc","d ""e"""\nNA,caf\u00e9,\u6f22\n'.encode())
    public = inputs.read_test(path)
    monkeypatch.setenv(inputs.RERUN, "1")
    assert inputs.read_test(path).equals(public) and capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [b"", b"\n\n", b"number,text\n1,a\n"])
def test_a_file_without_ids_is_an_error_in_both_runs(content, tmp_path, monkeypatch):
    (tmp_path / "test.csv").write_bytes(content)
    monkeypatch.setenv(inputs.RERUN, "1")
    with pytest.raises(DataError, match="no column id"):
        inputs.read_test(tmp_path / "test.csv")
    with pytest.raises(DataError, match="No file"):
        inputs.read_test(tmp_path / "none.csv")
