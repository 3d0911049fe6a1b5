"""versions.csv as people, spreadsheets and git leave it: read and mended, or refused by name."""

import csv
import json
import os
import threading

import pytest
from kaggle_cases import BASE, HANDLE, publish_base

from kaggle_upload import publish, versions

OLD = "handle,version,sha256,base,rank,style,rows_hash,scores,commit,time"  # before the notes
SHA = "0" * 64
SCORES = '"{""n"": 3, ""scs_after"": 0.5}"'


def old_line(version, sha=SHA):
    return f"{HANDLE},{version},{sha},org/base,4,plain,abc,{SCORES},1f2e,2026-11-01T00:00:00+00:00"


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


FORMS = {
    "as it was before the notes": f"{OLD}\n{old_line(1)}\n",
    "no final newline": f"{OLD}\n{old_line(1)}",
    "a byte order mark": f"\ufeff{OLD}\n{old_line(1)}\n",
    "Windows line ends": f"{OLD}\n{old_line(1)}\n".replace("\n", "\r\n"),
    "semicolons and a byte order mark": (
        "\ufeff" + f"{OLD}\n{old_line(1)}".replace(",", ";").replace('3; "', '3, "') + "\n"
    ),
    "tabs": f"{OLD}\n{old_line(1)}\n".replace(",", "\t").replace('3\t "', '3, "'),
    "bars": f"{OLD}\n{old_line(1)}\n".replace(",", "|").replace('3| "', '3, "'),
    "Excel's line about semicolons": (
        "sep=;\r\n" + f"{OLD}\n{old_line(1)}".replace(",", ";").replace('3; "', '3, "') + "\n"
    ),
    "a version as a spreadsheet writes it": f"{OLD}\n{old_line('1.0')}\n",
    "a version with a decimal comma": f"{OLD}\n{old_line(1)}\n".replace(",1,", ',"1,0",'),
    "spaces and capitals": f"{OLD.title()}\n{old_line(' 1 ', SHA.upper())}\n",
    "blank lines and lines of separators": f"\n{OLD}\n\n{',' * 9}\n{old_line(1)}\n\n",
    "a header once more, as two files put together have": f"{OLD}\n{OLD}\n{old_line(1)}\n",
    "empty columns behind": f"{OLD},,\n{old_line(1)},,\n",
    "a column of the user's": f"{OLD},remark\n{old_line(1)},mine\n",
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_read_and_loses_nothing(case, form):
    """The next publish finds version 1 and adds version 2; the scores' commas stay."""
    case.standing(1)
    path = case.tmp / "versions.csv"
    path.write_text(FORMS[form], encoding="utf-8", newline="")
    case.write(2)
    code, out, err = case.publish("--verify", "list")
    assert code == 0 and out.splitlines()[-1] == f"{HANDLE}/2", err
    one, two = rows(path)
    assert [one["handle"], one["version"], two["version"]] == [HANDLE, "1", "2"]
    assert json.loads(one["scores"]) == {"n": 3, "scs_after": 0.5} and one["style"] == "plain"
    assert (
        one["notes"] == "" and two["notes"] == "some notes" and one.get("remark", "mine") == "mine"
    )
    assert "another form" in out and path.read_text().startswith("handle,version,sha256")
    code, out, _ = case.publish("--verify", "list")
    assert code == 0 and "Unchanged" in out and "another form" not in out and len(rows(path)) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            f"{OLD}\n<<<<<<< HEAD\n{old_line(1)}\n=======\n{old_line(2)}\n>>>>>>> theirs\n",
            "conflict markers (line 2, 6)",
        ),
        (f"<<<<<<< HEAD\n{OLD}\n=======\n{OLD}\n>>>>>>> theirs\n", "conflict markers (line 1, 5)"),
        (f"{old_line(1)}\n", "line 1 is the header and lacks handle, version, sha256"),
        (f"{OLD}\n{old_line('one')}\n", "line 2: the version 'one' is no number"),
        (f"{OLD}\n{old_line('')}\n", "line 2: the version '' is no number"),
        (f"{OLD}\n{old_line('1.5')}\n", "line 2: the version '1.5' is no number"),
        (f"{OLD},version\n{old_line(1)},2\n", "line 1 has the column version more than once"),
        (f"{OLD}\n{HANDLE},1\n", "line 2 has 2 fields, the header 10"),
        (f"{OLD}\n{old_line(1)}{old_line(2)}\n", "line 2 has 19 fields, the header 10"),
        (f'{OLD}\n{HANDLE},1,"open\n', "correct the line"),
        ("\ufffe" + OLD, "UTF-8"),
    ],
)
def test_what_cannot_be_read_blocks_before_anything_is_sent(case, text, message):
    case.write(1)
    path = case.tmp / "versions.csv"
    path.write_bytes(text.encode("utf-16-le" if text[0] == "\ufffe" else "utf-8"))
    before = path.read_bytes()
    for more in ((), ("--force",), ("--dry-run",)):
        code, _, err = case.publish(*more)
        assert code == 1 and message in err and "versions.csv" in err, err
    assert case.server.requests == [] and path.read_bytes() == before


def test_a_place_that_cannot_be_written_is_named_before_anything_is_sent(case):
    case.write(1)
    (case.tmp / "a file").write_text("")
    code, _, err = case.publish("--versions", case.tmp / "a file" / "versions.csv")
    assert code == 1 and "can't be written" in err and "--versions" in err
    code, _, err = case.publish("--work", case.tmp / "a file" / "work")
    assert code == 1 and "can't be made" in err and "--work" in err
    assert case.server.requests == []


def test_a_version_whose_record_failed_is_recorded_by_the_next_run(case, monkeypatch):
    """The disk fills up meanwhile."""
    case.write(1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        code, _, err = case.publish("--verify", "list")
    assert code == 1 and f"{HANDLE}/1 stands, but" in err and "run the same command again" in err
    code, out, _ = case.publish("--verify", "list")
    assert code == 0 and len(case.versions) == 1 and case.recorded() == [(HANDLE, "1")]


def test_many_writers_lose_no_line(tmp_path):
    """Each run replaces the file, so that a waiting one must read it anew."""
    path = tmp_path / "versions.csv"

    def add(number):
        with publish.locked(path):
            found = versions.read(path)
            versions.write(path, [*found, {"handle": "h", "version": str(number), "sha256": "x"}])

    threads = [threading.Thread(target=add, args=(number,)) for number in range(1, 21)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(int(row["version"]) for row in rows(path)) == list(range(1, 21))


def test_scores_need_the_hash_of_these_weights(case):
    """A run that was killed after saving leaves the scores of the one before beside the adapter."""
    case.write(1)
    for evaluation in ({"scs_after": 0.5, "style": "json"}, {"adapter_sha256": SHA, "n": 3}):
        (case.folder.parent / "evaluation.json").write_text(json.dumps(evaluation))
        code, out, _ = case.publish("--verify", "list", "--force")
        assert code == 0 and "versions.csv gets no scores" in out
    for row in rows(case.tmp / "versions.csv"):
        assert [row["scores"], row["rows_hash"], row["style"]] == ["", "", "plain"]


def test_another_base_under_the_same_handle_is_said(case, base):
    code, out, err = publish_base(case, base)
    assert code == 0 and "another base" not in out, err
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"]["base"] = "org/other"
    (base / "config.json").write_text(json.dumps(config))
    code, out, err = publish_base(case, base)
    assert code == 0 and f"{BASE} holds versions of another base (org/base)" in out, err
    assert "org/other" in out and len(rows(case.tmp / "versions.csv")) == 2
