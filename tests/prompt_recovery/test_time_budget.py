"""The time budget's functions: what rows get in the time that is left, by what was measured."""

import pytest

from prompt_recovery.engine import Meter
from prompt_recovery.time_budget import (
    SAFETY_FACTOR,
    RowPlan,
    next_plan,
    plans_from,
    seconds_needed,
)


def meter(batches, rows=10, tokens_in=100, tokens_out=20, reading=5.0, writing=20.0):
    """After batches of rows alike: reading takes 5 s, writing 20 s a batch."""
    counted = Meter()
    for _ in range(batches):
        counted.add([tokens_in] * rows, [tokens_out] * rows, reading, writing)
    return counted


def test_plans_go_from_several_answers_to_one_to_shorter_ones():
    assert plans_from(RowPlan(4, 64), "plain") == [
        RowPlan(4, 64),
        *(RowPlan(1, n) for n in (64, 48, 32, 24, 16)),
    ]
    assert plans_from(RowPlan(1, 64), "json") == [RowPlan(1, 64), RowPlan(1, 48), RowPlan(1, 32)]
    # nothing shorter would hold a prompt
    assert plans_from(RowPlan(1, 8), "plain") == [RowPlan(1, 8)]
    assert plans_from(RowPlan(2, 256), "reason_json")[-1] == RowPlan(1, 128)


def test_seconds_are_those_of_reading_and_writing():
    plan = RowPlan(1, 20)
    assert seconds_needed(plan, {}, [100] * 5) == 0
    assert seconds_needed(plan, {plan: Meter()}, [100] * 5) == 0
    # 5 s for 1,000 tokens read, 20 s for 10 rows written
    assert seconds_needed(plan, {plan: meter(3)}, [100] * 50) == pytest.approx(
        50 * (100 * 0.005 + 2)
    )
    assert seconds_needed(plan, {plan: meter(3)}, [400]) == pytest.approx(400 * 0.005 + 2)
    # half as long answers take half the time to write, half as many too; reading stays
    assert seconds_needed(RowPlan(1, 10), {plan: meter(3)}, [100]) == pytest.approx(0.5 + 1)
    assert seconds_needed(RowPlan(1, 20), {RowPlan(4, 20): meter(3)}, [100]) == pytest.approx(
        0.5 + 2 / 4
    )
    # what was measured with as many answers says more than the rest
    assert seconds_needed(plan, {RowPlan(4, 20): meter(9), plan: meter(3)}, [100]) == pytest.approx(
        0.5 + 2
    )
    # no answer had a finite token
    assert seconds_needed(plan, {plan: meter(3, tokens_out=0)}, [100]) == pytest.approx(0.5 + 2)


LENGTHS = [100] * 40  # 100 s by what meter() measured


@pytest.mark.parametrize(
    ("seconds_left", "expected"),
    [
        (1000, (RowPlan(1, 64), True)),
        (100 * SAFETY_FACTOR + 1, (RowPlan(1, 64), True)),
        # answers took 20 tokens: a limit of 24 or more saves nothing, one of 16 a fifth of the
        # writing
        (100 * SAFETY_FACTOR - 1, (RowPlan(1, 16), True)),
        ((20 + 0.8 * 80) * SAFETY_FACTOR + 1, (RowPlan(1, 16), True)),
        ((20 + 0.8 * 80) * SAFETY_FACTOR - 1, (RowPlan(1, 16), False)),
        (0, (RowPlan(1, 16), False)),
    ],
)
def test_the_longest_answers_that_fit_are_taken_and_the_shortest_where_none_do(
    seconds_left, expected
):
    plans = plans_from(RowPlan(1, 64), "plain")
    assert next_plan(plans, {plans[0]: meter(3)}, LENGTHS, seconds_left) == expected


def test_a_single_answer_is_measured_before_answers_get_shorter():
    plans = plans_from(RowPlan(4, 64), "plain")
    assert next_plan(plans, {plans[0]: meter(3)}, LENGTHS, 90) == (RowPlan(1, 64), True)
    assert next_plan(plans, {plans[0]: meter(3)}, LENGTHS, 0) == (RowPlan(1, 64), True)


def test_the_first_batch_alone_changes_nothing_unless_it_took_a_good_part_of_the_time():
    plans = plans_from(RowPlan(1, 64), "plain")
    slow = {plans[0]: meter(1, writing=50.0)}  # it compiles
    assert next_plan(plans, slow, [100] * 4000, 2000) == (plans[0], True)
    assert next_plan(plans, slow, [100] * 4000, 500) == (plans[-1], False)


def test_without_a_measure_or_rows_to_come_nothing_changes():
    plans = plans_from(RowPlan(4, 64), "json")
    assert next_plan(plans, {}, LENGTHS, 0) == (plans[0], True)
    assert next_plan(plans, {plans[0]: meter(5)}, [], 0) == (plans[0], True)
