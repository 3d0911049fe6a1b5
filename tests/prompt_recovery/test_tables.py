"""The files of rows that people have: read as what they are, or named for what they are."""

import bz2
import gzip
import io
import json
import lzma
import os
import sqlite3
import tarfile
import zipfile

import pandas as pd
import pytest
from conftest import NASTY

from prompt_recovery.data import DataError, clean_rows, describe, read_rows, read_test

FRAME = pd.DataFrame(
    {
        "id": ["007", "b"],
        "original_text": ['A text; with, all "marks"\tand\nlines', "Zwei\u2028Texte"],
        "rewritten_text": ["One 😀", "Two"],
        "rewrite_prompt": ["Make it short.", "Make it long."],
    }
)
PLAIN = FRAME.to_csv(index=False)
ROWS = FRAME.to_numpy().tolist()


def packed_zip(*names, text=PLAIN):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, text)
    return buffer.getvalue()


def renamed(change):
    return FRAME.rename(columns=change).to_csv(index=False)


def json_lines(ensure_ascii=False):
    return "\n".join(json.dumps(row, ensure_ascii=ensure_ascii) for row in FRAME.to_dict("records"))


SEMICOLONS = FRAME.to_csv(index=False, sep=";")
# the file's name, its content, what is printed about it
READ = {
    "csv.zip as Kaggle serves it": ("rows.csv.zip", packed_zip("rows.csv"), "zip of rows.csv"),
    "a zip made on a Mac": ("r.zip", packed_zip("d/r.csv", "__MACOSX/d/._r.csv"), "zip of d/r.csv"),
    "a zip under the name of a CSV": ("rows.csv", packed_zip("rows.csv"), "zip of rows.csv"),
    "csv.gz": ("rows.csv.gz", gzip.compress(PLAIN.encode()), "gzip"),
    "csv.bz2": ("rows.csv.bz2", bz2.compress(PLAIN.encode()), "bz2"),
    "csv.xz": ("rows.csv.xz", lzma.compress(PLAIN.encode()), "lzma"),
    "a gzip in a zip": (
        "r.zip",
        packed_zip("r.csv.gz", text=gzip.compress(PLAIN.encode())),
        "gzip",
    ),
    "jsonl": ("rows.jsonl", json_lines(), "JSON"),
    "jsonl in ASCII with blank lines": ("rows.json", "\n" + json_lines(True) + "\n\n", "JSON"),
    "jsonl with Windows line ends": ("rows.jsonl", json_lines().replace("\n", "\r\n"), "JSON"),
    "a list of JSON objects": ("rows.json", FRAME.to_json(orient="records", indent=1), "JSON"),
    "tabs": ("rows.tsv", FRAME.to_csv(index=False, sep="\t"), "separated by tabs"),
    "semicolons": ("rows.csv", SEMICOLONS, "separated by semicolons"),
    "Excel's line about semicolons": ("rows.csv", "sep=;\r\n" + SEMICOLONS, "by semicolons"),
    "bars": ("rows.csv", FRAME.to_csv(index=False, sep="|"), "separated by bars"),
    "capitals": ("rows.csv", renamed(str.upper), None),
    "titles": ("rows.csv", renamed(lambda name: name.replace("_", " ").title()), None),
    "spaces around names": ("rows.csv", renamed(lambda name: f" {name}\t"), "a space behind"),
    "a space behind each comma": (
        "rows.csv",
        "id, original_text, rewritten_text, rewrite_prompt\n"
        + "\n".join(
            ", ".join(f'"{text.replace(chr(34), chr(34) * 2)}"' for text in row) for row in ROWS
        ),
        "a space behind",
    ),
    "a BOM in front": ("rows.csv", "\ufeff" + PLAIN, None),
    "a BOM inside the header": ("rows.csv", renamed(lambda name: "\ufeff" + name), None),
    "two BOMs and quotes": (
        "rows.csv",
        "\ufeff\ufeff" + FRAME.to_csv(index=False, quoting=1),
        None,
    ),
    "a header repeated": ("rows.csv", PLAIN + PLAIN.splitlines()[0] + "\n", "1 repeated header"),
    "a header repeated with a BOM": (
        "rows.csv",
        PLAIN.splitlines()[0]
        + '\n\ufeff"id",Original_text,"rewritten_text",rewrite_prompt\n'
        + PLAIN.partition("\n")[2],
        "1 repeated header",
    ),
    "a nested column besides": (
        "rows.jsonl",
        "\n".join(json.dumps({**row, "meta": {"a": [1]}}) for row in FRAME.to_dict("records")),
        "JSON",
    ),
    "an extra column": ("rows.csv", FRAME.assign(Other=1).to_csv(), None),
}


@pytest.mark.parametrize("form", READ)
def test_each_form_gives_the_rows(tmp_path, form, capsys):
    name, content, said = READ[form]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert read_rows(path)[list(FRAME)].to_numpy().tolist() == ROWS
    out = capsys.readouterr().out
    assert (said in out and str(path) in out) if said else out == ""
    assert read_test(path).to_numpy().tolist() == FRAME.iloc[:, :3].to_numpy().tolist()


def archive(content):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo("rows.csv")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def database(tmp_path):
    connection = sqlite3.connect(tmp_path / "made.db")
    connection.execute("create table rows (a)")
    connection.close()
    return (tmp_path / "made.db").read_bytes()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
NAMED = {
    "an HTML page": (b"<!DOCTYPE html>\n<html><title>Login</title></html>", "an HTML page"),
    "an HTML page with a comment": (b"\n <!-- x -->\n<HTML lang=en>", "an HTML page"),
    "XML": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an XML page"),
    "a Git LFS pointer": (POINTER, "a Git LFS pointer"),
    "a git-annex pointer": (b"/annex/objects/SHA256E-s12--ab.csv\n", "a git-annex pointer"),
    "several files in a zip": (
        packed_zip("train.csv", "test.csv"),
        r"a zip with 2 files in it \(train.csv, test",
    ),
    "an empty zip": (packed_zip(), "a zip with 0 files"),
    "a pointer in a zip": (packed_zip("rows.csv", text=POINTER), "a Git LFS pointer"),
    "an Excel workbook": (
        packed_zip("[Content_Types].xml", "xl/workbook.xml"),
        "an Excel workbook",
    ),
    "an old Excel workbook": (
        b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600),
        "an old Excel workbook",
    ),
    "a zip cut short": (packed_zip("rows.csv")[:-30], "can't be unpacked"),
    "a gzip cut short": (gzip.compress(PLAIN.encode())[:-12], "can't be unpacked"),
    "a tar": (archive(PLAIN.encode()), "a tar archive"),
    "a tar.gz": (gzip.compress(archive(PLAIN.encode())), "a tar archive"),
    "a pickle": (b"\x80\x04\x95" + bytes(40), "a pickle, which can run code"),
    "a PDF": (b"%PDF-1.7\n...", "a PDF"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(40), "packed by zstd"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(40), "no table of texts"),
    "one JSON object": (FRAME.to_json(indent=1).encode(), "one JSON object"),
    "broken JSON lines": (json_lines().encode()[:-5], r"JSON, and broken \(line 2"),
    "JSON of other things": (b'[{"id": 1}, 3]', "row 2 is no object"),
    "a text that is a list": (
        b'{"original_text": ["a"], "rewritten_text": "b", "rewrite_prompt": "c"}',
        "is no text but",
    ),
    "half a character": (
        b'{"original_text": "\\ud83d", "rewritten_text": "b", "rewrite_prompt": "c"}',
        "half a character",
    ),
    "columns in another order, put together": (
        (PLAIN + "rewrite_prompt,rewritten_text,original_text,id\na,b,c,d\n").encode(),
        "another header as row 3",
    ),
    "a Parquet file cut short": (b"PAR1" + bytes(50), "Parquet file"),
    "a bzip2 cut short": (bz2.compress(PLAIN.encode())[:-5], "can't be unpacked"),
    "UTF-16": (PLAIN.encode("utf-16"), "not UTF-8 but UTF-16"),
    "UTF-16 without a mark": (PLAIN.encode("utf-16-le"), "not UTF-8 but UTF-16"),
    "a program": (b"\x7fELF" + bytes(60), "or no text"),
    "a disk's zeros": (bytes(1000), "or no text"),
    "white space": (b"  \n\n", "is empty: it needs a header"),
    "a Word document": (packed_zip("[Content_Types].xml", "word/document.xml"), "a Word document"),
    "an OpenDocument sheet": (packed_zip("mimetype", "content.xml"), "an OpenDocument file"),
    "a Markdown table": (
        b"| id | original_text | rewritten_text | rewrite_prompt |\n|---|:--|---|---|\n"
        b"| 1 | a | b | c |\n",
        "a Markdown table",
    ),
    "files put together without a line end between": (
        (PLAIN.rstrip("\n") + PLAIN).encode(),
        "the header inside row 2: files were put together",
    ),
    "git's conflict markers": (
        PLAIN.replace("b,Zwei", "<<<<<<< HEAD\nb,Zwei").encode(),
        r"conflict markers \(row 2\)",
    ),
    "a title above the header": (
        b"My rows\n" + PLAIN.encode(),
        r"The first line must be the header; it is \['My rows'\]",
    ),
    "a JSON object of columns": (FRAME.to_json().encode(), "one JSON object: write one a line"),
    "a JSON object of rows": (
        json.dumps({"data": FRAME.to_dict("records")}).encode(),
        "one JSON object: write one a line",
    ),
    "a name twice in JSON": (
        b'{"original_text": "a", "original_text": "b", "rewritten_text": "c"}',
        "an object has a name twice",
    ),
    "deep JSON": (b"[" * 100_000, "JSON that can't be read"),
    "a number of 5,000 digits": (b'[{"id": ' + b"9" * 5000 + b"}]", "JSON that can't be read"),
}


@pytest.mark.parametrize("kind", NAMED)
def test_what_is_no_table_is_named_for_what_it_is(tmp_path, kind):
    content, message = NAMED[kind]
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    for read in (read_rows, read_test):
        with pytest.raises(DataError, match=message) as caught:
            read(path)
        assert str(path) in str(caught.value)


def test_databases_folders_and_missing_files_are_named(tmp_path, monkeypatch):
    (tmp_path / "rows.csv").write_bytes(database(tmp_path))
    with pytest.raises(DataError, match="an SQLite database"):
        read_rows(tmp_path / "rows.csv")
    with pytest.raises(DataError, match=r"is a folder: give one of its files, such as .*rows\.csv"):
        read_rows(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"No file at {tmp_path}/data/none.csv"):
        read_rows("data/none.csv")
    (tmp_path / "link.csv").symlink_to(tmp_path / "gone.csv")
    with pytest.raises(DataError, match=rf"No file at {tmp_path}/gone\.csv, to which link\.csv"):
        read_rows("link.csv")
    (tmp_path / "round.csv").symlink_to("round.csv")
    with pytest.raises(DataError, match=r"round\.csv can't be read: Too many levels of symbolic"):
        read_rows("round.csv")
    with pytest.raises(DataError, match="can't be read: File name too long"):
        read_rows("a" * 300)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="is a pipe or a device"):
        read_rows("pipe")


def test_a_header_of_megabytes_is_not_printed_whole(tmp_path):
    (tmp_path / "rows.csv").write_text("x" * 10**6 + "\n1\n")
    with pytest.raises(DataError, match="has no column") as caught:
        read_rows(tmp_path / "rows.csv")
    assert len(str(caught.value)) < 1000


def test_parquet(tmp_path, monkeypatch):
    """Read where pyarrow is installed; else it is said what reads it."""
    path = tmp_path / "rows.parquet"
    try:
        FRAME.to_parquet(path)
    except ImportError:
        path.write_bytes(b"PAR1" + bytes(40) + b"PAR1")
        with pytest.raises(DataError, match=r"is a Parquet file, and pyarrow.*pip install pyarrow"):
            read_rows(path)
        return
    assert read_rows(path)[list(FRAME)].to_numpy().tolist() == ROWS
    FRAME.assign(id=[7, 8], response=[None, "x"]).to_parquet(path)
    rows = read_rows(path)
    assert rows["id"].to_list() == ["7", "8"] and rows["response"].to_list() == ["", "x"]


def test_numbers_and_nothing_in_json_are_texts(tmp_path):
    row = {"id": 7, "original_text": "a", "rewritten_text": "b", "rewrite_prompt": 1.5}
    lines = [row, row | {"id": 8, "response": None}, row | {"id": 9, "rewrite_prompt": None}]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = read_rows(tmp_path / "r.jsonl")
    assert rows["id"].to_list() == ["7", "8", "9"] and rows["response"].to_list() == [""] * 3
    assert rows["rewrite_prompt"].to_list() == ["1.5", "1.5", ""]


def test_nasty_texts_survive_each_form(tmp_path):
    texts = [text for text in NASTY if "\r" not in text]
    frame = pd.DataFrame(
        {name: texts for name in ("original_text", "rewritten_text", "rewrite_prompt")}
    )
    frame.to_csv(tmp_path / "a.csv", sep="\t", index=False)
    frame.to_json(tmp_path / "b.csv", orient="records", lines=True, force_ascii=False)
    for name in ("a.csv", "b.csv"):
        assert read_rows(tmp_path / name)["rewrite_prompt"].to_list() == texts


def test_what_astype_str_makes_of_missing_values_is_missing(tmp_path):
    """As pandas before 3 wrote it. It would be taught and learned; other words stay."""
    frame = pd.concat([FRAME] * 4, ignore_index=True).assign(id=[str(n) for n in range(8)])
    frame.loc[[1, 2, 3], "rewrite_prompt"] = ["None", "nan", "<NA>"]
    frame.loc[4, "rewritten_text"] = "NaT"
    frame.loc[[5, 6, 7], "original_text"] = ["NA", "null", "none"]
    frame["response"] = "nan"
    frame.to_csv(tmp_path / "rows.csv", index=False)
    rows = read_rows(tmp_path / "rows.csv")
    assert rows["response"].to_list() == [""] * 8
    kept, account = clean_rows(rows)
    assert kept["id"].to_list() == ["0", "5", "6", "7"]
    assert account["reason"].to_list() == [
        *[f"rewrite_prompt is {text!r}" for text in ("None", "nan", "<NA>")],
        "rewritten_text is 'NaT'",
    ]
    assert "rewrite_prompt is 'nan'" in describe(kept, account)
    frame.loc[3, "id"] = "nan"
    frame.to_csv(tmp_path / "rows.csv", index=False)
    with pytest.raises(DataError, match=r"column id is blank in 1 rows: rows\.csv:4"):
        read_rows(tmp_path / "rows.csv")
    # a test file's ids stay as they are written
    assert "nan" in read_test(tmp_path / "rows.csv")["id"].to_list()
