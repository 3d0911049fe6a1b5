"""Pushing and handing in: which notebook, whose state, what was attached, which names are read."""

import json
import shutil

import jupytext
import papermill
import pytest
from conftest import ROOT
from kaggle_cases import BASE, DATASET, HANDLE, NOTEBOOK, PUBLIC, SLUG, push, submit
from kaggle_stand_in import USER, status

from kaggle_upload import cli
from kaggle_upload.handles import Page, UploadError, Variation, competition_slug


def pushed(case, times):
    for _ in range(times):
        code, _, err = push(case)
        assert code == 0, err


# names


@pytest.mark.parametrize(
    ("text", "read"),
    [
        (PUBLIC, PUBLIC),
        ("qwen-lm/qwen2.5/transformers/7b-instruct/1", None),
        ("google/gemma/pyTorch/gemma_1.1_instruct_2b_en/12", None),
        ("Somebody-Else/A_model/other/V.1+x/3", None),
        ("mistral-ai/mixtral/PyTorch/8x7b-instruct-v0.1-hf/1", PUBLIC),
        ("google/gemma/TensorFlow 2/2b/1", "google/gemma/tensorFlow2/2b/1"),
        ("google/gemma/Gemma C++/2b/1", "google/gemma/gemmaCpp/2b/1"),
        (f"https://www.kaggle.com/models/{PUBLIC}", PUBLIC),
        (
            "https://www.kaggle.com/models/mistral-ai/mixtral/frameworks/pyTorch/variations/"
            "8x7b-instruct-v0.1-hf/versions/1?select=config.json#files",
            PUBLIC,
        ),
        ("kaggle.com/models/google/gemma/TensorFlow%202/2b/1/", "google/gemma/tensorFlow2/2b/1"),
    ],
)
def test_versions_that_stand_are_named_as_kaggle_names_them(text, read):
    assert str(Variation.parse(text, pinned=True)) == (read or text)


@pytest.mark.parametrize(
    "text",
    ["a/b/pyTorch/c", "a//pyTorch/c/1", "a/b c/pyTorch/d/1", "a/b/pyTorch/c/v1", "-a/b/pyTorch/c/1",
     "https://www.kaggle.com/models/a/b/pyTorch/c", "a/b/pyTorch/c/1\n", "a/../pyTorch/c/1"],
)  # fmt: skip
def test_what_names_no_version_is_refused(text):
    with pytest.raises(UploadError, match="must have the form|is empty, holds white space"):
        Variation.parse(text, pinned=True)


def test_names_of_what_is_made_stay_slugs_and_pages_are_read():
    for text in ("a/qwen2.5/transformers/x", "a/b/transformers/x_y", "A/b/transformers/x"):
        with pytest.raises(UploadError, match="is not a slug"):
            Variation.parse(text)
    page = Page.parse("https://www.kaggle.com/code/me/recover-prompts/2", "notebook", pinned=True)
    assert str(page) == "me/recover-prompts/2"
    held = Page.parse("https://www.kaggle.com/datasets/Me_2/Wheels.v1", "dataset", new=False)
    assert str(held) == "Me_2/Wheels.v1"
    for form in ("competitions/llm-prompts/overview", "c/llm-prompts", "competitions/llm-prompts"):
        assert competition_slug(f"https://www.kaggle.com/{form}") == "llm-prompts"


def test_addresses_are_read_from_any_tab_and_only_of_the_right_kind():
    """A notebook's address as a dataset's would be pushed as a source that Kaggle drops."""
    site = "https://www.kaggle.com"
    for form in (f"{site}/code/me/a-notebook/edit", "HTTPS://Kaggle.com/code/me/a-notebook/log/"):
        assert str(Page.parse(form, "notebook")) == "me/a-notebook"
    assert str(Page.parse(f"{site}/datasets/me/my-data/data", "dataset")) == "me/my-data"
    for form, what in (("code/me/a-notebook", "dataset"), ("datasets/me/my-data", "notebook")):
        with pytest.raises(UploadError, match=f"is the page of a .*; give a {what}'s"):
            Page.parse(f"{site}/{form}", what)
    with pytest.raises(UploadError, match="is the page of a dataset; give a model's"):
        Variation.parse(f"{site}/datasets/me/my-data/versions/3", pinned=True)
    with pytest.raises(UploadError, match="is the page of a dataset; give a competition's"):
        competition_slug(f"{site}/datasets/me/my-data")
    with pytest.raises(UploadError, match="The competition '' is not a slug"):
        competition_slug(f"{site}/competitions")


def test_the_public_base_is_pushed_from_its_page(case):
    code, _, err = push(case, "--base", f"https://www.kaggle.com/models/{PUBLIC}")
    assert code == 0, err
    assert case.server.kernels[SLUG][0]["modelDataSources"] == [f"{HANDLE}/3", PUBLIC]


def test_several_adapters_are_attached_and_their_order_is_said(case, tmp_path):
    ninth, tenth = f"{USER}/recovery/transformers/r5/9", f"{USER}/recovery/transformers/r5/10"
    code, out, err = push(case, "--adapter", ninth, "--adapter", tenth)
    assert code == 0, err
    sources = [f"{HANDLE}/3", ninth, tenth, f"{BASE}/1"]
    assert case.server.kernels[SLUG][0]["modelDataSources"] == sources and "order" not in out
    assert 'has combine = "first", which refuses several adapters' in out
    code, out, _ = push(case, "--adapter", tenth, "--adapter", ninth)
    assert code == 0 and f"order of their paths: {HANDLE}/3, {ninth}, {tenth}." in out
    joined = written(
        tmp_path,
        lambda n: [
            c.update(source="".join(c["source"]).replace('combine = "first"', 'combine = "join"'))
            for c in n["cells"]
        ],
    )
    code, out, err = push(case, "--adapter", ninth, file=joined)
    assert code == 0 and "note: " not in out, err
    case.server.requests.clear()
    code, _, err = push(case, "--adapter", f"{HANDLE}/3")
    assert code == 1 and "give each once" in err and case.server.requests == []


# what is pushed


def written(tmp_path, change):
    notebook = json.loads(NOTEBOOK.read_text())
    change(notebook)
    path = tmp_path / "mine.ipynb"
    path.write_text(json.dumps(notebook))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n: n["metadata"].pop("kernelspec"), "names no kernel"),
        (lambda n: n["metadata"]["kernelspec"].pop("name"), "names no kernel"),
        (
            lambda n: n["metadata"]["kernelspec"].update(name="my-venv"),
            "names the kernel 'my-venv'",
        ),
        (lambda n: n["metadata"]["kernelspec"].update(name="ir", language="R"), "the kernel 'ir'"),
        (lambda n: n.update(cells=[]), "holds no code"),
        (lambda n: n.update(cells=n["cells"][:1]), "holds no code"),
        (lambda n: [c.update(source=["# x\n", "\n"]) for c in n["cells"]], "holds no code"),
        (lambda n: n.pop("cells"), "not a notebook"),
        (lambda n: n.update(nbformat=3), "nbformat is 3"),
    ],
)
def test_a_notebook_whose_run_would_fail_is_not_pushed(case, tmp_path, change, message):
    code, _, err = push(case, file=written(tmp_path, change))
    assert code == 1 and message in err and "mine.ipynb" in err and case.server.requests == []


def test_files_that_are_no_notebooks_are_not_pushed(case, tmp_path):
    texts = [
        "",
        "[]",
        "null",
        "<html>",
        "%% not json",
        "<<<<<<< HEAD\n{}\n=======\n{}\n>>>>>>> x\n",
    ]
    for text in texts:
        (tmp_path / "mine.ipynb").write_text(text)
        code, _, err = push(case, file=tmp_path / "mine.ipynb")
        assert code == 1 and ("not a notebook" in err or "is empty" in err), text
    assert push(case, file=NOTEBOOK.with_suffix(".py"))[0] == 1
    assert case.server.requests == []


@pytest.mark.parametrize("name", ["train", "compare"])
def test_a_notebook_that_trains_is_not_pushed_under_any_name(case, tmp_path, name):
    source = ROOT / "notebooks" / f"{name}.ipynb"
    copies = [source, tmp_path / "submission.ipynb", tmp_path / "prepared.ipynb"]
    shutil.copy(source, copies[1])
    papermill.execute_notebook(
        source, copies[2], parameters={"train_csv": "r.csv"}, prepare_only=True, progress_bar=False
    )
    for path in copies:
        code, _, err = push(case, file=path)
        assert code == 1 and "trains" in err, path
    assert case.server.requests == []


def test_the_remedy_for_a_kernel_works(case, tmp_path):
    path = written(tmp_path, lambda n: n["metadata"]["kernelspec"].update(name="my-venv"))
    notebook = jupytext.read(path)
    from jupytext.cli import jupytext as command

    command(["--set-kernel", "python3", str(path)])
    code, _, err = push(case, file=path)
    assert code == 0, err
    assert len(json.loads(path.read_text())["cells"]) == len(notebook.cells)


@pytest.mark.parametrize(
    ("wanted", "kept"),
    [
        (f"{USER}/recovery/transformers/lora/1", f"{USER}/recovery/transformers/lora/12"),
        (f"{USER}/recovery/transformers/lora/1", f"x{USER}/recovery/transformers/lora/1"),
    ],
)
def test_a_dropped_source_is_not_covered_by_a_longer_name(case, wanted, kept):
    """One of two that Kaggle was asked for is dropped; the other's name holds its name."""
    case.server.refused_sources = {wanted}
    code, _, err = push(case, "--adapter", wanted, "--base", kept)
    assert code == 1 and f"model {wanted} was not attached" in err and f"{kept} was not" not in err


def test_sources_that_kaggle_spells_otherwise_are_attached(case):
    keep = case.server.GetKernel

    def spelled(body):
        answer = keep(body)
        metadata = answer["metadata"]
        sources = metadata["modelDataSources"]
        metadata["modelDataSources"] = [x.replace("transformers", "Transformers") for x in sources]
        metadata["datasetDataSources"] = [f"{DATASET}/2"]
        return answer

    case.server.GetKernel = spelled
    code, _, err = push(case)
    assert code == 0, err


# handing in


@pytest.mark.parametrize("state", ["RUNNING", "QUEUED", "ERROR", "CANCEL_ACKNOWLEDGED"])
def test_a_name_that_holds_complete_is_no_state(case, state):
    case.server.kernel_status = state
    case.server.kernel_failure = f'x\n{USER}/complete-recovery/2 has status "COMPLETE"'
    options = ["--competition", "llm-prompts", "--message", "complete", "--timeout", "30"]
    code, _, err = case.run("submit", "--notebook", f"{USER}/complete-recovery/2", *options)
    assert code == 1 and state in err and case.server.submissions == []


def test_a_version_that_is_not_the_newest_is_refused(case):
    """Its state is unknown: 2.2.4 tells that of the latest run, whichever version is named."""
    pushed(case, 3)
    code, out, err = submit(case)
    assert code == 1 and f"{SLUG}/2 is not the newest version" in err
    assert case.server.submissions == []
    case.server.kernels[SLUG].pop()
    code, out, err = submit(case)
    assert code == 0 and "can't be known" not in out and len(case.server.submissions) == 1, err


def test_a_version_that_is_not_the_newest_is_handed_in_where_its_state_is_told(
    case, newer_program, monkeypatch
):  # fmt: skip
    pushed(case, 3)
    case.server.kernel_status = "RUNNING"  # the third
    monkeypatch.setenv("PYTHONPATH", str(newer_program))
    code, _, err = submit(case)
    assert code == 0 and case.server.submissions[0]["version"] == 2, err


def test_where_kaggle_shows_no_versions_it_is_said(case):
    code, out, err = submit(case)
    assert code == 0 and f"whether {SLUG}/2 is the newest version can't be known" in out, err


@pytest.mark.parametrize(
    ("message", "keeps"),
    [
        (" adapter 3 \n", str.strip),
        ("adapter  3,\tr<16", lambda text: " ".join(text.split()).replace("<", "&lt;")),
        ("a" * 900, lambda text: text[:500]),
        ("adapter 3", lambda text: ""),
    ],
)
def test_a_message_that_kaggle_changes_is_no_failure(case, message, keeps):
    case.server.keeps = keeps
    code, out, err = submit(case, "--message", message)
    assert code == 0 and "submission 100" in out and len(case.server.submissions) == 1, err


def test_a_submission_that_failed_never_asks_for_another_one(case):
    for fault in (status(404, "Not found"), status(500)):
        case.server.fail("CreateCodeSubmission", fault)
        code, _, err = submit(case)
        assert code == 1 and "un the same command" not in err and "before you hand in again" in err

    def somebody_else(handler):
        case.server.submissions.append({"ref": 99, "description": "a teammate's", "fileName": "x"})
        return status(500)(handler)

    case.server.fail("CreateCodeSubmission", somebody_else)
    code, _, err = submit(case)
    assert code == 1 and '99 ("a teammate\'s") is new' in err


@pytest.mark.parametrize("text", ["-2", "-", "-half the rows", "--lr 2e-5, r 16", "-n", "-m x"])
def test_texts_that_begin_with_a_dash_arrive(case, text, each_program):
    code, _, err = submit(case, "--message", text)
    assert code == 0 and case.server.submissions[0]["description"] == text, err
    case.standing(1)
    case.write(2)
    code, _, err = case.publish("--notes", text, "--verify", "list")
    sent = [
        body["body"]["versionNotes"]
        for name, body in case.server.requests
        if name == "CreateModelInstanceVersion"
    ]
    assert code == 0 and sent == [text], err


@pytest.mark.parametrize("text", ["", "  ", "--"])
def test_blank_texts_are_refused_before_kaggle_is_asked(case, text):
    """argparse makes an empty list of "--", which was handed in as "[]"."""
    case.write(1)
    for code, _, err in (submit(case, "--message", text), case.publish("--notes", text)):
        assert code == 1 and "is blank or '--'" in err
    code, _, err = submit(case, f"--output={text}")
    assert code == 1 and "--output is blank" in err and case.server.requests == []


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "soon"])
def test_a_timeout_is_a_time(case, text, capsys):
    with pytest.raises(SystemExit):
        submit(case, "--timeout", text)
    assert f"{text!r} is no time: give seconds, more than 0" in capsys.readouterr().err


def test_notes_that_are_forgotten_are_not_the_next_option(case, capsys):
    case.write(1)
    with pytest.raises(SystemExit):
        case.publish("--notes", "--dry-run")
    assert "--notes: expected one argument" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "text", "kind"),
    [
        (f"{USER}/denied/transformers/r4", f"{USER}/denied/transformers/r4 has too many", "failed"),
        (f"{USER}/m/transformers/404", f"Busy: {USER}/m/transformers/404", "failed"),
        ("--version-notes=401 of 403 rows", "Bad notes: 401 of 403 rows", "failed"),
        (f"{USER}/m/transformers/r4", f"404 Not Found: {USER}/m/transformers/r4", "missing"),
        ("x", "  3%| | 404/9000 [00:01<00:09, 403B/s]\nServer error", "failed"),
        ("x", "500 Server Error for url: http://localhost/api/v1/denied/404", "failed"),
        (f"{USER}/m", f"Permission 'models.get' was denied on {USER}/m", "forbidden"),
    ],
)
def test_errors_are_read_in_the_program_s_words_not_in_the_user_s(given, text, kind):
    assert cli.Reply(1, "", text, given=("models", given)).kind == kind


def test_bases_of_the_template_are_named(case):
    code, out, _ = push(case, "--base", PUBLIC, "--dry-run")
    assert code == 0 and PUBLIC in out and BASE not in out and case.server.requests == []
