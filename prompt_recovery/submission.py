"""test.csv -> submission.csv: whole and valid at every moment, however the run ends, and within a
time budget.

`prepare` writes the file, filled with the fallback or with what an earlier run finished; `answer`
puts the model's answers in; `report` says what came of each row. Rows that can't be answered keep
the fallback, with the reason counted.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from prompt_recovery import keys
from prompt_recovery.agreement import refuse_several
from prompt_recovery.answers import Recovered, answer_prompts
from prompt_recovery.base import base_digest, longest
from prompt_recovery.combine import LIMIT, combine, count_tokens
from prompt_recovery.engine import Meter, Sampling, ready, spread_order
from prompt_recovery.recipe import MOST_TOKENS, Format, SubmissionSettings
from prompt_recovery.run_lock import RunFolderError, claim, release
from prompt_recovery.submission_file import (
    SubmissionError,
    append_journal,
    check_submission,
    clean_answer,
    journal_path,
    read_journal,
)
from prompt_recovery.submission_job import Job
from prompt_recovery.time_budget import SHORTEST, RowPlan, next_plan, plans_from, seconds_needed
from prompt_recovery.tokenizer import encode_row, loses_its_middle

GIVE_UP = 16  # rows that raise one after the other: the device or the model is broken, not the rows
OUT_OF_TIME = "out of time"


# --- prepare ------------------------------------------------------------------------------------


def prepare(
    test: pd.DataFrame,
    settings: SubmissionSettings,
    tokenizer: Any,
    *,
    encoder: Any = None,
    started: float | None = None,
    max_tokens: int | None = None,
    seed: int = 0,
) -> Job:
    """Everything that needs no GPU. The file stands when it returns, with what earlier runs of the
    same rows, model, adapter and settings finished, and the fallback for the rest. Until `report`
    it is this process's own.

    Args: test: of `data.read_test`. settings: with their paths and format, of `inputs.complete`.
        tokenizer: the base's, which encodes each row here, once. encoder: for "agree" and
        threshold, of `metric.load_encoder`. started: time.monotonic() from which the time budget
        counts, now if None. What earlier runs took counts too. max_tokens: of a prompt with its
        answer; None: as the base has them, at most 4096. seed: of the answers that are drawn.

    Raises: SeveralProcesses: launched with others. SubmissionError: a fallback that says nothing, a
        mean prompt too long to stand behind any answer, another process that writes the same file,
        no file. ValueError, TokenizerError: settings that fit no row.
    """
    refuse_several(
        "A submission",
        "start one script a card, each with its own CUDA_VISIBLE_DEVICES, its part of the rows as "
        "test_csv and its own submission_csv, and join the files",
    )
    options: dict[str, Any] = dict(
        how=settings.combine,
        mean_prompt=settings.mean_prompt,
        encoder=encoder,
        threshold=settings.threshold,
    )
    fallback = _checked_fallback(settings)
    # settings and encoders that can't work raise here
    combine([fallback, "Make it rhyme."], **options)

    def finish(prompts: list[str]) -> str:
        prompts = [text for text in map(clean_answer, prompts) if text]
        return clean_answer(combine(prompts, **options)) if prompts else ""

    started = time.monotonic() if started is None else started
    if max_tokens is None:
        max_tokens = longest(settings.model_dir, MOST_TOKENS)
    _claim(settings.submission_csv)
    room = max_tokens - settings.max_new_tokens
    prompts, cut, wrong = _encode(test, tokenizer, room, settings.format)
    key = keys.answers_key(
        "" if settings.model_dir is None else base_digest(settings.model_dir, settings.four_bit),
        settings.adapter_dir,
        tokenizer,
        test["id"].to_list(),
        [prompts.get(position) for position in range(len(test))],
        settings.values("answers") | dict(seed=seed),
    )
    journal = journal_path(settings.submission_csv)
    found, spent = read_journal(journal, key)
    job = Job(
        test,
        settings,
        room,
        journal,
        key,
        finish,
        fallback,
        [fallback] * len(test),
        plans_from(
            RowPlan(settings.answers_per_row, settings.max_new_tokens), settings.format.style
        ),
        started,
        deadline=started + settings.time_budget_hours * 3600 - spent,
        noted=started,
        seed=seed,
        prompts=prompts,
        cut=cut,
        alone=settings.allow_base and settings.adapter_dir is None,
    )
    if cut:
        job.say(
            f"{len(cut)} of {len(test)} rows lose the middle of their texts: a prompt with its "
            f"answer has {max_tokens} tokens, of which max_new_tokens={settings.max_new_tokens} "
            "are the answer's"
        )
    least = SHORTEST[settings.format.style]
    if settings.max_new_tokens < least:
        job.say(
            f"max_new_tokens={settings.max_new_tokens}: a {settings.format.style} answer takes "
            f"{least} tokens or more, and one that is cut short holds no prompt. Raise it."
        )
    given = [
        f"{name}={value:g}"
        for name, value in (("temperature", settings.temperature), ("top_p", settings.top_p))
        if value not in (getattr(SubmissionSettings, name), 0)
    ]
    if settings.answers_per_row == 1 and given:
        job.say(
            f"{', '.join(given)}: the one answer to a row is the likeliest, and none is drawn. Set "
            "answers_per_row to 2 or more with combine."
        )
    for position, (plan, recovered) in found.items():
        job.note(position, plan, recovered)
    if found:
        budget = settings.time_budget_hours * 3600
        left = max(0.0, job.deadline - time.monotonic())
        job.say(
            f"{len(found)} rows stand in {journal.name}, which took {spent:.0f} s of "
            f"time_budget_hours={settings.time_budget_hours:g}, {budget:.0f} s: {left:.0f} s are "
            "left"
        )
    job.save()
    if len(found) < len(test):  # rows for which there is no room at all
        encode_row(
            tokenizer,
            {"original_text": "", "rewritten_text": ""},
            max_tokens=job.room,
            format=settings.format,
        )
    for position, error in wrong.items():
        job.fail(position, error)
    return job


def _claim(submission_csv: str) -> None:
    try:
        claim(submission_csv, "submission_csv")
    except RunFolderError as error:
        raise SubmissionError(str(error)) from None
    except OSError as error:
        print(f"{submission_csv} can't be locked ({error}): see to it that no second run writes it")


def _encode(
    test: pd.DataFrame, tokenizer: Any, room: int, format: Format
) -> tuple[dict[int, list[int]], set[int], dict[int, Exception]]:
    """(token ids by row position, rows that were cut, what was raised by row position): whatever is
    wrong with one row must not cost the others."""
    prompts, cut, wrong = {}, set(), {}
    for position, row in enumerate(test.to_dict("records")):
        try:
            ids = prompts[position] = encode_row(tokenizer, row, max_tokens=room, format=format)[0]
            # one that was cut fills its room but for some pieces that join in another way
            if len(ids) > 0.9 * room and loses_its_middle(
                tokenizer, row, max_tokens=room, format=format
            ):
                cut.add(position)
        except Exception as error:
            wrong[position] = error
    return prompts, cut, wrong


def _checked_fallback(settings: SubmissionSettings) -> str:
    """The fallback as the file holds it. Raises SubmissionError where it, or the mean prompt, can
    stand in no row."""
    fallback = clean_answer(settings.fallback_prompt)
    if not fallback:
        raise SubmissionError(
            f"fallback_prompt={settings.fallback_prompt!r} says nothing; a blank answer, or a "
            "word for missing, fails the whole submission. Give a real prompt."
        )
    if count_tokens(fallback) > LIMIT:
        raise SubmissionError(
            f"fallback_prompt={fallback[:80]!r} has {count_tokens(fallback)} tokens, the scorer "
            f"reads {LIMIT}. Give a shorter one."
        )
    mean_prompt = (settings.mean_prompt or "").strip()
    if mean_prompt and not clean_answer(mean_prompt):
        raise SubmissionError(
            f"mean_prompt={mean_prompt!r} says nothing, or a word for missing. Give a real one, or "
            "None for no mean prompt."
        )
    # by a threshold it stands alone
    behind = mean_prompt if settings.threshold is not None else f"a. {mean_prompt}"
    if count_tokens(behind) > LIMIT:
        raise SubmissionError(
            f"mean_prompt={mean_prompt[:80]!r} has {count_tokens(mean_prompt)} tokens: behind an "
            f"answer it would stand in no row, since the scorer reads {LIMIT}. Give a shorter one."
        )
    return fallback


# --- answer -------------------------------------------------------------------------------------


def answer(job: Job, model: Any, tokenizer: Any) -> None:
    """Answer what is pending, until it is done or the time budget is spent.

    If the measured speed is too low, a row gets one answer instead of answers_per_row, then shorter
    ones, then the fallback. A row that raises keeps the fallback. Raises SubmissionError where no
    whole file could be written.
    """
    job.ending = ""
    if job.settings.adapter_dir is not None and not hasattr(model, "peft_config"):
        # allow_base, and the adapter was refused when it was loaded: these are not its answers
        job.alone, job.key = True, keys.key(job.key, "the base alone")
    if not job.pending() and not any(map(job.less, job.found)):
        return
    try:
        with (
            ready(model) as prepared,
            tqdm(total=len(job.test), initial=len(job.found), desc="answers", unit="row") as bar,
        ):
            _answer_slices(job, prepared, tokenizer, bar)
            _answer_again(job, prepared, tokenizer, bar)
    finally:
        job.save(last=True)


def _slices(job: Job) -> list[list[int]]:
    """What is pending, in slices of rows of like length that a restart cuts in the same places; in
    an order in which those that are done are like those to come, or the shortest first where not
    all can be answered."""
    order, pending = job.longest_first(), set(job.pending())
    parts = [order[n : n + job.slice_rows] for n in range(0, len(order), job.slice_rows)]
    parts = parts[::-1] if job.ending else spread_order(parts)
    return [kept for part in parts if (kept := [i for i in part if i in pending])]


def _answer_slices(job: Job, model: Any, tokenizer: Any, bar: tqdm) -> None:
    """Answer the slices; one that raises is halved until the rows that raise stand alone."""
    queue = _slices(job)
    raised = 0
    while queue and time.monotonic() + job.meters.get(job.plan, Meter()).slowest < job.deadline:
        part = queue.pop(0)
        plan, ending = job.plan, job.ending
        error = _answer_slice(job, model, tokenizer, part, bar)
        rest = [i for i in part if job.waits(i)]
        raised = raised if len(rest) == len(part) else 0
        if (plan, ending) != (job.plan, job.ending):
            queue = _slices(job)
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
                job.fail(position, error)
            raised += 1
            if raised == GIVE_UP:
                job.ending = f"given up after {GIVE_UP} rows in a row raised"
                job.say(f"{job.ending}; the last: {error}")
                break


def _answer_again(job: Job, model: Any, tokenizer: Any, bar: tqdm) -> None:
    """Once every row has an answer, answer those as asked that got less, as long as there is time:
    an earlier run was short of it, or this one until it turned out to be faster."""
    less = [position for position in job.found if job.less(position)]
    left = job.deadline - time.monotonic()
    if not less or job.ending or job.pending() or left <= 0:
        return
    job.say(f"{len(less)} rows have less than was asked: again as asked, {left:.0f} s are left")
    job.again, job.plans = set(less), [job.asked]
    bar.total += len(less)
    _answer_slices(job, model, tokenizer, bar)


def _answer_slice(
    job: Job, model: Any, tokenizer: Any, positions: list[int], bar: tqdm
) -> Exception | None:
    """Answer rows until they are done, the plan changes, or something raises, which is returned."""
    settings = job.settings
    temperature = settings.temperature if job.plan.answers > 1 else 0.0
    meter = job.meters.setdefault(job.plan, Meter())
    results: Any = answer_prompts(
        model,
        tokenizer,
        [job.prompts[i] for i in positions],
        style=job.settings.format.style,
        sampling=Sampling(job.plan.answers, temperature, settings.top_p, job.seed),
        numbers=positions,
        max_new_tokens=job.plan.new_tokens,
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
                _record(job, rows, meter, bar)
                rows = []
                if _replan(job):
                    return None
    except SubmissionError:
        raise
    except Exception as error:
        return error.with_traceback(None)  # a traceback holds the batch's memory
    finally:
        results.close()
    return None


def _record(job: Job, rows: list[tuple[int, list[Recovered]]], meter: Meter, bar: tqdm) -> None:
    """Take finished rows, and put them where a kill can't reach them."""
    started = time.monotonic()
    for position, found in rows:
        job.note(position, job.plan, found)
    now = time.monotonic()
    meter.writing += now - started  # combining with an encoder on the CPU takes its time
    try:
        append_journal(job.journal, job.key, job.plan, rows, now - job.noted)
    except OSError as error:
        job.say(
            f"{job.journal} can't be written ({error}): a restart would answer these rows again."
        )
    job.noted = now
    if now - job.written > job.write_seconds:
        job.save()
    left = max(0.0, job.deadline - now)
    needed = seconds_needed(job.plan, job.meters, job.lengths_to_come())
    bar.set_postfix_str(f"{needed:.0f} s to go of {left:.0f} s left in the budget", refresh=False)
    bar.update(len(rows))
    if now - job.said > 30:
        job.said = now
        job.say(f"{job.progress()}, about {needed:.0f} s to go, {left:.0f} s left in the budget")


def _replan(job: Job) -> bool:
    """Whether the rows to come now get less, since there is no time for more; says so."""
    left = max(0.0, job.deadline - time.monotonic())
    lengths = job.lengths_to_come()
    chosen, enough = next_plan(job.plans, job.meters, lengths, left)
    if job.ending or (enough and chosen == job.plan):
        return False
    needed = seconds_needed(job.plan, job.meters, lengths)
    why = f"{len(lengths)} rows would take {needed:.0f} s, {left:.0f} s are left"
    if not enough and job.again:
        job.ending = OUT_OF_TIME
        job.say(f"{why}: the shortest first, the others keep what they have")
    elif not enough:
        job.ending = OUT_OF_TIME
        share = left / max(seconds_needed(chosen, job.meters, lengths), 1e-9)
        job.say(
            f"{why}: even answers of {chosen.new_tokens} tokens are too slow. About "
            f"{max(0, 1 - share):.0%} of the rows to come, the longest, will keep the fallback."
        )
    elif chosen.answers < job.plan.answers:
        job.say(f"{why}: from here a single answer a row instead of {job.plan.answers}.")
    else:
        job.say(f"{why}: from here answers end after {chosen.new_tokens} tokens at the latest.")
    job.plans = job.plans[job.plans.index(chosen) :]
    return True


# --- report -------------------------------------------------------------------------------------


def report(job: Job) -> pd.DataFrame:
    """Check the file as it lies there against the answers, say how many rows are answered by what,
    and return what came of each, in the order of test: id, answer, source (model or fallback), how
    (the parser's word, or why it is the fallback), stopped, less (than was asked, such as "1 of 4
    answers"), lacks (what the settings ask for and the answer is without; see `Job.lacks`), tokens
    (of all answers to the row). Raises SubmissionError for a file that must not be handed in."""
    try:
        check_submission(job.test, job.settings.submission_csv, job.answers)
    finally:
        release(job.settings.submission_csv, "submission_csv")
    lines = []
    for position, text in enumerate(job.answers):
        found = job.found.get(position, [])
        used = next(
            (each for each in found if each.prompt is not None), found[0] if found else None
        )
        by_model = used is not None and position not in job.reasons
        how = (
            used.how if used and by_model else job.reasons.get(position, job.ending or OUT_OF_TIME)
        )
        tokens = sum(each.tokens for each in found)
        lines.append(
            (
                text, "model" if by_model else "fallback", how, used.stopped if used else "",
                job.less(position), "; ".join(job.lacks(position)), tokens,
            )
        )  # fmt: skip
    columns = ["answer", "source", "how", "stopped", "less", "lacks", "tokens"]
    table = pd.DataFrame(lines, columns=columns).astype({name: str for name in columns[:6]})
    table.insert(0, "id", job.test["id"].to_list())
    alone = "; by the base alone, without an adapter" if job.alone else ""
    job.say(summary(table) + alone + (f"; {job.progress()}" if job.meters else ""))
    return table


def summary(report: pd.DataFrame) -> str:
    """How many rows were answered by the model, and how many by the fallback and why."""
    by_model = report["source"] == "model"
    reasons = ", ".join(
        f"{n} {reason}" for reason, n in report.loc[~by_model, "how"].value_counts().items()
    )
    return (
        f"{len(report)} rows: {by_model.sum()} by the model, {(~by_model).sum()} by the fallback"
        + (f" ({reasons})" if reasons else "")
        + "".join(
            f"; {n} with {less} only, for want of time"
            for less, n in report.loc[report["less"] != "", "less"].value_counts().items()
        )
        + "".join(
            f"; {n} lack {what}"
            for what, n in report["lacks"].str.split("; ").explode().value_counts().items()
            if what
        )
    )
