"""The answers of a submission: one adapter after the other, row by row, within the time budget,
each put where a kill can't reach it."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from peft import PeftModel
from tqdm.auto import tqdm

from prompt_recovery.adapter import check_loaded, put_on
from prompt_recovery.adapter_files import AdapterError
from prompt_recovery.answers import Recovered, answer_prompts
from prompt_recovery.engine import Meter, Sampling, ready, spread_order
from prompt_recovery.submission_file import SubmissionError, append_journal
from prompt_recovery.submission_job import OUT_OF_TIME, Job, Member
from prompt_recovery.submission_members import seat
from prompt_recovery.time_budget import SAFETY_FACTOR, RowPlan, next_plan, seconds_needed

GIVE_UP = 16  # rows that raise one after the other: the device or the model is broken, not the rows


def answer(job: Job, model: Any, tokenizer: Any) -> None:
    """Answer what is pending, one adapter after the other, until it is done or the time budget is
    spent.

    model: the base, which is as it was afterwards; a single adapter may be on it already.

    If the measured speed is too low, the rows to come go without the last adapters. If it is too
    low for the first, they get one answer instead of answers_per_row, then shorter ones, then the
    fallback. A row that raises keeps the fallback, and an adapter that can't be put on costs the
    others nothing. Raises SubmissionError where no whole file could be written.
    """
    on = isinstance(model, PeftModel)
    if on and len(job.members) > 1:
        raise ValueError("The model has an adapter on it: give the base, as `inputs.load` does.")
    if job.settings.allow_base and not on:
        _drop_strangers(job, model, tokenizer)
    pending = [each for each in job.members if each.pending() or any(map(each.less, each.found))]
    for member in job.members:
        member.ending = ""
    failed: list[Exception] = []
    plans: dict[int, Any] = {}
    try:
        with tqdm(
            total=len(job.test) * len(job.members),
            initial=sum(len(member.found) for member in job.members),
            desc="answers",
            unit="row",
        ) as bar:
            for member in pending:
                if time.monotonic() + _slowest(job, member) >= job.deadline:
                    break
                try:
                    with _on(job, member, model, plans) as prepared:
                        _answer_slices(job, member, prepared, tokenizer, bar)
                        _answer_again(job, member, prepared, tokenizer, bar)
                except SubmissionError:
                    raise
                except Exception as error:
                    failed.append(error.with_traceback(None))
                    member.ending = f"raised {type(error).__name__}"
                    job.say(f"{member.name} is left out: {str(error)[:300]}")
        if pending and len(failed) == len(pending) and not job.found:
            raise failed[-1]
    finally:
        job.save(last=True)


@contextmanager
def _on(job: Job, member: Member, model: Any, plans: dict[int, Any]) -> Iterator[Any]:
    """The base as it answers, with the member's adapter on it, by the first plan for so many
    parameters: of what the card holds since then, such as captured steps, that plan has counted
    its share, and the batches are those of the adapter alone."""
    gc.collect()  # what the adapter before left in cycles holds memory
    with ExitStack() as stack:
        if member.adapter_dir is not None and not isinstance(model, PeftModel):
            place = member.adapter_dir, job.settings.model_dir
            model = stack.enter_context(put_on(model, *place))
            if len(job.members) > 1:
                job.say(f"answering with {member.name}")
        size = sum(parameter.numel() for parameter in model.parameters())
        prepared = stack.enter_context(ready(model, plans.get(size)))
        plans.setdefault(size, prepared.planned)
        yield prepared


def _drop_strangers(job: Job, model: Any, tokenizer: Any) -> None:
    """Leave out adapters of another base than the one that was loaded, which `inputs.load` named;
    where none is left, the base answers alone."""

    def fits(member: Member) -> bool:
        try:
            if member.adapter_dir is not None:
                check_loaded(model, member.adapter_dir, job.settings.model_dir)
        except AdapterError:
            return False
        return True

    job.members = [member for member in job.members if fits(member)]
    if not job.members:
        seat(job, tokenizer, [None])


def _slices(job: Job, member: Member) -> list[list[int]]:
    """What is pending, in slices of rows of like length that a restart cuts in the same places; in
    an order in which those that are done are like those to come, or the shortest first where not
    all can be answered."""
    order, pending = member.longest_first(), set(member.pending())
    parts = [order[n : n + job.slice_rows] for n in range(0, len(order), job.slice_rows)]
    parts = parts[::-1] if member.ending else spread_order(parts)
    return [kept for part in parts if (kept := [i for i in part if i in pending])]


def _answer_slices(job: Job, member: Member, model: Any, tokenizer: Any, bar: tqdm) -> None:
    """Answer the slices; one that raises is halved until the rows that raise stand alone."""
    _replan(job, member)  # by what the adapters before took
    queue = _slices(job, member)
    raised = 0
    while queue and time.monotonic() + _slowest(job, member) < job.deadline:
        part = queue.pop(0)
        plan, ending = member.plan, member.ending
        error = _answer_slice(job, member, model, tokenizer, part, bar)
        rest = [i for i in part if member.waits(i)]
        raised = raised if len(rest) == len(part) else 0
        if (plan, ending) != (member.plan, member.ending):
            queue = _slices(job, member)
        elif error is None and rest:
            break  # the deadline
        elif error is not None:
            if torch.cuda.is_available():
                # after a fault of the device nothing works, which the rows then say
                with suppress(RuntimeError):
                    torch.cuda.empty_cache()
            if len(rest) > 1:
                queue[:0] = [rest[: len(rest) // 2], rest[len(rest) // 2 :]]
                continue
            for position in rest:
                job.fail(member, position, error)
            raised += 1
            if raised == GIVE_UP:
                member.ending = f"given up after {GIVE_UP} rows in a row raised"
                job.say(f"{member.ending}; the last: {error}")
                break


def _answer_again(job: Job, member: Member, model: Any, tokenizer: Any, bar: tqdm) -> None:
    """Once every row has an answer, answer those as asked that got less, as long as there is time:
    an earlier run was short of it, or this one until it turned out to be faster."""
    less = [position for position in member.found if member.less(position)]
    left = job.deadline - time.monotonic()
    if not less or member.ending or member.pending() or left <= 0:
        return
    job.say(f"{len(less)} rows have less than was asked: again as asked, {left:.0f} s are left")
    member.again, member.plans = set(less), [member.asked]
    bar.total += len(less)
    _answer_slices(job, member, model, tokenizer, bar)


def _slowest(job: Job, member: Member) -> float:
    """Seconds of the slowest batch by this plan, or of any member while it has none."""
    if member.meters:
        return member.meters.get(member.plan, Meter()).slowest
    return max((m.slowest for each in job.members for m in each.meters.values()), default=0.0)


def _answer_slice(
    job: Job, member: Member, model: Any, tokenizer: Any, positions: list[int], bar: tqdm
) -> Exception | None:
    """Answer rows until they are done, the plan changes, or something raises, which is returned."""
    settings, plan = job.settings, member.plan
    temperature = settings.temperature if plan.answers > 1 else 0.0
    meter = member.meters.setdefault(plan, Meter())
    results: Any = answer_prompts(
        model,
        tokenizer,
        [member.prompts[i] for i in positions],
        style=member.format.style,
        sampling=Sampling(plan.answers, temperature, settings.top_p, job.seed),
        numbers=positions,
        max_new_tokens=plan.new_tokens,
        deadline=job.deadline,
        batch_tokens=job.batch_tokens,
        meter=meter,
        description=None,
    )
    counted = meter.rows
    rows: list[tuple[int, list[Recovered]]] = []
    try:
        for position, found in results:
            rows.append((positions[position], found))
            counted += 1
            if counted == meter.rows:  # all that is finished has been handed over
                _record(job, member, rows, meter, bar)
                rows = []
                if _replan(job, member):
                    return None
    except SubmissionError:
        raise
    except Exception as error:
        return error.with_traceback(None)  # a traceback holds the batch's memory
    finally:
        results.close()
    return None


def _record(
    job: Job, member: Member, rows: list[tuple[int, list[Recovered]]], meter: Meter, bar: tqdm
) -> None:
    """Take finished rows, and put them where a kill can't reach them."""
    started = time.monotonic()
    for position, found in rows:
        job.note(member, position, member.plan, found)
    now = time.monotonic()
    meter.writing += now - started  # combining with an encoder on the CPU takes its time
    try:
        append_journal(job.journal, member.key, member.name, member.plan, rows, now - job.noted)
    except OSError as error:
        job.say(
            f"{job.journal} can't be written ({error}): a restart would answer these rows again."
        )
    job.noted = now
    if now - job.written > job.write_seconds:
        job.save()
    left = max(0.0, job.deadline - now)
    needed = sum(_seconds_to_come(job, member))
    bar.set_postfix_str(f"{needed:.0f} s to go of {left:.0f} s left in the budget", refresh=False)
    bar.update(len(rows))
    if now - job.said > 30:
        job.said = now
        job.say(f"{job.progress()}, about {needed:.0f} s to go, {left:.0f} s left in the budget")


def _seconds_to_come(job: Job, member: Member) -> list[float]:
    """Seconds that the rows to come of this member and of each behind it take; one that has not
    begun is taken to be as fast as the one before."""
    seconds: list[float] = []
    meters: dict[RowPlan, Meter] = {}
    for each in job.members:
        meters = each.meters or meters
        if seconds or each is member:
            seconds.append(seconds_needed(each.plan, meters, each.lengths_to_come()))
    return seconds


def _replan(job: Job, member: Member) -> bool:
    """Whether the rows to come now get less, since there is no time for more; says so."""
    left = max(0.0, job.deadline - time.monotonic())
    lengths = member.lengths_to_come()
    first = member is job.members[0]
    # of adapters behind the first none is cut short: the rows to come go without it
    plans = member.plans if first else member.plans[:1]
    before = job.members[max(0, job.members.index(member) - 1)]
    meters = member.meters or before.meters
    chosen, enough = next_plan(plans, meters, lengths, left)
    if member.ending:
        return False
    needed = seconds_needed(member.plan, meters, lengths)
    why = f"{len(lengths)} rows would take {needed:.0f} s, {left:.0f} s are left"
    if enough and chosen == member.plan:
        _say_dropped(job, member, left)
        return False
    share = left / max(seconds_needed(chosen, meters, lengths), 1e-9)
    if not enough and member.again:
        member.ending = OUT_OF_TIME
        job.say(f"{why}: the shortest first, the others keep what they have")
    elif not enough:
        member.ending = OUT_OF_TIME
        late = f"About {max(0, 1 - share):.0%} of the rows to come, the longest, will"
        job.say(
            f"{why}: even answers of {chosen.new_tokens} tokens are too slow. {late} keep the "
            "fallback."
            if first
            else f"{why}. {late} go without {member.name}."
        )
    elif chosen.answers < member.plan.answers:
        job.say(f"{why}: from here a single answer a row instead of {member.plan.answers}.")
    else:
        job.say(f"{why}: from here answers end after {chosen.new_tokens} tokens at the latest.")
    member.plans = member.plans[member.plans.index(chosen) :]
    return True


def _say_dropped(job: Job, member: Member, left: float) -> None:
    """Say, where it changed, for which of the adapters to come there is no time."""
    behind = job.members[job.members.index(member) + 1 :]
    own, *needed = _seconds_to_come(job, member)
    sums = [own + sum(needed[: n + 1]) for n in range(len(needed))]
    late = [each for each, ends in zip(behind, sums, strict=True) if ends * SAFETY_FACTOR > left]
    batches = sum(meter.batches for meter in member.meters.values())
    if batches > 1 and late != job.late:  # the first one compiles
        job.late = late
        names = ", ".join(each.name for each in late)
        job.say(
            f"all adapters would take {own + sum(needed):.0f} s, {left:.0f} s are left: rows go "
            f"without {names} as far as time does not allow for it."
            if late
            else "there is time for all adapters again."
        )
