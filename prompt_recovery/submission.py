"""test.csv -> submission.csv: whole and valid at every moment, however the run ends, and within a
time budget.

`prepare` writes the file, filled with the fallback or with what an earlier run finished; `answer`
puts the model's answers in; `report` says what came of each row. Rows that can't be answered keep
the fallback, with the reason counted.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pandas as pd

from prompt_recovery.agreement import refuse_several
from prompt_recovery.base import longest
from prompt_recovery.combine import LIMIT, combine, count_tokens
from prompt_recovery.recipe import MOST_TOKENS, SubmissionSettings
from prompt_recovery.run_lock import RunFolderError, claim, release
from prompt_recovery.settings import SettingError
from prompt_recovery.submission_answers import answer as answer
from prompt_recovery.submission_file import (
    SubmissionError,
    check_submission,
    clean_answer,
    journal_path,
)
from prompt_recovery.submission_job import OUT_OF_TIME, Job, Member
from prompt_recovery.submission_members import check_fits, seat


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

    Args:
        test: of `data.read_test`.
        settings: with their paths, of `inputs.complete`.
        tokenizer: the base's, which encodes each row here, once.
        encoder: for "agree" and threshold, of `metric.load_encoder`.
        started: time.monotonic() from which the time budget counts, now if None. What earlier runs
            took counts too.
        max_tokens: of a prompt with its answer; None: as the base has them, at most 4096.
        seed: of the answers that are drawn.

    Raises:
        SeveralProcesses: launched with others.
        SubmissionError: a fallback that says nothing, a mean prompt too long to stand behind any
            answer, another process that writes the same file, no file.
        ValueError, TokenizerError: settings that fit no row.
    """
    refuse_several(
        "A submission",
        "start one script a card, each with its own CUDA_VISIBLE_DEVICES, its part of the rows as "
        "test_csv and its own submission_csv, and join the files",
    )
    if wrong := [*settings.uncombined()]:
        raise SettingError("\n".join(wrong))
    options: dict[str, Any] = dict(
        strategy=settings.combine,
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
    max_prompt_tokens = max_tokens - settings.max_new_tokens
    job = Job(
        test,
        settings,
        max_prompt_tokens,
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
    seat(job, tokenizer, settings.adapter_dir or [None])
    job.save()
    check_fits(job, tokenizer)
    return job


def _claim(submission_csv: str) -> None:
    try:
        claim(submission_csv, "submission_csv")
    except RunFolderError as error:
        raise SubmissionError(str(error)) from None
    except OSError as error:
        print(f"{submission_csv} can't be locked ({error}): see to it that no second run writes it")


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


def report(job: Job) -> pd.DataFrame:
    """Check the file as it lies there against the answers, say how many rows are answered by what,
    and return a table of what came of each row, in the order of test.

    Its columns: id; answer; source, model or fallback; how, the parser's word, or why it is the
    fallback; stopped, why the answer ended; less, than was asked, such as "1 of 4 answers"; lacks,
    what the settings ask for and the answer is without (see `Job.lacks`); tokens, of all answers to
    the row; adapters, the names of those whose prompts the answer is made of.
    Raises SubmissionError for a file that must not be handed in.
    """
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
                first.parsed_as if first else next(iter(missing), OUT_OF_TIME),
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
        job.say(_coverage(job, member))
    return table


def _less(job: Job, position: int) -> str:
    texts = {member.name: member.less(position) for member in job.members}
    if len(texts) == 1:
        return "".join(texts.values())
    return ", ".join(f"{text} by {name}" for name, text in texts.items() if text)


def _coverage(job: Job, member: Member) -> str:
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
