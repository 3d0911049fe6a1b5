"""A grid of settings: each cell trains an adapter, or takes the base as it is, and answers the same
held-out rows.

What a cell answered lies in a CSV named by a key of what it depends on; such a cell is not run
again. Scores are computed from the answers, so that ways to combine them cost nothing.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from prompt_recovery import adapter, data, files, metric, plots, splitting, training
from prompt_recovery.agreement import refuse_several
from prompt_recovery.answers import answer_prompts, encode_rows, or_fallback
from prompt_recovery.base import base_digest
from prompt_recovery.combine import agreements, combine, pick_threshold
from prompt_recovery.engine import Sampling, base_id
from prompt_recovery.examples import Example, usable_examples
from prompt_recovery.keys import answers_key, key
from prompt_recovery.recipe import Cell, Joined
from prompt_recovery.settings import SettingError

VARIES = ("adapter", "answers", "rows", "score")  # the kinds of settings that a grid may vary


class ComparisonError(ValueError):
    """A grid that can't be run."""


def make_cells(
    grid: Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]], **shared: Any
) -> list[Cell | Joined]:
    """The cells, the first of which is the reference; all are checked before one is run.

    grid: lists of values by name, of which every combination is a cell, or one mapping for each
    cell; {"adapters": [1, 2], "combine": "join"} is a cell in which those of cells 1 and 2 answer
    together. shared: other values than a Cell's defaults for all cells. Raises ComparisonError for
    other names, values that can't work, or equal cells.
    """
    if isinstance(grid, Mapping):
        single = [
            f"{name}={value!r}"
            for name, value in grid.items()
            if not isinstance(value, (list, tuple))
        ]
        if single:
            raise ComparisonError(
                f"grid has {', '.join(single)}: give a list of values for each name, or put it in "
                "shared."
            )
        parts = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    elif isinstance(grid, (list, tuple)) and all(isinstance(part, Mapping) for part in grid):
        parts = [dict(part) for part in grid]
    else:
        raise ComparisonError(
            f"grid={grid!r}: give a list of mappings, one a cell, or a mapping of names to lists."
        )
    names = Cell.names(*VARIES)
    given = [part for part in parts if "adapters" not in part or isinstance(grid, Mapping)]
    unknown = {str(name) for part in [*given, shared] for name in part} - set(names)
    if unknown:
        raise ComparisonError(
            f"{', '.join(sorted(unknown))} is no setting; there are {', '.join(names)}."
        )
    cells: list[Cell | Joined] = []
    wrong = []
    for number, part in enumerate(parts):
        try:
            together = "adapters" in part
            cells.append(Joined(**part) if together else Cell(**shared | part))
        except (SettingError, TypeError) as error:
            wrong.append(f"cell {number}: {error}")
    wrong = wrong or [
        f"cell {number}: adapters={list(cell.adapters)}: {each} is no cell with an adapter of its "
        "own; name cells that are trained."
        for number, cell in enumerate(cells)
        if isinstance(cell, Joined)
        for each in cell.adapters
        if not any(isinstance(c, Cell) and c.max_steps != 0 for c in cells[each : each + 1])
    ]
    if wrong:
        raise ComparisonError("\n".join(wrong))
    if not cells or any(cell in cells[:n] for n, cell in enumerate(cells)):
        raise ComparisonError(
            f"{len(cells)} cells, and none may stand twice: give each another value of some "
            "setting."
        )
    return cells


def read_split(
    cells: Sequence[Cell | Joined],
    train_csv: str | Path | Sequence[str | Path],
    eval_fraction: float,
    seed: int,
    output_dir: str | Path | None = None,
    encoder: Any = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(train, eval) rows of train_csv and of all files that cells name, cleaned, split once by
    prompt groups; the column file names the file. A cell takes its part of train with `rows_of`, so
    no cell trains on a prompt that is held out.

    The split is read from output_dir/split.csv where an earlier run left it; see
    `splitting.read_or_split`. Raises SeveralProcesses where this process was launched with others.
    """
    refuse_several(
        "A comparison",
        "start one script a card, each with its own CUDA_VISIBLE_DEVICES, its part of grid and its "
        "own output_dir",
    )
    own = [cell.train_csv for cell in cells if isinstance(cell, Cell)]
    named = [_paths(each) for each in [train_csv, *own] if each]
    names = list(dict.fromkeys(path for paths in named for path in paths))
    rows, account = data.clean_rows(data.read_rows(names))
    print(data.describe(rows, account))
    path = Path(output_dir) / "split.csv" if output_dir else None
    train, held_out = splitting.read_or_split(rows, path, eval_fraction, seed, encoder, again=True)
    print(splitting.describe_split(train, held_out))
    return train, held_out


def _paths(train_csv: str | Path | Sequence[str | Path]) -> list[str]:
    paths = [train_csv] if isinstance(train_csv, (str, Path)) else train_csv
    return [str(Path(path)) for path in paths]


def rows_of(cell: Cell, train_rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that a cell trains on: its files, its filter, its number. Raises ComparisonError if
    too few are left."""
    rows = train_rows
    if cell.train_csv:
        rows = rows[rows["file"].isin(_paths(cell.train_csv))]
    if cell.row_filter:
        try:
            rows = rows.query(cell.row_filter)
        except Exception as error:  # whatever a text that is no query raises
            raise ComparisonError(
                f"row_filter={cell.row_filter!r}: {error}. Give a query for pandas."
            ) from error
    wanted = len(rows) if cell.train_rows is None else cell.train_rows
    if not len(rows) or wanted > len(rows) or wanted < 1:
        raise ComparisonError(
            f"A cell wants {wanted} rows, and train_csv and row_filter leave {len(rows)}: {cell}."
        )
    if wanted < len(rows):
        rows = rows.sample(frac=1, random_state=cell.seed).head(
            wanted
        )  # a smaller train_rows is a subset of a larger one
    return rows.reset_index(drop=True)


def check_cells(
    cells: Sequence[Cell | Joined],
    tokenizer: PreTrainedTokenizerFast,
    train_rows: pd.DataFrame,
    eval_rows: pd.DataFrame,
    model_dir: str | Path,
) -> None:
    """Raises ComparisonError naming the cells that can't be trained on their rows, or can't answer,
    before one is run."""
    wrong = []
    for number, cell in enumerate(cells):
        if isinstance(cell, Joined):
            continue
        try:
            rows = rows_of(cell, train_rows)
            if cell.max_steps != 0:
                adapter.check_target_modules(cell.target_modules, model_dir)
                left_out = len(rows) - len(examples_of(cell, tokenizer, rows))
                if left_out:
                    print(
                        f"cell {number}: {left_out} of {len(rows)} rows can't be taught and are "
                        "left out"
                    )
            room = cell.max_tokens - cell.max_new_tokens
            encode_rows(
                tokenizer,
                eval_rows,
                max_tokens=room,
                format=cell.format,
                examples=shots_of(cell, rows),
            )
        except ValueError as error:
            wrong.append(f"cell {number}: {error}")
    if wrong:
        raise ComparisonError("\n".join(wrong))


def shots_of(cell: Cell, rows: pd.DataFrame) -> list[dict[Any, Any]]:
    """The rows that stand as examples before each row that is answered. Raises ComparisonError for
    too few rows."""
    if cell.few_shot > len(rows):
        raise ComparisonError(
            f"few_shot={cell.few_shot}, and the cell has {len(rows)} rows: give fewer, or more "
            "rows."
        )
    return rows.sample(cell.few_shot, random_state=cell.seed).to_dict("records")


def run_cells(cells: Sequence[Cell | Joined], *rows: Any, **options: Any) -> list[pd.DataFrame]:
    """`run_cell`'s table of each cell; that of joined cells holds their answers one after the
    other, and takes no run."""
    tables = {n: run_cell(c, *rows, **options) for n, c in enumerate(cells) if isinstance(c, Cell)}
    for number, cell in enumerate(cells):
        if isinstance(cell, Joined):
            tables[number] = joined([tables[each] for each in cell.adapters])
    return [tables[number] for number in range(len(cells))]


def joined(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    table = pd.concat(tables, ignore_index=True)
    return table.assign(
        number=table.groupby("id", sort=False).cumcount(),
        seconds=sum(each["seconds"].iloc[0] for each in tables),
        adapter=" + ".join(each["adapter"].iloc[0] for each in tables),
    )


def run_cell(
    cell: Cell,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    train_rows: pd.DataFrame,
    eval_rows: pd.DataFrame,
    output_dir: str | Path,
    *,
    model_dir: str | Path,
    fallback_prompt: str = "Please improve this text.",
) -> pd.DataFrame:
    """What the cell answers to eval_rows, one line an answer: id, number, answer, how, stopped,
    tokens, seconds (of the whole cell's answering), adapter (its folder's name, "" for the base).
    Read from output_dir if the cell was run before; adapters there serve other cells of the same
    training, and training that was killed goes on. base is left as it was.

    few-shot examples stand before rows that are answered; training sees none.
    """
    if any(isinstance(module, BaseTunerLayer) for module in base.modules()):
        raise ComparisonError(
            "base holds a LoRA, of a cell that was interrupted, say: load the base again."
        )
    rows = rows_of(cell, train_rows)
    trained = cell.max_steps != 0
    # what the answers depend on, itself: the base as loaded, what it is trained on and asked, and
    # how it is read
    loaded = base_digest(base)
    examples = examples_of(cell, tokenizer, rows) if trained else []
    room = cell.max_tokens - cell.max_new_tokens
    prompts = encode_rows(
        tokenizer, eval_rows, max_tokens=room, format=cell.format, examples=shots_of(cell, rows)
    )
    made_of = key(loaded, cell.values("adapter"), examples)
    adapter_dir = Path(output_dir) / f"adapter-{made_of}" if trained else None
    answering: Any = base
    if adapter_dir is not None and not adapter_dir.is_dir():
        answering = _train(cell, base, base_id(model_dir), tokenizer, examples, adapter_dir)
    try:
        asked = cell.values("answers") | dict(fallback_prompt=fallback_prompt)
        named = answers_key(
            loaded, adapter_dir, tokenizer, eval_rows["id"].to_list(), prompts, asked
        )
        answers_csv = Path(output_dir) / f"answers-{named}.csv"
        if answers_csv.is_file():
            return files.read_csv(answers_csv, ("number", "tokens", "seconds"))
        if adapter_dir is not None and answering is base:
            answering = adapter.load_adapter(base, adapter_dir, model_dir)
        table = _answer(cell, answering, tokenizer, prompts, eval_rows, fallback_prompt)
    finally:
        if answering is not base:
            answering.unload()
    files.write_csv(table.assign(adapter=adapter_dir.name if adapter_dir else ""), answers_csv)
    return files.read_csv(answers_csv, ("number", "tokens", "seconds"))


def _answer(
    cell: Cell, model: Any, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[Sequence[int]],
    eval_rows: pd.DataFrame, fallback_prompt: str,
) -> pd.DataFrame:  # fmt: skip
    temperature = cell.temperature if cell.answers_per_row > 1 else 0.0
    sampling = Sampling(cell.answers_per_row, temperature, cell.top_p, cell.seed)
    started = time.monotonic()
    results = answer_prompts(
        model,
        tokenizer,
        prompts,
        style=cell.style,
        max_new_tokens=cell.max_new_tokens,
        sampling=sampling,
        stop_at_object=False,  # else JSON would never be seen to end by EOS
    )
    lines = [
        (
            eval_rows["id"].iloc[position],
            number,
            *or_fallback(found, fallback_prompt),
            found.stopped,
            found.tokens,
        )
        for position, answers in sorted(results)
        for number, found in enumerate(answers)
    ]
    table = pd.DataFrame(lines, columns=["id", "number", "answer", "how", "stopped", "tokens"])
    return table.assign(seconds=round(time.monotonic() - started, 2))


def _train(
    cell: Cell, base: PreTrainedModel, base_name: str, tokenizer: PreTrainedTokenizerFast,
    examples: Sequence[Example], adapter_dir: Path,
) -> Any:  # fmt: skip
    lora = adapter.add_lora(
        base, base=base_name, r=cell.lora_r, alpha=cell.lora_alpha, dropout=cell.lora_dropout,
        target_modules=cell.target_modules, seed=cell.seed,
    )  # fmt: skip
    working = adapter_dir.with_name(adapter_dir.name.replace("adapter", "training"))
    try:
        training.train(
            lora, tokenizer, examples, [], replace(cell, output_dir=str(working), resume=True)
        )
        adapter.save_adapter(lora, adapter_dir, cell.format)
    except BaseException:  # the next cell gets the base as it was, after an interrupt too
        lora.unload()
        raise
    shutil.rmtree(working / "checkpoints")
    return lora


def examples_of(
    cell: Cell, tokenizer: PreTrainedTokenizerFast, rows: pd.DataFrame
) -> list[Example]:
    """The rows as this cell trains on them; those that can't be taught are left out. Raises
    TrainingError where none is left."""
    _, by_id, _ = usable_examples(tokenizer, rows, max_tokens=cell.max_tokens, format=cell.format)
    examples = list(by_id.values())
    if cell.supervise == "text":
        return [{"input_ids": each["input_ids"], "labels": each["input_ids"]} for each in examples]
    return examples


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

    answers: tables of run_cells. Raises ComparisonError where one is not about eval_rows.
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
            both = [
                combine(each, cell.combine, mean_prompt=mean_prompt, encoder=needed)
                for each in groups
            ]
            with_mean = metric.sharpened_cosine(both, truths, encoder)
            alone = metric.sharpened_cosine([mean_prompt] * len(truths), truths, encoder)
            line |= dict(scs_with_mean=with_mean.mean(), scs_mean_alone=alone.mean())
            if isinstance(cell, Joined) or cell.answers_per_row > 1:
                agreed = np.array([agreements(each, encoder).mean() for each in groups])
                threshold = pick_threshold(agreed, with_mean, alone)
                line["threshold"] = threshold
                if threshold is not None:
                    line["scs_with_threshold"] = np.where(
                        agreed < threshold, alone, with_mean
                    ).mean()
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
