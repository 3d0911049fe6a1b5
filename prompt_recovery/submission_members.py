"""The adapters of a submission: each with its rows as they are asked, and what earlier runs
answered."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from prompt_recovery.base import base_digest
from prompt_recovery.inputs import answer_format
from prompt_recovery.keys import answers_key
from prompt_recovery.recipe import Format, SubmissionSettings
from prompt_recovery.submission_file import read_journal
from prompt_recovery.submission_job import Job, Member
from prompt_recovery.time_budget import SHORTEST, RowPlan, plans_from
from prompt_recovery.tokenizer import encode_row, loses_its_middle


def seat(job: Job, tokenizer: Any, folders: Sequence[str | Path | None]) -> None:
    """Make the job's members, with what earlier runs answered; what those took is taken off the
    time budget. None: the base alone."""
    settings, test = job.settings, job.test
    base = "" if settings.model_dir is None else base_digest(settings.model_dir, settings.four_bit)
    plan = RowPlan(settings.answers_per_row, settings.max_new_tokens)
    paths = [None if folder is None else Path(folder) for folder in folders]
    formats = [answer_format(path, settings.style, settings.system_placement) for path in paths]
    encoded = {
        format: _encode(test, tokenizer, job.max_prompt_tokens, format) for format in set(formats)
    }
    for style in sorted({format.style for format in formats}):
        if settings.max_new_tokens < SHORTEST[style]:
            job.say(
                f"max_new_tokens={settings.max_new_tokens}: a {style} answer takes "
                f"{SHORTEST[style]} tokens or more, and one that is cut short holds no prompt. "
                "Raise it."
            )
    any_cut = set().union(*(cut for _, cut, _ in encoded.values()))
    if any_cut:
        job.say(
            f"{len(any_cut)} of {len(test)} rows lose the middle of their texts: a prompt with its "
            f"answer has {job.max_prompt_tokens + settings.max_new_tokens} tokens, of which "
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


def check_fits(job: Job, tokenizer: Any) -> None:
    """Raises TokenizerError where a member that has rows to answer can fit no row."""
    blank = {"original_text": "", "rewritten_text": ""}
    for member in job.members:
        if len(member.found) < len(job.test):
            encode_row(tokenizer, blank, max_tokens=job.max_prompt_tokens, format=member.format)


def _names(paths: Sequence[Path | None]) -> list[str]:
    """What tells adapters apart: the ends of their paths, from where these differ."""
    folders = [path for path in paths if path is not None]
    if len(folders) < 2:
        return [path.name if path else "the base" for path in paths]
    shared = os.path.commonpath([folder.absolute().parent for folder in folders])
    return [folder.absolute().relative_to(shared).as_posix() for folder in folders]


def _encode(
    test: pd.DataFrame, tokenizer: Any, max_tokens: int, format: Format
) -> tuple[dict[int, list[int]], set[int], dict[int, Exception]]:
    """(token ids by row position, rows that were cut, what was raised by row position): whatever is
    wrong with one row must not cost the others."""
    prompts, cut, wrong = {}, set(), {}
    for position, row in enumerate(test.to_dict("records")):
        try:
            ids, _ = encode_row(tokenizer, row, max_tokens=max_tokens, format=format)
            prompts[position] = ids
            # one that was cut has max_tokens but for some pieces that join in another way
            if len(ids) > 0.9 * max_tokens and loses_its_middle(
                tokenizer, row, max_tokens=max_tokens, format=format
            ):
                cut.add(position)
        except Exception as error:
            wrong[position] = error
    return prompts, cut, wrong
