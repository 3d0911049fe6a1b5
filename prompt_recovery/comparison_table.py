"""What a comparison's cells scored, as a table, a picture and advice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from prompt_recovery import metric, plots
from prompt_recovery.combine import agreements, combine, pick_threshold
from prompt_recovery.comparison_grid import VARIES, ComparisonError
from prompt_recovery.recipe import Cell, Joined


def answer_groups(table: pd.DataFrame) -> list[list[str]]:
    """The answers of each row of a run_cell's table, in its order, as a submission combines them:
    those in which a prompt was found, or else the fallback."""
    groups = [group for _, group in table.groupby("id", sort=False)]
    found = [group.loc[group["how"] != "fallback", "answer"].to_list() for group in groups]
    return [
        each or group["answer"].to_list()[:1] for each, group in zip(found, groups, strict=True)
    ]


def result_table(
    cells: Sequence[Cell | Joined],
    answers: Sequence[pd.DataFrame],
    eval_rows: pd.DataFrame,
    encoder: Any,
    *,
    mean_prompt: str | None = None,
) -> pd.DataFrame:
    """One line a cell: the settings in which cells differ, scs, low and high of its 95% interval,
    gain over the first cell with its paired interval, scs_recovered (a row without a prompt counts
    0; in scs the fallback's score does, as in a submission), exact_match, seconds and tokens
    (written) a row, the shares of answers parsed and of those that ended by EOS, and the adapter's
    folder.

    With a mean_prompt also scs_with_mean, where it stands behind the answer, scs_mean_alone, and
    for cells of several answers the threshold of agreement under which it alone does better (see
    `pick_threshold`) with scs_with_threshold on these same rows.

    Where there are joined cells, also their members in adapters, the one with the best score in
    best, and the gain over it with its paired interval: gain_over_best, gain_over_best_low and
    gain_over_best_high.

    Args:
        cells: of `comparison_grid.make_cells`.
        answers: their tables, of `comparison.run_cells`.
        eval_rows: that they answered.
        encoder: of `metric.load_encoder`.
        mean_prompt: None leaves its columns out.

    Raises ComparisonError where one is not about eval_rows.
    """
    varied = [
        name
        for name in Cell.names(*VARIES)
        if len({getattr(cell, name) for cell in cells if hasattr(cell, name)}) > 1
    ]
    truths = eval_rows["rewrite_prompt"].to_list()
    lines: list[dict[str, Any]] = []
    scored: list[np.ndarray] = []
    for cell, table in zip(cells, answers, strict=True):
        groups = answer_groups(table)
        if table["id"].drop_duplicates().to_list() != eval_rows["id"].to_list():
            raise ComparisonError(
                "The answers of a cell are not those of eval_rows: give run_cell's tables of these "
                "rows."
            )
        needed = encoder if cell.combine != "first" else None
        given = [combine(each, cell.combine, encoder=needed) for each in groups]
        scores = metric.sharpened_cosine(given, truths, encoder)
        scored.append(scores)
        line: dict[str, Any] = {name: str(getattr(cell, name, "")) for name in varied}
        line |= metric.score_line(scores, scored[0])
        found = table["how"].ne("fallback").groupby(table["id"], sort=False).any().to_numpy()
        line["scs_recovered"] = np.where(found, scores, 0).mean()
        if mean_prompt:
            line |= _with_mean_prompt(cell, groups, truths, encoder, mean_prompt)
        line |= dict(
            exact_match=metric.exact_match(given, truths),
            seconds_a_row=table["seconds"].iloc[0] / len(truths),
            tokens_a_row=table["tokens"].sum() / len(truths),
            parsed=(table["how"] != "fallback").mean(),
            stopped_by_eos=(table["stopped"] == "eos").mean(),
            adapter=table["adapter"].iloc[0],
        )
        lines.append(line)
    for cell, line, scores in zip(cells, lines, scored, strict=True):
        if isinstance(cell, Joined):
            best = max(cell.adapters, key=lambda n: scored[n].mean())
            gain, low, high = metric.paired_difference(scores, scored[best])
            line |= dict(adapters=" + ".join(map(str, cell.adapters)), best=best)
            line |= dict(gain_over_best=gain, gain_over_best_low=low, gain_over_best_high=high)
    return pd.DataFrame(lines)


def _with_mean_prompt(
    cell: Cell | Joined, groups: list[list[str]], truths: list[str], encoder: Any, mean_prompt: str
) -> dict[str, Any]:
    needed = encoder if cell.combine != "first" else None
    both = [combine(each, cell.combine, mean_prompt=mean_prompt, encoder=needed) for each in groups]
    with_mean = metric.sharpened_cosine(both, truths, encoder)
    alone = metric.sharpened_cosine([mean_prompt] * len(truths), truths, encoder)
    line = dict(scs_with_mean=with_mean.mean(), scs_mean_alone=alone.mean())
    if isinstance(cell, Joined) or cell.answers_per_row > 1:
        agreed = np.array([agreements(each, encoder).mean() for each in groups])
        line["threshold"] = threshold = pick_threshold(agreed, with_mean, alone)
        if threshold is not None:
            line["scs_with_threshold"] = np.where(agreed < threshold, alone, with_mean).mean()
    return line


def recommend(table: pd.DataFrame) -> str:
    """For each joined cell of a `result_table` a line: whether joining beats its best member."""
    lines = []
    for number, line in table[table["best"].notna()].iterrows() if "best" in table else ():
        low, high = line["gain_over_best_low"], line["gain_over_best_high"]
        verdict = (
            "joining is better: give them as adapter_dir"
            if low > 0
            else "joining is worse: take the member alone"
            if high < 0
            else "the rows do not tell them apart: take the member alone, which takes less time"
        )
        lines.append(
            f"cell {number}, {line['adapters']}: {line['gain_over_best']:+.3f} against its best "
            f"member, cell {line['best']:.0f} (95%: {low:+.3f} to {high:+.3f}); {verdict}"
        )
    return "\n".join(lines)


def plot_results(table: pd.DataFrame, path: str | Path) -> None:
    """Score with its interval against seconds a row, one point a cell, numbered as in the table. A
    PNG."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    heights = [table["scs"] - table["low"], table["high"] - table["scs"]]
    axes.errorbar(table["seconds_a_row"], table["scs"], yerr=heights, fmt="o", capsize=3, lw=1)
    for number, (x, y) in enumerate(zip(table["seconds_a_row"], table["scs"], strict=True)):
        axes.annotate(str(number), (x, y), xytext=(5, 5), textcoords="offset points")
    axes.set(xlabel="seconds a row", ylabel="SCS, 95% interval", xlim=(0, None))
    plots.save_figure(figure, Path(path))
