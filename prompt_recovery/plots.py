"""Pictures of a training, and tables with whole texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from prompt_recovery.examples import Example
from prompt_recovery.files import replaced

if TYPE_CHECKING:
    from pandas.io.formats.style import Styler


def plot_log(log: pd.DataFrame, path: str | Path, **about: str) -> None:
    """Train and eval loss, and the eval score if it was measured, against the step; the best step
    marked. A PNG, with `about` as texts in it."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for column, label in (("loss", "train"), ("eval_loss", "eval")):
        part = log[log[column].notna()]
        axes.plot(
            part["step"],
            part[column],
            marker="o" if column == "eval_loss" else None,
            ms=3,
            label=label,
        )
    scored = log["eval_scs"].notna().any()
    if scored:
        part = log[log["eval_scs"].notna()]
        right = axes.twinx()
        right.plot(
            part["step"],
            part["eval_scs"],
            color="tab:green",
            marker="s",
            ms=3,
            ls="--",
            label="eval SCS (right)",
        )
        right.set(ylim=(0, None), ylabel="SCS of held-out answers")
    if log["eval_loss"].notna().any():
        order = ["eval_scs", "eval_loss"] if scored else ["eval_loss"]
        best = (
            log.round({"eval_scs": 6})
            .sort_values(order, ascending=[name != "eval_scs" for name in order])
            .iloc[0]
        )
        value = f"SCS {best['eval_scs']:.3f}" if scored else f"eval loss {best['eval_loss']:.3f}"
        axes.axvline(
            best["step"],
            color="grey",
            lw=0.8,
            ls=":",
            label=f"best: {value} at step {best['step']:.0f}",
        )
    axes.set(xlabel="step", ylabel="loss on answer and EOS (nats a token)", ylim=(0, None))
    figure.legend(frameon=False, loc="outside upper center", ncols=4)
    save_figure(figure, Path(path), **about)


def plot_lengths(examples: Sequence[Example], max_tokens: int, path: str | Path) -> None:
    """Histogram of the examples' lengths in tokens, with the limit marked, as a PNG."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 2.5), layout="constrained")
    axes.hist([len(example["input_ids"]) for example in examples], bins=40)
    axes.axvline(max_tokens, color="tab:red", lw=1, label=f"max_tokens = {max_tokens}")
    axes.set(xlabel="tokens in an example", ylabel="examples")
    axes.legend(frameon=False)
    save_figure(figure, Path(path))


def plot_scores(rows: pd.DataFrame, summary: pd.DataFrame, path: str | Path) -> None:
    """How the scores of each file's rows are spread, and beside it in the same colours their means
    with intervals, as a PNG.

    rows, summary: of scoring.score_files and score_report.summary.
    """
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 3 + 0.2 * len(summary)), layout="constrained"
    )
    for place, (_, part) in enumerate(rows.groupby("file", sort=False)):
        left.hist(part["scs"], bins=40, range=(-1, 1), histtype="step")
        line = summary.iloc[place]
        around = [[line["scs"] - line["low"]], [line["high"] - line["scs"]]]
        right.errorbar(line["scs"], place, xerr=around, fmt="o", capsize=3)
    left.set(xlabel="SCS of a row", ylabel="rows", xlim=(min(0.0, rows["scs"].min()), 1))
    right.set(xlabel="mean SCS, 95% interval", yticks=range(len(summary)))
    right.set_yticklabels(summary["file"])
    right.margins(y=0.3)
    right.invert_yaxis()
    save_figure(figure, Path(path))


def whole_texts(table: pd.DataFrame) -> Styler:
    """The table for a notebook: texts whole and as they are, numbers with two decimals."""
    numbers = table.select_dtypes("float").columns
    table = table.copy()
    table[numbers] = table[numbers].round(2) + 0.0  # -0.00 is 0.00
    shown = table.style.hide(axis="index").format(precision=2, escape="html")
    shown.set_table_styles(
        [{"selector": "td, th", "props": "text-align: left; vertical-align: top"}]
    )
    return shown.set_properties(None, **{"white-space": "pre-wrap"})


def save_figure(figure: Any, path: Path, **about: str) -> None:
    """Write a PNG, with `about` as texts in it, and close the figure."""
    import matplotlib.pyplot as plt

    with replaced(path) as partial:
        figure.savefig(partial, dpi=120, metadata=about, format="png")
    plt.close(figure)
