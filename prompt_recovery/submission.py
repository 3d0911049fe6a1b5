"""test.csv -> submission.csv: whole and valid at every moment, however the run ends, and within a time budget.

Rows that can't be answered keep the fallback, with the reason counted; what stands in the journal is not done again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

from prompt_recovery.answers import NOT_FINITE, Recovered, answer_prompts
from prompt_recovery.combine import combine
from prompt_recovery.engine import Meter, Sampling, ready, spread_order
from prompt_recovery.recipe import Format
from prompt_recovery.submission_file import (
    SubmissionError,
    append_journal,
    check_submission,
    clean_answer,
    journal_path,
    read_journal,
    write_submission,
)
from prompt_recovery.tokenizer import encode_row

SLICE_ROWS = 512  # of one call of `answer_prompts`: many batches, since the last one of a call is a small one
SHORTEST = {"plain": 16, "json": 32, "reason_json": 128}  # tokens below which hardly any prompt fits into an answer
RESERVE = 1.1  # estimates of the time left were up to a tenth too low
GIVE_UP = 16  # rows that raise one after the other: the device or the model is broken, not the rows


class Plan(NamedTuple):
    """What each of the rows to come gets: answers, and at most so many tokens for each."""

    answers: int
    new_tokens: int


@dataclass
class _Run:
    """State of a run: what is answered, by what, and what it took."""

    test: pd.DataFrame
    path: Path
    journal: Path
    settings: dict[str, Any]
    finish: Callable[[list[str]], str]  # the prompts found for a row -> its one answer, "" if they say nothing
    started: float
    deadline: float
    write_seconds: float
    batch_tokens: int | None
    found: dict[int, list[Recovered]]
    answers: list[str]
    reasons: dict[int, str] = field(default_factory=dict)  # of rows that were not answered
    prompts: dict[int, list[int]] = field(default_factory=dict)  # token ids of the rows as the model is asked
    meters: dict[Plan, Meter] = field(default_factory=dict)
    ending: str = ""  # once it is clear that not all rows can be answered
    written: float = float("-inf")
    said: float = float("-inf")
    noted: float = 0.0
    plan: Plan = Plan(1, 1)

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started:6.0f} s] {text}", flush=True)

    def pending(self) -> list[int]:
        """Positions still to be answered, the longest first."""
        return [i for i in self.longest_first() if i not in self.found and i not in self.reasons]

    def longest_first(self) -> list[int]:
        return sorted(self.prompts, key=lambda i: (-len(self.prompts[i]), i))

    def slices(self, rows: int) -> list[list[int]]:
        """What is pending, in slices of rows of like length that a restart cuts in the same places; in an order in which
        those that are done are like those to come, or the shortest first where not all can be answered."""
        order = self.longest_first()
        pending = set(self.pending())
        parts = [order[n : n + rows] for n in range(0, len(order), rows)]
        parts = parts[::-1] if self.ending else spread_order(parts)
        return [kept for part in parts if (kept := [i for i in part if i in pending])]

    def note(self, position: int, found: list[Recovered]) -> None:
        self.found[position] = found
        answer = self.finish([each.prompt for each in found if each.how != "fallback"])
        if answer:
            self.answers[position] = answer
        else:
            broken = any(each.stopped == NOT_FINITE for each in found)
            self.reasons[position] = "logits not finite" if broken else "no prompt in the answer"

    def record(self, rows: list[tuple[int, list[Recovered]]], meter: Meter) -> None:
        """Take finished rows, and put them where a kill can't reach them."""
        started = time.monotonic()
        for position, found in rows:
            self.note(position, found)
        now = time.monotonic()
        meter.writing += now - started  # combining with an encoder on the CPU takes its time
        try:
            append_journal(self.journal, rows, now - self.noted)
        except OSError as error:
            self.say(f"{self.journal} can't be written ({error}): a restart would answer these rows again.")
        self.noted = now
        if now - self.written > self.write_seconds:
            self.save()
        if now - self.said > 30:
            self.said = now
            left = max(0.0, self.deadline - now)
            self.say(f"{self.progress()}, about {self.needed(self.plan):.0f} s to go, {left:.0f} s left in the budget")

    def progress(self) -> str:
        tokens = sum(meter.tokens_out for meter in self.meters.values())
        rate = tokens / max(sum(meter.seconds for meter in self.meters.values()), 1e-9)
        return f"{len(self.found)} of {len(self.test)} rows, {rate:.1f} tokens/s"

    def save(self) -> None:
        """Bring submission.csv up to date; if the disk is full, the last whole one stays."""
        try:
            write_submission(self.test, self.answers, self.path)
        except OSError as error:
            self.say(f"{self.path} can't be written ({error}): the one before stays. Free some space.")
            check_submission(self.test, self.path)
        self.written = time.monotonic()

    def encode(self, tokenizer: Any) -> None:
        """Encode each row, which also finds those that raise."""
        rows = self.test.to_dict("records")
        options: Any = {name: self.settings[name] for name in ("style", "system_placement")}
        options = dict(format=Format(**options))
        room = self.settings["max_tokens"] - self.settings["max_new_tokens"]
        encode_row(tokenizer, {"original_text": "", "rewritten_text": ""}, max_tokens=room, **options)
        for position, row in enumerate(rows):
            try:
                self.prompts[position] = encode_row(tokenizer, row, max_tokens=room, **options)[0]
            except Exception as error:  # whatever is wrong with one row must not cost the others
                self.fail(position, error)

    def fail(self, position: int, error: Exception) -> None:
        memory = isinstance(error, torch.OutOfMemoryError)
        self.reasons[position] = "out of memory" if memory else f"raised {type(error).__name__}"
        self.say(f"row {position} (id {self.test['id'].iloc[position]}) keeps the fallback: {str(error)[:300]}")

    # -- time

    def needed(self, plan: Plan) -> float:
        """Seconds that the pending rows take by this plan, from what reading a token and writing an answer took so far."""
        measured = {each: meter for each, meter in self.meters.items() if meter.batches}
        same = {each: meter for each, meter in measured.items() if each.answers == plan.answers} or measured
        if not same:
            return 0.0
        left = self.pending()
        rows = sum(meter.rows for meter in same.values())
        reading = sum(meter.seconds_a_token_in() * meter.rows for meter in same.values()) / rows
        writing = sum(
            meter.seconds_a_row() * meter.rows * plan.answers / each.answers
            * min(1.0, plan.new_tokens / max(meter.longest, 1))  # 0: all not finite
            for each, meter in same.items()
        ) / rows  # fmt: skip
        return reading * sum(len(self.prompts[i]) for i in left) + writing * len(left)

    def replan(self) -> bool:
        """Whether the rows to come now get less, since there is no time for more: first a single answer, then shorter
        ones; where that is too little, as many rows as can be."""
        left = max(0.0, self.deadline - time.monotonic())
        needed = self.needed(self.plan)
        same = [meter for plan, meter in self.meters.items() if plan.answers == self.plan.answers]
        # the first batch compiles: its measure alone is a poor one, unless it took a good part of the time
        first = sum(meter.batches for meter in same) == 1 and sum(meter.seconds for meter in same) < left / 10
        if self.ending or first or needed * RESERVE <= left:
            return False
        why = f"{len(self.pending())} rows would take {needed:.0f} s, {left:.0f} s are left"
        if self.plan.answers > 1:
            self.say(f"{why}: from here a single answer a row instead of {self.plan.answers}.")
            self.plan = Plan(1, self.plan.new_tokens)
            return True
        shortest = min(self.settings["max_new_tokens"], SHORTEST[self.settings["style"]])
        shorter = [int(self.settings["max_new_tokens"] * share) for share in (0.75, 0.5, 0.375, 0.25, 0.125)]
        plans = [Plan(1, tokens) for tokens in shorter if tokens > shortest] + [Plan(1, shortest)]
        plans = [plan for plan in plans if plan < self.plan]
        chosen = next((plan for plan in plans if self.needed(plan) * RESERVE <= left), None)
        if chosen is None:
            self.ending = "out of time"
            chosen = plans[-1] if plans else self.plan
            share = left / max(self.needed(chosen), 1e-9)
            self.say(f"{why}: even answers of {chosen.new_tokens} tokens are too slow. About {max(0, 1 - share):.0%} of the "
                     "rows to come, the longest, will keep the fallback.")  # fmt: skip
        else:
            self.say(f"{why}: from here answers end after {chosen.new_tokens} tokens at the latest.")
        self.plan = chosen
        return True

    def in_time(self) -> bool:
        return time.monotonic() + self.meters.get(self.plan, Meter()).slowest < self.deadline

    # -- answers

    def answer_slice(self, model: Any, tokenizer: Any, positions: list[int]) -> Exception | None:
        """Answer rows until they are done, the plan changes, or something raises, which is returned."""
        several = self.plan.answers > 1
        temperature = self.settings["temperature"] if several else 0.0
        sampling = Sampling(self.plan.answers, temperature, self.settings["top_p"], self.settings["seed"])
        meter = self.meters.setdefault(self.plan, Meter())
        results: Any = answer_prompts(
            model, tokenizer, [self.prompts[i] for i in positions], style=self.settings["style"], fallback_prompt="-",
            max_new_tokens=self.plan.new_tokens, sampling=sampling, numbers=positions, deadline=self.deadline,
            batch_tokens=self.batch_tokens, meter=meter, description=None,
        )  # fmt: skip
        counted = meter.rows
        rows: list[tuple[int, list[Recovered]]] = []
        try:
            for position, found in results:
                rows.append((positions[position], found))
                counted += 1
                if counted == meter.rows:  # all that is finished has been handed over
                    self.record(rows, meter)
                    rows = []
                    if self.replan():
                        return None
        except SubmissionError:
            raise
        except Exception as error:
            return error.with_traceback(None)  # a traceback holds the batch's memory
        finally:
            results.close()
        return None

    def answer(self, model: Any, tokenizer: Any, rows: int) -> None:
        """Answer what is pending, in slices; a slice that raises is halved until the rows that raise stand alone."""
        queue = self.slices(rows)
        raised = 0
        while queue and self.in_time():
            part = queue.pop(0)
            plan, ending = self.plan, self.ending
            error = self.answer_slice(model, tokenizer, part)
            rest = [i for i in part if i not in self.found]
            raised = raised if len(rest) == len(part) else 0
            if (plan, ending) != (self.plan, self.ending):
                queue = self.slices(rows)
            elif error is None and rest:
                break  # the deadline
            elif error is not None:
                if torch.cuda.is_available():
                    with suppress(RuntimeError):  # after a fault of the device nothing works, which the rows then say
                        torch.cuda.empty_cache()
                if len(rest) > 1:
                    queue[:0] = [rest[: len(rest) // 2], rest[len(rest) // 2 :]]
                    continue
                for position in rest:
                    self.fail(position, error)
                raised += 1
                if raised == GIVE_UP:
                    self.ending = f"given up after {GIVE_UP} rows in a row raised"
                    self.say(f"{self.ending}; the last: {error}")
                    break

    def report(self) -> pd.DataFrame:
        lines = []
        for position, answer in enumerate(self.answers):
            found = self.found.get(position, [])
            used = next((each for each in found if each.how != "fallback"), found[0] if found else None)
            by_model = used is not None and position not in self.reasons
            how = used.how if used and by_model else self.reasons.get(position, self.ending or "out of time")
            tokens = sum(each.tokens for each in found)
            lines.append((answer, "model" if by_model else "fallback", how, used.stopped if used else "", tokens))
        columns = ["answer", "source", "how", "stopped", "tokens"]
        table = pd.DataFrame(lines, columns=columns).astype({name: str for name in columns[:4]})
        table.insert(0, "id", self.test["id"].to_list())
        return table


def answer_test(
    model: Any,
    tokenizer: Any,
    test: pd.DataFrame,
    submission_csv: str | Path,
    *,
    fallback_prompt: str,
    time_budget_hours: float,
    style: str,
    system_placement: str,
    max_tokens: int,
    max_new_tokens: int,
    model_dir: str | Path | None = None,
    adapter_dir: str | Path | None = None,
    answers_per_row: int = 1,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    mean_prompt: str | None = None,
    how: str = "first",
    encoder: Any = None,
    threshold: float | None = None,
    started: float | None = None,
    batch_tokens: int | None = None,
    slice_rows: int = SLICE_ROWS,
    write_seconds: float = 10.0,
) -> pd.DataFrame:
    """Answer every row of test (of `data.read_test`) into submission_csv. Returns, in its order: id, answer, source (model
    or fallback), how (the parser's word, or why it is the fallback), stopped, tokens (of all answers to the row).

    model None: nothing is answered; the file gets what earlier runs finished, and fallbacks. Call it so before the model
    loads, and with the same settings afterwards. model_dir, adapter_dir: what the model was loaded from, by which (and by
    test and settings) a later run knows the rows that it need not answer again.
    time_budget_hours: of this run from `started` (time.monotonic(); now if None) and of those that it goes on from. If
    the measured speed is too low, a row gets one answer instead of answers_per_row, then shorter ones, then the fallback.
    how, mean_prompt, encoder, threshold: see `combine`; answers over 128 sentence-t5 tokens lose their end. temperature,
    top_p: of all answers but the first, which is greedy. seed, batch_tokens: see `generate`. slice_rows, write_seconds:
    rows of one call of `answer_prompts`, and the least time between two writes of submission_csv.
    Raises SubmissionError for a blank fallback, for several answers that nothing combines or the other way round, and where
    no whole file could be written; TokenizerError, TemplateError and ValueError for settings that fit no row. A row that
    raises keeps the fallback.
    """
    fallback = clean_answer(fallback_prompt)
    if not fallback:
        raise SubmissionError(
            "fallback_prompt is blank; a blank answer fails the whole submission. Give a real prompt."
        )
    if (answers_per_row > 1) != (how != "first" or threshold is not None):
        raise SubmissionError(
            f"answers_per_row={answers_per_row}, combine={how!r}, threshold={threshold}: several answers are for join, agree"
            " or a threshold, which do nothing with one. Set answers_per_row to 2 or more with them, or to 1 with first."
        )
    options: dict[str, Any] = dict(how=how, mean_prompt=mean_prompt, encoder=encoder, threshold=threshold)
    fallback = combine([fallback])
    combine([fallback], **options)  # settings that can't work raise here

    def finish(prompts: list[str]) -> str:
        prompts = [text for text in map(clean_answer, prompts) if text]
        return clean_answer(combine(prompts, **options)) if prompts else ""

    started = time.monotonic() if started is None else started
    settings = dict(
        style=style, system_placement=system_placement, max_tokens=max_tokens, max_new_tokens=max_new_tokens,
        answers_per_row=answers_per_row, temperature=temperature, top_p=top_p, seed=seed,
    )  # fmt: skip
    journal = journal_path(test, submission_csv, model_dir, adapter_dir, settings)
    found, spent = read_journal(journal)
    run = _Run(
        test, Path(submission_csv), journal, settings, finish, started, started + time_budget_hours * 3600 - spent,
        write_seconds, batch_tokens, {}, [fallback] * len(test), plan=Plan(answers_per_row, max_new_tokens), noted=started,
    )  # fmt: skip
    for position, answers in found.items():
        run.note(position, answers)
    if found:
        run.say(f"{len(found)} rows stand in {journal.name}, which took {spent:.0f} s")
    run.save()
    if model is None:
        run.ending = "no model"
    elif len(found) < len(test):
        try:
            run.encode(tokenizer)
            with ready(model) as prepared:
                run.answer(prepared, tokenizer, slice_rows)
        finally:
            run.save()
    check_submission(test, submission_csv)
    report = run.report()
    run.say(summary(report) + (f"; {run.progress()}" if run.meters else ""))
    return report


def summary(report: pd.DataFrame) -> str:
    """How many rows were answered by the model, and how many by the fallback and why."""
    by_model = report["source"] == "model"
    reasons = ", ".join(f"{n} {reason}" for reason, n in report.loc[~by_model, "how"].value_counts().items())
    return f"{len(report)} rows: {by_model.sum()} by the model, {(~by_model).sum()} by the fallback" + (
        f" ({reasons})" if reasons else ""
    )
