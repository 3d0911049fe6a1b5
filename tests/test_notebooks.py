"""The notebooks as users meet them: pairs agree, both run, errors are messages, importing is cheap."""

import json
import subprocess
import sys

import jupytext
import pandas as pd
import papermill
import pytest
from conftest import ROOT, TINY

from prompt_recovery import metric

NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("*.py"))


def test_there_are_notebooks():
    assert {"train", "submission"} <= set(NAMES)
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_pair_agrees_and_has_no_outputs(name):
    source = jupytext.read(ROOT / "notebooks" / f"{name}.py")
    notebook = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())
    cells = [(c["cell_type"], "".join(c["source"]), c["metadata"].get("tags", [])) for c in notebook["cells"]]
    assert cells == [(c.cell_type, c.source, c.metadata.get("tags", [])) for c in source.cells], "run: make notebooks"
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook["cells"])
    assert sum("parameters" in tags for _, _, tags in cells) == 1


def run(name, folder, **parameters):
    papermill.execute_notebook(
        ROOT / "notebooks" / f"{name}.ipynb", folder / f"{name}.ipynb", parameters=parameters, cwd=ROOT,
        kernel_name="python3", progress_bar=False,
    )  # fmt: skip


@pytest.mark.parametrize("style, placement, pad", [("plain", "user", "<pad>"), ("reason_json", "turn", "unk")])
def test_both_notebooks_run(tmp_path, style, placement, pad):
    rows = pd.read_csv(ROOT / "demo" / "rows.csv", dtype=str).head(24)
    rows["response"] = '1. The voice changed. \n2. {"prompt": "x"}'
    rows.to_csv(tmp_path / "rows.csv", index=False)
    test = pd.read_csv(ROOT / "demo" / "test.csv", dtype=str).head(5)
    test.to_csv(tmp_path / "test.csv", index=False)
    shared = dict(model_dir=str(TINY), style=style, system_placement=placement)
    run(
        "train", tmp_path, train_csv=[str(tmp_path / "rows.csv")], output_dir=str(tmp_path / "out"), max_steps=2,
        eval_fraction=0.2, encoder_dir=str(metric.minilm_dir()), pad=pad, **shared,
    )  # fmt: skip
    out = tmp_path / "out"
    assert {p.name for p in (out / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert {"scs_before", "scs_after", "scs_after_ci", "exact_match", "n", "encoder"} <= evaluation.keys()
    assert evaluation["n"] == len(pd.read_csv(out / "predictions.csv")) > 0
    assert evaluation["encoder"] == "all-MiniLM-L6-v2"
    assert (out / "loss.png").stat().st_size > 5000 and len(pd.read_csv(out / "training_log.csv")) == 2
    run(
        "submission", tmp_path, adapter_dir=str(out / "adapter"), test_csv=str(tmp_path / "test.csv"),
        submission_csv=str(tmp_path / "submission.csv"), max_new_tokens=8, **shared,
    )  # fmt: skip
    assert pd.read_csv(tmp_path / "submission.csv", dtype=str)["id"].to_list() == test["id"].to_list()


def test_an_unknown_csv_stops_with_its_message(tmp_path):
    (tmp_path / "rows.csv").write_text("id,text\n1,a\n")
    with pytest.raises(papermill.PapermillExecutionError, match="rows.csv.*original_text") as caught:
        run(
            "train", tmp_path, train_csv=str(tmp_path / "rows.csv"), model_dir=str(TINY), output_dir=str(tmp_path / "o")
        )
    assert len(str(caught.value)) < 2000  # a message, not a page


def test_importing_the_package_is_cheap():
    code = "import sys, time; t = time.perf_counter(); import prompt_recovery; "
    code += "print(time.perf_counter() - t, 'torch' in sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.split()
    assert float(out[0]) < 0.2 and out[1] == "False"
