"""Submissions of anyone's beside the truth: their scores, how they differ, and where they fail.

Rows are matched by id alone. What can't be matched is refused, and whatever was passed over is said
by name.
"""

from __future__ import annotations

import base64
import html
import tempfile
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
from pandas._libs.parsers import STR_NA_VALUES

from prompt_recovery import data, files, metric, plots
from prompt_recovery.combine import LIMIT, count_tokens
from prompt_recovery.prompt_groups import prompt_groups
from prompt_recovery.tables import DataError, read_table

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

WORST = 20  # rows of a file that are shown beside their truth
TASKS = 15  # prompt groups that are shown, those that cost most
EDGES = (5, 10, 20, 40)  # words, up to which lengths are told apart
BANDS = ("0 to 5", "6 to 10", "11 to 20", "21 to 40", "over 40")


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
        places = _quoted(rows["source"][unsaid])
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


# --- the report -----------------------------------------------------------------------------------


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """One line a file: file, rows, scs, low and high of its 95% interval, by_task (the mean over
    prompt groups of their means), exact_match, the shares empty, repeated and cut, words of the
    median answer."""
    lines = []
    for name, part in rows.groupby("file", sort=False):
        low, high = metric.bootstrap_interval(part["scs"].to_numpy())
        lines.append(
            dict(
                file=name,
                rows=len(part),
                scs=part["scs"].mean(),
                low=low,
                high=high,
                by_task=part.groupby("task")["scs"].mean().mean(),
                exact_match=metric.exact_match(part["answer"].to_list(), part["truth"].to_list()),
                **part[["empty", "repeated", "cut"]].mean(),
                words=int(np.median(_words(part["answer"]))),
            )
        )
    return pd.DataFrame(lines)


def differences(rows: pd.DataFrame) -> pd.DataFrame:
    """One line a pair of files: file, over, rows (that both have), gain of the first over the
    second, low and high of its paired 95% interval, shown (whether the interval leaves out 0)."""
    scores = {name: part.set_index("id")["scs"] for name, part in rows.groupby("file", sort=False)}
    lines = []
    for over, name in combinations(scores, 2):
        both = pd.concat([scores[name], scores[over]], axis=1, join="inner").to_numpy()
        if len(both):
            gain, low, high = metric.paired_difference(both[:, 0], both[:, 1])
            shown = "yes" if low > 0 or high < 0 else "no"
            lines.append((name, over, len(both), gain, low, high, shown))
    return pd.DataFrame(lines, columns=["file", "over", "rows", "gain", "low", "high", "shown"])


def repeated_answers(rows: pd.DataFrame) -> pd.DataFrame:
    """The most frequent answer of each file that has one twice: file, rows, scs (mean), answer."""
    lines = []
    for name, part in rows[rows["repeated"]].groupby("file", sort=False):
        answer = part["answer"].mode().iloc[0]
        own = part[part["answer"] == answer]
        lines.append((name, len(own), own["scs"].mean(), answer))
    return pd.DataFrame(lines, columns=["file", "rows", "scs", "answer"])


def by_length(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Rows and mean score of each file by the words of the column truth or answer."""
    bands = np.array(BANDS)[np.searchsorted(EDGES, _words(rows[column]))]
    found = rows.groupby([pd.Categorical(bands, BANDS), "file"], observed=True)["scs"]
    table = found.agg(["size", "mean"]).unstack("file")
    result = pd.DataFrame({f"words of {column}": table.index.astype(str)})
    for name in rows["file"].unique():
        result[f"rows {name}"] = table["size", name].fillna(0).astype(int).to_numpy()
        result[f"scs {name}"] = table["mean", name].to_numpy()
    return result


def _words(texts: pd.Series) -> list[int]:
    return [len(text.split()) for text in texts]


def by_task(rows: pd.DataFrame) -> pd.DataFrame:
    """One line a prompt group, the one that costs the files most first: task (a truth of it), rows,
    cost (what it takes from the mean score), then each file's scs."""
    means = rows.pivot_table(values="scs", index="task", columns="file", sort=False)
    lost = (1 - rows["scs"]).groupby(rows["task"]).sum() / len(rows)
    table = pd.DataFrame(
        {
            "task": rows.groupby("task")["truth"].first(),
            "rows": rows.groupby("task")["id"].nunique(),
            "cost": lost,
        }
    )
    for name in rows["file"].unique():
        table[f"scs {name}"] = means[name]
    return table.sort_values("cost", ascending=False, kind="stable").reset_index(drop=True)


def sections(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The tables of a report by their titles, the most important first."""
    tasks = by_task(rows)
    tables = {
        "Scores, 95% interval": summary(rows),
        "Differences over the same rows, 95% interval": differences(rows),
        "Most frequent answers": repeated_answers(rows),
        "By length of the truth": by_length(rows, "truth"),
        "By length of the answer": by_length(rows, "answer"),
        f"By prompt group: {min(TASKS, len(tasks))} of {len(tasks)}, those that cost most": (
            tasks.head(TASKS)
        ),
    }
    for name, part in rows.groupby("file", sort=False):
        worst = part.nsmallest(WORST, "scs")
        tables[f"The worst of {len(part)} rows of {name}"] = worst[["id", "scs", "truth", "answer"]]
    return {title: table for title, table in tables.items() if len(table)}


def text_report(scored: Scored, encoder: str) -> str:
    """For a terminal: what matters most stands last."""
    parts = []
    for title, table in reversed(sections(scored.rows).items()):
        shown = beside(table) if {"truth", "answer"} <= set(table) else _as_text(table)
        parts.append(f"{title}\n{shown}")
    return "\n\n".join([*parts, "\n".join([*scored.notes, f"encoder {encoder}"])])


def _as_text(table: pd.DataFrame) -> str:
    texts = table.select_dtypes(exclude="number").columns
    table = table.assign(**{name: table[name].map(_one_line) for name in texts})
    left = {name: f"{{:<{table[name].str.len().max()}}}".format for name in texts}
    return str(
        table.to_string(
            index=False,
            justify="left",
            float_format="{:.3f}".format,
            formatters=left,
            na_rep="-",
        )
    )


def beside(table: pd.DataFrame) -> str:
    """Scored rows, each answer under its truth, for a terminal."""
    return "\n".join(
        f"{row['scs']:6.3f}  {row['id']}\n        truth   {_one_line(row['truth'], 300)}\n"
        f"        answer  {_one_line(row['answer'], 300)}"
        for row in table.to_dict("records")
    )


def _one_line(text: str, most: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 3]}..."


STYLE = """body { font-family: sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse }
td, th { text-align: left; vertical-align: top; white-space: pre-wrap; padding: .2em .8em .2em 0;
  border-bottom: 1px solid #ddd }"""


def html_report(scored: Scored, encoder: str) -> str:
    """One page that needs no other file, with the plot and whole texts."""
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "scores.png"
        plots.plot_scores(scored.rows, summary(scored.rows), picture)
        image = base64.b64encode(picture.read_bytes()).decode()
    with pd.option_context("display.max_colwidth", None):
        tables = [
            f"<h2>{html.escape(title)}</h2>\n"
            + table.to_html(index=False, border=0, float_format="{:.3f}".format, na_rep="-")
            for title, table in sections(scored.rows).items()
        ]
    names = ", ".join(scored.rows["file"].unique())
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in scored.notes)
    return "\n".join(
        [
            f'<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n<style>{STYLE}</style>',
            f"<title>Scores of {html.escape(names)}</title>",
            f"<h1>Scores of {html.escape(names)}</h1>",
            f"<p>Encoder {html.escape(encoder)}</p>\n<ul>{notes}</ul>",
            tables[0],
            f'<p><img alt="scores" src="data:image/png;base64,{image}"></p>',
            *tables[1:],
            "</html>\n",
        ]
    )


def write_page(scored: Scored, encoder: str, path: str | Path) -> None:
    files.write_text(html_report(scored, encoder), Path(path))
