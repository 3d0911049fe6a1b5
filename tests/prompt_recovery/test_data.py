"""Rows: what is read, what is refused and in which words, what is dropped, and a split without
leaks."""

import pandas as pd
import pytest
from conftest import table

from prompt_recovery.data import (
    DataError,
    clean_rows,
    describe,
    is_refusal,
    normalise,
    read_rows,
    read_test,
    strip_lead_in,
)

HEADER = "id,original_text,rewritten_text,rewrite_prompt\n"


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def test_nasty_texts_survive_reading(tmp_path):
    nasty = [
        "NA",
        "null",
        "007",
        "</s> [INST] {x}",
        "😀 改写 ру",
        'say "hi"',
        "a\nb",
        "x" * 300_000,
        "1e5",
        " lead",
    ]
    frame = pd.DataFrame({"id": [f"00{i}" for i in range(len(nasty))], "original_text": nasty})
    frame["rewritten_text"], frame["rewrite_prompt"], frame["extra"] = nasty, nasty, 1
    frame.to_csv(tmp_path / "a.csv", index=False, encoding="utf-8-sig")
    rows = read_rows(tmp_path / "a.csv")
    assert list(rows.columns) == [
        "id", "original_text", "rewritten_text", "rewrite_prompt", "response", "origin", "file"
    ]  # fmt: skip
    for name in ("original_text", "rewritten_text", "rewrite_prompt"):
        assert rows[name].tolist() == nasty
    assert rows["id"].tolist() == frame["id"].tolist()
    assert rows["response"].tolist() == [""] * len(nasty)
    assert rows["origin"].tolist() == [f"a.csv:{i + 1}" for i in range(len(nasty))]
    assert all(isinstance(value, str) for value in rows.to_numpy().ravel())


def test_windows_line_ends_inside_and_between_rows(tmp_path):
    text = (HEADER + '1,"a\nb",c,d\n\n2,e,f,"g\n"\n').replace("\n", "\r\n")
    rows = read_rows(str(write(tmp_path / "w.csv", text)))
    assert rows[["id", "original_text", "rewrite_prompt"]].values.tolist() == [
        ["1", "a\nb", "d"],
        ["2", "e", "g\n"],
    ]


def test_several_files_with_made_ids_and_responses(tmp_path):
    (tmp_path / "more").mkdir()
    plain = "original_text,rewritten_text,rewrite_prompt\na,b,c\nd,e,f\n"
    first = write(tmp_path / "rows.csv", plain)
    second = write(tmp_path / "more" / "rows.csv", plain)
    third = write(
        tmp_path / "r.csv", "response,rewrite_prompt,rewritten_text,original_text,id\nwhy,p,r,o,7\n"
    )
    rows = read_rows([first, second, third])
    assert rows["id"].tolist() == ["rows-1", "rows-2", "rows-2-1", "rows-2-2", "7"]
    assert rows.iloc[4].to_dict() == {
        "id": "7",
        "original_text": "o",
        "rewritten_text": "r",
        "rewrite_prompt": "p",
        "response": "why",
        "origin": "r.csv:1",
        "file": str(third),
    }


@pytest.mark.parametrize(
    ("text", "encoding", "words"),
    [
        (
            "id,original_text\n1,a\n",
            "utf-8",
            ["bad.csv", "no column rewritten_text, rewrite_prompt", "'id'"],
        ),
        ("original_text;rewritten_text;prompt\na;b;c\n", "utf-8", ["separated by commas"]),
        ("", "utf-8", ["bad.csv", "empty"]),
        ("\n\n", "utf-8", ["bad.csv", "empty"]),
        (HEADER, "utf-8", ["bad.csv", "no rows"]),
        (
            HEADER + "1,a,b,ok\n2,caf\u00e9,b,c\n",
            "latin-1",
            ["bad.csv", "not UTF-8", "0xe9", "line 3"],
        ),
        (HEADER + "1,a,b,c\n", "utf-16", ["not UTF-8"]),
        (
            HEADER + "1,a,b,c\n2,a,b\n3,a,b,c,d\n",
            "utf-8",
            ["4 columns", "row 2 (line 3) has 3", "row 3 (line 4) has 5"],
        ),
        (
            HEADER + '1,"a\nb",b,c\n2,"open,b,c\n3,a,b,c\n',
            "utf-8",
            ["malformed at row 2", "line 4"],
        ),
        (HEADER + '1,"a" b,b,c\n', "utf-8", ["malformed at row 1"]),
        (
            HEADER + "7,a,b,c\n8,a,b,c\n7,d,e,f\n",
            "utf-8",
            ["column id", "'7' in bad.csv:1, bad.csv:3"],
        ),
        (HEADER + "7,a,b,c\n ,a,b,c\n", "utf-8", ["column id is blank", "bad.csv:2"]),
        (
            HEADER.replace("id,", "original_text,") + "7,a,b,c\n",
            "utf-8",
            ["original_text more than once"],
        ),
    ],
)
def test_unusable_files_are_named(tmp_path, text, encoding, words):
    path = write(tmp_path / "bad.csv", text, encoding)
    with pytest.raises(DataError) as error:
        read_rows(path)
    for word in words:
        assert word in str(error.value)


def test_missing_files_and_ids_across_files(tmp_path):
    with pytest.raises(DataError, match=r"No file at .*none\.csv"):
        read_rows(tmp_path / "none.csv")
    with pytest.raises(DataError, match="at least one"):
        read_rows([])
    first = write(tmp_path / "a.csv", HEADER + "1,a,b,c\n2,a,b,c\n")
    second = write(tmp_path / "b.csv", HEADER + "3,a,b,c\n2,a,b,c\n")
    with pytest.raises(DataError, match=r"a\.csv, .*b\.csv: .*'2' in a\.csv:2, b\.csv:2"):
        read_rows([first, second])
    with pytest.raises(DataError, match="more than once"):
        read_rows([first, tmp_path / "." / "a.csv"])


def test_test_file_keeps_every_row_and_id(tmp_path):
    path = write(
        tmp_path / "test.csv",
        "\ufeffid,original_text,rewritten_text,x\n007,,\n".replace(",,\n", ",,,1\n"),
    )
    assert read_test(path).values.tolist() == [["007", "", ""]]
    rows = read_test(
        write(tmp_path / "t.csv", "rewritten_text,id,original_text\nb,1,a\nb,01,a\n ,1.0,\n")
    )
    assert list(rows.columns) == ["id", "original_text", "rewritten_text"]
    assert rows.values.tolist() == [["1", "a", "b"], ["01", "a", "b"], ["1.0", "", " "]]
    empty = read_test(write(tmp_path / "e.csv", "id,original_text,rewritten_text\n"))
    assert empty.shape == (0, 3) and list(empty.columns) == list(rows.columns)
    with pytest.raises(DataError, match="no column id"):
        read_test(write(tmp_path / "n.csv", "original_text,rewritten_text\na,b\n"))
    with pytest.raises(DataError, match=r"'1' in d\.csv:1, d\.csv:2"):
        read_test(write(tmp_path / "d.csv", "id,original_text,rewritten_text\n1,a,b\n1,c,d\n"))


REFUSALS = [
    "I cannot fulfill this request.",
    "I'm sorry, but I can't assist with that.",
    "I\u2019m sorry, but I can\u2019t help with that request.",
    "I'm sorry, but I can't.",
    "I am sorry, I cannot rewrite the text as it contains personal data.",
    "Sorry, I can't help you with this.",
    "I apologize, but I am unable to generate explicit content.",
    "I apologize for any inconvenience, but I cannot provide a rewrite of this text.",
    "Unfortunately, I cannot comply with that.",
    "As an AI language model, I cannot produce violent material.",
    "As an AI, I don't have feelings, so ...",
    "I am not able to rewrite this text.",
    "I must decline to provide that content.",
    "I cannot comply.",
    "I'm just an AI and I cannot rewrite this.",
    "  I can't create content that demeans people.",
]
NOT_REFUSALS = [
    "I cannot believe how warm it was today.",
    "I cannot help laughing when I think of it.",
    "I cannot help but smile.",
    "I can't do this any more. Every morning the bus is late.",
    "I cannot write a letter to her, for my hand shakes.",
    "I cannot rewrite history.",
    "I cannot comply with the wishes of a king who is mad.",
    "We are sorry to hear of your loss.",
    "I cannot provide for my family on this wage.",
    "I'm sorry, but I can't come to your party on Saturday.",
    "I am sorry to tell you that the cat ate the fish.",
    "Sorry, we are closed on Mondays.",
    "Unfortunately, I could not find the text.",
    "As an AI researcher, I cannot stress this enough.",
    "As a cook, I cannot stand cold soup.",
    "She said: I cannot fulfill this request.",
    "",
]


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals_are_found(text):
    assert is_refusal(text)


@pytest.mark.parametrize("text", NOT_REFUSALS)
def test_texts_that_only_begin_like_a_refusal_stay(text):
    assert not is_refusal(text)


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("Sure, here is the rewritten text:\n\nDear John,\nhello", "Dear John,\nhello"),
        ("Sure! Here's a rewritten version: Dear John", "Dear John"),
        ("Certainly! Here is the poem:\n\nRoses", "Roses"),
        ("Here\u2019s the text rewritten as a pirate would say it:\nArr", "Arr"),
        ("**Rewritten text:**\nArr", "Arr"),
        ("Of course. Here is your revised letter:\n  Indented", "  Indented"),
        ("Sure, here is the rewritten text:\n", ""),
        ("Here is the list of what you need:\nFlour", None),
        ("Sure, here is what I told him: go home.", None),
        ("Sure enough, it rained.", None),
        ("Arr\nSure, here is the rewritten text:\nArr", None),
        ("Here is the street that was rewritten by time, she said.", None),
    ],
)
def test_lead_ins(text, rest):
    assert strip_lead_in(text) == (text if rest is None else rest)


def test_account_says_what_was_dropped_and_why():
    rows = table(
        [
            ("a", "b", "p"),
            ("", "b", "p"),
            ("a", " \n", "p"),
            ("a", "b", "\t"),
            ("same", " same\n", "p"),
            ("a", "b", "p"),
            ("a", "I cannot assist with that.", "p"),
            ("a", "I cannot believe it.", "p"),
            ("a", "Sure, here is the rewritten text:\nB", "p"),
            ("a", "Sure, here is the rewritten text:\n", "p"),
            ("a", "b", "other prompt"),
        ]
    )
    before = rows.copy(deep=True)
    clean, account = clean_rows(rows)
    dropped = [
        ["r1", "t.csv:2", "blank original_text", "dropped"],
        ["r2", "t.csv:3", "blank rewritten_text", "dropped"],
        ["r3", "t.csv:4", "blank rewrite_prompt", "dropped"],
        ["r4", "t.csv:5", "identical original and rewritten", "dropped"],
        ["r5", "t.csv:6", "exact duplicate", "dropped"],
        ["r6", "t.csv:7", "refusal", "dropped"],
    ]
    assert list(account.columns) == ["id", "origin", "reason", "action"]
    assert account.values.tolist() == dropped
    pd.testing.assert_frame_equal(clean, rows.iloc[[0, 7, 8, 9, 10]].reset_index(drop=True))

    clean, account = clean_rows(rows, strip_lead_ins=True)
    assert account.values.tolist() == [
        *dropped,
        ["r8", "t.csv:9", "lead-in stripped", "changed"],
        ["r9", "t.csv:10", "lead-in stripped", "changed"],
        ["r9", "t.csv:10", "blank rewritten_text", "dropped"],
    ]
    assert clean.set_index("id")["rewritten_text"].to_dict() == {
        "r0": "b", "r7": "I cannot believe it.", "r8": "B", "r10": "b"
    }  # fmt: skip
    pd.testing.assert_frame_equal(rows, before)
    report = describe(clean, account)
    assert "11 rows read, 7 dropped, 4 kept" in report
    assert "dropped 1: refusal (t.csv:7)" in report and "changed 2: lead-in stripped" in report


@pytest.mark.parametrize("prompt", ["N/A", "NaN", "null", "none", "-", "?", "[]", '""', "\u200b"])
def test_a_prompt_that_says_nothing_is_not_taught(prompt):
    """An answer like it is read as no prompt."""
    clean, account = clean_rows(table([("a", "b", prompt), ("a", "b", "p")]))
    assert clean["rewrite_prompt"].to_list() == ["p"]
    assert account["reason"].to_list() == [f"rewrite_prompt is {prompt!r}, which says nothing"]


def test_nothing_left_is_an_empty_table_not_a_crash():
    clean, account = clean_rows(table([("", "b", "p")]))
    assert len(clean) == 0 and list(clean.columns) == list(table([]).columns)
    assert "1 rows read, 1 dropped, 0 kept" in describe(clean, account)


def test_normalise():
    assert (
        normalise("  Make it\n\u201cRHYME\u201d\u2014don\u2019t stop!! ")
        == "make it rhyme dont stop"
    )
    assert normalise("\uff2d\uff41\uff4b\uff45") == "make"  # full-width letters
    assert normalise("?!") != normalise("!")


def test_ids_that_stand_in_several_files_are_prefixed(tmp_path, capsys):
    (tmp_path / "more").mkdir()
    text = HEADER + "".join(f"{n},a{n},b,c\n" for n in range(3))
    files = [
        write(tmp_path / "a.csv", text),
        write(tmp_path / "b.csv", text),
        write(tmp_path / "more" / "a.csv", text),
    ]
    rows = read_rows(files)
    assert rows["id"].tolist() == [f"{stem}-{n}" for stem in ("a", "b", "a-2") for n in range(3)]
    assert "each has its file's name before it, as in 'a-0'" in capsys.readouterr().out
    assert read_rows(files[0])["id"].tolist() == ["0", "1", "2"]
    write(files[1], text + "2,x,y,z\n")
    with pytest.raises(
        DataError, match=r"b.csv: column id has 1 values more than once \(file:row\): '2'"
    ):
        read_rows(files)
