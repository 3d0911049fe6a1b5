"""What is done in the time that is left, by pure functions of what was measured so far: what the
rows to come get, and when a training ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from prompt_recovery.engine import Meter

SHARES = (0.75, 0.5, 0.375, 0.25, 0.125)  # of max_new_tokens, tried from the longest on
# tokens below which hardly any prompt fits into an answer
SHORTEST = {"plain": 16, "json": 32, "reason_json": 128}
SAFETY_FACTOR = 1.1  # estimates of the time left were up to a tenth too low
# Seconds behind a training beside the answers to the held-out rows: saving and checking the
# adapter, scores, pictures. A guess with a margin.
REST = 180.0


class RowPlan(NamedTuple):
    """What each of the rows to come gets: answers, and at most so many tokens for each."""

    answers: int
    new_tokens: int


def plans_from(plan: RowPlan, style: str) -> list[RowPlan]:
    """The plan, then lesser ones: a single answer, then shorter ones down to the shortest of the
    style."""
    shortest = min(plan.new_tokens, SHORTEST[style])
    shorter = [int(plan.new_tokens * share) for share in SHARES]
    tokens = [plan.new_tokens, *(each for each in shorter if each > shortest), shortest]
    return list(dict.fromkeys([plan, *(RowPlan(1, each) for each in tokens)]))


def seconds_needed(plan: RowPlan, meters: Mapping[RowPlan, Meter], lengths: Sequence[int]) -> float:
    """Seconds that prompts of these lengths in tokens take by this plan, from what reading a token
    and writing an answer took so far; 0 before anything was measured.

    meters: of the plans that were followed. Those with as many answers as this one say more than
    others.
    """
    measured = {each: meter for each, meter in meters.items() if meter.batches}
    same = {
        each: meter for each, meter in measured.items() if each.answers == plan.answers
    } or measured
    rows = sum(meter.rows for meter in same.values())
    if not rows:
        return 0.0
    reading = sum(meter.seconds_a_token_in() * meter.rows for meter in same.values()) / rows
    writing = sum(
        meter.seconds_a_row() * meter.rows * plan.answers / each.answers
        * min(1.0, plan.new_tokens / max(meter.longest, 1))  # 0: all not finite
        for each, meter in same.items()
    ) / rows  # fmt: skip
    return reading * sum(lengths) + writing * len(lengths)


def next_plan(
    plans: Sequence[RowPlan],
    meters: Mapping[RowPlan, Meter],
    lengths: Sequence[int],
    seconds_left: float,
) -> tuple[RowPlan, bool]:
    """The plan for the rows to come, and whether it answers all of them in time.

    plans: the one that is followed, then the lesser ones (of `plans_from`). lengths: tokens of the
    prompts to come.
    """
    followed, *lesser = plans
    same = [meter for plan, meter in meters.items() if plan.answers == followed.answers]
    # the first batch compiles: its measure alone is a poor one, unless it took a good part of the
    # time
    first = (
        sum(meter.batches for meter in same) == 1
        and sum(meter.seconds for meter in same) < seconds_left / 10
    )

    def fits(plan: RowPlan) -> bool:
        return seconds_needed(plan, meters, lengths) * SAFETY_FACTOR <= seconds_left

    if first or fits(followed):
        return followed, True
    if followed.answers > 1 and lesser:
        return lesser[0], True  # what a single answer takes is measured before it gets shorter
    return next(((plan, True) for plan in lesser if fits(plan)), (plans[-1], False))


class TrainingTime(NamedTuple):
    """When a notebook must have ended, on the clock of time.monotonic(), and the seconds that its
    held-out rows take to be answered."""

    ends_at: float
    answering: float


def of_training(started: float, hours: float | None, answering: float) -> TrainingTime | None:
    """The time of a notebook that began at `started`; None where hours say no limit."""
    return None if hours is None else TrainingTime(started + 3600 * hours, answering)


def must_end(
    allowed: TrainingTime, now: float, step: float, evaluation: float, evaluations: int = 1
) -> bool:
    """Whether a training that goes on for one more step may end too late.

    Args:
        now: on the clock of allowed.ends_at.
        step, evaluation: seconds of the longest so far; an evaluation with its checkpoint, 0 before
            the first, which is taken to be what answering takes.
        evaluations: that are still to come, the last one with them.
    """
    to_come = step + evaluations * (evaluation or allowed.answering) + allowed.answering + REST
    return allowed.ends_at - now < SAFETY_FACTOR * to_come
