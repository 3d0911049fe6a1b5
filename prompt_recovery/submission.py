"""test.csv -> submission.csv: whole and valid at every moment, however the run ends, and within a
time budget.

`prepare` writes the file, filled with the fallback or with what an earlier run finished; `answer`
puts the model's answers in; `report` says what came of each row. Rows that can't be answered keep
the fallback, with the reason counted.
"""

from __future__ import annotations

import gc
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peft import PeftModel
from tqdm.auto import tqdm

from prompt_recovery.adapter import check_loaded, put_on
from prompt_recovery.adapter_files import AdapterError
from prompt_recovery.agreement import refuse_several
from prompt_recovery.answers import Recovered, answer_prompts
from prompt_recovery.base import base_digest, longest
from prompt_recovery.combine import LIMIT, combine, count_tokens
from prompt_recovery.engine import Meter, Sampling, ready, spread_order
from prompt_recovery.inputs import answer_format
from prompt_recovery.keys import answers_key
from prompt_recovery.recipe import MOST_TOKENS, Format, SubmissionSettings
from prompt_recovery.run_lock import RunFolderError, claim, release
from prompt_recovery.settings import SettingError
from prompt_recovery.submission_file import (
    SubmissionError,
    append_journal,
    check_submission,
    clean_answer,
    journal_path,
    read_journal,
)
from prompt_recovery.submission_job import Job, Member
from prompt_recovery.time_budget import (
    SAFETY,
    SHORTEST,
    RowPlan,
    next_plan,
    plans_from,
    seconds_needed,
)
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
    same rows, model, adapters and settings finished, and the fallback for the rest. Until `report`
    it is this process's own.

    Args: test: of `data.read_test`. settings: with their paths, of `inputs.complete`.
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
    if wrong := [*settings.uncombined()]:
        raise SettingError("\n".join(wrong))
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
    job = Job(
        test,
        settings,
        room,
        journal_path(settings.submission_csv),
        finish,
        fallback,
        [fallback] * len(test),
        [],
        started,
        deadline=started + settings.time_budget_hours * 3600,
        noted=started,
        seed=seed,
    )
    _seat(job, tokenizer, settings.adapter_dir or [None])
    job.save()
    for member in job.members:
        if len(member.found) < len(test):  # rows for which there is no room at all
            blank = {"original_text": "", "rewritten_text": ""}
            encode_row(tokenizer, blank, max_tokens=room, format=member.format)
    return job


def _seat(job: Job, tokenizer: Any, folders: Sequence[str | Path | None]) -> None:
    """Make the job's members, with what earlier runs answered; what those took is taken off the
    time budget. None: the base alone."""
    settings, test = job.settings, job.test
    base = "" if settings.model_dir is None else base_digest(settings.model_dir, settings.four_bit)
    plan = RowPlan(settings.answers_per_row, settings.max_new_tokens)
    paths = [None if folder is None else Path(folder) for folder in folders]
    formats = [answer_format(path, settings.style, settings.system_placement) for path in paths]
    encoded = {format: _encode(test, tokenizer, job.room, format) for format in set(formats)}
    for style in sorted({format.style for format in formats}):
        if settings.max_new_tokens < SHORTEST[style]:
            job.say(
                f"max_new_tokens={settings.max_new_tokens}: a {style} answer takes "
                f"{SHORTEST[style]} tokens or more, and one that is cut short holds no prompt. "
                "Raise it."
            )
    cut = set().union(*(cut for _, cut, _ in encoded.values()))
    if cut:
        job.say(
            f"{len(cut)} of {len(test)} rows lose the middle of their texts: a prompt with its "
            f"answer has {job.room + settings.max_new_tokens} tokens, of which "
            f"max_new_tokens={settings.max_new_tokens} are the answer's"
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
    job.members = []
    for name, path, format in zip(_names(paths), paths, formats, strict=True):
        prompts, cut, wrong = encoded[format]
        key = answers_key(
            base,
            path,
            tokenizer,
            test["id"].to_list(),
            [prompts.get(position) for position in range(len(test))],
            settings.values("answers") | asdict(format) | dict(seed=job.seed),
        )
        plans = plans_from(plan, format.style)
        member = Member(name, path, format, key, plan, plans, prompts, cut)
        job.members.append(member)
        found, spent = read_journal(job.journal, key)
        job.deadline -= spent
        for position, (followed, recovered) in found.items():
            job.note(member, position, followed, recovered)
        if found:
            by = f" by {name}" if len(paths) > 1 else ""
            budget = settings.time_budget_hours * 3600
            left = max(0.0, job.deadline - time.monotonic())
            job.say(
                f"{len(found)} rows{by} stand in {job.journal.name}, which took {spent:.0f} s of "
                f"time_budget_hours={settings.time_budget_hours:g}, {budget:.0f} s: {left:.0f} s "
                "are left"
            )
        for position, error in wrong.items():
            job.fail(member, position, error)


def _claim(submission_csv: str) -> None:
    try:
        claim(submission_csv, "submission_csv")
    except RunFolderError as error:
        raise SubmissionError(str(error)) from None
    except OSError as error:
        print(f"{submission_csv} can't be locked ({error}): see to it that no second run writes it")


def _names(paths: Sequence[Path | None]) -> list[str]:
    """What tells adapters apart: the ends of their paths, from where these differ."""
    folders = [path for path in paths if path is not None]
    if len(folders) < 2:
        return [path.name if path else "the base" for path in paths]
    shared = os.path.commonpath([folder.absolute().parent for folder in folders])
    return [folder.absolute().relative_to(shared).as_posix() for folder in folders]


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
                    with _on(job, member, model) as prepared:
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
def _on(job: Job, member: Member, model: Any) -> Iterator[Any]:
    """The base as it answers, with the member's adapter on it."""
    gc.collect()  # what the adapter before left in cycles holds memory
    with ExitStack() as stack:
        if member.adapter_dir is not None and not isinstance(model, PeftModel):
            place = member.adapter_dir, job.settings.model_dir
            model = stack.enter_context(put_on(model, *place))
            if len(job.members) > 1:
                job.say(f"answering with {member.name}")
        yield stack.enter_context(ready(model))


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
        _seat(job, tokenizer, [None])


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
    late = [each for each, ends in zip(behind, sums, strict=True) if ends * SAFETY > left]
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


# --- report -------------------------------------------------------------------------------------


def report(job: Job) -> pd.DataFrame:
    """Check the file as it lies there against the answers, say how many rows are answered by what,
    and return what came of each, in the order of test: id, answer, source (model or fallback), how
    (the parser's word, or why it is the fallback), stopped, less (than was asked, such as "1 of 4
    answers"), lacks (what the settings ask for and the answer is without; see `Job.lacks`), tokens
    (of all answers to the row), adapters (the names of those whose prompts the answer is made of).
    Raises SubmissionError for a file that must not be handed in."""
    try:
        check_submission(job.test, job.settings.submission_csv, job.answers)
    finally:
        release(job.settings.submission_csv, "submission_csv")
    lines = []
    for position, text in enumerate(job.answers):
        found = [each for member in job.members for each in member.found.get(position, [])]
        by = [member for member in job.members if member.answered(position)]
        used = [each for member in by for each in member.answered(position)]
        first = next((each for each in used if each.prompt is not None), None)
        reasons = [member.reasons[position] for member in job.members if position in member.reasons]
        missing = [*reasons, *(member.ending for member in job.members if member.ending)]
        stopped = first or next(iter(found), None)
        lines.append(
            (
                text,
                "model" if first else "fallback",
                first.how if first else next(iter(missing), OUT_OF_TIME),
                stopped.stopped if stopped else "",
                _less(job, position),
                "; ".join(job.lacks(position)),
                sum(each.tokens for each in found),
                ", ".join(member.name for member in by),
            )
        )
    columns = ["answer", "source", "how", "stopped", "less", "lacks", "tokens", "adapters"]
    table = pd.DataFrame(lines, columns=columns)
    table = table.astype({name: str for name in columns if name != "tokens"})
    table.insert(0, "id", job.test["id"].to_list())
    measured = any(member.meters for member in job.members)
    base = job.settings.allow_base and job.members[0].adapter_dir is None
    alone = "; by the base alone, without an adapter" if base else ""
    job.say(summary(table) + alone + (f"; {job.progress()}" if measured else ""))
    for member in job.members if len(job.members) > 1 else []:
        job.say(_share(job, member))
    return table


def _less(job: Job, position: int) -> str:
    texts = {member.name: member.less(position) for member in job.members}
    if len(texts) == 1:
        return "".join(texts.values())
    return ", ".join(f"{text} by {name}" for name, text in texts.items() if text)


def _share(job: Job, member: Member) -> str:
    """How many rows have a member's answer, and why the others have none."""
    rows = range(len(job.test))
    without = [position for position in rows if not member.answered(position)]
    reasons = Counter(member.reasons.get(i, member.ending or OUT_OF_TIME) for i in without)
    text = f"{member.name}: in {len(rows) - len(without)} of {len(rows)} rows"
    return text + "".join(f", {count} {reason}" for reason, count in reasons.most_common())


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
