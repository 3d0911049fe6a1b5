"""What `make demo-ensemble` runs after the demo, here after one step of training and on six
rows."""

import ensemble  # demo/ensemble.py
import pandas as pd
import run  # demo/run.py
from conftest import ROOT
from tiny_submission import make_adapter

from prompt_recovery import adapter_files, files
from prompt_recovery.recipe import Format


def test_a_second_style_is_trained_and_both_answer_one_submission(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "OUTPUT", tmp_path)
    monkeypatch.setattr(run, "SETTINGS", run.SETTINGS | dict(max_steps=1))
    make_adapter(tmp_path / "train" / "adapter", Format())
    rows = pd.read_csv(ROOT / "demo" / "rows.csv", dtype=str)
    rows.tail(24).to_csv(tmp_path / "own rows.csv", index=False)
    rows.head(6).to_csv(tmp_path / "rehearsal.csv", index=False)
    answers = rows[["id"]].head(6).assign(rewrite_prompt="Make it rhyme.")
    answers.to_csv(tmp_path / "submission.csv", index=False)
    ensemble.main(["--rows", str(tmp_path / "own rows.csv")])
    report = " ".join(capsys.readouterr().out.split("== report")[1].split())
    for pair in ("json.csv submission.csv 6", "joined.csv submission-json.csv 6"):
        assert f"submission-{pair} " in report
    assert "by 2 of 2 adapters" in report and (tmp_path / "scores.html").is_file()
    second = tmp_path / "train-json" / "adapter"
    assert adapter_files.read_header(second)["style"] == "json"
    joined = files.read_csv(tmp_path / "submission-joined.csv")
    assert joined["id"].to_list() == answers["id"].to_list()
