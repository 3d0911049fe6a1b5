"""A submission as it stands while it is answered: its rows, what was found for them, and what
submission.csv holds."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch

from prompt_recovery.answers import NOT_FINITE, Recovered
from prompt_recovery.combine import LIMIT
from prompt_recovery.data import normalise
from prompt_recovery.engine import Meter
from prompt_recovery.recipe import Format, SubmissionSettings
from prompt_recovery.submission_file import (
    check_submission,
    clean_answer,
    lent,
    write_submission,
)
from prompt_recovery.time_budget import RowPlan

NO_MODEL = "no model"
OUT_OF_TIME = "out of time"
FULL = errno.ENOSPC, errno.EDQUOT  # a disk, or the part of it that this user may fill


@dataclass
class Member:
    """An adapter of a submission, or the base alone, and what it answered."""

    name: str
    adapter_dir: Path | None  # None: the base alone
    format: Format
    key: str  # of its answers, see `keys.answers_key`
    asked: RowPlan
    plans: list[RowPlan]  # the one that is followed, then lesser ones
    # token ids of the rows as the model is asked
    prompts: dict[int, list[int]]
    cut: set[int]  # rows whose texts were cut to fit
    found: dict[int, list[Recovered]] = field(default_factory=dict)
    by: dict[int, RowPlan] = field(default_factory=dict)  # the plan of each row in found
    again: set[int] = field(default_factory=set)  # rows in found that are being answered as asked
    reasons: dict[int, str] = field(default_factory=dict)  # of rows that it gave no prompt to
    meters: dict[RowPlan, Meter] = field(default_factory=dict)
    # why rows without a reason of their own have no answer; "" while all may get one
    ending: str = NO_MODEL

    @property
    def plan(self) -> RowPlan:
        return self.plans[0]

    def longest_first(self) -> list[int]:
        return sorted(self.prompts, key=lambda i: (-len(self.prompts[i]), i))

    def waits(self, position: int) -> bool:
        """Whether the row is still to be answered."""
        done = position in self.found or position in self.reasons
        return position in self.again or not done

    def pending(self) -> list[int]:
        """Positions still to be answered, the longest first."""
        return [position for position in self.longest_first() if self.waits(position)]

    def less(self, position: int) -> str:
        """By how much less than asked the row was answered; "" if by nothing, or not at all. A
        shorter limit counts for an answer that it cut."""
        by, found = self.by.get(position, self.asked), self.found.get(position, [])
        if by.answers < self.asked.answers:
            return f"{by.answers} of {self.asked.answers} answers"
        cut = any(each.stopped == "length" for each in found)
        shorter = cut and by.new_tokens < self.asked.new_tokens
        return f"{by.new_tokens} of {self.asked.new_tokens} tokens" if shorter else ""

    def lengths_to_come(self) -> list[int]:
        return [len(self.prompts[i]) for i in self.pending()]

    def answered(self, position: int) -> list[Recovered]:
        """Its answers to a row; none where no prompt is in them."""
        return [] if position in self.reasons else self.found.get(position, [])


@dataclass
class Job:
    """A submission as it stands: what is answered, by which adapters, and what it took."""

    test: pd.DataFrame
    settings: SubmissionSettings
    max_prompt_tokens: int
    journal: Path
    # the prompts found for a row -> its one answer, "" if they say nothing
    finish: Callable[[list[str]], str]
    fallback: str
    answers: list[str]  # what submission.csv holds
    members: list[Member]  # they answer one after the other
    started: float
    deadline: float
    noted: float  # when the journal was last written
    seed: int = 0
    # those for which there seems to be too little time, as was said last
    late: list[Member] = field(default_factory=list)
    written: float = float("-inf")
    said: float = float("-inf")
    write_seconds: float = 10.0  # at least, between two writes of submission.csv
    # of one call of `answer_prompts`: many batches, since the last one of a call is a small one
    slice_rows: int = 512
    batch_tokens: int | None = None  # see `generate`

    @property
    def found(self) -> dict[int, list[Recovered]]:
        """All members' answers by row position."""
        found: dict[int, list[Recovered]] = {}
        for member in self.members:
            for position, answers in member.found.items():
                found.setdefault(position, []).extend(answers)
        return found

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started:6.0f} s] {text}", flush=True)

    def note(self, member: Member, position: int, plan: RowPlan, found: list[Recovered]) -> None:
        member.found[position], member.by[position] = found, plan
        member.again.discard(position)
        member.reasons.pop(position, None)  # of a lesser answer
        if not any(clean_answer(each.prompt) for each in found if each.prompt is not None):
            broken = any(each.stopped == NOT_FINITE for each in found)
            member.reasons[position] = "logits not finite" if broken else "no prompt in the answer"
        answers = [each for one in self.members for each in one.answered(position)]
        prompts = [each.prompt for each in answers if each.prompt is not None]
        self.answers[position] = self.finish(prompts) or self.fallback

    def save(self, last: bool = False) -> None:
        """Bring submission.csv up to date; if the disk is full, the last whole one stays. The last
        write gets the journal's disk space, if need be."""
        path = self.settings.submission_csv
        try:
            try:
                write_submission(self.test, self.answers, path)
            except OSError as error:
                if not last or error.errno not in FULL:
                    raise
                with lent(self.journal):
                    write_submission(self.test, self.answers, path)
        except OSError as error:
            full = error.errno in (*FULL, errno.EFBIG)
            remedy = "Free some space." if full else "Give another submission_csv."
            self.say(f"{path} can't be written ({error}): the one before stays. {remedy}")
            check_submission(self.test, path)
        self.written = time.monotonic()

    def fail(self, member: Member, position: int, error: Exception) -> None:
        if position in member.found:
            member.again.discard(position)
            keeps = "keeps its shorter answer"
        else:
            memory = isinstance(error, torch.OutOfMemoryError)
            reason = "out of memory" if memory else f"raised {type(error).__name__}"
            member.reasons[position] = reason
            alone = len(self.members) == 1
            keeps = "keeps the fallback" if alone else f"goes without {member.name}"
        self.say(
            f"row {position} (id {self.test['id'].iloc[position]}) {keeps}: {str(error)[:300]}"
        )

    def lacks(self, position: int) -> list[str]:
        """What the settings ask for and the row's answer is without."""
        found, mean = self.found.get(position, []), normalise(self.settings.mean_prompt or "")
        if not any(member.answered(position) for member in self.members):
            return []
        prompts = [text for each in found if (text := clean_answer(each.prompt or ""))]
        answer = normalise(self.answers[position])
        stand = [normalise(text) in answer for text in prompts]
        alone = self.settings.threshold is not None and answer == mean
        whole = all(stand) if self.settings.combine == "join" else any(stand)
        lacking = {
            "the middle of their texts": any(position in member.cut for member in self.members),
            "an answer's end, at max_new_tokens": any(each.stopped == "length" for each in found),
            "a prompt in some of their answers": len(prompts) < len(found),
            f"a part of what was found, at {LIMIT} tokens": not alone and not whole,
            f"mean_prompt, at {LIMIT} tokens": mean not in answer,
        }
        return [what for what, lacks in lacking.items() if lacks]

    def progress(self) -> str:
        meters = [meter for member in self.members for meter in member.meters.values()]
        rate = sum(meter.tokens_out for meter in meters) / max(
            sum(meter.seconds for meter in meters), 1e-9
        )
        rows = [f"{len(member.found)} of {len(self.test)} rows" for member in self.members]
        if len(rows) > 1:
            rows = [f"{text} by {each.name}" for text, each in zip(rows, self.members, strict=True)]
        return f"{', '.join(rows)}, {rate:.1f} tokens/s"
