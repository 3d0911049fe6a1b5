"""Submissions of anyone's are scored by id, and never wrongly: what can't be matched is refused."""

import base64
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from prompt_recovery import __main__ as program
from prompt_recovery import data, files, metric, score_report, scoring
from prompt_recovery.tables import DataError

TRUTHS = {
    "1": "Rewrite this text as a pirate would say it.",
    "2": "Make it rhyme.",
    "03": "Shorten the text to one sentence.",
    "x y": "Translate it into French.",
}
ANSWERS = ["Talk like a pirate.", "Make it rhyme.", "Be brief.", "Use the passive voice."]


@pytest.fixture
def truth(tmp_path):
    path = tmp_path / "truth.csv"
    pd.DataFrame(TRUTHS.items(), columns=["id", "rewrite_prompt"]).to_csv(path, index=False)
    return path


def written(path, answers=ANSWERS, ids=tuple(TRUTHS), **columns):
    table = pd.DataFrame({"id": ids, "rewrite_prompt": answers} | columns)
    table.to_csv(path, index=False)
    return path


def expected(answers, truths, encoder):
    return metric.sharpened_cosine(answers, truths, encoder)


def test_the_score_is_the_training_notebooks(tmp_path, encoder):
    """To 1e-6, from the predictions.csv that it leaves and from a submission of the same answers; a
    row without a prompt counts 0 in all three."""
    rows = data.read_rows(ROOT / "demo" / "natural_rows.csv").head(40)
    random = np.random.default_rng(0)
    guesses = rows["rewrite_prompt"].sample(frac=1, random_state=1).to_list()
    how = np.where(random.random(40) < 0.2, "fallback", "text")
    after = pd.DataFrame({"id": rows["id"], "answer": guesses, "how": how, "stopped": "eos"})
    predictions = metric.score_table(rows, after.assign(how="fallback"), after, encoder)
    figure = metric.evaluation(predictions, "MiniLM")
    files.write_csv(predictions, tmp_path / "predictions.csv")
    submission = predictions[["id", "after"]].rename(columns={"after": "rewrite_prompt"})
    files.write_csv(submission.sample(frac=1, random_state=2), tmp_path / "submission.csv")
    paths = [tmp_path / "predictions.csv", tmp_path / "submission.csv"]
    found = scoring.score_files(paths, ROOT / "demo" / "natural_rows.csv", encoder)
    table = score_report.summary(found.rows)
    assert figure["scs_after"] > 0.02 and figure["no_prompt"] > 0.1
    for line in table.to_dict("records"):
        assert line["scs"] == pytest.approx(figure["scs_after"], abs=1e-6)
        assert [line["low"], line["high"]] == pytest.approx(figure["scs_after_ci"], abs=1e-6)
        assert line["exact_match"] == figure["exact_match"] and line["rows"] == 40
        assert line["empty"] == pytest.approx(figure["no_prompt"])
    assert any(
        "predictions.csv: the answers are those of its column after" in n for n in found.notes
    )
    assert any("submission.csv is in another order" in note for note in found.notes)


def test_an_encoder_reads_as_far_as_its_own_limit(tmp_path, truth):
    """128 pieces: what stands behind them changes no score, and is counted as cut."""
    folder = shutil.copytree(metric.minilm_dir(), tmp_path / "encoder")
    own = json.loads((folder / "sentence_bert_config.json").read_text())
    (folder / "sentence_bert_config.json").write_text(json.dumps(own | {"max_seq_length": 128}))
    encoder = metric.load_encoder(folder, device="cpu")
    fits = "word " * 125 + "pirate"  # with its two marks 128 pieces
    answers = [fits, fits + " ship", fits + " ship and a thousand more of them", "ship " + fits]
    lone = dict.fromkeys("abcd", TRUTHS["1"])
    pd.DataFrame(lone.items(), columns=["id", "rewrite_prompt"]).to_csv(truth, index=False)
    found = scoring.score_files(
        [written(tmp_path / "a.csv", answers, list("abcd"))], truth, encoder
    )
    scores = found.rows["scs"].to_list()
    assert scores[1] == pytest.approx(scores[0], abs=1e-6)
    assert scores[2] == pytest.approx(scores[0], abs=1e-6)
    assert scores[3] != pytest.approx(scores[0], abs=1e-4)
    assert found.rows["cut"].to_list() == [False, True, True, True]
    assert encoder.max_seq_length == 128
    assert not metric.load_encoder(metric.minilm_dir(), device="cpu").max_seq_length == 128


@pytest.mark.parametrize(
    "text, notes",
    [
        ("ID,Rewrite Prompt\n{rows}", []),
        ("id;rewrite_prompt\n{semicolons}", []),
        ("id,prompt\n{rows}", ["those of its column prompt"]),
        (",id,rewrite_prompt\n{numbered}", ["its other columns, '', are passed over"]),
        ("rewrite_prompt,id,score\n{turned}", ["'score', are passed over"]),
        ("id,rewrite_prompt\n{backwards}", ["another order"]),
        ("id,rewrite_prompt\n{rows}{first}", ["same answer again to 1 id ('1')"]),
        ("id,rewrite_prompt\n{but_first}", ["no answer to 1 id ('1') of 4"]),
    ],
)
def test_odd_files_are_matched_by_id_and_what_is_odd_is_said(text, notes, truth, tmp_path, encoder):
    pairs = list(zip(TRUTHS, ANSWERS, strict=True))
    lines = [f'"{own}","{answer}"\n' for own, answer in pairs]
    forms = dict(
        rows="".join(lines),
        semicolons="".join(f"{own};{answer}\n" for own, answer in pairs),
        numbered="".join(f"{n},{line}" for n, line in enumerate(lines)),
        turned="".join(f"{answer},{own},0.5\n" for own, answer in pairs),
        backwards="".join(lines[::-1]),
        first=lines[0],
        but_first="".join(lines[1:]),
    )
    path = tmp_path / "a.csv"
    path.write_text(text.format(**forms), encoding="utf-8-sig")
    found = scoring.score_files([path], truth, encoder)
    scores = dict(zip(TRUTHS, expected(ANSWERS, list(TRUTHS.values()), encoder), strict=True))
    assert set(found.rows["id"]) == {each for each in TRUTHS if each != "1" or "but" not in text}
    for row in found.rows.to_dict("records"):
        assert row["scs"] == pytest.approx(scores[row["id"]], abs=1e-6)
        assert row["truth"] == TRUTHS[row["id"]]
    assert len(found.notes) == len(notes), found.notes
    for said, wanted in zip(found.notes, notes, strict=True):
        assert said.startswith("a.csv") and wanted in said


@pytest.mark.parametrize(
    "text, why",
    [
        ("", "is empty"),
        ("id,rewrite_prompt\n", "a header but no rows"),
        ("rewrite_prompt\na\n", "0 columns id"),
        ("id,one,two\n1,a,b\n", "0 columns rewrite_prompt"),
        ("id,original_text,rewritten_text\n1,a,b\n", "0 columns rewrite_prompt"),
        ("id,rewrite_prompt,rewrite_prompt\n1,a,b\n", "2 columns rewrite_prompt"),
        ("id,rewrite_prompt\n1,a\n1,b\n2,c\n", "several answers to 1 id ('1')"),
        ("id,rewrite_prompt\n1,a\n2,b\n3,c\n", "1 id ('3') of 3 that no truth has"),
        ("id,rewrite_prompt\n1.0,a\n2.0,b\n", "2 ids ('1.0', '2.0') of 2"),
        ("id,rewrite_prompt\n1,a\n,b\n", "1 id ('') of 2"),
        ("id,rewrite_prompt\n1,a,b\n", "2 columns, but row 1"),
        ("<!doctype html><html></html>", "an HTML page"),
    ],
)
def test_what_cannot_be_matched_is_refused_by_name(text, why, truth, tmp_path, capsys):
    (tmp_path / "odd.csv").write_text(text)
    files_of = [str(written(tmp_path / "a.csv")), str(tmp_path / "odd.csv")]
    assert program.main(["score", *files_of, "--truth", str(truth)]) == 1
    captured = capsys.readouterr()
    assert why in captured.err and "odd.csv" in captured.err and "SCS" not in captured.out


def test_truths_that_cannot_be_used_are_refused_or_said(tmp_path, encoder, capsys):
    answers = written(tmp_path / "a.csv", ["a b c", "d e f"], ["t-1", "t-2"])
    path = tmp_path / "t.csv"
    path.write_text("rewrite_prompt\nMake it rhyme.\nBe brief.\n \n")  # ids of data.read_rows
    found = scoring.score_files([answers], path, encoder)
    assert found.rows["id"].to_list() == ["t-1", "t-2"]
    assert found.notes == ["1 rows without a truth are not scored: 't.csv:3'."]
    assert "a space behind" not in capsys.readouterr().out  # one column has no separators
    # a row that was answered and has no truth is not scored, and is no stranger either
    whole = written(tmp_path / "a.csv", ["a b c", "d e f", "g h i"], ["t-1", "t-2", "t-3"])
    assert scoring.score_files([whole], path, encoder).rows["id"].to_list() == ["t-1", "t-2"]
    for text, why in (
        ("id,prompt\nt-1,a\n", "no column rewrite_prompt"),
        ("id,rewrite_prompt\nt-1,a\nt-1,b\nt-2,c\n", "more than once"),
        ("id,rewrite_prompt\nt-1,\nt-2,nan\n", "blank in all 2 rows"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=why):
            scoring.score_files([answers], path, encoder)
    path.write_text("id,rewrite_prompt\nt-1,a\nt-2,b\n")
    with pytest.raises(DataError, match="given more than once"):
        scoring.score_files([answers, tmp_path / "." / "a.csv"], path, encoder)


def test_answers_that_say_nothing_count_zero_and_shares_are_counted(tmp_path, truth, encoder):
    answers = ["", "N/A", "Make it RHYME!", "make it rhyme"]
    found = scoring.score_files([written(tmp_path / "a.csv", answers)], truth, encoder)
    assert found.rows["scs"].to_list()[:2] == [0, 0] and (found.rows["scs"][2:] > 0).all()
    line = score_report.summary(found.rows).iloc[0]
    assert (line["empty"], line["repeated"], line["cut"]) == (0.5, 0.5, 0)
    assert "2 ids ('1', '2'). Each counts 0" in "".join(found.notes)
    long = ["word " * 300, *ANSWERS[1:]]
    found = scoring.score_files([written(tmp_path / "a.csv", long)], truth, encoder)
    assert found.rows["cut"].to_list() == [True, False, False, False]
    assert "more than 128 pieces of sentence-t5 to 1 id ('1')" in "".join(found.notes)
    same = scoring.score_files([written(tmp_path / "a.csv", TRUTHS.values())], truth, encoder)
    assert "Is it the truth itself?" in "".join(same.notes)


def test_differences_are_paired_over_the_rows_that_both_have(tmp_path, encoder):
    rows = data.read_rows(ROOT / "demo" / "natural_rows.csv").head(40)
    truths = rows["rewrite_prompt"].to_list()
    guesses = truths[1:] + truths[:1]
    better = [(guesses, truths)[n % 2][n] for n in range(len(truths))]
    ids = rows["id"].to_list()
    paths = [
        written(tmp_path / "a.csv", guesses, ids),
        written(tmp_path / "b.csv", better, ids),
        written(tmp_path / "c.csv", guesses[:25], ids[:25]),
    ]
    found = scoring.score_files(paths, ROOT / "demo" / "natural_rows.csv", encoder)
    table = score_report.differences(found.rows).set_index(["file", "over"])
    a, b = (expected(each, truths, encoder) for each in (guesses, better))
    wanted = metric.paired_difference(b, a)
    line = table.loc["b.csv", "a.csv"]
    assert line[["gain", "low", "high"]].to_list() == pytest.approx(wanted, abs=1e-5)
    assert line["shown"] == "yes" and line["rows"] == 40
    same = table.loc["c.csv", "a.csv"]
    assert same["rows"] == 25 and same["shown"] == "no" and abs(same["gain"]) < 1e-6
    assert "do not answer the same rows" in found.notes[-1]
    # every row stands in one length band and one task, with its score
    for column in ("truth", "answer"):
        bands = score_report.by_length(found.rows, column)
        assert (bands["rows a.csv"].sum(), bands["rows c.csv"].sum()) == (40, 25)
        mean = (bands["scs a.csv"].fillna(0) * bands["rows a.csv"]).sum() / 40
        assert mean == pytest.approx(a.mean(), abs=1e-5)
    tasks = score_report.by_task(found.rows)
    assert tasks["rows"].sum() == 40 and tasks["cost"].is_monotonic_decreasing
    assert tasks["cost"].sum() == pytest.approx(1 - found.rows["scs"].mean())


def test_the_program_says_it_and_writes_one_page(tmp_path, truth, capsys):
    odd = '<b>bold</b> & "quoted" ' + "and so on " * 40
    (tmp_path / "one").mkdir()
    files_of = [
        str(written(tmp_path / "a.csv", [odd, *ANSWERS[1:]])),
        str(written(tmp_path / "one" / "a.csv", ANSWERS)),
    ]
    page = tmp_path / "pages" / "scores.html"
    asked = ["score", *files_of, "--truth", str(truth)]
    assert program.main([*asked, "--html", str(page)]) == 0
    captured = capsys.readouterr()
    assert "Batches: 100%" in captured.err  # the bar
    printed = captured.out
    line = re.search(r"^one/a\.csv +4 +(\d\.\d{3}) ", printed, re.MULTILINE)
    mean = expected(ANSWERS, list(TRUTHS.values()), metric.load_encoder(metric.minilm_dir())).mean()
    assert float(line[1]) == pytest.approx(mean, abs=6e-4)
    folder = tmp_path.name  # two files of one name are told apart by their folders
    assert (
        f"The worst of 4 rows of {folder}/a.csv" in printed
        and "encoder all-MiniLM-L6-v2" in printed
    )
    assert f"one/a.csv {folder}/a.csv 4" in " ".join(printed.split())
    html = page.read_text(encoding="utf-8")
    assert "&lt;b&gt;bold&lt;/b&gt; &amp;" in html and odd.split(" ", 1)[1][-200:].strip() in html
    assert "<b>bold" not in html and str(tmp_path.parent) not in html and "http" not in html
    (image,) = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    assert base64.b64decode(image).startswith(b"\x89PNG")
    before = files.sha256(tmp_path / "a.csv")
    with pytest.raises(SystemExit):
        program.main([*asked, "--html", files_of[0]])
    assert "give a page to write" in capsys.readouterr().err
    assert files.sha256(tmp_path / "a.csv") == before
    assert program.main([*asked, "--encoder", str(tmp_path)]) == 1
    assert "modules.json" in capsys.readouterr().err
