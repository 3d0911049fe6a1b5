"""What `scoring.score_files` found, as tables, as text and as a page."""

from __future__ import annotations

import base64
import html
import tempfile
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from prompt_recovery import files, metric, plots
from prompt_recovery.scoring import Scored

WORST = 20  # rows of a file that are shown beside their truth
TASKS = 15  # prompt groups that are shown, those that cost most
EDGES = (5, 10, 20, 40)  # words, up to which lengths are told apart
BANDS = ("0 to 5", "6 to 10", "11 to 20", "21 to 40", "over 40")


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
