"""The meter: what the first batch says and when it no longer counts; and that a row is encoded once
however a run goes."""

from collections import Counter

import pandas as pd
import pytest
from conftest import answer_test
from tiny_submission import FALLBACK, OPTIONS, rows

from prompt_recovery import submission_members
from prompt_recovery.engine import Meter

EMPTY = ""  # the text of the row that checks the settings


# --- rates ----------------------------------------------------------------------------------------


def test_a_meter_that_counted_nothing_estimates_nothing():
    meter = Meter()
    assert meter.seconds_a_token_in() == meter.seconds_a_row() == meter.estimate([5, 5]) == 0
    assert meter.seconds == meter.slowest == 0 and meter.left != meter.left


def test_the_first_batch_counts_as_long_as_it_is_alone():
    meter = Meter()
    meter.add([10, 30], [4, 6], 8.0, 20.0)
    assert meter.seconds_a_token_in() == 8 / 40 and meter.seconds_a_row() == 20 / 2
    assert meter.estimate([100, 100, 100]) == pytest.approx(300 * 0.2 + 3 * 10)


def test_the_first_batch_says_nothing_once_there_is_another():
    meter = Meter()
    meter.add([10, 30], [4, 6], 8.0, 20.0)
    meter.add([20, 20, 10], [3, 3, 2], 0.5, 6.0)
    assert meter.seconds_a_token_in() == 0.5 / 50 and meter.seconds_a_row() == 6 / 3
    assert meter.estimate([100]) == pytest.approx(100 * 0.01 + 2)
    meter.add([50], [8], 1.5, 4.0)  # from here the later ones together, each row and token alike
    assert meter.seconds_a_token_in() == 2 / 100 and meter.seconds_a_row() == 10 / 4
    assert meter.estimate([]) == 0


def test_all_batches_are_counted_in_the_sums():
    meter = Meter()
    meter.add([10, 30], [4, 6], 8.0, 20.0)
    meter.add([20], [9, 3, 2], 0.5, 6.0)  # three answers to a prompt
    assert (meter.rows, meter.batches, meter.longest) == (3, 2, 9)
    assert (meter.tokens_in, meter.tokens_out) == (60, 24)
    assert (meter.reading, meter.writing, meter.seconds) == (8.5, 26.0, 34.5)
    assert meter.slowest == 28.0
    assert "3 rows, 60 tokens read, 24 written in 34 s" in str(meter)


def test_a_batch_without_a_token_is_counted():
    meter = Meter()
    meter.add([10], [0], 1.0, 1.0)
    meter.add([10], [0], 1.0, 1.0)
    assert meter.longest == 0 and meter.estimate([10]) == 2


# --- rows are encoded once ------------------------------------------------------------------------


@pytest.fixture
def encoded(monkeypatch):
    """How often each row was encoded, by its original text."""
    counts, real = Counter(), submission_members.encode_row

    def count(tokenizer, row, **options):
        counts[row["original_text"]] += 1
        return real(tokenizer, row, **options)

    monkeypatch.setattr(submission_members, "encode_row", count)
    return counts


def once(test):
    return Counter([*test["original_text"], EMPTY])


def test_rows_of_slices_that_raise_and_are_halved_are_encoded_once(faulty, encoded, tmp_path):
    raised, shapes = [], []

    def fault(ids):
        shapes.append(tuple(ids.shape))
        # any slice of more rows, so that each is halved twice or more
        if ids.shape[1] > 1 and len(ids) > 2:
            raised.append(len(ids))
            raise RuntimeError("injected")

    test = rows(20)
    report = answer_test(*faulty(fault), test, tmp_path / "s.csv", slice_rows=10, **OPTIONS)
    assert set(raised) >= {10, 5} and (report["source"] == "model").sum() > 10
    assert encoded == once(test)


def test_rows_that_raise_alone_and_rows_that_wait_are_encoded_once(faulty, encoded, tmp_path):
    def fault(ids):
        raise RuntimeError("injected")

    test = rows(30)
    report = answer_test(*faulty(fault), test, tmp_path / "s.csv", slice_rows=8, **OPTIONS)
    assert set(report["answer"]) == {FALLBACK}
    assert encoded == once(test)


def test_a_row_that_can_not_be_encoded_is_tried_once(loaded, monkeypatch, tmp_path):
    tried, real, test = Counter(), submission_members.encode_row, rows(6)
    bad = test["original_text"][4]

    def refuse(tokenizer, row, **options):
        tried[row["original_text"]] += 1
        if row["original_text"] == bad:
            raise KeyError("z")
        return real(tokenizer, row, **options)

    monkeypatch.setattr(submission_members, "encode_row", refuse)
    report = answer_test(*loaded, test, tmp_path / "s.csv", **OPTIONS)
    assert report["how"][4] == "raised KeyError" and tried == once(test)
    assert (report.drop(index=4)["how"] != "raised KeyError").all()


def test_a_restart_with_all_rows_in_the_journal_encodes_them_once_and_asks_nothing(
    loaded,
    encoded,
    tmp_path,
):
    test = rows(5)
    first = answer_test(*loaded, test, tmp_path / "s.csv", **OPTIONS)
    assert encoded == once(test)
    encoded.clear()
    # the journal's key is made of the rows' ids
    again = answer_test("asked for nothing", None, test, tmp_path / "s.csv", **OPTIONS)
    assert encoded == Counter(test["original_text"])
    pd.testing.assert_frame_equal(first, again)
