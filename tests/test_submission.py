import pandas as pd
import pytest
from conftest import NASTY, TINY

from prompt_recovery import data, model, submission
from prompt_recovery.submission import SubmissionError
from prompt_recovery.tokenizer import load_tokenizer

OPTIONS = dict(style="plain", system_placement="user", max_tokens=400, max_new_tokens=8)


@pytest.fixture
def test_csv(tmp_path):
    path = tmp_path / "test.csv"
    texts = ["", *NASTY]
    frame = pd.DataFrame(
        {"id": [f"0{n}" for n in range(len(texts))][::-1], "original_text": texts, "rewritten_text": texts[::-1]}
    )
    frame.to_csv(path, index=False)
    return path


def answer(test_csv, hours, out):
    base, tok = model.load_base(TINY), load_tokenizer(TINY, pad="unk", side="left")
    test = data.read_test(test_csv)
    report = submission.answer_test(
        base, tok, test, out, fallback_prompt="Fall, back", time_budget_hours=hours, **OPTIONS
    )
    return test, report, pd.read_csv(out, dtype=str, keep_default_na=False)


def test_same_ids_same_order_no_blank(test_csv, tmp_path):
    test, report, frame = answer(test_csv, 1, tmp_path / "new" / "submission.csv")
    assert frame.columns.to_list() == ["id", "rewrite_prompt"]
    assert frame["id"].to_list() == test["id"].to_list() and frame["id"][0].startswith("0")
    assert (frame["rewrite_prompt"].str.strip() != "").all()
    assert frame["rewrite_prompt"].to_list() == report["answer"].to_list()
    assert (report["how"] == "plain").any()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["submission.csv"]


def test_no_time_leaves_valid_fallbacks(test_csv, tmp_path):
    _, report, frame = answer(test_csv, 0, tmp_path / "submission.csv")
    assert set(frame["rewrite_prompt"]) == {"Fall, back"} and set(report["how"]) == {"out of time"}


def test_blank_fallback_is_refused_before_anything(tmp_path):
    with pytest.raises(SubmissionError, match="blank"):
        submission.answer_test(None, None, pd.DataFrame(), tmp_path / "s.csv", fallback_prompt=" ", time_budget_hours=1)
    assert not list(tmp_path.iterdir())


def test_wrong_files_are_refused(tmp_path):
    test = pd.DataFrame({"id": ["1", "2"]})
    path = tmp_path / "s.csv"
    for text, message in (
        ("id,prompt\n1,a\n2,b\n", "columns"),
        ("id,rewrite_prompt\n2,a\n1,b\n", "order"),
        ("id,rewrite_prompt\n1,a\n2,  \n", "rows \\[1\\] are blank"),
    ):
        path.write_text(text)
        with pytest.raises(SubmissionError, match=message):
            submission.check_submission(test, path)


def test_inputs_are_found_or_listed(tmp_path):
    for name, text in (
        ("base/config.json", '{"architectures": ["MixtralForCausalLM"]}'),
        ("t5/config.json", '{"architectures": ["T5EncoderModel"]}'),
        ("lora/1/adapter_config.json", "{}"),
        ("comp/test.csv", "id"),
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    found = submission.find_inputs(None, None, None, tmp_path)
    assert found == (tmp_path / "base", tmp_path / "lora" / "1", tmp_path / "comp" / "test.csv")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "adapter_config.json").write_text("{}")
    with pytest.raises(SubmissionError, match="2 places(.|\n)*lora/1\n(.|\n)*other\n"):
        submission.find_inputs(None, None, None, tmp_path)
    assert submission.find_inputs(None, "x", None, tmp_path)[1].name == "x"
    (tmp_path / "comp" / "test.csv").unlink()
    with pytest.raises(SubmissionError, match="0 places(.|\n)*nothing"):
        submission.find_inputs(None, "x", None, tmp_path)
