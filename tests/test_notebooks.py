"""The notebooks as users meet them: pairs agree, both run, errors are messages, importing is
cheap."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys

import jupytext
import pandas as pd
import papermill
import pytest
import run as run_demo  # demo/run.py
from conftest import ROOT, TINY  # puts demo/ on the path
from PIL import Image

from kaggle_upload import contents
from prompt_recovery import data, files, metric, scoring

FALLBACK = "Please improve this text while keeping its original meaning but altering the tone."
NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("*.py"))


def test_there_are_notebooks():
    assert {"train", "submission"} <= set(NAMES)
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_pair_agrees_and_has_no_outputs(name):
    source = jupytext.read(ROOT / "notebooks" / f"{name}.py")
    notebook = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())
    cells = [
        (c["cell_type"], "".join(c["source"]), c["metadata"].get("tags", []))
        for c in notebook["cells"]
    ]
    assert cells == [(c.cell_type, c.source, c.metadata.get("tags", [])) for c in source.cells], (
        "run: make notebooks"
    )
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook["cells"])
    assert sum("parameters" in tags for _, _, tags in cells) == 1


def run(name, folder, **parameters):
    papermill.execute_notebook(
        ROOT / "notebooks" / f"{name}.ipynb",
        folder / f"{name}.ipynb",
        parameters=parameters,
        cwd=ROOT,
        kernel_name="python3",
        progress_bar=False,
    )


def notices(name, folder):
    """What libraries say in red blocks though there is nothing to act on is not in an executed
    notebook."""
    cells = json.loads((folder / f"{name}.ipynb").read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    said = "".join(
        part for output in outputs if output.get("name") == "stderr" for part in output["text"]
    )
    known = ["Warning: `is_gradient_checkpointing`", "kernels-community"]
    # else bars are no bars, which it says
    known += ["IProgress"] if importlib.util.find_spec("ipywidgets") else []
    assert not [notice for notice in known if notice in said], said


def test_both_notebooks_run_on_natural_rows(tmp_path):
    shutil.copy(ROOT / "demo" / "natural_rows.csv", tmp_path / "rows.csv")
    test = pd.read_csv(ROOT / "demo" / "test.csv", dtype=str).head(5)
    test.to_csv(tmp_path / "test.csv", index=False)
    shared = dict(model_dir=str(TINY), style="reason_json", system_placement="turn")
    run(
        "train",
        tmp_path,
        train_csv=[str(tmp_path / "rows.csv")],
        output_dir=str(tmp_path / "out"),
        max_steps=2,
        eval_fraction=0.05,
        encoder_dir=str(metric.minilm_dir()),
        pad="unk",
        batch_size=2,
        **shared,
    )
    notices("train", tmp_path)
    out = tmp_path / "out"
    assert {p.name for p in (out / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    evaluation = json.loads((out / "evaluation.json").read_text())
    names = {"scs_before", "scs_after", "scs_after_ci", "exact_match", "n", "encoder"}
    assert names <= evaluation.keys()
    assert evaluation["n"] == len(pd.read_csv(out / "predictions.csv")) > 0
    assert evaluation["encoder"] == "all-MiniLM-L6-v2"
    # the rows of the report stand there whole, to rehearse on; what scores a submission agrees
    held_out = data.read_rows(out / "held_out.csv")
    assert held_out["id"].to_list() == files.read_csv(out / "predictions.csv")["id"].to_list()
    assert data.read_test(out / "held_out.csv")["rewritten_text"].str.strip().all()
    encoder = metric.load_encoder(metric.minilm_dir(), device="cpu")
    scored = scoring.score_files([out / "predictions.csv"], out / "held_out.csv", encoder).rows
    assert scored["scs"].mean() == pytest.approx(evaluation["scs_after"], abs=1e-6)
    published = contents.adapter_content(out / "adapter")[1]  # a line of versions.csv
    assert published["style"] == "reason_json" and re.fullmatch(
        "[0-9a-f]{12}", published["rows_hash"]
    )
    assert (
        published["base"] == "tiny-mixtral"
        and json.loads(published["scores"])["n"] == evaluation["n"]
    )
    assert (out / "loss.png").stat().st_size > 5000 and len(
        pd.read_csv(out / "training_log.csv")
    ) == 2
    weights = files.sha256(out / "adapter" / "adapter_model.safetensors")
    assert (
        evaluation["adapter_sha256"]
        == Image.open(out / "loss.png").text["adapter_sha256"]
        == weights
    )
    assert set(files.read_csv(out / "predictions.csv")["adapter_sha256"]) == {weights}
    assert len(files.read_csv(out / "split.csv")) == 300 and not (out / "run.lock").exists()
    # style and placement are those that the adapter names; of two answers that disagree, the mean
    # prompt is left
    run(
        "submission",
        tmp_path,
        model_dir=str(TINY),
        adapter_dir=str(out / "adapter"),
        test_csv=str(tmp_path / "test.csv"),
        submission_csv=str(tmp_path / "submission.csv"),
        max_new_tokens=40,
        answers_per_row=2,
        combine="agree",
        temperature=1.5,
        threshold=1.1,
        mean_prompt="Improve it.",
        encoder_dir=str(metric.minilm_dir()),
    )
    notices("submission", tmp_path)
    answers = pd.read_csv(tmp_path / "submission.csv", dtype=str)
    assert answers["id"].to_list() == test["id"].to_list()
    assert set(answers["rewrite_prompt"]) <= {"Improve it.", FALLBACK}
    assert "reason_json answers, 2 a row, agree" in (tmp_path / "submission.ipynb").read_text()


def test_an_unknown_csv_stops_with_its_message(tmp_path):
    (tmp_path / "rows.csv").write_text("id,text\n1,a\n")
    with pytest.raises(
        papermill.PapermillExecutionError, match="rows.csv.*original_text"
    ) as caught:
        run(
            "train",
            tmp_path,
            train_csv=str(tmp_path / "rows.csv"),
            model_dir=str(TINY),
            output_dir=str(tmp_path / "o"),
        )
    assert len(str(caught.value)) < 2000  # a message, not a page


def test_where_no_row_is_left_the_account_comes_first(tmp_path):
    (tmp_path / "rows.csv").write_text("original_text,rewritten_text,rewrite_prompt\na,a,p\nb,,p\n")
    with pytest.raises(
        papermill.PapermillExecutionError, match="no rows left to train on: see the account"
    ):
        run(
            "train",
            tmp_path,
            train_csv=str(tmp_path / "rows.csv"),
            model_dir=str(TINY),
            output_dir=str(tmp_path / "o"),
        )
    said = (tmp_path / "train.ipynb").read_text()
    assert (
        "2 rows read, 2 dropped, 0 kept" in said
        and "identical original and rewritten (rows.csv:1)" in said
    )


def test_demo_trains_on_the_rows_given_and_uses_nothing_stale(tmp_path, monkeypatch, capsys):
    """What `make demo ROWS=path.csv` runs, with plain answers and <pad>."""
    output = tmp_path / "demo"
    monkeypatch.setattr(run_demo, "OUTPUT", output)
    (output / "train" / "checkpoints" / "checkpoint-700").mkdir(parents=True)
    (output / "train" / "checkpoints" / "checkpoint-700" / "trainer_state.json").write_text("{}")
    bad = tmp_path / "bad.csv"
    bad.write_text("id,text\n1,a\n")
    with pytest.raises(SystemExit, match=r"bad.csv has no column original_text"):
        run_demo.main(["--rows", str(bad)])
    assert (output / "train").exists()  # a mistyped path costs nothing
    own = pd.read_csv(ROOT / "demo" / "rows.csv", dtype=str).tail(24)
    own.to_csv(tmp_path / "own rows.csv", index=False)
    run_demo.main(["--rows", str(tmp_path / "own rows.csv")])
    assert {path.name for path in (output / "train" / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    assert set(pd.read_csv(output / "train" / "predictions.csv", dtype=str)["id"]) < set(own["id"])
    assert not list((output / "train").rglob("checkpoint-700"))
    answers = pd.read_csv(output / "submission.csv", dtype=str, keep_default_na=False)
    assert (
        answers["id"].to_list()
        == pd.read_csv(ROOT / "demo" / "test.csv", dtype=str)["id"].to_list()
    )
    assert (answers["rewrite_prompt"].str.strip() != "").all()
    report = capsys.readouterr().out.split("== report")[1]
    assert "near 0: it shows that your file is read" in report
    assert "24 in own rows.csv" in report and "peak memory" in report and "95%" in report
    assert report.count("  truth ") == report.count("  after ") > 0 and "submission.csv" in report


def test_importing_the_package_is_cheap():
    times = []
    for _ in range(3):  # the least of three: other programs may hold the machine up
        command = [sys.executable, "-X", "importtime", "-c", "import prompt_recovery"]
        lines = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=ROOT
        ).stderr.splitlines()
        modules = {line.split("|")[-1].strip(): int(line.split("|")[1]) for line in lines[1:]}
        assert "torch" not in modules
        times.append(modules["prompt_recovery"] / 1e6)
    assert min(times) < 0.2


def test_the_upload_program_starts_without_torch_and_pandas():
    command = "import kaggle_upload.__main__, sys; print({'torch', 'pandas'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "set()\n", done.stderr
