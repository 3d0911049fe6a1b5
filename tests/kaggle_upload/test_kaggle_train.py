"""Training on Kaggle: what is pushed, what is refused before Kaggle is asked, an adapter that is
published from a notebook's output."""

import json
import subprocess
import sys

import papermill
import pytest
from conftest import ROOT
from kaggle_cases import BASE, DATASET, HANDLE, NOTEBOOK, PUBLIC, SLUG, write_adapter
from kaggle_stand_in import USER

from kaggle_upload import stage
from kaggle_upload.handles import UploadError
from kaggle_upload.notebook import check
from prompt_recovery.files import sha256

TRAIN = ROOT / "notebooks" / "train.ipynb"
TO = f"{USER}/train-recover-prompts"
ROWS, ENCODER = f"{USER}/my-rows", f"{USER}/sentence-t5-base"


def push(case, *more, without=()):
    options = {
        "--to": TO,
        "--base": f"{BASE}/1",
        "--rows": ROWS,
        "--encoder": ENCODER,
        "--wheels": DATASET,
        "--timeout": "30",
    }
    kept = [word for name in options if name not in without for word in (name, options[name])]
    return case.run("notebook", "--train", *kept, *more)


def test_the_train_notebook_is_pushed_with_its_inputs_private_offline_on_two_t4s(case):
    code, out, err = push(case, "--dry-run")
    assert code == 0 and "train.ipynb" in out and case.server.requests == [], err
    code, out, err = push(case, "--rows", f"{USER}/more-rows")
    assert code == 0 and out.splitlines()[-1] == f"{TO}/1", err
    held = case.server.kernels[TO][0]
    assert held["isPrivate"] is True and held["enableInternet"] is False
    assert held["enableGpu"] is True and held["machineShape"] == "NvidiaTeslaT4"
    assert held["modelDataSources"] == [f"{BASE}/1"]
    assert held["datasetDataSources"] == [DATASET, ROWS, f"{USER}/more-rows", ENCODER]
    assert held["competitionDataSources"] == [] == held["kernelDataSources"]
    sent = [
        (cell["cell_type"], "".join(cell["source"])) for cell in json.loads(held["text"])["cells"]
    ]
    own = json.loads(TRAIN.read_text())["cells"]
    assert sent == [(cell["cell_type"], "".join(cell["source"])) for cell in own]


@pytest.mark.parametrize(
    ("given", "model", "dataset"),
    [
        ("some-one/t5/transformers/base/2", "some-one/t5/transformers/base/2", None),
        (
            "https://www.kaggle.com/models/google/t5/frameworks/pyTorch/variations/base/versions/1",
            "google/t5/pyTorch/base/1",
            None,
        ),
        (f"https://www.kaggle.com/datasets/{ENCODER}", None, ENCODER),
    ],
)
def test_the_encoder_may_be_a_dataset_or_a_model(case, given, model, dataset):
    code, out, err = push(case, "--encoder", given, "--base", PUBLIC, "--dry-run")
    assert code == 0, err
    sent = json.loads(out.partition("kernel-metadata.json: ")[2])
    assert sent["model_sources"] == [PUBLIC, *([model] if model else [])]
    assert sent["dataset_sources"] == [DATASET, ROWS, *([dataset] if dataset else [])]


@pytest.mark.parametrize(
    ("without", "more", "message"),
    [
        (["--rows"], [], "with --train the notebook needs --rows too"),
        (["--encoder"], [], "needs --encoder too"),
        (["--rows", "--encoder"], [], "needs --rows and --encoder too"),
        ([], ["--adapter", f"{HANDLE}/3"], "with --train the notebook takes no --adapter"),
        ([], ["--competition", "llm-prompts"], "takes no --competition"),
        ([], ["--base", BASE], "N the version number"),
        ([], ["--rows", "someone"], "must have the form"),
        ([], ["--encoder", "a/b/c"], "must have the form"),
        ([], ["--encoder", f"{USER}/m/transformers/x"], "N the version number"),
        ([], ["--earlier", "someone"], "must have the form"),
        ([], ["--earlier", TO], "is the notebook that would be pushed"),
        ([], ["--file", NOTEBOOK], "submission.ipynb does not train"),
        ([], ["--file", ROOT / "notebooks" / "compare.ipynb"], "compare.ipynb does not train"),
        ([], ["--file", "missing.ipynb"], "missing.ipynb"),
    ],
)
def test_what_can_not_work_is_refused_before_kaggle_is_asked(case, without, more, message):
    code, _, err = push(case, *more, without=without)
    assert code == 1 and message in err and case.server.requests == []


def test_without_train_its_options_are_refused_and_those_to_answer_are_needed(case):
    words = ["notebook", "--to", SLUG, "--base", f"{BASE}/1", "--wheels", DATASET]
    for more, message in (
        ([], "without --train the notebook needs --adapter and --competition too"),
        (["--adapter", f"{HANDLE}/3"], "needs --competition too"),
        (
            ["--adapter", f"{HANDLE}/3", "--competition", "c", "--rows", ROWS, "--earlier", TO],
            "without --train the notebook takes no --rows and no --earlier",
        ),
    ):
        code, _, err = case.run(*words, *more)
        assert code == 1 and message in err and case.server.requests == []


@pytest.mark.parametrize(
    ("source", "parameters", "bad"),
    [
        (TRAIN, {"model_dir": "/data/mixtral"}, "model_dir = "),
        (TRAIN, {"train_csv": ["rows.csv", "more.csv"]}, "train_csv = "),
        (TRAIN, {"encoder_dir": "~/encoder"}, "encoder_dir = "),
        (TRAIN, {"input_dir": "inputs"}, "input_dir = "),
        (NOTEBOOK, {"adapter_dir": "outputs/adapter"}, "adapter_dir = "),
        (NOTEBOOK, {"test_csv": "test.csv"}, "test_csv = "),
        (TRAIN, {"time_budget_hours": 12}, "Kaggle ends the run after 12: give less, such as 11.5"),
        (TRAIN, {"time_budget_hours": 11.9}, None),
        (NOTEBOOK, {"time_budget_hours": 9.0}, "Kaggle ends the run after 9: give less"),
        (TRAIN, {"train_csv": "/kaggle/input/datasets/me/r/rows.csv", "epochs": 2}, None),
        (TRAIN, {"model_dir": None, "output_dir": "out", "resume": True}, None),
    ],
)
def test_paths_of_another_machine_and_more_time_than_there_is_are_refused_in_either_notebook(
    case, tmp_path, source, parameters, bad
):  # fmt: skip
    mine = tmp_path / "mine.ipynb"
    papermill.execute_notebook(
        source, mine, parameters=parameters, prepare_only=True, progress_bar=False
    )
    words = ["--file", mine, "--dry-run"]
    if source == TRAIN:
        code, _, err = push(case, *words)
    else:
        sources = ["--adapter", f"{HANDLE}/3", "--competition", "c", "--wheels", DATASET]
        code, _, err = case.run("notebook", "--to", SLUG, "--base", f"{BASE}/1", *sources, *words)
    assert code == (1 if bad else 0), err
    if bad:
        assert bad in err and ("no path of Kaggle's" in err or "time_budget_hours" in err)


@pytest.mark.parametrize(
    "line",
    [
        "model_dir='nf4'",
        "model_dir = Path('nf4')",
        'model_dir: str = r"nf4"',
        "train_csv=['a.csv']",
    ],
)
def test_a_path_of_another_machine_is_seen_however_it_is_typed(tmp_path, line):
    notebook = json.loads(TRAIN.read_text())
    notebook["cells"].append({"cell_type": "code", "source": [line]})
    (tmp_path / "mine.ipynb").write_text(json.dumps(notebook))
    with pytest.raises(UploadError, match="which is no path of Kaggle's"):
        check(tmp_path / "mine.ipynb", train=True)


def test_json_too_deep_to_read_is_no_notebook(tmp_path):
    (tmp_path / "deep.ipynb").write_text("[" * 100_000)
    with pytest.raises(UploadError, match="not a notebook.*as Jupyter saves it"):
        check(tmp_path / "deep.ipynb")


def test_a_later_session_has_the_earlier_one_s_output_once_it_has_ended_well(case):
    assert push(case)[0] == 0
    later = [f"{TO}-2", "--earlier", TO]
    for state in ("RUNNING", "ERROR", "CANCEL_ACKNOWLEDGED"):
        case.server.kernel_status = state
        code, _, err = push(case, "--to", *later)
        assert code == 1 and state in err and "Nothing was pushed" in err
        assert f"{TO}-2" not in case.server.kernels
    case.server.kernel_status = "COMPLETE"
    code, out, err = push(case, "--to", *later)
    assert code == 0 and out.splitlines()[-1] == f"{TO}-2/1", err
    assert case.server.kernels[f"{TO}-2"][0]["kernelDataSources"] == [TO]
    case.server.refused_sources = {TO, ROWS}
    code, _, err = push(case, "--to", *later)
    assert code == 1 and f"kernel {TO} was not attached" in err
    assert f"dataset {ROWS} was not attached" in err


def test_an_adapter_is_published_from_a_notebook_s_output(case, tmp_path):
    """As docs/KAGGLE.md has it: downloaded by the kaggle program, with all that lies beside it."""
    assert push(case)[0] == 0
    made = tmp_path / "working"
    files = write_adapter(made / "outputs/train/adapter", 1)
    weights = made / "outputs/train/adapter/adapter_model.safetensors"
    evaluation = {"scs_after": 0.6, "n": 50, "encoder": "t5", "adapter_sha256": sha256(weights)}
    (made / "outputs/train/evaluation.json").write_text(json.dumps(evaluation))
    for number in range(25):  # more than one page of the program
        checkpoint = made / f"outputs/train/checkpoints/checkpoint-{number}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "optimizer.pt").write_bytes(b"state")
    case.server.output[TO] = {
        str(path.relative_to(made)): path.read_bytes() for path in made.rglob("*") if path.is_file()
    }
    out = tmp_path / "out"
    command = [sys.executable, "-m", "kaggle", "kernels", "output", TO, "-p", str(out), "--force"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    got = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert got == case.server.output[TO].keys()
    folder = out / "outputs/train/adapter"
    options = ["--to", HANDLE, "--notes", "from Kaggle", "--versions", tmp_path / "v.csv"]
    code, printed, err = case.run("adapter", folder, *options, "--timeout", "30")
    assert code == 0 and printed.splitlines()[-1] == f"{HANDLE}/1", err
    assert case.versions == [files]
    assert '""scs_after"": 0.6' in (tmp_path / "v.csv").read_text()
    code, _, err = case.run("adapter", out, *options)
    assert code == 1 and f"own folder: give {folder}." in err


def test_sources_of_the_template_are_attached_too(case, tmp_path, monkeypatch):
    template = json.loads((ROOT / "kaggle_upload" / "kernel-metadata.json").read_text())
    (tmp_path / "kernel-metadata.json").write_text(
        json.dumps(
            template
            | {"kernel_sources": [f"{USER}/other"], "dataset_sources": ["a/rows"]}
            | {"enable_gpu": False, "enable_internet": True, "is_private": False}
        )
    )
    monkeypatch.setattr(stage, "HERE", tmp_path)
    code, out, err = push(case, "--earlier", f"{TO}-0", "--dry-run")
    sent = json.loads(out.partition("kernel-metadata.json: ")[2])
    assert code == 0 and sent["kernel_sources"] == [f"{TO}-0", f"{USER}/other"], err
    assert sent["dataset_sources"] == [DATASET, ROWS, ENCODER, "a/rows"]
    assert sent["enable_gpu"] and sent["is_private"] and not sent["enable_internet"]
