"""The notebooks as Kaggle runs them, on a dense base in 4 bits: a session that ends in time, one
that goes on from its output, and a submission with the adapter."""

import json
import re
import shutil

import pandas as pd
import papermill
from conftest import ROOT

from kaggle_upload import contents
from prompt_recovery import metric


def run(name, working, **parameters):
    """In a session's own folder, as Kaggle does."""
    working.mkdir(parents=True, exist_ok=True)
    papermill.execute_notebook(
        ROOT / "notebooks" / f"{name}.ipynb",
        working / "__notebook__.ipynb",
        parameters=parameters,
        cwd=working,
        kernel_name="python3",
        progress_bar=False,
    )
    return (working / "__notebook__.ipynb").read_text()


def test_two_sessions_and_a_submission_find_all_they_need(tmp_path, mistral):
    root = tmp_path / "input"
    (root / "models/me").mkdir(parents=True)
    (root / "models/me/base").symlink_to(mistral / "nf4")
    (root / "datasets/rows").mkdir(parents=True)
    rows = pd.read_csv(ROOT / "demo" / "rows.csv", dtype=str).head(40)
    rows.to_csv(root / "datasets/rows/rows.csv", index=False)
    (root / "datasets/encoder").symlink_to(metric.minilm_dir())
    settings = dict(
        input_dir=str(root), max_steps=4, batch_size=2, gradient_accumulation=1, max_tokens=300
    )
    # less than what comes behind a training is taken to need: it ends after its first step
    said = run("train", tmp_path / "first", time_budget_hours=0.05, **settings)
    first = tmp_path / "first/outputs/train"
    assert "ENDED IN TIME at step 1 of 4" in said
    evaluation = json.loads((first / "evaluation.json").read_text())
    assert "ENDED IN TIME at step 1 of 4" in evaluation["training"] and evaluation["n"] > 0
    assert contents.adapter_content(first / "adapter")[1]["scores"]  # whole, and its scores
    # the next session has this one's output as an input, which can't be written to
    mounted = shutil.copytree(tmp_path / "first", root / "notebooks/me/train-recover-prompts")
    for path in mounted.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    said = run("train", tmp_path / "second", **settings)
    assert "goes on from its checkpoint of step 1" in said and "all 4 steps done" in said
    second = tmp_path / "second/outputs/train"
    log = pd.read_csv(second / "training_log.csv")
    assert log["step"].to_list() == [1, 2, 3, 4]
    splits = [pd.read_csv(each / "split.csv", dtype=str) for each in (first, second)]
    assert splits[0].equals(splits[1])
    # and the submission: the adapter as a model, no earlier output, the competition
    for path in mounted.rglob("*"):
        path.chmod(0o755)
    shutil.rmtree(root / "notebooks")
    shutil.copytree(second / "adapter", root / "models/me/lora")
    (root / "competitions/c").mkdir(parents=True)
    test = pd.read_csv(ROOT / "demo" / "test.csv", dtype=str).head(3)
    test.to_csv(root / "competitions/c/test.csv", index=False)
    to = tmp_path / "third/submission.csv"
    said = run(
        "submission",
        tmp_path / "third",
        input_dir=str(root),
        submission_csv=str(to),
        max_new_tokens=8,
    )
    answers = pd.read_csv(to, dtype=str)
    assert answers["id"].to_list() == test["id"].to_list()
    assert answers["rewrite_prompt"].str.strip().ne("").all()
    assert re.search(r"3 rows: [123] by the model", said)
