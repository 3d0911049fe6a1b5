"""The real kaggle program against a stand-in server: what stands on the server after each fault,
and after a re-run."""

import csv
import hashlib
import json
import os
import shutil
import subprocess
import threading

import pytest
from kaggle_cases import HANDLE, WEIGHTS, write_adapter
from kaggle_stand_in import (
    USER,
    altered,
    cut_after,
    delay,
    dies,
    error_200,
    lost_reply,
    status,
)

from kaggle_upload import cli, publish
from kaggle_upload.__main__ import main


def test_first_next_unchanged(case, each_program):
    case.server.page_size = 1  # the list of versions comes in pages
    first = case.write(1)
    evaluation = {"scs_after": 0.5, "n": 3, "style": "json", "rows_hash": "abc"}
    evaluation["adapter_sha256"] = hashlib.sha256(first[WEIGHTS]).hexdigest()
    (case.folder.parent / "evaluation.json").write_text(json.dumps(evaluation))
    code, out, _ = case.publish()
    assert code == 0 and out.splitlines()[-1] == f"{HANDLE}/1"
    assert case.versions == [first] and not case.server.public
    assert [
        request["isPrivate"] for name, request in case.server.requests if name == "CreateModel"
    ] == [True]
    assert "no notes for a first version" in out
    second = case.write(2)
    code, out, _ = case.publish()
    assert code == 0 and out.splitlines()[-1] == f"{HANDLE}/2" and case.versions == [first, second]
    assert "evaluation.json is of other weights than these" in out
    sent = [
        body["body"]["versionNotes"]
        for name, body in case.server.requests
        if name == "CreateModelInstanceVersion"
    ]
    assert sent == ["some notes"]
    code, out, _ = case.publish()
    assert (
        code == 0
        and "Unchanged" in out
        and out.splitlines()[-1] == f"{HANDLE}/2"
        and len(case.versions) == 2
    )
    # another machine: it compares the bytes
    (case.tmp / "versions.csv").rename(case.tmp / "kept.csv")
    code, out, _ = case.publish()
    assert (
        code == 0
        and "Unchanged" in out
        and len(case.versions) == 2
        and case.recorded() == [(HANDLE, "2")]
    )
    with (case.tmp / "kept.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["version"], row["base"], row["rank"]) for row in rows] == [
        ("1", "org/base", "4"),
        ("2", "org/base", "4"),
    ]
    assert rows[0]["style"] == "plain" and rows[0]["rows_hash"] == "abc"
    assert json.loads(rows[0]["scores"]) == {"scs_after": 0.5, "n": 3}
    assert rows[0]["sha256"] != rows[1]["sha256"]
    # the second adapter lies beside the first one's evaluation
    assert [rows[1][name] for name in ("style", "rows_hash", "scores")] == ["plain", "", ""]
    assert [row["notes"] for row in rows] == ["some notes"] * 2
    assert [
        path.name for path in (case.folder.parent / ".kaggle_upload").iterdir() if path.is_dir()
    ] == []


def test_lost_reply_makes_a_duplicate_that_is_named(case):
    case.standing(1)
    new = case.write(2)
    case.server.fail("CreateModelInstanceVersion", lost_reply)
    code, out, _ = case.publish()
    assert code == 0 and out.splitlines()[-1] == f"{HANDLE}/2"
    assert f"duplicate: {HANDLE}/3 holds the same bytes" in out and case.versions[1:] == [new, new]
    code, out, _ = case.publish()
    assert code == 0 and "Unchanged" in out and len(case.versions) == 3
    code, out, _ = case.publish("--force")
    assert code == 0 and out.splitlines()[-1] == f"{HANDLE}/4" and case.versions[3] == new


def test_lost_reply_to_the_first_version(case):
    """The repeated creation gets "exists already" and exit code 0 or 1; the version stands all the
    same."""
    files = case.write(1)
    case.server.fail("CreateModel", lost_reply)
    case.server.fail("CreateModelInstance", lost_reply)
    code, out, _ = case.publish()
    assert code == 0 and out.splitlines()[-1] == f"{HANDLE}/1" and case.versions == [files]


def test_refused_upload(case, each_program, monkeypatch):
    """2.2.4 would go on, register the version without the file and exit with 0; it is stopped
    before that.

    Here the program is a process of its own, as in use.
    """
    monkeypatch.setattr(cli, "subprocess", subprocess)
    files = case.write(1)
    case.server.fail("PUT", status(403))
    case.server.fail("StartBlobUpload", delay(0), delay(1))  # time enough to be stopped
    code, out, err = case.publish()
    assert code == 1 and "The upload of " in err and case.versions == [] and not case.recorded()
    # a refused session stays refused; the next run must not try it again
    case.server.fail("PROBE", status(403))
    code, out, _ = case.publish()
    assert code == 0 and case.versions == [files] and out.splitlines()[-1] == f"{HANDLE}/1"


def test_lost_file_of_a_version_that_was_made(case, monkeypatch):
    """The same, were the program not stopped: the version is compared, found wanting, named."""
    files = case.write(1)
    monkeypatch.setattr(os, "killpg", lambda *_: None)
    case.server.fail("PUT", status(403))
    code, _, err = case.publish()
    assert (
        code == 1
        and f"{HANDLE}/1 holds no " in err
        and "Delete" in err
        and len(case.versions[0]) == 1
    )
    code, out, _ = case.publish()
    assert code == 0 and out.splitlines()[-1] == f"{HANDLE}/2" and case.versions[1] == files
    assert case.recorded() == [(HANDLE, "2")]


@pytest.mark.parametrize(
    ("verify", "change", "message"),
    [
        ("list", lambda data: data[:-1], "holds other files or sizes"),
        (
            "download",
            lambda data: data[:-1] + bytes([data[-1] ^ 1]),
            "holds other bytes of the same size",
        ),
    ],
)
def test_bytes_changed_on_the_way(case, monkeypatch, verify, change, message):
    """The list shows other sizes; other bytes of the same size only the download does."""
    files = case.write(1)
    case.server.fail("PUT", altered(change))
    with monkeypatch.context() as patch:
        patch.setattr(publish, "LISTING", 0.1)
        code, _, err = case.publish("--verify", verify)
    assert code == 1 and f"{HANDLE}/1 {message}" in err and not case.recorded()
    code, out, _ = case.publish("--verify", verify)
    assert code == 0 and out.splitlines()[-1] == f"{HANDLE}/2" and case.versions[1] == files


ERRORS = [
    ("StartBlobUpload", status(500, "Internal error")),
    ("CreateModelInstanceVersion", status(401, "Unauthenticated")),
    ("CreateModelInstanceVersion", status(403, "Permission 'models.update' was denied")),
    ("CreateModelInstanceVersion", status(404, "Not found")),
    ("CreateModelInstanceVersion", status(409, "Conflict")),
    ("CreateModelInstanceVersion", status(500, html=True)),
    ("CreateModelInstanceVersion", error_200("The variation is being changed.")),
    ("GetModel", status(500, "Internal error")),
    ("ListModelInstanceVersions", status(500, "Internal error")),
]


def test_errors_of_the_server(case):
    """Each error in turn fails the publish without a version; the next run makes exactly one."""
    case.standing(1)
    new = case.write(2)
    for method, fault in ERRORS:
        case.server.fail(method, fault)
        code, out, err = case.publish()
        assert code == 1 and err.startswith("error: ") and f"{HANDLE}/2" not in out, method
        assert not any(case.server.faults.values()) and len(case.versions) == 1, method
    code, out, _ = case.publish()
    assert code == 0 and out.splitlines()[-1] == f"{HANDLE}/2" and case.versions[1:] == [new]
    assert case.recorded() == [(HANDLE, "1"), (HANDLE, "2")]


def test_errors_while_verifying_are_waited_for(case):
    """After a creation that went well, a list that fails or comes late is asked again."""
    files = case.write(1)
    case.server.list_lag = 1.0
    # the first version is sent without listing before it fails
    case.server.fail("ListModelInstanceVersions", delay(0), status(500), status(404, "Not found"))
    code, out, _ = case.publish()
    assert code == 0 and out.splitlines()[-1] == f"{HANDLE}/1" and case.versions == [files]


def test_version_that_is_never_listed(case, monkeypatch):
    """Success is what is listed. A later run finds the version and makes no other."""
    files = case.write(1)
    case.server.list_lag = 3600
    monkeypatch.setattr(publish, "LISTING", 0.5)
    code, _, err = case.publish()
    assert (
        code == 1
        and "lists no such version" in err
        and case.versions == [files]
        and not case.recorded()
    )
    case.server.list_lag = 0
    code, out, _ = case.publish("--force")
    assert (
        code == 0
        and "earlier run" in out
        and out.splitlines()[-1] == f"{HANDLE}/1"
        and case.versions == [files]
    )


def test_slow_server(case):
    files = case.write(1)
    for method in (
        "GetModel",
        "StartBlobUpload",
        "CreateModelInstance",
        "ListModelInstanceVersionFiles",
    ):
        case.server.fail(method, delay(0.7))
    code, out, _ = case.publish()
    assert code == 0 and out.splitlines()[-1] == f"{HANDLE}/1" and case.versions == [files]


def test_dead_server(case):
    """The program would go on trying for 143 s; the deadline is ours."""
    files = case.write(1)
    case.server.fail("StartBlobUpload", dies)
    code, _, err = case.publish(timeout=3)
    assert code == 1 and err.startswith("error: ") and case.versions == []
    case.server.dead = False
    case.server.fail("GetModel", delay(4))  # takes the call, and does not answer in time
    code, _, err = case.publish(timeout=2)
    assert code == 1 and "no end after 2 s" in err and "does not answer" in err
    code, out, _ = case.publish()
    assert code == 0 and out.splitlines()[-1] == f"{HANDLE}/1" and case.versions == [files]


def test_cut_connection_is_resumed_within_and_across_runs(case):
    case.standing(0)
    files = case.write(1)
    case.server.fail("PUT", cut_after(100))
    code, _, _ = case.publish("--verify", "list")
    assert code == 0 and case.versions[1:] == [files]
    files = case.write(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "transfer_timeout", lambda timeout, size: 4)
        # the weights may come first or second; whichever it is breaks before its end
        case.server.fail("PUT", cut_after(100, dead=True))
        code, _, err = case.publish()
    assert code == 1 and len(case.versions) == 2
    case.server.dead = False
    before = len(case.server.requests)
    code, out, _ = case.publish()
    assert code == 0 and case.versions[2:] == [files] and out.splitlines()[-1] == f"{HANDLE}/3"
    spans = [body for name, body in case.server.requests[before:] if name == "PUT"]
    assert any(span.startswith("bytes 100-") for span in spans), spans


def test_stale_session_with_other_bytes_of_the_same_size_and_time(case, tmp_path):
    """Left to itself the program publishes the old bytes; here the new ones stand."""
    case.standing(0)

    def interrupt_then_change(send, old: int, new: int) -> bytes:
        case.write(old)
        stamp = (case.folder / WEIGHTS).stat()
        (case.folder / "adapter_config.json").touch()
        # all is uploaded, the version is not made
        case.server.fail("CreateModelInstanceVersion", status(500))
        send()
        changed = case.write(new)[WEIGHTS]
        os.utime(case.folder / WEIGHTS, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        send()
        return changed

    temp = tmp_path / "shared-tmp"
    temp.mkdir()
    command = (
        "models",
        "variations",
        "versions",
        "create",
        HANDLE,
        "-p",
        str(case.folder),
        "-n",
        "x",
    )
    new = interrupt_then_change(lambda: cli.run(*command, timeout=20, temp=temp), 1, 2)
    assert len(case.versions) == 2 and case.versions[1][WEIGHTS] != new, (
        "the stand-in does not show the trap"
    )
    new = interrupt_then_change(case.publish, 3, 4)
    assert len(case.versions) == 3 and case.versions[2][WEIGHTS] == new


def test_expired_sessions(case, each_program):
    """2.2.4 gives up on a file whose session has expired, each time anew; the session is dropped
    for the next run."""
    files = case.write(1)
    case.server.fail("CreateModelInstance", status(500))
    assert case.publish()[0] == 1
    for blob in case.server.blobs.values():
        blob["expired"] = True
    codes = [case.publish()[0] for _ in range(3)]
    assert codes[-1] == 0 and case.versions[-1] == files  # one file a run at worst
    assert all(len(version) < 2 for version in case.versions[:-1])


def test_signed_addresses_are_not_shown():
    """Python's network errors name the address, and whoever knows a signed one may write the
    file."""
    text = (
        "Max retries exceeded with url: /b/o?upload_id=s3cret&X-Goog-Signature=s3%2Fcret=="
        " (Caused by X) what? yes"
    )
    said = cli.Reply(1, text, "").said
    assert "s3" not in said and said.endswith("/b/o?... (Caused by X) what? yes")


def test_who_owns_what(case, monkeypatch):
    """Somebody else's model, a public one, one that Kaggle makes public, no login: nothing is
    sent."""
    case.write(1)
    code, _, err = case.publish(to="other/recovery/transformers/r4")
    assert code == 1 and "somebody else" in err
    case.server.models[f"{USER}/open"] = {}
    case.server.public = {f"{USER}/open", "other/open"}
    case.server.models["other/open"] = {}
    for owner in (USER, "other"):
        code, _, err = case.publish(to=f"{owner}/open/transformers/r4")
        assert code == 1 and "is public" in err
    case.server.makes_public = {f"{USER}/surprise"}
    code, _, err = case.publish(to=f"{USER}/surprise/transformers/r4")
    assert code == 1 and "is public" in err
    monkeypatch.setenv("KAGGLE_KEY", "wrong")
    code, _, err = case.publish()
    assert code == 1 and "kaggle auth login" in err
    assert case.server.asked("StartBlobUpload") == 0 and case.versions == []


def test_one_s_own_missing_model_is_made_where_kaggle_says_403_and_is_made_public_meanwhile(case):
    files = case.write(1)
    case.server.fail("GetModel", status(403, "Permission 'models.get' was denied"))

    def opens(handler):
        handler.server.public.add(f"{USER}/recovery")
        return False

    case.server.fail("ListModelInstanceVersionFiles", opens)
    code, _, err = case.publish()
    assert code == 1 and "PUBLIC" in err and f"{HANDLE}/1" in err and case.versions == [files]


def test_two_publishes_at_once(case, tmp_path):
    """Two machines with different adapters make the model at once: each gets a version of its own
    and says which."""
    case.server.fail("CreateModel", delay(1))
    case.server.fail("CreateModelInstance", delay(1))
    codes, contents = [], {}

    def machine(name: str, seed: int) -> None:
        folder, record = tmp_path / name / "adapter", tmp_path / f"{name}.csv"
        contents[name] = write_adapter(folder, seed)
        options = ["--notes", name, "--versions", str(record), "--timeout", "30"]
        codes.append(main(["adapter", str(folder), "--to", HANDLE, *options]))

    threads = [
        threading.Thread(target=machine, args=(name, seed)) for seed, name in enumerate("ab")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [0, 0] and len(case.versions) == 2
    for name in "ab":
        with (tmp_path / f"{name}.csv").open(newline="") as file:
            numbers = [int(row["version"]) for row in csv.DictReader(file)]
        assert [case.versions[number - 1] for number in numbers] == [contents[name]]


def test_the_same_publish_twice_at_once(case):
    """The second waits for the first and finds its version."""
    files = case.write(1)
    case.server.fail("CreateModel", delay(1))
    codes = []
    threads = [threading.Thread(target=lambda: codes.append(case.publish()[0])) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [0, 0] and case.versions == [files] and case.recorded() == [(HANDLE, "1")]


def test_folder_written_to_while_it_is_published(case):
    case.write(1)

    def overwrite(handler):
        case.write(2)
        return False

    case.server.fail("ListModelInstanceVersionFiles", overwrite)
    code, _, err = case.publish("--verify", "list")
    assert code == 1 and "changed while being published" in err and f"{HANDLE}/1" in err


def test_dry_run_asks_and_writes_nothing(case, tmp_path):
    case.write(1)
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = case.publish("--dry-run")
    assert code == 0 and HANDLE in out and WEIGHTS in out and '"isPrivate": true' in out
    assert sorted(tmp_path.rglob("*")) == before and case.server.requests == []


def test_what_is_refused_before_anything_is_asked(case, tmp_path):
    case.write(1)
    for to in (
        "someone/recovery",
        "someone/recovery/transformers/r4/3",
        "someone/recovery/peft/r4",
        "Someone/recovery/transformers/r4",
        "someone/re--covery/transformers/r4",
        "someone/recovery/transformers/r_4",
        "someone/recovery/transformers/r4\n",
        "someone//transformers/r4",
    ):
        assert case.publish(to=to)[0] == 1, to
    (case.folder / ".env").write_text("KAGGLE_KEY=x")
    code, _, err = case.publish()
    assert code == 1 and ".env may hold credentials" in err
    (case.folder / ".env").unlink()
    shutil.move(case.folder / WEIGHTS, tmp_path / "elsewhere")
    (case.folder / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    code, _, err = case.publish()
    assert code == 1 and "is a symlink" in err
    (case.folder / WEIGHTS).unlink()
    assert case.publish()[0] == 1  # adapter.check_adapter: a file is missing
    (case.folder / WEIGHTS).write_bytes(b"")
    assert case.publish()[0] == 1
    assert case.server.requests == []
