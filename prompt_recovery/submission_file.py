"""submission.csv and the journal of finished rows beside it, on the disk: written so that a kill
leaves both whole."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pandas as pd

from prompt_recovery.answers import Recovered
from prompt_recovery.combine import LIMIT, count_tokens
from prompt_recovery.time_budget import RowPlan
from prompt_recovery.unwrap import CONTROL_TOKENS, is_prompt


class SubmissionError(ValueError):
    """A submission that must not be handed in, or settings that would make one."""


# --- the file -------------------------------------------------------------------------------------


def clean_answer(text: str) -> str:
    """The text in one line, without special tokens spelled out, control characters and halves of
    surrogate pairs; "" if it says nothing, or what pandas reads as missing."""
    text = "".join(" " if unicodedata.category(char) == "Cc" else char for char in text)
    text = "".join(
        char for char in text if unicodedata.category(char) not in ("Cs", "Cn") and char != "\ufeff"
    )
    while CONTROL_TOKENS.search(text):  # what is left of <</s>s> is one again
        text = CONTROL_TOKENS.sub("", text)
    text = " ".join(text.split())
    return text if is_prompt(text) else ""


def write_submission(test: pd.DataFrame, answers: Sequence[str], path: str | Path) -> None:
    """Write id, rewrite_prompt for the test rows in order: beside the target and moved over it, so
    that a reader never sees half a file. Raises OSError (a full disk); what stood there before then
    stays."""
    frame = pd.DataFrame({"id": test["id"].to_list(), "rewrite_prompt": list(answers)}, dtype=str)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    try:
        _write(partial, frame.to_csv(index=False).encode(), os.O_TRUNC)
        os.replace(partial, target)
    except OSError:
        # the space it takes is wanted, and the first error is the one to report
        with suppress(OSError):
            partial.unlink()
        raise


def check_submission(
    test: pd.DataFrame, path: str | Path, answers: Sequence[str] | None = None
) -> None:
    """Read the file back: the same ids in the same order, two columns, and answers that are neither
    blank nor longer than the scorer reads, without special tokens or control characters, and these
    ones, if they are given. Raises SubmissionError otherwise."""
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
        scored = pd.read_csv(path, dtype=str)  # by pandas' defaults, as a scorer reads it
    except (OSError, ValueError) as error:
        raise SubmissionError(f"{path} is no submission: {error}") from error
    if list(frame.columns) != ["id", "rewrite_prompt"]:
        raise SubmissionError(
            f"{path} has the columns {list(frame.columns)}; it needs id, rewrite_prompt."
        )
    if frame["id"].to_list() != test["id"].to_list():
        raise SubmissionError(
            f"{path} does not have the ids of test.csv in its order; write it from test.csv again."
        )
    prompts = frame["rewrite_prompt"]
    for wrong, what in (
        (
            prompts.str.strip() == "",
            "are blank, which fails the whole submission; set fallback_prompt",
        ),
        (
            scored["rewrite_prompt"].isna(),
            "are read as missing by pandas, which fails the whole submission; set fallback_prompt",
        ),
        (
            prompts != prompts.map(clean_answer),
            "hold control characters or special tokens; write them with clean_answer",
        ),
        (
            prompts.map(count_tokens) > LIMIT,
            f"are longer than {LIMIT} sentence-t5 tokens, which scores badly; shorten them",
        ),
    ):
        if wrong.any():
            raise SubmissionError(f"{path}: rows {frame.index[wrong].to_list()[:5]} {what}.")
    other = [] if answers is None else frame.index[prompts != list(answers)].to_list()
    if other:
        raise SubmissionError(
            f"{path} does not hold what was found for {len(other)} of {len(test)} rows, the first "
            f"is row {other[0]}: its last write failed. Don't hand it in: free some space, or give "
            f"another submission_csv with a copy of {journal_path(path)} beside it, and run this "
            "again."
        )


def _write(path: Path, data: bytes, mode: int) -> None:
    """mode: os.O_TRUNC or os.O_APPEND. What is written is on the disk when it returns."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | mode, 0o644)
    try:
        while data:
            data = data[os.write(file, data) :]
        os.fsync(file)
    finally:
        os.close(file)


# --- the journal ----------------------------------------------------------------------------------


def journal_path(submission_csv: str | Path) -> Path:
    """Where finished rows are kept, each line under the key of what its answers depend on."""
    return Path(f"{submission_csv}.journal")


def read_journal(path: Path, key: str) -> tuple[dict[int, tuple[RowPlan, list[Recovered]]], float]:
    """(plan and answers by row position, seconds that earlier runs took) of the lines of this key,
    of `keys.answers_key`. Of a row that was answered again, the answers by the larger plan. A line
    that was cut off by a kill is passed over."""
    found: dict[int, tuple[RowPlan, list[Recovered]]] = {}
    seconds = 0.0
    for line in path.read_bytes().split(b"\n") if path.is_file() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry.get("key") == key:
            seconds += entry["seconds"]
            plan = RowPlan(*entry["plan"])
            for position, answers in entry["rows"]:
                if position not in found or plan > found[position][0]:
                    found[position] = plan, [Recovered(*answer) for answer in answers]
    return found, seconds


@contextmanager
def lent(journal: Path) -> Iterator[None]:
    """Inside the with block the journal's disk space is free; afterwards the journal is there
    again, as much of it as fits."""
    content = journal.read_bytes() if journal.is_file() else b""
    journal.unlink(missing_ok=True)
    try:
        yield
    finally:
        try:
            _write(journal, content, os.O_TRUNC)
        except OSError as error:
            print(
                f"{journal} gave its room to the file ({error}): a restart would answer the rows "
                "again that it lost."
            )


def append_journal(
    path: Path,
    key: str,
    adapter: str,
    plan: RowPlan,
    rows: Sequence[tuple[int, list[Recovered]]],
    seconds: float,
) -> None:
    """Add rows that were answered; they are on the disk when it returns.

    Args:
        path: of `journal_path`.
        key: of what the answers depend on, see `keys.answers_key`.
        adapter: its name, for people.
        plan: by which the rows were answered.
        rows: (position in test.csv, its answers).
        seconds: that they took.

    Raises OSError.
    """
    entry = {
        "key": key,
        "adapter": adapter,
        "plan": plan,
        "seconds": round(seconds, 3),
        "rows": rows,
    }
    line = json.dumps(entry).encode() + b"\n"
    if path.exists() and path.stat().st_size:
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            # a killed run's last line may have no end
            line = line if file.read() == b"\n" else b"\n" + line
    _write(path, line, os.O_APPEND)
