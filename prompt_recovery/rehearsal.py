"""A rehearsal: the submission on rows whose prompts are known, scored before it is handed in.

The prompts are read here alone, when every row has its answer.
"""

from __future__ import annotations

import os
import time
from itertools import cycle, islice
from pathlib import Path

import pandas as pd

from prompt_recovery import metric, score_report, scoring
from prompt_recovery.engine import ModelError, TooLittleMemory, on_t4s, plan
from prompt_recovery.inputs import RERUN
from prompt_recovery.submission_job import Job
from prompt_recovery.tables import columns_of
from prompt_recovery.time_budget import seconds_needed

HIDDEN_ROWS = 1300  # of the competition
T4S = (14.7, 14.7)  # GiB that Kaggle's two leave to a process
WORST = 5


def report(job: Job, answers: pd.DataFrame) -> None:
    """Print the worst rows of submission.csv, its score, the seconds a row, and what they make for
    a hidden test set here and, reckoned, on two T4s. Nothing where test_csv holds no prompts.

    answers: of `submission.report`. The encoder is that of the settings, or MiniLM.
    """
    settings = job.settings
    took = time.monotonic() - job.started
    if os.environ.get(RERUN) or "rewrite_prompt" not in columns_of(Path(settings.test_csv)):
        return
    try:
        print(_score(job, answers))
    except (ValueError, OSError) as error:  # whatever it is, the answers stand
        print(f"no score: {error}")
    print(_seconds(job, took))


def _score(job: Job, answers: pd.DataFrame) -> str:
    settings = job.settings
    folder = settings.encoder_dir or metric.minilm_dir()
    encoder = metric.load_encoder(folder, device="cpu")
    rows, notes = scoring.score_files([settings.submission_csv], settings.test_csv, encoder)
    line = score_report.summary(rows).iloc[0]
    by_model = rows["id"].isin(answers.loc[answers["source"] == "model", "id"])
    worst = score_report.beside(rows.nsmallest(WORST, "scs"))
    lines = [
        f"the worst of {len(rows)} rows\n{worst}\n",
        *notes,
        f"rehearsal: SCS {line['scs']:.3f} (95%: {line['low']:.3f} to {line['high']:.3f}) on "
        f"{len(rows)} rows, {line['by_task']:.3f} by prompt group, {line['exact_match']:.0%} word "
        f"for word; encoder {metric.encoder_name(folder)}",
    ]
    for source, part in (("model", rows[by_model]), ("fallback", rows[~by_model])):
        if len(part):
            lines.append(f"  {len(part)} rows by the {source}: {part['scs'].mean():.3f}")
    return "\n".join(lines)


def _seconds(job: Job, took: float) -> str:
    """Seconds of all adapters together: each answers every row."""
    members = [member for member in job.members if any(m.batches for m in member.meters.values())]
    meters = [meter for member in members for meter in member.meters.values() if meter.batches]
    if not members:
        return "no row was answered in this run, so there is no time to measure"
    a_row = read = written = here = 0.0
    lengths = []
    for member in members:
        own = member.meters.values()
        rows = sum(meter.rows for meter in own)
        a_row += sum(meter.seconds for meter in own) / rows
        read += sum(meter.tokens_in for meter in own) / rows
        written += sum(meter.tokens_out for meter in own) / rows
        lengths.append(list(islice(cycle(map(len, member.prompts.values())), HIDDEN_ROWS)))
        here += seconds_needed(member.plan, member.meters, lengths[-1])
    rest = max(0.0, took - sum(meter.wall for meter in meters))
    first = all(meter.batches == 1 for meter in meters)
    by = f" by {len(members)} of {len(job.members)} adapters" if len(job.members) > 1 else ""
    lines = [
        f"{a_row:.3g} s a row on this machine{by}, with {read:.0f} tokens to read and "
        f"{written:.0f} to write; {rest:.0f} s for all else",
        f"{HIDDEN_ROWS} such rows here: {_sum(rest, here)}"
        + (" (from one batch, the first, which is slow)" if first else ""),
    ]
    try:
        planned = plan(job.settings.model_dir, T4S)
        reading = writing = 0.0
        for member, rows_of in zip(members, lengths, strict=True):
            longest = max(meter.longest for meter in member.meters.values())
            loading, each, _ = on_t4s(planned, rows_of, longest)
            reading += each
            writing += on_t4s(planned, rows_of * member.plan.answers, longest).writing
        lines.append(
            f"{HIDDEN_ROWS} such rows on two T4s, reckoned: {_sum(loading, reading, writing)} to "
            "load, read and write"
            if loading + reading + writing >= 1
            else "on two T4s: the model is too small to be reckoned by its bytes and FLOPs"
        )
    except (ModelError, TooLittleMemory, ValueError) as error:
        lines.append(f"on two T4s: {error}")
    return "\n".join(lines)


def _sum(*seconds: float) -> str:
    parts = [round(each) for each in seconds]
    whole = sum(parts)
    return " + ".join(map(str, parts)) + (
        f" = {whole} s" if whole < 120 else f" s = {whole / 60:.0f} minutes"
    )
