"""Submissions of anyone's beside the truth: their scores, how they differ, and where they fail.

Rows are matched by id alone. What can't be matched is refused, and whatever was passed over is said
by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
from pandas._libs.parsers import STR_NA_VALUES

from prompt_recovery import data, metric
from prompt_recovery.combine import LIMIT, count_tokens
from prompt_recovery.prompt_groups import prompt_groups
from prompt_recovery.tables import DataError, read_table

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class Scored(NamedTuple):
    """What `score_files` found.

    rows: one line a file and row: file, id, truth, task (number of its prompt group), answer, scs,
    empty (it counts 0), repeated (it stands in another row too), cut (longer than the encoder
    reads). notes: what is odd about the files, in sentences.
    """

    rows: pd.DataFrame
    notes: list[str]


# --- reading --------------------------------------------------------------------------------------


def read_truths(paths: str | Path | Sequence[str | Path]) -> tuple[pd.DataFrame, list[str]]:
    """(id and truth of every row of the files, "" where it has none; what is odd about them).

    The files need no texts; where one has no ids, its rows are called as `data.read_rows` calls
    them. Raises DataError as that does, and where no row has a truth.
    """
    rows = data.read_rows(paths, ["rewrite_prompt"])
    unsaid = rows["rewrite_prompt"].str.strip().isin(["", *data.MISSING])
    notes = []
    if unsaid.any():
        places = _quoted(rows["origin"][unsaid])
        notes.append(f"{unsaid.sum()} rows without a truth are not scored: {places}.")
    if unsaid.all():
        raise DataError(f"{rows['file'].iloc[0]}: rewrite_prompt is blank in all {len(rows)} rows.")
    truths = rows["rewrite_prompt"].where(~unsaid, "")
    return pd.DataFrame({"id": rows["id"], "truth": truths}), notes


def read_answers(path: str | Path, name: str) -> tuple[pd.DataFrame, list[str]]:
    """(id and answer of every row of a submission, what is odd about it, by the file's name).

    The answers are those of the column rewrite_prompt, of the only column beside id, or of `after`
    in a training's predictions.csv, whose rewrite_prompt is the truth. Raises DataError for a file
    whose rows or answers can't be told.
    """
    header, records = read_table(Path(path), ("id", "rewrite_prompt"))
    others = [each for each in header if each not in ("id", "") and "unnamed" not in each]
    column = "rewrite_prompt"
    if {"scs_after", "after"} <= set(header):
        column = "after"
    elif column not in header and len(others) == 1:
        column = others[0]
    notes = []
    for wanted, why in (("id", "match its rows with the truth"), (column, "tell its answers")):
        if header.count(wanted) != 1:
            raise DataError(
                f"{name} has {header.count(wanted)} columns {wanted}, and one is needed to {why}; "
                f"its columns are {header}. Give a file with id, rewrite_prompt."
            )
    if not records:
        raise DataError(f"{name} has a header but no rows: give at least one row.")
    if column != "rewrite_prompt":
        notes.append(f"{name}: the answers are those of its column {column}.")
    if passed := [each for each in header if each not in ("id", column)]:
        notes.append(
            f"{name}: its other columns, {', '.join(map(repr, passed))}, are passed over. A "
            "submission has id, rewrite_prompt alone."
        )
    places = [header.index("id"), header.index(column)]
    table = pd.DataFrame(
        [[record[place] for place in places] for record in records], columns=["id", "answer"]
    )
    once = table.drop_duplicates()
    doubled = once["id"].duplicated()
    if doubled.any():
        raise DataError(
            f"{name} has several answers to {_named(once['id'][doubled].unique())}: leave one for "
            "each."
        )
    if len(once) < len(table):
        again = table.loc[table["id"].duplicated(), "id"].unique()
        notes.append(f"{name} has the same answer again to {_named(again)}: each row counts once.")
    return once.reset_index(drop=True), notes


def _matched(
    name: str, table: pd.DataFrame, truths: pd.DataFrame
) -> tuple[pd.DataFrame, list[str]]:
    """The answers in the order of the truths, with them. Raises DataError for an id that no truth
    has."""
    known, own = set(truths["id"]), set(table["id"])
    unknown = [each for each in table["id"] if each not in known]
    if unknown:
        raise DataError(
            f"{name} has {_named(unknown)} of {len(table)} that no truth has, whose ids are such "
            f"as {_quoted(truths['id'])}. Ids are matched as they are written: give the truth that "
            "belongs to this file, or take these rows out."
        )
    notes = []
    wanted = truths["id"][truths["truth"] != ""]
    missing = [each for each in wanted if each not in own]
    if missing:
        notes.append(
            f"{name} has no answer to {_named(missing)} of {len(wanted)}: its score is that of "
            f"the other {len(wanted) - len(missing)}."
        )
    rows = truths.merge(table, on="id")
    if rows["id"].to_list() != table["id"].to_list():
        notes.append(f"{name} is in another order than the truth: its rows are matched by id.")
    rows = rows[rows["truth"] != ""]
    if rows.empty:
        raise DataError(f"{name} answers {len(table)} rows, and none of them has a truth.")
    return rows, notes


def _quoted(values: Sequence[str] | pd.Series | np.ndarray) -> str:
    return ", ".join(map(repr, list(values)[:5])) + (", ..." if len(values) > 5 else "")


def _named(ids: Sequence[str] | pd.Series | np.ndarray) -> str:
    return f"{len(ids)} id{'s' * (len(ids) > 1)} ({_quoted(ids)})"


# --- scoring --------------------------------------------------------------------------------------


def score_files(
    paths: Sequence[str | Path],
    truth_csv: str | Path | Sequence[str | Path],
    encoder: SentenceTransformer,
) -> Scored:
    """Score each file against the truths. An empty answer, or one that a scorer's pandas reads as
    missing, counts 0.

    Args: paths: CSV or what `tables.read_table` reads. truth_csv: with id and rewrite_prompt, such
        as a file of rows. encoder: of `metric.load_encoder`; it reads as far as it does by itself.

    Raises: DataError: a file given twice, or one that can't be matched; see `read_answers`.
    """
    truths, notes = read_truths(truth_csv)
    parts = []
    for name, path in zip(_names(paths), paths, strict=True):
        table, odd = read_answers(path, name)
        rows, unmatched = _matched(name, table, truths)
        parts.append(rows.assign(file=name))
        notes += odd + unmatched
    rows = pd.concat(parts, ignore_index=True)
    answered = rows.drop_duplicates("id")
    tasks = prompt_groups(answered["truth"].to_list(), encoder=encoder)
    rows["task"] = rows["id"].map(dict(zip(answered["id"], tasks, strict=True)))
    rows["empty"] = (rows["answer"].str.strip() == "") | rows["answer"].isin(STR_NA_VALUES)
    rows["scs"] = 0.0
    given = ~rows["empty"]
    rows.loc[given, "scs"] = metric.sharpened_cosine(
        rows["answer"][given].to_list(),
        rows["truth"][given].to_list(),
        encoder,
        show_progress_bar=True,
    )
    wordings = pd.DataFrame({"file": rows["file"], "answer": rows["answer"].map(data.normalise)})
    rows["repeated"] = wordings.duplicated(keep=False) & given
    rows["cut"] = _longer_than_read(rows["answer"].to_list(), encoder)
    for each, part in rows.groupby("file", sort=False):
        notes += _odd_answers(str(each), part)
    if len({tuple(part["id"]) for _, part in rows.groupby("file")}) > 1:
        notes.append(
            "The files do not answer the same rows, so their scores can't be compared; the "
            "differences are of the rows that both have."
        )
    return Scored(rows, notes)


def _names(paths: Sequence[str | Path]) -> list[str]:
    """The files' names, with as many of their folders as tell them apart."""
    given = [Path(path).resolve() for path in paths]
    twice = [path for path, n in Counter(given).items() if n > 1]
    if twice:
        raise DataError(f"{twice[0]} is given more than once: name each file once.")
    depth = 1
    while len({path.parts[-depth:] for path in given}) < len(given):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in given]


def _longer_than_read(texts: Sequence[str], encoder: SentenceTransformer) -> list[bool]:
    if encoder.max_seq_length is None:
        return [False] * len(texts)
    read = encoder.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
    return [len(ids) > encoder.max_seq_length for ids in read]


def _odd_answers(name: str, rows: pd.DataFrame) -> list[str]:
    notes = []
    if rows["empty"].any():
        notes.append(
            f"{name} says nothing, or what pandas reads as missing, to "
            f"{_named(rows['id'][rows['empty']])}. Each counts 0 here; in the competition one "
            "fails the whole file."
        )
    long = rows["answer"].map(count_tokens) > LIMIT
    if long.any():
        notes.append(
            f"{name} has answers of more than {LIMIT} pieces of sentence-t5 to "
            f"{_named(rows['id'][long])}: they score badly there."
        )
    if len(rows) > 1 and (rows["answer"] == rows["truth"]).all():
        notes.append(f"{name}: every answer is its truth, word for word. Is it the truth itself?")
    return notes
