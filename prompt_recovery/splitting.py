"""A split of the rows with no task on both sides, kept in split.csv."""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from prompt_recovery.data import DataError, normalise
from prompt_recovery.files import read_csv, write_csv
from prompt_recovery.prompt_groups import embedding_threshold, prompt_groups

LEAST = 5  # prompts that each side has, where a tenth of all are as many
SEVERAL = 5  # groups of a held-out side, at least, where there are enough of that size
LARGEST = 0.5  # share of a side's rows in one group from which a warning is due
# Groups from which on those that choose and those of the report differ. The demo has 12, and
# half of them choose by luck: step 50 scored 0.38 on six, 0.29 on rows of all (LOG.md, 2026-11-27).
MANY = 20
LEAST_TO_HOLD_BACK = 40  # held-out rows, from which a part is held back for the report
SIDES = ("train", "held_out")  # what the rows' own column split may hold
SPLIT_COLUMNS = ("id", "rewrite_prompt", "group", "split", "made_with")


def _given(rows: pd.DataFrame) -> np.ndarray | None:
    """Whether each row is held out by the rows' own column split, bool [rows]; None without one."""
    if "split" not in rows or not rows["split"].str.strip().any():
        return None
    wrong = rows[~rows["split"].isin(SIDES)]
    if len(wrong):
        where = f" in {wrong['origin'].iloc[0]}" if "origin" in wrong else ""
        raise DataError(
            f"The column split holds {wrong['split'].iloc[0]!r}{where}: write {' or '.join(SIDES)} "
            "in every row, or remove the column, and the rows are split here."
        )
    held_out = rows["split"].eq("held_out").to_numpy()
    if held_out.all():
        raise DataError("The column split holds out every row: none is left to train on.")
    return held_out


def _sides(
    rows: pd.DataFrame, given: np.ndarray | None, eval_fraction: float, seed: int, encoder: Any
) -> tuple[list[int], np.ndarray]:
    """Each row's group, and whether it is held out, bool [rows]."""
    if not 0 <= eval_fraction < 1:
        raise DataError(
            f"eval_fraction={eval_fraction}: give a share from 0 up to, but not including, 1."
        )
    if len(rows) == 0:
        raise DataError("There are no rows to split: see the account of what was dropped.")
    prompts = rows["rewrite_prompt"].tolist()
    groups = prompt_groups(prompts, encoder=encoder)
    if given is not None:
        return groups, given
    if eval_fraction == 0:
        return groups, np.zeros(len(rows), dtype=bool)
    return groups, _held_out(groups, [normalise(prompt) for prompt in prompts], eval_fraction, seed)


def _held_out(groups: list[int], wordings: list[str], fraction: float, seed: int) -> np.ndarray:
    """Whether each row is held out, bool [rows]."""
    sizes = Counter(groups)
    if len(sizes) < 2:
        raise DataError(
            f"All {len(groups)} rows have the same or nearly the same prompt, so none can be held "
            "out without leaking. Add rows with other prompts, or set eval_fraction=0."
        )
    prompts = {group: 0 for group in sizes}  # distinct ones
    for group, _ in set(zip(groups, wordings, strict=True)):
        prompts[group] += 1
    least_groups = min(LEAST, -(-len(sizes) // 10))
    least_prompts = min(LEAST, -(-sum(prompts.values()) // 10))
    order = sorted(sizes)
    random.Random(seed).shuffle(order)
    target = fraction * len(groups)
    most_groups = int(max(fraction, 0.5) * len(sizes))
    chosen: set[int] = set()
    size, left_prompts = 0, sum(prompts.values())

    def leaves_enough(group: int) -> bool:
        left = len(sizes) - len(chosen) - 1
        return left >= least_groups and left_prompts - prompts[group] >= min(
            least_prompts, left_prompts - 1
        )

    # first those of which several make a side: no one group should decide what the side says
    for group in sorted(order, key=lambda group: sizes[group] > target / SEVERAL):
        grown = size + sizes[group]
        if (
            len(chosen) < most_groups
            and abs(grown - target) < abs(size - target)
            and leaves_enough(group)
        ):
            chosen.add(group)
            size, left_prompts = grown, left_prompts - prompts[group]
    for group in sorted(order, key=sizes.__getitem__):  # the small ones first: they overshoot least
        held_prompts = sum(prompts.values()) - left_prompts
        if len(chosen) >= least_groups and held_prompts >= least_prompts:
            break
        if group not in chosen and leaves_enough(group):
            chosen.add(group)
            left_prompts -= prompts[group]
    return np.array([group in chosen for group in groups])


def read_or_split(
    rows: pd.DataFrame,
    path: str | Path | None,
    eval_fraction: float,
    seed: int,
    encoder: Any = None,
    again: bool = False,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Split into (train, held out) so that no prompt group stands on both sides; row order is kept,
    and both tables have the column group. The split is written to a CSV: id, rewrite_prompt, group,
    split (train or held_out), made_with. Same rows, fraction, seed and encoder: same split. A
    column split of the rows' own, with train or held_out in each, is taken as it is instead.

    Groups are shuffled with the seed and held out while that brings the number of rows nearer to
    the fraction. A large group is passed over rather than overshooting, those of a fifth of the
    side or more are the last to go, and half of the groups stay for training (or their share, if
    that is less), so that no group, however large, pushes the variety to one side. Both sides get
    at least a tenth of the groups and of the distinct prompts, or 5, as far as the groups allow.

    Args:
        rows: with id and rewrite_prompt.
        path: the CSV, such as output_dir/split.csv; None: it is not kept.
        eval_fraction, seed: the part of the rows that is held out, 0 for none, and what draws it.
        encoder: tells prompts that are one task; None: their words alone do.
        again: where the file stands, the split is read from it, so that it depends on nothing
            installed.

    Raises DataError where it was then made of other rows, or with another fraction or seed; for an
    eval_fraction outside [0, 1), and where one side would be empty.
    """
    given = _given(rows)
    made_with = f"eval_fraction={eval_fraction} seed={seed}"
    if given is not None:
        made_with = "the column split"
    path = None if path is None else Path(path)
    if again and path and path.is_file():
        try:
            kept = read_csv(path)
        except ValueError as error:
            raise DataError(f"{path} is damaged ({error}): remove it to split anew.") from error
        _check_kept(kept, rows, path, made_with, given)
        groups = kept["group"].factorize()[0].tolist()
        held_out = kept["split"].eq("held_out").to_numpy()
        print(f"the split is that of {path}")
    else:
        started = time.monotonic()
        groups, held_out = _sides(rows, given, eval_fraction, seed, encoder)
        if encoder is not None:
            print(
                "prompts count as one task by their words, or from a cosine of "
                f"{embedding_threshold(encoder):.2f} of their embeddings: {len(set(groups))} "
                f"tasks, found in {time.monotonic() - started:.0f} s"
            )
        if path:
            table = rows[["id", "rewrite_prompt"]].assign(group=groups)
            write_csv(
                table.assign(split=np.where(held_out, "held_out", "train"), made_with=made_with),
                path,
            )
    rows = rows.drop(columns="split", errors="ignore").assign(group=groups)
    if given is not None:
        both = len({*rows["group"][held_out]} & {*rows["group"][~held_out]})
        print(
            f"the split is the rows' own; {both} of {len(set(groups))} tasks stand on both sides"
            + (": the score of what is held out is too favourable" if both else "")
        )
    return rows[~held_out].reset_index(drop=True), rows[held_out].reset_index(drop=True)


def _check_kept(
    kept: pd.DataFrame, rows: pd.DataFrame, path: Path, made_with: str, given: np.ndarray | None
) -> None:
    """Raises DataError for a split that is not one of these rows, made with these settings.

    given: whether each row is held out by the rows' own column; None: groups stand on one side.
    """
    if list(kept.columns) != list(SPLIT_COLUMNS):
        raise DataError(
            f"{path} has the columns {list(kept.columns)}, not {list(SPLIT_COLUMNS)}: remove it."
        )
    sides = kept.groupby("group")["split"].agg(set)
    wrong = sides[~sides.isin([{"train"}, {"held_out"}])]
    if len(wrong) and given is None:
        raise DataError(
            f"{path}: group {wrong.index[0]!r} has the split {sorted(wrong.iloc[0])}. Give all "
            f"rows of a group either train or held_out, or remove {path.name} to split anew."
        )
    for name in ("id", "rewrite_prompt"):
        if kept[name].to_list() != rows[name].to_list():
            raise DataError(
                f"{path} is the split of other rows: {len(kept)} rows there, {len(rows)} now, "
                f"and the column {name} differs. Give those rows back, or take another "
                f"output_dir, or remove {path.name} to split anew."
            )
    if given is not None and not np.array_equal(kept["split"].eq("held_out"), given):
        raise DataError(
            f"{path} is another split than that of the rows' own column: remove {path.name}, or "
            "take another output_dir."
        )
    if not kept["made_with"].eq(made_with).all():
        raise DataError(
            f"{path} was made with {kept['made_with'].iloc[0]}, now it is {made_with}. Give "
            f"those settings back, or take another output_dir, or remove {path.name} to split "
            "anew."
        )


def hold_back(held_out: pd.DataFrame, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(rows that choose a checkpoint, rows for the report) of the held-out ones of `read_or_split`.

    Half of them choose, about 64 at most: other prompt groups than those of the report where there
    are 20 or more, else other rows. With fewer than 40 rows all are for the report, and choose too:
    a line says so.
    """
    if len(held_out) < LEAST_TO_HOLD_BACK:
        if len(held_out):
            print(
                f"{len(held_out)} held-out rows, fewer than {LEAST_TO_HOLD_BACK}: the same rows "
                "choose the checkpoint and are reported, so the score is too favourable. Raise "
                "eval_fraction, or give more rows."
            )
        return held_out, held_out
    share = min(64, len(held_out) // 2) / len(held_out)
    apart = held_out["group"].nunique() >= MANY
    if apart:
        wordings = held_out["rewrite_prompt"].map(normalise).to_list()
        chooses = _held_out(held_out["group"].to_list(), wordings, share, seed)
    else:
        chooses = np.random.default_rng(seed).permutation(len(held_out)) < share * len(held_out)
    print(
        f"{chooses.sum()} of the held-out rows choose the checkpoint, {(~chooses).sum()} are for "
        f"the report{'' if apart else f', of the same prompts: there are fewer than {MANY} groups'}"
    )
    return held_out[chooses].reset_index(drop=True), held_out[~chooses].reset_index(drop=True)


def describe_split(train: pd.DataFrame, held_out: pd.DataFrame) -> str:
    """A line a side of `read_or_split`: rows, distinct prompts, groups, the largest group's share;
    a warning where that is above a half."""
    lines, warnings = [], []
    for side, part in (("to train on", train), ("held out", held_out)):
        line = f"{len(part)} rows {side}"
        if len(part):
            counts = part["group"].value_counts()
            share = counts.iloc[0] / len(part)
            line += (
                f", {part['rewrite_prompt'].map(normalise).nunique()} distinct prompts in "
                f"{len(counts)} groups, {share:.0%} of the rows in the largest"
            )
            if share > LARGEST:
                prompt = part.loc[part["group"] == counts.index[0], "rewrite_prompt"].iloc[0]
                warnings.append(
                    f"WARNING: {share:.0%} of the rows {side} have the prompt {prompt[:80]!r} or "
                    "nearly that. A model that answers it to everything looks good there: add "
                    "rows with other prompts."
                )
        lines.append(line)
    return "\n".join([*lines, *warnings])
